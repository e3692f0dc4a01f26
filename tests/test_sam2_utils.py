"""``sam2.utils``: transforms of images, prompts and masks, and what stands around them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import random_image
from PIL import Image

from sam.sam2.utils import amg, misc
from sam.sam2.utils.transforms import SAM2Transforms

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def by_hand(image: np.ndarray, side: int) -> torch.Tensor:
    """The official preprocessing of an image: float, antialiased, stretched, normalised."""
    pixels = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    resized = F.interpolate(pixels[None], (side, side), mode="bilinear", align_corners=False, antialias=True)[0]
    return (resized - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@pytest.mark.parametrize("size", [(40, 70), (64, 64), (90, 30)])
def test_images_are_stretched_and_normalised(size: tuple[int, int]) -> None:
    image, transforms = random_image(*size), SAM2Transforms(64, 0.0)
    expected = by_hand(image, 64)
    assert torch.allclose(transforms(image), expected, atol=1e-5)
    for same in (Image.fromarray(image), image / np.float32(255), image / 255.0, image[:, ::-1][:, ::-1]):
        result = transforms(same)
        assert result.dtype == torch.float32
        assert torch.allclose(result, expected, atol=1e-5)
    batch = transforms.forward_batch([image, image[:20]])
    assert batch.shape == (2, 3, 64, 64)
    assert torch.allclose(batch[1], by_hand(image[:20], 64), atol=1e-5)
    raw = torch.rand(2, 3, 50, 40)
    assert torch.equal(transforms.transforms(raw)[1], transforms.transforms(raw[1]))


def test_other_modes_of_pictures_are_taken_as_rgb() -> None:
    image, transforms = random_image(20, 30), SAM2Transforms(32, 0.0)
    grey = image[..., 0]
    as_rgb = transforms(np.stack([grey] * 3, -1))
    assert torch.equal(transforms(Image.fromarray(grey)), as_rgb)
    rgba = np.dstack([image, np.full((20, 30), 255, np.uint8)])
    assert torch.equal(transforms(Image.fromarray(rgba)), transforms(image))


@pytest.mark.parametrize(
    ("image", "error", "says"),
    [
        (np.zeros((5, 6), np.uint8), ValueError, r"must be RGB, an array \[H, W, 3\], got \[5, 6\] \(grey\?"),
        (np.zeros((5, 6, 4), np.uint8), ValueError, r"got \[5, 6, 4\] \(RGBA\?"),
        (np.zeros((5, 6, 3), np.int64), TypeError, r"must be uint8 in 0..255, or floating-point in 0..1, got int64"),
        (np.zeros((0, 6, 3), np.uint8), ValueError, r"the image is empty: 0x6"),
        (torch.zeros(5, 6, 3), TypeError, r"the image must be a numpy array \[H, W, 3\] or a PIL image, got Tensor"),
    ],
)
def test_other_images_are_named(image: object, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        SAM2Transforms(32, 0.0)(image)  # type: ignore[arg-type]


def test_coordinates_scale_by_each_side() -> None:
    transforms = SAM2Transforms(64, 0.0)
    coords = torch.tensor([[[10.0, 5.0], [20.0, 40.0]]])
    scaled = transforms.transform_coords(coords, normalize=True, orig_hw=(40, 80))
    assert torch.allclose(scaled, torch.tensor([[[8.0, 8.0], [16.0, 64.0]]]))
    assert torch.equal(transforms.transform_coords(coords / 100), coords / 100 * 64)
    boxes = transforms.transform_boxes(torch.tensor([10.0, 5.0, 20.0, 40.0]), normalize=True, orig_hw=[40, 80])
    assert torch.allclose(boxes, scaled)
    assert boxes.shape == (1, 2, 2)
    with pytest.raises(ValueError, match=r"normalize=True needs orig_hw"):
        transforms.transform_coords(coords, normalize=True)


def spotted() -> torch.Tensor:
    """Logits with a hole of 4 pixels, one of 9, a sprinkle of 2 pixels and one of 6."""
    logits = torch.full((1, 2, 32, 32), -3.0)
    logits[..., 2:20, 2:20] = 4.0
    logits[..., 4:6, 4:6] = -1.0
    logits[..., 10:13, 10:13] = -1.0
    logits[..., 25, 25:27] = 2.0
    logits[..., 28:30, 2:5] = 2.0
    return logits


def test_small_holes_and_sprinkles_are_removed_before_the_one_resize() -> None:
    logits, kept = spotted(), spotted()
    expected = spotted()
    expected[..., 4:6, 4:6] = 0.5 + 10
    expected[..., 25, 25:27] = 0.5 - 10
    cleaned = SAM2Transforms(64, 0.5, max_hole_area=4, max_sprinkle_area=5).postprocess_masks(logits, (50, 70))
    assert torch.equal(cleaned, F.interpolate(expected, (50, 70), mode="bilinear", align_corners=False))
    assert torch.equal(logits, kept)
    plain = SAM2Transforms(64, 0.5).postprocess_masks(logits.half(), [50, 70])
    assert plain.dtype == torch.float32
    assert torch.equal(plain, F.interpolate(kept, (50, 70), mode="bilinear", align_corners=False))


def test_logits_for_a_loss_keep_their_gradients() -> None:
    logits = spotted().requires_grad_()
    SAM2Transforms(64, 0.0, max_hole_area=4).postprocess_masks(logits, (50, 70)).sum().backward()
    assert logits.grad is not None
    assert (logits.grad[..., 4:6, 4:6] == 0).all()
    assert (logits.grad[..., 10:13, 10:13] > 0).all()


def test_transforms_are_modules_that_copy() -> None:
    transforms = copy.deepcopy(SAM2Transforms(resolution=64, mask_threshold=0.0, disable_torch_jit=True))
    assert (transforms.resolution, transforms.mask_threshold) == (64, 0.0)
    assert (transforms.max_hole_area, transforms.max_sprinkle_area) == (0.0, 0.0)
    assert (transforms.mean, transforms.std) == ([*MEAN], [*STD])
    assert isinstance(transforms, torch.nn.Module)


def test_components_carry_their_areas() -> None:
    mask = spotted()[:, :1] > 0
    labels, areas = misc.get_connected_components(mask)
    assert labels.dtype == areas.dtype == torch.int32
    assert labels.shape == areas.shape == mask.shape
    assert torch.equal(labels > 0, mask)
    assert torch.equal(areas > 0, mask)
    assert areas[0, 0, 25, 25] == 2
    assert areas[0, 0, 28, 3] == 6
    assert areas[0, 0, 3, 3] == 18 * 18 - 4 - 9
    assert len(labels.unique()) == 4
    with pytest.raises(ValueError, match=r"mask must be \[N, 1, H, W\], got \[1, 32, 32\]"):
        misc.get_connected_components(mask[0])


def test_holes_in_scores_are_filled() -> None:
    logits = spotted()[:, :1]
    filled = misc.fill_holes_in_mask_scores(logits, 4)
    assert (filled[0, 0, 4:6, 4:6] == 0.1).all()
    assert torch.equal(filled.where(filled != 0.1, -1.0), logits)
    with pytest.raises(ValueError, match=r"max_area must be more than 0 pixels, got 0"):
        misc.fill_holes_in_mask_scores(logits, 0)


def test_boxes_around_masks() -> None:
    masks = torch.zeros(2, 1, 7, 9, dtype=torch.bool)
    masks[0, 0, 2:5, 3:8] = True
    assert misc.mask_to_box(masks).tolist() == [[[3, 2, 7, 4]], [[9, 7, -1, -1]]]
    assert misc.mask_to_box(masks).dtype == torch.int32


def test_points_are_appended() -> None:
    points, labels = torch.rand(1, 2, 2), torch.ones(1, 2, dtype=torch.int32)
    first = misc.concat_points(None, points, labels)
    both = misc.concat_points(first, points + 1, labels)
    assert list(both) == ["point_coords", "point_labels"]
    assert torch.equal(both["point_coords"], torch.cat([points, points + 1], dim=1))
    assert both["point_labels"].shape == (1, 4)


def test_attention_settings_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert misc.get_sdpa_settings() == (True, False, True)


def test_tables_of_masks_become_floats() -> None:
    data = amg.MaskData(boxes=torch.tensor([[1, 2, 3, 4]]), rles=[{"size": [1, 1], "counts": [1]}])
    data.to_numpy()
    assert data["boxes"].dtype == np.float32
    assert amg.box_xyxy_to_xywh(data["boxes"][0]).tolist() == [1.0, 2.0, 2.0, 2.0]
