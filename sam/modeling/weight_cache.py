"""Values computed from weights, and the detection of stale ones."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastsam_kernels import requires_autograd

from ..system.tensors import is_ordinary, is_plain

T = TypeVar("T")

PACKING = threading.RLock()  # one thread packs; some values are made of others


class Stale:
    """A value made of weights that becomes stale when an optimiser steps one of them.

    ``_version`` does not tell: fused optimisers leave it as it is.

    Attributes:
        addresses: addresses of the weights' memory, which the value must keep alive lest other weights get them.
        is_stale: True from the first step on.
    """

    __slots__ = ("__weakref__", "addresses", "is_stale")

    def __init__(self, addresses: Sequence[int]) -> None:
        self.addresses = frozenset(addresses)
        self.is_stale = False
        _follow(self)


_followers: weakref.WeakSet[Stale] = weakref.WeakSet()
_following = threading.Lock()
_is_registered = False


def _follow(value: Stale) -> None:
    """Mark ``value`` stale at optimiser steps; the first call registers the hook, so that an import registers none."""
    global _is_registered
    with _following:
        if not _is_registered:
            register_optimizer_step_post_hook(_after_step)
            _is_registered = True
        _followers.add(value)


def _after_step(optimiser: torch.optim.Optimizer, *_: Any) -> None:
    stepped = {
        parameter.data_ptr()
        for group in optimiser.param_groups
        for parameter in group["params"]
        if parameter.grad is not None and is_plain(parameter)
    }
    with _following:
        for value in _followers:
            if not value.addresses.isdisjoint(stepped):
                value.is_stale = True


class _Packed(Stale):
    """A cached value, the key it was made under, and the memory that the key names."""

    __slots__ = ("key", "memory", "value")

    def __init__(self, key: tuple[tuple[int, ...], ...], value: Any, sources: Sequence[Tensor]) -> None:
        super().__init__(key[0])
        self.key, self.value = key, value
        self.memory = [source.detach() for source in sources]


class WeightCache(nn.Module):
    """A module that keeps values computed from its weights until the weights change.

    Packed values are dropped by ``.to()`` and its kin, by ``train()`` and ``eval()``, by ``load_state_dict``, and when
    one of the named sources was written in place, by an optimiser too. What torch does not count, writes through
    ``.data``, to weights made in ``inference_mode`` or from outside, has to be told:
    :meth:`weights_changed`. Nothing is kept while autograd records a source, of sources that are no plain tensors,
    nor in a compiled graph, which makes it of the weights that it is given. Threads may ask at once, each on a
    stream of its own: one of them makes the value, and the others get it finished.

    Attributes:
        kernels: implementation of the operations when a program calls the module itself; "reference" calls the modules
            in it, as officially.
        generation: incremented whenever the cache is cleared.
    """

    kernels = "auto"

    def __init__(self) -> None:
        super().__init__()
        self._packed: dict[str, _Packed] = {}
        self._snapshot: Any = None  # a snapshot of sam.inference.eligibility
        self.generation = 0

    def _fused(self, *inputs: Any) -> Any:
        """Compute ``forward`` fused, or return None where the official operations shall run.

        ``sam.inference`` puts the fused form of a class here.
        """
        return None

    def packed(self, name: str, make: Callable[[], T], *sources: Tensor) -> T:
        """Return ``make()``, a function of ``sources`` alone, computed once for their present values."""
        if torch.compiler.is_compiling() or requires_autograd(*sources):
            return make()
        if not all(map(is_ordinary, sources)):
            self._packed.pop(name, None)
            return make()
        key = _key_of(sources)
        entry = self._packed.get(name)
        if entry is None or entry.is_stale or entry.key != key:
            with PACKING:
                entry = self._packed.get(name)
                if entry is None or entry.is_stale or entry.key != key:
                    with packing(sources):
                        entry = _Packed(key, make(), sources)
                    finish(sources)
                    self._packed[name] = entry
        return entry.value

    def weights_changed(self) -> None:
        """Drop all packed values of this module and those in it, after writes that torch does not count."""
        for module in self.modules():
            if isinstance(module, WeightCache):
                module._drop_packed()

    def check_trainable(self) -> None:
        """Raise ``ValueError`` where a module cannot be trained."""

    def train(self, mode: bool = True) -> Any:
        if mode:
            for module in self.modules():
                if isinstance(module, WeightCache):
                    module.check_trainable()
        self._drop_packed()
        return super().train(mode)

    def _drop_packed(self) -> None:
        self._packed.clear()
        self._snapshot = None
        self.generation += 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._drop_packed()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._drop_packed()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": {}, "_snapshot": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled state, which may be an official module's without a cache."""
        super().__setstate__({"_packed": {}, "_snapshot": None, "generation": 0, **state})


def _key_of(sources: Sequence[Tensor]) -> tuple[tuple[Any, ...], ...]:
    """Return addresses, dtypes and versions: they change when a source is replaced or written in place.

    The key identifies memory by its address, so its holder must keep the memory alive.
    """
    return (
        tuple(source.data_ptr() for source in sources),
        tuple(source.dtype for source in sources),
        tuple(0 if source.is_inference() else source._version for source in sources),
    )


@contextmanager
def packing(sources: Sequence[Tensor]) -> Iterator[None]:
    """Pack weights independently of the modes of the first caller.

    A value made under autocast would be narrow, and one made in ``inference_mode`` could never meet autograd later.
    """
    kind = sources[0].device.type if sources else "cpu"
    wide = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
    with torch.inference_mode(False), torch.no_grad(), wide:
        yield


def finish(sources: Sequence[Tensor]) -> None:
    """Wait for what was computed of ``sources`` on this stream, which other streams do not wait for."""
    device = next((source.device for source in sources if source.device.type == "cuda"), None)
    if device is not None and not torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream(device).synchronize()


def weights_of(module: nn.Module) -> list[Tensor]:
    """Return all parameters and buffers of ``module``; every image asks, and ``parameters()`` takes longer."""
    tensors: list[Tensor | None] = []
    pending: list[nn.Module | None] = [module]
    while pending:
        inner = pending.pop()
        if inner is not None:
            tensors += inner._parameters.values()
            tensors += inner._buffers.values()
            pending += inner._modules.values()
    return [tensor for tensor in tensors if tensor is not None]
