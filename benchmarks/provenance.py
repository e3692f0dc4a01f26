"""The provenance of a figure: the machine, the versions, the revision."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sam.system.hardware import cpu_name, usable_cores

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
CPU_RESULTS = (
    "cpu_clicks.json",
    "cpu_clicks_4_cores.json",
    "cpu_encoder.json",
    "cpu_encoder_4_cores.json",
    "cpu_bf16.json",
)
SAM2_RESULTS = ("cpu_sam2.json",)


@cache
def provenance() -> dict[str, Any]:
    """Return the facts that every row carries."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "revision": _revision(),
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "tf32": torch.backends.cudnn.allow_tf32,
        "triton": _version("triton"),
        "python": platform.python_version(),
    }


def describe(facts: dict[str, Any]) -> str:
    """Format one line for the head of a table."""
    machine = facts["gpu"] or f"{facts['cpu']}, {facts['cores']} cores"
    return (
        f"{machine}; torch {facts['torch']}, triton {facts['triton']}, Python {facts['python']}; "
        f"revision {facts['revision']}, {facts['date']}"
    )


def read_rows(results: Path) -> list[dict[str, Any]]:
    """Read the rows of a results file; a case that failed has none."""
    return [row for row in json.loads(results.read_text()) if "failure" not in row]


def title(row: dict[str, Any]) -> str:
    """Return the title of a row of results, without its form."""
    facts = row["provenance"]
    cores = "" if facts["gpu"] else f", {facts['cores']} cores"
    return f"{row['case']}, {row['dtype']}{cores}"


_FORMS = {
    "reference": "official modules in this package",
    "torch": "ours, PyTorch forms",
    "triton": "ours, Triton forms",
    "torch.compile of torch": "ours, PyTorch forms, compiled",
}


def form_name(form: str) -> str:
    """Return the name of a form in pages and pictures: "torch, compiled" is "ours, PyTorch forms, compiled"."""
    kind, *how = form.split(", ", 1)
    return ", ".join([_FORMS.get(kind, kind), *how])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _revision() -> str:
    """Return the commit, marked when the measured code differs from it; results and pages do not count."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--", "sam", "fastsam_kernels", "benchmarks/*.py")
        return git("rev-parse", "--short=10", "HEAD").strip() + ("+changes" if changed.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("REVISION", "unknown")
