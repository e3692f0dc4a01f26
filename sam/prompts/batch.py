"""Prompts as the decoder takes them: P of them in one batch, padded to the longest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..images.geometry import ImageGeometry
from .labels import LABEL_ABSENT, LABEL_BOX_BOTTOM_RIGHT
from .layout import PromptLayout
from .prompt import Prompt
from .tensors import append_padding_point, box_labels, check_prompts


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
        image_index: [P] int64, the image of each prompt; None when there is one image.
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
        """Return prompts ``start`` to ``stop``."""
        cut = slice(start, stop)
        return PromptBatch(
            self.coords[cut],
            self.labels[cut],
            None if self.mask_inputs is None else self.mask_inputs[cut],
            None if self.image_index is None else self.image_index[cut],
            self.ragged,
        )

    def is_of_one_kind(self, layout: PromptLayout) -> bool:
        """Return whether one official call takes all prompts: all have as many points, and all or none have a box."""
        if layout is PromptLayout.BOX_FIRST:  # where corners are points
            return not self.ragged
        boxed = (self.labels[:, -1:] == LABEL_BOX_BOTTOM_RIGHT).flatten().tolist()
        return not self.ragged and len(set(boxed)) <= 1

    def points_and_boxes(self, layout: PromptLayout) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
        """Return the official prompt encoder's arguments, (points, labels) and boxes, of prompts of one kind.

        Those of SAM 2 have corners among the points and no boxes.
        """
        present = (self.labels != LABEL_ABSENT).all(dim=0)
        coords, labels = self.coords[:, present], self.labels[:, present]
        if layout is PromptLayout.POINTS_FIRST and bool((labels[:, -1:] == LABEL_BOX_BOTTOM_RIGHT).any()):
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
        layout: PromptLayout,
    ) -> PromptBatch:
        """Batch prompts of one kind, already in the input frame: the official ``predict_torch`` arguments.

        Args:
            points: coordinates [P, N, 2] and labels [P, N]; with ``BOX_FIRST`` corners of boxes may be among them.
            boxes: [P, 4].
            mask_inputs: [P, 1, h, w]; one mask serves all points, and one set of points all masks.
            layout: the model's token order.

        Raises:
            ValueError: NaN, infinity, an unknown label or a coordinate too far away in tensors on the CPU.
        """
        check_prompts(points, boxes, mask_inputs, corners=layout is PromptLayout.BOX_FIRST)
        clicks = corners = None
        if points is not None:
            clicks = coordinates_on(points[0], device), points[1].to(device, torch.int64)
        if boxes is not None:
            pairs = coordinates_on(boxes, device).reshape(-1, 2, 2)
            corners = pairs, box_labels(pairs)
        parts, padded = layout.arrange(clicks, corners)
        if not parts:
            coords = torch.empty((1, 0, 2), dtype=torch.float32, device=device)
            labels = torch.empty((1, 0), device=device, dtype=torch.int64)
        elif len(parts) == 1:
            coords, labels = parts[0]
        else:
            coords, labels = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        if padded:
            coords, labels = append_padding_point(coords, labels)
        if mask_inputs is not None:
            prompts = max(len(coords), len(mask_inputs))
            mask_inputs = mask_inputs.to(device, torch.float32).expand(prompts, -1, -1, -1)
            coords, labels = coords.expand(prompts, -1, -1), labels.expand(prompts, -1)
        return cls(coords, labels, mask_inputs)


@dataclass(frozen=True)
class RaggedChunk:
    """A chunk of the prompts of a ragged request, and their positions in it."""

    positions: list[int]
    batch: PromptBatch

    @property
    def rows(self) -> slice | Tensor:
        """Return the positions as an index of tensors on the batch's device."""
        if all(later == position + 1 for position, later in pairwise(self.positions)):
            return slice(self.positions[0], self.positions[-1] + 1)
        return upload(np.array(self.positions, np.int64), self.batch.coords.device)


def ragged_chunks(
    prompts: Sequence[Sequence[Prompt]],
    geometries: Sequence[ImageGeometry],
    device: torch.device,
    prompts_per_chunk: int,
    layout: PromptLayout,
) -> Iterator[RaggedChunk]:
    """Batch prompts of several images, prompts of like length together so that little is padded.

    Args:
        prompts: for each image its prompts.
        geometries: one per image.
        prompts_per_chunk: maximum number of prompts per chunk.
        layout: the model's token order.

    Yields:
        chunks that together hold every prompt once; positions count prompts image by image.
    """
    entries: list[tuple[int, int, np.ndarray, np.ndarray, np.ndarray | None]] = []
    for index, (of_image, geometry) in enumerate(zip(prompts, geometries, strict=True)):
        for prompt in of_image:
            coords, labels = prompt.tokens(geometry, layout)
            entries.append((len(entries), index, coords, labels, prompt.mask_input))
    for with_mask in (False, True):
        group = sorted((e for e in entries if (e[4] is not None) == with_mask), key=lambda e: len(e[3]))
        for start in range(0, len(group), prompts_per_chunk):
            yield _collate(group[start : start + prompts_per_chunk], with_mask, device)


def _collate(chunk: list[tuple[Any, ...]], with_mask: bool, device: torch.device) -> RaggedChunk:
    positions, images, all_coords, all_labels, masks = zip(*chunk, strict=True)
    longest = max(len(labels) for labels in all_labels)
    coords = np.zeros((len(chunk), longest, 2), np.float32)
    labels = np.full((len(chunk), longest), LABEL_ABSENT, np.int64)
    for row, (prompt_coords, prompt_labels) in enumerate(zip(all_coords, all_labels, strict=True)):
        coords[row, : len(prompt_labels)] = prompt_coords
        labels[row, : len(prompt_labels)] = prompt_labels
    batch = PromptBatch(
        upload(coords, device),
        upload(labels, device),
        upload(np.stack(masks), device) if with_mask else None,
        upload(np.array(images, np.int64), device),
        ragged=bool((labels == LABEL_ABSENT).any()),
    )
    return RaggedChunk(list(positions), batch)


def upload(table: np.ndarray, device: torch.device) -> Tensor:
    """Copy a table to ``device`` without a wait for it: the encoder may still be at work there."""
    return torch.from_numpy(table).to(device, non_blocking=True)
