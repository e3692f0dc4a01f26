"""SAM 2's memory encoder: the features of a frame and a mask of an object become a memory of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .common import DropPath, LayerNorm2d
from .memory_attention import get_clones
from .weight_cache import WeightCache


class MaskDownSampler(nn.Module):
    """Convolutions that take masks [B, 1, h, w] to [B, embed_dim, h / total_stride, w / total_stride].

    Args:
        embed_dim: channels of the result.
        kernel_size, stride, padding: options of each convolution; channels grow by ``stride`` squared.
        total_stride: a power of ``stride``.
        activation: after each norm.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        kernel_size: int = 4,
        stride: int = 4,
        padding: int = 0,
        total_stride: int = 16,
        activation: type[nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        count = round(math.log(total_stride, stride))
        if stride**count != total_stride:
            raise ValueError(f"total_stride={total_stride} must be a power of stride={stride}")
        self.encoder = nn.Sequential()
        channels = 1
        for _ in range(count):
            following = channels * stride**2
            self.encoder.append(nn.Conv2d(channels, following, kernel_size=kernel_size, stride=stride, padding=padding))
            self.encoder.append(LayerNorm2d(following))
            self.encoder.append(activation())
            channels = following
        self.encoder.append(nn.Conv2d(channels, embed_dim, kernel_size=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


class CXBlock(nn.Module):
    """Block of ConvNeXt (arXiv 2201.03545) on [B, dim, h, w].

    Args:
        dim: channels.
        kernel_size, padding: options of the first convolution.
        drop_path: drops the block's addition to a sample while training.
        layer_scale_init_value: initial scale of the residual, per channel; 0 for no such weights.
        use_dwconv: the first convolution does not mix channels.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 7,
        padding: int = 3,
        drop_path: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        use_dwconv: bool = True,
    ) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=kernel_size, padding=padding, groups=dim if use_dwconv else 1)
        self.norm = LayerNorm2d(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale_init_value)) if layer_scale_init_value > 0 else None
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        added = self.norm(self.dwconv(x)).permute(0, 2, 3, 1)
        added = self.pwconv2(self.act(self.pwconv1(added)))
        if self.gamma is not None:
            added = self.gamma * added
        return x + self.drop_path(added.permute(0, 3, 1, 2))


class Fuser(nn.Module):
    """``num_layers`` copies of ``layer`` on [B, dim, h, w], after an optional projection."""

    def __init__(self, layer: nn.Module, num_layers: int, dim: int | None = None, input_projection: bool = False):
        super().__init__()
        self.proj: nn.Module = nn.Identity()
        self.layers = get_clones(layer, num_layers)
        if input_projection:
            if dim is None:
                raise ValueError("input_projection needs dim")
            self.proj = nn.Conv2d(dim, dim, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        for layer in self.layers:
            x = layer(x)
        return x


class MemoryEncoder(WeightCache):
    """Encode masks of objects, with the features of their frame, as memories of ``out_dim`` channels.

    Args:
        out_dim: channels of a memory.
        mask_downsampler: takes masks to the size of the features, as :class:`MaskDownSampler`.
        fuser: mixes the sum of both, as :class:`Fuser`.
        position_encoding: gives the positions of a memory.
        in_dim: channels of the features.
    """

    def __init__(
        self,
        out_dim: int,
        mask_downsampler: nn.Module,
        fuser: nn.Module,
        position_encoding: nn.Module,
        in_dim: int = 256,
    ) -> None:
        super().__init__()
        self.mask_downsampler = mask_downsampler
        self.pix_feat_proj = nn.Conv2d(in_dim, in_dim, kernel_size=1)
        self.fuser = fuser
        self.position_encoding = position_encoding
        self.out_proj = nn.Conv2d(in_dim, out_dim, kernel_size=1) if out_dim != in_dim else nn.Identity()

    def forward(
        self, pix_feat: Tensor, masks: Tensor, skip_mask_sigmoid: bool = False
    ) -> dict[str, Tensor | list[Tensor]]:
        """Encode memories of B objects.

        Args:
            pix_feat: [B, in_dim, h, w] of the frame.
            masks: [B, 1, 16h, 16w] logits; with ``skip_mask_sigmoid`` what the convolutions take.

        Returns:
            vision_features: [B, out_dim, h, w]; vision_pos_enc: a list of their positions.
        """
        fused = self._fused(pix_feat, masks, skip_mask_sigmoid)
        if fused is not None:
            return fused
        downsampled = self.mask_downsampler(masks if skip_mask_sigmoid else masks.sigmoid())
        x = self.pix_feat_proj(pix_feat.to(downsampled.device)) + downsampled
        x = self.out_proj(self.fuser(x))
        return {"vision_features": x, "vision_pos_enc": [self.position_encoding(x).to(x.dtype)]}
