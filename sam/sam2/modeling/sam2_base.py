"""The whole model: ``sam2.modeling.sam2_base``."""

from ...modeling.sam2_base import NO_OBJ_SCORE, SAM2Base

__all__ = ["NO_OBJ_SCORE", "SAM2Base"]
