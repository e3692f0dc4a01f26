"""Streams of images: files are read, resized and copied while the model works on earlier ones."""

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

from ..checks import naming, require
from ..embedding import ImageEmbedding
from ..images.prepare import PreparedImage, prepare_image
from ..images.read import read_image
from ..masks.results import MaskPrediction
from ..modeling.promptable import PromptableModel
from ..prompts.prompt import Prompt
from ..system.device_profile import device_profile, preparing_threads

ImageSource = np.ndarray | str | os.PathLike[str]
S = TypeVar("S")
T = TypeVar("T")


def encode_stream(
    model: PromptableModel,
    images: Iterable[ImageSource],
    *,
    batch_size: int | None = None,
    workers: int | None = None,
    batches_ahead: int = 2,
    resize_on_device: bool = False,
) -> Iterator[ImageEmbedding]:
    """Embed images of any sizes as they come, in their order.

    Threads read and resize the next images; a batch is copied to the device from pinned memory, on a stream of its
    own, while the one before is encoded. Memory does not grow with the number of images.

    Args:
        model: on any device; for several GPUs run one process per GPU.
        images: arrays [H, W, 3] uint8 RGB, or floating-point in 0..1, or files.
        batch_size: images per pass of the encoder; by default 1 on a CPU and 8 elsewhere.
        workers: threads; by default 2 on a CPU and 8 elsewhere, or as many as there are cores.
        batches_ahead: how many batches are read ahead of the model.
        resize_on_device: see :meth:`sam.Sam.encode`; threads then only read.

    Yields:
        one handle per image, as :meth:`Sam.encode` makes it.

    Raises:
        TypeError, ValueError, FileNotFoundError, IsADirectoryError: a bad image, named by its position, after all
            images before it were yielded.
    """
    if batch_size is None:
        batch_size = device_profile(model.device).images_per_pass
    workers = preparing_threads(model.device) if workers is None else workers
    for name, value in (("batch_size", batch_size), ("workers", workers), ("batches_ahead", batches_ahead)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    copier = _Copier(model.device)
    prepared = _map_ahead(
        lambda item: _prepare(model, *item, resize_on_device), enumerate(images), workers, batch_size * batches_ahead
    )
    failure: Exception | None = None
    while True:
        batch: list[PreparedImage] = []
        try:
            while len(batch) < batch_size and (image := next(prepared, None)) is not None:
                batch.append(image)
        except Exception as error:  # what came before it is encoded first
            failure = error
        if batch:
            copied = copier.to_device([image.pixels for image in batch])
            pixels = [model.encoder_input(*both) for both in zip(copied, batch, strict=True)]
            yield from model.embed(torch.stack(pixels), batch)
        if failure is not None:
            raise failure
        if len(batch) < batch_size:
            return


def predict_stream(
    model: PromptableModel,
    requests: Iterable[tuple[ImageSource, Sequence[Prompt]]],
    *,
    multimask_output: bool = True,
    batch_size: int | None = None,
    workers: int | None = None,
    batches_ahead: int = 2,
    resize_on_device: bool = False,
) -> Iterator[MaskPrediction]:
    """Predict masks for prompts on images as they come, in their order; see :func:`encode_stream`.

    Args:
        requests: pairs of an image and its prompts.
        multimask_output: three masks per prompt instead of one.

    Yields:
        one prediction per image, on the CPU, in pageable memory; it is copied there while the next one is computed.

    Raises:
        as :func:`encode_stream` and :meth:`Sam.predict`.
    """
    queued_prompts: deque[Sequence[Prompt]] = deque()

    def images() -> Iterator[ImageSource]:
        for image, prompts in requests:
            queued_prompts.append(prompts)
            yield image

    embeddings = encode_stream(
        model,
        images(),
        batch_size=batch_size,
        workers=workers,
        batches_ahead=batches_ahead,
        resize_on_device=resize_on_device,
    )
    copier, pending = _Copier(model.device), deque[_PendingCopy]()
    try:
        for embedding in embeddings:
            pending.append(copier.to_host(model.predict(embedding, queued_prompts.popleft(), multimask_output)))
            if len(pending) > 1:
                yield pending.popleft().result()
    except Exception:
        yield from (copy.result() for copy in pending)
        raise
    yield from (copy.result() for copy in pending)


def _prepare(model: PromptableModel, index: int, source: ImageSource, resize_on_device: bool) -> PreparedImage:
    with naming(f"image {index}"):
        require("the image", source, (np.ndarray, str, os.PathLike), "a numpy array [H, W, 3] of uint8, or a file")
        image = source if isinstance(source, np.ndarray) else read_image(source)
        return prepare_image(image, model.image_geometry, resize_on_device=resize_on_device)


def _map_ahead(function: Callable[[S], T], items: Iterable[S], workers: int, ahead: int) -> Iterator[T]:
    """Map in threads, ``ahead`` items ahead of the consumer; an error is raised at its item's position."""
    source, futures = iter(items), deque[Future[T]]()

    def submit() -> None:
        try:
            futures.append(pool.submit(function, next(source)))
        except StopIteration:
            pass
        except Exception as error:  # from the source: raised after all items before it
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
class _PendingCopy:
    """A prediction on its way to the host; ``done`` is None where it is there."""

    prediction: MaskPrediction
    done: torch.cuda.Event | None

    def result(self) -> MaskPrediction:
        """Return the prediction in pageable memory: a list of pinned ones would take all that the host can pin."""
        if self.done is None:
            return self.prediction
        self.done.synchronize()
        return MaskPrediction(*(tensor.clone() for tensor in _tensors(self.prediction)))


def _tensors(prediction: MaskPrediction) -> list[Tensor]:
    """Return all tensors of a prediction, in the order of its fields."""
    return [tensor for tensor in vars(prediction).values() if tensor is not None]


class _Copier:
    """Copy to and from a device, on a stream beside the computation where the device is a GPU.

    torch reuses pinned memory once the copies from and to it are done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def to_device(self, images: Sequence[np.ndarray]) -> list[Tensor]:
        """Copy images [h, w, 3] uint8 to the device."""
        tensors = [torch.from_numpy(image) for image in images]
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                tensors = [tensor.pin_memory().to(self._device, non_blocking=True) for tensor in tensors]
            computing = torch.cuda.current_stream(self._device)
            computing.wait_stream(self._stream)
            for tensor in tensors:
                tensor.record_stream(computing)
        return tensors

    def to_host(self, prediction: MaskPrediction) -> _PendingCopy:
        """Begin to copy a prediction to the host."""
        if self._stream is None:
            return _PendingCopy(prediction, None)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        done = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            copies = []
            for tensor in _tensors(prediction):
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                copies.append(host.copy_(tensor, non_blocking=True))
                tensor.record_stream(self._stream)
            done.record(self._stream)
        return _PendingCopy(MaskPrediction(*copies), done)
