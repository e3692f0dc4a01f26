"""A model of promptable segmentation: images to embeddings, embeddings and prompts to masks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, overload

import numpy as np
import torch
from torch import Tensor

from fastsam_kernels import Kernels, check_kernels, packed_masks, preprocess_image, resolve_kernels

from ..checks import require
from ..embedding import ImageEmbedding, ImageFeatures
from ..images.geometry import ImageGeometry
from ..images.prepare import PreparedImage
from ..images.tensors import normalize_and_pad
from ..inference import buckets, decode, encode, explain, predict
from ..inference.fused_decoder import DecodedPrompts
from ..inference.low_rank_decoder import SharedImage
from ..inference.module_decoder import MadeMasks
from ..masks import upscale
from ..masks.results import DecodedMasks, MaskPrediction
from ..prompts.batch import PromptBatch
from ..prompts.layout import PromptLayout
from ..prompts.prompt import Prompt
from ..system.device_profile import device_profile
from ..system.malloc import keep_freed_memory
from .common import Fp32Buffers, uncompiled
from .identity import hash_of_model
from .quantized_linear import QuantizedLinear
from .weight_cache import WeightCache, weights_of

if TYPE_CHECKING:
    from ..inference import Runtime
    from .mask_decoder import MaskDecoder
    from .prompt_encoder import PromptEncoder


class PromptableModel(WeightCache, Fp32Buffers):
    """The base of all Segment Anything models: an image encoder, a prompt encoder and a mask decoder.

    ``encode`` and ``predict`` work on handles that can be kept, and on prompts of any number and kind for any number
    of images. Both may be called from many threads.

    Attributes:
        prompt_layout: the order of a prompt's tokens that the model was trained with.
        stretches_images: images are resized to the square each side by a factor of its own, else both by the same.
        low_res_limit: how far from 0 the low-resolution logits of a prediction lie, at most; None without a limit.
        mask_threshold: logits above it are in the mask.
        pixel_mean, pixel_std: [3, 1, 1] fp32, of pixels in 0..255.
    """

    mask_threshold: float = 0.0
    prompt_layout: ClassVar[PromptLayout] = PromptLayout.POINTS_FIRST
    stretches_images: ClassVar[bool] = False
    low_res_limit: ClassVar[float | None] = None
    pixel_mean: Tensor
    pixel_std: Tensor
    # Of the class, as models that the official package pickled have none of their own.
    config: Any = None
    runtime: Runtime | None = None  # set by load_model(compile=True)
    _kernels = "auto"

    if TYPE_CHECKING:  # modules and attributes in one model, properties in another

        @property
        def image_encoder(self) -> Any: ...
        @property
        def prompt_encoder(self) -> PromptEncoder: ...
        @property
        def mask_decoder(self) -> MaskDecoder: ...
        @property
        def image_size(self) -> int: ...

    def __init__(self, pixel_mean: Sequence[float], pixel_std: Sequence[float]) -> None:
        super().__init__()
        keep_freed_memory()
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the image encoder and the mask decoder; prompts are always encoded in fp32 at least."""
        weight = getattr(getattr(self.mask_decoder, "iou_token", None), "weight", None)
        return weight.dtype if isinstance(weight, Tensor) else next(self.parameters()).dtype

    @property
    def name(self) -> str:
        """Return the variant, with the scheme of a quantised model behind it: "vit_b-int8"."""
        variant = self.config.variant if self.config is not None else "custom"
        return variant if self.quantization is None else f"{variant}-{self.quantization}"

    @property
    def quantization(self) -> str | None:
        """Return the scheme that linear layers are quantised by, "int8" or "fp8"; None where none is."""
        return next((module.scheme for module in self.modules() if isinstance(module, QuantizedLinear)), None)

    @property
    def kernels(self) -> str:
        """Return "auto", "reference", "torch" or "triton", with what single operations chose: "auto, nms=torch".

        Set it to one of the four, or to a mapping like ``{"nms": "torch"}``; :attr:`resolved_kernels` is what runs.
        """
        return self._kernels

    @kernels.setter
    def kernels(self, kernels: Kernels) -> None:
        self._kernels = check_kernels(kernels)
        for part in self.modules():
            if isinstance(part, WeightCache) and part is not self:
                part.kernels = self._kernels

    @property
    def resolved_kernels(self) -> str:
        """Return the implementation that ``kernels`` selects for the encoder and the decoder on the model's device."""
        kind = self.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.dtype
        return resolve_kernels(self._kernels, self.device, dtype)

    @property
    def model_hash(self) -> str | None:
        """Return 32 hex digits that identify these weights, this dtype and this architecture.

        None where weights are no plain tensors, like quantised ones. The values and the modules count, not what wraps
        them, nor how the model was made or what its config calls it: a compiled model and one put together by hand
        have the hash of the plain one. A checksum against mistakes, not against forgery: 600 MB of weights take
        about 0.1 s on four cores.
        """
        with torch.no_grad():
            return self.packed("model_hash", lambda: hash_of_model(self), *weights_of(self))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "runtime": None}  # a copy runs eagerly

    # Images ------------------------------------------------------------------------------------------------

    @overload
    def encode(
        self, images: np.ndarray | PreparedImage, batch_size: int | None = None, *, resize_on_device: bool = False
    ) -> ImageEmbedding: ...
    @overload
    def encode(
        self,
        images: Sequence[np.ndarray | PreparedImage],
        batch_size: int | None = None,
        *,
        resize_on_device: bool = False,
    ) -> list[ImageEmbedding]: ...
    @torch.no_grad()
    def encode(
        self,
        images: np.ndarray | PreparedImage | Sequence[np.ndarray | PreparedImage],
        batch_size: int | None = None,
        *,
        resize_on_device: bool = False,
    ) -> ImageEmbedding | list[ImageEmbedding]:
        """Embed one image, or a list of images of any sizes.

        Args:
            images: [H, W, 3] uint8 RGB, or floating-point in 0..1; or what :func:`sam.images.prepare_image` made of one
                for this model, which is not resized again.
            batch_size: images per pass of the encoder; by default 1 on a CPU and 8 elsewhere.
            resize_on_device: the image goes to the device as it is and is resized, normalised and padded there in
                one pass. Faster, and up to a level of 8 bits off Pillow's resize, which SAM was trained with; the
                embedding has no ``image_hash`` then. Images for SAM 2 are resized there in any case, as officially.

        Returns:
            one handle, or a list of them in the order of the images.

        Raises:
            TypeError, ValueError: an image of another kind, named by its place, or a batch below 1; nothing was
                encoded.
        """
        if isinstance(images, (np.ndarray, PreparedImage)):
            return self.encode([images], resize_on_device=resize_on_device)[0]
        return encode.encode(self, images, batch_size, resize_on_device)

    def check_prepared(self, image: PreparedImage) -> None:
        """Raise ``ValueError`` unless ``image`` was prepared for a model of this size."""
        if image.geometry != self.image_geometry(*image.geometry.original_size):
            raise ValueError(f"an image prepared for {image.geometry.image_size} px does not suit this model")

    @torch.no_grad()
    def embed(self, pixels: Tensor, images: Sequence[PreparedImage]) -> list[ImageEmbedding]:
        """Encode a batch [B, 3, size, size], as :meth:`encoder_input` makes it of B images, to one handle per image."""
        rows = self.image_features(pixels).rows()
        model_hash = self.model_hash  # once a batch, while a GPU works on it
        return [
            ImageEmbedding(row.embedding, image.geometry, model_hash, self.name, image.image_hash, row.high_res)
            for row, image in zip(rows, images, strict=True)
        ]

    def encoder_input(self, pixels: Tensor, image: PreparedImage) -> Tensor:
        """Return the encoder's input [3, size, size] of an image whose pixels are on this device.

        They are resized, normalised and padded in one pass; those that :meth:`shrunk` has resized are normalised.
        """
        if pixels.is_floating_point():
            return normalize_and_pad(pixels, self.pixel_mean, self.pixel_std, self.image_size).to(self.dtype)
        return preprocess_image(
            pixels,
            image.geometry.input_size,
            image.geometry.image_size,
            self.pixel_mean,
            self.pixel_std,
            dtype=self.dtype,
            kernels=self._kernels,
        )

    def shrunk(self, image: PreparedImage) -> PreparedImage:
        """Return an image that has to wait, resized on the host where its pixels take more memory than so.

        Of a model that stretches images the device resizes them: 50 megapixels are 150 MB, and 12 MB afterwards.
        """
        side = image.geometry.image_size
        if image.pixels.nbytes <= 3 * side * side * 4:
            return image
        as_they_are = torch.zeros(3, device="cpu"), torch.ones(3, device="cpu")
        resized = preprocess_image(torch.from_numpy(image.pixels), image.geometry.input_size, side, *as_they_are)
        return replace(image, pixels=resized.numpy())

    @abstractmethod
    def image_features(self, pixels: Tensor) -> ImageFeatures:
        """Return what the decoder reads of normalised pixels [B, 3, size, size], by the kernels of this model."""

    def image_geometry(self, height: int, width: int) -> ImageGeometry:
        """Return how this model resizes an image of ``height`` x ``width``: its :data:`ResizePolicy`.

        Raises:
            ValueError: a side is 0, or vanishes when the longer one is resized.
        """
        make = ImageGeometry.stretched if self.stretches_images else ImageGeometry.longest_side
        return make(height, width, self.image_size)

    # Masks -------------------------------------------------------------------------------------------------

    @overload
    def predict(
        self,
        embeddings: ImageEmbedding,
        prompts: Sequence[Prompt],
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> MaskPrediction: ...
    @overload
    def predict(
        self,
        embeddings: Sequence[ImageEmbedding],
        prompts: Sequence[Sequence[Prompt]],
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> list[MaskPrediction]: ...
    @torch.no_grad()
    def predict(
        self,
        embeddings: ImageEmbedding | Sequence[ImageEmbedding],
        prompts: Sequence[Any],
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> MaskPrediction | list[MaskPrediction]:
        """Predict masks for ragged prompts: any number per image, each with its own points, box and mask.

        Args:
            embeddings: one handle, or a list.
            prompts: the prompts of the image, or a list of them for each image.
            multimask_output: three masks per prompt instead of one.
            return_logits: fp32 logits in place of boolean masks.

        Returns:
            one prediction per image, its rows in the order of the image's prompts.

        Raises:
            TypeError: no embeddings, or no lists of prompts.
            ValueError: an embedding of another model or on another device, a mask input of the wrong size.
        """
        if isinstance(prompts, Prompt):
            raise TypeError("prompts must be a list of Prompt, got a single one")
        require("prompts", prompts, Sequence, "a list of Prompt, or for several embeddings a list of such lists")
        if isinstance(embeddings, ImageEmbedding):
            return self.predict([embeddings], [prompts], multimask_output, return_logits)[0]
        return predict.predict(self, embeddings, prompts, multimask_output, return_logits)

    def decode(self, embeddings: Sequence[ImageEmbedding], batch: PromptBatch, multimask_output: bool) -> DecodedMasks:
        """Decode prompts. See :func:`sam.inference.decode.decode`."""
        return decode.decode(self, embeddings, batch, multimask_output)

    def decode_tokens(
        self, embeddings: Sequence[ImageEmbedding], batch: PromptBatch, shared: SharedImage | None = None
    ) -> DecodedPrompts | MadeMasks:
        """Run the first half of :meth:`decode`: all but the masks. See :func:`sam.inference.decode.decode_tokens`."""
        return decode.decode_tokens(self, embeddings, batch, shared)

    def decode_masks(
        self, decoded: DecodedPrompts | MadeMasks, multimask_output: bool, rows: Tensor | None = None
    ) -> DecodedMasks:
        """Run the second half of :meth:`decode`, of the prompts ``rows`` [R] only where they are given."""
        return decode.decode_masks(self, decoded, multimask_output, rows)

    def explain(self) -> str:
        """Describe what runs, one line per part and operation, and what keeps a part from running fused."""
        return explain.explain(self)

    @property
    def uses_fused_decoder(self) -> bool:
        """Return whether prompts are decoded fused, not by the official calls of prompt encoder and mask decoder.

        They do where a user hooked, patched, subclassed or replaced something in there.
        """
        return decode.why_not_fused_decoder(self) is None

    def masks(self, low_res: Tensor, geometry: ImageGeometry, return_logits: bool) -> Tensor:
        """Make masks [P, C, H, W] of low-resolution logits [P, C, h, w], or their logits at that size."""
        if return_logits:
            return upscale.upscale_masks(low_res, geometry)
        return upscale.masks_from_logits(low_res, geometry, self.mask_threshold)

    def packed_masks(self, low_res: Tensor, geometry: ImageGeometry) -> Tensor:
        """Make the masks of :meth:`masks` as words [P * C, W, ceil(H / 32)]: :func:`fastsam_kernels.packed_masks`."""
        resizing = upscale.resizing_of(geometry, self.low_res_size)
        return packed_masks(low_res.flatten(0, 1), resizing, threshold=self.mask_threshold, kernels=self._kernels)

    def check_embedding(self, embedding: ImageEmbedding) -> None:
        """Raise ``ValueError`` unless this model can decode ``embedding``."""
        predict.check_embedding(self, embedding)

    @property
    def known_hash(self) -> str | None:
        """Return :attr:`model_hash` as it was last computed: looking at every weight costs more than a click."""
        entry = self._packed.get("model_hash")
        return entry.value if entry is not None else self.model_hash

    @property
    def low_res_size(self) -> tuple[int, int]:
        """Return the (height, width) of low-resolution logits and of mask inputs."""
        side = 4 * self.image_size // 16  # where the prompt encoder is a user's own
        return getattr(self.prompt_encoder, "mask_input_size", (side, side))

    @property
    def token_buckets(self) -> tuple[int, ...]:
        """Return the lengths that prompts are padded to, so that few shapes run compiled or as graphs."""
        own = getattr(uncompiled(self.mask_decoder), "output_tokens", None)  # a user's own has none
        return buckets.token_buckets(5 if own is None else own.total)

    @property
    def prompts_per_chunk(self) -> int:
        """Return the number of prompts that the decoder takes at a time."""
        return device_profile(self.device).prompts_per_chunk
