"""Prompts decoded by the official calls of the prompt encoder and the mask decoder, which reach all in there."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def call_modules(
    prompt_encoder: nn.Module,
    mask_decoder: nn.Module,
    features: Tensor,
    points: tuple[Tensor, Tensor] | None,
    boxes: Tensor | None,
    mask_inputs: Tensor | None,
    multimask_output: bool,
) -> tuple[Tensor, Tensor]:
    """Decode P prompts on one image as ``segment_anything`` does, by one call of each module.

    Args:
        prompt_encoder, mask_decoder: of any class that has the official ``forward``, and ``get_dense_pe``.
        features: [1, C, h, w] of the image.
        points: coordinates [P, N, 2] in the input frame and labels [P, N].
        boxes: [P, 4] in the input frame.
        mask_inputs: [P, 1, 4h, 4w] low-resolution logits.
        multimask_output: three masks per prompt instead of one.

    Returns:
        logits [P, masks, 4h, 4w] and predicted IoU [P, masks], fp32 at least.
    """
    sparse, dense = prompt_encoder(points=points, boxes=boxes, masks=mask_inputs)
    logits, iou = mask_decoder(
        image_embeddings=features,
        image_pe=prompt_encoder.get_dense_pe(),  # type: ignore[operator]
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask_output,
    )
    return logits.to(_at_least_fp32(logits)), iou.to(_at_least_fp32(iou))


def _at_least_fp32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
