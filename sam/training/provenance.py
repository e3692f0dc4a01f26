"""The provenance that weights and figures carry."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import torch

from .. import __version__
from ..build_sam import NANO_CHECKPOINT
from ..checkpoint import read_checkpoint
from ..system.hardware import cpu_name

EMBEDDED, SCRATCH = "embedded", "scratch"  # what a run can start from, but for files


def origin(init: str) -> str:
    """Return what a run started from, in words; ``init`` as of ``Settings``."""
    if init == SCRATCH:
        return "fresh weights"
    about = read_checkpoint(NANO_CHECKPOINT if init == EMBEDDED else init).metadata
    name = "the embedded checkpoint" if init == EMBEDDED else Path(init).name
    return f"{name} ({about['revision']}, {about['steps']} steps)" if "revision" in about else name


def machine(device: torch.device) -> str:
    """Return the name of the machine in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def revision() -> str:
    """Return the git revision of the code; without a repository the variable ``REVISION``, or the version."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("REVISION", __version__)
