"""What the engine holds of a request: what it asks for, how far it has come, and whom to tell."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..embedding import ImageEmbedding
from ..images.prepare import PreparedImage
from ..prompts.prompt import Prompt

_MOST_POINTS_PER_SIDE = 1024  # a million clicks


@dataclass(frozen=True, eq=False)
class KeyedImage(PreparedImage):
    """A prepared image and the key of its embedding in one engine.

    Attributes:
        key: hash of the image and the model, keyed with the engine's secret.
    """

    key: str


@dataclass(frozen=True, eq=False)
class PromptMasks:
    """The C masks of one prompt.

    Attributes:
        rles: uncompressed COCO run-length encodings at the original image's size, see :mod:`sam.masks.rle`.
        predicted_iou: [C] fp32.
        low_res_logits: [C, h, w] fp32 if they were asked for; each can be a next prompt's ``mask_input``.
    """

    rles: list[dict[str, Any]]
    predicted_iou: np.ndarray
    low_res_logits: np.ndarray | None = None

    @property
    def best(self) -> int:
        """The mask of the highest predicted IoU."""
        return int(self.predicted_iou.argmax())


@dataclass(frozen=True)
class AutomaticOptions:
    """Those of :class:`sam.SamAutomaticMaskGenerator` that one embedding of the whole image can serve."""

    points_per_side: int = 32
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    box_nms_thresh: float = 0.7

    def __post_init__(self) -> None:
        if not 1 <= self.points_per_side <= _MOST_POINTS_PER_SIDE:
            raise ValueError(f"points_per_side must be within 1..{_MOST_POINTS_PER_SIDE}, got {self.points_per_side}")
        for name in ("pred_iou_thresh", "stability_score_thresh", "box_nms_thresh"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be within 0..1, got {value}")


@dataclass(eq=False)
class Job:
    """A request for an embedding, and the base of those that go on from there.

    Exactly one of ``image`` and ``embedding`` is set at first; the engine sets the other.
    """

    key: str | None
    image: KeyedImage | None
    embedding: ImageEmbedding | None
    expires: float  # on the clock of time.monotonic
    future: Future[Any] = field(default_factory=Future)
    _answered: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def resolve(self, result: Any) -> None:
        if self._is_first_answer():
            self.future.set_result(result)

    def fail(self, error: BaseException) -> None:
        if self._is_first_answer():
            self.future.set_exception(error)

    def acknowledge_cancel(self) -> None:
        """Who waits for several futures at once, as ``concurrent.futures.wait`` does, learns of it only now."""
        self._is_first_answer()

    def _is_first_answer(self) -> bool:
        """Once, and not for who cancelled: the engine's thread and one that closes it may answer at the same time."""
        return self._answered.acquire(blocking=False) and self.future.set_running_or_notify_cancel()


@dataclass(eq=False)
class SegmentJob(Job):
    prompts: Sequence[Prompt] = ()
    multimask_output: bool = True
    keep_logits: bool = False
    done: list[PromptMasks] = field(default_factory=list)

    @property
    def remaining(self) -> int:
        return len(self.prompts) - len(self.done)

    @property
    def pixels(self) -> int:
        """Of one of its masks, once there is an embedding."""
        height, width = self.embedding.geometry.original_size if self.embedding is not None else (0, 0)
        return height * width


@dataclass(eq=False)
class AutomaticJob(Job):
    options: AutomaticOptions = field(default_factory=AutomaticOptions)
    points_per_batch: int = 64
    retried: bool = False
    steps: Iterator[Any] | None = None
