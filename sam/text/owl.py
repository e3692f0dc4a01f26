"""OWLv2: labels by the place of their query."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .detections import Detections
from .transformers_detector import TransformersDetector, corners

_MAX_QUERIES = 512  # labels of all images of a pass: they go through the text model together


class Owl(TransformersDetector):
    """An ``Owlv2ForObjectDetection`` with its processor.

    The score of a box and a label is the label's probability, and a box has the label of the highest score. All
    labels of an image take one pass. There is no suppression of its own.
    """

    def tokens(self, labels: list[str]) -> list[Tensor]:
        """Return the tokens of an image's labels and which of them are text, [2, labels, tokens], in one part.

        Raises:
            ValueError: a label with more tokens than the text model takes, 16 as published.
        """
        room = self.model.config.text_config.max_position_embeddings
        padded = self.processor.tokenizer(labels, padding="max_length", max_length=room)
        for label, own in zip(labels, padded["input_ids"], strict=True):
            if len(own) > room:
                raise ValueError(f"label {label!r:.80} has {len(own)} tokens, the detector takes {room} at most")
        return [torch.tensor([padded["input_ids"], padded["attention_mask"]])]

    def texts(self, tokens: Sequence[list[Tensor]]) -> Iterator[tuple[list[int], dict[str, Tensor], list[int]]]:
        """Yield as many images a pass as the text model has room for; fewer labels are filled up by the first one."""
        queries = [parts[0] for parts in tokens]
        counts = [each.shape[1] for each in queries]
        together = max(1, _MAX_QUERIES // max(counts))
        for start in range(0, len(queries), together):
            rows = range(start, min(start + together, len(queries)))
            widest = max(counts[row] for row in rows)
            fillers = [queries[row][:, :1].expand(-1, widest - counts[row], -1) for row in rows]
            filled = [torch.cat([queries[row], filler], 1) for row, filler in zip(rows, fillers, strict=True)]
            ids, mask = torch.cat(filled, 1)
            yield [*rows], {"input_ids": ids, "attention_mask": mask}, [counts[row] for row in rows]

    def detections(self, logits: Tensor, boxes: Tensor, places: int, size: tuple[int, ...]) -> Detections:
        """Return each patch's box with the best of the image's own labels; the picture is the corner of a square."""
        best, label_ids = logits[:, :places].max(1)
        return Detections(corners(boxes) * max(size), best.sigmoid(), label_ids)
