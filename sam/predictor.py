"""``SamPredictor``: one image at a time, prompts as numpy arrays or tensors, as in the official package."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checks import require, require_model
from .embedding import ImageEmbedding, ImageFeatures
from .images.geometry import ImageGeometry
from .images.prepare import CheckedImage
from .inference.eligibility import why_not_fused
from .inference.module_calls import call_modules
from .modeling import Sam
from .prompts.batch import PromptBatch
from .prompts.prompt import OfficialPrompt
from .prompts.tensors import check_prompt_tensors
from .system.methods import WrittenMethods, what_was_replaced
from .utils.transforms import ResizeLongestSide

_SHARED = (
    "another thread is setting an image on this SamPredictor: use one for each thread, "
    "or model.encode and model.predict"
)


class SamPredictor:
    """Embeds an image once and predicts masks for any number of prompts.

    A thin shell over :class:`sam.modeling.Sam`. ``features``, ``input_size``, ``original_size`` and
    ``is_image_set`` are plain attributes: set all four to restore an embedding saved earlier. A call that
    raises leaves the image that was set as it was.

    Threads may ask about one image. They may not set images of their own: whoever sets one, or asks, while another
    thread sets an image gets a ``RuntimeError``. ``model.encode`` and ``model.predict`` are for sharing.
    """

    # Of the class, for subclasses that do not call ``__init__``.
    is_image_set: bool = False
    features: Tensor | None = None
    original_size: tuple[int, int]
    input_size: tuple[int, int]
    _handle: ImageEmbedding | None = None
    _setter: int  # the thread that is setting an image, there for as long as it does

    def __init__(self, sam_model: Sam) -> None:
        """Predict with ``sam_model``; no image is set yet.

        Raises:
            TypeError: no SAM model.
        """
        require_model(sam_model)
        if getattr(sam_model, "stretches_images", False):
            raise TypeError("a SAM 2 model takes sam.sam2's SAM2ImagePredictor, or model.encode and model.predict")
        self.model = sam_model
        self.transform = ResizeLongestSide(sam_model.image_size)
        self.reset_image()

    def set_image(self, image: np.ndarray, image_format: str = "RGB") -> None:
        """Embed an image, [H, W, 3] uint8 in the channel order ``image_format``, "RGB" or "BGR".

        Floating-point pixels must lie in 0..1, and are multiplied by 255 as officially.

        Raises:
            TypeError, ValueError: another kind of image, or one too long and thin to be resized.
        """
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format must be 'RGB' or 'BGR', got {image_format!r}")
        checked = CheckedImage.of(image, self.model.image_geometry)
        image = checked.pixels if image_format == self.model.image_format else checked.pixels[..., ::-1]
        resized = np.ascontiguousarray(self.transform.apply_image(image))
        pixels = torch.as_tensor(resized, device=self.device).permute(2, 0, 1).contiguous()
        self.set_torch_image(pixels[None], checked.geometry.original_size)

    @torch.no_grad()
    def set_torch_image(self, transformed_image: Tensor, original_image_size: tuple[int, int]) -> None:
        """Embed an image already transformed with ``ResizeLongestSide``.

        Args:
            transformed_image: [1, 3, h, w] in 0..255, the longer side the model's image size.
            original_image_size: (height, width) before the transformation.

        Raises:
            TypeError: no tensor, or a size that is no two numbers.
            ValueError: another shape.
            RuntimeError: another thread is setting an image on this predictor.
        """
        require("transformed_image", transformed_image, Tensor, "a torch.Tensor [1, 3, h, w] in 0..255")
        long_side, shape = self.model.image_size, list(transformed_image.shape)
        if len(shape) != 4 or shape[1] != 3 or max(shape[2:]) != long_side:
            raise ValueError(f"set_torch_image takes [1, 3, h, w] with a longer side of {long_side}, got {shape}")
        input_size = (transformed_image.shape[-2], transformed_image.shape[-1])
        geometry = ImageGeometry(original_image_size, input_size, long_side)
        with self._setting_an_image():
            features = self.model.image_features(self.model.preprocess(transformed_image)).embedding
            self.reset_image()
            self.original_size = original_image_size
            self.input_size = input_size
            self.features = features
            self.is_image_set = True
            if len(features) == 1:  # made here: another thread that asks, on a stream of its own, waits for this one
                self._handle = ImageEmbedding(features, geometry)

    @contextmanager
    def _setting_an_image(self) -> Iterator[None]:
        me = threading.get_ident()
        if vars(self).setdefault("_setter", me) != me:  # one step, so that one of two threads is the first
            raise RuntimeError(_SHARED)
        try:
            yield
        finally:
            del self._setter

    def predict(
        self,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Predict masks for one prompt on the image that is set.

        Args:
            point_coords: [N, 2] as (x, y) in pixels of the original image.
            point_labels: [N], 1 for the object, 0 for the background.
            box: [4] as x0, y0, x1, y1 in pixels of the original image.
            mask_input: [1, h, w] low-resolution logits of an earlier prediction.
            multimask_output: three masks, for a prompt that may mean several things; else one.
            return_logits: logits instead of boolean masks.

        Returns:
            masks [C, H, W] bool at the original size (fp32 if logits), predicted IoU [C] fp32, and
            low-resolution logits [C, h, w] fp32.

        Raises:
            RuntimeError: no image is set.
            ValueError: see :class:`sam.Prompt`, though a box may have its corners in any order; or a mask input of
                another size than the model's.
        """
        labels = None if point_coords is None else point_labels  # labels alone are ignored, as officially
        if self._asks_directly():
            prompt = OfficialPrompt(point_coords, labels, box, mask_input)
            result = self.model.predict(self.embedding, [prompt], multimask_output, return_logits)
            answer = result.masks, result.iou_predictions, result.low_res_logits
        else:
            self._require_image()
            tensors = self._official_tensors(point_coords, labels, box, mask_input)
            answer = self.predict_torch(*tensors, multimask_output, return_logits=return_logits)
        masks, iou, low_res = (rows[0].detach().cpu().numpy() for rows in answer)
        return masks, iou, low_res

    def _asks_directly(self) -> bool:
        """Return whether prompts may go to the model as they are, past ``transform`` and ``predict_torch``."""
        return why_not_stock(self) is None and self._why_by_modules() is None

    def _why_by_modules(self) -> str | None:
        return why_not_fused(prompt_encoder=self.model.prompt_encoder, mask_decoder=self.model.mask_decoder)

    def _official_tensors(
        self, coords: Any, labels: Any, box: Any, mask_input: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Return the tensors of one prompt for :meth:`predict_torch`, in the input frame of this predictor's transform.

        Raises:
            ValueError: points without labels.
        """
        if coords is not None and labels is None:
            raise ValueError("point_labels must be given with point_coords")
        if coords is not None:
            coords = self.transform.apply_coords(coords, self.original_size)
        if box is not None:
            box = self.transform.apply_boxes(box, self.original_size)
        numbers = [(coords, torch.float), (labels, torch.int), (box, torch.float), (mask_input, torch.float)]
        given = (x if x is None else torch.as_tensor(x, dtype=dtype, device=self.device)[None] for x, dtype in numbers)
        points, point_labels, boxes, masks = given
        return points, point_labels, boxes, masks

    @torch.no_grad()
    def predict_torch(
        self,
        point_coords: Tensor | None,
        point_labels: Tensor | None,
        boxes: Tensor | None = None,
        mask_input: Tensor | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Predict masks for P prompts, already transformed to the input frame with ``ResizeLongestSide``.

        Args:
            point_coords, point_labels: [P, N, 2] and [P, N].
            boxes: [P, 4].
            mask_input: [P, 1, h, w] low-resolution logits, or [1, 1, h, w] for all prompts.
            multimask_output, return_logits: as in :meth:`predict`.

        Returns:
            masks [P, C, H, W] bool (fp32 if logits), predicted IoU [P, C] and low-resolution logits [P, C, h, w].

        Raises:
            RuntimeError: no image is set.
            ValueError: shapes that do not agree; NaN, infinity or an unknown label in tensors on the CPU. Values
                on another device are not read back.
        """
        self._require_image()
        check_prompt_tensors(point_coords, point_labels, boxes, mask_input, self.model.low_res_size)
        points = None if point_coords is None or point_labels is None else (point_coords, point_labels)
        if self._why_by_modules() is None:
            batch = PromptBatch.from_tensors(points, boxes, mask_input, self.device, self.model.prompt_layout)
            low_res, iou, _ = self.model.decode([self.embedding], batch, multimask_output)
        else:
            parts = self.model.prompt_encoder, self.model.mask_decoder
            features = ImageFeatures(self._require_image())
            low_res, iou, _ = call_modules(
                *parts, features, points, boxes, mask_input, multimask_output, self.model.prompt_layout
            )
        if _POSTPROCESSING.replaced_in(self.model) is None:
            return self.model.masks(low_res, self.embedding.geometry, return_logits), iou, low_res
        masks = self.model.postprocess_masks(low_res, self.input_size, self.original_size)
        return masks if return_logits else masks > self.model.mask_threshold, iou, low_res

    def get_image_embedding(self) -> Tensor:
        """Return the features [1, C, h, w] of the image that is set.

        Raises:
            RuntimeError: no image is set.
        """
        return self._require_image()

    @property
    def device(self) -> torch.device:
        return self.model.device

    def reset_image(self) -> None:
        """Forget the image."""
        self.is_image_set = False
        self.features = None
        self.orig_h = None
        self.orig_w = None
        self.input_h = None
        self.input_w = None
        self._handle: ImageEmbedding | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_handle", "_setter")}

    def _require_image(self) -> Tensor:
        if vars(self).get("_setter", threading.get_ident()) != threading.get_ident():
            raise RuntimeError(_SHARED)
        if not self.is_image_set or self.features is None:
            raise RuntimeError("no image is set: call set_image(...) before asking for masks or features")
        return self.features

    @property
    def embedding(self) -> ImageEmbedding:
        """Return a handle on the image that is set, for ``model.predict``; its origin is taken on trust.

        Raises:
            RuntimeError: no image is set.
        """
        features = self._require_image()
        geometry = ImageGeometry(self.original_size, self.input_size, self.model.image_size)
        handle = self._handle
        if handle is None or handle.features is not features or handle.geometry != geometry:
            handle = self._handle = ImageEmbedding(features, geometry)
        return handle


_METHODS = WrittenMethods(SamPredictor, "set_image", "set_torch_image", "predict_torch", "reset_image")
_TRANSFORM = WrittenMethods(ResizeLongestSide, "apply_image", "apply_coords", "apply_boxes", "get_preprocess_shape")
_POSTPROCESSING = WrittenMethods(Sam, "postprocess_masks")


def why_not_stock(predictor: Any) -> str | None:
    """Return what a program replaced of a predictor, its transform or its model's postprocessing; None for nothing."""
    return what_was_replaced(
        {
            "predictor": (_METHODS, predictor),
            "predictor's transform": (_TRANSFORM, predictor.transform),
            "predictor's model": (_POSTPROCESSING, predictor.model),
        }
    )
