"""Bad input to the predictor and to ``encode``/``predict``: a clear error, and nothing is lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from models import random_image
from PIL import Image

from sam import InteractiveSession, Prompt, Sam, SamPredictor
from sam.embedding import ImageFeatures


@pytest.fixture
def ready(nano: Sam, photo: np.ndarray) -> SamPredictor:
    predictor = SamPredictor(nano)
    predictor.set_image(photo)
    return predictor


def test_before_set_image(nano: Sam) -> None:
    predictor = SamPredictor(nano)
    for call in (
        predictor.predict,
        predictor.get_image_embedding,
        lambda: predictor.predict_torch(None, None),
    ):
        with pytest.raises(RuntimeError, match=r"no image is set: call set_image"):
            call()


BAD_IMAGES = [
    (random_image(30, 40)[..., 0], ValueError, r"must be \[H, W, 3\], got \[30, 40\] \(grey\? np.dstack"),
    (np.zeros((30, 40, 4), np.uint8), ValueError, r"must be \[H, W, 3\], got \[30, 40, 4\] \(RGBA\?"),
    (np.zeros((2, 30, 40, 3), np.uint8), ValueError, r"must be \[H, W, 3\], got \[2, 30, 40, 3\]"),
    (random_image(30, 40) / 1.0, ValueError, r"must lie in 0..1, got values from 0 to 255; .*image.astype"),
    (np.zeros((0, 40, 3), np.uint8), ValueError, r"the image is empty: 0x40"),
    (np.zeros((1, 20000, 3), np.uint8), ValueError, r"1x20000 .*resized to 512 px .*side of 0 px.* 1:1024"),
    ([[1, 2, 3]], TypeError, r"must be a numpy array \[H, W, 3\] of uint8, got list"),
]


@pytest.mark.parametrize(("image", "kind", "message"), BAD_IMAGES)
def test_bad_image(ready: SamPredictor, image: Any, kind: type[Exception], message: str) -> None:
    before = ready.predict()[2]
    with pytest.raises(kind, match=message):
        ready.set_image(image)
    np.testing.assert_array_equal(ready.predict()[2], before)  # the image set earlier is still there


@pytest.mark.parametrize(("image", "kind", "message"), BAD_IMAGES[:-1])
def test_bad_image_in_a_batch_is_named(nano: Sam, image: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"image 1: .*{message}"):
        nano.encode([random_image(30, 40), image])


def test_smallest_and_thinnest_images_work(nano: Sam) -> None:
    predictor = SamPredictor(nano)
    for size in ((1, 1), (1, 1024), (1024, 1)):
        predictor.set_image(random_image(*size))
        assert predictor.predict(np.array([[0, 0]]), np.array([1]))[0].shape == (3, *size)


def test_image_format(ready: SamPredictor, photo: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"image_format must be 'RGB' or 'BGR', got 'HSV'"):
        ready.set_image(photo, image_format="HSV")


def test_torch_image_of_a_wrong_shape(ready: SamPredictor) -> None:
    with pytest.raises(ValueError, match=r"\[1, 3, h, w\] with a longer side of 512, got \[1, 3, 200, 300\]"):
        ready.set_torch_image(torch.zeros(1, 3, 200, 300), (200, 300))


def one(x: float, y: float) -> np.ndarray:
    return np.array([[x, y]])


LABEL = np.array([1])
BAD_PROMPTS = [
    ({"point_coords": one(1, np.nan), "point_labels": LABEL}, r"points must be finite, got nan at index \[0, 1\]"),
    ({"point_coords": one(-np.inf, 1), "point_labels": LABEL}, r"points must be finite, got -inf at index \[0, 0\]"),
    ({"box": np.array([1, 2, np.inf, 4])}, r"box must be finite, got inf at index \[2\]"),
    ({"point_coords": one(1e39, 1), "point_labels": LABEL}, r"points must lie within 1e\+30 px of 0, got 1e\+39 at"),
    ({"box": np.array([0, 0, 3e38, -3e38])}, r"box must lie within 1e\+30 px of 0, got 3e\+38 at index \[2\]"),
    ({"point_coords": one(1, 2)}, r"labels must be given with points"),
    ({"point_coords": one(1, 2), "point_labels": np.array([1, 0])}, r"1 points need labels of shape \[1\], got \[2\]"),
    ({"point_coords": one(1, 2), "point_labels": np.array([2])}, r"labels must be 1 .*0 .*or -1.*got 2"),
    ({"point_coords": one(1, 2), "point_labels": np.array([0.5])}, r"labels must be 1 .*got 0.5"),
    ({"point_coords": np.zeros((1, 3)), "point_labels": LABEL}, r"points must be \[N, 2\], got \[1, 3\]"),
    ({"box": np.zeros((2, 4))}, r"box must be x0, y0, x1, y1 of shape \[4\], got \[2, 4\]"),
    ({"mask_input": np.zeros((1, 256, 256))}, r"mask_input must be .*128x128 px for this model, got 256x256"),
    ({"mask_input": np.zeros((128, 128))}, r"mask_input must be \[1, h, w\], got \[128, 128\]"),
    ({"mask_input": np.zeros((3, 128, 128))}, r"mask_input must be \[1, h, w\], got \[3, 128, 128\]"),
    ({"mask_input": np.full((1, 128, 128), np.nan)}, r"mask_input must be finite, got nan at index \[0, 0, 0\]"),
]


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS)
def test_bad_prompt(ready: SamPredictor, prompt: dict[str, np.ndarray], message: str) -> None:
    before = ready.predict()[2]
    with pytest.raises(ValueError, match=message):
        ready.predict(**prompt)
    np.testing.assert_array_equal(ready.predict()[2], before)


POINTS, LABELS, BOXES = torch.ones(2, 3, 2), torch.ones(2, 3), torch.ones(2, 4)
BAD_TENSORS = [
    ((POINTS, None), {}, r"point_labels must be given with point_coords"),
    ((POINTS[0], LABELS), {}, r"point_coords must be \[P, N, 2\], got \[3, 2\]"),
    ((POINTS, LABELS[:, :2]), {}, r"point_labels must be \[2, 3\], got \[2, 2\]"),
    ((POINTS, LABELS + 2), {}, r"labels must be 1 .*got 3.0"),
    ((POINTS * torch.nan, LABELS), {}, r"point_coords must be finite, got nan at index \[0, 0, 0\]"),
    ((POINTS, LABELS, BOXES[:1]), {}, r"number of prompts differs: \{'point_coords': 2, 'boxes': 1\}"),
    ((POINTS * 1e31, LABELS), {}, r"points must lie within 1e\+30 px of 0, got .*e\+30 at index \[0, 0, 0\]"),
    ((None, None, BOXES[:, :3]), {}, r"boxes must be \[P, 4\], got \[2, 3\]"),
    ((None, None, BOXES * torch.inf), {}, r"boxes must be finite, got inf"),
    ((None, None, BOXES), {"mask_input": torch.zeros(2, 128, 128)}, r"mask_input must be \[P, 1, h, w\]"),
    ((None, None, BOXES), {"mask_input": torch.zeros(2, 1, 64, 64)}, r"128x128 px for this model, got 64x64"),
    ((None, None, BOXES), {"mask_input": torch.zeros(3, 1, 128, 128)}, r"prompts differs: .*'mask_input': 3"),
]


@pytest.mark.parametrize(("args", "kwargs", "message"), BAD_TENSORS)
def test_bad_tensors(ready: SamPredictor, args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ready.predict_torch(*args, **kwargs)


# Of ``Sam.forward`` and of the prompt encoder by itself: points, labels, boxes, masks.
BAD_MODULE_INPUTS = [
    (POINTS, LABELS + 1, None, None, r"labels must be 1 .*0 .*or -1 .*got 2"),
    (POINTS, torch.full((2, 3), 3, dtype=torch.int64), None, None, r"labels must be 1 .*got 3"),
    (POINTS, LABELS - 3, None, None, r"labels must be 1 .*got -2"),
    (POINTS, LABELS / 2, BOXES, None, r"labels must be 1 .*got 0.5"),
    (POINTS, LABELS + 6, None, None, r"labels must be 1 .*got 7"),
    (POINTS * torch.nan, LABELS, None, None, r"points must be finite, got nan at index \[0, 0, 0\]"),
    (POINTS.double() * 1e39, LABELS, None, None, r"points must lie within 1e\+30 px of 0, got 1e\+39"),
    (POINTS.bfloat16() * torch.inf, LABELS, None, None, r"points must be finite, got inf"),
    (None, None, BOXES * -torch.inf, None, r"boxes must be finite, got -inf at index \[0, 0\]"),
    (POINTS, LABELS, None, torch.zeros(2, 1, 4, 4), r"128x128 px for this model, got 4x4"),
    (None, None, BOXES, torch.zeros(2, 1, 64, 64), r"128x128 px for this model, got 64x64"),
    (None, None, None, torch.zeros(2, 1, 64, 64), r"128x128 px for this model, got 64x64"),
    (None, None, BOXES, torch.full((2, 1, 128, 128), torch.nan), r"mask_inputs must be finite, got nan"),
]


@pytest.mark.parametrize(("points", "labels", "boxes", "masks", "message"), BAD_MODULE_INPUTS)
def test_bad_module_input(
    nano: Sam, points: Any, labels: Any, boxes: Any, masks: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=message):
        nano.prompt_encoder(None if points is None else (points, labels), boxes, masks)
    record = {"image": torch.zeros(3, 512, 512), "original_size": (512, 512), "boxes": boxes, "mask_inputs": masks}
    if points is not None:
        record |= {"point_coords": points, "point_labels": labels}
    monkeypatch.setattr(nano, "image_features", lambda pixels: ImageFeatures(torch.zeros(1, 256, 32, 32)))
    with pytest.raises(ValueError, match=message):
        nano([record], multimask_output=True)


def test_the_furthest_points_have_masks(ready: SamPredictor) -> None:
    masks, scores, logits = ready.predict(one(-1e30, 1e30), LABEL, np.array([-1e30, 0, 1e30, 1e30]))
    assert masks.shape == (3, 300, 451)
    assert np.isfinite(scores).all()
    assert np.isfinite(logits).all()


def test_corners_of_a_box(ready: SamPredictor, nano: Sam, photo: np.ndarray) -> None:
    """In order, but for the official predictor, which takes what it always took; over the edges for all."""
    message = r"box must be x0, y0, x1, y1 with x0 <= x1 and y0 <= y1, got \[9.0, 2.0, 8.5, 4.0\]"
    with pytest.raises(ValueError, match=message):
        Prompt(box=(9, 2, 8.5, 4))
    with pytest.raises(ValueError, match=message):
        InteractiveSession(nano, ready.embedding).box(9, 2, 8.5, 4)
    with pytest.raises(ValueError, match=r"got \[1.0, 4.0, 9.0, 2.0\]"):
        Prompt(box=np.array([[1, 4, 9, 2]]))
    assert Prompt(box=(-0.5, -3, 10_000, -3)).box.tolist() == [-0.5, -3, 10_000, -3]
    by_corners = ready.predict(box=np.array([90, 80, 10, 20]))[2]
    boxes = ready.transform.apply_boxes_torch(torch.tensor([[90, 80, 10, 20]]), photo.shape[:2])
    np.testing.assert_allclose(by_corners, ready.predict_torch(None, None, boxes)[2][0], atol=1e-4)


def test_labels_without_points() -> None:
    with pytest.raises(ValueError, match=r"points must be given with labels"):
        Prompt(labels=[1])


def test_counts_of_embeddings_and_prompts(nano: Sam, photo: np.ndarray) -> None:
    embedding = nano.encode(photo)
    with pytest.raises(ValueError, match=r"1 embeddings need as many lists of prompts, got 2"):
        nano.predict([embedding], [[], []])


def test_one_thing_in_place_of_a_list(nano: Sam, photo: np.ndarray) -> None:
    with pytest.raises(TypeError, match=r"an array \[H, W, 3\] or a list of them is wanted, got Image"):
        nano.encode(Image.fromarray(photo))  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="prompts must be a list of Prompt, got a single one"):
        nano.predict(nano.encode(photo), Prompt([(5, 5)], [1]))  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        nano.encode([photo], batch_size=0)


def test_encoder_input_of_another_size(nano: Sam) -> None:
    """Where there are absolute positions they say which; without them any size is encoded."""
    message = r"positions for 32x32 patches, an image of 512 px, got \[1, 3, 256, 512\], which is 16x32 patches"
    with pytest.raises(ValueError, match=message):
        nano.image_encoder(torch.zeros(1, 3, 256, 512))
    with pytest.raises(ValueError, match=r"the image encoder takes \[B, 3, H, W\], got \[3, 512, 512\]"):
        nano.image_encoder(torch.zeros(3, 512, 512))
