"""One prompt as people give it, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..images.geometry import ImageGeometry
from .checks import as_array, check_coordinates, check_corners, check_finite, check_labels
from .labels import CORNER_LABELS, LABEL_PADDING
from .layout import PromptLayout


@dataclass(frozen=True, eq=False)
class Prompt:
    """One question about one image; any combination of the three kinds, also none.

    Attributes:
        points: [N, 2] clicks as (x, y) in pixels of the original image.
        labels: [N], 1 for a click on the object, 0 for one on the background, -1 for padding.
        box: [4] as x0, y0, x1, y1 in pixels of the original image; it may reach over the image's edges.
        mask_input: [1, h, w] low-resolution logits, as an earlier prediction returned them.

    Raises:
        TypeError: a value is no array of numbers.
        ValueError: points without labels or the reverse, lengths that differ, a label outside {-1, 0, 1}, a wrong
            shape, a box with x1 < x0 or y1 < y0, NaN or infinity, a coordinate further than ``MAX_COORDINATE`` (1e30)
            from 0.
    """

    points: Any = None
    labels: Any = None
    box: Any = None
    mask_input: Any = None

    def __post_init__(self) -> None:
        if (self.points is None) != (self.labels is None):
            missing, given = ("labels", "points") if self.labels is None else ("points", "labels")
            raise ValueError(f"{missing} must be given with {given}")
        if self.points is not None:
            points = _numbers("points", self.points, "[N, 2]", np.float64)
            labels = _numbers("labels", self.labels, "[N]")
            if points.shape == (0,):  # an empty list
                points = points.reshape(0, 2)
            if points.ndim != 2 or points.shape[1] != 2:
                raise ValueError(f"points must be [N, 2], got {list(points.shape)}")
            if labels.shape != points.shape[:1]:
                raise ValueError(f"{len(points)} points need labels of shape [{len(points)}], got {list(labels.shape)}")
            check_labels(labels)
            check_coordinates("points", points)
            self._set(points=points, labels=labels.astype(np.int64))
        if self.box is not None:
            box = _numbers("box", self.box, "[4]", np.float64)
            if box.size != 4:
                raise ValueError(f"box must be x0, y0, x1, y1 of shape [4], got {list(box.shape)}")
            check_coordinates("box", box)
            self._check_corners(box.reshape(4))
            self._set(box=box.reshape(4))
        if self.mask_input is not None:
            mask_input = _numbers("mask_input", self.mask_input, "[1, h, w]", np.float32)
            if mask_input.ndim != 3 or mask_input.shape[0] != 1:
                raise ValueError(f"mask_input must be [1, h, w], got {list(mask_input.shape)}")
            check_finite("mask_input", mask_input)
            self._set(mask_input=mask_input)

    def _check_corners(self, box: np.ndarray) -> None:
        check_corners(box)

    def _set(self, **values: np.ndarray) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def tokens(self, geometry: ImageGeometry, layout: PromptLayout) -> tuple[np.ndarray, np.ndarray]:
        """Return coordinates [S, 2] in the input frame and labels [S], in the order the model was trained with."""
        clicks = None if self.points is None else (self.points, self.labels)
        corners = None if self.box is None else (self.box.reshape(2, 2), np.array(CORNER_LABELS))
        parts, padded = layout.arrange(clicks, corners)
        if padded:
            parts.append(_PADDING)
        if not parts:
            return np.empty((0, 2)), np.empty(0, np.int64)
        coords, labels = map(np.concatenate, zip(*parts, strict=True))
        return coords * geometry.scale, labels


_PADDING = np.zeros((1, 2)), np.array([LABEL_PADDING], np.int64)


class OfficialPrompt(Prompt):
    """A prompt of the official predictor, which takes the corners of a box in any order."""

    def _check_corners(self, box: np.ndarray) -> None:
        pass


def _numbers(name: str, values: Any, shape: str, dtype: Any = None) -> np.ndarray:
    """Copy ``values`` to an array of numbers."""
    try:
        array = np.array(as_array(values), dtype=dtype)
    except (TypeError, ValueError):
        array = None
    if array is None or array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be an array of numbers {shape}, got {type(values).__name__} {values!r:.80}")
    return array
