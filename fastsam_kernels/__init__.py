"""Operations of Segment Anything that are worth a kernel, each checked against a plain PyTorch reference."""

from .dispatch import KERNELS, UnsupportedKernelError, check_kernels, resolve_kernels
from .hypernetwork_masks import UpscalingWeights, hypernetwork_masks, pack_upscaling
from .nms import nms
from .rel_pos_attention import rel_pos_attention

__all__ = [
    "KERNELS",
    "UnsupportedKernelError",
    "UpscalingWeights",
    "check_kernels",
    "hypernetwork_masks",
    "nms",
    "pack_upscaling",
    "rel_pos_attention",
    "resolve_kernels",
]
