"""Calls with an argument of a wrong type or shape at every public edge, and the message of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from models import TINY, random_image

import sam
from sam import InteractiveSession, Prompt, Sam, SamAutomaticMaskGenerator, SamPredictor
from sam.build_sam import NANO_CHECKPOINT
from sam.checkpoint import read_checkpoint, write_checkpoint
from sam.engine import Engine
from sam.images.read import read_image
from sam.utils import amg
from sam.utils.transforms import ResizeLongestSide

IMAGE = random_image(30, 40)
TRANSFORM = ResizeLongestSide(64)
Edge = Callable[[Sam, Any], Any]


def generator(model: Sam) -> SamAutomaticMaskGenerator:
    return SamAutomaticMaskGenerator(model, points_per_side=1)


def predictor(model: Sam) -> SamPredictor:
    made = SamPredictor(model)
    made.set_image(IMAGE)
    return made


# What takes an image, and what it makes of one: floating point in 0..1 is what its pixels in 0..255 are.
IMAGE_EDGES: dict[str, Edge] = {
    "set_image": lambda model, image: SamPredictor(model).set_image(image),
    "encode": lambda model, image: model.encode([image]),
    "encode on device": lambda model, image: model.encode([image], resize_on_device=True),
    "generate": lambda model, image: generator(model).generate(image),
    "generate_batch": lambda model, image: generator(model).generate_batch([image]),
    "steps": lambda model, image: generator(model).steps(image),
    "apply_image": lambda model, image: TRANSFORM.apply_image(image),
    "encode_stream": lambda model, image: list(sam.encode_stream(model, [image])),
    "predict_stream": lambda model, image: list(sam.predict_stream(model, [(image, [])])),
}


ARRAY, TENSOR = np.zeros((1, 4)), torch.zeros(1, 4)
EDGES: dict[str, tuple[Edge, Any, str]] = {
    "SamPredictor": (lambda model, x: SamPredictor(x), "vit_b", "model must be a sam.Sam, got str"),
    "generator": (lambda model, x: SamAutomaticMaskGenerator(x), None, "model must be a sam.Sam, got NoneType"),
    "session": (lambda model, x: InteractiveSession(x, model.encode(IMAGE)), 3, "model must be a sam.Sam, got int"),
    "session of an image": (InteractiveSession, IMAGE, "embedding must be an ImageEmbedding.*, got ndarray"),
    "set_torch_image": (
        lambda model, x: SamPredictor(model).set_torch_image(x, (30, 40)),
        np.zeros((1, 3, 96, 128)),
        r"transformed_image must be a torch.Tensor \[1, 3, h, w\] in 0..255, got ndarray",
    ),
    "its size": (
        lambda model, x: SamPredictor(model).set_torch_image(torch.zeros(1, 3, 96, 128), x),
        (30,),
        r"original_size must be \(height, width\) in pixels, got \(30,\)",
    ),
    "its size, a number": (
        lambda model, x: SamPredictor(model).set_torch_image(torch.zeros(1, 3, 96, 128), x),
        30,
        r"original_size must be \(height, width\) in pixels, got 30",
    ),
    "points of tensors": (
        lambda model, x: predictor(model).predict_torch(x, torch.ones(1, 1)),
        np.zeros((1, 1, 2)),
        r"point_coords must be a torch.Tensor \(predict takes arrays\), got ndarray",
    ),
    "labels of tensors": (
        lambda model, x: predictor(model).predict_torch(torch.ones(1, 1, 2), x),
        [[1]],
        "point_labels must be a torch.Tensor .*got list",
    ),
    "boxes of tensors": (
        lambda model, x: predictor(model).predict_torch(None, None, x),
        ARRAY,
        "boxes must be a torch.Tensor .*got ndarray",
    ),
    "mask of tensors": (
        lambda model, x: predictor(model).predict_torch(None, None, mask_input=x),
        np.zeros((1, 1, 32, 32)),
        "mask_input must be a torch.Tensor .*got ndarray",
    ),
    "points": (lambda model, x: Prompt(x, [1]), "here", r"points must be an array of numbers \[N, 2\], got str 'here'"),
    "ragged points": (
        lambda model, x: Prompt(x, [1, 1]),
        [[1, 2], [3]],
        "points must be an array of numbers .*got list",
    ),
    "points of the predictor": (
        lambda model, x: predictor(model).predict(x, [1]),
        {"x": 1},
        r"points must be an array of numbers \[N, 2\], got dict",
    ),
    "labels": (lambda model, x: Prompt([(1, 1)], x), ["object"], r"labels must be an array of numbers \[N\], got list"),
    "labels of objects": (
        lambda model, x: Prompt([(1, 1)], x),
        [None],
        "labels must be an array of numbers .*got list",
    ),
    "box": (lambda model, x: Prompt(box=x), "0 0 9 9", r"box must be an array of numbers \[4\], got str '0 0 9 9'"),
    "mask input": (
        lambda model, x: Prompt(mask_input=x),
        object(),
        "mask_input must be an array of numbers .*got object",
    ),
    "a click": (
        lambda model, x: InteractiveSession(model, model.encode(IMAGE)).click(x, 3),
        "left",
        r"points must be an array of numbers \[N, 2\]",
    ),
    "prompts": (
        lambda model, x: model.predict(model.encode(IMAGE), x),
        [(3, 4)],
        "a prompt of embedding 0 must be a sam.Prompt, got tuple",
    ),
    "no list of prompts": (
        lambda model, x: model.predict(model.encode(IMAGE), x),
        3,
        "prompts must be a list of Prompt, .*got int",
    ),
    "a list of prompts for many": (
        lambda model, x: model.predict([model.encode(IMAGE)], x),
        [Prompt([(1, 1)], [1])],
        "the prompts of embedding 0 must be a list of Prompt, got Prompt",
    ),
    "embeddings": (
        lambda model, x: model.predict([x], [[]]),
        torch.zeros(1, 64, 8, 8),
        "embeddings must be an ImageEmbedding or a list of them, got Tensor",
    ),
    "an image in place of its embedding": (
        lambda model, x: model.predict(x, []),
        IMAGE,
        "embeddings must be an ImageEmbedding or a list of them, got ndarray",
    ),
    "forward": (
        lambda model, x: model(x, True),
        {"image": 1},
        "batched_input must be a list of dictionaries, got dict",
    ),
    "a record": (lambda model, x: model([x], True), TENSOR, r"batched_input\[0\] must be a dictionary, got Tensor"),
    "its image": (
        lambda model, x: model([{"image": x, "original_size": (30, 40)}], True),
        IMAGE,
        r"image of batched_input\[0\] must be a torch.Tensor, got ndarray",
    ),
    "its boxes": (
        lambda model, x: model([{"image": torch.zeros(3, 128, 96), "original_size": (30, 40), "boxes": x}], True),
        ARRAY,
        r"boxes of batched_input\[0\] must be a torch.Tensor, got ndarray",
    ),
    "preprocess": (
        lambda model, x: model.preprocess(x),
        IMAGE,
        r"x must be a torch.Tensor \[..., 3, h, w\] .*got ndarray",
    ),
    "postprocess_masks": (
        lambda model, x: model.postprocess_masks(x, (9, 9), (9, 9)),
        ARRAY,
        r"masks must be a torch.Tensor \[P, C, h, w\], got ndarray",
    ),
    "generate_batch": (
        lambda model, x: generator(model).generate_batch(x),
        3,
        "images must be a list of arrays .*got int",
    ),
    "apply_coords": (
        lambda model, x: TRANSFORM.apply_coords(x, (9, 9)),
        "1, 2",
        "an array of numbers is wanted, got str",
    ),
    "apply_boxes": (
        lambda model, x: TRANSFORM.apply_boxes(x, (9, 9)),
        [None, {}],
        "an array of numbers is wanted, got list",
    ),
    "apply_image_torch": (
        lambda model, x: TRANSFORM.apply_image_torch(x),
        IMAGE,
        r"image must be a torch.Tensor \[B, C, H, W\], got ndarray",
    ),
    "apply_coords_torch": (
        lambda model, x: TRANSFORM.apply_coords_torch(x, (9, 9)),
        ARRAY,
        r"coords must be a torch.Tensor \[..., 2\], got ndarray",
    ),
    "apply_boxes_torch": (
        lambda model, x: TRANSFORM.apply_boxes_torch(x, (9, 9)),
        [[0, 0, 1, 1]],
        r"boxes must be a torch.Tensor \[B, 4\], got list",
    ),
    "mask_to_rle_pytorch": (
        lambda model, x: amg.mask_to_rle_pytorch(x),
        IMAGE > 9,
        "masks must be a torch.Tensor .*got nd",
    ),
    "stability": (
        lambda model, x: amg.calculate_stability_score(x, 0, 1),
        ARRAY,
        "masks must be a torch.Tensor .*got nd",
    ),
    "batched_mask_to_box": (
        lambda model, x: amg.batched_mask_to_box(x),
        IMAGE > 9,
        "masks must be a torch.Tensor .*got nd",
    ),
    "uncrop_masks": (
        lambda model, x: amg.uncrop_masks(x, [0, 0, 1, 1], 2, 2),
        ARRAY,
        "masks must be a torch.Tensor .*got nd",
    ),
    "uncrop_points": (
        lambda model, x: amg.uncrop_points(x, [1, 1, 2, 2]),
        ARRAY,
        "points must be a torch.Tensor .*got nd",
    ),
    "uncrop_boxes": (
        lambda model, x: amg.uncrop_boxes_xyxy(x, [1, 1, 2, 2]),
        ARRAY,
        "boxes must be a torch.Tensor .*got nd",
    ),
    "near edge": (
        lambda model, x: amg.is_box_near_crop_edge(x, [0, 0, 1, 1], [0, 0, 2, 2]),
        ARRAY,
        "boxes must be a torch.Tensor .*got ndarray",
    ),
    "rle_to_mask": (
        lambda model, x: amg.rle_to_mask(x),
        [3, 4],
        "rle must be a dictionary of size and counts, got list",
    ),
    "area_from_rle": (
        lambda model, x: amg.area_from_rle(x),
        "34",
        "rle must be a dictionary of size and counts, got str",
    ),
    "coco_encode_rle": (
        lambda model, x: amg.coco_encode_rle(x),
        None,
        "must be a dictionary of size and counts, got None",
    ),
    "build_point_grid": (lambda model, x: amg.build_point_grid(x), "32", "n_per_side must be an int, got str"),
    "MaskData.filter": (
        lambda model, x: amg.MaskData(a=[1]).filter(x),
        [True],
        "keep must be a torch.Tensor .*got list",
    ),
    "MaskData.cat": (lambda model, x: amg.MaskData().cat(x), {"a": []}, "new_stats must be a MaskData, got dict"),
    "a stream of numbers": (
        lambda model, x: list(sam.encode_stream(model, [x])),
        3,
        r"image 0: the image must be a numpy array \[H, W, 3\] of uint8, or a file, got int",
    ),
}


EDGES |= {
    "no model to save": (
        lambda model, x: sam.save_checkpoint(x, "w.pth"),
        None,
        "the model must be a sam.Sam, or a module around one, got NoneType",
    ),
    "a state dict to save": (
        lambda model, x: sam.save_checkpoint(x, "w.pth"),
        {"a": TENSOR},
        "must be a sam.Sam, or a module around one, got dict; sam.checkpoint.write_checkpoint takes a state dict",
    ),
    "another module to save": (
        lambda model, x: sam.save_checkpoint(x, "w.pth"),
        torch.nn.ReLU(),
        "must be a sam.Sam, .*got ReLU$",
    ),
    "a path to save to": (
        lambda model, x: sam.save_checkpoint(model, x),
        3,
        "path must be a path, a str or os.PathLike, got int",
    ),
    "metadata": (
        lambda model, x: sam.save_checkpoint(model, "w.safetensors", metadata=x),
        5,
        "metadata must be a mapping of strings to strings, got int",
    ),
    "metadata that is false": (
        lambda model, x: sam.save_checkpoint(model, "w.safetensors", metadata=x),
        0,
        "metadata must be a mapping of strings to strings, got int",
    ),
    "weights to write": (
        lambda model, x: write_checkpoint(x, TINY, "w.pth"),
        [TENSOR],
        "state_dict must be a mapping of names to tensors, got list",
    ),
    "the config to write": (
        lambda model, x: write_checkpoint(model.state_dict(), x, "w.pth"),
        "tiny",
        "config must be a SamConfig or a Sam2Config, got str",
    ),
    "a checkpoint": (lambda model, x: sam.load_model(x), 123, "checkpoint must be a path, .*got int"),
    "a checkpoint of the registry": (
        lambda model, x: sam.sam_model_registry["vit_b"](checkpoint=x),
        {"a": TENSOR},
        "checkpoint must be a path, a str or os.PathLike, got dict",
    ),
    "a variant": (
        lambda model, x: sam.load_model(variant=x),
        ["vit_b"],
        "variant must be one of vit_b, vit_l, vit_h, nano, sam2_tiny, .*, got list",
    ),
    "a device": (
        lambda model, x: sam.load_model(device=x),
        3.5,
        r"device must be a torch.device or its name like 'cuda:0', got 3\.5",
    ),
    "a device that is true": (lambda model, x: sam.load_model(device=x), True, "device must be .*got True"),
    "the config to build": (
        lambda model, x: sam.build_from_config(x),
        "nano",
        "config must be a SamConfig or a Sam2Config, got str",
    ),
    "the config to read": (
        lambda model, x: read_checkpoint(NANO_CHECKPOINT, config=x),
        "nano",
        "config must be a SamConfig or a Sam2Config, got str",
    ),
    "an embedding's file": (lambda model, x: sam.ImageEmbedding.load(x), None, "path must be a path, .*got NoneType"),
    "an embedding's file to write": (
        lambda model, x: model.encode(IMAGE).save(x),
        3,
        "path must be a path, a str or os.PathLike, got int",
    ),
    "an embedding's device": (lambda model, x: model.encode(IMAGE).to(x), 3.5, r"device must be .*got 3\.5"),
    "a loaded embedding's device": (
        lambda model, x: sam.ImageEmbedding.load("e.safetensors", x),
        torch.float32,
        "device must be .*got torch.float32",
    ),
    "Engine": (lambda model, x: Engine(x), "nano", "model must be a sam.Sam, got str"),
    "a file of an image": (lambda model, x: read_image(x), None, "image file must be a path, .*got NoneType"),
    "a limit of pixels": (
        lambda model, x: read_image("a.png", x),
        "5",
        "max_megapixels must be a number, or None for no limit, got str",
    ),
}
