"""bf16 in the interpreter against torch, bit by bit: what it shows of kernels is worth as much as this."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from kernels.interpreter_bf16 import bf16_in_the_interpreter, narrow

from fastsam_kernels.dispatch import is_triton_interpreter

pytestmark = pytest.mark.skipif(not is_triton_interpreter(), reason="a GPU has bf16 of its own")


@triton.jit
def cast_kernel(source_ptr, out_ptr, count, block: tl.constexpr):
    i = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(out_ptr + i, tl.load(source_ptr + i, mask=i < count).to(out_ptr.dtype.element_ty), mask=i < count)


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, side: tl.constexpr):
    i = tl.arange(0, side)
    place = i[:, None] * side + i[None, :]
    tl.store(out_ptr + place, tl.dot(tl.load(a_ptr + place), tl.load(b_ptr + place)))


@triton.jit
def add_kernel(a_ptr, out_ptr):
    tl.store(out_ptr, tl.load(a_ptr) + tl.load(a_ptr))


def cast(source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(len(source), dtype=dtype)
    cast_kernel[(triton.cdiv(len(source), 4096),)](source, out, len(source), block=4096)
    return out


def assert_same_bits(result: torch.Tensor, expected: torch.Tensor) -> None:
    """The payload of NaN is free."""
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.view(torch.int16)[~result.isnan()], expected.view(torch.int16)[~result.isnan()])


def samples() -> torch.Tensor:
    """Every kind of fp32 bit pattern, and each bf16 with what lies around the middle between it and the next."""
    patterns = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    every = np.arange(2**16, dtype=np.uint32) << 16
    middles = np.concatenate([every + offset for offset in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    return torch.from_numpy(np.concatenate([patterns, middles]).view(np.float32))


def test_casts_round_as_torch_does() -> None:
    values = samples()
    assert_same_bits(cast(values, torch.bfloat16), values.bfloat16())
    every = torch.arange(-(2**15), 2**15).short().view(torch.bfloat16)
    widened = cast(every, torch.float32)
    assert torch.equal(widened[~every.isnan()], every.float()[~every.isnan()])
    assert torch.equal(widened.isnan(), every.isnan())


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32])
def test_casts_of_other_types(dtype: torch.dtype) -> None:
    values = (
        torch.arange(-40_000, 40_000).to(dtype) if dtype == torch.int32 else torch.linspace(-7e4, 7e4, 50_001).half()
    )
    narrowed = cast(values, torch.bfloat16)
    assert_same_bits(narrowed, values.bfloat16())
    if dtype == torch.float16:
        assert torch.equal(cast(narrowed, dtype), narrowed.half())


def test_a_dot_of_bf16_sums_exact_products_in_fp32() -> None:
    a, b = (torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0)) * 8).bfloat16()
    whole = a.round(), b.round()  # their sums are exact in fp32
    out = torch.empty(64, 64)
    dot_kernel[(1,)](*whole, out, side=64)
    assert torch.equal(out.double(), whole[0].double() @ whole[1].double())
    dot_kernel[(1,)](a, b, out, side=64)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=0, atol=64 * 64 * torch.finfo(out.dtype).eps)


def test_a_dot_of_fp32_rounds_once_whatever_the_cpu() -> None:
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    out, exact = torch.empty(256, 256), a.double() @ b.double()
    dot_kernel[(1,)](a, b, out, side=256)
    half = torch.finfo(out.dtype).eps / 2
    assert bool(((out.double() - exact).abs() <= half * exact.abs() * (1 + 1e-6)).all())


def test_what_would_calculate_with_bit_patterns_refuses() -> None:
    ones = torch.ones(1, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="widen to fp32 before calculating"):
        add_kernel[(1,)](ones, torch.empty_like(ones))


def test_the_interpreter_is_as_before_afterwards() -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    before = dict(vars(InterpreterBuilder))
    with bf16_in_the_interpreter():
        assert InterpreterBuilder.create_dot is not before["create_dot"]
    assert dict(vars(InterpreterBuilder)) == before


def test_rounding_by_hand() -> None:
    """Ties go to the even neighbour; the largest fp32 is nearest to infinity."""
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.3895314e38, 3.4028235e38, np.inf], np.float32)
    assert [hex(bits) for bits in narrow(ties)] == ["0x3f80", "0x3f82", "0xbf80", "0x7f7f", "0x7f80", "0x7f80"]
