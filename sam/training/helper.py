"""A helper head for training that tells, everywhere at once, whether two places of a picture show one object.

A prompt teaches the encoder about one object; this teaches it about every border in the picture, for little more
than one product. The head is thrown away after training.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CELLS = 4  # a side of a patch: the resolution of the masks
_CHANNELS = 16
_REACHES = (1, 2, 4, 8, 16)  # cells between the two places
_DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1))  # rows, columns


class SameObjectHead(nn.Module):
    """Embed every cell; the farther apart two of them, the less they belong to one object."""

    def __init__(self, channels: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(_CELLS**2 * _CHANNELS, channels, 1, 1, generator=generator) * (0.25 * channels**-0.5)
        self.weight = nn.Parameter(weight)
        self.nearness = nn.Parameter(torch.ones(len(_REACHES)))  # logit of two places with the same embedding

    def forward(self, features: Tensor) -> Tensor:
        """Embed features [B, C, grid, grid] as [B, 16, 4 grid, 4 grid]."""
        return F.pixel_shuffle(F.conv2d(features, self.weight), _CELLS)

    def loss(self, features: Tensor, ids: Tensor) -> Tensor:
        """Return the cross entropy of "the same object", both answers counting alike, over all reaches and directions.

        Args:
            features: [B, C, grid, grid].
            ids: [B, H, W] visible ids, 0 for the ground, of which two places say nothing.
        """
        embedding = self(features.float())  # which autocast may have narrowed
        stride = ids.shape[-1] // embedding.shape[-1]
        ids = ids[:, stride // 2 :: stride, stride // 2 :: stride]
        losses = []
        for reach, nearness in zip(_REACHES, self.nearness, strict=True):
            if reach >= ids.shape[-1]:
                break
            for down, right in _DIRECTIONS:
                one, other = _apart(ids, down * reach, right * reach)
                same = one == other
                alike = same & (one > 0)
                unlike = ~same
                here, there = _apart(embedding, down * reach, right * reach)
                logits = nearness - (here - there).square().sum(1)
                on_alike = (F.softplus(-logits) * alike).sum() / alike.sum().clamp(min=1)
                on_unlike = (F.softplus(logits) * unlike).sum() / unlike.sum().clamp(min=1)
                losses.append(on_alike + on_unlike)
        return torch.stack(losses).mean() / 2


def _apart(values: Tensor, down: int, right: int) -> tuple[Tensor, Tensor]:
    """Return two views of [..., h, w] of equal size, the second ``down`` rows and ``right`` columns further on."""
    height, width = values.shape[-2:]
    first_columns, then_columns = (
        (slice(0, width - right), slice(right, width))
        if right >= 0
        else (slice(-right, width), slice(0, width + right))
    )
    return values[..., : height - down, first_columns], values[..., down:, then_columns]
