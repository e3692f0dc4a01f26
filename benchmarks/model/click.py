"""What a user waits for once an image is embedded: prompts in, masks of 1024 x 1024 pixels out."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

import sam
from sam.embedding import ImageEmbedding
from sam.preprocess import ImageGeometry
from sam.prompts import PromptBatch

from ..case import Case, Problem, draw, few_rows
from ..measure import Form, Work
from ..peers import chosen_peers
from . import decoder_work

SIZE = (1024, 1024)


def _prompts(count: int) -> Callable[[torch.device, torch.dtype], Problem]:
    """One point each, three masks each, with the decoder of ViT-B; the rows are held by their low-resolution logits."""

    def make(device: torch.device, dtype: torch.dtype) -> Problem:
        torch.manual_seed(0)
        model = sam.build_from_config(sam.VARIANTS["vit_b"]).requires_grad_(False).to(device, dtype)
        embedding = ImageEmbedding(draw((1, 256, 64, 64), device, dtype, 1), ImageGeometry.of(*SIZE, 1024))
        coords = 1024 * torch.rand(count, 1, 2, generator=torch.Generator().manual_seed(2)).to(device)
        labels = torch.ones(count, 1, dtype=torch.int64, device=device)
        rows = few_rows(count)

        def predict(kernels: str) -> Form:
            def form() -> Tensor:
                model.kernels = kernels
                batch = PromptBatch.from_tensors((coords, labels), None, None, device)
                low_res, _ = model.decode([embedding], batch, multimask_output=True)
                model.masks(low_res, embedding.geometry, return_logits=False)
                return low_res

            return form

        def official(model: sam.Sam, coords: Tensor, labels: Tensor, features: Tensor) -> Tensor:
            sparse, dense = model.prompt_encoder((coords, labels), None, None)
            return model.mask_decoder(features, model.prompt_encoder.get_dense_pe(), sparse, dense, True)[0]

        def by_modules() -> Tensor:
            low_res = official(model, coords, labels, embedding.features)
            _ = model.postprocess_masks(low_res, SIZE, SIZE) > 0
            return low_res

        def truth() -> Tensor:
            return official(copy.deepcopy(model).double(), coords[rows], labels[rows], embedding.features.double())

        forms: dict[str, Form] = {"reference": by_modules, "torch": predict("torch")}
        if device.type == "cuda":
            forms["triton"] = predict("triton")
        for name, peer in chosen_peers(model).items():
            forms[name] = lambda peer=peer: peer.predict(embedding.features, coords, labels, SIZE)  # type: ignore[misc]
        moved, flops = decoder_work.totals(decoder_work.passes(count))
        masks = count * 3 * SIZE[0] * SIZE[1]  # a byte a pixel, written once
        return Problem(forms, truth, rows, Work(moved + masks, flops), compile=False)

    return make


CASES = [
    Case("click, 1 point to 1024 x 1024 masks", _prompts(1)),
    Case("64 points to 1024 x 1024 masks", _prompts(64)),
]
