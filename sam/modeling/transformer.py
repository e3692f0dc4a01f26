"""The two-way transformer of SAM's mask decoder: prompt tokens and image tokens attend to each other.

Throughout: P prompts, T tokens a prompt, N image tokens, C channels, D channels inside an attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

    def select(self, image_index: Tensor | None, prompts: int) -> SharedImageSide:
        """One row a prompt; without an index the only image serves all, without a copy."""
        fields = (self.keys, self.k, self.v, self.q)
        if image_index is None:
            return SharedImageSide(*(field.expand(prompts, -1, -1) for field in fields))
        return SharedImageSide(*(field.index_select(0, image_index) for field in fields))


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
        kernels: str = "reference",
    ) -> tuple[Tensor, Tensor]:
        """Update tokens [P, T, C] and image tokens [P, N, C].

        Args:
            queries, query_pe: [P, T, C].
            keys, key_pe: [P, N, C] (``key_pe`` may have one row for all).
            token_mask: [P, T], False for tokens that are padding.
            shared: projections of ``keys`` made beforehand; None projects here.
            kernels: "reference", or anything else for PyTorch's fused attention.
        """
        if self.skip_first_layer_pe:
            queries = self.self_attn(queries, queries, queries, token_mask, kernels)
        else:
            located = queries + query_pe
            queries = queries + self.self_attn(located, located, queries, token_mask, kernels)
        queries = self.norm1(queries)

        if shared is None:
            shared = self.share_image_side(keys, key_pe)
        token_to_image, image_to_token = self.cross_attn_token_to_image, self.cross_attn_image_to_token
        asked = token_to_image.q_proj(queries + query_pe)
        queries = queries + token_to_image.attend(asked, shared.k, shared.v, None, kernels)
        queries = self.norm2(queries)

        queries = self.norm3(queries + self.mlp(queries))

        offered_k = image_to_token.k_proj(queries + query_pe)
        offered_v = image_to_token.v_proj(queries)
        keys = keys + image_to_token.attend(shared.q, offered_k, offered_v, token_mask, kernels)
        return queries, self.norm4(keys)


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
                kernels=kernels,
            )
        attended = self.final_attn_token_to_image(queries + tokens, keys + key_pe, keys, None, kernels)
        return self.norm_final_attn(queries + attended), keys
