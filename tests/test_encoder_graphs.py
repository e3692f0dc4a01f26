"""The encoder of one image as a CUDA graph, with a stand-in that runs again what a graph would replay."""

from __future__ import annotations

import copy

import pytest
import torch
from asking import Rerun, run_into_poisoned_outputs
from models import TINY, TINY_2, random_image, random_model

from sam import Sam
from sam.inference import Graphs, Runtime


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> tuple[Sam, Sam]:
    """One whose encoder is replayed, its output buffers NaN before each run, and one that runs eagerly."""
    monkeypatch.setattr(Rerun, "recorded", 0)
    monkeypatch.setattr(Graphs, "run", run_into_poisoned_outputs)
    eager = random_model(TINY)
    replaying = copy.deepcopy(eager)
    replaying.runtime = Runtime(replaying, compile_encoder=False, recorder=Rerun)
    return replaying, eager


def test_one_image_is_replayed_and_earlier_features_stay(models: tuple[Sam, Sam]) -> None:
    replaying, eager = models
    images = [random_image(48, 60, seed=i) for i in range(3)]
    result = [replaying.encode(image) for image in images]
    assert Rerun.recorded == 1
    for embedding, image in zip(result, images, strict=True):
        assert torch.equal(embedding.features, eager.encode(image).features)


def test_a_batch_runs_eagerly_and_as_large_as_it_is(models: tuple[Sam, Sam], monkeypatch: pytest.MonkeyPatch) -> None:
    replaying, eager = models
    images = [random_image(48, 60, seed=i) for i in range(5)]
    counts = []
    replaying.image_encoder.patch_embed.register_forward_hook(lambda _, args, out: counts.append(len(args[0])))
    result = replaying.encode(images, batch_size=5)
    assert counts == [5]  # padding to 8 is for shapes that are compiled
    assert Rerun.recorded == 0
    for embedding, image in zip(result, images, strict=True):
        torch.testing.assert_close(embedding.features, eager.encode(image).features, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", ["in place", "loaded", "assigned", "replaced", "kernels", "dtype"])
def test_changes_are_recorded_anew(models: tuple[Sam, Sam], change: str) -> None:
    replaying, eager = models
    image = random_image(48, 60)
    before = replaying.encode(image).features
    for model in models:
        encoder = model.image_encoder
        if change == "in place":
            with torch.no_grad():
                encoder.blocks[0].attn.qkv.weight.mul_(1.5)
        elif change in ("loaded", "assigned"):
            state = {name: 1.1 * value for name, value in encoder.state_dict().items()}
            encoder.load_state_dict(state, assign=change == "assigned")
        elif change == "replaced":
            weight = encoder.blocks[1].mlp.lin1.weight
            encoder.blocks[1].mlp.lin1.weight = torch.nn.Parameter(1.5 * weight, requires_grad=False)
        elif change == "kernels":
            model.kernels = "reference"
        else:
            model.double()
    result = replaying.encode(image).features
    assert Rerun.recorded == 2
    assert result.dtype != before.dtype or change == "kernels" or not torch.allclose(result, before, rtol=1e-3)
    assert torch.equal(result, eager.encode(image).features)


@pytest.mark.parametrize("who", ["hook", "patch", "grad", "autocast"])
def test_what_a_replay_would_hide_runs_eagerly(models: tuple[Sam, Sam], who: str) -> None:
    replaying, _ = models
    image, seen = random_image(48, 60), []
    replaying.encode(image)
    block = replaying.image_encoder.blocks[1]
    if who == "hook":
        block.norm1.register_forward_hook(lambda module, args, out: seen.append(1))
    elif who == "patch":
        forward = block.mlp.forward
        block.mlp.forward = lambda x: (seen.append(1), forward(x))[1]
    size = replaying.image_encoder.img_size
    pixels = torch.randn(1, 3, size, size)
    if who == "grad":
        replaying.requires_grad_(True)
        features = replaying.image_features(pixels).embedding
        assert features.requires_grad
    elif who == "autocast":
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert replaying.image_features(pixels).embedding.dtype == torch.bfloat16
    else:
        for _ in range(2):
            replaying.encode(image)
        assert len(seen) >= 2
    assert Rerun.recorded == 1


def test_the_warm_up_covers_it_and_reset_forgets_it(models: tuple[Sam, Sam]) -> None:
    replaying, _ = models
    runtime = replaying.runtime
    assert runtime is not None
    (step,) = runtime.warmup(prompts=())
    assert step.what == "encoder, 1 images"
    replaying.encode(random_image(48, 60))
    assert Rerun.recorded == 1
    runtime.reset()
    replaying.encode(random_image(48, 60))
    assert Rerun.recorded == 2


def test_sam_2_s_image_is_replayed(models: tuple[Sam, Sam]) -> None:
    eager = random_model(TINY_2)
    replaying = copy.deepcopy(eager)
    replaying.runtime = Runtime(replaying, compile_encoder=False, recorder=Rerun)
    images = [random_image(48, 60, seed=seed) for seed in range(2)]
    results = [replaying.encode(image) for image in images]
    assert Rerun.recorded == 1
    for image, result in zip(images, results, strict=True):
        expected = eager.encode(image)
        maps = zip((result.features, *result.high_res), (expected.features, *expected.high_res), strict=True)
        assert all(torch.equal(*both) and both[0].stride() == both[1].stride() for both in maps)
    for model in (replaying, eager):
        model.sam_mask_decoder.conv_s0.weight.mul_(1.5)
    assert torch.equal(replaying.encode(images[0]).high_res[0], eager.encode(images[0]).high_res[0])
    assert Rerun.recorded == 2
    seen: list[int] = []
    replaying.image_encoder.neck.register_forward_hook(lambda *_: seen.append(1))
    for _ in range(2):
        replaying.encode(images[0])
    assert len(seen) == 2
    assert Rerun.recorded == 2
