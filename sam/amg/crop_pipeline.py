"""Masks from clicks on one crop of an image: of all that the decoder sees, the confident, the stable and the new.

Cheap questions come first. The predicted IoU is known before the decoder's upscaling, stability and box follow from
logits of low resolution, and what the suppression leaves is made in bits and encoded as runs.

On a GPU the host waits for the device once a batch of clicks, to know which masks are confident, and once a crop, for
the table of what is known of them with the verdict of the suppression; the runs of what is left are the last copy.
Memory allowing, all clicks are one batch and all runs one copy. What does not fit costs further waits and nothing
else: more clicks are more batches, logits over the limit become runs before the suppression, and runs for which there
was no room come in a second copy.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsam_kernels import Resizing, mask_statistics, packed_masks, ranked_nms

from ..embedding import ImageEmbedding
from ..images.geometry import ImageGeometry
from ..masks.rle_encode import encode_packed
from ..masks.upscale import resizing_of
from ..modeling.promptable import PromptableModel
from ..prompts.batch import PromptBatch, coordinates_on
from ..utils.amg import MaskData, is_box_near_crop_edge, uncrop_boxes_xyxy, uncrop_points
from .finders import Clicks, Finder, any_confident_masks
from .memory_plan import MemoryPlan


@dataclass(frozen=True)
class Criteria:
    """The criteria by which masks stay; the arguments of :class:`sam.SamAutomaticMaskGenerator` by the same names."""

    pred_iou_thresh: float
    stability_score_thresh: float
    stability_score_offset: float
    box_nms_thresh: float
    mask_threshold: float

    @property
    def iou_threshold(self) -> float | None:
        """Return the predicted IoU above which masks stay; None where all do."""
        return self.pred_iou_thresh if self.pred_iou_thresh > 0 else None


@dataclass(frozen=True)
class Crop:
    """An embedded part of an image, or all of it.

    Attributes:
        embedding: the embedding of the part.
        box: x0, y0, x1, y1 in the image.
        image_size: (height, width) of the image.
    """

    embedding: ImageEmbedding
    box: tuple[int, int, int, int]
    image_size: tuple[int, int]

    @property
    def resizing(self) -> Resizing:
        side = 4 * self.embedding.features.shape[-1]
        return resizing_of(self.embedding.geometry, (side, side))

    @property
    def is_whole(self) -> bool:
        height, width = self.image_size
        return self.box == (0, 0, width, height)


def masks_of_crop(
    model: PromptableModel,
    crop: Crop,
    clicks: np.ndarray,
    criteria: Criteria,
    plan: MemoryPlan,
    find: Finder = any_confident_masks,
) -> Generator[int, None, MaskData]:
    """Make masks at ``clicks`` [P, 2] in pixels of the crop: best first, on the host, in the frame of the image.

    ``find`` makes the masks of each batch. Yields the number of clicks of the batch when it is done; the generator
    returns ``iou_preds``, ``stability_score``, ``boxes``, ``points``, ``crop_boxes`` and ``rles``.
    """
    prompts = _prompts(model, clicks, crop.embedding.geometry)
    pending = PendingMasks(model, crop, plan, criteria.mask_threshold)
    tables = [torch.zeros(0, _Columns.COUNT, dtype=torch.float32, device=model.device)]
    for start in range(0, len(prompts), plan.points_at_once):
        part = prompts.rows(start, start + plan.points_at_once)
        batch = Clicks(model, crop.embedding, part, criteria.iou_threshold, plan.count_early, plan.low_rank)
        table, logits = _candidates(batch, crop, criteria, find)
        table[:, _Columns.CLICK] += start
        tables.append(table)
        pending.append(logits)
        yield len(part)
    table = torch.cat(tables)
    order, new = ranked_nms(
        table[:, _Columns.BOX], table[:, _Columns.IOU], criteria.box_nms_thresh, kernels=model.kernels
    )
    ranked = torch.cat([table[order], order[:, None].to(table), new[:, None].to(table)], dim=1).cpu()
    box = [*crop.box]
    ranked = ranked[(ranked[:, -1] > 0) & ~ranked[:, _Columns.CLICK].isnan()]
    return MaskData(
        iou_preds=ranked[:, _Columns.IOU],
        stability_score=ranked[:, _Columns.STABILITY],
        boxes=uncrop_boxes_xyxy(ranked[:, _Columns.BOX].long(), box),
        points=uncrop_points(torch.from_numpy(clicks)[ranked[:, _Columns.CLICK].long()], box),
        crop_boxes=torch.tensor([box] * len(ranked), dtype=torch.int64, device=ranked.device).reshape(-1, 4),
        rles=pending.encode(ranked[:, -2].long()),
    )


class _Columns:
    """Columns of the table, which has one row per mask."""

    IOU, STABILITY, BOX, CLICK, COUNT = 0, 1, slice(2, 6), 6, 7


def _prompts(model: PromptableModel, clicks: np.ndarray, geometry: ImageGeometry) -> PromptBatch:
    points = coordinates_on(torch.from_numpy(clicks * geometry.scale)[:, None], model.device, non_blocking=True)
    labels = torch.ones(points.shape[:2], dtype=torch.int64, device=points.device)
    return PromptBatch.from_tensors((points, labels), None, None, model.device, model.prompt_layout)


def _candidates(batch: Clicks, crop: Crop, criteria: Criteria, find: Finder) -> tuple[Tensor, Tensor]:
    """Return the table [N, columns] of confident masks, and their logits [N, h, w].

    With ``count_early`` without the masks that are not stable or cut off by the crop; else these stay as rows of NaN,
    whose boxes overlap nothing.
    """
    logits, iou, clicks = find(batch)
    statistics = mask_statistics(
        logits,
        crop.resizing,
        threshold=criteria.mask_threshold,
        offset=criteria.stability_score_offset,
        kernels=batch.model.kernels,
    )
    good = torch.ones_like(clicks, dtype=torch.bool)
    if criteria.stability_score_thresh > 0:
        good &= statistics.stability >= criteria.stability_score_thresh
    if not crop.is_whole:
        height, width = crop.image_size
        good &= ~is_box_near_crop_edge(statistics.boxes, [*crop.box], [0, 0, width, height])
    columns = (iou, statistics.stability, *statistics.boxes.unbind(1), clicks)
    table = torch.stack([column.to(iou.dtype) for column in columns], dim=1)
    if batch.count_early:
        return table[good], logits[good]
    return table.where(good[:, None], torch.nan), logits


class PendingMasks:
    """Logits of masks that wait for the suppression; once there are too many, the runs in their place."""

    def __init__(self, model: PromptableModel, crop: Crop, plan: MemoryPlan, threshold: float) -> None:
        self._model, self._crop, self._plan, self._threshold = model, crop, plan, threshold
        self._parts: list[Tensor | list[dict[str, Any]]] = []
        self._held = 0

    def append(self, logits: Tensor) -> None:
        self._parts.append(logits)
        self._held += logits.nbytes
        if self._held > self._plan.held_bytes:
            self._parts = [self._runs(part) if isinstance(part, Tensor) else part for part in self._parts]
            self._held = 0

    def encode(self, chosen: Tensor) -> list[dict[str, Any]]:
        """Return the runs of masks by their number, in the order of appending."""
        runs: dict[int, dict[str, Any]] = {}
        start = 0
        for part in self._parts:
            rows = chosen[(chosen >= start) & (chosen < start + len(part))] - start
            encoded = self._runs(part, rows) if isinstance(part, Tensor) else [part[row] for row in rows.tolist()]
            runs.update(zip((rows + start).tolist(), encoded, strict=True))
            start += len(part)
        return [runs[number] for number in chosen.tolist()]

    def _runs(self, logits: Tensor, rows: Tensor | None = None) -> list[dict[str, Any]]:
        rows = torch.arange(len(logits), device="cpu") if rows is None else rows
        crop, resizing = self._crop, self._crop.resizing
        runs = []
        for chunk in rows.split(self._plan.masks_at_once):
            packed = packed_masks(
                logits[chunk.to(logits.device, non_blocking=True)],
                resizing,
                threshold=self._threshold,
                kernels=self._model.kernels,
            )
            runs += encode_packed(packed, resizing.output_size, (crop.box[0], crop.box[1]), crop.image_size)
        return runs
