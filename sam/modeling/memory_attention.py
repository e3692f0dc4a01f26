"""SAM 2's memory attention: the features of a frame learn from the memories and object pointers of other frames.

Throughout: B objects, N tokens of a frame, K tokens of memories, C channels. A memory is narrower than the frame.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .position_encoding import apply_rotary_enc, compute_axial_cis
from .transformer import Attention
from .weight_cache import WeightCache

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "glu": F.glu}


class RoPEAttention(Attention):
    """Attention whose queries and keys are rotated by their place on a square grid.

    Args:
        embedding_dim, num_heads, downsample_rate, dropout, kv_in_dim: see :class:`Attention`.
        rope_theta: the frequencies are its powers.
        rope_k_repeat: the keys are several grids; each is rotated like the queries.
        feat_sizes: columns and rows for which the rotations are made beforehand.
    """

    def __init__(
        self,
        *args: Any,
        rope_theta: float = 10000.0,
        rope_k_repeat: bool = False,
        feat_sizes: tuple[int, int] = (64, 64),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.rope_theta = rope_theta
        self.rope_k_repeat = rope_k_repeat
        self.freqs_cis = self.compute_cis(end_x=feat_sizes[0], end_y=feat_sizes[1])

    def compute_cis(self, end_x: int, end_y: int) -> Tensor:
        """Return the rotations of a grid, see :func:`compute_axial_cis`."""
        return compute_axial_cis(self.internal_dim // self.num_heads, end_x, end_y, self.rope_theta)

    def _rotations(self, tokens: int, device: torch.device) -> Tensor:
        """Return the rotations of a square grid of ``tokens`` on ``device``, kept for the next call."""
        rotations = self.freqs_cis
        if len(rotations) != tokens or rotations.device != device:
            with torch.inference_mode(False), torch.no_grad():  # a kept table serves later training too
                if len(rotations) != tokens:
                    side = math.isqrt(tokens)
                    rotations = self.compute_cis(end_x=side, end_y=side)
                self.freqs_cis = rotations = rotations.to(device)
        return rotations

    def forward(self, q: Tensor, k: Tensor, v: Tensor, num_k_exclude_rope: int = 0) -> Tensor:
        """Attend with queries [B, N, C] to keys and values [B, K, kv_in_dim]; returns [B, N, C].

        Args:
            num_k_exclude_rope: how many of the last keys are on no grid and not rotated.

        Raises:
            ValueError: queries that are no square grid, or other keys than queries without ``rope_k_repeat``.
        """
        if math.isqrt(q.shape[-2]) ** 2 != q.shape[-2]:
            raise ValueError(f"rotated attention takes a square grid of queries, got {q.shape[-2]} tokens")
        if q.shape[-2] != k.shape[-2] and not self.rope_k_repeat:
            raise ValueError(f"{k.shape[-2]} keys for {q.shape[-2]} queries need rope_k_repeat")
        q, k, v = (self._separate_heads(x, self.num_heads) for x in (self.q_proj(q), self.k_proj(k), self.v_proj(v)))
        on_grid = k.shape[-2] - num_k_exclude_rope
        rotations = self._rotations(q.shape[-2], q.device)
        q, rotated = apply_rotary_enc(q, k[:, :, :on_grid], rotations, self.rope_k_repeat)
        k = torch.cat([rotated, k[:, :, on_grid:]], dim=2) if num_k_exclude_rope else rotated
        dropout = self.dropout_p if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.out_proj(self._recombine_heads(out))


class MemoryAttentionLayer(nn.Module):
    """Self-attention of a frame, attention to the memories, MLP; a norm before each.

    Args:
        activation: "relu", "gelu" or "glu".
        cross_attention, self_attention: the two attentions.
        d_model: C.
        dim_feedforward: hidden channels of the MLP.
        dropout: while training.
        pos_enc_at_attn: add positions to queries and keys of the self-attention.
        pos_enc_at_cross_attn_keys, pos_enc_at_cross_attn_queries: add positions there.
    """

    __constants__ = ("activation_str", "pos_enc_at_attn", "pos_enc_at_cross_attn_keys", "pos_enc_at_cross_attn_queries")

    def __init__(
        self,
        activation: str,
        cross_attention: nn.Module,
        d_model: int,
        dim_feedforward: int,
        dropout: float,
        pos_enc_at_attn: bool,
        pos_enc_at_cross_attn_keys: bool,
        pos_enc_at_cross_attn_queries: bool,
        self_attention: nn.Module,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.dim_feedforward = dim_feedforward
        self.dropout_value = dropout
        self.self_attn = self_attention
        self.cross_attn_image = cross_attention
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(d_model) for _ in range(3))
        self.dropout1, self.dropout2, self.dropout3 = (nn.Dropout(dropout) for _ in range(3))
        self.activation_str = activation
        self.activation = get_activation_fn(activation)
        self.pos_enc_at_attn = pos_enc_at_attn
        self.pos_enc_at_cross_attn_queries = pos_enc_at_cross_attn_queries
        self.pos_enc_at_cross_attn_keys = pos_enc_at_cross_attn_keys

    def _forward_sa(self, tgt: Tensor, query_pos: Any) -> Tensor:
        x = self.norm1(tgt)
        q = x + query_pos if self.pos_enc_at_attn else x
        return tgt + self.dropout1(self.self_attn(q, q, v=x))

    def _forward_ca(
        self,
        tgt: Tensor,
        memory: Tensor,
        query_pos: Any,
        pos: Any,
        num_k_exclude_rope: int = 0,
    ) -> Tensor:
        x = self.norm2(tgt)
        exclude = {"num_k_exclude_rope": num_k_exclude_rope} if num_k_exclude_rope > 0 else {}
        learnt = self.cross_attn_image(
            q=x + query_pos if self.pos_enc_at_cross_attn_queries else x,
            k=memory + pos if self.pos_enc_at_cross_attn_keys else memory,
            v=memory,
            **exclude,
        )
        return tgt + self.dropout2(learnt)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        pos: Tensor | None = None,
        query_pos: Tensor | None = None,
        num_k_exclude_rope: int = 0,
    ) -> Tensor:
        """Update the frame ``tgt`` [B, N, C] by ``memory`` [B, K, mem_dim], given the positions of both."""
        tgt = self._forward_sa(tgt, query_pos)
        tgt = self._forward_ca(tgt, memory, query_pos, pos, num_k_exclude_rope)
        x = self.linear2(self.dropout(self.activation(self.linear1(self.norm3(tgt)))))
        return tgt + self.dropout3(x)


class MemoryAttention(WeightCache):
    """``num_layers`` copies of ``layer``, and a last norm.

    Args:
        d_model: C.
        pos_enc_at_input: add a tenth of the frame's positions to it.
        layer: a :class:`MemoryAttentionLayer`.
        num_layers: copies of it.
        batch_first: the layers take objects before tokens.
    """

    __constants__ = ("pos_enc_at_input", "batch_first")

    def __init__(
        self, d_model: int, pos_enc_at_input: bool, layer: nn.Module, num_layers: int, batch_first: bool = True
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.layers = get_clones(layer, num_layers)
        self.num_layers = num_layers
        self.norm = nn.LayerNorm(d_model)
        self.pos_enc_at_input = pos_enc_at_input
        self.batch_first = batch_first

    def forward(
        self,
        curr: Tensor | list[Tensor],
        memory: Tensor,
        curr_pos: Tensor | list[Tensor] | None = None,
        memory_pos: Tensor | None = None,
        num_obj_ptr_tokens: int = 0,
    ) -> Tensor:
        """Attend from a frame to itself and to memories, layer by layer.

        Args:
            curr: [N, B, C] of the frame, or a list of one such.
            memory: [K, B, mem_dim], object pointers last.
            curr_pos: positions [N, B, C] of ``curr``, given as it is.
            memory_pos: positions [K, B, mem_dim].
            num_obj_ptr_tokens: how many of the last tokens of ``memory`` are pointers.

        Returns:
            [N, B, C].

        Raises:
            ValueError: another number of objects in ``memory``, or several frames.
        """
        x, position = (_only(value) if isinstance(value, list) else value for value in (curr, curr_pos))
        assert x is not None
        if x.shape[1] != memory.shape[1]:
            raise ValueError(f"memories of {memory.shape[1]} objects for a frame of {x.shape[1]}")
        fused = self._fused(x, memory, position, memory_pos, num_obj_ptr_tokens)
        if fused is not None:
            return fused
        if self.pos_enc_at_input and position is not None:
            x = x + 0.1 * position
        if self.batch_first:
            x, memory = x.transpose(0, 1), memory.transpose(0, 1)
            position, memory_pos = (p if p is None else p.transpose(0, 1) for p in (position, memory_pos))
        for layer in self.layers:
            rotates = isinstance(layer.cross_attn_image, RoPEAttention)
            exclude = {"num_k_exclude_rope": num_obj_ptr_tokens} if rotates else {}
            x = layer(tgt=x, memory=memory, pos=memory_pos, query_pos=position, **exclude)
        x = self.norm(x)
        return x.transpose(0, 1) if self.batch_first else x


def _only(values: list[Tensor]) -> Tensor:
    if len(values) != 1:
        raise ValueError(f"memory attention takes one level of features, got {len(values)}")
    return values[0]


def get_activation_fn(activation: str) -> Callable[[Tensor], Tensor]:
    """Return the function of a name.

    Raises:
        RuntimeError: no "relu", "gelu" or "glu".
    """
    if activation not in _ACTIVATIONS:
        raise RuntimeError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
    return _ACTIVATIONS[activation]


def get_clones(module: nn.Module, N: int) -> nn.ModuleList:  # noqa: N803 - official
    """Return ``N`` copies of ``module`` with weights of their own."""
    return nn.ModuleList(copy.deepcopy(module) for _ in range(N))
