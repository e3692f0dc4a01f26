"""The mask decoder of SAM: image embedding and prompt tokens -> low-resolution mask logits and their predicted IoU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..system.tensors import is_making_graph
from .common import MLP, LayerNorm2d
from .transformer import TwoWayTransformer
from .weight_cache import WeightCache


class OutputTokens(NamedTuple):
    """Positions of the decoder's own tokens, which come before those of a prompt.

    Attributes:
        iou: index of the token of the predicted IoU.
        masks: slice of the mask tokens, the single mask first.
        total: number of the decoder's own tokens.
        object_score: index of the token of the object score; None without ``pred_obj_scores``.
    """

    iou: int
    masks: slice
    total: int
    object_score: int | None = None


class DecoderOutputs(NamedTuple):
    """All that a mask decoder predicts for P prompts.

    Attributes:
        masks: logits [P, M, 4h, 4w], the single mask first.
        iou: [P, M] predicted IoU of each.
        mask_tokens: [P, M, C] of each.
        object_scores: logits [P, 1], above 0 where the object is seen; None without ``pred_obj_scores``.
    """

    masks: Tensor
    iou: Tensor
    mask_tokens: Tensor
    object_scores: Tensor | None


class MaskDecoder(WeightCache):
    """Predicts ``num_multimask_outputs`` masks for ambiguous prompts and one for unambiguous ones.

    With its defaults it is the decoder of SAM; the options from ``use_high_res_features`` on are those of SAM 2.

    Args:
        transformer_dim: C, the channels of tokens and image embedding.
        transformer: the two-way transformer.
        num_multimask_outputs: masks for an ambiguous prompt.
        activation: in the upscaling.
        iou_head_depth, iou_head_hidden_dim: layers and width of the MLP that predicts the IoU.
        use_high_res_features: the upscaling adds two feature maps of a finer grid.
        iou_prediction_use_sigmoid: the predicted IoU goes through a sigmoid.
        dynamic_multimask_via_stability: in eval mode, replace an unstable single mask by the alternative of the
            best predicted IoU.
        dynamic_multimask_stability_delta: logits by which the threshold is moved to measure stability.
        dynamic_multimask_stability_thresh: IoU of both masks from which on the single mask is stable.
        pred_obj_scores: a token of its own says whether the object is there.
        pred_obj_scores_mlp: its head is an MLP of three layers and not one linear layer.
        use_multimask_token_for_obj_ptr: the alternatives' tokens are those of the object, where they are returned.
    """

    # SAM 2's, at SAM's values. At those they are no part of a model's hash, which SAM had before them.
    OPTIONS: ClassVar = {
        "use_high_res_features": False,
        "dynamic_multimask_via_stability": False,
        "dynamic_multimask_stability_delta": 0.05,
        "dynamic_multimask_stability_thresh": 0.98,
        "pred_obj_scores": False,
        "use_multimask_token_for_obj_ptr": False,
    }
    __constants__ = ("num_multimask_outputs", "num_mask_tokens", *OPTIONS)

    def __init__(
        self,
        *,
        transformer_dim: int,
        transformer: TwoWayTransformer,
        num_multimask_outputs: int = 3,
        activation: type[nn.Module] = nn.GELU,
        iou_head_depth: int = 3,
        iou_head_hidden_dim: int = 256,
        use_high_res_features: bool = False,
        iou_prediction_use_sigmoid: bool = False,
        dynamic_multimask_via_stability: bool = False,
        dynamic_multimask_stability_delta: float = 0.05,
        dynamic_multimask_stability_thresh: float = 0.98,
        pred_obj_scores: bool = False,
        pred_obj_scores_mlp: bool = False,
        use_multimask_token_for_obj_ptr: bool = False,
    ) -> None:
        super().__init__()
        self.transformer_dim = transformer_dim
        self.transformer = transformer
        self.num_multimask_outputs = num_multimask_outputs
        self.num_mask_tokens = num_multimask_outputs + 1
        self.iou_token = nn.Embedding(1, transformer_dim)
        self.mask_tokens = nn.Embedding(self.num_mask_tokens, transformer_dim)
        self.pred_obj_scores = pred_obj_scores
        if pred_obj_scores:
            self.obj_score_token = nn.Embedding(1, transformer_dim)
        self.use_multimask_token_for_obj_ptr = use_multimask_token_for_obj_ptr
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(transformer_dim, transformer_dim // 4, kernel_size=2, stride=2),
            LayerNorm2d(transformer_dim // 4),
            activation(),
            nn.ConvTranspose2d(transformer_dim // 4, transformer_dim // 8, kernel_size=2, stride=2),
            activation(),
        )
        self.use_high_res_features = use_high_res_features
        if use_high_res_features:
            self.conv_s0 = nn.Conv2d(transformer_dim, transformer_dim // 8, kernel_size=1)
            self.conv_s1 = nn.Conv2d(transformer_dim, transformer_dim // 4, kernel_size=1)
        self.output_hypernetworks_mlps = nn.ModuleList(
            MLP(transformer_dim, transformer_dim, transformer_dim // 8, 3) for _ in range(self.num_mask_tokens)
        )
        self.iou_prediction_head = MLP(
            transformer_dim, iou_head_hidden_dim, self.num_mask_tokens, iou_head_depth, iou_prediction_use_sigmoid
        )
        if pred_obj_scores:
            self.pred_obj_score_head = (
                MLP(transformer_dim, transformer_dim, 1, 3) if pred_obj_scores_mlp else nn.Linear(transformer_dim, 1)
            )
        self.dynamic_multimask_via_stability = dynamic_multimask_via_stability
        self.dynamic_multimask_stability_delta = dynamic_multimask_stability_delta
        self.dynamic_multimask_stability_thresh = dynamic_multimask_stability_thresh

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
        high_res_features: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predict masks for P prompts on one image, one prompt on P images, or P images with a prompt each.

        Every input has P rows, or one row that serves all.

        Args:
            image_embeddings: [P or 1, C, h, w] from the image encoder.
            image_pe: [P or 1, C, h, w] positional encoding of its grid.
            sparse_prompt_embeddings: [P or 1, S, C] tokens of points and boxes.
            dense_prompt_embeddings: [P or 1, C, h, w] embedding of the masks.
            multimask_output: three masks for an ambiguous prompt, or the one mask for an unambiguous prompt.
            high_res_features: [P or 1, C / 8, 4h, 4w] and [P or 1, C / 4, 2h, 2w], of ``conv_s0`` and ``conv_s1``.

        Returns:
            logits [P, 3 or 1, 4h, 4w] and predicted IoU [P, 3 or 1].

        Raises:
            ValueError: numbers of rows that do not fit together; high-resolution features where the decoder adds none,
                or none where it adds them.
        """
        inputs = (image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings)
        fused = self._fused(*inputs, multimask_output, high_res_features)
        if fused is not None:
            return fused[:2]
        extra = {"high_res_features": high_res_features} if high_res_features else {}  # not of the official signature
        masks, iou = self.predict_masks(
            image_embeddings=image_embeddings,
            image_pe=image_pe,
            sparse_prompt_embeddings=sparse_prompt_embeddings,
            dense_prompt_embeddings=dense_prompt_embeddings,
            **extra,
        )
        return self.choose_masks(masks, iou, multimask_output)

    def predict_masks(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        high_res_features: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predict all masks: logits [P, 4, 4h, 4w] and predicted IoU [P, 4], the single mask first.

        Every module is called as officially, so hooks, adapters and other modules in their places count.
        """
        masks, iou, *_ = self.predict_all(
            image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings, high_res_features
        )
        return masks, iou

    def predict_all(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        high_res_features: Sequence[Tensor] | None = None,
    ) -> DecoderOutputs:
        """Predict all masks as :meth:`predict_masks`, and return their tokens and the object score too."""
        _check_rows(
            image_embeddings=image_embeddings,
            image_pe=image_pe,
            sparse_prompt_embeddings=sparse_prompt_embeddings,
            dense_prompt_embeddings=dense_prompt_embeddings,
        )
        if len(high_res_features or ()) != 2 * self.use_high_res_features:
            number = "two" if self.use_high_res_features else "no"
            raise ValueError(f"this mask decoder takes {number} high_res_features, got {len(high_res_features or ())}")
        tokens, grid = self._tokens(sparse_prompt_embeddings), image_embeddings.shape[-2:]
        source = image_embeddings + dense_prompt_embeddings.to(image_embeddings.dtype)
        # A sum and no comparison, so that a traced graph serves any number of prompts.
        prompts = (source[:, 0, 0, 0] + image_pe[:, 0, 0, 0] + tokens[:, 0, 0]).shape[0]
        each = (prompts, -1, -1, -1)
        pe, tokens = image_pe.to(tokens.dtype).expand(each), tokens.expand(prompts, -1, -1)
        tokens, keys = self.transformer(source.expand(each), pe, tokens)
        upscaled = upscale(self.output_upscaling, keys.transpose(1, 2).unflatten(2, grid), high_res_features or ())
        positions = self.output_tokens
        mask_tokens = tokens[:, positions.masks]
        mlps = self.output_hypernetworks_mlps
        hyper = torch.stack([mlps[i](mask_tokens[:, i]) for i in range(self.num_mask_tokens)], dim=1)
        masks = (hyper @ upscaled.flatten(2)).unflatten(-1, upscaled.shape[-2:])  # [P, M, 4h, 4w]
        iou = self.iou_prediction_head(tokens[:, positions.iou])
        object_scores = None
        if positions.object_score is not None:
            object_scores = self.pred_obj_score_head(tokens[:, positions.object_score])
        return DecoderOutputs(masks, iou, mask_tokens, object_scores)

    def choose_masks(self, masks: Tensor, iou: Tensor, multimask_output: bool) -> tuple[Tensor, Tensor]:
        """Choose what a call returns of all logits [P, M, h, w] and predicted IoU [P, M]: alternatives or single mask.

        With ``dynamic_multimask_via_stability``, in eval mode, a single mask that is not stable gives way to the
        alternative of the best predicted IoU.
        """
        chosen = self.mask_slice(multimask_output)
        single, single_iou = masks[:, chosen], iou[:, chosen]
        if multimask_output or self.training or not self.dynamic_multimask_via_stability:
            return single, single_iou
        return self._dynamic_multimask_via_stability(masks, iou)

    def _dynamic_multimask_via_stability(
        self, all_mask_logits: Tensor, all_iou_scores: Tensor
    ) -> tuple[Tensor, Tensor]:
        best = 1 + all_iou_scores[:, 1:].argmax(dim=1)
        row = torch.arange(best.shape[0], device=best.device)
        single, single_iou = all_mask_logits[:, :1], all_iou_scores[:, :1]
        stable = self._get_stability_scores(single) >= self.dynamic_multimask_stability_thresh
        return (
            torch.where(stable[..., None, None], single, all_mask_logits[row, best][:, None]),
            torch.where(stable, single_iou, all_iou_scores[row, best][:, None]),
        )

    def _get_stability_scores(self, mask_logits: Tensor) -> Tensor:
        return stability_of(mask_logits, self.dynamic_multimask_stability_delta)

    def object_tokens(self, mask_tokens: Tensor, multimask_output: bool) -> Tensor:
        """Return the tokens [P, 3 or 1, C] that stand for the object, of all mask tokens [P, M, C].

        They are the alternatives' where those are returned and ``use_multimask_token_for_obj_ptr`` is set, else the
        single mask's.
        """
        return mask_tokens[:, self.mask_slice(multimask_output and self.use_multimask_token_for_obj_ptr)]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a decoder without :attr:`OPTIONS` too, as official ones and older ones are."""
        super().__setstate__({**self.OPTIONS, **state})

    @property
    def output_tokens(self) -> OutputTokens:
        """Return the positions of the decoder's own tokens among the tokens of a prompt."""
        iou = int(self.pred_obj_scores)
        total = iou + 1 + self.num_mask_tokens
        return OutputTokens(iou, slice(iou + 1, total), total, 0 if self.pred_obj_scores else None)

    def output_token_weights(self) -> Tensor:
        """Return the decoder's own tokens in the order of :attr:`output_tokens`, [total, C]."""
        weights = [self.iou_token.weight, self.mask_tokens.weight]
        return torch.cat([self.obj_score_token.weight, *weights] if self.pred_obj_scores else weights)

    @staticmethod
    def mask_slice(multimask_output: bool) -> slice:
        """Return the masks that a call asks for: mask 0 is the single one, the others the alternatives."""
        return slice(1, None) if multimask_output else slice(0, 1)

    def _tokens(self, sparse: Tensor) -> Tensor:
        """Put the decoder's own tokens before those of prompts: [P, S, C] -> [P, total + S, C]."""
        output_tokens = self.output_token_weights()
        return torch.cat([output_tokens.expand(sparse.shape[0], -1, -1), sparse.to(output_tokens.dtype)], dim=1)


def upscale(layers: nn.Sequential, x: Tensor, high_res_features: Sequence[Tensor]) -> Tensor:
    """Upscale image features [P, C, h, w] to [P, C / 8, 4h, 4w], adding the finer features where there are any."""
    if not high_res_features:
        return layers(x)
    fine, coarse = high_res_features
    up1, norm, activation1, up2, activation2 = layers
    x = activation1(norm(up1(x) + coarse))
    return activation2(up2(x) + fine)


def stability_of(logits: Tensor, delta: float) -> Tensor:
    """Return the IoU [...] of the masks that logits [..., h, w] make at thresholds ``delta`` above and below 0.

    Of an empty mask it is 1.
    """
    inner, outer = ((logits > offset).sum(dim=(-2, -1)) for offset in (delta, -delta))
    return torch.where(outer > 0, inner / outer, 1.0)


def _check_rows(**inputs: Tensor) -> None:
    """Raise ``ValueError`` unless all ``inputs`` have as many rows, or one."""
    if is_making_graph():
        return
    rows = {name: x.shape[0] for name, x in inputs.items()}
    if len(set(rows.values()) - {1}) > 1:
        raise ValueError(f"the mask decoder takes one row of an input or as many as of the others, got {rows}")
