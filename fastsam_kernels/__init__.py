"""Operations of Segment Anything that are worth a kernel, each checked against a plain PyTorch reference."""

from .dispatch import KERNELS, UnsupportedKernelError, check_kernels, resolve_kernels
from .hypernetwork_masks import UpscalingWeights, hypernetwork_masks, pack_upscaling
from .nms import nms
from .rel_pos_attention import rel_pos_attention
from .two_way_attention import MOST_TOKENS, image_to_token_attention, token_to_image_attention, two_way_attention

__all__ = [
    "KERNELS",
    "MOST_TOKENS",
    "UnsupportedKernelError",
    "UpscalingWeights",
    "check_kernels",
    "hypernetwork_masks",
    "image_to_token_attention",
    "nms",
    "pack_upscaling",
    "rel_pos_attention",
    "resolve_kernels",
    "token_to_image_attention",
    "two_way_attention",
]
