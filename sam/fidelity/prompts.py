"""Prompts for images without labels, and what a model answers to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..automatic_mask_generator import SamAutomaticMaskGenerator
from ..embedding import ImageEmbedding
from ..masks import rle
from ..modeling.promptable import PromptableModel
from ..prompts.prompt import Prompt
from ..utils.amg import batched_mask_to_box

_MIN_BOX_SIDE = 4  # pixels


@dataclass(frozen=True)
class Answers:
    """The answers of one model to one image.

    Attributes:
        embedding: its features, in fp32.
        box_masks: [B, H, W] bool, a mask per box.
        box_iou: [B] predicted IoU.
        click_masks: [C, 3, H, W] bool.
        click_iou: [C, 3] predicted IoU.
        automatic: [A, H, W] bool.
    """

    embedding: Tensor
    box_masks: Tensor
    box_iou: Tensor
    click_masks: Tensor
    click_iou: Tensor
    automatic: Tensor


def grid_of_clicks(image: np.ndarray, side: int) -> list[Prompt]:
    """Return clicks in the middles of a grid of ``side`` x ``side`` cells."""
    height, width = image.shape[:2]
    middles = (np.arange(side) + 0.5) / side
    return [Prompt([(x * width, y * height)], [1]) for y in middles for x in middles]


def boxes_of(model: PromptableModel, embedding: ImageEmbedding, clicks: Sequence[Prompt]) -> list[Prompt]:
    """Return the boxes of the masks that ``model`` rates best for ``clicks``, each once."""
    prediction = model.predict(embedding, clicks)
    best = prediction.masks[torch.arange(len(clicks)), prediction.iou_predictions.argmax(1)]
    boxes = batched_mask_to_box(best).float()
    sides = (boxes[:, 2:] - boxes[:, :2]).amin(1)  # those of an empty mask are 0
    return [Prompt(box=box) for box in dict.fromkeys(map(tuple, boxes[sides >= _MIN_BOX_SIDE].tolist()))]


def answer(
    model: PromptableModel, image: np.ndarray, clicks: Sequence[Prompt], boxes: Sequence[Prompt], points_per_side: int
) -> Answers:
    """Return what a model answers to clicks, boxes and a grid of automatic masks."""
    embedding = model.encode(image)
    of_boxes = model.predict(embedding, boxes, multimask_output=False)
    of_clicks = model.predict(embedding, clicks)
    generator = SamAutomaticMaskGenerator(model, points_per_side, output_mode="uncompressed_rle")
    records: list[dict[str, Any]] = generator.generate(image)
    masks = [torch.from_numpy(rle.decode(record["segmentation"])) for record in records]
    return Answers(
        embedding.features.float().cpu(),
        of_boxes.masks[:, 0].cpu(),
        of_boxes.iou_predictions[:, 0].cpu(),
        of_clicks.masks.cpu(),
        of_clicks.iou_predictions.cpu(),
        torch.stack(masks) if masks else torch.zeros(0, *image.shape[:2], dtype=torch.bool),
    )
