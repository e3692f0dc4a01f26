"""The mask decoder at the size of SAM's: 64 x 64 tokens of 256 channels."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

import sam
from fastsam_kernels import hypernetwork_masks
from sam.inference import fused_decoder
from sam.inference.packed_weights import PackedDecoder, pack_decoder
from sam.modeling.mask_decoder import MaskDecoder
from sam.prompts.tensors import append_padding_point

from ..case import Case, Problem, draw, few_rows
from ..measure import Form, Work
from ..operations.hypernetwork_masks import work
from ..peers import chosen_peers
from . import decoder_work


def _decoder(device: torch.device, dtype: torch.dtype) -> PackedDecoder:
    torch.manual_seed(0)
    model = sam.build_from_config(sam.VARIANTS["vit_b"])
    return pack_decoder(model.mask_decoder.requires_grad_(False).to(device, dtype))


def _mask_head(device: torch.device, dtype: torch.dtype) -> Problem:
    """Compare the official ``output_upscaling`` and hypernetworks, four masks, with ours, which make three."""
    prompts, grid = 64, (64, 64)
    decoder = _decoder(device, dtype)
    keys, tokens = draw((prompts, 4096, 256), device, dtype, 1), draw((prompts, 4, 256), device, dtype, 2)
    mask_slice, rows = MaskDecoder.mask_slice(True), few_rows(prompts)

    def official() -> Tensor:
        return fused_decoder.masks_by_modules(decoder, keys, tokens, slice(None), grid)[:, mask_slice].float()

    def ours(kernels: str) -> Form:
        return lambda: hypernetwork_masks(
            keys,
            decoder.upscaling,
            fused_decoder.hypernetworks(decoder, tokens, mask_slice),
            grid=grid,
            out_dtype=torch.float32,
            kernels=kernels,
        )

    def truth() -> Tensor:
        wide = _decoder(device, torch.float64)
        return fused_decoder.masks_by_modules(wide, keys[rows].double(), tokens[rows].double(), mask_slice, grid)

    forms: dict[str, Form] = {"reference": official, "torch": ours("torch")}
    if device.type == "cuda":
        forms["triton"] = ours("triton")
    return Problem(forms, truth, rows, work(prompts, 3, keys.element_size()), compile=False)


def _clicks(prompts: int, selected: slice = slice(None)) -> Callable[[torch.device, torch.dtype], Problem]:
    """Measure one-point prompts on one image to three low-resolution masks; only of prompts in ``selected``."""

    def make(device: torch.device, dtype: torch.dtype) -> Problem:
        torch.manual_seed(0)
        model = sam.build_from_config(sam.VARIANTS["vit_b"]).requires_grad_(False).to(device, dtype)
        features = draw((1, 256, 64, 64), device, dtype, 1)
        coords = 1024 * torch.rand(prompts, 1, 2, generator=torch.Generator().manual_seed(2)).to(device)
        labels = torch.ones(prompts, 1, dtype=torch.int64, device=device)
        count = len(range(prompts)[selected])
        rows = few_rows(count)

        def forms_of(model: sam.Sam, kernels: str) -> Form:
            return lambda: _decode(model, features, coords, labels, selected, kernels)

        def official(model: sam.Sam, coords: Tensor, labels: Tensor, features: Tensor) -> Tensor:
            sparse, dense = model.prompt_encoder((coords, labels), None, None)
            masks, _ = model.mask_decoder.predict_masks(features, model.prompt_encoder.get_dense_pe(), sparse, dense)
            return masks[:, MaskDecoder.mask_slice(True)]

        def truth() -> Tensor:
            chosen = torch.arange(prompts, device=device)[selected][rows]
            return official(copy.deepcopy(model).double(), coords[chosen], labels[chosen], features.double())

        forms: dict[str, Form] = {
            "reference": lambda: official(model, coords, labels, features)[selected],
            "torch": forms_of(model, "torch"),
        }
        if device.type == "cuda":
            forms["triton"] = forms_of(model, "triton")
        for name, peer in chosen_peers(model).items():
            forms[name] = lambda peer=peer: peer.decode(features, coords, labels)[0][selected]  # type: ignore[misc]
        moved, flops = decoder_work.totals(decoder_work.passes(prompts))
        return Problem(forms, truth, rows, Work(moved, flops), compile=count == prompts)

    return make


def _decode(model: sam.Sam, features: Tensor, coords: Tensor, labels: Tensor, selected: slice, kernels: str) -> Tensor:
    """Decode as the model does, one chunk of prompts at a time, with the image's projections made anew."""
    encoder, packed = model.prompt_encoder, pack_decoder(model.mask_decoder)
    image_pe, mask_slice = encoder.get_dense_pe(), MaskDecoder.mask_slice(True)
    projections = fused_decoder.project_images(packed, features, image_pe, encoder.no_mask_embed.weight)
    dense = encoder.no_mask_embed.weight.view(1, -1, 1, 1)
    size, wide = model.prompts_per_chunk, torch.promote_types(features.dtype, torch.float32)
    indices = range(len(coords))[selected]
    masks = torch.empty(len(indices), 3, 256, 256, device=features.device, dtype=wide)
    filled = 0
    for start in range(0, len(coords), size):
        chunk = slice(start, start + size)
        sparse = encoder.embed_tokens(*append_padding_point(coords[chunk], labels[chunk]))
        decoded = fused_decoder.decode_tokens(
            packed, features, image_pe, sparse, dense, projections=projections, kernels=kernels
        )
        rows = [place - start for place in indices if start <= place < start + size]
        index = None if len(rows) == len(sparse) else torch.tensor(rows, device=features.device)
        masks[filled : filled + len(rows)] = fused_decoder.decode_masks(decoded, mask_slice, index, kernels)
        filled += len(rows)
    return masks


CASES = [
    Case("mask head, 64 prompts", _mask_head),
    Case("decoder, 64 clicks", _clicks(64)),
    Case("decoder, 1024 clicks", _clicks(1024), devices=("cuda",)),
    Case("decoder, 1024 clicks, masks of every tenth", _clicks(1024, slice(None, None, 10)), devices=("cuda",)),
]
