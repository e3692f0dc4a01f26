"""Weights as fused forms read them, immutable snapshots: layers by themselves, and the whole mask decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsam_kernels import LayerNormWeights, UpscalingWeights, ValueProjection, pack_upscaling

from ..modeling.common import LayerNorm2d
from ..modeling.mask_decoder import MaskDecoder, OutputTokens, upscale
from ..modeling.prompt_encoder import PromptEncoder
from ..modeling.transformer import Attention, TwoWayAttentionBlock

Function = Callable[[Tensor], Tensor]
Packed = TypeVar("Packed")


@dataclass(frozen=True)
class Linear:
    """A linear layer: [..., in] -> [..., out]."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class LayerNorm:
    """A layer norm over the last dimension."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which operations on ``device`` take dtypes as they are."""
    is_on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if is_on else nullcontext()


@dataclass(frozen=True)
class ByDtype(Generic[Packed]):
    """Packed weights with products in the dtype that a call wants: that of the weights, or autocast's.

    Attributes:
        packed: the weights as they are.
        dtype: of them.
    """

    packed: Packed
    dtype: torch.dtype
    _narrowed: dict[torch.dtype, Packed] = field(default_factory=dict, repr=False)

    def now(self, device: torch.device) -> Packed:
        """Return the weights for a call on ``device``, kept for the next one."""
        kind = device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.dtype
        if dtype == self.dtype:
            return self.packed
        if dtype not in self._narrowed:
            with torch.inference_mode(False):
                self._narrowed[dtype] = _in_dtype(self.packed, dtype)
        return self._narrowed[dtype]


def _in_dtype(packed: Any, dtype: torch.dtype) -> Any:
    """Return packed weights in another dtype; norms stay as they are."""
    if isinstance(packed, Tensor):
        return packed.to(dtype)
    if isinstance(packed, tuple):
        return tuple(_in_dtype(each, dtype) for each in packed)
    if is_dataclass(packed) and not isinstance(packed, (type, LayerNorm)):
        values = {each.name: _in_dtype(getattr(packed, each.name), dtype) for each in fields(packed)}
        return replace(packed, **values)
    return packed


@dataclass(frozen=True)
class PackedAttention:
    """An attention; its four projections as :class:`Linear`, or modules of a user's own.

    Attributes:
        q, k, v, out: the projections.
        num_heads: heads of the attention.
        value: ``v`` as an operand, where its weights are known.
    """

    q: Any
    k: Any
    v: Any
    out: Any
    num_heads: int
    value: Any

    @property
    def can_absorb(self) -> bool:
        """Return whether all projections are plain linear layers, which the tokens can absorb."""
        return all(type(projection) is Linear for projection in (self.q, self.k, self.v, self.out))


@dataclass(frozen=True)
class PackedBlock:
    """A two-way block; norms as :class:`LayerNorm`, or modules of a user's own.

    ``image_norm`` is ``norm4``, that of the image tokens, as an operand, where its weights are known.
    """

    self_attn: PackedAttention
    token_to_image: PackedAttention
    image_to_token: PackedAttention
    norm1: Function
    norm2: Function
    norm3: Function
    norm4: Function
    image_norm: Any
    mlp: Function
    skip_first_layer_pe: bool

    @property
    def can_absorb(self) -> bool:
        """Return whether the projections between tokens and image can be absorbed, and the image's norm fused."""
        return self.image_norm is not None and self.token_to_image.can_absorb and self.image_to_token.can_absorb


@dataclass(frozen=True)
class Stability:
    """Thresholds by which an unstable single mask is replaced by the alternative of the best predicted IoU.

    Attributes:
        delta: logits by which the threshold is moved.
        threshold: IoU of both masks from which on the single mask stays.
    """

    delta: float
    threshold: float


@dataclass(frozen=True)
class PackedDecoder:
    """All that the fused mask decoder reads of the weights of one generation.

    Attributes:
        generation: the decoder's generation (:func:`sam.inference.eligibility.look`).
        output_tokens: [1 + M, C], or one more with an object score, the decoder's own.
        positions: where they stand.
        blocks, final_attn, norm_final_attn: the layers of the transformer.
        can_absorb: the projections of the image can be absorbed into the tokens.
        predict_iou: the head [P, C] -> [P, M].
        predict_object_scores: the head [P, C] -> [P, 1]; None where the decoder has none.
        stability: thresholds that replace an unstable single mask; None where it always stays.
        takes_high_res: the upscaling adds features of finer grids.
        upscaling: both transposed convolutions as matrices; None where a user changed ``output_upscaling``.
        upscale: ``output_upscaling`` itself, and the features that it adds.
        upscaling_eps: epsilon of the upscaling's norm.
        hypernetworks: weights [masks, in, out] and biases [masks, 1, out] of each layer, by the masks' first index and
            the one behind their last; of the single mask, of the others, and of all.
        mask_mlps: the M hypernetworks themselves.
        logits_dtype: dtype of logits and predicted IoU, at least fp32.
    """

    generation: int
    output_tokens: Tensor
    positions: OutputTokens
    blocks: tuple[PackedBlock, ...]
    final_attn: PackedAttention
    norm_final_attn: Function
    can_absorb: bool
    predict_iou: Function
    predict_object_scores: Function | None
    stability: Stability | None
    takes_high_res: bool
    upscaling: UpscalingWeights | None
    upscale: Callable[[Tensor, Sequence[Tensor]], Tensor]
    upscaling_eps: float
    hypernetworks: dict[tuple[int, int], list[tuple[Tensor, Tensor]]]
    mask_mlps: tuple[Function, ...]
    logits_dtype: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        return self.output_tokens.dtype


def pack_decoder(decoder: MaskDecoder, generation: int = 0) -> PackedDecoder:
    """Pack the weights of ``decoder``, of which :func:`sam.inference.eligibility.look` has no objection.

    Differentiable where autograd records: the weights themselves are read, or functions of them.
    """
    transformer, upscaling = decoder.transformer, decoder.output_upscaling
    blocks = tuple(_pack_block(block) for block in transformer.layers)  # type: ignore[arg-type]
    final_attn = _pack_attention(transformer.final_attn_token_to_image)
    mlps = tuple(decoder.output_hypernetworks_mlps)
    matrices, eps = _pack_upscaling(upscaling)
    return PackedDecoder(
        generation=generation,
        output_tokens=decoder.output_token_weights(),
        positions=decoder.output_tokens,
        blocks=blocks,
        final_attn=final_attn,
        norm_final_attn=_pack_norm(transformer.norm_final_attn),
        can_absorb=final_attn.can_absorb and all(block.can_absorb for block in blocks),
        predict_iou=decoder.iou_prediction_head,
        predict_object_scores=decoder.pred_obj_score_head if decoder.pred_obj_scores else None,
        stability=_pack_stability(decoder),
        takes_high_res=decoder.use_high_res_features,
        upscaling=matrices,
        upscale=partial(upscale, upscaling),
        upscaling_eps=eps,
        hypernetworks=_pack_hypernetworks(mlps),
        mask_mlps=mlps,
        logits_dtype=torch.promote_types(decoder.iou_token.weight.dtype, torch.float32),
    )


def _pack_stability(decoder: MaskDecoder) -> Stability | None:
    if decoder.training or not decoder.dynamic_multimask_via_stability:
        return None
    return Stability(decoder.dynamic_multimask_stability_delta, decoder.dynamic_multimask_stability_thresh)


def pack_image_pe(encoder: PromptEncoder, generation: int = 0) -> Tensor:
    """Compute the positional encoding of the image embedding's grid, [1, C, h, w]."""
    return encoder.pe_layer(encoder.image_embedding_size)[None]


def _pack_block(block: TwoWayAttentionBlock) -> PackedBlock:
    norm4 = _pack_norm(block.norm4)
    return PackedBlock(
        self_attn=_pack_attention(block.self_attn),
        token_to_image=_pack_attention(block.cross_attn_token_to_image),
        image_to_token=_pack_attention(block.cross_attn_image_to_token),
        norm1=_pack_norm(block.norm1),
        norm2=_pack_norm(block.norm2),
        norm3=_pack_norm(block.norm3),
        norm4=norm4,
        image_norm=LayerNormWeights(norm4.weight, norm4.bias, norm4.eps) if type(norm4) is LayerNorm else None,
        mlp=block.mlp,
        skip_first_layer_pe=block.skip_first_layer_pe,
    )


def _pack_attention(attention: Attention) -> PackedAttention:
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
    q, k, v, out = map(_pack_linear, projections)
    value = ValueProjection(v.weight, v.bias) if type(v) is Linear else None
    return PackedAttention(q, k, v, out, attention.num_heads, value)


def _pack_hypernetworks(mlps: Sequence[nn.Module]) -> dict[tuple[int, int], list[tuple[Tensor, Tensor]]]:
    layers = [
        (
            # In the order of nn.Linear: with ``in`` outermost MKL sums few rows one by one, three times as wrong.
            torch.stack([linear.weight for linear in layer]).transpose(1, 2),
            torch.stack([linear.bias for linear in layer])[:, None],
        )
        for layer in zip(*(mlp.layers for mlp in mlps), strict=True)
    ]
    ranges = {(0, 1), (1, len(mlps)), (0, len(mlps))}
    return {(start, stop): [(w[start:stop], b[start:stop]) for w, b in layers] for start, stop in ranges}


def _pack_linear(layer: nn.Module) -> Any:
    known = type(layer) is nn.Linear and layer.bias is not None
    return Linear(layer.weight, layer.bias) if known else layer  # type: ignore[arg-type]


def _pack_norm(layer: nn.Module) -> Any:
    known = type(layer) is nn.LayerNorm and layer.weight is not None and layer.bias is not None
    return LayerNorm(layer.weight, layer.bias, layer.eps) if known else layer  # type: ignore[arg-type]


def pack_composed(after: nn.Linear, before: nn.Linear) -> Linear:
    """Return two linear layers in a row as one, its products in fp64."""
    weight, bias = after.weight.double(), after.bias.double()
    composed = weight @ before.weight.double(), weight @ before.bias.double() + bias
    return Linear(composed[0].to(after.weight.dtype), composed[1].to(after.weight.dtype))


def pack_wide_norm(norm: Any) -> LayerNorm:
    """Return a norm of values in fp32 at least."""
    wide = torch.promote_types(norm.weight.dtype, torch.float32)
    return LayerNorm(norm.weight.to(wide), norm.bias.to(wide), norm.eps)


_UPSCALING = (nn.ConvTranspose2d, LayerNorm2d, nn.GELU, nn.ConvTranspose2d, nn.GELU)


def _doubles(layer: Any) -> bool:
    """Return whether a transposed convolution makes 2 x 2 pixels of each pixel by itself, with a bias."""
    settings = (layer.kernel_size, layer.stride, layer.padding, layer.output_padding, layer.groups)
    return settings == ((2, 2), (2, 2), (0, 0), (0, 0), 1) and layer.dilation == (1, 1) and layer.bias is not None


def _pack_upscaling(upscaling: nn.Sequential) -> tuple[UpscalingWeights | None, float]:
    """Pack ``output_upscaling`` if it is what the operation computes; another activation runs as modules."""
    layers = list(upscaling)
    exact = all(layer.approximate == "none" for layer in layers if isinstance(layer, nn.GELU))
    if tuple(map(type, layers)) != _UPSCALING or not exact or not (_doubles(layers[0]) and _doubles(layers[3])):
        return None, 0.0
    first, norm, _, second, _ = layers
    weights = [getattr(layer, name) for layer in (first, norm, second) for name in ("weight", "bias")]
    return pack_upscaling(*weights), norm.eps  # type: ignore[return-value]
