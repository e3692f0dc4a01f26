"""Confident masks of clicks on an embedded image, which automatic masks start from.

Each function is a :data:`Finder`, or becomes one when its further arguments are given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..embedding import ImageEmbedding
from ..inference.eligibility import why_not_fused
from ..inference.low_rank_decoder import CLICKS_AT_ONCE, SharedImage
from ..inference.module_calls import call_modules
from ..modeling.mask_decoder import MaskDecoder
from ..modeling.promptable import PromptableModel
from ..prompts.batch import PromptBatch, upload


@dataclass(frozen=True)
class Clicks:
    """A batch of clicks on one image, and which of their masks are confident.

    Attributes:
        model: makes the masks.
        embedding: the image.
        prompts: the clicks, one per prompt.
        iou_threshold: masks of a predicted IoU above it are confident; None takes all.
        count_early: count confident masks after each chunk of the decoder, while its image side is in the cache of a
            CPU, and not once for the whole batch.
        shared: what the model made of the image for all its clicks; None where it decodes them without.
    """

    model: PromptableModel
    embedding: ImageEmbedding
    prompts: PromptBatch
    iou_threshold: float | None
    count_early: bool
    shared: SharedImage | None = None

    def are_confident(self, iou: Tensor) -> Tensor:
        """Return which masks of these predicted IoUs are confident, as bool."""
        return torch.ones_like(iou, dtype=torch.bool) if self.iou_threshold is None else iou > self.iou_threshold


class ConfidentMasks(NamedTuple):
    """N confident masks of clicks.

    Attributes:
        logits: [N, h, w], fp32 at least.
        iou: [N] predicted IoU, fp32 at least.
        clicks: [N] int64, the click of each mask, in rising order.
    """

    logits: Tensor
    iou: Tensor
    clicks: Tensor


Finder = Callable[[Clicks], ConfidentMasks]


def any_confident_masks(clicks: Clicks) -> ConfidentMasks:
    """Select from three masks per prompt, by the fused decoder or, where a program has changed it, by its modules."""
    model = clicks.model
    changed = why_not_fused(prompt_encoder=model.prompt_encoder, mask_decoder=model.mask_decoder)
    return confident_masks(clicks) if changed is None else confident_masks_by_modules(clicks)


def confident_masks(clicks: Clicks) -> ConfidentMasks:
    """Select from three masks per prompt, upscaling only prompts that have a confident one."""
    model, prompts = clicks.model, clicks.prompts
    size = model.prompts_per_chunk if clicks.shared is None else CLICKS_AT_ONCE
    together = size if clicks.count_early else max(len(prompts), 1)
    results = []
    for start in range(0, len(prompts), together):
        part = prompts.rows(start, start + together)
        chunks = [
            model.decode_tokens([clicks.embedding], part.rows(at, at + size), clicks.shared)
            for at in range(0, len(part), size)
        ]
        iou = torch.cat([chunk.iou for chunk in chunks])[:, MaskDecoder.mask_slice(multimask_output=True)]
        chosen = clicks.are_confident(iou).cpu().numpy()
        logits = []
        for chunk, choice in zip(chunks, np.split(chosen, range(size, len(chosen), size)), strict=True):
            rows = np.flatnonzero(choice.any(axis=1))
            if len(rows):
                masks = model.decode_masks(chunk, True, upload(rows, model.device)).logits.flatten(0, 1)
                logits.append(masks[upload(np.flatnonzero(choice[rows]), model.device)])
        if logits:
            positions = np.flatnonzero(chosen)
            scores = iou.flatten()[upload(positions, model.device)].to(logits[0].dtype)
            indices = upload(start + positions // iou.shape[1], model.device)
            results.append(ConfidentMasks(torch.cat(logits), scores, indices))
    if not results:
        none = torch.zeros(0, dtype=torch.float32, device=model.device)
        return ConfidentMasks(none.view(0, *model.low_res_size), none, none.long())
    return ConfidentMasks(*map(torch.cat, zip(*results, strict=True)))


def confident_masks_by_modules(clicks: Clicks) -> ConfidentMasks:
    """Select from three masks per prompt, by one call of each module, for a model that a program has changed."""
    model, prompts = clicks.model, clicks.prompts
    layout, parts = model.prompt_layout, (model.prompt_encoder, model.mask_decoder)
    points, boxes = prompts.points_and_boxes(layout)
    logits, iou, _ = call_modules(*parts, clicks.embedding.ready(), points, boxes, prompts.mask_inputs, True, layout)
    confident = clicks.are_confident(iou)
    return ConfidentMasks(logits[confident], iou[confident], confident.nonzero()[:, 0])


def confident_single_masks(clicks: Clicks) -> ConfidentMasks:
    """Select from one mask per prompt: the best of three where that one is unstable and the model replaces it."""
    decoded = clicks.model.decode([clicks.embedding], clicks.prompts, multimask_output=False)
    logits, iou = decoded.logits[:, 0], decoded.iou[:, 0]
    indices = torch.arange(len(iou), device=iou.device)
    if clicks.iou_threshold is None:
        return ConfidentMasks(logits, iou, indices)
    confident = clicks.are_confident(iou)
    return ConfidentMasks(logits[confident], iou[confident], indices[confident])


def refined_masks(clicks: Clicks, first: Finder) -> ConfidentMasks:
    """Make all masks by ``first``, then select from the answers to each mask as a prompt beside its click."""
    logits, _, indices = first(replace(clicks, iou_threshold=None))
    prompts, limit = clicks.prompts, clicks.model.low_res_limit
    again = replace(
        prompts,
        coords=prompts.coords[indices],
        labels=prompts.labels[indices],
        mask_inputs=(logits if limit is None else logits.clamp(-limit, limit))[:, None],
    )
    refined, iou, rows = confident_single_masks(replace(clicks, prompts=again))
    return ConfidentMasks(refined, iou, indices[rows])


def cleaned_masks(clicks: Clicks, find: Finder, clean: Callable[[Tensor], Tensor]) -> ConfidentMasks:
    """Remove small holes and islands from the masks of ``find``, by a function of logits [P, C, h, w]."""
    logits, iou, indices = find(clicks)
    return ConfidentMasks(clean(logits[:, None])[:, 0], iou, indices)
