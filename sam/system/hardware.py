"""The hardware under the program: the device that is asked for, what it multiplies fast, the cores of the CPU."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch


def usable_device(device: Any = None) -> torch.device:
    """Return ``device`` as a ``torch.device`` that tensors can be put on.

    None takes the CUDA device if there is one, else the CPU.

    Raises:
        TypeError: neither a name, an index nor a device.
        ValueError: torch has no such device, here or at all.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(device, (str, int, torch.device)) or isinstance(device, bool):
        raise TypeError(f"device must be a torch.device or its name like 'cuda:0', got {device!r}")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = re.split(r"\n|\. ", str(error))[0].rstrip(".")
        raise ValueError(f"torch cannot use device {str(device)!r} here: {reason}") from None
    return chosen


def usable_cores() -> int:
    """Return how many cores of the CPU this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """Return the model of the CPU, as Linux names it, else its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def multiplies_bf16_fast(device: torch.device) -> bool:
    """Return whether matrix products in bf16 are faster than in fp32 on ``device``: it has instructions for them."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and _cpu_has_bf16_products()


def _cpu_has_bf16_products() -> bool:
    # No environment variable changes this: those that limit oneDNN or ATen leave the capabilities as they are.
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
