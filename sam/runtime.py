"""Compiled execution: one graph a shape, over a few shapes that are known beforehand.

``load_model(compile=True)`` gives a model a :class:`Runtime`. The blocks of the encoder are compiled, each kind once,
with the operations of ``fastsam_kernels`` inside; the decoder is compiled for *buckets*, a number of prompts and of
tokens that smaller requests are padded to. Padding is exact: absent tokens are masked out of every attention, and
absent prompts are rows that nobody reads.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .modeling.common import is_ours
from .modeling.image_encoder import Block, ImageEncoderViT
from .modeling.mask_decoder import MaskDecoder
from .modeling.prompt_encoder import LABEL_ABSENT
from .modeling.transformer import SharedImageSide
from .prompts import PromptBatch

if TYPE_CHECKING:
    from .embedding import ImageEmbedding
    from .modeling import Sam

logger = logging.getLogger("sam")

TOKENS = (2, 3, 6, 11)  # a click or a box; both; 5 points; 10 points, up to which image projections are folded
_LARGEST_IMAGE_BATCH = 8
_MOST_GRAPHS = 256


@dataclass(frozen=True)
class Bucket:
    """A shape that is compiled.

    Attributes:
        prompts, tokens: of the batch after padding.
        multimask: three masks a prompt, or one.
        with_masks: prompts have a mask input.
    """

    prompts: int
    tokens: int
    multimask: bool
    with_masks: bool


@dataclass(frozen=True)
class Warmed:
    """What :meth:`Runtime.warmup` did for one shape, and the seconds that it took."""

    what: str
    seconds: float


class Runtime:
    """Runs the passes of one model compiled. May be called from many threads; a bucket is compiled by one of them."""

    def __init__(self, model: Sam) -> None:
        """``model`` keeps its modules and weights; its blocks run compiled from now on, here or elsewhere."""
        self._model = model
        self._lock = threading.Lock()
        # A graph a bucket and a kind of block; torch gives up compiling after eight of a function otherwise.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_GRAPHS)
        self._decode = torch.compile(self._decode_padded, fullgraph=True, dynamic=False)
        self._compiled: dict[Bucket, float] = {}
        self._told: set[str] = set()
        if is_ours(model.image_encoder, ImageEncoderViT):
            for block in model.image_encoder.blocks:
                if is_ours(block, Block):
                    block.compile(fullgraph=True, dynamic=False)

    @property
    def buckets(self) -> dict[Bucket, float]:
        """Those that are compiled, with the seconds that the first use of each took."""
        return dict(self._compiled)

    @property
    def prompt_counts(self) -> tuple[int, ...]:
        """The powers of two up to the model's chunk."""
        most = self._model.prompts_per_chunk
        return tuple(2**i for i in range(most.bit_length()) if 2**i <= most)

    def warmup(
        self,
        prompts: tuple[int, ...] | None = None,
        tokens: tuple[int, ...] = TOKENS,
        multimask: tuple[bool, ...] = (True, False),
        mask_input: tuple[bool, ...] = (False, True),
        images: tuple[int, ...] = (1,),
    ) -> list[Warmed]:
        """Compile what requests will need, so that none of them waits.

        Args:
            prompts, tokens: sizes of the decoder's batches, each padded to its bucket; None for all.
            multimask, mask_input: kinds of requests.
            images: batches of the encoder.

        Returns:
            what was compiled and how long it took; nothing twice.
        """
        from .embedding import ImageEmbedding
        from .preprocess import ImageGeometry

        model, done = self._model, []
        size, (height, width) = model.image_encoder.img_size, model.prompt_encoder.image_embedding_size
        for count in images:
            start = time.perf_counter()
            with torch.no_grad():
                self.image_features(torch.zeros(count, 3, size, size, device=model.device, dtype=model.dtype))
            done.append(Warmed(f"encoder, {count} images", time.perf_counter() - start))
        shape = (1, model.prompt_encoder.embed_dim, height, width)
        embedding = ImageEmbedding(
            torch.zeros(shape, device=model.device, dtype=model.dtype), ImageGeometry.of(size, size, size)
        )
        low = model.prompt_encoder.mask_input_size
        for count in prompts or self.prompt_counts:
            for length in tokens:
                for with_masks in mask_input:
                    batch = PromptBatch(
                        torch.zeros(count, length, 2, device=model.device),
                        torch.zeros(count, length, dtype=torch.int64, device=model.device),
                        torch.zeros(count, 1, *low, device=model.device) if with_masks else None,
                    )
                    for multi in multimask:
                        before = len(self._compiled)
                        with torch.no_grad():
                            model.decode([embedding], batch, multi)
                        if len(self._compiled) > before:
                            bucket, seconds = next(reversed(self._compiled.items()))
                            done.append(Warmed(str(bucket), seconds))
        return done

    def image_features(self, pixels: Tensor) -> Tensor:
        """The encoder on [B, 3, size, size]; batches are padded to powers of two, so that few shapes are compiled."""
        count = len(pixels)
        padded = min(1 << (count - 1).bit_length(), max(count, _LARGEST_IMAGE_BATCH)) if count else 0
        if padded > count:
            pixels = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, padded - count))
        return self._model.image_encoder(pixels, self._model.resolved_kernels)[:count]

    def decode(
        self, embeddings: Sequence[ImageEmbedding], batch: PromptBatch, multimask: bool
    ) -> tuple[Tensor, Tensor] | None:
        """Logits [P, C, h, w] and predicted IoU [P, C] of at most a chunk of prompts; None where no bucket fits."""
        bucket = self._bucket_of(len(embeddings), batch, multimask)
        if bucket is None:
            return None
        share = batch.mask_inputs is None and self._model.resolved_kernels != "reference"
        shared = self._model.shared_image_side(embeddings) if share else None
        more = (0, bucket.tokens - batch.labels.shape[1], 0, bucket.prompts - len(batch))
        coords = F.pad(batch.coords.to(torch.float32), (0, 0, *more))
        labels = F.pad(batch.labels, more, value=LABEL_ABSENT)
        masks = batch.mask_inputs
        if masks is not None:
            masks = F.pad(masks, (0, 0, 0, 0, 0, 0, 0, more[3]))
        image_pe = self._model.prompt_encoder.get_dense_pe()
        features, kernels = embeddings[0].features, self._model.resolved_kernels
        arguments = (features, image_pe, coords, labels, masks, shared, multimask, kernels)
        if bucket in self._compiled:
            logits, iou = self._decode(*arguments)
        else:
            with self._lock:
                start = time.perf_counter()
                logits, iou = self._decode(*arguments)
                self._compiled.setdefault(bucket, time.perf_counter() - start)
        return logits[: len(batch)], iou[: len(batch)]

    def _bucket_of(self, images: int, batch: PromptBatch, multimask: bool) -> Bucket | None:
        length = batch.labels.shape[1]
        if images > 1 or length > TOKENS[-1]:
            several = "prompts on several images at once"
            self._tell(several if images > 1 else f"prompts of more than {TOKENS[-1]} tokens")
            return None
        prompts = next((count for count in self.prompt_counts if count >= len(batch)), None)
        if prompts is None or len(batch) == 0:
            return None
        tokens = next(size for size in TOKENS if size >= length)
        return Bucket(prompts, tokens, multimask, batch.mask_inputs is not None)

    def _tell(self, what: str) -> None:
        """Once: a request that is not compiled runs, slower."""
        if what not in self._told:
            self._told.add(what)
            logger.warning("%s fit no compiled shape and run eagerly", what)

    def _decode_padded(
        self,
        features: Tensor,
        image_pe: Tensor,
        coords: Tensor,
        labels: Tensor,
        masks: Tensor | None,
        shared: SharedImageSide | None,
        multimask: bool,
        kernels: str,
    ) -> tuple[Tensor, Tensor]:
        encoder, decoder = self._model.prompt_encoder, self._model.mask_decoder
        wanted = MaskDecoder.mask_slice(multimask)
        dense = encoder.no_mask_embed.weight.view(1, -1, 1, 1) if masks is None else encoder._embed_masks(masks)
        decoded = decoder.decode_tokens(
            features,
            image_pe,
            encoder.embed_tokens(coords, labels),
            dense,
            token_mask=labels != LABEL_ABSENT,
            shared=shared,
            kernels=kernels,
        )
        return decoder.decode_masks(decoded, wanted, None, kernels), decoded.iou[:, wanted]
