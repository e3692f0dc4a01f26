"""Compile one launch for a named target, without a GPU, and read its machine code.

Triton compiles a launch for any target. For NVIDIA the ``cuobjdump`` in its wheel reads registers, stack and machine
code; for AMD the assembly says all of it. A Triton that interprets cannot compile, so this never shares a process
with the interpreter.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastsam_kernels.dispatch import is_triton_interpreter
from fastsam_kernels.triton.launch import Launch
from fastsam_kernels.triton.tiles import architectures

from . import ttgir, wgmma
from .compile_cases import AMD, CompileCase

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.bool: "i1"}
# Of a multiprocessor; its shared memory is a block's limit and 1 KB that the system keeps.
_REGISTERS_PER_SM = 65536
_AMD_SHARED_MEMORY = 64 * 1024  # LDS of a compute unit of CDNA 3


@dataclass(frozen=True)
class Compiled:
    """The compiled form of one launch.

    Attributes:
        registers: of a thread; at most 255 on NVIDIA, 512 vector registers on CDNA 3.
        stack: bytes of local memory a thread; more than 0 means values were spilled.
        spills: loads and stores of local memory in the machine code.
        shared, shared_limit: bytes a block.
        dot_rows: the most rows of a matrix product in it; 0 where there is none.
        tensor_core: its matrix instructions by name.
        wide_loads: loads of 128 bits from global memory, straight to registers or to shared memory.
        instructions: in all.
        programs_an_sm: how many fit a multiprocessor at once; None where that is not worked out.
        serialised: remarks of ptxas on sm_90 that matrix products wait for each other.
        hazards: writes to shared memory on sm_90 that another warpgroup may not be ready for.
        overwrites: copies ahead over tiles that their loop has yet to read.
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
    dot_rows: int
    tensor_core: dict[str, int]
    wide_loads: int
    instructions: int
    programs_an_sm: int | None
    serialised: list[str]
    hazards: list[str]
    overwrites: list[str]

    @property
    def asserted(self) -> bool:
        """Return whether a problem is an error: nothing is shipped for AMD."""
        return self.arch != AMD

    @property
    def problems(self) -> list[str]:
        """List what a tile must not have; the exact fp32 tiles may spill and have no tensor cores."""
        problems = []
        if self.shared > self.shared_limit:
            problems.append(f"{self.shared} bytes of shared memory, over {self.shared_limit}")
        problems += [f"another warpgroup may still read what is written in {place}" for place in self.hazards]
        problems += [f"its loop has yet to read the tile that is copied over in {place}" for place in self.overwrites]
        if self.dtype == "fp32":
            return problems
        if self.stack > 0:
            problems.append(f"{self.stack} bytes of stack")
        if self.dot_rows and not self.tensor_core:
            problems.append("no tensor-core instruction")
        # The newer instructions take 64 rows at least.
        expected = {"sm_90": "HGMMA", "sm_100": "UTC"}.get(self.arch)
        if expected and self.dot_rows >= 64 and not any(name.startswith(expected) for name in self.tensor_core):
            problems.append(f"no {expected} on {self.arch}")
        return problems + self.serialised


class _Device:
    """A stand-in for Triton's GPU driver: all that compiling needs of it is the architecture."""

    def __init__(self, arch: int | str) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("hip", arch, 64) if arch == AMD else GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> Any:
        return self._target  # what kernels are kept by

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target


def compile_launch(launch: Launch, arch: int | str) -> Any:
    """Compile a kernel for sm_``arch``, or for an AMD architecture by name, as a run there would compile it.

    Such a run finds it in Triton's cache on the disk. This process can launch nothing afterwards.

    Raises:
        RuntimeError: this process interprets.
    """
    pretend(arch)
    import triton

    # Put back afterwards: the knob is a variable of the environment, which is part of the key of Triton's cache.
    with triton.knobs.amd.scope():
        if arch == AMD:  # whose compiler stops at an assertion on rel_pos_attention with buffer operations
            triton.knobs.amd.use_buffer_ops = False
        return warmup(launch)


def pretend(arch: int | str) -> None:
    """Make this process compile for an architecture as if such a device were here.

    Raises:
        RuntimeError: this process interprets.
    """
    if is_triton_interpreter():
        raise RuntimeError("TRITON_INTERPRET=1: the interpreter cannot compile; run without it")
    from triton.runtime import driver

    driver.set_active(_Device(arch))


def warmup(launch: Launch) -> Any:
    """Compile a kernel for the active device, or take it from Triton's cache."""
    return launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.constexprs, **launch.options)


def inspect(case: CompileCase) -> Compiled:
    """Compile one case and read what came out."""
    compiled = compile_launch(case.launch, case.arch)
    tile = case.launch.tile
    hopper, ptx = case.arch == 90, compiled.asm.get("ptx", "")
    blocks = ", ".join(f"{name} {size}" for name, size in tile.blocks.items())
    read = _read_amd(compiled) if case.arch == AMD else _read_nvidia(compiled, int(case.arch), tile.num_warps)
    return Compiled(
        operation=case.operation,
        shape=case.shape,
        dtype=TYPES[case.dtype],
        arch=AMD if case.arch == AMD else f"sm_{case.arch}",
        tile=f"{blocks}; {tile.num_warps} warps, {tile.num_stages} stages",
        provisional=tile.provisional,
        shared=compiled.metadata.shared,
        dot_rows=max(map(int, re.findall(r"tt\.dot .*-> tensor<(\d+)x", compiled.asm["ttir"])), default=0),
        serialised=wgmma.serialised(ptx, case.arch, case.launch.fuse_multiply_add) if hopper else [],
        hazards=wgmma.hazards(ptx) if hopper else [],
        overwrites=[] if case.arch == AMD else ttgir.overwrites(compiled.asm["ttgir"]),
        **read,
    )


def _read_nvidia(compiled: Any, arch: int, num_warps: int) -> dict[str, Any]:
    usage, machine_code = _dump(compiled.asm["cubin"])
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", machine_code, re.M)
    registers, gpu = int(usage["REG"]), architectures()[arch]
    return {
        "registers": registers,
        "stack": int(usage["STACK"]),
        "spills": sum(name.startswith(("LDL", "STL")) for name in names),
        "shared_limit": gpu.shared_memory,
        "tensor_core": _count(r"HGMMA|UTC\w*MMA|HMMA|QGMMA|IMMA", names),
        "wide_loads": sum(bool(re.match(r"LDG\.E.*128|LDGSTS.*128|UBLKCP|UTMALDG", name)) for name in names),
        "instructions": len(names),
        "programs_an_sm": min(
            _REGISTERS_PER_SM // (32 * num_warps * (-(-registers // 8) * 8)),
            (gpu.shared_memory + 1024) // (compiled.metadata.shared + 1024),
            gpu.warps_per_sm // num_warps,
            gpu.programs_per_sm,
        ),
    }


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


def _read_amd(compiled: Any) -> dict[str, Any]:
    assembly = compiled.asm["amdgcn"]
    facts = {name: int(value) for name, value in re.findall(r"\.(\w+):\s*(\d+)\s*$", assembly, re.M)}
    names = re.findall(r"^\t([a-z]\w+)", assembly, re.M)
    return {
        "registers": facts["vgpr_count"],
        "stack": facts["private_segment_fixed_size"],
        "spills": facts["vgpr_spill_count"],
        "shared_limit": _AMD_SHARED_MEMORY,
        "tensor_core": _count(r"v_mfma", names),
        "wide_loads": sum(bool(re.match(r"(global|buffer)_load_dwordx4", name)) for name in names),
        "instructions": len(names),
        "programs_an_sm": None,
    }


def _count(pattern: str, names: list[str]) -> dict[str, int]:
    return dict(Counter(match[0] for name in names if (match := re.match(pattern, name)) is not None))
