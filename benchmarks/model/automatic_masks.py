"""The tail of automatic masks: everything after the decoder, from low-resolution logits to records.

Both generators run as they are, with the encoder and the decoder replaced by logits made before. A tenth of the masks
is stable; all pass the predicted IoU, so all are measured at full size.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import sam
from fastsam_kernels import nms
from sam import SamAutomaticMaskGenerator
from sam.embedding import ImageEmbedding
from sam.images.geometry import ImageGeometry
from sam.inference.fused_decoder import DecodedPrompts
from sam.inference.packed_weights import pack_decoder
from sam.masks.results import DecodedMasks
from sam.prompts.batch import PromptBatch
from sam.utils import amg

from ..case import Case, Problem
from ..measure import Form, Work
from ..operations.mask_postprocess import discs
from ..peers import SegmentAnything, chosen_peers

_POINTS_CHUNK = 64
SIDE = 256  # of the logits


def logits_of(masks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return logits [masks / 3, 3, 256, 256], one in ten of them stable, and predicted IoU [masks / 3, 3]."""
    steepness = torch.where(torch.arange(masks) % 10 == 0, 150.0, 20.0)
    iou = torch.linspace(0.99, 0.9, masks, device=device)
    return discs(masks, SIDE, device, torch.float32, steepness).unflatten(0, (-1, 3)), iou.unflatten(0, (-1, 3))


class Tail:
    """The work after the decoder on one image whose masks are known already."""

    def __init__(self, masks: int, size: tuple[int, int], device: torch.device) -> None:
        # A small encoder: it is never run.
        config = replace(sam.VARIANTS["nano"], image_size=4 * SIDE)
        self.model = sam.build_from_config(config).requires_grad_(False).eval().to(device)
        self.low_res, self.iou = logits_of(masks, device)
        self.image = np.zeros((*size, 3), np.uint8)
        self.grid = [np.random.default_rng(0).random((masks // 3, 2))]

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from zip(self.low_res.split(_POINTS_CHUNK), self.iou.split(_POINTS_CHUNK), strict=True)

    def ours(self, kernels: str) -> Callable[[], list[dict[str, Any]]]:
        geometry = ImageGeometry.longest_side(*self.image.shape[:2], 4 * SIDE)
        embedding = ImageEmbedding(torch.zeros(1, 256, SIDE // 4, SIDE // 4, device=self.model.device), geometry)
        generator = SamAutomaticMaskGenerator(self.model, None, point_grids=self.grid, output_mode="coco_rle")

        packed = pack_decoder(self.model.mask_decoder)

        def run() -> list[dict[str, Any]]:
            first = 0

            def decode_tokens(embeddings: Sequence[ImageEmbedding], batch: PromptBatch, _: None) -> DecodedPrompts:
                nonlocal first
                rows = torch.arange(first, first + len(batch), device=self.iou.device)
                first += len(batch)
                return DecodedPrompts(rows, rows, F.pad(self.iou[rows], (1, 0)), (1, 1), packed)

            def decode_masks(decoded: DecodedPrompts, multimask_output: bool, rows: Tensor) -> DecodedMasks:
                return DecodedMasks(self.low_res[decoded.keys[rows]], self.iou[decoded.keys[rows]])

            self.model.kernels = kernels
            self.model.decode_tokens, self.model.decode_masks = decode_tokens, decode_masks  # type: ignore[method-assign, assignment]
            return drain(generator.steps(embedding))

        return run

    def official(self, peer: SegmentAnything) -> Callable[[], list[dict[str, Any]]]:
        chunks = self._chunks()
        geometry = ImageGeometry.longest_side(*self.image.shape[:2], 4 * SIDE)
        model: Any = peer.model
        generator = peer.package.SamAutomaticMaskGenerator(model, None, point_grids=self.grid, output_mode="coco_rle")

        def predict(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
            low_res, iou = next(chunks)
            masks = model.postprocess_masks(low_res, geometry.input_size, geometry.original_size)
            return masks, iou, low_res

        generator.predictor.set_image = lambda image: None
        generator.predictor.predict_torch = predict
        return lambda: generator.generate(self.image)

    def recipe(self, dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
        """Run the official steps written out, in the official order."""
        size, input_size = self.image.shape[:2], ImageGeometry.longest_side(*self.image.shape[:2], 4 * SIDE).input_size
        data = amg.MaskData()
        for low_res, iou in zip(self.low_res.split(_POINTS_CHUNK), self.iou.split(_POINTS_CHUNK), strict=True):
            logits = F.interpolate(low_res.to(dtype), (4 * SIDE, 4 * SIDE), mode="bilinear")
            logits = F.interpolate(logits[..., : input_size[0], : input_size[1]], size, mode="bilinear").flatten(0, 1)
            part = amg.MaskData(logits=logits, iou=iou.flatten())
            part.filter(part["iou"] > 0.88)
            part["stability"] = amg.calculate_stability_score(part["logits"], 0.0, 1.0)
            part.filter(part["stability"] >= 0.95)
            masks = part["logits"] > 0
            del part["logits"]
            part["boxes"], part["rles"] = amg.batched_mask_to_box(masks), amg.mask_to_rle_pytorch(masks)
            data.cat(part)
        data.filter(nms(data["boxes"], data["iou"], 0.7))
        return [
            {
                "segmentation": amg.coco_encode_rle(rle),
                "area": amg.area_from_rle(rle),
                "bbox": amg.box_xyxy_to_xywh(box).tolist(),
                "stability_score": score.item(),
            }
            for rle, box, score in zip(data["rles"], data["boxes"], data["stability"], strict=True)
        ]


def drain(steps: Generator[int, None, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Run the steps to the end and return the records."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def numbers(records: list[dict[str, Any]]) -> Tensor:
    """Return area, box and stability of each record, to compare."""
    rows = [[record["area"] ** 0.5, *record["bbox"], record["stability_score"]] for record in records]
    return torch.tensor(rows, dtype=torch.float64)


def _case(masks: int, size: tuple[int, int]) -> Callable[[torch.device, torch.dtype], Problem]:
    def make(device: torch.device, dtype: torch.dtype) -> Problem:
        tail = Tail(masks, size, device)
        truth = numbers(tail.recipe(torch.float64))

        def form(run: Callable[[], list[dict[str, Any]]]) -> Form:
            return lambda: numbers(run())

        forms = {"reference": form(tail.recipe), "torch": form(tail.ours("torch"))}
        if device.type == "cuda":
            forms["triton"] = form(tail.ours("triton"))
        for name, peer in chosen_peers(tail.model).items():
            if isinstance(peer, SegmentAnything):
                forms[name] = form(tail.official(peer))
        work = Work(bytes=tail.low_res.nbytes, flops=0)
        return Problem(forms, lambda: truth, list(range(len(truth))), work, compile=False)

    return make


CASES = [
    Case(f"automatic masks, tail of {masks} masks, {size[0]}x{size[1]}", _case(masks, size), devices, (torch.float32,))
    for masks, devices in ((192, ("cpu",)), (3072, ("cuda",)))
    for size in ((1024, 1024), (1500, 2250))
]
