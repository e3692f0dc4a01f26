"""Training runs of a few seconds: a small model, its stages and a trainer."""

from __future__ import annotations

import torch
from models import TINY

import sam
from sam import Sam
from sam.training.schedule import Stage
from sam.training.trainer import Settings, Trainer

CPU = torch.device("cpu")
STAGES = (
    Stage(until=0.5, size=96, images=2, prompts=3, corrections=1.0),
    Stage(until=1.0, size=128, images=2, prompts=3, corrections=0.5),
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fresh_model() -> Sam:
    torch.manual_seed(0)
    return sam.build_from_config(TINY).train()


def trainer(seed: int = 0, stages: tuple[Stage, ...] = STAGES, **settings: int) -> Trainer:
    return Trainer(Settings(seed=seed, peak=1e-3, **settings), CPU, workers=0, model=fresh_model(), stages=stages)
