"""Measurement of the dtypes of linear layers on a device: which of them is fast here is no matter of its name."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsam_kernels import int8_linear, pack_int8_weight, quantize_rows, quantize_weight

_TURNS = 5
_INPUTS, _OUTPUTS = 768, 2304  # of the first linear layer of ViT-B's blocks
_ROWS = {"cpu": 512}
_ROWS_GPU = 4096


@torch.no_grad()
def measured_products(device: torch.device) -> dict[str, float]:
    """Return the milliseconds of one linear layer in each dtype, the fastest first.

    int8 begins and ends in fp32, with its rows quantised as they come. The forms take turns, and the median counts;
    other programs on the machine disturb it.
    """
    rows = _ROWS.get(device.type, _ROWS_GPU)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, _INPUTS, generator=generator).to(device) for n in (rows, _OUTPUTS))
    packed = pack_int8_weight(quantize_weight(weight, "int8"))
    forms: dict[str, Callable[[], Tensor]] = {"int8": lambda: int8_linear(quantize_rows(x), packed, None)}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        forms[name] = partial(F.linear, x.to(dtype), weight.to(dtype))
    for form in forms.values():
        form()
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(_TURNS):
        for name, form in forms.items():
            start = _now(device)
            form()
            times[name].append(1000 * (_now(device) - start))
    medians = {name: statistics.median(of_form) for name, of_form in times.items()}
    return dict(sorted(medians.items(), key=lambda item: item[1]))


def describe_products(device: torch.device) -> str:
    """Return :func:`measured_products` in words: "int8 (0.21 of fp32), bf16 (0.5), fp32, fp16 (1.9)"."""
    times = measured_products(device)
    shares = {name: "" if name == "fp32" else f" ({ms / times['fp32']:.2f} of fp32)" for name, ms in times.items()}
    return f"{', '.join(name + share for name, share in shares.items())}; one linear layer, measured now"


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
