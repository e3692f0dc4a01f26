"""Masks of objects through whole videos: :func:`track`, and :func:`track_together` for several at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from ..modeling.sam2_base import SAM2Base
from ..system.device_profile import device_profile
from .frames import VideoFrame, open_frames
from .results import FrameResult
from .session import TrackingSession, encode_ahead, step_together

Prompts = Mapping[int, Mapping[Hashable, Any]]


class Tracking:
    """Iterates over the results of a video, frame by frame.

    Attributes:
        session: of the video; while frames are iterated over, objects are added, corrected and removed there.
    """

    def __init__(self, session: TrackingSession, frames: Iterator[VideoFrame], frames_per_pass: int = 1) -> None:
        self.session = session
        self._frames, self._per_pass = frames, frames_per_pass
        self._ready: deque[VideoFrame] = deque()
        self._failure: Exception | None = None

    def __iter__(self) -> Tracking:
        return self

    def __next__(self) -> FrameResult:
        if not self._ready:
            self._read()
        return self.session.step(self._ready.popleft())

    def _read(self) -> None:
        """Read, and encode in one pass, the next frames; an error is raised after all frames before it."""
        if self._failure is not None:
            raise self._failure
        frames: list[VideoFrame] = []
        try:
            frames.extend(islice(self._frames, self._per_pass))
        except Exception as error:
            self._failure = error
            if not frames:
                raise
        if not frames:
            raise StopIteration
        self._ready.extend(frames if len(frames) == 1 else encode_ahead(self.session.model, frames))


def track(
    model: SAM2Base, frames: Any, prompts: Prompts | None = None, *, reverse: bool = False, fill_hole_area: int = 8
) -> Tracking:
    """Track objects through the frames of a video, in memory that does not grow with it.

    Args:
        model: of SAM 2, with its memory.
        frames: a folder of JPEG files, a video file (extra ``video``), or arrays [H, W, 3] uint8 RGB and files of
            images, as a sequence or as they come from a camera.
        prompts: by frame and id of the object, a :class:`sam.Prompt` or a mask [H, W]. An object begins at its first
            prompt, and is learnt again at each later one.
        reverse: from the last frame to the first; takes a folder or a sequence.
        fill_hole_area: holes of up to so many low-resolution pixels are filled, as officially; 0 fills none.

    Returns:
        an iterator over a result per frame. Prompts may be given at any time to its ``session``: also corrections of
        the frame whose result came last.

    Raises:
        TypeError, ValueError, LookupError: a model that cannot track, a bad prompt, or one of a frame that is none.
        OSError: while iterating, a frame that cannot be read, named, after the results of all frames before it.
    """
    source, count = open_frames(model, frames, reverse)
    session = _session(model, prompts, count, reverse, fill_hole_area)
    # Frames that come one by one are answered one by one.
    return Tracking(session, source, 1 if count is None else device_profile(model.device).images_per_pass)


def track_together(
    model: SAM2Base, videos: Sequence[Any], prompts: Sequence[Prompts], *, fill_hole_area: int = 8
) -> Iterator[list[FrameResult | None]]:
    """Track objects through several videos at once, as one batch of frames and objects; see :func:`track`.

    Args:
        videos: the frames of each.
        prompts: of each.

    Yields:
        a result for each video, None for one that has ended.

    Raises:
        ValueError: another number of prompts than of videos, and what :func:`track` raises.
    """
    if len(videos) != len(prompts):
        raise ValueError(f"{len(videos)} videos need as many prompts, got {len(prompts)}")
    opened = [open_frames(model, video) for video in videos]
    sessions = [
        _session(model, given, count, False, fill_hole_area) for (_, count), given in zip(opened, prompts, strict=True)
    ]
    return _rounds(sessions, [source for source, _ in opened])


def _rounds(
    sessions: Sequence[TrackingSession], sources: Sequence[Iterator[VideoFrame]]
) -> Iterator[list[FrameResult | None]]:
    while True:
        frames = [next(source, None) for source in sources]
        running = [index for index, frame in enumerate(frames) if frame is not None]
        if not running:
            return
        results: list[FrameResult | None] = [None] * len(sessions)
        answers = step_together([sessions[index] for index in running], [frames[index] for index in running])
        for index, answer in zip(running, answers, strict=True):
            results[index] = answer
        yield results


def _session(
    model: SAM2Base, prompts: Prompts | None, count: int | None, reverse: bool, fill_hole_area: int
) -> TrackingSession:
    session = TrackingSession(model, num_frames=count, reverse=reverse, fill_hole_area=fill_hole_area)
    for frame, of_frame in (prompts or {}).items():
        for object_id, prompt in of_frame.items():
            session.add(object_id, prompt, frame)
    return session
