"""The mask decoder on packed weights: transformer and predicted IoU first, then the selected masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsam_kernels import UnsupportedKernelError, choice_for, hypernetwork_masks
from fastsam_kernels.hypernetwork_masks import masks_of_products

from ..embedding import ImageProjections
from ..modeling.mask_decoder import MaskDecoder, stability_of
from .fused_transformer import attend_finally, project_image, run_transformer
from .low_rank_tokens import LowRankKeys
from .packed_weights import PackedDecoder


@dataclass(frozen=True)
class DecodedPrompts:
    """P prompts after the transformer: all but their masks, which cost as much again.

    Attributes:
        keys: image tokens as each prompt sees them, [P, h * w, C] or not made.
        mask_tokens: [P, M, C], one for each mask the decoder knows, the single mask first; before the final attention
            where image tokens are not made.
        iou: [P, M] their predicted IoU, in the weights' dtype.
        grid: (h, w).
        packed: the weights that decoded them, for the second half.
        object_scores: logits [P, 1] of whether the object is seen; None where the decoder predicts none.
        high_res: features of finer grids [I, C / 8, 4h, 4w] and [I, C / 4, 2h, 2w]; None where the decoder adds none.
        image_index: [P] int64, the image of each prompt; None for one image, or one image per prompt.
    """

    keys: Tensor | LowRankKeys
    mask_tokens: Tensor
    iou: Tensor
    grid: tuple[int, int]
    packed: PackedDecoder
    object_scores: Tensor | None = None
    high_res: tuple[Tensor, Tensor] | None = None
    image_index: Tensor | None = None

    @classmethod
    def of(
        cls,
        packed: PackedDecoder,
        keys: Tensor | LowRankKeys,
        tokens: Tensor,
        grid: tuple[int, int],
        high_res: Sequence[Tensor],
        image_index: Tensor | None = None,
    ) -> DecodedPrompts:
        """Predict IoU and object scores of prompts of image tokens ``keys`` and output tokens [P, T, C]."""
        positions, predict_scores = packed.positions, packed.predict_object_scores
        at = positions.object_score
        return cls(
            keys=keys,
            mask_tokens=tokens[:, positions.masks],
            iou=packed.predict_iou(tokens[:, positions.iou]),
            grid=grid,
            packed=packed,
            object_scores=None if predict_scores is None or at is None else predict_scores(tokens[:, at]),
            high_res=(high_res[0], high_res[1]) if high_res else None,
            image_index=image_index,
        )


def project_images(
    packed: PackedDecoder, image_embeddings: Tensor, image_pe: Tensor, no_mask: Tensor
) -> ImageProjections:
    """Project images for block 0, as prompts without a mask input share them.

    Args:
        packed: the weights.
        image_embeddings: [I, C, h, w].
        image_pe: [1, C, h, w].
        no_mask: the embedding of no mask input, [1, C].
    """
    keys = (image_embeddings + no_mask.view(1, -1, 1, 1)).flatten(2).transpose(1, 2).contiguous()
    return project_image(packed.blocks[0], keys, _tokens_of(image_pe).to(keys.dtype))


def decode(
    packed: PackedDecoder,
    image_embeddings: Tensor,
    image_pe: Tensor,
    sparse: Tensor,
    dense: Tensor,
    *,
    mask_slice: slice,
    kernels: str = "reference",
    **request: Any,
) -> tuple[Tensor, Tensor]:
    """Run :func:`decode_tokens`, then :func:`decode_masks` on every prompt.

    Returns:
        logits [P, masks, 4h, 4w] in at least fp32, in the weights' dtype for "reference"; predicted IoU [P, masks] in
        the weights' dtype.
    """
    decoded = decode_tokens(packed, image_embeddings, image_pe, sparse, dense, kernels=kernels, **request)
    return decode_masks(decoded, mask_slice, kernels=kernels), decoded.iou[:, mask_slice]


def decode_tokens(
    packed: PackedDecoder,
    image_embeddings: Tensor,
    image_pe: Tensor,
    sparse: Tensor,
    dense: Tensor,
    *,
    image_index: Tensor | None = None,
    token_mask: Tensor | None = None,
    projections: ImageProjections | None = None,
    high_res: Sequence[Tensor] = (),
    kernels: str = "reference",
) -> DecodedPrompts:
    """Run the transformer on P prompts spread over I images, and predict the IoU of their masks.

    Args:
        packed: the weights.
        image_embeddings: [I, C, h, w].
        image_pe: [1, C, h, w].
        sparse: [P, S, C].
        dense: [P or 1, C, h, w]; not read where ``projections`` stand for it.
        image_index: [P], int64, the image of each prompt; None for one image, or for one image per prompt.
        token_mask: [P, S], False for tokens that are padding; None when there are none.
        projections: from :func:`project_images`, for prompts without a mask input.
        high_res: SAM 2's features of finer grids, [I, C / 8, 4h, 4w] and [I, C / 4, 2h, 2w].
        kernels: implementation of the operations; "auto" resolves for each of them.
    """
    if len(high_res) != 2 * packed.takes_high_res:
        expected = "two maps of high-resolution features" if packed.takes_high_res else "no high-resolution features"
        raise ValueError(f"this mask decoder takes {expected}, got {len(high_res)}")
    prompts, positions, image_of = sparse.shape[0], packed.positions, image_index
    output_tokens = packed.output_tokens.expand(prompts, -1, -1)
    tokens = torch.cat([output_tokens, sparse.to(packed.dtype)], dim=1)
    if token_mask is not None:
        token_mask = F.pad(token_mask, (positions.total, 0), value=True)

    if projections is not None:
        keys = projections.keys
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

    tokens, keys = run_transformer(
        packed, keys, key_pe, tokens, token_mask, projections, image_index, positions.total, kernels
    )
    grid = image_embeddings.shape[-2], image_embeddings.shape[-1]
    return DecodedPrompts.of(packed, keys, tokens, grid, high_res, image_of)


def choose_masks(
    decoded: DecodedPrompts, multimask_output: bool, rows: Tensor | None = None, kernels: str = "reference"
) -> tuple[Tensor, Tensor]:
    """Make the masks that a call returns, as :meth:`MaskDecoder.choose_masks` chooses them.

    The predicted IoU is known before them, so of a single mask that may have to give way two are made and not four.

    Args, errors: as :func:`decode_masks`.

    Returns:
        logits [P or rows, 3 or 1, 4h, 4w] and their predicted IoU [P or rows, 3 or 1].
    """
    iou = decoded.iou if rows is None else decoded.iou.index_select(0, rows)
    stability, masks = decoded.packed.stability, MaskDecoder.mask_slice(multimask_output)
    if multimask_output or stability is None:
        return decode_masks(decoded, masks, rows, kernels), iou[:, masks]
    best = 1 + iou[:, 1:].argmax(dim=1, keepdim=True)
    pair = torch.cat([torch.zeros_like(best), best], dim=1)
    logits, iou = decode_masks(decoded, pair, rows, kernels), iou.gather(1, pair)
    stable = stability_of(logits[:, :1], stability.delta) >= stability.threshold
    chosen = torch.where(stable[..., None, None], logits[:, :1], logits[:, 1:])
    return chosen, torch.where(stable, iou[:, :1], iou[:, 1:])


def decode_masks(
    decoded: DecodedPrompts, masks: slice | Tensor, rows: Tensor | None = None, kernels: str = "reference"
) -> Tensor:
    """Make low-resolution logits of decoded prompts, or only of those in ``rows``, an int64 index.

    What is left out costs nothing: upscaling is 45 % of the decoder's work.

    Args:
        decoded: from :func:`decode_tokens`.
        masks: those of every prompt, or for each its own, [P or rows, masks] int64.
        rows: [rows] int64.
        kernels: implementation of the operations.

    Returns:
        [P or rows, masks, 4h, 4w] in at least fp32, in the weights' dtype for "reference".

    Raises:
        UnsupportedKernelError: "triton" for an upscaling that is not the official one.
    """
    packed, keys, mask_tokens = decoded.packed, decoded.keys, decoded.mask_tokens
    high_res, image_index = decoded.high_res, decoded.image_index
    if rows is not None:
        keys = keys.select(rows) if isinstance(keys, LowRankKeys) else keys.index_select(0, rows)
        mask_tokens = mask_tokens.index_select(0, rows)
        if image_index is not None:
            image_index = image_index.index_select(0, rows)
        elif high_res is not None and len(high_res[0]) > 1:
            image_index = rows
    if isinstance(keys, LowRankKeys):
        assert packed.upscaling is not None
        began = packed.output_tokens[packed.positions.masks]
        mask_tokens = attend_finally(packed, mask_tokens, began, keys.prompts)
        hyper, eps, dtype = hypernetworks(packed, mask_tokens, masks), packed.upscaling_eps, packed.logits_dtype
        first = keys.first_product(packed.upscaling)
        return masks_of_products(first, packed.upscaling, hyper, decoded.grid, eps, dtype, high_res)
    if packed.upscaling is None and choice_for(kernels, "hypernetwork_masks") == "triton":
        raise UnsupportedKernelError(
            "the 'triton' implementation of hypernetwork_masks takes the official upscaling only"
        )
    if kernels == "reference" or packed.upscaling is None:
        return masks_by_modules(packed, keys, mask_tokens, masks, decoded.grid, high_res, image_index)
    return hypernetwork_masks(
        keys.to(packed.dtype),
        packed.upscaling,
        hypernetworks(packed, mask_tokens, masks).to(packed.dtype),  # autocast may have narrowed it
        grid=decoded.grid,
        eps=packed.upscaling_eps,
        out_dtype=packed.logits_dtype,
        high_res=None if high_res is None else (high_res[0].to(packed.dtype), high_res[1].to(packed.dtype)),
        image_index=image_index,
        kernels=kernels,
    )


def masks_by_modules(
    packed: PackedDecoder,
    keys: Tensor,
    mask_tokens: Tensor,
    masks: slice | Tensor,
    grid: tuple[int, int],
    high_res: tuple[Tensor, Tensor] | None = None,
    image_index: Tensor | None = None,
) -> Tensor:
    """Make logits [P, masks, 4h, 4w] by the official modules."""
    if high_res is not None and image_index is not None:
        high_res = high_res[0].index_select(0, image_index), high_res[1].index_select(0, image_index)
    upscaled = packed.upscale(keys.transpose(1, 2).unflatten(2, grid), high_res or ())
    indices = range(len(packed.mask_mlps))[masks if isinstance(masks, slice) else slice(None)]
    hyper = torch.stack([packed.mask_mlps[index](mask_tokens[:, index]) for index in indices], dim=1)
    hyper = hyper if isinstance(masks, slice) else _gather(hyper, masks)
    return (hyper @ upscaled.flatten(2)).unflatten(-1, upscaled.shape[-2:])


def hypernetworks(packed: PackedDecoder, mask_tokens: Tensor, masks: slice | Tensor) -> Tensor:
    """Run the MLPs of ``masks`` as one batched product per layer: [P, M, C] -> [P, masks, C / 8].

    Where each prompt has masks of its own, [P, masks] int64, all are run: they cost next to nothing.
    """
    mask_slice = masks if isinstance(masks, slice) else slice(None)
    x = mask_tokens[:, mask_slice].transpose(0, 1)
    start, stop, _ = mask_slice.indices(mask_tokens.shape[1])
    layers = packed.hypernetworks[start, stop]
    for index, (weight, bias) in enumerate(layers):
        x = torch.baddbmm(bias, x, weight)
        if index < len(layers) - 1:
            x = x.relu()
    x = x.transpose(0, 1)
    return x if isinstance(masks, slice) else _gather(x, masks)


def _gather(vectors: Tensor, masks: Tensor) -> Tensor:
    """Return the vectors [P, M, D] of each prompt's masks [P, masks]: [P, masks, D]."""
    return vectors.gather(1, masks[..., None].expand(-1, -1, vectors.shape[2]))


def _tokens_of(x: Tensor) -> Tensor:
    """Turn a feature map into tokens: [I, C, h, w] -> [I, h * w, C]."""
    return x.flatten(2).transpose(1, 2)
