"""What the compiler is asked for and what it makes of it, in processes that do not interpret."""

from __future__ import annotations

import json
from typing import Any

import pytest
from kernels.test_compile_report import run

SPECIALISATIONS = """
import json
import numpy as np
import torch
from triton.runtime import driver
from benchmarks.machine_code import _Device
from fastsam_kernels import Resizing
from fastsam_kernels.connected_components.triton import kernel as components
from fastsam_kernels.mask_postprocess.triton import kernel as masks
from fastsam_kernels.nms.triton import kernel as nms
from fastsam_kernels.preprocess_image.triton import kernel as preprocess
from fastsam_kernels.triton.tiles import lookup

driver.set_active(_Device(90))
found = {}

def ask(launch):
    # Notes under which key Triton would compile, and does not.
    keys = found.setdefault(launch.kernel.__name__, set())
    launch.kernel._do_compile = lambda key, *arguments: keys.add(str(key))
    launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.constexprs, **launch.options)

def meta(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")

rng = np.random.default_rng(0)
mean = meta(3, dtype=torch.float32)
for number in range(200):
    height, width = (int(side) for side in rng.integers(200, 4000, 2))
    scale = 1024 / max(height, width)
    size = tuple(max(1, int(side * scale + 0.5)) for side in (height, width))
    image, pixels = meta(height, width, 3, dtype=torch.uint8), meta(3, 1024, 1024, dtype=torch.float32)
    ask(preprocess.plan(image, size, mean, mean, pixels, lookup("preprocess_image", 90, torch.float32)))
    count = int(rng.integers(1, 500))
    logits, tile = meta(count, 256, 256, dtype=torch.bfloat16), lookup("mask_postprocess", 90, torch.bfloat16)
    numbers = meta(count, 7, dtype=torch.int32)
    ask(masks.plan(logits, Resizing(1024, size, (height, width)), 0.0, 1.0, numbers, tile, statistics=True))
    some, labels = meta(count, height, width, dtype=torch.bool), meta(count, height, width, dtype=torch.int32)
    for launch in components.plan(some, labels, labels, lookup("connected_components", 90, torch.bool)):
        ask(launch)
    bits, keep = meta(count, nms.words_of(count), dtype=torch.int32), meta(count, dtype=torch.bool)
    boxes = meta(count, 4, dtype=torch.float32)
    for launch in nms.plan(boxes, 0.7, bits, keep, lookup("nms", 90, torch.float32)):
        ask(launch)
print(json.dumps({name: len(keys) for name, keys in found.items()}))
"""


def output_of(script: str) -> Any:
    done = run("-c", script)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_sizes_of_images_are_not_compiled_for() -> None:
    """200 images of as many sizes: what is compiled again is for another number of taps or of logits under a tile."""
    result = output_of(SPECIALISATIONS)
    patches = result.pop("mask_postprocess_kernel")
    assert patches <= 6
    once = ("preprocess_image_kernel", "runs_kernel", "unite_kernel", "labels_kernel")
    assert result == {**dict.fromkeys(once, 1), "overlap_bits_kernel": 1, "sweep_kernel": 1}


FENCES = """
import json
from benchmarks.compile_cases import compile_cases
from benchmarks.machine_code import _dump, compile_launch

fences, atomics = {}, 0
for operation in ("mask_postprocess", "connected_components"):
    for case in compile_cases([operation], [90]):
        machine_code = _dump(compile_launch(case.launch, 90).asm["cubin"])[1]
        fences[f"{case.operation}, {case.shape}, {case.dtype}"] = machine_code.count("MEMBAR")
        atomics += machine_code.count("RED.E") + machine_code.count("ATOM")
print(json.dumps([fences, atomics]))
"""


@pytest.mark.slow
def test_atomics_order_nothing() -> None:
    """A fence of the whole GPU for each atomic throws the L1 cache away: counts and minima need none."""
    fences, atomics = output_of(FENCES)
    assert atomics > 0
    assert fences == dict.fromkeys(fences, 0)
