"""The order of a prompt's tokens, with and without SAM 2's corners first, and the geometry of stretched images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comparison import assert_close_l2

from fastsam_kernels import mask_statistics, packed_masks, preprocess_image
from sam import ImageEmbedding, Prompt
from sam.embedding import ImageFeatures
from sam.images import CheckedImage, ImageGeometry
from sam.masks.upscale import masks_from_logits, resizing_of, upscale_masks
from sam.prompts.batch import PromptBatch, ragged_chunks
from sam.prompts.layout import PromptLayout

POINTS_FIRST, BOX_FIRST = PromptLayout.POINTS_FIRST, PromptLayout.BOX_FIRST
CLICKS, BOX = {"points": [(10, 20), (30, 40)], "labels": [1, 0]}, {"box": (1, 2, 3, 4)}
# Parts of a prompt, the layout, and the labels of its tokens.
LABELS = [
    ({}, POINTS_FIRST, []),
    (CLICKS, POINTS_FIRST, [1, 0, -1]),
    (BOX, POINTS_FIRST, [2, 3]),
    (CLICKS | BOX, POINTS_FIRST, [1, 0, 2, 3]),
    ({}, BOX_FIRST, []),
    (CLICKS, BOX_FIRST, [1, 0, -1]),
    (BOX, BOX_FIRST, [2, 3, -1]),
    (CLICKS | BOX, BOX_FIRST, [2, 3, 1, 0, -1]),
]
PLACES = {2: (1, 2), 3: (3, 4), 1: (10, 20), 0: (30, 40), -1: (0, 0)}


@pytest.mark.parametrize(("parts", "layout", "labels"), LABELS)
def test_tokens_of_a_prompt(parts: dict, layout: PromptLayout, labels: list[int]) -> None:
    geometry = ImageGeometry.stretched(50, 100, 200)
    coords, found = Prompt(**parts).tokens(geometry, layout)
    assert found.tolist() == labels
    np.testing.assert_allclose(coords, np.array([PLACES[label] for label in labels]).reshape(-1, 2) * (2, 4))

    one = {name: torch.tensor([value], dtype=torch.float32) for name, value in parts.items()}
    points = (one["points"], one["labels"]) if "points" in one else None
    batch = PromptBatch.from_tensors(points, one.get("box"), None, torch.device("cpu"), layout)
    assert batch.labels.tolist() == [labels]
    assert batch.coords[0].tolist() == [list(PLACES[label]) for label in labels]
    assert batch.is_of_one_kind(layout)

    given, boxes = batch.points_and_boxes(layout)  # what the official prompt encoder is called with
    if layout is BOX_FIRST:
        assert boxes is None
        assert (given is None) == (not labels)
        assert given is None or given[1].tolist() == [labels[:-1]]
    else:
        assert (boxes is None) == ("box" not in parts)
        assert (given is None) == ("points" not in parts)
        assert given is None or given[1].tolist() == [[1, 0]]


def test_ragged_prompts_keep_the_layout() -> None:
    geometry = ImageGeometry.stretched(50, 100, 200)
    prompts = [Prompt(**CLICKS), Prompt(**BOX), Prompt(**CLICKS, **BOX)]
    [chunk] = ragged_chunks([prompts], [geometry], torch.device("cpu"), 8, BOX_FIRST)
    rows = dict(zip(chunk.positions, chunk.batch.labels.tolist(), strict=True))
    assert rows == {0: [1, 0, -1, -2, -2], 1: [2, 3, -1, -2, -2], 2: [2, 3, 1, 0, -1]}
    assert not chunk.batch.is_of_one_kind(BOX_FIRST)


def test_corners_are_points_of_sam_2_only() -> None:
    points = torch.zeros(1, 2, 2), torch.tensor([[2, 3]])
    batch = PromptBatch.from_tensors(points, None, None, torch.device("cpu"), BOX_FIRST)
    assert batch.labels.tolist() == [[2, 3, -1]]
    with pytest.raises(ValueError, match=r"labels must be 1 .* or -1 \(padding\), got 2"):
        PromptBatch.from_tensors(points, None, None, torch.device("cpu"), POINTS_FIRST)
    with pytest.raises(ValueError, match=r"or 2 and 3 \(corners of a box\), got 4"):
        PromptBatch.from_tensors((points[0], points[1] + 1), None, None, torch.device("cpu"), BOX_FIRST)


@pytest.mark.parametrize("size", [(37, 90), (64, 64), (150, 41)])
def test_one_resize_of_a_stretched_image(size: tuple[int, int]) -> None:
    geometry, logits = ImageGeometry.stretched(*size, 256), torch.randn(2, 3, 64, 64)
    assert geometry.scale == (256 / size[1], 256 / size[0])
    truth = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    assert torch.equal(upscale_masks(logits, geometry), truth)
    assert torch.equal(masks_from_logits(logits, geometry, 0.3), truth > 0.3)
    resizing, flat = resizing_of(geometry, (64, 64)), logits.flatten(0, 1)
    packed = packed_masks(flat, resizing, threshold=0.3).numpy().astype("<i4").view(np.uint8)
    bits = np.unpackbits(packed, axis=2, bitorder="little", count=size[0]).transpose(0, 2, 1)
    wrong = bits != (truth.flatten(0, 1) > 0.3).numpy()
    assert wrong.mean() < 1e-4  # a pixel within rounding of the threshold may fall either way
    area = mask_statistics(flat, resizing, threshold=0.3).area
    assert np.abs(area.numpy() - bits.sum(axis=(1, 2), dtype=np.int64)).max() <= 1


def test_a_stretched_geometry_fills_its_square() -> None:
    with pytest.raises(ValueError, match=r"a stretched image fills its square of 64 px, got \(64, 32\)"):
        ImageGeometry((10, 10), (64, 32), 64, is_stretched=True)
    with pytest.raises(ValueError, match="the image is empty: 0x3"):
        ImageGeometry.stretched(0, 3, 64)


def test_pixels_of_a_stretched_image() -> None:
    """They go to the device as they are, with their hash, and are resized in floating point there."""
    image = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    checked = CheckedImage.of(image, lambda height, width: ImageGeometry.stretched(height, width, 32))
    prepared = checked.prepare()
    assert not prepared.is_resized
    assert np.array_equal(prepared.pixels, image)
    assert prepared.image_hash is not None
    assert checked.prepare(resize_on_device=True).image_hash is None
    mean, std = torch.tensor([3.0, 4, 5]).view(3, 1, 1), torch.tensor([2.0, 6, 7]).view(3, 1, 1)
    found = preprocess_image(torch.from_numpy(image), prepared.geometry.input_size, 32, mean, std)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    truth = (F.interpolate(pixels, (32, 32), mode="bilinear", antialias=True)[0] - mean) / std
    assert_close_l2(found, truth, 1e-6, "pixels")


def test_features_of_finer_grids_go_with_an_embedding(tmp_path) -> None:
    maps = torch.randn(2, 8, 4, 4), (torch.randn(2, 1, 16, 16), torch.randn(2, 2, 8, 8))
    rows = ImageFeatures(*maps).rows()
    assert [row.embedding.data_ptr() for row in rows] != [maps[0].data_ptr()] * 2
    for index, row in enumerate(rows):
        for found, whole in zip((row.embedding, *row.high_res), (maps[0], *maps[1]), strict=True):
            assert torch.equal(found, whole[index : index + 1])

    embedding = ImageEmbedding(rows[0].embedding, ImageGeometry.stretched(30, 40, 64), high_res=rows[0].high_res)
    assert embedding.nbytes == 4 * (8 * 16 + 256 + 2 * 64)
    embedding.save(tmp_path / "of.safetensors")
    read = ImageEmbedding.load(tmp_path / "of.safetensors")
    assert read.geometry == embedding.geometry
    assert read.geometry.is_stretched
    assert all(map(torch.equal, (read.features, *read.high_res), (embedding.features, *embedding.high_res)))
    moved = embedding.to("cpu")
    assert all(map(torch.equal, moved.high_res, embedding.high_res))
