"""The check of copies ahead, on TTGIR written by hand and on what the compiler made of a dot within an ``if``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.ttgir import overwrites

TILE = "!ttg.memdesc<32x64xbf16, #shared, #smem, mutable>"
COPY = f"%c = ttg.async_copy_global_to_local %p, %next mask %m : tensor<32x64x!tt.ptr<bf16>, #b> -> {TILE}"
AT = f"%now = ttg.memdesc_index %ring[%i] : !ttg.memdesc<2x32x64xbf16> -> {TILE}"
LOAD = f"%x = ttg.local_load %now token %w : {TILE} -> tensor<32x64xbf16, #b>"
FLIPPED = f"%flipped = ttg.memdesc_trans %now {{order = array<i32: 1, 0>}} : {TILE} -> {TILE}"
DOT = f"%y = ttng.warp_group_dot %a, %now, %acc {{isAsync = true}} : tensor<64x32xbf16> * {TILE} -> tensor<64x64xf32>"
WAIT = f"%z:2 = ttng.warp_group_dot_wait %y, %now {{pendings = 0 : i32}} : tensor<64x64xf32, #mma>, {TILE}"
WAIT_ONE = WAIT.replace("pendings = 0", "pendings = 1")
MMA = f"ttng.tc_gen5_mma %a, %now, %acc, %true, %true, %barrier[%true] {{is_async}} : {TILE}, {TILE}, {TILE}"
MMA_WAIT = "ttng.wait_barrier %barrier, %phase, %true : !ttg.memdesc<1xi64, #shared2, #smem, mutable>"
IF = ("%r = scf.if %t -> (tensor<64x64xf32>) {", "} else {", "}")


def found(
    *body: str, buffers: int = 2, ahead: int = 2, first: tuple[str, ...] = (), carried: str = "%none"
) -> list[str]:
    """What is said of a loop over ``body`` and tiles in ``buffers``, of which ``ahead`` are copied before it.

    ``first`` stands behind these copies, as the rounds that a pipeliner takes out of the loop.
    """
    text = [
        'module attributes {"ttg.num-warps" = 4 : i32} {',
        "tt.func public @kernel(%p: !tt.ptr<bf16>) {",
        f"%ring = ttg.local_alloc : () -> !ttg.memdesc<{buffers}x32x64xbf16, #shared, #smem, mutable>",
        f"%next = ttg.memdesc_index %ring[%j] : !ttg.memdesc<{buffers}x32x64xbf16> -> {TILE}",
        *[COPY] * ahead,
        *first,
        f"%l:2 = scf.for %i = %zero to %n step %one iter_args(%acc = {carried}) -> (tensor<64x64xf32>)  : i32 {{",
        "%w = ttg.async_wait %c {num = 1 : i32}",
        AT,
        *body,
        "scf.yield %z#0 : tensor<64x64xf32>",
        "} {tt.num_stages = 3 : i32}",
        "}",
        "}",
    ]
    return [line.partition(": ")[2] for line in overwrites("\n".join(text))]


@pytest.mark.parametrize("buffers", [1, 2, 3])
@pytest.mark.parametrize(
    "reads",
    [
        (LOAD,),
        (DOT, WAIT),
        (MMA, MMA_WAIT),
        (IF[0], DOT, WAIT, *IF[1:]),
        (FLIPPED, DOT.replace("%now", "%flipped"), WAIT),
    ],
    ids=["load", "wgmma", "tcgen05", "if", "transposed"],
)
def test_a_copy_over_the_tile_at_hand_comes_after_its_last_read(reads: tuple[str, ...], buffers: int) -> None:
    assert found(*reads, COPY, buffers=buffers, ahead=buffers) == []
    assert found(COPY, *reads, buffers=buffers, ahead=buffers) == [COPY]
    assert found(LOAD, COPY, *reads, buffers=buffers, ahead=buffers) == [COPY]
    assert found(COPY, *reads, buffers=buffers + 1, ahead=buffers) == [], "it goes to a buffer of its own"


def test_a_first_round_before_the_loop_has_read_its_tile() -> None:
    first = (AT.replace("[%i]", "[%zero]"), LOAD, COPY)
    assert found(LOAD, COPY, buffers=1, ahead=1, first=first) == []
    assert found(COPY, LOAD, buffers=1, ahead=1, first=first) == [COPY]
    assert found(LOAD, COPY, buffers=1, ahead=1, first=first[2:]) == [COPY], "nobody has read the first tile"


def test_a_product_that_is_waited_for_in_the_next_round() -> None:
    """Its barrier is carried over the end of the round, and what it has read stands among the wait's ``deps``."""
    bar = "!ttg.memdesc<1xi64, #shared2, #smem, mutable>"
    at = f"%barrier = ttg.memdesc_index %bars[%i] : !ttg.memdesc<2x1xi64> -> {bar}"
    bars = f"%b0 = ttg.memdesc_index %bars[%zero] : !ttg.memdesc<2x1xi64> -> {bar}"
    first = (
        "%bars = ttg.local_alloc : () -> !ttg.memdesc<2x1xi64, #shared2>",
        bars,
        AT,
        MMA.replace("%barrier", "%b0"),
    )
    wait = f"ttng.wait_barrier %acc, %phase deps %a, %now : {bar}, {TILE}, {TILE}"
    assert found(wait, at, MMA, COPY, first=first, carried="%b0") == []
    assert found(COPY, wait, at, MMA, first=first, carried="%b0") == [COPY]
    assert found(at, MMA, COPY, first=first, carried="%b0") == [COPY], "nobody waits for it"


@pytest.mark.parametrize(("issue", "wait"), [(DOT, WAIT), (MMA, MMA_WAIT)], ids=["wgmma", "tcgen05"])
def test_a_product_reads_until_it_is_waited_for(issue: str, wait: str) -> None:
    assert found(issue, COPY, wait) == [COPY]
    assert found(issue, COPY) == [COPY], "nobody waits for it"
    assert found(issue, MMA_WAIT.replace("%barrier", "%other"), COPY, wait) == [COPY]


def test_a_product_in_flight_over_the_end_of_an_iteration() -> None:
    assert found(DOT, WAIT_ONE, COPY, buffers=3, ahead=2) == []
    assert found(COPY, DOT, WAIT_ONE, buffers=3, ahead=2) == [COPY]
    assert found(DOT, WAIT_ONE, COPY, buffers=3, ahead=3) == [COPY]


def test_a_product_that_is_not_asynchronous_has_read_where_it_stands() -> None:
    assert found(DOT.replace("{isAsync = true} ", ""), COPY) == []


def test_copies_ahead_of_an_inner_loop_are_no_copies_of_the_outer() -> None:
    inner = ("scf.for %k = %zero to %n step %one  : i32 {", AT, DOT, WAIT, COPY, "}")
    assert found(COPY, COPY, *inner, buffers=2, ahead=0) == []
    late = ("scf.for %k = %zero to %n step %one  : i32 {", AT, COPY, DOT, WAIT, "}")
    assert found(COPY, COPY, *late, buffers=2, ahead=0) == [COPY]


def test_loops_without_copies_have_nothing_to_say() -> None:
    assert found(DOT, WAIT, ahead=0) == []
    assert overwrites("") == []


@pytest.mark.slow
def test_what_triton_makes_of_a_dot_in_an_if(tmp_path: Path) -> None:
    """A fault of the compiler that the kernels steer clear of; in a process of its own, as this one may interpret."""
    (tmp_path / "looping.py").write_text(LOOPING)
    run = subprocess.run(
        [sys.executable, tmp_path / "looping.py"],
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["90", "in_loop", "0", "90", "in_if", "1", "100", "in_loop", "0", "100", "in_if", "1"]


LOOPING = """
import torch
import triton
import triton.language as tl

from benchmarks.machine_code import compile_launch
from benchmarks.ttgir import overwrites
from fastsam_kernels.triton.launch import Launch
from fastsam_kernels.triton.tiles import TileConfig


@triton.jit
def kernel(a, b, c, n, IN_IF: tl.constexpr):
    row, column = tl.arange(0, 64), tl.arange(0, 64)
    tile = row[:, None] * 64 + column[None, :]
    x = tl.load(a + tile)
    y = tl.zeros([64, 64], tl.float32)
    for start in tl.range(0, n, 64, num_stages=2):
        keys = tl.load(b + start * 64 + tile)
        doubled = (keys.to(tl.float32) * 2).to(keys.dtype)
        z = tl.dot(x, tl.trans(doubled))
        z = tl.exp2(z).to(keys.dtype)
        y = y * 0.5
        if IN_IF:
            if start < n:
                y = tl.dot(z, keys, y)
        else:
            y = tl.dot(z, keys, y)
            y = tl.where(start < n, y, 0.0)
    tl.store(c + tile, y)


half, full = (torch.empty(4096, 64, dtype=dtype, device="meta") for dtype in (torch.bfloat16, torch.float32))
for arch in (90, 100):
    for name, inside in (("in_loop", False), ("in_if", True)):
        arguments = {"a": half, "b": half, "c": full, "n": 4096}
        launch = Launch(kernel, (1,), arguments, {"IN_IF": inside}, TileConfig({}, 4, 2))
        print(arch, name, len(overwrites(compile_launch(launch, arch).asm["ttgir"])))
"""
