"""Two photographs of scikit-image with outlines drawn by hand, in pixels (x, y)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from skimage import data

# The cup with its handle, without the spoon before it.
_CUP = [
    (283, 18), (320, 21), (355, 34), (385, 57), (402, 85), (406, 112), (402, 145), (391, 182), (381, 208), (370, 226),
    (352, 241), (334, 256), (327, 268), (312, 281), (288, 285), (264, 283), (256, 272), (259, 252), (250, 248),
    (243, 270), (236, 292), (228, 304), (216, 306), (203, 299), (197, 289), (196, 277), (203, 258), (214, 240),
    (221, 233), (207, 217), (194, 198), (184, 178), (177, 152), (173, 122), (173, 100), (180, 75), (196, 51),
    (222, 32), (250, 21),
]  # fmt: skip
# The head with both ears, as far as the photograph shows it, without the neck.
_HEAD = [
    (44, 0), (35, 30), (31, 62), (32, 95), (40, 122), (46, 142), (54, 165), (70, 188), (92, 207), (112, 222),
    (132, 240), (155, 254), (180, 264), (200, 275), (222, 281), (246, 283), (272, 280), (292, 270), (305, 255),
    (313, 236), (322, 215), (334, 196), (346, 176), (355, 158), (359, 140), (362, 120), (360, 98), (358, 78),
    (372, 52), (387, 25), (399, 0),
]  # fmt: skip


@dataclass(frozen=True)
class Outlined:
    image: np.ndarray  # [H, W, 3] uint8
    mask: np.ndarray  # [H, W] bool

    @property
    def box(self) -> tuple[float, float, float, float]:
        ys, xs = np.nonzero(self.mask)
        return float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1)


def cup() -> Outlined:
    return _outlined(data.coffee(), _CUP)


def head() -> Outlined:
    return _outlined(data.chelsea(), _HEAD)


def _outlined(image: np.ndarray, polygon: list[tuple[int, int]]) -> Outlined:
    canvas = Image.new("1", (image.shape[1], image.shape[0]))
    ImageDraw.Draw(canvas).polygon(polygon, fill=1)
    return Outlined(image, np.array(canvas))
