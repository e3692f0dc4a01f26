"""A SAM 2 model behind every door of the package: each answers what ``predict`` does, with the object score."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import TINY, TINY_2, random_image, random_model
from PIL import Image
from serving import file_of
from waiting import SECONDS

from sam import (
    ImageEmbedding,
    InteractiveSession,
    MaskPrediction,
    Prompt,
    SamAutomaticMaskGenerator,
    load_model,
    predict_stream,
    save_checkpoint,
)
from sam.cli import main
from sam.engine import AutomaticOptions, Engine, PromptMasks
from sam.masks import rle
from sam.masks.rle_encode import encode
from sam.modeling.promptable import PromptableModel

IMAGES = [random_image(60, 90), random_image(100, 47, seed=1)]
PROMPTS = [
    [
        Prompt([(5, 6)], [1]),
        Prompt([(40, 30), (80, 50), (2, 2)], [1, 0, 0]),
        Prompt(box=(10, 10, 50, 40)),
        Prompt([(20, 20)], [0], box=(10, 10, 50, 40)),
    ],
    [Prompt([(30, 90), (1, 1)], [1, 1]), Prompt(mask_input=np.full((1, 32, 32), 3.0))],
]


@pytest.fixture(scope="module")
def model() -> PromptableModel:
    """It sees some of the objects, makes logits beyond the limit, and some of its single masks are unstable."""
    made = random_model(TINY_2)
    with torch.no_grad():
        made.get_parameter("sam_mask_decoder.output_upscaling.3.weight").mul_(4)
        made.get_parameter("sam_mask_decoder.pred_obj_score_head.layers.2.bias").add_(1.75)
    return made


@pytest.fixture(scope="module")
def embeddings(model: PromptableModel) -> list[ImageEmbedding]:
    return model.encode(IMAGES)


@pytest.fixture(scope="module")
def expected(model: PromptableModel, embeddings: list[ImageEmbedding]) -> list[MaskPrediction]:
    return model.predict(embeddings, PROMPTS)


def assert_same(found: MaskPrediction, expected: MaskPrediction) -> None:
    assert found.object_scores is not None
    assert expected.object_scores is not None
    torch.testing.assert_close(found.object_scores, expected.object_scores, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.iou_predictions, expected.iou_predictions, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.low_res_logits, expected.low_res_logits, rtol=1e-3, atol=2e-3)
    assert (found.masks != expected.masks).float().mean() < 1e-3


def assert_answers(answers: list[PromptMasks], expected: MaskPrediction) -> None:
    for row, answer in enumerate(answers):
        assert expected.object_scores is not None
        assert answer.object_score == pytest.approx(expected.object_scores[row].item(), abs=1e-4)
        np.testing.assert_allclose(answer.predicted_iou, expected.iou_predictions[row], atol=1e-4)
        masks = np.stack([rle.decode(encoded) for encoded in answer.rles])
        assert (masks != expected.masks[row].numpy()).mean() < 1e-3


def test_the_cases_differ(expected: list[MaskPrediction]) -> None:
    scores = torch.cat([prediction.object_scores for prediction in expected if prediction.object_scores is not None])
    assert len(scores) == 6
    assert 0 < (scores > 0).sum() < 6
    assert len(scores.unique()) == 6
    logits = torch.cat([prediction.low_res_logits for prediction in expected])
    assert logits.abs().max() == 32
    assert all(0.02 < prediction.masks.float().mean() < 0.98 for prediction in expected)


@pytest.mark.parametrize("multimask", [True, False])
def test_ragged_prompts_are_those_one_by_one(
    model: PromptableModel, embeddings: list[ImageEmbedding], multimask: bool
) -> None:
    together = model.predict(embeddings, PROMPTS, multimask)
    for embedding, prompts, prediction in zip(embeddings, PROMPTS, together, strict=True):
        for row, prompt in enumerate(prompts):
            alone = model.predict(embedding, [prompt], multimask)
            part = MaskPrediction(*(tensor[row : row + 1] for tensor in vars(prediction).values()))
            assert_same(alone, part)


def test_the_reference_agrees(
    model: PromptableModel, embeddings: list[ImageEmbedding], expected: list[MaskPrediction]
) -> None:
    model.kernels = "reference"
    try:
        encoded = model.encode(IMAGES)
        for prediction, other in zip(model.predict(encoded, PROMPTS), expected, strict=True):
            assert_same(prediction, other)
    finally:
        model.kernels = "auto"
    for embedding, other_embedding in zip(encoded, embeddings, strict=True):
        for level, other_level in zip(embedding.high_res, other_embedding.high_res, strict=True):
            torch.testing.assert_close(level, other_level, rtol=1e-3, atol=1e-4)


def test_saved_embeddings(
    model: PromptableModel, embeddings: list[ImageEmbedding], expected: list[MaskPrediction], tmp_path: Path
) -> None:
    embeddings[1].save(tmp_path / "one.safetensors")
    loaded = ImageEmbedding.load(tmp_path / "one.safetensors")
    assert_same(model.predict(loaded, PROMPTS[1]), expected[1])
    with pytest.raises(ValueError, match="this embedding was made by model custom"):
        random_model(TINY).predict(loaded, PROMPTS[1])


def test_a_stream(model: PromptableModel, expected: list[MaskPrediction]) -> None:
    for prediction, other in zip(
        predict_stream(model, zip(IMAGES, PROMPTS, strict=True), batch_size=2), expected, strict=True
    ):
        assert_same(prediction, other)


def test_a_session_of_ten_clicks(model: PromptableModel, embeddings: list[ImageEmbedding]) -> None:
    session, points, labels = InteractiveSession(model, embeddings[0]), [], []
    mask_input = None
    clicks = np.random.default_rng(0).uniform((0, 0), (90, 60), (10, 2))
    for number, (x, y) in enumerate(clicks):
        points.append((x, y))
        labels.append(int(number % 3 != 2))
        answer = session.click(x, y, labels[-1])
        prompt = Prompt(points, labels, mask_input=mask_input)
        prediction = model.predict(embeddings[0], [prompt], multimask_output=number == 0)
        best = int(prediction.iou_predictions[0].argmax())
        assert prediction.object_scores is not None
        assert answer.object_score == pytest.approx(prediction.object_scores[0].item(), abs=1e-4)
        assert answer.predicted_iou == pytest.approx(prediction.iou_predictions[0, best].item(), abs=1e-4)
        assert (answer.mask() != prediction.masks[0, best].numpy()).mean() < 1e-2
        mask_input = session.low_res_logits[0].numpy().copy()  # what it says is what it feeds back
        np.testing.assert_allclose(mask_input, prediction.low_res_logits[0, best : best + 1], atol=5e-2)


# The engine --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(model: PromptableModel) -> Iterator[Engine]:
    with Engine(model) as running:
        yield running


def test_an_engine(engine: Engine, expected: list[MaskPrediction]) -> None:
    futures = [engine.segment(*both, keep_logits=True) for both in zip(IMAGES, PROMPTS, strict=True)]
    for future, prediction in zip(futures, expected, strict=True):
        answers = future.result(SECONDS)
        assert_answers(answers, prediction)
        low_res = np.stack([answer.low_res_logits for answer in answers if answer.low_res_logits is not None])
        np.testing.assert_allclose(low_res, prediction.low_res_logits, atol=2e-3)


def test_the_engine_counts_all_features_of_what_it_keeps(model: PromptableModel) -> None:
    with Engine(model) as running:
        image = running.prepare(IMAGES[0])
        embedding = running.embed(image).result(SECONDS)
        maps = [embedding.features, *embedding.high_res]
        assert running.counters()["cache_bytes"] == sum(x.nbytes for x in maps) == embedding.nbytes
        assert running.embedding(image.key) is embedding
        running.segment(embedding, PROMPTS[0][:1]).result(SECONDS)
        assert running.counters()["cache_bytes"] == embedding.nbytes > sum(x.nbytes for x in maps)


def test_an_image_that_waits_is_no_larger_than_the_models_input(engine: Engine, model: PromptableModel) -> None:
    large = random_image(700, 900)
    prepared = engine.prepare(large)
    assert prepared.pixels.nbytes == 3 * 128 * 128 * 4
    assert engine.prepare(IMAGES[0]).pixels.nbytes == IMAGES[0].nbytes
    embedding, straight = engine.embed(prepared).result(SECONDS), model.encode(large)
    assert embedding.image_hash == straight.image_hash
    assert embedding.geometry == straight.geometry
    torch.testing.assert_close(embedding.features, straight.features, rtol=1e-4, atol=1e-4)


def test_automatic_masks(engine: Engine, model: PromptableModel, embeddings: list[ImageEmbedding]) -> None:
    """All of them, in little memory, by the engine: each is one of the masks of its click."""
    options: dict[str, Any] = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}
    form = {"points_per_side": 3, "output_mode": "uncompressed_rle"}
    records = SamAutomaticMaskGenerator(model, **form, **options).generate(IMAGES[0])
    assert len(records) == 27
    little = SamAutomaticMaskGenerator(model, **form, **options, max_memory="70MB")
    asked = AutomaticOptions(points_per_side=3, **options)
    for others in (little.generate(IMAGES[0]), engine.automatic(embeddings[0], asked).result(SECONDS)):
        for record, other in zip(*(sorted(each, key=_place) for each in (records, others)), strict=True):
            assert record["point_coords"] == other["point_coords"]
            assert record["predicted_iou"] == pytest.approx(other["predicted_iou"], abs=1e-4)
            assert record["area"] == pytest.approx(other["area"], abs=6)
    clicks = {tuple(record["point_coords"][0]) for record in records}
    prediction = model.predict(embeddings[0], [Prompt([click], [1]) for click in clicks])
    for click, masks, scores in zip(clicks, prediction.masks, prediction.iou_predictions, strict=True):
        of_click = [record for record in records if tuple(record["point_coords"][0]) == click]
        for record in of_click:
            nearest = int((scores - record["predicted_iou"]).abs().argmin())
            assert (rle.decode(record["segmentation"]) != masks[nearest].numpy()).mean() < 1e-3


def _place(record: dict[str, Any]) -> tuple[Any, float]:
    return record["point_coords"], record["predicted_iou"]


def test_an_image_of_a_single_row_has_automatic_masks(model: PromptableModel) -> None:
    """SAM cannot resize it, SAM 2 stretches it."""
    options = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}
    assert SamAutomaticMaskGenerator(model, 2, **options).generate(random_image(1, 700))
    with pytest.raises(ValueError, match="the aspect ratio may be at most 1:256"):
        SamAutomaticMaskGenerator(random_model(TINY), 2).generate(random_image(1, 700))


# Files and commands ------------------------------------------------------------------------------------------


def test_a_file_and_the_commands(model: PromptableModel, expected: list[MaskPrediction], tmp_path: Path) -> None:
    checkpoint, photo = tmp_path / "weights.safetensors", tmp_path / "photo.png"
    save_checkpoint(model, checkpoint)
    loaded = load_model(checkpoint, device="cpu")
    assert loaded.model_hash == model.model_hash
    Image.fromarray(IMAGES[0]).save(photo)
    common = [str(photo), "--checkpoint", str(checkpoint), "--device", "cpu"]
    assert main(["segment", *common, "--point", "5,6", "--out", str(tmp_path / "click")]) == 0
    document = json.loads((tmp_path / "click" / "photo.json").read_text())
    assert expected[0].object_scores is not None
    assert document["object_score"] == pytest.approx(expected[0].object_scores[0].item(), abs=1e-4)
    found = np.stack([rle.decode(record["segmentation"]) for record in document["masks"]])
    assert (found != expected[0].masks[0].numpy()).mean() < 1e-3
    all_masks = ["--pred-iou-thresh", "0", "--stability-score-thresh", "0", "--box-nms-thresh", "1"]
    into = ["--format", "coco", "--out", str(tmp_path / "everything")]
    assert main(["auto", *common, "--points-per-side", "2", *all_masks, *into]) == 0
    assert len(json.loads((tmp_path / "everything" / "photo.json").read_text())) == 12


# The service -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local(model: PromptableModel) -> Iterator[Any]:
    pytest.importorskip("fastapi", reason="needs the extra serve")
    pytest.importorskip("httptools", reason="needs the extra serve")
    from local_service import Local

    from sam.server import Settings

    running = Local(Engine(model), Settings())
    yield running
    running.close()


def test_the_service(local: Any, expected: list[MaskPrediction]) -> None:
    prompts = [
        {"points": [[5, 6]]},
        {"points": [[40, 30], [80, 50], [2, 2]], "labels": [1, 0, 0]},
        {"box": [10, 10, 50, 40]},
        {"points": [[20, 20]], "labels": [0], "box": [10, 10, 50, 40]},
    ]
    status, answer, headers = local.post("/v1/segment", file_of(IMAGES[0]), prompts=prompts)
    assert status == 200
    scores = expected[0].object_scores
    assert scores is not None
    assert [prompt["object_score"] for prompt in answer["prompts"]] == pytest.approx(scores.tolist(), abs=1e-4)
    for prompt, masks in zip(answer["prompts"], expected[0].masks, strict=True):
        decoded = np.stack([rle.decode(record["segmentation"]) for record in prompt["masks"]])
        assert (decoded != masks.numpy()).mean() < 1e-3
    _, again, _ = local.post("/v1/segment", embedding=headers["x-embedding"], prompts=prompts[:1])
    assert again["prompts"][0]["object_score"] == pytest.approx(scores[0].item(), abs=1e-4)
    _, content, _ = local.post("/v1/segment", embedding=headers["x-embedding"], prompts=prompts, output="npz")
    with np.load(io.BytesIO(content)) as arrays:
        np.testing.assert_allclose(arrays["object_scores"], scores, atol=1e-4)
        assert arrays["masks"].shape == (12, 60, 90)


def test_everything_by_the_service_has_the_thresholds_of_sam_2(local: Any) -> None:
    """0.8 where a request does not say, and what it says where it does."""
    used: list[tuple[float, float]] = []
    steps = SamAutomaticMaskGenerator.steps

    def noted(generator: SamAutomaticMaskGenerator, image: Any) -> Any:
        used.append((generator.pred_iou_thresh, generator.stability_score_thresh))
        return steps(generator, image)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SamAutomaticMaskGenerator, "steps", noted)
        for fields in ({}, {"pred_iou_thresh": 0.88, "stability_score_thresh": 0.5}):
            assert local.post("/v1/automatic", file_of(IMAGES[0]), points_per_side=2, **fields)[0] == 200
    assert used == [(0.8, 0.95), (0.88, 0.5)]


def test_a_client_corrects_what_it_got(
    local: Any, model: PromptableModel, embeddings: list[ImageEmbedding], expected: list[MaskPrediction]
) -> None:
    from sam.client import Client

    with Client(f"http://127.0.0.1:{local.port}") as client:
        image = client.embed(file_of(IMAGES[0]))
        (click,) = client.segment(image, [PROMPTS[0][0]])
        correction = {"points": [[5, 6], [70, 20]], "labels": [1, 0], "mask_input": click.reference}
        (corrected,) = client.segment(image, [correction], multimask_output=False)
    assert expected[0].object_scores is not None
    assert click.object_score == pytest.approx(expected[0].object_scores[0].item(), abs=1e-4)
    low_res = expected[0].low_res_logits[0, click.best][None].numpy()
    prompt = Prompt([(5, 6), (70, 20)], [1, 0], mask_input=low_res)
    prediction = model.predict(embeddings[0], [prompt], multimask_output=False)
    assert (corrected.masks != prediction.masks[0].numpy()).mean() < 1e-2


def test_sam_has_no_object_scores() -> None:
    """Its answers are what they were."""
    from sam.masks.formats import find_format
    from sam.server.outputs import prompt_masks

    model = random_model(TINY)
    prediction = model.predict(model.encode(IMAGES[0]), PROMPTS[0][:1])
    assert prediction.object_scores is None
    rles = encode(prediction.masks[0])
    with Engine(model) as engine:
        (answer,) = engine.segment(IMAGES[0], PROMPTS[0][:1]).result(SECONDS)
    assert answer.object_score is None
    assert answer.rles == rles
    (record,) = prompt_masks([answer], find_format("rle"), (60, 90), 10**9, lambda: None)
    assert set(record) == {"best", "masks"}
    content = prompt_masks([answer], find_format("npz"), (60, 90), 10**9, lambda: None)
    assert isinstance(content, bytes)
    with np.load(io.BytesIO(content)) as arrays:
        assert set(arrays) == {"masks", "predicted_iou"}
