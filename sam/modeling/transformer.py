"""The two-way transformer of SAM's mask decoder: prompt tokens and image tokens attend to each other.

Throughout: P prompts, T tokens a prompt, N image tokens, C channels, D channels inside an attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsam_kernels import (
    MAX_TOKENS,
    AbsorbedTokens,
    ImageTokens,
    LayerNormWeights,
    ValueProjection,
    token_to_image_attention,
    two_way_attention,
    without_unused_queries,
)

from .common import MLPBlock


@dataclass(frozen=True)
class SharedImageSide:
    """The image side of block 0, which all prompts without a mask input share; one row an image.

    ``keys`` [I, N, C] is the image embedding plus the no-mask embedding; ``k`` and ``v`` [I, N, D] are what its
    tokens offer to the prompt's, ``q`` [I, N, D] what they ask of them.
    """

    keys: Tensor
    k: Tensor
    v: Tensor
    q: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.keys, self.k, self.v, self.q

    def select(self, image_index: Tensor) -> SharedImageSide:
        """One row a prompt; a single image serves all without a copy."""

        def rows(field: Tensor) -> Tensor:
            if len(field) == 1:
                return field.expand(len(image_index), -1, -1)
            return field.index_select(0, image_index)

        return SharedImageSide(*map(rows, self.tensors))


_USUAL_KERNELS = ("kernels", "reference")


def _unusual(**options: Any) -> dict[str, Any]:
    """Those that the official modules do not have and that are not at their defaults: what a user puts in the place
    of a module of ours need not know them."""
    return {name: value for name, value in options.items() if value is not None and (name, value) != _USUAL_KERNELS}


class Attention(nn.Module):
    """Multi-head attention whose inner width is ``embedding_dim / downsample_rate``."""

    __constants__ = ("internal_dim", "num_heads")

    def __init__(self, embedding_dim: int, num_heads: int, downsample_rate: int = 1) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.internal_dim = embedding_dim // downsample_rate
        self.num_heads = num_heads
        if self.internal_dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide the inner width {self.internal_dim}")
        self.q_proj = nn.Linear(embedding_dim, self.internal_dim)
        self.k_proj = nn.Linear(embedding_dim, self.internal_dim)
        self.v_proj = nn.Linear(embedding_dim, self.internal_dim)
        self.out_proj = nn.Linear(self.internal_dim, embedding_dim)

    def _separate_heads(self, x: Tensor, num_heads: int) -> Tensor:
        return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # [P, heads, tokens, D / heads]

    def _recombine_heads(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, kernels: str = "reference"
    ) -> Tensor:
        """[P, Q, C], [P, K, C], [P, K, C] -> [P, Q, C]; ``key_mask`` [P, K] is False for keys to leave out."""
        return self.attend(self.q_proj(q), self.k_proj(k), self.v_proj(v), key_mask, kernels)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, kernels: str) -> Tensor:
        """As ``forward``, of queries, keys and values already projected to [P, tokens, D]."""
        q, k, v = (self._separate_heads(x, self.num_heads) for x in (q, k, v))
        mask = None if key_mask is None else key_mask[:, None, None, :]
        if kernels == "reference":
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf)
            out = scores.softmax(dim=-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(self._recombine_heads(out))

    def fold_queries(self, tokens: Tensor) -> Tensor:
        """Tokens [P, T, C] that ask the image, as queries [P, heads, T, C] on its tokens before ``k_proj``."""
        asked = self.q_proj(tokens) * self._scale
        return self._by_head(asked, self.k_proj.weight)

    def fold_tokens(self, k: Tensor, v: Tensor, token_mask: Tensor | None, fold_keys: bool = True) -> AbsorbedTokens:
        """Tokens that the image asks: keys [P, heads, T, C], bias [P, heads, T] and values [P, heads, T, C].

        The keys meet image tokens before ``q_proj``, or after it as [P, heads, T, D / heads] without ``fold_keys``;
        the values have been through ``out_proj``. ``token_mask`` [P, T] is False for tokens that are padding.
        """
        token_keys = self.k_proj(k) * self._scale
        by_head = token_keys.unflatten(-1, (self.num_heads, -1))
        if fold_keys:
            keys = self._by_head(token_keys, self.q_proj.weight)
            bias = (by_head * self.q_proj.bias.view(self.num_heads, -1)).sum(-1)
        else:
            keys, bias = by_head.transpose(1, 2), torch.zeros_like(by_head[..., 0])
        if token_mask is not None:
            bias = bias.masked_fill(~token_mask[..., None], -torch.inf)
        values = self._by_head(self.v_proj(v), self.out_proj.weight.t()) + self.out_proj.bias / self.num_heads
        return AbsorbedTokens(keys, bias.transpose(1, 2), values)

    def attend_shared(self, tokens: Tensor, image: SharedImageSide, kernels: str) -> Tensor:
        """What tokens [P, T, C] learn of one image whose keys and values are kept.

        The tokens of all prompts are one set of queries, and the image is read once.
        """
        asked = self.q_proj(tokens)
        return self.attend(asked.flatten(0, 1)[None], image.k, image.v, None, kernels).view(tokens.shape)

    def _by_head(self, x: Tensor, weight: Tensor) -> Tensor:
        """[P, T, D] and [D, C] -> [P, heads, T, C], each head's channels of x by its rows of the weight."""
        heads = x.unflatten(-1, (self.num_heads, -1)).permute(2, 0, 1, 3)  # [heads, P, T, D / heads]
        folded = heads.flatten(1, 2) @ weight.unflatten(0, (self.num_heads, -1))
        return folded.unflatten(1, x.shape[:2]).transpose(0, 1)

    @property
    def value_projection(self) -> ValueProjection:
        """The weights that turn image tokens into values."""
        return ValueProjection(self.v_proj.weight, self.v_proj.bias)

    @property
    def _scale(self) -> float:
        return (self.internal_dim / self.num_heads) ** -0.5

    @property
    def is_official(self) -> bool:
        """Whether all projections are plain linears with a bias, whose weights can be folded."""
        projections = (self.q_proj, self.k_proj, self.v_proj, self.out_proj)
        return all(type(layer) is nn.Linear and layer.bias is not None for layer in projections)


class TwoWayAttentionBlock(nn.Module):
    """Self-attention of tokens, tokens to image, MLP on tokens, image to tokens; a norm after each."""

    __constants__ = ("skip_first_layer_pe",)

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        mlp_dim: int = 2048,
        activation: type[nn.Module] = nn.ReLU,
        attention_downsample_rate: int = 2,
        skip_first_layer_pe: bool = False,
    ) -> None:
        super().__init__()
        self.self_attn = Attention(embedding_dim, num_heads)
        self.norm1 = nn.LayerNorm(embedding_dim)
        self.cross_attn_token_to_image = Attention(embedding_dim, num_heads, attention_downsample_rate)
        self.norm2 = nn.LayerNorm(embedding_dim)
        self.mlp = MLPBlock(embedding_dim, mlp_dim, activation)
        self.norm3 = nn.LayerNorm(embedding_dim)
        self.norm4 = nn.LayerNorm(embedding_dim)
        self.cross_attn_image_to_token = Attention(embedding_dim, num_heads, attention_downsample_rate)
        self.skip_first_layer_pe = skip_first_layer_pe

    @property
    def is_official(self) -> bool:
        """Whether the projections between tokens and image can be folded, and the norm of the image fused."""
        crossing = (self.cross_attn_token_to_image, self.cross_attn_image_to_token)
        return type(self.norm4) is nn.LayerNorm and all(attention.is_official for attention in crossing)

    def image_side_weights(self) -> list[Tensor]:
        """The weights that :meth:`share_image_side` reads."""
        to_image, to_token = self.cross_attn_token_to_image, self.cross_attn_image_to_token
        return [p for layer in (to_image.k_proj, to_image.v_proj, to_token.q_proj) for p in layer.parameters()]

    def share_image_side(self, keys: Tensor, key_pe: Tensor) -> SharedImageSide:
        """This block's projections of image tokens [I, N, C] that no prompt has touched yet."""
        located = keys + key_pe
        return SharedImageSide(
            keys=keys,
            k=self.cross_attn_token_to_image.k_proj(located),
            v=self.cross_attn_token_to_image.v_proj(keys),
            q=self.cross_attn_image_to_token.q_proj(located),
        )

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        query_pe: Tensor,
        key_pe: Tensor,
        token_mask: Tensor | None = None,
        shared: SharedImageSide | None = None,
        image_index: Tensor | None = None,
        kernels: str = "reference",
    ) -> tuple[Tensor, Tensor]:
        """Update tokens [P, T, C] and image tokens [P, N, C].

        Args:
            queries, query_pe: [P, T, C].
            keys: [P, N, C]; not read where ``shared`` stands for it.
            key_pe: [P or 1, N, C].
            token_mask: [P, T], False for tokens that are padding.
            shared: image tokens and their projections, one row an image, made beforehand.
            image_index: [P] int64, the row of ``shared`` of each prompt.
            kernels: "reference" is the official formula; anything else takes PyTorch's fused attention.
        """
        queries = self.attend_self(queries, query_pe, token_mask, kernels)
        if shared is None and kernels == "reference":  # the official calls, which reach what a user put in their place
            attended = self.cross_attn_token_to_image(queries + query_pe, keys + key_pe, keys)
            queries = self.update_tokens(queries, attended)
            how = _unusual(key_mask=token_mask)
            attended = self.cross_attn_image_to_token(keys + key_pe, queries + query_pe, queries, **how)
            return queries, self.norm4(keys + attended)
        if shared is None:
            shared = self.share_image_side(keys, key_pe)
        elif image_index is not None:
            shared = shared.select(image_index)
        to_image, to_token = self.cross_attn_token_to_image, self.cross_attn_image_to_token
        asked = to_image.q_proj(queries + query_pe)
        queries = self.update_tokens(queries, to_image.attend(asked, shared.k, shared.v, None, kernels))
        offered = to_token.k_proj(queries + query_pe)
        attended = to_token.attend(shared.q, offered, to_token.v_proj(queries), token_mask, kernels)
        return queries, self.norm4(shared.keys + attended)

    def attend_self(self, queries: Tensor, query_pe: Tensor, token_mask: Tensor | None, kernels: str) -> Tensor:
        """The tokens after their self-attention."""
        how = _unusual(key_mask=token_mask, kernels=kernels)
        if self.skip_first_layer_pe:
            queries = self.self_attn(queries, queries, queries, **how)
        else:
            located = queries + query_pe
            queries = queries + self.self_attn(located, located, queries, **how)
        return self.norm1(queries)

    def update_tokens(self, queries: Tensor, attended: Tensor) -> Tensor:
        """The tokens after what they learnt of the image, and their MLP."""
        queries = self.norm2(queries + attended)
        return self.norm3(queries + self.mlp(queries))


class TwoWayTransformer(nn.Module):
    """``depth`` two-way blocks and a final attention from the tokens to the image."""

    def __init__(
        self,
        depth: int,
        embedding_dim: int,
        num_heads: int,
        mlp_dim: int,
        activation: type[nn.Module] = nn.ReLU,
        attention_downsample_rate: int = 2,
    ) -> None:
        super().__init__()
        self.depth = depth
        self.embedding_dim = embedding_dim
        self.num_heads = num_heads
        self.mlp_dim = mlp_dim
        self.layers = nn.ModuleList(
            TwoWayAttentionBlock(
                embedding_dim=embedding_dim,
                num_heads=num_heads,
                mlp_dim=mlp_dim,
                activation=activation,
                attention_downsample_rate=attention_downsample_rate,
                skip_first_layer_pe=index == 0,
            )
            for index in range(depth)
        )
        self.final_attn_token_to_image = Attention(embedding_dim, num_heads, attention_downsample_rate)
        self.norm_final_attn = nn.LayerNorm(embedding_dim)

    @property
    def has_official_parts(self) -> bool:
        """Whether the blocks and attentions are of these classes as they are, whatever their projections."""
        if not all(type(block) is TwoWayAttentionBlock for block in self.layers):
            return False
        names = ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token")
        attentions = [getattr(block, name) for block in self.layers for name in names]
        return all(type(attention) is Attention for attention in [*attentions, self.final_attn_token_to_image])

    @property
    def first_block(self) -> TwoWayAttentionBlock:
        return self.layers[0]  # type: ignore[return-value]

    def forward(self, image_embedding: Tensor, image_pe: Tensor, point_embedding: Tensor) -> tuple[Tensor, Tensor]:
        """The official interface.

        Args:
            image_embedding, image_pe: [P, C, h, w].
            point_embedding: [P, T, C] tokens, which serve as their own positional encoding.

        Returns:
            tokens [P, T, C] and image tokens [P, h * w, C].
        """
        keys, key_pe = (x.flatten(2).transpose(1, 2) for x in (image_embedding, image_pe))
        return self.attend(keys, key_pe, point_embedding)

    def attend(
        self,
        keys: Tensor,
        key_pe: Tensor,
        tokens: Tensor,
        token_mask: Tensor | None = None,
        shared: SharedImageSide | None = None,
        image_index: Tensor | None = None,
        answers: int | None = None,
        kernels: str = "reference",
    ) -> tuple[Tensor, Tensor]:
        """As ``forward`` on image tokens [P, N, C]; see :class:`TwoWayAttentionBlock` for the rest.

        ``answers`` is how many of the tokens, the first ones, are wanted back; None for all.
        """
        if self._folds(tokens, kernels):
            return self._attend_folded(keys, key_pe[0], tokens, token_mask, shared, image_index, answers, kernels)
        queries = tokens
        for index, layer in enumerate(self.layers):
            first = {"shared": shared, "image_index": image_index} if index == 0 else {}
            how = _unusual(token_mask=token_mask, kernels=kernels, **first)
            queries, keys = layer(queries=queries, keys=keys, query_pe=tokens, key_pe=key_pe, **how)
        queries = queries[:, :answers]
        attended = self.final_attn_token_to_image(
            queries + tokens[:, :answers], keys + key_pe, keys, **_unusual(kernels=kernels)
        )
        return self.norm_final_attn(queries + attended), keys

    def _folds(self, tokens: Tensor, kernels: str) -> bool:
        """Whether the projections of the image are folded into these tokens [P, T, C].

        Beyond :data:`MAX_TOKENS` tokens it would cost more than it saves; autocast would mix dtypes; and what a
        fine-tune put in place of a projection, a norm or a block runs as it is.
        """
        return (
            kernels != "reference"
            and tokens.shape[1] <= MAX_TOKENS
            and not torch.is_autocast_enabled(tokens.device.type)
            and all(type(layer) is TwoWayAttentionBlock and layer.is_official for layer in self.layers)
            and self.final_attn_token_to_image.is_official
        )

    def _attend_folded(
        self,
        keys: Tensor,
        key_pe: Tensor,
        tokens: Tensor,
        token_mask: Tensor | None,
        shared: SharedImageSide | None,
        image_index: Tensor | None,
        answers: int | None,
        kernels: str,
    ) -> tuple[Tensor, Tensor]:
        """With the projections of the image folded into the tokens.

        What a block tells the image does not reach the next block's tokens before their attention to the image, so
        the two are one pass over the image tokens.
        """
        layers: list[TwoWayAttentionBlock] = list(self.layers)  # type: ignore[arg-type]
        first = layers[0]
        image = ImageTokens(keys, key_pe, image_index)
        if shared is not None:
            image = ImageTokens(shared.keys, key_pe, image_index, shared.q)
        queries = first.attend_self(tokens, tokens, token_mask, kernels)
        to_image = first.cross_attn_token_to_image
        if shared is not None and len(shared.keys) == 1:
            attended = to_image.attend_shared(queries + tokens, shared, kernels)
        else:
            values = token_to_image_attention(
                to_image.fold_queries(queries + tokens), image, to_image.value_projection, kernels=kernels
            )
            attended = to_image.out_proj(values)
        image = without_unused_queries(image, kernels)
        for layer, following in zip(layers, [*layers[1:], None], strict=True):
            queries = layer.update_tokens(queries, attended)
            absorbed = layer.cross_attn_image_to_token.fold_tokens(
                queries + tokens, queries, token_mask, fold_keys=image.queries is None
            )
            to_image = self.final_attn_token_to_image
            if following is not None:
                queries = following.attend_self(queries, tokens, token_mask, kernels)
                to_image = following.cross_attn_token_to_image
            else:
                queries, tokens = queries[:, :answers], tokens[:, :answers]
            keys, values = two_way_attention(
                image,
                absorbed,
                LayerNormWeights(layer.norm4.weight, layer.norm4.bias, layer.norm4.eps),
                to_image.fold_queries(queries + tokens),
                to_image.value_projection,
                kernels=kernels,
            )
            attended = to_image.out_proj(values)
            image = ImageTokens(keys, key_pe)  # from here on every prompt has its own
        return self.norm_final_attn(queries + attended), keys
