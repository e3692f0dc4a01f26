"""Results of the mask decoder and of a prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..system.tensors import compact


class DecodedMasks(NamedTuple):
    """The mask decoder's outputs for P prompts; C is 3 with ``multimask_output``, else 1.

    Attributes:
        logits: [P, C, h, w] of low resolution, fp32 at least.
        iou: [P, C] predicted IoU, fp32 at least.
        object_scores: [P] logits, above 0 where the object is seen; None of SAM, which does not say.
    """

    logits: Tensor
    iou: Tensor
    object_scores: Tensor | None = None


@dataclass(frozen=True)
class MaskPrediction:
    """The masks of P prompts on one image; C is 3 with ``multimask_output``, else 1.

    Attributes:
        masks: [P, C, H, W] at the original image's size: bool, or fp32 logits with ``return_logits``.
        iou_predictions: [P, C] fp32, the model's own estimate of each mask's IoU.
        low_res_logits: [P, C, h, w] fp32; one of them can be the ``mask_input`` of a next prompt. Those of SAM 2 lie
            within 32 of 0, as officially.
        object_scores: [P] fp32 logits, above 0 where SAM 2 sees the object; None of SAM, which does not say.
    """

    masks: Tensor
    iou_predictions: Tensor
    low_res_logits: Tensor
    object_scores: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: None if tensor is None else compact(tensor) for name, tensor in self.__dict__.items()}
