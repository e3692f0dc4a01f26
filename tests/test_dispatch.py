"""Which form of an operation runs."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from models import TINY, random_image, random_model
from torch import Tensor

from fastsam_kernels import dispatch
from fastsam_kernels.dispatch import resolve_kernels, select_implementation
from sam import Prompt

CPU = torch.device("cpu")


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton forms could run on this device."""
    monkeypatch.setattr(dispatch, "_device_constraint", lambda device: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._log_once.cache_clear()


@pytest.mark.parametrize(
    ("kernels", "products", "expected"),
    [
        ("auto", None, "triton"),
        ("auto", torch.bfloat16, "triton"),
        ("auto", torch.float16, "triton"),
        ("auto", torch.float32, "torch"),
        ("triton", torch.float32, "triton"),
        ("reference", torch.float32, "reference"),
    ],
)
def test_products_in_fp32_are_torch_s(
    as_on_a_gpu: None, caplog: pytest.LogCaptureFixture, kernels: str, products: torch.dtype | None, expected: str
) -> None:
    with caplog.at_level(logging.INFO, "fastsam_kernels"):
        assert select_implementation("an operation", kernels, CPU, None, products=products) == expected
    assert resolve_kernels(kernels, CPU, products) == expected
    said = "kernels='auto' is 'torch' (products in fp32 are torch's, which follow its fp32_precision)" in caplog.text
    assert said == (expected == "torch")


def test_a_model_in_fp32_multiplies_with_torch(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``registry[...](checkpoint=...).to("cuda")`` gives; its weights stay fp32 under autocast."""
    chosen: dict[str, str] = {}

    def noting(operation: str, *arguments: object, **options: object) -> str:
        chosen[operation] = select_implementation(operation, *arguments, **options)  # type: ignore[arg-type]
        return chosen[operation]

    for name, module in list(sys.modules.items()):
        if (
            name.startswith("fastsam_kernels.")
            and getattr(module, "select_implementation", None) is select_implementation
        ):
            monkeypatch.setattr(module, "select_implementation", noting)
    model = random_model(TINY)
    with torch.no_grad():
        model.predict(model.encode(random_image(40, 60)), [Prompt([[9, 9]], [1])])
    every = ("rel_pos_attention", "two_way_attention", "hypernetwork_masks", "every operation")
    assert chosen == dict.fromkeys(every, "torch")
    assert model.resolved_kernels == "torch"
    with torch.autocast("cpu", torch.bfloat16):
        assert model.resolved_kernels == "triton"
    assert model.bfloat16().resolved_kernels == "triton"


def test_a_choice_can_be_compiled() -> None:
    """``kernels="auto"`` in a compiled block: no search of the disk, no message."""

    def chosen(x: Tensor) -> Tensor:
        return x + {"torch": 1, "triton": 2}[select_implementation("an operation of its own", "auto", x.device, None)]

    compiled = torch.compile(chosen, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2)).tolist() == [1, 1]
