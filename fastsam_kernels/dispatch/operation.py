"""Operations by name, and the choice of an implementation for each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic

import torch

from . import device as devices
from .implementation import Implementation, Result, first_tensor

KERNELS = ("auto", "reference", "torch", "triton")
Kernels = str | Mapping[str, str]

logger = logging.getLogger("fastsam_kernels")


class UnsupportedKernelError(ValueError):
    """The chosen implementation cannot serve this input; the message names the constraint."""


@dataclass(frozen=True)
class Operation(Generic[Result]):
    """An operation and the implementations it offers.

    Attributes:
        name: name of the public function.
        implementations: the first without a limitation or a drawback is what "auto" runs; the last has none.
        prepare: checks the arguments of the public function, without ``kernels``, and returns them as the
            implementations take them.
    """

    name: str
    implementations: tuple[Implementation[Result], ...]
    prepare: Callable[..., tuple[Any, ...]]

    def run(self, kernels: Kernels, *arguments: Any) -> Result:
        """Compute the operation on prepared arguments.

        Raises:
            ValueError, UnsupportedKernelError: as :meth:`select`.
        """
        return self.select(kernels, *arguments).run(*arguments)

    def select(self, kernels: Kernels, *arguments: Any) -> Implementation[Result]:
        """Return the implementation that ``kernels`` means for prepared arguments.

        Raises:
            ValueError: ``kernels`` names no operation or no implementation.
            UnsupportedKernelError: the implementation that it names cannot run.
        """
        choice = kernels if kernels in KERNELS else choice_for(kernels, self.name)
        if choice == "triton" and not _offers_triton(self):
            raise UnsupportedKernelError(f"{self.name} has no 'triton' implementation; 'auto' finds another")
        if choice != "auto":
            implementation = self.implementation(choice)
            problem = implementation.limitation and implementation.limitation(*arguments)
            if problem:
                raise UnsupportedKernelError(f"the {choice!r} implementation of {self.name} cannot run here: {problem}")
            return implementation
        first_problem = None
        for implementation in self.implementations:
            problem = implementation.limitation and implementation.limitation(*arguments)
            problem = problem or (implementation.drawback and implementation.drawback(*arguments))
            if not problem:
                if not torch.compiler.is_compiling():
                    _log_once(self.name, str(first_tensor(arguments).device), implementation.name, first_problem)
                return implementation
            first_problem = first_problem or problem
        raise UnsupportedKernelError(f"no implementation of {self.name} can run here: {first_problem}")

    def implementation(self, name: str) -> Implementation[Result]:
        """Return the implementation of that name.

        Raises:
            ValueError: there is none.
        """
        for implementation in self.implementations:
            if implementation.name == name:
                return implementation
        known = ", ".join(implementation.name for implementation in self.implementations)
        raise ValueError(f"the implementation of {self.name} must be one of {known}, got {name!r}")


OPERATIONS: dict[str, Operation[Any]] = {}


def register(operation: Operation[Result]) -> Operation[Result]:
    """Make ``operation`` known by its name, and return it."""
    OPERATIONS[operation.name] = operation
    return operation


def has_kernel(name: str) -> bool:
    """Tell whether an operation has a Triton form; a kernel that several operations share has its own name."""
    return name not in OPERATIONS or _offers_triton(OPERATIONS[name])


def _offers_triton(operation: Operation[Any]) -> bool:
    return any(implementation.name == "triton" for implementation in operation.implementations)


def limitation(operation: str, implementation: str, *arguments: Any, **options: Any) -> str | None:
    """Return what keeps an implementation of an operation from these arguments, None if it can run.

    Args:
        operation: the name of a function of this package, like "rel_pos_attention".
        implementation: "reference", "torch" or "triton".
        arguments, options: arguments of the function, without ``kernels``.

    Raises:
        ValueError: unknown names, or arguments that the function itself would refuse.
    """
    entry = OPERATIONS.get(operation)
    if entry is None:
        raise ValueError(f"unknown operation {operation!r}; known: {', '.join(sorted(OPERATIONS))}")
    ask, prepared = entry.implementation(implementation).limitation, entry.prepare(*arguments, **options)
    return None if ask is None else ask(*prepared)


def check_kernels(kernels: Kernels) -> str:
    """Return ``kernels`` as one string: one of :data:`KERNELS`, or with choices, "auto, nms=torch".

    Raises:
        ValueError: it names no operation or no implementation.
    """
    if isinstance(kernels, str) and kernels in KERNELS:
        return kernels
    default, choices = _parse(kernels)
    return ", ".join([default, *(f"{name}={choice}" for name, choice in sorted(choices.items()))])


def resolve_kernels(kernels: Kernels, device: torch.device, dtype: torch.dtype | None = None) -> str:
    """Return ``kernels`` as :func:`check_kernels` does, with what "auto" means on ``device`` in its place.

    ``dtype`` is that of matrix products, None where there are none.

    Raises:
        ValueError: it names no operation or no implementation.
        UnsupportedKernelError: "triton" on a device that Triton kernels cannot run on.
    """
    default, *choices = check_kernels(kernels).split(", ")
    problem = None
    if default in ("auto", "triton"):
        problem = devices.triton_limitation(device)
    if default == "triton" and problem is not None:
        raise UnsupportedKernelError(f"the 'triton' implementations cannot run here: {problem}")
    if default == "auto":
        problem = problem or devices.triton_drawback(dtype)
        default = "triton" if problem is None else "torch"
        if not torch.compiler.is_compiling():
            _log_once("every operation", str(device), default, problem)
    return ", ".join([default, *choices])


def choice_for(kernels: Kernels, operation: str) -> str:
    """Return what ``kernels`` says of one operation, one of :data:`KERNELS`.

    Raises:
        ValueError: it names no operation or no implementation.
    """
    if isinstance(kernels, str) and kernels in KERNELS:
        return kernels
    default, choices = _parse(kernels)
    return choices.get(operation, default)


def _parse(kernels: Kernels) -> tuple[str, dict[str, str]]:
    if isinstance(kernels, Mapping):
        default, choices = "auto", dict(kernels)
    elif isinstance(kernels, str):
        default, *parts = kernels.split(", ")
        choices = {name: choice for name, _, choice in (part.partition("=") for part in parts)}
    else:
        raise ValueError(f"kernels must be one of {', '.join(KERNELS)}, or a mapping, got {kernels!r}")
    for name, choice in {"kernels": default, **choices}.items():
        if name != "kernels" and name not in OPERATIONS:
            raise ValueError(f"kernels names an unknown operation {name!r}; known: {', '.join(sorted(OPERATIONS))}")
        if choice not in KERNELS:
            raise ValueError(f"{name} must be one of {', '.join(KERNELS)}, got {choice!r}")
    return default, choices


@cache
def _log_once(operation: str, device: str, choice: str, problem: str | None) -> None:
    logger.info("%s on %s: kernels='auto' is %r%s", operation, device, choice, f" ({problem})" if problem else "")
