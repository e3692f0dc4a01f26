"""``memory_attention``: the torch form against the formula in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_close_l2, assert_within_budget
from kernels.foundation import DTYPES
from torch import Tensor

from fastsam_kernels import UnsupportedKernelError, memory_attention, resolve_kernels
from fastsam_kernels.memory_attention import eager
from fastsam_kernels.memory_attention.reference import reference

Inputs = tuple[Tensor, Tensor, Tensor, tuple[int, ...]]


def make_inputs(
    lengths: tuple[int, ...],
    queries: int = 37,
    widths: tuple[int, int] = (64, 16),
    shared: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return (1.5 * torch.randn(shape, generator=generator, device=device)).to(dtype)

    objects = 1 if shared else len(lengths)
    return draw(objects, queries, widths[0]), draw(sum(lengths), widths[0]), draw(sum(lengths), widths[1]), lengths


def test_reference_is_the_projection_of_values_moved_behind_the_sum() -> None:
    """The formula that everything is held against, itself held against attention with projected values."""
    queries, keys, memory, lengths = make_inputs((20, 33), dtype=torch.float64)
    value, out = torch.randn(64, 16, dtype=torch.float64), torch.randn(64, 64, dtype=torch.float64)
    found = reference(queries, keys, memory, lengths) @ (out @ value).t()
    for row, (q, k, m) in enumerate(zip(queries, keys.split(lengths), memory.split(lengths), strict=True)):
        official = F.scaled_dot_product_attention(q[None], k[None], (m @ value.t())[None])[0] @ out.t()
        assert_close_l2(found[row], official, 1e-14, "the formula")


# One object and several, of equal and of different lengths, asking alike or each for itself; values that are narrower
# than keys, and as wide; more scores than a block holds.
CASES: list[dict[str, Any]] = [
    {"lengths": (64,)},
    {"lengths": (64, 1, 130)},
    {"lengths": (64, 64, 90, 90, 64), "shared": True},
    {"lengths": (50, 50), "widths": (64, 64)},
    {"lengths": (16400, 300), "queries": 300, "shared": True},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_eager(device: torch.device, dtype: torch.dtype, case: dict[str, Any]) -> None:
    inputs = make_inputs(**case, dtype=dtype, device=device)
    out = memory_attention(*inputs, kernels="torch")
    assert out.dtype == dtype
    assert_within_budget(out, reference, inputs, f"torch form, {dtype}, {case}")


def test_objects_of_equal_lengths_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere than on a CPU; there the scores of an object would not stay in the cache."""
    calls: list[tuple[int, ...]] = []
    fused = eager._fused
    monkeypatch.setattr(eager, "_fused", lambda q, k, v: (calls.append(tuple(k.shape)), fused(q, k, v))[1])
    inputs = [x.to("meta") if isinstance(x, Tensor) else x for x in make_inputs((64, 64, 90, 64), shared=True)]
    assert eager.eager(*inputs).shape == (4, 37, 16)  # type: ignore[arg-type]
    assert calls == [(2, 64, 64), (1, 90, 64), (1, 64, 64)]


def test_gradients() -> None:
    *tensors, lengths = make_inputs((9, 5), 3, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda *x: memory_attention(*x, lengths, kernels="torch"), leaves)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({0: torch.zeros(2, 3, 8)}, r"queries must be \[B, N, D\] and keys \[S, D\], got \[2, 3, 8\]"),
        ({2: torch.zeros(13, 16)}, r"values must be \[14, E\], one per key, got \[13, 16\]"),
        ({1: torch.zeros(14, 64).half()}, "dtypes must be the same"),
        ({3: (14, 0)}, r"lengths must be at least 1 and sum up to the 14 keys, got \[14, 0\]"),
        ({3: (9, 4)}, "sum up to the 14 keys"),
        ({3: (9, 4, 1)}, "queries are of 2 objects and lengths of 3"),
    ],
)
def test_bad_inputs_are_named(change: dict[int, Any], words: str) -> None:
    inputs = make_inputs((9, 5))
    with pytest.raises(ValueError, match=words):
        memory_attention(*[change.get(index, x) for index, x in enumerate(inputs)])


def test_there_is_no_triton_form() -> None:
    inputs = make_inputs((9, 5))
    with pytest.raises(UnsupportedKernelError, match="memory_attention has no 'triton' implementation"):
        memory_attention(*inputs, kernels="triton")
    assert resolve_kernels({"memory_attention": "torch"}, torch.device("cpu")) == "torch, memory_attention=torch"
    with pytest.raises(ValueError, match="memory_attention must be one of auto, reference, torch, triton, got 'cuda'"):
        memory_attention(*inputs, kernels={"memory_attention": "cuda"})
