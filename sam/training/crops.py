"""A model on square crops of its canvas: the same weights on fewer tokens, differentiable.

A crop is a whole number of patches at a place on the model's canvas. It sees its part of the absolute position
table, the middle of the relative ones, and the positional encoding of its place, so what is learnt on crops holds
for the whole canvas. A crop of 224 px fills one window of 14 tokens and one of 448 px four, where the 32 x 32
tokens of the whole canvas are padded to 42 x 42.

Another way to cheap pictures is to train patch 8 on 256 px, which equals patch 16 on the same picture enlarged
twice. It has as many tokens, so it saves only the drawing, and such a model never sees detail finer than 256 px;
scenes are drawn at 512 px here instead.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..config import SamConfig
from ..inference.fused_decoder import decode, project_images
from ..inference.fused_encoder import encode
from ..inference.packed_weights import pack_decoder
from ..modeling.build import build_empty
from ..modeling.image_encoder import ImageEncoderViT
from ..modeling.promptable import PromptableModel


class _FusedEncoder(nn.Module):
    """An image encoder as a module that ``functional_call`` gives other weights."""

    def __init__(self, encoder: ImageEncoderViT) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor) -> Tensor:
        return encode(self.encoder, pixels, "torch")


@lru_cache
def _shapes_of(config: SamConfig) -> _FusedEncoder:
    return _FusedEncoder(build_empty(config).image_encoder)


class CropModel:
    """Run ``model`` on crops of ``size`` pixels whose top left patch is ``origin`` (row, column)."""

    def __init__(self, model: PromptableModel, size: int, origin: tuple[int, int] = (0, 0)) -> None:
        config = model.config
        if config is None or size % config.patch_size or not 0 < size <= config.image_size:
            raise ValueError(f"a crop must be a positive number of patches inside the model's canvas, got {size} px")
        grid = size // config.patch_size
        last = config.grid_size - grid
        if not all(0 <= start <= last for start in origin):
            raise ValueError(f"a crop of {grid} patches must start at 0..{last}, got {origin}")
        self.model, self.size, self.grid, self.origin = model, size, grid, origin
        self._config = config
        self._offset = config.patch_size * torch.tensor(
            [origin[1], origin[0]], dtype=torch.float32, device=model.device
        )

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode normalised pixels [B, 3, size, size] to features [B, C, grid, grid]."""
        encoder = self.model.image_encoder
        if self.size == self._config.image_size:
            return encode(encoder, pixels, "torch")
        shapes = _shapes_of(self._config.with_image_size(self.size))
        weights = {f"encoder.{name}": weight for name, weight in self._cropped_weights().items()}
        return functional_call(shapes, weights, (pixels,))

    def _cropped_weights(self) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = dict(self.model.image_encoder.named_parameters())
        row, column = self.origin
        weights["pos_embed"] = weights["pos_embed"][:, row : row + self.grid, column : column + self.grid]
        cut = self._config.grid_size - self.grid
        for block in self._config.global_attn_indexes:
            for axis in "hw":
                name = f"blocks.{block}.attn.rel_pos_{axis}"
                weights[name] = weights[name][cut : len(weights[name]) - cut]
        return weights

    def decode(
        self, features: Tensor, coords: Tensor, labels: Tensor, image_index: Tensor, mask_inputs: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Decode all four masks of N prompts on the pictures of ``features`` [B, C, grid, grid].

        Args:
            coords: [N, S, 2] (x, y) in pixels of the crop.
            labels: [N, S].
            image_index: [N] int64.
            mask_inputs: [N, 4 * grid, 4 * grid] logits of an earlier round, or None.

        Returns:
            logits [N, 4, 4 * grid, 4 * grid] and predicted IoU [N, 4], the single mask first.
        """
        encoder, decoder = self.model.prompt_encoder, self.model.mask_decoder
        row, column = self.origin
        image_pe = encoder.get_dense_pe()[..., row : row + self.grid, column : column + self.grid]
        sparse = encoder.embed_tokens(coords + self._offset, labels)
        packed, projections = pack_decoder(decoder), None
        if mask_inputs is None:
            dense = encoder.no_mask_embed.weight.view(1, -1, 1, 1)
            projections = project_images(packed, features, image_pe, encoder.no_mask_embed.weight)
        else:
            dense = encoder._downscale_masks(mask_inputs[:, None])
        return decode(
            packed,
            features,
            image_pe,
            sparse,
            dense,
            mask_slice=slice(None),
            image_index=image_index,
            projections=projections,
            kernels="torch",
        )
