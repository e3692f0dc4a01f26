"""Attention of SAM 2's memory attention, of one head: objects with different numbers of memories are one batch.

For a query i and the keys j of object b, of D channels:

    out_bi = sum_j softmax_j(q_bi . k_j / sqrt(D)) v_j

The keys of all objects lie one behind the other: the grids of memory frames first, then the tokens of object pointers.
Values may be narrower than keys. There is one head and nothing rotates values, so that the projection of the values
moves behind the sum, W_o (P (M W_v^T + b_v)) + b_o = (P M)(W_o W_v)^T + (W_o b_v + b_o): the values are the memories
themselves, 64 channels in place of 256. A frame's attention to itself is the same with one grid an object.

Sources: SAM 2 (arXiv 2408.00714); ``memory_attention.py`` and ``sam/transformer.py`` of sam2.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..dispatch import Implementation, Kernels, Operation, register
from .eager import eager
from .reference import reference


def memory_attention(
    queries: Tensor, keys: Tensor, values: Tensor, lengths: Sequence[int], *, kernels: Kernels = "auto"
) -> Tensor:
    """Attend with the tokens of a frame to the memories of B objects.

    Args:
        queries: [B, N, D], or [1, N, D] where all objects still ask alike; rotated by their position, not scaled.
        keys: [S, D], those of object 0 first; rotated where they are on a grid.
        values: [S, E], for each key.
        lengths: how many keys each object has, at least one; their sum is S.
        kernels: "reference", "torch" or "auto"; there is no Triton form yet.

    Returns:
        [B, N, E] in the dtype of ``values``; sums are fp32 at least.

    Raises:
        ValueError: shapes, dtypes or lengths that do not fit together, or an unknown ``kernels``.
        UnsupportedKernelError: "triton".
    """
    return MEMORY_ATTENTION.run(kernels, *_prepare(queries, keys, values, lengths))


def _prepare(
    queries: Tensor, keys: Tensor, values: Tensor, lengths: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    if queries.ndim != 3 or keys.ndim != 2 or queries.shape[2] != keys.shape[1]:
        raise ValueError(f"queries must be [B, N, D] and keys [S, D], got {list(queries.shape)}, {list(keys.shape)}")
    if values.ndim != 2 or len(values) != len(keys):
        raise ValueError(f"values must be [{len(keys)}, E], one per key, got {list(values.shape)}")
    if not queries.dtype == keys.dtype == values.dtype:
        raise ValueError(f"dtypes must be the same, got {queries.dtype}, {keys.dtype} and {values.dtype}")
    lengths = tuple(lengths)
    if any(length < 1 for length in lengths) or sum(lengths) != len(keys):
        raise ValueError(f"lengths must be at least 1 and sum up to the {len(keys)} keys, got {list(lengths)}")
    if len(queries) not in (1, len(lengths)):
        raise ValueError(f"queries are of {len(queries)} objects and lengths of {len(lengths)}")
    return queries, keys, values, lengths


MEMORY_ATTENTION = register(
    Operation("memory_attention", (Implementation("torch", eager), Implementation("reference", reference)), _prepare)
)
