"""A started service under attack: everybody else is answered, nothing of the attackers' stays."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from models import random_image
from waiting import wait_until

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("httptools", reason="needs the extra serve")
from serving import Server, file_of

from benchmarks.service_attacks import ATTACKS, TITLES, measure

pytestmark = [pytest.mark.slow, pytest.mark.service]
GROWTH_MB = 100


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server("--device", "cpu") as running:
        yield running
        assert running.stop() == 0


@pytest.mark.parametrize("name", ATTACKS)
def test_others_are_answered(server: Server, name: str) -> None:
    """``python -m benchmarks service --attacks`` measures how soon."""
    picture = file_of(random_image(48, 64))
    descriptors = Path(f"/proc/{server.process.pid}/fd")
    measure(name, server.port, server.resident_bytes, picture, seconds=2)  # what the first of its kind takes stays
    open_before = len(os.listdir(descriptors))
    outcome = measure(name, server.port, server.resident_bytes, picture, seconds=4)
    print(f"\n{TITLES}\n{outcome.row()}")
    assert outcome.attacks >= 2
    assert outcome.health
    assert outcome.honest
    assert outcome.failed == 0
    assert outcome.growth <= GROWTH_MB
    wait_until(lambda: len(os.listdir(descriptors)) <= open_before)
    assert b"sam_in_flight 0.0" in server.get("/metrics")[1]
    assert server.get("/v2/health/ready")[0] == 200
    assert not server.tracebacks()
    assert all(record["event"] != "not json" for record in server.log), json.dumps(server.log[-5:])
