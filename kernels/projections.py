"""V = gain ∘ W / τ, τ = √d_b: what every token's state is projected by in Eqs. (12)-(14), made once for all tokens.

Transposed, [K, d_b], so that neighbouring columns of a row lie side by side in memory: in float32, and in bfloat16 for
many.py, where it is read as often as the states are. Its rows are

    depth    n of the carry columns of W_α, for Â, then m of W_β, for Bᵀ
    width    m of the read columns of W_α, for Å; in `step` they are the next sublayer's, behind those of depth

Made from W by the other kernels, it would be made again for every token, or every few: it is too large to keep.
"""

from __future__ import annotations

import triton
import triton.language as tl
from vwn_ref.kernels.tiles import rounded


@triton.jit
def store_row(V, row, c, x, D: tl.constexpr):
    """x, columns `c` of a row of V."""
    if V.dtype.element_ty == tl.bfloat16:
        x = rounded(x)
    tl.store(V + row * D + c, x, mask=c < D)


@triton.jit
def projections_kernel(
    W_alpha, W_beta, gain, next_W, next_gain, V,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """V, BD columns of d_b a program."""
    c = tl.program_id(0) * BD + tl.arange(0, BD)
    inside = c < D
    one_over_tau = 1.0 / tl.sqrt(D * 1.0)
    if DEPTH:
        g = tl.load(gain + c, mask=inside, other=0.0).to(tl.float32) * one_over_tau
        for k in tl.static_range(N):
            w = tl.load(W_alpha + c * (M + N) + M + k, mask=inside, other=0.0).to(tl.float32)
            store_row(V, k, c, g * w, D)
        for k in tl.static_range(M):
            w = tl.load(W_beta + c * M + k, mask=inside, other=0.0).to(tl.float32)
            store_row(V, N + k, c, g * w, D)
    if WIDTH:
        first: tl.constexpr = N + M if DEPTH else 0
        g = tl.load(next_gain + c, mask=inside, other=0.0).to(tl.float32) * one_over_tau
        for k in tl.static_range(M):
            w = tl.load(next_W + c * (M + N) + k, mask=inside, other=0.0).to(tl.float32)
            store_row(V, first + k, c, g * w, D)
