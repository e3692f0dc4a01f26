"""The decoder's memory traffic and arithmetic, pass by pass, counted from the shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

import sam

from ..operations import hypernetwork_masks
from ..operations.token_to_image_attention import CHANNELS, CLICK_TOKENS, HEAD_CHANNELS, HEADS

IMAGE_TOKENS, MASKS, ELEMENT, FP32 = 4096, 3, 2, 4
_PADDED_TOKENS = 8


@dataclass(frozen=True)
class Pass:
    """One pass over memory, for all prompts together; bytes and operations (two per multiply-add)."""

    name: str
    read: float
    written: float
    flops: float


def passes(prompts: int) -> list[Pass]:
    """Return the passes of the Triton forms on one-point prompts on one image, in 16 bits, for any encoder.

    A buffer that one launch writes and another reads counts twice; what a program reads again shortly after it read
    or wrote it does not.
    """
    tokens, inner = prompts * CLICK_TOKENS, HEADS * HEAD_CHANNELS
    rows = prompts * HEADS * CLICK_TOKENS
    image = IMAGE_TOKENS * CHANNELS * ELEMENT
    splits = _splits(prompts)
    operands = 3 * rows * CHANNELS * ELEMENT  # folded keys, values and queries
    partials = prompts * splits * HEADS * _PADDED_TOKENS * (HEAD_CHANNELS + 2) * FP32
    padded = prompts * HEADS * _PADDED_TOKENS
    two_way = 8 * IMAGE_TOKENS * padded * CHANNELS + 2 * splits * padded * CHANNELS * inner
    last = hypernetwork_masks.work(prompts, MASKS, ELEMENT)
    return [
        Pass("tokens: projections, folding, MLPs", *_token_side(prompts)),
        Pass(
            "tokens to image, block 0, over the kept K and V",
            2 * IMAGE_TOKENS * inner * ELEMENT + tokens * inner * ELEMENT,
            tokens * inner * ELEMENT,
            4 * tokens * IMAGE_TOKENS * inner,
        ),
        Pass("image to tokens, block 0, and tokens to image, block 1", 2 * image + operands, prompts * image, two_way),
        Pass(
            "image to tokens, block 1, and final tokens to image",
            (prompts + 1) * image + operands,
            prompts * image,
            two_way,
        ),
        Pass("partial sums of both", 2 * partials, 2 * partials + 2 * tokens * inner * ELEMENT, 0),
        Pass("upscaling and masks", prompts * image, last.bytes - prompts * image, last.flops),
    ]


def _splits(prompts: int) -> int:
    from fastsam_kernels.token_to_image_attention.triton.kernel import shares_of

    return shares_of(prompts, IMAGE_TOKENS)[0]


def _token_side(prompts: int) -> tuple[float, float, float]:
    """Count bytes and operations of every linear on tokens, those of the image absorbed into them."""
    with torch.device("meta"):
        decoder = sam.build_from_config(sam.VARIANTS["vit_b"]).mask_decoder
    read = written = flops = 0.0
    for name, layer in decoder.named_modules():
        skipped = (
            name.endswith("token_to_image.v_proj") or name == "transformer.layers.0.cross_attn_token_to_image.k_proj"
        )
        if not isinstance(layer, nn.Linear) or skipped or name.startswith("output_hypernetworks_mlps.0"):
            continue
        vectors = prompts * (CLICK_TOKENS if name.startswith("transformer") else 1)
        read += ELEMENT * (vectors * layer.in_features + layer.weight.numel())
        written += ELEMENT * vectors * layer.out_features
        flops += 2 * vectors * layer.weight.numel()
    folded = 2 * 3 * prompts * HEADS * CLICK_TOKENS * CHANNELS * ELEMENT  # the operands of both passes
    return read, written + folded, flops


def totals(of: list[Pass]) -> tuple[float, float]:
    """Return the sum of bytes and of operations."""
    return sum(step.read + step.written for step in of), sum(step.flops for step in of)


def work_table(prompts: int = 1024) -> str:
    """Format the table as the page shows it."""
    counted = passes(prompts)
    moved, flops = totals(counted)
    rows = [
        f"| {step.name} | {step.read / 1e9:.2f} | {step.written / 1e9:.2f} | {step.flops / 1e12:.3f} |"
        for step in counted
    ]
    total = f"| **in all** | **{moved / 1e9:.2f}** read and written | | **{flops / 1e12:.3f}** |"
    return "\n".join(["| pass | GB read | GB written | TFLOP |", "|---|---:|---:|---:|", *rows, total])
