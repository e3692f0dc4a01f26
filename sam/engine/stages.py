"""The stages of a request: each takes a batch of what waits for it and runs the model on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from ..amg.memory_plan import usual_memory
from ..automatic_mask_generator import SamAutomaticMaskGenerator
from ..embedding import ImageEmbedding
from ..images.geometry import ImageGeometry
from ..masks.rle_encode import encode_packed
from ..modeling.promptable import PromptableModel
from ..prompts.batch import ragged_chunks
from ..prompts.prompt import Prompt
from .batch_runner import BatchRunner, out_of_memory
from .errors import EngineError, OutOfMemoryError, is_out_of_memory
from .requests import AutomaticJob, ImageJob, Job, KeyedImage, PromptMasks, SegmentJob

AnyJob = TypeVar("AnyJob", bound=Job)
WorkItem = TypeVar("WorkItem")
Outcomes = dict[AnyJob, EngineError | None]


class Stage(ABC, Generic[AnyJob, WorkItem]):
    """The jobs that wait for one kind of pass.

    Attributes:
        counter: what the engine counts work items and batches by.
        unfinished_first: whether a job that needs another pass of this stage goes before all others.
        queue: the jobs that wait; the engine's lock guards it.
    """

    counter: ClassVar[str]
    unfinished_first: ClassVar[bool] = False

    def __init__(self, model: PromptableModel, runner: BatchRunner) -> None:
        self.model = model
        self.runner = runner
        self.queue: deque[AnyJob] = deque()

    def drop_answered(self, now: float) -> list[AnyJob]:
        """Forget the jobs that were answered or cancelled, and those that are too late; return the late ones."""
        late = [job for job in self.queue if job.expires <= now]
        self.queue = deque(job for job in self.queue if job.expires > now and not job.future.done())
        return late

    @abstractmethod
    def take(self) -> list[WorkItem]:
        """Remove a batch from the queue, which is not empty; called under the engine's lock."""

    @abstractmethod
    def run(self, work_items: list[WorkItem]) -> Outcomes[AnyJob]:
        """Run the model on a batch and note in its jobs what came out; return each job's error, None where it is well.

        Called without the lock.
        """


class EncodeStage(Stage[ImageJob, list[ImageJob]]):
    """Encodes images; a work item is all jobs that wait for one image.

    Args:
        max_images: images per batch.
        on_encoded: called with the key and the embedding of each image.
    """

    counter = "image"

    def __init__(
        self,
        model: PromptableModel,
        runner: BatchRunner,
        max_images: int,
        on_encoded: Callable[[str, ImageEmbedding], None],
    ) -> None:
        super().__init__(model, runner)
        self.max_images = max_images
        self._on_encoded = on_encoded

    def take(self) -> list[list[ImageJob]]:
        groups: dict[str, list[ImageJob]] = {}
        for job in self.queue:
            key = _image_of(job).key
            if key in groups or len(groups) < self.max_images:
                groups.setdefault(key, []).append(job)
        taken = {job for group in groups.values() for job in group}
        self.queue = deque(job for job in self.queue if job not in taken)
        return list(groups.values())

    def run(self, work_items: list[list[ImageJob]]) -> Outcomes[ImageJob]:
        images = [_image_of(group[0]) for group in work_items]
        embeddings = self.runner.run(images, lambda batch: self.model.encode(batch, batch_size=len(batch)))
        outcomes: Outcomes[ImageJob] = {}
        for image, group, embedding in zip(images, work_items, embeddings, strict=True):
            if isinstance(embedding, OutOfMemoryError):
                outcomes.update(dict.fromkeys(group, embedding))
                continue
            self._on_encoded(image.key, embedding)
            for job in group:
                job.source = embedding
                outcomes[job] = None
        return outcomes


def _image_of(job: ImageJob) -> KeyedImage:
    assert isinstance(job.source, KeyedImage)
    return job.source


class DecodeStage(Stage[SegmentJob, tuple[SegmentJob, int]]):
    """Decodes prompts; a work item is a job and the index of one of its prompts.

    Args:
        max_batch: prompts per batch.
        max_pixels: pixels per batch, one mask of each prompt counted, where it is of more than one prompt.
    """

    counter = "prompt"

    def __init__(self, model: PromptableModel, runner: BatchRunner, max_batch: int, max_pixels: int) -> None:
        super().__init__(model, runner)
        self.max_batch = max_batch
        self.max_pixels = max_pixels

    def take(self) -> list[tuple[SegmentJob, int]]:
        """Take a prompt of each job in turn until the batch is full."""
        multimask_output = self.queue[0].multimask_output
        compatible = [job for job in self.queue if job.multimask_output == multimask_output]
        demands = [(job.remaining, job.mask_pixels) for job in compatible]
        shares = fair_shares(demands, self.max_batch, self.max_pixels)
        served = {job: count for job, count in zip(compatible, shares, strict=True) if count}
        self.queue = deque(job for job in self.queue if job not in served)
        return [(job, len(job.done) + i) for job, count in served.items() for i in range(count)]

    def run(self, work_items: list[tuple[SegmentJob, int]]) -> Outcomes[SegmentJob]:
        outcomes: Outcomes[SegmentJob] = dict.fromkeys(job for job, _ in work_items)
        results = self.runner.run(work_items, self._decode)
        for (job, _), result in zip(work_items, results, strict=True):
            if isinstance(result, OutOfMemoryError):
                outcomes[job] = result
            else:
                job.done.append(result)
        return outcomes

    @torch.no_grad()
    def _decode(self, work_items: list[tuple[SegmentJob, int]]) -> list[PromptMasks]:
        prompts: dict[SegmentJob, list[Prompt]] = {}
        for job, index in work_items:
            prompts.setdefault(job, []).append(job.prompts[index])
        embeddings = [job.embedding for job in prompts]
        geometries = [embedding.geometry for embedding in embeddings]
        multimask_output = work_items[0][0].multimask_output
        results: list[PromptMasks | None] = [None] * len(work_items)
        for chunk in ragged_chunks(
            list(prompts.values()), geometries, self.model.device, self.max_batch, self.model.prompt_layout
        ):
            logits, iou, scores = self.model.decode(embeddings, chunk.batch, multimask_output)
            predicted_iou = iou.float().cpu().numpy()
            object_scores = [None] * len(iou) if scores is None else scores.tolist()
            jobs = [work_items[position][0] for position in chunk.positions]
            rles = self._rles(logits, [job.embedding.geometry for job in jobs])
            limit = self.model.low_res_limit
            clamped = logits if limit is None else logits.clamp(-limit, limit)
            for row, (job, position) in enumerate(zip(jobs, chunk.positions, strict=True)):
                low_res = clamped[row].float().cpu().numpy().copy() if job.keep_logits else None
                results[position] = PromptMasks(rles[row], predicted_iou[row], low_res, object_scores[row])
        return [result for result in results if result is not None]

    def _rles(self, logits: Tensor, geometries: list[ImageGeometry]) -> list[list[dict[str, Any]]]:
        """Encode each prompt's masks from packed bits, prompts of images of one size together."""
        rles: list[list[dict[str, Any]]] = [[] for _ in geometries]
        for geometry in dict.fromkeys(geometries):
            rows = [row for row, other in enumerate(geometries) if other == geometry]
            encoded = encode_packed(self.model.packed_masks(logits[rows], geometry), geometry.original_size)
            for position, row in enumerate(rows):
                rles[row] = encoded[position * logits.shape[1] : (position + 1) * logits.shape[1]]
        return rles


class AutomaticStage(Stage[AutomaticJob, AutomaticJob]):
    """Makes masks of everything, one batch of clicks of one job at a time.

    A job that is begun holds masks, so no other begins before it ends.
    """

    counter = "automatic"
    unfinished_first = True

    def check(self) -> None:
        """Raise ``ValueError`` where the official loop would make masks of everything: it starts from images."""
        SamAutomaticMaskGenerator(self.model, points_per_side=1).check_takes_embeddings()

    def take(self) -> list[AutomaticJob]:
        return [self.queue.popleft()]

    def run(self, work_items: list[AutomaticJob]) -> Outcomes[AutomaticJob]:
        return {job: self._step(job) for job in work_items}

    def _step(self, job: AutomaticJob) -> OutOfMemoryError | None:
        """Decode the next batch of clicks; where memory runs out begin again, once, with half as many per batch."""
        try:
            job.steps = job.steps or self._begin(job)
            next(job.steps)
            return None
        except StopIteration as stop:
            job.records = stop.value
            return None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self.runner.relieve()  # only now: the error held what the step had allocated
        if job.retried or job.points_per_batch == 1:
            return out_of_memory()
        job.retried, job.steps, job.points_per_batch = True, None, job.points_per_batch // 2
        return None

    def _begin(self, job: AutomaticJob) -> Iterator[int]:
        """Start the generator, the second time with half of the memory: on a GPU it may decode more than a batch."""
        generator = SamAutomaticMaskGenerator(
            self.model,
            points_per_batch=job.points_per_batch,
            max_memory=usual_memory(self.model.device) // 2 if job.retried else None,
            output_mode="uncompressed_rle",
            **vars(job.options),
        )
        return generator.steps(job.embedding)


def fair_shares(demands: Sequence[tuple[int, int]], capacity: int, budget: int) -> list[int]:
    """Share out up to ``capacity`` items one by one, in turn; a demand is a number of items and the cost of one.

    An item that costs more than is left of the budget waits, unless nothing was given yet:
    ``[(1, 1), (9, 1), (9, 1)], 8, 99 -> [1, 4, 3]`` and ``[(9, 60), (2, 1)], 8, 50 -> [1, 0]``.
    """
    shares, given, spent = [0] * len(demands), 0, 0
    while True:
        before = given
        for index, (count, cost) in enumerate(demands):
            if shares[index] < count and given < capacity and (given == 0 or spent + cost <= budget):
                shares[index] += 1
                given, spent = given + 1, spent + cost
        if given == before:
            return shares
