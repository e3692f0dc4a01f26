"""A batch engine: requests of many clients, one model, no HTTP. ``Engine`` is all that a caller needs."""

from .core import Engine
from .errors import DeadlineExceeded, EngineClosed, EngineError, EngineFailed, OutOfMemory, QueueFull
from .jobs import AutomaticOptions, PreparedImage, PromptMasks

__all__ = [
    "AutomaticOptions",
    "DeadlineExceeded",
    "Engine",
    "EngineClosed",
    "EngineError",
    "EngineFailed",
    "OutOfMemory",
    "PreparedImage",
    "PromptMasks",
    "QueueFull",
]
