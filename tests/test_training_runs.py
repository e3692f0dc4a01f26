"""Training of the embedded model as a user starts it, killed and resumed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

STEPS = 8


def command(out: Path, *more: str) -> list[str]:
    run = [sys.executable, "-m", "sam.training", "--steps", str(STEPS), "--save-minutes", "0.001", "--device", "cpu"]
    return [*run, "--out", str(out), *more]


def losses(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_killed_run_repeats_and_continues_the_curve(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole), check=True, timeout=500)
    assert [entry["step"] for entry in losses(whole)] == list(range(STEPS))

    with subprocess.Popen(command(killed)) as process:
        deadline = time.monotonic() + 400
        while not (killed / "state.pt").exists() or len(losses(killed)) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.kill()
    before = losses(killed)
    assert len(before) < STEPS
    assert before == losses(whole)[: len(before)]

    subprocess.run(command(killed, "--resume"), check=True, timeout=500)
    assert losses(killed) == losses(whole)
    weights = [(out / "nano.safetensors").read_bytes() for out in (whole, killed)]
    assert len(weights[0]) == len(weights[1]) <= 16e6
