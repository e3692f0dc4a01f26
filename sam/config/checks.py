"""Checks of the numbers of a config, which may come out of a file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, TypeVar

C = TypeVar("C")

# What whole numbers may be, far above those of the largest variant: a model is built of them.
COUNTS, SIZES = range(1, 257), range(1, 2**16 + 1)
_MAX_PIXEL = 2**16


def check_whole(name: str, value: Any, allowed: range) -> None:
    """Check a number that may come out of a file.

    Raises:
        ValueError: no whole number, or one that is not ``allowed``.
    """
    if not is_whole(value, allowed):
        raise ValueError(f"{name} must be a whole number from {allowed[0]} to {allowed[-1]}, got {value!r}")


def builtin(value: Any) -> Any:
    """Return numpy's and others' numbers as Python's own, which JSON holds, and anything else as it is."""
    if isinstance(value, bool):
        return value
    return int(value) if isinstance(value, Integral) else float(value) if isinstance(value, Real) else value


def is_whole(value: Any, allowed: range) -> bool:
    return type(value) is int and value in allowed  # True is an int too, and 1.0 is in a range


def builtin_tuple(name: str, values: Any) -> tuple[Any, ...]:
    """Return a list of numbers as a tuple of Python's own.

    Raises:
        ValueError: no list.
    """
    if not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a list, got {values!r}")
    return tuple(map(builtin, values))


def check_pixel_statistics(mean: tuple[Any, ...], std: tuple[Any, ...]) -> None:
    """Check the mean and the standard deviation of pixels in 0..255, three numbers each.

    Raises:
        ValueError: another number of them, or one out of bounds.
    """
    for name, least, values in (("pixel_mean", -_MAX_PIXEL, mean), ("pixel_std", 0, std)):
        numbers = [v for v in values if type(v) in (int, float) and least <= v <= _MAX_PIXEL]
        if not len(values) == len(numbers) == 3:
            raise ValueError(f"{name} must be three numbers from {least} to {_MAX_PIXEL}, got {list(values)}")
    if 0 in std:
        raise ValueError(f"pixel_std must not be 0, got {list(std)}")


def from_mapping(kind: type[C], values: Any) -> C:
    """Return a config of the class ``kind`` that has ``values`` as its fields.

    Raises:
        ValueError: no dictionary, or fields or values that no config of the kind has.
    """
    if not isinstance(values, dict):
        raise ValueError(f"a {kind.__name__} is a JSON object, got {type(values).__name__}")
    unknown = sorted(set(values) - {field.name for field in fields(kind)})  # type: ignore[arg-type]
    if unknown:
        raise ValueError(f"unknown {kind.__name__} fields {unknown}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"incomplete {kind.__name__}: {error}") from None


def from_json(kind: type[C], text: str) -> C:
    """Return the config of the class ``kind`` that ``text`` describes.

    Raises:
        ValueError: not JSON, or fields or values that no config of the kind has.
        RecursionError: JSON that is nested too deep.
    """
    return from_mapping(kind, json.loads(text))
