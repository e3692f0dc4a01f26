"""The compile report: every shipped kernel and tile, for every architecture, as one table."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from .compile_cases import compile_cases
from .forks import map_in_forks
from .machine_code import Compiled, inspect
from .provenance import RESULTS, describe, provenance


def to_markdown(rows: list[Compiled], facts: dict[str, Any]) -> str:
    """Format the table, one row per launch."""
    head = "kernel|shape|arch|dtype|tile|registers|stack|shared KB|matrix instructions|128-bit loads|instructions"
    head += "|programs an SM|verdict"
    columns = head.split("|")
    lines = [
        "# Compile report",
        "",
        f"triton {facts['triton']}, revision {facts['revision']}, {facts['date']}. Regenerate: "
        "`python -m benchmarks compile-report --write`.",
        "",
        "Compiled, not run. Every tile must fit the shared memory; 16-bit tiles must have no stack and use tensor",
        "cores where there is a dot, with 64 rows or more HGMMA on sm_90 and UTC*MMA on sm_100. HGMMA must not be",
        "serialised (C7510 to C7515 of `ptxas -v`), no warpgroup may write shared memory that another may still read,",
        "and no loop may copy a tile over one that it has yet to read. fp32 is exact and slow and may spill. gfx942 is",
        "only reported, with the tiles of sm_80.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
    ]
    for row in rows:
        cores = ", ".join(f"{count} {name}" for name, count in row.tensor_core.items()) or "none"
        verdict = ("; ".join(row.problems) or "ok") if row.asserted else "reported"
        cells = [row.operation, row.shape, row.arch, row.dtype, row.tile, row.registers, row.stack]
        cells += [f"{row.shared / 1024:.0f} / {row.shared_limit // 1024}", cores, row.wide_loads, row.instructions]
        cells += ["" if row.programs_an_sm is None else row.programs_an_sm, verdict]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def run(operations: list[str] | None, arches: list[int | str] | None, workers: int, write: bool) -> int:
    """Run the command: print the table, write it if asked; status 1 when a tile has a forbidden problem."""
    rows = map_in_forks(inspect, compile_cases(operations, arches), workers, "compile")
    facts = {**provenance(), "gpu": None}
    table = to_markdown(rows, facts)
    print(table)
    if write:
        RESULTS.mkdir(exist_ok=True)
        name = "compile_report_triton" + ".".join(str(facts["triton"]).split(".")[:2])
        (RESULTS / f"{name}.md").write_text(table)
        document = {"provenance": facts, "rows": [asdict(row) for row in rows]}
        (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    bad = [row for row in rows if row.asserted and row.problems]
    for row in bad:
        print(f"{row.operation} {row.arch} {row.dtype} ({row.shape}): {'; '.join(row.problems)}")
    print(f"{len(rows)} launches, {len(bad)} with problems; {describe(facts)}")
    return 1 if bad else 0
