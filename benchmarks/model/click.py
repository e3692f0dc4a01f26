"""The wait of a user once an image is embedded: prompts in, masks of 1024 x 1024 pixels out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

import sam
from sam.embedding import ImageEmbedding
from sam.images.geometry import ImageGeometry
from sam.inference import Runtime
from sam.prompts.batch import PromptBatch
from sam.prompts.layout import PromptLayout

from ..case import Case, Problem, draw, few_rows
from ..measure import Form, Work
from ..peers import chosen_peers
from . import decoder_work

SIZE = (1024, 1024)
GEOMETRY = ImageGeometry.longest_side(*SIZE, 1024)
_CLICKS = 10


class Predict(Protocol):
    """The type of :meth:`benchmarks.peers.Peer.predict`."""

    def __call__(
        self,
        features: Tensor,
        coords: Tensor,
        labels: Tensor,
        size: tuple[int, int],
        mask_inputs: Tensor | None = None,
        multimask: bool = True,
    ) -> tuple[Tensor, Tensor]: ...


def _model(device: torch.device, dtype: torch.dtype) -> sam.Sam:
    torch.manual_seed(0)
    return sam.build_from_config(sam.VARIANTS["vit_b"]).requires_grad_(False).to(device, dtype)


def _by_modules(model: sam.Sam, full_size: bool = True) -> Predict:
    """Predict the official way, in this package's modules."""

    def predict(
        features: Tensor,
        coords: Tensor,
        labels: Tensor,
        size: tuple[int, int],
        mask_inputs: Tensor | None = None,
        multimask: bool = True,
    ) -> tuple[Tensor, Tensor]:
        sparse, dense = model.prompt_encoder((coords, labels), None, mask_inputs)
        image_pe = model.prompt_encoder.get_dense_pe()
        masks = model.mask_decoder.mask_slice(multimask)
        low_res, iou = (x[:, masks] for x in model.mask_decoder.predict_masks(features, image_pe, sparse, dense))
        if full_size:
            _ = model.postprocess_masks(low_res, size, size) > 0
        return low_res, iou

    return predict


def _made_ready(model: sam.Sam) -> sam.Sam:
    """Copy the model with the decoder as CUDA graphs or, on a CPU, compiled."""
    other = copy.deepcopy(model)
    other.runtime = Runtime(other, compile_encoder=False)
    return other


def _prompts(count: int) -> Callable[[torch.device, torch.dtype], Problem]:
    """Measure one point and three masks per prompt, with the decoder of ViT-B; rows are held by their logits."""

    def make(device: torch.device, dtype: torch.dtype) -> Problem:
        model = _model(device, dtype)
        features = draw((1, 256, 64, 64), device, dtype, 1)
        coords = 1024 * torch.rand(count, 1, 2, generator=torch.Generator().manual_seed(2)).to(device)
        labels = torch.ones(count, 1, dtype=torch.int64, device=device)
        rows = few_rows(count)

        def ours(model: sam.Sam, kernels: str) -> Form:
            embedding = ImageEmbedding(features, GEOMETRY)  # which keeps what one model makes of it

            def form() -> Tensor:
                model.kernels = kernels
                batch = PromptBatch.from_tensors((coords, labels), None, None, device, PromptLayout.POINTS_FIRST)
                low_res, _, _ = model.decode([embedding], batch, multimask_output=True)
                model.masks(low_res, embedding.geometry, return_logits=False)
                return low_res

            return form

        def theirs(predict: Predict) -> Form:
            return lambda: predict(features, coords, labels, SIZE)[0]

        def truth() -> Tensor:
            exact = _by_modules(copy.deepcopy(model).double(), full_size=False)
            return exact(features.double(), coords[rows], labels[rows], SIZE)[0]

        forms: dict[str, Form] = {"reference": theirs(_by_modules(model)), "torch": ours(model, "torch")}
        if device.type == "cuda":
            forms["triton"] = ours(model, "triton")
            ready = _made_ready(model)
            if count <= ready.runtime.limits.prompts:  # more run without a graph
                forms["triton, CUDA graphs"] = ours(ready, "triton")
        else:
            forms["torch, compiled"] = ours(_made_ready(model), "torch")
        for name, peer in chosen_peers(model).items():
            forms[name] = theirs(peer.predict)
        moved, flops = decoder_work.totals(decoder_work.passes(count))
        masks = count * 3 * SIZE[0] * SIZE[1]  # a byte a pixel, written once
        return Problem(forms, truth, rows, Work(moved + masks, flops), compile=False)

    return make


def _session(device: torch.device, dtype: torch.dtype) -> Problem:
    """Measure clicks on one object, each with the last answer as mask input; held by its logits."""
    model = _model(device, dtype)
    features = draw((1, 256, 64, 64), device, dtype, 1)
    positions = 1024 * torch.rand(_CLICKS, 2, generator=torch.Generator().manual_seed(2))
    signs = torch.tensor([int(index % 3 != 2) for index in range(_CLICKS)])

    def ours(model: sam.Sam, kernels: str) -> Form:
        session = sam.InteractiveSession(model, ImageEmbedding(features, GEOMETRY))

        def form() -> Tensor:
            model.kernels = kernels
            session.reset()
            for (x, y), sign in zip(positions.tolist(), signs.tolist(), strict=True):
                session.click(x, y, sign)
            return session.low_res_logits.clone()

        return form

    def theirs(predict: Predict, features: Tensor) -> Form:
        coords, labels = positions[None].to(device), signs[None].to(device)

        def form() -> Tensor:
            logits = None
            for count in range(1, _CLICKS + 1):
                low_res, iou = predict(features, coords[:, :count], labels[:, :count], SIZE, logits, count == 1)
                logits = low_res[:, int(iou[0].argmax())][:, None]
            assert logits is not None
            return logits

        return form

    def truth() -> Tensor:
        exact = _by_modules(copy.deepcopy(model).double(), full_size=False)
        return theirs(exact, features.double())()

    forms = {"reference": theirs(_by_modules(model), features), "torch": ours(model, "torch")}
    if device.type == "cuda":
        forms["triton"] = ours(model, "triton")
        forms["triton, CUDA graphs"] = ours(_made_ready(model), "triton")
    else:
        forms["torch, compiled"] = ours(_made_ready(model), "torch")
    for name, peer in chosen_peers(model).items():
        forms[name] = theirs(peer.predict, features)
    moved, flops = decoder_work.totals(decoder_work.passes(1))
    return Problem(forms, truth, [0], Work(_CLICKS * moved, _CLICKS * flops), compile=False)


CASES = [
    Case("click, 1 point to 1024 x 1024 masks", _prompts(1)),
    Case("64 points to 1024 x 1024 masks", _prompts(64)),
    Case(f"session of {_CLICKS} clicks, with mask input", _session),
]
