"""The few names of torchvision that Meta's packages use, for machines where it is not installed."""

from __future__ import annotations

import sys
import types
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from fastsam_kernels import nms


def stand_in_for_torchvision() -> None:
    """Make ``segment_anything`` and ``sam2`` importable; nothing where torchvision itself is."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        with suppress(ImportError):  # which asks once whether torchvision is there, and could use no stand-in
            from transformers.utils import is_torchvision_available

            is_torchvision_available()
        boxes = _module("torchvision.ops.boxes", batched_nms=batched_nms, box_area=box_area, nms=nms)
        ops = _module("torchvision.ops", boxes=boxes, batched_nms=batched_nms, nms=nms)
        functional = _module("torchvision.transforms.functional", resize=resize, to_pil_image=to_pil_image)
        steps = {"Resize": Resize, "Normalize": Normalize, "ToTensor": ToTensor}
        transforms = _module("torchvision.transforms", functional=functional, **steps)
        _module("torchvision", ops=ops, transforms=transforms)


def _module(name: str, **content: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    vars(made).update(content)
    sys.modules[name] = made
    return made


def box_area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    apart = idxs.to(boxes) * (boxes.max() + 1) if len(boxes) else idxs.to(boxes)
    return nms(boxes + apart[:, None], scores, iou_threshold)


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize((size[1], size[0]), Image.Resampling.BILINEAR)


def to_pil_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.asarray(pixels))


class ToTensor:
    """Makes [3, H, W] fp32 in 0..1 of an image [H, W, 3] uint8."""

    def __call__(self, image: np.ndarray | Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)


class Resize(nn.Module):
    """Resizes [3, H, W] bilinearly and antialiased; what has the size stays as it is."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.height, self.width = size

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2] == self.height and x.shape[-1] == self.width:
            return x
        size = [self.height, self.width]
        return F.interpolate(x[None], size, mode="bilinear", align_corners=False, antialias=True)[0]


class Normalize(nn.Module):
    """Subtracts a mean and divides by a standard deviation per channel."""

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std
