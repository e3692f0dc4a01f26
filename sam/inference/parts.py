"""What :mod:`sam.inference` takes of a model: its parts and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..embedding import ImageEmbedding
from ..images.geometry import ImageGeometry
from ..images.prepare import PreparedImage
from ..prompts.batch import PromptBatch

if TYPE_CHECKING:
    from .runtime import Runtime


class Model(Protocol):
    """A model as inference sees it; :class:`sam.modeling.Sam` is one."""

    image_encoder: Any
    prompt_encoder: Any
    mask_decoder: Any
    runtime: Runtime | None

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def name(self) -> str: ...
    @property
    def known_hash(self) -> str | None: ...
    @property
    def kernels(self) -> str: ...
    @property
    def resolved_kernels(self) -> str: ...
    @property
    def image_size(self) -> int: ...
    @property
    def low_res_size(self) -> tuple[int, int]: ...
    @property
    def prompts_per_chunk(self) -> int: ...

    def decode(
        self, embeddings: Sequence[ImageEmbedding], batch: PromptBatch, multimask_output: bool
    ) -> tuple[Tensor, Tensor]: ...
    def masks(self, low_res: Tensor, geometry: ImageGeometry, return_logits: bool) -> Tensor: ...
    def embed(self, pixels: Tensor, images: Sequence[PreparedImage]) -> list[ImageEmbedding]: ...
    def encoder_input(self, pixels: Tensor, image: PreparedImage) -> Tensor: ...
    def image_geometry(self, height: int, width: int) -> ImageGeometry: ...
    def check_prepared(self, image: PreparedImage) -> None: ...
    def check_embedding(self, embedding: ImageEmbedding) -> None: ...
