"""Nothing depends on torch's default dtype and device, and nothing is sent to a device that cannot hold it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import TINY, random_image, random_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sam
from fastsam_kernels import Resizing, mask_statistics, packed_masks, preprocess_image
from sam import Prompt, Sam
from sam.amg.crop_pipeline import _prompts
from sam.engine import Engine
from sam.modeling.build import build_empty
from sam.modeling.image_encoder import get_rel_pos

SIZE = (90, 128)
IMAGE = random_image(*SIZE)
PROMPTS = [Prompt([(40, 40)], [1]), Prompt([(9, 9), (30, 50)], [0, 1], box=(2, 3, 60, 70)), Prompt(box=(4, 4, 99, 50))]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    sam.save_checkpoint(random_model(TINY), path)
    return path


@contextmanager
def default(what: torch.dtype | str | None) -> Iterator[None]:
    if isinstance(what, torch.dtype):
        torch.set_default_dtype(what)
    elif what is not None:
        torch.set_default_device(what)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def host(values: Any, dtype: torch.dtype | None = None) -> Tensor:
    return torch.tensor(values, dtype=dtype, device="cpu")


def predictions(model: Sam) -> Iterator[Any]:
    embedding = model.encode(IMAGE)
    yield from (embedding.features, embedding.model_hash, model.encode(IMAGE, resize_on_device=True).features)
    once = model.predict(embedding, PROMPTS)
    again = Prompt([(40, 40)], [1], mask_input=once.low_res_logits[0, :1].numpy())
    for result in (once, *model.predict([embedding, embedding], [PROMPTS, [again]], False, True)):
        yield from (result.masks, result.iou_predictions, result.low_res_logits)
    session = sam.InteractiveSession(model, embedding)
    yield from (session.click(40, 40).mask(), session.click(50, 40, 0).mask())
    yield next(iter(sam.encode_stream(model, [IMAGE]))).features
    with Engine(model) as engine:
        yield engine.embed(IMAGE).result().features
    record = {
        "image": model.preprocess(torch.from_numpy(IMAGE).permute(2, 0, 1))[:, : SIZE[0]],
        "original_size": SIZE,
        "point_coords": host([[[4, 5]]]),
        "point_labels": host([[1]]),
        "boxes": host([[4, 4, 99, 50]]),
    }
    yield from model([record], multimask_output=True)[0].values()
    model.mask_decoder.register_forward_hook(lambda *_: None)  # the official calls
    yield model.predict(embedding, PROMPTS).low_res_logits


def official_calls(model: Sam) -> Iterator[Any]:
    predictor = sam.SamPredictor(model)
    predictor.set_image(IMAGE)
    yield from predictor.predict(np.array([[40, 40]]), np.array([1]))
    coords, labels = host([[[40, 40]]]), host([[1]])
    yield from predictor.predict_torch(coords, labels, return_logits=True)
    yield from predictor.predict_torch(predictor.transform.apply_coords_torch(coords, SIZE), labels)
    yield from predictor.predict_torch(None, None, host([[4, 4, 99, 50]]))
    yield predictor.transform.apply_image_torch(torch.from_numpy(IMAGE).permute(2, 0, 1)[None].float())
    generator = sam.SamAutomaticMaskGenerator(
        model,
        points_per_side=3,
        pred_iou_thresh=0.0,
        stability_score_thresh=0.0,
        box_nms_thresh=0.9,
        crop_n_layers=1,
        min_mask_region_area=20,
    )
    for mask in generator.generate(IMAGE):
        yield mask.pop("segmentation")
        yield str(mask)


def assert_bit_equal(result: list[Any], expected: list[Any]) -> None:
    assert len(result) == len(expected)
    for index, (value, required) in enumerate(zip(result, expected, strict=True)):
        if isinstance(required, Tensor):
            assert (value.dtype, value.device) == (required.dtype, required.device), index
            assert torch.equal(value, required), index
        else:
            assert np.array_equal(value, required), index


DEFAULTS = [torch.bfloat16, torch.float64, "meta"]


@pytest.mark.parametrize("kernels", ["torch", "reference"])
@pytest.mark.parametrize("calls", [predictions, official_calls])
def test_loading_and_predicting_under_other_defaults(path: Path, calls: Any, kernels: str) -> None:
    expected = list(calls(sam.load_model(path, device="cpu", kernels=kernels)))
    for what in DEFAULTS:
        with default(what):
            model = sam.load_model(path, device="cpu", kernels=kernels)
            assert model.pixel_mean.dtype == torch.float32
            assert_bit_equal(list(calls(model)), expected)


@pytest.mark.parametrize("what", DEFAULTS)
def test_resized_tables_and_whole_functions_under_other_defaults(path: Path, what: torch.dtype | str) -> None:
    table = random_model(TINY).image_encoder.blocks[1].attn.rel_pos_h.detach()

    def results() -> list[Any]:
        larger = sam.load_model(path, device="cpu", image_size=192)
        # Positions beyond 256, which bf16 rounds.
        return [larger.model_hash, get_rel_pos(300, 450, table), get_rel_pos(450, 300, table)]

    expected = results()
    with default(what):
        assert_bit_equal(results(), expected)


@pytest.mark.parametrize("what", DEFAULTS)
def test_triton_forms_under_other_defaults(what: torch.dtype | str) -> None:
    """Those with tables of their own."""
    logits = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0))
    image, resizing = torch.from_numpy(random_image(20, 30)), Resizing(32, (32, 22), (45, 31))
    mean = std = torch.ones(3)

    def results() -> list[Any]:
        statistics = mask_statistics(logits, resizing, kernels="triton")
        return [
            *(statistics.stability, statistics.area, statistics.boxes),
            packed_masks(logits, resizing, kernels="triton"),
            preprocess_image(image, (22, 32), 32, mean, std, dtype=torch.float32, kernels="triton"),
        ]

    expected = results()
    with default(what):
        assert_bit_equal(results(), expected)


# A device without fp64 ------------------------------------------------------------------------------------


class NoFp64(TorchDispatchMode):
    """As MPS: no tensor on the device, for which "meta" stands, is of fp64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.is_meta and value.dtype == torch.float64:
                raise TypeError(f"{func} makes fp64 on a device that does not have it")
        return result


def test_no_fp64_leaves_the_host_for_a_device_without_it() -> None:
    model = build_empty(TINY).requires_grad_(False).eval()
    model.kernels = "reference"  # the others ask for the state of autocast, which "meta" has none of
    coords, labels = host([[[40.0, 40.0]]], torch.float64), host([[1]])
    boxes = host([[4.0, 4.0, 99.0, 50.0]], torch.float64)
    with NoFp64():
        with pytest.raises(TypeError, match="fp64 on a device that does not have it"):
            coords.to("meta")
        embedding = model.encode(IMAGE)
        assert model.predict(embedding, PROMPTS).masks.shape == (3, 3, *SIZE)
        predictor = sam.SamPredictor(model)
        predictor.set_image(IMAGE)
        assert predictor.predict_torch(coords, labels, boxes)[0].shape == (1, 3, *SIZE)
        assert predictor.predict_torch(None, None, boxes)[0].shape == (1, 3, *SIZE)
        record = {"image": torch.zeros(3, 90, 128, device="meta"), "original_size": SIZE, "boxes": boxes}
        record |= {"point_coords": coords, "point_labels": labels}
        assert model([record], multimask_output=False)[0]["masks"].shape == (1, 1, *SIZE)
        clicks = _prompts(model, np.array([[3.0, 4.0], [5.0, 6.0]]), model.image_geometry(*SIZE))
        assert (clicks.coords.dtype, clicks.coords.device.type) == (torch.float32, "meta")


def test_fp64_coordinates_are_rounded_once_where_they_can_be(tiny: Sam) -> None:
    """As officially; CUDA has fp64 too."""
    clicks = _prompts(tiny, np.array([[3.0, 4.0]]), tiny.image_geometry(*SIZE))
    assert clicks.coords.dtype == torch.float64
