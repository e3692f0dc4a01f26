"""One way to compute an operation, and its limitations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from . import device as devices

Result = TypeVar("Result")


@dataclass(frozen=True)
class Implementation(Generic[Result]):
    """One way to compute an operation; all implementations of an operation take the same positional arguments.

    The first argument is a tensor, or a tuple that begins with one: where it is, the operation runs.

    Attributes:
        name: its name for ``kernels=``.
        run: computes the result.
        limitation: returns what keeps it from the arguments, None where nothing does; None if nothing ever does.
        drawback: returns why "auto" passes over it although it could run, None where it does not.
    """

    name: str
    run: Callable[..., Result]
    limitation: Callable[..., str | None] | None = None
    drawback: Callable[..., str | None] | None = None


def triton_implementation(
    run: Callable[..., Result], limitation: Callable[..., str | None], *, multiplies: bool
) -> Implementation[Result]:
    """Return the implementation "triton" of an operation.

    Args:
        run: launches the kernels.
        limitation: the limitation of these kernels; what all Triton kernels need is checked here.
        multiplies: whether there are matrix products, in the dtype of the first tensor.
    """

    def all_limitations(*arguments: Any) -> str | None:
        reason = devices.triton_limitation(first_tensor(arguments).device) or limitation(*arguments)
        if reason is None and devices.requires_autograd(*_tensors_in(arguments)):
            return "it has no backward; 'torch' and 'reference' differentiate"
        return reason

    def drawback(*arguments: Any) -> str | None:
        return devices.triton_drawback(first_tensor(arguments).dtype if multiplies else None)

    return Implementation("triton", run, all_limitations, drawback)


def first_tensor(arguments: Sequence[Any]) -> Tensor:
    """Return the tensor that the arguments of an operation begin with."""
    first = arguments[0]
    return first if isinstance(first, Tensor) else first[0]


def _tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among ``values`` and in tuples among them."""
    tensors: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, tuple):
            tensors += _tensors_in(value)
    return tensors
