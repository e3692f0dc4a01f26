"""Many clicks on one image by the mask decoder, few of whose masks are wanted: image tokens are vectors beside it.

The image is projected once for all of them, and each click costs products with those few vectors. In fp32 at least:
squares of sums are taken apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastsam_kernels import choice_for

from ..embedding import ImageProjections
from .fused_decoder import DecodedPrompts
from .fused_transformer import attend_finally, run_low_rank
from .low_rank_tokens import ImageTables, LowRankKeys
from .packed_weights import PackedDecoder

CLICKS_AT_ONCE = 16  # whose tokens are one product; the image side of each is made by itself


@dataclass(frozen=True)
class SharedImage:
    """The projections of an image that all clicks on it share.

    Attributes:
        packed: the weights that it was projected by.
        projections: for block 0.
        tables: for what follows.
        upscaled: [N, C], image tokens after the first product of the upscaling.
        high_res: features of finer grids, as of :class:`sam.inference.fused_decoder.DecodedPrompts`.
        grid: (h, w).
    """

    packed: PackedDecoder
    projections: ImageProjections
    tables: ImageTables
    upscaled: Tensor
    high_res: tuple[Tensor, Tensor] | None
    grid: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Return the bytes of the projections and tables, and of what is alive while one click is decoded."""
        tables = [*self.projections.tensors, self.upscaled, *self.tables.tensors]
        return sum(table.nbytes for table in tables) + self.click_nbytes + 2 * self.upscaled.nbytes

    @property
    def click_nbytes(self) -> int:
        """Return the bytes of the weights of a click's vectors: tokens of the decoder, of the click and its padding."""
        rows = [
            update.reading.weight.shape[0] * (self.packed.positions.total + 2) + 1 for update in self.tables.updates
        ]
        return sum(rows) * len(self.upscaled) * self.upscaled.element_size()

    @classmethod
    def of(
        cls,
        packed: PackedDecoder,
        projections: ImageProjections,
        image_pe: Tensor,
        high_res: tuple[Tensor, ...],
    ) -> SharedImage:
        """Project one image by weights that :func:`can_share` takes; ``image_pe`` is [1, C, h, w]."""
        assert packed.upscaling is not None
        pe = image_pe[0].flatten(1).t().to(projections.keys.dtype)
        tables = ImageTables.of(packed.blocks, packed.final_attn, projections.keys[0], projections.q[0], pe)
        fine = (high_res[0], high_res[1]) if high_res else None
        grid = image_pe.shape[-2], image_pe.shape[-1]
        return cls(packed, projections, tables, tables.final @ packed.upscaling.weight1, fine, grid)


def can_share(packed: PackedDecoder, kernels: str) -> bool:
    """Return whether clicks may be decoded so: a decoder of SAM 2, as shipped, in fp32 or fp64.

    SAM's answers stay those of the releases before, to the bit.
    """
    chosen = {choice_for(kernels, name) for name in ("two_way_attention", "hypernetwork_masks")}
    return (
        packed.takes_high_res
        and packed.can_absorb
        and packed.upscaling is not None
        and packed.dtype in (torch.float32, torch.float64)
        and chosen <= {"auto", "torch"}
    )


def decode_clicks(shared: SharedImage, sparse: Tensor, kernels: str) -> DecodedPrompts:
    """Run the transformer on P clicks of ``sparse`` embeddings [P, S, C], and predict the IoU of their masks."""
    packed, before = shared.packed, shared.packed.positions.masks.start
    output_tokens = packed.output_tokens.expand(len(sparse), -1, -1)
    tokens = torch.cat([output_tokens, sparse.to(packed.dtype)], dim=1)
    queries, prompts = run_low_rank(packed, shared.tables, shared.projections, tokens, kernels)
    # The tokens of masks have the final attention to come: few are asked for.
    answers = attend_finally(packed, queries[:, :before], tokens[:, :before], prompts)
    tokens = torch.cat([answers, queries[:, before:]], dim=1)
    return DecodedPrompts.of(packed, LowRankKeys(prompts, shared.upscaled), tokens, shared.grid, shared.high_res or ())
