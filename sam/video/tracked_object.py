"""An object of a session: what it remembers, and its last answer."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

Outputs = dict[str, dict[int, dict[str, Any]]]


@dataclass
class TrackedObject:
    """The state of one object in a session.

    Attributes:
        id: of the object.
        outputs: what it remembers, the official record: by kind and frame.
        masks, iou, scores: its last answer: logits [1, 1, h, w], [1], and [1, 1].
        points: the clicks and the box on the current frame, as the prompt encoder takes them.
        tracked: the frame on which it was found by its memories; None where it was prompted.
    """

    id: Hashable
    outputs: Outputs = field(default_factory=lambda: {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}})
    masks: Any = None
    iou: Any = None
    scores: Any = None
    points: dict[str, Tensor] | None = None
    tracked: int | None = None

    def copy(self) -> TrackedObject:
        """Return an object that goes on by itself; the tensors, which nobody writes to, are the same."""
        return replace(self, outputs={kind: dict(frames) for kind, frames in self.outputs.items()})
