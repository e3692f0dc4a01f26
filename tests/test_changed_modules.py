"""Modules of stock classes with other settings, weights of a class, copies, and derivatives: as the modules compute."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_close_l2
from models import TINY, random_model
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, stack_module_state, vmap

from sam import Sam
from sam.inference.eligibility import why_not_fused, why_not_now
from sam.modeling.mask_decoder import MaskDecoder


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(model: Sam) -> dict[str, Tensor]:
    return {
        "image_embeddings": draw(1, 64, 8, 8),
        "image_pe": model.prompt_encoder.get_dense_pe(),
        "sparse_prompt_embeddings": draw(2, 2, 64, seed=1),
        "dense_prompt_embeddings": draw(1, 64, 8, 8, seed=2),
    }


def assert_as_modules(decoder: MaskDecoder, given: dict[str, Tensor]) -> None:
    masks, iou = decoder(**given, multimask_output=True)
    expected_masks, expected_iou = decoder.predict_masks(**given)
    assert_close_l2(masks, expected_masks[:, 1:], 1e-5, "masks")
    assert_close_l2(iou, expected_iou[:, 1:], 1e-5, "predicted IoU")


class Doubling(Tensor):
    """Weights that only ``F.linear`` makes twice as large: their numbers alone do not say what they do."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = super().__torch_function__(func, types, args, kwargs or {})
        return answer.as_subclass(Tensor) * 2 if func is F.linear else answer


def double(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight.as_subclass(Doubling), False)  # type: ignore[arg-type]


def upscale_by(index: int, *args: Any, **kwargs: Any) -> Callable[[MaskDecoder], None]:
    def change(decoder: MaskDecoder) -> None:
        decoder.output_upscaling[index] = nn.ConvTranspose2d(*args, **kwargs).requires_grad_(False)

    return change


def widen(decoder: MaskDecoder) -> None:
    layers: Any = decoder.output_hypernetworks_mlps[1].layers
    layers[0], layers[1] = nn.Linear(64, 80).requires_grad_(False), nn.Linear(80, 64).requires_grad_(False)


CHANGES: dict[str, Callable[[MaskDecoder], Any]] = {
    "upscaling: larger kernel": upscale_by(0, 64, 16, 4, 2, 1),
    "upscaling: no bias": upscale_by(3, 16, 8, 2, 2, bias=False),
    "upscaling: groups": upscale_by(3, 16, 8, 2, 2, groups=2),
    "upscaling: stride": lambda d: setattr(d.output_upscaling[0], "stride", (1, 1)),
    "upscaling: output padding": lambda d: setattr(d.output_upscaling[3], "output_padding", (1, 1)),
    "hypernetwork: no bias": lambda d: setattr(d.output_hypernetworks_mlps[1].layers[0], "bias", None),
    "hypernetwork: other width": widen,
    "class of weights: keys": lambda d: double(d.transformer.layers[0].cross_attn_token_to_image.k_proj),
    "class of weights: hypernetwork": lambda d: double(d.output_hypernetworks_mlps[1].layers[0]),
    "class of weights: MLP": lambda d: double(d.transformer.layers[1].mlp.lin1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_decoder_computes_what_its_modules_do(name: str) -> None:
    model = random_model(TINY)
    given = inputs(model)
    assert_as_modules(model.mask_decoder, given)
    torch.manual_seed(0)
    CHANGES[name](model.mask_decoder)
    assert_as_modules(model.mask_decoder, given)
    one = {**given, "sparse_prompt_embeddings": draw(1, 2, 64, seed=1)}
    assert_as_modules(model.mask_decoder, one)


REASONS: dict[str, tuple[Callable[[MaskDecoder], Any], str]] = {
    "bias": (CHANGES["hypernetwork: no bias"], "output_hypernetworks_mlps.1 has a layer without a bias"),
    "width": (widen, "output_hypernetworks_mlps.1 has other widths than output_hypernetworks_mlps.0"),
    "class": (CHANGES["class of weights: MLP"], "transformer.layers.1.mlp.lin1.weight is a Doubling, no plain tensor"),
    "dropout": (
        lambda d: setattr(d.transformer.layers[0].self_attn, "dropout_p", 0.5),
        "transformer.layers.0.self_attn has a dropout",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_the_reason_names_the_module(name: str) -> None:
    model = random_model(TINY)
    change, reason = REASONS[name]
    assert why_not_fused(mask_decoder=model.mask_decoder) is None
    change(model.mask_decoder)
    assert why_not_fused(mask_decoder=model.mask_decoder) == f"mask_decoder.{reason}"


def test_dropout_drops_while_training() -> None:
    model = random_model(TINY)
    given = inputs(model)
    model.mask_decoder.transformer.layers[0].self_attn.dropout_p = 0.9  # type: ignore[union-attr]
    model.train()
    torch.manual_seed(0)
    masks, _ = model.mask_decoder(**given, multimask_output=True)
    torch.manual_seed(0)
    assert torch.equal(masks, model.mask_decoder.predict_masks(**given)[0][:, 1:])


@pytest.mark.parametrize("kind", [nn.Linear, nn.Module, MaskDecoder])
def test_a_patched_call_of_a_class_counts(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(TINY)
    given = inputs(model)
    model.mask_decoder(**given, multimask_output=True)
    layer, call, seen = model.mask_decoder.transformer.layers[0], nn.Module.__call__, []

    def patched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(self)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(kind, "__call__", patched, raising=False)
    model.mask_decoder(**given, multimask_output=True)
    inner: Any = {nn.Linear: layer.self_attn.q_proj, nn.Module: layer, MaskDecoder: model.mask_decoder}[kind]
    assert any(module is inner for module in seen)


def scaled_copy(module: nn.Module, scale: float) -> nn.Module:
    """Copy a module as ``nn.DataParallel`` does, with other weights."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        if child is not None:
            setattr(replica, name, scaled_copy(child, scale))
    for name, weight in {**module._parameters, **module._buffers}.items():
        if weight is not None:
            setattr(replica, name, weight.detach() * scale)
    return replica


def test_a_replica_computes_by_its_own_weights() -> None:
    model = random_model(TINY)
    given = inputs(model)
    assert_as_modules(model.mask_decoder, given)
    replica = scaled_copy(model.mask_decoder, 1.1)
    assert_as_modules(replica, given)  # type: ignore[arg-type]
    assert_as_modules(model.mask_decoder, given)
    encoder: Any = scaled_copy(model.prompt_encoder, 1.1)
    assert torch.equal(encoder.get_dense_pe(), encoder.pe_layer(encoder.image_embedding_size)[None])
    assert not torch.equal(encoder.get_dense_pe(), model.prompt_encoder.get_dense_pe())


def test_a_module_that_took_the_attributes_of_another_computes_by_its_own() -> None:
    model = random_model(TINY)
    given = inputs(model)
    assert_as_modules(model.mask_decoder, given)
    taken = MaskDecoder.__new__(MaskDecoder)
    taken.__dict__.update(model.mask_decoder.__dict__)
    taken._modules = dict(taken._modules)
    taken.transformer = copy.deepcopy(taken.transformer)
    with torch.no_grad():
        for weight in taken.transformer.parameters():
            weight.mul_(1.1)
    assert_as_modules(taken, given)


@pytest.mark.parametrize("grad", [True, False])
def test_weights_that_are_mapped_over(grad: bool) -> None:
    model = random_model(TINY)
    given = inputs(model)
    decoders = [model.mask_decoder, random_model(TINY, seed=1).mask_decoder]
    weights, buffers = stack_module_state(decoders)  # type: ignore[arg-type]

    def call(weights: dict[str, Tensor], buffers: dict[str, Tensor]) -> Any:
        arguments = {**given, "multimask_output": True}
        return functional_call(decoders[0], (weights, buffers), args=(), kwargs=arguments)[0]

    with torch.set_grad_enabled(grad):
        masks = vmap(call)(weights, buffers)
    for mapped, decoder in zip(masks, decoders, strict=True):
        assert_close_l2(mapped.detach(), decoder.predict_masks(**given)[0][:, 1:], 1e-5, "masks")


def test_calls_among_forward_mode_derivatives_are_the_modules_own() -> None:
    assert why_not_now(torch.ones(1)) is None
    with forward_ad.dual_level():
        assert why_not_now(torch.ones(1)) == "forward-mode derivatives are computed"


@pytest.mark.slow  # torch scripts its decompositions first
def test_derivatives_forwards() -> None:
    model = random_model(TINY)
    given = inputs(model)
    with forward_ad.dual_level():
        given["sparse_prompt_embeddings"] = forward_ad.make_dual(draw(2, 2, 64, seed=1), draw(2, 2, 64, seed=3))
        masks, _ = model.mask_decoder(**given, multimask_output=True)
        expected = model.mask_decoder.predict_masks(**given)[0][:, 1:]
        assert torch.equal(*(forward_ad.unpack_dual(x).tangent for x in (masks, expected)))
        features = model.image_encoder(forward_ad.make_dual(draw(1, 3, 128, 128), draw(1, 3, 128, 128, seed=1)))
        assert forward_ad.unpack_dual(features).tangent.norm() > 0


@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.float16])
def test_labels_of_any_dtype(dtype: torch.dtype, boxed: bool) -> None:
    encoder = random_model(TINY).prompt_encoder
    points, labels = torch.tensor([[[10.0, 20.0], [30.0, 40.0]]]), torch.tensor([[1, 0]])
    boxes = torch.tensor([[1.0, 2.0, 50.0, 60.0]]) if boxed else None
    expected, _ = encoder((points, labels), boxes, None)
    assert torch.equal(encoder((points, labels.to(dtype)), boxes, None)[0], expected)


PATCHED_FIRST = """
import functools
from torch import nn
from sam.modeling import MaskDecoder, PromptEncoder
from sam.modeling.transformer import Attention

@functools.wraps(Attention.forward)
def wrapped(self, *args, **kwargs):
    return 0

MaskDecoder.predict_masks = lambda *args, **kwargs: 0
Attention.forward = wrapped
PromptEncoder._embed_points = functools.partialmethod(PromptEncoder._embed_boxes)
nn.GELU.forward = lambda self, x: x

from sam.inference.eligibility import find_intrusion
from sam.modeling import TwoWayTransformer

encoder = PromptEncoder(64, (8, 8), (128, 128), 16)
transformer = TwoWayTransformer(1, 64, 4, 64)
for part in encoder, MaskDecoder(transformer_dim=64, transformer=transformer), transformer, nn.GELU(), nn.ReLU():
    print(find_intrusion(part, "it"))
"""


def test_a_patch_from_before_the_first_model_counts() -> None:
    run = subprocess.run([sys.executable, "-c", PATCHED_FIRST], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [
        "_embed_points of PromptEncoder, the class of it, was replaced",
        "predict_masks of MaskDecoder, the class of it, was replaced",
        "forward of Attention, the class of it.layers.0.self_attn, was replaced",
        "forward of GELU, the class of it, was replaced",
        "None",
    ]


def test_points_of_a_batched_input_come_with_labels_or_are_none() -> None:
    model = random_model(TINY)
    record = {"image": draw(3, 96, 128), "original_size": (60, 80), "boxes": torch.tensor([[1.0, 2.0, 50.0, 60.0]])}
    (expected,) = model([record], True)
    for labels in ({}, {"point_labels": None}, {"point_labels": torch.ones(1, 1)}):  # alone they are ignored
        (answer,) = model([{**record, "point_coords": None, **labels}], True)
        assert torch.equal(answer["low_res_logits"], expected["low_res_logits"])
    with pytest.raises(ValueError, match=r"batched_input\[0\] must have point_labels with its point_coords"):
        model([{**record, "point_coords": torch.ones(1, 1, 2)}], True)
