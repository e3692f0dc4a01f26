"""The mask decoder of SAM 2 (arXiv 2408.00714): SAM's with its options, called and answering as in sam2."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .mask_decoder import MaskDecoder


class Sam2MaskDecoder(MaskDecoder):
    """Predict masks, their IoU, the tokens of the object and whether it is seen; the options are of its base class."""

    def forward(  # type: ignore[override]
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
        repeat_image: bool,
        high_res_features: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Predict masks for P prompts on one image, or P images with a prompt each.

        Args:
            image_embeddings: [P or 1, C, h, w].
            image_pe: [1, C, h, w] positional encoding of its grid.
            sparse_prompt_embeddings: [P, S, C] tokens of points and boxes.
            dense_prompt_embeddings: [P, C, h, w] embedding of the masks.
            multimask_output: three masks for an ambiguous prompt, or the one mask for an unambiguous prompt.
            repeat_image: one image is of all prompts; the number of rows says it too, so this is not read.
            high_res_features: [P or 1, C / 8, 4h, 4w] and [P or 1, C / 4, 2h, 2w], of ``conv_s0`` and ``conv_s1``.

        Returns:
            logits [P, 3 or 1, 4h, 4w]; predicted IoU [P, 3 or 1]; the object's tokens [P, 3 or 1, C]; logits [P, 1]
            of whether the object is seen, 10 without ``pred_obj_scores``.

        Raises:
            ValueError: as of the base class.
        """
        inputs = (image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings)
        fused = self._fused(*inputs, multimask_output, high_res_features)
        if fused is not None:
            masks, iou, mask_tokens, object_scores = fused
            object_scores = seen_for_sure(iou) if object_scores is None else object_scores
        else:
            all_masks, all_iou, mask_tokens, object_scores = self.predict_masks(
                image_embeddings=image_embeddings,
                image_pe=image_pe,
                sparse_prompt_embeddings=sparse_prompt_embeddings,
                dense_prompt_embeddings=dense_prompt_embeddings,
                repeat_image=repeat_image,
                high_res_features=high_res_features,
            )
            masks, iou = self.choose_masks(all_masks, all_iou, multimask_output)
        return masks, iou, self.object_tokens(mask_tokens, multimask_output), object_scores

    def predict_masks(  # type: ignore[override]
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        repeat_image: bool,
        high_res_features: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Predict all masks [P, M, 4h, 4w] and their IoU [P, M], with all mask tokens [P, M, C] and object scores."""
        masks, iou, mask_tokens, object_scores = self.predict_all(
            image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings, high_res_features
        )
        return masks, iou, mask_tokens, seen_for_sure(iou) if object_scores is None else object_scores


def seen_for_sure(iou: Tensor) -> Tensor:
    """Return the object scores [P, 1] of a decoder that predicts none, as officially; ``iou`` is [P, M]."""
    return torch.full_like(iou[:, :1], 10.0)
