"""The two cross-attentions of SAM's mask decoder, with the projections of the image side folded into the token side.

For image tokens x_n [C] at positions e_n, heads h of d channels, and the tokens t of one prompt:

    token to image:  s_n = (W_k,h (x_n + e_n) + b_k,h) . q_ht / sqrt(d);  o_ht = sum_n softmax_n(s) (W_v,h x_n + b_v,h)
    image to token:  s_t = (W_q,h (x_n + e_n) + b_q,h) . k_ht / sqrt(d)      y_n = W_o concat_h sum_t softmax_t(s) v_ht

K, V and Q of the image are never formed, because the few tokens can carry their weights instead:

    token to image:  a_ht = W_k,h^T q_ht / sqrt(d);  s_n = a_ht . (x_n + e_n)  (b_k is the same for all n: it cancels);
                     o_ht = W_v,h (sum_n softmax_n(s) x_n) + b_v,h
    image to token:  a_ht = W_q,h^T k_ht / sqrt(d), b_ht = b_q,h . k_ht / sqrt(d);  s_t = a_ht . (x_n + e_n) + b_ht;
                     u_ht = W_o,h v_ht + b_o / H;  y_n = sum_ht softmax_t(s) u_ht,  then the residual and the norm.

With N = 4096 and C = 256 that is less work than projecting the image up to about 16 tokens a prompt, and memory sees
the image tokens once. The operations take the folded operands a, b and u; :mod:`sam.modeling.transformer` folds. Only
the queries of an image that no prompt has touched are worth forming and keeping, for the forms in PyTorch: their scores
then take 16 products a token and head instead of 256.

Source: Segment Anything (arXiv 2304.02643), appendix A; ``transformer.py`` of segment-anything.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import requires_autograd, select_implementation

_BLOCKS = 8  # of a lone prompt's image tokens: a BLAS shares a batch among its threads, but not a product so narrow
_KEPT_QUERIES = "it folds the queries of the image, and image_queries is given"
MAX_TOKENS = 16  # for which folding saves work, and which the Triton forms hold in registers


def token_to_image_attention(
    queries: Tensor,
    keys: Tensor,
    key_pe: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    *,
    image_index: Tensor | None = None,
    kernels: str = "auto",
) -> Tensor:
    """Attention of prompt tokens to image tokens, before its output projection.

    Args:
        queries: [P, H, T, C], W_k,h^T q_ht / sqrt(d).
        keys: [I, N, C] image tokens; I is P, or what ``image_index`` counts.
        key_pe: [N, C] positions, added to the keys and not to the values.
        value_weight, value_bias: [H * d, C] and [H * d] of the projection of the values.
        image_index: [P] int64, the row of ``keys`` of each prompt; None when every prompt has its own.
        kernels: "reference", "torch", "triton" or "auto".

    Returns:
        [P, T, H * d] in the dtype of ``queries``.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or an unknown ``kernels``.
        UnsupportedKernelError: "triton" where it cannot run; the message says why.
    """
    inputs = (queries, keys, key_pe, value_weight, value_bias)
    _check_image(queries, keys, key_pe, image_index)
    _check_values(queries, value_weight, value_bias)
    _check_dtypes(queries, key_pe=key_pe, keys=keys, value_weight=value_weight, value_bias=value_bias)
    constraint = _constraint(queries, value_weight.shape[0] // queries.shape[1])
    chosen = select_implementation(
        "token_to_image_attention", kernels, keys.device, constraint, *inputs, products=keys.dtype
    )
    if chosen == "reference":
        return token_to_image_reference(*inputs, image_index)
    if chosen == "torch":
        return token_to_image_torch(*inputs, image_index)
    from .token_to_image_kernel import token_to_image_triton

    return token_to_image_triton(*inputs, image_index)


def image_to_token_attention(
    keys: Tensor,
    key_pe: Tensor,
    token_keys: Tensor,
    token_bias: Tensor,
    token_values: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float = 1e-5,
    image_index: Tensor | None = None,
    image_queries: Tensor | None = None,
    kernels: str = "auto",
) -> Tensor:
    """Attention of image tokens to prompt tokens, its output projection, the residual and the layer norm.

    Args:
        keys: [I, N, C] image tokens; I is P, or what ``image_index`` counts.
        key_pe: [N, C] positions, added before the scores and not to the residual.
        token_keys: [P, H, T, C], W_q,h^T k_ht / sqrt(d).
        token_bias: [P, H, T], b_q,h . k_ht / sqrt(d); -inf for tokens that are padding, never for all of a prompt.
        token_values: [P, H, T, C], W_o,h v_ht + b_o / H.
        norm_weight, norm_bias, eps: of the layer norm, [C].
        image_index: [P] int64, the row of ``keys`` of each prompt; None when every prompt has its own.
        image_queries: [I, N, H * d], W_q (x_n + e_n) + b_q where they were kept. ``token_keys`` are then
            [P, H, T, d], k_ht / sqrt(d), and ``token_bias`` holds what concerns padding only. No Triton form.
        kernels: "reference", "torch", "triton" or "auto".

    Returns:
        [P, N, C], contiguous, in the dtype of ``keys``.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or an unknown ``kernels``.
        UnsupportedKernelError: "triton" where it cannot run; the message says why.
    """
    inputs = (keys, key_pe, token_keys, token_bias, token_values, norm_weight, norm_bias)
    _check_update(*inputs, image_index, image_queries)
    constraint = _constraint(token_values, 16) if image_queries is None else _KEPT_QUERIES
    chosen = select_implementation(
        "image_to_token_attention", kernels, keys.device, constraint, *inputs, products=keys.dtype
    )
    if chosen == "reference":
        return image_to_token_reference(*inputs, eps, image_index, image_queries)
    if chosen == "torch":
        return image_to_token_torch(*inputs, eps, image_index, image_queries)
    from .image_to_token_kernel import image_to_token_triton

    return image_to_token_triton(*inputs, eps, image_index)


def two_way_attention(
    keys: Tensor,
    key_pe: Tensor,
    token_keys: Tensor,
    token_bias: Tensor,
    token_values: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    queries: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    *,
    eps: float = 1e-5,
    image_index: Tensor | None = None,
    image_queries: Tensor | None = None,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor]:
    """:func:`image_to_token_attention`, then :func:`token_to_image_attention` on what it made of the image tokens.

    The decoder may ask both at once because the tokens of the next attention to the image do not depend on how this
    block changed it.

    Args:
        keys, key_pe, token_keys, token_bias, token_values, norm_weight, norm_bias, eps, image_index, image_queries:
            of the former.
        queries: [P, H, Q, C] of the latter, of at most as many tokens.
        value_weight, value_bias: of the latter.
        kernels: "reference", "torch", "triton" or "auto".

    Returns:
        image tokens [P, N, C], contiguous, and what the prompts' tokens learn of them, [P, Q, H * d]; both in the
        dtype of ``keys``.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or an unknown ``kernels``.
        UnsupportedKernelError: "triton" where it cannot run; the message says why.
    """
    update = (keys, key_pe, token_keys, token_bias, token_values, norm_weight, norm_bias)
    ask = (queries, value_weight, value_bias)
    _check_update(*update, image_index, image_queries)
    prompts, heads, tokens, channels = token_values.shape
    asked = queries.shape[2] if queries.ndim == 4 else 0
    if queries.shape != (prompts, heads, asked, channels) or not 1 <= asked <= tokens:
        expected = f"[{prompts}, {heads}, 1 to {tokens}, {channels}]"
        raise ValueError(f"queries must be {expected}, got {list(queries.shape)}")
    _check_values(*ask)
    _check_dtypes(keys, queries=queries, value_weight=value_weight, value_bias=value_bias)
    head_dim = len(value_weight) // heads
    constraint = _constraint(token_values, head_dim) if image_queries is None else _KEPT_QUERIES
    chosen = select_implementation(
        "two_way_attention", kernels, keys.device, constraint, *update, *ask, products=keys.dtype
    )
    if chosen == "triton":
        from .two_way_kernel import two_way_triton

        if asked < tokens:  # the kernel has one number of tokens
            queries = F.pad(queries, (0, 0, 0, tokens - asked))
        keys, learnt = two_way_triton(*update, queries, value_weight, value_bias, eps, image_index)
        return keys, learnt[:, :asked]
    if chosen == "reference":
        keys = image_to_token_reference(*update, eps, image_index, image_queries)
        return keys, token_to_image_reference(queries, keys, key_pe, value_weight, value_bias)
    keys = image_to_token_torch(*update, eps, image_index, image_queries)
    return keys, token_to_image_torch(queries, keys, key_pe, value_weight, value_bias)


def token_to_image_reference(
    queries: Tensor,
    keys: Tensor,
    key_pe: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    image_index: Tensor | None = None,
) -> Tensor:
    """The formula."""
    keys = keys if image_index is None else keys[image_index]
    weights = torch.einsum("phtc,pnc->phtn", queries, keys + key_pe).softmax(dim=-1)
    attended = torch.einsum("phtn,pnc->phtc", weights, keys)
    values = torch.einsum("phtc,hdc->pthd", attended, value_weight.unflatten(0, (queries.shape[1], -1)))
    return values.flatten(2) + value_bias


def image_to_token_reference(
    keys: Tensor,
    key_pe: Tensor,
    token_keys: Tensor,
    token_bias: Tensor,
    token_values: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    image_index: Tensor | None = None,
    image_queries: Tensor | None = None,
) -> Tensor:
    """The formula."""
    keys = keys if image_index is None else keys[image_index]
    if image_queries is None:
        scores = torch.einsum("pnc,phtc->pnht", keys + key_pe, token_keys)
    else:
        asking = image_queries if image_index is None else image_queries[image_index]
        scores = torch.einsum("pnhd,phtd->pnht", asking.unflatten(-1, (token_keys.shape[1], -1)), token_keys)
    weights = (scores + token_bias[:, None]).softmax(dim=-1)
    attended = torch.einsum("pnht,phtc->pnc", weights, token_values)
    return F.layer_norm(keys + attended, norm_weight.shape, norm_weight, norm_bias, eps)


def token_to_image_torch(
    queries: Tensor,
    keys: Tensor,
    key_pe: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    image_index: Tensor | None = None,
) -> Tensor:
    """Two batched products over the image tokens, the scores overwritten by their softmax."""
    keys = _of_prompts(keys, image_index, len(queries))
    (prompts, heads, tokens, _), recorded = queries.shape, requires_autograd(queries, keys)
    blocks = _blocks(keys)
    located = _split(keys + key_pe, blocks)
    scores = _shared(queries.flatten(1, 2), blocks) @ located.transpose(1, 2)
    if blocks > 1:
        scores = scores.transpose(0, 1).flatten(1)[None]  # [P, H * T, N]
    weights = torch.softmax(scores, -1, out=None if recorded else scores)
    attended = (weights @ keys).unflatten(1, (heads, tokens))  # [P, H, T, C]
    values = attended.transpose(0, 1).flatten(1, 2) @ value_weight.unflatten(0, (heads, -1)).transpose(1, 2)
    return values.unflatten(1, (prompts, tokens)).permute(1, 2, 0, 3).flatten(2) + value_bias


def image_to_token_torch(
    keys: Tensor,
    key_pe: Tensor,
    token_keys: Tensor,
    token_bias: Tensor,
    token_values: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    image_index: Tensor | None = None,
    image_queries: Tensor | None = None,
) -> Tensor:
    """Scores with the image tokens innermost, so that the softmax over a few tokens runs along them; in place."""
    prompts, heads, tokens, _ = token_keys.shape
    keys = _of_prompts(keys, image_index, prompts)
    blocks = _blocks(keys)
    if image_queries is None:
        bias, offered = (_shared(x.flatten(1, 2), blocks) for x in (token_bias[..., None], token_keys))
        room = located = _split(keys + key_pe, blocks)
        scores = torch.baddbmm(bias, offered, located.transpose(1, 2)).unflatten(1, (heads, tokens))
    else:
        room = None
        scores = _kept_scores(image_queries, token_keys, image_index).add_(token_bias[..., None])
    recorded = requires_autograd(scores, token_values)
    weights = torch.softmax(scores, 2, out=scores if scores.is_contiguous() and not recorded else None).flatten(1, 2)
    if image_queries is not None and blocks > 1:
        weights = weights[0].unflatten(1, (blocks, -1)).transpose(0, 1)
    values = _shared(token_values.flatten(1, 2), blocks)
    if room is not None and (recorded or torch.compiler.is_compiling() or not room.is_contiguous()):
        room = None  # else the sums with the positions have served, and their memory is used again
    updated = torch.bmm(weights.transpose(1, 2), values, out=room).add_(_split(keys, blocks))
    return F.layer_norm(updated.view(keys.shape), norm_weight.shape, norm_weight, norm_bias, eps)


def _kept_scores(image_queries: Tensor, token_keys: Tensor, image_index: Tensor | None) -> Tensor:
    """[I, N, H * d] and [P, H, T, d] -> [P, H, T, N]"""
    prompts, heads, tokens, _ = token_keys.shape
    asking = image_queries.unflatten(-1, (heads, -1)).permute(0, 2, 3, 1)  # [I, H, d, N]
    if image_index is None or len(asking) > 1:
        return token_keys @ (asking if image_index is None else asking.index_select(0, image_index))
    together = token_keys.transpose(0, 1).flatten(1, 2) @ asking[0]  # the tokens of all prompts are one set
    return together.unflatten(1, (prompts, tokens)).transpose(0, 1)


def _blocks(keys: Tensor) -> int:
    """How many parts to split image tokens [P, N, C] into."""
    return _BLOCKS if len(keys) == 1 and keys.shape[1] % _BLOCKS == 0 else 1


def _split(image: Tensor, blocks: int) -> Tensor:
    """[P, N, C] -> [P * blocks, N / blocks, C]"""
    return image if blocks == 1 else image.reshape(blocks, -1, image.shape[2])


def _shared(tokens: Tensor, blocks: int) -> Tensor:
    """What all blocks of a prompt meet: [P, H * T, C] -> [P * blocks, H * T, C], no copy."""
    return tokens if blocks == 1 else tokens.expand(blocks, -1, -1)


def _of_prompts(keys: Tensor, image_index: Tensor | None, prompts: int) -> Tensor:
    """[P, N, C]; one image serves all prompts without a copy."""
    if image_index is None:
        return keys
    return keys.expand(prompts, -1, -1) if len(keys) == 1 else keys.index_select(0, image_index)


def _check_image(tokens: Tensor, keys: Tensor, key_pe: Tensor, image_index: Tensor | None) -> None:
    if tokens.ndim != 4:
        raise ValueError(f"the folded tokens must be [P, H, T, C], got {list(tokens.shape)}")
    prompts, channels = tokens.shape[0], tokens.shape[3]
    if keys.ndim != 3 or keys.shape[2] != channels or (image_index is None and len(keys) != prompts):
        images = prompts if image_index is None else "I"
        raise ValueError(f"keys must be [{images}, N, {channels}], got {list(keys.shape)}")
    if key_pe.shape != keys.shape[1:]:
        raise ValueError(f"key_pe must be {list(keys.shape[1:])}, got {list(key_pe.shape)}")
    if image_index is not None and (image_index.shape != (prompts,) or image_index.dtype != torch.int64):
        raise ValueError(f"image_index must be [{prompts}] of int64, got {list(image_index.shape)} {image_index.dtype}")


def _check_values(queries: Tensor, value_weight: Tensor, value_bias: Tensor) -> None:
    heads, channels = queries.shape[1], queries.shape[3]
    if value_weight.ndim != 2 or value_weight.shape[1] != channels or len(value_weight) % heads:
        raise ValueError(f"value_weight must be [{heads} * d, {channels}], got {list(value_weight.shape)}")
    if value_bias.shape != value_weight.shape[:1]:
        raise ValueError(f"value_bias must be [{len(value_weight)}], got {list(value_bias.shape)}")


def _check_update(
    keys: Tensor,
    key_pe: Tensor,
    token_keys: Tensor,
    token_bias: Tensor,
    token_values: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    image_index: Tensor | None,
    image_queries: Tensor | None = None,
) -> None:
    _check_image(token_keys if image_queries is None else token_values, keys, key_pe, image_index)
    expected: tuple[int, ...] = token_values.shape
    if image_queries is not None:
        heads, width = token_values.shape[1], image_queries.shape[-1]
        if image_queries.shape[:-1] != keys.shape[:-1] or width % heads:
            wanted = f"[{keys.shape[0]}, {keys.shape[1]}, {heads} * d]"
            raise ValueError(f"image_queries must be {wanted}, got {list(image_queries.shape)}")
        expected = (*token_values.shape[:3], width // heads)
    if token_keys.shape != expected or token_bias.shape != expected[:3]:
        raise ValueError(
            f"token_keys and token_bias must be {list(expected)} and {list(expected[:3])} beside these token_values, "
            f"got {list(token_keys.shape)} and {list(token_bias.shape)}"
        )
    named = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    for name, vector in named.items():
        if vector.shape != keys.shape[2:]:
            raise ValueError(f"{name} must be [{keys.shape[2]}], got {list(vector.shape)}")
    if image_queries is not None:
        named["image_queries"] = image_queries
    _check_dtypes(keys, key_pe=key_pe, token_keys=token_keys, token_bias=token_bias, token_values=token_values, **named)


def _check_dtypes(main: Tensor, **others: Tensor) -> None:
    for name, tensor in others.items():
        if tensor.dtype != main.dtype:
            raise ValueError(f"{name} must have the dtype of the others, {main.dtype}, got {tensor.dtype}")


def _constraint(tokens: Tensor, head_dim: int) -> str | None:
    """What keeps the Triton forms from these inputs."""
    prompts, heads, count, channels = tokens.shape
    if tokens.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the tensors must be fp32, fp16 or bf16, got {tokens.dtype}"
    if count > MAX_TOKENS:
        return f"a prompt may have up to {MAX_TOKENS} tokens, got {count}"
    for what, number, least in (("channels", channels, 64), ("heads", heads, 2), ("channels a head", head_dim, 1)):
        if number < least or number & (number - 1):
            return f"the {what} must be a power of two of at least {least}, got {number}"
    if prompts == 0:
        return "there are no prompts"
    return None
