"""Changes that programs make to the modules and methods of a model, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .extension_points import SIZE, Change
from .official_calls import numbers

# Each method by its owner in a model; a program patches it on that object, on its class, or in a subclass.
METHODS = (
    ("", "preprocess"),
    ("", "postprocess_masks"),
    ("image_encoder", "forward"),
    ("image_encoder.patch_embed", "forward"),
    ("image_encoder.blocks.0", "forward"),
    ("image_encoder.blocks.0.attn", "forward"),
    ("image_encoder.blocks.1.attn", "forward"),
    ("image_encoder.blocks.0.mlp", "forward"),
    ("image_encoder.neck.1", "forward"),
    ("prompt_encoder", "forward"),
    ("prompt_encoder", "get_dense_pe"),
    ("prompt_encoder", "_embed_points"),
    ("prompt_encoder", "_embed_boxes"),
    ("prompt_encoder", "_embed_masks"),
    ("prompt_encoder", "_get_batch_size"),
    ("prompt_encoder", "_get_device"),
    ("prompt_encoder.pe_layer", "forward"),
    ("prompt_encoder.pe_layer", "forward_with_coords"),
    ("prompt_encoder.pe_layer", "_pe_encoding"),
    ("mask_decoder", "forward"),
    ("mask_decoder", "predict_masks"),
    ("mask_decoder.transformer", "forward"),
    ("mask_decoder.transformer.layers.0", "forward"),
    ("mask_decoder.transformer.layers.0.self_attn", "forward"),
    ("mask_decoder.transformer.layers.0.self_attn", "_separate_heads"),
    ("mask_decoder.transformer.layers.1.cross_attn_token_to_image", "forward"),
    ("mask_decoder.transformer.final_attn_token_to_image", "_recombine_heads"),
    ("mask_decoder.transformer.layers.0.mlp", "forward"),
    ("mask_decoder.output_hypernetworks_mlps.2", "forward"),
    ("mask_decoder.iou_prediction_head", "forward"),
)
HOOKED = (
    "image_encoder",
    "image_encoder.patch_embed",
    "image_encoder.patch_embed.proj",
    "image_encoder.blocks.0",
    "image_encoder.blocks.0.norm1",
    "image_encoder.blocks.0.attn",
    "image_encoder.blocks.0.attn.qkv",
    "image_encoder.blocks.0.attn.proj",
    "image_encoder.blocks.0.norm2",
    "image_encoder.blocks.0.mlp",
    "image_encoder.blocks.0.mlp.lin1",
    "image_encoder.blocks.0.mlp.act",
    "image_encoder.blocks.0.mlp.lin2",
    "image_encoder.blocks.1.attn",
    "image_encoder.blocks.1.attn.proj",
    "image_encoder.neck",
    "image_encoder.neck.0",
    "image_encoder.neck.3",
    "prompt_encoder",
    "prompt_encoder.pe_layer",
    "prompt_encoder.mask_downscaling",
    "prompt_encoder.mask_downscaling.0",
    "prompt_encoder.point_embeddings.1",
    "mask_decoder",
    "mask_decoder.transformer",
    "mask_decoder.transformer.layers.0",
    "mask_decoder.transformer.layers.0.norm1",
    "mask_decoder.transformer.layers.0.self_attn",
    "mask_decoder.transformer.layers.0.self_attn.q_proj",
    "mask_decoder.transformer.layers.1.cross_attn_image_to_token",
    "mask_decoder.transformer.layers.1.cross_attn_image_to_token.out_proj",
    "mask_decoder.transformer.layers.1.mlp.act",
    "mask_decoder.transformer.norm_final_attn",
    "mask_decoder.output_upscaling",
    "mask_decoder.output_upscaling.1",
    "mask_decoder.output_hypernetworks_mlps.0",
    "mask_decoder.output_hypernetworks_mlps.0.layers.1",
    "mask_decoder.iou_prediction_head.layers.2",
)
FUNCTIONS = ("window_partition", "window_unpartition", "get_rel_pos", "add_decomposed_rel_pos")


class Traced(nn.Module):
    """A call of a module traced by ``torch.jit``, in the module's place."""

    def __init__(self, graph: Any, signature: Callable[..., Any]) -> None:
        super().__init__()
        self.graph, self.signature = graph, signature

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.graph(*self.signature(*args, **kwargs))


def trace_decoder(change: Change) -> None:
    """Trace the decoder for three masks of any number of prompts, as a module of its own."""
    decoder = change.model.mask_decoder
    example = [
        numbers(1, 64, 8, 8, seed=1),
        numbers(1, 64, 8, 8, seed=2),
        numbers(1, 3, 64, seed=3),
        numbers(1, 64, 8, 8, seed=4),
    ]

    class ThreeMasks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = decoder

        def forward(self, features: Tensor, pe: Tensor, sparse: Tensor, dense: Tensor) -> Any:
            return self.decoder(features, pe, sparse, dense, multimask_output=True)

    def signature(
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
    ) -> tuple[Tensor, ...]:
        return image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings

    change.model.mask_decoder = Traced(torch.jit.trace(ThreeMasks(), example, check_trace=False), signature)


def trace_encoder(change: Change) -> None:
    encoder = change.model.image_encoder
    graph = torch.jit.trace(encoder, numbers(1, 3, SIZE, SIZE), check_trace=False)
    change.model.image_encoder = Traced(graph, lambda x: (x,))
    change.model.image_encoder.img_size = SIZE


def hook_everything(change: Change) -> None:
    for name, _ in change.model.named_modules():
        if name:
            change.hook(name, "forward_pre_with_kwargs")


def hook_globally(change: Change) -> None:
    names = {module: name for name, module in change.model.named_modules()}
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: change._saw(names[module], args, {}) if names.get(module) else None
    )
    change._stack.callback(handle.remove)


def model_changes() -> dict[str, Callable[[Change], None]]:
    """Return the changes that programs make to a model, by name."""

    def on_instance(change: Change, path: str, method: str) -> None:
        change.wrap(change.model.get_submodule(path), method)

    def on_class(change: Change, path: str, method: str) -> None:
        change.wrap(type(change.model.get_submodule(path)), method)

    def in_subclass(change: Change, path: str, method: str) -> None:
        change.subclass(change.model.get_submodule(path), method)

    def patch_function(change: Change, name: str) -> None:
        change.wrap(change.module("modeling.image_encoder"), name)

    changes: dict[str, Callable[[Change], None]] = {}
    for path, method in METHODS:
        for place, make in {"instance": on_instance, "class": on_class, "subclass": in_subclass}.items():
            changes[f"{path or 'model'}.{method} on the {place}"] = partial(make, path=path, method=method)
    for name in HOOKED:
        for kind in ("forward", "forward_pre"):
            changes[f"{kind} hook on {name}"] = lambda change, name=name, kind=kind: change.hook(name, kind)
    for name in FUNCTIONS:
        changes[f"image_encoder.{name}"] = partial(patch_function, name=name)
    changes["hooks on every module"] = hook_everything
    changes["a hook for all modules there are"] = hook_globally
    changes["mask_threshold"] = lambda change: setattr(change.model, "mask_threshold", 0.4)
    changes["image_format"] = lambda change: setattr(change.model, "image_format", "BGR")
    changes["pixel_mean"] = lambda change: setattr(change.model, "pixel_mean", 0.5 * change.model.pixel_mean)
    changes["a traced image encoder"] = trace_encoder
    changes["a traced mask decoder"] = trace_decoder
    return changes
