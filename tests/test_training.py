"""Training: losses, optimiser and crops, and runs that repeat and resume to the bit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from comparison import assert_close_l2
from training_runs import CPU, STAGES, fresh_model, generator, trainer

import sam
from sam.system.hardware import multiplies_bf16_fast
from sam.training import helper, losses, provenance, schedule
from sam.training.crops import CropModel
from sam.training.helper import SameObjectHead
from sam.training.loop import resume, save, train
from sam.training.muon import Muon, hidden_matrices, orthogonalized
from sam.training.schedule import Schedule, Stage

# Losses ---------------------------------------------------------------------------------------------------


def test_losses_have_the_values_worked_out_by_hand() -> None:
    # Two pixels: p = 3/4 on the object, p = 1/2 on the ground.
    logits = torch.tensor([[[math.log(3), 0.0]]], dtype=torch.float64)
    targets = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    on_object, on_ground = 0.25 * (1 / 4) ** 2 * math.log(4 / 3), 0.75 * (1 / 2) ** 2 * math.log(2)
    assert losses.focal_loss(logits, targets).item() == pytest.approx((on_object + on_ground) / 2)
    assert losses.dice_loss(logits, targets).item() == pytest.approx(1 - (2 * 0.75 + 1) / (1.25 + 1 + 1))
    assert losses.balanced_cross_entropy(logits, targets).item() == pytest.approx(math.log(4 / 3) + math.log(2))


def test_iou_is_measured_on_enlarged_masks() -> None:
    truth = torch.zeros(1, 16, 16, dtype=torch.bool)
    truth[:, :, 6:] = True
    logits = torch.full((1, 2, 4, 4), -1.0)
    logits[:, 0, :, 2:] = 1  # half of the picture, exactly; the border between two pixels stays where it is
    logits[:, 1, :, :2] = 1  # the other half
    assert losses.mask_iou(logits, truth).tolist() == [[pytest.approx(128 / 160), pytest.approx(32 / 256)]]


@pytest.mark.parametrize("loss", [losses.focal_loss, losses.dice_loss, losses.balanced_cross_entropy])
def test_losses_have_the_right_gradients(loss: losses.MaskLoss) -> None:
    draws = generator()
    logits = torch.randn(2, 3, 4, generator=draws, dtype=torch.float64, requires_grad=True)
    targets = torch.rand(2, 3, 4, generator=draws, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: loss(x, targets), (logits,))


def test_a_click_trains_the_best_alternative_and_a_box_the_single_mask() -> None:
    truth = torch.zeros(1, 16, 16, dtype=torch.bool)
    truth[:, 4:12, 4:12] = True
    targets = torch.nn.functional.avg_pool2d(truth.float(), 2)
    logits = torch.zeros(1, 4, 8, 8)
    logits[:, 2] = 4 * targets - 2  # the best of the three
    logits.requires_grad_()
    strength = {}
    for name, is_click in (("click", True), ("box", False)):
        result = losses.prompt_losses(logits, torch.zeros(1, 4), targets, truth, torch.tensor([is_click]))
        (gradient,) = torch.autograd.grad(result.mask, logits)
        strength[name] = gradient.abs().sum((0, 2, 3)).tolist()
    alone = strength["box"][0]  # of a mask like masks 1 and 3, with its full weight
    assert strength["click"][0] == pytest.approx(0.3 * alone, rel=1e-4)
    assert strength["click"][3] == pytest.approx(0.05 / 3 * alone, rel=1e-4)
    assert strength["box"][2] == pytest.approx(0.3 * strength["click"][2], rel=1e-4)
    assert strength["click"][2] > 3 * strength["click"][3]
    assert result.iou[0, [0, 1, 3]].tolist() == [0, 0, 0]
    assert result.iou[0, 2] == pytest.approx(1, abs=0.07)  # enlarging rounds the corners off
    assert result.iou_head.item() == pytest.approx((result.iou[0, 2].item() - 0.025) / 4)  # nearly the mean error


# The helper head ------------------------------------------------------------------------------------------


def test_the_helper_asks_every_pair_of_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helper, "_REACHES", (1, 2, 16))  # the last is wider than the picture
    head = SameObjectHead(8, seed=0)
    with torch.no_grad():
        head.nearness.copy_(torch.tensor([0.5, 2.0, 1.0]))
    head.forward = lambda features: features  # type: ignore[method-assign]
    embedding = torch.randn(2, 16, 6, 6, generator=generator())
    ids = torch.randint(0, 3, (2, 6, 6), generator=generator(1), dtype=torch.uint8)
    expected = []
    for reach, nearness in ((1, 0.5), (2, 2.0)):
        for down, right in ((0, reach), (reach, 0), (reach, reach), (reach, -reach)):
            answers: dict[bool, list[float]] = {True: [], False: []}
            for b, y, x in np.ndindex(2, 6, 6):
                v, u = y + down, x + right
                if not (v < 6 and 0 <= u < 6) or not (ids[b, y, x] or ids[b, v, u]):
                    continue
                same = bool(ids[b, y, x] == ids[b, v, u])
                logit = nearness - (embedding[b, :, y, x] - embedding[b, :, v, u]).square().sum().item()
                answers[same].append(math.log1p(math.exp(-logit if same else logit)))
            expected.append((np.mean(answers[True]) + np.mean(answers[False])) / 2)
    assert head.loss(embedding, ids).item() == pytest.approx(np.mean(expected), rel=1e-5)


def test_the_helper_reads_cells_in_the_middle_and_says_nothing_of_the_ground() -> None:
    head = SameObjectHead(8, seed=0)
    features = torch.randn(1, 8, 3, 3, generator=generator())
    assert head.loss(features, torch.zeros(1, 48, 48, dtype=torch.uint8)).item() == 0
    ids = torch.zeros(1, 48, 48, dtype=torch.uint8)
    ids[:, :, 18] = 1  # column 4 of 12 is read at pixels 2 + 4 * 4
    assert head(features).shape == (1, 16, 12, 12)
    assert head.loss(features, ids) > 0
    assert head.loss(features, ids.roll(1, dims=2)).item() == 0


def test_the_helper_teaches_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients(weight: float) -> torch.Tensor:
        monkeypatch.setattr("sam.training.trainer._HELPER_WEIGHT", weight)
        learner = trainer()
        learner.train_step(0.0)
        return learner.model.image_encoder.patch_embed.proj.weight.grad.clone()  # type: ignore[union-attr]

    assert not torch.allclose(gradients(0.0), gradients(1.0), rtol=0.01)


# Muon -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 16, 96), (2, 96, 16)])
def test_muon_makes_matrices_nearly_orthogonal(shape: tuple[int, int, int]) -> None:
    u, _, vh = torch.linalg.svd(torch.randn(shape, generator=generator()), full_matrices=False)
    matrices = u @ torch.diag(torch.linspace(0.1, 5, min(shape[1:]))) @ vh
    updates = orthogonalized(matrices)
    values = torch.linalg.svdvals(updates)
    assert 0.5 < values.min() <= values.max() < 1.3
    assert ((updates * (u @ vh)).sum((1, 2)) > 0.75 * min(shape[1:])).all()  # the same singular vectors


def test_muon_finds_the_minimum_and_keeps_its_momentum() -> None:
    target = torch.randn(8, 12, generator=generator())
    weight = torch.nn.Parameter(torch.zeros(8, 12))
    optimizer = Muon([weight], lr=0.05, weight_decay=0.0)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 400)
        weight.grad = weight.detach() - target
        optimizer.step()
    torch.testing.assert_close(weight.detach(), target, atol=0.02, rtol=0)
    copy = Muon([torch.nn.Parameter(weight.detach().clone())], lr=0.05, weight_decay=0.0)
    copy.load_state_dict(optimizer.state_dict())
    (state,) = copy.state.values()
    assert torch.equal(state["momentum"], optimizer.state[weight]["momentum"])


def test_muon_leaves_heads_and_tables_alone() -> None:
    model = fresh_model()
    chosen = {id(matrix) for matrix in hidden_matrices(model)}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in chosen]
    assert "image_encoder.blocks.0.attn.qkv.weight" in names
    assert "mask_decoder.transformer.layers.1.mlp.lin1.weight" in names
    assert "mask_decoder.iou_prediction_head.layers.2.weight" not in names
    assert not any("rel_pos" in name or "embed" in name or "bias" in name for name in names)


# Crops ----------------------------------------------------------------------------------------------------


def test_the_largest_crop_is_the_model() -> None:
    model = fresh_model().eval()
    crop = CropModel(model, 128)
    pixels = torch.randn(2, 3, 128, 128, generator=generator())
    coords, labels = torch.tensor([[[30.0, 40.0], [0.0, 0.0]]]), torch.tensor([[1, -1]])
    with torch.no_grad():
        features = crop.encode(pixels)
        torch.testing.assert_close(features, model.image_encoder(pixels), atol=1e-5, rtol=1e-4)
        logits, iou = crop.decode(features, coords, labels, torch.tensor([1]))
        sparse, dense = model.prompt_encoder((coords[:, :1], labels[:, :1]), None, None)
        image_pe = model.prompt_encoder.get_dense_pe()
        expected = model.mask_decoder.predict_masks(features[1:], image_pe, sparse, dense)
    torch.testing.assert_close(logits, expected[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(iou, expected[1], atol=1e-4, rtol=1e-4)


def test_a_crop_sees_its_place_on_the_canvas() -> None:
    """Tokens that attend to nothing but themselves are the same on a crop and on the canvas around it."""
    model = fresh_model().eval()
    for block in model.image_encoder.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
        torch.nn.init.zeros_(block.attn.proj.bias)
    torch.nn.init.normal_(model.image_encoder.pos_embed)
    pixels = torch.randn(1, 3, 128, 128, generator=generator())
    with torch.no_grad():
        canvas = model.image_encoder(pixels)
        crop = CropModel(model, 96, origin=(2, 1)).encode(pixels[..., 32:, 16:112])
    # The neck's 3x3 convolution meets the crop's edge; inside it nothing differs.
    torch.testing.assert_close(crop[..., 1:-1, 1:-1], canvas[..., 3:7, 2:6], atol=1e-4, rtol=1e-4)


def test_a_crop_has_to_fit() -> None:
    model = fresh_model()
    with pytest.raises(ValueError, match=r"must start at 0\.\.2"):
        CropModel(model, 96, origin=(0, 3))
    with pytest.raises(ValueError, match="got 100 px"):
        CropModel(model, 100)


# Runs -----------------------------------------------------------------------------------------------------


def test_training_learns_one_scene() -> None:
    """The same picture over and over, with other prompts each time."""
    learner = trainer(stages=(Stage(1.0, 128, 1, 6, 0.0),))
    first = learner.train_step(0.0)
    batch = learner._batch(learner.stages[0], np.random.default_rng(1))
    learner._batch = lambda stage, rng: batch  # type: ignore[method-assign]
    seen = torch.stack([learner.train_step(0.0)[0] for _ in range(40)])
    assert torch.isfinite(first[:2]).all()
    assert seen[-10:].mean() < 0.5 * seen[:5].mean()


@pytest.mark.parametrize(("dtype", "corrections"), [(torch.float32, 1.0), (torch.bfloat16, 0.0)], ids=str)
def test_prompts_decoded_a_picture_at_a_time_give_the_same_gradients(dtype: torch.dtype, corrections: float) -> None:
    """Within the roundings of the arithmetic; in bf16 without corrections, which a pixel at the threshold moves."""

    def step(max_tokens: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        learner = trainer(stages=(Stage(1.0, 96, 3, 3, corrections),))
        learner.max_tokens = max_tokens
        learner.dtype = dtype
        return learner.train_step(0.0), learner._gradients.clone()

    (means, gradients), (means_of_parts, gradients_of_parts) = step(None), step(1)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(means_of_parts, means, atol=0, rtol=tolerance, equal_nan=True)
    assert_close_l2(gradients_of_parts, gradients, tolerance, f"gradients in {dtype}")


def test_prompts_are_decoded_by_whole_pictures() -> None:
    learner, index = trainer(), torch.tensor([0, 0, 0, 2, 2, 2, 3, 3, 3])
    for max_tokens, expected in ((1, [3, 3, 3]), (6 * 36, [6, 3]), (9 * 36, [9]), (None, [9])):
        learner.max_tokens = max_tokens
        chunks = learner._prompt_chunks(index, grid=6)
        assert [chunk.stop - chunk.start for chunk in chunks] == expected
        assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(9))


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_step_is_in_what_the_device_multiplies_fast(
    fast: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sam.system.hardware._cpu_has_bf16_products", lambda: fast)
    assert multiplies_bf16_fast(CPU) is fast
    assert trainer().dtype == dtype
    assert not multiplies_bf16_fast(torch.device("meta"))


def test_a_step_in_half_precision_teaches_the_same() -> None:
    """As on a device that multiplies bf16 faster: the weights stay in fp32, and so do the losses."""

    def step(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        learner = trainer()
        learner.dtype = dtype
        means = learner.train_step(0.0)
        return means, learner._gradients.clone()

    (exact, wide), (rounded, narrow) = step(torch.float32), step(torch.bfloat16)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded[[0, 1, 7]], exact[[0, 1, 7]], atol=0, rtol=0.05)
    assert torch.nn.functional.cosine_similarity(narrow, wide, dim=0) > 0.95


def test_a_resumed_run_continues_to_the_bit(tmp_path: Path) -> None:
    whole = trainer(reuse=2, pool=5)
    uninterrupted = [whole.train_step(step / 6) for step in range(6)]
    killed = trainer(reuse=2, pool=5)
    for step in range(3):
        killed.train_step(step / 6)
    save(killed, Schedule(steps=6, spent_seconds=12.0, clock=lambda: 0.0), tmp_path)
    resumed, spent = resume(tmp_path, CPU, workers=0, model=fresh_model(), stages=STAGES)
    assert (resumed.step, spent) == (3, 12)
    for step in range(3, 6):
        assert torch.equal(resumed.train_step(step / 6).nan_to_num(-1), uninterrupted[step].nan_to_num(-1))
    for name, value in whole.average.items():
        assert torch.equal(resumed.average[name], value), name


def test_the_same_seed_gives_the_same_losses_and_another_seed_others() -> None:
    def first_losses(seed: int) -> list[float]:
        learner = trainer(seed)
        losses = torch.stack([learner.train_step(0.0)[0] for _ in range(2)])
        assert losses.isfinite().all()  # both batches show objects
        return losses.tolist()

    assert first_losses(7) == first_losses(7)
    assert first_losses(7) != first_losses(6)


def test_a_run_writes_its_log_its_state_and_weights_that_load(tmp_path: Path) -> None:
    lines: list[str] = []
    train(trainer(), Schedule(steps=2), tmp_path, report=lines.append)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [0, 1]
    assert all(entry["mask loss"] > 0 for entry in log)
    assert "96 px" in lines[0]
    assert "2 steps" in lines[-1]
    stored = sam.checkpoint.read_checkpoint(tmp_path / "nano.safetensors")
    assert stored.metadata["steps"] == "2"
    assert {"seed", "seconds", "machine", "revision", "started_from"} <= set(stored.metadata)
    assert {tensor.dtype for tensor in stored.state_dict.values()} == {torch.float16}
    sam.load_model(tmp_path / "nano.safetensors", device="cpu")


def test_without_a_repository_the_environment_may_name_the_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    assert provenance.revision() == sam.__version__
    monkeypatch.setenv("REVISION", "0123456789")
    assert provenance.revision() == "0123456789"


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_run_ends_in_time_with_its_schedule_done() -> None:
    clock = FakeClock()
    fitted = Schedule(minutes=2, clock=clock)
    durations = np.random.default_rng(0).uniform(0.5, 3.0, 1000)
    step, rates = 0, []
    while fitted.goes_on(step):
        rates.append(schedule.learning_rate(1.0, step, fitted.progress(step)))
        clock.now += durations[step]
        step += 1
    assert 114 < fitted.seconds <= 120
    assert max(rates) == 1
    assert rates[-1] < 0.15
    assert rates[25] == 1
    assert rates == sorted(rates[:20]) + sorted(rates[20:], reverse=True)


def test_a_resumed_run_has_the_time_that_was_left() -> None:
    clock = FakeClock()
    left = Schedule(minutes=2, spent_seconds=90, clock=clock)
    assert left.progress(60) == pytest.approx(0.75)
    clock.now += 31
    assert left.progress(60) == 1
    assert not left.goes_on(60)


def test_the_first_steps_of_a_run_do_not_depend_on_the_clock() -> None:
    clock = FakeClock()
    short = Schedule(minutes=1, clock=clock)
    clock.now += 59
    assert [short.progress(step) for step in (0, 49)] == [0, 0]
    assert short.progress(50) == pytest.approx(59 / 60)


def test_stages_follow_one_another() -> None:
    assert [schedule.stage_at(STAGES, progress).size for progress in (0, 0.49, 0.5, 1.0)] == [96, 96, 128, 128]
    for stages in (schedule.FROM_SCRATCH, schedule.CONTINUED):
        assert stages[-1].until == 1
        assert stages[-1].size == 512
    with pytest.raises(ValueError, match="either"):
        Schedule()
    with pytest.raises(ValueError, match="longer than nothing"):
        Schedule(minutes=0)
