"""The state that the routes share: the engine, whether it takes requests, and results kept between them."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import numpy as np

from ..engine import AutomaticOptions, Engine, EngineClosedError
from ..prompts.prompt import Prompt
from ..system.malloc import return_freed_memory
from .bodies import BodyReader
from .errors import ApiError
from .metrics import Metrics
from .sessions import VideoSessions
from .settings import Settings

T = TypeVar("T")
log = logging.getLogger("sam.server")
_WARM_UP_SECONDS = 600.0
# After the last of a burst of requests freed memory goes back to the system.
_IDLE_SECONDS = 5.0


class ResultStore:
    """Low-resolution logits of recent answers by id, evicted oldest first under a budget of bytes."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.nbytes = 0
        self._entries: OrderedDict[str, tuple[str, list[np.ndarray], list[int]]] = OrderedDict()

    def put(self, embedding: str, logits: list[np.ndarray], best: list[int]) -> str | None:
        """Store the logits and return their id; None if they are larger than the budget."""
        size = sum(array.nbytes for array in logits)
        if size > self.budget:
            return None
        key = secrets.token_hex(16)
        self._entries[key] = (embedding, logits, best)
        self.nbytes += size
        while self.nbytes > self.budget:
            _, (_, oldest, _) = self._entries.popitem(last=False)
            self.nbytes -= sum(array.nbytes for array in oldest)
        return key

    def mask_input(self, key: str, embedding: str, prompt: int, mask: int | None) -> np.ndarray:
        """Return the logits [1, h, w] of one mask; of the best one for None.

        Raises:
            ApiError: no such result on this embedding.
        """
        entry = self._entries.get(key)
        if entry is None or entry[0] != embedding or prompt >= len(entry[1]):
            raise ApiError("unknown_result")
        logits = entry[1][prompt]
        mask = entry[2][prompt] if mask is None else mask
        if mask >= len(logits):
            raise ApiError("unknown_result")
        return logits[mask : mask + 1]


class Service:
    """One engine behind HTTP.

    Attributes:
        stop: called when the model failed, so that the process can end.
        on_warm: called once, in the thread that warmed up, before the service is ready.
        in_flight: number of requests to the model that were admitted and are not answered.
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self.settings = settings
        self.results = ResultStore(settings.result_cache_bytes)
        self.bodies = BodyReader(settings)
        self.sessions = VideoSessions(engine, settings)
        self.sessions.on_close = self._session_closed
        self.metrics = Metrics(engine, self.sessions)
        self.stop: Callable[[], None] = lambda: None
        self.on_warm: Callable[[], None] = lambda: None
        self.warm = False
        self.draining = False
        self.in_flight = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._trimming: asyncio.TimerHandle | None = None
        # Two at a time: an image of the largest size takes up to 600 MB while it is decoded.
        self._decoding = anyio.CapacityLimiter(2)
        # So is an answer of masks of the largest size; more at once would all be late.
        self._encoding = anyio.CapacityLimiter(2)
        # Each thread waits for a process most of the time.
        self.reading_videos = anyio.CapacityLimiter(settings.max_videos)
        self._interpreting = PacedThread()
        self._answering: set[anyio.CancelScope] = set()
        engine.on_failure = self._model_failed

    @property
    def ready(self) -> bool:
        return self.warm and not self.draining and self.engine.failure is None

    def start(self) -> None:
        """Warm up in a thread; the service is ready once that is done."""
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._warm_up, name="sam-warm-up", daemon=True).start()

    def _warm_up(self) -> None:
        try:
            warm_up(self.engine, every_size=self.engine.model.device.type != "cpu")
        except EngineClosedError:
            log.info("warm-up ended early")
        except Exception as error:
            log.exception("warm-up failed")
            if self.engine.failure is None:
                self.engine.fail(error)
        else:
            self.on_warm()
            self.warm = True
            log.info("ready")

    def _model_failed(self, error: BaseException) -> None:
        log.critical("model failed", exc_info=error)
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.stop)

    def check_open(self) -> None:
        """Refuse a request before its body is read, if it would be refused now.

        Raises:
            ApiError: the service takes no requests now; the code says why.
        """
        if self.engine.failure is not None:
            raise ApiError("model_failed")
        if self.draining:
            raise ApiError("draining")
        if not self.warm:
            raise ApiError("not_ready")
        if self.in_flight >= self.engine.max_queue:
            raise ApiError("queue_full")

    def admit(self) -> None:
        """Admit one request to the model, whose body has arrived.

        Raises:
            ApiError: as :meth:`check_open`.
        """
        self.check_open()
        self.in_flight += 1
        self.metrics.in_flight.set(self.in_flight)

    def release(self) -> None:
        self.in_flight -= 1
        self.metrics.in_flight.set(self.in_flight)
        self._trim_later()

    def _session_closed(self, reason: str) -> None:
        self.metrics.sessions_ended.labels(reason).inc()
        self._trim_later()

    def _trim_later(self) -> None:
        if self._trimming is not None:
            self._trimming.cancel()
        self._trimming = asyncio.get_running_loop().call_later(_IDLE_SECONDS, self._trim)

    def _trim(self) -> None:
        """Give back what a burst of requests took: each thread's share of the heap keeps its largest size."""
        if self.in_flight == 0:
            threading.Thread(target=return_freed_memory, name="sam-trim", daemon=True).start()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Cancel the block when the time to drain is over.

        Raises:
            ApiError: it was cancelled.
        """
        with anyio.CancelScope() as scope:
            self._answering.add(scope)
            try:
                yield
            finally:
                self._answering.discard(scope)
        if scope.cancelled_caught:
            raise ApiError("draining")

    async def drain(self) -> None:
        """Admit no more requests and wait for those in flight; late ones get the error ``draining``."""
        self.draining = True
        log.info("draining", extra={"fields": {"in_flight": self.in_flight}})
        until = asyncio.get_running_loop().time() + self.settings.drain_seconds
        while self.in_flight and self.engine.failure is None and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.02)
        for scope in list(self._answering):
            scope.cancel()

    async def decode(self, work: Callable[[], T]) -> T:
        """Run ``work()`` in one of a few threads; it checks for cancellation itself."""
        return await _run_limited(work, self._decoding)

    async def encode(self, work: Callable[[Callable[[], None]], T]) -> T:
        """Run ``work(check)`` in one of a few threads; ``check``, called now and then, raises once nobody waits."""
        return await _run_limited(lambda: work(anyio.from_thread.check_cancelled), self._encoding)

    async def interpret(self, work: Callable[[], T], size: int, small: int) -> T:
        """Run ``work()``, all Python, in a thread; or here if its ``size`` is ``small``: the way would take longer."""
        return work() if size <= small else await self._interpreting.run(work)


class PacedThread:
    """Runs one piece of Python at a time in a thread, and rests after each for as long as it took.

    Python and pydantic hold the interpreter. The event loop and every call into torch wait for it, so that texts,
    however many clients send them, may have no more than half of its time.
    """

    def __init__(self) -> None:
        self.limiter = anyio.CapacityLimiter(1)

    async def run(self, work: Callable[[], T]) -> T:
        """Return the result of ``work()``; the next piece begins after the rest, the caller goes on before it."""
        borrower = object()
        await self.limiter.acquire_on_behalf_of(borrower)
        seconds = 0.0

        def measured() -> T:
            nonlocal seconds
            started = time.thread_time()
            try:
                return work()
            finally:
                seconds = time.thread_time() - started

        try:
            return await _run_limited(measured, None)
        finally:
            asyncio.get_running_loop().call_later(seconds, self.limiter.release_on_behalf_of, borrower)


async def _run_limited(work: Callable[[], T], limiter: anyio.CapacityLimiter | None) -> T:
    result = await anyio.to_thread.run_sync(work, limiter=limiter)
    await anyio.lowlevel.checkpoint_if_cancelled()  # the client may have left while nothing could be cancelled
    return result


def warm_up(engine: Engine, every_size: bool) -> None:
    """Run every kind of request once, so that the first one does not wait.

    Where kernels are compiled, ``every_size`` of a batch is run: none is compiled for a request.
    """
    model, limit = engine.model, _WARM_UP_SECONDS
    side = model.image_size
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    for count in range(1, engine.max_images + 1) if every_size else ():
        model.encode([image] * count, batch_size=count)
    embedding = engine.embed(image).result(limit)
    low_res = np.zeros((1, *model.low_res_size), np.float32)
    kinds = (Prompt([(1, 1)], [1]), Prompt(box=(1, 1, 9, 9)), Prompt([(1, 1)], [1], mask_input=low_res))
    counts = range(1, engine.max_batch + 1) if every_size else [1]
    for prompt in kinds:
        for multimask in (True, False):
            for count in counts:
                engine.segment(embedding, [prompt] * count, multimask, deadline=limit).result(limit)
    everything = AutomaticOptions(1, pred_iou_thresh=0.0, stability_score_thresh=0.0)
    engine.automatic(embedding, everything, deadline=limit).result(limit)
    if every_size:
        _warm_up_tracking(engine, image)


def _warm_up_tracking(engine: Engine, image: np.ndarray) -> None:
    """Track an object from one frame to the next, if the model can."""
    try:
        stream = engine.open_stream()
    except TypeError:
        return
    for prompts in ({"object": Prompt([(1, 1)], [1])}, {}):
        stream.push(image, prompts, deadline=_WARM_UP_SECONDS).result(_WARM_UP_SECONDS)


async def cancel_on_disconnect(receive: Callable[[], Awaitable[object]], work: Callable[[], Awaitable[T]]) -> T | None:
    """Return the result of ``work``, or None as soon as the client has left: the work is cancelled or not begun.

    ``receive`` is the ASGI channel after the whole body was read: its next message is the disconnect.
    """
    with anyio.CancelScope() as scope:
        listener = asyncio.ensure_future(receive())

        def leave(_: object) -> None:
            scope.cancel()

        listener.add_done_callback(leave)
        try:
            await asyncio.sleep(0)  # a client that left while the image was decoded is known to have left now
            return None if listener.done() else await work()
        finally:
            listener.remove_done_callback(leave)
            listener.cancel()
    return None
