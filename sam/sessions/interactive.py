"""The interactive loop: click, look, correct. Every answer refines the one before."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastsam_kernels import Resizing, packed_masks

from ..checks import require, require_model
from ..embedding import ImageEmbedding
from ..inference import TOKEN_BUCKETS
from ..inference.decode import decoding
from ..modeling import Sam
from ..prompts.batch import PromptBatch
from ..prompts.labels import LABEL_ABSENT
from ..prompts.prompt import Prompt


@dataclass(frozen=True)
class Answer:
    """One mask, in memory that the session's next answer takes over.

    Attributes:
        packed: [width, ceil(height / 32)] int32; bit b of word k of column x is the pixel in row 32 k + b.
        predicted_iou: of the mask, as the model sees it.
        size: (height, width) of the image.
    """

    packed: np.ndarray
    predicted_iou: float
    size: tuple[int, int]

    def mask(self) -> np.ndarray:
        """The mask as a new array, [height, width] bool."""
        octets = self.packed.astype("<i4", copy=False).view(np.uint8)
        return np.unpackbits(octets, axis=1, bitorder="little", count=self.size[0]).T.astype(bool)


class InteractiveSession:
    """Prompts on one image, one after another; each is answered from all so far and the last answer's logits.

    As SAM was trained: a single click on an object chooses the best of three masks, and whatever follows is asked
    for one mask, with the logits of the last as mask input. Of an answer, one block of memory goes to the host.
    Not for sharing between threads; sessions of one model may run in several.
    """

    def __init__(self, model: Sam, embedding: ImageEmbedding) -> None:
        """
        Raises:
            TypeError: no model, or no embedding.
            ValueError: an embedding of another model or on another device.
        """
        require_model(model)
        require("embedding", embedding, ImageEmbedding, "an ImageEmbedding, as model.encode makes it")
        model.check_embedding(embedding)
        self._model, self._embedding = model, embedding
        side = model.low_res_size
        wide = torch.promote_types(model.dtype, torch.float32)
        self._logits = torch.zeros((1, 1, *side), device=model.device, dtype=wide)
        height, width = embedding.geometry.original_size
        self._words = (width, -(-height // 32))
        on_gpu = model.device.type == "cuda"
        self._host = torch.zeros(
            self._words[0] * self._words[1] + 1, dtype=torch.int32, device="cpu", pin_memory=on_gpu
        )
        self._asked = torch.zeros(1, TOKEN_BUCKETS[-1], 3, dtype=torch.float32, device="cpu", pin_memory=on_gpu)
        self.reset()

    @property
    def low_res_logits(self) -> Tensor:
        """[1, 1, h, w] logits of the last answer, on the model's device; the next answer overwrites them."""
        return self._logits

    def reset(self) -> None:
        """Forget every prompt; the image stays."""
        self._points: list[tuple[float, float]] = []
        self._labels: list[int] = []
        self._box: tuple[float, float, float, float] | None = None
        self._answered = False

    def click(self, x: float, y: float, label: int = 1) -> Answer:
        """Another click, in pixels of the original image: 1 on the object, 0 on what is not.

        Raises:
            ValueError: not finite or too far away (:class:`sam.Prompt`), or another label. Nothing has changed then.
        """
        if label not in (0, 1):
            raise ValueError(f"label must be 1 (object) or 0 (background), got {label!r}")
        return self._ask([*self._points, (x, y)], [*self._labels, label], self._box)

    def box(self, x0: float, y0: float, x1: float, y1: float) -> Answer:
        """The object's box, in pixels of the original image, in place of an earlier one.

        Raises:
            ValueError: not finite or too far away (:class:`sam.Prompt`). Nothing has changed then.
        """
        return self._ask(self._points, self._labels, (x0, y0, x1, y1))

    @torch.no_grad()
    def _ask(
        self, points: list[tuple[float, float]], labels: list[int], box: tuple[float, float, float, float] | None
    ) -> Answer:
        prompt = Prompt(points or None, labels or None, box)
        geometry = self._embedding.geometry
        ambiguous = not self._answered and box is None and len(points) == 1
        batch = self._batch(*prompt.tokens(geometry))
        resizing = Resizing(geometry.image_size, geometry.input_size, geometry.original_size)
        threshold, kernels = self._model.mask_threshold, self._model.kernels

        def answer(logits: Tensor, iou: Tensor) -> None:
            """Keep the logits of the best mask, and send its words and predicted IoU to the host."""
            best = iou[0].argmax()[None]
            torch.index_select(logits[0].to(self._logits.dtype), 0, best, out=self._logits[0])
            words = packed_masks(self._logits[0], resizing, threshold=threshold, kernels=kernels).flatten()
            score = iou[0].index_select(0, best).float().view(torch.int32)
            self._host.copy_(torch.cat([words, score]), non_blocking=True)

        with decoding(self._model, [self._embedding], batch, ambiguous) as (logits, iou):
            answer(logits, iou)
        if self._model.device.type == "cuda":
            torch.cuda.current_stream(self._model.device).synchronize()
        self._points, self._labels, self._box, self._answered = points, labels, box, True
        packed = self._host[:-1].view(self._words).numpy()
        return Answer(packed, float(self._host[-1:].view(torch.float32)), geometry.original_size)

    def _batch(self, coords: np.ndarray, labels: np.ndarray) -> PromptBatch:
        """One prompt of a bucket's length, through one copy to the device."""
        count = len(labels)
        length = next((size for size in TOKEN_BUCKETS if size >= count), count)
        asked = self._asked[:, :length] if length <= TOKEN_BUCKETS[-1] else self._asked.new_zeros(1, length, 3)
        table = asked[0].numpy()
        table[:count, :2], table[:count, 2], table[count:] = coords, labels, (0, 0, LABEL_ABSENT)
        there = asked.to(self._model.device, non_blocking=True)
        masks = self._logits.float() if self._answered else None
        return PromptBatch(there[..., :2], there[..., 2].to(torch.int64), masks, ragged=length > count)
