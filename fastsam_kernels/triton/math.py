"""Functions of Triton kernels that several operations use. Imports triton: only kernel modules import this."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gelu(x, EXACT: tl.constexpr):
    """Return x * Phi(x) of fp32 x, through erf if EXACT, else to 1.4e-5 absolute in 14 instructions without a division.

    gelu(x) = max(x, 0) - a * Q(a) with a = min(|x|, 4.4) and Q(a) = erfc(a / sqrt(2)) / 2. The polynomial is the
    minimax fit of a * Q(a) on [0, 4.4], expanded around 2, where fp32 does not cancel.
    """
    if EXACT:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    a = tl.minimum(tl.abs(x), 4.4)
    v = a - 2.0
    q = -1.4024413758306764e-05 * v + 7.66384691814892e-05
    q = q * v + 5.869736196473241e-05
    q = q * v - 0.001216805656440556
    q = q * v + 0.0023045558482408524
    q = q * v + 0.004325356800109148
    q = q * v - 0.027002349495887756
    q = q * v + 0.054066501557826996
    q = q * v - 0.05399548262357712
    q = q * v + 0.0227451603859663
    return tl.maximum(x, 0.0) - a * q
