"""The lint of matrix instructions of sm_90, on PTX written by hand."""

from __future__ import annotations

import pytest

from benchmarks.machine_code import Compiled
from benchmarks.wgmma import hazards, remarks

PRODUCT = "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, 1, 1, 1, 0, 1;"
WAIT = "wgmma.wait_group.sync.aligned 0;"
BARRIER = "bar.sync 0;"
WRITE = "st.shared.v4.b32 [%r2], {%r3, %r4, %r5, %r6};"


def kernel(*lines: str, threads: int = 256) -> str:
    head = [".visible .entry kernel(", ")", f".reqntid {threads}", "{"]
    return "\n".join([*head, *(line if line.startswith("$") else "\t" + line for line in lines), "\tret;", "}"])


def test_a_write_after_the_wait_is_found() -> None:
    assert hazards(kernel(PRODUCT, WAIT, WRITE)) == [f"line 7: {WRITE}"]


@pytest.mark.parametrize(
    "barrier", [BARRIER, "barrier.sync 0;", "barrier.cta.sync.aligned 0;", "bar.red.popc.u32 %r1, 0, %p1;"]
)
def test_a_barrier_of_all_threads_parts_them(barrier: str) -> None:
    assert hazards(kernel(PRODUCT, WAIT, barrier, WRITE)) == []
    assert hazards(kernel(PRODUCT, barrier, WAIT, WRITE)), "a barrier before the wait says nothing"


@pytest.mark.parametrize("other", ["mbarrier.try_wait.shared.b64 %p1, [%r1], %r2;", "bar.warp.sync 0xffffffff;"])
def test_no_other_barrier_does(other: str) -> None:
    assert hazards(kernel(PRODUCT, WAIT, other, WRITE))


def test_one_warpgroup_waits_for_itself() -> None:
    assert hazards(kernel(PRODUCT, WAIT, WRITE, threads=128)) == []


def test_writes_beside_a_product_are_a_pipeline() -> None:
    """They go to another buffer, or no tile could be loaded ahead."""
    assert hazards(kernel(PRODUCT, WRITE, WAIT, BARRIER)) == []


def test_another_product_does_not_part_them() -> None:
    assert hazards(kernel(PRODUCT, WAIT, PRODUCT, WRITE))


def test_a_wait_without_a_product_is_nothing() -> None:
    assert hazards(kernel(WAIT, WRITE)) == []


@pytest.mark.parametrize(
    "write",
    [
        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r1], {%r2, %r3, %r4, %r5};",
        "@%p3 cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;",
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2, %r3}], [%r4];",
        "atom.shared.add.u32 %r1, [%r2], 1;",
        "red.relaxed.cta.shared.add.u32 [%r2], 1;",
        "@%p1 st.shared.b16 [%r2], %rs1;",
    ],
)
def test_every_kind_of_write(write: str) -> None:
    assert len(hazards(kernel(PRODUCT, WAIT, write))) == 1
    assert hazards(kernel(PRODUCT, WAIT, BARRIER, write)) == []


@pytest.mark.parametrize("other", ["st.global.b32 [%rd1], %r1;", "ld.shared.b32 %r1, [%r2];", "cp.async.wait_group 0;"])
def test_what_writes_no_shared_memory(other: str) -> None:
    assert hazards(kernel(PRODUCT, WAIT, other)) == []


def test_every_way_needs_a_barrier() -> None:
    some = ("@%p1 bra $L__BB0_2;", BARRIER, "$L__BB0_2:", WRITE)
    assert hazards(kernel(PRODUCT, WAIT, *some))
    assert hazards(kernel(PRODUCT, WAIT, "bra.uni $L__BB0_2;", WRITE, "$L__BB0_2:", BARRIER, WRITE)) == []


def test_around_a_loop() -> None:
    """The write at its top comes after the wait at its bottom, once around."""
    label, back = "$L__BB0_1:                // =>This Inner Loop Header: Depth=1", "@%p1 bra $L__BB0_1;"
    top = (label, WRITE, BARRIER, PRODUCT, WAIT)
    assert hazards(kernel(*top, back)) == [f"line 6: {WRITE}"]
    assert hazards(kernel(*top, BARRIER, back)) == []


def test_remarks_of_ptxas() -> None:
    loss = "Potential Performance Loss: wgmma.mma_async instructions are serialized due to"
    log = [
        f"ptxas info    : (C7515) {loss} others in the function 'a_kernel'",
        f"ptxas info    : (C7515) {loss} others in the function 'b_kernel'",
        f"ptxas info    : (C7510) {loss} too few registers in function 'a_kernel'",
        "ptxas info    : Used 174 registers, used 1 barriers",
    ]
    said = "wgmma.mma_async instructions are serialized due to"
    assert remarks("\n".join(log)) == [f"C7515: {said} others", f"C7510: {said} too few registers"]
    assert remarks(log[-1]) == []


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_report_fails_on_either(dtype: str) -> None:
    facts = dict.fromkeys(Compiled.__dataclass_fields__, 0) | {"arch": "sm_90", "dtype": dtype, "tensor_core": {}}
    assert Compiled(**facts | {"serialised": [], "hazards": []}).problems == []  # type: ignore[arg-type]
    found = Compiled(**facts | {"serialised": ["C7515: slow"], "hazards": ["line 7: st.shared"]}).problems  # type: ignore[arg-type]
    hazard = "another warpgroup may still read what is written in line 7: st.shared"
    assert found == ([hazard] if dtype == "fp32" else [hazard, "C7515: slow"])
