"""Changes that programs make to the modules and methods of Meta's package, with its answers written down for the tests.

    python -m benchmarks.official_extensions --segment-anything PATH

PATH is the folder from which ``import segment_anything`` works. To be run again when a change is added; it takes a few
seconds. ``tests/test_extension_points.py`` makes the same changes to this package.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .extension_points import SIZE, Change, scaled
from .model_changes import model_changes
from .official_calls import numbers, pixels
from .official_masks import package_version
from .peers import import_segment_anything

TARGET = Path(__file__).parents[1] / "tests" / "official_extensions.json"
SAMPLES = 3
IMAGE = pixels(60, 80, 3)
POINTS, LABELS = np.array([[30.0, 20.0], [50.0, 41.0]]), np.array([1, 0])
BOX = np.array([10.0, 5.0, 61.0, 50.0])


# Changes of predictors and generators ----------------------------------------------------------------------

PREDICTOR_METHODS = ("set_image", "set_torch_image", "predict_torch", "reset_image")
TRANSFORM_METHODS = ("apply_image", "apply_coords", "apply_boxes")
GENERATOR_METHODS = ("_generate_masks", "_process_crop", "_process_batch")
GENERATOR_FUNCTIONS = (
    *("generate_crop_boxes", "batch_iterator", "calculate_stability_score", "batched_mask_to_box"),
    *("is_box_near_crop_edge", "uncrop_masks", "mask_to_rle_pytorch", "uncrop_boxes_xyxy", "uncrop_points"),
    *("area_from_rle", "box_xyxy_to_xywh"),
)


class OwnTransform:
    """A transform that a program wrote: it resizes as ``inner`` and moves points by a pixel."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        return 255 - self.inner.apply_image(image)

    def apply_coords(self, coords: np.ndarray, original_size: tuple[int, ...]) -> np.ndarray:
        return self.inner.apply_coords(coords, original_size) + 1

    def apply_boxes(self, boxes: np.ndarray, original_size: tuple[int, ...]) -> np.ndarray:
        return self.inner.apply_boxes(boxes, original_size) - 1


class OwnPredictor:
    """A predictor that a program wrote, with what the official generator asks of one and no more."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.model, self.transform, self.device = inner.model, inner.transform, inner.device

    def set_image(self, image: np.ndarray) -> None:
        self._inner.set_image(255 - image)

    def reset_image(self) -> None:
        self._inner.reset_image()

    def predict_torch(self, *args: Any, **kwargs: Any) -> Any:
        return scaled(self._inner.predict_torch(*args, **kwargs))


def change_transform(predictor: Any) -> None:
    predictor.transform = OwnTransform(predictor.transform)


def halve_features(predictor: Any) -> None:
    predictor.features = 0.5 * predictor.features


def change_model(predictor: Any) -> None:
    predictor.model.mask_decoder.iou_prediction_head = nn.Sequential(predictor.model.mask_decoder.iou_prediction_head)


def change_predictor(generator: Any) -> None:
    generator.predictor = OwnPredictor(generator.predictor)


def change_attributes(generator: Any) -> None:
    generator.points_per_batch, generator.stability_score_offset, generator.box_nms_thresh = 2, 0.25, 0.5
    generator.point_grids = [grid[::-1] for grid in generator.point_grids]


def predictor_changes() -> dict[str, Callable[[Change], None]]:
    """Return what programs do to predictors, those of generators included, by name."""
    changes: dict[str, Callable[[Change], None]] = {}
    for method in PREDICTOR_METHODS:
        changes[f"predictor.{method} on the instance"] = lambda change, method=method: change.to_predictors.append(
            lambda predictor: change.wrap(predictor, method)
        )
        changes[f"predictor.{method} on the class"] = lambda change, method=method: change.wrap(
            change.package.SamPredictor, method
        )
        changes[f"predictor.{method} on the subclass"] = lambda change, method=method: change.to_predictors.append(
            lambda predictor: change.subclass(predictor, method)
        )
    for method in TRANSFORM_METHODS:
        changes[f"transform.{method} on the instance"] = lambda change, method=method: change.to_predictors.append(
            lambda predictor: change.wrap(predictor.transform, method)
        )
        changes[f"transform.{method} on the class"] = lambda change, method=method: change.wrap(
            change.module("utils.transforms").ResizeLongestSide, method
        )
        changes[f"transform.{method} on the subclass"] = lambda change, method=method: change.to_predictors.append(
            lambda predictor: change.subclass(predictor.transform, method)
        )
    changes["a transform of one's own"] = lambda change: change.to_predictors.append(change_transform)
    changes["a model changed through the predictor"] = lambda change: change.to_predictors.append(change_model)
    return changes


def features_changes() -> dict[str, Callable[[Change], None]]:
    return {"features by hand": lambda change: change.to_set_predictors.append(halve_features)}


def generator_changes() -> dict[str, Callable[[Change], None]]:
    """Return what programs do to generators, by name."""
    changes = predictor_changes()
    for method in GENERATOR_METHODS:
        changes[f"generator.{method} on the instance"] = lambda change, method=method: change.to_generators.append(
            lambda generator: change.wrap(generator, method, alter=lambda answer: answer)
        )
        changes[f"generator.{method} on the class"] = lambda change, method=method: change.wrap(
            change.package.SamAutomaticMaskGenerator, method, alter=lambda answer: answer
        )
        changes[f"generator.{method} on the subclass"] = lambda change, method=method: change.to_generators.append(
            lambda generator: change.subclass(generator, method)
        )
    for name in GENERATOR_FUNCTIONS:
        changes[f"automatic_mask_generator.{name}"] = lambda change, name=name: change.wrap(
            change.module("automatic_mask_generator"), name
        )
    changes["a predictor of one's own"] = lambda change: change.to_generators.append(change_predictor)
    changes["other attributes"] = lambda change: change.to_generators.append(change_attributes)
    names = ("model.postprocess_masks on the instance", "model.postprocess_masks on the subclass")
    names += ("model.preprocess on the instance", "mask_decoder.predict_masks on the instance")
    names += ("forward hook on mask_decoder.output_upscaling", "a traced mask decoder")
    return changes | {name: model_changes()[name] for name in names}


def generated(change: Change) -> dict[str, Any]:
    """Ask a changed generator for all masks of an image, and then by its inner methods for their parts."""
    generator = change.generator()
    records = generator.generate(IMAGE)
    result: dict[str, Any] = {"calls of generate": change.log.take()}
    for name in ("bbox", "area", "predicted_iou", "stability_score", "point_coords", "crop_box"):
        result[name] = torch.tensor([record[name] for record in records], dtype=torch.float64)
    data = generator._generate_masks(IMAGE)
    result |= {f"{name} of _generate_masks": column for name, column in data.items() if name != "rles"}
    height, width = IMAGE.shape[:2]
    data = generator._process_crop(IMAGE, [10, 5, 70, 50], 1, (height, width))
    result |= {f"{name} of _process_crop": column for name, column in data.items() if name != "rles"}
    generator.predictor.set_image(IMAGE)
    data = generator._process_batch(
        np.array([[20.0, 30.0], [60.0, 7.0]]), (height, width), [0, 0, width, height], (height, width)
    )
    result |= {f"{name} of _process_batch": column for name, column in data.items() if name != "rles"}
    return result | {"calls of inner methods": change.log.take()}


def answers(change: Change) -> dict[str, Any]:
    """Ask a changed model by the official calls: points, then points, box and mask together, then ``forward``."""
    predictor = change.predictor()
    predictor.set_image(IMAGE)
    for make in change.to_set_predictors:
        make(predictor)
    result: dict[str, Any] = {"calls of set_image": change.log.take(), "features": predictor.get_image_embedding()}
    mask = numbers(1, 32, 32, seed=9).numpy()
    prompts: dict[str, dict[str, Any]] = {
        "points": {"point_coords": POINTS, "point_labels": LABELS},
        "all": {"point_coords": POINTS, "point_labels": LABELS, "box": BOX, "mask_input": mask},
    }
    for name, prompt in prompts.items():
        masks, iou, low_res = predictor.predict(**prompt, return_logits=True)
        result |= {f"calls of {name}": change.log.take()}
        result |= {f"masks of {name}": masks, f"iou of {name}": iou, f"low_res of {name}": low_res}
    (output,) = change.model([forward_input(mask)], multimask_output=True)
    result["calls of forward"] = change.log.take()
    return result | {"forward masks": output["masks"].double(), "forward low_res": output["low_res_logits"]}


def forward_input(mask: np.ndarray) -> dict[str, Any]:
    """Return the input of ``Sam.forward`` for two prompts of points, box and mask each."""
    return {
        "image": torch.from_numpy(pixels(3, 96, SIZE, seed=12)),
        "original_size": (60, 80),
        "point_coords": torch.tensor([[[40.0, 30.0]], [[70.0, 60.0]]]),
        "point_labels": torch.tensor([[1], [0]]),
        "boxes": torch.tensor([[10.0, 8.0, 90.0, 80.0], [1.0, 2.0, 50.0, 60.0]]),
        "mask_inputs": torch.from_numpy(mask)[None].repeat(2, 1, 1, 1),
    }


def written(answer: Any) -> Any:
    """Describe an answer: calls as they are, numbers by their shape, norm and values at places spread over them."""
    if isinstance(answer, list):
        return answer
    values = torch.as_tensor(answer).detach().double()
    flat = values.flatten()
    positions = torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat)), dtype=torch.float64).round().long()
    samples = [float(f"{value:.6g}") for value in flat[positions].tolist()]
    return {"shape": list(values.shape), "norm": float(f"{float(flat.norm()):.7g}"), "samples": samples}


TABLES: dict[str, tuple[Callable[[], dict[str, Callable[[Change], None]]], Callable[[Change], dict[str, Any]]]] = {
    "predictor and forward": (lambda: model_changes() | predictor_changes() | features_changes(), answers),
    "generator": (generator_changes, generated),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.official_extensions", description=__doc__)
    parser.add_argument("--segment-anything", default="", metavar="PATH", help="folder of the package")
    package = import_segment_anything(parser.parse_args().segment_anything)
    torch.set_num_threads(1)  # models of this size are slower with more
    parts = []
    for table, (changes, ask) in TABLES.items():
        lines = []
        for name, make in changes().items():
            with Change(package) as change:
                make(change)
                row = {key: written(answer) for key, answer in ask(change).items()}
            lines.append(f"{json.dumps(name)}: {json.dumps(row)}")
        parts.append(f"{json.dumps(table)}: {{\n" + ",\n".join(lines) + "\n}")
    head = json.dumps({"package": package_version()})[:-1]
    TARGET.write_text(head + ", " + ",\n".join(parts) + "}\n")


if __name__ == "__main__":
    main()
