"""COCO run lengths of masks that lie in tensors, found on the masks' device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsam_kernels import pack_masks


def encode(masks: Tensor) -> list[dict[str, Any]]:
    """Encode masks [N, H, W] bool as uncompressed RLEs, ``{"size": [H, W], "counts": [int, ...]}``."""
    return encode_packed(pack_masks(masks), (masks.shape[1], masks.shape[2]))


def encode_packed(
    packed: Tensor, size: tuple[int, int], corner: tuple[int, int] = (0, 0), full_size: tuple[int, int] | None = None
) -> list[dict[str, Any]]:
    """Encode masks packed along their columns as uncompressed RLEs.

    The words in which a run begins or ends are found on the masks' device and copied to the host in one copy.

    Args:
        packed: [N, width, ceil(height / 32)] int32, of ``fastsam_kernels.packed_masks``.
        size: (height, width) of the masks.
        corner: (x, y) of their first pixel in the image.
        full_size: (height, width) of the image; None when the masks cover it.
    """
    height, width = full_size or size
    words = F.pad(packed, (0, 1))  # a run that reaches the last row ends in a word of its own
    above = F.pad(words[..., :-1] >> 31 & 1, (1, 0))
    changes = (words ^ (words << 1 | above)).flatten()  # one bit per pixel unlike the one above it
    if packed.device.type == "cpu":
        nonzero = _nonzero_words(changes).numpy()
    else:  # smooth masks have an edge above and one below in some columns
        nonzero = _copy_nonzero_words(changes, 2 * len(packed) * packed.shape[1]).numpy()
    bits = np.unpackbits(nonzero.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :4], axis=1, bitorder="little")
    entry, bit = np.nonzero(bits)
    column, word = np.divmod(nonzero[entry] >> 32, words.shape[2])
    mask, column = np.divmod(column, max(packed.shape[1], 1))
    edges = (corner[0] + column) * height + corner[1] + 32 * word + bit
    # A run over the end of a column ends there and begins anew at the same position: neither is an edge.
    repeated = (edges[1:] == edges[:-1]) & (mask[1:] == mask[:-1])
    real = ~(np.append(repeated, False) | np.insert(repeated, 0, False)) if len(edges) else np.ones(0, bool)
    edges, mask = edges[real], mask[real]

    encoded = []
    for inner in np.split(edges, np.searchsorted(mask, np.arange(1, len(packed)))) if len(packed) else []:
        ends_inside = len(inner) > 0 and inner[-1] == height * width
        counts = np.diff(inner, prepend=0) if ends_inside else np.diff(inner, prepend=0, append=height * width)
        encoded.append({"size": [height, width], "counts": counts.tolist()})
    return encoded


def _nonzero_words(words: Tensor) -> Tensor:
    """Return each word that is not 0, with its index in the upper half of 64 bits."""
    positions = words.nonzero()[:, 0]
    return positions << 32 | words[positions].long() & 0xFFFFFFFF


def _copy_nonzero_words(words: Tensor, capacity: int) -> Tensor:
    """Return the result of ``_nonzero_words`` on the host, in one copy and without a wait for its size.

    The copy has the ``capacity``; when there are more words, a second copy brings all.
    """
    while True:
        positions = torch.nonzero_static(words, size=capacity, fill_value=0)[:, 0]
        result = positions << 32 | words[positions].long() & 0xFFFFFFFF
        counted = torch.cat([words.count_nonzero()[None], result]).cpu()
        count = int(counted[0])
        if count <= capacity:
            return counted[1 : count + 1]
        capacity = count
