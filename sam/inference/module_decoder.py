"""Prompts to masks by the official calls, for modules that the fused form cannot stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..embedding import ImageEmbedding
from ..prompts.batch import PromptBatch
from .module_calls import call_modules
from .parts import Model


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
    model: Model,
    embeddings: Sequence[ImageEmbedding],
    batch: PromptBatch,
    multimask_output: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return logits [P, C, h, w] and predicted IoU [P, C] in ``dtype``.

    The official calls take prompts of one image and of one kind; others go one by one.
    """
    layout = model.prompt_layout
    alike = len(embeddings) == 1 and batch.is_of_one_kind(layout)
    answers = []
    for part in [batch] if alike else [batch.rows(row, row + 1) for row in range(len(batch))]:
        image = 0 if part.image_index is None or len(embeddings) == 1 else int(part.image_index[0])
        points, boxes = part.points_and_boxes(layout)
        features = embeddings[image].ready_features()
        modules = model.prompt_encoder, model.mask_decoder
        masks, iou = call_modules(*modules, features, points, boxes, part.mask_inputs, multimask_output)
        answers.append((masks.to(dtype), iou.to(dtype)))
    all_logits, all_iou = zip(*answers, strict=True)
    return torch.cat(all_logits), torch.cat(all_iou)
