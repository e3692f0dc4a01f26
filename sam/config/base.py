"""What the descriptions of all models share: sizes that follow from others, and JSON."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import asdict, replace
from typing import Any, TypeVar

from .checks import from_json

C = TypeVar("C", bound="ModelConfig")


class ModelConfig(ABC):
    """The description of a model: a frozen dataclass that has an ``image_size`` and a ``grid_size``."""

    image_size: int

    @property
    @abstractmethod
    def grid_size(self) -> int:
        """Side of the image embedding, in tokens."""

    @property
    def low_res_size(self) -> int:
        """Side of the low-resolution logits and of ``mask_input``, in pixels."""
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
