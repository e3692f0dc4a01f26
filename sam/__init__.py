"""Segment Anything, a drop-in for ``segment_anything``: the model, the predictor, batches, a command line.

``import sam`` imports none of its modules: a name brings its module along when it is first used, so that parts which
need no torch (the client, reading images, run lengths) run where there is none.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors: what ``_HOMES`` says
    from . import automatic_mask_generator, modeling, predictor, utils
    from .automatic_mask_generator import SamAutomaticMaskGenerator
    from .build_sam import (
        build_sam,
        build_sam_nano,
        build_sam_vit_b,
        build_sam_vit_h,
        build_sam_vit_l,
        load_model,
        sam_model_registry,
    )
    from .checkpoint import CheckpointError, save_checkpoint
    from .config import SAM2_VARIANTS, VARIANTS, HieraConfig, Sam2Config, SamConfig
    from .drop_in import as_sam2, as_segment_anything
    from .embedding import ImageEmbedding
    from .masks.results import MaskPrediction
    from .modeling import Sam
    from .modeling.build import build_from_config
    from .modeling.quantization import quantize
    from .modeling.sam2_base import SAM2Base
    from .predictor import SamPredictor
    from .prompts.prompt import Prompt
    from .sessions.interactive import InteractiveSession
    from .sessions.stream import encode_stream, predict_stream
    from .video.results import FrameResult
    from .video.session import TrackingSession, step_together
    from .video.session_file import load_session, save_session
    from .video.tracking import track, track_together

__version__ = "0.1.0"

__all__ = [
    "SAM2_VARIANTS",
    "VARIANTS",
    "CheckpointError",
    "FrameResult",
    "HieraConfig",
    "ImageEmbedding",
    "InteractiveSession",
    "MaskPrediction",
    "Prompt",
    "SAM2Base",
    "Sam",
    "Sam2Config",
    "SamAutomaticMaskGenerator",
    "SamConfig",
    "SamPredictor",
    "TrackingSession",
    "as_sam2",
    "as_segment_anything",
    "automatic_mask_generator",
    "build_from_config",
    "build_sam",
    "build_sam_nano",
    "build_sam_vit_b",
    "build_sam_vit_h",
    "build_sam_vit_l",
    "encode_stream",
    "load_model",
    "load_session",
    "modeling",
    "predict_stream",
    "predictor",
    "quantize",
    "sam_model_registry",
    "save_checkpoint",
    "save_session",
    "step_together",
    "track",
    "track_together",
    "utils",
]

_NAMES = {
    "automatic_mask_generator": ("SamAutomaticMaskGenerator",),
    "build_sam": (
        "build_sam",
        "build_sam_nano",
        "build_sam_vit_b",
        "build_sam_vit_h",
        "build_sam_vit_l",
        "load_model",
        "sam_model_registry",
    ),
    "checkpoint": ("CheckpointError", "save_checkpoint"),
    "config": ("SAM2_VARIANTS", "VARIANTS", "HieraConfig", "Sam2Config", "SamConfig"),
    "drop_in": ("as_sam2", "as_segment_anything"),
    "embedding": ("ImageEmbedding",),
    "masks.results": ("MaskPrediction",),
    "modeling": ("Sam",),
    "modeling.build": ("build_from_config",),
    "modeling.quantization": ("quantize",),
    "modeling.sam2_base": ("SAM2Base",),
    "predictor": ("SamPredictor",),
    "prompts.prompt": ("Prompt",),
    "sessions.interactive": ("InteractiveSession",),
    "sessions.stream": ("encode_stream", "predict_stream"),
    "video.results": ("FrameResult",),
    "video.session": ("TrackingSession", "step_together"),
    "video.session_file": ("load_session", "save_session"),
    "video.tracking": ("track", "track_together"),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}
_SUBMODULES = {
    "amg",
    "automatic_mask_generator",
    "checkpoint",
    "client",
    "config",
    "embedding",
    "engine",
    "fidelity",
    "images",
    "inference",
    "masks",
    "modeling",
    "predictor",
    "prompts",
    "sam2",
    "sessions",
    "text",
    "utils",
    "verify",
    "video",
}

if not TYPE_CHECKING:  # a checker that sees __getattr__ takes every misspelt name

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        elif name in _SUBMODULES:
            value = import_module(f".{name}", __name__)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})


class _Package(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        """Keep ``build_sam`` the function, as officially, when the import of the module of that name sets it."""
        if name == "build_sam" and isinstance(value, ModuleType):
            value = value.build_sam
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
