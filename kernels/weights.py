"""g_V = Σ H′ᵀ e over all tokens and slots: the gradient of the projections, V = gain ∘ W / τ.

e = rstd · ∂L/∂q [T, n, K] comes from the backward kernels. A product of [d_b, T n] by [T n, K] with a very long sum:
program (c, s) takes BD columns of H′ and every S-th stretch of rows, and writes its sum to partial[s]. The S sums are
added afterwards, always in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def weights_kernel(
    H, E, partial, rows,
    D: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """H [rows, D], E [rows, K] -> partial [S, D, K]."""
    c = tl.program_id(0) * BD + tl.arange(0, BD)
    k = tl.arange(0, KP)
    total = tl.zeros((BD, KP), tl.float32)
    for stretch in range(tl.program_id(1), tl.cdiv(rows, BR), tl.num_programs(1)):
        row = tl.arange(0, BR) + (tl.zeros((BR,), tl.int64) + stretch) * BR
        inside = row[:, None] < rows
        h = tl.load(H + row[:, None] * D + c[None, :], mask=inside & (c[None, :] < D), other=0.0).to(tl.float32)
        e = tl.load(E + row[:, None] * K + k[None, :], mask=inside & (k[None, :] < K), other=0.0).to(tl.float32)
        total += tl.dot(tl.trans(h), e, input_precision=PREC)
    own = partial + tl.program_id(1) * (D * K)
    tl.store(own + c[:, None] * K + k[None, :], total, mask=(c[:, None] < D) & (k[None, :] < K))
