"""Sessions of video: each is a stream of the engine, and the masks of its frames; those that nobody uses are closed."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ..engine import Engine, StreamError, TrackedFrame, TrackingStream
from ..images.videos import VideoApart
from ..masks.formats import MaskSet, compressed_rles
from ..prompts import wire
from .errors import ApiError
from .settings import Settings

log = logging.getLogger("sam.server")
_SWEEP_SECONDS = 5.0
CLOSE_REASONS = ("closed", "expired", "stopped")
# Of a frame's masks, beside the text of their run lengths.
_BYTES_PER_FRAME, _BYTES_PER_MASK = 1024, 512
_KEY = re.compile(wire.IDENTIFIER)


class VideoRun:
    """A video file that a session tracks by itself.

    Attributes:
        decoder: gives its frames, from when it is started.
        frames: how many of them were tracked.
        error: why it ended before the last one.
        ended: whether it ended.
    """

    def __init__(self) -> None:
        self.decoder: VideoApart | None = None
        self.frames, self.ended = 0, False
        self.error: ApiError | None = None
        self.task: asyncio.Task[None] | None = None

    def close(self) -> None:
        """End it, if it has not."""
        if self.decoder is not None:
            self.decoder.close()
        if self.task is not None:
            self.task.cancel()


class VideoSession:
    """One video of a client.

    Attributes:
        key: its id.
        stream: what tracks its frames.
        lock: held by the request that is answered.
        masks: of the frames that were tracked, run lengths as text; of many, of the last ones.
        nbytes: size of these masks.
        run: the video file that it tracks, or tracked last.
        users: requests that use it now.
        used: when it was last used.
    """

    def __init__(self, stream: TrackingStream, max_mask_bytes: int, used: float) -> None:
        self.key = secrets.token_hex(16)
        self.stream, self.used, self.users = stream, used, 0
        self.lock = asyncio.Lock()
        self.masks: OrderedDict[int, TrackedFrame] = OrderedDict()
        self.nbytes, self._max_mask_bytes = 0, max_mask_bytes
        self.run: VideoRun | None = None
        self._keeping: set[asyncio.Task[Any]] = set()

    @property
    def is_running(self) -> bool:
        return self.run is not None and not self.run.ended

    async def result(self, future: Future[Any]) -> TrackedFrame | None:
        """Return what the stream answers, with its masks kept; also where the caller has left just before it came.

        Raises:
            ApiError: the frame is not the next one any more, or the session was closed meanwhile.
            EngineError: as the future.
        """
        task = asyncio.ensure_future(self._keep(future))
        self._keeping.add(task)
        task.add_done_callback(self._forget)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            future.cancel()
            raise
        except StreamError:
            raise ApiError("unknown_session" if self.stream.session is None else "wrong_frame") from None

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._keeping.discard(task)
        if not task.cancelled():
            task.exception()  # whoever asked may have left

    async def _keep(self, future: Future[Any]) -> TrackedFrame | None:
        answer: TrackedFrame | None = await asyncio.wrap_future(future)
        if answer is None:
            return None
        answer = await asyncio.to_thread(_compressed, answer)
        if self.stream.session is not None:
            self._drop(answer.frame)
            self.masks[answer.frame] = answer
            self.nbytes += _size(answer)
            while self.nbytes > self._max_mask_bytes and len(self.masks) > 1:
                self._drop(next(iter(self.masks)))
        return answer

    def _drop(self, frame: int) -> None:
        answer = self.masks.pop(frame, None)
        if answer is not None:
            self.nbytes -= _size(answer)

    def begin(self, run: VideoRun, work: Coroutine[Any, Any, None]) -> None:
        """Let ``work`` track a video file by itself; an :class:`ApiError` of it is the run's."""
        self.run = run
        run.task = asyncio.ensure_future(_noted(run, work))

    def close(self) -> None:
        """Release its memory, and end what it does."""
        self.stream.close()
        if self.run is not None:
            self.run.close()
        self.masks.clear()
        self.nbytes = 0


async def _noted(run: VideoRun, work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except ApiError as error:
        run.error = error
    except Exception:
        log.exception("video failed")
        run.error = ApiError("internal")
    finally:
        run.ended = True
        if run.decoder is not None:
            run.decoder.close()


def _compressed(answer: TrackedFrame) -> TrackedFrame:
    return replace(answer, rles=compressed_rles(MaskSet(answer.rles, answer.size)))


def _size(answer: TrackedFrame) -> int:
    return _BYTES_PER_FRAME + sum(_BYTES_PER_MASK + len(encoded["counts"]) for encoded in answer.rles)


class VideoSessions:
    """The sessions that are open; all on the event loop.

    Attributes:
        clock: tells the time by which a session counts as abandoned.
        on_close: called with one of :data:`CLOSE_REASONS` whenever one was closed.
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine, self._settings = engine, settings
        self._open: dict[str, VideoSession] = {}
        self._sweeping: asyncio.TimerHandle | None = None
        self._beginning = 0
        self.clock: Callable[[], float] = time.monotonic
        self.on_close: Callable[[str], None] = lambda reason: None

    def __len__(self) -> int:
        return len(self._open)

    @property
    def nbytes(self) -> int:
        """Return the bytes that all sessions hold: tensors, and masks of frames."""
        return sum(session.stream.nbytes + session.nbytes for session in self._open.values())

    @property
    def running(self) -> int:
        """Return how many video files are being tracked, or about to be."""
        return self._beginning + sum(session.is_running for session in self._open.values())

    @contextmanager
    def place_for_video(self) -> Iterator[None]:
        """Hold one of the places for video files until the session tracks it.

        Raises:
            ApiError: there is none.
        """
        if self.running >= self._settings.max_videos:
            raise ApiError("queue_full")
        self._beginning += 1
        try:
            yield
        finally:
            self._beginning -= 1

    def open(self, fill_hole_area: int) -> VideoSession:
        """Open a session.

        Raises:
            ApiError: the model cannot track, or as many are open as there may be.
        """
        self.expire()
        if len(self) >= self._settings.max_sessions:
            raise ApiError("too_many_sessions")
        try:
            stream = self._engine.open_stream(fill_hole_area)
        except TypeError:
            raise ApiError("cannot_track") from None
        session = VideoSession(stream, self._settings.max_session_mask_bytes, self.clock())
        self._open[session.key] = session
        if self._sweeping is None:
            self._sweep()
        return session

    def find(self, key: str) -> VideoSession:
        """Return a session, which is used now.

        Raises:
            ApiError: there is none of this id.
        """
        self.expire()
        session = self._open.get(key) if _KEY.fullmatch(key) else None
        if session is None:
            raise ApiError("unknown_session")
        session.used = self.clock()
        return session

    @contextmanager
    def using(self, key: str) -> Iterator[VideoSession]:
        """Keep a session from being taken for abandoned within the block; see :meth:`find`."""
        session = self.find(key)
        session.users += 1
        try:
            yield session
        finally:
            session.users -= 1
            session.used = self.clock()

    def seconds_left(self, session: VideoSession) -> float:
        """Return after which time without a request the session is closed."""
        return max(0.0, session.used + self._settings.session_seconds - self.clock())

    def close(self, key: str, reason: str = "closed") -> None:
        """Close a session.

        Raises:
            ApiError: there is none of this id.
        """
        session = self._open.pop(key, None)
        if session is None:
            raise ApiError("unknown_session")
        session.close()
        self.on_close(reason)

    def expire(self) -> None:
        """Close the sessions that nobody has used for the time that they may be idle."""
        for session in list(self._open.values()):
            if not session.users and self.seconds_left(session) <= 0:
                self.close(session.key, "expired")

    def close_all(self) -> None:
        """Close all sessions: the service stops."""
        for key in list(self._open):
            self.close(key, "stopped")
        if self._sweeping is not None:
            self._sweeping.cancel()

    def _sweep(self) -> None:
        """Look for abandoned sessions now and then, as long as any is open."""
        self.expire()
        seconds = min(_SWEEP_SECONDS, self._settings.session_seconds)
        loop = asyncio.get_running_loop()
        self._sweeping = loop.call_later(seconds, self._sweep) if self._open else None
