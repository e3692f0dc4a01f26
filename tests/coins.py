"""The 24 coins of scikit-image's photograph, segmented the classical way: the truth that clicks are held against."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from skimage import data, filters, segmentation

_SMALLEST_COIN = 400  # pixels; what the watershed leaves below is specks


@dataclass(frozen=True)
class Coin:
    mask: np.ndarray  # [H, W] bool

    @property
    def center(self) -> tuple[float, float]:
        ys, xs = np.nonzero(self.mask)
        return float(xs.mean()), float(ys.mean())

    @property
    def radius(self) -> float:
        return float(np.sqrt(self.mask.sum() / np.pi))

    @property
    def box(self) -> tuple[float, float, float, float]:
        ys, xs = np.nonzero(self.mask)
        return float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1)


def photograph() -> np.ndarray:
    """[303, 384, 3] uint8."""
    return np.repeat(data.coins()[:, :, None], 3, axis=2)


def coins() -> list[Coin]:
    """Watershed of the gradient from sure background and sure coin, holes filled, touching coins apart."""
    grey = data.coins()
    markers = np.zeros(grey.shape, np.int32)
    markers[grey < 30], markers[grey > 150] = 1, 2
    foreground = ndimage.binary_fill_holes(segmentation.watershed(filters.sobel(grey), markers) == 2)
    labels, count = ndimage.label(ndimage.binary_opening(foreground, iterations=2))
    masks = [labels == index for index in range(1, count + 1)]
    return [Coin(mask) for mask in masks if mask.sum() >= _SMALLEST_COIN]


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))
