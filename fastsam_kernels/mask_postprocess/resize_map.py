"""The two bilinear resizes of mask post-processing as one linear map per axis.

Bilinear resizing is separable, so upscaling to the padded square, cutting the padding off and resizing to the image
is ``A_h @ mask @ A_w^T`` with matrices of a few neighbouring taps a row. The taps are at least 0 and add up to 1: a
pixel lies between the smallest and the largest logit that it is made of.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

TILE = 32  # pixels of a tile's side: the bits of a word


class Resizing(NamedTuple):
    """The way from low-resolution logits to masks of an image, or of a crop of one.

    Attributes:
        image_size: side of the padded square that the model sees.
        input_size: (height, width) of the resized image in its top left corner.
        output_size: (height, width) of the masks.
    """

    image_size: int
    input_size: tuple[int, int]
    output_size: tuple[int, int]


class Axis(NamedTuple):
    """One axis of the map: output i is the sum over t of ``weights[i, t] * input[first[i] + t]``.

    Attributes:
        first: [out] int32.
        weights: [out, taps] fp32.
    """

    first: np.ndarray
    weights: np.ndarray


class TiledAxis(NamedTuple):
    """The same axis cut into tiles of 32 outputs, each of which reads ``patch`` inputs.

    Attributes:
        patches: [tiles, patch] int64, the inputs that each tile reads.
        matrix: [tiles, 32, patch] fp32; zero rows behind the last output.
        used: [tiles, 32] bool, False behind the last output.
    """

    patches: np.ndarray
    matrix: np.ndarray
    used: np.ndarray


def _bilinear(inputs: int, outputs: int) -> np.ndarray:
    """Return one resize as a matrix [outputs, inputs], with the arithmetic of ``torch.nn.functional.interpolate``.

    The source position is a single fused multiply-add in fp32. The product of an fp32 and a small half-integer is
    exact in fp64, so rounding once from there is the same.
    """
    scale = float(np.float32(inputs) / np.float32(outputs))
    source = np.float32(scale * (np.arange(outputs) + 0.5) - 0.5)
    source = np.maximum(source, np.float32(0))
    low = np.minimum(source.astype(np.int64), inputs - 1)
    high = np.minimum(low + 1, inputs - 1)
    upper = np.clip(source - low.astype(np.float32), 0, 1).astype(np.float32)
    matrix = np.zeros((outputs, inputs))
    rows = np.arange(outputs)
    matrix[rows, low] += np.float32(1) - upper
    matrix[rows, high] += upper
    return matrix


@lru_cache(maxsize=64)
def axis(low: int, image: int, used: int, outputs: int) -> Axis:
    """Map ``low`` logits over ``image`` pixels, of which the first ``used`` count, to ``outputs`` pixels."""
    matrix = _bilinear(used, outputs) @ _bilinear(low, image)[:used]
    filled = matrix != 0
    begin, end = filled.argmax(axis=1), low - filled[:, ::-1].argmax(axis=1)
    taps = int((end - begin).max())
    first = np.minimum(begin, low - taps)
    weights = np.take_along_axis(matrix, first[:, None] + np.arange(taps), axis=1)
    return Axis(first.astype(np.int32), weights.astype(np.float32))


@lru_cache(maxsize=64)
def tiled_axis(low: int, image: int, used: int, outputs: int) -> TiledAxis:
    """Return :func:`axis` cut into tiles."""
    first, weights = axis(low, image, used, outputs)
    taps = weights.shape[1]
    begins = np.arange(0, outputs, TILE)
    start = first[begins].astype(np.int64)
    ends = first[np.minimum(begins + TILE, outputs) - 1] + taps
    patch = int((ends - start).max())
    start = np.minimum(start, low - patch)
    matrix = np.zeros((len(begins), TILE, patch), np.float32)
    rows = np.arange(outputs)
    tile = rows // TILE
    for tap in range(taps):
        matrix[tile, rows % TILE, first - start[tile] + tap] += weights[:, tap]
    return TiledAxis(start[:, None] + np.arange(patch), matrix, begins[:, None] + np.arange(TILE) < outputs)


def axes(low_size: tuple[int, int], resizing: Resizing) -> tuple[Axis, Axis]:
    """Return the rows' and the columns' axis for logits of ``low_size``."""
    rows, columns = _arguments(low_size, resizing)
    return axis(*rows), axis(*columns)


def tiled_axes(low_size: tuple[int, int], resizing: Resizing) -> tuple[TiledAxis, TiledAxis]:
    """Return :func:`axes` cut into tiles."""
    rows, columns = _arguments(low_size, resizing)
    return tiled_axis(*rows), tiled_axis(*columns)


def _arguments(low_size: tuple[int, int], resizing: Resizing) -> tuple[tuple[int, ...], tuple[int, ...]]:
    rows, columns = (
        (low_size[side], resizing.image_size, resizing.input_size[side], resizing.output_size[side]) for side in (0, 1)
    )
    return rows, columns
