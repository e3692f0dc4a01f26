"""The grammar of prompts in requests, answers and on command lines, with its limits and messages.

A document is ``{"points": [[x, y], ...], "labels": [1, ...], "box": [x0, y0, x1, y1], "mask_input": reference}``; each
part may be absent or null, but not all. A reference names a mask of an earlier answer, whose logits stay where they
are: ``{"result": ID, "prompt": 0, "mask": 0}``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .checks import MAX_COORDINATE
from .labels import LABEL_BACKGROUND, LABEL_FOREGROUND
from .prompt import Prompt

IDENTIFIER = "[0-9a-f]{32}"  # ids of embeddings and results
MAX_PROMPTS = 1024  # per request
MAX_POINTS = 64  # per prompt
MAX_MASKS = 16  # per prompt
POINT_TEXT, BOX_TEXT = "X,Y[,LABEL]", "X0,Y0,X1,Y1"


@dataclass(frozen=True)
class Part:
    """One part of a document: what it holds, and the limits of each of its numbers."""

    description: str
    low: float
    high: float


POINTS = Part("clicks as [x, y] in pixels, inside the image", 0, 2**24)
LABELS = Part(
    "1 for a click on the object, 0 for one on the background; default: all 1", LABEL_BACKGROUND, LABEL_FOREGROUND
)
BOX = Part(
    "x0, y0, x1, y1 in pixels, x0 <= x1, y0 <= y1; may reach over the edges, but must meet the image",
    -MAX_COORDINATE,
    MAX_COORDINATE,
)
_PARTS = ("points", "labels", "box", "mask_input")


def from_dict(document: Mapping[str, Any], mask_input: Any = None) -> Prompt:
    """Return the prompt that a document describes.

    Args:
        document: its ``mask_input`` is looked up by the caller, who has the logits.
        mask_input: the low-resolution logits, [1, h, w].

    Raises:
        TypeError: a part is no array of numbers.
        ValueError: a part that the grammar does not have, or whose values are not allowed.
    """
    unknown = [name for name in document if name not in _PARTS]
    if unknown:
        raise ValueError(f"a prompt has {', '.join(_PARTS)}, got {unknown[0]!r}")
    points, labels, box = (document.get(name) for name in _PARTS[:3])
    check_parts(points, labels, box)
    if labels is None and points is not None:
        labels = [LABEL_FOREGROUND] * len(points)
    return Prompt(points, labels, box, mask_input)


def to_dict(prompt: Prompt, mask_input: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the document of a prompt.

    Args:
        mask_input: reference to a mask of an earlier answer, see :func:`mask_reference`.

    Raises:
        ValueError: the prompt has logits, which documents refer to but do not hold, or a label that they do not have.
    """
    if prompt.mask_input is not None:
        raise ValueError("mask_input must be a reference to an earlier mask in a request, got an array")
    labels = None if prompt.labels is None else prompt.labels.tolist()
    if any(not LABELS.low <= label <= LABELS.high for label in labels or ()):
        raise ValueError("labels must be 1 (object) or 0 (background) in a request")
    document = {
        "points": None if prompt.points is None else prompt.points.tolist(),
        "labels": labels,
        "box": None if prompt.box is None else prompt.box.tolist(),
    }
    return document if mask_input is None else {**document, "mask_input": dict(mask_input)}


def mask_reference(result: str, prompt: int, mask: int) -> dict[str, Any]:
    """Return what names a mask of the answer ``result`` in the ``mask_input`` of a later prompt."""
    return {"result": result, "prompt": prompt, "mask": mask}


def check_parts(points: Sequence[Any] | None, labels: Sequence[Any] | None, box: Any) -> None:
    """Raise ``ValueError`` unless these parts make a prompt together."""
    if points is None and box is None:
        raise ValueError("points or a box are needed")
    if labels is not None and (points is None or len(labels) != len(points)):
        raise ValueError("as many labels as points are needed")


def find_outside(
    points: Sequence[Sequence[float]] | None, box: Sequence[float] | None, size: tuple[int, int]
) -> tuple[str | int, ...] | None:
    """Return the path to the first click outside an image of (height, width), or to a box that does not meet it.

    Edges belong to the image. None if there is neither.
    """
    height, width = size
    for index, (x, y) in enumerate(points or ()):
        if not (0 <= x <= width and 0 <= y <= height):
            return "points", index
    if box is not None:
        x0, y0, x1, y1 = box
        if x0 > width or y0 > height or x1 < 0 or y1 < 0:
            return ("box",)
    return None


def parse_point(text: str) -> tuple[float, float, int]:
    """Return x, y and label of a click written as ``X,Y`` or ``X,Y,LABEL``.

    Raises:
        ValueError: it is not of that form, or the label is neither 1 nor 0.
    """
    x, y, *label = _parse_numbers(text, (2, 3), "X,Y or X,Y,LABEL")
    if label and label[0] not in (LABEL_FOREGROUND, LABEL_BACKGROUND):
        raise ValueError(f"the label in {text!r} must be 1 (object) or 0 (background)")
    return x, y, int(label[0]) if label else LABEL_FOREGROUND


def parse_box(text: str) -> list[float]:
    """Return the sides of a box written as ``X0,Y0,X1,Y1``.

    Raises:
        ValueError: it is not of that form.
    """
    return _parse_numbers(text, (4,), BOX_TEXT)


def from_clicks(clicks: Sequence[tuple[float, float, int]], box: Sequence[float] | None) -> Prompt:
    """Return the prompt of parsed clicks (x, y, label) and a box; either may be missing."""
    document: dict[str, Any] = {"box": box}
    if clicks:
        document |= {"points": [click[:2] for click in clicks], "labels": [click[2] for click in clicks]}
    return from_dict(document)


def _parse_numbers(text: str, counts: tuple[int, ...], form: str) -> list[float]:
    try:
        values = [float(number) for number in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in counts:
        raise ValueError(f"{text!r} is not {form}")
    return values
