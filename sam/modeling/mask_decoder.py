"""The mask decoder of SAM: image embedding and prompt tokens -> low-resolution mask logits and their predicted IoU."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsam_kernels import UnsupportedKernelError, UpscalingWeights, hypernetwork_masks, pack_upscaling

from ..system.tensors import is_making_graph
from .common import LayerNorm2d
from .transformer import SharedImageSide, TwoWayTransformer
from .weight_cache import WeightCache


@dataclass(frozen=True)
class DecodedPrompts:
    """P prompts after the transformer: all but their masks, which cost as much again.

    Attributes:
        keys: [P, h * w, C] image tokens as each prompt sees them.
        mask_tokens: [P, M, C], one for each mask the decoder knows, the single mask first.
        iou: [P, M] predicted IoU of each, in the weights' dtype.
        grid: (h, w).
    """

    keys: Tensor
    mask_tokens: Tensor
    iou: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True)
class AnsweredPrompts:
    """P prompts whose M masks are made already: by modules that cannot be asked for a half.

    Attributes:
        logits: [P, M, h, w], the single mask first.
        iou: [P, M] predicted IoU of each.
    """

    logits: Tensor
    iou: Tensor


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
        masks, iou = self.predict_masks(
            image_embeddings=image_embeddings,
            image_pe=image_pe,
            sparse_prompt_embeddings=sparse_prompt_embeddings,
            dense_prompt_embeddings=dense_prompt_embeddings,
        )
        wanted = self.mask_slice(multimask_output)
        return masks[:, wanted], iou[:, wanted]

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
        mask_tokens = tokens[:, 1 : 1 + self.num_mask_tokens]
        masks = self._masks_by_modules(keys, mask_tokens, slice(None), (grid[0], grid[1]))
        return masks, self.iou_prediction_head(tokens[:, 0])

    @staticmethod
    def mask_slice(multimask_output: bool) -> slice:
        """Which of the mask tokens answer: token 0 is the single mask, the others the alternatives."""
        return slice(1, None) if multimask_output else slice(0, 1)

    def share_image_side(self, image_embeddings: Tensor, image_pe: Tensor, no_mask: Tensor) -> SharedImageSide:
        """What prompts without a mask input share of images [I, C, h, w]; ``no_mask`` is that embedding, [1, C]."""
        keys = (image_embeddings + no_mask.view(1, -1, 1, 1)).flatten(2).transpose(1, 2).contiguous()
        return self.transformer.first_block.share_image_side(keys, _tokens_of(image_pe).to(keys.dtype))

    def decode(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse: Tensor,
        dense: Tensor,
        *,
        mask_slice: slice,
        kernels: str = "reference",
        **request: Any,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`decode_tokens`, then :meth:`decode_masks` of every prompt.

        Returns:
            logits [P, masks, 4h, 4w] in at least fp32, in the weights' dtype for "reference"; predicted IoU
            [P, masks] in the weights' dtype.
        """
        decoded = self.decode_tokens(image_embeddings, image_pe, sparse, dense, kernels=kernels, **request)
        return self.decode_masks(decoded, mask_slice, kernels=kernels), decoded.iou[:, mask_slice]

    def decode_tokens(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse: Tensor,
        dense: Tensor,
        *,
        image_index: Tensor | None = None,
        token_mask: Tensor | None = None,
        shared: SharedImageSide | None = None,
        kernels: str = "reference",
    ) -> DecodedPrompts:
        """The transformer on P prompts spread over I images, and the predicted IoU of their masks.

        Args:
            image_embeddings: [I, C, h, w].
            image_pe: [1, C, h, w].
            sparse: [P, S, C].
            dense: [P or 1, C, h, w]; not read where ``shared`` stands for it.
            image_index: [P], int64, the image of each prompt; None for one image, or for an image a prompt.
            token_mask: [P, S], False for tokens that are padding; None when there are none.
            shared: from :meth:`share_image_side`, for prompts without a mask input.
            kernels: implementation of the operations; "auto" resolves for each of them.
        """
        prompts, answers = sparse.shape[0], 1 + self.num_mask_tokens
        tokens = self._tokens(sparse)
        if token_mask is not None:
            token_mask = F.pad(token_mask, (answers, 0), value=True)

        if shared is not None:
            keys = shared.keys
            if image_index is None and len(keys) != prompts:
                image_index = torch.zeros(prompts, dtype=torch.int64, device=keys.device)
        else:
            if image_index is not None:
                image_embeddings = image_embeddings.index_select(0, image_index)
            keys = _tokens_of(image_embeddings + dense.to(image_embeddings.dtype))
            if kernels != "reference":
                keys = keys.contiguous()  # they are read a dozen times, a token at a time
            keys = keys.expand(prompts, -1, -1)
            image_index = None
        key_pe = _tokens_of(image_pe[:1]).to(tokens.dtype)

        tokens, keys = self.transformer.attend(keys, key_pe, tokens, token_mask, shared, image_index, answers, kernels)
        return DecodedPrompts(
            keys=keys,
            mask_tokens=tokens[:, 1 : 1 + self.num_mask_tokens],
            iou=self.iou_prediction_head(tokens[:, 0]),
            grid=(image_embeddings.shape[-2], image_embeddings.shape[-1]),
        )

    def _tokens(self, sparse: Tensor) -> Tensor:
        """Those that will answer, the predicted IoU's first, and a prompt's: [P, S, C] -> [P, 1 + M + S, C]."""
        answers = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        return torch.cat([answers.expand(sparse.shape[0], -1, -1), sparse.to(answers.dtype)], dim=1)

    def decode_masks(
        self, decoded: DecodedPrompts, mask_slice: slice, rows: Tensor | None = None, kernels: str = "reference"
    ) -> Tensor:
        """Low-resolution logits of decoded prompts, of those in ``rows`` only, an int64 index, where it is given.

        What is not asked for costs nothing: upscaling is 45 % of the decoder's work.

        Returns:
            [P or rows, masks, 4h, 4w] in at least fp32, in the weights' dtype for "reference".
        """
        keys, mask_tokens, dtype = decoded.keys, decoded.mask_tokens, self.iou_token.weight.dtype
        if rows is not None:
            keys, mask_tokens = keys.index_select(0, rows), mask_tokens.index_select(0, rows)
        if kernels == "reference" or not self._has_official_upscaling(kernels):
            return self._masks_by_modules(keys, mask_tokens, mask_slice, decoded.grid)
        return hypernetwork_masks(
            keys.to(dtype),
            self._upscaling(),
            self._hypernetworks(mask_tokens, mask_slice).to(dtype),  # autocast may have narrowed it
            grid=decoded.grid,
            eps=self.output_upscaling[1].eps,  # type: ignore[arg-type]
            out_dtype=torch.promote_types(dtype, torch.float32),
            kernels=kernels,
        )

    def _masks_by_modules(self, keys: Tensor, mask_tokens: Tensor, mask_slice: slice, grid: tuple[int, int]) -> Tensor:
        upscaled = self.output_upscaling(keys.transpose(1, 2).unflatten(2, grid))
        asked_for = range(self.num_mask_tokens)[mask_slice]
        hyper = torch.stack([self.output_hypernetworks_mlps[i](mask_tokens[:, i]) for i in asked_for], dim=1)
        return (hyper @ upscaled.flatten(2)).unflatten(-1, upscaled.shape[-2:])  # [P, masks, 4h, 4w]

    def _hypernetworks(self, mask_tokens: Tensor, mask_slice: slice) -> Tensor:
        """The MLPs of the masks asked for as one batched product a layer: [P, all masks, C] -> [P, masks, C / 8]."""
        mlps = [self.output_hypernetworks_mlps[i] for i in range(self.num_mask_tokens)[mask_slice]]
        layers = list(zip(*(mlp.layers for mlp in mlps), strict=True))

        def stack() -> list[tuple[Tensor, Tensor]]:
            return [
                (
                    torch.stack([linear.weight.t() for linear in layer]),  # [masks, in, out]
                    torch.stack([linear.bias for linear in layer])[:, None],  # [masks, 1, out]
                )
                for layer in layers
            ]

        sources = [parameter for mlp in mlps for parameter in mlp.parameters()]
        stacked = self.packed(f"hypernetworks {mask_slice.start}:{mask_slice.stop}", stack, *sources)
        x = mask_tokens[:, mask_slice].transpose(0, 1)
        for index, (weight, bias) in enumerate(stacked):
            x = torch.baddbmm(bias, x, weight)
            if index < len(stacked) - 1:
                x = x.relu()
        return x.transpose(0, 1)

    def _upscaling(self) -> UpscalingWeights:
        first, norm, _, second, _ = self.output_upscaling
        weights = [getattr(layer, name) for layer in (first, norm, second) for name in ("weight", "bias")]
        return self.packed("upscaling", lambda: pack_upscaling(*weights), *weights)

    def _has_official_upscaling(self, kernels: str) -> bool:
        """Whether ``output_upscaling`` is what the operation computes; another activation runs as modules."""
        official = (nn.ConvTranspose2d, LayerNorm2d, nn.GELU, nn.ConvTranspose2d, nn.GELU)
        layers = list(self.output_upscaling)
        if [type(layer) for layer in layers] == list(official) and all(
            layer.approximate == "none" for layer in layers if isinstance(layer, nn.GELU)
        ):
            return True
        if kernels == "triton":
            raise UnsupportedKernelError(
                "hypernetwork_masks has a Triton form for the official upscaling with GELU only"
            )
        return False


def _check_rows(**inputs: Tensor) -> None:
    """Raise ``ValueError`` unless all ``inputs`` have as many rows, or one."""
    if is_making_graph():
        return
    rows = {name: x.shape[0] for name, x in inputs.items()}
    if len(set(rows.values()) - {1}) > 1:
        raise ValueError(f"the mask decoder takes one row of an input or as many as of the others, got {rows}")


def _tokens_of(x: Tensor) -> Tensor:
    """[I, C, h, w] -> [I, h * w, C]"""
    return x.flatten(2).transpose(1, 2)


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
