"""Linear layers whose rows and weights are fp8."""

from .api import fp8_linear

__all__ = ["fp8_linear"]
