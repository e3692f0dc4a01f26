"""The plan of tuning: in which order, with which candidates, compiled side by side, in what time.

``dry_run`` goes through all of it but the GPU: it compiles every candidate as a run would, and holds that the process
that would launch them finds them in Triton's cache.
"""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastsam_kernels.triton.launch import Launch, Launches
from fastsam_kernels.triton.tiles import ShapeClass, TileConfig, lookup

from .case import TuneProblem
from .compile_cases import CompileCase
from .forks import map_in_forks
from .machine_code import inspect, pretend, warmup
from .operations import OPERATIONS

# By what the model loses with a poor tile; what it does not launch is tuned only when it is asked for by name.
ORDER = (
    "two_way_attention",
    "rel_pos_attention",
    "window_attention",
    "hypernetwork_masks",
    "mask_postprocess",
    "token_to_image_attention",
    "preprocess_image",
)
FINALISTS = 8
# What a GPU is taken to need, judged generously: to make a problem and its truth, and to load, run and check a tile.
_SECONDS_A_PROBLEM, _SECONDS_A_TILE = 3.0, 0.15


@dataclass(frozen=True)
class Planned:
    """One problem: an operation, a class of its shapes, and how to make it for a device and dtype."""

    operation: str
    shape: ShapeClass

    def make(self, device: torch.device, dtype: torch.dtype, arch: int) -> TuneProblem:
        """Make the problem with its candidates, the committed tile first and no launch twice."""
        problem = OPERATIONS[self.operation].TUNING[self.shape](device, dtype)
        committed = lookup(self.operation, arch, dtype, self.shape)
        return replace(problem, candidates=distinct(problem, [committed, *problem.candidates]))


def planned(operations: list[str] | None) -> list[Planned]:
    """Return the problems of the named operations, or of all in :data:`ORDER`.

    Raises:
        ValueError: an operation that has nothing to tune.
    """
    known = [operation for operation, module in OPERATIONS.items() if module.TUNING]
    for operation in operations or ():
        if operation not in known:
            raise ValueError(f"nothing to tune in {operation!r}; known: {', '.join(known)}")
    return [Planned(operation, shape) for operation in operations or ORDER for shape in OPERATIONS[operation].TUNING]


def distinct(problem: TuneProblem, tiles: list[TileConfig]) -> list[TileConfig]:
    """Drop tiles that come to the same launches as an earlier one: a plan may round blocks up or down."""
    distinct_tiles: dict[str, TileConfig] = {}
    for tile in tiles:
        launches = _launches(problem, tile)
        distinct_tiles.setdefault(repr([(one.grid, one.constexprs, one.options) for one in launches]), tile)
    return list(distinct_tiles.values())


def _launches(problem: TuneProblem, tile: TileConfig) -> tuple[Launch, ...]:
    made = problem.launch(tile)
    return made.launches if isinstance(made, Launches) else (made,)


def without_memory(problem: TuneProblem, tile: TileConfig) -> list[Launch]:
    """Return the launches of a tile on the meta device, which is all that compiling needs."""

    def moved(launch: Launch) -> Launch:
        meta = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in launch.arguments.items()}
        return replace(launch, arguments=meta)

    return [moved(launch) for launch in _launches(problem, tile)]


@dataclass(frozen=True)
class Verdict:
    """The outcome of compiling a candidate.

    Attributes:
        complaint: what the compile report would say against it, or how the compiler failed; empty if nothing.
        compiled: launches that were not in Triton's cache.
        seconds: of CPU time, the tools that the compiler starts included.
    """

    complaint: str
    compiled: int
    seconds: float


def compile_all(problem: TuneProblem, about: Planned, arch: int, dtype: torch.dtype, workers: int) -> list[Verdict]:
    """Return one verdict per candidate; those without a complaint are in Triton's cache then."""
    cases = [
        [CompileCase(about.operation, about.shape, dtype, arch, launch) for launch in without_memory(problem, tile)]
        for tile in problem.candidates
    ]
    return map_in_forks(_verdict, cases, workers, "compile")


def _verdict(cases: list[CompileCase]) -> Verdict:
    before = _cpu_seconds()
    with counting() as in_cache:
        try:
            complaint = "; ".join(problem for case in cases for problem in inspect(case).problems)
        except Exception as failure:
            complaint = in_a_line(failure)
    return Verdict(complaint, in_cache.count(False), _cpu_seconds() - before)


def in_a_line(failure: Exception) -> str:
    return f"{type(failure).__name__}: {next(iter(str(failure).strip().splitlines()), '')}"


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@contextmanager
def counting() -> Iterator[list[bool]]:
    """Record, for each kernel that Triton makes ready meanwhile, whether its cache on the disk had it."""
    from triton.knobs import compilation

    in_cache: list[bool] = []

    def note(*, cache_hit: bool, **rest: object) -> None:
        in_cache.append(cache_hit)

    with compilation.scope():
        compilation.listener = note
        yield in_cache


# The dry run --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rehearsed:
    """A problem rehearsed without a GPU: candidates, the clean ones, compilations and their CPU seconds."""

    about: Planned
    candidates: int
    clean: int
    compiled: int
    missed: int
    cpu_seconds: float

    def seconds(self, workers: int, seconds: float) -> float:
        """Estimate the time on a GPU beside ``workers`` cores, with ``seconds`` for the finalists."""
        return self.cpu_seconds / workers + _SECONDS_A_PROBLEM + _SECONDS_A_TILE * self.clean + seconds


def rehearse(about: Planned, arch: int, dtype: torch.dtype, workers: int) -> Rehearsed:
    """Compile a problem's candidates in forks, then ask for the clean ones as the process that launches them does."""
    problem = about.make(torch.device("meta"), dtype, arch)
    verdicts = compile_all(problem, about, arch, dtype, workers)
    clean = [tile for tile, verdict in zip(problem.candidates, verdicts, strict=True) if not verdict.complaint]
    pretend(arch)
    with counting() as in_cache:
        for tile in clean:
            for launch in without_memory(problem, tile):
                warmup(launch)
    compiled, spent = (sum(values) for values in zip(*((v.compiled, v.seconds) for v in verdicts), strict=True))
    return Rehearsed(about, len(verdicts), len(clean), int(compiled), in_cache.count(False), spent)


def dry_run(
    operations: list[str] | None,
    arch: int,
    dtypes: list[torch.dtype],
    seconds: float,
    workers: int,
    gpu_workers: int,
    limit: float,
) -> int:
    """Run the command: one line per problem in the order of a run, and an estimate of the run.

    Triton's cache is an empty folder of its own. Exit status 1 when a candidate had to be compiled twice, or when the
    estimate for ``gpu_workers`` cores is over ``limit`` seconds.
    """
    from triton import knobs

    total, missed = 0.0, 0
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        for dtype in dtypes:
            for about in planned(operations):
                row = rehearse(about, arch, dtype, workers)
                total += row.seconds(gpu_workers, seconds)
                missed += row.missed
                print(
                    f"{about.operation}, {about.shape}, sm_{arch}, {str(dtype).removeprefix('torch.')}: "
                    f"{row.candidates} candidates, {row.clean} clean; {row.compiled} compilations in "
                    f"{row.cpu_seconds:.0f} s of CPU time, {row.missed} of them not found by the process that "
                    f"launches; {total:.0f} s into a run",
                    flush=True,
                )
    print(f"estimate: {total:.0f} s of {limit:.0f} s, with {gpu_workers} cores that compile; assumed, not measured: "
          f"{_SECONDS_A_PROBLEM:g} s a problem and {_SECONDS_A_TILE:g} s a tile on the GPU")  # fmt: skip
    if missed:
        print(f"{missed} candidates were compiled twice")
    return int(missed > 0 or total > limit)
