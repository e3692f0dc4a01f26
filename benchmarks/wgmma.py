"""What can go wrong with the matrix instructions of sm_90 that no other check sees, read off PTX and ``ptxas -v``.

``hazards``: a warpgroup that has waited for its own product knows nothing of another's, which may still read the same
operands in shared memory. So between a ``wgmma.wait_group`` and the next write to shared memory a barrier of all
threads must stand, on every way through the kernel. (triton issues 11047 and 11050: a compiler left it out.)

``serialised``: ptxas makes each ``wgmma`` wait for the one before it where registers do not suffice or where others
touch an accumulator, and only says so in a remark (C7510 to C7515).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_WARPGROUP = 128  # threads
_KINDS = {
    "product": r"wgmma\.mma_async",
    "wait": r"wgmma\.wait_group",
    "barrier": r"(bar|barrier)(\.cta)?\.(sync|red)|barrier\.cluster\.wait",
    "write": r"(st|red|atom)(\.\w+)*\.shared|stmatrix|cp\.async\.(c[ag]\.shared|bulk(\.\w+)*\.shared)",
    "branch": r"bra\b",
    "end": r"(ret|exit|trap)\b",
}
_INSTRUCTION = re.compile(r"(@!?%\w+\s+)?([a-z][\w.:]*)(.*)")


@dataclass
class _Block:
    """Instructions without a label between them: line number, kind, target, and whether it has a predicate."""

    steps: list[tuple[int, str, str, bool]] = field(default_factory=list)


def hazards(ptx: str) -> list[str]:
    """Each write to shared memory that another warpgroup may not be ready for, as the line of the PTX it stands on."""
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", ptx)
    if threads is not None and int(threads[1]) <= _WARPGROUP:
        return []  # one warpgroup waits for itself
    blocks, names = _blocks(ptx)
    lines = ptx.splitlines()
    found: set[int] = set()
    seen: set[tuple[int, bool, bool]] = set()
    ways = [(0, False, False)]
    while ways:
        place, issued, waited = ways.pop()
        if place >= len(blocks) or (place, issued, waited) in seen:
            continue
        seen.add((place, issued, waited))
        for line, kind, target, predicated in blocks[place].steps:
            if kind == "product":
                issued = True
            elif kind == "wait":
                waited |= issued
                issued = False
            elif kind == "barrier":
                waited = False
            elif kind == "write" and waited:
                found.add(line)
            elif kind == "branch":
                ways.append((names[target], issued, waited))
            if kind in ("branch", "end") and not predicated:
                break
        else:
            ways.append((place + 1, issued, waited))
    return [f"line {line + 1}: {lines[line].strip()}" for line in sorted(found)]


def _blocks(ptx: str) -> tuple[list[_Block], dict[str, int]]:
    """The blocks in their order, and the place of each by its label."""
    blocks, names = [_Block()], {}
    for number, kind, target, predicated in _steps(ptx):
        if kind == "label":
            names[target] = len(blocks)
            blocks.append(_Block())
        else:
            blocks[-1].steps.append((number, kind, target, predicated))
    return blocks, names


def _steps(ptx: str) -> Iterator[tuple[int, str, str, bool]]:
    for number, line in enumerate(ptx.splitlines()):
        text = line.partition("//")[0].strip()
        label = re.match(r"(\$?\w+):$", text)
        if label is not None:
            yield number, "label", label[1], False
            continue
        instruction = _INSTRUCTION.match(text)
        if instruction is None:
            continue
        predicate, name, operands = instruction.groups()
        kind = next((kind for kind, pattern in _KINDS.items() if re.match(pattern, name)), None)
        if kind is not None:
            target = re.search(r"(\$?\w+);", operands) if kind == "branch" else None
            yield number, kind, target[1] if target else "", predicate is not None


def serialised(ptx: str, arch: int, fuse_multiply_add: bool) -> list[str]:
    """What ptxas remarks of products that it makes wait for each other; empty without any ``wgmma``."""
    if "wgmma.mma_async" not in ptx:
        return []
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    fusion = [] if fuse_multiply_add else ["--fmad=false"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(arch).path, "-v", *fusion, f"--gpu-name={sm_arch_from_capability(arch)}", source]
        done = subprocess.run([*command, "-o", f"{source}.o"], capture_output=True, text=True, check=True)
    return remarks(done.stderr)


def remarks(log: str) -> list[str]:
    """The remarks of serialised products in the output of ``ptxas -v``, each once."""
    said = r"\((C75\d\d)\).*?(wgmma\S* instructions are serialized.*?)(?: in (?:the )?function .*)?$"
    return list(dict.fromkeys(f"{code}: {text}" for code, text in re.findall(said, log, re.M)))
