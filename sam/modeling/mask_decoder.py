"""The mask decoder of SAM: image embedding and prompt tokens -> low-resolution mask logits and their predicted IoU."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..system.tensors import is_making_graph
from .common import LayerNorm2d
from .transformer import TwoWayTransformer
from .weight_cache import WeightCache


class OutputTokens(NamedTuple):
    """Where the decoder's own tokens stand, which come before those of a prompt.

    Attributes:
        iou: index of the token of the predicted IoU.
        masks: those of the masks, the single mask first.
        total: how many there are.
    """

    iou: int
    masks: slice
    total: int


class MaskDecoder(WeightCache):
    """Predicts ``num_multimask_outputs`` masks for ambiguous prompts and one for unambiguous ones."""

    __constants__ = ("num_multimask_outputs", "num_mask_tokens")

    def __init__(
        self,
        *,
        transformer_dim: int,
        transformer: TwoWayTransformer,
        num_multimask_outputs: int = 3,
        activation: type[nn.Module] = nn.GELU,
        iou_head_depth: int = 3,
        iou_head_hidden_dim: int = 256,
    ) -> None:
        super().__init__()
        self.transformer_dim = transformer_dim
        self.transformer = transformer
        self.num_multimask_outputs = num_multimask_outputs
        self.num_mask_tokens = num_multimask_outputs + 1
        self.iou_token = nn.Embedding(1, transformer_dim)
        self.mask_tokens = nn.Embedding(self.num_mask_tokens, transformer_dim)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(transformer_dim, transformer_dim // 4, kernel_size=2, stride=2),
            LayerNorm2d(transformer_dim // 4),
            activation(),
            nn.ConvTranspose2d(transformer_dim // 4, transformer_dim // 8, kernel_size=2, stride=2),
            activation(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(
            MLP(transformer_dim, transformer_dim, transformer_dim // 8, 3) for _ in range(self.num_mask_tokens)
        )
        self.iou_prediction_head = MLP(transformer_dim, iou_head_hidden_dim, self.num_mask_tokens, iou_head_depth)

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        """Predict masks for P prompts on one image, one prompt on P images, or P images with a prompt each.

        Every input has P rows, or one row that serves all.

        Args:
            image_embeddings: [P or 1, C, h, w] from the image encoder.
            image_pe: [P or 1, C, h, w] positional encoding of its grid.
            sparse_prompt_embeddings: [P or 1, S, C] tokens of points and boxes.
            dense_prompt_embeddings: [P or 1, C, h, w] embedding of the masks.
            multimask_output: three masks for an ambiguous prompt, or the one mask for an unambiguous prompt.

        Returns:
            logits [P, 3 or 1, 4h, 4w] and predicted IoU [P, 3 or 1].

        Raises:
            ValueError: numbers of rows that do not fit together.
        """
        fused = self._fused(
            image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings, multimask_output
        )
        if fused is not None:
            return fused
        masks, iou = self.predict_masks(
            image_embeddings=image_embeddings,
            image_pe=image_pe,
            sparse_prompt_embeddings=sparse_prompt_embeddings,
            dense_prompt_embeddings=dense_prompt_embeddings,
        )
        mask_slice = self.mask_slice(multimask_output)
        return masks[:, mask_slice], iou[:, mask_slice]

    def predict_masks(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """As ``forward``, of all masks: logits [P, 4, 4h, 4w] and predicted IoU [P, 4], the single mask first.

        Every module is called as officially, so hooks, adapters and other modules in their places count.
        """
        _check_rows(
            image_embeddings=image_embeddings,
            image_pe=image_pe,
            sparse_prompt_embeddings=sparse_prompt_embeddings,
            dense_prompt_embeddings=dense_prompt_embeddings,
        )
        tokens, grid = self._tokens(sparse_prompt_embeddings), image_embeddings.shape[-2:]
        source = image_embeddings + dense_prompt_embeddings.to(image_embeddings.dtype)
        # A sum and no comparison, so that a traced graph serves any number of prompts.
        prompts = (source[:, 0, 0, 0] + image_pe[:, 0, 0, 0] + tokens[:, 0, 0]).shape[0]
        each = (prompts, -1, -1, -1)
        pe, tokens = image_pe.to(tokens.dtype).expand(each), tokens.expand(prompts, -1, -1)
        tokens, keys = self.transformer(source.expand(each), pe, tokens)
        upscaled = self.output_upscaling(keys.transpose(1, 2).unflatten(2, grid))
        positions = self.output_tokens
        mask_tokens = tokens[:, positions.masks]
        mlps = self.output_hypernetworks_mlps
        hyper = torch.stack([mlps[i](mask_tokens[:, i]) for i in range(self.num_mask_tokens)], dim=1)
        masks = (hyper @ upscaled.flatten(2)).unflatten(-1, upscaled.shape[-2:])  # [P, M, 4h, 4w]
        return masks, self.iou_prediction_head(tokens[:, positions.iou])

    @property
    def output_tokens(self) -> OutputTokens:
        """Where the decoder's own tokens stand among the tokens of a prompt."""
        return OutputTokens(iou=0, masks=slice(1, 1 + self.num_mask_tokens), total=1 + self.num_mask_tokens)

    @staticmethod
    def mask_slice(multimask_output: bool) -> slice:
        """Return the masks that a call asks for: mask 0 is the single one, the others the alternatives."""
        return slice(1, None) if multimask_output else slice(0, 1)

    def _tokens(self, sparse: Tensor) -> Tensor:
        """Put the output tokens, the predicted IoU's first, before those of prompts: [P, S, C] -> [P, 1 + M + S, C]."""
        output_tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        return torch.cat([output_tokens.expand(sparse.shape[0], -1, -1), sparse.to(output_tokens.dtype)], dim=1)


def _check_rows(**inputs: Tensor) -> None:
    """Raise ``ValueError`` unless all ``inputs`` have as many rows, or one."""
    if is_making_graph():
        return
    rows = {name: x.shape[0] for name, x in inputs.items()}
    if len(set(rows.values()) - {1}) > 1:
        raise ValueError(f"the mask decoder takes one row of an input or as many as of the others, got {rows}")


class MLP(nn.Module):
    """``num_layers`` linears with ReLU between them: [..., input_dim] -> [..., output_dim]."""

    __constants__ = ("num_layers", "sigmoid_output")

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        output_dim: int,
        num_layers: int,
        sigmoid_output: bool = False,
    ) -> None:
        super().__init__()
        self.num_layers = num_layers
        widths = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))
        self.sigmoid_output = sigmoid_output

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        x = self.layers[-1](x)
        return x.sigmoid() if self.sigmoid_output else x
