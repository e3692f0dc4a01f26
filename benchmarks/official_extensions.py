"""Changes that programs make to the modules and methods of Meta's package, with its answers written down for the tests.

    python -m benchmarks.official_extensions --segment-anything PATH

PATH is the folder from which ``import segment_anything`` works. To be run again when a change is added; it takes a few
seconds. ``tests/test_extension_points.py`` makes the same changes to this package.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from .official_calls import numbers, pixels
from .official_masks import package_version
from .peers import import_segment_anything

TARGET = Path(__file__).parents[1] / "tests" / "official_extensions.json"
SAMPLES = 6
SIZE = 128
IMAGE = pixels(60, 80, 3)
POINTS, LABELS = np.array([[30.0, 20.0], [50.0, 41.0]]), np.array([1, 0])
BOX = np.array([10.0, 5.0, 61.0, 50.0])


def small_model(package: Any) -> Any:
    """Build a ``Sam`` of the package with windows that do not divide its grid of 8 x 8, every weight drawn."""
    modeling, grid = package.modeling, (8, 8)
    encoder = modeling.ImageEncoderViT(
        img_size=SIZE,
        patch_size=16,
        embed_dim=32,
        depth=3,
        num_heads=2,
        out_chans=64,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=3,
        global_attn_indexes=(1,),
    )
    prompt_encoder = modeling.PromptEncoder(
        embed_dim=64, image_embedding_size=grid, input_image_size=(SIZE, SIZE), mask_in_chans=16
    )
    transformer = modeling.TwoWayTransformer(depth=2, embedding_dim=64, mlp_dim=96, num_heads=8)
    decoder = modeling.MaskDecoder(transformer_dim=64, transformer=transformer, iou_head_hidden_dim=48)
    model = modeling.Sam(encoder, prompt_encoder, decoder).eval().requires_grad_(False)
    for seed, (name, tensor) in enumerate(sorted(model.state_dict().items())):
        of_norm = tensor.ndim == 1 and name.endswith("weight")
        fan_in = tensor[0].numel() if tensor.ndim > 1 else 25
        tensor.copy_(float(of_norm) + numbers(*tensor.shape, seed=seed, scale=1.2 * fan_in**-0.5))
    return model


# What is seen and changed ----------------------------------------------------------------------------------


class Log(list[str]):
    """The calls that a change saw, each by its name and its arguments as they were given."""

    def note(self, label: str, args: Iterable[Any], kwargs: dict[str, Any]) -> None:
        given = [*map(described, args), *(f"{name}={described(value)}" for name, value in kwargs.items())]
        self.append(f"{label}({', '.join(given)})")

    def take(self) -> list[str]:
        """Return the calls in order, those repeated in a row once with their number, and forget them."""
        found = [call if (count := len(list(same))) == 1 else f"{count} x {call}" for call, same in groupby(self)]
        self.clear()
        return found


def described(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return "x".join(map(str, value.shape))
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(described, value))}]"
    return str(value) if value is None or isinstance(value, int | float) else type(value).__name__


def scaled(answer: Any) -> Any:
    """Return an answer with its first tensor or array of numbers made larger by a quarter."""
    if isinstance(answer, Tensor):
        return 1.25 * answer if answer.is_floating_point() else answer
    if isinstance(answer, np.ndarray):
        return 1.25 * answer if answer.dtype.kind == "f" else answer
    return (scaled(answer[0]), *answer[1:]) if isinstance(answer, tuple) and answer else answer


class Change:
    """One program's changes to a package and a model of it; leaving the context takes them back from the package."""

    def __init__(self, package: Any) -> None:
        self.package, self.log, self._stack = package, Log(), ExitStack()
        self.model = small_model(package)
        self.predictor_class = package.SamPredictor

    def __enter__(self) -> Change:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def module(self, name: str) -> Any:
        """Import a module of the package."""
        return importlib.import_module(f"{self.package.__name__}.{name}" if name else self.package.__name__)

    def replace(self, owner: Any, name: str, value: Any) -> None:
        self._stack.enter_context(patch.object(owner, name, value))

    def wrap(self, owner: Any, name: str, alter: Callable[[Any], Any] = scaled) -> None:
        """Put a wrapper in the place of a method or a function, that notes the call and alters the answer."""
        self.replace(owner, name, self._wrapper(getattr(owner, name), name, is_method=isinstance(owner, type)))
        # ``getattr`` binds what it takes of an instance, so its wrapper gets no self.

    def _wrapper(self, function: Any, label: str, is_method: bool, alter: Callable[[Any], Any] = scaled) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self.log.note(label, args[1:] if is_method else args, kwargs)
            return alter(function(*args, **kwargs))

        return wrapper

    def subclass(self, thing: Any, *names: str) -> None:
        """Make ``thing`` of a subclass of its class that overrides methods."""
        thing.__class__ = self.derived_class(type(thing), *names)

    def derived_class(self, base: type, *names: str) -> type:
        return type("Own", (base,), {name: self._wrapper(getattr(base, name), name, is_method=True) for name in names})

    def hook(self, name: str, kind: str) -> None:
        """Register a hook that notes the call, and as a forward hook alters the output."""
        module = self.model.get_submodule(name)
        if kind == "forward":
            module.register_forward_hook(lambda _, args, output: self._saw(name, args, {}) or scaled(output))
        elif kind == "forward_pre":
            module.register_forward_pre_hook(lambda _, args: self._saw(name, args, {}))
        else:
            module.register_forward_pre_hook(lambda _, args, kwargs: self._saw(name, args, kwargs), with_kwargs=True)

    def _saw(self, label: str, args: Any, kwargs: dict[str, Any]) -> None:
        self.log.note(label.rpartition(".")[2] or label, args, kwargs)


# Changes of the model --------------------------------------------------------------------------------------

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
    """Return what programs do to a model, by name."""

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
    changes["a traced image encoder"] = trace_encoder
    changes["a traced mask decoder"] = trace_decoder
    return changes


def answers(change: Change) -> dict[str, Any]:
    """Ask a changed model by the official calls: points, then points, box and mask together, then ``forward``."""
    predictor = change.predictor_class(change.model)
    predictor.set_image(IMAGE)
    found: dict[str, Any] = {"calls of set_image": change.log.take(), "features": predictor.get_image_embedding()}
    mask = numbers(1, 32, 32, seed=9).numpy()
    prompts: dict[str, dict[str, Any]] = {
        "points": {"point_coords": POINTS, "point_labels": LABELS},
        "all": {"point_coords": POINTS, "point_labels": LABELS, "box": BOX, "mask_input": mask},
    }
    for name, prompt in prompts.items():
        masks, iou, low_res = predictor.predict(**prompt, return_logits=True)
        found |= {f"calls of {name}": change.log.take()}
        found |= {f"masks of {name}": masks, f"iou of {name}": iou, f"low_res of {name}": low_res}
    (output,) = change.model([forward_input(mask)], multimask_output=True)
    found["calls of forward"] = change.log.take()
    return found | {"forward masks": output["masks"].double(), "forward low_res": output["low_res_logits"]}


def forward_input(mask: np.ndarray) -> dict[str, Any]:
    """The input of ``Sam.forward`` for two prompts of points, box and mask each."""
    return {
        "image": torch.from_numpy(pixels(3, 96, SIZE, seed=12)),
        "original_size": (60, 80),
        "point_coords": torch.tensor([[[40.0, 30.0]], [[70.0, 60.0]]]),
        "point_labels": torch.tensor([[1], [0]]),
        "boxes": torch.tensor([[10.0, 8.0, 90.0, 80.0], [1.0, 2.0, 50.0, 60.0]]),
        "mask_inputs": torch.from_numpy(mask)[None].repeat(2, 1, 1, 1),
    }


def written(answer: Any) -> Any:
    """Describe an answer: calls as they are, numbers by their shape, norm and values at places spread over them."""
    if isinstance(answer, list):
        return answer
    values = torch.as_tensor(answer).detach().double()
    flat = values.flatten()
    places = torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat)), dtype=torch.float64).round().long()
    samples = [float(f"{value:.6g}") for value in flat[places].tolist()]
    return {"shape": list(values.shape), "norm": float(f"{float(flat.norm()):.7g}"), "samples": samples}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.official_extensions", description=__doc__)
    parser.add_argument("--segment-anything", default="", metavar="PATH", help="folder of the package")
    package = import_segment_anything(parser.parse_args().segment_anything)
    lines = []
    for name, make in model_changes().items():
        with Change(package) as change:
            make(change)
            row = {key: written(answer) for key, answer in answers(change).items()}
        lines.append(f"{json.dumps(name)}: {json.dumps(row)}")
    head = json.dumps({"package": package_version()})[:-1]
    TARGET.write_text(head + ', "rows": {\n' + ",\n".join(lines) + "\n}}\n")


if __name__ == "__main__":
    main()
