"""Statistics by which masks are kept or dropped."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class MaskStatistics(NamedTuple):
    """Counts and boxes of masks at their full size.

    Attributes:
        inside, outside: [N] int64, pixels above threshold + offset and above threshold - offset.
        area: [N] int64, pixels of the mask.
        boxes: [N, 4] int64, x0, y0, x1, y1 with the last column and row included; zeros for an empty mask.
    """

    inside: Tensor
    outside: Tensor
    area: Tensor
    boxes: Tensor

    @property
    def stability(self) -> Tensor:
        """Return the stability score inside / outside, [N] fp32; NaN where both are 0."""
        return self.inside.float() / self.outside.float()
