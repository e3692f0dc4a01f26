"""The embedded model on photographs it never saw. ``pytest tests/test_nano.py -s`` prints its figures."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path

import coins
import numpy as np
import photographs
import pytest

import sam
from sam import Prompt, Sam, SamAutomaticMaskGenerator, SamPredictor

GOOD = 0.75


@pytest.fixture(scope="module")
def truth() -> list[coins.Coin]:
    result = coins.coins()
    assert len(result) == 24
    return result


def report(what: str, scores: list[float]) -> None:
    good = sum(score >= GOOD for score in scores)
    print(f"\n{what}: mean IoU {np.mean(scores):.3f}, {good} of {len(scores)} at {GOOD} or more")


def test_centre_clicks_through_the_predictor(nano: Sam, truth: list[coins.Coin]) -> None:
    predictor = SamPredictor(nano)
    predictor.set_image(coins.photograph())
    chosen, best = [], []
    for coin in truth:
        masks, scores, _ = predictor.predict(np.array([coin.center]), np.array([1]))
        ious = [coins.iou(mask, coin.mask) for mask in masks]
        chosen.append(ious[int(scores.argmax())])
        best.append(max(ious))
    report("centre click, highest predicted IoU", chosen)
    report("centre click, best of three", best)
    assert sum(score >= GOOD for score in chosen) >= 21


def test_clicks_off_the_centre_and_boxes(nano: Sam, truth: list[coins.Coin]) -> None:
    embedding = nano.encode(coins.photograph())
    clicks = [
        (coin, (coin.center[0] + coin.radius / 2 * dx, coin.center[1] + coin.radius / 2 * dy))
        for coin, (dx, dy) in product(truth, ((1, 0), (-1, 0), (0, 1), (0, -1)))
    ]
    result = nano.predict(embedding, [Prompt([xy], [1]) for _, xy in clicks])
    chosen = result.iou_predictions.argmax(dim=1)
    off_centre = [coins.iou(result.masks[i, chosen[i]].numpy(), coin.mask) for i, (coin, _) in enumerate(clicks)]
    report("click half a radius off", off_centre)
    result = nano.predict(embedding, [Prompt(box=coin.box) for coin in truth], multimask_output=False)
    boxed = [coins.iou(mask.numpy(), coin.mask) for mask, coin in zip(result.masks[:, 0], truth, strict=True)]
    report("box", boxed)
    assert np.mean([score >= GOOD for score in off_centre]) >= 0.6
    assert sum(score >= GOOD for score in boxed) >= 18


def test_a_corrective_click_helps(nano: Sam, truth: list[coins.Coin]) -> None:
    """A click on the ground cuts it off; the earlier logits go back in as ``mask_input``."""
    embedding = nano.encode(coins.photograph())
    left, right = truth[1], truth[2]  # neighbours
    between = ((left.center[0] + right.center[0]) / 2, (left.center[1] + right.center[1]) / 2)
    first = nano.predict(embedding, [Prompt([left.center, right.center], [1, 1])], multimask_output=False)
    again = Prompt([left.center, right.center, between], [1, 1, 0], mask_input=first.low_res_logits[0])
    second = nano.predict(embedding, [again], multimask_output=False)
    x, y = (round(value) for value in between)
    assert second.low_res_logits.shape == first.low_res_logits.shape
    assert not second.masks[0, 0, y, x]


def test_a_cup_by_a_box_and_by_a_click(nano: Sam) -> None:
    cup = photographs.cup()
    embedding = nano.encode(cup.image)
    boxed = nano.predict(embedding, [Prompt(box=cup.box)], multimask_output=False).masks[0, 0]
    by_box = coins.iou(boxed.numpy(), cup.mask)
    clicked = nano.predict(embedding, [Prompt([(285, 230)], [1])])  # on its front
    ious = [coins.iou(mask.numpy(), cup.mask) for mask in clicked.masks[0]]
    print(f"\ncup: by a box {by_box:.3f}, by a click {ious[int(clicked.iou_predictions.argmax())]:.3f}")
    assert by_box >= 0.4  # weak, like every large object of a photograph


@pytest.mark.xfail(reason="large objects are beyond this checkpoint: the box comes back nearly empty", strict=True)
def test_a_head_by_a_box(nano: Sam) -> None:
    head = photographs.head()
    mask = nano.predict(nano.encode(head.image), [Prompt(box=head.box)], multimask_output=False).masks[0, 0]
    by_box = coins.iou(mask.numpy(), head.mask)
    print(f"\nhead: by a box {by_box:.3f}")
    assert by_box >= 0.5


def test_different_pictures_embed_differently(nano: Sam, photo: np.ndarray) -> None:
    """Far apart compared with how far the features of one picture lie from their mean."""
    pictures = [photo, photographs.cup().image, coins.photograph()]
    features = [nano.encode(picture).features.float() for picture in pictures]
    spread = min(float((one - one.mean((-1, -2), keepdim=True)).norm()) for one in features)
    for a, b in combinations(features, 2):
        assert float((a - b).norm()) > 0.5 * spread


def test_the_package_stays_small() -> None:
    folder = Path(sam.__file__).parent / "assets"
    packaged = [*folder.glob("*.safetensors"), *folder.glob("*.md")]
    assert len(packaged) >= 2
    assert sum(path.stat().st_size for path in packaged) <= 16e6


def test_automatic_masks(nano: Sam, truth: list[coins.Coin]) -> None:
    """A grid of a quarter of the usual clicks finds most coins."""
    records = SamAutomaticMaskGenerator(nano, 16).generate(coins.photograph())
    best = [max(coins.iou(record["segmentation"], coin.mask) for record in records) for coin in truth]
    report(f"automatic masks, best of {len(records)}", best)
    assert sum(score >= GOOD for score in best) >= 18
