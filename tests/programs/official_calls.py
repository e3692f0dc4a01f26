"""A program for ``segment_anything``: the options of its script for automatic masks, the calls of its notebooks.

Run by tests under ``sam run``; it prints what it found as one line of JSON and ends with status 7.
"""

import argparse
import csv
import importlib
import importlib.util
import json
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--input", required=True)
parser.add_argument("--output", required=True)
parser.add_argument("--model-type", required=True)
parser.add_argument("--checkpoint", required=True)
parser.add_argument("--device", default="cuda")
parser.add_argument("--convert-to-rle", action="store_true")
settings = parser.add_argument_group("AMG Settings")
for option in ("points-per-side", "points-per-batch", "crop-n-layers", "crop-n-points-downscale-factor"):
    settings.add_argument("--" + option, type=int)
for option in ("pred-iou-thresh", "stability-score-thresh", "stability-score-offset", "box-nms-thresh"):
    settings.add_argument("--" + option, type=float)
settings.add_argument("--crop-nms-thresh", type=float)
settings.add_argument("--crop-overlap-ratio", type=int)
settings.add_argument("--min-mask-region-area", type=int)


def where(_=None):
    """Where this process would import ``segment_anything`` from, without doing so."""
    return importlib.util.find_spec("segment_anything").origin


def processes():
    result = {"spawn": multiprocessing.get_context("spawn").Pool(1).map(where, [0])[0]}
    code = "import importlib.util; print(importlib.util.find_spec('segment_anything').origin)"
    result["subprocess"] = subprocess.check_output([sys.executable, "-c", code], text=True).strip()
    return result


def names():
    table = json.loads((Path(__file__).parent / "official_names.json").read_text())
    missing = [f"{m}.{n}" for m in table for n in table[m] if not hasattr(importlib.import_module(m), n)]
    import segment_anything.modeling.image_encoder as image_encoder
    from segment_anything.utils import amg, onnx, transforms

    scope = {}
    exec("from segment_anything.utils.amg import *", scope)
    pickled = b"csegment_anything.modeling.image_encoder\nBlock\n."
    return {
        "missing": missing,
        "star": scope["rle_to_mask"] is amg.rle_to_mask,
        "from": (onnx.__name__, transforms.__name__),
        "pickle": pickle.loads(pickled) is image_encoder.Block,
        "function": callable(importlib.import_module("segment_anything").build_sam),
    }


def automatic_masks(args, model, image):
    from segment_anything import SamAutomaticMaskGenerator

    given = {
        name: value
        for name, value in vars(args).items()
        if value is not None and name not in ("input", "output", "model_type", "checkpoint", "device", "convert_to_rle")
    }
    output_mode = "coco_rle" if args.convert_to_rle else "binary_mask"
    masks = SamAutomaticMaskGenerator(model, output_mode=output_mode, **given).generate(image)
    if args.convert_to_rle:
        Path(args.output, "masks.json").write_text(json.dumps(masks))
        return len(masks)
    with open(Path(args.output, "metadata.csv"), "w") as file:
        writer = csv.writer(file)
        for index, mask in enumerate(masks):
            row = [index, mask["area"], *mask["bbox"], *mask["point_coords"][0]]
            writer.writerow([*row, mask["predicted_iou"], mask["stability_score"], *mask["crop_box"]])
    return len(masks)


def clicks(model, image):
    """The predictor's notebook: a point, a correction with the mask fed back, boxes together, images together."""
    import numpy as np
    import torch
    from segment_anything import SamPredictor
    from segment_anything.utils.transforms import ResizeLongestSide

    predictor = SamPredictor(model)
    predictor.set_image(image)
    point, label = np.array([[120, 80]]), np.array([1])
    masks, scores, logits = predictor.predict(point_coords=point, point_labels=label, multimask_output=True)
    best = logits[np.argmax(scores), :, :]
    points, labels = np.array([[120, 80], [10, 10]]), np.array([1, 0])
    corrected, _, _ = predictor.predict(points, labels, mask_input=best[None], multimask_output=False)
    boxed, _, _ = predictor.predict(None, None, box=np.array([20, 20, 200, 150])[None, :], multimask_output=False)
    boxes = torch.tensor([[20, 20, 200, 150], [5, 5, 60, 70]], device=predictor.device)
    transformed = predictor.transform.apply_boxes_torch(boxes, image.shape[:2])
    together, _, _ = predictor.predict_torch(None, None, boxes=transformed, multimask_output=False)
    resize = ResizeLongestSide(model.image_encoder.img_size)
    pixels = torch.as_tensor(resize.apply_image(image), device=model.device).permute(2, 0, 1).contiguous()
    prompts = resize.apply_boxes_torch(boxes, image.shape[:2])
    batch = [{"image": pixels, "boxes": prompts, "original_size": image.shape[:2]}] * 2
    outputs = model(batch, multimask_output=False)
    shapes = [masks.shape, corrected.shape, boxed.shape, together.shape, outputs[1]["masks"].shape]
    return [list(shape) for shape in shapes], predictor.get_image_embedding(), best


def decoder(model, embedding, best):
    """The notebook that exports: the wrapped decoder on a point and its padding."""
    import torch
    from segment_anything.utils.onnx import SamOnnxModel

    masks, scores, _ = SamOnnxModel(model, return_single_mask=True)(
        image_embeddings=embedding,
        point_coords=torch.tensor([[[120.0, 80.0], [0.0, 0.0]]]),
        point_labels=torch.tensor([[1.0, -1.0]]),
        mask_input=torch.as_tensor(best)[None, None],
        has_mask_input=torch.ones(1),
        orig_im_size=torch.tensor([300.0, 451.0]),
    )
    return [list(masks.shape), list(scores.shape)]


def main():
    args = parser.parse_args()
    result = {
        "path": sys.path[0],
        "file": __file__,
        "warnings": sys.warnoptions,
        "unbuffered": sys.stdout.write_through,
        "before": where(),
        **processes(),
    }
    result.update(names())
    import cv2
    from segment_anything import sam_model_registry

    model = sam_model_registry[args.model_type](checkpoint=args.checkpoint)
    model.to(device=args.device)
    image = cv2.cvtColor(cv2.imread(args.input), cv2.COLOR_BGR2RGB)
    result["masks"] = automatic_masks(args, model, image)
    result["clicks"], embedding, best = clicks(model, image)
    result["decoder"] = decoder(model, embedding, best)
    amg = sys.modules["segment_anything.utils.amg"]
    result["reload"] = importlib.reload(amg) is amg  # last, as its classes are others then
    print(json.dumps(result))
    sys.exit(7)


if __name__ == "__main__":
    main()
