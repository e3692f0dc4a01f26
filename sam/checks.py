"""Checks of what users hand over: a wrong type is named together with the type that is wanted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def require(name: str, value: Any, kinds: type | tuple[type, ...], expected: str) -> None:
    """Raise ``TypeError`` saying what ``name`` must be, unless ``value`` is of one of ``kinds``."""
    if not isinstance(value, kinds):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")


def path_of(name: str, value: Any) -> Path:
    """Return ``value`` as a path.

    Raises:
        TypeError: it is none; ``name`` says what must be.
        ValueError: ``Path`` would take it for another: an empty name for the working directory, or a URL.
    """
    require(name, value, (str, os.PathLike), "a path, a str or os.PathLike")
    text = os.fspath(value)
    if not text:
        raise ValueError(f"{name} must name a file or folder, got an empty name")
    if "://" in text:
        raise ValueError(f"{name} must name a file or folder, got the URL {text}: download it first")
    return Path(value)


def require_model(model: Any) -> None:
    """Raise ``TypeError`` unless ``model`` has an image encoder, as a SAM model or a user's own has."""
    if not hasattr(model, "image_encoder"):
        raise TypeError(f"model must be a sam.Sam, got {type(model).__name__}")


@contextmanager
def naming(name: str | None) -> Iterator[None]:
    """Put ``name`` before the message of a bad value, or of a file that is not there; None leaves it."""
    try:
        yield
    except (TypeError, ValueError, FileNotFoundError, IsADirectoryError) as error:
        raise type(error)(str(error) if name is None else f"{name}: {error}") from None
