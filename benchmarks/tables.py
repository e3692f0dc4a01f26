"""The tables that pages show, made from the committed results and tiles, so that no page says more than they do."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastsam_kernels.triton.tiles import architectures, entries_for
from sam.build_sam import NANO_CHECKPOINT
from sam.checkpoint import read_checkpoint

from .compile_cases import AMD
from .mask_iou import sentence
from .model.decoder_work import work_table
from .operations import OPERATIONS
from .provenance import CPU_RESULTS, RESULTS, ROOT, SAM2_RESULTS, describe, read_rows, title


def status_table() -> str:
    """Format one row per kernel: where it was interpreted, compiled, run and tuned."""
    lines = [
        "| kernel | interpreted | compiled, 16-bit tiles without stack | run on a GPU | tuned |",
        "|---|---|---|---|---|",
    ]
    for operation in OPERATIONS:
        if not OPERATIONS[operation].LAUNCHES:
            lines.append(f"| `{operation}` | no kernel yet: torch form only | - | - | - |")
            continue
        cells = [_interpreted(operation), _compiled(operation), _ran(operation, "triton"), _tuned(operation)]
        lines.append(f"| `{operation}` | " + " | ".join(cells) + " |")
    for what, tests, case, form in _BESIDE_KERNELS:
        lines.append(f"| {what} | on a CPU: `{tests}` | - | {_ran(case, form)} | - |")
    trained_on = read_checkpoint(NANO_CHECKPOINT).metadata["machine"]
    on_gpu = trained_on if "NVIDIA" in trained_on else "never"
    lines.append(f"| training of the embedded model | on a CPU: `tests/test_training.py` | - | {on_gpu} | - |")
    return "\n".join(lines)


# What else only a GPU can show: the tests of all but that, and the case and form that show it.
_BESIDE_KERNELS = (
    ("CUDA graphs of the decoder, sessions", "tests/test_graphs.py", "session of", "triton, CUDA graphs"),
    ("streams: copies beside the computation", "tests/test_stream.py", "stream of", "triton, stream"),
    ("encoder with compiled blocks", "tests/test_runtime.py", "encoder", "triton, compiled blocks"),
)


def _interpreted(operation: str) -> str:
    name = getattr(OPERATIONS[operation], "TESTS", f"test_{operation}.py")  # several operations may share a file
    tests = ROOT / "tests" / "kernels" / name
    names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}  # and bool as it is
    entries = [entry for arch in architectures() for entry in entries_for(operation, arch)]
    of_tiles = sorted({names.get(dtype, dtype) for entry in entries for dtype in entry["dtype"]})
    return f"{', '.join(of_tiles)}: `{tests.relative_to(ROOT)}`" if tests.exists() else "no"


def _compiled(operation: str) -> str:
    cells = []
    for path in sorted(RESULTS.glob("compile_report_*.json")):
        document = json.loads(path.read_text())
        every = [row for row in document["rows"] if row["operation"] == operation]
        rows = [row for row in every if row["dtype"] != "fp32"] or every  # boxes come in fp32 only
        spilled = {row["arch"] for row in rows if row["stack"]}
        clean = [arch for arch in dict.fromkeys(row["arch"] for row in rows) if arch not in spilled and arch != AMD]
        if clean:
            cells.append(f"{', '.join(clean)} (triton {document['provenance']['triton']})")
    return "; ".join(cells) or "no"


def _ran(case: str, form: str) -> str:
    dtypes_by_place: dict[str, set[str]] = {}
    for path in sorted(RESULTS.glob("gpu*.json")):
        for row in read_rows(path):
            if row["case"].startswith(case) and row["form"] == form and row["speedup"] is not None:
                facts = row["provenance"]
                where = f"{facts['gpu']}, {facts['date']}, {facts['revision']}"
                dtypes_by_place.setdefault(where, set()).add(row["dtype"])
    return "; ".join(f"{where}: {', '.join(sorted(dtypes))}" for where, dtypes in dtypes_by_place.items()) or "never"


def _tuned(operation: str) -> str:
    tuned = [
        f"sm_{gpu.arch} {dtype}"
        for gpu in architectures().values()
        for entry in gpu.tiles
        if entry["operation"] == operation and not entry["provisional"]
        for dtype in entry["dtype"]
    ]
    return ", ".join(dict.fromkeys(tuned)) or "provisional"


@dataclass(frozen=True)
class Columns:
    """The columns of a table of speed.

    Attributes:
        forms: those that may stand in each column, by its head.
        over: the form that the speed-ups in brackets are over, and its name there.
        memory: the form whose peak memory stands beside ours.
    """

    forms: dict[str, tuple[str, ...]]
    over: tuple[str, str]
    memory: str


SAM = Columns(
    {
        "segment-anything": ("segment-anything",),
        "transformers": ("transformers",),
        "official modules here": ("reference",),
        "**ours**": ("torch",),
        "**ours**, compiled": ("torch, compiled", "torch.compile of torch"),
    },
    ("reference", "the official modules in this package"),
    "segment-anything",
)
SAM2 = Columns(
    {
        "sam2": ("sam2",),
        "transformers": ("transformers",),
        "official modules here": ("reference",),
        "**ours**": ("torch",),
    },
    ("sam2", "sam2"),
    "sam2",
)


def speed_table(*results: str, cases: str = "", columns: Columns = SAM) -> str:
    """Return one row per case of results files whose name matches ``cases``, fp32 first, and one column per form."""
    paths = [RESULTS / name for name in results]
    rows = [row for path in paths if path.exists() for row in read_rows(path) if re.match(cases, row["case"])]
    if not rows:
        return "Not measured yet."
    by_case: dict[str, dict[str, dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["dtype"] != "float32"):
        by_case.setdefault(title(row), {})[row["form"]] = row
    lines = ["| ms | " + " | ".join(columns.forms) + " | MB |", "|---|" + "---:|" * (len(columns.forms) + 1)]
    for case, forms in by_case.items():
        over, cells = forms.get(columns.over[0]), []
        for column, names in columns.forms.items():
            row = next((forms[name] for name in names if name in forms), None)
            cells.append("" if row is None else _milliseconds(row, over if "ours" in column else None))
        memory = [forms[name]["peak_bytes"] for name in (columns.memory, "torch") if name in forms]
        cells.append(" / ".join("-" if peak is None else f"{peak / 1e6:.0f}" for peak in memory))
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    explained = (
        f"Medians, forms in turn; in brackets the speed-up over {columns.over[1]}; "
        f"MB: peak memory of {columns.memory} / ours."
    )
    return "\n".join([*lines, "", explained, *_sources(rows)])


def _sources(rows: list[dict[str, Any]]) -> list[str]:
    """Return one line per machine and day, with the revisions that were measured there."""
    revisions: dict[str, dict[str, None]] = {}
    for row in rows:
        facts = row["provenance"]
        revisions.setdefault(describe({**facts, "revision": "{}"}), {})[facts["revision"]] = None
    return [f"{line.format(', '.join(names))}." for line, names in revisions.items()]


def _milliseconds(row: dict[str, Any], over: dict[str, Any] | None) -> str:
    """Format a time, and the speed-up over a row; no time of ours stands without a result that is right."""
    if row["speedup"] is None:
        return "over budget"
    time = row["timing"]["p50"]
    if over is None:
        return f"{time:.0f}"
    speedup = over["timing"]["p50"] / time
    return f"{time:.0f} ({speedup:.{2 if speedup < 2 else 1}f}x)"


FRONT_PAGE = ("cpu_clicks.json", "cpu_encoder.json")  # fp32 on two cores
# What stands between <!-- NAME --> and <!-- /NAME --> in a page.
TABLES = {
    "status": (Path("benchmarks/README.md"), status_table),
    "speed": (Path("README.md"), partial(speed_table, *FRONT_PAGE, cases="click|64 points|session|encoder")),
    "sam2 speed": (Path("benchmarks/README.md"), partial(speed_table, *SAM2_RESULTS, columns=SAM2)),
    "every speed": (Path("benchmarks/README.md"), partial(speed_table, *CPU_RESULTS)),
    "decoder work": (Path("benchmarks/README.md"), work_table),
    "mask iou": (Path("README.md"), sentence),
}


def fill(page: str, name: str, table: str) -> str:
    """Return the page with the table between its marks.

    Raises:
        ValueError: the marks are not there.
    """
    start, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
    if start not in page or end not in page:
        raise ValueError(f"the page has no marks {start.strip()} and {end.strip()}")
    before, rest = page.split(start, 1)
    return before + start + table + end + rest.split(end, 1)[1]


def run(write: bool) -> int:
    """Run the command: print the tables, or put them into their pages."""
    for name, (path, make) in TABLES.items():
        table = make()
        print(f"{path}: {name}\n\n{table}\n")
        if write:
            page = ROOT / path
            page.write_text(fill(page.read_text(), name, table))
    return 0
