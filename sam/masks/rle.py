"""COCO's run-length encoding of masks: runs over columns, as counts or as the compressed string of pycocotools.

Format: github.com/cocodataset/cocoapi, ``common/maskApi.h``. Counts alternate between background and mask,
starting with background. In the string each count from the third on is the difference to the count two before
it, written in groups of five bits, low first, each group one character from "0" up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def decode(rle: dict[str, Any]) -> np.ndarray:
    """Decode an RLE of either kind to a mask [H, W] bool.

    Raises:
        ValueError: its counts do not fill the mask.
    """
    height, width = rle["size"]
    wrong = f"the counts of an RLE of {height}x{width} must add up to {height * width}"
    try:
        counts = _counts(rle)
    except OverflowError:
        raise ValueError(wrong) from None
    ends = np.cumsum(counts)  # a sum beyond 64 bits turns negative before it comes round to the total
    if min(counts.min(initial=0), ends.min(initial=0)) < 0 or ends.max(initial=0) != height * width:
        raise ValueError(wrong)
    inside = np.arange(len(counts)) % 2 == 1
    return np.repeat(inside, counts).reshape(width, height).T


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Encode a mask [H, W], everything but 0 inside, as an uncompressed RLE."""
    inside = np.not_equal(mask, 0).T.ravel()
    edges = np.flatnonzero(np.diff(inside, prepend=False))
    return {"size": list(mask.shape), "counts": np.diff(edges, prepend=0, append=inside.size).tolist()}


def area(rle: dict[str, Any]) -> int:
    """Return the number of mask pixels of an uncompressed RLE."""
    return sum(rle["counts"][1::2])


def bounding_box(rle: dict[str, Any]) -> list[int]:
    """Return x, y, width and height of an RLE's mask in whole pixels, as pycocotools' ``toBbox``; zeros if it is empty.

    A mask of one pixel has a box of 1x1: the official generator's ``bbox`` leaves out the last column and row.
    """
    height = rle["size"][0]
    edges = _counts(rle).cumsum()
    starts, lasts = edges[: len(edges) // 2 * 2 : 2], edges[1::2] - 1
    filled = lasts >= starts
    starts, lasts = starts[filled], lasts[filled]
    if len(lasts) == 0:
        return [0, 0, 0, 0]
    first_columns, last_columns = starts // height, lasts // height
    left, right = int(first_columns[0]), int(last_columns[-1])
    if (first_columns != last_columns).any():  # a run goes on in the next column
        top, bottom = 0, height - 1
    else:
        above = first_columns * height
        top, bottom = int((starts - above).min()), int((lasts - above).max())
    return [left, top, right - left + 1, bottom - top + 1]


def _counts(rle: dict[str, Any]) -> np.ndarray:
    counts = rle["counts"]
    return decompress(counts) if isinstance(counts, str | bytes) else np.asarray(counts, dtype=np.int64)


def compress(counts: Sequence[int]) -> str:
    """Compress counts to the string that pycocotools writes."""
    return compress_all([counts])[0]


def compress_all(many_counts: Sequence[Sequence[int]]) -> list[str]:
    """Compress the counts of several masks, one string per mask, in one pass."""
    if not many_counts:
        return []
    values = np.concatenate([np.asarray(counts, dtype=np.int64) for counts in many_counts])
    lengths = np.array([len(counts) for counts in many_counts])
    position = np.arange(len(values)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    differences = values.copy()
    differences[2:] -= np.where(position[2:] > 2, values[:-2], 0)
    size = max(int(np.abs(differences).max(initial=0)).bit_length() + 1, 1)  # with the sign
    groups = differences[:, None] >> (5 * np.arange(-(-size // 5) + 1))  # arithmetic shift: the sign comes along
    low = groups[:, :-1] & 31
    done = groups[:, 1:] == -((low >> 4) & 1)  # what is left is the sign that the group's top bit already says
    last = done.argmax(axis=1)
    characters = (low + 32 * ~done + 48).astype(np.uint8)
    text = characters[np.arange(low.shape[1]) <= last[:, None]].tobytes().decode("ascii")
    ends = np.concatenate([[0], np.cumsum(last + 1)])[np.cumsum(lengths)].tolist()
    return [text[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def decompress(text: str | bytes) -> np.ndarray:
    """Decompress the string that pycocotools writes to counts, int64.

    Raises:
        ValueError: it is no such string.
    """
    data = text.encode("ascii") if isinstance(text, str) else text
    codes = np.frombuffer(data, dtype=np.uint8).astype(np.int64) - 48
    if len(codes) == 0:
        return codes
    last = (codes & 32) == 0
    if not last[-1] or codes.min() < 0 or codes.max() > 63:
        raise ValueError("not a compressed RLE")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    position = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
    values = np.add.reduceat((codes & 31) << (5 * position), starts)
    negative = (codes[ends] & 16) != 0
    values -= np.where(negative, np.int64(1) << (5 * (position[ends] + 1)), 0)
    # Undo the differences: odd and even places are running sums of their own, from the third count on.
    for parity in (1, 2):
        values[parity::2] = np.cumsum(values[parity::2])
    return values
