"""Ragged prompts on handles to masks of the original size."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..checks import require
from ..embedding import ImageEmbedding
from ..masks.results import MaskPrediction
from ..modeling.mask_decoder import MaskDecoder
from ..prompts.batch import ragged_chunks
from ..prompts.checks import check_mask_inputs
from ..prompts.prompt import Prompt
from .decode import decode_chunk, fused_parts, logits_dtype
from .parts import Model, features_sizes


def predict(
    model: Model,
    embeddings: Sequence[ImageEmbedding],
    prompts: Sequence[Sequence[Prompt]],
    multimask_output: bool,
    return_logits: bool,
) -> list[MaskPrediction]:
    """Predict masks, one prediction per handle; see :meth:`sam.Sam.predict`."""
    _check(model, embeddings, prompts)
    total = sum(len(of_image) for of_image in prompts)
    tokens = getattr(model.mask_decoder, "num_mask_tokens", 4)
    masks_each = len(range(tokens)[MaskDecoder.mask_slice(multimask_output)])
    dtype, parts, scores = logits_dtype(model), fused_parts(model), None
    low_res = torch.empty((total, masks_each, *model.low_res_size), device=model.device, dtype=dtype)
    iou = torch.empty((total, masks_each), device=model.device, dtype=dtype)
    geometries = [embedding.geometry for embedding in embeddings]
    for chunk in ragged_chunks(prompts, geometries, model.device, model.prompts_per_chunk, model.prompt_layout):
        rows = chunk.rows
        low_res[rows], iou[rows], of_chunk = decode_chunk(model, parts, embeddings, chunk.batch, multimask_output)
        if of_chunk is not None:
            scores = torch.empty(total, device=model.device, dtype=dtype) if scores is None else scores
            scores[rows] = of_chunk

    counts = [len(of_image) for of_image in prompts]
    logits_of, iou_of = low_res.split(counts), iou.split(counts)
    scores_of = [None] * len(counts) if scores is None else scores.split(counts)
    masks_of = [model.masks(*both, return_logits) for both in zip(logits_of, geometries, strict=True)]
    if model.low_res_limit is not None:
        low_res.clamp_(-model.low_res_limit, model.low_res_limit)
    return [MaskPrediction(*each) for each in zip(masks_of, iou_of, logits_of, scores_of, strict=True)]


def check_embedding(model: Model, embedding: ImageEmbedding) -> None:
    """Raise ``ValueError`` unless ``model`` can decode ``embedding``."""
    if embedding.model_hash is not None and embedding.model_hash != model.known_hash:
        own = model.known_hash or "of weights that are no plain tensors"
        raise ValueError(
            f"this embedding was made by model {embedding.model_name} {embedding.model_hash}, not by this "
            f"model, {model.name} {own}; encode the image again"
        )
    sizes = features_sizes(model)
    if sizes is not None:
        expected, actual = [[1, *size] for size in sizes], [list(x.shape) for x in embedding.ready().maps]
        if actual != expected:
            raise ValueError(f"this model's features are {_listed(expected)}, got {_listed(actual)}")
    if embedding.geometry.image_size != model.image_size:
        raise ValueError(
            f"the embedding is of an image of {embedding.geometry.image_size} px, the model takes {model.image_size} px"
        )
    if embedding.device != model.device:
        raise ValueError(
            f"the embedding is on {embedding.device}, the model on {model.device}; "
            f"use embedding.to({str(model.device)!r})"
        )


def _listed(shapes: list[list[int]]) -> str:
    return ", ".join(map(str, shapes))


def _check(model: Model, embeddings: Sequence[ImageEmbedding], prompts: Sequence[Sequence[Prompt]]) -> None:
    require("embeddings", embeddings, Sequence, "an ImageEmbedding or a list of them")
    if len(embeddings) != len(prompts):
        raise ValueError(f"{len(embeddings)} embeddings need as many lists of prompts, got {len(prompts)}")
    for embedding in embeddings:
        require("embeddings", embedding, ImageEmbedding, "an ImageEmbedding or a list of them")
        model.check_embedding(embedding)
    for index, of_image in enumerate(prompts):
        require(f"the prompts of embedding {index}", of_image, Sequence, "a list of Prompt")
        for prompt in of_image:
            require(f"a prompt of embedding {index}", prompt, Prompt, "a sam.Prompt")
    for prompt in (prompt for of_image in prompts for prompt in of_image):
        if prompt.mask_input is not None:
            check_mask_inputs(prompt.mask_input.shape, model.low_res_size)
