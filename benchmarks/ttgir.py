"""Hazards of tiles that a loop copies ahead, read off Triton's GPU dialect.

Such tiles lie in a ring of buffers. Triton orders the copies and the reads of a loop when it pipelines it, by the uses
of a buffer that stand in the loop's own block; a product within an ``scf.if`` it does not see. The next tile is then
copied over the one that the product has yet to read, where it reads shared memory, as on sm_90 and sm_100. The results
are wrong, and only now and then.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_OPERATION = re.compile(r"\s*(?:(%[\w#]+)(?::\d+)? = )?\"?(?:\w+\.)+(\w+)\"?(.*)")
_COPY = "async_copy_global_to_local"
_NO_READ = {"async_wait", "warp_group_dot_wait", "wait_barrier", "local_dealloc", "async_commit_group", "for", "yield"}


@dataclass
class _Step:
    """One operation: its line, its name, what it reads or writes by the allocation, and the whole of it."""

    line: int
    name: str
    operands: list[str]
    text: str


def overwrites(ttgir: str) -> list[str]:
    """Return each copy over a tile that the same loop has yet to read, as its line of the TTGIR."""
    lines = ttgir.splitlines()
    steps, rings = _read(lines)
    hits: set[int] = set()
    for around, begin, end in _loops(lines):  # inner ones first
        body = [step for step in steps if begin < step.line < end]
        for ring in {step.operands[1] for step in body if step.name == _COPY} & rings.keys():
            before = [step for step in steps if around < step.line < begin]
            # What copies ahead of a loop belongs to it, and is no copy of the loop around it.
            hits.update(_overwrites(before, body, ring, rings.pop(ring)))
    return [f"line {line + 1}: {lines[line].strip()}" for line in sorted(hits)]


def _overwrites(before: list[_Step], body: list[_Step], ring: str, buffers: int) -> Iterator[int]:
    """Run a loop on a ring, behind what stands before it; the lines of copies that come too early.

    A pipeliner takes first rounds out of the loop, with their copies and reads.
    """
    done = {step.line: 0 for step in body if _reads(step, ring)}  # tiles that were read
    copied = first = 0  # tiles copied; reads that stand before the loop
    flying: list[tuple[int, str]] = []  # products not waited for, the oldest first: their line and barrier
    reading = {step.line for step in (*before, *body) if _reads(step, ring)}
    for step in before + body * (buffers + 2):
        landed: list[int] = []
        if _copies(step, ring):
            read = min(done.values(), default=copied) + first // max(1, len(done))
            if step.line >= body[0].line and read <= copied - buffers:
                yield step.line
            copied += 1
        elif step.name == "warp_group_dot" and "isAsync = true" in step.text:
            flying.append((step.line, ""))
        elif step.name == "tc_gen5_mma" and "is_async" in step.text:
            flying.append((step.line, step.operands[-2]))  # before its predicate
        elif step.name == "warp_group_dot_wait":
            pending = re.search(r"pendings = (\d+)", step.text)
            landed = [line for line, _ in flying[: len(flying) - int(pending[1] if pending else 0)]]
            del flying[: len(landed)]
        elif step.name == "wait_barrier":
            flight = next((flight for flight in flying if flight[1] == step.operands[0]), None)
            if flight is not None:
                flying.remove(flight)
                landed = [flight[0]]
        else:
            landed = [step.line]
        for line in landed:
            if line in done:
                done[line] += 1
            elif line in reading:
                first += 1


def _copies(step: _Step, ring: str) -> bool:
    return step.name == _COPY and step.operands[1] == ring


def _reads(step: _Step, ring: str) -> bool:
    return step.name != _COPY and step.name not in _NO_READ and ring in step.operands


def _read(lines: list[str]) -> tuple[list[_Step], dict[str, int]]:
    """Return the operations but for views, their operands traced to allocations, and the buffers of each ring."""
    steps, rings, roots = [], {}, {}
    for line, text in enumerate(lines):
        match = _OPERATION.match(text)
        if match is None:
            continue
        result, name, rest = match.groups()
        if name == "for":  # what a loop carries begins as a view of the same allocation
            for carried, start in re.findall(r"(%\w+) = (%\w+)", rest.partition("iter_args(")[2]):
                if start in roots:
                    roots[carried] = roots[start]
        operands = [roots.get(operand, operand) for operand in re.findall(r"%\w+", rest)]
        size = re.search(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x", text)
        if size is not None:
            rings[result] = int(size[1])
        elif name.startswith("memdesc_"):
            roots[result] = operands[0]
        else:
            steps.append(_Step(line, name, operands, text))
    return steps, rings


def _loops(lines: list[str]) -> Iterator[tuple[int, int, int]]:
    """Return the first and last line of each loop, after the one on which the region around it begins."""
    regions: list[int] = []
    for line, text in enumerate(lines):
        if text.lstrip().startswith("}"):
            begin = regions.pop()
            if " scf.for " in f" {lines[begin].strip()} ":
                yield regions[-1], begin, line
        if text.count("{") > text.count("}") or re.match(r"\s*\}.*\{$", text):
            regions.append(line)
