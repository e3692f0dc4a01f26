"""Many images one after another."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from models import TINY, random_image, random_model
from PIL import Image

import sam
from sam import Prompt, Sam
from sam.system.device_profile import preparing_threads

SIZES = ((40, 60), (60, 40), (48, 48), (33, 90), (20, 21))


@pytest.fixture(scope="module")
def model() -> Sam:
    return random_model(TINY)


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return [random_image(*size, seed=i) for i, size in enumerate(SIZES)]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_embeddings_are_those_of_encode(model: Sam, images: list[np.ndarray], batch_size: int) -> None:
    result = list(sam.encode_stream(model, iter(images), batch_size=batch_size))
    expected = model.encode(images, batch_size=batch_size)
    assert len(result) == len(expected) == len(SIZES)
    for one, other in zip(result, expected, strict=True):
        assert torch.equal(one.features, other.features)
        assert (one.geometry, one.image_hash, one.model_hash) == (other.geometry, other.image_hash, other.model_hash)


def test_predictions_are_those_of_predict(model: Sam, images: list[np.ndarray]) -> None:
    prompts = [[Prompt([[5 + i, 9]], [1])] * (1 + i % 2) for i in range(len(images))]
    result = list(sam.predict_stream(model, zip(images, prompts, strict=True), multimask_output=False))
    assert len(result) == len(images)
    for image, requests, prediction in zip(images, prompts, result, strict=True):
        expected = model.predict(model.encode(image), requests, multimask_output=False)
        assert torch.equal(prediction.masks, expected.masks)
        assert torch.equal(prediction.iou_predictions, expected.iou_predictions)
        assert torch.equal(prediction.low_res_logits, expected.low_res_logits)


def test_files(model: Sam, images: list[np.ndarray], tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    for one, image in zip(sam.encode_stream(model, paths), images, strict=True):
        assert torch.equal(one.features, model.encode(image).features)


def test_nothing_to_do(model: Sam) -> None:
    assert list(sam.encode_stream(model, [])) == []
    assert list(sam.predict_stream(model, [])) == []


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_bad_image_raises_in_its_place(model: Sam, images: list[np.ndarray], batch_size: int) -> None:
    stream = sam.encode_stream(model, [*images[:3], images[3][..., 0], images[4]], batch_size=batch_size)
    got = [next(stream) for _ in range(3)]
    assert [embedding.geometry.original_size for embedding in got] == list(SIZES[:3])
    with pytest.raises(ValueError, match="image 3: the image must be"):
        next(stream)


def test_predictions_before_a_bad_image_arrive(model: Sam, images: list[np.ndarray]) -> None:
    requests = [(image, [Prompt([[3, 4]], [1])]) for image in (*images[:2], np.zeros((3, 3)))]
    stream = sam.predict_stream(model, requests)
    assert [next(stream).masks.shape[-2:] for _ in range(2)] == [torch.Size(size) for size in SIZES[:2]]
    with pytest.raises(ValueError, match="image 2: the image must be"):
        next(stream)


def test_a_missing_file_and_a_failing_source(model: Sam, images: list[np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=r"image 0: .* is a folder, not an image"):
        next(sam.encode_stream(model, [tmp_path]))
    with pytest.raises(FileNotFoundError, match=r"image 0: no such image: nowhere\.png"):
        next(sam.encode_stream(model, ["nowhere.png"]))

    def failing() -> Iterator[np.ndarray]:
        yield from images[:2]
        raise RuntimeError("the disk is gone")

    stream = sam.encode_stream(model, failing())
    assert len([next(stream), next(stream)]) == 2
    with pytest.raises(RuntimeError, match="the disk is gone"):
        next(stream)


def test_bad_numbers(model: Sam) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        next(sam.encode_stream(model, [], batch_size=0))


def test_it_reads_ahead_and_no_further(model: Sam, images: list[np.ndarray]) -> None:
    taken = 0

    def source() -> Iterator[np.ndarray]:
        nonlocal taken
        while True:
            taken += 1
            yield images[taken % len(images)]

    stream = sam.encode_stream(model, source(), batch_size=2, batches_ahead=3)
    next(stream)
    assert taken == 2 + 6
    for _ in range(4):
        next(stream)
    assert taken == 6 + 6
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sam-stream")]


def test_images_resized_on_the_device(model: Sam, images: list[np.ndarray]) -> None:
    result = list(sam.encode_stream(model, images, batch_size=2, resize_on_device=True))
    for one, other in zip(result, model.encode(images, batch_size=2, resize_on_device=True), strict=True):
        assert torch.equal(one.features, other.features)
        assert one.image_hash is None


def test_as_many_threads_as_the_model_leaves_cores_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores in (1, 3, 64):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, cores=cores: set(range(cores)), raising=False)
        assert preparing_threads(torch.device("cpu")) == 2
        assert preparing_threads(torch.device("cuda")) == min(8, cores)
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert preparing_threads(torch.device("cuda")) == 1
