"""The whole model on a GPU, against the plain formula in fp64 on the CPU; run by ``make gpu-test``."""

from __future__ import annotations

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from asking import CLICKS, ask_at_random, by_prediction, run_into_poisoned_outputs
from comparison import relative_l2
from models import TINY, TINY_2, random_image, random_model
from torch import Tensor

import sam
from fastsam_kernels.numerics import Budget
from sam import Prompt, Sam
from sam.images.prepare import prepare_image
from sam.inference import Graphs, Runtime

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def prompts() -> list[Prompt]:
    return [
        Prompt(points=np.array([[20.0, 30.0]]), labels=np.array([1])),
        Prompt(points=np.array([[5.0, 6.0], [40.0, 9.0]]), labels=np.array([1, 0])),
        Prompt(box=np.array([4.0, 8.0, 50.0, 44.0])),
    ]


def outputs(model: Sam, image: np.ndarray) -> dict[str, Tensor]:
    embedding = model.encode(image)
    prediction = model.predict(embedding, prompts())
    return {
        "features": embedding.features.double().cpu(),
        "logits": prediction.low_res_logits.double().cpu(),
        "predicted IoU": prediction.iou_predictions.double().cpu(),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("name", ["nano", "tiny", "tiny 2"])
def test_model_within_budget(name: str, kernels: str, dtype: torch.dtype) -> None:
    model = sam.load_model() if name == "nano" else random_model(TINY if name == "tiny" else TINY_2)
    image = random_image(48, 64)
    truth_model = copy.deepcopy(model).double()
    truth_model.kernels = "reference"
    truth = outputs(truth_model, image)
    model = model.to("cuda", dtype)
    model.kernels = "reference"
    plain = outputs(model, image)
    model.kernels = kernels
    result = outputs(model, image)
    for what, expected in truth.items():
        error, baseline = relative_l2(result[what], expected), relative_l2(plain[what], expected)
        limit = Budget(baseline, dtype).limit
        assert error <= limit, f"{what}: {error:.2e} is over the budget of {limit:.2e} (plain {baseline:.2e})"


def test_auto_is_triton_after_a_move() -> None:
    """People write ``registry[...](checkpoint=...).to("cuda")``."""
    model = sam.load_model(device="cpu")
    assert model.resolved_kernels == "torch"
    assert model.to("cuda").resolved_kernels == "torch"  # products in fp32
    assert model.to(torch.bfloat16).resolved_kernels == "triton"
    assert torch.isfinite(model.predict(model.encode(random_image(48, 64)), prompts()).low_res_logits).all()


def test_predictor_and_embedding_move() -> None:
    image = random_image(48, 64)
    on_gpu, on_cpu = sam.load_model(device="cuda"), sam.load_model(device="cpu")
    predictor = sam.SamPredictor(on_gpu)
    predictor.set_image(image)
    coords, labels = np.array([[20.0, 30.0]]), np.array([1])
    masks, _, logits = predictor.predict(coords, labels)
    assert masks.shape == (3, 48, 64)
    embedding = predictor.embedding.to("cpu")
    there = on_cpu.predict(embedding, [Prompt(points=coords, labels=labels)])
    agree = (torch.from_numpy(masks) == there.masks[0]).double().mean()
    assert agree > 0.999
    assert relative_l2(torch.from_numpy(logits), there.low_res_logits[0]) < 1e-3


def test_automatic_masks_wait_twice() -> None:
    """The host asks which masks are confident, then for what is known of them; the runs of the survivors come last."""
    model, image = sam.load_model(device="cuda"), random_image(300, 400)
    generator = sam.SamAutomaticMaskGenerator(
        model, 16, pred_iou_thresh=0.3, stability_score_thresh=0.3, output_mode="coco_rle"
    )
    embedding = model.encode(image)

    def records() -> list[dict[str, Any]]:
        steps = generator.steps(embedding)
        assert next(steps) == 256  # one batch has all clicks
        with pytest.raises(StopIteration) as stop:
            next(steps)
        return stop.value.value

    expected = records()  # kernels are compiled and tables of the geometry are uploaded
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert records() == expected
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchronizing" in str(warning.message)]
    assert expected
    assert len(waits) <= 3, [f"{warning.filename}:{warning.lineno}" for warning in waits]


def test_automatic_masks_as_on_a_cpu() -> None:
    records = {}
    for device in ("cpu", "cuda"):
        model = sam.load_model(device=device)
        generator = sam.SamAutomaticMaskGenerator(
            model, 8, pred_iou_thresh=0.3, stability_score_thresh=0.3, crop_n_layers=1, min_mask_region_area=20
        )
        records[device] = generator.generate(random_image(300, 400))
    assert len(records["cpu"]) == len(records["cuda"]) > 3
    for one, other in zip(records["cpu"], records["cuda"], strict=True):
        assert one["point_coords"] == other["point_coords"]
        assert abs(one["area"] - other["area"]) <= 0.01 * one["area"]


def replaying(model: Sam) -> Sam:
    other = copy.deepcopy(model)
    other.runtime = Runtime(other, compile_encoder=False)
    return other


@pytest.mark.parametrize("config", [TINY, TINY_2], ids=["sam", "sam 2"])
def test_a_thousand_replays(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Graphs, "run", run_into_poisoned_outputs)
    eager = random_model(config).to("cuda")
    ask_at_random(replaying(eager), eager, requests=1000, seed=1)


def test_replays_by_many_threads_on_their_own_streams() -> None:
    eager = sam.load_model(device="cuda")
    model = replaying(eager)
    embeddings = [eager.encode(random_image(48, 64, seed=i)) for i in range(2)]
    expected = [eager.predict(embedding, prompts()).low_res_logits for embedding in embeddings]

    def ask(thread: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            result = [model.predict(embeddings[(thread + i) % 2], prompts()).low_res_logits for i in range(25)]
            torch.cuda.current_stream().synchronize()
        return all(relative_l2(one, expected[(thread + i) % 2]) < 1e-4 for i, one in enumerate(result))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_session_of_ten_clicks_takes_no_new_memory(dtype: torch.dtype) -> None:
    eager = sam.load_model(device="cuda", dtype=dtype)
    model = replaying(eager)
    embedding = eager.encode(random_image(48, 64))
    session = sam.InteractiveSession(model, embedding)

    def answers() -> list[np.ndarray]:
        session.reset()
        return [session.click(*click).mask() for click in CLICKS[:10]]

    result = answers()
    if dtype == torch.float32:
        for answer, mask in zip(result, by_prediction(eager, embedding, CLICKS[:10]), strict=True):
            assert (answer == mask).mean() > 0.999
    before = torch.cuda.memory_stats()
    assert all((one == other).all() for one, other in zip(answers(), result, strict=True))
    after = torch.cuda.memory_stats()
    for what in ("reserved_bytes.all.current", "segment.all.allocated", "num_alloc_retries"):
        assert after[what] == before[what], what
    assert len(model.runtime.buckets) <= 5  # type: ignore[union-attr]


def test_streams_on_a_gpu() -> None:
    model = sam.load_model(device="cuda")
    images = [random_image(40 + i, 90 - 2 * i, seed=i) for i in range(20)]
    requests = [(image, [Prompt([[5.0, 9.0]], [1])]) for image in images]
    for (image, sent), result in zip(requests, sam.predict_stream(model, requests, batch_size=4), strict=True):
        expected = model.predict(model.encode(image), sent)
        assert result.masks.device.type == "cpu"
        assert not any(tensor.is_pinned() for tensor in (result.masks, result.iou_predictions, result.low_res_logits))
        assert relative_l2(result.low_res_logits, expected.low_res_logits.cpu()) < 1e-4
        assert (result.masks == expected.masks.cpu()).double().mean() > 0.999


def test_graphs_need_a_gpu_and_are_asked_for_by_name() -> None:
    model = sam.load_model(device="cuda", cuda_graphs=True)
    assert model.runtime is not None
    model.predict(model.encode(random_image(48, 64)), prompts()[:1])
    assert len(model.runtime.buckets) == 1


def test_features_are_waited_for_by_another_stream() -> None:
    """Encoded behind other work on one stream, asked for on another without a word from the host."""
    model, image = sam.load_model(device="cuda"), random_image(48, 64)
    embedding = model.encode(image)
    expected = model.predict(embedding, prompts()).low_res_logits
    prepared = prepare_image(image, model.image_geometry)
    pixels = model.encoder_input(torch.from_numpy(prepared.pixels).cuda(), prepared)[None]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10**9)  # after everything that the host waits for
        (late,) = model.embed(pixels, [prepared])
    with torch.cuda.stream(torch.cuda.Stream()):
        result = model.predict(late, prompts()).low_res_logits
        torch.cuda.current_stream().synchronize()
    assert relative_l2(result, expected) < 1e-5


def test_the_encoder_of_one_image_is_replayed() -> None:
    eager = sam.load_model(device="cuda", dtype=torch.bfloat16)
    model = replaying(eager)
    for seed in range(3):
        image = random_image(48, 64, seed=seed)
        assert torch.equal(model.encode(image).features, eager.encode(image).features)
    with torch.no_grad():
        for either in (model, eager):
            either.image_encoder.blocks[0].mlp.lin1.weight.mul_(1.5)
    assert torch.equal(model.encode(image).features, eager.encode(image).features)
