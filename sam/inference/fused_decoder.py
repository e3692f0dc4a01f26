"""The mask decoder on packed weights: transformer and predicted IoU first, then the masks that are wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsam_kernels import UnsupportedKernelError, choice_for, hypernetwork_masks

from ..embedding import ImageProjections
from .fused_transformer import project_image, run_transformer
from .packed_weights import PackedDecoder


@dataclass(frozen=True)
class DecodedPrompts:
    """P prompts after the transformer: all but their masks, which cost as much again.

    Attributes:
        keys: [P, h * w, C] image tokens as each prompt sees them.
        mask_tokens: [P, M, C], one for each mask the decoder knows, the single mask first.
        iou: [P, M] predicted IoU of each, in the weights' dtype.
        grid: (h, w).
        packed: the weights that decoded them, for the second half.
    """

    keys: Tensor
    mask_tokens: Tensor
    iou: Tensor
    grid: tuple[int, int]
    packed: PackedDecoder


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
        kernels: implementation of the operations; "auto" resolves for each of them.
    """
    prompts, positions = sparse.shape[0], packed.positions
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
    return DecodedPrompts(
        keys=keys,
        mask_tokens=tokens[:, positions.masks],
        iou=packed.predict_iou(tokens[:, positions.iou]),
        grid=(image_embeddings.shape[-2], image_embeddings.shape[-1]),
        packed=packed,
    )


def decode_masks(
    decoded: DecodedPrompts, mask_slice: slice, rows: Tensor | None = None, kernels: str = "reference"
) -> Tensor:
    """Make low-resolution logits of decoded prompts, or only of those in ``rows``, an int64 index.

    What is left out costs nothing: upscaling is 45 % of the decoder's work.

    Returns:
        [P or rows, masks, 4h, 4w] in at least fp32, in the weights' dtype for "reference".

    Raises:
        UnsupportedKernelError: "triton" for an upscaling that is not the official one.
    """
    packed, keys, mask_tokens = decoded.packed, decoded.keys, decoded.mask_tokens
    if rows is not None:
        keys, mask_tokens = keys.index_select(0, rows), mask_tokens.index_select(0, rows)
    if packed.upscaling is None and choice_for(kernels, "hypernetwork_masks") == "triton":
        raise UnsupportedKernelError(
            "the 'triton' implementation of hypernetwork_masks takes the official upscaling only"
        )
    if kernels == "reference" or packed.upscaling is None:
        return masks_by_modules(packed, keys, mask_tokens, mask_slice, decoded.grid)
    return hypernetwork_masks(
        keys.to(packed.dtype),
        packed.upscaling,
        hypernetworks(packed, mask_tokens, mask_slice).to(packed.dtype),  # autocast may have narrowed it
        grid=decoded.grid,
        eps=packed.upscaling_eps,
        out_dtype=packed.logits_dtype,
        kernels=kernels,
    )


def masks_by_modules(
    packed: PackedDecoder, keys: Tensor, mask_tokens: Tensor, mask_slice: slice, grid: tuple[int, int]
) -> Tensor:
    """Make logits [P, masks, 4h, 4w] by the official modules."""
    upscaled = packed.upscale(keys.transpose(1, 2).unflatten(2, grid))
    indices = range(len(packed.mask_mlps))[mask_slice]
    hyper = torch.stack([packed.mask_mlps[index](mask_tokens[:, index]) for index in indices], dim=1)
    return (hyper @ upscaled.flatten(2)).unflatten(-1, upscaled.shape[-2:])


def hypernetworks(packed: PackedDecoder, mask_tokens: Tensor, mask_slice: slice) -> Tensor:
    """Run the MLPs of the masks in ``mask_slice`` as one batched product per layer: [P, M, C] -> [P, masks, C / 8]."""
    x = mask_tokens[:, mask_slice].transpose(0, 1)
    start, stop, _ = mask_slice.indices(mask_tokens.shape[1])
    layers = packed.hypernetworks[start, stop]
    for index, (weight, bias) in enumerate(layers):
        x = torch.baddbmm(bias, x, weight)
        if index < len(layers) - 1:
            x = x.relu()
    return x.transpose(0, 1)


def _tokens_of(x: Tensor) -> Tensor:
    """Turn a feature map into tokens: [I, C, h, w] -> [I, h * w, C]."""
    return x.flatten(2).transpose(1, 2)
