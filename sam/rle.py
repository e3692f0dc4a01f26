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
import torch.nn.functional as F
from torch import Tensor

from fastsam_kernels import pack_masks

def encode(masks: Tensor) -> list[dict[str, Any]]:
    """[N, H, W] bool -> uncompressed RLEs, ``{"size": [H, W], "counts": [int, ...]}``."""
    return encode_packed(pack_masks(masks), masks.shape[1])


def encode_packed(
    packed: Tensor, height: int, corner: tuple[int, int] = (0, 0), full_size: tuple[int, int] | None = None
) -> list[dict[str, Any]]:
    """Uncompressed RLEs of masks given as bits. Runs are looked for where the masks are; one copy brings them over.

    Args:
        packed: [N, width, ceil(height / 32)] int32, from ``fastsam_kernels.packed_masks``.
        height: of the masks.
        corner: (x, y) of their first pixel in a larger image.
        full_size: (height, width) of that image; None when the masks are all of it.
    """
    full_height, full_width = full_size or (height, packed.shape[1])
    over_columns = height == full_height  # a run may go on in the next column
    if over_columns and corner[0] + packed.shape[1] < full_width:
        packed = F.pad(packed, (0, 0, 0, 1))  # and ends in the column behind the last
    count, width, words = packed.shape
    places, bits = _changes(packed, height, over_columns)
    column, word = np.divmod(places, words + (not over_columns))
    mask, column = np.divmod(column, max(width, 1))
    entry, bit = np.nonzero(np.unpackbits(bits.view(np.uint8).reshape(-1, 4), axis=1, bitorder="little"))
    edges = ((corner[0] + column) * full_height + corner[1] + 32 * word)[entry] + bit
    ends = np.searchsorted(mask[entry], np.arange(count), side="right")
    total, encoded, begin = full_height * full_width, [], 0
    for end in ends.tolist():
        inner = edges[begin:end]
        closed = len(inner) > 0 and inner[-1] == total  # the last run reaches the last pixel
        counts = np.diff(inner, prepend=0) if closed else np.diff(inner, prepend=0, append=total)
        encoded.append({"size": [full_height, full_width], "counts": counts.tolist()})
        begin = end
    return encoded


def _changes(packed: Tensor, height: int, over_columns: bool) -> tuple[np.ndarray, np.ndarray]:
    """Bits of the pixels unlike the one before them: places [K] of words that have any, and these words, uint32.

    With ``over_columns`` a column goes on where the one to its left ends; without, it begins and ends in the
    background, which takes a word more.
    """
    last = (height - 1) % 32
    before = F.pad((packed[..., :-1] >> 31) & 1, (1, 0))
    if over_columns:
        before[:, 1:, 0] = (packed[:, :-1, -1] >> last) & 1
        changes = packed ^ ((packed << 1) | before)
        changes[..., -1] &= -1 if last == 31 else (1 << (last + 1)) - 1
    else:
        changes = F.pad(packed ^ ((packed << 1) | before), (0, 1))
        changes[..., -1] = (packed[..., -1] >> 31) & 1
    changes = changes.flatten()
    places = changes.nonzero()[:, 0]
    found = torch.stack([places, changes[places].long()]).cpu().numpy()
    return found[0], found[1].astype(np.uint32)


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
    return compress_all([counts])[0]


def compress_all(many_counts: Sequence[Sequence[int]]) -> list[str]:
    """Counts of several masks -> their strings, in one go."""
    if not many_counts:
        return []
    values = np.concatenate([np.asarray(counts, dtype=np.int64) for counts in many_counts])
    lengths = np.array([len(counts) for counts in many_counts])
    place = np.arange(len(values)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    differences = values.copy()
    differences[2:] -= np.where(place[2:] > 2, values[:-2], 0)
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
