"""Prompts to masks by the official calls, for modules that the fused form cannot stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..embedding import ImageEmbedding
from ..prompts.batch import PromptBatch
from .module_calls import call_modules


@dataclass(frozen=True)
class MadeMasks:
    """P prompts whose M masks are made already: by modules that cannot be asked for a half.

    Attributes:
        logits: [P, M, h, w], the single mask first.
        iou: [P, M] predicted IoU of each.
    """

    logits: Tensor
    iou: Tensor


def decode_by_modules(
    prompt_encoder: Any,
    mask_decoder: Any,
    embeddings: Sequence[ImageEmbedding],
    batch: PromptBatch,
    multimask_output: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return logits [P, C, h, w] and predicted IoU [P, C] in ``dtype``.

    The official calls take prompts of one image and of one kind; others go one by one.
    """
    alike = len(embeddings) == 1 and batch.of_one_kind
    answers = []
    for part in [batch] if alike else [batch.rows(row, row + 1) for row in range(len(batch))]:
        image = 0 if part.image_index is None or len(embeddings) == 1 else int(part.image_index[0])
        points, boxes = part.points_and_boxes()
        features = embeddings[image].ready_features()
        masks, iou = call_modules(
            prompt_encoder, mask_decoder, features, points, boxes, part.mask_inputs, multimask_output
        )
        answers.append((masks.to(dtype), iou.to(dtype)))
    all_logits, all_iou = zip(*answers, strict=True)
    return torch.cat(all_logits), torch.cat(all_iou)
