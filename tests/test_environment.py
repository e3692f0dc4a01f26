"""``python -m sam info --env``: what a report of a bug needs, and nothing that tells who and where one is."""

from __future__ import annotations

import getpass
import json
import platform
import re
import tempfile
from pathlib import Path

import pytest
import torch

import sam
from sam.cli import main


def test_facts_of_the_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert main(["info", "--env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert facts["python"].endswith(platform.python_version())
    assert facts["device"] == str(sam.load_model().device)
    assert facts["kernels in float32"] == sam.load_model().resolved_kernels
    assert facts["OMP_WAIT_POLICY"] == "PASSIVE"
    assert set(re.findall(r"int8|fp32|bf16|fp16", facts["fastest products"])) == {"int8", "fp32", "bf16", "fp16"}
    assert facts["int8"].startswith(("oneDNN", "torch._int_mm", "exact sums"))
    assert facts["fp8"].startswith(("here", "fp8 needs"))
    assert main(["info", "--env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(facts)
    assert [line.split("  ")[0].strip() for line in lines] == list(facts)


def test_no_path_user_host_or_secret(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SAM_TOKEN", "SAM_HANDLE_SECRET", "PYTHONPATH"):
        monkeypatch.setenv(name, "not-for-others")
    assert main(["info", "--env"]) == 0
    shown = capsys.readouterr().out
    folders = [str(Path.home()), str(Path.cwd()), tempfile.gettempdir(), str(Path(sam.__file__).parent)]
    assert [text for text in folders if text in shown] == []
    assert {getpass.getuser(), platform.node(), "not-for-others"} & set(re.split(r"[^\w.-]+", shown)) == set()


def test_an_environment_has_no_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "weights.pth", "--env"]) == 2
    assert "--env is of this machine: it takes no CHECKPOINT" in capsys.readouterr().err
