"""Compilation of the blocks of image encoders and of the decoder, within limits of torch that are raised for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

_MAX_COMPILED_GRAPHS = 256


def compiled_block(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that runs a block of an image encoder, compiled once for each kind of block.

    It is called within :func:`many_graphs`.
    """
    return torch.compile(run, fullgraph=True, dynamic=False)


def many_graphs() -> AbstractContextManager[None]:
    """Raise torch's limit of eight compiled graphs per function, so that each bucket and kind of block gets one.

    The limit is one of the thread, so it is raised around every call that may compile, and nobody else's changes.
    """
    config = torch._dynamo.config
    return config.patch(recompile_limit=max(config.recompile_limit, _MAX_COMPILED_GRAPHS))
