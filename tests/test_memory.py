"""What automatic masks plan with on a GPU, by the memory that is free there; injected, so that no GPU is needed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sam.amg import memory_plan as memory
from sam.amg.memory_plan import MemoryPlan

GB = 10**9


def plan(dtype: torch.dtype = torch.float32, max_memory: int | None = None, points_per_batch: int = 64) -> MemoryPlan:
    """For a model of SAM's usual sizes."""
    model = SimpleNamespace(
        low_res_size=(256, 256),
        prompt_encoder=SimpleNamespace(image_embedding_size=(64, 64), embed_dim=256),
        device=torch.device("cuda"),
        dtype=dtype,
        prompts_per_chunk=128,
    )
    return MemoryPlan.plan(model, (1024, 1024), points_per_batch, max_memory)  # type: ignore[arg-type]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes free on the device, of which torch keeps some for reuse."""
    state = {"device": 0, "reserved": 0, "allocated": 0}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (state["device"], 200 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: state["reserved"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: state["allocated"])
    return state


def test_a_large_gpu_takes_every_click_at_once(free: dict[str, int]) -> None:
    free["device"] = 130 * GB
    assert plan().points_at_once == plan(torch.bfloat16).points_at_once == 1024
    assert plan(points_per_batch=2048).points_at_once == 2048


def test_clicks_follow_the_free_memory(free: dict[str, int]) -> None:
    """Half of what is free, and of that half for decoding: 1024 clicks in fp32 take some 12 GB."""
    points = []
    for gigabytes in (8, 12, 24, 48, 80):
        free["device"] = gigabytes * GB
        points.append(plan().points_at_once)
        used = min(points[-1], 128) * 42 * 10**6 + max(0, points[-1] - 128) * 6.5 * 10**6
        assert used < gigabytes * GB / 2
        assert plan(torch.bfloat16).points_at_once > points[-1] or points[-1] == 1024
    assert points == sorted(points)
    assert points[0] < 128 < points[-1] == 1024


def test_what_torch_keeps_for_reuse_is_free(free: dict[str, int]) -> None:
    free.update(device=6 * GB, reserved=26 * GB, allocated=2 * GB)
    assert memory.free_memory(torch.device("cuda")) == 30 * GB
    reused = plan()
    free.update(device=30 * GB, reserved=2 * GB, allocated=2 * GB)
    assert reused == plan()


def test_max_memory_is_no_more_than_there_is(free: dict[str, int]) -> None:
    free["device"] = 4 * GB
    assert plan(max_memory=100 * GB) == plan(max_memory=4 * GB)
    assert plan(max_memory=2 * GB).points_at_once < plan(max_memory=4 * GB).points_at_once


def test_a_full_gpu_is_asked_one_click_at_a_time_and_not_refused(free: dict[str, int]) -> None:
    free["device"] = 10**6
    result = plan()
    assert (result.points_at_once, result.masks_at_once, result.held_bytes) == (1, 1, 0)
    with pytest.raises(ValueError, match=r"max_memory of 10 MB is too little for masks of 1024x1024"):
        plan(max_memory=10 * 10**6)
