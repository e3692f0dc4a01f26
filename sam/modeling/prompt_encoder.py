"""The prompt encoder of SAM: points, boxes and masks -> sparse tokens and a dense embedding.

Every sparse prompt is a list of labelled points. A label is one of the constants below; a box is its two
corners, and a prompt without a box ends with one padding point. Encoding happens in fp32 whatever the
model's dtype: bf16 coordinates are 4 px apart at 512..1024.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .common import DerivedWeights, Fp32Buffers, LayerNorm2d, is_as_written, is_making_graph, is_plain

LABEL_ABSENT = -2  # fills the token list of a shorter prompt; masked out of every attention
LABEL_PADDING = -1  # the "not a point" token
LABEL_BACKGROUND = 0
LABEL_FOREGROUND = 1
LABEL_BOX_TOP_LEFT = 2
LABEL_BOX_BOTTOM_RIGHT = 3

MAX_COORDINATE = 1e30  # pixels; what fp32 makes of them on the way to a token is finite
_POINT_LABELS = (LABEL_PADDING, LABEL_BACKGROUND, LABEL_FOREGROUND)


class PromptEncoder(DerivedWeights):
    """Embeds prompts given in pixels of the padded square input."""

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

    @property
    def is_official(self) -> bool:
        """Whether :meth:`embed_tokens` computes what ``forward`` does, which a user may have changed."""
        official = type(self) is PromptEncoder and type(self.pe_layer) is PositionEmbeddingRandom
        return official and is_as_written(self)

    def get_dense_pe(self) -> Tensor:
        """The positional encoding of the image embedding's grid, [1, embed_dim, grid_h, grid_w], fp32."""
        height, width = self.image_embedding_size  # programs change it to feed images of another size
        return self.derived(
            f"dense_pe {height}x{width}",
            lambda: self.pe_layer((height, width))[None],
            self.pe_layer.positional_encoding_gaussian_matrix,
        )

    def embed_tokens(self, coords: Tensor, labels: Tensor) -> Tensor:
        """Sparse tokens of labelled points.

        Args:
            coords: [P, S, 2] (x, y) in pixels of the padded input.
            labels: [P, S], the ``LABEL_*`` constants.

        Returns:
            [P, S, embed_dim], fp32 (or wider). The rows of absent points are padding tokens.
        """
        encoding = self.pe_layer.forward_with_coords(coords + 0.5, self.input_image_size)
        table = torch.cat([e.weight for e in (self.not_a_point_embed, *self.point_embeddings)])
        learned = table[labels.clamp(min=LABEL_PADDING).long() - LABEL_PADDING]
        located = torch.where((labels > LABEL_PADDING)[..., None], encoding, 0.0)
        return located + learned.to(encoding.dtype)

    def _embed_points(self, points: Tensor, labels: Tensor, pad: bool) -> Tensor:
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
            points: coordinates [P, N, 2] in pixels of the padded input and labels [P, N].
            boxes: [P, 4] as x0, y0, x1, y1 in pixels of the padded input.
            masks: [P, 1, 4 * grid_h, 4 * grid_w] low-resolution logits.

        Returns:
            sparse [P, tokens, embed_dim] in fp32 and dense [P, embed_dim, grid_h, grid_w] in the weights' dtype.

        Raises:
            ValueError: masks of another size; what :func:`check_prompts` says.
        """
        check_prompts(points, boxes, masks)
        prompts = self._get_batch_size(points, boxes, masks)
        sparse = torch.empty((prompts, 0, self.embed_dim), dtype=torch.float32, device=self._get_device())
        if points is not None:
            sparse = torch.cat([sparse, self._embed_points(*points, pad=boxes is None)], dim=1)
        if boxes is not None:
            sparse = torch.cat([sparse, self._embed_boxes(boxes)], dim=1)
        if masks is not None:
            return sparse, self._embed_masks(masks)
        return sparse, self.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(prompts, -1, *self.image_embedding_size)


def append_padding_point(points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Points [P, N, 2] and labels [P, N] with the one padding point that a prompt without a box ends with."""
    padded_points = torch.cat([points, points.new_zeros(points.shape[0], 1, 2)], dim=1)
    padding = labels.new_full((labels.shape[0], 1), LABEL_PADDING)
    return padded_points, torch.cat([labels, padding], dim=1)


def box_labels(corners: Tensor) -> Tensor:
    """Labels [P, 2] of box corners [P, 2, 2]."""
    pair = torch.arange(LABEL_BOX_TOP_LEFT, LABEL_BOX_BOTTOM_RIGHT + 1, device=corners.device)
    return pair.expand(corners.shape[0], 2)


def as_array(values: Any) -> np.ndarray:
    """``values`` on the host, without a copy where there can be."""
    if not isinstance(values, Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()  # numpy has no bf16


def check_finite(name: str, values: np.ndarray | Tensor) -> None:
    """Raise ``ValueError`` naming the first value of ``values`` that is NaN or infinite."""
    array = as_array(values)
    _check(name, "be finite", array, np.isfinite(array))


def check_coordinates(name: str, values: np.ndarray | Tensor) -> None:
    """Raise ``ValueError`` naming the first of ``values`` that is no finite number within ``MAX_COORDINATE`` of 0."""
    check_finite(name, values)
    array = np.asarray(as_array(values), np.float64)  # fp16 cannot be compared with the limit
    _check(name, f"lie within {MAX_COORDINATE:g} px of 0", array, np.abs(array) <= MAX_COORDINATE)


def _check(name: str, rule: str, array: np.ndarray, good: np.ndarray) -> None:
    if not good.all():
        where = tuple(int(i) for i in np.argwhere(~good)[0])
        raise ValueError(f"{name} must {rule}, got {array[where]} at index {list(where)}")


def check_labels(labels: np.ndarray | Tensor) -> None:
    """Raise ``ValueError`` naming the first label outside {-1, 0, 1}."""
    array = as_array(labels)
    bad = np.logical_and.reduce([array != label for label in _POINT_LABELS])
    if bad.any():
        raise ValueError(f"labels must be 1 (object), 0 (background) or -1 (padding), got {array[bad].flat[0]}")


def check_mask_inputs(shape: Sequence[int], low_res_size: tuple[int, int]) -> None:
    """Raise ``ValueError`` unless masks of ``shape`` [..., h, w] are what the model takes."""
    height, width = low_res_size
    if tuple(shape[-2:]) != (height, width):
        raise ValueError(
            f"mask_input must be low-resolution logits of {height}x{width} px for this model, "
            f"got {'x'.join(map(str, shape[-2:]))}"
        )


def check_prompts(points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, masks: Tensor | None) -> None:
    """Raise ``ValueError`` for prompts of values that no model takes.

    Values elsewhere than on the CPU are not read back; those of a graph that is made or of ``torch.func`` cannot be.
    """
    for name, values, check in (
        ("points", points and points[0], check_coordinates),
        ("boxes", boxes, check_coordinates),
        ("mask_inputs", masks, check_finite),
    ):
        if values is not None and _readable(values):
            check(name, values)
    if points is not None and _readable(points[1]):
        check_labels(points[1])


def _readable(values: Tensor) -> bool:
    if is_making_graph():
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(values):
        return False
    return is_plain(values) and values.device.type == "cpu"


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
        """[..., 2] coordinates in [0, 1] -> [..., 2 * num_pos_feats]."""
        matrix = self.positional_encoding_gaussian_matrix.to(self._dtype)
        coords = 2 * coords.to(self._dtype) - 1
        # Written out, not a matmul: autocast and TF32 would round the coordinates.
        phase = 2 * math.pi * (coords[..., :1] * matrix[0] + coords[..., 1:] * matrix[1])
        return torch.cat([phase.sin(), phase.cos()], dim=-1)

    def forward(self, size: tuple[int, int]) -> Tensor:
        """Encoding of the centres of a grid of ``size`` (height, width): [2 * num_pos_feats, height, width]."""
        height, width = size
        device = self.positional_encoding_gaussian_matrix.device
        y = (torch.arange(height, device=device, dtype=self._dtype) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=self._dtype) + 0.5) / width
        centres = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)
        return self._pe_encoding(centres).permute(2, 0, 1)

    def forward_with_coords(self, coords_input: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Encoding of [P, S, 2] (x, y) pixels in an image of ``image_size`` (height, width)."""
        height, width = image_size
        x, y = coords_input.unbind(-1)
        return self._pe_encoding(torch.stack([x / width, y / height], dim=-1))
