"""COCO's run-length encoding of masks: runs over columns, as counts or as the compressed string of pycocotools.

Format: github.com/cocodataset/cocoapi, ``common/maskApi.h``. Counts alternate between background and mask,
starting with background. In the string each count from the third on is the difference to the count two before
it, written in groups of five bits, low first, each group one character from "0" up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_GROUPS = 13  # of five bits: more than any 63-bit count takes


def encode(masks: Tensor) -> list[dict[str, Any]]:
    """[N, H, W] bool -> uncompressed RLEs, ``{"size": [H, W], "counts": [int, ...]}``."""
    count, height, width = masks.shape
    flat = masks.bool().transpose(1, 2).reshape(count, height * width)
    rows, ends = (flat[:, 1:] ^ flat[:, :-1]).nonzero(as_tuple=True)
    first = flat[:, :1].any(dim=1).tolist()
    changes = torch.bincount(rows, minlength=count).tolist()
    encoded = []
    for starts_inside, inner in zip(first, (ends + 1).cpu().split(changes), strict=True):
        edges = np.concatenate([[0], inner.numpy(), [height * width]])
        counts = np.diff(edges).tolist()
        encoded.append({"size": [height, width], "counts": [0, *counts] if starts_inside else counts})
    return encoded


def decode(rle: dict[str, Any]) -> np.ndarray:
    """An RLE of either kind -> [H, W] bool.

    Raises:
        ValueError: its counts do not fill the mask.
    """
    height, width = rle["size"]
    counts = rle["counts"]
    counts = decompress(counts) if isinstance(counts, str | bytes) else np.asarray(counts, dtype=np.int64)
    if counts.sum() != height * width or (counts < 0).any():
        raise ValueError(f"the counts of an RLE of {height}x{width} must add up to {height * width}")
    inside = np.arange(len(counts)) % 2 == 1
    return np.repeat(inside, counts).reshape(width, height).T


def area(rle: dict[str, Any]) -> int:
    """Number of mask pixels of an uncompressed RLE."""
    return sum(rle["counts"][1::2])


def compress(counts: Sequence[int]) -> str:
    """Counts -> the string that pycocotools writes."""
    values = np.array(counts, dtype=np.int64)
    values[3:] -= np.array(counts, dtype=np.int64)[1:-2]
    groups = values[:, None] >> (5 * np.arange(_GROUPS))  # arithmetic shift: the sign comes along
    after = values[:, None] >> (5 * np.arange(1, _GROUPS + 1))
    low = groups & 31
    done = after == -((low >> 4) & 1)  # what is left is the sign that the group's top bit already says
    used = np.arange(_GROUPS) <= done.argmax(axis=1)[:, None]
    characters = (low + 32 * ~done + 48).astype(np.uint8)
    return characters[used].tobytes().decode("ascii")


def decompress(text: str | bytes) -> np.ndarray:
    """The string that pycocotools writes -> counts, int64."""
    data = text.encode("ascii") if isinstance(text, str) else text
    codes = np.frombuffer(data, dtype=np.uint8).astype(np.int64) - 48
    if len(codes) == 0:
        return codes
    last = (codes & 32) == 0
    if not last[-1] or codes.min() < 0 or codes.max() > 63:
        raise ValueError("not a compressed RLE")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
    values = np.add.reduceat((codes & 31) << (5 * place), starts)
    negative = (codes[ends] & 16) != 0
    values -= np.where(negative, np.int64(1) << (5 * (place[ends] + 1)), 0)
    # Undo the differences: odd and even places are running sums of their own, from the third count on.
    for parity in (1, 2):
        values[parity::2] = np.cumsum(values[parity::2])
    return values
