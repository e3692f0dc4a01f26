"""The decoder as one traceable module, for ``torch.onnx.export``: ``segment_anything.utils.onnx``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modeling import Sam
from .amg import calculate_stability_score


class SamOnnxModel(nn.Module):
    """Answers prompts on one image embedding, with every size that may differ from call to call kept as a tensor.

    It can be traced and exported, and shares the modules of ``model``. ``torch.onnx.export`` needs ``dynamo=False`` to
    take the usual ``dynamic_axes`` of the number of points.
    """

    def __init__(
        self,
        model: Sam,
        return_single_mask: bool,
        use_stability_score: bool = False,
        return_extra_metrics: bool = False,
    ) -> None:
        """Wrap ``model``.

        Args:
            model: the whole model; its image encoder is not run.
            return_single_mask: answer with the best mask only.
            use_stability_score: score masks by their stability in place of the predicted IoU.
            return_extra_metrics: return stability scores, areas and low-resolution logits too.
        """
        super().__init__()
        self.mask_decoder = model.mask_decoder
        self.model = model
        self.img_size = model.image_size
        self.return_single_mask = return_single_mask
        self.use_stability_score = use_stability_score
        self.stability_score_offset = 1.0
        self.return_extra_metrics = return_extra_metrics

    @staticmethod
    def resize_longest_image_size(input_image_size: Tensor, longest_side: int) -> Tensor:
        """Return the int64 size [2] of an image of ``input_image_size`` whose longer side became ``longest_side``."""
        size = input_image_size.to(torch.float32)
        return torch.floor(longest_side / size.max() * size + 0.5).to(torch.int64)

    def _embed_points(self, point_coords: Tensor, point_labels: Tensor) -> Tensor:
        """Embed points [P, N, 2] of the padded square with labels [P, N], -1 for padding, 2 and 3 for box corners."""
        return self.model.prompt_encoder.embed_tokens(point_coords, point_labels)

    def _embed_masks(self, input_mask: Tensor, has_mask_input: Tensor) -> Tensor:
        """Embed the mask input [P, 1, h, w] where ``has_mask_input`` [1] is 1, and its absence where that is 0."""
        encoder = self.model.prompt_encoder
        given, absent = encoder.mask_downscaling(input_mask), encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        return has_mask_input * given + (1 - has_mask_input) * absent

    def mask_postprocessing(self, masks: Tensor, orig_im_size: Tensor) -> Tensor:
        """Resize low-resolution logits to the padded square, cut the padding off, resize to ``orig_im_size`` [2]."""
        # Indexed, so that a trace keeps the sizes; unpacked or as integers they would become those of the example.
        input_size, original_size = self.resize_longest_image_size(orig_im_size, self.img_size), orig_im_size.long()
        square = F.interpolate(masks, (self.img_size, self.img_size), mode="bilinear", align_corners=False)
        cut, size = square[..., : input_size[0], : input_size[1]], (original_size[0], original_size[1])
        return F.interpolate(cut, size, mode="bilinear", align_corners=False)  # type: ignore[arg-type]

    def select_masks(self, masks: Tensor, iou_preds: Tensor, num_points: int | Tensor) -> tuple[Tensor, Tensor]:
        """Choose one mask a prompt: the single mask for more than two points, else the best of the alternatives.

        Args:
            masks: [P, M, h, w], the single mask first.
            iou_preds: [P, M].
            num_points: points a prompt, padding included.

        Returns:
            the masks [P, 1, h, w] and their scores [P, 1].
        """
        single = torch.zeros_like(iou_preds[:1])
        single[:, 0] = 1000.0  # far beyond any score
        best = (iou_preds + (num_points - 2.5) * single).argmax(dim=1)
        prompts = torch.arange(masks.shape[0], device=masks.device)
        return masks[prompts, best][:, None], iou_preds[prompts, best][:, None]

    @torch.no_grad()
    def forward(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
        orig_im_size: Tensor,
    ) -> tuple[Tensor, ...]:
        """Answer P prompts of N points on one image.

        Args:
            image_embeddings: [1, C, h, w] from the image encoder.
            point_coords: [P, N, 2] (x, y) in pixels of the padded square. A box is its two corners; a prompt without a
                box ends with one padding point.
            point_labels: [P, N]: 1 object, 0 background, 2 and 3 the corners of a box, -1 padding.
            mask_input: [P, 1, 4h, 4w] low-resolution logits.
            has_mask_input: [1], 1 where ``mask_input`` counts and 0 where it does not.
            orig_im_size: [2] (height, width) of the original image.

        Returns:
            logits [P, M, height, width], scores [P, M] and low-resolution logits [P, M, 4h, 4w]; with
            ``return_extra_metrics`` stability scores [P, M] and areas [P, M] in pixels before the last.
        """
        masks, scores = self.mask_decoder.predict_masks(
            image_embeddings=image_embeddings,
            image_pe=self.model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=self._embed_points(point_coords, point_labels),
            dense_prompt_embeddings=self._embed_masks(mask_input, has_mask_input),
        )
        if self.use_stability_score:
            scores = self._stability(masks)
        if self.return_single_mask:
            masks, scores = self.select_masks(masks, scores, point_coords.shape[1])
        upscaled = self.mask_postprocessing(masks, orig_im_size)
        if not self.return_extra_metrics:
            return upscaled, scores, masks
        areas = (upscaled > self.model.mask_threshold).sum(dim=(-1, -2))
        return upscaled, scores, self._stability(upscaled), areas, masks

    def _stability(self, masks: Tensor) -> Tensor:
        return calculate_stability_score(masks, self.model.mask_threshold, self.stability_score_offset)
