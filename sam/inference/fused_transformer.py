"""The two-way transformer on packed weights: several prompts of several images, padded tokens, absorbed projections.

P prompts, T tokens per prompt, I images, N image tokens, C channels, D channels inside an attention. Weight absorption
moves the projections of the image into the few tokens (:mod:`fastsam_kernels.two_way_attention`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsam_kernels import (
    MAX_TOKENS,
    AbsorbedTokens,
    ImageTokens,
    token_to_image_attention,
    two_way_attention,
    without_unused_queries,
)

from ..embedding import ImageProjections
from .low_rank_tokens import ImageTables, LowRankTokens
from .packed_weights import PackedAttention, PackedBlock, PackedDecoder


def project_image(block: PackedBlock, keys: Tensor, key_pe: Tensor) -> ImageProjections:
    """Project image tokens [I, N, C] for ``block``; ``key_pe`` is [N, C] or [1, N, C]."""
    keys_with_pe = keys + key_pe
    return ImageProjections(
        keys=keys,
        k=block.token_to_image.k(keys_with_pe),
        v=block.token_to_image.v(keys),
        q=block.image_to_token.q(keys_with_pe),
    )


def run_transformer(
    packed: PackedDecoder,
    keys: Tensor,
    key_pe: Tensor,
    tokens: Tensor,
    token_mask: Tensor | None = None,
    projections: ImageProjections | None = None,
    image_index: Tensor | None = None,
    num_output_tokens: int | None = None,
    kernels: str = "reference",
) -> tuple[Tensor, Tensor]:
    """Run all two-way blocks and the final attention on the tokens of prompts and images.

    Args:
        packed: the weights.
        keys: [P, N, C] image tokens; not read where ``projections`` are given.
        key_pe: [1, N, C] their positions.
        tokens: [P, T, C], which serve as their own positional encoding.
        token_mask: [P, T], False for tokens that are padding.
        projections: image tokens and their projections for block 0, one row per image.
        image_index: [P] int64, the row of ``projections`` of each prompt.
        num_output_tokens: how many of the tokens, the first ones, are returned; None for all.
        kernels: "reference" is the official formula; anything else takes PyTorch's fused attention, or absorbs.

    Returns:
        tokens [P, num_output_tokens, C] and image tokens [P, N, C].
    """
    if (
        packed.can_absorb
        and kernels != "reference"
        and tokens.shape[1] <= MAX_TOKENS  # beyond, absorbing costs more than it saves
        and not torch.is_autocast_enabled(tokens.device.type)  # which would mix dtypes
    ):
        image = ImageTokens(keys, key_pe[0])
        if projections is not None:
            image = ImageTokens(projections.keys, key_pe[0], image_index, projections.q)
        return _run_absorbed(packed, image, tokens, token_mask, projections, num_output_tokens, kernels)
    queries = tokens
    for block in packed.blocks:
        if projections is None:
            projections = project_image(block, keys, key_pe)
        elif image_index is not None:
            projections = projections.select(image_index)
        queries, keys = _run_projected(block, queries, tokens, token_mask, projections, kernels)
        projections = image_index = None  # from here on every prompt has its own keys
    queries, tokens = queries[:, :num_output_tokens], tokens[:, :num_output_tokens]
    final = packed.final_attn
    learnt = _attend(final, final.q(queries + tokens), final.k(keys + key_pe), final.v(keys), None, kernels)
    return packed.norm_final_attn(queries + learnt), keys


def _run_projected(
    block: PackedBlock,
    queries: Tensor,
    query_pe: Tensor,
    token_mask: Tensor | None,
    image: ImageProjections,
    kernels: str,
) -> tuple[Tensor, Tensor]:
    """Run one block on image tokens that are projected, as officially."""
    queries = _attend_self(block, queries, query_pe, token_mask, kernels)
    attention = block.token_to_image
    learnt = _attend(attention, attention.q(queries + query_pe), image.k, image.v, None, kernels)
    queries = _update_tokens(block, queries, learnt)
    attention = block.image_to_token
    k, v = attention.k(queries + query_pe), attention.v(queries)
    return queries, block.norm4(image.keys + _attend(attention, image.q, k, v, token_mask, kernels))


def _run_absorbed(
    packed: PackedDecoder,
    image: ImageTokens,
    tokens: Tensor,
    token_mask: Tensor | None,
    projections: ImageProjections | None,
    num_output_tokens: int | None,
    kernels: str,
) -> tuple[Tensor, Tensor]:
    """Run all blocks with the projections of the image absorbed into the tokens.

    What a block tells the image does not reach the next block's tokens before their attention to the image, so
    the two are one pass over the image tokens.
    """
    first = packed.blocks[0]
    queries = _attend_self(first, tokens, tokens, token_mask, kernels)
    to_image = first.token_to_image
    if projections is not None and len(image.tokens) == 1:
        learnt = _attend_to_shared(to_image, queries + tokens, projections, kernels)
    else:
        absorbed_queries = _absorb_queries(to_image, queries + tokens)
        learnt = to_image.out(token_to_image_attention(absorbed_queries, image, to_image.value, kernels=kernels))
    image = without_unused_queries(image, kernels)
    for block, following in zip(packed.blocks, [*packed.blocks[1:], None], strict=True):
        queries = _update_tokens(block, queries, learnt)
        absorbed = _absorb_tokens(
            block.image_to_token, queries + tokens, queries, token_mask, absorb_keys=image.queries is None
        )
        to_image = packed.final_attn
        if following is not None:
            queries = _attend_self(following, queries, tokens, token_mask, kernels)
            to_image = following.token_to_image
        else:
            queries, tokens = queries[:, :num_output_tokens], tokens[:, :num_output_tokens]
        keys, values = two_way_attention(
            image,
            absorbed,
            block.image_norm,
            _absorb_queries(to_image, queries + tokens),
            to_image.value,
            kernels=kernels,
        )
        learnt = to_image.out(values)
        image = ImageTokens(keys, image.pe)  # from here on every prompt has its own
    return packed.norm_final_attn(queries + learnt), image.tokens


def run_low_rank(
    packed: PackedDecoder, tables: ImageTables, projections: ImageProjections, tokens: Tensor, kernels: str
) -> tuple[Tensor, list[LowRankTokens]]:
    """Run all two-way blocks on prompts of one image without a mask input, and make no image tokens.

    Args:
        tables: from :meth:`ImageTables.of`, of the same image as ``projections``.
        packed, projections, tokens, kernels: as of :func:`run_transformer`; absorption is possible.

    Returns:
        tokens [P, T, C], for :func:`attend_finally`, and the image tokens of each prompt.
    """
    first, queries = packed.blocks[0], _attend_self(packed.blocks[0], tokens, tokens, None, kernels)
    learnt = _attend_to_shared(first.token_to_image, queries + tokens, projections, kernels)
    images = [LowRankTokens(tables, first.image_to_token.num_heads * tokens.shape[1]) for _ in tokens]
    for block, following in zip(packed.blocks, [*packed.blocks[1:], None], strict=True):
        queries = _update_tokens(block, queries, learnt)
        attention = block.image_to_token
        keys = _scaled_heads(attention, attention.k(queries + tokens))
        values = attention.v(queries).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for image, *operands in zip(images, keys, values, strict=True):
            image.update(*operands)
        if following is not None:
            queries = _attend_self(following, queries, tokens, None, kernels)
            learnt = _attend_each(following.token_to_image, queries + tokens, images)
    return queries, images


def attend_finally(packed: PackedDecoder, queries: Tensor, tokens: Tensor, images: Sequence[LowRankTokens]) -> Tensor:
    """Run the final attention on tokens [P, K, C] of :func:`run_low_rank`, which began as ``tokens`` [P or 1, K, C]."""
    return packed.norm_final_attn(queries + _attend_each(packed.final_attn, queries + tokens, images))


def _attend_each(attention: PackedAttention, tokens: Tensor, images: Sequence[LowRankTokens]) -> Tensor:
    """Attend with tokens [P, K, C] to the image tokens of each prompt as they are now."""
    queries = _scaled_heads(attention, attention.q(tokens))
    return attention.out(torch.stack([image.attend(asking) for image, asking in zip(images, queries, strict=True)]))


def _attend_to_shared(
    attention: PackedAttention, tokens: Tensor, projections: ImageProjections, kernels: str
) -> Tensor:
    """Attend with tokens [P, T, C] to one image: those of all prompts are one set of queries, and it is read once."""
    q = attention.q(tokens).flatten(0, 1)[None]
    return _attend(attention, q, projections.k, projections.v, None, kernels).view(tokens.shape)


def _attend_self(
    block: PackedBlock, queries: Tensor, query_pe: Tensor, token_mask: Tensor | None, kernels: str
) -> Tensor:
    attention = block.self_attn
    if block.skip_first_layer_pe:
        q = k = v = queries
    else:
        q, v = queries + query_pe, queries
        k = q
    attended = _attend(attention, attention.q(q), attention.k(k), attention.v(v), token_mask, kernels)
    return block.norm1(attended if block.skip_first_layer_pe else queries + attended)


def _update_tokens(block: PackedBlock, queries: Tensor, learnt: Tensor) -> Tensor:
    """Return the tokens after what they learnt of the image, and their MLP."""
    queries = block.norm2(queries + learnt)
    return block.norm3(queries + block.mlp(queries))


def _attend(
    attention: PackedAttention, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, kernels: str
) -> Tensor:
    """Attend with projected q [P, Q, D], k and v [P, K, D]; ``key_mask`` [P, K] is False for keys to leave out."""
    q, k, v = (x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    mask = None if key_mask is None else key_mask[:, None, None, :]
    if kernels == "reference":
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        out = scores.softmax(dim=-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return attention.out(out.transpose(1, 2).flatten(2))


def _absorb_queries(attention: PackedAttention, tokens: Tensor) -> Tensor:
    """Absorb ``k`` into the queries of tokens [P, T, C]: [P, heads, T, C], which meet image tokens before it."""
    q = attention.q(tokens)
    return _by_head(attention, q * _scale(attention, q), attention.k.weight)


def _absorb_tokens(
    attention: PackedAttention, k: Tensor, v: Tensor, token_mask: Tensor | None, absorb_keys: bool = True
) -> AbsorbedTokens:
    """Absorb ``q`` and ``out`` into tokens that the image attends to.

    Returns:
        keys [P, heads, T, C], which meet image tokens before ``q``, or after it as [P, heads, T, D / heads] without
        ``absorb_keys``; their bias [P, heads, T], -inf where ``token_mask`` [P, T] is False; values [P, heads, T, C],
        which have been through ``out``.
    """
    projected = attention.k(k)
    projected = projected * _scale(attention, projected)
    by_head = projected.unflatten(-1, (attention.num_heads, -1))
    if absorb_keys:
        keys = _by_head(attention, projected, attention.q.weight)
        bias = (by_head * attention.q.bias.view(attention.num_heads, -1)).sum(-1)
    else:
        keys, bias = by_head.transpose(1, 2), torch.zeros_like(by_head[..., 0])
    if token_mask is not None:
        bias = bias.masked_fill(~token_mask[..., None], -torch.inf)
    out = attention.out
    values = _by_head(attention, attention.v(v), out.weight.t()) + out.bias / attention.num_heads
    return AbsorbedTokens(keys, bias.transpose(1, 2), values)


def _by_head(attention: PackedAttention, x: Tensor, weight: Tensor) -> Tensor:
    """Multiply each head's channels of x [P, T, D] by its rows of the weight [D, C]: [P, heads, T, C]."""
    heads = x.unflatten(-1, (attention.num_heads, -1)).permute(2, 0, 1, 3)  # [heads, P, T, D / heads]
    product = heads.flatten(1, 2) @ weight.unflatten(0, (attention.num_heads, -1))
    return product.unflatten(1, x.shape[:2]).transpose(0, 1)


def _scaled_heads(attention: PackedAttention, projected: Tensor) -> Tensor:
    """Split projected tokens [P, T, D] by head, as scores want them: [P, heads, T, D / heads]."""
    scaled = projected * _scale(attention, projected)
    return scaled.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)


def _scale(attention: PackedAttention, projected: Tensor) -> float:
    return (projected.shape[-1] / attention.num_heads) ** -0.5
