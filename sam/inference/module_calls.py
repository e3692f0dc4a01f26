"""Decode prompts by the official calls of the prompt encoder and the mask decoder, which run every hook in them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..embedding import ImageFeatures
from ..masks.results import DecodedMasks
from ..prompts.layout import PromptLayout


def call_modules(
    prompt_encoder: nn.Module,
    mask_decoder: nn.Module,
    features: ImageFeatures,
    points: tuple[Tensor, Tensor] | None,
    boxes: Tensor | None,
    mask_inputs: Tensor | None,
    multimask_output: bool,
    layout: PromptLayout,
) -> DecodedMasks:
    """Decode P prompts on one image as ``segment_anything`` does, or ``sam2``, by one call of each module.

    Args:
        prompt_encoder, mask_decoder: modules of any class with the official ``forward``, and ``get_dense_pe``.
        features: the features of the image, one row.
        points: coordinates [P, N, 2] in the input frame and labels [P, N].
        boxes: [P, 4] in the input frame.
        mask_inputs: [P, 1, 4h, 4w] low-resolution logits.
        multimask_output: three masks per prompt instead of one.
        layout: the model's token order; with ``BOX_FIRST`` the calls are those of ``sam2``.
    """
    sparse, dense = prompt_encoder(points=points, boxes=boxes, masks=mask_inputs)
    inputs = {
        "image_embeddings": features.embedding,
        "image_pe": prompt_encoder.get_dense_pe(),  # type: ignore[operator]
        "sparse_prompt_embeddings": sparse,
        "dense_prompt_embeddings": dense,
        "multimask_output": multimask_output,
    }
    if layout is PromptLayout.POINTS_FIRST:
        logits, iou = mask_decoder(**inputs)
        scores = None
    else:
        high_res = [*features.high_res] or None
        logits, iou, _, scores = mask_decoder(**inputs, repeat_image=len(sparse) > 1, high_res_features=high_res)
    return DecodedMasks(_wide(logits), _wide(iou), None if scores is None else _wide(scores)[:, 0])


def _wide(x: Tensor) -> Tensor:
    """Return ``x`` in fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
