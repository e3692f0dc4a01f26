"""Training data: scenes, and the prompts drawn for their objects."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from training_runs import generator

from sam.training import evaluate, prompts
from sam.training.scenes import Scene, held_out_scene, scene_rng, training_scene


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [held_out_scene(index) for index in range(16)]


# Scenes ---------------------------------------------------------------------------------------------------


def test_no_training_scene_is_held_out() -> None:
    def start(split: str, seed: int, index: int) -> int:
        return int(scene_rng(split, seed, index).integers(2**63))

    held_out = {start("held-out", 0, index) for index in range(500)}
    training = {start("training", seed, index) for seed in range(4) for index in range(500)}
    assert len(held_out) == 500
    assert len(training) == 2000
    assert not held_out & training


def test_a_scene_depends_on_its_seed_and_index_alone() -> None:
    once, again = training_scene(3, 7, size=128), training_scene(3, 7, size=128)
    assert np.array_equal(once.image, again.image)
    assert np.array_equal(once.ids, again.ids)
    assert not np.array_equal(once.image, training_scene(3, 8, size=128).image)
    assert not np.array_equal(once.image, training_scene(4, 7, size=128).image)


def test_scenes_are_pictures_with_labelled_objects_of_all_sizes(scenes: list[Scene]) -> None:
    shares, grey, parts = [], 0, 0
    for scene in scenes:
        assert scene.image.shape == (512, 512, 3)
        assert scene.image.dtype == np.uint8
        assert scene.image.std() > 2
        grey += bool((scene.image == scene.image[..., :1]).all())
        shown = np.unique(scene.ids)
        assert not scene.parents[scene.parents[shown]].any()  # a part of a part would be in no mask of the whole
        parts += int((scene.parents[shown] > 0).sum())
        shares += [mask.mean() for mask in scene.masks(evaluate.MIN_PIXELS)]
    assert 0 < grey < len(scenes)
    assert parts > 0
    assert min(shares) >= 100 / 512**2
    assert max(shares) > 0.2
    assert 0.1 < np.mean(np.array(shares) > evaluate.LARGE) < 0.6
    assert np.mean(np.array(shares) < 0.01) > 0.2


def test_masks_share_no_pixel_but_those_of_a_part_with_its_object(scenes: list[Scene]) -> None:
    for scene in scenes[:6]:
        count = int(scene.ids.max())
        masks = scene.masks(0)
        assert len(masks) == count
        for part, owner in ((i, scene.parents[i]) for i in range(1, count + 1) if scene.parents[i]):
            assert not (masks[part - 1] & ~masks[owner - 1]).any()
        whole = [masks[i - 1] for i in range(1, count + 1) if not scene.parents[i]]
        assert np.sum(whole, axis=0).max() <= 1


# Prompts --------------------------------------------------------------------------------------------------


def ragged_regions() -> torch.Tensor:
    regions = torch.rand(40, 23, 31, generator=generator()) < 0.1
    regions[0] = False
    regions[0, 22, 30] = True
    regions[1] = True
    return regions


def test_clicks_are_inside_their_region_and_anywhere_in_it() -> None:
    regions = ragged_regions()
    seen = torch.zeros_like(regions)
    rows, draws = torch.arange(len(regions)), generator()
    for _ in range(400):
        x, y = prompts.random_clicks(regions, draws).long().unbind(1)
        assert regions[rows, y, x].all()
        seen[rows, y, x] = True
    assert (seen & ~regions).sum() == 0
    assert (seen.sum((1, 2)) >= 0.8 * regions.sum((1, 2)).clamp(max=60)).all()


def test_clicks_are_uniform() -> None:
    region = torch.zeros(1, 8, 8, dtype=torch.bool)
    region[0, 2, 3:7] = region[0, 5, 0] = True
    clicks = prompts.random_clicks(region.expand(5000, -1, -1), generator())
    _, counts = torch.unique(clicks, dim=0, return_counts=True)
    assert len(counts) == 5
    assert ((counts / 5000 - 0.2).abs() < 0.03).all()


def test_boxes_are_tight_and_jitter_has_limits() -> None:
    masks = torch.zeros(2, 512, 512, dtype=torch.bool)
    masks[0, 100:400, 50:450] = True
    masks[1, 7, 9] = True
    boxes = prompts.tight_boxes(masks)
    assert boxes.tolist() == [[50, 100, 450, 400], [9, 7, 10, 8]]
    moved = prompts.jitter_boxes(boxes.repeat(500, 1), 512, generator())
    shift = (moved - boxes.repeat(500, 1)).view(500, 2, 4).abs()
    assert shift[:, 0].max() == 10  # 20 px in 1024
    assert shift[:, 1].max() <= 1 / 3 + 1e-6
    assert shift[:, 0].mean() > 5
    assert (moved[:, 2:] > moved[:, :2]).all()
    edge = torch.tensor([[0.0, 0.0, 512.0, 512.0]]).repeat(200, 1)
    assert prompts.jitter_boxes(edge, 512, generator()).min() >= 0
    assert prompts.jitter_boxes(edge, 512, generator()).max() <= 512


def test_corrections_land_on_the_error_with_the_true_label() -> None:
    truth = torch.zeros(64, 32, 32, dtype=torch.bool)
    truth[:, 8:24, 8:24] = True
    logits = torch.full((64, 8, 8), -5.0)
    logits[:, :, 4:] = 5.0  # misses the left half of the object, and adds ground on the right
    coords, labels = torch.zeros(64, 2, 2), torch.ones(64, 2, dtype=torch.int64)
    coords, labels = prompts.add_corrections(coords, labels, logits, truth, generator())
    x, y = coords[:, 2].long().unbind(1)
    wrong = (prompts.upsample(logits, 32) > 0) != truth
    rows = torch.arange(64)
    assert wrong[rows, y, x].all()
    assert torch.equal(labels[:, 2].bool(), truth[rows, y, x])
    assert 0 < labels[:, 2].sum() < 64
    perfect = torch.where(truth[:, ::4, ::4], 20.0, -20.0)
    perfect_truth = prompts.upsample(perfect, 32) > 0
    _, labels = prompts.add_corrections(coords, labels, perfect, perfect_truth, generator())
    assert labels[:, 3].all()


def test_objects_are_wholes_with_their_parts_and_empty_pictures_give_none() -> None:
    ids, parents = torch.zeros(3, 20, 20, dtype=torch.uint8), torch.zeros(3, 256, dtype=torch.uint8)
    ids[0, 2:12, 2:12], ids[0, 4:7, 4:7], parents[0, 2] = 1, 2, 1
    ids[2, 0, 0] = 1  # too small
    objects = prompts.choose_objects(ids, parents, 50, min_pixels=5, generator=generator())
    assert objects.image_index.tolist() == [0] * 50
    areas = objects.masks.sum((1, 2))
    assert set(areas.tolist()) == {9, 100}
    assert 15 < (areas == 100).sum() < 35
