"""The tests of GPUs as compilations, in processes that do not interpret: the plugin on a few, and on all when slow."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from kernels.test_compile_report import run

LAUNCHES = """
from dataclasses import replace

import pytest
import torch

from fastsam_kernels import nms
from fastsam_kernels.triton.launch import Launch
from fastsam_kernels.nms.triton.kernel import plan, words_of
from fastsam_kernels.triton.tiles import TileConfig, arch_of, lookup


def launches(device):
    boxes, bits = torch.rand(40, 4, device=device), torch.empty(40, words_of(40), dtype=torch.int32, device=device)
    keep = torch.empty(40, dtype=torch.bool, device=device)
    return plan(boxes, 0.5, bits, keep, lookup("nms", arch_of(device), torch.float32))


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_operation(device):
    boxes = torch.rand(40, 4, device=device)
    if torch.equal(boxes, boxes + 1) and float(boxes.sum()) == 0.0:
        nms(boxes[boxes[:, 0] > 0.5], boxes[:, 0], 0.5, kernels="triton").tolist()


def test_no_warps(device):
    launch = launches(device)[0]
    replace(launch, tile=replace(launch.tile, num_warps=0)).run()


def test_no_programs(device):
    replace(launches(device)[0], grid=(0, 1)).run()


def test_no_values(device):
    launches(device)[1].run()
    torch.linalg.inv(torch.empty(2, 3, device=device))
"""


# What may end, for want of values, before anything was launched: whole models, graphs, and what launches no kernel.
WITHOUT_LAUNCHES = ("test_gpu.py", "compiles_as_one_graph", "-torch-", "takes_the_eager", "kept_tables")


def compiled(*arguments: str) -> str:
    """What the plugin says of tests; the last lines are its own."""
    program = "import sys; sys.path.insert(0, 'tests'); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    done = run("-c", program, "-q", "-p", "kernels.compile_launches", "-p", "no:cacheprovider", *arguments)
    assert "launches, " in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_what_a_gpu_would_refuse_fails(tmp_path: Path) -> None:
    tests = tmp_path / "test_launches.py"
    tests.write_text(LAUNCHES)
    said = compiled("--arch", "90", "--rootdir", str(tmp_path), str(tests))
    assert "2 failed, 1 passed, 1 skipped" in said
    assert "overlap_bits_kernel: AssertionError: num_warps must be a power of 2" in said
    assert "grid (0, 1), of which each must be from 1 to (2147483647, 65535)" in said
    assert re.search(r"cut short after 1 launches: RuntimeError: .*test_no_values", said)
    assert "sm_90: 5 launches, 2 compilations: overlap_bits_kernel 1, sweep_kernel 1" in said


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90", "120"])
def test_every_launch_of_the_gpu_s_tests_compiles(arch: str) -> None:
    """None fails, and every kernel is launched; what is cut short are tests of graphs and of whole records."""
    tests = ["tests/kernels", "tests/test_gpu.py", "--ignore", "tests/kernels/test_compile_report.py"]
    said = compiled("--arch", arch, "-m", "not slow", *tests)
    assert " failed" not in said, said[-4000:]
    kernels = ("runs", "unite", "labels", "overlap_bits", "sweep", "combine", "two_way", "token_to_image")
    kernels += ("image_to_token", "hypernetwork_masks", "mask_postprocess", "preprocess_image", "rel_pos_attention")
    kernels += ("window_attention",)
    for kernel in kernels:
        assert f"{kernel}_kernel " in said, kernel
    cut = [line for line in said.splitlines() if line.startswith("cut short after 0 launches")]
    assert not [line for line in cut if not any(test in line for test in WITHOUT_LAUNCHES)]
