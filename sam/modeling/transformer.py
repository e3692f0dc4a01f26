"""The two-way transformer of SAM's mask decoder: prompt tokens and image tokens attend to each other.

Throughout: P prompts, T tokens a prompt, N image tokens, C channels, D channels inside an attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsam_kernels import MOST_TOKENS, image_to_token_attention, token_to_image_attention

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

    def select(self, image_index: Tensor) -> SharedImageSide:
        """One row a prompt; a single image serves all without a copy."""

        def rows(field: Tensor) -> Tensor:
            if len(field) == 1:
                return field.expand(len(image_index), -1, -1)
            return field.index_select(0, image_index)

        return SharedImageSide(*map(rows, (self.keys, self.k, self.v, self.q)))


class Attention(nn.Module):
    """Multi-head attention whose inner width is ``embedding_dim / downsample_rate``."""

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

    def fold_tokens(self, k: Tensor, v: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens that the image asks: keys [P, heads, T, C], bias [P, heads, T] and values [P, heads, T, C].

        The keys meet image tokens before ``q_proj``; the values have been through ``out_proj``. ``token_mask``
        [P, T] is False for tokens that are padding.
        """
        offered = self.k_proj(k) * self._scale
        bias = (offered.unflatten(-1, (self.num_heads, -1)) * self.q_proj.bias.view(self.num_heads, -1)).sum(-1)
        if token_mask is not None:
            bias = bias.masked_fill(~token_mask[..., None], -torch.inf)
        values = self._by_head(self.v_proj(v), self.out_proj.weight.t()) + self.out_proj.bias / self.num_heads
        return self._by_head(offered, self.q_proj.weight), bias.transpose(1, 2), values

    def attend_folded(self, tokens: Tensor, keys: Tensor, key_pe: Tensor, kernels: str) -> Tensor:
        """What tokens [P, T, C] learn of image tokens [P, N, C] at ``key_pe`` [1, N, C], which are not projected."""
        value = self.v_proj
        return self.out_proj(
            token_to_image_attention(
                self.fold_queries(tokens), keys, key_pe[0], value.weight, value.bias, kernels=kernels
            )
        )

    def attend_shared(self, tokens: Tensor, image: SharedImageSide, image_index: Tensor | None, kernels: str) -> Tensor:
        """What tokens [P, T, C] learn of images whose keys and values are kept: one image, or one a prompt by index.

        The tokens of all prompts on a single image are one set of queries, and its keys are read once.
        """
        asked = self.q_proj(tokens)
        if len(image.k) == 1:
            return self.attend(asked.flatten(0, 1)[None], image.k, image.v, None, kernels).view(tokens.shape)
        if image_index is not None:
            image = image.select(image_index)
        return self.attend(asked, image.k, image.v, None, kernels)

    def _by_head(self, x: Tensor, weight: Tensor) -> Tensor:
        """[P, T, D] and [D, C] -> [P, heads, T, C], each head's channels of x by its rows of the weight."""
        heads = x.unflatten(-1, (self.num_heads, -1)).permute(2, 0, 1, 3)  # [heads, P, T, D / heads]
        folded = heads.flatten(1, 2) @ weight.unflatten(0, (self.num_heads, -1))
        return folded.unflatten(1, x.shape[:2]).transpose(0, 1)

    @property
    def _scale(self) -> float:
        return (self.internal_dim / self.num_heads) ** -0.5

    @property
    def is_official(self) -> bool:
        """Whether all projections are plain linears with a bias, whose weights can be folded."""
        projections = (self.q_proj, self.k_proj, self.v_proj, self.out_proj)
        return all(type(layer) is nn.Linear and layer.bias is not None for layer in projections)


def _folds(tokens: Tensor, kernels: str, *attentions: Attention) -> bool:
    """Whether the image side of ``attentions`` is folded into these tokens [P, T, C].

    Beyond :data:`MOST_TOKENS` tokens it would cost more than it saves; autocast would mix dtypes; and what a
    fine-tune put in place of a projection runs as it is.
    """
    return (
        kernels != "reference"
        and tokens.shape[1] <= MOST_TOKENS
        and not torch.is_autocast_enabled(tokens.device.type)
        and all(attention.is_official for attention in attentions)
    )


class TwoWayAttentionBlock(nn.Module):
    """Self-attention of tokens, tokens to image, MLP on tokens, image to tokens; a norm after each."""

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
            kernels: "reference" is the official modules; anything else folds the projections of the image where
                that saves work, and goes to the operations of ``fastsam_kernels``.
        """
        if self.skip_first_layer_pe:
            queries = self.self_attn(queries, queries, queries, token_mask, kernels)
        else:
            located = queries + query_pe
            queries = queries + self.self_attn(located, located, queries, token_mask, kernels)
        queries = self.norm1(queries)
        if type(self.norm4) is nn.LayerNorm and _folds(
            queries, kernels, self.cross_attn_token_to_image, self.cross_attn_image_to_token
        ):
            return self._cross_folded(queries, keys, query_pe, key_pe, token_mask, shared, image_index, kernels)
        if shared is None:
            shared = self.share_image_side(keys, key_pe)
        elif image_index is not None:
            shared = shared.select(image_index)
        return self._cross(queries, query_pe, token_mask, shared, kernels)

    def _cross(
        self, queries: Tensor, query_pe: Tensor, token_mask: Tensor | None, image: SharedImageSide, kernels: str
    ) -> tuple[Tensor, Tensor]:
        """Tokens to image, MLP, image to tokens, with the image projected: ``image`` has one row a prompt."""
        to_image, to_token = self.cross_attn_token_to_image, self.cross_attn_image_to_token
        asked = to_image.q_proj(queries + query_pe)
        queries = self.norm2(queries + to_image.attend(asked, image.k, image.v, None, kernels))
        queries = self.norm3(queries + self.mlp(queries))
        offered = to_token.k_proj(queries + query_pe)
        attended = to_token.attend(image.q, offered, to_token.v_proj(queries), token_mask, kernels)
        return queries, self.norm4(image.keys + attended)

    def _cross_folded(
        self,
        queries: Tensor,
        keys: Tensor,
        query_pe: Tensor,
        key_pe: Tensor,
        token_mask: Tensor | None,
        shared: SharedImageSide | None,
        image_index: Tensor | None,
        kernels: str,
    ) -> tuple[Tensor, Tensor]:
        """The same, with the projections of the image folded into the tokens."""
        to_image, to_token = self.cross_attn_token_to_image, self.cross_attn_image_to_token
        if shared is None:
            attended = to_image.attend_folded(queries + query_pe, keys, key_pe, kernels)
        else:
            keys = shared.keys
            attended = to_image.attend_shared(queries + query_pe, shared, image_index, kernels)
        queries = self.norm2(queries + attended)
        queries = self.norm3(queries + self.mlp(queries))
        keys = image_to_token_attention(
            keys,
            key_pe[0],
            *to_token.fold_tokens(queries + query_pe, queries, token_mask),
            self.norm4.weight,
            self.norm4.bias,
            eps=self.norm4.eps,
            image_index=image_index,
            kernels=kernels,
        )
        return queries, keys


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
        kernels: str = "reference",
    ) -> tuple[Tensor, Tensor]:
        """As ``forward`` on image tokens [P, N, C]; see :class:`TwoWayAttentionBlock` for the rest."""
        queries = tokens
        for index, layer in enumerate(self.layers):
            queries, keys = layer(
                queries=queries,
                keys=keys,
                query_pe=tokens,
                key_pe=key_pe,
                token_mask=token_mask,
                shared=shared if index == 0 else None,
                image_index=image_index if index == 0 else None,
                kernels=kernels,
            )
        final = self.final_attn_token_to_image
        if _folds(tokens, kernels, final):
            attended = final.attend_folded(queries + tokens, keys, key_pe, kernels)
        else:
            attended = final(queries + tokens, keys + key_pe, keys, None, kernels)
        return self.norm_final_attn(queries + attended), keys
