"""The compile report, in a process that does not interpret: a kernel a run in ``make test``, all of them when slow."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.compile_cases import compile_cases
from benchmarks.machine_code import inspect

ROOT = Path(__file__).parents[2]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


def report(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "benchmarks", "compile-report", "--workers", "2", *arguments)


def hypernetwork_masks_rows(arch: str) -> list[str]:
    done = report("--operation", "hypernetwork_masks", "--arch", arch)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = [line for line in done.stdout.splitlines() if line.startswith("| hypernetwork_masks")]
    assert len(rows) == 12  # three dtypes, one or three masks, with finer features and without
    assert all(f"sm_{arch}" in row for row in rows)
    return [row for row in rows if "fp32" not in row]


def test_hopper_is_clean() -> None:
    """16-bit tiles without stack, within the shared memory, on tensor cores; the command fails otherwise."""
    assert all("HGMMA" in row for row in hypernetwork_masks_rows("90"))


@pytest.mark.slow
def test_ampere_is_clean() -> None:
    assert all("HMMA" in row for row in hypernetwork_masks_rows("80"))


@pytest.mark.slow
def test_every_kernel_tile_and_architecture_is_clean() -> None:
    done = report()
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


COMPILES = """
import dataclasses
from benchmarks import compile_report
from benchmarks.compile_cases import compile_cases
from benchmarks.machine_code import compile_launch
from fastsam_kernels.triton.tiles import TileConfig

def too_large(*arguments):
    case = next(compile_cases(["hypernetwork_masks"], [80]))
    tile = TileConfig({"BLOCK_N": 128, "BLOCK_C": 256}, 4, 3)
    yield dataclasses.replace(case, launch=dataclasses.replace(case.launch, tile=tile))

if __name__ == "__main__":
    compile_report.compile_cases = too_large
    print("status", compile_report.run(None, None, 1, False))
    overlaps = next(compile_cases(["nms"], [90]))
    assembly = compile_launch(overlaps.launch, 90).asm["ptx"]
    print(overlaps.shape, assembly.count("mul.rn.f32") + assembly.count("mul.f32"), assembly.count("fma"))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What one process says of a tile that is too large and of the overlaps of nms: each start takes seconds."""
    script = tmp_path_factory.mktemp("compiles") / "compiles.py"
    script.write_text(COMPILES)
    done = run(script)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout.splitlines()


def test_a_tile_that_spills_fails(compiled: list[str]) -> None:
    assert "status 1" in compiled
    assert any("of shared memory, over 166912" in line or "bytes of stack" in line for line in compiled)


def test_the_products_of_nms_are_rounded(compiled: list[str]) -> None:
    """A sum of a product that is not decides otherwise than the host where an overlap is at the threshold."""
    (line,) = (line for line in compiled if line.startswith("overlaps"))
    products, fused = map(int, line.split()[-2:])
    assert products > 0
    assert fused == 0


def test_a_process_of_the_interpreter_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = next(compile_cases(["hypernetwork_masks"], [80]))
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1: the interpreter cannot compile"):
        inspect(case)


def test_an_unknown_architecture_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "compile-report", "--arch", "75"])
    assert main() == 2
    assert "unknown architecture '75'; known: 80, 86, 89, 90, 100, 120, gfx942" in capsys.readouterr().err


FINDS = """
import os
from dataclasses import replace

import torch
from benchmarks.compile_cases import compile_cases
from benchmarks.machine_code import compile_launch, pretend
from benchmarks.tuning_plan import Planned, compile_all, counting, without_memory

if __name__ == "__main__":
    about, dtype = Planned("preprocess_image", "any"), torch.bfloat16
    problem = about.make(torch.device("meta"), dtype, 90)
    problem = replace(problem, candidates=problem.candidates[:2])
    verdicts = compile_all(problem, about, 90, dtype, workers=1)
    print([(verdict.complaint, verdict.compiled, verdict.seconds > 0) for verdict in verdicts])
    pretend(90)
    with counting() as found:
        for tile in problem.candidates:
            for launch in without_memory(problem, tile):
                launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.constexprs, **launch.options)
    print(found)
    before = dict(os.environ)
    compile_launch(next(compile_cases(["nms"], ["gfx942"])).launch, "gfx942")
    print(dict(os.environ) == before)
"""


def test_what_forks_compile_is_found_by_the_process_that_launches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No compilation leaves anything behind that is part of the key of Triton's cache, nor does one for AMD."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    script = tmp_path / "finds.py"
    script.write_text(FINDS)
    done = run(script)
    assert done.returncode == 0, done.stderr[-2000:]
    verdicts, result, unchanged = done.stdout.splitlines()
    assert verdicts == "[('', 1, True), ('', 1, True)]"
    assert result == "[True, True]"
    assert unchanged == "True"


COMPLAINS = """
from dataclasses import replace

import torch
from benchmarks.tuning_plan import Planned, compile_all
from fastsam_kernels.triton.tiles import TileConfig

if __name__ == "__main__":
    about = Planned("hypernetwork_masks", "any")
    problem = about.make(torch.device("meta"), torch.bfloat16, 80)
    tiles = [TileConfig({"BLOCK_N": n, "BLOCK_C": 256}, 4, stages) for n, stages in ((32, 1), (128, 3), (24, 1))]
    for verdict in compile_all(replace(problem, candidates=tiles), about, 80, torch.bfloat16, workers=1):
        print(verdict.complaint or "clean")
"""


@pytest.mark.slow
def test_what_a_candidate_is_left_out_for(tmp_path: Path) -> None:
    script = tmp_path / "complains.py"
    script.write_text(COMPLAINS)
    done = run(script)
    assert done.returncode == 0, done.stderr[-2000:]
    clean, large, odd = done.stdout.splitlines()
    assert clean == "clean"
    assert "of shared memory, over 166912" in large or "bytes of stack" in large
    assert odd.startswith("CompilationError")
