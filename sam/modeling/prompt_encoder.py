"""The prompt encoder of SAM: points, boxes and masks -> sparse tokens and a dense embedding.

Every sparse prompt is a list of labelled points. A label is one of the constants below; a box is its two
corners, and a prompt without a box ends with one padding point. Encoding happens in fp32 whatever the
model's dtype: bf16 coordinates are 4 px apart at 512..1024.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..prompts.checks import check_mask_inputs
from ..prompts.labels import LABEL_PADDING
from ..prompts.tensors import append_padding_point, box_labels, check_prompts
from .common import Fp32Buffers, LayerNorm2d
from .weight_cache import WeightCache


class PromptEncoder(WeightCache):
    """Embeds prompts given in pixels of the padded square input.

    Attributes:
        takes_corners: points may be corners of boxes, as of SAM 2, whose model sets it.
    """

    takes_corners: bool = False
    __constants__ = ("embed_dim", "input_image_size", "image_embedding_size", "mask_input_size")

    def __init__(
        self,
        embed_dim: int,
        image_embedding_size: tuple[int, int],
        input_image_size: tuple[int, int],
        mask_in_chans: int,
        activation: type[nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.input_image_size = input_image_size
        self.image_embedding_size = image_embedding_size
        self.pe_layer = PositionEmbeddingRandom(embed_dim // 2)

        self.num_point_embeddings = 4  # background, foreground, box top-left, box bottom-right
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, embed_dim) for _ in range(self.num_point_embeddings))
        self.not_a_point_embed = nn.Embedding(1, embed_dim)

        self.mask_input_size = (4 * image_embedding_size[0], 4 * image_embedding_size[1])
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, mask_in_chans // 4, kernel_size=2, stride=2),
            LayerNorm2d(mask_in_chans // 4),
            activation(),
            nn.Conv2d(mask_in_chans // 4, mask_in_chans, kernel_size=2, stride=2),
            LayerNorm2d(mask_in_chans),
            activation(),
            nn.Conv2d(mask_in_chans, embed_dim, kernel_size=1),
        )
        self.no_mask_embed = nn.Embedding(1, embed_dim)

    def get_dense_pe(self) -> Tensor:
        """Return the positional encoding of the image embedding's grid, [1, embed_dim, grid_h, grid_w], fp32."""
        packed = self._fused()
        return self.pe_layer(self.image_embedding_size)[None] if packed is None else packed

    def embed_tokens(self, coords: Tensor, labels: Tensor) -> Tensor:
        """Return the sparse tokens of labelled points.

        Args:
            coords: [P, S, 2] (x, y) in pixels of the padded input.
            labels: [P, S], the ``LABEL_*`` constants.

        Returns:
            [P, S, embed_dim], fp32 (or wider). The rows of absent points are padding tokens.
        """
        encoding = self.pe_layer.forward_with_coords(coords + 0.5, self.input_image_size)
        table = torch.cat([e.weight for e in (self.not_a_point_embed, *self.point_embeddings)])
        learned = table[labels.clamp(min=LABEL_PADDING).long() - LABEL_PADDING]
        positions = torch.where((labels > LABEL_PADDING)[..., None], encoding, 0.0)
        return positions + learned.to(encoding.dtype)

    def _embed_points(self, points: Tensor, labels: Tensor, pad: bool) -> Tensor:
        if not labels.dtype.is_signed:  # as of a mask of clicks; -1 is the padding's
            labels = labels.long()
        if pad:
            points, labels = append_padding_point(points, labels)
        return self.embed_tokens(points, labels)

    def _embed_boxes(self, boxes: Tensor) -> Tensor:
        corners = boxes.reshape(-1, 2, 2)
        return self.embed_tokens(corners, box_labels(corners))

    def _embed_masks(self, masks: Tensor) -> Tensor:
        check_mask_inputs(masks.shape, self.mask_input_size)
        return self._downscale_masks(masks)

    def _downscale_masks(self, masks: Tensor) -> Tensor:
        return self.mask_downscaling(masks.to(self.no_mask_embed.weight.dtype))

    def _get_batch_size(self, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, masks: Tensor | None) -> int:
        for prompts in (points[0] if points is not None else None, boxes, masks):
            if prompts is not None:
                return prompts.shape[0]
        return 1

    def _get_device(self) -> torch.device:
        return self.no_mask_embed.weight.device

    def forward(
        self, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Embed prompts of one kind each, the same number of every kind given.

        Args:
            points: coordinates [P, N, 2] in pixels of the padded input and labels [P, N]: 1 on the object, 0 on the
                background, -1 for padding, and with :attr:`takes_corners` 2 and 3 for the corners of a box.
            boxes: [P, 4] as x0, y0, x1, y1 in pixels of the padded input.
            masks: [P, 1, 4 * grid_h, 4 * grid_w] low-resolution logits.

        Returns:
            sparse [P, tokens, embed_dim] in fp32 and dense [P, embed_dim, grid_h, grid_w] in the weights' dtype.

        Raises:
            ValueError: masks of another size; what :func:`check_prompts` says.
        """
        check_prompts(points, boxes, masks, corners=self.takes_corners)
        prompts = self._get_batch_size(points, boxes, masks)
        sparse = torch.empty((prompts, 0, self.embed_dim), dtype=torch.float32, device=self._get_device())
        if points is not None:
            sparse = torch.cat([sparse, self._embed_points(*points, pad=boxes is None)], dim=1)
        if boxes is not None:
            sparse = torch.cat([sparse, self._embed_boxes(boxes)], dim=1)
        if masks is not None:
            return sparse, self._embed_masks(masks)
        return sparse, self.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(prompts, -1, *self.image_embedding_size)


class PositionEmbeddingRandom(Fp32Buffers):
    """Random Fourier features of positions in the unit square (arXiv 2006.10739).

    The frequency matrix stays in fp32 when the model goes to half precision.
    """

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, num_pos_feats: int = 64, scale: float | None = None) -> None:
        super().__init__()
        if scale is None or scale <= 0.0:
            scale = 1.0
        matrix = nn.init.normal_(torch.empty(2, num_pos_feats, dtype=torch.float32), std=scale)
        self.register_buffer("positional_encoding_gaussian_matrix", matrix)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.positional_encoding_gaussian_matrix.dtype, torch.float32)

    def _pe_encoding(self, coords: Tensor) -> Tensor:
        """Encode coordinates [..., 2] in [0, 1] as [..., 2 * num_pos_feats]."""
        matrix = self.positional_encoding_gaussian_matrix.to(self._dtype)
        coords = 2 * coords.to(self._dtype) - 1
        # Written out, not a matmul: autocast and TF32 would round the coordinates.
        phase = 2 * math.pi * (coords[..., :1] * matrix[0] + coords[..., 1:] * matrix[1])
        return torch.cat([phase.sin(), phase.cos()], dim=-1)

    def forward(self, size: tuple[int, int]) -> Tensor:
        """Encode the centres of a grid of ``size`` (height, width) as [2 * num_pos_feats, height, width]."""
        height, width = size
        device = self.positional_encoding_gaussian_matrix.device
        y = (torch.arange(height, device=device, dtype=self._dtype) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=self._dtype) + 0.5) / width
        centres = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)
        return self._pe_encoding(centres).permute(2, 0, 1)

    def forward_with_coords(self, coords_input: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Encode points [P, S, 2] (x, y) in pixels of an image of ``image_size`` (height, width)."""
        height, width = image_size
        x, y = coords_input.unbind(-1)
        return self._pe_encoding(torch.stack([x / width, y / height], dim=-1))
