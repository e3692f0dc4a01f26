"""Many images one after another: files are read, resized and copied while the model works on earlier ones."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from . import preprocess
from .embedding import ImageEmbedding, hash_image
from .images import read_image
from .modeling import Sam
from .preprocess import ImageGeometry
from .prompts import Prompt
from .results import MaskPrediction

ImageSource = np.ndarray | str | os.PathLike[str]
S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class _Resized:
    """An image as it goes to the device, [h, w, 3] uint8."""

    image: np.ndarray
    geometry: ImageGeometry
    image_hash: str


def encode_stream(
    model: Sam,
    images: Iterable[ImageSource],
    *,
    batch_size: int | None = None,
    workers: int = 2,
    batches_ahead: int = 2,
) -> Iterator[ImageEmbedding]:
    """Embed images of any sizes as they come, in their order.

    Threads read and resize what comes next; a batch is copied to the device on a stream of its own, from memory the
    device reads by itself, while the one before is encoded. Memory does not grow with the number of images.

    Args:
        model: on any device; for several GPUs, a process each.
        images: arrays [H, W, 3] uint8 RGB, or files.
        batch_size: images a pass of the encoder; by default 1 on a CPU and 8 elsewhere.
        workers: threads.
        batches_ahead: how many batches are read ahead of the model.

    Yields:
        a handle an image, as :meth:`Sam.encode` makes it.

    Raises:
        TypeError, ValueError, FileNotFoundError: of a bad image, with its place, when its turn comes: all before it
            were yielded.
    """
    if batch_size is None:
        batch_size = 1 if model.device.type == "cpu" else 8
    for name, value in (("batch_size", batch_size), ("workers", workers), ("batches_ahead", batches_ahead)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    copier = _Copier(model.device)
    prepared = _ahead(lambda item: _prepare(model, *item), enumerate(images), workers, batch_size * batches_ahead)
    failure: Exception | None = None
    while True:
        batch: list[_Resized] = []
        try:
            while len(batch) < batch_size and (resized := next(prepared, None)) is not None:
                batch.append(resized)
        except Exception as error:  # what came before it is encoded first
            failure = error
        if batch:
            pixels = torch.stack(
                [model.preprocess(there) for there in copier.to_device([resized.image for resized in batch])]
            )
            yield from model.embed(
                pixels, [resized.geometry for resized in batch], [resized.image_hash for resized in batch]
            )
        if failure is not None:
            raise failure
        if len(batch) < batch_size:
            return


def predict_stream(
    model: Sam,
    requests: Iterable[tuple[ImageSource, Sequence[Prompt]]],
    *,
    multimask_output: bool = True,
    batch_size: int | None = None,
    workers: int = 2,
    batches_ahead: int = 2,
) -> Iterator[MaskPrediction]:
    """Masks for prompts on images as they come, in their order; see :func:`encode_stream`.

    Args:
        requests: an image and its prompts each.
        multimask_output: three masks a prompt instead of one.

    Yields:
        a prediction an image, on the CPU; it is copied there while the next one is computed.

    Raises:
        as :func:`encode_stream` and :meth:`Sam.predict`.
    """
    asked: deque[Sequence[Prompt]] = deque()

    def images() -> Iterator[ImageSource]:
        for image, prompts in requests:
            asked.append(prompts)
            yield image

    embeddings = encode_stream(model, images(), batch_size=batch_size, workers=workers, batches_ahead=batches_ahead)
    copier, waiting = _Copier(model.device), deque[_Copied]()
    try:
        for embedding in embeddings:
            waiting.append(copier.to_host(model.predict(embedding, asked.popleft(), multimask_output)))
            if len(waiting) > 1:
                yield waiting.popleft().result()
    except Exception:
        yield from (copied.result() for copied in waiting)
        raise
    yield from (copied.result() for copied in waiting)


def _prepare(model: Sam, index: int, source: ImageSource) -> _Resized:
    try:
        image = preprocess.validate_image(source if isinstance(source, np.ndarray) else read_image(source))
        geometry = ImageGeometry.of(image.shape[0], image.shape[1], model.image_encoder.img_size)
    except (TypeError, ValueError, FileNotFoundError) as error:
        raise type(error)(f"image {index}: {error}") from None
    resized = preprocess.resize_image(image, geometry.input_size)
    return _Resized(resized, geometry, hash_image(resized, geometry))


def _ahead(function: Callable[[S], T], items: Iterable[S], workers: int, ahead: int) -> Iterator[T]:
    """``map`` in threads, ``ahead`` items ahead of whoever asks; an error comes in its place."""
    source, futures = iter(items), deque[Future[T]]()

    def submit() -> None:
        try:
            futures.append(pool.submit(function, next(source)))
        except StopIteration:
            pass
        except Exception as error:  # of the source: after all that it gave before
            futures.append(Future())
            futures[-1].set_exception(error)

    with ThreadPoolExecutor(workers, thread_name_prefix="sam-stream") as pool:
        for _ in range(ahead):
            submit()
        try:
            while futures:
                result = futures.popleft().result()
                submit()
                yield result
        finally:
            for future in futures:
                future.cancel()


@dataclass(frozen=True)
class _Copied:
    """A prediction on its way to the host."""

    prediction: MaskPrediction
    arrived: torch.cuda.Event | None

    def result(self) -> MaskPrediction:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.prediction


class _Copier:
    """Copies to and from a device, on a stream beside the computation where the device is a GPU.

    torch keeps pinned memory and gives it out again once the copies from and to it are done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def to_device(self, images: Sequence[np.ndarray]) -> list[Tensor]:
        """[h, w, 3] uint8 each -> [3, h, w]."""
        tensors = [torch.from_numpy(image) for image in images]
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                tensors = [tensor.pin_memory().to(self._device, non_blocking=True) for tensor in tensors]
            computing = torch.cuda.current_stream(self._device)
            computing.wait_stream(self._stream)
            for tensor in tensors:
                tensor.record_stream(computing)
        return [tensor.permute(2, 0, 1) for tensor in tensors]

    def to_host(self, prediction: MaskPrediction) -> _Copied:
        if self._stream is None:
            return _Copied(prediction, None)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        arrived = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            there = []
            for tensor in (prediction.masks, prediction.iou_predictions, prediction.low_res_logits):
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                there.append(host.copy_(tensor, non_blocking=True))
                tensor.record_stream(self._stream)
            arrived.record(self._stream)
        return _Copied(MaskPrediction(*there), arrived)
