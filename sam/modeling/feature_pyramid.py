"""SAM 2's image encoder: the trunk, and the neck that makes maps of one width of its stages (arXiv 1612.03144)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hiera import Hiera
from .weight_cache import WeightCache


class ImageEncoder(WeightCache):
    """Encode normalised pixels [B, 3, H, W] as maps of one width at strides 4, 8 and 16, and their positions.

    Args:
        trunk: makes one map per stage, as :class:`~sam.modeling.hiera.Hiera`.
        neck: takes them, as :class:`FpnNeck`.
        scalp: how many of the coarsest maps are dropped.
    """

    __constants__ = ("scalp",)

    def __init__(self, trunk: Hiera, neck: FpnNeck, scalp: int = 0) -> None:
        super().__init__()
        self.trunk = trunk
        self.neck = neck
        self.scalp = scalp
        if trunk.channel_list != neck.backbone_channel_list:
            raise ValueError(
                f"the trunk makes maps of {trunk.channel_list} channels, the neck takes {neck.backbone_channel_list}"
            )

    def forward(self, sample: Tensor) -> dict[str, Tensor | list[Tensor]]:
        """Encode a batch of images.

        Returns:
            backbone_fpn: the maps [B, d_model, h, w], the finest first; vision_pos_enc: their positions;
            vision_features: the last map.

        Raises:
            ValueError: a side that is no multiple of 32 px.
        """
        fused = self._fused(sample)
        if fused is not None:
            return fused
        features, positions = self.neck(self.trunk(sample))
        if self.scalp > 0:
            features, positions = features[: -self.scalp], positions[: -self.scalp]
        return {"vision_features": features[-1], "vision_pos_enc": positions, "backbone_fpn": features}


class FpnNeck(nn.Module):
    """Project each stage to ``d_model`` channels; add the upsampled next coarser map to some levels.

    Args:
        position_encoding: gives the positions of a map.
        d_model: channels of all maps.
        backbone_channel_list: channels of the stages, the coarsest first.
        kernel_size, stride, padding: options of the projections' convolutions.
        fpn_interp_model: how a coarser map is upsampled.
        fuse_type: "sum", or "avg" of the two.
        fpn_top_down_levels: the levels that get the coarser one added; by default all.
    """

    __constants__ = ("d_model", "fpn_interp_model", "fuse_type", "fpn_top_down_levels")

    def __init__(
        self,
        position_encoding: nn.Module,
        d_model: int,
        backbone_channel_list: Sequence[int],
        kernel_size: int = 1,
        stride: int = 1,
        padding: int = 0,
        fpn_interp_model: str = "bilinear",
        fuse_type: str = "sum",
        fpn_top_down_levels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if fuse_type not in ("sum", "avg"):
            raise ValueError(f"fuse_type must be 'sum' or 'avg', got {fuse_type!r}")
        self.position_encoding = position_encoding
        self.backbone_channel_list = list(backbone_channel_list)
        self.d_model = d_model
        self.convs = nn.ModuleList()
        for channels in backbone_channel_list:
            conv = nn.Conv2d(channels, d_model, kernel_size=kernel_size, stride=stride, padding=padding)
            self.convs.append(nn.Sequential())
            self.convs[-1].add_module("conv", conv)
        self.fpn_interp_model = fpn_interp_model
        self.fuse_type = fuse_type
        levels = range(len(self.convs)) if fpn_top_down_levels is None else fpn_top_down_levels
        self.fpn_top_down_levels = list(levels)

    def forward(self, xs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the maps [B, d_model, h, w] of the stages ``xs``, the finest first, and their positions."""
        if len(xs) != len(self.convs):
            raise ValueError(f"the neck takes the maps of {len(self.convs)} stages, got {len(xs)}")
        maps: list[Tensor] = []
        for level, conv in zip(reversed(range(len(xs))), self.convs, strict=True):
            lateral = conv(xs[level])
            if level in self.fpn_top_down_levels and maps:
                lateral = lateral + upsample(maps[-1], self.fpn_interp_model)
                if self.fuse_type == "avg":
                    lateral = lateral / 2
            maps.append(lateral)
        maps.reverse()
        return maps, [self.position_encoding(x).to(x.dtype) for x in maps]


def upsample(x: Tensor, mode: str) -> Tensor:
    """Upsample [B, C, h, w] twofold, in fp32 as officially, or wider where ``x`` is."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.interpolate(wide, scale_factor=2.0, mode=mode, align_corners=None if mode == "nearest" else False)
