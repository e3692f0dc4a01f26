"""Prompts to masks: fused where :mod:`sam.inference.eligibility` allows it, else by the official calls."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from fastsam_kernels import requires_autograd

from ..embedding import ImageEmbedding, ImageFeatures, ImageProjections
from ..masks.results import DecodedMasks
from ..modeling.common import uncompiled
from ..modeling.mask_decoder import MaskDecoder
from ..prompts.batch import PromptBatch
from ..prompts.labels import LABEL_ABSENT
from . import fused_decoder
from .eligibility import PARTS, look, why_not_fused
from .fused_decoder import DecodedPrompts
from .low_rank_decoder import SharedImage, can_share, decode_clicks
from .module_decoder import MadeMasks, decode_by_modules, join
from .packed_weights import Linear, pack_decoder, pack_image_pe
from .parts import FusedParts, Model

logger = logging.getLogger("sam")


def fused_parts(model: Model) -> FusedParts | None:
    """Return the parts of ``model`` as they are now; None where they do not run fused. One look per request."""
    prompt_encoder, mask_decoder = uncompiled(model.prompt_encoder), uncompiled(model.mask_decoder)
    if type(prompt_encoder) not in PARTS["prompt_encoder"] or type(mask_decoder) not in PARTS["mask_decoder"]:
        _log_once(why_not_fused_decoder(model))
        return None
    encoder, decoder = look(prompt_encoder), look(mask_decoder)
    if encoder.why_not_fused is not None or decoder.why_not_fused is not None:
        _log_once(encoder.why_not_fused or decoder.why_not_fused)
        return None
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in (*encoder.weights, *decoder.weights)):
        return FusedParts(prompt_encoder, prompt_encoder.get_dense_pe(), pack_decoder(mask_decoder), None)
    return FusedParts(
        prompt_encoder,
        encoder.packed(pack_image_pe, prompt_encoder),
        decoder.packed(pack_decoder, mask_decoder),
        (encoder.generation, decoder.generation),
    )


@cache
def _log_once(reason: str | None) -> None:
    logger.info("prompts are decoded by the official calls of the modules: %s", reason)


def why_not_fused_decoder(model: Model) -> str | None:
    """Return a sentence on what keeps prompts from being decoded fused; None where nothing does."""
    return why_not_fused(prompt_encoder=model.prompt_encoder, mask_decoder=model.mask_decoder)


def logits_dtype(model: Model) -> torch.dtype:
    """Return the dtype of logits and predicted IoU: fp32 at least."""
    return torch.promote_types(model.dtype, torch.float32)


def decode(
    model: Model, embeddings: Sequence[ImageEmbedding], batch: PromptBatch, multimask_output: bool
) -> DecodedMasks:
    """Decode a batch of prompts.

    ``batch.image_index`` counts ``embeddings``; without it there is one of them. Prompts are decoded a chunk
    at a time, so memory does not grow with their number beyond the result; the official calls take them all at once,
    as a hook or the scale of a quantised input expects.
    """
    parts = fused_parts(model)
    size = max(len(batch), 1) if parts is None else model.prompts_per_chunk
    chunks = [batch.rows(start, start + size) for start in range(0, max(len(batch), 1), size)]
    decoded = [decode_chunk(model, parts, embeddings, chunk, multimask_output) for chunk in chunks]
    return decoded[0] if len(decoded) == 1 else join(decoded, decoded[0].logits.dtype)


def decode_chunk(
    model: Model,
    parts: FusedParts | None,
    embeddings: Sequence[ImageEmbedding],
    batch: PromptBatch,
    multimask_output: bool,
) -> DecodedMasks:
    """Run :func:`decode` on one chunk, by ``parts`` or, where they are None, by the official calls."""
    if parts is None:
        dtype = logits_dtype(model)
        return decode_by_modules(model, embeddings, batch, multimask_output, dtype)
    dtype = parts.packed.logits_dtype
    if model.runtime is not None:
        with model.runtime.run(parts, embeddings, batch, multimask_output) as outputs:
            if outputs is not None:
                rows = (None if output is None else output[: len(batch)].to(dtype, copy=True) for output in outputs)
                return DecodedMasks(*rows)  # type: ignore[arg-type]
    return decode_masks(model, _decode_tokens(model, parts, embeddings, batch), multimask_output)


def shared_image(model: Model, embedding: ImageEmbedding) -> SharedImage | None:
    """Project an image for many clicks without a mask input; None where their decoding does not take it.

    It holds for the weights as they are now. On a CPU; a GPU has kernels that read an image once for many prompts.
    """
    parts, device = fused_parts(model), embedding.device
    if (
        parts is None
        or parts.generation is None
        or device.type != "cpu"
        or torch.is_autocast_enabled(device.type)
        or requires_autograd(embedding.features)
        or not can_share(parts.packed, model.kernels)
    ):
        return None
    projections = image_projections(parts, embedding)
    return SharedImage.of(parts.packed, projections, parts.image_pe, embedding.ready_high_res())


def decode_tokens(
    model: Model, embeddings: Sequence[ImageEmbedding], batch: PromptBatch, shared: SharedImage | None = None
) -> DecodedPrompts | MadeMasks:
    """Run the first half of :func:`decode` on a batch as one chunk: all but the masks, their predicted IoU included.

    The result holds the image side of each prompt: ask for ``prompts_per_chunk`` prompts or so at a time. Clicks of one
    number of points on a single image are decoded from ``shared``, what :func:`shared_image` made of it, where given.
    """
    if shared is not None:
        encoder = uncompiled(model.prompt_encoder)
        return decode_clicks(shared, encoder.embed_tokens(batch.coords, batch.labels), model.kernels)
    parts = fused_parts(model)
    if parts is None:
        dtype = logits_dtype(model)
        both = [
            decode_by_modules(model, embeddings, batch, multimask_output, dtype) for multimask_output in (False, True)
        ]
        single, alternatives = both
        logits = torch.cat([single.logits, alternatives.logits], dim=1)
        return MadeMasks(logits, torch.cat([single.iou, alternatives.iou], dim=1), single.object_scores)
    return _decode_tokens(model, parts, embeddings, batch)


def decode_masks(
    model: Model, decoded: DecodedPrompts | MadeMasks, multimask_output: bool, rows: Tensor | None = None
) -> DecodedMasks:
    """Run the second half of :func:`decode`, of all prompts or of the prompts ``rows`` [R] only."""
    scores = decoded.object_scores
    if scores is not None and rows is not None:
        scores = scores[rows]
    if isinstance(decoded, MadeMasks):
        masks = MaskDecoder.mask_slice(multimask_output)
        logits, iou = (x if rows is None else x[rows] for x in (decoded.logits, decoded.iou))
        return DecodedMasks(logits[:, masks], iou[:, masks], scores)
    logits, iou = fused_decoder.choose_masks(decoded, multimask_output, rows, model.kernels)
    dtype = decoded.packed.logits_dtype
    return DecodedMasks(logits.to(dtype), iou.to(dtype), None if scores is None else scores[:, 0].to(dtype))


@contextmanager
def decoding(
    model: Model, embeddings: Sequence[ImageEmbedding], batch: PromptBatch, multimask_output: bool
) -> Iterator[DecodedMasks]:
    """Decode at most a chunk of prompts, and hold the answer for the length of the context.

    It may be a graph's own memory, which the next request overwrites, and have more rows than prompts.
    """
    parts = fused_parts(model)
    if parts is not None and model.runtime is not None:
        with model.runtime.run(parts, embeddings, batch, multimask_output) as outputs:
            if outputs is not None:
                yield outputs
                return
    yield model.decode(embeddings, batch, multimask_output)


def _decode_tokens(
    model: Model, parts: FusedParts, embeddings: Sequence[ImageEmbedding], batch: PromptBatch
) -> DecodedPrompts:
    encoder, masks = parts.prompt_encoder, batch.mask_inputs
    dense = encoder.no_mask_embed.weight.view(1, -1, 1, 1) if masks is None else encoder._embed_masks(masks)
    projections = None
    if masks is None and model.kernels != "reference":
        projections = ImageProjections.cat([image_projections(parts, embedding) for embedding in embeddings])
    features = ImageFeatures.cat([embedding.ready() for embedding in embeddings])
    return fused_decoder.decode_tokens(
        parts.packed,
        features.embedding,
        parts.image_pe,
        encoder.embed_tokens(batch.coords, batch.labels),
        dense,
        image_index=batch.image_index if len(embeddings) > 1 else None,
        token_mask=batch.labels != LABEL_ABSENT if batch.ragged else None,
        projections=projections,
        high_res=features.high_res,
        kernels=model.kernels,
    )


def image_projections(parts: FusedParts, embedding: ImageEmbedding) -> ImageProjections:
    """Return block 0's projections of an image, which all its prompts without a mask input share."""
    encoder, packed = parts.prompt_encoder, parts.packed

    def make() -> ImageProjections:
        no_mask = encoder.no_mask_embed.weight
        return fused_decoder.project_images(packed, embedding.ready_features(), parts.image_pe, no_mask)

    block = packed.blocks[0]
    projections = (block.token_to_image.k, block.token_to_image.v, block.image_to_token.q)
    known = all(type(projection) is Linear for projection in projections)
    if parts.generation is None or not known or requires_autograd(embedding.features):
        return make()  # an adapter may be turned on and off, and a graph serves one backward pass
    kind = embedding.device.type
    narrowed = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    return embedding.projections((parts.generation, narrowed), make)
