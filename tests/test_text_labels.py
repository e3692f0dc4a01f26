"""What text prompts refuse, by name, and how detectors load: whole, offline, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sam
from sam.text import Detections, GroundingDino, Owl, load_detector, segment

pytest.importorskip("transformers", reason="text prompts need transformers")
import text_models

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def dino() -> GroundingDino:
    return GroundingDino(*text_models.grounding_dino())


@pytest.fixture(scope="module")
def owl() -> Owl:
    return Owl(*text_models.owl())


@pytest.fixture(scope="module")
def folder(dino: GroundingDino, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector as transformers saves it."""
    path = tmp_path_factory.mktemp("detector")
    dino.model.save_pretrained(path)
    dino.processor.save_pretrained(path)
    return path


class Nothing:
    def detect(self, images: Any, labels: Any, threshold: float) -> list[Detections]:
        empty = torch.empty(0)
        return [Detections(empty.reshape(0, 4), empty, empty.long()) for _ in images]


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"labels": [[]]}, ValueError, r"labels\[0\] must hold at least one label, got none"),
    ({"labels": ["cat"]}, TypeError, r"labels must be a list of labels for each image, got \['cat'\]"),
    ({"labels": "cat"}, TypeError, "labels must be a list of labels for each image, got 'cat'"),
    ({"labels": [["cat"], ["dog"]]}, ValueError, "1 images need as many lists of labels, got 2"),
    ({"labels": [["cat", "  "]]}, ValueError, r"a label of labels\[0\] must have text, got '  '"),
    ({"labels": [["cat", 3]]}, TypeError, r"a label of labels\[0\] must be a str, got int"),
    (
        {"labels": [["red car", "Red  Car"]]},
        ValueError,
        r"labels\[0\] must differ from each other, got 'Red  Car' twice",
    ),
    ({"negative_labels": ["CAT"]}, ValueError, r"negative_labels has 'cat', which labels\[0\] asks for"),
    ({"negative_labels": "dog"}, TypeError, "negative_labels must be a list of labels, got one str 'dog'"),
    ({"threshold": 1.5}, ValueError, "threshold must lie in 0..1, got 1.5"),
    ({"threshold": float("nan")}, ValueError, "threshold must lie in 0..1, got nan"),
    ({"threshold": "0.3"}, TypeError, "threshold must be a number in 0..1, got str '0.3'"),
    ({"thresholds": {"dog": 0.4}}, ValueError, "thresholds has 'dog', which is no label of any image"),
    ({"thresholds": {"cat": -1}}, ValueError, r"thresholds\['cat'\] must lie in 0..1, got -1"),
    ({"thresholds": [0.4]}, TypeError, "thresholds must be a mapping of labels to numbers, got list"),
    ({"nms_thresh": 2}, ValueError, "nms_thresh must lie in 0..1, got 2"),
    ({"mask_nms_thresh": -0.5}, ValueError, "mask_nms_thresh must lie in 0..1, got -0.5"),
    ({"within": [(5, 5, 1, 1)]}, ValueError, r"within\[0\]: box must be x0, y0, x1, y1 with x0 <= x1"),
    ({"within": [None, None]}, ValueError, "1 images need as many boxes in within, got 2"),
    ({"images": IMAGE}, TypeError, "images must be a list of images, got a single one"),
    ({"images": [IMAGE[..., 0]]}, ValueError, r"images\[0\]: the image must be \[H, W, 3\]"),
    ({"detector": object()}, TypeError, "detector must be a detector, an object with a method detect, got object"),
]


@pytest.mark.parametrize(("wrong", "kind", "message"), REFUSED, ids=[message[:60] for _, _, message in REFUSED])
def test_what_is_wrong_is_named(wrong: dict[str, Any], kind: type[Exception], message: str, nano: sam.Sam) -> None:
    asked = {"detector": Nothing(), "images": [IMAGE], "labels": [["cat"]], **wrong}
    with pytest.raises(kind, match=message):
        segment(nano, asked.pop("detector"), asked.pop("images"), asked.pop("labels"), **asked)


def test_a_detector_that_loses_an_image_is_caught(nano: sam.Sam) -> None:
    class Careless(Nothing):
        def detect(self, images: Any, labels: Any, threshold: float) -> list[Detections]:
            return super().detect(images[1:], labels, threshold)

    with pytest.raises(ValueError, match="the detector gave 1 results for 2 images"):
        segment(nano, Careless(), [IMAGE, IMAGE], [["cat"], ["cat"]])


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("st. bernard", r"label 'st\. bernard' must not hold '\.': captions are cut there"),
        ("cat?", r"label 'cat\?' must not hold '\?': captions are cut there"),
        (" ".join(["cat"] * 126), "label 'cat cat .* has 126 tokens, the detector takes 125 at most"),
    ],
)
def test_grounding_dino_names_the_label_that_it_cannot_take(dino: GroundingDino, label: str, message: str) -> None:
    before = dino.passes
    with pytest.raises(ValueError, match=message):
        dino.detect([IMAGE], [["dog", label]], 0.3)
    assert dino.passes == before


def test_captions_are_filled_and_never_cut_a_label(dino: GroundingDino) -> None:
    captions = dino.tokens(["cat"] + ["red traffic light"] * 31 + [" ".join(["dog"] * 125), "bus"])
    assert [len(caption.spans) for caption in captions] == [32, 1, 1]
    assert max(len(caption.tokens) for caption in captions) == 128
    tokenizer = dino.processor.tokenizer
    text = "cat. " + " ".join(["red traffic light."] * 31)
    assert captions[0].tokens == tokenizer(text)["input_ids"]
    assert [place for caption in captions for place, *_ in caption.spans] == list(range(34))


def test_owl_takes_any_sign_and_names_what_is_too_long(owl: Owl) -> None:
    assert len(owl.detect([IMAGE], [["st. b?"]], 0.0)[0]) == 36
    with pytest.raises(ValueError, match="label 'a traffic light of' has 17 tokens, the detector takes 16 at most"):
        owl.detect([IMAGE], [["cat", "a traffic light of"]], 0.3)


def test_a_thousand_labels(dino: GroundingDino) -> None:
    labels = [f"{first} {second}" for first in text_models.NUMBERED[:25] for second in text_models.NUMBERED[:40]]
    before = dino.passes
    (found,) = dino.detect([IMAGE], [labels], 0.0)
    assert dino.passes - before == 24  # 42 of three tokens a caption
    assert len(found) == 24 * 30
    assert int(found.label_ids.max()) > 950


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"score": "median"}])
def test_options_of_detectors(dino: GroundingDino, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        GroundingDino(dino.model, dino.processor, **wrong)


def test_a_tokenizer_of_another_vocabulary_is_refused(dino: GroundingDino, owl: Owl) -> None:
    with pytest.raises(ValueError, match=r"must have BERT's tokens \(101, 102, 1012, 1029\), this tokenizer has"):
        GroundingDino(dino.model, owl.processor)


def test_a_saved_folder_loads_offline_as_it_was(dino: GroundingDino, folder: Path) -> None:
    loaded = load_detector(folder, device="cpu", score="mean", batch_size=3)
    assert isinstance(loaded, GroundingDino)
    assert (loaded.score, loaded.batch_size) == ("mean", 3)
    loaded.score = "max"
    (one,), (other,) = (each.detect([IMAGE], [["cat", "red car"]], 0.0) for each in (dino, loaded))
    assert torch.equal(one.boxes, other.boxes)
    assert torch.equal(one.scores, other.scores)


def test_a_saved_owl_loads(owl: Owl, tmp_path: Path) -> None:
    owl.model.save_pretrained(tmp_path)
    owl.processor.save_pretrained(tmp_path)
    loaded = load_detector(tmp_path, device="cpu")
    assert isinstance(loaded, Owl)
    (one,), (other,) = (each.detect([IMAGE], [["cat", "red car"]], 0.0) for each in (owl, loaded))
    assert torch.equal(one.scores, other.scores)
    assert torch.equal(one.boxes, other.boxes)


def changed(folder: Path, target: Path, weights: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    state = load_file(target / "model.safetensors")
    weights(state)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_weights_that_are_missing_or_of_another_shape_are_named(folder: Path, tmp_path: Path) -> None:
    key = "model.text_projection.weight"
    (tmp_path / "less").mkdir()
    less = changed(folder, tmp_path / "less", lambda state: state.pop(key))
    with pytest.raises(sam.CheckpointError, match=r"less has no weights for model\.text_projection\.weight$"):
        load_detector(less, device="cpu")
    (tmp_path / "other").mkdir()
    other = changed(folder, tmp_path / "other", lambda state: state.update({key: state[key][:, :3].clone()}))
    with pytest.raises(sam.CheckpointError, match=r"other.*(shape|size)"):
        load_detector(other, device="cpu")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "sam3"}, "is SAM 3, which takes text by itself: it is no detector, and not read here"),
        ({"model_type": "sam3_video"}, "is SAM 3"),
        (
            {"model_type": "yolos"},
            "a detector must be one of grounding-dino, mm-grounding-dino, owlv2, .* says model_type",
        ),
        ([], "model_type None"),
        ("{", "Expecting"),
    ],
)
def test_folders_of_other_models_are_named(config: Any, message: str, tmp_path: Path) -> None:
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(sam.CheckpointError, match=message):
        load_detector(tmp_path)


def test_nothing_is_downloaded_unasked(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no such folder: IDEA/tiny; download=True takes it for a name on the Hub"
    ):
        load_detector("IDEA/tiny")
    with pytest.raises(sam.CheckpointError, match=r"is no detector as transformers saves it: it has no config.json"):
        load_detector(tmp_path)
