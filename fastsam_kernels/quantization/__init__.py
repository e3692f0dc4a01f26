"""Operands of the linear layers in 8 bits, and what their forms share."""

from .devices import why_not_quantized
from .onednn import int8_form, sums_exactly
from .operands import SCHEMES, QuantizedRows, QuantizedWeight, quantize_weight

__all__ = [
    "SCHEMES",
    "QuantizedRows",
    "QuantizedWeight",
    "int8_form",
    "quantize_weight",
    "sums_exactly",
    "why_not_quantized",
]
