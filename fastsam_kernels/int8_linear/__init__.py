"""Linear layers whose rows and weights are int8."""

from .api import int8_linear, pack_int8_weight

__all__ = ["int8_linear", "pack_int8_weight"]
