"""One way from pixels to the encoder: every edge checks, resizes and hashes an image once, where it is given."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import TINY, random_image, random_model
from PIL import Image
from waiting import SECONDS

import sam
from sam import Sam, SamAutomaticMaskGenerator, SamPredictor
from sam.engine import Engine
from sam.images import CheckedImage, ImageGeometry, PreparedImage, prepare_image
from sam.images import prepare as preparation

IMAGE = random_image(30, 40)


@pytest.fixture(scope="module")
def model() -> Sam:
    return random_model(TINY)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(step, name of the thread) of each check, resize and hash."""
    done: list[tuple[str, str]] = []

    def counted(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def count(*args: Any, **kwargs: Any) -> Any:
            done.append((name, threading.current_thread().name))
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, count)

    counted(preparation, "validate_image")
    counted(preparation, "hash_image")
    counted(Image.Image, "resize")
    return done


def generate(model: Sam, **options: Any) -> None:
    SamAutomaticMaskGenerator(model, points_per_side=1, **options).generate(IMAGE)


def in_engine(model: Sam) -> None:
    with Engine(model) as engine:
        engine.embed(IMAGE).result(SECONDS)


EDGES: dict[str, tuple[Callable[[Sam], Any], Counter[str]]] = {
    "set_image": (lambda model: SamPredictor(model).set_image(IMAGE), Counter(validate_image=1, resize=1)),
    "encode": (lambda model: model.encode(IMAGE), Counter(validate_image=1, resize=1, hash_image=1)),
    "encode two": (lambda model: model.encode([IMAGE] * 2), Counter(validate_image=2, resize=2, hash_image=2)),
    "encode on device": (lambda model: model.encode(IMAGE, resize_on_device=True), Counter(validate_image=1)),
    "stream": (
        lambda model: list(sam.encode_stream(model, [IMAGE])),
        Counter(validate_image=1, resize=1, hash_image=1),
    ),
    "stream on device": (
        lambda model: list(sam.encode_stream(model, [IMAGE], resize_on_device=True)),
        Counter(validate_image=1),
    ),
    "engine": (in_engine, Counter(validate_image=1, resize=1, hash_image=1)),
    # The image and its crop, which is all of it, are checked.
    "generate": (generate, Counter(validate_image=2, resize=1)),
}


@pytest.mark.parametrize("edge", EDGES)
def test_each_step_is_done_once(model: Sam, steps: list[tuple[str, str]], edge: str) -> None:
    use, expected = EDGES[edge]
    use(model)
    assert Counter(name for name, _ in steps) == expected


def test_the_engines_thread_prepares_nothing(model: Sam, steps: list[tuple[str, str]]) -> None:
    in_engine(model)
    assert {thread for _, thread in steps} == {threading.current_thread().name}


def test_threads_of_a_stream_do_all_of_it(model: Sam, steps: list[tuple[str, str]]) -> None:
    list(sam.encode_stream(model, [IMAGE] * 3))
    assert len(steps) == 9
    assert all(thread.startswith("sam-stream") for _, thread in steps)


def test_a_prepared_image_is_encoded_as_its_pixels_are(model: Sam) -> None:
    prepared = prepare_image(IMAGE, model.image_geometry)
    expected = model.encode(IMAGE)
    one, (other, third) = model.encode(prepared), model.encode([prepared, IMAGE], batch_size=1)
    for result in (one, other, third):
        assert torch.equal(result.features, expected.features)
        assert (result.geometry, result.image_hash) == (expected.geometry, expected.image_hash)
    assert prepared.pixels.shape[:2] == expected.geometry.input_size
    assert prepared.is_resized


def test_an_image_that_the_device_resizes_is_kept_as_it_is(model: Sam) -> None:
    prepared = prepare_image(IMAGE[::-1], model.image_geometry, resize_on_device=True)
    assert not prepared.is_resized
    assert np.array_equal(prepared.pixels, IMAGE[::-1])
    expected = model.encode(IMAGE[::-1], resize_on_device=True)
    result = model.encode(prepared)
    assert torch.equal(result.features, expected.features)
    assert result.image_hash is None


def test_an_image_prepared_for_another_model_is_refused(model: Sam) -> None:
    other = prepare_image(IMAGE, lambda height, width: ImageGeometry.longest_side(height, width, 64))
    with pytest.raises(ValueError, match="image 1: an image prepared for 64 px does not suit this model"):
        model.encode([IMAGE, other])


def test_a_policy_decides_the_geometry() -> None:
    def square(height: int, width: int) -> ImageGeometry:
        return ImageGeometry((height, width), (32, 32), 32)

    checked = CheckedImage.of(IMAGE, square)
    assert checked.pixels is IMAGE
    prepared = checked.prepare()
    assert isinstance(prepared, PreparedImage)
    assert prepared.pixels.shape == (32, 32, 3)
    assert prepared.geometry.original_size == (30, 40)


def test_the_engine_takes_a_prepared_image(model: Sam) -> None:
    prepared = prepare_image(IMAGE, model.image_geometry)
    with Engine(model) as engine:
        keyed = engine.prepare(prepared)
        assert keyed.key == engine.prepare(IMAGE).key
        assert keyed.pixels is prepared.pixels
        for image in (prepared, keyed):
            assert torch.equal(engine.embed(image).result(SECONDS).features, model.encode(IMAGE).features)


def test_the_engine_refuses_an_image_that_it_cannot_encode(model: Sam) -> None:
    """Where it is given: in the engine's thread the error would be the model's, and end the engine."""
    other = prepare_image(IMAGE, lambda height, width: ImageGeometry.longest_side(height, width, 64))
    unresized = prepare_image(IMAGE, model.image_geometry, resize_on_device=True)
    with Engine(model) as engine:
        with pytest.raises(ValueError, match="an image prepared for 64 px does not suit this model"):
            engine.embed(other)
        with pytest.raises(ValueError, match="the engine takes images that are hashed"):
            engine.segment(unresized, [sam.Prompt([(5, 5)], [1])])
        assert engine.counters()["accepted"] == 0
