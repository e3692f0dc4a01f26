"""The result of a prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..system.tensors import compact


@dataclass(frozen=True)
class MaskPrediction:
    """The masks of P prompts on one image; C is 3 with ``multimask_output``, else 1.

    Attributes:
        masks: [P, C, H, W] at the original image's size: bool, or fp32 logits with ``return_logits``.
        iou_predictions: [P, C] fp32, the model's own estimate of each mask's IoU.
        low_res_logits: [P, C, h, w] fp32; one of them can be the ``mask_input`` of a next prompt.
    """

    masks: Tensor
    iou_predictions: Tensor
    low_res_logits: Tensor

    def __getstate__(self) -> dict[str, Any]:
        return {name: compact(tensor) for name, tensor in self.__dict__.items()}
