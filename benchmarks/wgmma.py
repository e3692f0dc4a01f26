"""Hazards of sm_90's matrix instructions that no other check sees, read off PTX and ``ptxas -v``.

``hazards``: a warpgroup that has waited for its own product knows nothing of another's, which may still read the same
operands in shared memory. So between a ``wgmma.wait_group`` and the next write to shared memory a barrier of all
threads must stand, on every way through the kernel. (triton issues 11047 and 11050: a compiler left it out.) It
knows no addresses: a write to what no product reads is a hazard to it, and one over operands that a product has yet
to read, or that it reads meanwhile, is none. :mod:`.ttgir` sees those.

``serialised``: ptxas makes each ``wgmma`` wait for the one before it where registers do not suffice or where others
touch an accumulator, and only says so in a remark (C7510 to C7515).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

_WARPGROUP = 128  # threads
_KINDS = {
    "product": r"wgmma\.mma_async",
    "commit": r"wgmma\.commit_group",
    "wait": r"wgmma\.wait_group",
    "barrier": r"(bar|barrier)(\.cta)?\.sync|barrier\.cluster\.wait",
    "reduction": r"(bar|barrier)(\.cta)?\.red",
    "write": r"(st|red|atom)(\.\w+)*\.shared|stmatrix"
    r"|cp\.async\.c[ag]\.shared|cp\.(reduce\.)?async\.bulk(\.tensor\.\dd)?\.shared",
    "branch": r"bra\b",
    "end": r"(ret|exit|trap)\b",
}
_LABEL = re.compile(r"(\$?\w+):(?!:)")
_INSTRUCTION = re.compile(r"(@!?%\w+\s+)?([a-z][\w.:]*)(.*)")
_MOST_FLYING = 8  # more groups in flight than this are not told apart


@dataclass(frozen=True)
class _Step:
    """One instruction: the line it stands on, its kind, its operands, and whether it has a predicate."""

    line: int
    kind: str
    operands: str
    predicated: bool


@dataclass(frozen=True)
class _State:
    """The state of a warpgroup's own products.

    Attributes:
        open: products issued since the last group was committed.
        flying: groups that it has not waited for.
        waited: whether it has waited for a product and no barrier of all threads has come since.
    """

    open: int = 0
    flying: int = 0
    waited: bool = False

    def after(self, step: _Step, threads: int) -> _State:
        if step.kind == "product":
            return replace(self, open=min(self.open + 1, _MOST_FLYING))
        if step.kind == "commit":
            return replace(self, open=0, flying=min(self.flying + (self.open > 0), _MOST_FLYING))
        if step.kind == "wait":  # what is not committed, which no compiler leaves, counts as a group
            flying, allowed = self.flying + self.open, int(step.operands)
            return _State(0, min(flying, allowed), self.waited or flying > allowed)
        if step.kind in ("barrier", "reduction") and not step.predicated and _is_of_all(step, threads):
            return replace(self, waited=False)
        return self


def hazards(ptx: str) -> list[str]:
    """Return each write to shared memory that another warpgroup may not be ready for, as its line of the PTX."""
    given = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", ptx)
    threads = int(given[1]) if given is not None else 1024
    if threads <= _WARPGROUP:
        return []  # one warpgroup waits for itself
    blocks, names = _blocks(ptx)
    lines = ptx.splitlines()
    hits: set[int] = set()
    seen: set[tuple[int, _State]] = set()
    ways = [(0, _State())]
    while ways:
        place, state = ways.pop()
        if place >= len(blocks) or (place, state) in seen:
            continue
        seen.add((place, state))
        for step in blocks[place]:
            state = state.after(step, threads)
            if step.kind == "write" and state.waited:
                hits.add(step.line)
            elif step.kind == "branch":
                ways.append((names[step.operands.split()[-1]], state))
            if step.kind in ("branch", "end") and not step.predicated:
                break
        else:
            ways.append((place + 1, state))
    return [f"line {line + 1}: {lines[line].strip()}" for line in sorted(hits)]


def _is_of_all(barrier: _Step, threads: int) -> bool:
    """Return whether a barrier is one of all threads: it counts none, or all; a count in a register is unknown."""
    operands = [part.strip() for part in barrier.operands.split(",")]
    if barrier.kind == "reduction":  # of a predicate into a register
        operands = operands[1:-1]
    counts = operands[1:]
    return not counts or (counts[0].isdigit() and int(counts[0]) >= threads)


def _blocks(ptx: str) -> tuple[list[list[_Step]], dict[str, int]]:
    """Return the runs of instructions without a label between them, and the place of each by its label."""
    blocks: list[list[_Step]] = [[]]
    names = {}
    for step in _steps(ptx):
        if step.kind == "label":
            names[step.operands] = len(blocks)
            blocks.append([])
        else:
            blocks[-1].append(step)
    return blocks, names


def _steps(ptx: str) -> Iterator[_Step]:
    """Parse labels and the instructions that matter; a line may hold several, between braces."""
    for number, line in enumerate(ptx.splitlines()):
        for statement in line.partition("//")[0].split(";"):
            text = statement.strip(" \t{}")
            while label := _LABEL.match(text):
                yield _Step(number, "label", label[1], False)
                text = text[label.end() :].strip(" \t{}")
            instruction = _INSTRUCTION.match(text)
            if instruction is None:
                continue
            predicate, name, operands = instruction.groups()
            kind = next((kind for kind, pattern in _KINDS.items() if re.match(pattern, name)), None)
            if kind is not None:
                yield _Step(number, kind, operands.strip(), predicate is not None)


def serialised(ptx: str, arch: int, fuse_multiply_add: bool) -> list[str]:
    """Return what ptxas remarks of products that wait for each other; empty without any ``wgmma``."""
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
    """Return the remarks of serialised products in the output of ``ptxas -v``, each once."""
    said = r"\((C75\d\d)\).*?(wgmma\S* instructions are serialized.*?)(?: in (?:the )?function .*)?$"
    return list(dict.fromkeys(f"{code}: {text}" for code, text in re.findall(said, log, re.M)))
