"""Interactive segmentation: click, look, correct. Every answer refines the one before."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..checks import require, require_model
from ..embedding import ImageEmbedding
from ..inference.decode import decoding
from ..modeling.promptable import PromptableModel
from ..prompts.batch import PromptBatch
from ..prompts.labels import LABEL_ABSENT
from ..prompts.prompt import Prompt


@dataclass(frozen=True)
class Answer:
    """Hold one mask, in memory that the session's next answer overwrites.

    Attributes:
        packed: [width, ceil(height / 32)] int32; bit b of word k of column x is the pixel in row 32 k + b.
        predicted_iou: the IoU that the model predicts for the mask.
        size: (height, width) of the image.
        object_score: a logit, above 0 where SAM 2 sees the object; None of SAM, which does not say.
    """

    packed: np.ndarray
    predicted_iou: float
    size: tuple[int, int]
    object_score: float | None = None

    def mask(self) -> np.ndarray:
        """Return the mask as a new array, [height, width] bool."""
        octets = self.packed.astype("<i4", copy=False).view(np.uint8)
        return np.unpackbits(octets, axis=1, bitorder="little", count=self.size[0]).T.astype(bool)


class InteractiveSession:
    """Answer prompts on one image one after another, each from all prompts so far and the last answer's logits.

    As in SAM's training, a first single click chooses the best of three masks, and every later prompt gets one mask,
    with the logits of the last one as mask input. One block of memory per answer goes to the host. Threads must not
    share a session; sessions of one model may run in several threads.
    """

    def __init__(self, model: PromptableModel, embedding: ImageEmbedding) -> None:
        """Begin without a prompt.

        Raises:
            TypeError: no model, or no embedding.
            ValueError: an embedding of another model or on another device.
        """
        require_model(model)
        require("embedding", embedding, ImageEmbedding, "an ImageEmbedding, as model.encode makes it")
        model.check_embedding(embedding)
        self._model, self._embedding, self._lengths = model, embedding, model.token_buckets
        logits_dtype = torch.promote_types(model.dtype, torch.float32)
        self._logits = torch.zeros((1, 1, *model.low_res_size), device=model.device, dtype=logits_dtype)
        height, width = embedding.geometry.original_size
        self._packed_shape = (width, -(-height // 32))
        pin_memory = model.device.type == "cuda"
        # On the host: the packed mask, its predicted IoU and object score, and x, y and label of each prompt token.
        self._host_answer = torch.zeros(
            self._packed_shape[0] * self._packed_shape[1] + 2, dtype=torch.int32, device="cpu", pin_memory=pin_memory
        )
        self._host_tokens = torch.zeros(
            1, self._lengths[-1], 3, dtype=torch.float32, device="cpu", pin_memory=pin_memory
        )
        self.reset()

    @property
    def low_res_logits(self) -> Tensor:
        """Return the last answer's logits [1, 1, h, w], on the model's device; the next answer overwrites them."""
        return self._logits

    def reset(self) -> None:
        """Drop all prompts; the image stays."""
        self._points: list[tuple[float, float]] = []
        self._labels: list[int] = []
        self._box: tuple[float, float, float, float] | None = None
        self._answered = False

    def click(self, x: float, y: float, label: int = 1) -> Answer:
        """Add a click in pixels of the original image, labelled 1 on the object and 0 on the background.

        Raises:
            ValueError: not finite or too far away (:class:`sam.Prompt`), or another label; nothing is changed.
        """
        if label not in (0, 1):
            raise ValueError(f"label must be 1 (object) or 0 (background), got {label!r}")
        return self._predict([*self._points, (x, y)], [*self._labels, label], self._box)

    def box(self, x0: float, y0: float, x1: float, y1: float) -> Answer:
        """Set the object's box, in pixels of the original image, in place of an earlier one.

        Raises:
            ValueError: not finite or too far away (:class:`sam.Prompt`); nothing is changed.
        """
        return self._predict(self._points, self._labels, (x0, y0, x1, y1))

    @torch.no_grad()
    def _predict(
        self, points: list[tuple[float, float]], labels: list[int], box: tuple[float, float, float, float] | None
    ) -> Answer:
        prompt = Prompt(points or None, labels or None, box)
        geometry = self._embedding.geometry
        multimask_output = not self._answered and box is None and len(points) == 1
        batch = self._batch(*prompt.tokens(geometry, self._model.prompt_layout))
        with decoding(self._model, [self._embedding], batch, multimask_output) as (logits, iou, scores):
            best = iou[0].argmax()[None]
            torch.index_select(logits[0].to(self._logits.dtype), 0, best, out=self._logits[0])
            words = self._model.packed_masks(self._logits, geometry).flatten()
            numbers = [iou[0].index_select(0, best)] if scores is None else [iou[0].index_select(0, best), scores[:1]]
            answer = torch.cat([words, *(number.float().view(torch.int32) for number in numbers)])
            self._host_answer[: len(answer)].copy_(answer, non_blocking=True)
            if self._model.low_res_limit is not None:
                self._logits.clamp_(-self._model.low_res_limit, self._model.low_res_limit)
        if self._model.device.type == "cuda":
            torch.cuda.current_stream(self._model.device).synchronize()
        self._points, self._labels, self._box, self._answered = points, labels, box, True
        packed, tail = self._host_answer[:-2].view(self._packed_shape).numpy(), self._host_answer[-2:]
        predicted_iou, score = tail.view(torch.float32).tolist()
        return Answer(packed, predicted_iou, geometry.original_size, None if scores is None else score)

    def _batch(self, coords: np.ndarray, labels: np.ndarray) -> PromptBatch:
        """Pad the prompt's tokens to a bucket's length and copy them to the device at once."""
        count = len(labels)
        length = next((size for size in self._lengths if size >= count), count)
        fits = length <= self._lengths[-1]
        host_tokens = self._host_tokens[:, :length] if fits else self._host_tokens.new_zeros(1, length, 3)
        rows = host_tokens[0].numpy()
        rows[:count, :2], rows[:count, 2], rows[count:] = coords, labels, (0, 0, LABEL_ABSENT)
        tokens = host_tokens.to(self._model.device, non_blocking=True)
        mask_inputs = self._logits.float() if self._answered else None
        return PromptBatch(tokens[..., :2], tokens[..., 2].to(torch.int64), mask_inputs, ragged=length > count)
