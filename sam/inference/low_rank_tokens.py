"""The image tokens of a prompt as a few vectors beside the tokens of its image, and never written out.

An attention of the image to T prompt tokens adds sum_j w_nj v_j to image token n, with H * T vectors v_j [C], and a
layer norm scales a token by one number. So the image tokens of a prompt stay

    y_n = a_n x_n + sum_j w_nj r_j

with x of the image alone, and J vectors r. What reads them needs, for all prompts of an image, x times its weights
once, and for each prompt products with J columns where there were C; what the norm needs is a square:

    |y_n|^2 = a_n^2 |x_n|^2 + sum_j w_nj (2 a_n x_n . r_j + sum_i (r_j . r_i) w_ni)    of x and r less their means

H heads of d channels, T tokens, N image tokens, C channels. The norm before a level and its bias, a vector of its own,
are of that level; level 0 is the image itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastsam_kernels import LayerNormWeights, UpscalingWeights

from .packed_weights import Linear, PackedAttention, PackedBlock


class Reading(NamedTuple):
    """A projection of the image tokens by which an attention scores them, for tokens [H, T, d].

    Attributes:
        shared: [H, d, N] of x.
        positions: [H, d, N] of the positions, with the bias; None where ``shared`` is all there is.
        weight: [H, d, C], of what is a prompt's own.
    """

    shared: Tensor
    positions: Tensor | None
    weight: Tensor

    @classmethod
    def of(cls, projection: Linear, heads: int, x: Tensor, pe: Tensor) -> Reading:
        """Project x [N, C] and positions ``pe`` [N, C]."""

        def by_head(values: Tensor) -> Tensor:
            return values.t().contiguous().unflatten(0, (heads, -1))

        return cls(
            by_head(x @ projection.weight.t()), by_head(projection(pe)), projection.weight.unflatten(0, (heads, -1))
        )


class Reader(NamedTuple):
    """An attention of prompt tokens to image tokens: how it scores them, and its values [H, N, d] of x."""

    reading: Reading
    shared_values: Tensor
    value: Linear

    @classmethod
    def of(cls, attention: PackedAttention, x: Tensor, pe: Tensor) -> Reader:
        values = (x @ attention.v.weight.t()).unflatten(1, (attention.num_heads, -1)).transpose(0, 1).contiguous()
        return cls(Reading.of(attention.k, attention.num_heads, x, pe), values, attention.v)


class Update(NamedTuple):
    """An attention of image tokens to prompt tokens, and the norm after it.

    Attributes:
        reading: how the image tokens score the prompt's.
        out: the projection of values [T, H * d] to what is added.
        norm: the norm after it.
        squares: [N], |x_n|^2 of x less its mean over channels.
        values: of each update so far, with this one: [H, d, N], x before its values' ``out``.
        biases: of each update so far, with this one: [N], x before the bias of its ``out``, for a head.
        norms: of each norm so far: [N], x before its bias.
    """

    reading: Reading
    out: Linear
    norm: LayerNormWeights
    squares: Tensor
    values: list[Tensor]
    biases: list[Tensor]
    norms: list[Tensor]


class ImageTables(NamedTuple):
    """Tables that the prompts of an image share: of an update and of the attention that reads its result, per block.

    Attributes:
        updates, readers: one for each block.
        final: [N, C] x of the last level.
    """

    updates: list[Update]
    readers: list[Reader]
    final: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        """Return the tables themselves, without the weights that they are read with."""
        readings = [update.reading for update in self.updates] + [reader.reading for reader in self.readers]
        tables = [self.final, *(reader.shared_values for reader in self.readers)]
        tables += [table for reading in readings for table in (reading.shared, reading.positions) if table is not None]
        return tables + [table for update in self.updates for table in (*update.values, *update.biases, *update.norms)]

    @classmethod
    def of(
        cls, blocks: Sequence[PackedBlock], final: PackedAttention, keys: Tensor, q: Tensor, pe: Tensor
    ) -> ImageTables:
        """Make the tables of image tokens ``keys`` [N, C] at positions ``pe`` [N, C].

        ``q`` [N, H * d] are the queries of block 0, of keys with positions.
        """
        x, updates, readers = keys, [], []
        followers = [*(block.token_to_image for block in blocks[1:]), final]
        for index, (block, follower) in enumerate(zip(blocks, followers, strict=True)):
            attention = block.image_to_token
            heads, weight = attention.num_heads, attention.q.weight
            if index:
                reading = Reading.of(attention.q, heads, x, pe)
            else:
                reading = Reading(q.t().contiguous().unflatten(0, (heads, -1)), None, weight.unflatten(0, (heads, -1)))
            x = _centred(x)
            updates.append(_update(blocks[: index + 1], x, reading))
            x = x * block.image_norm.weight
            readers.append(Reader.of(follower, x, pe))
        return cls(updates, readers, x)


def _update(blocks: Sequence[PackedBlock], x: Tensor, reading: Reading) -> Update:
    """Make the tables of the last of ``blocks``, of the centred x [N, C] before its norm."""
    block, values, biases, norms, part = blocks[-1], [], [], [], x
    for earlier in reversed(blocks):
        if earlier is not block:  # the adjoint of what has happened to its vectors since
            norms.append(part @ earlier.image_norm.bias)
            part = _centred(part * earlier.image_norm.weight)
        attention = earlier.image_to_token
        values.append((part @ attention.out.weight).t().contiguous().unflatten(0, (attention.num_heads, -1)))
        biases.append(part @ attention.out.bias / attention.num_heads)
    return Update(
        reading,
        block.image_to_token.out,
        block.image_norm,
        x.square().sum(1),
        values[::-1],
        biases[::-1],
        norms[::-1],
    )


class LowRankTokens:
    """The image tokens of one prompt.

    Attributes:
        scale: [N], a_n.
        weights: [J, N], w_nj.
        vectors: [J, C], r_j.
    """

    def __init__(self, tables: ImageTables, rows: int) -> None:
        """Start as those of the image; each update brings ``rows`` vectors, H * T of them, and a bias."""
        self._tables, self._rows = tables, rows
        x = tables.final
        self._space = x.new_empty(len(tables.updates) * (rows + 1), len(x))
        self.scale, self.weights, self.vectors = x.new_ones(len(x)), self._space[:0], x.new_empty(0, x.shape[1])
        self._values: list[Tensor] = []

    def update(self, keys: Tensor, values: Tensor) -> None:
        """Attend to tokens of ``keys``, scaled, and ``values`` [H, T, d], add what is learnt, and normalise."""
        update, start = self._tables.updates[len(self._values)], len(self.weights)
        stop = start + self._rows
        scores = self._scored(keys, update.reading, self._space[start:stop])
        by_head = scores.view(*keys.shape[:2], -1)
        torch.softmax(by_head, 1, out=by_head)
        self._values.append(values)
        heads = len(values)
        added = values @ update.out.weight.t().unflatten(0, (heads, -1)) + update.out.bias / heads
        vectors = _centred(torch.cat([self.vectors, added.flatten(0, 1)]))
        self.weights = self._space[:stop]
        variance = (self.scale.square() * update.squares + self._squares(update, vectors)) / vectors.shape[1]
        rstd = (variance.clamp_(min=0) + update.norm.eps).rsqrt_()
        self.scale = self.scale * rstd
        self.weights.mul_(rstd)
        self._space[stop] = 1
        self.weights = self._space[: stop + 1]
        self.vectors = torch.cat([vectors * update.norm.weight, update.norm.bias[None]])

    def attend(self, queries: Tensor) -> Tensor:
        """Return what tokens of ``queries`` [H, T, d], scaled, learn after the last update: [T, H * d]."""
        reader, (heads, count, _) = self._tables.readers[len(self._values) - 1], queries.shape
        scores = self._scored(queries, reader.reading, self.scale.new_empty(heads * count, len(self.scale)))
        torch.softmax(scores, 1, out=scores)
        own = (scores @ self.weights.t()).view(heads, count, -1)
        vectors = (self.vectors @ reader.value.weight.t()).unflatten(1, (heads, -1)).transpose(0, 1)
        shared = scores.mul_(self.scale).view(heads, count, -1) @ reader.shared_values
        return torch.baddbmm(shared, own, vectors).transpose(0, 1).flatten(1) + reader.value.bias

    def _scored(self, tokens: Tensor, reading: Reading, out: Tensor) -> Tensor:
        """Score tokens [H, T, d] against image tokens into ``out`` [H * T, N]."""
        by_head = out.view(*tokens.shape[:2], -1)
        torch.bmm(tokens, reading.shared, out=by_head)
        if reading.positions is not None:
            out.mul_(self.scale)
            by_head.baddbmm_(tokens, reading.positions)
            out.addmm_((tokens @ reading.weight).flatten(0, 1) @ self.vectors.t(), self.weights)
        return out

    def _squares(self, update: Update, vectors: Tensor) -> Tensor:
        """Return the squares [N] less those of x, of centred ``vectors`` [J, C]."""
        total, twice = torch.zeros_like(self.scale), 2 * self.scale
        for index, values in enumerate(self._values):
            start = index * (self._rows + 1)
            stop = min(start + self._rows + 1, len(self.weights))
            out = torch.empty_like(self.weights[start:stop])
            by_head = out[: self._rows].view(*values.shape[:2], -1)
            torch.bmm(values, update.values[index], out=by_head)
            by_head += update.biases[index]
            if len(out) > self._rows:
                out[-1] = update.norms[index]
            products = vectors[start:stop] @ vectors[:stop].t()
            products[:, :start] *= 2  # each pair of updates once
            out.mul_(twice).addmm_(products, self.weights[:stop])
            total += out.mul_(self.weights[start:stop]).sum(0)
        return total


class LowRankKeys(NamedTuple):
    """The image tokens of P prompts of one image, as far as masks are made of them.

    Attributes:
        prompts: those of each prompt.
        upscaled: [N, C], x of the last level after the first product of the upscaling.
    """

    prompts: Sequence[LowRankTokens]
    upscaled: Tensor

    def select(self, rows: Tensor) -> LowRankKeys:
        """Return those of the prompts ``rows`` [R] int64."""
        return self._replace(prompts=[self.prompts[row] for row in rows.tolist()])

    def first_product(self, weights: UpscalingWeights) -> Callable[[slice, slice], Tensor]:
        """Return the first product of the upscaling, of slices of prompts and of image tokens [p * n, C]."""
        vectors = [prompt.vectors @ weights.weight1 for prompt in self.prompts]
        for own in vectors:
            own[-1] += weights.bias1  # beside the bias of the last norm, whose weight is 1

        def product(prompts: slice, tokens: slice) -> Tensor:
            parts = [
                torch.addcmul(prompt.weights[:, tokens].t() @ own, prompt.scale[tokens, None], self.upscaled[tokens])
                for prompt, own in zip(self.prompts[prompts], vectors[prompts], strict=True)
            ]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        return product


def _centred(x: Tensor) -> Tensor:
    """Return x [..., C] less its mean over channels."""
    return x - x.mean(-1, keepdim=True)
