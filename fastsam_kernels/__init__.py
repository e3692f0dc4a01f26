"""Operations of Segment Anything that are worth a kernel, each checked against a plain PyTorch reference."""

from .connected_components import connected_components
from .cross_attention import MAX_TOKENS, AbsorbedTokens, ImageTokens, LayerNormWeights, ValueProjection
from .dispatch import (
    KERNELS,
    Kernels,
    UnsupportedKernelError,
    check_kernels,
    choice_for,
    has_kernel,
    limitation,
    requires_autograd,
    resolve_kernels,
)
from .fp8_linear import fp8_linear
from .hypernetwork_masks import UpscalingWeights, hypernetwork_masks, pack_upscaling
from .image_to_token_attention import image_to_token_attention
from .int8_linear import int8_linear, pack_int8_weight
from .mask_postprocess import MaskStatistics, Resizing, above, mask_statistics, pack_masks, packed_masks, unpack_masks
from .memory_attention import memory_attention
from .nms import nms, ranked_nms
from .preprocess_image import preprocess_image
from .quantization import SCHEMES, QuantizedRows, QuantizedWeight, int8_form, quantize_weight, why_not_quantized
from .quantize_rows import quantize_rows
from .rel_pos_attention import rel_pos_attention
from .token_to_image_attention import token_to_image_attention
from .two_way_attention import two_way_attention, without_unused_queries
from .window_attention import window_attention

__all__ = [
    "KERNELS",
    "MAX_TOKENS",
    "SCHEMES",
    "AbsorbedTokens",
    "ImageTokens",
    "Kernels",
    "LayerNormWeights",
    "MaskStatistics",
    "QuantizedRows",
    "QuantizedWeight",
    "Resizing",
    "UnsupportedKernelError",
    "UpscalingWeights",
    "ValueProjection",
    "above",
    "check_kernels",
    "choice_for",
    "connected_components",
    "fp8_linear",
    "has_kernel",
    "hypernetwork_masks",
    "image_to_token_attention",
    "int8_form",
    "int8_linear",
    "limitation",
    "mask_statistics",
    "memory_attention",
    "nms",
    "pack_int8_weight",
    "pack_masks",
    "pack_upscaling",
    "packed_masks",
    "preprocess_image",
    "quantize_rows",
    "quantize_weight",
    "ranked_nms",
    "rel_pos_attention",
    "requires_autograd",
    "resolve_kernels",
    "token_to_image_attention",
    "two_way_attention",
    "unpack_masks",
    "why_not_quantized",
    "window_attention",
    "without_unused_queries",
]
