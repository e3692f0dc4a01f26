"""SAM 2's memory encoder on packed weights, for several objects of one frame, with channels last.

The frame's features are projected once for all objects, and the scale of a block's addition is part of its last weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modeling.memory_encoder import CXBlock, MemoryEncoder
from .eligibility import look, why_not_now
from .packed_weights import ByDtype, LayerNorm, Linear, pack_wide_norm, without_autocast


@dataclass(frozen=True)
class PackedConv:
    """A convolution of [B, C, H, W], channels last."""

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: Any
    groups: int

    def __call__(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, groups=self.groups)


@dataclass(frozen=True)
class PackedBlock:
    """A block of ConvNeXt on [B, C, h, w], channels last; ``second`` has been scaled."""

    conv: PackedConv
    norm: LayerNorm
    first: Linear
    approximate: str
    second: Linear

    def __call__(self, x: Tensor) -> Tensor:
        added = _normed(self.conv(x), self.norm)
        added = self.second(F.gelu(self.first(added), approximate=self.approximate))
        return x + added.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class PackedMemoryEncoder:
    """The weights of one generation.

    Attributes:
        steps: of the masks: each a convolution, a norm, and how the GELU after it is approximated.
        masks, features: the projections of single pixels of the masks and of the frame.
        out: that of the result; None where it stays as it is.
        blocks: of the fuser.
    """

    steps: tuple[tuple[PackedConv, LayerNorm, str], ...]
    masks: Linear
    features: Linear
    blocks: tuple[PackedBlock, ...]
    out: Linear | None


def pack_memory_encoder(encoder: MemoryEncoder, generation: int = 0) -> ByDtype[PackedMemoryEncoder]:
    """Pack the weights of ``encoder``, of which :func:`sam.inference.eligibility.look` has no objection."""
    layers: Any = encoder.mask_downsampler.encoder
    steps = zip(layers[0:-1:3], layers[1::3], layers[2::3], strict=True)
    packed = PackedMemoryEncoder(
        steps=tuple((_pack_conv(conv), pack_wide_norm(norm), act.approximate) for conv, norm, act in steps),
        masks=_pack_pixels(layers[-1]),
        features=_pack_pixels(encoder.pix_feat_proj),
        blocks=tuple(map(_pack_block, encoder.fuser.layers)),  # type: ignore[arg-type]
        out=None if type(encoder.out_proj) is nn.Identity else _pack_pixels(encoder.out_proj),
    )
    return ByDtype(packed, encoder.pix_feat_proj.weight.dtype)


def _pack_conv(conv: nn.Conv2d) -> PackedConv:
    weight = conv.weight.contiguous(memory_format=torch.channels_last)
    return PackedConv(weight, conv.bias, conv.stride, conv.padding, conv.groups)


def _pack_pixels(conv: Any) -> Linear:
    return Linear(conv.weight.flatten(1), conv.bias)


def _pack_block(block: CXBlock) -> PackedBlock:
    weight: Tensor = block.pwconv2.weight
    bias: Tensor = block.pwconv2.bias
    if block.gamma is not None:
        weight, bias = block.gamma[:, None] * weight, block.gamma * bias
    return PackedBlock(
        conv=_pack_conv(block.dwconv),
        norm=pack_wide_norm(block.norm),
        first=Linear(block.pwconv1.weight, block.pwconv1.bias),
        approximate=block.act.approximate,
        second=Linear(weight, bias),
    )


def _normed(x: Tensor, norm: LayerNorm) -> Tensor:
    """Return [B, C, H, W] with normalised channels, as [B, H, W, C]."""
    x = x.permute(0, 2, 3, 1)
    if x.dtype == norm.weight.dtype:
        return norm(x)
    return norm(x.to(norm.weight.dtype)).to(x.dtype)


def project_frame(packed: PackedMemoryEncoder, features: Tensor) -> Tensor:
    """Return what all memories of a frame share, of its features [1 or B, C, h, w]: [1 or B, h, w, C]."""
    with without_autocast(features.device):
        return packed.features(features.to(packed.features.weight.dtype).permute(0, 2, 3, 1))


def encode_memories(packed: PackedMemoryEncoder, of_frame: Tensor, masks: Tensor) -> Tensor:
    """Encode the masks of B objects on a frame.

    Args:
        packed: the weights.
        of_frame: [1 or B, h, w, C], of :func:`project_frame`.
        masks: [B, 1, 16h, 16w], what the convolutions take.

    Returns:
        [B, M, h, w], channels last.
    """
    dtype = packed.features.weight.dtype
    with without_autocast(masks.device):
        x = masks.to(dtype)
        for conv, norm, approximate in packed.steps:
            x = F.gelu(_normed(conv(x), norm), approximate=approximate).permute(0, 3, 1, 2)
        x = (packed.masks(x.permute(0, 2, 3, 1)) + of_frame).permute(0, 3, 1, 2)
        for block in packed.blocks:
            x = block(x)
        return x if packed.out is None else packed.out(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def encode(
    encoder: MemoryEncoder, pix_feat: Tensor, masks: Tensor, skip_mask_sigmoid: bool
) -> dict[str, Tensor | list[Tensor]] | None:
    """Compute :meth:`MemoryEncoder.forward` fused; None where the official operations shall run."""
    if type(encoder) is not MemoryEncoder or encoder.kernels == "reference" or pix_feat.ndim != 4 or masks.ndim != 4:
        return None
    if why_not_now(pix_feat, masks, part=encoder, takes_autocast=True) is not None:
        return None
    weight: Any = encoder.pix_feat_proj.weight
    if masks.device != weight.device or pix_feat.device != weight.device or look(encoder).why_not_fused is not None:
        return None
    weights = look(encoder).packed(pack_memory_encoder, encoder)
    narrow = torch.is_autocast_enabled(masks.device.type)
    if not narrow and any(x.dtype != weights.dtype for x in (pix_feat, masks)):
        return None
    features = pix_feat[:1] if pix_feat.stride(0) == 0 else pix_feat
    packed = weights.now(masks.device)
    of_frame = project_frame(packed, features)
    found = encode_memories(packed, of_frame, masks if skip_mask_sigmoid else masks.sigmoid())
    return {"vision_features": found, "vision_pos_enc": [encoder.position_encoding(found).to(found.dtype)]}
