"""The base of all configs: fields that every model has, sizes that follow from others, and JSON."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import asdict, replace
from typing import Any, TypeVar

from .checks import builtin_tuple, check_pixel_statistics, from_json

C = TypeVar("C", bound="ModelConfig")


class ModelConfig(ABC):
    """The description of a model: a frozen dataclass with these fields and a ``grid_size``."""

    variant: str
    image_size: int
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]

    def _settle_shared_fields(self) -> None:
        """Check ``variant`` and the pixel statistics, and make the latter tuples of floats."""
        if not isinstance(self.variant, str):
            raise ValueError(f"variant must be a name, got {self.variant!r}")
        mean, std = (builtin_tuple(name, getattr(self, name)) for name in ("pixel_mean", "pixel_std"))
        check_pixel_statistics(mean, std)
        object.__setattr__(self, "pixel_mean", tuple(map(float, mean)))
        object.__setattr__(self, "pixel_std", tuple(map(float, std)))

    @property
    @abstractmethod
    def grid_size(self) -> int:
        """Return the side of the image embedding, in tokens."""

    @property
    def low_res_size(self) -> int:
        """Return the side of the low-resolution logits and of ``mask_input``, in pixels."""
        return 4 * self.grid_size

    def with_image_size(self: C, image_size: int) -> C:
        """Return the same model for another square input; position tables that follow it have to be resized."""
        values: Any = self
        return self if image_size == self.image_size else replace(values, image_size=image_size)

    def to_json(self) -> str:
        """Return the fields as a JSON object."""
        values: Any = self
        return json.dumps(asdict(values))

    @classmethod
    def from_json(cls: type[C], text: str) -> C:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: not JSON, or fields or values that no config of this class has.
            RecursionError: JSON that is nested too deep.
        """
        return from_json(cls, text)
