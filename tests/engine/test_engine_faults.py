"""The engine when it is short of memory, broken or closed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from busy import CLICK, hold
from gate import Gate
from models import random_image
from waiting import SECONDS, wait_until

from sam import SamAutomaticMaskGenerator
from sam.engine import AutomaticOptions, Engine, EngineClosedError, EngineFailedError, OutOfMemoryError
from sam.engine.errors import is_out_of_memory


@pytest.mark.parametrize(
    "words",
    [
        "[enforce fail at alloc_cpu.cpp:116] . DefaultCPUAllocator: can't allocate memory",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Triton Error [CUDA]: out of memory",
    ],
)
def test_shortages_in_words(words: str) -> None:
    assert is_out_of_memory(RuntimeError(words))
    assert not is_out_of_memory(ValueError(words))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_out_of_memory_halves_the_batch_once(engine_of: Callable[..., Engine], gate: Gate) -> None:
    engine = engine_of(max_batch=8)
    gate.open.set()
    handle = engine.embed(random_image(8, 8)).result(SECONDS)
    gate.shortage_above = 4
    assert len(engine.segment(handle, [CLICK] * 8).result(SECONDS)) == 8
    assert gate.decoded == [8, 4, 4]
    gate.decoded.clear()
    gate.shortage_above = 3
    with pytest.raises(OutOfMemoryError, match="out of memory, even with half the batch"):
        engine.segment(handle, [CLICK] * 8).result(SECONDS)
    assert gate.decoded == [8, 4, 4]
    assert len(engine.segment(handle, [CLICK]).result(SECONDS)) == 1  # the engine lives
    assert engine.failure is None
    assert engine.counters()["out_of_memory"] == 4


def test_out_of_memory_in_everything_starts_once_more_with_half(
    engine_of: Callable[..., Engine], gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets = []

    class Generator(SamAutomaticMaskGenerator):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            if "max_memory" in options:  # not the one that is only asked whether it could start from an embedding
                budgets.append(self.max_memory)

    monkeypatch.setattr("sam.engine.stages.SamAutomaticMaskGenerator", Generator)
    engine = engine_of(max_batch=4)
    gate.open.set()
    gate.shortage_above = 2
    options = AutomaticOptions(points_per_side=2)
    engine.automatic(random_image(8, 8), options).result(SECONDS)
    assert gate.decoded == [4, 2, 2]
    assert budgets == [None, 10**9]
    gate.shortage_above = 1
    with pytest.raises(OutOfMemoryError):
        engine.automatic(random_image(8, 8), options).result(SECONDS)
    assert engine.failure is None


def test_a_model_fault_fails_everyone_and_the_engine(engine_of: Callable[..., Engine], gate: Gate) -> None:
    faults: list[BaseException] = []
    engine = engine_of(on_failure=faults.append)
    fault = RuntimeError("CUDA error: an illegal memory access was encountered")
    gate.faults.append(fault)
    futures = [hold(engine, gate), engine.segment(random_image(8, 8), [CLICK])]
    gate.open.set()
    for future in futures:
        with pytest.raises(EngineFailedError):
            future.result(SECONDS)
    wait_until(lambda: bool(faults))
    assert faults == [fault]
    assert engine.failure is fault
    with pytest.raises(EngineFailedError):
        engine.embed(random_image(8, 8))
    assert len(gate.encoded) == 1


def test_close_answers_what_was_accepted(engine_of: Callable[..., Engine], gate: Gate) -> None:
    engine = engine_of()
    futures = [hold(engine, gate), *(engine.segment(random_image(8, 8), [CLICK]) for _ in range(5))]
    closer = threading.Thread(target=engine.close)
    closer.start()
    wait_until(lambda: engine._closing)
    with pytest.raises(EngineClosedError):
        engine.embed(random_image(8, 8))
    gate.open.set()
    closer.join(SECONDS)
    assert all(future.done() and future.exception() is None for future in futures)


def test_close_gives_up_after_its_timeout(engine_of: Callable[..., Engine], gate: Gate) -> None:
    engine = engine_of()
    stuck = hold(engine, gate)
    assert not engine.close(timeout=0.05)
    with pytest.raises(EngineClosedError):
        stuck.result(SECONDS)
    gate.open.set()


def test_close_waits_for_what_is_computed_for_nobody(engine_of: Callable[..., Engine], gate: Gate) -> None:
    """An interpreter that ends takes itself from under a thread inside torch."""
    engine = engine_of()
    assert hold(engine, gate).cancel()
    assert engine.pending == 0
    assert not engine.close(timeout=0.05)
    gate.open.set()
    assert engine.close(SECONDS)
