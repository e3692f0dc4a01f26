"""Weights that are no plain tensors act on every public call as the official modules compute with them, or are refused.

They are int8 levels behind a class of tensors, as libraries have them, and what torch's dynamic quantisation packs. The
scale of a dynamically quantised input is one for the whole batch, so that expected answers are of the same batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import TINY, TINY_2, draw_weights_that_see, quantise_weights, quantized, random_image, random_model
from torch import Tensor
from waiting import SECONDS

import sam
from benchmarks.official_sam2_video import HEIGHT, WIDTH, clip, start
from sam import Prompt
from sam.embedding import ImageEmbedding, ImageFeatures
from sam.engine import Engine
from sam.engine.requests import AutomaticOptions
from sam.images import prepare_image
from sam.inference import Runtime
from sam.inference.module_calls import call_modules
from sam.masks import rle
from sam.masks.results import DecodedMasks
from sam.modeling.build import sam2_arguments
from sam.prompts.layout import PromptLayout
from sam.sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator
from sam.sam2.sam2_image_predictor import SAM2ImagePredictor
from sam.sam2.sam2_video_predictor import SAM2VideoPredictor

IMAGE = random_image(90, 128)
IMAGES = [IMAGE, random_image(70, 60, 1)]
SIZE = TINY_2.image_size
FRAMES = clip(SIZE, 3)
CLICK = [40.0, 40.0]
# More than a CPU decodes at a time.
BOXES = torch.tensor([[4.0, 4, 99, 50], [20, 9, 60, 80]]).repeat(3, 1) + 2 * torch.arange(6.0)[:, None]
GRID = {"points_per_side": 2, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # quantize_dynamic, which programs still call


def behind_a_class(model: Any) -> Any:
    quantise_weights(model)
    return model


KINDS: dict[str, Callable[[Any], Any]] = {"behind a class": behind_a_class, "dynamic": quantized}


@dataclass
class Quantised:
    """A model of such weights, and the answers of its modules, called one by one."""

    model: Any

    @cached_property
    def embedding(self) -> ImageEmbedding:
        return self.model.encode(IMAGE)

    @cached_property
    def pixels(self) -> Tensor:
        """The input of the encoder, whose bits matter: a level that falls to the other side moves all that follows."""
        prepared = prepare_image(IMAGE, self.model.image_geometry)
        return self.model.encoder_input(torch.from_numpy(prepared.pixels), prepared)[None]

    @cached_property
    def as_transformed(self) -> Quantised:
        """The answers to the pixels of SAM 2's official transforms, which round in another order than ``encode``."""
        if isinstance(self.model, sam.Sam):
            return self
        transformed = Quantised(self.model)
        transformed.pixels = SAM2ImagePredictor(self.model)._transforms(IMAGE)[None]
        return transformed

    @cached_property
    @torch.no_grad()
    def maps(self) -> ImageFeatures:
        """The image's features by the official calls."""
        model = self.model
        if isinstance(model, sam.Sam):
            return ImageFeatures(model.image_encoder(self.pixels))
        *finer, coarse = model.forward_image(self.pixels)["backbone_fpn"]
        return ImageFeatures(coarse + model.no_mem_embed.view(1, -1, 1, 1), tuple(finer))

    @property
    def features(self) -> Tensor:
        return self.maps.embedding

    @torch.no_grad()
    def answers(self, clicks: list[list[float]], boxes: Tensor | None = None) -> DecodedMasks:
        """The three masks of each click, given in the image's pixels, and of each box, in those of the input."""
        model = self.model
        points = None
        if clicks:
            scale = model.image_geometry(*IMAGE.shape[:2]).scale
            xy = torch.from_numpy(scale * np.array(clicks, np.float64))[:, None].float()
            points = xy, torch.ones(len(clicks), 1, dtype=torch.int64)
        parts = model.prompt_encoder, model.mask_decoder
        return call_modules(*parts, self.maps, points, boxes, None, True, model.prompt_layout)

    @property
    def click(self) -> Tensor:
        """The low-resolution logits of the three masks of a click, which SAM 2 clamps."""
        logits, limit = self.answers([CLICK]).logits[0], self.model.low_res_limit
        return logits if limit is None else logits.clamp(-limit, limit)

    def everything(self) -> list[float]:
        """The predicted IoUs of the masks of a grid of clicks."""
        height, width = IMAGE.shape[:2]
        grid = [[x * width, y * height] for y in (0.25, 0.75) for x in (0.25, 0.75)]
        return sorted(self.answers(grid).iou.flatten().tolist())

    def predictor(self) -> Any:
        predictor = (sam.SamPredictor if isinstance(self.model, sam.Sam) else SAM2ImagePredictor)(self.model)
        predictor.set_image(IMAGE)
        return predictor

    @property
    def masks(self) -> np.ndarray:
        """The three masks of a click, as bool in the image's size."""
        logits = self.answers([CLICK]).logits[0]
        if isinstance(self.model, sam.Sam):
            masks = self.model.postprocess_masks(logits[None], (90, 128), (90, 128))
        else:
            masks = SAM2ImagePredictor(self.model)._transforms.postprocess_masks(logits[None], (90, 128))
        return (masks[0] > 0).numpy()


def ious(records: list[dict[str, Any]]) -> list[float]:
    return sorted(record["predicted_iou"] for record in records)


def one_engine(q: Quantised, ask: Callable[[Engine], Any]) -> Any:
    with Engine(q.model) as engine:
        return ask(engine).result(SECONDS)


def compiled(q: Quantised) -> Tensor:
    """The click once the decoder and the encoder's blocks are asked to be compiled."""
    q.model.runtime = Runtime(q.model)
    try:
        embedding = q.model.encode(IMAGE)
        logits = q.model.predict(embedding, [Prompt([CLICK], [1])]).low_res_logits[0]
        assert q.model.runtime.buckets == {}
        return logits
    finally:
        q.model.runtime = None


def session(q: Quantised) -> np.ndarray:
    return sam.InteractiveSession(q.model, q.embedding).click(*CLICK).mask()


def best_mask(q: Quantised) -> np.ndarray:
    (iou,) = q.answers([CLICK]).iou
    return q.masks[int(iou.argmax())]


def segmented(q: Quantised) -> np.ndarray:
    (answer,) = one_engine(q, lambda engine: engine.segment(IMAGE, [Prompt([CLICK], [1])]))
    return np.stack([rle.decode(encoded) for encoded in answer.rles])


def set_batch(q: Quantised) -> Any:
    predictor = SAM2ImagePredictor(q.model)
    predictor.set_image_batch(IMAGES)
    return predictor


@torch.no_grad()
def embedding_of_images(q: Quantised) -> Tensor:
    """The embedding of both images, which pass each module of the encoder together."""
    encoder, pixels = q.model.image_encoder, SAM2ImagePredictor(q.model)._transforms.forward_batch(IMAGES)
    maps, _ = encoder.neck(encoder.trunk(pixels))
    return maps[2] + q.model.no_mem_embed.view(1, -1, 1, 1)


@torch.no_grad()
def clicks_on_images(q: Quantised) -> Tensor:
    """The low-resolution logits of a click on each of both images by the official calls."""
    transforms, parts = SAM2ImagePredictor(q.model)._transforms, (q.model.prompt_encoder, q.model.mask_decoder)
    *finer, _ = q.model.forward_image(transforms.forward_batch(IMAGES))["backbone_fpn"]
    embedding, answers = embedding_of_images(q), []
    for row, image in enumerate(IMAGES):
        features = ImageFeatures(embedding[row][None], tuple(x[row][None] for x in finer))
        xy = transforms.transform_coords(torch.tensor([[CLICK]]), normalize=True, orig_hw=image.shape[:2])
        click = xy, torch.ones(1, 1, dtype=torch.int32)
        answers.append(call_modules(*parts, features, click, None, None, True, PromptLayout.BOX_FIRST).logits)
    return torch.cat(answers).clamp(-32, 32)


def tracked(q: Quantised) -> Tensor:
    """The logits of a click on the first frame, and of all frames as they are tracked."""
    state = start(q.model, FRAMES)
    _, _, clicked = q.model.add_new_points_or_box(state, 0, 1, points=[CLICK], labels=[1])
    return torch.cat([clicked, *(masks for _, _, masks in q.model.propagate_in_video(state))])


@torch.no_grad()
def tracked_officially(q: Quantised) -> Tensor:
    """The same, step by step by the calls that the official predictor makes."""
    model, masks = q.model, []
    outputs: dict[str, dict[int, Any]] = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
    for frame, image in enumerate(FRAMES):
        _, features, positions, sizes = model._prepare_backbone_features(model.forward_image(image[None]))
        xy = torch.tensor([[CLICK]]) / torch.tensor([WIDTH, HEIGHT]) * SIZE
        click = {"point_coords": xy, "point_labels": torch.ones(1, 1, dtype=torch.int32)} if frame == 0 else None
        inputs = features, positions, sizes, click, None, outputs, len(FRAMES)
        step = model.track_step(frame, frame == 0, *inputs, run_mem_encoder=frame > 0)
        if frame == 0:  # the memory of a click is made of the mask that was answered
            mask = F.interpolate(step["pred_masks"], (SIZE, SIZE), mode="bilinear", align_corners=False)
            memory = model._encode_new_memory(features, sizes, mask, step["object_score_logits"], True)
            step["maskmem_features"], step["maskmem_pos_enc"] = memory
        step["maskmem_features"] = step["maskmem_features"].bfloat16()
        outputs["cond_frame_outputs" if frame == 0 else "non_cond_frame_outputs"][frame] = step
        masks.append(F.interpolate(step["pred_masks"], (HEIGHT, WIDTH), mode="bilinear", align_corners=False))
    return torch.cat([masks[0], *masks])


Call = tuple[Callable[[Quantised], Any], Callable[[Quantised], Any]]
# What is called, and what the official modules answer.
CALLS: dict[str, Call] = {
    "encode": (lambda q: q.embedding.features, lambda q: q.features),
    "encode_stream": (lambda q: next(iter(sam.encode_stream(q.model, [IMAGE]))).features, lambda q: q.features),
    "predict": (lambda q: q.model.predict(q.embedding, [Prompt([CLICK], [1])]).low_res_logits[0], lambda q: q.click),
    "predict, two images": (
        lambda q: q.model.predict([q.embedding] * 2, [[Prompt([CLICK], [1])]] * 2)[1].low_res_logits[0],
        lambda q: q.click,
    ),
    "predictor": (
        lambda q: torch.from_numpy(q.predictor().predict([CLICK], [1])[2]),
        lambda q: q.as_transformed.click,
    ),
    "predictor's masks": (
        lambda q: q.predictor().predict([CLICK], [1])[0].astype(bool),
        lambda q: q.as_transformed.masks,
    ),
    "session": (session, best_mask),
    "engine.embed": (lambda q: one_engine(q, lambda e: e.embed(IMAGE)).features, lambda q: q.features),
    "engine.segment": (segmented, lambda q: q.masks),
    "engine.automatic": (
        lambda q: ious(one_engine(q, lambda e: e.automatic(IMAGE, AutomaticOptions(**GRID)))),
        Quantised.everything,
    ),
    "compiled": (compiled, lambda q: q.click),
}
CALLS_1: dict[str, Call] = {
    "predict_torch": (
        lambda q: q.predictor().predict_torch(None, None, BOXES)[2],
        lambda q: q.answers([], BOXES).logits,
    ),
    "forward": (
        lambda q: q.model(
            [{"image": torch.from_numpy(IMAGE).permute(2, 0, 1), "original_size": (90, 128), "boxes": BOXES}], True
        )[0]["low_res_logits"],
        lambda q: q.answers([], BOXES).logits,
    ),
    "generate": (
        lambda q: ious(sam.SamAutomaticMaskGenerator(q.model, **GRID).generate(IMAGE)),
        Quantised.everything,
    ),
    "generate_batch": (
        lambda q: ious(sam.SamAutomaticMaskGenerator(q.model, **GRID).generate_batch([IMAGE])[0]),
        Quantised.everything,
    ),
}
CALLS_2: dict[str, Call] = {
    "generate": (
        lambda q: ious(SAM2AutomaticMaskGenerator(q.model, multimask_output=True, **GRID).generate(IMAGE)),
        lambda q: q.as_transformed.everything(),
    ),
    "set_image_batch": (lambda q: set_batch(q).get_image_embedding(), embedding_of_images),
    "predict_batch": (
        lambda q: torch.from_numpy(np.stack(set_batch(q).predict_batch([[CLICK]] * 2, [[1]] * 2)[2])),
        clicks_on_images,
    ),
}
CALLS_OF_VIDEO: dict[str, Call] = {"click and propagate": (tracked, tracked_officially)}
MODELS: dict[str, tuple[Callable[[], Any], dict[str, Call]]] = {
    "SAM": (partial(random_model, TINY), CALLS | CALLS_1),
    "SAM 2": (partial(random_model, TINY_2), CALLS | CALLS_2),
    "SAM 2, videos": (
        lambda: draw_weights_that_see(SAM2VideoPredictor(**sam2_arguments(TINY_2)).eval()),
        CALLS_OF_VIDEO,
    ),
}


ROWS = [(name, kind, call) for name, (_, calls) in MODELS.items() for kind in KINDS for call in calls]


@cache
def quantised(name: str, kind: str) -> Quantised:
    return Quantised(KINDS[kind](MODELS[name][0]()))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models of this size are slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("name", "kind", "call"), ROWS, ids=map(": ".join, ROWS))
def test_a_call_acts_as_the_official_modules(name: str, kind: str, call: str) -> None:
    ours, official = (function(quantised(name, kind)) for function in MODELS[name][1][call])
    if isinstance(ours, list):
        assert len(ours) == len(official)
        ours, official = torch.tensor(ours), torch.tensor(official)
    if isinstance(ours, np.ndarray):
        ours, official = torch.from_numpy(ours), torch.from_numpy(official)
    assert torch.equal(ours, official)
