"""Operations of Segment Anything that are worth a kernel, each checked against a plain PyTorch reference."""

from .connected_components import connected_components
from .dispatch import KERNELS, UnsupportedKernelError, check_kernels, resolve_kernels
from .hypernetwork_masks import UpscalingWeights, hypernetwork_masks, pack_upscaling
from .mask_postprocess import MaskStatistics, Resizing, mask_statistics, pack_masks, packed_masks, unpack_masks
from .nms import nms

__all__ = [
    "KERNELS",
    "MaskStatistics",
    "Resizing",
    "UnsupportedKernelError",
    "UpscalingWeights",
    "check_kernels",
    "connected_components",
    "hypernetwork_masks",
    "mask_statistics",
    "nms",
    "pack_masks",
    "pack_upscaling",
    "packed_masks",
    "resolve_kernels",
    "unpack_masks",
]
