"""Wrong types at the public edges are a ``TypeError`` that says the wanted one; an empty list is an empty array."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from argument_edges import EDGES, IMAGE, IMAGE_EDGES, TRANSFORM, generator, predictor
from models import TINY, random_model
from PIL import Image

import sam
from sam import Prompt, Sam, SamAutomaticMaskGenerator, SamPredictor
from sam.engine import Engine


@pytest.fixture(scope="module")
def model() -> Sam:
    return random_model(TINY)


NOT_IMAGES = [
    (Image.fromarray(IMAGE), TypeError, "numpy array .*got Image"),
    (torch.zeros(3, 30, 40), TypeError, "numpy array .*got Tensor"),
    (IMAGE.tolist(), TypeError, "numpy array .*got list"),
    (None, TypeError, "numpy array .*got NoneType"),
    (IMAGE > 99, TypeError, r"must be uint8 in 0\.\.255, or floating-point in 0\.\.1, got bool"),
    (IMAGE.astype(np.int64), TypeError, "must be uint8 .*got int64"),
    (IMAGE.astype(np.uint16), TypeError, "must be uint8 .*got uint16"),
    (IMAGE * 1j, TypeError, "must be uint8 .*got complex"),
    (IMAGE.astype(object), TypeError, "must be uint8 .*got object"),
    (
        IMAGE.astype(float),
        ValueError,
        r"must lie in 0\.\.1, got values from \d+ to 25\d; pixels in 0\.\.255 are wanted",
    ),
    (IMAGE / 255 - 0.5, ValueError, r"must lie in 0\.\.1, got values from -0\.\d+ to 0\.\d+"),
    (np.full((30, 40, 3), np.nan), ValueError, r"must lie in 0\.\.1, got values from nan to nan"),
    (np.full((30, 40, 3), np.inf), ValueError, r"must lie in 0\.\.1, got values from inf to inf"),
    (np.zeros((0, 40, 3)), ValueError, "the image is empty: 0x40"),
    (np.zeros((30, 40, 5), np.uint8), ValueError, r"must be .*got \[30, 40, 5\]"),
]


@pytest.mark.parametrize(("image", "kind", "message"), NOT_IMAGES)
@pytest.mark.parametrize("edge", IMAGE_EDGES)
def test_not_an_image(model: Sam, edge: str, image: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        IMAGE_EDGES[edge](model, image)


def test_a_path_is_an_image_of_a_stream_only(model: Sam) -> None:
    with pytest.raises(TypeError, match=r"numpy array .*got str"):
        SamPredictor(model).set_image("a.png")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"no such image: a\.png"):
        list(sam.encode_stream(model, ["a.png"]))


@pytest.mark.filterwarnings("error")  # torch warns of arrays that cannot be written
def test_images_of_other_dtypes_and_layouts_are_the_same_image(model: Sam) -> None:
    frozen = IMAGE.copy()
    frozen.flags.writeable = False
    wide = np.zeros((30, 80, 3), np.uint8)
    wide[:, ::2] = IMAGE
    like = (frozen, wide[:, ::2], np.asfortranarray(IMAGE), (IMAGE + 0.25) / 255, ((IMAGE + 0.25) / 255).astype("f4"))
    expected, resized = model.encode(IMAGE), model.encode(IMAGE, resize_on_device=True)
    records = generator(model).generate(IMAGE)
    with Engine(model) as engine:
        for image in like:
            assert model.encode(image).image_hash == expected.image_hash
            assert torch.equal(model.encode(image, resize_on_device=True).features, resized.features)
            assert torch.equal(predictor_features(model, image), expected.features)
            assert [record["area"] for record in generator(model).generate(image)] == [r["area"] for r in records]
            assert next(iter(sam.encode_stream(model, [image]))).image_hash == expected.image_hash
            assert engine.prepare(image).image_hash == expected.image_hash


def predictor_features(model: Sam, image: np.ndarray) -> torch.Tensor:
    made = SamPredictor(model)
    made.set_image(image)
    assert made.features is not None
    return made.features


@pytest.mark.parametrize("device", ["foo", "cuda:9999", "cuda:x", "", 9999])
def test_a_device_that_torch_cannot_use(device: Any) -> None:
    with pytest.raises(ValueError, match=rf"torch cannot use device '{device}' here: \w"):
        sam.load_model(device=device)
    with pytest.raises(ValueError, match=rf"torch cannot use device '{device}' here: \w"):
        sam.ImageEmbedding.load("e.safetensors", device)


def test_no_device_of_this_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch says it on a machine without one."""

    def none_here(*_: Any, **__: Any) -> None:
        raise AssertionError("Torch not compiled with CUDA enabled\nand more")

    monkeypatch.setattr(torch, "empty", none_here)
    with pytest.raises(ValueError, match=r"torch cannot use device 'cuda' here: Torch not compiled with CUDA enabled$"):
        sam.load_model(device="cuda")


@pytest.mark.parametrize("name", EDGES)
def test_another_type(model: Sam, name: str) -> None:
    edge, value, message = EDGES[name]
    with pytest.raises(TypeError, match=message):
        edge(model, value)


def test_an_empty_list_is_an_empty_array(model: Sam) -> None:
    embedding, empty = model.encode(IMAGE), np.zeros((0, 2))
    expected = model.predict(embedding, [Prompt(empty, np.zeros(0))])
    for prompt in (Prompt([], []), Prompt((), ()), Prompt(torch.zeros(0, 2), [])):
        assert torch.equal(model.predict(embedding, [prompt]).low_res_logits, expected.low_res_logits)
    ours = predictor(model)
    np.testing.assert_array_equal(ours.predict([], [])[2], ours.predict(empty, np.zeros(0))[2])
    box = [3, 3, 20, 20]
    np.testing.assert_array_equal(ours.predict([], [], box)[2], ours.predict(empty, np.zeros(0), np.array(box))[2])
    assert TRANSFORM.apply_coords([], (9, 9)).shape == (0, 2)
    assert TRANSFORM.apply_boxes([], (9, 9)).shape == (0, 4)
    assert model.encode([]) == model.predict([], []) == model([], multimask_output=True) == []
    assert len(model.predict(embedding, []).masks) == 0
    assert list(sam.encode_stream(model, [])) == []
    grids = SamAutomaticMaskGenerator(model, points_per_side=None, point_grids=[[]])
    assert grids.generate(IMAGE) == grids.generate_batch([]) == []


def test_shapes_of_the_transform() -> None:
    for call, message in (
        (lambda: TRANSFORM.apply_coords([[1, 2, 3]], (9, 9)), r"points must be \[..., 2\], got \[1, 3\]"),
        (lambda: TRANSFORM.apply_boxes([[1, 2, 3]], (9, 9)), r"boxes must be \[B, 4\], got \[1, 3\]"),
        (lambda: TRANSFORM.apply_coords_torch(torch.ones(2, 3), (9, 9)), r"coords must be \[..., 2\], got \[2, 3\]"),
        (lambda: TRANSFORM.apply_boxes_torch(torch.ones(2, 3), (9, 9)), r"boxes must be \[B, 4\], got \[2, 3\]"),
        (lambda: TRANSFORM.apply_image_torch(torch.ones(3, 9, 9)), r"image must be \[B, C, H, W\], got \[3, 9, 9\]"),
        (lambda: TRANSFORM.apply_coords([[1, 2]], (0, 9)), r"the image is empty: 0x9"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
