"""``SAM2ImagePredictor``: the official answers, shapes and types, batches, what programs restore, train and change."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import random_image, randomise
from PIL import Image

import sam
from benchmarks.official_sam2 import random_sam2, sample
from benchmarks.official_sam2_prompts import photograph, prompts
from sam import HieraConfig, Sam2Config
from sam.sam2.sam2_image_predictor import SAM2ImagePredictor

OFFICIAL = json.loads((Path(__file__).parent / "official_sam2_prompts.json").read_text())
TRUNK = HieraConfig(16, 1, (1, 2, 3, 1), (4,), d_model=64)
SMALL = Sam2Config("custom", TRUNK, image_size=64, memory_attention_layers=1, fuser_layers=1)
IMAGE = random_image(40, 70)
POINT, LABEL, BOX = np.array([[30, 20]]), np.array([1]), np.array([5, 6, 50, 30])


@pytest.fixture(scope="module")
def small() -> sam.SAM2Base:
    model = sam.build_from_config(SMALL)
    randomise(model)
    return model.requires_grad_(False)


@pytest.fixture
def predictor(small: sam.SAM2Base) -> SAM2ImagePredictor:
    result = SAM2ImagePredictor(copy.deepcopy(small))
    result.set_image(IMAGE)
    return result


def close(a: Any, b: Any, error: float = 1e-4) -> bool:
    a, b = (torch.as_tensor(x).float() for x in (a, b))
    return a.shape == b.shape and bool((a - b).norm() <= error * b.norm() + 1e-6)


@pytest.mark.parametrize("variant", [pytest.param("sam2_tiny", marks=pytest.mark.slow), "sam2.1_tiny"])
def test_answers_are_the_official_ones(variant: str) -> None:
    """Prompts of every kind, three masks and the one, which stays or gives way."""
    model = random_sam2(variant)
    written = OFFICIAL[variant]
    model.sam_mask_decoder.dynamic_multimask_stability_thresh = written["threshold"]
    predictor = SAM2ImagePredictor(model)
    predictor.set_image(photograph())
    for multimask_output, answers in ((False, written["single"]), (True, written["alternatives"])):
        for name, prompt in prompts().items():
            given = [prompt.get(part) for part in ("points", "labels", "box", "mask_input")]
            arrays = [None if part is None else np.array(part) for part in given]
            masks, iou, low_res = predictor.predict(*arrays, multimask_output, return_logits=True)
            for part, values in (("masks", masks), ("low_res", low_res)):
                ours, theirs = sample(torch.from_numpy(values), 48), torch.tensor(answers[name][part])
                assert (ours - theirs).norm() <= 2e-4 * theirs.norm(), (name, part)
            assert np.allclose(iou, answers[name]["iou"], rtol=1e-4), name


CALLS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "box [4]": ({"box": BOX}, (3,)),
    "box [1, 4]": ({"box": BOX[None]}, (3,)),
    "box [2, 4]": ({"box": np.stack([BOX, BOX + 3])}, (2, 3)),
    "points [1, 1, 2]": ({"point_coords": POINT[None], "point_labels": LABEL[None]}, (3,)),
    "points [2, 1, 2], one mask": (
        {"point_coords": np.stack([POINT] * 2), "point_labels": np.stack([LABEL] * 2), "multimask_output": False},
        (2, 1),
    ),
    "points and boxes": (
        {"point_coords": np.stack([POINT] * 2), "point_labels": np.stack([LABEL] * 2), "box": np.stack([BOX] * 2)},
        (2, 3),
    ),
    "point and box [4]": ({"point_coords": POINT, "point_labels": LABEL, "box": BOX}, (3,)),
    "lists": ({"point_coords": [[30, 20]], "point_labels": [1], "box": [5, 6, 50, 30]}, (3,)),
    "tensors": ({"point_coords": torch.tensor([[30, 20]]), "point_labels": torch.tensor([1])}, (3,)),
    "labels of corners": ({"point_coords": BOX.reshape(2, 2), "point_labels": np.array([2, 3])}, (3,)),
    "labels alone": ({"point_labels": LABEL}, (3,)),
    "no boxes": ({"box": np.zeros((0, 4))}, (0, 3)),
    "a mask [1, h, w]": ({"mask_input": np.zeros((1, 16, 16), np.float32)}, (3,)),
    "masks [2, 1, h, w]": (
        {
            "point_coords": np.stack([POINT] * 2),
            "point_labels": np.stack([LABEL] * 2),
            "mask_input": torch.zeros(2, 1, 16, 16),
        },
        (2, 3),
    ),
    "nothing": ({}, (3,)),
}


@pytest.mark.parametrize("call", CALLS)
def test_shapes_and_types(predictor: SAM2ImagePredictor, call: str) -> None:
    arguments, lead = CALLS[call]
    masks, iou, low_res = predictor.predict(**arguments)
    assert (masks.shape, iou.shape, low_res.shape) == ((*lead, 40, 70), lead, (*lead, 16, 16))
    assert {masks.dtype, iou.dtype, low_res.dtype} == {np.dtype(np.float32)}
    assert set(np.unique(masks)) <= {0.0, 1.0}
    assert np.abs(low_res).max(initial=0) <= 32
    logits = predictor.predict(**arguments, return_logits=True)[0]
    assert np.array_equal(logits > 0, masks > 0)


def test_coordinates_of_the_image_and_of_the_unit_square(predictor: SAM2ImagePredictor) -> None:
    expected = predictor.predict(POINT, LABEL, BOX)[2]
    scale = np.array([70, 40])
    unit = predictor.predict(POINT / scale, LABEL, BOX / np.tile(scale, 2), normalize_coords=False)[2]
    assert close(unit, expected)
    corners = np.concatenate([BOX.reshape(2, 2), POINT])
    assert close(predictor.predict(corners, np.array([2, 3, 1]))[2], expected)
    assert close(predictor.predict(POINT[::-1][:, ::-1][:, ::-1], LABEL, BOX)[2], expected)


def test_thresholds_holes_and_limits(small: sam.SAM2Base) -> None:
    plain = SAM2ImagePredictor(small)
    plain.set_image(IMAGE)
    logits, _, low_res = plain.predict(POINT, LABEL, return_logits=True)
    middle = float(np.median(logits))
    moved = SAM2ImagePredictor(small, mask_threshold=middle, max_hole_area=9, max_sprinkle_area=9)
    moved.set_image(IMAGE)
    masks, _, same = moved.predict(POINT, LABEL)
    cleaned = moved.predict(POINT, LABEL, return_logits=True)[0]
    assert np.array_equal(masks > 0, cleaned > middle)
    assert np.array_equal(same, low_res)
    changed = cleaned != logits
    assert 0 < changed.mean() < 0.9
    small.sam_mask_decoder.output_hypernetworks_mlps[1].layers[-1].bias.add_(300)
    try:
        logits, _, low_res = plain.predict(POINT, LABEL, return_logits=True)
    finally:
        small.sam_mask_decoder.output_hypernetworks_mlps[1].layers[-1].bias.sub_(300)
    assert np.abs(low_res).max() == 32
    assert np.abs(logits).max() > 32


def test_a_batch_is_what_one_by_one_gives(small: sam.SAM2Base) -> None:
    """Pictures of several sizes, with a point, two boxes, and nothing but a mask."""
    predictor, images = SAM2ImagePredictor(small), [IMAGE, random_image(30, 20, 1), random_image(25, 64, 2)]
    mask = 3 * np.random.default_rng(0).normal(size=(1, 16, 16)).astype(np.float32)
    points, labels = [POINT, None, None], [LABEL, None, None]
    boxes, masks = [None, np.array([[2, 2, 9, 20], [5, 6, 15, 25]]), None], [None, None, mask]
    predictor.set_image_batch(images)
    assert predictor.get_image_embedding().shape == (3, 64, 4, 4)
    batch = predictor.predict_batch(points, labels, boxes, masks, return_logits=True)
    assert [masks.shape for masks in batch[0]] == [(3, 40, 70), (2, 3, 30, 20), (3, 25, 64)]
    for index, image in enumerate(images):
        predictor.set_image(image)
        alone = predictor.predict(points[index], labels[index], boxes[index], masks[index], return_logits=True)
        assert all(close(many[index], one) for many, one in zip(batch, alone, strict=True))
    with pytest.raises(RuntimeError, match=r"no batch of images is set: call set_image_batch"):
        predictor.predict_batch()
    predictor.set_image_batch([Image.fromarray(images[0]), images[1]])
    assert [len(part) for part in predictor.predict_batch()] == [2, 2, 2]
    with pytest.raises(ValueError, match=r"box_batch must have one entry per image, 2, got 3"):
        predictor.predict_batch(box_batch=[BOX] * 3)
    with pytest.raises(ValueError, match=r"image 1: box must be \[4\] or \[P, 4\], got \[3\]"):
        predictor.predict_batch(box_batch=[BOX, BOX[:3]])


def test_features_are_plain_tensors_that_programs_restore(predictor: SAM2ImagePredictor, small: sam.SAM2Base) -> None:
    expected = predictor.predict(box=BOX)
    assert predictor._features is not None
    features = predictor._features
    assert list(features) == ["image_embed", "high_res_feats"]
    tensors = [features["image_embed"], *features["high_res_feats"]]
    assert [list(x.shape) for x in tensors] == [[1, 64, 4, 4], [1, 8, 16, 16], [1, 16, 8, 8]]
    assert all(type(x) is torch.Tensor and not x.requires_grad and not x.is_inference() for x in tensors)
    assert predictor.get_image_embedding() is features["image_embed"]
    other = SAM2ImagePredictor(small)
    other.set_image(random_image(9, 9, 5))
    other.predict(box=BOX)
    other._features = {
        "image_embed": features["image_embed"].cpu().clone(),
        "high_res_feats": [x.clone() for x in features["high_res_feats"]],
    }
    other._orig_hw, other._is_image_set = [[40, 70]], True
    for ours, theirs in zip(other.predict(box=BOX), expected, strict=True):
        assert np.array_equal(ours, theirs)
    other._features["high_res_feats"][0] = other._features["high_res_feats"][0] + 5
    assert not close(other.predict(box=BOX)[2], expected[2], 1e-3)
    other._features["high_res_feats"][0].copy_(features["high_res_feats"][0])
    assert np.array_equal(other.predict(box=BOX)[2], expected[2])
    assert np.array_equal(copy.deepcopy(predictor).predict(box=BOX)[2], expected[2])


@pytest.mark.parametrize("image", ["array", "floats", "PIL RGB", "PIL RGBA", "strides"])
def test_other_forms_of_an_image(predictor: SAM2ImagePredictor, image: str) -> None:
    expected = predictor.get_image_embedding().clone()
    alpha = np.full((40, 70, 1), 255, np.uint8)
    forms: dict[str, Any] = {
        "array": np.asfortranarray(IMAGE),
        "floats": IMAGE / 255.0,
        "PIL RGB": Image.fromarray(IMAGE),
        "PIL RGBA": Image.fromarray(np.concatenate([IMAGE, alpha], -1)),
        "strides": IMAGE[..., ::-1].copy()[..., ::-1],
    }
    predictor.set_image(forms[image])
    assert close(predictor.get_image_embedding(), expected)


def test_a_grey_picture_is_named_and_leaves_the_image(predictor: SAM2ImagePredictor) -> None:
    kept = predictor.get_image_embedding()
    for image, error, says in (
        (IMAGE[..., 0], ValueError, r"must be RGB, an array \[H, W, 3\], got \[40, 70\] \(grey"),
        (np.dstack([IMAGE, IMAGE[..., :1]]), ValueError, r"got \[40, 70, 4\] \(RGBA"),
        (torch.zeros(40, 70, 3), NotImplementedError, r"must be a numpy array \[H, W, 3\].*or a PIL image, got Tensor"),
    ):
        with pytest.raises(error, match=says):
            predictor.set_image(image)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^image 1: the image must be RGB"):
        predictor.set_image_batch([IMAGE, IMAGE[..., 0]])
    with pytest.raises(ValueError, match=r"image_list is empty"):
        predictor.set_image_batch([])
    assert predictor.get_image_embedding() is kept
    predictor.set_image(Image.fromarray(IMAGE[..., 0]))  # a PIL image says its colours
    assert predictor.predict(POINT, LABEL)[0].shape == (3, 40, 70)


TWO = np.array([[30, 20], [40, 25]])
MIXED_UP: dict[str, tuple[dict[str, Any], str]] = {
    "fewer labels": ({"point_coords": TWO, "point_labels": LABEL}, r"point_labels must be \[1, 2\], got \[1, 1\]"),
    "no labels": ({"point_coords": TWO}, r"point_labels must be given with point_coords"),
    "two boxes": ({"point_coords": TWO, "point_labels": [1, 0], "box": [BOX, BOX]}, r"prompts differs: .*boxes': 2"),
    "a box of six": ({"box": np.arange(6)}, r"box must be \[4\] or \[P, 4\], got \[6\]"),
    "points in 3-D": ({"point_coords": np.zeros((2, 3)), "point_labels": [1, 1]}, r"point_coords must be \[N, 2\]"),
    "a label": ({"point_coords": TWO, "point_labels": [1, 7]}, r"labels must be .*2 and 3 \(corners of a box\), got 7"),
    "NaN": ({"box": [np.nan, 0, 9, 9]}, r"boxes must"),
    "a large mask": ({"mask_input": np.zeros((1, 64, 64))}, r"mask"),
}


@pytest.mark.parametrize("what", MIXED_UP)
def test_prompts_that_are_mixed_up_are_named(predictor: SAM2ImagePredictor, what: str) -> None:
    arguments, says = MIXED_UP[what]
    with pytest.raises(ValueError, match=says):
        predictor.predict(**arguments)


def test_before_an_image_is_set(small: sam.SAM2Base) -> None:
    predictor = SAM2ImagePredictor(small)
    for call in (predictor.predict, predictor.get_image_embedding, lambda: predictor._predict(None, None)):
        with pytest.raises(RuntimeError, match=r"no image is set: call set_image"):
            call()
    predictor.set_image(IMAGE)
    predictor.reset_predictor()
    assert (predictor._is_image_set, predictor._features, predictor._orig_hw) == (False, None, None)
    with pytest.raises(TypeError, match=r"SAM2ImagePredictor takes no 'threshold'"):
        SAM2ImagePredictor(small, threshold=1)
    assert predictor._bb_feat_sizes == [(16, 16), (8, 8), (4, 4)]


def test_the_tensor_interface(predictor: SAM2ImagePredictor) -> None:
    """As a program calls it: prompts prepared, in pixels of the square."""
    mask, coords, labels, boxes = predictor._prep_prompts(TWO[:, None], [[1], [0]], [BOX, BOX], None, True)
    assert mask is None
    assert coords is not None
    assert labels is not None
    assert boxes is not None
    assert (coords.shape, labels.dtype, boxes.shape) == ((2, 1, 2), torch.int32, (2, 2, 2))
    assert torch.allclose(coords[0, 0], torch.tensor([30 / 70 * 64, 20 / 40 * 64]))
    masks, iou, low_res = predictor._predict(coords, labels, boxes, multimask_output=False)
    assert (masks.shape, masks.dtype) == ((2, 1, 40, 70), torch.bool)
    arrays = predictor.predict(TWO[:, None], [[1], [0]], [BOX, BOX], multimask_output=False)  # type: ignore[arg-type]
    assert close(low_res, arrays[2])
    assert close(iou, arrays[1])
    flat = predictor._predict(coords, labels, boxes.reshape(2, 4), multimask_output=False)[2]
    assert torch.equal(flat, low_res)


def test_training_on_the_features_of_an_image(predictor: SAM2ImagePredictor) -> None:
    """The common loop: prompts by ``_prep_prompts``, the modules called, masks by the transforms, a loss."""
    model = predictor.model.train()
    for part in (model.sam_prompt_encoder, model.sam_mask_decoder):
        part.requires_grad_(True)
    _, coords, labels, _ = predictor._prep_prompts(TWO[:, None].astype(float), np.ones((2, 1)), None, None, True)
    sparse, dense = model.sam_prompt_encoder(points=(coords, labels), boxes=None, masks=None)
    assert predictor._features is not None
    low_res, scores, tokens, seen = model.sam_mask_decoder(
        image_embeddings=predictor._features["image_embed"][-1].unsqueeze(0),
        image_pe=model.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=True,
        repeat_image=True,
        high_res_features=[level[-1].unsqueeze(0) for level in predictor._features["high_res_feats"]],
    )
    assert [x.shape[0] for x in (low_res, scores, tokens, seen)] == [2, 2, 2, 2]
    masks = predictor._transforms.postprocess_masks(low_res, predictor._orig_hw[-1])
    (masks.sigmoid().mean() + scores.mean()).backward()
    unused = ("mask_downscaling", "conv_s0", "conv_s1", "pred_obj_score", "point_embeddings", "mlps.0", "obj_score")
    without = [
        name
        for part in (model.sam_prompt_encoder, model.sam_mask_decoder)
        for name, weight in part.named_parameters()
        if weight.grad is None and not any(word in name for word in unused)
    ]
    assert without == []
    with torch.no_grad():
        for weight in model.sam_mask_decoder.parameters():
            weight.add_(0.05)
    after = predictor.predict(POINT, LABEL)[2]
    fresh = SAM2ImagePredictor(model.eval())
    fresh._features, fresh._orig_hw, fresh._is_image_set = predictor._features, [(40, 70)], True
    assert close(after, fresh.predict(POINT, LABEL)[2])


def test_what_a_program_hooks_patches_and_swaps_is_called(predictor: SAM2ImagePredictor) -> None:
    model, seen = predictor.model, []
    expected = predictor.predict(POINT, LABEL)[2]
    hook = model.sam_mask_decoder.register_forward_hook(
        lambda m, a, output: seen.append([*map(list, map(np.shape, output))])
    )
    assert close(predictor.predict(POINT, LABEL)[2], expected)
    hook.remove()
    assert seen == [[[1, 3, 16, 16], [1, 3], [1, 3, 64], [1, 1]]]

    forward = model.forward_image
    model.forward_image = lambda pixels: (seen.append(list(pixels.shape)), forward(pixels))[1]
    predictor.set_image(IMAGE)
    assert seen[-1] == [1, 3, 64, 64]
    assert close(predictor.predict(POINT, LABEL)[2], expected)
    del model.forward_image

    with patched(model, image_encoder=torch.compile(model.image_encoder, backend="eager")):
        predictor.set_image(IMAGE)
        assert close(predictor.predict(POINT, LABEL)[2], expected)

    transforms = predictor._transforms
    with patched(transforms, postprocess_masks=lambda masks, size: torch.ones(*masks.shape[:2], *size)):
        assert predictor.predict(POINT, LABEL)[0].all()
    model.directly_add_no_mem_embed = False
    predictor.set_image(IMAGE)
    assert not close(predictor.predict(POINT, LABEL)[2], expected, 1e-3)


@contextmanager
def patched(thing: Any, **attributes: Any) -> Iterator[None]:
    kept = {name: getattr(thing, name) for name in attributes}
    for name, value in attributes.items():
        setattr(thing, name, value)
    yield
    for name, value in kept.items():
        if name in vars(thing):
            delattr(thing, name)
        setattr(thing, name, value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision(predictor: SAM2ImagePredictor, dtype: torch.dtype) -> None:
    expected = predictor.predict(POINT, LABEL, return_logits=True)[0]
    narrow = SAM2ImagePredictor(copy.deepcopy(predictor.model).to(dtype))
    narrow.set_image(IMAGE)
    assert close(narrow.predict(POINT, LABEL, return_logits=True)[0], expected, 0.2)


def test_autocast_of_the_call_is_obeyed(predictor: SAM2ImagePredictor) -> None:
    expected = predictor.predict(POINT, LABEL, return_logits=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        predictor.set_image(IMAGE)
        result = predictor.predict(POINT, LABEL, return_logits=True)
    assert predictor._features is not None
    assert predictor._features["image_embed"].dtype == torch.float32
    assert [x.dtype for x in predictor._features["high_res_feats"]] == [torch.bfloat16] * 2
    assert [x.dtype for x in result] == [np.dtype(np.float32)] * 3
    assert close(result[0], expected[0], 0.2)
    assert not np.array_equal(result[2], expected[2])
    predictor.set_image(IMAGE)
    assert np.array_equal(predictor.predict(POINT, LABEL)[2], expected[2])


def test_inference_mode_and_threads_of_our_own_interface(predictor: SAM2ImagePredictor) -> None:
    expected = predictor.predict(POINT, LABEL)[2]
    with torch.inference_mode():
        predictor.set_image(IMAGE)
        assert predictor.get_image_embedding().is_inference()
        assert np.array_equal(predictor.predict(POINT, LABEL)[2], expected)
    prompt = sam.Prompt(POINT, LABEL)
    ours = predictor.model.predict(predictor.model.encode(IMAGE), [prompt])
    assert close(ours.low_res_logits[0], expected)
    assert close(predictor.model.predict(predictor.embedding, [prompt]).low_res_logits[0], expected)
