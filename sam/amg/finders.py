"""Confident masks of clicks on an embedded image, which automatic masks start from.

Each function is a :class:`Finder`, or becomes one when its further arguments are given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..embedding import ImageEmbedding
from ..inference.eligibility import why_not_fused
from ..inference.module_calls import call_modules
from ..modeling.mask_decoder import MaskDecoder
from ..modeling.promptable import PromptableModel
from ..prompts.batch import PromptBatch, upload


class Finder(Protocol):
    """A function that makes masks of a batch of clicks."""

    def __call__(
        self,
        model: PromptableModel,
        embedding: ImageEmbedding,
        batch: PromptBatch,
        iou_threshold: float | None,
        count_early: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the masks of a predicted IoU above a threshold; None takes all.

        Returns:
            logits [N, h, w] and predicted IoU [N], fp32 at least, and the prompt of each, [N] int64, in rising order.
        """


def any_confident_masks(
    model: PromptableModel,
    embedding: ImageEmbedding,
    batch: PromptBatch,
    iou_threshold: float | None,
    count_early: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Select from three masks per prompt, by the fused decoder or, where a program has changed it, by its modules."""
    changed = why_not_fused(prompt_encoder=model.prompt_encoder, mask_decoder=model.mask_decoder)
    find = confident_masks if changed is None else confident_masks_by_modules
    return find(model, embedding, batch, iou_threshold, count_early)


def confident_masks(
    model: PromptableModel,
    embedding: ImageEmbedding,
    batch: PromptBatch,
    iou_threshold: float | None,
    count_early: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Select, of three masks per prompt, those of a predicted IoU above a threshold; None takes all.

    The decoder upscales prompts of which a mask is left, and only those. What is left is counted after each chunk with
    ``count_early``, while its image side is in the cache of a CPU, else once, after the tokens of the whole batch.

    Returns:
        logits [N, h, w] and predicted IoU [N], fp32 at least, and the prompt of each, [N] int64, in rising order.
    """
    size = model.prompts_per_chunk
    together = size if count_early else max(len(batch), 1)
    found = []
    for start in range(0, len(batch), together):
        part = batch.rows(start, start + together)
        chunks = [model.decode_tokens([embedding], part.rows(at, at + size)) for at in range(0, len(part), size)]
        iou = torch.cat([chunk.iou for chunk in chunks])[:, MaskDecoder.mask_slice(multimask_output=True)]
        confident = torch.ones_like(iou, dtype=torch.bool) if iou_threshold is None else iou > iou_threshold
        chosen = confident.cpu().numpy()
        logits = []
        for chunk, choice in zip(chunks, np.split(chosen, range(size, len(chosen), size)), strict=True):
            rows = np.flatnonzero(choice.any(axis=1))
            if len(rows):
                masks = model.decode_masks(chunk, True, upload(rows, model.device)).logits.flatten(0, 1)
                logits.append(masks[upload(np.flatnonzero(choice[rows]), model.device)])
        if logits:
            places = np.flatnonzero(chosen)
            scores = iou.flatten()[upload(places, model.device)].to(logits[0].dtype)
            found.append((torch.cat(logits), scores, upload(start + places // iou.shape[1], model.device)))
    if not found:
        side = model.low_res_size
        none = torch.zeros(0, dtype=torch.float32, device=model.device)
        return none.view(0, *side), none, none.long()
    logits_of, iou_of, prompts_of = zip(*found, strict=True)
    return torch.cat(logits_of), torch.cat(iou_of), torch.cat(prompts_of)


def confident_masks_by_modules(
    model: PromptableModel,
    embedding: ImageEmbedding,
    batch: PromptBatch,
    iou_threshold: float | None,
    count_early: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute :func:`confident_masks` by one call of each module, for a model that a program has changed."""
    layout, parts = model.prompt_layout, (model.prompt_encoder, model.mask_decoder)
    points, boxes = batch.points_and_boxes(layout)
    logits, iou, _ = call_modules(*parts, embedding.ready(), points, boxes, batch.mask_inputs, True, layout)
    confident = torch.ones_like(iou, dtype=torch.bool) if iou_threshold is None else iou > iou_threshold
    return logits[confident], iou[confident], confident.nonzero()[:, 0]


def confident_single_masks(
    model: PromptableModel,
    embedding: ImageEmbedding,
    batch: PromptBatch,
    iou_threshold: float | None,
    count_early: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Select from one mask per prompt: the best of three where that one is unstable and the model replaces it."""
    decoded = model.decode([embedding], batch, multimask_output=False)
    logits, iou = decoded.logits[:, 0], decoded.iou[:, 0]
    prompts = torch.arange(len(iou), device=iou.device)
    if iou_threshold is None:
        return logits, iou, prompts
    confident = iou > iou_threshold
    return logits[confident], iou[confident], prompts[confident]


def refined_masks(
    model: PromptableModel,
    embedding: ImageEmbedding,
    batch: PromptBatch,
    iou_threshold: float | None,
    count_early: bool,
    first: Finder,
) -> tuple[Tensor, Tensor, Tensor]:
    """Make all masks by ``first``, ask once more with each as a prompt beside its click, and select of the answers."""
    logits, _, clicks = first(model, embedding, batch, None, count_early)
    limit = model.low_res_limit
    again = replace(
        batch,
        coords=batch.coords[clicks],
        labels=batch.labels[clicks],
        mask_inputs=(logits if limit is None else logits.clamp(-limit, limit))[:, None],
    )
    refined, iou, rows = confident_single_masks(model, embedding, again, iou_threshold, count_early)
    return refined, iou, clicks[rows]


def cleaned_masks(
    model: PromptableModel,
    embedding: ImageEmbedding,
    batch: PromptBatch,
    iou_threshold: float | None,
    count_early: bool,
    find: Finder,
    clean: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Remove small holes and islands from the masks of ``find``, by a function of logits [P, C, h, w]."""
    logits, iou, clicks = find(model, embedding, batch, iou_threshold, count_early)
    return clean(logits[:, None])[:, 0], iou, clicks
