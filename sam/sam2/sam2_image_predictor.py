"""``SAM2ImagePredictor``: images, one or several at once, and prompts as arrays or tensors, as officially."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checks import naming, require, require_model
from ..embedding import ImageEmbedding
from ..images.geometry import ImageGeometry
from ..inference.eligibility import why_not_fused
from ..inference.module_calls import call_modules
from ..masks import upscale
from ..modeling.promptable import PromptableModel
from ..modeling.sam2_base import SAM2Base
from ..prompts.batch import PromptBatch
from ..prompts.layout import PromptLayout
from ..prompts.tensors import check_prompt_tensors
from ..system.methods import WrittenMethods, what_was_replaced
from .prompt_arrays import prompt_tensors
from .utils.transforms import SAM2Transforms, size_of


class SAM2ImagePredictor:
    """Embeds an image or several at once, and predicts masks for any number of prompts.

    ``_features``, ``_orig_hw`` and ``_is_image_set`` are plain values, as officially: set all three to restore what
    was saved earlier. A call that raises leaves the image that was set as it was. Threads may ask about one image.

    Attributes:
        model: a SAM 2 model, also one of videos, compiled, or a program's own.
        mask_threshold: logits above it are in the mask.
    """

    _features: dict[str, Any] | None
    _orig_hw: Any

    def __init__(
        self,
        sam_model: Any,
        mask_threshold: float = 0.0,
        max_hole_area: float = 0.0,
        max_sprinkle_area: float = 0.0,
        **kwargs: Any,
    ) -> None:
        """Predict with ``sam_model``; no image is set yet.

        Args:
            sam_model: the model.
            mask_threshold: in logits.
            max_hole_area, max_sprinkle_area: the largest holes that are filled and islands that are wiped, in pixels
                of the low-resolution logits; on any device.

        Raises:
            TypeError: no model, or a keyword argument that there is none of; officially it would be ignored.
        """
        require_model(sam_model)
        if kwargs:
            raise TypeError(f"SAM2ImagePredictor takes no {next(iter(kwargs))!r}")
        self.model = sam_model
        side = sam_model.image_size
        self._transforms = SAM2Transforms(side, mask_threshold, max_hole_area, max_sprinkle_area)
        self.mask_threshold = mask_threshold
        self._bb_feat_sizes = [(side // stride, side // stride) for stride in (4, 8, 16)]
        self.reset_predictor()

    @classmethod
    def from_pretrained(cls, model_id: str, **kwargs: Any) -> SAM2ImagePredictor:
        """Predict with a model of the Hugging Face hub; ``kwargs`` are of ``build_sam2`` and of this class.

        Raises:
            ImportError, ValueError: as :func:`sam.sam2.build_sam.build_sam2_hf` does.
            TypeError: an argument of neither.
        """
        from .build_sam import from_pretrained

        predictor: SAM2ImagePredictor = from_pretrained(cls, model_id, kwargs)
        return predictor

    # Images ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def set_image(self, image: np.ndarray | Image.Image) -> None:
        """Embed an image: [H, W, 3] uint8 RGB or floating-point in 0..1, or a PIL image.

        Raises:
            NotImplementedError: another type.
            TypeError, ValueError: an array of another shape or dtype.
        """
        size = size_of(image)
        features = self._embed(self._transforms(image)[None])
        self.reset_predictor()
        self._features, self._orig_hw, self._is_image_set = features, [size], True

    @torch.no_grad()
    def set_image_batch(self, image_list: Sequence[np.ndarray | Image.Image]) -> None:
        """Embed images of any sizes in one pass of the encoder; :meth:`predict_batch` asks about them.

        Raises:
            TypeError: no list, or an image that is none, named by its place.
            ValueError: an empty list, or an image of another shape.
        """
        require("image_list", image_list, (list, tuple), "a list of arrays [H, W, 3]")
        if not image_list:
            raise ValueError("image_list is empty: there is no image to set")
        sizes = []
        for index, image in enumerate(image_list):
            require(f"image {index}", image, (np.ndarray, Image.Image), "a numpy array [H, W, 3] or a PIL image")
            with naming(f"image {index}"):
                sizes.append(size_of(image))
        features = self._embed(self._transforms.forward_batch(image_list))
        self.reset_predictor()
        self._features, self._orig_hw, self._is_image_set, self._is_batch = features, sizes, True, True

    def _embed(self, pixels: Tensor) -> dict[str, Any]:
        """Return the features of pixels [B, 3, size, size], in the model's dtype, as plain tensors."""
        model: Any = self.model
        pixels = pixels.to(self.device, getattr(model, "dtype", None))
        if isinstance(model, PromptableModel) and _METHODS.replaced_in(model) is None:
            features = model.image_features(pixels)
            return {"image_embed": features.embedding, "high_res_feats": [*features.high_res]}
        _, levels, _, sizes = model._prepare_backbone_features(model.forward_image(pixels))
        if model.directly_add_no_mem_embed:
            levels[-1] = levels[-1] + model.no_mem_embed
        *high_res, embedding = (
            level.permute(1, 2, 0).reshape(len(pixels), -1, *size) for level, size in zip(levels, sizes, strict=True)
        )
        return {"image_embed": embedding, "high_res_feats": high_res}

    def get_image_embedding(self) -> Tensor:
        """Return the features [B, C, h, w] of the images that are set, with ``no_mem_embed`` added.

        Raises:
            RuntimeError: no image is set.
        """
        embedding: Tensor = self._require_features()["image_embed"]
        return embedding

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def reset_predictor(self) -> None:
        """Forget the images."""
        self._is_image_set = False
        self._features = None
        self._orig_hw = None
        self._is_batch = False
        self._handles: dict[int, tuple[list[Tensor], ImageEmbedding]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_handles": {}}

    def _require_features(self) -> dict[str, Any]:
        if not self._is_image_set or self._features is None:
            raise RuntimeError("no image is set: call set_image(...) or set_image_batch(...) before asking for masks")
        return self._features

    @property
    def embedding(self) -> ImageEmbedding:
        """Return a handle on the image that is set, the last of a batch, for ``model.predict``.

        Raises:
            RuntimeError: no image is set.
        """
        return self._handle(-1)

    def _handle(self, img_idx: int) -> ImageEmbedding:
        """Return one image as :mod:`sam.inference` takes it: the last handle, unless the features are others now."""
        features = self._require_features()
        sources = [features["image_embed"], *features["high_res_feats"]]
        height, width = self._orig_hw[img_idx]
        geometry = ImageGeometry.stretched(height, width, self.model.image_size)
        known, handle = self._handles.get(img_idx, ((), None))
        same = len(known) == len(sources) and all(map(torch.Tensor.is_set_to, known, sources)) if handle else False
        if handle is None or not same or handle.geometry != geometry:
            embedding, *high_res = (source[img_idx][None] for source in sources)
            handle = ImageEmbedding(embedding, geometry, high_res=tuple(high_res))
            self._handles[img_idx] = (sources, handle)
        return handle

    # Masks -------------------------------------------------------------------------------------------------

    def predict(
        self,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        normalize_coords: bool = True,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Predict masks for one prompt or several on the image that is set.

        Args:
            point_coords: [N, 2] or [P, N, 2] as (x, y), in pixels of the image or, without ``normalize_coords``, in
                0..1 of it.
            point_labels: [N] or [P, N]: 1 for the object, 0 for the background, 2 and 3 for the corners of a box.
            box: [4] or [P, 4] as x0, y0, x1, y1.
            mask_input: [1, h, w] or [P, 1, h, w] low-resolution logits of an earlier prediction.
            multimask_output: three masks per prompt, for prompts that may mean several things; else one.
            return_logits: logits instead of masks of 0 and 1.
            normalize_coords: coordinates are in pixels of the image.

        Returns:
            masks [C, H, W], predicted IoU [C] and low-resolution logits [C, h, w] within +-32, all fp32; several
            prompts put P before each.

        Raises:
            RuntimeError: no image is set.
            ValueError: shapes that do not agree, NaN, an unknown label, or a mask input of another size.
        """
        return self._predict_arrays(
            (point_coords, point_labels, box, mask_input), multimask_output, return_logits, normalize_coords, -1
        )

    def predict_batch(
        self,
        point_coords_batch: Sequence[np.ndarray | None] | None = None,
        point_labels_batch: Sequence[np.ndarray | None] | None = None,
        box_batch: Sequence[np.ndarray | None] | None = None,
        mask_input_batch: Sequence[np.ndarray | None] | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        normalize_coords: bool = True,
    ) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
        """Predict masks on each of the images that :meth:`set_image_batch` has set.

        Args:
            point_coords_batch, point_labels_batch, box_batch, mask_input_batch: for each image what
                :meth:`predict` takes, or None for it or for all.
            multimask_output, return_logits, normalize_coords: as there.

        Returns:
            three lists, of what :meth:`predict` returns for each image.

        Raises:
            RuntimeError: no batch of images is set.
            ValueError: lists of other lengths than there are images; what :meth:`predict` raises, named by the image.
        """
        if not self._is_batch:
            raise RuntimeError("no batch of images is set: call set_image_batch(...) before predict_batch")
        images = len(self._require_features()["image_embed"])
        given = {
            "point_coords_batch": point_coords_batch,
            "point_labels_batch": point_labels_batch,
            "box_batch": box_batch,
            "mask_input_batch": mask_input_batch,
        }
        for name, values in given.items():
            if values is not None and len(values) != images:
                raise ValueError(f"{name} must have one entry per image, {images}, got {len(values)}")
        answers = []
        for index in range(images):
            prompt = tuple(None if values is None else values[index] for values in given.values())
            with naming(f"image {index}"):
                answers.append(self._predict_arrays(prompt, multimask_output, return_logits, normalize_coords, index))
        masks, iou, low_res = (list(column) for column in zip(*answers, strict=True))
        return masks, iou, low_res

    def _predict_arrays(
        self,
        prompt: tuple[Any, ...],
        multimask_output: bool,
        return_logits: bool,
        normalize_coords: bool,
        img_idx: int,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self._require_features()
        coords, labels, box, mask_input = prompt
        prepared = self._prep_prompts(coords, labels, box, mask_input, normalize_coords, img_idx=img_idx)
        mask_input, coords, labels, boxes = prepared
        answer = self._predict(
            coords, labels, boxes, mask_input, multimask_output, return_logits=return_logits, img_idx=img_idx
        )
        masks, iou, low_res = (rows.squeeze(0).float().detach().cpu().numpy() for rows in answer)
        return masks, iou, low_res

    def _prep_prompts(
        self,
        point_coords: Any,
        point_labels: Any,
        box: Any,
        mask_logits: Any,
        normalize_coords: bool,
        img_idx: int = -1,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Return prompts as tensors in pixels of the model's square, for :meth:`_predict` or a program's own calls.

        Args:
            point_coords, point_labels, box, mask_logits, normalize_coords: as in :meth:`predict`.
            img_idx: the image of the batch.

        Returns:
            mask input [P, 1, h, w], points [P, N, 2], labels [P, N] and boxes [P, 2, 2], None where none are given.
        """
        arrays = (point_coords, point_labels, box, mask_logits)
        return prompt_tensors(self._transforms, arrays, normalize_coords, self._orig_hw[img_idx], self.device)

    @torch.no_grad()
    def _predict(
        self,
        point_coords: Tensor | None,
        point_labels: Tensor | None,
        boxes: Tensor | None = None,
        mask_input: Tensor | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        img_idx: int = -1,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Predict masks for P prompts in pixels of the model's square, as :meth:`_prep_prompts` returns them.

        Args:
            point_coords, point_labels: [P, N, 2] and [P, N].
            boxes: [P, 4] or [P, 2, 2].
            mask_input: [P, 1, h, w] low-resolution logits.
            multimask_output, return_logits: as in :meth:`predict`.
            img_idx: the image of the batch.

        Returns:
            masks [P, C, H, W] bool (fp32 if logits), predicted IoU [P, C] and low-resolution logits [P, C, h, w]
            within +-32.

        Raises:
            RuntimeError: no image is set.
            ValueError: shapes that do not agree; NaN, infinity or an unknown label in tensors on the CPU.
        """
        self._require_features()
        corners = None if boxes is None else boxes.reshape(-1, 4)
        check_prompt_tensors(point_coords, point_labels, corners, mask_input, _mask_size(self.model), corners=True)
        points = None if point_coords is None or point_labels is None else (point_coords, point_labels)
        low_res, iou = self._decode(points, corners, mask_input, multimask_output, img_idx)
        limit = SAM2Base.low_res_limit  # a program's own model need not have one
        return self._masks(low_res, return_logits, img_idx), iou, low_res.clamp(-limit, limit)

    def _decode(
        self,
        points: tuple[Tensor, Tensor] | None,
        boxes: Tensor | None,
        mask_input: Tensor | None,
        multimask_output: bool,
        img_idx: int,
    ) -> tuple[Tensor, Tensor]:
        """Return low-resolution logits [P, C, h, w] and predicted IoU [P, C]."""
        model: Any = self.model
        layout, handle = PromptLayout.BOX_FIRST, self._handle(img_idx)
        batch = PromptBatch.from_tensors(points, boxes, mask_input, self.device, layout)
        encoder, decoder = model.sam_prompt_encoder, model.sam_mask_decoder
        if isinstance(model, PromptableModel) and why_not_fused(prompt_encoder=encoder, mask_decoder=decoder) is None:
            decoded = model.decode([handle], batch, multimask_output)
        else:
            clicks, _ = batch.points_and_boxes(layout)
            decoded = call_modules(encoder, decoder, handle.ready(), clicks, None, mask_input, multimask_output, layout)
        return decoded.logits, decoded.iou

    def _masks(self, low_res: Tensor, return_logits: bool, img_idx: int) -> Tensor:
        transforms, (height, width) = self._transforms, self._orig_hw[img_idx]
        if return_logits or _TRANSFORMS.replaced_in(transforms) is not None:
            logits = transforms.postprocess_masks(low_res, self._orig_hw[img_idx])
            return logits if return_logits else logits > self.mask_threshold
        geometry = ImageGeometry.stretched(height, width, self.model.image_size)
        return upscale.masks_from_logits(transforms.cleaned(low_res), geometry, self.mask_threshold)


def _mask_size(model: Any) -> tuple[int, int]:
    """Return (height, width) of the mask inputs that a model takes."""
    side = model.image_size // 4
    return getattr(model.sam_prompt_encoder, "mask_input_size", (side, side))


_METHODS = WrittenMethods(SAM2Base, "forward_image", "_prepare_backbone_features")
_PREDICTOR = WrittenMethods(
    SAM2ImagePredictor, "set_image", "_predict", "_embed", "_decode", "_masks", "reset_predictor"
)
_TRANSFORMS = WrittenMethods(
    SAM2Transforms, "__call__", "transform_coords", "transform_boxes", "postprocess_masks", "cleaned"
)


def why_not_stock(predictor: Any) -> str | None:
    """Return what a program replaced of a predictor, its transforms or the model's images; None for nothing."""
    if not isinstance(predictor.model, PromptableModel):
        return f"the predictor's model is of a class of its own, {type(predictor.model).__name__}"
    return what_was_replaced(
        {
            "predictor": (_PREDICTOR, predictor),
            "predictor's transforms": (_TRANSFORMS, predictor._transforms),
            "predictor's model": (_METHODS, predictor.model),
        }
    )
