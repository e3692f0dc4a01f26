"""Compilation of the blocks of image encoders and of the decoder: what torch can compile, within raised limits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..modeling.quantized_linear import QuantizedLinear
from ..system.tensors import is_plain

_MAX_COMPILED_GRAPHS = 256


def compiled_block(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that runs a block of an image encoder, compiled once for each kind of block.

    It is called within :func:`many_graphs`.
    """
    return torch.compile(run, fullgraph=True, dynamic=False)


def why_not_compiled(name: str, part: nn.Module) -> str | None:
    """Return a sentence on weights in ``part``, called ``name``, that ``torch.compile`` cannot take; None without any.

    These are weights in 8 bits, weights that torch packed for itself, as its dynamic quantisation does, and tensors
    behind a class that does not tell torch of what it is made.
    """
    for path, module in part.named_modules(prefix=name):
        for weight in (*module._parameters.values(), *module._buffers.values()):
            if weight is not None and not is_plain(weight) and not is_traceable_wrapper_subclass(weight):
                return f"{path} has weights of {type(weight).__name__}, which torch.compile does not take"
        if isinstance(module, QuantizedLinear):
            return f"{path} is quantised to {module.scheme}, whose products torch.compile does not take"
        if any(isinstance(value, torch.ScriptObject) for value in module.__dict__.values()):
            return f"{path} has weights that torch packed, which torch.compile does not take"
    return None


def many_graphs() -> AbstractContextManager[None]:
    """Raise torch's limit of eight compiled graphs per function, so that each bucket and kind of block gets one.

    The limit is one of the thread, so it is raised around every call that may compile, and nobody else's changes.
    """
    config = torch._dynamo.config
    return config.patch(recompile_limit=max(config.recompile_limit, _MAX_COMPILED_GRAPHS))
