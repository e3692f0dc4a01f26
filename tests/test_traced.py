"""Graphs that ``torch.jit.trace`` and ``torch.export`` make of the modules, which ONNX exporters start from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import assert_close_l2
from torch import Tensor

import sam
from benchmarks.official_calls import numbers, small_encoder
from sam import Sam

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch.jit.trace, which programs still call
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


class Call(torch.nn.Module):
    """A call of modules as a module, so that their weights are no constants of the graph."""

    def __init__(self, function: Callable[..., Any], *parts: torch.nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, torch.nn.ModuleList(parts)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*self.parts, *inputs)


def traced(module: torch.nn.Module, *inputs: Tensor) -> Any:
    with torch.no_grad():
        return torch.jit.trace(module, inputs, check_trace=False)


DIVISIONS = ("aten::floor_divide", "aten::floordiv", "aten::remainder", "aten::fmod")
NOT_NEGATIVE = (*DIVISIONS, "aten::size", "aten::add", "aten::mul", "aten::Int", "prim::NumToTensor", "prim::Constant")


def divisions(graph: Any) -> list[str]:
    """Say of each integer division of a traced graph what may make an operand negative; "" is nothing.

    Exported graphs round the quotient of a negative number towards zero where Python rounds it down.
    """

    def culprit(value: Any) -> str:
        node = value.node()
        if node.kind() not in NOT_NEGATIVE:
            return node.kind()
        if node.kind() == "aten::size":
            return ""
        if node.kind() == "prim::Constant":
            constant = value.toIValue()
            return "" if int(constant) >= 0 else f"the constant {constant}"
        return next(filter(None, map(culprit, node.inputs())), "")

    inlined = graph.inlined_graph  # held: its nodes do not outlive it
    nodes = [node for kind in DIVISIONS for node in inlined.findAllNodes(kind)]
    return [next(filter(None, map(culprit, node.inputs())), "") for node in nodes]


@pytest.mark.parametrize(
    ("window", "size"), [(3, (64, 64)), (5, (64, 64)), (3, (40, 72)), (7, (64, 48)), (0, (64, 64))]
)
def test_the_encoder_divides_no_negative_number(window: int, size: tuple[int, int]) -> None:
    encoder, pixels = small_encoder(sam.modeling, window_size=window, use_abs_pos=False), numbers(1, 3, *size)
    graph = traced(encoder, pixels)
    assert len(divisions(graph)) == (8 if window else 0)  # two blocks, two directions, there and back
    assert not any(divisions(graph)), divisions(graph)
    assert_close_l2(graph(pixels), encoder(pixels), 1e-6, "traced")


def test_a_negative_quotient_is_seen() -> None:
    """What the test above looks for, in the form that it had."""
    graph = traced(Call(lambda x: x.new_zeros(-(-x.shape[0] // 3))), torch.zeros(8))
    assert divisions(graph) == ["aten::neg"]


def prompts(count: int, points: int) -> tuple[Tensor, Tensor]:
    return 100 + 30 * numbers(count, points, 2), torch.arange(count * points).view(count, points) % 2


def test_a_traced_prompt_encoder_serves_other_numbers_of_prompts(nano: Sam) -> None:
    points = Call(lambda encoder, coords, labels: encoder((coords, labels), None, None), nano.prompt_encoder)
    boxes = Call(lambda encoder, boxes, masks: encoder(None, boxes, masks), nano.prompt_encoder)
    both = Call(lambda encoder, coords, labels, boxes: encoder((coords, labels), boxes, None), nano.prompt_encoder)

    def corners(count: int) -> Tensor:
        return 100 * numbers(count, 4).abs()

    for call, few, many in (
        (points, prompts(1, 2), prompts(3, 5)),
        (boxes, (corners(1), numbers(1, 1, 128, 128)), (corners(3), numbers(3, 1, 128, 128))),
        (both, (*prompts(1, 1), corners(1)), (*prompts(4, 3), corners(4))),
    ):
        graph = traced(call, *few)
        assert not any(divisions(graph)), divisions(graph)
        for ours, expected in zip(graph(*many), call(*many), strict=True):
            assert_close_l2(ours, expected, 1e-6, "traced with one prompt")


def decoder_inputs(images: int, sparse: int, dense: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        numbers(images, 64, 8, 8, scale=0.3),
        numbers(sparse, tokens, 64, seed=1),
        numbers(dense, 64, 8, 8, seed=2, scale=0.3),
    )


def decoder_call(model: Sam) -> Call:
    pe = model.prompt_encoder.get_dense_pe()
    return Call(lambda decoder, *inputs: decoder(inputs[0], pe, *inputs[1:], multimask_output=True), model.mask_decoder)


@pytest.mark.parametrize(("images", "sparse", "dense"), [(1, 3, 3), (1, 2, 1), (2, 1, 1), (1, 1, 2)])
def test_a_traced_mask_decoder_serves_other_numbers_of_prompts(tiny: Sam, images: int, sparse: int, dense: int) -> None:
    call = decoder_call(tiny)
    graph, given = traced(call, *decoder_inputs(1, 1, 1, 2)), decoder_inputs(images, sparse, dense, 4)
    assert not any(divisions(graph)), divisions(graph)
    for ours, expected in zip(graph(*given), call(*given), strict=True):
        assert_close_l2(ours, expected, 1e-5, "traced with one prompt of two tokens")


@pytest.mark.slow  # torch.export imports for seconds
def test_an_exported_mask_decoder_serves_other_numbers_of_prompts(tiny: Sam) -> None:
    call, prompts, tokens = decoder_call(tiny), torch.export.Dim("prompts"), torch.export.Dim("tokens")
    shapes = (({}, {0: prompts, 1: tokens}, {0: prompts}),)
    graph = torch.export.export(call, decoder_inputs(1, 3, 3, 2), dynamic_shapes=shapes).module()
    given = decoder_inputs(1, 5, 5, 4)
    for ours, expected in zip(graph(*given), call(*given), strict=True):
        assert_close_l2(ours, expected, 1e-5, "exported with three prompts of two tokens")
