"""What a launch tells Triton and the device, without a GPU."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastsam_kernels.triton.launch import Launch, stream_key
from fastsam_kernels.triton.tiles import TileConfig


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


def test_kept_tables_are_those_of_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another stream might read them before they are filled, or after their memory was given away."""
    from fastsam_kernels import Resizing
    from fastsam_kernels.mask_postprocess.triton import kernel as masks
    from fastsam_kernels.preprocess_image.triton import kernel as preprocess

    cpu, streams = torch.device("cpu"), {0: 11, 1: 22}
    assert stream_key(cpu) == 0
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=streams[device.index]))
    assert [stream_key(torch.device("cuda", index)) for index in (0, 1)] == [11, 22]

    tile = TileConfig({"BLOCK_W": 32, "BLOCK_H": 16}, 1, 1)
    low_res, numbers = torch.zeros(1, 16, 16), torch.zeros(1, 7, dtype=torch.int32)
    image, pixels, mean = torch.zeros(5, 7, 3, dtype=torch.uint8), torch.zeros(3, 8, 8), torch.zeros(3)

    def tables(stream: int) -> list[torch.Tensor]:
        for module in (masks, preprocess):
            monkeypatch.setattr(module, "stream_key", lambda device: stream)
        counting = masks.plan(low_res, Resizing(64, (40, 64), (25, 40)), 0.0, 1.0, numbers, tile, statistics=True)
        resizing = preprocess.plan(image, (6, 8), mean, mean, pixels, tile)
        names = ("row_first_ptr", "row_weights_ptr", "column_first_ptr", "column_weights_ptr")
        return [launch.arguments[name] for launch in (counting, resizing) for name in names]

    first, again, other = tables(1), tables(1), tables(2)
    assert all(a is b for a, b in zip(first, again, strict=True))
    assert not any(a is b for a, b in zip(first, other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
