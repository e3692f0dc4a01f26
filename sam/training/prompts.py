"""Prompts as SAM was trained with them, drawn on the device for all objects of a batch at once.

N objects of B pictures of ``size`` pixels; a prompt is coordinates [N, S, 2] and labels [N, S], as the prompt
encoder takes them. Source: Segment Anything (arXiv 2304.02643), appendix A, "Training algorithm".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..prompts.labels import LABEL_BACKGROUND, LABEL_FOREGROUND, LABEL_PADDING
from ..prompts.tensors import box_labels

BOX_NOISE = 0.1  # standard deviation of a box's sides, as a share of its width or height
BOX_NOISE_LIMIT = 20.0  # pixels of a 1024 px picture


@dataclass(frozen=True)
class Objects:
    """Hold the objects of a batch: masks [N, H, W] bool, and the index of each one's picture, [N] int64."""

    masks: Tensor
    image_index: Tensor


def choose_objects(ids: Tensor, parents: Tensor, per_image: int, min_pixels: int, generator: Generator) -> Objects:
    """Draw objects and parts of each picture, small ones as often as large ones.

    Args:
        ids: [B, H, W] uint8 visible ids, 0 for the ground.
        parents: [B, 256] uint8, the object that a part belongs to, else 0.
        per_image: draws per picture, with replacement; a picture without objects gives none.
        min_pixels: pixels that an object must show.
    """
    batch = ids.shape[0]
    flat = ids.flatten(1).long()
    shown = torch.zeros(batch, 256, device=ids.device).scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.float32))
    areas = shown.scatter_add(1, parents.long(), shown * (parents > 0))
    weights = (areas >= min_pixels).float()
    weights[:, 0] = 0
    has_objects = weights.sum(1) > 0
    drawn = torch.multinomial(
        weights + (~has_objects[:, None]).float(), per_image, replacement=True, generator=generator
    )
    image_index = torch.arange(batch, device=ids.device)[has_objects].repeat_interleave(per_image)
    object_ids = drawn[has_objects].flatten().to(ids.dtype)[:, None, None]
    owners = parents.gather(1, flat).view(ids.shape)
    masks = (ids[image_index] == object_ids) | (owners[image_index] == object_ids)
    return Objects(masks, image_index)


def random_clicks(regions: Tensor, generator: Generator) -> Tensor:
    """Draw one pixel of each region [N, H, W] bool, all equally likely: [N, 2] (x, y) fp32; (0, 0) of an empty one."""
    rows = regions.sum(2)
    rank = _uniform(rows.sum(1), generator)  # which of the region's pixels, in reading order
    below = rows.cumsum(1)
    y = _first_above(below, rank)
    row = regions.gather(1, y[:, None, None].expand(-1, 1, regions.shape[2]))[:, 0]
    rank = rank - (below.gather(1, y[:, None])[:, 0] - row.sum(1))
    x = _first_above(row.cumsum(1), rank)
    return torch.stack([x, y], dim=1).float()


def tight_boxes(masks: Tensor) -> Tensor:
    """Return boxes [N, 4] as x0, y0, x1, y1 around masks [N, H, W], none empty, with the last row and column inside."""
    sides = []
    for axis in (1, 2):  # columns, then rows
        line = masks.any(axis).to(torch.uint8)
        first, last = line.argmax(1), line.shape[1] - line.flip(1).argmax(1)
        sides.append((first, last))
    (x0, x1), (y0, y1) = sides
    return torch.stack([x0, y0, x1, y1], dim=1).float()


def jitter_boxes(boxes: Tensor, size: int, generator: Generator) -> Tensor:
    """Move the sides of boxes at random, within the picture: 10 % of the side, at most 20 px in 1024.

    No side moves by more than a third of the box, so a box never turns inside out.
    """
    extent = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    noise = BOX_NOISE * extent * torch.randn(boxes.shape, dtype=torch.float32, device=boxes.device, generator=generator)
    limit = (extent / 3).clamp(max=BOX_NOISE_LIMIT * size / 1024)
    return (boxes + noise.clamp(-limit, limit)).clamp(0, size)


def first_prompts(objects: Objects, box_share: float, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a click anywhere inside each object, or a jittered box around it.

    Returns:
        coordinates [N, 2, 2], labels [N, 2], and which prompts are clicks, [N] bool.
    """
    masks = objects.masks
    is_click = torch.rand(len(masks), dtype=torch.float32, device=masks.device, generator=generator) >= box_share
    clicks = random_clicks(masks, generator)
    boxes = jitter_boxes(tight_boxes(masks), masks.shape[-1], generator).view(-1, 2, 2)
    click_coords = torch.stack([clicks, torch.zeros_like(clicks)], dim=1)
    click_labels = torch.tensor([LABEL_FOREGROUND, LABEL_PADDING], device=masks.device).expand(len(masks), 2)
    coords = torch.where(is_click[:, None, None], click_coords, boxes)
    return coords, torch.where(is_click[:, None], click_labels, box_labels(boxes)), is_click


def add_corrections(
    coords: Tensor, labels: Tensor, logits: Tensor, masks: Tensor, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Append a click on a random pixel that the prediction got wrong; on the object where nothing is wrong.

    Args:
        coords, labels: [N, S, 2] and [N, S].
        logits: [N, h, w] low-resolution prediction.
        masks: [N, H, W] bool truth.
    """
    predicted = upsample(logits, masks.shape[-1]) > 0
    wrong = predicted != masks
    wrong = torch.where(wrong.any((1, 2), keepdim=True), wrong, masks)
    clicks = random_clicks(wrong, generator)
    return append_clicks(coords, labels, clicks, masks)


def append_clicks(coords: Tensor, labels: Tensor, clicks: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Append clicks [N, 2], labelled by the mask at their position."""
    rows = torch.arange(len(masks), device=masks.device)
    inside = masks[rows, clicks[:, 1].long(), clicks[:, 0].long()]
    label = torch.where(inside, LABEL_FOREGROUND, LABEL_BACKGROUND)
    return torch.cat([coords, clicks[:, None]], dim=1), torch.cat([labels, label[:, None]], dim=1)


def upsample(logits: Tensor, size: int) -> Tensor:
    """Resize low-resolution logits [N, h, w] to ``size`` pixels per side, as the predictor does it."""
    return F.interpolate(logits[:, None].float(), (size, size), mode="bilinear", align_corners=False)[:, 0]


def _uniform(counts: Tensor, generator: Generator) -> Tensor:
    """Draw [N] integers, each uniform in 0..count - 1 (0 where the count is 0)."""
    draw = torch.rand(counts.shape, device=counts.device, dtype=torch.float64, generator=generator)
    return (draw * counts).long()


def _first_above(cumulative: Tensor, rank: Tensor) -> Tensor:
    """Return the first index [N] at which the running count [N, L] exceeds ``rank`` [N]; the last where none does."""
    index = torch.searchsorted(cumulative.contiguous(), rank[:, None], right=True)[:, 0]
    return index.clamp(max=cumulative.shape[1] - 1)
