"""Shapes that run compiled or as a graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsam_kernels import MAX_TOKENS

from ..prompts.batch import PromptBatch
from ..prompts.labels import LABEL_ABSENT


def token_buckets(own_tokens: int) -> tuple[int, ...]:
    """Return the lengths that prompts are padded to, for a decoder with ``own_tokens`` of its own.

    They are a click or a box; both; 5 points; and the longest into which the projections of an image are absorbed.
    """
    return (*sorted({2, 3, 6, max(6, MAX_TOKENS - own_tokens)}),)


@dataclass(frozen=True)
class Bucket:
    """A shape that requests are padded to.

    Attributes:
        images: images that the prompts are on.
        prompts, tokens: size of the batch after padding.
        multimask_output: three masks per prompt, or one.
        with_masks: prompts have a mask input.
        dtype: dtype of the model.
    """

    images: int
    prompts: int
    tokens: int
    multimask_output: bool
    with_masks: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class Limits:
    """The largest of each; all powers of two up to them are buckets, and these lengths of prompts."""

    images: int
    prompts: int
    tokens: tuple[int, ...]

    @property
    def image_counts(self) -> tuple[int, ...]:
        return _powers_of_two(self.images)

    @property
    def prompt_counts(self) -> tuple[int, ...]:
        return _powers_of_two(self.prompts)

    def fit(
        self, images: int, prompts: int, tokens: int, multimask_output: bool, with_masks: bool, dtype: torch.dtype
    ) -> Bucket | str:
        """Return the bucket of a request, or a phrase that says why none fits."""
        if tokens > self.tokens[-1]:
            return f"prompts of more than {self.tokens[-1]} tokens"
        if prompts > self.prompts:
            return f"more than {self.prompts} prompts at once"
        if images > self.images:
            return "prompts on " + ("several" if self.images == 1 else f"more than {self.images}") + " images at once"
        return Bucket(
            images=_next_power_of_two(images),
            prompts=_next_power_of_two(prompts),
            tokens=next(size for size in self.tokens if size >= tokens),
            multimask_output=multimask_output,
            with_masks=with_masks,
            dtype=dtype,
        )


def pad_to_bucket(batch: PromptBatch, bucket: Bucket) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Pad a batch to the bucket's sizes; return coordinates in fp32, labels, mask inputs and image index."""
    prompts, tokens = bucket.prompts - len(batch), bucket.tokens - batch.labels.shape[1]

    def pad(tensor: Tensor, edges: tuple[int, ...], value: float = 0) -> Tensor:
        return F.pad(tensor, edges, value=value) if any(edges) else tensor

    masks, index = batch.mask_inputs, None
    if bucket.images > 1:
        assert batch.image_index is not None
        index = pad(batch.image_index, (0, prompts))
    return (
        pad(batch.coords.to(torch.float32), (0, 0, 0, tokens, 0, prompts)),
        pad(batch.labels, (0, tokens, 0, prompts), LABEL_ABSENT),
        None if masks is None else pad(masks, (0, 0, 0, 0, 0, 0, 0, prompts)),
        index,
    )


def as_table(buckets: dict[Bucket, float]) -> str:
    """Return one line per bucket, with the seconds that its first use took."""
    lines = [f"{'images':>6} {'prompts':>7} {'tokens':>6} {'masks':>5} {'mask input':>10} {'dtype':>8} {'seconds':>8}"]
    for bucket, seconds in sorted(buckets.items(), key=lambda item: str(item[0])):
        dtype = str(bucket.dtype).removeprefix("torch.")
        lines.append(
            f"{bucket.images:>6} {bucket.prompts:>7} {bucket.tokens:>6} {3 if bucket.multimask_output else 1:>5} "
            f"{'yes' if bucket.with_masks else 'no':>10} {dtype:>8} {seconds:>8.2f}"
        )
    return "\n".join(lines)


def _powers_of_two(limit: int) -> tuple[int, ...]:
    return tuple(2**i for i in range(limit.bit_length()))


def _next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
