"""Timing, memory and the machine's own limits."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by the names that options take
Form = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Milliseconds at the 20th, 50th and 80th percentile, and the number of runs."""

    p20: float
    p50: float
    p80: float
    runs: int


def time_forms(forms: Mapping[str, Form], device: torch.device, seconds: float, runs: int = 5) -> dict[str, Timing]:
    """Time several forms side by side, one run of each in turn, so that a drifting machine drifts for all.

    Args:
        forms: by name; each was run before, so that nothing is compiled in the time.
        seconds: to spend on all of them.
        runs: of each at the least.
    """
    samples: dict[str, list[float]] = {name: [] for name in forms}
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device) if device.type == "cuda" else None
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(next(iter(samples.values()))) < runs:
        for name, form in forms.items():
            samples[name].append(_once(form, device, flush))
    return {name: _percentiles(values) for name, values in samples.items()}


def _once(form: Form, device: torch.device, flush: torch.Tensor | None) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        form()
        return 1000 * (time.perf_counter() - start)
    assert flush is not None
    flush.zero_()  # or the inputs come from the L2 cache
    start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start_event.record()
    form()
    end_event.record()
    torch.cuda.synchronize(device)
    return start_event.elapsed_time(end_event)


def _percentiles(values: list[float]) -> Timing:
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return Timing(cuts[1], statistics.median(values), cuts[7], len(values))


def peak_memory(form: Form, device: torch.device) -> int:
    """Measure the most bytes that ``form`` takes beyond what is allocated before it.

    On a GPU torch counts them. On a CPU it is the peak of the process's resident memory, as Linux keeps it, over
    what is resident once the C library has given back all that earlier runs freed.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        form()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = _peak_resident()
    form()
    return _peak_resident() - before


def _peak_resident() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


# Limits ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """The least work of an operation, counted from its shapes.

    Attributes:
        bytes: each input read once and each output written once.
        flops: of matrix products, two for a multiplication and its addition.
        scalar_ops: instructions outside the matrix units (a GELU, a softmax) that no form can leave out.
    """

    bytes: float
    flops: float
    scalar_ops: float = 0.0


def limit_ms(work: Work, device: torch.device, dtype: torch.dtype) -> float:
    """Return the time that nothing can beat on this machine, by its measured rates."""
    times = [work.bytes / bandwidth(device), work.flops / matmul_rate(device, dtype)]
    if device.type == "cuda":
        times.append(work.scalar_ops / scalar_rate(device))
    return 1000 * max(times)


@cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP per second of a large square product through torch."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / (_best(lambda: a @ b, device) / 1000)


@cache
def bandwidth(device: torch.device) -> float:
    """Measure the bytes per second of a large copy, read and written both counted."""
    size = 2**30 if device.type == "cuda" else 2**27
    source = torch.randint(0, 100, (size,), device=device, dtype=torch.int8)
    target = torch.empty_like(source)
    return 2 * size / (_best(lambda: target.copy_(source), device) / 1000)


@cache
def scalar_rate(device: torch.device) -> float:
    """Return the fp32 instructions per second: multiprocessors x 128 lanes x the highest clock."""
    properties = torch.cuda.get_device_properties(device)
    kilohertz = getattr(properties, "clock_rate", None) or 1_755_000  # an H100 SXM's boost clock
    return properties.multi_processor_count * 128 * kilohertz * 1000.0


def _best(form: Form, device: torch.device) -> float:
    for _ in range(3):
        form()
    return time_forms({"": form}, device, 0.5)[""].p20
