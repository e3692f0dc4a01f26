"""The modules of SAM, at the import paths and under the names of the official package."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .image_encoder import ImageEncoderViT
from .mask_decoder import MaskDecoder
from .prompt_encoder import PromptEncoder
from .transformer import TwoWayTransformer

if TYPE_CHECKING:
    from .sam import Sam

__all__ = ["ImageEncoderViT", "MaskDecoder", "PromptEncoder", "Sam", "TwoWayTransformer"]


def __getattr__(name: str) -> Any:
    """Import the whole model when it is asked for: it stands on ``sam.inference``, which stands on the parts here."""
    if name in ("Sam", "sam"):
        whole = import_module(f"{__name__}.sam")
        return whole.Sam if name == "Sam" else whole
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
