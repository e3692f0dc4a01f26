"""``sam run``: programs written for ``segment_anything``, unmodified, and the processes that they start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sam
from sam import Sam
from sam.cli import main, run
from sam.cli.run import environment

PROGRAM = Path(__file__).parent / "programs" / "official_calls.py"


def python(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """A Python that ``sam run`` has replaced itself by."""
    variables = {**environment(replace_local=False), **options.pop("variables", {})}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=variables, capture_output=True, text=True, timeout=300, **options
    )


def test_official_calls(nano: Sam, photo: np.ndarray, tmp_path: Path) -> None:
    """Every official path and name, the script's options, the notebooks' calls, and the program's processes."""
    weights, image = tmp_path / "sam_nano.pth", tmp_path / "photo.png"
    sam.save_checkpoint(nano, weights)
    Image.fromarray(photo).save(image)
    options = {
        "--input": image,
        "--output": tmp_path,
        "--model-type": "nano",
        "--checkpoint": weights,
        "--device": "cpu",
        "--points-per-side": 4,
        "--points-per-batch": 16,
        "--pred-iou-thresh": 0.3,
        "--stability-score-thresh": 0.5,
        "--stability-score-offset": 1.0,
        "--box-nms-thresh": 0.7,
        "--crop-n-layers": 0,
        "--crop-nms-thresh": 0.7,
        "--crop-overlap-ratio": 0,
        "--crop-n-points-downscale-factor": 1,
        "--min-mask-region-area": 10,
    }
    given = [str(part) for pair in options.items() for part in pair]
    flags = [sys.executable, "-u", "-W", "ignore::UserWarning", "-m", "sam", "run"]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([*flags, str(PROGRAM), *given], env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 7, done.stderr
    result = json.loads(done.stdout)
    assert result["path"] == str(PROGRAM.parent)
    assert result["file"] == str(PROGRAM)
    assert "ignore::UserWarning" in result["warnings"]
    assert result["unbuffered"]
    assert [result[process] for process in ("before", "spawn", "subprocess")] == [sam.__file__] * 3
    assert result["missing"] == []
    assert result["star"]
    assert result["from"] == ["sam.utils.onnx", "sam.utils.transforms"]
    assert result["pickle"]
    assert result["reload"]
    assert result["function"]
    assert result["masks"] == len((tmp_path / "metadata.csv").read_text().splitlines()) > 0
    assert result["clicks"] == [[3, 300, 451], [1, 300, 451], [1, 300, 451], [2, 1, 300, 451], [2, 1, 300, 451]]
    assert result["decoder"] == [[1, 1, 300, 451], [1, 1]]


OWN = """
import pickle, segment_anything, sam
from segment_anything import build_sam, modeling
from segment_anything.build_sam import sam_model_registry
assert sam.MINE and not hasattr(segment_anything, "MINE")
import sam.tool
assert isinstance(sam_model_registry["nano"](), modeling.Sam) and callable(build_sam)
assert segment_anything.modeling.sam.Sam is pickle.loads(pickle.dumps(modeling.Sam))
segment_anything.load_model().model_hash
print(segment_anything.__file__, sam.tool.__file__)
"""


def test_a_program_with_a_sam_of_its_own(tmp_path: Path) -> None:
    """Its ``sam`` is what it imports by that name, and ours what it imports as ``segment_anything``."""
    (tmp_path / "sam" / "tool").mkdir(parents=True)
    (tmp_path / "sam" / "__init__.py").write_text("MINE = True")
    (tmp_path / "sam" / "tool" / "__init__.py").touch()
    (tmp_path / "program.py").write_text(OWN)
    done = python(tmp_path / "program.py", cwd=tmp_path)
    assert done.stdout.split() == [sam.__file__, str(tmp_path / "sam" / "tool" / "__init__.py")], done.stderr


def test_a_copy_of_the_programs_own(tmp_path: Path) -> None:
    """Stays, and a warning at the line that imports it says so and names the option that replaces it."""
    (tmp_path / "segment_anything").mkdir()
    (tmp_path / "segment_anything" / "__init__.py").write_text("MODIFIED = True")
    program = tmp_path / "program.py"
    program.write_text("from segment_anything import MODIFIED")
    done = python(program)
    assert done.returncode == 0
    assert f"{program}:1: RuntimeWarning: segment_anything in {tmp_path / 'segment_anything'} is a copy" in done.stderr
    assert "sam run --replace-local, serves" in done.stderr
    program.write_text("import importlib.util; print(importlib.util.find_spec('segment_anything').origin)")
    done = python(program, variables={"FASTSAM_REPLACE_LOCAL": "1"})
    assert (done.stdout.strip(), done.stderr) == (sam.__file__, "")


SPAWNING = """
import multiprocessing, sys
import torch
from segment_anything.modeling import common

class Names(torch.utils.data.Dataset):
    def __len__(self):
        return 1
    def __getitem__(self, index):
        import segment_anything
        return segment_anything.__file__

def same(given):
    from segment_anything.modeling.common import MLPBlock
    return given is MLPBlock

if __name__ == "__main__":
    print(multiprocessing.get_context("spawn").Pool(1).map(same, [common.MLPBlock])[0])
    print(multiprocessing.get_context("forkserver").Pool(1).map(same, [common.MLPBlock])[0])
    for context in ("spawn", "fork"):
        loader = torch.utils.data.DataLoader(Names(), num_workers=1, multiprocessing_context=context)
        print(next(iter(loader))[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True], ids=["plain", "with a sam of its own"])
def test_processes_that_import(own: bool, tmp_path: Path) -> None:
    """Workers of every kind, and classes sent to them."""
    if own:
        (tmp_path / "sam").mkdir()
        (tmp_path / "sam" / "__init__.py").touch()
    (tmp_path / "program.py").write_text(SPAWNING)
    done = python(tmp_path / "program.py", cwd=tmp_path)
    assert done.stdout.split() == ["True", "True", sam.__file__, sam.__file__], done.stderr


@pytest.mark.parametrize(
    ("code", "status"),
    [("import sys; sys.exit(3)", 3), ("1 / 0", 1), ("raise KeyboardInterrupt", -2), ("raise SystemExit('over')", 1)],
)
def test_ends_as_without(code: str, status: int, tmp_path: Path) -> None:
    """The same status and the same traceback."""
    (tmp_path / "program.py").write_text(f"def f():\n    {code}\nf()\n")
    plain = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True)
    done = python(tmp_path / "program.py")
    assert (done.returncode, done.stderr, done.stdout) == (plain.returncode, plain.stderr, plain.stdout)
    assert done.returncode == status


def test_a_sitecustomize_that_was_there(tmp_path: Path) -> None:
    """Is imported as it would be, and the path is as it would be."""
    (tmp_path / "sitecustomize.py").write_text("print('theirs', __file__)")
    code = "import sys; print(sys.path, 'sitecustomize' in sys.modules)"
    plain = {**os.environ, "PYTHONPATH": str(tmp_path)}
    expected = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True)
    hooked = environment(replace_local=False)["PYTHONPATH"].split(os.pathsep)[0]
    done = python("-c", code, variables={"PYTHONPATH": os.pathsep.join([hooked, str(tmp_path)])})
    assert (done.stdout, done.stderr) == (expected.stdout, expected.stderr)
    assert "theirs" in done.stdout


def test_other_pythons_are_left_alone() -> None:
    """Of another installation, for which this package is not installed."""
    code = "import sys; print('_fastsam_drop_in' in {type(finder).__module__ for finder in sys.meta_path})"
    assert python("-c", code).stdout == "True\n"
    assert python("-c", code, variables={"FASTSAM_RUN": "/another"}).stdout == "False\n"


def executed(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """What ``fastsam run`` with ``arguments`` becomes: its command, interpreter flags left out, and its variables."""
    calls: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda file, command, variables: calls.append((command, variables)))
    monkeypatch.setattr(run, "interpreter_flags", list)
    assert main(["run", *arguments]) == 0
    ((command, variables),) = calls
    assert command[0] == sys.executable
    return command[1:], variables


@pytest.mark.parametrize(
    ("given", "program"),
    [
        (["a.py"], ["a.py"]),
        (["a.py", "--replace-local", "-h", "--", "-x"], ["a.py", "--replace-local", "-h", "--", "-x"]),
        (["--", "a.py", "--"], ["a.py", "--"]),
        (["--traceback", "-m", "tool", "--help"], ["-m", "tool", "--help"]),
        (["-mtool", "-m"], ["-mtool", "-m"]),
        (["-", "x"], ["-", "x"]),
        (["run", "run"], ["run", "run"]),
    ],
)
def test_a_programs_arguments_are_its_own(
    given: list[str], program: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command, variables = executed(monkeypatch, *given)
    assert command == program
    assert "FASTSAM_REPLACE_LOCAL" not in variables


def test_options_of_ours_come_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"first{os.pathsep}{os.pathsep}last")
    command, variables = executed(monkeypatch, "--replace-local", "a.py")
    assert command == ["a.py"]
    assert "FASTSAM_REPLACE_LOCAL" in variables
    monkeypatch.setenv("PYTHONPATH", variables["PYTHONPATH"])
    again = environment(replace_local=False)["PYTHONPATH"].split(os.pathsep)
    assert again == variables["PYTHONPATH"].split(os.pathsep)  # once, however often it runs itself
    assert again[1:] == ["first", "", "last"]
    monkeypatch.delenv("PYTHONPATH")
    assert os.pathsep not in environment(replace_local=False)["PYTHONPATH"]  # an empty part is the working directory


@pytest.mark.parametrize("given", [[], ["-m"], ["--replace-local"], ["--"]])
def test_no_program(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *given]) == 2
    assert "run needs a SCRIPT, or -m MODULE" in capsys.readouterr().err


def test_an_option_that_we_do_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", "--points-per-side", "4", "a.py"])
    assert ended.value.code == 2
    assert "--points-per-side" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "name"), [("-I", "isolated"), ("-E", "ignore_environment"), ("-S", "no_site")])
def test_pythons_that_would_not_serve(
    flag: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "flags", SimpleNamespace(**{"isolated": 0, "ignore_environment": 0, "no_site": 0, name: 1})
    )
    assert main(["run", "a.py"]) == 2
    assert f"python {flag} reads no PYTHONPATH or sitecustomize" in capsys.readouterr().err
