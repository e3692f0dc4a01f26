"""The runtime of one model: runs requests compiled, as CUDA graphs or eagerly."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..embedding import ImageEmbedding, ImageProjections, channels_last
from ..masks.results import DecodedMasks
from ..modeling.common import is_stock_class, uncompiled
from ..modeling.feature_pyramid import ImageEncoder
from ..modeling.weight_cache import WeightCache
from ..prompts.batch import PromptBatch
from ..prompts.labels import LABEL_ABSENT
from . import fused_decoder
from .buckets import Bucket, Limits, as_table, pad_to_bucket
from .compilation import compiled_block, many_graphs, why_not_compiled
from .decode import image_projections
from .eligibility import PARTS, look
from .fused_encoder import run_block
from .fused_hiera import run_grid_block
from .graphs import GraphsOfWeights, Recorder, StackedInput
from .packed_weights import pack_decoder
from .parts import FusedParts, Model, features_sizes

logger = logging.getLogger("sam")

_MAX_PADDED_IMAGES = 8
# Limits of a graph: the image side of a prompt is 2 MB in bf16, and a pool for more of them would be gigabytes.
_REPLAYED = {"images": 16, "prompts": 32}
_KINDS = {kind for kinds in PARTS.values() for kind in kinds}


@dataclass(frozen=True)
class WarmupStep:
    """One shape that :meth:`Runtime.warmup` made ready, and the seconds that it took."""

    what: str
    seconds: float


class Runtime:
    """Runs the passes of one model, compiled or as CUDA graphs. May be called from many threads.

    A graph has the weights of the decoder, or of the encoder, in it. It belongs to their generation: after a change of
    a weight, a hook or a module new graphs are recorded, or the request runs eagerly.
    """

    def __init__(self, model: Model, *, compile_encoder: bool = True, recorder: Recorder | None = None) -> None:
        """Begin with no shape ready; :meth:`warmup` makes them.

        Args:
            model: a decoder with hooks or modules of a user's own runs eagerly.
            compile_encoder: its images are encoded by compiled blocks.
            recorder: stands in for CUDA's graphs.
        """
        self._model = model
        self._lock = threading.Lock()
        self._first_use: dict[Bucket, float] = {}
        self._warned: set[str] = set()
        self._recorder = recorder
        self._decoder_graphs, self._encoder_graphs = GraphsOfWeights(recorder), GraphsOfWeights(recorder)
        self._compile_encoder = compile_encoder

    @property
    def why_encoder_not_compiled(self) -> str | None:
        """Return a sentence on what keeps images from being encoded by compiled blocks; None where nothing does."""
        encoder = self._model.image_encoder
        if not self._compile_encoder:
            return "compile_encoder is False"
        if not any(is_stock_class(encoder, kind) for kind in PARTS["image_encoder"]):
            return f"image_encoder is a {type(encoder).__name__}, of no class of this package"
        encoder = uncompiled(encoder)
        return look(encoder).packed(_why_not_compiled, encoder)

    @cached_property
    def _compiled_block(self) -> Callable[..., Tensor]:
        is_hiera = isinstance(uncompiled(self._model.image_encoder), ImageEncoder)
        return compiled_block(run_grid_block if is_hiera else run_block)

    @property
    def buckets(self) -> dict[Bucket, float]:
        """Return the buckets in use, with the seconds that the first use of each took."""
        return dict(self._first_use)

    def table(self) -> str:
        """Return the buckets in use as text."""
        return as_table(self._first_use)

    @property
    def limits(self) -> Limits:
        """Return what fits a bucket: up to the model's chunk on one image, or what graphs have memory for."""
        sizes = _REPLAYED if self.replays else {"images": 1, "prompts": self._model.prompts_per_chunk}
        return Limits(**sizes, tokens=self._model.token_buckets)

    def reset(self) -> None:
        """Forget every graph."""
        self._decoder_graphs.reset()
        self._encoder_graphs.reset()

    def warmup(
        self,
        prompts: tuple[int, ...] | None = None,
        tokens: tuple[int, ...] | None = None,
        multimask: tuple[bool, ...] = (True, False),
        mask_input: tuple[bool, ...] = (False, True),
        images: tuple[int, ...] = (1,),
        image_batches: tuple[int, ...] = (1,),
    ) -> list[WarmupStep]:
        """Compile or record what requests will need, so that none of them waits.

        A shape that was not made ready is at its first use: a CUDA graph then costs that request two runs and a
        capture, and other threads nothing.

        Args:
            prompts, tokens, images: sizes of the decoder's batches, each padded to its bucket; None for all.
            multimask, mask_input: kinds of requests.
            image_batches: batches of the encoder.

        Returns:
            what was made ready and how long it took; nothing twice.
        """
        model, done, size = self._model, [], self._model.image_size
        for count in image_batches:
            start = time.perf_counter()
            with torch.no_grad():
                model.image_features(torch.zeros(count, 3, size, size, device=model.device, dtype=model.dtype))
                self._wait()
            done.append(WarmupStep(f"encoder, {count} images", time.perf_counter() - start))
        for image_count in images:
            embeddings = [self._blank_embedding() for _ in range(image_count)]
            counts = self.limits.prompt_counts if prompts is None else prompts
            lengths = self.limits.tokens if tokens is None else tokens
            for count, length, with_masks, multimask_output in product(counts, lengths, mask_input, multimask):
                known = set(self._first_use)
                with torch.no_grad():
                    batch = self._blank_batch(image_count, count, length, with_masks)
                    model.decode(embeddings, batch, multimask_output)
                first_use = self._first_use.items()
                done += [WarmupStep(str(bucket), seconds) for bucket, seconds in first_use if bucket not in known]
        self._wait()
        return done

    def _blank_embedding(self) -> ImageEmbedding:
        model, sizes = self._model, features_sizes(self._model)
        assert sizes is not None, "only parts of ours run compiled"
        features, *high_res = (torch.zeros(1, *size, device=model.device, dtype=model.dtype) for size in sizes)
        geometry = model.image_geometry(model.image_size, model.image_size)
        return ImageEmbedding(features, geometry, high_res=tuple(map(channels_last, high_res)))

    def _blank_batch(self, images: int, prompts: int, tokens: int, with_masks: bool) -> PromptBatch:
        model = self._model
        zeros = partial(torch.zeros, device=model.device)
        return PromptBatch(
            zeros(prompts, tokens, 2, dtype=torch.float32),
            zeros(prompts, tokens, dtype=torch.int64),
            zeros(prompts, 1, *model.low_res_size, dtype=torch.float32) if with_masks else None,
            zeros(prompts, dtype=torch.int64) if images > 1 else None,
        )

    def image_maps(
        self,
        encode: Callable[[Tensor, Callable[..., Tensor] | None], tuple[Tensor, ...]],
        pixels: Tensor,
        *parts: nn.Module,
    ) -> tuple[Tensor, ...]:
        """Run an image encoder on [B, 3, size, size].

        Compiled, batches are padded to powers of two, so that few shapes are compiled. As CUDA graphs, one image is
        replayed: its kernels are shorter than the host takes to launch them. Larger batches run eagerly.

        Args:
            encode: a function of pixels and a compiled block, or None; it may read the weights of ``parts`` and
                nothing else that may change.
            pixels: normalised.
            parts: parts of the model.

        Returns:
            what ``encode`` returns, in memory of its own.
        """
        model, count = self._model, len(pixels)
        reason = self.why_encoder_not_compiled
        if reason is None:
            padded = min(1 << (count - 1).bit_length(), max(count, _MAX_PADDED_IMAGES)) if count else 0
            if padded > count:
                pixels = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, padded - count))
            with many_graphs():
                return tuple(maps[:count] for maps in encode(pixels, self._compiled_block))
        if self._compile_encoder:
            self._warn_once(f"images are encoded without compiled blocks: {reason}")
        generation = self._replayable(pixels, parts)
        if generation is None:
            return encode(pixels, None)
        with self._encoder_graphs.now(model.device, generation).run(
            ("encoder", model.resolved_kernels), lambda image: encode(image, None), [StackedInput.of(pixels)]
        ) as (outputs, _):
            return tuple(output.clone() for output in outputs)

    @contextmanager
    def run(
        self, parts: FusedParts, embeddings: Sequence[ImageEmbedding], batch: PromptBatch, multimask_output: bool
    ) -> Iterator[DecodedMasks | None]:
        """Decode at most a chunk of prompts, and hold the outputs for the length of the context.

        No graph has what is done with them: what depends on the size of an image would be recorded for every size.

        Args:
            parts: the model's, as they are now.
            embeddings, batch: the prompts and their images.
            multimask_output: three masks per prompt instead of one.

        Yields:
            the answer to the padded batch, which the next request overwrites; None where no bucket fits.
        """
        bucket = self._bucket_of(len(embeddings), batch, multimask_output)
        if bucket is None:
            yield None
            return
        kernels = self._model.resolved_kernels
        image = self._image_inputs(parts, embeddings, bucket)
        prompts = pad_to_bucket(batch, bucket)

        if not self.replays:
            tensors = [None if stacked is None else stacked.tensors[0] for stacked in image]
            with nullcontext() if bucket in self._first_use else self._lock:  # one thread compiles
                start = time.perf_counter()
                with many_graphs():
                    outputs = self._compiled(*tensors, *prompts, multimask_output=multimask_output, kernels=kernels)
                self._first_use.setdefault(bucket, time.perf_counter() - start)
            yield DecodedMasks(*outputs)
            return

        generation = (self._settings(), parts.generation)
        graphs = self._decoder_graphs.now(self._model.device, generation, forget=self._first_use.clear)
        with graphs.run(
            bucket,
            lambda *tensors: self._decode_padded(
                *tensors, multimask_output=multimask_output, kernels=kernels, parts=parts
            ),
            [*image, *(None if tensor is None else StackedInput.of(tensor) for tensor in prompts)],
        ) as (outputs, seconds):
            if seconds is not None:
                self._first_use.setdefault(bucket, seconds)
            yield DecodedMasks(*outputs)

    # Graphs ------------------------------------------------------------------------------------------------

    @property
    def replays(self) -> bool:
        """Return whether the decoder runs as graphs and not compiled."""
        return self._recorder is not None or self._model.device.type == "cuda"

    def _settings(self) -> Hashable:
        """Return what a graph holds besides weights."""
        backends = torch.backends
        precisions = (backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision)  # type: ignore[attr-defined]
        return self._model.device, self._model.resolved_kernels, precisions

    def _replayable(self, pixels: Tensor, parts: Sequence[nn.Module]) -> Hashable | None:
        """Return what its graphs belong to if a pass of ``parts`` over ``pixels`` can be replayed, else None."""
        model = self._model
        if not self.replays or torch.is_grad_enabled() or torch.is_autocast_enabled(model.device.type):
            return None
        if pixels.shape != (1, 3, model.image_size, model.image_size) or pixels.device != model.device:
            return None
        plain = [uncompiled(part) for part in parts]
        if not all(isinstance(part, WeightCache) and type(part) in _KINDS for part in plain):
            return None
        snapshots = [look(part) for part in plain]
        if any(snapshot.intrusion is not None for snapshot in snapshots):  # a hook would see nothing of a replay
            return None
        return self._settings(), *(snapshot.generation for snapshot in snapshots)

    def _image_inputs(
        self, parts: FusedParts, embeddings: Sequence[ImageEmbedding], bucket: Bucket
    ) -> list[StackedInput | None]:
        """Return features, keys, k, v and q of block 0, and the features of finer grids.

        Where there are mask inputs the features are read, else the rest of them.
        """

        def stacked(tensors: Sequence[Tensor]) -> StackedInput:
            return StackedInput(tensors, (bucket.images, *tensors[0].shape[1:]))

        levels = zip(*(embedding.ready_high_res() for embedding in embeddings), strict=True)
        high_res: list[StackedInput | None] = [stacked(level) for level in levels]
        high_res = high_res or [None, None]
        if bucket.with_masks or self._model.resolved_kernels == "reference":
            features = stacked([embedding.ready_features() for embedding in embeddings])
            return [features, None, None, None, None, *high_res]
        projections = [image_projections(parts, embedding).tensors for embedding in embeddings]
        return [None, *map(stacked, zip(*projections, strict=True)), *high_res]

    # Both --------------------------------------------------------------------------------------------------

    def _bucket_of(self, images: int, batch: PromptBatch, multimask_output: bool) -> Bucket | None:
        model = self._model
        eager = torch.is_grad_enabled() or torch.is_autocast_enabled(model.device.type)
        if len(batch) == 0 or (self.replays and eager):
            return None
        with_masks = batch.mask_inputs is not None
        fit = self.limits.fit(images, len(batch), batch.labels.shape[1], multimask_output, with_masks, model.dtype)
        if isinstance(fit, Bucket):
            return fit
        self._warn_once(f"{fit} fit no shape made ready and run eagerly")
        return None

    def _warn_once(self, message: str) -> None:
        """Log why requests run slower than they could."""
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)

    def _decode_padded(
        self,
        features: Tensor | None,
        keys: Tensor | None,
        k: Tensor | None,
        v: Tensor | None,
        q: Tensor | None,
        fine: Tensor | None,
        coarse: Tensor | None,
        coords: Tensor,
        labels: Tensor,
        masks: Tensor | None,
        image_index: Tensor | None,
        *,
        multimask_output: bool,
        kernels: str,
        parts: FusedParts | None = None,
    ) -> tuple[Tensor, ...]:
        encoder = self._model.prompt_encoder
        if parts is None:  # compiled: of the weights that the compiled function is given
            image_pe, packed = encoder.get_dense_pe(), pack_decoder(self._model.mask_decoder)
        else:
            image_pe, packed = parts.image_pe, parts.packed
        dense = encoder.no_mask_embed.weight.view(1, -1, 1, 1) if masks is None else encoder._embed_masks(masks)
        projections = [tensor for tensor in (keys, k, v, q) if tensor is not None]
        decoded = fused_decoder.decode_tokens(
            packed,
            image_pe if features is None else features,  # beside ``projections`` only its grid is read
            image_pe,
            encoder.embed_tokens(coords, labels),
            dense,
            image_index=image_index,
            token_mask=labels != LABEL_ABSENT,
            projections=ImageProjections(*projections) if projections else None,
            high_res=[level for level in (fine, coarse) if level is not None],
            kernels=kernels,
        )
        answer = fused_decoder.choose_masks(decoded, multimask_output, kernels=kernels)
        return answer if decoded.object_scores is None else (*answer, decoded.object_scores[:, 0])

    @cached_property
    def _compiled(self) -> Callable[..., tuple[Tensor, ...]]:
        return torch.compile(self._decode_padded, fullgraph=True, dynamic=False)

    def _wait(self) -> None:
        """Wait for this thread's stream: waiting for the whole device could break another thread's capture."""
        if self._model.device.type == "cuda":
            torch.cuda.current_stream(self._model.device).synchronize()


def _why_not_compiled(encoder: nn.Module, _: int) -> str | None:
    return why_not_compiled("image_encoder", encoder)
