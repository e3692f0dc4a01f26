"""SAM 2's memory attention and memory encoder fused, against the official modules, and what keeps them from it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import TINY_2, randomise
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastsam_kernels.numerics import Budget, relative_error
from sam.config import SAM2_VARIANTS
from sam.inference.eligibility import look, why_not_fused
from sam.inference.fused_memory_attention import (
    Memories,
    frame_queries,
    learn_from_memories,
    pack_memory_attention,
)
from sam.modeling.build import _build_memory_attention, _build_memory_encoder
from sam.modeling.memory_attention import MemoryAttention
from sam.modeling.memory_encoder import MemoryEncoder

GRID, FRAMES, POINTERS = 4, 7, 16
TOKENS, MEMORIES = GRID**2, FRAMES * GRID**2 + 4 * POINTERS
RELEASED = SAM2_VARIANTS["sam2.1_tiny"].with_image_size(16 * GRID)


def drawn(module: Any) -> Any:
    """Draw the weights of a module so that no term is small: attention is not even, and every block adds as much."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in module.eval().requires_grad_(False).named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if name.endswith("norm.weight") or ("norm" in name and weight.ndim == 1 and name.endswith("weight")):
            weight.copy_(1 + 0.2 * noise)
        elif weight.ndim == 1:
            weight.copy_(0.1 * noise)
        else:
            weight.copy_(noise * (3 * weight[0].numel()) ** -0.5)
        if "q_proj.weight" in name:
            weight.mul_(8)
    return module


@pytest.fixture(scope="module")
def attention() -> MemoryAttention:
    return drawn(_build_memory_attention(RELEASED))


@pytest.fixture(scope="module")
def encoder() -> MemoryEncoder:
    return drawn(_build_memory_encoder(RELEASED))


def official(module: Any, dtype: torch.dtype | None = None) -> Any:
    """Return a copy that calls its modules."""
    copied = copy.deepcopy(module)
    copied.kernels = "reference"
    return copied if dtype is None else copied.to(dtype)


def inputs(objects: int, pointers: int = 4 * POINTERS, width: int = 256, expanded: bool = True) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, generator=generator)
    frame = (1, objects) if expanded else (objects, objects)
    curr, curr_pos = (draw(TOKENS, frame[0], width).expand(-1, objects, -1) for _ in range(2))
    memory, memory_pos = (draw(MEMORIES - 4 * POINTERS + pointers, objects, 64) for _ in range(2))
    return curr, memory, curr_pos, memory_pos, pointers


def cast(values: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(x.to(dtype) if isinstance(x, Tensor) else x for x in values)


@pytest.mark.parametrize("expanded", [True, False])
@pytest.mark.parametrize(("objects", "pointers"), [(1, 64), (3, 64), (2, 0), (2, 4)])
@torch.no_grad()
def test_memory_attention_in_fp32(attention: MemoryAttention, objects: int, pointers: int, expanded: bool) -> None:
    given = inputs(objects, pointers, expanded=expanded)
    found, reference = attention(*given), official(attention)(*given)
    assert found.shape == (TOKENS, objects, 256)
    assert relative_error(found, reference) <= 2e-6
    exact = official(attention, torch.float64)(*cast(given, torch.float64))
    assert relative_error(found, exact) <= Budget(relative_error(reference, exact), torch.float32).limit


@torch.no_grad()
def test_memory_attention_in_fp64_is_the_same_formula(attention: MemoryAttention) -> None:
    given, wide = cast(inputs(2), torch.float64), copy.deepcopy(attention).double()
    assert relative_error(wide(*given), official(wide)(*given)) <= 1e-13


def in_bf16(attention: MemoryAttention, given: tuple[Any, ...], autocast: bool) -> tuple[float, float]:
    """The error of the fused form in bf16, and that of the modules; memories are bf16 as they are kept."""
    given = tuple(x.bfloat16().float() if isinstance(x, Tensor) else x for x in given)
    narrow = attention
    if not autocast:
        narrow = copy.deepcopy(attention).bfloat16()
        given = cast(given, torch.bfloat16)
    exact = official(narrow, torch.float64)(*cast(given, torch.float64))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, plain = narrow(*given), official(narrow)(*given)
    assert found.dtype == plain.dtype
    return relative_error(found, exact), relative_error(plain, exact)


@torch.no_grad()
def test_memory_attention_in_bf16_keeps_a_wide_residual(attention: MemoryAttention) -> None:
    """Under autocast that of the modules is wide as well; in a model of bf16 it is not."""
    found, plain = in_bf16(attention, inputs(1), True)
    assert found <= 1.1 * plain
    found, plain = in_bf16(attention, inputs(1), False)
    assert found <= 0.75 * plain


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [True, False])
@torch.no_grad()
def test_memory_attention_in_bf16_at_256_px(
    attention: MemoryAttention, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors of more tokens average out: these are as many as the limit was measured for."""
    monkeypatch.setattr(f"{__name__}.TOKENS", 16 * TOKENS)
    monkeypatch.setattr(f"{__name__}.MEMORIES", FRAMES * 16 * GRID**2 + 4 * POINTERS)
    assert in_bf16(attention, inputs(1), autocast)[0] <= 5e-3


@pytest.mark.parametrize("width", [256, 64])
@torch.no_grad()
def test_memory_encoder(encoder: MemoryEncoder, width: int) -> None:
    if width == 64:  # memories as wide as the frame
        encoder = drawn(_build_memory_encoder(TINY_2))
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(1, width, GRID, GRID, generator=generator).expand(2, -1, -1, -1)
    masks = 5 * torch.randn(2, 1, 16 * GRID, 16 * GRID, generator=generator)
    found, plain = encoder(features, masks), official(encoder)(features, masks)
    exact = official(encoder, torch.float64)(features.double(), masks.double())
    baseline = relative_error(plain["vision_features"], exact["vision_features"])
    limit = Budget(baseline, torch.float32).limit
    assert found["vision_features"].shape == (2, 64, GRID, GRID)
    assert relative_error(found["vision_features"], exact["vision_features"]) <= limit
    assert torch.equal(found["vision_pos_enc"][0], plain["vision_pos_enc"][0])


@torch.no_grad()
def test_fewer_products(attention: MemoryAttention) -> None:
    """Values of 64 channels, no projection of them and none behind self-attention, and layer 0 once for all objects."""

    def flops(run: Callable[[], object]) -> int:
        counter = FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH):  # whose products are counted
            run()
        return counter.get_total_flops()

    def ours(objects: int) -> None:
        """Run what the module runs; the counter has hooks, before which modules stand by themselves."""
        curr, memory, curr_pos, memory_pos, _ = inputs(objects)
        tokens, sources = (x.transpose(0, 1).flatten(0, 1) for x in (memory, memory + memory_pos))
        memories = Memories(tokens, sources, (FRAMES,) * objects, (MEMORIES,) * objects)
        frame = frame_queries(packed, curr.transpose(0, 1)[:1], curr_pos.transpose(0, 1)[:1], "torch")
        learn_from_memories(packed, frame, memories, "torch")

    packed, stock = pack_memory_attention(attention).packed, official(attention)
    linear, scores, own = 2 * TOKENS * 256, 2 * TOKENS * MEMORIES, 2 * TOKENS * TOKENS
    keys, mlp = 2 * MEMORIES * 64 * 256, 2 * linear * 2048
    per_layer = scores * (256 + 64) + keys + linear * 64 + mlp
    of_frame = 3 * linear * 256 + own * 512 + linear * 256
    for objects in (1, 3):
        assert flops(partial(ours, objects)) == objects * (4 * per_layer + 3 * of_frame) + of_frame
        assert flops(partial(stock, *inputs(objects))) == objects * 4 * (
            scores * 512 + 2 * keys + 2 * linear * 256 + mlp + 4 * linear * 256 + own * 512
        )


CHANGES: dict[str, Callable[[Any], Any]] = {
    "has a forward hook": lambda m: m.layers[1].linear2.register_forward_hook(lambda *_: None),
    "has a forward of its own": lambda m: setattr(m.layers[0], "forward", m.layers[0].forward),
    "has another activation": lambda m: setattr(m.layers[2], "activation", F.gelu),
    "is in training mode": lambda m: m.layers[0].dropout1.train(),
    "adds positions elsewhere": lambda m: setattr(m.layers[3], "pos_enc_at_attn", True),
    "is a Sequential, not a Linear": lambda m: setattr(
        m.layers[0].self_attn, "v_proj", nn.Sequential(m.layers[0].self_attn.v_proj)
    ),
    "a subclass": lambda m: setattr(
        m.layers[0],
        "cross_attn_image",
        type("Own", (type(m.layers[0].cross_attn_image),), {})(256, 1, kv_in_dim=64, rope_k_repeat=True),
    ),
}


@pytest.mark.parametrize("words", CHANGES)
@torch.no_grad()
def test_what_is_changed_is_called_as_officially(attention: MemoryAttention, words: str) -> None:
    changed = copy.deepcopy(attention)
    given = inputs(1)
    changed(*given)  # packed once
    assert look(changed).why_not_fused is None
    CHANGES[words](changed)
    torch.manual_seed(0)
    found = changed(*given)
    reason = why_not_fused(memory_attention=changed)
    assert reason is not None
    assert words in reason
    changed.kernels = "reference"
    torch.manual_seed(0)
    assert torch.equal(found, changed(*given))


@torch.no_grad()
def test_new_weights_are_read(attention: MemoryAttention, encoder: MemoryEncoder) -> None:
    given, changed = inputs(1), copy.deepcopy(attention)
    before = changed(*given)
    changed.layers[1].cross_attn_image.v_proj.weight.mul_(2)
    after = changed(*given)
    assert relative_error(after, before) > 1e-3
    assert relative_error(after, official(changed)(*given)) <= 2e-6
    randomise(encoder := copy.deepcopy(encoder))
    encoder.fuser.layers[0].gamma.mul_(3)
    masks = torch.randn(1, 1, 16 * GRID, 16 * GRID)
    found, plain = (m(torch.ones(1, 256, GRID, GRID), masks) for m in (encoder, official(encoder)))
    assert relative_error(found["vision_features"], plain["vision_features"]) <= 2e-6


def test_gradients_are_those_of_the_modules(attention: MemoryAttention, encoder: MemoryEncoder) -> None:
    for module, given in (
        (attention, inputs(1)),
        (encoder, (torch.ones(1, 256, GRID, GRID), torch.randn(1, 1, 16 * GRID, 16 * GRID))),
    ):
        first = given[0].clone().requires_grad_()
        out = module(first, *given[1:])
        out = out["vision_features"] if isinstance(out, dict) else out
        out.sum().backward()
        assert float(first.grad.norm()) > 0
