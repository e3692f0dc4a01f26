"""Run cases, hold their forms against the truth, time them side by side, and print or write the rows.

A form whose numerics are red has no speed-up: the row says so and the command ends with status 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastsam_kernels.numerics import Budget
from sam.system.atomic_write import write_atomically

from .case import Case, Problem, Result, parts, rows_of, worst_error
from .cases import jobs
from .measure import Timing, limit_ms, peak_memory, time_forms
from .peers import PEERS, SAM2
from .provenance import describe, provenance

COMPILED = "torch.compile of torch"


@dataclass(frozen=True)
class Row:
    """One form of one case.

    Attributes:
        error, budget: relative L2 against fp64, and the limit of its :class:`Budget`.
        percent_of_limit: the machine's limit over the time.
        peak_bytes: memory beyond the inputs; None where it was in another process.
        speedup: over the baseline, of medians; None for red numerics.
    """

    case: str
    form: str
    device: str
    dtype: str
    timing: Timing
    percent_of_limit: float
    peak_bytes: int | None
    error: float
    budget: float
    speedup: float | None

    @property
    def green(self) -> bool:
        return self.error <= self.budget


@dataclass(frozen=True)
class Failure:
    """A case that raised, in place of its rows."""

    case: str
    device: str
    dtype: str
    failure: str


def run_case(case: Case, device: torch.device, dtype: torch.dtype, seconds: float, compiled: bool) -> list[Row]:
    """Check and time every form of a case in one go."""
    problem = case.make(device, dtype)
    forms = {name: form for name, form in problem.forms.items() if compiled or "compiled" not in name}
    if compiled and problem.compile:
        forms[COMPILED] = _compile(problem)
    errors = form_errors(problem, forms)
    budget = budget_of(problem, errors, dtype)
    memory = {name: peak_memory(form, device) if problem.here else None for name, form in forms.items()}
    timings = time_forms(forms, device, seconds, case.runs)
    limit = limit_ms(problem.work, device, dtype)
    rows = []
    for name, timing in timings.items():
        green = errors[name] <= budget
        rows.append(
            Row(
                case=case.name,
                form=name,
                device=str(device),
                dtype=name_of(dtype),
                timing=timing,
                percent_of_limit=100 * limit / timing.p50,
                peak_bytes=memory[name],
                error=errors[name],
                budget=budget,
                speedup=timings[problem.baseline].p50 / timing.p50 if green else None,
            )
        )
    return rows


def budget_of(problem: Problem, errors: dict[str, float], dtype: torch.dtype) -> float:
    """Return the error that a form may have, from that of the plain formula."""
    noise = errors[problem.baseline] if problem.plain is None else worst_error(problem.plain(), parts(problem.truth()))
    return Budget(noise, dtype).limit


def form_errors(problem: Problem, forms: dict[str, Callable[[], Result]]) -> dict[str, float]:
    """Return the relative L2 error of each form on the problem's rows; infinite when something is not finite."""
    truth = parts(problem.truth())
    return {name: worst_error(rows_of(form(), problem.rows), truth) for name, form in forms.items()}


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype in rows and tile files."""
    return str(dtype).removeprefix("torch.")


def _compile(problem: Problem) -> Callable[[], Result]:
    torch._dynamo.reset()
    form = torch.compile(problem.forms["torch"])
    form()
    return form


def to_table(rows: list[Row], markdown: bool = False) -> str:
    """Format the rows as text."""
    head = ["case", "form", "dtype", "ms p20", "p50", "p80", "% of limit", "peak MB", "error", "speed-up"]
    body = [
        [
            row.case,
            row.form,
            row.dtype,
            *(f"{value:.3g}" for value in (row.timing.p20, row.timing.p50, row.timing.p80)),
            f"{row.percent_of_limit:.0f}",
            "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}",
            f"{row.error:.1e}" + ("" if row.green else f" OVER {row.budget:.1e}"),
            f"{row.speedup:.2f}" if row.speedup is not None else "red numerics",
        ]
        for row in rows
    ]
    if markdown:
        return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body))
    widths = [max(len(cells[column]) for cells in (head, *body)) for column in range(len(head))]
    lines = []
    for cells in (head, *body):
        left = [cell.ljust(width) for cell, width in zip(cells[:3], widths[:3], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(cells[3:], widths[3:], strict=True)]
        lines.append("  ".join(left + right).rstrip())
    return "\n".join(lines)


def run(
    group: str | None,
    pattern: str,
    device: torch.device,
    dtypes: list[torch.dtype],
    seconds: float,
    compiled: bool,
    json_file: Path | None,
) -> int:
    """Run the command: print one table per case, and write all rows to a JSON file if asked, as they are made.

    A case that raises is written down, and the others go on. Exit status 1 for red numerics and for failures, 2 when
    nothing matches.
    """
    work = jobs(group, pattern, device, dtypes)
    if not work:
        print(f"no case of group {group} contains {pattern!r} on {device}")
        return 2
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
    facts, good = provenance(), True
    written: list[dict[str, Any]] = []
    print(describe(facts), flush=True)
    for case, dtype in tqdm(work, desc="measure", disable=None, leave=False):
        try:
            with torch.no_grad():
                rows = run_case(case, device, dtype, seconds, compiled)
        except Exception as error:
            failure = Failure(case.name, str(device), name_of(dtype), f"{type(error).__name__}: {error}")
            print(f"\n{failure.case}, {failure.dtype}: {failure.failure}", flush=True)
            written.append({**asdict(failure), "provenance": facts})
            good = False
        else:
            print(f"\n{to_table(rows)}", flush=True)
            written += [{**asdict(row), "provenance": facts} for row in rows]
            good &= all(row.green for row in rows if row.form not in (*PEERS, SAM2))
        if json_file is not None:
            with write_atomically(json_file) as partial:
                partial.write_text(json.dumps(written, indent=1) + "\n")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 0 if good else 1
