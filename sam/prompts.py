"""Prompts as people give them, checked, and as the decoder takes them, batched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .modeling.prompt_encoder import (
    LABEL_ABSENT,
    LABEL_BOX_BOTTOM_RIGHT,
    LABEL_BOX_TOP_LEFT,
    LABEL_PADDING,
    append_padding_point,
    as_array,
    box_labels,
    check_coordinates,
    check_finite,
    check_labels,
    check_prompts,
)
from .preprocess import ImageGeometry

Corners = TypeVar("Corners", bound="np.ndarray | Sequence[float]")


@dataclass(frozen=True, eq=False)
class Prompt:
    """One question about one image; any combination of the three kinds, also none.

    Attributes:
        points: [N, 2] clicks as (x, y) in pixels of the original image.
        labels: [N], 1 for a click on the object, 0 for one on the background, -1 for padding.
        box: [4] as x0, y0, x1, y1 in pixels of the original image; it may reach over the image's edges.
        mask_input: [1, h, w] low-resolution logits, as an earlier prediction returned them.

    Raises:
        TypeError: what is no array of numbers.
        ValueError: points without labels or the reverse, lengths that differ, a label outside {-1, 0, 1}, a wrong
            shape, a box with x1 < x0 or y1 < y0, NaN or infinity, a coordinate further than ``MAX_COORDINATE`` (1e30)
            from 0.
    """

    points: Any = None
    labels: Any = None
    box: Any = None
    mask_input: Any = None

    def __post_init__(self) -> None:
        if (self.points is None) != (self.labels is None):
            missing, given = ("labels", "points") if self.labels is None else ("points", "labels")
            raise ValueError(f"{missing} must be given with {given}")
        if self.points is not None:
            points = _numbers("points", self.points, "[N, 2]", np.float64)
            labels = _numbers("labels", self.labels, "[N]")
            if points.shape == (0,):  # an empty list
                points = points.reshape(0, 2)
            if points.ndim != 2 or points.shape[1] != 2:
                raise ValueError(f"points must be [N, 2], got {list(points.shape)}")
            if labels.shape != points.shape[:1]:
                raise ValueError(f"{len(points)} points need labels of shape [{len(points)}], got {list(labels.shape)}")
            check_labels(labels)
            check_coordinates("points", points)
            self._set(points=points, labels=labels.astype(np.int64))
        if self.box is not None:
            box = _numbers("box", self.box, "[4]", np.float64)
            if box.size != 4:
                raise ValueError(f"box must be x0, y0, x1, y1 of shape [4], got {list(box.shape)}")
            check_coordinates("box", box)
            self._check_corners(box.reshape(4))
            self._set(box=box.reshape(4))
        if self.mask_input is not None:
            mask_input = _numbers("mask_input", self.mask_input, "[1, h, w]", np.float32)
            if mask_input.ndim != 3 or mask_input.shape[0] != 1:
                raise ValueError(f"mask_input must be [1, h, w], got {list(mask_input.shape)}")
            check_finite("mask_input", mask_input)
            self._set(mask_input=mask_input)

    def _check_corners(self, box: np.ndarray) -> None:
        check_corners(box)

    def _set(self, **values: np.ndarray) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def tokens(self, geometry: ImageGeometry) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates [S, 2] in the input frame and labels [S], in the order the model was trained with."""
        coords, labels = np.empty((0, 2)), np.empty(0, np.int64)
        if self.points is not None:
            coords, labels = self.points, self.labels
            if self.box is None:
                coords, labels = np.vstack([coords, [(0.0, 0.0)]]), np.append(labels, LABEL_PADDING)
        if self.box is not None:
            coords = np.vstack([coords, self.box.reshape(2, 2)])
            labels = np.append(labels, [LABEL_BOX_TOP_LEFT, LABEL_BOX_BOTTOM_RIGHT])
        return coords * geometry.scale, labels


class OfficialPrompt(Prompt):
    """A prompt of the official predictor, which takes the corners of a box in any order."""

    def _check_corners(self, box: np.ndarray) -> None:
        pass


def check_corners(box: Corners) -> Corners:
    """Return a box whose corners are in order.

    Raises:
        ValueError: they are not.
    """
    x0, y0, x1, y1 = box
    if x1 < x0 or y1 < y0:
        raise ValueError(f"box must be x0, y0, x1, y1 with x0 <= x1 and y0 <= y1, got {[float(side) for side in box]}")
    return box


def _numbers(name: str, values: Any, shape: str, dtype: Any = None) -> np.ndarray:
    """Copy ``values`` to an array of numbers."""
    try:
        array = np.array(as_array(values), dtype=dtype)
    except (TypeError, ValueError):
        array = None
    if array is None or array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be an array of numbers {shape}, got {type(values).__name__} {values!r:.80}")
    return array


def coordinates_on(values: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
    """Return ``values`` on ``device``, in fp32 but where fp64 was given and the device is known to have it.

    Pixels in fp64 divided by the image size are rounded once, as officially.
    """
    wide = values.dtype == torch.float64 and device.type in ("cpu", "cuda")
    values = values if wide else values.to(torch.float32)
    return values if values.device == device else values.to(device, non_blocking=non_blocking)


@dataclass(frozen=True)
class PromptBatch:
    """P prompts ready for the prompt encoder; either all or none have a mask input.

    Attributes:
        coords: [P, S, 2] fp32 or fp64, pixels of the padded input.
        labels: [P, S], the prompt encoder's ``LABEL_*``; ``LABEL_ABSENT`` fills the shorter prompts.
        mask_inputs: [P, 1, h, w] fp32, or None.
        image_index: [P] int64, which image each prompt asks about; None when there is one image.
        ragged: some label is ``LABEL_ABSENT``.
    """

    coords: Tensor
    labels: Tensor
    mask_inputs: Tensor | None = None
    image_index: Tensor | None = None
    ragged: bool = False

    def __len__(self) -> int:
        return self.labels.shape[0]

    def rows(self, start: int, stop: int) -> PromptBatch:
        """Prompts ``start`` to ``stop``."""
        cut = slice(start, stop)
        return PromptBatch(
            self.coords[cut],
            self.labels[cut],
            None if self.mask_inputs is None else self.mask_inputs[cut],
            None if self.image_index is None else self.image_index[cut],
            self.ragged,
        )

    @property
    def of_one_kind(self) -> bool:
        """Whether all have as many points and all or none have a box."""
        boxed = (self.labels[:, -1:] == LABEL_BOX_BOTTOM_RIGHT).flatten().tolist()
        return not self.ragged and len(set(boxed)) <= 1

    def points_and_boxes(self) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
        """What the official prompt encoder takes: (points, their labels) and boxes, of prompts of one kind."""
        present = (self.labels != LABEL_ABSENT).all(dim=0)
        coords, labels = self.coords[:, present], self.labels[:, present]
        if bool((labels[:, -1:] == LABEL_BOX_BOTTOM_RIGHT).any()):
            boxes = coords[:, -2:].flatten(1)
            coords, labels = coords[:, :-2], labels[:, :-2]
        else:  # the encoder appends the padding point itself
            boxes, coords, labels = None, coords[:, :-1], labels[:, :-1]
        return (coords, labels) if labels.shape[1] else None, boxes

    @classmethod
    def from_tensors(
        cls,
        points: tuple[Tensor, Tensor] | None,
        boxes: Tensor | None,
        mask_inputs: Tensor | None,
        device: torch.device,
    ) -> PromptBatch:
        """Prompts of one kind each, already in the input frame: the official ``predict_torch`` arguments.

        Args:
            points: coordinates [P, N, 2] and labels [P, N].
            boxes: [P, 4].
            mask_inputs: [P, 1, h, w]; one mask serves all points, and one set of points all masks.

        Raises:
            ValueError: NaN, infinity, an unknown label or a coordinate too far away in tensors on the CPU.
        """
        check_prompts(points, boxes, mask_inputs)
        coords = torch.empty((1, 0, 2), dtype=torch.float32, device=device)
        labels = torch.empty((1, 0), device=device, dtype=torch.int64)
        if points is not None:
            coords, labels = coordinates_on(points[0], device), points[1].to(device, torch.int64)
            if boxes is None:
                coords, labels = append_padding_point(coords, labels)
        if boxes is not None:
            corners = coordinates_on(boxes, device).reshape(-1, 2, 2)
            pair = box_labels(corners)
            coords = torch.cat([coords, corners], dim=1) if points is not None else corners
            labels = torch.cat([labels, pair], dim=1) if points is not None else pair
        if mask_inputs is not None:
            prompts = max(len(coords), len(mask_inputs))
            mask_inputs = mask_inputs.to(device, torch.float32).expand(prompts, -1, -1, -1)
            coords, labels = coords.expand(prompts, -1, -1), labels.expand(prompts, -1)
        return cls(coords, labels, mask_inputs)


@dataclass(frozen=True)
class RaggedChunk:
    """Some of the prompts of a ragged request, and their places in it."""

    places: list[int]
    batch: PromptBatch

    @property
    def rows(self) -> slice | Tensor:
        """The places as an index of tensors on the batch's device."""
        if all(later == place + 1 for place, later in pairwise(self.places)):
            return slice(self.places[0], self.places[-1] + 1)
        return upload(np.array(self.places, np.int64), self.batch.coords.device)


def ragged_chunks(
    prompts: Sequence[Sequence[Prompt]],
    geometries: Sequence[ImageGeometry],
    device: torch.device,
    prompts_per_chunk: int,
) -> Iterator[RaggedChunk]:
    """Batch prompts of several images, prompts of like length together so that little is padded.

    Args:
        prompts: for each image its prompts.
        geometries: one an image.
        prompts_per_chunk: the most prompts of a chunk.

    Yields:
        chunks that together hold every prompt once; a place counts prompts image by image.
    """
    entries: list[tuple[int, int, np.ndarray, np.ndarray, np.ndarray | None]] = []
    for index, (of_image, geometry) in enumerate(zip(prompts, geometries, strict=True)):
        for prompt in of_image:
            coords, labels = prompt.tokens(geometry)
            entries.append((len(entries), index, coords, labels, prompt.mask_input))
    for with_mask in (False, True):
        group = sorted((e for e in entries if (e[4] is not None) == with_mask), key=lambda e: len(e[3]))
        for start in range(0, len(group), prompts_per_chunk):
            yield _collate(group[start : start + prompts_per_chunk], with_mask, device)


def _collate(chunk: list[tuple[Any, ...]], with_mask: bool, device: torch.device) -> RaggedChunk:
    places, images, all_coords, all_labels, masks = zip(*chunk, strict=True)
    longest = max(len(labels) for labels in all_labels)
    coords = np.zeros((len(chunk), longest, 2), np.float32)
    labels = np.full((len(chunk), longest), LABEL_ABSENT, np.int64)
    for row, (some_coords, some_labels) in enumerate(zip(all_coords, all_labels, strict=True)):
        coords[row, : len(some_labels)] = some_coords
        labels[row, : len(some_labels)] = some_labels
    batch = PromptBatch(
        upload(coords, device),
        upload(labels, device),
        upload(np.stack(masks), device) if with_mask else None,
        upload(np.array(images, np.int64), device),
        ragged=bool((labels == LABEL_ABSENT).any()),
    )
    return RaggedChunk(list(places), batch)


def upload(table: np.ndarray, device: torch.device) -> Tensor:
    """Without a wait for the device, where the encoder may still be at work."""
    return torch.from_numpy(table).to(device, non_blocking=True)
