"""Streams of the engine: frames of many videos, each tracked in its order, between the requests for images."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..prompts.prompt import Prompt
from ..video.frames import VideoFrame, frame_of
from ..video.prompts import check_prompt, mask_of
from ..video.results import FrameResult
from ..video.session import TrackingSession, step_together
from .errors import EngineError, OutOfMemoryError, StreamError
from .requests import Job
from .stages import Outcomes, Stage


@dataclass(frozen=True, eq=False)
class TrackedFrame:
    """The O objects of a stream on one frame.

    Attributes:
        frame: its number, from 0 on.
        size: (height, width).
        objects: their ids, in the order in which they were added.
        rles: a mask each, uncompressed COCO run lengths at the frame's size, see :mod:`sam.masks.rle`.
        predicted_iou: [O] fp32.
        object_scores: [O] fp32 logits, above 0 where an object is seen.
    """

    frame: int
    size: tuple[int, int]
    objects: tuple[Hashable, ...]
    rles: list[dict[str, Any]]
    predicted_iou: np.ndarray
    object_scores: np.ndarray

    @classmethod
    def of(cls, result: FrameResult) -> TrackedFrame:
        """Copy a result to the host."""
        scores = (each.cpu().numpy() for each in (result.predicted_iou, result.object_scores))
        return cls(result.frame, result.size, result.objects, result.rles(), *scores)


class TrackingStream:
    """A video whose frames come one by one; :meth:`Engine.open_stream` makes it.

    Requests are answered in their order. One that is refused, late or cancelled leaves the stream as it was, and so
    does one that finds no memory.

    Attributes:
        frame, next_frame: the numbers of the current frame, None before the first, and of the next one.
        size: (height, width) of the current frame; zeros before the first.
        objects: the ids of the objects, in the order in which they were added.
        nbytes: bytes of tensors that the stream holds.
    """

    def __init__(
        self,
        session: TrackingSession,
        submit: Callable[[TrackJob], Future[Any]],
        expiry: Callable[[float | None], float],
    ) -> None:
        self._model, self._submit, self._expiry = session.model, submit, expiry
        self._lock = threading.Lock()
        self._session: TrackingSession | None = session
        self._read(session)

    def _read(self, session: TrackingSession) -> None:
        self.frame, self.next_frame = session.frame, session.next_frame
        self.size, self.objects = session.size, session.objects
        self.nbytes = session.nbytes

    def commit(self, session: TrackingSession) -> None:
        """Go on with ``session``, unless the stream was closed meanwhile."""
        with self._lock:
            if self._session is not None:
                self._session = session
                self._read(session)

    @property
    def session(self) -> TrackingSession | None:
        """Return the state after the last answer, which nobody may change; None of a closed stream."""
        return self._session

    def push(
        self,
        image: Any,
        prompts: Mapping[Any, Any] | None = None,
        frame: int | None = None,
        deadline: float | None = None,
    ) -> Future[TrackedFrame]:
        """Track all objects on the next frame.

        Args:
            image: [H, W, 3] uint8 RGB, or a :class:`~sam.video.frames.VideoFrame`; it is resized in this thread.
            prompts: by object, what is prompted on this frame.
            frame: the number that it must have; by default whichever comes next.
            deadline: seconds, in place of the engine's.

        Raises:
            TypeError, ValueError, OSError: a bad image or prompt.
            QueueFullError, EngineClosedError, EngineFailedError: nothing was accepted.

        The future fails with :class:`StreamError` where the next frame has another number, or the stream was closed.
        """
        given = image if isinstance(image, VideoFrame) else frame_of(self._model, image)
        return self._request(deadline, image=given, prompts=self._checked(prompts or {}), frame=frame)

    def prompt(
        self, prompts: Mapping[Any, Any], frame: int | None = None, deadline: float | None = None
    ) -> Future[TrackedFrame | None]:
        """Prompt objects, new ones or known ones, on the current frame or on one to come.

        Args:
            prompts: by object, a :class:`sam.Prompt` of points, a box or both, or a mask [H, W].
            frame: by default the current one, or the first.

        Returns:
            a future of all objects on the current frame; of None for a frame to come. It fails with
            :class:`StreamError` for a frame that went by.

        Raises:
            TypeError, ValueError: a bad prompt, or none.
            QueueFullError, EngineClosedError, EngineFailedError: nothing was accepted.
        """
        if not prompts:
            raise ValueError("at least one prompt is needed")
        return self._request(deadline, prompts=self._checked(prompts), frame=frame)

    def remove(self, object_id: Hashable, deadline: float | None = None) -> Future[TrackedFrame | None]:
        """Forget an object and its prompts to come; the future is of the others on the current frame.

        It fails with :class:`StreamError` where there is no such object.
        """
        return self._request(deadline, removes=(object_id,))

    def close(self) -> None:
        """Release the memory of the stream; requests that wait are refused."""
        with self._lock:
            self._session = None
            self.objects, self.nbytes = (), 0

    def _request(self, deadline: float | None, **what: Any) -> Future[Any]:
        return self._submit(TrackJob(stream=self, expires=self._expiry(deadline), **what))

    def _checked(self, prompts: Mapping[Any, Any]) -> dict[Hashable, Any]:
        """Return prompts that the model takes as they are; a mask that waits for its frame is of the model's size."""
        checked = {}
        for object_id, prompt in prompts.items():
            check_prompt(prompt)
            if not isinstance(prompt, Prompt):
                prompt = mask_of(prompt, self._model.image_size, self._model.device)[0, 0]
            checked[object_id] = prompt
        return checked


class _Step(NamedTuple):
    session: TrackingSession
    answer: TrackedFrame | None


@dataclass(eq=False, kw_only=True)
class TrackJob(Job):
    """A request to a stream: a frame, prompts, or objects to forget.

    Attributes:
        frame: the number that the pushed frame must have, or the frame of the prompts; None for what comes first.
        step: the stream's state afterwards and the answer, once they are computed.
    """

    stream: TrackingStream
    image: VideoFrame | None = None
    prompts: Mapping[Hashable, Any] = field(default_factory=dict)
    removes: tuple[Hashable, ...] = ()
    frame: int | None = None
    step: _Step | None = None

    @property
    def result(self) -> _Step | None:
        return self.step

    def resolve(self, result: _Step) -> None:
        """Answer, and let the stream go on from there, both or none of it."""
        if self._is_first_answer():
            self.stream.commit(result.session)
            self.future.set_result(result.answer)

    def refusal(self) -> StreamError | None:
        """Return why the stream, as it is now, does not take the request."""
        session = self.stream.session
        if session is None:
            return StreamError("the stream is closed")
        if self.image is not None and self.frame not in (None, session.next_frame):
            return StreamError(f"the next frame is {session.next_frame}, not {self.frame}")
        first = session.next_frame if session.frame is None else session.frame
        if self.image is None and self.frame is not None and self.frame < first:
            return StreamError(f"frame {self.frame} went by, the current one is {session.frame}")
        unknown = [each for each in self.removes if each not in dict(session.kept_prompts)]
        return StreamError(f"there is no object {unknown[0]!r}") if unknown else None

    def begun(self) -> TrackingSession:
        """Return a copy of the stream's state, to work on."""
        session = self.stream.session
        assert session is not None
        return session.fork()


class TrackStage(Stage[TrackJob, TrackJob]):
    """Tracks frames, of each stream one at a time, those of several streams as one batch; answers prompts one by one.

    It works on copies of the streams' states: where memory runs out, nothing is half done.

    Args:
        max_frames: frames per batch.
    """

    counter = "frame"

    def __init__(self, model: Any, runner: Any, max_frames: int) -> None:
        super().__init__(model, runner)
        self.max_frames = max_frames

    def take(self) -> list[TrackJob]:
        """Take the oldest request; with a frame, also the oldest of other streams that are frames."""
        oldest: dict[TrackingStream, TrackJob] = {}
        for job in self.queue:
            oldest.setdefault(job.stream, job)
        first, *others = oldest.values()
        taken = [first]
        if first.image is not None:
            taken += [job for job in others if job.image is not None][: self.max_frames - 1]
        self.queue = deque(job for job in self.queue if job not in taken)
        return taken

    def run(self, work_items: list[TrackJob]) -> Outcomes[TrackJob]:
        refusals: dict[TrackJob, EngineError | None] = {job: job.refusal() for job in work_items}
        accepted = [job for job, refusal in refusals.items() if refusal is None]
        steps = self.runner.run(accepted, self._push if work_items[0].image is not None else self._change)
        for job, step in zip(accepted, steps, strict=True):
            if isinstance(step, OutOfMemoryError):
                refusals[job] = step
            else:
                job.step = step
        return refusals

    def _push(self, jobs: list[TrackJob]) -> list[_Step]:
        sessions = [job.begun() for job in jobs]
        for job, session in zip(jobs, sessions, strict=True):
            session.add_all(job.prompts, session.next_frame)
        results = step_together(sessions, [job.image for job in jobs])
        return [_Step(*each) for each in zip(sessions, map(TrackedFrame.of, results), strict=True)]

    def _change(self, jobs: list[TrackJob]) -> list[_Step]:
        return [self._changed(job) for job in jobs]

    def _changed(self, job: TrackJob) -> _Step:
        session = job.begun()
        for object_id in job.removes:
            session.remove(object_id)
        result = session.add_all(job.prompts, job.frame) if job.prompts else None
        if job.removes and session.frame is not None:
            result = session.result()
        return _Step(session, None if result is None else TrackedFrame.of(result))
