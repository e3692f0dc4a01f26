"""SAM 2's prompts and masks: against Meta's predictor with the same weights, and the fused form against the modules."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asking import Rerun, run_into_poisoned_outputs
from comparison import assert_close_l2
from models import TINY_2, random_image, random_model
from torch import Tensor

from benchmarks.official_sam2 import random_sam2, sample
from benchmarks.official_sam2_prompts import HEIGHT, WIDTH, photograph, prompts
from sam import ImageEmbedding, InteractiveSession, MaskPrediction, Prompt, predict_stream
from sam.inference import Graphs, Runtime, direct_calls
from sam.inference.eligibility import why_not_fused
from sam.modeling.mask_decoder import MaskDecoder
from sam.modeling.sam2_base import SAM2Base
from sam.modeling.sam2_mask_decoder import Sam2MaskDecoder
from sam.prompts.batch import PromptBatch

OFFICIAL: dict[str, Any] = json.loads((Path(__file__).parent / "official_sam2_prompts.json").read_text())
LIMITS = {"masks": 1e-5, "low_res": 1e-5, "iou": 1e-5, "score": 1e-5}  # relative L2


@pytest.fixture(scope="module", params=list(OFFICIAL))
def official(request: pytest.FixtureRequest) -> tuple[SAM2Base, ImageEmbedding, dict[str, Any]]:
    """A model, its embedding of the photograph, and Meta's figures."""
    model, figures = random_sam2(request.param), OFFICIAL[request.param]
    model.sam_mask_decoder.dynamic_multimask_stability_thresh = figures["threshold"]
    return model, model.encode(photograph()), figures


@pytest.mark.parametrize("way", ["torch", "reference", "modules"])
def test_predictions_are_the_official_ones(official: tuple[SAM2Base, ImageEmbedding, dict[str, Any]], way: str) -> None:
    """Of single masks half are stable, and half give way to an alternative."""
    model, embedding, figures = official
    model.kernels = "reference" if way == "reference" else "torch"
    hook = model.sam_mask_decoder.iou_prediction_head.register_forward_hook(lambda *_: None)
    if way != "modules":
        hook.remove()
    assert model.uses_fused_decoder is (way != "modules")
    for kind, multimask_output in (("single", False), ("alternatives", True)):
        asked = prompts()
        result = model.predict(embedding, [Prompt(**prompt) for prompt in asked.values()], multimask_output, True)
        assert result.object_scores is not None
        found = zip(result.masks, result.low_res_logits, result.iou_predictions, result.object_scores, strict=True)
        for name, (masks, low_res, iou, score) in zip(asked, found, strict=True):
            assert masks.shape[1:] == (HEIGHT, WIDTH)
            values = {"masks": sample(masks, 48), "low_res": sample(low_res, 48), "iou": iou, "score": score[None]}
            for part, value in values.items():
                what = f"{part} of {name}, {kind}"
                assert_close_l2(value, torch.tensor(figures[kind][name][part]), LIMITS[part], what)
    hook.remove()


@pytest.fixture
def model() -> SAM2Base:
    return random_model(TINY_2)


def ask(count: int, masks: bool = False) -> list[Prompt]:
    """Prompts of every kind, in turn."""
    rng = np.random.default_rng(count)
    kinds: list[dict[str, Any]] = [{"points": [(20, 30)], "labels": [1]}, {"box": (5, 6, 40, 50)}]
    kinds += [{**kinds[1], "points": [(9, 9), (30, 20)], "labels": [0, 1]}, {}]
    mask = {"mask_input": 4 * rng.normal(size=(1, 32, 32))} if masks else {}
    return [Prompt(**kinds[index % 4], **mask) for index in range(count)]


def assert_same(found: MaskPrediction, expected: MaskPrediction, limit: float = 1e-5) -> None:
    for name, value in vars(expected).items():
        tolerance = 0.03 if value.dtype == torch.bool else limit  # a pixel within rounding of 0 may fall either way
        assert_close_l2(getattr(found, name).double(), value.double(), tolerance, name)


@pytest.mark.parametrize("multimask_output", [True, False])
def test_ragged_prompts_on_several_images(model: SAM2Base, multimask_output: bool) -> None:
    embeddings = model.encode([random_image(48, 60, seed=seed) for seed in range(3)], batch_size=2)
    asked = [ask(5), ask(3, masks=True), [*ask(2), *ask(2, masks=True)]]
    together = model.predict(embeddings, asked, multimask_output)
    model.kernels = "reference"
    for embedding, of_image, found in zip(embeddings, asked, together, strict=True):
        for row, prompt in enumerate(of_image):
            alone = model.predict(embedding, [prompt], multimask_output)
            assert_same(MaskPrediction(*(value[row : row + 1] for value in vars(found).values())), alone)


def test_an_unstable_mask_gives_way_for_each_prompt(model: SAM2Base) -> None:
    embedding, decoder = model.encode(random_image(48, 60)), model.sam_mask_decoder
    decoder.dynamic_multimask_via_stability = False
    plain = model.predict(embedding, ask(8), False)
    every = model.predict(embedding, ask(8), True)
    stability = decoder._get_stability_scores(plain.low_res_logits)[:, 0]
    decoder.dynamic_multimask_via_stability = True
    decoder.dynamic_multimask_stability_thresh = float(stability[:2].mean())
    found = model.predict(embedding, ask(8), False)
    stays = stability >= decoder.dynamic_multimask_stability_thresh
    assert 0 < stays.sum() < 8
    for row in range(8):
        best = every.iou_predictions[row].argmax()
        expected = plain.low_res_logits[row, 0] if stays[row] else every.low_res_logits[row, best]
        assert_close_l2(found.low_res_logits[row, 0], expected, 1e-5, "mask")
    decoder.train()
    assert_same(model.predict(embedding, ask(8), False), plain)


def test_low_resolution_logits_are_within_32(model: SAM2Base) -> None:
    for mlp in model.sam_mask_decoder.output_hypernetworks_mlps:
        mlp.layers[2].weight.mul_(30)
    embedding = model.encode(random_image(48, 60))
    found = model.predict(embedding, ask(3), return_logits=True)
    assert found.low_res_logits.abs().max() == 32
    assert found.masks.abs().max() > 40  # which are made before
    session = InteractiveSession(model, embedding)
    session.click(20, 30)
    assert session.low_res_logits.abs().max() == 32


def official_call(model: SAM2Base, embedding: ImageEmbedding, count: int, multimask: bool) -> tuple[Tensor, ...]:
    points = torch.tensor([[[2.0, 3.0], [60.0, 70.0]]]) + 9 * torch.arange(count)[:, None, None]
    sparse, dense = model.sam_prompt_encoder((points, torch.tensor([[2, 3]]).expand(count, 2)), None, None)
    return model.sam_mask_decoder(
        image_embeddings=embedding.features,
        image_pe=model.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask,
        repeat_image=count > 1,
        high_res_features=[*embedding.high_res],
    )


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_the_official_call_is_fused(
    model: SAM2Base, count: int, multimask: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedding, calls, decode = model.encode(random_image(48, 60)), [], direct_calls._decode
    monkeypatch.setattr(direct_calls, "_decode", lambda *arguments: calls.append(1) or decode(*arguments))
    found = official_call(model, embedding, count, multimask)
    assert calls == [1]
    model.kernels = "reference"
    expected = official_call(model, embedding, count, multimask)
    assert calls == [1]
    assert [list(x.shape) for x in found] == [
        [count, 3 if multimask else 1, 32, 32],
        [count, 3 if multimask else 1],
        [count, 3 if multimask else 1, 64],
        [count, 1],
    ]
    for name, ours, official in zip(("masks", "IoU", "tokens", "scores"), found, expected, strict=True):
        assert_close_l2(ours, official, 1e-5, name)


def test_gradients_through_the_official_call(model: SAM2Base) -> None:
    embedding = model.encode(random_image(48, 60))
    model.sam_mask_decoder.requires_grad_(True)
    sum(x.square().mean() for x in official_call(model, embedding, 2, True)).backward()
    missing = {name for name, weight in model.sam_mask_decoder.named_parameters() if weight.grad is None}
    # Not called here: the forward of an image has them.
    assert {name.partition(".")[0] for name in missing} <= {"conv_s0", "conv_s1", "output_hypernetworks_mlps"}
    assert not any("mlps.1" in name or "mlps.2" in name or "mlps.3" in name for name in missing)


@pytest.mark.parametrize("multimask", [True, False])
def test_gradients_of_the_fused_form_are_the_modules(model: SAM2Base, multimask: bool) -> None:
    embedding, weights = model.encode(random_image(48, 60)), dict(model.sam_mask_decoder.named_parameters())
    model.sam_mask_decoder.requires_grad_(True)
    points = 100 * torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([[1, 0]] * 3)
    batch = PromptBatch.from_tensors(points, None, None, model.device, model.prompt_layout)
    gradients = []
    for kernels in ("torch", "reference"):
        model.kernels = kernels
        logits, iou, scores = model.decode([embedding], batch, multimask)
        assert scores is not None
        loss = logits.square().mean() + iou.sum() + scores.sum()
        found = torch.autograd.grad(loss, [*weights.values()], allow_unused=True)
        gradients.append({name: x for name, x in zip(weights, found, strict=True) if x is not None})
    fused, modules = gradients
    reached = {name for name, gradient in modules.items() if gradient.norm() > 1e-4}
    assert len(reached) > 50
    for name in reached:
        assert_close_l2(fused[name], modules[name], 1e-4, name)


def test_what_is_patched_is_noticed(model: SAM2Base, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not_fused(mask_decoder=model.sam_mask_decoder) is None
    with monkeypatch.context() as patch:
        patch.setattr(Sam2MaskDecoder, "_get_stability_scores", lambda self, logits: logits[..., 0, 0], raising=False)
        reason = why_not_fused(mask_decoder=model.sam_mask_decoder)
        assert reason == "_get_stability_scores of Sam2MaskDecoder, the class of mask_decoder, was replaced"
    with monkeypatch.context() as patch:
        patch.setattr(MaskDecoder, "predict_all", lambda self, *inputs: None)
        reason = why_not_fused(mask_decoder=model.sam_mask_decoder)
        assert reason == "predict_all of MaskDecoder, the class of mask_decoder, was replaced"
    assert why_not_fused(mask_decoder=model.sam_mask_decoder) is None


def test_embeddings_keep_what_the_decoder_reads(model: SAM2Base, tmp_path: Path) -> None:
    embedding = model.encode(random_image(48, 60))
    embedding.save(tmp_path / "of.safetensors")
    read = ImageEmbedding.load(tmp_path / "of.safetensors")
    assert_same(model.predict(read, ask(3)), model.predict(embedding, ask(3)), 1e-6)
    shapes = r"\[1, 64, 8, 8\], \[1, 8, 32, 32\], \[1, 16, 16, 16\]"
    with pytest.raises(ValueError, match=rf"this model's features are {shapes}, got \[1, 64, 8, 8\]$"):
        model.predict(replace(embedding, high_res=()), ask(1))
    other = random_model(TINY_2, seed=1)
    with pytest.raises(ValueError, match="this embedding was made by model custom"):
        other.predict(embedding, ask(1))


def test_a_session_answers_with_the_object_score(model: SAM2Base) -> None:
    embedding = model.encode(random_image(48, 60))
    session = InteractiveSession(model, embedding)
    first = session.click(20, 30)
    expected = model.predict(embedding, [Prompt([(20, 30)], [1])])
    best = int(expected.iou_predictions[0].argmax())
    np.testing.assert_array_equal(first.mask(), expected.masks[0, best].numpy())
    assert expected.object_scores is not None
    assert first.object_score == pytest.approx(float(expected.object_scores[0]), abs=1e-5)
    second = session.box(5, 6, 40, 50)
    logits = expected.low_res_logits[0, best][None].numpy()
    expected = model.predict(embedding, [Prompt([(20, 30)], [1], (5, 6, 40, 50), logits)], multimask_output=False)
    assert (second.mask() == expected.masks[0, 0].numpy()).mean() > 0.999
    assert second.predicted_iou == pytest.approx(float(expected.iou_predictions[0, 0]), abs=1e-5)


def test_a_stream_is_predictions(model: SAM2Base) -> None:
    images = [random_image(48, 60, seed=seed) for seed in range(3)]
    for image, found in zip(images, predict_stream(model, [(image, ask(2)) for image in images]), strict=True):
        assert_same(found, model.predict(model.encode(image), ask(2)), 1e-6)


def test_graphs_replay_what_runs_eagerly(model: SAM2Base, monkeypatch: pytest.MonkeyPatch) -> None:
    replaying = copy.deepcopy(model)
    replaying.runtime = Runtime(replaying, compile_encoder=False, recorder=Rerun)
    monkeypatch.setattr(Graphs, "run", run_into_poisoned_outputs)
    embeddings = model.encode([random_image(48, 60, seed=seed) for seed in range(2)])
    for asked in ([ask(1), ask(3)], [ask(2, masks=True), ask(4)]):
        for multimask_output in (True, False):
            both = (each.predict(embeddings, asked, multimask_output) for each in (replaying, model))
            for found, expected in zip(*both, strict=True):
                assert_same(found, expected)
    assert replaying.runtime.buckets


@pytest.mark.slow
def test_compiled_is_what_runs_eagerly(model: SAM2Base) -> None:
    compiled, images = copy.deepcopy(model), [random_image(48, 60, seed=seed) for seed in range(3)]
    compiled.runtime = Runtime(compiled)
    assert compiled.runtime.why_encoder_not_compiled is None
    for found, expected in zip(compiled.encode(images, batch_size=3), model.encode(images), strict=True):
        for name, ours, other in zip(("embedding", "s0", "s1"), found.ready().maps, expected.ready().maps, strict=True):
            assert_close_l2(ours, other, 1e-5, name)
    embedding = model.encode(images[0])
    for prompts_of in (ask(3), ask(3, masks=True)):
        for multimask_output in (True, False):
            found, expected = (each.predict(embedding, prompts_of, multimask_output) for each in (compiled, model))
            assert_same(found, expected)
    assert compiled.runtime.buckets
