"""A click, and an engine whose model is busy."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from gate import Gate
from models import random_image
from waiting import SECONDS

from sam import Prompt
from sam.engine import Engine

CLICK = Prompt([(5, 5)], [1])


def hold(engine: Engine, gate: Gate) -> Future[Any]:
    """Let the model be busy with one image, so that what comes next waits."""
    busy = engine.embed(random_image(9, 9, seed=99))
    assert gate.entered.wait(SECONDS)
    return busy
