"""Training of the embedded model as a user starts it, killed and resumed, and several processes on one model."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from models import TINY
from torch.multiprocessing.spawn import ProcessRaisedException
from waiting import SECONDS, wait_until

import sam
from sam.training.__main__ import main
from sam.training.schedule import Stage
from sam.training.team import Team, run_together
from sam.training.trainer import Settings, Trainer

STEPS = 8
CPU = torch.device("cpu")
IN_BACKGROUND = """\
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts what stands before an &
os.execv(sys.argv[1], sys.argv[1:])
"""


def command(out: Path, *more: str) -> list[str]:
    run = [sys.executable, "-m", "sam.training", "--steps", str(STEPS), "--save-minutes", "0.001", "--device", "cpu"]
    run += ["--processes", "2"]
    return [*run, "--out", str(out), *more]


def losses(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_killed_run_repeats_and_continues_the_curve(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole), check=True, timeout=SECONDS)
    assert [entry["step"] for entry in losses(whole)] == list(range(STEPS))

    in_background = [sys.executable, "-c", IN_BACKGROUND, *command(killed)]
    with subprocess.Popen(in_background, stdout=subprocess.PIPE) as process:
        wait_until(lambda: process.poll() is not None or ((killed / "state.pt").exists() and len(losses(killed)) >= 3))
        assert process.poll() is None
        process.kill()
        assert process.stdout is not None
        process.stdout.read()  # until the processes that it started, which hold the pipe too, have seen it and ended
    before = losses(killed)
    assert len(before) < STEPS
    assert before == losses(whole)[: len(before)]

    subprocess.run(command(killed, "--resume"), check=True, timeout=SECONDS)
    assert losses(killed) == losses(whole)
    weights = [(out / "nano.safetensors").read_bytes() for out in (whole, killed)]
    assert len(weights[0]) == len(weights[1]) <= 16e6


# Teams ----------------------------------------------------------------------------------------------------


def member(team: Team, scenes_seed: int = 0) -> Trainer:
    torch.manual_seed(0)
    settings = Settings(seed=scenes_seed, peak=1e-3, processes=team.size)
    stages = (Stage(until=1.0, size=96, images=2, prompts=3, corrections=0.5),)
    trainer = Trainer(settings, CPU, 0, sam.build_from_config(TINY).train(), stages, team)
    trainer.dtype = torch.float32  # whatever the CPU multiplies fast: the same on both sides of a comparison
    return trainer


def three_steps(team: Team, out: Path) -> None:
    torch.set_num_threads(1)
    trainer = member(team)
    means = torch.stack([trainer.train_step(0.0) for _ in range(3)])
    torch.save((means, trainer.model.state_dict()), out / f"{team.rank}.pt")


def fail_in_the_second_after_three_steps(team: Team, out: Path) -> None:
    three_steps(team, out)
    team.all_reduce(torch.zeros(1))  # nobody fails before all have written
    if team.rank == 1:
        raise ValueError("no memory for seven prompts")
    time.sleep(SECONDS)  # until it is ended


class Alone(Team):
    """One of a team, without the others: keeps what it would have sent."""

    def all_reduce(self, values: torch.Tensor) -> None:
        sent.append(values.clone())


sent: list[torch.Tensor] = []


def test_a_team_trains_one_model_on_the_mean_of_its_gradients_and_fails_as_one(tmp_path: Path) -> None:
    """In the same two processes, whose start takes longer than what they do."""
    with pytest.raises(ProcessRaisedException, match="no memory for seven prompts"):
        run_together(2, fail_in_the_second_after_three_steps, tmp_path)
    (means, weights), (other_means, other_weights) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(means.nan_to_num(-1), other_means.nan_to_num(-1))
    assert all(torch.equal(value, other_weights[name]) for name, value in weights.items())

    sent.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    members = [member(Alone(rank, 2)) for rank in (0, 1)]
    for one in members:
        one.train_step(0.0)
    torch.set_num_threads(threads)
    first, second = sent
    count = len(members[0]._gradients)
    assert not torch.equal(first[:count], second[:count])  # each has pictures of its own
    assert (first[-1], second[-1]) == (1, 1)
    assert means[0, 0].item() == pytest.approx((first[count] + second[count]).item() / 2, rel=1e-6)
    norm = ((first + second)[:count].double() / 2).norm().item()
    assert means[0, 6].item() == pytest.approx(norm, rel=1e-5)


def test_a_member_without_objects_does_not_count() -> None:
    one = member(Alone(0, 2))  # the other one has no objects and adds zeros
    one._gradients.fill_(3.0)
    means = torch.tensor([2.0, torch.nan])
    assert one._average_over_team(means, taught=True)
    assert one._gradients.unique().tolist() == [3]
    assert means[0] == 2
    assert means[1].isnan()
    one._gradients.zero_()
    assert not one._average_over_team(means, taught=False)


def test_a_run_goes_on_with_as_many_processes() -> None:
    with pytest.raises(ValueError, match="a run of 3 processes cannot go on with 1"):
        Trainer(Settings(processes=3), CPU, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume"], "no run was saved in"),
        (["--init", "nowhere.safetensors"], "no such checkpoint: nowhere.safetensors"),
        (["--processes", "0"], "0 processes cannot train on cpu: 1 on a GPU, 1 to 256 on a CPU"),
        (["--device", "abacus"], "torch cannot use device 'abacus' here: "),
    ],
)
def test_a_run_that_cannot_start_says_why_in_a_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--device", "cpu", "--out", str(tmp_path), *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())
