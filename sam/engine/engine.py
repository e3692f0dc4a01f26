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
from ..images.prepare import prepare_image
from ..modeling import Sam
from ..prompts.checks import check_mask_inputs
from ..prompts.prompt import Prompt
from ..system.device_profile import device_profile
from .cache import EmbeddingCache
from .errors import (
    DeadlineExceededError,
    EngineClosedError,
    EngineError,
    EngineFailedError,
    OutOfMemoryError,
    QueueFullError,
)
from .requests import AutomaticJob, AutomaticOptions, Job, KeyedImage, PromptMasks, SegmentJob
from .stages import Passes

_STAGES = ("encode", "decode", "automatic")
_COUNTERS = {
    "accepted", "completed", "cancelled", "out_of_memory",
    "images", "image_batches", "prompts", "prompt_batches", "automatics", "automatic_batches",
    *(error.counter for error in EngineError.__subclasses__()),
}  # fmt: skip


class Engine:
    """Answers requests from any number of threads with one model.

    A request is checked where it is made, so a bad one raises there and never meets a batch. Accepted ones wait
    for the one thread that calls the model. Whenever it is free it takes what waits, without delay: images with
    images, prompts with prompts of any images, a prompt of each request in turn until the batch is full or its
    masks are large. So a request of a thousand prompts, or of prompts on an image of 50 megapixels, shares every
    batch with those that came after it. The three stages take turns.

    Futures are those of ``concurrent.futures``; ``asyncio.wrap_future`` makes them awaitable. ``cancel()`` works
    until the last prompt is decoded, and what was not begun by then is not computed.
    """

    def __init__(
        self,
        model: Sam,
        max_batch: int = 16,
        max_queue: int = 256,
        deadline: float = 30.0,
        embedding_cache_bytes: int = 2**30,
        *,
        max_images: int | None = None,
        handle_secret: bytes | None = None,
        on_failure: Callable[[BaseException], None] | None = None,
    ) -> None:
        """
        Args:
            model: nobody else should change its weights or move it.
            max_batch: prompts decoded together.
            max_queue: requests accepted and not yet answered.
            deadline: seconds that a request may wait by default.
            embedding_cache_bytes: of image embeddings kept for later prompts.
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
        self.max_batch = max_batch
        self._passes = Passes(model, max_batch, self._count_shortage)
        self.max_queue = max_queue
        self.deadline = deadline
        self.max_images = max_images
        self._batch_pixels = profile.pixels_per_batch
        self.failure: BaseException | None = None
        self.on_failure = on_failure
        self._model_hash = model.model_hash
        self._handle_secret = handle_secret or secrets.token_bytes(32)
        self._cache = EmbeddingCache(embedding_cache_bytes)
        self._counters: Counter[str] = Counter()
        # From the start, so that whoever watches them sees zeros and not nothing.
        self._counters.update(dict.fromkeys(_COUNTERS, 0))
        self._accepted: set[Job] = set()
        self._queues: dict[str, deque[Any]] = {stage: deque() for stage in _STAGES}
        self._turns = deque(_STAGES)
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="sam-engine", daemon=True)
        self._thread.start()

    # Requests ----------------------------------------------------------------------------------------------

    def prepare(self, image: np.ndarray) -> KeyedImage:
        """Check, resize and hash an image, [H, W, 3] uint8 RGB, in the caller's thread.

        Raises:
            TypeError, ValueError: as :meth:`sam.modeling.Sam.encode`.
        """
        prepared = prepare_image(image, self.model.image_geometry)
        content = f"{prepared.image_hash} {self._model_hash}".encode()
        key = hashlib.blake2b(content, digest_size=16, key=self._handle_secret).hexdigest()
        return KeyedImage(**vars(prepared), key=key)

    def embedding(self, key: str) -> ImageEmbedding | None:
        """The embedding of that key if it is still kept."""
        with self._changed:
            return self._cache.get(key)

    def embed(self, image: np.ndarray | KeyedImage, deadline: float | None = None) -> Future[ImageEmbedding]:
        """The image's embedding, from the cache if it is there.

        Raises:
            TypeError, ValueError: another kind of image.
            QueueFullError, EngineClosedError, EngineFailedError: nothing was accepted.
        """
        return self._submit(Job(*self._source(image), self._expiry(deadline)))

    def segment(
        self,
        image: np.ndarray | KeyedImage | ImageEmbedding,
        prompts: Sequence[Prompt],
        multimask_output: bool = True,
        keep_logits: bool = False,
        deadline: float | None = None,
    ) -> Future[list[PromptMasks]]:
        """Masks for prompts on one image, in their order.

        Args:
            image: pixels, or an embedding of this model.
            prompts: at least one.
            multimask_output: three masks a prompt instead of one.
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
        wanted = list(prompts), bool(multimask_output), bool(keep_logits)
        return self._submit(SegmentJob(*self._source(image), self._expiry(deadline), Future(), *wanted))

    def automatic(
        self,
        image: np.ndarray | KeyedImage | ImageEmbedding,
        options: AutomaticOptions | None = None,
        deadline: float | None = None,
    ) -> Future[list[dict[str, Any]]]:
        """Masks of everything: the records of :class:`sam.SamAutomaticMaskGenerator` with uncompressed RLEs.

        Raises:
            TypeError, ValueError: a bad image, or an embedding that is not of this model or of its dtype.
            QueueFullError, EngineClosedError, EngineFailedError: nothing was accepted.
        """
        options = options or AutomaticOptions()
        source = self._source(image)
        return self._submit(AutomaticJob(*source, self._expiry(deadline), Future(), options, self.max_batch))

    def _source(
        self, image: np.ndarray | KeyedImage | ImageEmbedding
    ) -> tuple[str | None, KeyedImage | None, ImageEmbedding | None]:
        if isinstance(image, ImageEmbedding):
            self.model.check_embedding(image)
            if image.features.dtype != self.model.dtype:  # would fail, or not, by what else is in the batch
                raise ValueError(f"the embedding is in {image.features.dtype}, the model in {self.model.dtype}")
            return None, None, image
        prepared = image if isinstance(image, KeyedImage) else self.prepare(image)
        return prepared.key, prepared, None

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
        with self._changed:
            if job.embedding is None and job.key is not None:
                job.embedding = self._cache.get(job.key)
        self._advance(job)
        return job.future

    def _forget(self, job: Job | None) -> None:
        assert job is not None  # those accepted are held
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
        """Put a job where its next piece of work is done, or answer it."""
        if job.embedding is not None and type(job) is Job:
            job.resolve(job.embedding)
            return
        stage = "encode" if job.embedding is None else "decode" if isinstance(job, SegmentJob) else "automatic"
        with self._changed:
            failed = self.failure is not None
            if not failed:
                queue = self._queues[stage]
                queue.appendleft(job) if before_others else queue.append(job)
                self._changed.notify_all()
        if failed:
            job.fail(EngineFailedError("the model failed"))

    # The thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        work: dict[str, Callable[[list[Any]], None]] = {
            "encode": self._encode,
            "decode": self._decode,
            "automatic": self._automatic,
        }
        try:
            while (taken := self._take()) is not None:
                stage, batch = taken
                if batch:
                    work[stage](batch)
                del taken, batch  # an idle engine holds on to no request
        except BaseException as error:
            self.fail(error)

    def _take(self) -> tuple[str, list[Any]] | None:
        """The next stage that has work, and the work; None when there will be none any more."""
        with self._changed:
            while not any(self._queues.values()):
                if self._closing and not self._accepted:
                    return None
                self._changed.wait()
            now = time.monotonic()
            expired = [job for queue in self._queues.values() for job in queue if job.expires <= now]
            for stage, queue in self._queues.items():
                self._queues[stage] = deque(job for job in queue if job.expires > now and not job.future.done())
            while not self._queues[self._turns[0]] and any(self._queues.values()):
                self._turns.rotate(-1)
            stage = self._turns[0]
            self._turns.rotate(-1)
            batch = getattr(self, f"_take_{stage}")() if self._queues[stage] else []
        for job in expired:  # outside the lock: a client's callback may do anything
            job.fail(DeadlineExceededError("the request waited for longer than its deadline"))
        return stage, batch

    def _take_encode(self) -> list[list[Job]]:
        """Jobs by image: up to ``max_images`` images, each with everyone who waits for it."""
        queue = self._queues["encode"]
        groups: dict[str, list[Job]] = {}
        for job in queue:
            if job.key in groups or len(groups) < self.max_images:
                groups.setdefault(job.key, []).append(job)
        taken = {job for group in groups.values() for job in group}
        self._queues["encode"] = deque(job for job in queue if job not in taken)
        return list(groups.values())

    def _take_decode(self) -> list[tuple[SegmentJob, int]]:
        """(job, place of a prompt): a prompt of each job in turn until the batch is full."""
        queue = self._queues["decode"]
        mates = [job for job in queue if job.multimask_output == queue[0].multimask_output]
        counts = _fair_shares([(job.remaining, job.pixels) for job in mates], self.max_batch, self._batch_pixels)
        served = {job: count for job, count in zip(mates, counts, strict=True) if count}
        self._queues["decode"] = deque(job for job in queue if job not in served)
        return [(job, len(job.done) + i) for job, count in served.items() for i in range(count)]

    def _take_automatic(self) -> list[AutomaticJob]:
        return [self._queues["automatic"].popleft()]

    def _encode(self, groups: list[list[Job]]) -> None:
        self._count("image", len(groups))
        images = [group[0].image for group in groups if group[0].image is not None]
        for group, embedding in zip(groups, self._passes.encode(images), strict=True):
            if isinstance(embedding, ImageEmbedding):
                with self._changed:
                    self._cache.put(str(group[0].key), embedding)
            for job in group:
                if isinstance(embedding, OutOfMemoryError):
                    job.fail(embedding)
                else:
                    job.embedding, job.image = embedding, None
                    self._advance(job)

    def _decode(self, pieces: list[tuple[SegmentJob, int]]) -> None:
        self._count("prompt", len(pieces))
        failed: dict[SegmentJob, OutOfMemoryError] = {}
        for (job, _), masks in zip(pieces, self._passes.decode(pieces), strict=True):
            if isinstance(masks, OutOfMemoryError):
                failed[job] = masks
            else:
                job.done.append(masks)
        for job in dict.fromkeys(job for job, _ in pieces):
            self._recount(job)
            if job in failed:
                job.fail(failed[job])
            elif job.remaining:
                self._advance(job)
            else:
                job.resolve(job.done)

    def _automatic(self, jobs: list[AutomaticJob]) -> None:
        self._count("automatic", len(jobs))
        for job in jobs:
            records = self._passes.automatic(job)
            self._recount(job)
            if records is None:  # one that is begun holds masks, so no other begins before it ends
                self._advance(job, before_others=True)
            elif isinstance(records, OutOfMemoryError):
                job.fail(records)
            else:
                job.resolve(records)

    def _recount(self, job: Job) -> None:
        if job.embedding is not None:
            with self._changed:
                self._cache.recount(job.embedding)

    def _count_shortage(self) -> None:
        with self._changed:
            self._counters["out_of_memory"] += 1

    def _count(self, kind: str, amount: int) -> None:
        with self._changed:
            self._counters[f"{kind}_batches"] += 1
            self._counters[f"{kind}s"] += amount

    def fail(self, error: BaseException) -> None:
        """Give up: whoever waits, and whoever asks from now on, gets :class:`EngineFailedError`."""
        with self._changed:
            self.failure = error
            jobs = list(self._accepted)
            for queue in self._queues.values():
                queue.clear()
        for job in jobs:
            job.fail(EngineFailedError("the model failed"))
        if self.on_failure is not None:
            self.on_failure(error)

    # Its state ---------------------------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        """Requests accepted and not yet answered."""
        return len(self._accepted)

    def counters(self) -> dict[str, int]:
        """Counts since the start, and what is held now."""
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
        """Take nothing more, answer what was accepted, end the thread.

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


def _fair_shares(wanted: Sequence[tuple[int, int]], most: int, budget: int) -> list[int]:
    """Give out up to ``most`` one by one, in turn, to whoever wants more; ``wanted`` is how many, and the cost of one.

    What costs more than is left of the budget waits, unless nothing was given yet:
    ``[(1, 1), (9, 1), (9, 1)], 8, 99 -> [1, 4, 3]`` and ``[(9, 60), (2, 1)], 8, 50 -> [1, 0]``.
    """
    shares, given, spent = [0] * len(wanted), 0, 0
    while True:
        before = given
        for index, (count, cost) in enumerate(wanted):
            if shares[index] < count and given < most and (given == 0 or spent + cost <= budget):
                shares[index] += 1
                given, spent = given + 1, spent + cost
        if given == before:
            return shares
