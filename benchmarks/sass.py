"""The number of machine instructions that a warp runs in a kernel, from its SASS and the loops of its source.

``nvdisasm`` names the line of the source that each instruction comes from. A backward branch closes a loop, which is
the ``for`` or ``while`` of the source that most of its instructions stand in; the caller says how often that goes
round. Instructions under an ``if``, behind a ``return`` or in a called function count by the fraction that the caller
gives, and else in full. What stands behind the last exit, routines for rare operands, is not counted.
"""

from __future__ import annotations

import ast
import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path


@dataclass(frozen=True)
class Line:
    """The place of a line of source: its function, the loops around it from the inside, ifs and returns before it.

    Each by a name: ``function: target`` of a ``for``, ``function: while``, ``function: if test``,
    ``function: return if test``.
    """

    function: str
    loops: tuple[str, ...]
    ifs: tuple[str, ...]


@dataclass(frozen=True)
class Instruction:
    text: str
    line: Line | None


@dataclass
class Loop:
    """Instructions from ``start`` to ``end``, both included, and the loops within."""

    start: int
    end: int
    name: str = ""
    inner: list[Loop] = field(default_factory=list)

    def own(self) -> Iterator[int]:
        """Return the places that are in no inner loop."""
        within = {place for loop in self.inner for place in range(loop.start, loop.end + 1)}
        return (place for place in range(self.start, self.end + 1) if place not in within)

    def names(self) -> set[str]:
        return {self.name}.union(*(loop.names() for loop in self.inner))


def executed(cubin: bytes, trips: Mapping[str, float], fractions: Mapping[str, float]) -> float:
    """Count the instructions that a warp runs.

    Args:
        cubin: one kernel.
        trips: how often each loop goes round, by its name (see :class:`Line`).
        fractions: of the ifs, of what is behind a return, and of called functions by their names; others are 1.

    Raises:
        ValueError: a loop that ``trips`` does not name.
    """
    return count(*read(cubin), trips, fractions)


def count(
    instructions: list[Instruction],
    labels: Mapping[str, int],
    trips: Mapping[str, float],
    fractions: Mapping[str, float],
) -> float:
    """Count the instructions that a warp runs in parsed SASS; see :func:`executed`."""
    total, share = 0.0, _shares(instructions, labels, fractions)
    for loop, rounds in _with_rounds(find_loops(instructions, labels), trips, 1.0):
        total += rounds * sum(share[place] for place in loop.own())
    return total


def _with_rounds(loop: Loop, trips: Mapping[str, float], rounds: float) -> Iterator[tuple[Loop, float]]:
    yield loop, rounds
    for inner in loop.inner:
        if inner.name not in trips:
            raise ValueError(f"how often does the loop {inner.name!r} go round? Known: {', '.join(trips) or 'none'}")
        yield from _with_rounds(inner, trips, rounds * trips[inner.name])


def _shares(instructions: list[Instruction], labels: Mapping[str, int], fractions: Mapping[str, float]) -> list[float]:
    """Return how often each instruction runs per round; a basic block runs as most of its instructions do.

    The compiler moves instructions between blocks, and those of Triton's own functions say nothing.
    """
    starts = {0, *labels.values()}
    starts |= {place + 1 for place, one in enumerate(instructions) if re.search(r"\b(BRA|EXIT)\b", one.text)}
    shares: list[float] = []
    share = 1.0
    for start, end in pairwise(sorted({*starts, len(instructions)})):
        votes = Counter(_fraction(one.line, fractions) for one in instructions[start:end] if one.line is not None)
        share = votes.most_common(1)[0][0] if votes else share
        shares += [share] * (end - start)
    return shares


def _fraction(line: Line, fractions: Mapping[str, float]) -> float:
    return math.prod(fractions.get(name, 1.0) for name in (line.function, *line.ifs))


def find_loops(instructions: list[Instruction], labels: Mapping[str, int]) -> Loop:
    """Return the whole kernel as a loop of one round, up to its last exit, with its loops inside."""
    exits = [place for place, one in enumerate(instructions) if re.match(r"EXIT\b", one.text)]
    whole = Loop(0, exits[-1] if exits else len(instructions) - 1, "kernel")
    ends: dict[int, int] = {}
    for place, one in enumerate(instructions[: whole.end + 1]):
        target = re.search(r"\bBRA\b.*`\((\S+)\)", one.text)
        start = labels[target[1]] if target else place
        if start < place:
            ends[start] = max(place, ends.get(start, place))
    for start, end in sorted(ends.items(), key=lambda span: span[1] - span[0], reverse=True):
        around = whole
        while inside := [loop for loop in around.inner if loop.start <= start and end <= loop.end]:
            around = inside[0]
        around.inner.append(Loop(start, end))
    for loop in whole.inner:
        _name(loop, instructions)
    return whole


def _name(loop: Loop, instructions: list[Instruction]) -> None:
    """Name a loop by the innermost source loop of most of its own instructions; names of inner loops are taken."""
    for inner in loop.inner:
        _name(inner, instructions)
    taken = set().union(*(inner.names() for inner in loop.inner))
    lines = [line for place in loop.own() if (line := instructions[place].line) is not None]
    free = [next((name for name in line.loops if name not in taken), None) for line in lines]
    votes = Counter(name for name in free if name is not None)
    loop.name = votes.most_common(1)[0][0] if votes else f"a loop without a for, at {lines[0] if lines else '?'}"


def read(cubin: bytes) -> tuple[list[Instruction], dict[str, int]]:
    """Read the instructions of a kernel and the places of its labels."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([tool, "-g", "-c", file.name], capture_output=True, text=True, check=True).stdout
    return parse(listing)


def parse(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    line: Line | None = None
    for text in listing.splitlines():
        if (named := re.match(r'\s*//## File "(.+)", line (\d+)', text)) is not None:
            own = "/triton/language/" not in named[1]  # kernels of ours stand in folders called triton
            line = lines_of(named[1]).get(int(named[2])) if own else None
        elif (label := re.match(r"(\.L_\w+):", text)) is not None:
            labels[label[1]] = len(instructions)
        elif (match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", text)) is not None:
            instructions.append(Instruction(match[1], line))
    return instructions, labels


@cache
def lines_of(path: str) -> dict[int, Line]:
    """Return every line of a function's body in a file of source."""
    lines: dict[int, Line] = {}
    for function in ast.walk(ast.parse(Path(path).read_text())):
        if isinstance(function, ast.FunctionDef):
            _walk(function.body, Line(function.name, (), ()), lines)
    return lines


def _walk(body: list[ast.stmt], around: Line, lines: dict[int, Line]) -> tuple[str, ...]:
    """Note the lines of ``body``; return what of its returns whatever follows is behind, by their names."""
    returns: tuple[str, ...] = ()
    for statement in body:
        here = Line(around.function, around.loops, (*around.ifs, *returns))
        for number in range(statement.lineno, (statement.end_lineno or statement.lineno) + 1):
            lines[number] = here
        if isinstance(statement, ast.For | ast.While):
            what = "while" if isinstance(statement, ast.While) else ast.unparse(statement.target)
            inside = Line(here.function, (f"{here.function}: {what}", *here.loops), here.ifs)
            lines[statement.lineno] = inside
            returns += _walk(statement.body, inside, lines)
        elif isinstance(statement, ast.If):
            test = ast.unparse(statement.test)
            for what, branch in (("if", statement.body), ("else", statement.orelse)):
                within = Line(here.function, here.loops, (*here.ifs, f"{here.function}: {what} {test}"))
                returns += _walk(branch, within, lines)
            if any(isinstance(last, ast.Return) for last in statement.body):
                returns += (f"{here.function}: return if {test}",)
    return returns
