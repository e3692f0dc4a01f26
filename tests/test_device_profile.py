"""How many of everything a device takes at a time stands in one table, which every caller asks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import TINY, random_image, random_model
from torch import Tensor

import sam
from sam import Prompt, Sam, SamAutomaticMaskGenerator
from sam.embedding import ImageFeatures
from sam.engine import Engine
from sam.inference import predict
from sam.system import device_profile as profiles

IMAGES = [random_image(20, 30, seed) for seed in range(3)]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Sam:
    """A model on a CPU that takes two images and one prompt at a time."""
    profile = replace(profiles.device_profile(torch.device("cpu")), images_per_pass=2, prompts_per_chunk=1)
    monkeypatch.setattr(profiles, "_CPU", profile)
    return random_model(TINY)


def test_every_way_to_encode_takes_as_many_images(model: Sam, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    features = model.image_features

    def counted(pixels: Tensor) -> ImageFeatures:
        passes.append(len(pixels))
        return features(pixels)

    monkeypatch.setattr(model, "image_features", counted)
    for encode in (
        lambda: model.encode(IMAGES),
        lambda: list(sam.encode_stream(model, IMAGES)),
        lambda: SamAutomaticMaskGenerator(model, points_per_side=1).generate_batch(IMAGES),
    ):
        passes.clear()
        encode()
        assert passes == [2, 1]
    with Engine(model) as engine:
        assert engine.max_images == 2


def test_the_decoder_takes_as_many_prompts(model: Sam, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks: list[int] = []
    decode_chunk = predict.decode_chunk

    def counted(model, parts, embeddings, batch, multimask_output):  # type: ignore[no-untyped-def]
        chunks.append(len(batch))
        return decode_chunk(model, parts, embeddings, batch, multimask_output)

    monkeypatch.setattr(predict, "decode_chunk", counted)
    model.predict(model.encode(IMAGES[0]), [Prompt([(5, 5)], [1])] * 3)
    assert chunks == [1, 1, 1]


def test_a_cpu_has_a_profile_and_whatever_is_none_has_another() -> None:
    cpu, gpu, other = (profiles.device_profile(torch.device(name)) for name in ("cpu", "cuda", "mps"))
    assert cpu != gpu == other
    assert (cpu.images_per_pass, gpu.images_per_pass) == (1, 8)
