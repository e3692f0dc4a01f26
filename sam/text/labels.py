"""Labels as people write them, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..checks import require


def normalized(label: str) -> str:
    """Return a label in lower case, its words one space apart."""
    return " ".join(label.lower().split())


def check_labels(name: str, labels: Any) -> list[str]:
    """Return the labels of one image, each normalised.

    Raises:
        TypeError: no list of strings.
        ValueError: no label at all, one without text, or two that are the same once normalised.
    """
    if isinstance(labels, str):
        raise TypeError(f"{name} must be a list of labels, got one str {labels!r:.80}: [{labels!r:.80}]")
    require(name, labels, Sequence, "a list of labels")
    if not labels:
        raise ValueError(f"{name} must hold at least one label, got none")
    result: list[str] = []
    for label in labels:
        require(f"a label of {name}", label, str, "a str")
        text = normalized(label)
        if not text:
            raise ValueError(f"a label of {name} must have text, got {label!r}")
        if text in result:
            raise ValueError(f"{name} must differ from each other, got {label!r} twice")
        result.append(text)
    return result


def check_share(name: str, value: Any) -> float:
    """Return a score or an IoU in 0..1.

    Raises:
        TypeError: no number.
        ValueError: outside 0..1, or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number in 0..1, got {type(value).__name__} {value!r:.80}")
    if math.isnan(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in 0..1, got {value}")
    return float(value)


class Thresholds:
    """The score that detections must be above, for all labels and for some of their own."""

    def __init__(self, threshold: float, own: Mapping[str, float] | None) -> None:
        self.default = check_share("threshold", threshold)
        own = {} if own is None else own
        require("thresholds", own, Mapping, "a mapping of labels to numbers")
        self.own = {normalized(label): check_share(f"thresholds[{label!r}]", each) for label, each in own.items()}

    def check_known(self, labels: Sequence[Sequence[str]]) -> None:
        """Raise ``ValueError`` naming the first label with a threshold that no image asks for."""
        asked = {label for of_image in labels for label in of_image}
        for label in self.own:
            if label not in asked:
                raise ValueError(f"thresholds has {label!r}, which is no label of any image")

    def of(self, labels: Sequence[str]) -> list[float]:
        """Return the threshold of each label."""
        return [self.own.get(label, self.default) for label in labels]
