"""Weights from a file into a model that is there already, as a program built it."""

from __future__ import annotations

import os

from torch import nn

from ..checks import path_of
from .errors import CheckpointError
from .families import expected_shapes
from .read import official_state, read_weights


def load_into(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load weights strictly, in any layout that :func:`sam.checkpoint.read_checkpoint` takes.

    Args:
        model: a model with a ``config``, or one that a program has put together or changed, which takes official names.
        path: a file or folder.

    Raises:
        TypeError: no path.
        FileNotFoundError: no such file.
        CheckpointError: unreadable, foreign, or weights of another model, in one line.
    """
    path = path_of("checkpoint", path)
    state, form = read_weights(path)
    config, names = getattr(model, "config", None), model.state_dict().keys()
    try:
        if config is not None and names == expected_shapes(config).keys():
            state = official_state(state, form, config)
        elif form.layout != "official":
            raise CheckpointError(f"a changed model takes weights of official names, not those of {form.layout}")
        model.load_state_dict(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error.__cause__
    except RuntimeError as error:  # torch's, of a line per kind of mismatch
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from error
