"""Fixtures of the engine's tests: a small model behind a gate, and engines that are closed at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from gate import Gate
from models import TINY, random_model
from waiting import SECONDS

from sam import Sam
from sam.engine import Engine


@pytest.fixture
def model() -> Sam:
    return random_model(TINY)


@pytest.fixture
def gate(model: Sam) -> Gate:
    return Gate(model)


@pytest.fixture
def engine_of(model: Sam) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make(**options: Any) -> Engine:
        engines.append(Engine(model, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close(SECONDS)
