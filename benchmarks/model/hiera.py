"""SAM 2's image encoder as a decoder reads it, 1024 x 1024 pixels: the official modules, ours, and the peers."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sam import SAM2Base, build_from_config, save_checkpoint

from ..case import Case, Problem, draw
from ..measure import Form, Work
from ..official_sam2 import official_model, random_sam2
from ..peers import SAM2, sam2_path, transformers_chosen

SIZE = 1024


def encoder_work(model: SAM2Base, batch: int, element_size: int) -> Work:
    """Count the products of the linears and of the attention of real tokens, and the exponentials."""
    trunk: Any = model.image_encoder.trunk
    side, flops, exponentials, weights = SIZE // 4, 0.0, 0.0, 0
    tokens = batch * side**2
    for block in trunk.blocks:
        attention, keys = block.attn, (block.window_size or side) ** 2
        after = tokens // (4 if block.pool is not None else 1)
        before = [attention.qkv, *([block.proj] if block.dim != block.dim_out else [])]
        behind = [attention.proj, *block.mlp.layers]
        flops += 2 * sum(tokens * layer.weight.numel() for layer in before)
        flops += 2 * sum(after * layer.weight.numel() for layer in behind)
        flops += 4 * after * min(keys, side**2) * block.dim_out
        exponentials += after * min(keys, side**2) * attention.num_heads
        weights += sum(layer.weight.numel() for layer in (*before, *behind))
        side, tokens = (side // 2, after) if block.pool is not None else (side, tokens)
    return Work(bytes=weights * element_size, flops=flops, scalar_ops=exponentials)


@torch.no_grad()
def _embedding(model: SAM2Base, pixels: Tensor, kernels: str) -> Tensor:
    model.kernels = kernels
    return model.image_features(pixels).embedding


def _of_package(model: Any, pixels: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast(pixels.device.type, pixels.dtype, enabled=pixels.dtype != torch.float32):
        return model.forward_image(pixels.float())["backbone_fpn"][2] + model.no_mem_embed.view(1, -1, 1, 1)


def in_transformers(model: SAM2Base) -> Any:
    """Return ``transformers.Sam2Model`` with the weights, device and dtype of ours."""
    from transformers import Sam2Model

    assert model.config is not None
    images = build_from_config(replace(model.config, has_memory=False))
    images.load_state_dict({name: model.state_dict()[name] for name in images.state_dict()})
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(images, folder, layout="transformers")
        port = Sam2Model.from_pretrained(folder, dtype=model.dtype).eval().requires_grad_(False)
    return port.to(model.device)


@torch.no_grad()
def _of_transformers(port: Any, pixels: Tensor) -> Tensor:
    return port.get_image_embeddings(pixels)[-1]


def _case(variant: str, batch: int) -> Callable[[torch.device, torch.dtype], Problem]:
    def make(device: torch.device, dtype: torch.dtype) -> Problem:
        model = random_sam2(variant, SIZE).to(device)
        exact = copy.deepcopy(model).double()
        pixels = draw((batch, 3, SIZE, SIZE), device, dtype, 1)
        forms: dict[str, Form] = {}
        if (path := sam2_path()) is not None:
            official = official_model(path, variant, SIZE)
            official.load_state_dict(model.state_dict())
            forms[SAM2] = partial(_of_package, official.to(device), pixels)
        model = model.to(dtype)
        if transformers_chosen():
            forms["transformers"] = partial(_of_transformers, in_transformers(model), pixels)
        for name in ("reference", "torch", "triton") if device.type == "cuda" else ("reference", "torch"):
            forms[name] = partial(_embedding, model, pixels, name)
        work = encoder_work(model, batch, pixels.element_size())
        return Problem(forms, lambda: _embedding(exact, pixels[:1].double(), "torch"), [0], work, compile=False)

    return make


CASES = [
    Case("encoder, sam2.1_tiny, 1 image", _case("sam2.1_tiny", 1)),
    Case("encoder, sam2.1_tiny, 8 images", _case("sam2.1_tiny", 8), devices=("cuda",)),
    Case("encoder, sam2.1_base_plus, 1 image", _case("sam2.1_base_plus", 1), late=True),
    Case("encoder, sam2.1_large, 8 images", _case("sam2.1_large", 8), devices=("cuda",), late=True),
]
