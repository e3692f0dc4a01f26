"""Modules that a program calls itself, ``model.image_encoder(x)``, fused by the same rule as ``model.predict``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsam_kernels import requires_autograd

from ..modeling.feature_pyramid import ImageEncoder
from ..modeling.image_encoder import ImageEncoderViT
from ..modeling.mask_decoder import MaskDecoder
from ..modeling.memory_attention import MemoryAttention
from ..modeling.memory_encoder import MemoryEncoder
from ..modeling.prompt_encoder import PromptEncoder
from ..modeling.quantized_linear import check_whole
from ..system.device_profile import device_profile
from . import fused_decoder, fused_encoder, fused_hiera, fused_memory_attention, fused_memory_encoder
from .eligibility import PARTS, look, why_not_now
from .fused_transformer import project_image
from .packed_weights import PackedDecoder, pack_decoder, pack_image_pe

Answer = tuple[Tensor, Tensor, Tensor, Tensor | None]


def _fused_mask_decoder(
    decoder: MaskDecoder,
    image_embeddings: Tensor,
    image_pe: Tensor,
    sparse: Tensor,
    dense: Tensor,
    multimask_output: bool,
    high_res_features: Sequence[Tensor] | None = None,
) -> Answer | None:
    """Compute a mask decoder's ``forward`` fused: masks, their IoU, all mask tokens, and object scores.

    None where the official operations shall run.
    """
    inputs, high_res = (image_embeddings, image_pe, sparse, dense), tuple(high_res_features or ())
    if decoder.kernels == "reference" or why_not_now(*inputs, *high_res, part=decoder) is not None:
        return None
    if type(decoder) not in PARTS["mask_decoder"] or not _are_usual(*inputs):
        return None
    snapshot = look(decoder)
    if snapshot.why_not_fused is not None:
        return None
    packed = snapshot.packed(pack_decoder, decoder)
    if any(x.device != packed.output_tokens.device for x in (*inputs, *high_res)):
        return None
    if image_embeddings.dtype != packed.dtype or not _are_usual_high_res(packed, high_res, *inputs):
        return None
    return _decode(packed, *inputs, multimask_output, high_res, decoder.kernels)


def _are_usual_high_res(packed: PackedDecoder, high_res: Sequence[Tensor], *inputs: Tensor) -> bool:
    """Return whether there are the features of finer grids that the decoder takes, of one image or one per prompt."""
    height, width = inputs[0].shape[-2:]
    grids, prompts = [(4 * height, 4 * width), (2 * height, 2 * width)], max(map(len, inputs))
    if not packed.takes_high_res or [x.shape[-2:] for x in high_res] != grids:
        return not packed.takes_high_res and not high_res
    return len(high_res[0]) == len(high_res[1]) in (1, prompts)


def _are_usual(image_embeddings: Tensor, image_pe: Tensor, sparse: Tensor, dense: Tensor) -> bool:
    """Return whether all inputs have P rows or one, and all prompts the same positions."""
    inputs = (image_embeddings, image_pe, sparse, dense)
    rows = {len(x) for x in inputs if x.ndim}
    if [x.ndim for x in inputs] != [4, 4, 3, 4] or len(rows - {1}) > 1 or 0 in rows:
        return False
    return _is_one_row(image_pe) and image_pe.shape[1:] == image_embeddings.shape[1:] == dense.shape[1:]


def _is_one_row(x: Tensor) -> bool:
    return len(x) == 1 or x.stride(0) == 0


def _decode(
    packed: PackedDecoder,
    image_embeddings: Tensor,
    image_pe: Tensor,
    sparse: Tensor,
    dense: Tensor,
    multimask_output: bool,
    high_res: tuple[Tensor, ...],
    kernels: str,
) -> Answer:
    prompts = max(len(image_embeddings), len(sparse), len(dense))
    sparse = sparse.expand(prompts, -1, -1)
    projections = None
    if prompts > 1 and _is_one_row(image_embeddings) and _is_one_row(dense):
        image_embeddings, dense = image_embeddings[:1], dense[:1]
        keys = (image_embeddings + dense.to(packed.dtype)).flatten(2).transpose(1, 2).contiguous()
        key_pe = image_pe[:1].flatten(2).transpose(1, 2).to(packed.dtype)
        projections = project_image(packed.blocks[0], keys, key_pe)
    else:
        image_embeddings, dense = (x.expand(prompts, -1, -1, -1) for x in (image_embeddings, dense))
    size, answers = device_profile(sparse.device).prompts_per_chunk, []
    for start in range(0, prompts, size):
        rows = slice(start, start + size)
        of_images = slice(None) if projections is not None else rows
        decoded = fused_decoder.decode_tokens(
            packed,
            image_embeddings[of_images],
            image_pe,
            sparse[rows],
            dense[of_images],
            projections=projections,
            high_res=[features if len(features) == 1 else features[rows] for features in high_res],
            kernels=kernels,
        )
        logits, iou = fused_decoder.choose_masks(decoded, multimask_output, kernels=kernels)
        answers.append((logits.to(packed.dtype), iou, decoded.mask_tokens, decoded.object_scores))
    if len(answers) == 1:
        return answers[0]
    masks, iou_of, tokens, scores = zip(*answers, strict=True)
    return torch.cat(masks), torch.cat(iou_of), torch.cat(tokens), None if scores[0] is None else torch.cat(scores)


def _packed_image_pe(encoder: PromptEncoder) -> Tensor | None:
    """Return :meth:`PromptEncoder.get_dense_pe` as it is packed; None where it shall be computed."""
    matrix = getattr(encoder.pe_layer, "positional_encoding_gaussian_matrix", None)
    if torch.compiler.is_compiling() or type(encoder) is not PromptEncoder or not isinstance(matrix, Tensor):
        return None
    snapshot = look(encoder)
    if snapshot.why_not_fused is not None or requires_autograd(matrix):
        return None
    return snapshot.packed(pack_image_pe, encoder)


PromptEncoder._fused = _packed_image_pe  # type: ignore[assignment, method-assign]


def _fused_image_encoder(encoder: ImageEncoderViT, pixels: Tensor) -> Tensor | None:
    """Compute :meth:`ImageEncoderViT.forward` fused; None where the official operations shall run."""
    check_whole(encoder)
    if encoder.kernels == "reference" or why_not_now(pixels, part=encoder, takes_autocast=True) is not None:
        return None
    return fused_encoder.encode(encoder, pixels, encoder.kernels)


ImageEncoderViT._fused = _fused_image_encoder  # type: ignore[assignment, method-assign]
ImageEncoder._fused = fused_hiera.encode  # type: ignore[assignment, method-assign]
MaskDecoder._fused = _fused_mask_decoder  # type: ignore[assignment, method-assign]
MemoryAttention._fused = fused_memory_attention.attend  # type: ignore[assignment, method-assign]
MemoryEncoder._fused = fused_memory_encoder.encode  # type: ignore[assignment, method-assign]
