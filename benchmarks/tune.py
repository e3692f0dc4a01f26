"""Choose tiles on a GPU: compile all candidates, check those that are clean, time what is right, write the best.

Candidates are compiled side by side first, which leaves them in Triton's cache and takes out those that the compile
report would complain of. A candidate counts only when its result is within the comparator's budget. Of those that do,
the fastest in two runs are timed side by side, and the fastest of these wins; the committed tile is always among the
candidates. The entry that is written carries where it was measured and is no longer provisional.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastsam_kernels.numerics import Budget
from fastsam_kernels.triton.tiles import TILE_FOLDER, TileConfig, arch_of, architectures, lookup
from sam.system.atomic_write import write_atomically

from .case import Result, TuneProblem, parts, rows_of, worst_error
from .measure import time_forms
from .provenance import describe, provenance
from .runner import name_of
from .tuning_plan import FINALISTS, Planned, compile_all, counting, in_a_line, planned


@dataclass(frozen=True)
class Trial:
    """The outcome of a candidate: a time in ms, or why it was left out."""

    tile: TileConfig
    milliseconds: float | None
    reason: str = ""


def try_all(problem: TuneProblem, device: torch.device, seconds: float) -> list[Trial]:
    """Check every candidate, then time the right ones, the fastest few side by side."""
    truth, plain = parts(problem.truth()), parts(problem.plain())
    budget = Budget(worst_error(plain, truth), plain[0].dtype).limit
    rejected, right = [], []
    for tile in tqdm(problem.candidates, desc="check", disable=None, leave=False):
        reason = _check(problem, tile, truth, budget)
        (rejected.append(Trial(tile, None, reason)) if reason else right.append(tile))
    first = _time(problem, right, device, 0.0, runs=2)
    finalists = [trial.tile for trial in first[:FINALISTS]]
    return _time(problem, finalists, device, seconds, runs=5) + first[FINALISTS:] + rejected


def _time(
    problem: TuneProblem, tiles: list[TileConfig], device: torch.device, seconds: float, runs: int
) -> list[Trial]:
    """Time the candidates and return them, the fastest first."""
    if not tiles:
        return []
    forms = {str(place): problem.launch(tile).run for place, tile in enumerate(tiles)}
    timings = time_forms(forms, device, seconds, runs).values()
    trials = [Trial(tile, timing.p50) for tile, timing in zip(tiles, timings, strict=True)]
    return sorted(trials, key=lambda trial: trial.milliseconds or 0.0)


def _check(problem: TuneProblem, tile: TileConfig, truth: Result, budget: float) -> str:
    """Return why a tile must not be used; empty if it may."""
    (problem.reset or partial(_poison, problem.out))()
    try:
        problem.launch(tile).run()
        error = worst_error(rows_of(problem.out, problem.rows), truth)
    except Exception as failure:  # out of shared memory or registers, or the compiler gave up
        return in_a_line(failure)
    return "" if error <= budget else f"error {error:.1e} over {budget:.1e}"


def _poison(out: Result) -> None:
    for part in parts(out):
        part.fill_(torch.nan if part.is_floating_point() else torch.iinfo(part.dtype).max)


def write_choice(
    operation: str,
    shape: str,
    arch: int,
    dtype: torch.dtype,
    best: Trial,
    facts: dict[str, Any],
    folder: Path = TILE_FOLDER,
) -> None:
    """Put the choice before the other entries of the architecture's file, and take its like out of them."""
    path = folder / f"sm_{arch}.json"
    document = json.loads(path.read_text())
    name = name_of(dtype)
    entry = {
        "operation": operation,
        "dtype": [name],
        "shape": [str(shape)],
        "tile": numbers_of(best.tile),
        "provisional": False,
        "provenance": f"{best.milliseconds:.4g} ms, best of those that passed; {describe(facts)}",
    }
    document["tiles"] = [entry, *(rest for old in document["tiles"] for rest in _without(old, operation, name, shape))]
    with write_atomically(path) as partial:
        partial.write_text(to_json(document))
    architectures.cache_clear()
    lookup.cache_clear()


def _without(entry: dict[str, Any], operation: str, dtype: str, shape: str) -> Iterator[dict[str, Any]]:
    """Yield the entry less one combination, as up to two entries; all of it if it has others only."""
    if operation != entry["operation"] or dtype not in entry["dtype"] or shape not in entry["shape"]:
        yield entry
        return
    dtypes = [value for value in entry["dtype"] if value != dtype]
    shapes = [value for value in entry["shape"] if value != shape]
    if dtypes:
        yield {**entry, "dtype": dtypes}
    if shapes:
        yield {**entry, "dtype": [dtype], "shape": shapes}


def to_json(document: dict[str, Any]) -> str:
    """Return the file as people read it: one line per field."""
    entries = [
        "    {\n" + ",\n".join(f'      "{key}": {json.dumps(value)}' for key, value in entry.items()) + "\n    }"
        for entry in document["tiles"]
    ]
    limits = "".join(f'  "{key}": {value},\n' for key, value in document.items() if key != "tiles")
    return f'{{\n{limits}  "tiles": [\n' + ",\n".join(entries) + "\n  ]\n}\n"


def tune(
    about: Planned, device: torch.device, dtype: torch.dtype, seconds: float, workers: int
) -> tuple[list[Trial], int]:
    """Return every trial, the best first, and how many launches had to be compiled a second time."""
    arch = arch_of(device)
    problem = about.make(device, dtype, arch)
    rejected: list[Trial] = []
    if device.type != "cuda":
        return try_all(problem, device, seconds), 0
    verdicts = compile_all(problem, about, arch, dtype, workers)
    judged = list(zip(problem.candidates, verdicts, strict=True))
    rejected = [Trial(tile, None, verdict.complaint) for tile, verdict in judged if verdict.complaint]
    problem = replace(problem, candidates=[tile for tile, verdict in judged if not verdict.complaint])
    with counting() as in_cache:
        trials = try_all(problem, device, seconds)
    return trials + rejected, in_cache.count(False)


def numbers_of(tile: TileConfig) -> dict[str, int]:
    """Return the tile as the tile file has it."""
    return {**tile.blocks, "num_warps": tile.num_warps, "num_stages": tile.num_stages}


def check_own_file(device: torch.device) -> None:
    """Raise ``ValueError`` where a GPU takes another architecture's tiles: its choices are not for the other's file."""
    if device.type != "cuda":
        return
    arch, (major, minor) = arch_of(device), torch.cuda.get_device_capability(device)
    own = 10 * major + minor
    if arch != own:
        raise ValueError(
            f"this GPU is sm_{own} and takes the tiles of sm_{arch}, which it must not write: it needs a file of its "
            f"own first, {TILE_FOLDER.name}/sm_{own}.json, with its limits and no tiles"
        )


def run(
    operations: list[str] | None,
    device: torch.device,
    dtypes: list[torch.dtype],
    seconds: float,
    workers: int,
    write: bool,
) -> int:
    """Run the command: every trial, the best first; with ``write`` the file is changed after each shape.

    Exit status 1 when a shape has no right tile, or when the command is interrupted before the last.
    """
    facts, arch = provenance(), arch_of(device)
    print(describe(facts), flush=True)
    work = [(dtype, about) for dtype in dtypes for about in planned(operations)]
    without = []
    for place, (dtype, about) in enumerate(work):
        where = f"{about.operation}, {about.shape}, sm_{arch}, {name_of(dtype)}"
        print(f"\n{where}", flush=True)
        try:
            trials, again = tune(about, device, dtype, seconds, workers)
        except KeyboardInterrupt:
            left = ", ".join(f"{rest.operation} ({rest.shape}, {name_of(dtype)})" for dtype, rest in work[place:])
            print(f"interrupted; not tuned: {left}", flush=True)
            return 1
        except Exception as failure:
            without.append(f"{where}: {in_a_line(failure)}")
            continue
        if again:
            print(f"  {again} launches were compiled again: the parallel compilations were not found", flush=True)
        for trial in trials:
            outcome = trial.reason if trial.milliseconds is None else f"{trial.milliseconds:.4g} ms"
            tile = trial.tile
            print(f"  {dict(tile.blocks)} {tile.num_warps} warps {tile.num_stages} stages: {outcome}", flush=True)
        if trials[0].milliseconds is None:
            without.append(where)
        elif write:
            write_choice(about.operation, about.shape, arch, dtype, trials[0], facts)
    for where in without:
        print(f"no candidate is right, nothing written: {where}", flush=True)
    return 1 if without else 0
