"""Verify that a model on this machine computes what the paper's formulas say: :func:`verify`.

Every operation gets the same input three times: as the model runs it, in plain PyTorch in the model's dtype (the noise
floor), and in plain PyTorch in fp64 (the truth). Its distance from the truth may be twice that of plain PyTorch and one
rounding, as in flash-attention's tests. The whole way from image to masks has the same budget.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsam_kernels.numerics import Budget, relative_error

from .embedding import ImageEmbedding
from .inference import fused_hiera
from .inference.decode import fused_parts, shared_image
from .inference.fused_decoder import DecodedPrompts, decode_masks, project_images
from .inference.fused_encoder import Attend, attend, plan_blocks, run_block
from .inference.token_order import Level
from .masks.overlap import mask_iou
from .modeling.common import is_stock_class, uncompiled
from .modeling.feature_pyramid import ImageEncoder
from .modeling.image_encoder import Block, ImageEncoderViT
from .modeling.mask_decoder import MaskDecoder
from .modeling.promptable import PromptableModel
from .modeling.quantization import dequantized
from .prompts.batch import ragged_chunks
from .prompts.prompt import Prompt


@dataclass(frozen=True)
class Check:
    """Hold one comparison.

    Attributes:
        operation: name of what was compared.
        case: its input, in words.
        error: relative L2 distance of the model from the truth in fp64.
        noise: relative L2 distance of plain PyTorch in the model's dtype from the truth.
        budget: the largest ``error`` that passes.
        mask_iou: the smallest IoU with the masks of the truth, where the result is masks.
    """

    operation: str
    case: str
    error: float
    noise: float
    budget: float
    mask_iou: float | None = None

    @property
    def passed(self) -> bool:
        return self.error <= self.budget

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


@dataclass(frozen=True)
class Models:
    """Hold the model as it is, and two copies with nothing cached or fused: in its dtype, and in fp64."""

    ours: PromptableModel
    plain: PromptableModel
    truth: PromptableModel

    @classmethod
    def of(cls, model: PromptableModel) -> Models:
        plain = copy.deepcopy(model)  # without what the model derived from its weights
        plain.kernels = "reference"
        # The weights of a quantised model are its codes; that activations are rounded too is noise, and shows as such.
        return cls(model, plain, dequantized(plain).double())

    def compare(
        self,
        operation: str,
        case: str,
        run: Callable[[PromptableModel], Tensor],
        masks: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Check:
        """Compare what ``run`` returns for each model; ``dtype`` is the arithmetic's where it is not the model's."""
        result, plain, truth = (run(model).double() for model in (self.ours, self.plain, self.truth))
        error, noise = relative_error(result, truth), relative_error(plain, truth)
        budget = Budget(noise, dtype or self.ours.dtype).limit
        return Check(operation, case, error, noise, budget, least_iou(result, truth) if masks else None)


@torch.no_grad()
def verify(model: PromptableModel, image: np.ndarray | None = None) -> Iterator[Check]:
    """Compare every operation of a model, and the whole of it, with plain PyTorch in fp64, and yield the results.

    The model is taken as it is, with its packed and cached weights, so errors in them show. Meanwhile three copies of
    the weights, one of them in fp64, are on the model's device.

    Args:
        image: [H, W, 3] uint8 RGB; None draws one.

    Yields:
        one check per comparison; the model is right where all have ``passed``.
    """
    models = Models.of(model)
    image = drawn_image(model.image_size) if image is None else image
    embedding = models.truth.encode(image)
    yield from _encoder_checks(models, image)
    yield from _hiera_checks(models, image)
    yield from _decoder_checks(models, embedding)
    yield from _low_rank_checks(models, embedding)
    result = {id(m): m.encode(image) for m in (models.ours, models.plain, models.truth)}
    yield models.compare("image encoder", "whole", lambda m: result[id(m)].features)
    for level in range(len(embedding.high_res)):
        case = f"finer features, 1/{4 * 2**level} of the image"
        yield models.compare("image encoder", case, lambda m, level=level: result[id(m)].high_res[level])  # type: ignore[misc]
    for case, prompts in _prompts(embedding).items():

        def logits(m: PromptableModel, prompts: Sequence[Prompt] = prompts) -> Tensor:
            return m.predict(result[id(m)], prompts).low_res_logits

        yield models.compare("image to masks", case, logits, masks=True)


def _encoder_checks(models: Models, image: np.ndarray) -> Iterator[Check]:
    """Compare what each block adds to its input, which is the truth's."""
    encoders = [m.image_encoder for m in (models.ours, models.plain, models.truth)]
    if not all(is_stock_class(encoder, ImageEncoderViT) for encoder in encoders):
        return  # a stand-in has no blocks of ours; it is part of the whole
    x = _block_inputs(models.truth, models.truth.image_encoder.blocks, image)
    for index in range(len(encoders[0].blocks)):
        blocks = {id(m): m.image_encoder.blocks[index] for m in (models.ours, models.plain, models.truth)}
        if not all(is_stock_class(block, Block) for block in blocks.values()):
            return
        window = blocks[id(models.truth)].window_size
        case = f"block {index}, {f'windows of {window}' if window else 'global'}"

        def attention(m: PromptableModel, x: Tensor = x, blocks: dict[int, Any] = blocks) -> Tensor:
            block = blocks[id(m)]
            mode = Attend.MODULE if m.kernels == "reference" else Attend.GRID
            return attend(block, block.norm1(x.to(m.dtype)), m.kernels, mode)

        def added(m: PromptableModel, x: Tensor = x, blocks: dict[int, Any] = blocks, index: int = index) -> Tensor:
            narrow = x.to(m.dtype)
            plan = None if m.kernels == "reference" else plan_blocks(m.image_encoder)[index]
            return run_block(blocks[id(m)], narrow, m.kernels, plan).double() - narrow.double()

        yield models.compare("rel_pos_attention", case, attention)
        yield models.compare("encoder block", case, added)
        x = run_block(blocks[id(models.truth)], x, "reference", None)


def _hiera_checks(models: Models, image: np.ndarray) -> Iterator[Check]:
    """Compare what each block of SAM 2's encoder adds to its input, or makes of it where it pools."""
    encoders = {id(m): uncompiled(m.image_encoder) for m in (models.ours, models.plain, models.truth)}
    if not all(is_stock_class(encoder, ImageEncoder) for encoder in encoders.values()):
        return
    fused = fused_hiera.plan(encoders[id(models.ours)])
    truth = encoders[id(models.truth)].trunk.blocks
    x = _block_inputs(models.truth, truth, image)
    for index, is_fused in enumerate(fused.blocks):
        window, pools = truth[index].window_size, truth[index].pool is not None
        case = f"block {index}, {f'windows of {window}' if window else 'global'}{', pooled' if pools else ''}"

        def attention(m: Any, x: Tensor = x, index: int = index) -> Tensor:
            block = encoders[id(m)].trunk.blocks[index]
            return fused_hiera.attend(block, x.to(m.dtype), m.kernels)[0]

        def added(m: Any, x: Tensor = x, index: int = index) -> Tensor:
            block, narrow = encoders[id(m)].trunk.blocks[index], x.to(m.dtype)
            if m.kernels == "reference":
                result = block(narrow)
            else:
                level = Level.of(narrow, block.window_size or narrow.shape[1])
                result = fused_hiera.run_block(block, level, m.kernels, keeps_input=True).grid()
            return result.double() - narrow.double() if result.shape == narrow.shape else result

        if is_fused:
            yield models.compare("window_attention", case, attention)
            yield models.compare("encoder block", case, added)
        x = truth[index](x)


def _block_inputs(model: PromptableModel, blocks: Any, image: np.ndarray) -> Tensor:
    """Return the input of the first of an encoder's ``blocks``, [1, H, W, C]."""
    captured: list[Tensor] = []
    hook = blocks[0].register_forward_pre_hook(lambda module, inputs: captured.append(inputs[0]))
    try:
        model.encode(image)
    finally:
        hook.remove()
    return captured[0]


def _decoder_checks(models: Models, embedding: ImageEmbedding) -> Iterator[Check]:
    if not models.ours.uses_fused_decoder:
        return  # with modules of a user's own it has no operations of ours; it is part of the whole
    yield models.compare(
        "positional encoding", "image grid", lambda m: m.prompt_encoder.get_dense_pe(), dtype=torch.float32
    )
    yield models.compare("image side of block 0", "kept for an image", lambda m: _image_side(m, embedding))
    scores: dict[int, list[Tensor]] = {}
    seen: dict[int, list[Any]] = {}
    for case, prompts in _prompts(embedding).items():
        decoded = {id(m): _decode_tokens(m, embedding, prompts) for m in (models.ours, models.plain, models.truth)}

        def keys(m: PromptableModel, decoded: dict[int, DecodedPrompts] = decoded) -> Tensor:
            return _keys_of(decoded[id(m)])

        def tokens(m: PromptableModel, decoded: dict[int, DecodedPrompts] = decoded) -> Tensor:
            return decoded[id(m)].mask_tokens

        def masks(m: PromptableModel, decoded: dict[int, DecodedPrompts] = decoded) -> Tensor:
            given = decoded[id(models.truth)]
            narrow = replace(
                decoded[id(m)], keys=_keys_of(given).to(m.dtype), mask_tokens=given.mask_tokens.to(m.dtype)
            )
            return decode_masks(narrow, MaskDecoder.mask_slice(True), kernels=m.kernels)

        yield models.compare("two-way attention, image tokens", case, keys)
        yield models.compare("two-way attention, mask tokens", case, tokens)
        for m, of_case in decoded.items():
            scores.setdefault(m, []).append(of_case.iou)
            seen.setdefault(m, []).append(of_case.object_scores)
        yield models.compare("hypernetwork_masks", case, masks, masks=True)
    # Of all cases together: a few numbers are too few to tell noise from error.
    yield models.compare("predicted IoU", "all prompts", lambda m: torch.cat(scores[id(m)]))
    if models.ours.mask_decoder.pred_obj_scores:
        yield models.compare("object score", "all prompts", lambda m: torch.cat(seen[id(m)]))


def _low_rank_checks(models: Models, embedding: ImageEmbedding) -> Iterator[Check]:
    """Compare clicks as automatic masks decode them where no image tokens are made."""
    if not models.ours.uses_fused_decoder:
        return
    clicks = _clicks(embedding)
    by_model = {
        id(m): _decode_tokens(m, embedding, clicks, low_rank=m is models.ours)
        for m in (models.ours, models.plain, models.truth)
    }
    if isinstance(by_model[id(models.ours)].keys, Tensor):
        return  # this model, or this device, makes them

    def masks(m: PromptableModel) -> Tensor:
        return m.decode_masks(by_model[id(m)], True).logits

    def scores(m: PromptableModel) -> Tensor:
        decoded = by_model[id(m)]
        return torch.cat([decoded.iou, *([] if decoded.object_scores is None else [decoded.object_scores])], dim=1)

    case = f"{len(clicks)} clicks of automatic masks"
    yield models.compare("low-rank image tokens, masks", case, masks, masks=True)
    yield models.compare("low-rank image tokens, scores", case, scores)


def _image_side(model: PromptableModel, embedding: ImageEmbedding) -> Tensor:
    narrow = embedding.features.to(model.dtype)
    no_mask = model.prompt_encoder.no_mask_embed.weight
    parts = fused_parts(model)
    assert parts is not None
    projections = project_images(parts.packed, narrow, model.prompt_encoder.get_dense_pe(), no_mask)
    return torch.cat(projections.tensors, dim=-1)


def _keys_of(decoded: DecodedPrompts) -> Tensor:
    assert isinstance(decoded.keys, Tensor)
    return decoded.keys


def _decode_tokens(
    model: PromptableModel, embedding: ImageEmbedding, prompts: Sequence[Prompt], low_rank: bool = False
) -> DecodedPrompts:
    high_res = tuple(features.to(model.dtype) for features in embedding.high_res)
    narrow = ImageEmbedding(embedding.features.to(model.dtype), embedding.geometry, high_res=high_res)
    [chunk] = ragged_chunks([prompts], [narrow.geometry], model.device, len(prompts), model.prompt_layout)
    decoded = model.decode_tokens([narrow], chunk.batch, shared_image(model, narrow) if low_rank else None)
    assert isinstance(decoded, DecodedPrompts)
    return decoded


def _clicks(embedding: ImageEmbedding) -> list[Prompt]:
    """Return clicks all over the image."""
    height, width = embedding.geometry.original_size
    return [Prompt([point], [1]) for point in np.random.default_rng(1).uniform((0, 0), (width, height), (8, 2))]


def _prompts(embedding: ImageEmbedding) -> dict[str, list[Prompt]]:
    """Return one list of prompts per way through the decoder."""
    height, width = embedding.geometry.original_size
    rng = np.random.default_rng(0)
    many = rng.uniform((0, 0), (width, height), (20, 2))
    labels = np.arange(20) % 2
    box = np.array([0.2 * width, 0.2 * height, 0.7 * width, 0.8 * height])
    side = 4 * embedding.features.shape[-1]
    row, column = np.mgrid[:side, :side] / side
    drawn = 10 * np.sin(7 * row) * np.cos(5 * column)
    return {
        "clicks": [Prompt([point], [1]) for point in many[:3]],
        "box and points": [Prompt(many[:4], labels[:4], box), Prompt(box=box)],
        "20 points": [Prompt(many, labels)],
        "mask input": [Prompt(many[:2], labels[:2], mask_input=drawn[None])],
    }


def drawn_image(side: int) -> np.ndarray:
    """Draw a landscape of soft shapes, [H, W, 3] uint8, the same everywhere."""
    rng = np.random.default_rng(0)
    row, column = np.mgrid[: 3 * side // 4, :side] / side
    image = np.stack([60 + 80 * row, 90 + 60 * column, 120 - 40 * row], axis=-1)
    for _ in range(12):
        y, x, radius = rng.uniform((0, 0, 0.04), (0.75, 1, 0.2))
        inside = 1 / (1 + np.exp(40 * (np.hypot(row - y, column - x) / radius - 1)))
        image += inside[..., None] * (rng.uniform(0, 255, 3) - image)
    return image.clip(0, 255).astype(np.uint8)


def least_iou(result: Tensor, truth: Tensor) -> float:
    """Return the smallest IoU of masks [P, M, h, w] as logits; two empty masks agree."""
    return float(mask_iou(result > 0, truth > 0).min())
