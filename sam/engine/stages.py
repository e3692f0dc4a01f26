"""What the model does for the engine: a batch of each stage, again in halves where memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastsam_kernels import Resizing, packed_masks

from ..amg.memory_plan import usual_memory
from ..automatic_mask_generator import SamAutomaticMaskGenerator
from ..embedding import ImageEmbedding
from ..images.geometry import ImageGeometry
from ..inference.graphs import empty_cache
from ..masks.rle_encode import encode_packed
from ..modeling import Sam
from ..prompts.batch import ragged_chunks
from ..prompts.prompt import Prompt
from .errors import OutOfMemoryError, is_out_of_memory
from .requests import AutomaticJob, KeyedImage, PromptMasks, SegmentJob

Piece = TypeVar("Piece")
Result = TypeVar("Result")


class Passes:
    """Passes of ``model``. What does not fit memory, not in half the batch either, comes back as its error.

    Args:
        max_batch: prompts decoded together.
        on_shortage: called whenever memory ran out.
    """

    def __init__(self, model: Sam, max_batch: int, on_shortage: Callable[[], None]) -> None:
        self.model = model
        self.max_batch = max_batch
        self._on_shortage = on_shortage

    def encode(self, images: list[KeyedImage]) -> list[ImageEmbedding | OutOfMemoryError]:
        """The embedding of each image, in one batch."""
        return self._halving(images, lambda some: self.model.encode(some, batch_size=len(some)))

    def decode(self, pieces: list[tuple[SegmentJob, int]]) -> list[PromptMasks | OutOfMemoryError]:
        """The masks of each (job, place of a prompt); the jobs want as many masks a prompt as each other."""
        return self._halving(pieces, self._decode)

    @torch.no_grad()
    def _decode(self, pieces: list[tuple[SegmentJob, int]]) -> list[PromptMasks]:
        asked: dict[SegmentJob, list[Prompt]] = {}
        for job, place in pieces:
            asked.setdefault(job, []).append(job.prompts[place])
        embeddings = [job.embedding for job in asked if job.embedding is not None]
        geometries = [embedding.geometry for embedding in embeddings]
        geometry_of = [job.embedding.geometry for job, _ in pieces if job.embedding is not None]
        results: list[PromptMasks | None] = [None] * len(pieces)
        chunks = ragged_chunks(list(asked.values()), geometries, self.model.device, self.max_batch)
        multimask = pieces[0][0].multimask_output
        for chunk in chunks:
            logits, iou = self.model.decode(embeddings, chunk.batch, multimask)
            scores = iou.float().cpu().numpy()
            rles = self._rles(logits, [geometry_of[place] for place in chunk.places])
            for row, place in enumerate(chunk.places):
                kept = logits[row].float().cpu().numpy().copy() if pieces[place][0].keep_logits else None
                results[place] = PromptMasks(rles[row], scores[row], kept)
        return [result for result in results if result is not None]

    def _rles(self, logits: Tensor, geometries: list[ImageGeometry]) -> list[list[dict[str, Any]]]:
        """Those of each prompt's masks, prompts of images of one size together; never as pixels, only as bits."""
        rles: list[list[dict[str, Any]]] = [[] for _ in geometries]
        for geometry in dict.fromkeys(geometries):
            rows = [row for row, other in enumerate(geometries) if other == geometry]
            resizing = Resizing(geometry.image_size, geometry.input_size, geometry.original_size)
            packed = packed_masks(
                logits[rows].flatten(0, 1), resizing, threshold=self.model.mask_threshold, kernels=self.model.kernels
            )
            encoded = encode_packed(packed, geometry.original_size)
            for place, row in enumerate(rows):
                rles[row] = encoded[place * logits.shape[1] : (place + 1) * logits.shape[1]]
        return rles

    def automatic(self, job: AutomaticJob) -> list[dict[str, Any]] | OutOfMemoryError | None:
        """The next batch of clicks of automatic masks: None while more are to come, the records after the last.

        Where memory runs out it begins again, once, with half as many clicks a batch.
        """
        try:
            job.steps = job.steps or self._steps(job)
            next(job.steps)
            return None
        except StopIteration as stop:
            records: list[dict[str, Any]] = stop.value
            return records
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self._relieve()  # only now: the error held what the step had allocated
        if job.retried or job.points_per_batch == 1:
            return _shortage()
        job.retried, job.steps, job.points_per_batch = True, None, job.points_per_batch // 2
        return None

    def _steps(self, job: AutomaticJob) -> Iterator[Any]:
        """The second time with half of the memory too: on a GPU a batch has more clicks than it was asked for."""
        assert job.embedding is not None
        generator = SamAutomaticMaskGenerator(
            self.model,
            points_per_batch=job.points_per_batch,
            max_memory=usual_memory(self.model.device) // 2 if job.retried else None,
            output_mode="uncompressed_rle",
            **vars(job.options),
        )
        return generator.steps(job.embedding)

    def _halving(
        self, pieces: list[Piece], run: Callable[[list[Piece]], list[Result]]
    ) -> list[Result | OutOfMemoryError]:
        """``run(pieces)``, a result a piece; :class:`OutOfMemoryError` where memory runs out again in a half."""
        try:
            return [*run(pieces)]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self._relieve()
        results: list[Result | OutOfMemoryError] = []
        middle = (len(pieces) + 1) // 2
        for half in filter(None, (pieces[:middle], pieces[middle:])):
            try:
                results += run(half)
                continue
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            self._relieve()
            results += [_shortage()] * len(half)
        return results

    def _relieve(self) -> None:
        self._on_shortage()
        if self.model.device.type == "cuda":
            empty_cache()


def _shortage() -> OutOfMemoryError:
    return OutOfMemoryError("not enough memory, not for half the batch either")
