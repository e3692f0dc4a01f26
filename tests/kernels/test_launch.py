"""What a launch tells Triton and the device, without a GPU."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastsam_kernels.launch import Launch
from fastsam_kernels.tile_config import TileConfig


class Kernel:
    """Notes what it is launched with."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **arguments: self.__dict__.update(grid=grid, arguments=arguments)


def test_a_launch_goes_to_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes the current device and its stream, whatever the pointers are."""
    current: list[torch.device] = []

    @contextmanager
    def device_guard(device: torch.device) -> Any:
        current.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "device", device_guard)
    kernel = Kernel()
    with FakeTensorMode():
        there = torch.empty(3, device="cuda:1")
    tile = TileConfig({"BLOCK": 16}, num_warps=2, num_stages=3)
    Launch(kernel, (4,), {"count": 3, "index_ptr": None, "out_ptr": there}, {"EVEN": True}, tile).run()
    assert current == [torch.device("cuda:1")]
    assert kernel.grid == (4,)  # type: ignore[attr-defined]
    expected = {"count": 3, "index_ptr": None, "out_ptr": there, "EVEN": True, "BLOCK": 16}
    expected |= {"num_warps": 2, "num_stages": 3, "enable_fp_fusion": True}
    assert kernel.arguments == expected  # type: ignore[attr-defined]


def test_a_launch_on_the_host_asks_for_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", None)
    kernel = Kernel()
    tile = TileConfig({}, num_warps=1, num_stages=1)
    Launch(kernel, (1,), {"out_ptr": torch.empty(2)}, {}, tile, fuse_multiply_add=False).run()
    assert kernel.arguments["enable_fp_fusion"] is False  # type: ignore[attr-defined]
