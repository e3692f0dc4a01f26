"""Scripts written for ``sam2`` work with ``sam.sam2`` in its place: names, signatures, imports."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sam
import sam.sam2
from sam.drop_in import _SERVED
from sam.sam2.modeling import sam2_utils

# Of the official package's last release, annotations left out.
OFFICIAL: dict[str, str] = json.loads((Path(__file__).parent / "official_sam2_signatures.json").read_text())


def resolve(path: str) -> Any:
    parts = path.split(".")
    for split in range(len(parts), 0, -1):
        try:
            result: Any = importlib.import_module(".".join(["sam.sam2", *parts[:split]]))
        except ModuleNotFoundError:
            continue
        for name in parts[split:]:
            result = getattr(result, name)
        return result
    raise ModuleNotFoundError(path)


@pytest.mark.parametrize("path", OFFICIAL)
def test_signature(path: str) -> None:
    """Official parameters first and in order, same kinds and defaults; what we add has a default."""
    scope: dict[str, Any] = {"torch": torch}
    exec(f"def function({OFFICIAL[path]}): ...", scope)
    both = [list(inspect.signature(kind).parameters.values()) for kind in (scope["function"], resolve(path))]
    swallows = [any(p.kind is p.VAR_KEYWORD for p in parameters) for parameters in both]
    theirs, ours = ([p for p in parameters if p.kind is not p.VAR_KEYWORD] for parameters in both)
    assert swallows[1] or not swallows[0]
    described = [[(p.name, p.kind, p.default) for p in parameters] for parameters in (theirs, ours)]
    assert described[1][: len(theirs)] == described[0]
    assert all(p.default is not p.empty for p in ours[len(theirs) :])


def test_the_table_has_the_names_of_images() -> None:
    modules = {".".join(part for part in path.split(".") if part.islower() or "_" in part) for path in OFFICIAL}
    assert len(OFFICIAL) > 120
    assert {"build_sam.build_sam2", "sam2_image_predictor", "automatic_mask_generator"} <= modules


def test_imports_of_the_official_package_are_this_one() -> None:
    assert "sam2" not in sys.modules
    with sam.as_sam2():
        import sam2
        from sam2 import _C
        from sam2.build_sam import build_sam2
        from sam2.modeling.backbones.hieradet import Hiera
        from sam2.sam2_image_predictor import SAM2ImagePredictor

        assert sam2 is sam.sam2
        assert sam2.__spec__.name == "sam.sam2"
        assert build_sam2 is sam.sam2.build_sam.build_sam2
        assert SAM2ImagePredictor is sam.sam2.sam2_image_predictor.SAM2ImagePredictor
        assert Hiera is resolve("modeling.backbones.hieradet.Hiera")
        spec = importlib.util.find_spec("sam2")
        assert spec is not None
        assert spec.origin is not None
        assert (Path(spec.origin).parent / "configs/sam2.1/sam2.1_hiera_l.yaml").is_file()
        labels, areas = _C.get_connected_componnets(torch.ones(1, 1, 2, 2, dtype=torch.uint8))
        assert (labels > 0).all()
        assert (areas == 4).all()
        with pytest.raises(ModuleNotFoundError, match=r"no module sam2.sam2_camera_predictor: sam2 is served by"):
            importlib.import_module("sam2.sam2_camera_predictor")
    assert "sam2" not in sys.modules


def test_every_module_is_served() -> None:
    below, paths = _SERVED["sam2"]
    folder = Path(str(sam.sam2.__file__)).parent
    names = {".".join(path.relative_to(folder).with_suffix("").parts) for path in folder.rglob("*.py")}
    official = {name.removesuffix(".__init__") for name in names} - {"__init__", "model_tree", "prompt_arrays"}
    assert below == ".sam2"
    assert official == {*paths}


def test_a_box_is_drawn_around_each_mask() -> None:
    masks = torch.zeros(2, 1, 30, 40, dtype=torch.bool)
    masks[0, 0, 5:20, 10:31] = True
    masks[1, 0, :, :] = True
    corners, labels = sam2_utils.sample_box_points(masks, noise=0)
    assert corners.tolist() == [[[10, 5], [30, 19]], [[0, 0], [39, 29]]]
    assert labels.tolist() == [[2, 3], [2, 3]]
    assert labels.dtype == torch.int32
    noisy, _ = sam2_utils.sample_box_points(masks.expand(2, 1, 30, 40).repeat(50, 1, 1, 1))
    exact = corners.repeat(50, 1, 1)
    assert (noisy != exact).any()
    assert ((noisy - exact).abs() <= torch.tensor([3.9, 2.9])).all()
    assert (noisy >= 0).all()
    assert (noisy <= torch.tensor([39, 29])).all()


@pytest.mark.parametrize("method", ["uniform", "center"])
def test_clicks_correct_what_is_wrong(method: str) -> None:
    truth = torch.zeros(3, 1, 40, 50, dtype=torch.bool)
    truth[:, :, 10:30, 10:40] = True
    predicted = truth.clone()
    predicted[0, 0, 10:30, 10:25] = False  # missed
    predicted[1, 0, 32:38, 5:45] = True  # too much
    points, labels = sam2_utils.get_next_point(truth, predicted, method)
    assert points.shape == (3, 1, 2)
    assert labels.dtype == torch.int32
    assert labels[:2, 0].tolist() == [1, 0]
    x, y = points.long()[:, 0].unbind(1)
    wrong = (truth != predicted)[:, 0]
    assert wrong[0, y[0], x[0]]
    assert wrong[1, y[1], x[1]]
    if method == "uniform":  # nothing is wrong: somewhere on the background
        assert labels[2, 0] == 0
        assert not truth[2, 0, y[2], x[2]]
    else:
        assert 15 <= y[0] <= 24
        assert 14 <= x[0] <= 20


def test_the_middle_of_an_error_is_where_opencv_finds_it() -> None:
    cv2 = pytest.importorskip("cv2")
    truth = torch.zeros(1, 1, 30, 30, dtype=torch.bool)
    truth[0, 0, 3:20, 5:16] = True
    truth[0, 0, 8:11, 5:29] = True
    points, labels = sam2_utils.sample_one_point_from_error_center(truth, None)
    depth = cv2.distanceTransform(np.pad(truth[0, 0].numpy(), 1).astype(np.uint8), cv2.DIST_L2, 0)[1:-1, 1:-1]
    x, y = points[0, 0].long().tolist()
    assert depth[y, x] == depth.max()
    assert labels.tolist() == [[1]]
    with pytest.raises(ValueError, match=r"method must be 'uniform' or 'center', got 'best'"):
        sam2_utils.get_next_point(truth, None, "best")
