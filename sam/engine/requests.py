"""Requests to the engine, its answers, and the progress of each request."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..embedding import ImageEmbedding
from ..images.prepare import PreparedImage
from ..prompts.prompt import Prompt

_MAX_POINTS_PER_SIDE = 1024  # a million clicks


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
        object_score: a logit, above 0 where SAM 2 sees the object; None of SAM, which does not say.
    """

    rles: list[dict[str, Any]]
    predicted_iou: np.ndarray
    low_res_logits: np.ndarray | None = None
    object_score: float | None = None

    @property
    def best(self) -> int:
        """Return the index of the mask of the highest predicted IoU."""
        return int(self.predicted_iou.argmax())


@dataclass(frozen=True)
class AutomaticOptions:
    """Options of :class:`sam.SamAutomaticMaskGenerator` that one embedding of the whole image can serve.

    A threshold of None is the one that suits the model.
    """

    points_per_side: int = 32
    pred_iou_thresh: float | None = None
    stability_score_thresh: float | None = None
    box_nms_thresh: float = 0.7

    def __post_init__(self) -> None:
        if not 1 <= self.points_per_side <= _MAX_POINTS_PER_SIDE:
            raise ValueError(f"points_per_side must be within 1..{_MAX_POINTS_PER_SIDE}, got {self.points_per_side}")
        for name in ("pred_iou_thresh", "stability_score_thresh", "box_nms_thresh"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be within 0..1, got {value}")


@dataclass(eq=False, kw_only=True)
class Job(ABC):
    """A request that was accepted and is not answered yet.

    Attributes:
        expires: when the request is too late, on the clock of ``time.monotonic``.
        future: what the client waits for.
    """

    expires: float
    future: Future[Any] = field(default_factory=Future)
    _answered: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    @property
    @abstractmethod
    def result(self) -> Any:
        """Return the answer; None while a part of it is missing."""

    def resolve(self, result: Any) -> None:
        """Answer with a result, unless the request is answered already."""
        if self._is_first_answer():
            self.future.set_result(result)

    def fail(self, error: BaseException) -> None:
        """Answer with an error, unless the request is answered already."""
        if self._is_first_answer():
            self.future.set_exception(error)

    def acknowledge_cancel(self) -> None:
        """Acknowledge a cancellation: ``concurrent.futures.wait`` is not notified until then."""
        self._is_first_answer()

    def _is_first_answer(self) -> bool:
        """Return True once, and never after a cancellation: the engine's thread and one that closes it may race."""
        return self._answered.acquire(blocking=False) and self.future.set_running_or_notify_cancel()


@dataclass(eq=False, kw_only=True)
class ImageJob(Job):
    """A request about one image; ``source`` is the image, and its embedding from when it is encoded."""

    source: KeyedImage | ImageEmbedding

    @property
    def embedding(self) -> ImageEmbedding:
        """Return the embedding of the encoded image."""
        assert isinstance(self.source, ImageEmbedding)
        return self.source


@dataclass(eq=False, kw_only=True)
class EmbedJob(ImageJob):
    """A request for the embedding itself."""

    @property
    def result(self) -> ImageEmbedding | None:
        return self.source if isinstance(self.source, ImageEmbedding) else None


@dataclass(eq=False, kw_only=True)
class SegmentJob(ImageJob):
    """A request for masks of prompts; ``done`` holds those of the first prompts."""

    prompts: Sequence[Prompt]
    multimask_output: bool
    keep_logits: bool
    done: list[PromptMasks] = field(default_factory=list)

    @property
    def result(self) -> list[PromptMasks] | None:
        return None if self.remaining else self.done

    @property
    def remaining(self) -> int:
        """Return the number of prompts that are not decoded yet."""
        return len(self.prompts) - len(self.done)

    @property
    def mask_pixels(self) -> int:
        """Return the number of pixels of one mask."""
        height, width = self.source.geometry.original_size
        return height * width


@dataclass(eq=False, kw_only=True)
class AutomaticJob(ImageJob):
    """A request for masks of everything; ``steps`` is the generator that works on it, once it is begun."""

    options: AutomaticOptions
    points_per_batch: int
    retried: bool = False
    steps: Iterator[int] | None = None
    records: list[dict[str, Any]] | None = None

    @property
    def result(self) -> list[dict[str, Any]] | None:
        return self.records
