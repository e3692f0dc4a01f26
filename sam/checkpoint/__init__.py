"""Checkpoints: files to state dicts and back, strictly; foreign layouts become official names."""

from .errors import CheckpointError
from .layouts import LAYOUTS, Layout
from .read import Checkpoint, read_checkpoint
from .write import save_checkpoint, write_checkpoint

__all__ = [
    "LAYOUTS",
    "Checkpoint",
    "CheckpointError",
    "Layout",
    "read_checkpoint",
    "save_checkpoint",
    "write_checkpoint",
]
