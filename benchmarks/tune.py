"""Choose tiles on a GPU: compile and check each candidate, time what is right, write the best to the JSON file.

A candidate counts only when its result is within the comparator's budget; then the fastest one wins. The entry that
is written carries where it was measured and is no longer provisional.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastsam_kernels.tile_config import TileConfig, arch_of

from .case import Result, TuneProblem, parts, relative_error, rows_of
from .measure import time_forms
from .operations import OPERATIONS
from .provenance import describe, provenance
from .runner import error_budget, name_of

_FOLDER = Path(__file__).parents[1] / "fastsam_kernels" / "tile_configs"


@dataclass(frozen=True)
class Trial:
    """What became of a candidate: a time in ms, or why it was left out."""

    tile: TileConfig
    milliseconds: float | None
    reason: str = ""


def try_all(problem: TuneProblem, device: torch.device, seconds: float) -> list[Trial]:
    """Check every candidate, then time the right ones side by side."""
    truth, plain = parts(problem.truth()), parts(problem.plain())
    budget = error_budget(relative_error(plain, truth), plain[0].dtype)
    rejected, right = [], []
    for tile in tqdm(problem.candidates, desc="check", disable=None, leave=False):
        reason = _check(problem, tile, truth, budget)
        (rejected.append(Trial(tile, None, reason)) if reason else right.append(tile))
    times = (
        time_forms({str(i): problem.launch(tile).run for i, tile in enumerate(right)}, device, seconds) if right else {}
    )
    timed = [Trial(tile, times[str(i)].p50) for i, tile in enumerate(right)]
    return sorted(timed, key=lambda trial: trial.milliseconds or 0.0) + rejected


def _check(problem: TuneProblem, tile: TileConfig, truth: Result, budget: float) -> str:
    """Why a tile must not be used; empty if it may."""
    for out in parts(problem.out):
        out.fill_(torch.nan if out.is_floating_point() else torch.iinfo(out.dtype).max)
    try:
        problem.launch(tile).run()
        error = relative_error(rows_of(problem.out, problem.rows), truth)
    except Exception as failure:  # out of shared memory or registers, or the compiler gave up
        return f"{type(failure).__name__}: {str(failure).strip().splitlines()[0] if str(failure).strip() else ''}"
    return "" if error <= budget else f"error {error:.1e} over {budget:.1e}"


def write_choice(operation: str, shape: str, arch: int, dtype: torch.dtype, best: Trial, facts: dict[str, Any]) -> None:
    """Put the choice before the file's other entries, and take (arch, dtype, shape) out of those it replaces."""
    path = _FOLDER / f"{operation}.json"
    document = json.loads(path.read_text())
    name = name_of(dtype)
    tile = {**best.tile.blocks, "num_warps": best.tile.num_warps, "num_stages": best.tile.num_stages}
    entry = {
        "arch": [arch],
        "dtype": [name],
        "shape": [shape],
        "tile": tile,
        "provisional": False,
        "provenance": f"{best.milliseconds:.4g} ms, best of those that passed; {describe(facts)}",
    }
    document["tiles"] = [entry, *(rest for old in document["tiles"] for rest in _without(old, arch, name, shape))]
    path.write_text(to_json(document))


def _without(entry: dict[str, Any], arch: int, dtype: str, shape: str) -> Iterator[dict[str, Any]]:
    """The entry less one combination, as one to three entries; the whole of it if it has others only."""
    if arch not in entry["arch"] or dtype not in entry["dtype"] or shape not in entry["shape"]:
        yield entry
        return
    rest = {
        axis: [value for value in entry[axis] if value != chosen]
        for axis, chosen in (("arch", arch), ("dtype", dtype), ("shape", shape))
    }
    if rest["arch"]:
        yield {**entry, "arch": rest["arch"]}
    if rest["dtype"]:
        yield {**entry, "arch": [arch], "dtype": rest["dtype"]}
    if rest["shape"]:
        yield {**entry, "arch": [arch], "dtype": [dtype], "shape": rest["shape"]}


def to_json(document: dict[str, Any]) -> str:
    """The file as people read it: one line a field."""
    entries = [
        "    {\n" + ",\n".join(f'      "{key}": {json.dumps(value)}' for key, value in entry.items()) + "\n    }"
        for entry in document["tiles"]
    ]
    return f'{{\n  "operation": "{document["operation"]}",\n  "tiles": [\n' + ",\n".join(entries) + "\n  ]\n}\n"


def run(
    operations: list[str] | None, device: torch.device, dtypes: list[torch.dtype], seconds: float, write: bool
) -> int:
    """The command: every trial, the best first; with ``write`` the file is changed."""
    facts, arch = provenance(), arch_of(device)
    print(describe(facts))
    problems = [
        (operation, shape, make)
        for operation, module in OPERATIONS.items()
        for shape, make in module.TUNING.items()
        if not operations or operation in operations
    ]
    without = []
    for operation, shape, make in problems:
        for dtype in dtypes:
            where = f"{operation}, {shape}, sm_{arch}, {name_of(dtype)}"
            print(f"\n{where}", flush=True)
            trials = try_all(make(device, dtype), device, seconds)
            for trial in trials:
                outcome = trial.reason if trial.milliseconds is None else f"{trial.milliseconds:.4g} ms"
                tile = trial.tile
                print(f"  {dict(tile.blocks)} {tile.num_warps} warps {tile.num_stages} stages: {outcome}", flush=True)
            if trials[0].milliseconds is None:
                without.append(where)
            elif write:
                write_choice(operation, shape, arch, dtype, trials[0], facts)
    for where in without:
        print(f"no candidate is right, nothing written: {where}", flush=True)
    return 1 if without else 0
