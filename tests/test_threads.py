"""One generator in many threads answers each for its image; one predictor does, or says that it is not for sharing."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from comparison import assert_close_l2
from models import TINY, TINY_2, random_image, random_model
from waiting import SECONDS

from sam import Sam, SamAutomaticMaskGenerator, SamPredictor
from sam.embedding import ImageFeatures
from sam.sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator
from sam.sam2.sam2_image_predictor import SAM2ImagePredictor

IMAGES = [random_image(60, 80, seed=1), random_image(50, 40, seed=2)]
ALL = {"pred_iou_thresh": -1.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0, "crop_nms_thresh": 1.0}


@pytest.fixture(scope="module")
def model() -> Sam:
    return random_model(TINY)


def in_threads(function: Callable[[np.ndarray], Any]) -> list[Any]:
    """What ``function`` returns or raises for each image, all at once."""
    with ThreadPoolExecutor(len(IMAGES)) as pool:
        futures = [pool.submit(function, image) for image in IMAGES]
        return [future.exception(SECONDS) or future.result() for future in futures]


def same(ours: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    """Whether both are of one image; libraries add in another order where cores are taken, which moves few pixels."""
    return len(ours) == len(expected) > 0 and all(
        a["segmentation"].shape == b["segmentation"].shape
        and (a["segmentation"] == b["segmentation"]).mean() > 0.99
        and np.abs(np.subtract(a["bbox"], b["bbox"])).max() <= 2
        for a, b in zip(ours, expected, strict=True)
    )


def assert_same_logits(result: np.ndarray, expected: np.ndarray) -> None:
    assert_close_l2(torch.from_numpy(result), torch.from_numpy(expected), 1e-5, "logits")


WAYS: dict[str, tuple[dict[str, Any], Callable[[SamAutomaticMaskGenerator, np.ndarray], Any]]] = {
    "generate": ({}, lambda generator, image: generator.generate(image)),
    "with crops": ({"crop_n_layers": 1}, lambda generator, image: generator.generate(image)),
    "generate_batch": ({}, lambda generator, image: generator.generate_batch([image, image])[1]),
    "several at once": ({"resize_on_device": True}, lambda generator, image: generator.generate(image)),
}


@pytest.mark.parametrize("way", WAYS)
def test_one_generator_in_two_threads(model: Sam, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both threads have set their image before either reads what was made of it."""
    options, call = WAYS[way]
    calls: list[tuple[int, int]] = []
    shared = SamAutomaticMaskGenerator(
        model, points_per_side=2, progress=lambda *done: calls.append(done), **ALL, **options
    )
    expected = [call(shared, image) for image in IMAGES]
    before = sorted(calls)
    calls.clear()
    meet, features = threading.Barrier(2, timeout=SECONDS), Sam.image_features

    def image_features(self: Sam, pixels: torch.Tensor) -> ImageFeatures:
        result = features(self, pixels)
        meet.wait()
        return result

    monkeypatch.setattr(Sam, "image_features", image_features)
    for ours, alone in zip(in_threads(lambda image: call(shared, image)), expected, strict=True):
        assert same(ours, alone), ours
    assert sorted(calls) == before


class OfCrops(SamAutomaticMaskGenerator):
    """As a program's subclass, for which the official loop runs."""

    def _process_crop(self, *args: Any) -> Any:
        return super()._process_crop(*args)


class OfCrops2(SAM2AutomaticMaskGenerator):
    def _process_crop(self, *args: Any) -> Any:
        return super()._process_crop(*args)


@pytest.mark.parametrize("change", ["set_image of the class", "_process_crop", "SAM 2", "of two generators"])
def test_the_official_loop_in_two_threads(model: Sam, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass has its predictor for itself; without that both have set their image before either is asked about it."""
    is_sam2 = change == "SAM 2"
    predictor = SAM2ImagePredictor if is_sam2 else SamPredictor
    kinds = {"_process_crop": OfCrops, "SAM 2": OfCrops2}
    kind, options = kinds.get(change, SamAutomaticMaskGenerator), {"points_per_side": 2, **ALL}
    shared = kind(random_model(TINY_2) if is_sam2 else model, **options)
    generators = [shared, kind(shared.predictor.model, **options) if change == "of two generators" else shared]
    generators[1].predictor = shared.predictor
    expected = [kind(shared.predictor.model, **options).generate(image) for image in IMAGES]
    meet, set_image = threading.Barrier(2, timeout=0.2), predictor.set_image

    def slowly(self: Any, image: np.ndarray, *args: Any) -> None:
        set_image(self, image, *args)
        with suppress(threading.BrokenBarrierError):  # as it is where one waits for the other
            meet.wait()

    monkeypatch.setattr(predictor, "set_image", slowly)
    found = in_threads(lambda image: generators[image is IMAGES[1]].generate(image))
    for ours, alone in zip(found, expected, strict=True):
        assert same(ours, alone), ours


def test_a_predictor_of_a_users_own_is_still_asked(model: Sam, monkeypatch: pytest.MonkeyPatch) -> None:
    """A subclass and a patched instance; the image that was set on it before is gone, as officially."""
    seen: list[tuple[int, ...]] = []

    class Counting(SamPredictor):
        def set_image(self, image: np.ndarray, image_format: str = "RGB") -> None:
            seen.append(image.shape)
            super().set_image(image, image_format)

    generator = SamAutomaticMaskGenerator(model, points_per_side=1, **ALL)
    expected = generator.generate(IMAGES[0])
    generator.predictor = Counting(model)
    generator.predictor.set_image(IMAGES[1])
    assert same(generator.generate(IMAGES[0]), expected)
    assert seen == [IMAGES[1].shape, IMAGES[0].shape]
    assert generator.predictor.features is None
    official = generator.predictor.set_image
    monkeypatch.setattr(generator.predictor, "set_image", lambda image: [seen.append((0,)), official(image)])
    assert same(generator.generate(IMAGES[0]), expected)
    assert seen[2:] == [(0,), IMAGES[0].shape]


def test_one_predictor_in_two_threads(model: Sam, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one thread sets an image the others get an error, not masks of another image."""
    predictor = SamPredictor(model)
    predictor.set_image(IMAGES[0])
    before = predictor.predict()[2]
    inside, go_on, encode = threading.Event(), threading.Event(), model.image_features

    def image_features(pixels: torch.Tensor) -> ImageFeatures:
        inside.set()
        assert go_on.wait(SECONDS)
        return encode(pixels)

    monkeypatch.setattr(model, "image_features", image_features)
    with ThreadPoolExecutor(1) as pool:
        setting = pool.submit(predictor.set_image, IMAGES[1])
        assert inside.wait(SECONDS)
        try:
            for call in (
                lambda: predictor.set_image(IMAGES[0]),
                predictor.predict,
                lambda: predictor.predict_torch(None, None),
                predictor.get_image_embedding,
            ):
                with pytest.raises(
                    RuntimeError, match="another thread is setting an image on this SamPredictor: use one"
                ):
                    call()
            alone = copy.copy(predictor)  # has the image that was set, and is its own
            assert_same_logits(alone.predict()[2], before)
        finally:
            go_on.set()
        setting.result(SECONDS)
    assert predictor.original_size == IMAGES[1].shape[:2]
    after = predictor.predict()[2]
    assert np.abs(after - before).max() > 0.1
    for logits in in_threads(lambda image: predictor.predict()[2]):  # about one image all may ask
        assert_same_logits(logits, after)


def test_a_failure_while_an_image_is_set_leaves_the_predictor_usable(
    model: Sam, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = SamPredictor(model)
    with monkeypatch.context() as patch:
        patch.setattr(model, "image_features", lambda pixels: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            predictor.set_image(IMAGES[0])
    with pytest.raises(RuntimeError, match="no image is set"):
        predictor.predict()
    predictor.set_image(IMAGES[0])
    assert predictor.is_image_set


def test_copies_of_a_predictor(model: Sam) -> None:
    predictor = SamPredictor(model)
    predictor.set_image(IMAGES[0])
    expected = predictor.predict()[2]
    for other in (copy.copy(predictor), copy.deepcopy(predictor), pickle.loads(pickle.dumps(predictor))):
        assert_same_logits(other.predict()[2], expected)
        other.set_image(IMAGES[1])
    assert_same_logits(predictor.predict()[2], expected)
