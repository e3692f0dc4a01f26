"""SAM 2 (arXiv 2408.00714): the whole model, images to embeddings to masks, and one step of tracking objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Sam2Config
from ..embedding import ImageFeatures
from ..inference import fused_hiera
from ..prompts.layout import PromptLayout
from ..system.methods import WrittenMethods
from .common import MLP, uncompiled
from .feature_pyramid import ImageEncoder
from .prompt_encoder import PromptEncoder
from .promptable import PromptableModel
from .sam2_mask_decoder import Sam2MaskDecoder
from .sam2_tracking import NO_OBJ_SCORE, TrackingSteps
from .transformer import TwoWayTransformer

__all__ = ["NO_OBJ_SCORE", "SAM2Base"]

_MASK_LOGIT = 10.0  # logit inside a given mask; minus that outside


class SAM2Base(TrackingSteps, PromptableModel):
    """Segment Anything 2: an image encoder, a memory, a prompt encoder and a mask decoder.

    The arguments and methods of the official class; ``encode`` and ``predict`` are ours, see
    :class:`~sam.modeling.promptable.PromptableModel`. ``config`` says what the modules were built from; only saving in
    another layout needs it.
    """

    # Of what is computed of an image and its prompts; those of a video are no part of a model's hash.
    __constants__ = ("image_size", "backbone_stride", "directly_add_no_mem_embed", "use_high_res_features_in_sam")
    prompt_layout = PromptLayout.BOX_FIRST
    stretches_images = True
    low_res_limit = 32.0
    image_encoder: Any
    image_size: int
    backbone_stride: int
    use_high_res_features_in_sam: bool
    use_multimask_token_for_obj_ptr: bool
    iou_prediction_use_sigmoid: bool
    pred_obj_scores: bool
    pred_obj_scores_mlp: bool
    fixed_no_obj_ptr: bool
    soft_no_obj_ptr: bool
    use_mlp_for_obj_ptr_proj: bool

    def __init__(
        self,
        image_encoder: ImageEncoder,
        memory_attention: nn.Module,
        memory_encoder: nn.Module,
        num_maskmem: int = 7,
        image_size: int = 512,
        backbone_stride: int = 16,
        sigmoid_scale_for_mem_enc: float = 1.0,
        sigmoid_bias_for_mem_enc: float = 0.0,
        binarize_mask_from_pts_for_mem_enc: bool = False,
        use_mask_input_as_output_without_sam: bool = False,
        max_cond_frames_in_attn: int = -1,
        directly_add_no_mem_embed: bool = False,
        use_high_res_features_in_sam: bool = False,
        multimask_output_in_sam: bool = False,
        multimask_min_pt_num: int = 1,
        multimask_max_pt_num: int = 1,
        multimask_output_for_tracking: bool = False,
        use_multimask_token_for_obj_ptr: bool = False,
        iou_prediction_use_sigmoid: bool = False,
        memory_temporal_stride_for_eval: int = 1,
        non_overlap_masks_for_mem_enc: bool = False,
        use_obj_ptrs_in_encoder: bool = False,
        max_obj_ptrs_in_encoder: int = 16,
        add_tpos_enc_to_obj_ptrs: bool = True,
        proj_tpos_enc_in_obj_ptrs: bool = False,
        use_signed_tpos_enc_to_obj_ptrs: bool = False,
        only_obj_ptrs_in_the_past_for_eval: bool = False,
        pred_obj_scores: bool = False,
        pred_obj_scores_mlp: bool = False,
        fixed_no_obj_ptr: bool = False,
        soft_no_obj_ptr: bool = False,
        use_mlp_for_obj_ptr_proj: bool = False,
        no_obj_embed_spatial: bool = False,
        sam_mask_decoder_extra_args: Mapping[str, Any] | None = None,
        compile_image_encoder: bool = False,
        pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
        pixel_std: Sequence[float] = (58.395, 57.12, 57.375),
        config: Sam2Config | None = None,
    ) -> None:
        options = {name: value for name, value in locals().items() if name in _OPTIONS}
        _check_options(options)
        super().__init__(pixel_mean, pixel_std)
        for name, value in options.items():
            setattr(self, name, value)
        self.config = config
        self.image_encoder = image_encoder
        self.memory_attention = memory_attention
        self.memory_encoder = memory_encoder
        self.num_feature_levels = 3 if use_high_res_features_in_sam else 1
        self.hidden_dim = image_encoder.neck.d_model
        projection = getattr(getattr(memory_encoder, "out_proj", None), "weight", None)
        self.mem_dim = self.hidden_dim if projection is None else projection.shape[0]
        self.sam_mask_decoder_extra_args = sam_mask_decoder_extra_args
        self._build_embeddings(no_obj_embed_spatial)
        self._build_sam_heads()
        if compile_image_encoder:
            self.image_encoder.forward = torch.compile(
                self.image_encoder.forward, mode="max-autotune", fullgraph=True, dynamic=False
            )

    def _build_embeddings(self, no_obj_embed_spatial: bool) -> None:
        """Make the lone vectors of the memory, and the convolution that gives the decoder a mask that is given."""
        if self.use_obj_ptrs_in_encoder:
            self.mask_downsample = nn.Conv2d(1, 1, kernel_size=4, stride=4)
        self.maskmem_tpos_enc = _drawn(self.num_maskmem, 1, 1, self.mem_dim)
        self.no_mem_embed = _drawn(1, 1, self.hidden_dim)
        self.no_mem_pos_enc = _drawn(1, 1, self.hidden_dim)
        if self.pred_obj_scores and self.use_obj_ptrs_in_encoder:
            self.no_obj_ptr = _drawn(1, self.hidden_dim)
        self.no_obj_embed_spatial = _drawn(1, self.mem_dim) if no_obj_embed_spatial else None

    def _build_sam_heads(self) -> None:
        """Make the prompt encoder, the mask decoder and what makes pointers of its tokens."""
        width, side = self.hidden_dim, self.image_size // self.backbone_stride
        self.sam_prompt_embed_dim, self.sam_image_embedding_size = width, side
        self.sam_prompt_encoder = PromptEncoder(
            embed_dim=width,
            image_embedding_size=(side, side),
            input_image_size=(self.image_size, self.image_size),
            mask_in_chans=16,
        )
        self.sam_prompt_encoder.takes_corners = True
        self.sam_mask_decoder = Sam2MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=width, mlp_dim=2048, num_heads=8, numbered_mlp=True),
            transformer_dim=width,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
            use_high_res_features=self.use_high_res_features_in_sam,
            iou_prediction_use_sigmoid=self.iou_prediction_use_sigmoid,
            pred_obj_scores=self.pred_obj_scores,
            pred_obj_scores_mlp=self.pred_obj_scores_mlp,
            use_multimask_token_for_obj_ptr=self.use_multimask_token_for_obj_ptr,
            **(self.sam_mask_decoder_extra_args or {}),
        )
        self.obj_ptr_proj: nn.Module = nn.Identity()
        if self.use_obj_ptrs_in_encoder:
            self.obj_ptr_proj = (
                MLP(width, width, width, 3) if self.use_mlp_for_obj_ptr_proj else nn.Linear(width, width)
            )
        projects = self.proj_tpos_enc_in_obj_ptrs
        self.obj_ptr_tpos_proj = nn.Linear(width, self.mem_dim) if projects else nn.Identity()

    # Of sam.modeling.promptable ----------------------------------------------------------------------------

    @property
    def prompt_encoder(self) -> Any:
        return self.sam_prompt_encoder

    @property
    def mask_decoder(self) -> Any:
        return self.sam_mask_decoder

    def image_features(self, pixels: Tensor) -> ImageFeatures:
        """Encode normalised pixels [B, 3, H, W], sides multiples of 32, for prompts on the image itself.

        Returns:
            the embedding [B, C, h, w], with ``no_mem_embed`` added where the model does so, and the high-resolution
            features [B, C / 8, 4h, 4w] and [B, C / 4, 2h, 2w].
        """
        if self.runtime is not None and _IMAGE.replaced_in(self) is None:
            maps = self.runtime.image_maps(self._image_maps, pixels, self.image_encoder, self.sam_mask_decoder)
        else:
            maps = self._image_maps(pixels)
        embedding, *high_res = maps
        if self.directly_add_no_mem_embed:
            embedding = embedding + self.no_mem_embed.view(1, -1, 1, 1)
        return ImageFeatures(embedding.to(self.dtype), tuple(high_res))

    def _image_maps(self, pixels: Tensor, run: fused_hiera.RunBlock | None = None) -> tuple[Tensor, ...]:
        """Return the embedding, without ``no_mem_embed``, and the high-resolution features."""
        if _IMAGE.replaced_in(self) is None:
            decoder = self.sam_mask_decoder
            finer = (decoder.conv_s0, decoder.conv_s1) if self.use_high_res_features_in_sam else ()
            made = fused_hiera.image_features(self.image_encoder, finer, pixels, self._kernels, run)
            if made is not None:
                return made[0], *made[1]
        maps = self.forward_image(pixels)["backbone_fpn"]
        return maps[-1], *maps[-self.num_feature_levels : -1]

    # The official interface --------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raise ``NotImplementedError``, as officially: a predictor or :meth:`predict` runs the model."""
        raise NotImplementedError("SAM 2 has no forward of its own: use encode and predict, or a predictor")

    def forward_image(self, img_batch: Tensor) -> dict[str, Any]:
        """Encode images [B, 3, H, W] as the image encoder does, its finer maps projected for the mask decoder."""
        decoder: Any = self.sam_mask_decoder
        finer = (decoder.conv_s0, decoder.conv_s1) if self.use_high_res_features_in_sam else ()
        made = fused_hiera.image_features(self.image_encoder, finer, img_batch, self._kernels) if finer else None
        if made is not None:
            embedding, high_res = made
            maps = [*high_res, embedding]
            encode_position = uncompiled(self.image_encoder).neck.position_encoding
            positions = [encode_position(x).to(x.dtype) for x in maps]
            return {"vision_features": embedding, "vision_pos_enc": positions, "backbone_fpn": maps}
        backbone_out = self.image_encoder(img_batch)
        if self.use_high_res_features_in_sam:
            maps = backbone_out["backbone_fpn"]
            maps[0] = self.sam_mask_decoder.conv_s0(maps[0])
            maps[1] = self.sam_mask_decoder.conv_s1(maps[1])
        return backbone_out

    def _prepare_backbone_features(
        self, backbone_out: dict[str, Any]
    ) -> tuple[dict[str, Any], list[Tensor], list[Tensor], list[tuple[int, int]]]:
        """Return a copy of ``backbone_out``, its maps and positions as [h * w, B, C], and their sizes."""
        backbone_out = backbone_out.copy()
        maps, positions = backbone_out["backbone_fpn"], backbone_out["vision_pos_enc"]
        if not len(maps) == len(positions) >= self.num_feature_levels:
            raise ValueError(f"{self.num_feature_levels} maps and positions are wanted, got {len(maps)}")
        maps, positions = maps[-self.num_feature_levels :], positions[-self.num_feature_levels :]
        sizes = [(x.shape[-2], x.shape[-1]) for x in positions]
        tokens, token_positions = ([x.flatten(2).permute(2, 0, 1) for x in given] for given in (maps, positions))
        return backbone_out, tokens, token_positions, sizes

    def _forward_sam_heads(
        self,
        backbone_features: Tensor,
        point_inputs: Mapping[str, Tensor] | None = None,
        mask_inputs: Tensor | None = None,
        high_res_features: Sequence[Tensor] | None = None,
        multimask_output: bool = False,
    ) -> tuple[Tensor, ...]:
        """Predict the masks of B objects, each with features of its own.

        Args:
            backbone_features: [B, C, h, w].
            point_inputs: ``point_coords`` [B, N, 2] in pixels of the square and ``point_labels`` [B, N].
            mask_inputs: [B, 1, H, W]; another size than the low-resolution logits' is resized to theirs.
            high_res_features: [B, C / 8, 4h, 4w] and [B, C / 4, 2h, 2w].
            multimask_output: three masks per object, the best of which becomes its mask.

        Returns:
            all low-resolution logits [B, M, 4h, 4w], them at full size, predicted IoU [B, M], the best one's logits
            [B, 1, 4h, 4w] and at full size, object pointers [B, C], object scores [B, 1].
        """
        objects, device = backbone_features.shape[0], backbone_features.device
        if point_inputs is None:  # one point that is none
            coords = torch.zeros(objects, 1, 2, device=device)
            labels = -torch.ones(objects, 1, dtype=torch.int32, device=device)
        else:
            coords, labels = point_inputs["point_coords"], point_inputs["point_labels"]
        size = self.sam_prompt_encoder.mask_input_size
        if mask_inputs is not None and mask_inputs.shape[-2:] != size:
            mask_inputs = _resize(mask_inputs.float(), size, antialias=True)
        sparse, dense = self.sam_prompt_encoder(points=(coords, labels), boxes=None, masks=mask_inputs)
        image_pe = self.sam_prompt_encoder.get_dense_pe()
        if not torch.is_autocast_enabled(device.type):
            sparse, dense, image_pe = (x.to(backbone_features.dtype) for x in (sparse, dense, image_pe))
        low_res, ious, tokens, scores = self.sam_mask_decoder(
            image_embeddings=backbone_features,
            image_pe=image_pe,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask_output,
            repeat_image=False,
            high_res_features=high_res_features,
        )
        if self.pred_obj_scores:
            low_res = torch.where((scores > 0)[:, None, None], low_res, NO_OBJ_SCORE)
        low_res = low_res.float()
        high_res = _resize(low_res, (self.image_size, self.image_size))
        best_low_res, best_high_res, token = low_res, high_res, tokens[:, 0]
        if multimask_output:
            rows, best = torch.arange(objects, device=device), ious.argmax(dim=-1)
            best_low_res, best_high_res = low_res[rows, best][:, None], high_res[rows, best][:, None]
            if tokens.shape[1] > 1:
                token = tokens[rows, best]
        pointer = self.obj_ptr_proj(token)
        if self.pred_obj_scores:
            present = scores.sigmoid() if self.soft_no_obj_ptr else (scores > 0).float()
            pointer = self._without_absent(pointer, present)
        return low_res, high_res, ious, best_low_res, best_high_res, pointer, scores

    def _use_mask_as_output(
        self, backbone_features: Tensor, high_res_features: Sequence[Tensor] | None, mask_inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """Return what :meth:`_forward_sam_heads` does, with the masks [B, 1, H, W] that are given as the result."""
        masks = mask_inputs.float()
        high_res = masks * (2 * _MASK_LOGIT) - _MASK_LOGIT
        low_res = _resize(high_res, (masks.shape[-2] // 4, masks.shape[-1] // 4), antialias=True)
        pointer = torch.zeros(len(masks), self.hidden_dim, device=masks.device)
        if self.use_obj_ptrs_in_encoder:
            *_, pointer, _ = self._forward_sam_heads(
                backbone_features=backbone_features,
                mask_inputs=self.mask_downsample(masks.to(self.mask_downsample.weight.dtype)),
                high_res_features=high_res_features,
            )
        present = (masks.flatten(1) > 0.0).any(dim=1, keepdim=True).float()
        scores = 2 * _MASK_LOGIT * present - _MASK_LOGIT
        if self.pred_obj_scores:
            pointer = self._without_absent(pointer, present)
        ious = masks.new_ones(len(masks), 1)
        return low_res, high_res, ious, low_res, high_res, pointer, scores

    def _without_absent(self, pointer: Tensor, present: Tensor) -> Tensor:
        """Return the pointers [B, C], or ``no_obj_ptr`` as far as an object is not ``present`` [B, 1]."""
        if present.dtype == torch.bool:
            if self.fixed_no_obj_ptr:
                return torch.where(present, pointer, self.no_obj_ptr)
            present = present.float()
        if self.fixed_no_obj_ptr:
            pointer = present * pointer
        return pointer + (1 - present) * self.no_obj_ptr


_OPTIONS = (
    *("image_size", "backbone_stride", "num_maskmem", "sigmoid_scale_for_mem_enc", "sigmoid_bias_for_mem_enc"),
    *("binarize_mask_from_pts_for_mem_enc", "use_mask_input_as_output_without_sam", "max_cond_frames_in_attn"),
    *("directly_add_no_mem_embed", "use_high_res_features_in_sam", "multimask_output_in_sam", "multimask_min_pt_num"),
    *("multimask_max_pt_num", "multimask_output_for_tracking", "use_multimask_token_for_obj_ptr"),
    *("iou_prediction_use_sigmoid", "memory_temporal_stride_for_eval", "non_overlap_masks_for_mem_enc"),
    *("use_obj_ptrs_in_encoder", "max_obj_ptrs_in_encoder", "add_tpos_enc_to_obj_ptrs", "proj_tpos_enc_in_obj_ptrs"),
    *("use_signed_tpos_enc_to_obj_ptrs", "only_obj_ptrs_in_the_past_for_eval", "pred_obj_scores"),
    *("pred_obj_scores_mlp", "fixed_no_obj_ptr", "soft_no_obj_ptr", "use_mlp_for_obj_ptr_proj"),
)


def _check_options(options: Mapping[str, Any]) -> None:
    if options["proj_tpos_enc_in_obj_ptrs"] and not options["add_tpos_enc_to_obj_ptrs"]:
        raise ValueError("proj_tpos_enc_in_obj_ptrs needs add_tpos_enc_to_obj_ptrs")
    if options["fixed_no_obj_ptr"] and not (options["pred_obj_scores"] and options["use_obj_ptrs_in_encoder"]):
        raise ValueError("fixed_no_obj_ptr needs pred_obj_scores and use_obj_ptrs_in_encoder")


def _drawn(*shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.zeros(shape), std=0.02))


def _resize(x: Tensor, size: tuple[int, int], antialias: bool = False) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=antialias)


_IMAGE = WrittenMethods(SAM2Base, "forward_image")
