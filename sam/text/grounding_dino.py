"""Grounding DINO, MM-Grounding-DINO and LLMDet: labels by the tokens of a caption."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .detections import Detections
from .transformers_detector import TransformersDetector, corners

# [CLS], [SEP], "." and "?" of BERT's vocabulary, at which the models cut a caption.
_CUTS = (101, 102, 1012, 1029)
_STOP = 1012


@dataclass
class _Caption:
    """Labels that share a caption, as "cat. traffic light." does for two.

    Attributes:
        tokens: of the whole caption.
        spans: (label, first token, token behind the last) of each label.
    """

    tokens: list[int]
    spans: list[tuple[int, int, int]] = field(default_factory=list)


class GroundingDino(TransformersDetector):
    """A ``GroundingDinoForObjectDetection`` or ``MMGroundingDinoForObjectDetection`` with its processor.

    The score of a box and a label is the highest probability among the label's tokens, or their mean; a box has the
    label of the highest score. There is no threshold of text.

    Labels fill captions of up to ``max_text_len`` tokens, 256 as published, none of which cuts a label; each caption
    costs a pass, and scores of different captions are not calibrated to each other.
    """

    def __init__(self, model: Any, processor: Any, batch_size: int = 8, score: Literal["max", "mean"] = "max") -> None:
        """Take a model and its processor; see :class:`TransformersDetector`.

        Args:
            score: "max", whose thresholds are those in use, or "mean", as COCO is evaluated by the authors.

        Raises:
            ValueError: another ``score``, or a tokenizer whose separators are not BERT's.
        """
        super().__init__(model, processor, batch_size)
        if score not in ("max", "mean"):
            raise ValueError(f"score must be 'max' or 'mean', got {score!r}")
        self.score = score
        tokenizer = processor.tokenizer
        own = (tokenizer.cls_token_id, tokenizer.sep_token_id, *tokenizer.convert_tokens_to_ids([".", "?"]))
        if own != _CUTS:
            raise ValueError(f"[CLS], [SEP], '.' and '?' must have BERT's tokens {_CUTS}, this tokenizer has {own}")

    def tokens(self, labels: list[str]) -> list[_Caption]:
        """Return the captions of an image's labels.

        Raises:
            ValueError: a label with "." or "?", which captions are cut at, without tokens, or too long for a caption.
        """
        room = self.model.config.max_text_len
        captions = [_Caption([_CUTS[0]])]
        for place, label in enumerate(labels):
            tokens = self.processor.tokenizer(label, add_special_tokens=False)["input_ids"]
            if not tokens:
                raise ValueError(f"label {label!r} has nothing that the detector's vocabulary knows")
            if cuts := set(tokens) & set(_CUTS):
                names = ", ".join(map(repr, self.processor.tokenizer.convert_ids_to_tokens(sorted(cuts))))
                raise ValueError(f"label {label!r} must not hold {names}: captions are cut there")
            if len(tokens) + 3 > room:
                raise ValueError(f"label {label!r:.80} has {len(tokens)} tokens, the detector takes {room - 3} at most")
            if len(captions[-1].tokens) + len(tokens) + 2 > room:
                captions.append(_Caption([_CUTS[0]]))
            caption = captions[-1]
            begin = len(caption.tokens)
            caption.tokens += [*tokens, _STOP]
            caption.spans.append((place, begin, begin + len(tokens)))
        for caption in captions:
            caption.tokens.append(_CUTS[1])
        return captions

    def texts(self, tokens: Sequence[list[_Caption]]) -> Iterator[tuple[list[int], dict[str, Tensor], list[_Caption]]]:
        """Yield the first captions of all images, then the second ones of those that have them, and so on."""
        for number in range(max(map(len, tokens))):
            rows = [row for row, captions in enumerate(tokens) if len(captions) > number]
            captions = [tokens[row][number] for row in rows]
            width = max(len(caption.tokens) for caption in captions)
            ids = torch.full((len(rows), width), self.processor.tokenizer.pad_token_id)
            mask = torch.zeros_like(ids)
            for row, caption in enumerate(captions):
                ids[row, : len(caption.tokens)] = torch.tensor(caption.tokens)
                mask[row, : len(caption.tokens)] = 1
            yield rows, {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}, captions

    def detections(self, logits: Tensor, boxes: Tensor, places: _Caption, size: tuple[int, ...]) -> Detections:
        """Return each query's box with its best label and that label's score."""
        probabilities = logits.sigmoid()
        spans = [probabilities[:, begin:end] for _, begin, end in places.spans]
        by_label = torch.stack([span.amax(1) if self.score == "max" else span.mean(1) for span in spans], 1)
        scores, best = by_label.max(1)
        height, width = size
        label_ids = torch.tensor([place for place, _, _ in places.spans])[best]
        return Detections(corners(boxes) * torch.tensor([width, height, width, height]), scores, label_ids)
