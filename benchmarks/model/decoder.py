"""The mask decoder at the size of SAM's: 64 x 64 tokens of 256 channels."""

from __future__ import annotations

import torch
from torch import Tensor

import sam
from fastsam_kernels import hypernetwork_masks
from sam.modeling.mask_decoder import MaskDecoder

from ..case import Case, Problem, draw, few_rows
from ..measure import Form
from ..operations.hypernetwork_masks import work


def _decoder(device: torch.device, dtype: torch.dtype) -> MaskDecoder:
    torch.manual_seed(0)
    model = sam.build_from_config(sam.VARIANTS["vit_b"])
    return model.mask_decoder.requires_grad_(False).to(device, dtype)


def _mask_head(device: torch.device, dtype: torch.dtype) -> Problem:
    """The official ``output_upscaling`` and hypernetworks, which make four masks, against ours for the three asked."""
    prompts, grid = 64, (64, 64)
    decoder = _decoder(device, dtype)
    keys, tokens = draw((prompts, 4096, 256), device, dtype, 1), draw((prompts, 4, 256), device, dtype, 2)
    wanted, rows = MaskDecoder.mask_slice(True), few_rows(prompts)

    def official() -> Tensor:
        return decoder._masks_by_modules(keys, tokens, slice(None), grid)[:, wanted].float()

    def ours(kernels: str) -> Form:
        return lambda: hypernetwork_masks(
            keys,
            decoder._upscaling(),
            decoder._hypernetworks(tokens, wanted),
            grid=grid,
            out_dtype=torch.float32,
            kernels=kernels,
        )

    def truth() -> Tensor:
        wide = _decoder(device, torch.float64)
        return wide._masks_by_modules(keys[rows].double(), tokens[rows].double(), wanted, grid)

    forms: dict[str, Form] = {"reference": official, "torch": ours("torch")}
    if device.type == "cuda":
        forms["triton"] = ours("triton")
    return Problem(forms, truth, rows, work(prompts, 3, keys.element_size()), compile=False)


CASES = [Case("mask head, 64 prompts", _mask_head)]
