"""The engine: one thread drains what many clients ask for, in batches of whatever waits when it is free."""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from ..checks import require_model
from ..embedding import ImageEmbedding
from ..images.prepare import PreparedImage, prepare_image
from ..modeling.promptable import PromptableModel
from ..prompts.checks import check_mask_inputs
from ..prompts.prompt import Prompt
from ..system.device_profile import device_profile
from ..video.session import TrackingSession
from .batch_runner import BatchRunner
from .cache import EmbeddingCache
from .errors import (
    DeadlineExceededError,
    EngineClosedError,
    EngineError,
    EngineFailedError,
    QueueFullError,
)
from .requests import AutomaticJob, AutomaticOptions, EmbedJob, ImageJob, Job, KeyedImage, PromptMasks, SegmentJob
from .stages import AutomaticStage, DecodeStage, EncodeStage, Stage
from .streams import TrackingStream, TrackJob, TrackStage

ImageSource = np.ndarray | PreparedImage | ImageEmbedding
_REQUEST_COUNTERS = (
    "accepted", "completed", "cancelled", "out_of_memory", *(error.counter for error in EngineError.__subclasses__())
)  # fmt: skip


class Engine:
    """Answers requests from any number of threads with one model.

    A request is checked where it is made, so a bad one raises there and never meets a batch. Accepted ones wait
    for the one thread that calls the model. Whenever it is free it takes what waits, without delay: images with
    images, prompts with prompts of any images, a prompt of each request in turn until the batch is full or its
    masks are large. So a request of a thousand prompts, or of prompts on an image of 50 megapixels, shares every
    batch with those that came after it. The stages take turns, so a stream of frames keeps nobody waiting for more than
    one batch of them.

    Futures are those of ``concurrent.futures``; ``asyncio.wrap_future`` makes them awaitable. ``cancel()`` works
    until the last prompt is decoded, and what was not begun by then is not computed.
    """

    def __init__(
        self,
        model: PromptableModel,
        max_batch: int = 16,
        max_queue: int = 256,
        deadline: float = 30.0,
        embedding_cache_bytes: int = 2**30,
        *,
        max_images: int | None = None,
        handle_secret: bytes | None = None,
        on_failure: Callable[[BaseException], None] | None = None,
    ) -> None:
        """Start the thread that calls the model.

        Args:
            model: nobody else should change its weights or move it.
            max_batch: prompts decoded together.
            max_queue: requests accepted and not yet answered.
            deadline: seconds that a request may wait by default.
            embedding_cache_bytes: bytes of image embeddings kept for later prompts.
            max_images: images encoded together; by default 1 on a CPU and 8 elsewhere.
            handle_secret: 16 to 64 bytes without which nobody can tell an image's key; random by default. Engines that
                serve each other's keys have it in common.
            on_failure: called once, in the engine's thread, when the model failed.
        """
        require_model(model)
        profile = device_profile(model.device)
        max_images = profile.images_per_pass if max_images is None else max_images
        limits = {"max_batch": max_batch, "max_queue": max_queue, "deadline": deadline, "max_images": max_images}
        for name, value in limits.items():
            if not value > 0:  # NaN is not
                raise ValueError(f"{name} must be positive, got {value}")
        if embedding_cache_bytes < 0:
            raise ValueError(f"embedding_cache_bytes must not be negative, got {embedding_cache_bytes}")
        if handle_secret is not None and not 16 <= len(handle_secret) <= 64:
            raise ValueError(f"handle_secret must be of 16 to 64 bytes, got {len(handle_secret)}")
        self.model = model
        self.max_batch, self.max_queue, self.max_images = max_batch, max_queue, max_images
        self.deadline = deadline
        self.failure: BaseException | None = None
        self.on_failure = on_failure
        self._model_hash = model.model_hash
        self._handle_secret = handle_secret or secrets.token_bytes(32)
        self._cache = EmbeddingCache(embedding_cache_bytes)
        runner = BatchRunner(model.device, self._count_shortage)
        self._encode = EncodeStage(model, runner, max_images, self._cache_embedding)
        self._decode = DecodeStage(model, runner, max_batch, profile.pixels_per_batch)
        self._automatic = AutomaticStage(model, runner)
        self._track = TrackStage(model, runner, max_images)
        self._turns: deque[Stage[Any, Any]] = deque((self._encode, self._decode, self._automatic, self._track))
        # All from the start, so that whoever watches them sees zeros and not nothing.
        stage_counters = (f"{stage.counter}{suffix}" for stage in self._turns for suffix in ("s", "_batches"))
        self._counters = Counter(dict.fromkeys((*_REQUEST_COUNTERS, *stage_counters), 0))
        self._accepted: set[Job] = set()
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="sam-engine", daemon=True)
        self._thread.start()

    # Requests ----------------------------------------------------------------------------------------------

    def prepare(self, image: np.ndarray | PreparedImage) -> KeyedImage:
        """Check, resize and hash an image, [H, W, 3] uint8 RGB, in the caller's thread.

        Raises:
            TypeError, ValueError: as :meth:`sam.modeling.Sam.encode`; or an image that the device is to resize.
        """
        prepared = image if isinstance(image, PreparedImage) else prepare_image(image, self.model.image_geometry)
        self.model.check_prepared(prepared)
        if prepared.image_hash is None:
            raise ValueError("the engine takes images that are hashed: prepare it without resize_on_device")
        if isinstance(prepared, KeyedImage):
            return prepared
        content = f"{prepared.image_hash} {self._model_hash}".encode()
        key = hashlib.blake2b(content, digest_size=16, key=self._handle_secret).hexdigest()
        return KeyedImage(**vars(self.model.shrunk(prepared)), key=key)

    def embedding(self, key: str) -> ImageEmbedding | None:
        """Return the embedding of that key if it is still cached."""
        with self._changed:
            return self._cache.get(key)

    def embed(self, image: np.ndarray | PreparedImage, deadline: float | None = None) -> Future[ImageEmbedding]:
        """Embed an image, unless its embedding is cached.

        Raises:
            TypeError, ValueError: another kind of image.
            QueueFullError, EngineClosedError, EngineFailedError: nothing was accepted.
        """
        return self._submit(EmbedJob(source=self.prepare(image), expires=self._expiry(deadline)))

    def segment(
        self,
        image: ImageSource,
        prompts: Sequence[Prompt],
        multimask_output: bool = True,
        keep_logits: bool = False,
        deadline: float | None = None,
    ) -> Future[list[PromptMasks]]:
        """Predict masks for prompts on one image, in their order.

        Args:
            image: pixels, or an embedding of this model.
            prompts: at least one.
            multimask_output: three masks per prompt instead of one.
            keep_logits: return the low-resolution logits too.
            deadline: seconds, in place of the engine's.

        Raises:
            TypeError, ValueError: a bad image, no prompts, a mask input of the wrong size, an embedding that is not
                of this model or of its dtype.
            QueueFullError, EngineClosedError, EngineFailedError: nothing was accepted.
        """
        if not prompts:
            raise ValueError("at least one prompt is needed")
        for prompt in prompts:
            if not isinstance(prompt, Prompt):
                raise TypeError(f"prompts must be of type Prompt, got {type(prompt).__name__}")
            if prompt.mask_input is not None:
                check_mask_inputs(prompt.mask_input.shape, self.model.low_res_size)
        job = SegmentJob(
            source=self._source(image),
            expires=self._expiry(deadline),
            prompts=list(prompts),
            multimask_output=bool(multimask_output),
            keep_logits=bool(keep_logits),
        )
        return self._submit(job)

    def automatic(
        self,
        image: ImageSource,
        options: AutomaticOptions | None = None,
        deadline: float | None = None,
    ) -> Future[list[dict[str, Any]]]:
        """Segment everything: the records of :class:`sam.SamAutomaticMaskGenerator` with uncompressed RLEs.

        Raises:
            TypeError, ValueError: a bad image, or an embedding that is not of this model or of its dtype; or a program
                replaced something that only the official loop honours, such as ``postprocess_masks``.
            QueueFullError, EngineClosedError, EngineFailedError: nothing was accepted.
        """
        self._automatic.check()
        job = AutomaticJob(
            source=self._source(image),
            expires=self._expiry(deadline),
            options=options or AutomaticOptions(),
            points_per_batch=self.max_batch,
        )
        return self._submit(job)

    def open_stream(self, fill_hole_area: int = 8) -> TrackingStream:
        """Begin to track objects in a video whose frames come one by one.

        Args:
            fill_hole_area: holes of up to so many low-resolution pixels are filled; 0 fills none.

        Raises:
            TypeError: the model cannot track.
            ValueError: a negative area.
        """
        model: Any = self.model
        return TrackingStream(TrackingSession(model, fill_hole_area=fill_hole_area), self._submit, self._expiry)

    def _source(self, image: ImageSource) -> KeyedImage | ImageEmbedding:
        if not isinstance(image, ImageEmbedding):
            return self.prepare(image)
        self.model.check_embedding(image)
        if image.features.dtype != self.model.dtype:  # would fail, or not, by what else is in the batch
            raise ValueError(f"the embedding is in {image.features.dtype}, the model in {self.model.dtype}")
        return image

    def _expiry(self, deadline: float | None) -> float:
        seconds = self.deadline if deadline is None else deadline
        if not seconds > 0:  # NaN is not
            raise ValueError(f"deadline must be positive, got {seconds}")
        return time.monotonic() + seconds

    def _submit(self, job: Job) -> Future[Any]:
        with self._changed:
            if self.failure is not None:
                raise EngineFailedError("the model failed earlier; start a new engine")
            if self._closing:
                raise EngineClosedError("the engine is stopping")
            if len(self._accepted) >= self.max_queue:
                self._counters["rejected"] += 1
                raise QueueFullError(f"{self.max_queue} requests are waiting already")
            self._counters["accepted"] += 1
            self._accepted.add(job)
        answered = weakref.ref(job)  # a future that held its job would keep the embedding until the next collection
        job.future.add_done_callback(lambda future: self._forget(answered()))
        if isinstance(job, ImageJob) and isinstance(job.source, KeyedImage):
            job.source = self.embedding(job.source.key) or job.source
        self._advance(job)
        return job.future

    def _forget(self, job: Job | None) -> None:
        assert job is not None  # accepted jobs are held
        if job.future.cancelled():
            job.acknowledge_cancel()
        with self._changed:
            self._accepted.discard(job)
            if job.future.cancelled():
                self._counters["cancelled"] += 1
            else:
                error = job.future.exception()
                self._counters[getattr(error, "counter", "failed") if error else "completed"] += 1
            self._changed.notify_all()

    def _advance(self, job: Job, before_others: bool = False) -> None:
        """Answer a job that is complete, or queue it for its next stage."""
        if (result := job.result) is not None:
            job.resolve(result)
            return
        with self._changed:
            failed = self.failure is not None
            if not failed:
                queue = self._next_stage(job).queue
                queue.appendleft(job) if before_others else queue.append(job)
                self._changed.notify_all()
        if failed:
            job.fail(EngineFailedError("the model failed"))

    def _next_stage(self, job: Job) -> Stage[Any, Any]:
        if isinstance(job, TrackJob):
            return self._track
        if isinstance(job, ImageJob) and isinstance(job.source, KeyedImage):
            return self._encode
        return self._decode if isinstance(job, SegmentJob) else self._automatic

    # The thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while (taken := self._take()) is not None:
                self._work(*taken)
                del taken  # an idle engine holds on to no request
        except BaseException as error:
            self.fail(error)

    def _work(self, stage: Stage[Any, Any], work_items: list[Any]) -> None:
        if not work_items:
            return
        self._count(stage, len(work_items))
        for job, error in stage.run(work_items).items():
            self._settle(job, error, stage)

    def _take(self) -> tuple[Stage[Any, Any], list[Any]] | None:
        """Return the next stage that has work, and a batch of it; None when there will be none any more."""
        with self._changed:
            while not any(stage.queue for stage in self._turns):
                if self._closing and not self._accepted:
                    return None
                self._changed.wait()
            now = time.monotonic()
            late = [job for stage in self._turns for job in stage.drop_answered(now)]
            while not self._turns[0].queue and any(stage.queue for stage in self._turns):
                self._turns.rotate(-1)
            stage = self._turns[0]
            self._turns.rotate(-1)
            work_items = stage.take() if stage.queue else []
        for job in late:  # outside the lock: a client's callback may do anything
            job.fail(DeadlineExceededError("the request waited for longer than its deadline"))
        return stage, work_items

    def _settle(self, job: Job, error: EngineError | None, stage: Stage[Any, Any]) -> None:
        """Answer a job, or queue it for its next stage, after a batch that it was in."""
        if isinstance(job, ImageJob) and isinstance(job.source, ImageEmbedding):
            with self._changed:
                self._cache.recount(job.source)
        if error is not None:
            job.fail(error)
        else:
            self._advance(job, before_others=stage.unfinished_first)

    def _cache_embedding(self, key: str, embedding: ImageEmbedding) -> None:
        with self._changed:
            self._cache.put(key, embedding)

    def _count_shortage(self) -> None:
        with self._changed:
            self._counters["out_of_memory"] += 1

    def _count(self, stage: Stage[Any, Any], work_items: int) -> None:
        with self._changed:
            self._counters[f"{stage.counter}_batches"] += 1
            self._counters[f"{stage.counter}s"] += work_items

    def fail(self, error: BaseException) -> None:
        """Fail every request that waits, and every later one, with :class:`EngineFailedError`."""
        with self._changed:
            self.failure = error
            jobs = list(self._accepted)
            for stage in self._turns:
                stage.queue.clear()
        for job in jobs:
            job.fail(EngineFailedError("the model failed"))
        if self.on_failure is not None:
            self.on_failure(error)

    # Its state ---------------------------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        """Return the number of requests accepted and not yet answered."""
        return len(self._accepted)

    def counters(self) -> dict[str, int]:
        """Return the counts since the start, and the sizes of the queue and the cache now."""
        with self._changed:
            return {
                **self._counters,
                "pending": len(self._accepted),
                "cache_bytes": self._cache.nbytes,
                "cache_entries": len(self._cache),
                "cache_hits": self._cache.hits,
                "cache_misses": self._cache.misses,
                "cache_evictions": self._cache.evictions,
            }

    def close(self, timeout: float | None = None) -> bool:
        """Refuse new requests, answer those that were accepted, and end the thread.

        Returns:
            True if that took no longer than ``timeout`` seconds. Else the thread still runs, be it for a request that
            was cancelled, and whoever still waits gets :class:`EngineClosedError`.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)
        with self._changed:
            left = list(self._accepted)
        for job in left:
            job.fail(EngineClosedError("the engine stopped before the answer was ready"))
        return not self._thread.is_alive()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
