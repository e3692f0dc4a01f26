"""A run of training: it ends in time, logs, saves, and can be resumed exactly."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import write_checkpoint
from ..modeling import Sam
from ..system.atomic_write import write_atomically
from .provenance import machine, origin
from .schedule import Schedule, Stage, stage_at
from .team import ALONE, Team
from .trainer import MEANS, Settings, Trainer

_THE_END = -1.0  # in place of a step's progress


def run(
    team: Team,
    settings: Settings,
    device: torch.device,
    workers: int,
    length: tuple[float | None, int | None],
    out: Path,
    resumed: bool,
    save_minutes: float,
) -> None:
    """Run one process's part of a training of ``length`` (minutes, steps), one of them None."""
    if device.type == "cpu":
        torch.set_num_threads(1)  # what several add up would depend on how they happened to share the work
    if resumed:
        trainer, spent = resume(out, device, workers, team=team)
    else:
        trainer, spent = Trainer(settings, device, workers, team=team), 0.0
    train(trainer, Schedule(*length, spent), out, save_minutes)


def train(
    trainer: Trainer,
    schedule: Schedule,
    out: Path,
    save_minutes: float = 3.0,
    report: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> None:
    """Train until ``schedule`` ends; ``out`` gets the log of losses, the state and the averaged weights.

    Of several processes, the first one's schedule counts, and only that one writes and reports.
    """
    team = trainer.team
    if not team.is_leader:
        while (progress := team.broadcast(0.0)) >= 0:
            trainer.train_step(progress)
        return
    out.mkdir(parents=True, exist_ok=True)
    pending: list[tuple[int, Tensor]] = []
    recent: list[list[float]] = []
    saved = reported = began = time.monotonic()
    first_step = trainer.step
    if first_step == 0:
        (out / "log.jsonl").unlink(missing_ok=True)

    def flush() -> None:
        if pending:
            rows = torch.stack([means for _, means in pending]).tolist()
            with (out / "log.jsonl").open("a") as log:
                for (step, _), row in zip(pending, rows, strict=True):
                    measured = {name: value for name, value in zip(MEANS, row, strict=True) if not math.isnan(value)}
                    log.write(json.dumps({"step": step, **measured}) + "\n")
            recent.extend(rows)
            del recent[:-50]
            pending.clear()

    while schedule.goes_on(trainer.step):
        progress = team.broadcast(schedule.progress(trainer.step))
        step = trainer.step
        pending.append((step, trainer.train_step(progress)))
        now = time.monotonic()
        if now - reported > 10 or step == first_step:
            flush()
            report(_progress_line(trainer, progress, (trainer.step - first_step) / (now - began), recent))
            reported = now
        if now - saved > 60 * save_minutes:
            flush()
            save(trainer, schedule, out)
            saved = time.monotonic()
    team.broadcast(_THE_END)
    flush()
    save(trainer, schedule, out)
    report(f"{trainer.step} steps in {schedule.seconds:.0f} s; weights in {out / 'nano.safetensors'}")


def _progress_line(trainer: Trainer, progress: float, rate: float, recent: list[list[float]]) -> str:
    """Return how far the run is, and the means of the last steps, as a line."""
    columns = np.array(recent, dtype=np.float64)
    known = [(name, column[~np.isnan(column)]) for name, column in zip(MEANS, columns.T, strict=True)]
    means = ", ".join(f"{name} {values.mean():.3f}" for name, values in known if len(values))
    stage = stage_at(trainer.stages, progress)
    return f"step {trainer.step} ({progress:.0%}, {rate:.2f}/s, {stage.size} px): {means}"


def save(trainer: Trainer, schedule: Schedule, out: Path) -> None:
    """Save the state for resuming, and the averaged weights in fp16 as a checkpoint with its provenance."""
    with write_atomically(out / "state.pt") as partial:
        torch.save({**trainer.state(), "seconds": schedule.seconds}, partial)
    config = trainer.model.config
    if config is None:
        raise ValueError("the model has no config; build it with sam.build_from_config or load it from a file")
    about = {
        "trained_on": "procedurally drawn scenes (sam.training)",
        "started_from": origin(trainer.settings.init),
        "seed": str(trainer.settings.seed),
        "steps": str(trainer.step),
        "seconds": f"{schedule.seconds:.0f}",
        "machine": machine(trainer.device),
        "processes": str(trainer.settings.processes),
        "revision": trainer.revision,
    }
    write_checkpoint(trainer.average, config, out / "nano.safetensors", dtype=torch.float16, metadata=about)


def stored_settings(out: Path) -> Settings:
    """Return the settings of the run saved in ``out``.

    Raises:
        FileNotFoundError: nothing was saved there.
    """
    stored = out / "state.pt"
    if not stored.exists():
        raise FileNotFoundError(f"no run was saved in {out}: there is no {stored.name}")
    return Settings(**torch.load(stored, map_location="cpu", weights_only=True, mmap=True)["settings"])


def resume(
    out: Path,
    device: torch.device,
    workers: int,
    model: Sam | None = None,
    stages: tuple[Stage, ...] | None = None,
    team: Team = ALONE,
) -> tuple[Trainer, float]:
    """Return the trainer saved in ``out`` and the seconds its run has spent; arguments as of :class:`Trainer`.

    Raises:
        FileNotFoundError: nothing was saved there.
    """
    state = torch.load(out / "state.pt", map_location="cpu", weights_only=True)
    trainer = Trainer(Settings(**state["settings"]), device, workers, model, stages, team)
    trainer.load_state(state)
    if team.is_leader:
        _drop_later_lines(out / "log.jsonl", trainer.step)
    return trainer, state["seconds"]


def _drop_later_lines(log: Path, step: int) -> None:
    """Drop the lines of steps after the last save, which will be made again."""
    if log.exists():
        lines = [line for line in log.read_text().splitlines(keepends=True) if json.loads(line)["step"] < step]
        with write_atomically(log) as partial:
            partial.write_text("".join(lines))
