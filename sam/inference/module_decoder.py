"""Prompts to masks by the official calls, for modules that the fused form cannot stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..embedding import ImageEmbedding
from ..masks.results import DecodedMasks
from ..prompts.batch import PromptBatch
from .module_calls import call_modules
from .parts import Model


@dataclass(frozen=True)
class MadeMasks:
    """P prompts whose M masks are made already, by modules whose ``forward`` cannot be split in two.

    Attributes:
        logits: [P, M, h, w], the single mask first.
        iou: [P, M] predicted IoU of each.
        object_scores: [P], or None.
    """

    logits: Tensor
    iou: Tensor
    object_scores: Tensor | None


def decode_by_modules(
    model: Model,
    embeddings: Sequence[ImageEmbedding],
    batch: PromptBatch,
    multimask_output: bool,
    dtype: torch.dtype,
) -> DecodedMasks:
    """Decode prompts to values in ``dtype``.

    The official calls take prompts of one image and of one kind; others go one by one.
    """
    layout, parts = model.prompt_layout, (model.prompt_encoder, model.mask_decoder)
    alike = len(embeddings) == 1 and batch.is_of_one_kind(layout)
    answers = []
    for part in [batch] if alike else [batch.rows(row, row + 1) for row in range(len(batch))]:
        image = 0 if part.image_index is None or len(embeddings) == 1 else int(part.image_index[0])
        points, boxes = part.points_and_boxes(layout)
        features = embeddings[image].ready()
        answers.append(call_modules(*parts, features, points, boxes, part.mask_inputs, multimask_output, layout))
    return join(answers, dtype)


def join(answers: Sequence[DecodedMasks], dtype: torch.dtype) -> DecodedMasks:
    """Concatenate answers, in ``dtype``."""

    def joined(parts: tuple[Tensor, ...]) -> Tensor:
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)

    logits, iou, scores = zip(*answers, strict=True)
    return DecodedMasks(joined(logits), joined(iou), None if scores[0] is None else joined(scores))
