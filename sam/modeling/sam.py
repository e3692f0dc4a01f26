"""Segment Anything, the first model: the official batched interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Dict, List, Tuple  # noqa: F401, UP035 - star imports give them

import torch
import torch.nn.functional as F  # noqa: F401 - as above
from torch import Tensor, nn  # noqa: F401

from fastsam_kernels import pack_masks

from ..checks import require
from ..config import SamConfig
from ..embedding import ImageEmbedding, ImageFeatures
from ..images.geometry import ImageGeometry
from ..images.prepare import PreparedImage
from ..images.tensors import normalize_and_pad
from ..inference import fused_encoder
from ..inference.eligibility import is_stock
from ..masks import upscale
from ..prompts.batch import PromptBatch
from ..prompts.checks import check_mask_inputs
from ..system.methods import WrittenMethods
from .image_encoder import ImageEncoderViT
from .mask_decoder import MaskDecoder
from .prompt_encoder import PromptEncoder
from .promptable import PromptableModel


class Sam(PromptableModel):
    """Segment Anything (arXiv 2304.02643): an image encoder, a prompt encoder and a mask decoder.

    ``forward`` is the official batched interface; the rest is of every model of this package.
    """

    image_format: str = "RGB"
    config: SamConfig | None = None
    image_encoder: ImageEncoderViT
    prompt_encoder: PromptEncoder
    mask_decoder: MaskDecoder

    def __init__(
        self,
        image_encoder: ImageEncoderViT,
        prompt_encoder: PromptEncoder,
        mask_decoder: MaskDecoder,
        pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
        pixel_std: Sequence[float] = (58.395, 57.12, 57.375),
        config: SamConfig | None = None,
    ) -> None:
        """Assemble the model; ``config`` describes its modules, and only saving in another layout needs it."""
        super().__init__(pixel_mean, pixel_std)
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        self.config = config

    @property
    def image_size(self) -> int:
        """Return the side in pixels of the square that the image encoder takes."""
        return self.image_encoder.img_size

    @property
    def has_stock_postprocessing(self) -> bool:
        """Return whether ``postprocess_masks`` is this package's; a program's own makes all masks."""
        return _POSTPROCESSING.replaced_in(self) is None

    @property
    def has_stock_preprocessing(self) -> bool:
        """Return whether ``preprocess`` is this package's; a program's own makes every input of the encoder."""
        return _PREPROCESSING.replaced_in(self) is None

    def encoder_input(self, pixels: Tensor, image: PreparedImage) -> Tensor:
        """Return the encoder's input [3, size, size] of an image whose pixels [h, w, 3] uint8 are on this device.

        What is not resized yet is resized, normalised and padded in one pass.

        Raises:
            ValueError: an image that is not resized yet, for a model whose ``preprocess`` is a program's own.
        """
        if image.is_resized:
            return self.preprocess(pixels.permute(2, 0, 1))
        if not self.has_stock_preprocessing:
            raise ValueError("resize_on_device=True would go past the model's preprocess, which is not the stock one")
        return super().encoder_input(pixels, image)

    def image_features(self, pixels: Tensor) -> ImageFeatures:
        """Encode the pixels [B, 3, size, size] that :meth:`preprocess` returns, by the kernels of this model."""
        if self.runtime is not None and is_stock(self.image_encoder, ImageEncoderViT):
            [features] = self.runtime.image_maps(self._image_maps, pixels, self.image_encoder)
            return ImageFeatures(features)
        return ImageFeatures(self.image_encoder(pixels))

    def _image_maps(self, pixels: Tensor, run: Callable[..., Tensor] | None) -> tuple[Tensor]:
        return (fused_encoder.encode(self.image_encoder, pixels, self.resolved_kernels, run),)

    def masks(self, low_res: Tensor, geometry: ImageGeometry, return_logits: bool) -> Tensor:
        """Make masks [P, C, H, W] of low-resolution logits [P, C, h, w], or their logits at that size."""
        if self.has_stock_postprocessing:
            return super().masks(low_res, geometry, return_logits)
        logits = self.postprocess_masks(low_res, geometry.input_size, geometry.original_size)
        return logits if return_logits else logits > self.mask_threshold

    def packed_masks(self, low_res: Tensor, geometry: ImageGeometry) -> Tensor:
        """Make the masks of :meth:`masks` as words [P * C, W, ceil(H / 32)]: :func:`fastsam_kernels.packed_masks`."""
        if self.has_stock_postprocessing:
            return super().packed_masks(low_res, geometry)
        return pack_masks(self.masks(low_res, geometry, return_logits=False).flatten(0, 1))

    @torch.no_grad()
    def forward(self, batched_input: list[dict[str, Any]], multimask_output: bool) -> list[dict[str, Tensor]]:
        """Predict masks end to end for images and prompts already transformed with ``ResizeLongestSide``.

        Args:
            batched_input: one dictionary an image, prompts left out where there are none:
                image: [3, h, w], the resized image, 0..255;
                original_size: (H, W) before resizing;
                point_coords, point_labels: [P, N, 2] in the input frame, and [P, N];
                boxes: [P, 4] in the input frame;
                mask_inputs: [P, 1, low-res height, low-res width] logits.
            multimask_output: three masks per prompt instead of one.

        Returns:
            one dictionary an image: masks [P, C, H, W] bool, iou_predictions [P, C] and low_res_logits
            [P, C, low-res height, low-res width].
        """
        require("batched_input", batched_input, Sequence, "a list of dictionaries")
        for index, record in enumerate(batched_input):
            require(f"batched_input[{index}]", record, Mapping, "a dictionary")
            for name in ("image", "point_coords", "point_labels", "boxes", "mask_inputs"):
                if record.get(name) is not None or name == "image":
                    require(f"{name} of batched_input[{index}]", record.get(name), Tensor, "a torch.Tensor")
            if record.get("point_coords") is not None and record.get("point_labels") is None:
                raise ValueError(f"batched_input[{index}] must have point_labels with its point_coords")
        if not batched_input:
            return []
        pixels = torch.stack([self.preprocess(record["image"]) for record in batched_input])
        outputs = []
        for record, features in zip(batched_input, self.image_features(pixels).embedding, strict=True):
            size = record["image"].shape[-2:]
            geometry = ImageGeometry(record["original_size"], size, self.image_size)
            has_points = record.get("point_coords") is not None
            points = (record["point_coords"], record["point_labels"]) if has_points else None
            if record.get("mask_inputs") is not None:
                check_mask_inputs(record["mask_inputs"].shape, self.low_res_size)
            kinds = points, record.get("boxes"), record.get("mask_inputs")
            batch = PromptBatch.from_tensors(*kinds, self.device, self.prompt_layout)
            logits, iou, _ = self.decode([ImageEmbedding(features[None], geometry)], batch, multimask_output)
            if self.has_stock_postprocessing:
                masks = self.masks(logits, geometry, return_logits=False)
            else:
                sizes = {"input_size": geometry.input_size, "original_size": geometry.original_size}
                masks = self.postprocess_masks(logits, **sizes) > self.mask_threshold
            outputs.append({"masks": masks, "iou_predictions": iou, "low_res_logits": logits})
        return outputs

    def postprocess_masks(self, masks: Tensor, input_size: tuple[int, int], original_size: tuple[int, int]) -> Tensor:
        """Resize low-resolution logits [P, C, h, w] to [P, C, original height, original width].

        Of an ``input_size`` beyond the encoder's square only the square counts, as officially.
        """
        require("masks", masks, Tensor, "a torch.Tensor [P, C, h, w]")
        side = self.image_size
        height, width = input_size
        geometry = ImageGeometry(original_size, (min(height, side), min(width, side)), side)
        return upscale.upscale_masks(masks, geometry)

    def preprocess(self, x: Tensor) -> Tensor:
        """Normalise resized pixels [..., 3, h, w] in 0..255 and pad them to the encoder's square."""
        require("x", x, Tensor, "a torch.Tensor [..., 3, h, w] in 0..255")
        image_size = self.image_size
        return normalize_and_pad(x, self.pixel_mean, self.pixel_std, image_size).to(self.dtype)


_POSTPROCESSING, _PREPROCESSING = WrittenMethods(Sam, "postprocess_masks"), WrittenMethods(Sam, "preprocess")
