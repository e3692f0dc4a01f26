"""Kinds of tensors, and whether torch is making a graph of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn


def is_making_graph() -> bool:
    """Return True while torch traces, exports or compiles, when shapes and values may be symbols."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor has memory of its own: not fake, distributed, or quantised behind a class."""
    return type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__


is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_FUNCTIONS = (Tensor.__torch_function__.__func__, nn.Parameter.__torch_function__)  # type: ignore[attr-defined]


def is_ordinary(tensor: Tensor) -> bool:
    """Return whether torch's functions make of a tensor what they make of its numbers: it is plain, with none its own.

    A class with a ``__torch_function__`` may answer ``F.linear`` in its own way, and nothing else; what ``torch.func``
    maps over or differentiates has no memory to look at.
    """
    kind = type(tensor)
    if is_wrapped(tensor):
        return False
    if kind is Tensor or kind is nn.Parameter:
        return True
    function = kind.__torch_function__
    return is_plain(tensor) and getattr(function, "__func__", function) in _FUNCTIONS


def has_bytes(value: Any) -> bool:
    """Return whether ``value`` is a tensor whose bytes are its values."""
    return (
        isinstance(value, Tensor)
        and is_plain(value)
        and value.layout == torch.strided
        and not value.is_quantized
        and not value.is_meta
    )


def is_counter(tensor: Tensor) -> bool:
    """Return whether ``tensor`` is one integer: a count that a wrapper keeps beside weights, as averages of them do."""
    return tensor.ndim == 0 and not tensor.is_floating_point() and not tensor.is_complex()


def compact(tensor: Tensor) -> Tensor:
    """Return ``tensor``, or a copy where it is a view: pickled, a view takes all along that it is a view of."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def bytes_held(held: Any) -> int:
    """Return the bytes of memory behind the tensors in nested containers, shared memory once."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in _tensors(held)}
    return sum(storages.values())


def _tensors(held: Any) -> Iterator[Tensor]:
    if isinstance(held, Tensor):
        yield held
    elif is_dataclass(held):
        yield from _tensors([getattr(held, each.name) for each in fields(held)])
    elif isinstance(held, (Mapping, list, tuple)):
        for each in held.values() if isinstance(held, Mapping) else held:
            yield from _tensors(each)
