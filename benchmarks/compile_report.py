"""What the compiler makes of every shipped kernel, for every architecture, without a GPU.

Triton compiles a launch for a named target; the ``cuobjdump`` in its wheel reads registers, stack and machine code.
A Triton that interprets cannot compile, so this never shares a process with the interpreter.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastsam_kernels.dispatch import interpreting
from fastsam_kernels.launch import Launch
from fastsam_kernels.tile_config import SHARED_MEMORY

from .compile_cases import CompileCase, compile_cases
from .provenance import RESULTS, describe, provenance

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "i1",
}
# Of a multiprocessor: registers, and bytes of shared memory (a block's limit and 1 KB that the system keeps).
_REGISTERS_AN_SM = 65536
_WARPS_AN_SM = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}


@dataclass(frozen=True)
class Compiled:
    """What one launch became.

    Attributes:
        registers: of a thread, at most 255.
        stack: bytes of local memory a thread; more than 0 means values were spilled.
        spills: loads and stores of local memory in the machine code.
        shared, shared_limit: bytes a block.
        tensor_core: its tensor-core instructions by name.
        wide_loads: loads of 128 bits from global memory, straight to registers or (LDGSTS, bulk copies) to shared.
        instructions: in all.
        programs_an_sm: how many fit a multiprocessor at once.
    """

    operation: str
    shape: str
    dtype: str
    arch: str
    tile: str
    provisional: bool
    registers: int
    stack: int
    spills: int
    shared: int
    shared_limit: int
    tensor_core: dict[str, int]
    wide_loads: int
    instructions: int
    programs_an_sm: int

    @property
    def problems(self) -> list[str]:
        """What a 16-bit tile must not have."""
        expected = {"sm_90": "HGMMA", "sm_100": "UTC"}.get(self.arch)
        return [
            problem
            for problem, present in (
                (f"{self.stack} bytes of stack", self.stack > 0),
                (f"{self.shared} bytes of shared memory, over {self.shared_limit}", self.shared > self.shared_limit),
                ("no tensor-core instruction", not self.tensor_core),
                (
                    f"no {expected} on {self.arch}",
                    expected is not None and not any(name.startswith(expected) for name in self.tensor_core),
                ),
            )
            if present
        ]


def signature_of(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Types, constants and attributes of a launch as Triton specialises them at run time.

    Divisible by 16 are pointers (torch aligns memory) and the numbers that are; a number 1 becomes a constant.
    """
    types, constants, attributes = {}, dict(launch.constexprs), {}
    for place, name in enumerate(launch.kernel.arg_names):
        if name in constants:
            types[name] = "constexpr"
            continue
        value = launch.arguments[name]
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and value == 1):
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            types[name] = f"*{_TYPES[value.dtype]}"
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, bool):
            types[name] = "i1"
        elif isinstance(value, int):
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            types[name] = "fp32"
    return types, constants, attributes


def compile_launch(launch: Launch, arch: int) -> Any:
    """Triton's compiled kernel for sm_``arch``.

    Raises:
        RuntimeError: this process interprets.
    """
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET=1: the interpreter cannot compile; run without it")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants, attributes = signature_of(launch)
    source = ASTSource(fn=launch.kernel, signature=types, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.tile.num_warps, "num_stages": launch.tile.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def inspect(case: CompileCase) -> Compiled:
    """Compile one case and read what came out."""
    compiled = compile_launch(case.launch, case.arch)
    usage, machine_code = _dump(compiled.asm["cubin"])
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", machine_code, re.M)
    tensor_core = Counter(
        match[0] for name in names if (match := re.match(r"HGMMA|UTC\w*MMA|HMMA|QGMMA|IMMA", name)) is not None
    )
    wide = sum(bool(re.match(r"LDG\.E.*128|LDGSTS.*128|UBLKCP|UTMALDG", name)) for name in names)
    registers, stack = int(usage["REG"]), int(usage["STACK"])
    tile = case.launch.tile
    blocks = ", ".join(f"{name} {size}" for name, size in tile.blocks.items())
    shared, limit = compiled.metadata.shared, SHARED_MEMORY[case.arch]
    return Compiled(
        operation=case.operation,
        shape=case.shape,
        dtype=_TYPES[case.dtype],
        arch=f"sm_{case.arch}",
        tile=f"{blocks}; {tile.num_warps} warps, {tile.num_stages} stages",
        provisional=tile.provisional,
        registers=registers,
        stack=stack,
        spills=sum(name.startswith(("LDL", "STL")) for name in names),
        shared=shared,
        shared_limit=limit,
        tensor_core=dict(tensor_core),
        wide_loads=wide,
        instructions=len(names),
        programs_an_sm=min(
            _REGISTERS_AN_SM // (32 * tile.num_warps * (-(-registers // 8) * 8)),
            (limit + 1024) // (shared + 1024),
            _WARPS_AN_SM[case.arch] // tile.num_warps,
        ),
    )


def _dump(cubin: bytes) -> tuple[dict[str, str], str]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    return dict(re.findall(r"(\w+):(\d+)", usage)), code


def compile_all(cases: Iterable[CompileCase], workers: int) -> list[Compiled]:
    """Every case, in processes of their own."""
    # Kernels cannot be sent to a process; forked ones have them already.
    _CASES[:] = cases
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        places = range(len(_CASES))
        return list(tqdm(pool.map(_inspect_place, places), total=len(places), desc="compile", disable=None))


_CASES: list[CompileCase] = []


def _inspect_place(place: int) -> Compiled:
    return inspect(_CASES[place])


def to_markdown(rows: list[Compiled], facts: dict[str, Any]) -> str:
    """The table, one row a launch."""
    head = [
        "kernel",
        "shape",
        "arch",
        "dtype",
        "tile",
        "registers",
        "stack",
        "shared KB",
        "tensor core",
        "128-bit loads",
    ]
    head += ["instructions", "programs an SM", ""]
    lines = [
        "# Compile report",
        "",
        f"triton {facts['triton']}, revision {facts['revision']}, {facts['date']}. Regenerate: "
        "`python -m benchmarks compile-report --write`.",
        "",
        "Compiled, not run. 16-bit tiles must have no stack, fit the shared memory and use tensor cores; fp32 is exact",
        "and slow, and only reported.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for row in rows:
        cores = ", ".join(f"{count} {name}" for name, count in row.tensor_core.items()) or "none"
        verdict = "; ".join(row.problems) if row.dtype != "fp32" else "reported"
        cells = [row.operation, row.shape, row.arch, row.dtype, row.tile, row.registers, row.stack]
        cells += [f"{row.shared / 1024:.0f} / {row.shared_limit // 1024}", cores, row.wide_loads, row.instructions]
        cells += [row.programs_an_sm, verdict or "ok"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def run(operations: list[str] | None, arches: list[int] | None, workers: int, write: bool) -> int:
    """The command: print the table, write it if asked, exit status 1 when a 16-bit tile has a problem."""
    rows = compile_all(compile_cases(operations, arches), workers)
    facts = provenance()
    print(to_markdown(rows, facts))
    if write:
        (RESULTS / "compile_report.md").write_text(to_markdown(rows, facts))
        document = {"provenance": {**facts, "gpu": None}, "rows": [asdict(row) for row in rows]}
        (RESULTS / "compile_report.json").write_text(json.dumps(document, indent=1) + "\n")
    bad = [row for row in rows if row.dtype != "fp32" and row.problems]
    for row in bad:
        print(f"{row.operation} {row.arch} {row.dtype} ({row.shape}): {'; '.join(row.problems)}")
    print(f"{len(rows)} launches, {len(bad)} with problems; {describe(facts)}")
    return 1 if bad else 0
