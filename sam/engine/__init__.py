"""Serve requests of many clients with one model, in batches, without HTTP. ``Engine`` is all that a caller needs."""

from ..images.prepare import PreparedImage
from .engine import Engine
from .errors import (
    DeadlineExceededError,
    EngineClosedError,
    EngineError,
    EngineFailedError,
    OutOfMemoryError,
    QueueFullError,
    StreamError,
)
from .requests import AutomaticOptions, KeyedImage, PromptMasks
from .streams import TrackedFrame, TrackingStream

__all__ = [
    "AutomaticOptions",
    "DeadlineExceededError",
    "Engine",
    "EngineClosedError",
    "EngineError",
    "EngineFailedError",
    "KeyedImage",
    "OutOfMemoryError",
    "PreparedImage",
    "PromptMasks",
    "QueueFullError",
    "StreamError",
    "TrackedFrame",
    "TrackingStream",
]
