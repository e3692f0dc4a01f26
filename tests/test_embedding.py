"""``ImageEmbedding``: kept, saved, sent to another process, refused by another model."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from comparison import assert_close_l2
from models import TINY, random_image, random_model
from safetensors.torch import save_file
from waiting import SECONDS

import sam
from sam import ImageEmbedding, Prompt, Sam
from sam.build_sam import NANO_CHECKPOINT
from sam.images.geometry import ImageGeometry

PROMPTS = [Prompt([(170, 115)], [1]), Prompt(box=(135, 85, 208, 148)), Prompt([(30, 40), (9, 9)], [1, 0])]


def test_encode_keeps_geometry_and_hashes(nano: Sam, photo: np.ndarray) -> None:
    embedding = nano.encode(photo)
    assert embedding.features.shape == (1, 256, 32, 32)
    assert embedding.geometry == ImageGeometry((300, 451), (341, 512), 512)
    assert embedding.model_hash == nano.model_hash
    assert embedding.model_name == "nano"
    assert embedding.image_hash == nano.encode(photo).image_hash
    changed = photo.copy()
    changed[100:120, 100:120] = 255 - changed[100:120, 100:120]
    assert nano.encode(changed).image_hash != embedding.image_hash
    with pytest.raises(dataclasses.FrozenInstanceError):
        embedding.features = embedding.features  # type: ignore[misc]


def test_encode_of_mixed_sizes_equals_one_by_one(nano: Sam, photo: np.ndarray) -> None:
    images = [photo, random_image(100, 333), random_image(512, 512, 1), random_image(64, 20)]
    for batch_size in (None, 3):
        for together, image in zip(nano.encode(images, batch_size), images, strict=True):
            alone = nano.encode(image)
            assert together.geometry == alone.geometry
            assert together.image_hash == alone.image_hash
            torch.testing.assert_close(together.features, alone.features, rtol=1e-4, atol=1e-4)
    assert nano.encode([]) == []


def test_saved_in_one_process_masks_in_another_are_bit_equal(tmp_path: Path, nano: Sam, photo: np.ndarray) -> None:
    embedding = nano.encode(photo)
    embedding.save(tmp_path / "photo.safetensors")
    expected = nano.predict(embedding, PROMPTS)
    script = """
import sys, numpy as np, torch, sam
torch.set_num_threads(int(sys.argv[3]))
embedding = sam.ImageEmbedding.load(sys.argv[1])
prompts = [sam.Prompt([(170, 115)], [1]), sam.Prompt(box=(135, 85, 208, 148)), sam.Prompt([(30, 40), (9, 9)], [1, 0])]
result = sam.load_model(device="cpu").predict(embedding, prompts)
np.savez(sys.argv[2], masks=result.masks, iou=result.iou_predictions, logits=result.low_res_logits)
"""
    arguments = [tmp_path / "photo.safetensors", tmp_path / "out.npz", str(torch.get_num_threads())]
    subprocess.run([sys.executable, "-c", script, *map(str, arguments)], check=True, timeout=SECONDS)
    result = np.load(tmp_path / "out.npz")
    np.testing.assert_array_equal(result["masks"], expected.masks)
    np.testing.assert_array_equal(result["iou"], expected.iou_predictions)
    np.testing.assert_array_equal(result["logits"], expected.low_res_logits)


def test_round_trip(tmp_path: Path, nano: Sam, photo: np.ndarray) -> None:
    embedding = nano.encode(photo)
    embedding.save(tmp_path / "e.safetensors")
    loaded = ImageEmbedding.load(tmp_path / "e.safetensors")
    for field in ("geometry", "model_hash", "model_name", "image_hash"):
        assert getattr(loaded, field) == getattr(embedding, field)
    assert torch.equal(loaded.features, embedding.features)
    assert os.listdir(tmp_path) == ["e.safetensors"]


def test_what_was_loaded_stays_when_its_file_changes(tmp_path: Path, nano: Sam, photo: np.ndarray) -> None:
    embedding, path = nano.encode(photo), tmp_path / "e.safetensors"
    embedding.save(path)
    loaded = ImageEmbedding.load(path)
    with path.open("r+b") as file:
        file.seek(-embedding.features.nbytes, os.SEEK_END)
        file.write(bytes(embedding.features.nbytes))
    assert torch.equal(loaded.features, embedding.features)


def test_half_precision_round_trip(tmp_path: Path, photo: np.ndarray) -> None:
    model = sam.load_model(device="cpu", dtype=torch.bfloat16)
    embedding = model.encode(photo)
    assert embedding.features.dtype == torch.bfloat16
    embedding.save(tmp_path / "e.safetensors")
    loaded = ImageEmbedding.load(tmp_path / "e.safetensors")
    expected, actual = model.predict(embedding, PROMPTS), model.predict(loaded, PROMPTS)
    assert actual.low_res_logits.dtype == torch.float32
    assert torch.equal(actual.low_res_logits, expected.low_res_logits)


def test_another_model_refuses(nano: Sam, photo: np.ndarray) -> None:
    tuned = sam.load_model(device="cpu")
    with torch.no_grad():
        tuned.mask_decoder.iou_token.weight[0, 0] += 1e-3
    embedding = nano.encode(photo)
    with pytest.raises(ValueError, match=f"made by model nano {nano.model_hash}, not by this model, nano "):
        tuned.predict(embedding, PROMPTS)
    other = random_model(TINY)
    with pytest.raises(ValueError, match=r"made by model nano .*, not by this model, custom "):
        other.predict(embedding, PROMPTS)
    half = sam.load_model(device="cpu", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"not by this model, nano"):
        half.predict(embedding, PROMPTS)
    same = sam.load_model(device="cpu")
    assert same.predict(embedding, PROMPTS).masks.any()


def test_features_of_unknown_origin_must_fit(nano: Sam, photo: np.ndarray) -> None:
    embedding = nano.encode(photo)
    wrong = ImageEmbedding(torch.zeros(1, 256, 64, 64), embedding.geometry)
    with pytest.raises(ValueError, match=r"features are \[1, 256, 32, 32\], got \[1, 256, 64, 64\]"):
        nano.predict(wrong, PROMPTS)
    square = ImageGeometry((300, 451), (682, 1024), 1024)
    with pytest.raises(ValueError, match=r"image of 1024 px, the model takes 512 px"):
        nano.predict(ImageEmbedding(embedding.features, square), PROMPTS)
    with pytest.raises(ValueError, match=r"features must be \[1, C, h, w\], got \[256, 32, 32\]"):
        ImageEmbedding(embedding.features[0], embedding.geometry)
    with pytest.raises(ValueError, match=r"the embedding is on meta, the model on cpu; use embedding.to\('cpu'\)"):
        nano.predict(embedding.to("meta"), PROMPTS)
    trusted = nano.predict(ImageEmbedding(embedding.features, embedding.geometry), PROMPTS)
    assert torch.equal(trusted.low_res_logits, nano.predict(embedding, PROMPTS).low_res_logits)


def test_damaged_and_foreign_files(tmp_path: Path, nano: Sam, photo: np.ndarray) -> None:
    path = tmp_path / "e.safetensors"
    with pytest.raises(FileNotFoundError, match="no such embedding"):
        ImageEmbedding.load(path)
    nano.encode(photo).save(path)
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[:100], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"e.safetensors is a damaged image embedding"):
            ImageEmbedding.load(path)
    save_file({"features": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"is not a saved image embedding \(format None\)"):
        ImageEmbedding.load(path)
    with pytest.raises(ValueError, match=r"is not a saved image embedding \(format 'pt'\)"):
        ImageEmbedding.load(NANO_CHECKPOINT)


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        ("[[300, 451], [341, 512], 512.5]", r"must be integers, got \[300, 451, 341, 512, 512.5\]"),
        ("[[300, Infinity], [341, 512], 512]", r"must be integers, got \[300, inf, 341, 512, 512\]"),
        ("[[300, 451], [341, 512], 128]", r"input_size \(341, 512\) does not fit the model's square of 128 px"),
        ("[[300], [341, 512], 512]", r"original_size must be \(height, width\) in pixels, got \(300,\)"),
        ("[[300, 451], 512]", "not enough values"),
        ("[300, 451, 512]", "must be an iterable, not int"),
        ("[[300, 451], [341, 512]", "delimiter"),
        ("[" * 100_000, ""),
        ("[[300, 451], [341, 512], 512]", r"features must be \[1, C, h, w\], got \[7\]"),
    ],
)
def test_damaged_metadata(tmp_path: Path, geometry: str, message: str) -> None:
    path = tmp_path / "e.safetensors"
    metadata = {"format": "sam-image-embedding-1", "model_hash": "", "model_name": "nano", "image_hash": ""}
    save_file({"features": torch.zeros(7)}, path, {**metadata, "geometry": geometry})
    with pytest.raises(ValueError, match=rf"e.safetensors is a damaged image embedding: .*{message}"):
        ImageEmbedding.load(path)


def test_resizing_on_the_device(tiny: Sam) -> None:
    """Opt-in, and close to Pillow's resize, which stays the default."""
    images = [random_image(40, 300), random_image(200, 90)]
    exact, fast = tiny.encode(images), tiny.encode(images, resize_on_device=True)
    for one, other in zip(exact, fast, strict=True):
        assert one.image_hash is not None
        assert other.image_hash is None
        assert one.geometry == other.geometry
        assert not one.features.equal(other.features)
        # A level of 8 bits is a fiftieth of the standard deviation that pixels are divided by.
        assert_close_l2(other.features, one.features, 0.05, "features")
    assert tiny.encode(images[0], resize_on_device=True).features.allclose(fast[0].features, atol=1e-5)


def test_its_text_is_one_short_line() -> None:
    embedding = random_model(TINY).encode(random_image(30, 40))
    shape = list(embedding.features.shape)
    expected = f"ImageEmbedding(30x40 image, model {embedding.model_name}, features {shape} float32 on cpu)"
    assert repr(embedding) == str(embedding) == expected


def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    """Are called as the caller called them, not by the name that is written first; nothing is left beside them."""
    embedding = random_model(TINY).encode(random_image(30, 40))
    (tmp_path / "file").touch()
    (tmp_path / "folder.safetensors").mkdir()
    for path, kind in (
        (tmp_path / "none" / "x.safetensors", FileNotFoundError),
        (tmp_path / "file" / "x.safetensors", FileNotFoundError),
        (tmp_path / "folder.safetensors", IsADirectoryError),
    ):
        with pytest.raises(kind, match=re.escape(str(path))) as refused:
            embedding.save(path)
        assert "partial" not in str(refused.value)
    assert {each.name for each in tmp_path.iterdir()} == {"file", "folder.safetensors"}
    with pytest.raises(IsADirectoryError, match="is a folder, not a saved image embedding"):
        ImageEmbedding.load(tmp_path)


@pytest.mark.parametrize("name", ["cuda:99", "abacus"])
def test_devices_that_are_not_there(name: str, tmp_path: Path) -> None:
    embedding = random_model(TINY).encode(random_image(30, 40))
    embedding.save(tmp_path / "x")
    message = f"torch cannot use device '{name}' here: "
    with pytest.raises(ValueError, match=message):
        embedding.to(name)
    with pytest.raises(ValueError, match=message):
        ImageEmbedding.load(tmp_path / "x", name)
    assert embedding.to("meta").device == torch.device("meta")
