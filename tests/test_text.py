"""Labels to masks: every answer against transformers called by hand, one image, one caption, one box at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sam
from fastsam_kernels.nms.reference import reference as plain_nms
from sam.text import Detections, GroundingDino, Owl, TextMasks, segment

pytest.importorskip("transformers", reason="text prompts need transformers")
import text_models
from models import SMALL_2, TINY, random_model

LABELS = [["cat", "red car"], ["dog"], ["Traffic  Light", "person", "bus"], ["tree", "cat"]]
Searched = list[tuple[Tensor, Tensor, Tensor]]  # boxes, scores and label ids of each image


@pytest.fixture(scope="module")
def images(photo: np.ndarray) -> list[np.ndarray]:
    """Four photographs of three sizes, two of which are resized to the same."""
    return [photo, photo[:, ::-1].copy(), photo[:200, :150].copy(), photo[20:120, 100:400].copy()]


@pytest.fixture(scope="module")
def model() -> sam.Sam:
    """A model whose masks are of no matter."""
    return random_model(TINY)


@pytest.fixture(scope="module")
def dino() -> GroundingDino:
    return exact(GroundingDino(*text_models.grounding_dino()))


@pytest.fixture(scope="module")
def owl() -> Owl:
    return exact(Owl(*text_models.owl()))


def exact(detector: Any) -> Any:
    """In fp64: what is left of a difference is no rounding, of which a batch has another on every CPU."""
    detector.model.double()
    return detector


def corners(boxes: Tensor, width: float, height: float) -> Tensor:
    cx, cy, w, h = boxes.unbind(1)
    return torch.stack([(cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height], 1)


@torch.no_grad()
def dino_by_hand(detector: GroundingDino, image: np.ndarray, labels: Sequence[str], reduce: Any) -> tuple[Tensor, ...]:
    """One caption after the other, as the processor tokenises it; labels are the tokens between its full stops."""
    model, processor = detector.model, detector.processor
    captions: list[list[str]] = [[]]
    for label in labels:
        longer = " ".join(f"{each}." for each in (*captions[-1], label))
        if len(processor.tokenizer(longer)["input_ids"]) > model.config.max_text_len:
            captions.append([])
        captions[-1].append(label)
    parts, first = [], 0
    for caption in captions:
        text = " ".join(f"{' '.join(label.lower().split())}." for label in caption)
        inputs = processor(images=[image], text=[text], return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].double()
        outputs = model(**inputs)
        stops = (inputs["input_ids"][0] == 1012).nonzero()[:, 0].tolist()
        assert len(stops) == len(caption)
        probabilities = outputs.logits[0].sigmoid()
        begins = [1, *(stop + 1 for stop in stops[:-1])]
        by_label = torch.stack([reduce(probabilities[:, a:b]) for a, b in zip(begins, stops, strict=True)], 1)
        score, label = by_label.max(1)
        parts.append((corners(outputs.pred_boxes[0], image.shape[1], image.shape[0]), score, label + first))
        first += len(caption)
    boxes, scores, ids = (torch.cat(each) for each in zip(*parts, strict=True))
    return boxes.float(), scores.float(), ids


@torch.no_grad()
def owl_by_hand(detector: Owl, image: np.ndarray, labels: Sequence[str]) -> tuple[Tensor, ...]:
    inputs = detector.processor(images=[image], text=[[label.lower() for label in labels]], return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].double()
    logits, boxes = (outputs := detector.model(**inputs)).logits[0], outputs.pred_boxes[0]
    best, label = logits.max(1)
    return corners(boxes, max(image.shape), max(image.shape)).float(), best.sigmoid().float(), label


def by_score(boxes: Tensor, scores: Tensor, ids: Tensor, threshold: float) -> tuple[Tensor, ...]:
    rows = (scores > threshold).nonzero()[:, 0]
    rows = rows[scores[rows].sort(descending=True, stable=True).indices]
    return boxes[rows], scores[rows], ids[rows]


def assert_same(actual: Detections, expected: tuple[Tensor, ...], side: float) -> None:
    boxes, scores, ids = by_score(actual.boxes, actual.scores, actual.label_ids, 0)
    assert torch.equal(ids, expected[2])
    torch.testing.assert_close(scores, expected[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(boxes / side, expected[0] / side, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["GroundingDino", "MMGroundingDino"])
@pytest.mark.parametrize("score", ["max", "mean"])
def test_grounding_dino_finds_what_it_finds_by_hand(kind: str, score: Any, images: list[np.ndarray]) -> None:
    detector = exact(GroundingDino(*text_models.grounding_dino(kind), score=score))
    threshold = 0.2 if kind == "GroundingDino" else 0.0  # the other begins at probabilities of 1 %
    found = detector.detect(images, LABELS, threshold)
    reduce: Callable[[Tensor], Tensor] = (lambda span: span.amax(1)) if score == "max" else (lambda span: span.mean(1))
    for each, image, labels in zip(found, images, LABELS, strict=True):
        expected = by_score(*dino_by_hand(detector, image, labels, reduce), threshold)
        assert len(expected[0]) > 3
        assert_same(each, expected, max(image.shape))
    assert max(len(each.label_ids.unique()) for each in found) > 1
    assert detector.passes == 3  # a caption each, and three sizes after resizing


def test_owl_finds_what_it_finds_by_hand_with_other_numbers_of_labels(owl: Owl, images: list[np.ndarray]) -> None:
    labels = [["cat", "red car"], ["dog"], ["traffic light", "person", "bus", "tree"], ["cat"]]
    owl.passes = 0
    found = owl.detect(images, labels, 0.3)
    assert owl.passes == 1  # all images are resized to one square
    for each, image, own in zip(found, images, labels, strict=True):
        expected = by_score(*owl_by_hand(owl, image, own), 0.3)
        assert len(expected[0]) > 3
        assert_same(each, expected, max(image.shape))


def test_300_labels_over_six_images_of_four_sizes(dino: GroundingDino, images: list[np.ndarray]) -> None:
    """In one call as by hand; and the other images of a call change nothing."""
    six = [*images, images[0][::-1].copy(), images[2][:, :120].copy()]
    labels = list(text_models.NUMBERED)
    dino.passes = 0
    found = dino.detect(six, [labels] * 6, 0.25)
    captions = -(-300 // 63)  # two tokens a label, and two more
    assert dino.passes == 4 * captions
    for each, image in zip(found, six, strict=True):
        expected = by_score(*dino_by_hand(dino, image, labels, lambda span: span.amax(1)), 0.25)
        assert len({*expected[2].tolist()}) > 10
        assert_same(each, expected, max(image.shape))


@pytest.mark.parametrize("name", ["dino", "owl"])
def test_an_answer_depends_neither_on_other_images_nor_on_the_order(
    name: str, images: list[np.ndarray], request: pytest.FixtureRequest
) -> None:
    detector = request.getfixturevalue(name)
    together = detector.detect(images, LABELS, 0.2)
    backwards = detector.detect(images[::-1], LABELS[::-1], 0.2)[::-1]
    for index, image in enumerate(images):
        (alone,) = detector.detect([image], [LABELS[index]], 0.2)
        for other in (together[index], backwards[index]):
            assert_same(other, by_score(alone.boxes, alone.scores, alone.label_ids, 0), max(image.shape))


def test_owl_is_not_asked_about_more_labels_than_its_text_model_has_room_for(
    owl: Owl, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = owl.detect(images, LABELS, 0.3)
    monkeypatch.setattr("sam.text.owl._MAX_QUERIES", 6)
    owl.passes = 0
    for each, of_all in zip(owl.detect(images, LABELS, 0.3), expected, strict=True):
        assert_same(each, by_score(of_all.boxes, of_all.scores, of_all.label_ids, 0), 451)
    assert owl.passes == 2


def test_batches_have_a_size(dino: GroundingDino, images: list[np.ndarray]) -> None:
    detector = GroundingDino(dino.model, dino.processor, batch_size=2)
    five = [images[0]] * 5
    for each in detector.detect(five, [["cat"]] * 5, 0.2):
        (alone,) = dino.detect([images[0]], [["cat"]], 0.2)
        assert_same(each, by_score(alone.boxes, alone.scores, alone.label_ids, 0), 451)
    assert detector.passes == 3


def expected_boxes(raw: Detections, thresholds: Sequence[float], nms_thresh: float, size: tuple[int, ...]) -> Searched:
    """Clipped, above their threshold, suppressed label by label by the plain formula; of each label, best first."""
    result = []
    for label, threshold in enumerate(thresholds):
        boxes = raw.boxes.clone()
        boxes[:, 0::2], boxes[:, 1::2] = boxes[:, 0::2].clamp(0, size[1]), boxes[:, 1::2].clamp(0, size[0])
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        own = (raw.label_ids == label) & (raw.scores > threshold) & (area > 0)
        boxes, scores = boxes[own], raw.scores[own]
        order = scores.sort(descending=True, stable=True).indices
        keep = plain_nms(boxes[order], nms_thresh)
        result.append((boxes[order][keep], scores[order][keep], torch.full((int(keep.sum()),), label)))
    return result


def test_masks_are_those_of_the_predictor_box_by_box(
    dino: GroundingDino, images: list[np.ndarray], nano: sam.Sam, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, own = images[:3:2], LABELS[:3:2]
    calls: dict[str, int] = {"encoder": 0, "predict": 0}
    predict = nano.predict
    monkeypatch.setattr(
        nano, "predict", lambda *a, **k: (calls.update(predict=calls["predict"] + 1), predict(*a, **k))[1]
    )
    embed = nano.embed
    monkeypatch.setattr(nano, "embed", lambda x, y: (calls.update(encoder=calls["encoder"] + len(y)), embed(x, y))[1])
    results = segment(nano, dino, images, own, threshold=0.55, thresholds={"Red Car": 0.6})
    assert calls == {"encoder": len(images), "predict": 1}
    monkeypatch.undo()
    raw = dino.detect(images, own, 0.0)
    predictor, total = sam.SamPredictor(nano), 0
    for image, labels, found, result in zip(images, own, raw, results, strict=True):
        limits = [0.6 if label == "red car" else 0.55 for label in labels]
        expected = [torch.cat(each) for each in zip(*expected_boxes(found, limits, 0.5, image.shape), strict=True)]
        torch.testing.assert_close(result.boxes, expected[0], atol=1e-5 * max(image.shape), rtol=0)
        torch.testing.assert_close(result.scores, expected[1], atol=1e-6, rtol=0)
        assert torch.equal(result.label_ids, expected[2])
        assert result.labels == [labels[label] for label in expected[2].tolist()]
        predictor.set_image(image)
        for row, box in enumerate(result.boxes.numpy()):
            masks, scores, logits = predictor.predict(box=box, multimask_output=False)
            np.testing.assert_array_equal(masks[0], result.masks[row].numpy())
            assert result.predicted_iou[row].item() == pytest.approx(float(scores[0]), abs=1e-5)
            np.testing.assert_allclose(result.low_res_logits[row].numpy(), logits, atol=1e-3)
        total += len(result)
    assert total > 3


def test_sam2_segments_the_boxes_too(dino: GroundingDino, images: list[np.ndarray]) -> None:
    model = random_model(SMALL_2)
    results = segment(model, dino, images[:2], LABELS[:2], threshold=0.3)
    for image, result in zip(images, results, strict=False):
        prompts = [sam.Prompt(box=box) for box in result.boxes.numpy()]
        alone = model.predict(model.encode(image), prompts, multimask_output=False)
        assert len(result)
        assert torch.equal(result.masks, alone.masks[:, 0])
        assert result.object_scores is not None
        assert alone.object_scores is not None
        torch.testing.assert_close(result.object_scores, alone.object_scores)


def test_handles_of_a_result_take_corrections(dino: GroundingDino, images: list[np.ndarray], model: sam.Sam) -> None:
    (found,) = segment(model, dino, images[:1], [["cat"]], threshold=0.3)
    correction = sam.Prompt([(30, 30)], [0], box=found.boxes[0].numpy(), mask_input=found.low_res_logits[0].numpy())
    assert model.predict(found.embedding, [correction], multimask_output=False).masks.shape == (1, 1, 300, 451)


def rows_of(result: TextMasks) -> list[tuple[str, tuple[float, ...]]]:
    return [
        (label, tuple(box)) for label, box in zip(result.labels, result.boxes.round(decimals=2).tolist(), strict=True)
    ]


def test_no_detection_gives_empty_arrays(dino: GroundingDino, images: list[np.ndarray], model: sam.Sam) -> None:
    some, none = segment(model, dino, images[:2], [["cat"], ["dog"]], thresholds={"dog": 1.0})
    assert len(some)
    assert [list(each.shape) for each in (none.masks, none.boxes, none.scores, none.label_ids)] == [
        [0, 300, 451],
        [0, 4],
        [0],
        [0],
    ]
    assert none.labels == []
    assert none.predicted_iou.shape == (0,)
    assert none.masks.dtype == torch.bool
    assert segment(model, dino, [], []) == []


class Fixed:
    """A program's own detector, which finds the same boxes in every image."""

    def __init__(self, *found: tuple[tuple[float, ...], float, int]) -> None:
        self.found = found
        self.asked: list[Any] = []

    def detect(self, images: Any, labels: Any, threshold: float) -> list[Detections]:
        self.asked.append((labels, threshold))
        boxes = torch.tensor([box for box, _, _ in self.found]).reshape(-1, 4)
        each = Detections(boxes, torch.tensor([s for _, s, _ in self.found]), torch.tensor([i for *_, i in self.found]))
        return [each for _ in images]


LEFT, NEARLY_LEFT, RIGHT = (10.0, 20.0, 110.0, 120.0), (14.0, 20.0, 114.0, 120.0), (300.0, 50.0, 400.0, 150.0)


@pytest.fixture
def boxes() -> Fixed:
    return Fixed((LEFT, 0.6, 0), (NEARLY_LEFT, 0.8, 1), (RIGHT, 0.5, 1), (RIGHT, 0.4, 0))


def test_suppression_is_of_one_label_or_of_all(boxes: Fixed, photo: np.ndarray, model: sam.Sam) -> None:
    labels = [["cat", "dog"]]
    (within_labels,) = segment(model, boxes, [photo], labels)
    assert rows_of(within_labels) == [("cat", LEFT), ("cat", RIGHT), ("dog", NEARLY_LEFT), ("dog", RIGHT)]
    (over_all,) = segment(model, boxes, [photo], labels, agnostic_nms=True)
    assert rows_of(over_all) == [("dog", NEARLY_LEFT), ("dog", RIGHT)]
    (all_kept,) = segment(model, boxes, [photo], labels, agnostic_nms=True, nms_thresh=1.0)
    assert len(all_kept) == 4


def test_a_negative_label_takes_what_it_beats(boxes: Fixed, photo: np.ndarray, model: sam.Sam) -> None:
    (result,) = segment(model, boxes, [photo], [["cat"]], negative_labels=["dog"])
    assert rows_of(result) == []
    assert boxes.asked == [([["cat", "dog"]], 0.3)]
    (result,) = segment(model, boxes, [photo], [["cat"]], negative_labels=["dog"], nms_thresh=0.95)
    assert rows_of(result) == [("cat", LEFT)]
    weak = Fixed((LEFT, 0.6, 0), (LEFT, 0.5, 1))
    (result,) = segment(model, weak, [photo], [["cat"]], negative_labels=["dog"])
    assert rows_of(result) == [("cat", LEFT)]


def test_a_threshold_of_a_label_is_its_own(boxes: Fixed, photo: np.ndarray, model: sam.Sam) -> None:
    (result,) = segment(model, boxes, [photo], [["cat", "dog"]], threshold=0.45, thresholds={"DOG": 0.55, "cat": 0.2})
    assert rows_of(result) == [("cat", LEFT), ("cat", RIGHT), ("dog", NEARLY_LEFT)]
    assert boxes.asked[0][1] == 0.2


def test_a_box_says_where_to_look(boxes: Fixed, photo: np.ndarray, model: sam.Sam) -> None:
    left, everywhere = segment(model, boxes, [photo, photo], [["cat", "dog"]] * 2, within=[(0, 0, 60, 300), None])
    assert rows_of(left) == [("cat", LEFT)]  # the other's centre is at 64
    assert len(everywhere) == 4


def test_boxes_end_at_the_edges_of_the_picture(photo: np.ndarray, model: sam.Sam) -> None:
    over = Fixed(
        ((-20.0, 250.0, 100.0, 320.0), 0.9, 0), ((460.0, 10.0, 500.0, 50.0), 0.9, 0), ((5.0, 5.0, 5.0, 9.0), 0.9, 0)
    )
    (result,) = segment(model, over, [photo], [["cat"]])
    assert rows_of(result) == [("cat", (0.0, 250.0, 100.0, 300.0))]


def test_two_boxes_of_one_mask_are_one_object(photo: np.ndarray, nano: sam.Sam) -> None:
    """Boxes too far apart for suppression, whose masks are the same."""
    (several,) = segment(
        nano, Fixed((LEFT, 0.6, 0), (NEARLY_LEFT, 0.8, 0), (RIGHT, 0.5, 0)), [photo], [["cat"]], nms_thresh=1.0
    )
    assert len(several) == 3
    masks = several.masks.clone()
    iou = float((masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum())
    assert 0 < iou < 1
    options = {"nms_thresh": 1.0, "mask_nms_thresh": iou - 0.01}
    detector = Fixed((LEFT, 0.6, 0), (NEARLY_LEFT, 0.8, 0), (RIGHT, 0.5, 0))
    (one,) = segment(nano, detector, [photo], [["cat"]], **options)
    assert ("cat", LEFT) not in rows_of(one)
    assert torch.equal(one.masks[0], masks[0])
    (two,) = segment(nano, Fixed((LEFT, 0.6, 0), (NEARLY_LEFT, 0.8, 1)), [photo], [["cat", "dog"]], **options)
    assert len(two) == 2
    (agnostic,) = segment(
        nano, Fixed((LEFT, 0.6, 0), (NEARLY_LEFT, 0.8, 1)), [photo], [["cat", "dog"]], agnostic_nms=True, **options
    )
    assert rows_of(agnostic) == [("dog", NEARLY_LEFT)]


def test_permuted_labels_permute_ids(owl: Owl, photo: np.ndarray) -> None:
    """Of OWLv2, whose queries do not see each other."""
    (one,), (other,) = (owl.detect([photo], [labels], 0.3) for labels in (["cat", "dog", "bus"], ["bus", "cat", "dog"]))
    assert torch.equal((one.label_ids + 1) % 3, other.label_ids)
    assert torch.equal(one.boxes, other.boxes)
    assert len({*one.label_ids.tolist()}) > 1
