"""Positions of SAM 2: sines on a grid, sines of a distance in time, and rotations of queries and keys."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

_MAX_CACHED_GRIDS = 8


class PositionEmbeddingSine(nn.Module):
    """Sines and cosines of rows and columns, as in DETR (arXiv 2005.12872); no weights.

    Args:
        num_pos_feats: channels, half of them of the rows.
        temperature: base of the frequencies.
        normalize: scale positions to 0..``scale``.
        scale: 2 pi by default.
        warmup_cache, image_size, strides: taken and not used; the grids are made at their first use.
    """

    __constants__ = ("num_pos_feats", "temperature", "normalize", "scale")

    def __init__(
        self,
        num_pos_feats: int,
        temperature: int = 10000,
        normalize: bool = True,
        scale: float | None = None,
        warmup_cache: bool = True,
        image_size: int = 1024,
        strides: tuple[int, ...] = (4, 8, 16, 32),
    ) -> None:
        super().__init__()
        if num_pos_feats % 2:
            raise ValueError(f"num_pos_feats must be even, got {num_pos_feats}")
        if scale is not None and not normalize:
            raise ValueError("scale needs normalize=True")
        self.num_pos_feats = num_pos_feats // 2
        self.temperature = temperature
        self.normalize = normalize
        self.scale = 2 * math.pi if scale is None else scale
        self.cache: dict[tuple[int, int], Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Return the positions [B, num_pos_feats, h, w] of maps [B, C, h, w], fp32; one image's memory serves all."""
        size = (x.shape[-2], x.shape[-1])
        encoding = self.cache.get(size)
        if encoding is None or encoding.device != x.device:
            if len(self.cache) >= _MAX_CACHED_GRIDS:
                self.cache.clear()
            with torch.inference_mode(False), torch.no_grad():  # a kept table serves later training too
                self.cache[size] = encoding = self._grid(size, x.device)
        return encoding.expand(len(x), -1, -1, -1)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache": {}}

    def _grid(self, size: tuple[int, int], device: torch.device) -> Tensor:
        """Return [num_pos_feats, h, w]: of rows, then of columns."""
        rows, columns = (self._encode(torch.arange(1, side + 1, dtype=torch.float32, device=device)) for side in size)
        return torch.cat(
            [
                rows.t()[:, :, None].expand(-1, -1, size[1]),
                columns.t()[:, None, :].expand(-1, size[0], -1),
            ]
        )

    def _encode(self, positions: Tensor) -> Tensor:
        """Encode positions [n] as [n, num_pos_feats / 2], sine and cosine of each frequency side by side."""
        if self.normalize:
            positions = positions / (positions[-1:] + 1e-6) * self.scale
        index = torch.arange(self.num_pos_feats, dtype=torch.float32, device=positions.device)
        phase = positions[:, None] / self.temperature ** (2 * (index // 2) / self.num_pos_feats)
        return torch.stack([phase[:, 0::2].sin(), phase[:, 1::2].cos()], dim=2).flatten(1)


def get_1d_sine_pe(pos_inds: Tensor, dim: int, temperature: float = 10000) -> Tensor:
    """Encode numbers [...] by sines, then cosines, of ``dim`` / 2 frequencies: [..., dim]."""
    phase = pos_inds[..., None] / _wave_lengths(dim // 2, temperature, pos_inds.device)
    return torch.cat([phase.sin(), phase.cos()], dim=-1)


@lru_cache(maxsize=16)
def _wave_lengths(count: int, temperature: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():  # a kept table serves later training too
        index = torch.arange(count, dtype=torch.float32, device=device)
        return temperature ** (2 * (index // 2) / count)


def compute_axial_cis(dim: int, end_x: int, end_y: int, theta: float = 10000.0) -> Tensor:
    """Return the rotations of the tokens of a grid, of pairs of channels, as complex numbers of length 1.

    The first half of the pairs turns with the column, the other with the row (arXiv 2403.13298).

    Args:
        dim: channels, four to a frequency.
        end_x, end_y: columns and rows.
        theta: the frequencies are its powers.

    Returns:
        [end_y * end_x, dim / 2] complex64 on the CPU, row by row.
    """
    # On the CPU also where a model is built without memory: operations on its shapes alone would import half of torch.
    frequencies = theta ** (-torch.arange(0, dim, 4, device="cpu")[: dim // 4].float() / dim)
    token = torch.arange(int(end_x) * int(end_y), device="cpu")
    columns, rows = (token % int(end_x)).float(), (token // int(end_x)).float()
    phase = torch.cat([torch.outer(columns, frequencies), torch.outer(rows, frequencies)], dim=-1)
    return torch.polar(torch.ones_like(phase), phase)


def apply_rotary_enc(xq: Tensor, xk: Tensor, freqs_cis: Tensor, repeat_freqs_k: bool = False) -> tuple[Tensor, Tensor]:
    """Rotate queries [B, heads, N, D] and keys [B, heads, K, D] by ``freqs_cis`` [N, D / 2], in fp32 at least.

    With ``repeat_freqs_k`` the keys are several grids, K a multiple of N. No keys are returned as they are.
    """
    queries = _rotate(xq, freqs_cis)
    if xk.shape[-2] == 0:
        return queries, xk
    grids = xk.shape[-2] // xq.shape[-2] if repeat_freqs_k else 1
    return queries, _rotate(xk.unflatten(-2, (grids, -1)), freqs_cis).flatten(-3, -2)


def _rotate(x: Tensor, freqs_cis: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).contiguous()
    return torch.view_as_real(torch.view_as_complex(wide) * freqs_cis).flatten(-2).to(x.dtype)
