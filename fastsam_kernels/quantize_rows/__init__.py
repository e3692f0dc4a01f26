"""Quantisation of rows to 8 bits, with the layer norm before it."""

from .api import quantize_rows

__all__ = ["quantize_rows"]
