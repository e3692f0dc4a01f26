"""From images and prompts to the model's square and from its logits back: ``sam2.utils.transforms``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ...checks import naming, require
from ...masks.regions import areas_of, label_regions

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's pixel statistics, in 0..1
_FILLED = 10.0  # logits beyond the threshold at which a hole is filled and a sprinkle wiped


class SAM2Transforms(nn.Module):
    """Stretches images to a square and normalises them, scales prompts to it, and resizes logits to the image.

    ``to_tensor`` and ``transforms`` are the two steps of an image; the second takes batches [B, 3, H, W] too.
    """

    def __init__(
        self,
        resolution: int,
        mask_threshold: float,
        max_hole_area: float = 0.0,
        max_sprinkle_area: float = 0.0,
        disable_torch_jit: bool = False,
    ) -> None:
        """Transform for a model of ``resolution`` px; nothing here is compiled, whatever ``disable_torch_jit`` says.

        Args:
            resolution: side of the square.
            mask_threshold: in logits.
            max_hole_area, max_sprinkle_area: the largest holes that are filled and islands that are wiped, in pixels
                of the low-resolution logits; 0 for none.
            disable_torch_jit: taken for programs that give it.
        """
        super().__init__()
        self.resolution = resolution
        self.mask_threshold = mask_threshold
        self.max_hole_area = max_hole_area
        self.max_sprinkle_area = max_sprinkle_area
        self.mean = [*_MEAN]
        self.std = [*_STD]
        self.to_tensor = _ToTensor()
        self.transforms = nn.Sequential(_Resize(resolution), _Normalize(self.mean, self.std))

    def __call__(self, x: np.ndarray | Image.Image) -> Tensor:
        """Return an image as the model's input [3, resolution, resolution], fp32 on the CPU.

        Args:
            x: [H, W, 3], uint8, or floating-point in 0..1; or a PIL image, of which the RGB colours are taken.

        Raises:
            TypeError: no array or PIL image, or an array of other numbers.
            ValueError: an array of another shape, which is named.
        """
        pixels: Tensor = self.transforms(self.to_tensor(x))
        return pixels

    def forward_batch(self, img_list: Sequence[np.ndarray | Image.Image]) -> Tensor:
        """Return images of any sizes as one input [B, 3, resolution, resolution].

        Raises:
            TypeError, ValueError: as of one image, which is named by its place.
        """
        pixels = []
        for index, image in enumerate(img_list):
            with naming(f"image {index}"):
                pixels.append(self.transforms(self.to_tensor(image)))
        return torch.stack(pixels)

    def transform_coords(self, coords: Tensor, normalize: bool = False, orig_hw: Sequence[int] | None = None) -> Tensor:
        """Scale points [..., 2] to pixels of the square.

        Args:
            coords: (x, y), in pixels of the image with ``normalize``, else in 0..1 of it.
            normalize: divide by the image's width and height first.
            orig_hw: (height, width) of the image.

        Raises:
            ValueError: ``normalize`` without ``orig_hw``.
        """
        require("coords", coords, Tensor, "a torch.Tensor [..., 2]")
        if normalize:
            if orig_hw is None:
                raise ValueError("normalize=True needs orig_hw, the (height, width) of the image")
            height, width = orig_hw
            coords = coords / torch.tensor([width, height], dtype=coords.dtype, device=coords.device)
        return coords * self.resolution

    def transform_boxes(self, boxes: Tensor, normalize: bool = False, orig_hw: Sequence[int] | None = None) -> Tensor:
        """Scale boxes [P, 4] to pairs of corners [P, 2, 2] in pixels of the square; see :meth:`transform_coords`."""
        require("boxes", boxes, Tensor, "a torch.Tensor [P, 4]")
        return self.transform_coords(boxes.reshape(-1, 2, 2), normalize, orig_hw)

    def postprocess_masks(self, masks: Tensor, orig_hw: Sequence[int]) -> Tensor:
        """Resize logits [P, C, h, w] to fp32 logits [P, C, H, W] of the image, small holes and sprinkles gone before.

        Raises:
            ImportError: holes or sprinkles on a CPU without SciPy.
        """
        height, width = orig_hw
        return F.interpolate(self.cleaned(masks), (height, width), mode="bilinear", align_corners=False)

    def cleaned(self, masks: Tensor) -> Tensor:
        """Return fp32 logits [P, C, h, w] without holes up to ``max_hole_area`` and islands up to the other limit."""
        masks = masks.float()
        threshold = self.mask_threshold
        inside = masks > threshold
        for regions, limit, value in (
            (~inside, self.max_hole_area, threshold + _FILLED),
            (inside, self.max_sprinkle_area, threshold - _FILLED),
        ):
            if limit > 0:
                masks = torch.where(_small_regions(regions, limit), value, masks)
        return masks


def size_of(image: Any) -> tuple[int, int]:
    """Return (height, width) of an array [H, W, ...] or a PIL image.

    Raises:
        NotImplementedError: another type.
    """
    if isinstance(image, Image.Image):
        return image.height, image.width
    if isinstance(image, np.ndarray):
        return image.shape[0], image.shape[1] if image.ndim > 1 else 0
    raise NotImplementedError(
        f"the image must be a numpy array [H, W, 3] of uint8 in RGB, or a PIL image, got {type(image).__name__}"
    )


def _small_regions(masks: Tensor, limit: float) -> Tensor:
    """Return which pixels of masks [P, C, h, w] are in regions of up to ``limit`` pixels."""
    labels, sizes = label_regions(masks.flatten(0, 1))
    return ((labels > 0) & (areas_of(labels, sizes) <= limit)).view(masks.shape)


class _ToTensor:
    """Makes pixels [3, H, W] in 0..1 of an image, in fp32."""

    def __call__(self, image: Any) -> Tensor:
        if isinstance(image, Image.Image):
            image = np.array(image.convert("RGB"))
        require("the image", image, np.ndarray, "a numpy array [H, W, 3] or a PIL image")
        if image.ndim != 3 or image.shape[2] != 3:
            hint = {2: " (grey? np.dstack([image] * 3))", 3: " (RGBA? image[..., :3])"}.get(image.ndim, "")
            raise ValueError(f"the image must be RGB, an array [H, W, 3], got {list(image.shape)}{hint}")
        if 0 in image.shape:
            raise ValueError(f"the image is empty: {image.shape[0]}x{image.shape[1]} (height x width)")
        if image.dtype != np.uint8 and not np.issubdtype(image.dtype, np.floating):
            raise TypeError(f"the image must be uint8 in 0..255, or floating-point in 0..1, got {image.dtype}")
        if min(image.strides) < 0 or not image.flags.writeable:  # torch takes neither
            image = image.copy()
        pixels = torch.from_numpy(image).permute(2, 0, 1).to(torch.float32)
        return pixels.contiguous().div_(255) if image.dtype == np.uint8 else pixels.contiguous()


class _Resize(nn.Module):
    """Resizes [..., 3, H, W] to a square, bilinearly and antialiased; what has its size stays as it is."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.size = [side, side]

    def forward(self, x: Tensor) -> Tensor:
        if [*x.shape[-2:]] == self.size:
            return x
        batch = x.reshape(-1, *x.shape[-3:])
        resized = F.interpolate(batch, self.size, mode="bilinear", align_corners=False, antialias=True)
        return resized.view(*x.shape[:-2], *self.size)


class _Normalize(nn.Module):
    """Normalises [..., 3, H, W] by a mean and a standard deviation per channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean, self.std = [*mean], [*std]

    def forward(self, x: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std
