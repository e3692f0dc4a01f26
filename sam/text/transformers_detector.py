"""Batches for detectors of transformers, of images that their processor gives one size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .detections import Detections
from .labels import check_labels


class TransformersDetector(ABC):
    """A detector of transformers with its processor.

    Images go through the model in batches of one resized size, as padding would change what is found. So an image's
    detections do not depend on the other images of a call, but for rounding.

    Attributes:
        model: in evaluation mode.
        passes: how often the model was called so far.
    """

    def __init__(self, model: Any, processor: Any, batch_size: int = 8) -> None:
        """Take a model and its processor.

        Args:
            model: the model, on the device and in the dtype in which it is to run.
            processor: with ``image_processor`` and ``tokenizer``, as ``AutoProcessor`` gives it.
            batch_size: images a pass, at most.

        Raises:
            ValueError: a batch below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model = model.eval()
        self.processor = processor
        self.batch_size = batch_size
        self.passes = 0

    @torch.no_grad()
    def detect(
        self, images: Sequence[np.ndarray], labels: Sequence[Sequence[str]], threshold: float
    ) -> list[Detections]:
        """Find the objects of each image's labels; see :meth:`sam.text.Detector.detect`.

        Raises:
            TypeError, ValueError: labels that are no lists of strings, empty, without text or twice the same, or that
                this detector does not take. Nothing was detected then.
        """
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images need as many lists of labels, got {len(labels)}")
        tokens = [self.tokens(check_labels(f"labels[{index}]", each)) for index, each in enumerate(labels)]
        found: list[list[Detections]] = [[] for _ in images]
        for batch, pixels in self._batches(images):
            for rows, inputs, places in self.texts([tokens[index] for index in batch]):
                chosen = {name: each[rows].to(self.model.device) for name, each in pixels.items()}
                chosen["pixel_values"] = chosen["pixel_values"].to(self.model.dtype)
                texts = {name: each.to(self.model.device) for name, each in inputs.items()}
                self.passes += 1
                outputs = self.model(**chosen, **texts)
                for row, own, logits, boxes in zip(rows, places, outputs.logits, outputs.pred_boxes, strict=True):
                    image = images[batch[row]]
                    part = self.detections(logits.float().cpu(), boxes.float().cpu(), own, image.shape[:2])
                    found[batch[row]].append(part[part.scores > threshold])
        return [Detections.joined(parts) for parts in found]

    def _batches(self, images: Sequence[np.ndarray]) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Yield places of images of one size, and what the image processor makes of them; few wait at a time."""
        waiting: dict[tuple[int, ...], list[tuple[int, dict[str, Tensor]]]] = {}
        for index, image in enumerate(images):
            made = self.processor.image_processor([image], input_data_format="channels_last", return_tensors="pt")
            bucket = waiting.setdefault(tuple(made["pixel_values"].shape), [])
            bucket.append((index, dict(made)))
            if len(bucket) == self.batch_size:
                yield _stacked(bucket)
                bucket.clear()
        for bucket in waiting.values():
            if bucket:
                yield _stacked(bucket)

    @abstractmethod
    def tokens(self, labels: list[str]) -> list[Any]:
        """Return the tokens of an image's labels, in parts that a pass has room for.

        Raises:
            ValueError: a label that this detector does not take, named.
        """

    @abstractmethod
    def texts(self, tokens: Sequence[list[Any]]) -> Iterator[tuple[list[int], dict[str, Tensor], list[Any]]]:
        """Yield rows, text inputs and places of labels of each pass over a batch of images that have these tokens."""

    @abstractmethod
    def detections(self, logits: Tensor, boxes: Tensor, places: Any, size: tuple[int, ...]) -> Detections:
        """Return what one image's logits [Q, T] and relative boxes [Q, 4] (centre, size) say, in pixels."""


def corners(boxes: Tensor) -> Tensor:
    """Return boxes [Q, 4] of x0, y0, x1, y1 from those of centre and size."""
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    return torch.cat([centre - half, centre + half], 1)


def _stacked(bucket: list[tuple[int, dict[str, Tensor]]]) -> tuple[list[int], dict[str, Tensor]]:
    indices = [index for index, _ in bucket]
    return indices, {name: torch.cat([made[name] for _, made in bucket]) for name in bucket[0][1]}
