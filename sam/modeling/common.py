"""Layers that the encoder and the decoder share, and the cache of values derived from weights."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastsam_kernels import requires_autograd

from ..system.tensors import is_plain

T = TypeVar("T")

_MAKING = threading.RLock()  # of values derived from weights; some are made of others


class MLPBlock(nn.Module):
    """Linear, activation, linear: [..., embedding_dim] -> [..., embedding_dim]."""

    def __init__(self, embedding_dim: int, mlp_dim: int, act: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.lin1 = nn.Linear(embedding_dim, mlp_dim)
        self.lin2 = nn.Linear(mlp_dim, embedding_dim)
        self.act = act()

    @property
    def is_plain(self) -> bool:
        """True when every token goes through by itself: no stand-in for a linear, an activation of each value."""
        linears = type(self.lin1) is type(self.lin2) is nn.Linear
        return linears and type(self.act) in (nn.GELU, nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(self.act(self.lin1(x)))


class LayerNorm2d(nn.Module):
    """Layer normalisation over the channels of [B, C, H, W], biased variance, in at least fp32."""

    __constants__ = ("eps",)

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        centred = wide - wide.mean(dim=1, keepdim=True)
        variance = centred.square().mean(dim=1, keepdim=True)
        normed = centred * torch.rsqrt(variance + self.eps)
        return (normed * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def uncompiled(module: nn.Module) -> nn.Module:
    """What ``torch.compile`` wrapped, or the module itself."""
    return getattr(module, "_orig_mod", module)


# The segments that torch's own wrappers put into the names of what they wrap.
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def unwrapped_name(name: str) -> str:
    """The name of a weight in the model as it was before torch compiled or wrapped it or parts of it."""
    return _WRAPPERS.sub("", name)


def is_ours(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``module`` is of a class of this package as it is, compiled or not, and so takes ``kernels``.

    What a user put in its place, a subclass or another ``forward`` is called as the official code calls it.
    """
    module = uncompiled(module)
    return type(module) is kind and "forward" not in module.__dict__


def is_as_written(module: nn.Module) -> bool:
    """Whether nobody has hooked ``module`` or anything in it, given it another ``forward`` or other than plain weights.

    Every click asks, and ``modules()`` takes four times as long.
    """
    left: list[nn.Module | None] = [module]
    while left:
        state = left.pop().__dict__
        if state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state:
            return False
        if state["_parameters"]:
            for weight in state["_parameters"].values():
                # Nearly all are of this very class, which is quicker to see than what it dispatches to.
                if type(weight) is not Parameter and weight is not None and not is_plain(weight):
                    return False
        left += [inner for inner in state["_modules"].values() if inner is not None]
    return True


def _states(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield ``__dict__`` of ``module`` and of all modules in it; ``modules()`` takes several times as long."""
    left: list[nn.Module | None] = [module]
    while left:
        state = left.pop().__dict__
        yield state
        left += [inner for inner in state["_modules"].values() if inner is not None]


def weights_of(module: nn.Module) -> list[Tensor]:
    """Return all parameters and buffers of ``module``; every image asks."""
    return [
        tensor
        for state in _states(module)
        for tensors in (state["_parameters"], state["_buffers"])
        for tensor in tensors.values()
        if tensor is not None
    ]


def fingerprint(module: nn.Module) -> Hashable | None:
    """Identify the weights of ``module`` and all that it derived from them; None where somebody hooked or patched it.

    Two equal answers mean the same tensors, at the same addresses, unchanged as far as torch counts writes.
    """
    if not is_as_written(module):
        return None
    dropped = tuple(state["times_dropped"] for state in _states(module) if "times_dropped" in state)
    return weights_key(*weights_of(module)), dropped


_steps: dict[int, int] = {}  # of optimisers, by the address of the parameter: fused ones leave ``_version`` as it is


def _count_step(optimiser: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and is_plain(parameter):
                address = parameter.data_ptr()
                _steps[address] = _steps.get(address, 0) + 1


register_optimizer_step_post_hook(_count_step)


def steps_at(addresses: Iterable[int]) -> Hashable:
    """Changes when an optimiser has stepped a parameter at one of ``addresses``."""
    return tuple(_steps.get(address, 0) for address in addresses) if _steps else ()


def weights_key(*sources: Tensor) -> Hashable:
    """Changes when one of ``sources`` is replaced, or written in place as far as torch counts it.

    It knows memory by its address: whoever keeps the key keeps :func:`memory_of` them, so that nothing else gets it.
    """
    addresses = tuple(source.data_ptr() for source in sources)
    versions = tuple(0 if source.is_inference() else source._version for source in sources)
    return addresses, tuple(source.dtype for source in sources), versions, steps_at(addresses)


def memory_of(sources: Iterable[Tensor]) -> list[Tensor]:
    """Holds the memory of ``sources``, also when they are given another."""
    return [source.detach() for source in sources]


class Fp32Buffers(nn.Module):
    """A module whose own buffers never drop below fp32: ``.half()`` and ``.to(torch.bfloat16)`` only move them."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = before[name].to(buffer.device, torch.float32)  # type: ignore[union-attr]
        return self


def without_autocast(sources: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """What is kept of weights must not hang on who asked first."""
    if not sources or not torch.amp.is_autocast_available(sources[0].device.type):
        return nullcontext()
    return torch.autocast(sources[0].device.type, enabled=False)


def _finish(sources: Sequence[Tensor]) -> None:
    """Wait for what was computed of ``sources`` on this stream, which other streams do not wait for."""
    device = next((source.device for source in sources if source.device.type == "cuda"), None)
    if device is not None and not torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream(device).synchronize()


class DerivedWeights(nn.Module):
    """A module that keeps values computed from its weights until the weights change.

    Kept values are dropped by ``.to()`` and its kin, by ``train()`` and ``eval()``, by ``load_state_dict``, and when
    one of the named sources was written in place, by an optimiser too. What torch does not count, writes through
    ``.data`` or from outside, has to be told: :meth:`weights_changed`. Nothing is kept while autograd records a
    source, of sources that are no plain tensors, nor in a compiled graph, which makes it of the weights that it is
    given. Threads may ask at once, each on a stream of its own: one of them makes the value, and the others get it
    finished.

    Attributes:
        times_dropped: how often everything was dropped; who reads kept values by their addresses asks.
    """

    def __init__(self) -> None:
        super().__init__()
        self._derived: dict[str, tuple[Hashable, Any, list[Tensor]]] = {}
        self.times_dropped = 0

    def derived(self, name: str, make: Callable[[], T], *sources: Tensor) -> T:
        """The value of ``make()``, a function of ``sources`` alone, computed once for their present values."""
        if torch.compiler.is_compiling() or requires_autograd(*sources):
            return make()
        if not all(map(is_plain, sources)):
            self._derived.pop(name, None)
            return make()
        key = weights_key(*sources)
        kept = self._derived.get(name)
        if kept is None or kept[0] != key:
            with _MAKING:
                kept = self._derived.get(name)
                if kept is None or kept[0] != key:
                    # A value made inside inference_mode could never meet autograd later.
                    with torch.inference_mode(False), torch.no_grad(), without_autocast(sources):
                        kept = (key, make(), memory_of(sources))
                    _finish(sources)
                    self._derived[name] = kept
        return kept[1]

    def weights_changed(self) -> None:
        """Make all that is kept of the weights anew, here and below: after writes that torch does not count."""
        for module in self.modules():
            if isinstance(module, DerivedWeights):
                module._drop_derived()

    def train(self, mode: bool = True) -> Any:
        self._drop_derived()
        return super().train(mode)

    def _drop_derived(self) -> None:
        self._derived.clear()
        self.times_dropped += 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._drop_derived()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._drop_derived()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_derived": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of an official module too, which keeps nothing."""
        super().__setstate__({"_derived": {}, "times_dropped": 0, **state})
