"""``hypernetwork_masks`` with features of finer grids, as SAM 2's decoder has them: every form against the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparison import assert_close_l2, assert_within_budget
from kernels.foundation import DTYPES, guarded
from kernels.mask_inputs import EPS, finer_features, make_inputs
from models import TINY, random_model
from torch import Tensor

from fastsam_kernels import hypernetwork_masks, pack_upscaling
from fastsam_kernels.hypernetwork_masks.reference import reference


def test_reference_with_finer_features_is_sam_2_s_modules() -> None:
    decoder = random_model(TINY).double().mask_decoder
    keys, hyper = torch.randn(2, 64, 64).double(), torch.randn(2, 4, 8).double()
    s0, s1 = finer_features(1, (8, 8), 64, torch.float64)
    first, norm, act1, second, act2 = decoder.output_upscaling
    upscaled = act1(norm(first(keys.transpose(1, 2).unflatten(2, (8, 8))) + s1))
    expected = (hyper @ act2(second(upscaled) + s0).flatten(2)).unflatten(2, (32, 32))
    weights = pack_upscaling(first.weight, first.bias, norm.weight, norm.bias, second.weight, second.bias)
    found = reference(keys, weights, hyper, (8, 8), EPS, keys.dtype, (s0, s1))
    assert_close_l2(found, expected, 1e-12, "the formula")


@pytest.mark.parametrize(("images", "index"), [(1, None), (3, None), (2, [1, 0, 1]), (1, [0, 0, 0])])
@pytest.mark.parametrize("grid", [(6, 9), (64, 20)])
def test_eager_adds_finer_features(images: int, index: list[int] | None, grid: tuple[int, int]) -> None:
    """The larger grid has more than one block of tokens."""
    keys, weights, hyper, _ = make_inputs(3, grid, 2, torch.float32, channels=64)
    high_res, image_index = (
        finer_features(images, grid, 64, torch.float32),
        None if index is None else torch.tensor(index),
    )
    request: dict[str, Any] = {"grid": grid, "high_res": high_res, "image_index": image_index}

    def truth(keys: Tensor) -> Tensor:
        return reference(keys, weights, hyper, grid, EPS, torch.float32, high_res, image_index)

    found = hypernetwork_masks(keys, weights, hyper, kernels="torch", **request)
    assert_close_l2(found, truth(keys), 1e-6, "masks")
    keys.requires_grad_(True)
    found = hypernetwork_masks(keys, weights, hyper, kernels="torch", **request)
    [gradient], [expected] = (torch.autograd.grad(masks.square().sum(), keys) for masks in (found, truth(keys)))
    assert_close_l2(gradient, expected, 1e-5, "gradients")


FINER_CASES = [
    (1, (4, 9), 3, 64, 1, None),
    (3, (6, 5), 1, 64, 1, None),
    (2, (8, 8), 4, 128, 2, None),
    (3, (9, 4), 2, 64, 2, [1, 0, 1]),
    (1, (5, 5), 1, 256, 3, [2]),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("prompts", "grid", "masks", "channels", "images", "index"), FINER_CASES)
def test_triton_form_adds_finer_features(
    device: torch.device,
    dtype: torch.dtype,
    prompts: int,
    grid: tuple[int, int],
    masks: int,
    channels: int,
    images: int,
    index: list[int] | None,
) -> None:
    """Within the budget, and the same bits whatever the features' strides; beside them is NaN."""
    keys, weights, hyper, _ = make_inputs(prompts, grid, masks, dtype, device, channels)
    high_res = finer_features(images, grid, channels, dtype, device)
    image_index = None if index is None else torch.tensor(index, device=device)
    request: dict[str, Any] = {"grid": grid, "image_index": image_index, "kernels": "triton"}
    found = hypernetwork_masks(keys, weights, hyper, high_res=high_res, **request)
    inputs = keys, weights, hyper, grid, EPS, dtype, high_res, image_index
    assert_within_budget(found, reference, inputs, f"finer features, {dtype}, grid {grid}")
    views = guarded(high_res[0], (1, 3, 0, 2)), guarded(high_res[1], (0, 2, 3, 1))
    assert torch.equal(hypernetwork_masks(keys, weights, hyper, high_res=views, **request), found)


def test_finer_features_of_other_prompts_change_nothing(device: torch.device) -> None:
    keys, weights, hyper, grid = make_inputs(3, (6, 6), 2, torch.float16, device, 64)
    s0, s1 = finer_features(2, grid, 64, torch.float16, device)
    index = torch.tensor([1, 0, 1], device=device)
    request: dict[str, Any] = {"grid": grid, "kernels": "triton"}
    whole = hypernetwork_masks(keys, weights, hyper, high_res=(s0, s1), image_index=index, **request)
    for row, image in enumerate(index.tolist()):
        one, own = slice(row, row + 1), (s0[image : image + 1], s1[image : image + 1])
        alone = hypernetwork_masks(keys[one], weights, hyper[one], high_res=own, **request)
        assert torch.equal(whole[one], alone)


def test_refused_finer_features() -> None:
    keys, weights, hyper, grid = make_inputs(3, (4, 4), 2, torch.float32, channels=64)
    s0, s1 = finer_features(2, grid, 64, torch.float32)
    for high_res, index, message in (
        ((s1, s0), None, r"s0 of high_res must be \[2, 8, 16, 16\] of torch.float32, got \[2, 16, 8, 8\]"),
        ((s0, s1.double()), None, r"s1 of high_res .* got \[2, 16, 8, 8\] of torch.float64"),
        ((s0, s1), None, r"high_res of 2 images needs an image_index \[3\]"),
        ((s0, s1), torch.tensor([0, 1]), r"image_index must be \[3\] int64, got \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            hypernetwork_masks(keys, weights, hyper, grid=grid, high_res=high_res, image_index=index)
