"""The whole image encoder, images of 1024 x 1024: the official modules, ours, and the peers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

import sam
from sam import Sam
from sam.inference.compilation import compiled_block, many_graphs
from sam.inference.fused_encoder import encode, run_block

from ..case import Case, Problem, draw
from ..measure import Form, Work
from ..operations import rel_pos_attention
from ..peers import chosen_peers


def random_model(device: torch.device, variant: str = "vit_b") -> Sam:
    """Build a model whose position tables are not the zeros that they start from."""
    torch.manual_seed(0)
    model = sam.build_from_config(sam.VARIANTS[variant]).requires_grad_(False)
    for name, parameter in model.image_encoder.named_parameters():
        if "pos" in name:
            parameter.normal_(std=0.05)
    return model.to(device)


def encoder_work(model: Sam, batch: int, element_size: int) -> Work:
    """Count all products of the projections, the MLPs, the attention and the convolutions."""
    encoder, size = model.image_encoder, rel_pos_attention.SIZES[model.name]
    tokens = batch * 64 * 64
    linears = [layer for layer in encoder.modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)]
    attention = [rel_pos_attention.work(size, batch, block.window_size, element_size) for block in encoder.blocks]
    weights = sum(layer.weight.numel() for layer in linears)
    return Work(
        bytes=weights * element_size,
        flops=2 * tokens * weights + sum(work.flops for work in attention),
        scalar_ops=sum(work.scalar_ops for work in attention),
    )


def _case(batch: int, variant: str = "vit_b") -> Callable[[torch.device, torch.dtype], Problem]:
    def make(device: torch.device, dtype: torch.dtype) -> Problem:
        model = random_model(device, variant)
        exact = copy.deepcopy(model.image_encoder).double()
        model = model.to(dtype)
        encoder, pixels = model.image_encoder, draw((batch, 3, 1024, 1024), device, dtype, 1)

        def ours(kernels: str) -> Form:
            return lambda: encode(encoder, pixels, kernels)

        names = ("reference", "torch", "triton") if device.type == "cuda" else ("reference", "torch")
        forms = {name: ours(name) for name in names}
        if device.type == "cuda":
            run = compiled_block(run_block)

            def compiled() -> Tensor:
                with many_graphs():
                    return encode(encoder, pixels, "triton", run)

            forms["triton, compiled blocks"] = compiled
        for name, peer in chosen_peers(model).items():
            forms[name] = lambda peer=peer: peer.encode(pixels)  # type: ignore[misc]

        def truth() -> Tensor:
            return encode(exact, pixels[:1].double(), "torch")

        return Problem(forms, truth, [0], encoder_work(model, batch, pixels.element_size()), compile=False)

    return make


def _bf16_against_fp32(device: torch.device, dtype: torch.dtype) -> Problem:
    """Measure the gain of ``dtype=torch.bfloat16``: the official modules in fp32 against ours in bf16.

    The dtype of the case is that of the fast forms, so their error is held against a budget of bf16: that of the
    reference in the same dtype, which the case measures too.
    """
    model = random_model(device)
    exact, official = copy.deepcopy(model.image_encoder).double(), copy.deepcopy(model.image_encoder)
    encoder, pixels = model.image_encoder.to(dtype), draw((1, 3, 1024, 1024), device, torch.float32, 1)
    narrow = pixels.to(dtype)
    forms: dict[str, Form] = {
        "reference": lambda: encode(encoder, narrow, "reference"),
        "torch": lambda: encode(encoder, narrow, "torch"),
        "reference, fp32": lambda: encode(official, pixels, "reference"),
    }
    if device.type == "cuda":
        forms["triton"] = lambda: encode(encoder, narrow, "triton")
    return Problem(
        forms,
        lambda: encode(exact, pixels.double(), "torch"),
        [0],
        encoder_work(model, 1, narrow.element_size()),
        compile=False,
    )


CASES = [
    Case("encoder, vit_b, 1 image", _case(1)),
    Case("encoder, vit_b, 8 images", _case(8), devices=("cuda",)),
    Case("encoder, vit_h, 1 image", _case(1, "vit_h"), devices=("cuda",), late=True),
    Case("encoder, vit_h, 8 images", _case(8, "vit_h"), devices=("cuda",), late=True),
    Case("encoder, vit_b, bf16 against fp32", _bf16_against_fp32, dtypes=(torch.bfloat16,)),
]
