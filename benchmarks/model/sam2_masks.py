"""SAM 2 from an embedded image to masks of 1024 x 1024 pixels, and from an image to automatic masks.

Ours is :class:`sam.sam2.sam2_image_predictor.SAM2ImagePredictor` and the generator, Meta's are the classes of the same
names, with the same weights; "reference" is ours by the official formulas.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsam_kernels import nms
from sam import SAM2Base
from sam.inference.fused_decoder import DecodedPrompts
from sam.inference.module_decoder import MadeMasks
from sam.masks.results import DecodedMasks
from sam.prompts.batch import PromptBatch
from sam.sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator
from sam.sam2.sam2_image_predictor import SAM2ImagePredictor
from sam.utils import amg

from ..case import Case, Problem, draw, few_rows
from ..measure import Form, Work
from ..official_sam2 import official_model, random_sam2
from ..operations.mask_postprocess import discs
from ..peers import SAM2, sam2_path
from . import decoder_work
from .automatic_masks import numbers
from .hiera import encoder_work

VARIANT, SIZE = "sam2.1_tiny", 1024


def officially(official: Any, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Return the context in which Meta's fp32 model works in ``dtype``: autocast for 16 bits."""
    return torch.autocast(official.device.type, dtype, enabled=dtype != torch.float32)


def official_copy(path: str, model: SAM2Base) -> Any:
    """Return Meta's model of the weights of ours, which are fp32."""
    official = official_model(path, model.name, model.image_size)
    official.load_state_dict(model.state_dict())
    return official.to(model.device)


# Clicks -----------------------------------------------------------------------------------------------------------


def _prompts(count: int) -> Callable[[torch.device, torch.dtype], Problem]:
    """Measure one point and three masks per prompt; rows are held by their logits."""

    def make(device: torch.device, dtype: torch.dtype) -> Problem:
        model = random_sam2(VARIANT, SIZE).to(device)
        shapes = ((1, 256, 64, 64), (1, 32, 256, 256), (1, 64, 128, 128))
        maps = [draw(shape, device, torch.float32, seed) for seed, shape in enumerate(shapes)]
        coords = SIZE * torch.rand(count, 1, 2, generator=torch.Generator().manual_seed(2)).to(device)
        labels, rows = torch.ones(count, 1, dtype=torch.int32, device=device), few_rows(count)

        def asking(kind: type[Any], model: Any, dtype: torch.dtype) -> Any:
            predictor = kind(model)
            embedding, *high_res = (features.to(dtype) for features in maps)
            predictor._features = {"image_embed": embedding, "high_res_feats": high_res}
            predictor._orig_hw, predictor._is_image_set = [(SIZE, SIZE)], True
            return predictor

        def ours(model: SAM2Base, kernels: str, rows: Sequence[int] = range(count)) -> Form:
            predictor = asking(SAM2ImagePredictor, model, model.dtype)

            def form() -> Tensor:
                model.kernels = kernels
                return predictor._predict(coords[rows], labels[rows])[2]

            return form

        exact = ours(copy.deepcopy(model).double(), "reference", rows)
        forms: dict[str, Form] = {}
        if (path := sam2_path()) is not None:
            official = official_copy(path, model)
            from sam2.sam2_image_predictor import SAM2ImagePredictor as Official

            predictor = asking(Official, official, torch.float32)

            def theirs() -> Tensor:
                with officially(official, dtype):
                    return predictor._predict(coords, labels)[2]

            forms[SAM2] = theirs
        model = model.to(dtype)
        for name in ("reference", "torch", "triton") if device.type == "cuda" else ("reference", "torch"):
            forms[name] = ours(model, name)
        moved, flops = decoder_work.totals(decoder_work.passes(count))
        masks = count * 3 * SIZE**2  # a byte a pixel, written once
        return Problem(forms, exact, rows, Work(moved + masks, flops), compile=False)

    return make


# Automatic masks --------------------------------------------------------------------------------------------------


class Script:
    """Decoder outputs in place of those of random weights: every tenth click has one confident mask, a disc.

    So what comes after the decoder has to do with masks as they are. What the decoder said is kept beside.
    """

    def __init__(self, side: int, model: SAM2Base) -> None:
        self.clicks, self.side = side**2, side
        self.kept = torch.arange(0, self.clicks, 10)
        low_res = discs(3 * len(self.kept), model.low_res_size[0], torch.device("cpu"), torch.float32, 150.0)
        self.low_res = low_res.unflatten(0, (-1, 3))
        self.iou = torch.full((self.clicks, 3), 0.5)
        self.best = torch.arange(len(self.kept)) % 3
        self.iou[self.kept, self.best] = torch.linspace(0.99, 0.9, len(self.kept))
        self.size = (model.image_size,) * 2
        self.rows = few_rows(max(1, len(self.kept) // 2))  # of records, clicks and kept clicks, to hold runs by
        self.begin()

    def begin(self) -> None:
        self.scores: list[Tensor] = []
        self.masks: list[Tensor] = []

    def heard(self, iou: Tensor) -> slice:
        """Take the IoU [P, 3] that the decoder predicts of the next P clicks; return which they are."""
        start = sum(map(len, self.scores))
        self.scores.append(iou.float())
        return slice(start, start + len(iou))

    def made(self, masks: Tensor) -> None:
        """Take the logits [K, 3, h, w] that the decoder makes of the next K kept clicks."""
        self.masks.append(masks[..., ::32, ::32].flatten(1).float())

    def result(self, records: Sequence[dict[str, Any]]) -> tuple[Tensor, ...]:
        """Return the numbers of records [R, 6], all scores [clicks, 3] and points of the kept logits [K, points]."""
        return numbers([*records]), torch.cat(self.scores), torch.cat(self.masks)

    def numbers(self) -> Tensor:
        """Return the numbers of the records of the discs, resized in fp64."""
        rows = []
        for disc, iou in zip(self.low_res[range(len(self.kept)), self.best], self.iou.amax(1)[self.kept], strict=True):
            logits = F.interpolate(disc.double()[None, None], self.size, mode="bilinear")[0]
            (stability,), (box,) = amg.calculate_stability_score(logits, 0.0, 1.0), amg.batched_mask_to_box(logits > 0)
            rows.append((float(iou), int((logits > 0).sum()), box, float(stability)))
        rows = [row for row in rows if row[3] >= 0.95]
        order = nms(torch.stack([row[2] for row in rows]).float(), torch.tensor([row[0] for row in rows]), 0.7)
        best = [rows[index] for index in order.tolist()]
        return numbers(
            [
                {"area": area, "bbox": amg.box_xyxy_to_xywh(box).tolist(), "stability_score": stability}
                for _, area, box, stability in best
            ]
        )


@dataclass(frozen=True, kw_only=True)
class _Scripted(DecodedPrompts):
    clicks: Tensor
    said: DecodedPrompts


class _OursScripted:
    """A model whose decoder does its work and then says what the script has."""

    def __init__(self, model: SAM2Base, script: Script) -> None:
        self._script, self._tokens, self._masks = script, model.decode_tokens, model.decode_masks
        model.decode_tokens, model.decode_masks = self.decode_tokens, self.decode_masks  # type: ignore[method-assign, assignment]

    def decode_tokens(self, embeddings: Any, batch: PromptBatch, shared: Any = None) -> _Scripted:
        said = self._tokens(embeddings, batch, shared)
        assert not isinstance(said, MadeMasks)
        rows = self._script.heard(said.iou[:, 1:])
        clicks = torch.arange(rows.start, rows.stop)
        return _Scripted(**{**vars(said), "iou": F.pad(self._script.iou[rows], (1, 0))}, clicks=clicks, said=said)

    def decode_masks(self, decoded: _Scripted, multimask_output: bool, rows: Tensor) -> DecodedMasks:
        self._script.made(self._masks(decoded.said, multimask_output, rows).logits)
        clicks = decoded.clicks[rows]
        return DecodedMasks(self._script.low_res[clicks // 10], self._script.iou[clicks], None)


def photograph(side: int) -> np.ndarray:
    """Draw an image [side, side, 3] uint8: noise, and rectangles of other colours."""
    generator = np.random.default_rng(0)
    image = generator.integers(0, 90, (side, side, 3), dtype=np.uint8)
    for left, top in generator.integers(0, 4 * side // 5, (12, 2)):
        image[top : top + side // 5, left : left + side // 5] += generator.integers(0, 160, 3, dtype=np.uint8)
    return image


def ours(model: SAM2Base, script: Script, kernels: str) -> Form:
    """Return a run of our generator on an image of the model's size."""
    _OursScripted(model, script)
    generator = SAM2AutomaticMaskGenerator(model, script.side, output_mode="uncompressed_rle")
    image = photograph(model.image_size)

    def form() -> tuple[Tensor, ...]:
        script.begin()
        model.kernels = kernels
        return script.result(generator.generate(image))

    return form


def theirs(official: Any, script: Script, dtype: torch.dtype) -> Form:
    """Return a run of Meta's generator on the same image."""
    from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator as Official

    decode, side = official.sam_mask_decoder.forward, official.image_size

    def forward(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
        masks, iou, *others = decode(*arguments, **options)
        rows = script.heard(iou)
        kept = script.kept[(script.kept >= rows.start) & (script.kept < rows.stop)]
        script.made(masks[kept - rows.start])
        masks = masks.float()
        masks[kept - rows.start] = script.low_res[kept // 10]
        return masks, script.iou[rows], *others

    official.sam_mask_decoder.forward = forward
    generator = Official(official, script.side, output_mode="uncompressed_rle")
    generator.predictor._bb_feat_sizes = [(side // stride,) * 2 for stride in (4, 8, 16)]
    image = photograph(side)

    def form() -> tuple[Tensor, ...]:
        script.begin()
        with officially(official, dtype):
            return script.result(generator.generate(image))

    return form


def plainly(model: SAM2Base, script: Script) -> tuple[Tensor, ...]:
    """Return the rows of the script that a run should, by the official formulas in the model's dtype."""
    model.kernels, rows = "reference", script.rows
    embedding = model.encode(photograph(model.image_size))
    grid = model.image_size * torch.from_numpy(amg.build_point_grid(script.side)).float()

    def said(clicks: Sequence[int] | Tensor) -> DecodedMasks:
        points = grid[clicks][:, None], torch.ones(len(clicks), 1, dtype=torch.int64)
        batch = PromptBatch.from_tensors(points, None, None, model.device, model.prompt_layout)
        return model.decode([embedding], batch, multimask_output=True)

    masks = said(script.kept[rows]).logits[..., ::32, ::32].flatten(1)
    return script.numbers()[rows], said(rows).iou, masks


def automatic(model: SAM2Base, side: int, dtype: torch.dtype, path: str | None) -> Problem:
    """Return the problem of ``side`` x ``side`` clicks on an image, for a model in fp32 of random weights.

    It is held beside Meta's, or without it beside the official formulas, and its budget is that of the formulas.
    """
    script = Script(side, model)
    exact, plain = (copy.deepcopy(model).to(kind) for kind in (torch.float64, dtype))
    if path is not None:
        baseline, forms = SAM2, {SAM2: theirs(official_copy(path, model), script, dtype)}
    else:
        baseline = "reference"
        forms = {baseline: ours(copy.deepcopy(plain), script, baseline)}
    forms["torch"] = ours(copy.deepcopy(plain), script, "torch")
    moved, flops = decoder_work.totals(decoder_work.passes(script.clicks))
    encoder = encoder_work(model, 1, dtype.itemsize)
    work = replace(encoder, bytes=encoder.bytes + moved, flops=encoder.flops + flops)
    return Problem(
        forms,
        lambda: plainly(exact, script),
        script.rows,
        work,
        compile=False,
        baseline=baseline,
        plain=lambda: plainly(plain, script),
    )


def _automatic(side: int) -> Callable[[torch.device, torch.dtype], Problem]:
    return lambda device, dtype: automatic(random_sam2(VARIANT, SIZE), side, dtype, sam2_path())


CASES = [
    Case(f"{VARIANT}, 1 point, masks of {SIZE} x {SIZE}", _prompts(1)),
    Case(f"{VARIANT}, 64 points, masks of {SIZE} x {SIZE}", _prompts(64)),
    Case(
        f"{VARIANT}, automatic masks, 32 x 32 clicks, a tenth kept",
        _automatic(32),
        devices=("cpu",),
        dtypes=(torch.float32, torch.bfloat16),
        runs=3,
        late=True,
    ),
]
