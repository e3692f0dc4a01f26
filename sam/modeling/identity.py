"""The hash of a model: the values of its weights, and the constants of its modules."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from ..system.tensors import has_bytes, is_counter
from .common import unwrapped_name


def hash_of_model(model: nn.Module) -> str | None:
    """Return 32 hex digits of the weights and the modules of ``model``; None where a weight is no plain tensor."""
    # Inside a state dict no weight is missing and the names are the official ones.
    entries = {**model.state_dict(), **dict(model.named_buffers())}
    for wrapper in _wrappers(model):
        for name, value in list(entries.items()):
            if name.rpartition(".")[0] == wrapper and isinstance(value, Tensor) and is_counter(value):
                del entries[name]
    if not all(map(has_bytes, entries.values())):
        return None
    with ThreadPoolExecutor() as pool:  # zlib releases the GIL
        lines = sorted(pool.map(_checksum, entries.items()))
    return hashlib.sha256("\n".join([*_architecture(model), *lines]).encode()).hexdigest()[:32]


def _checksum(entry: tuple[str, Tensor]) -> str:
    name, tensor = entry
    values = tensor.detach().contiguous().cpu()
    crc = zlib.crc32(values.reshape(-1).view(torch.uint8).numpy().data)
    return f"{unwrapped_name(name)} {list(tensor.shape)} {tensor.dtype} {crc}"


def _wrappers(model: nn.Module) -> set[str]:
    """Return the names of the modules that wrap another as torch's own do."""
    names = [name.rpartition(".") for name, _ in model.named_modules() if name]
    return {parent for parent, _, own in names if not unwrapped_name(f"{own}.")}


def _architecture(model: nn.Module) -> Iterable[str]:
    """Return the modules, one a line; one that wraps another has its name, and the later of two of a name counts."""
    modules = {unwrapped_name(f"{name}."): module for name, module in model.named_modules()}
    return sorted(f"{name} {type(module).__name__} {_constants(module)}" for name, module in modules.items())


def _constants(module: nn.Module) -> str:
    """Return the settings of ``module`` besides weights: its TorchScript constants, or else its ``extra_repr``."""
    names = getattr(module, "__constants__", None)
    if names is None:
        return module.extra_repr()
    values = {name: getattr(module, name, None) for name in sorted(names)}
    defaults = getattr(module, "OPTIONS", {})
    return ", ".join(f"{n}={_plain(v)!r}" for n, v in values.items() if n not in defaults or v != defaults[n])


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value
