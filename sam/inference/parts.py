"""The parts and sizes of a model that :mod:`sam.inference` reads."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..embedding import ImageEmbedding, ImageFeatures
from ..images.geometry import ImageGeometry
from ..images.prepare import PreparedImage
from ..masks.results import DecodedMasks
from ..modeling.common import uncompiled
from ..modeling.mask_decoder import MaskDecoder
from ..modeling.prompt_encoder import PromptEncoder
from ..prompts.batch import PromptBatch
from ..prompts.layout import PromptLayout
from .buckets import Bucket
from .packed_weights import PackedDecoder


@dataclass(frozen=True)
class FusedParts:
    """The parts that decode one request fused.

    Attributes:
        prompt_encoder: the module; its weights are read as they are.
        image_pe: its encoding of the grid, [1, C, h, w].
        packed: the mask decoder.
        generation: the generation of both; None where autograd records and nothing is kept.
    """

    prompt_encoder: PromptEncoder
    image_pe: Tensor
    packed: PackedDecoder
    generation: Hashable | None


class DecoderRuntime(Protocol):
    """A decoder that is compiled or replayed; :class:`sam.inference.Runtime` is one."""

    @property
    def buckets(self) -> Mapping[Bucket, float]: ...
    @property
    def replays(self) -> bool: ...
    @property
    def why_encoder_not_compiled(self) -> str | None: ...

    def run(
        self, parts: FusedParts, embeddings: Sequence[ImageEmbedding], batch: PromptBatch, multimask_output: bool
    ) -> AbstractContextManager[DecodedMasks | None]: ...


class Model(Protocol):
    """A model as inference sees it; :class:`sam.modeling.promptable.PromptableModel` is one."""

    @property
    def image_encoder(self) -> Any: ...
    @property
    def prompt_encoder(self) -> Any: ...
    @property
    def mask_decoder(self) -> Any: ...
    @property
    def runtime(self) -> DecoderRuntime | None: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def name(self) -> str: ...
    @property
    def known_hash(self) -> str | None: ...
    @property
    def quantization(self) -> str | None: ...
    @property
    def kernels(self) -> str: ...
    @property
    def resolved_kernels(self) -> str: ...
    @property
    def image_size(self) -> int: ...
    @property
    def low_res_size(self) -> tuple[int, int]: ...
    @property
    def low_res_limit(self) -> float | None: ...
    @property
    def prompt_layout(self) -> PromptLayout: ...
    @property
    def token_buckets(self) -> tuple[int, ...]: ...
    @property
    def prompts_per_chunk(self) -> int: ...

    def decode(
        self, embeddings: Sequence[ImageEmbedding], batch: PromptBatch, multimask_output: bool
    ) -> DecodedMasks: ...
    def image_features(self, pixels: Tensor) -> ImageFeatures: ...
    def masks(self, low_res: Tensor, geometry: ImageGeometry, return_logits: bool) -> Tensor: ...
    def embed(self, pixels: Tensor, images: Sequence[PreparedImage]) -> list[ImageEmbedding]: ...
    def encoder_input(self, pixels: Tensor, image: PreparedImage) -> Tensor: ...
    def image_geometry(self, height: int, width: int) -> ImageGeometry: ...
    def check_prepared(self, image: PreparedImage) -> None: ...
    def check_embedding(self, embedding: ImageEmbedding) -> None: ...


def features_sizes(model: Model) -> list[tuple[int, int, int]] | None:
    """Return [C, h, w] of the features of an image that the decoder reads, the embedding first.

    None where a part is a user's own, which need not say what it takes.
    """
    encoder, decoder = uncompiled(model.prompt_encoder), uncompiled(model.mask_decoder)
    if not isinstance(encoder, PromptEncoder):
        return None
    channels, (height, width) = encoder.embed_dim, encoder.image_embedding_size
    sizes = [(channels, height, width)]
    if isinstance(decoder, MaskDecoder) and decoder.use_high_res_features:
        sizes += [(channels // 8, 4 * height, 4 * width), (channels // 4, 2 * height, 2 * width)]
    return sizes
