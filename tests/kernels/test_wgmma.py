"""The lint of matrix instructions of sm_90, on PTX written by hand."""

from __future__ import annotations

import pytest

from benchmarks.machine_code import Compiled
from benchmarks.wgmma import hazards, remarks

PRODUCT = "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, 1, 1, 1, 0, 1;"
WAIT = "wgmma.wait_group.sync.aligned 0;"
WAIT_ONE = "wgmma.wait_group.sync.aligned 1;"
COMMIT = "wgmma.commit_group.sync.aligned;"
BARRIER = "bar.sync 0;"
WRITE = "st.shared.v4.b32 [%r2], {%r3, %r4, %r5, %r6};"


def kernel(*lines: str, threads: int = 256) -> str:
    head = [".visible .entry kernel(", ")", f".reqntid {threads}", "{"]
    return "\n".join([*head, *(line if line.startswith("$") else "\t" + line for line in lines), "\tret;", "}"])


def test_a_write_after_the_wait_is_found() -> None:
    assert hazards(kernel(PRODUCT, WAIT, WRITE)) == [f"line 7: {WRITE}"]


@pytest.mark.parametrize(
    "barrier",
    [
        BARRIER,
        "bar.sync 1, 256;",
        "bar.sync %r1;",
        "barrier.sync 0;",
        "barrier.cta.sync.aligned 0;",
        "barrier.cluster.wait.acquire;",
        "bar.red.popc.u32 %r1, 0, %p1;",
        "bar.red.and.pred %p2, 0, 256, !%p1;",
    ],
)
def test_a_barrier_of_all_threads_parts_them(barrier: str) -> None:
    assert hazards(kernel(PRODUCT, WAIT, barrier, WRITE)) == []
    assert hazards(kernel(PRODUCT, barrier, WAIT, WRITE)), "a barrier before the wait says nothing"


@pytest.mark.parametrize("other", ["mbarrier.try_wait.shared.b64 %p1, [%r1], %r2;", "bar.warp.sync 0xffffffff;"])
def test_no_other_barrier_does(other: str) -> None:
    assert hazards(kernel(PRODUCT, WAIT, other, WRITE))


def test_one_warpgroup_waits_for_itself() -> None:
    assert hazards(kernel(PRODUCT, WAIT, WRITE, threads=128)) == []


@pytest.mark.parametrize(
    "lines",
    [
        (PRODUCT, PRODUCT, WAIT_ONE, BARRIER, WAIT, WRITE),
        (PRODUCT, COMMIT, PRODUCT, PRODUCT, COMMIT, WAIT_ONE, BARRIER, WAIT, WRITE),
        (PRODUCT, COMMIT, "$L1:", PRODUCT, COMMIT, WAIT_ONE, BARRIER, "@%p1 bra $L1;", WAIT, WRITE),
    ],
)
def test_the_last_of_several_groups_must_be_parted_from_too(lines: tuple[str, ...]) -> None:
    assert len(hazards(kernel(*lines))) == 1
    assert hazards(kernel(*lines[:-1], BARRIER, WRITE)) == []


def test_a_wait_that_allows_as_many_groups_as_fly_waits_for_none() -> None:
    assert hazards(kernel(PRODUCT, PRODUCT, COMMIT, WAIT_ONE, WRITE)) == []
    assert hazards(kernel(PRODUCT, COMMIT, PRODUCT, COMMIT, WAIT_ONE, WRITE))


@pytest.mark.parametrize(
    "barrier",
    [
        "bar.sync 1, 128;",
        "bar.sync %r1, 128;",
        "bar.sync 1, %r7;",
        "bar.red.popc.u32 %r1, 1, 128, %p1;",
        "@%p1 bar.sync 0;",
        "@!%p1 barrier.sync 0;",
    ],
)
def test_a_barrier_of_some_threads_does_not(barrier: str) -> None:
    assert hazards(kernel(PRODUCT, WAIT, barrier, WRITE))


@pytest.mark.parametrize("line", ["{ %s }", "{%s}", "$L5: %s", "$L5: $L6: { %s", "mov.b32 %%r9, %%r8; %s"])
def test_however_a_line_is_written(line: str) -> None:
    assert len(hazards(kernel(PRODUCT, WAIT, line % WRITE))) == 1
    assert hazards(kernel(PRODUCT, WAIT, line % BARRIER, WRITE)) == []


def test_a_label_before_an_instruction_is_a_target() -> None:
    assert hazards(kernel(PRODUCT, WAIT, "bra.uni $L5;", BARRIER, f"$L5: {WRITE}"))


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
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1], %r2, [%r4];",
        "cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.add.u32 [%r1], [%r2], 8, [%r3];",
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r1], %r2, [%r3];",
        "atom.shared.add.u32 %r1, [%r2], 1;",
        "red.relaxed.cta.shared.add.u32 [%r2], 1;",
        "@%p1 st.shared.b16 [%r2], %rs1;",
    ],
)
def test_every_kind_of_write(write: str) -> None:
    assert len(hazards(kernel(PRODUCT, WAIT, write))) == 1
    assert hazards(kernel(PRODUCT, WAIT, BARRIER, write)) == []


@pytest.mark.parametrize(
    "other",
    [
        "st.global.b32 [%rd1], %r1;",
        "ld.shared.b32 %r1, [%r2];",
        "cp.async.wait_group 0;",
        "cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r1], %r2;",
    ],
)
def test_what_writes_no_shared_memory(other: str) -> None:
    assert hazards(kernel(PRODUCT, WAIT, other)) == []


def test_every_way_needs_a_barrier() -> None:
    skipped = ("@%p1 bra $L__BB0_2;", BARRIER, "$L__BB0_2:", WRITE)
    assert hazards(kernel(PRODUCT, WAIT, *skipped))
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
    assert Compiled(**facts | {"serialised": [], "hazards": [], "overwrites": []}).problems == []  # type: ignore[arg-type]
    bad = {"serialised": ["C7515: slow"], "hazards": ["line 7: st.shared"], "overwrites": ["line 3: %a = copy"]}
    result = Compiled(**facts | bad).problems  # type: ignore[arg-type]
    wrong = [
        "another warpgroup may still read what is written in line 7: st.shared",
        "its loop has yet to read the tile that is copied over in line 3: %a = copy",
    ]
    assert result == (wrong if dtype == "fp32" else [*wrong, "C7515: slow"])
