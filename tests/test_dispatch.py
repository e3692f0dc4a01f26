"""Which implementation of an operation runs."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from models import TINY, random_image, random_model
from torch import Tensor

import fastsam_kernels
from fastsam_kernels import UnsupportedKernelError, check_kernels, limitation, nms, resolve_kernels
from fastsam_kernels.dispatch import Implementation, Operation, operation, triton_implementation
from fastsam_kernels.dispatch.operation import OPERATIONS
from sam import Prompt, load_model

CPU = torch.device("cpu")


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton kernels could run on this device."""
    monkeypatch.setattr("fastsam_kernels.dispatch.device.triton_limitation", lambda device: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    operation._log_once.cache_clear()


def operation_of(products: bool, limit: str | None = None) -> Operation[str]:
    """One that says which of its implementations ran."""
    return Operation(
        "an operation",
        (
            triton_implementation(lambda x: "triton", lambda x: limit, multiplies=products),
            Implementation("torch", lambda x: "torch"),
            Implementation("reference", lambda x: "reference"),
        ),
        lambda x: (x,),
    )


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
        assert operation_of(products is not None).run(kernels, torch.zeros(1, dtype=products)) == expected
    assert resolve_kernels(kernels, CPU, products) == expected
    said = "kernels='auto' is 'torch' (products in fp32 are torch's, which follow its fp32_precision)" in caplog.text
    assert said == (expected == "torch")


def test_auto_is_the_first_without_a_limitation(as_on_a_gpu: None) -> None:
    x = torch.zeros(1)
    limited = operation_of(False, "it is Tuesday")
    assert limited.run("auto", x) == "torch"
    with pytest.raises(UnsupportedKernelError, match="'triton' implementation of an operation cannot run"):
        limited.run("triton", x)
    nothing = Operation("nothing", limited.implementations[:1], lambda x: (x,))
    with pytest.raises(UnsupportedKernelError, match="no implementation of nothing can run here: it is Tuesday"):
        nothing.run("auto", x)
    recorded = torch.zeros(1, requires_grad=True)
    assert operation_of(False).run("auto", recorded) == "torch"
    with torch.no_grad():
        assert operation_of(False).run("auto", recorded) == "triton"


def test_a_model_in_fp32_multiplies_with_torch(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``registry[...](checkpoint=...).to("cuda")`` gives; its weights stay fp32 under autocast."""
    chosen: dict[str, str] = {}
    select = Operation.select

    def noting(self: Operation[Any], *arguments: Any) -> Implementation[Any]:
        implementation = select(self, *arguments)
        chosen[self.name] = implementation.name
        return implementation

    monkeypatch.setattr(Operation, "select", noting)
    model = random_model(TINY)
    with torch.no_grad():
        model.predict(model.encode(random_image(40, 60)), [Prompt([[9, 9]], [1])])
    assert chosen == dict.fromkeys(("rel_pos_attention", "two_way_attention", "hypernetwork_masks"), "torch")
    assert model.resolved_kernels == "torch"
    with torch.autocast("cpu", torch.bfloat16):
        assert model.resolved_kernels == "triton"
    assert model.bfloat16().resolved_kernels == "triton"


def test_a_choice_can_be_compiled() -> None:
    """``kernels="auto"`` in a compiled block: no search of the disk, no message."""
    own = operation_of(True)

    def chosen(x: Tensor) -> Tensor:
        return x + {"torch": 1, "triton": 2}[own.run("auto", x)]

    compiled = torch.compile(chosen, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2)).tolist() == [1, 1]


# Choices for single operations ----------------------------------------------------------------------------------


def test_a_choice_for_one_operation_leaves_auto_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: dict[str, str] = {}
    select = Operation.select

    def noting(self: Operation[Any], *arguments: Any) -> Implementation[Any]:
        implementation = select(self, *arguments)
        ran[self.name] = implementation.name
        return implementation

    monkeypatch.setattr(Operation, "select", noting)
    model = load_model(kernels={"rel_pos_attention": "reference", "two_way_attention": "torch"})
    image = random_image(40, 60)
    masks = model.predict(model.encode(image), [Prompt([[9, 9]], [1])]).low_res_logits
    assert ran["rel_pos_attention"] == "reference"
    assert ran["two_way_attention"] == ran["hypernetwork_masks"] == "torch"
    assert model.kernels == "auto, rel_pos_attention=reference, two_way_attention=torch"
    assert model.resolved_kernels == "torch, rel_pos_attention=reference, two_way_attention=torch"
    model.kernels = "auto"
    expected = model.predict(model.encode(image), [Prompt([[9, 9]], [1])]).low_res_logits
    assert float((masks - expected).norm() / expected.norm()) < 1e-4


def test_choices_as_one_string() -> None:
    assert check_kernels({}) == check_kernels("auto") == "auto"
    both = check_kernels({"nms": "torch", "connected_components": "reference"})
    assert both == "auto, connected_components=reference, nms=torch"
    assert check_kernels(both) == both
    assert resolve_kernels({"nms": "reference"}, CPU) == "torch, nms=reference"
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2.5]])
    for kernels in ({"nms": "reference"}, "torch, nms=reference", {"rel_pos_attention": "torch"}):
        assert nms(boxes, torch.tensor([0.1, 0.9]), 0.5, kernels=kernels).tolist() == [1]


@pytest.mark.parametrize(
    ("kernels", "message"),
    [
        ("cuda", r"kernels must be one of auto, reference, torch, triton, got 'cuda'"),
        (7, r"kernels must be one of auto, reference, torch, triton, or a mapping, got 7"),
        ({"nm": "torch"}, r"unknown operation 'nm'; known: connected_components, .*, nms, .*two_way_attention"),
        ({"nms": "fast"}, r"nms must be one of auto, reference, torch, triton, got 'fast'"),
    ],
)
def test_unknown_choices_are_named_with_what_there_is(kernels: Any, message: str) -> None:
    for use in (
        check_kernels,
        lambda kernels: load_model(kernels=kernels),
        lambda kernels: resolve_kernels(kernels, CPU),
        lambda kernels: nms(torch.zeros(1, 4), torch.zeros(1), 0.5, kernels=kernels),
    ):
        with pytest.raises(ValueError, match=message):
            use(kernels)


# What an implementation can do ------------------------------------------------------------------------------------


def test_limitations_can_be_asked(as_on_a_gpu: None) -> None:
    boxes, scores = torch.zeros(3, 4), torch.zeros(3)
    assert [limitation("nms", name, boxes, scores, 0.5) for name in ("reference", "torch", "triton")] == [None] * 3
    many = torch.zeros(16385, 4), torch.zeros(16385)
    assert limitation("nms", "triton", *many, iou_threshold=0.5) == "it takes up to 16384 boxes, got 16385"
    qkv, table = torch.zeros(1, 2, 2, 3 * 48), torch.zeros(3, 48)
    sizes = {"num_heads": 1, "window_size": 0, "qkv_bias": None}
    refused = limitation("rel_pos_attention", "triton", qkv, table, table, **sizes)
    assert refused == "the head dimension must be one of 32, 64, 80, got 48"
    assert limitation("rel_pos_attention", "torch", qkv, table, table, **sizes) is None


def test_limitations_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    masks = torch.zeros(1, 2, 2, dtype=torch.bool)
    assert limitation("connected_components", "triton", masks) == "it needs a CUDA device, got cpu"


def test_questions_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="unknown operation 'attention'; known: connected_components"):
        limitation("attention", "triton")
    with pytest.raises(ValueError, match="implementation of nms must be one of triton, torch, reference, got 'cuda'"):
        limitation("nms", "cuda", torch.zeros(1, 4), torch.zeros(1), 0.5)
    with pytest.raises(ValueError, match=r"nms takes boxes \[N, 4\]"):
        limitation("nms", "torch", torch.zeros(1, 3), torch.zeros(1), 0.5)


# Operations that have no kernel yet.
WITHOUT_KERNEL = ("memory_attention", "quantize_rows", "int8_linear", "fp8_linear")


def test_every_operation_is_public_and_has_a_reference() -> None:
    for name, result in OPERATIONS.items():
        assert callable(getattr(fastsam_kernels, name))
        names = ["triton", "torch", "reference"][name in WITHOUT_KERNEL :]
        if name == "fp8_linear":  # only GPUs have products of fp8
            names.remove("torch")
        assert [implementation.name for implementation in result.implementations] == names
