"""g_V = Σ H′ᵀ e over all tokens and slots: the gradient of the projections, V = gain ∘ W / τ.

e = rstd · ∂L/∂q comes from the backward kernels: [T, n, m] from the one of `width`, of the read columns, and [T, n,
n+m] from the one of `depth`, of the others; here are either or both. A product of [d_b, T n] by [T n, K] with a very
long sum: program (c, s) takes BD columns of H′ and every S-th stretch of rows, and writes its sum to partial[s]. The S
sums are added afterwards, always in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from vwn_ref.kernels.tiles import add_product


@triton.jit
def weights_kernel(
    H, E_read, E_write, partial, rows,
    D: tl.constexpr, READ: tl.constexpr, WRITE: tl.constexpr, KP: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """H [rows, D], E_read [rows, READ] and E_write [rows, WRITE] -> partial [S, D, READ + WRITE]; either may be 0."""
    K: tl.constexpr = READ + WRITE
    c = tl.program_id(0) * BD + tl.arange(0, BD)
    k = tl.arange(0, KP)
    total = tl.zeros((BD, KP), tl.float32)
    for stretch in range(tl.program_id(1), tl.cdiv(rows, BR), tl.num_programs(1)):
        row = tl.arange(0, BR) + (tl.zeros((BR,), tl.int64) + stretch) * BR
        inside = row[:, None] < rows
        h = tl.load(H + row[:, None] * D + c[None, :], mask=inside & (c[None, :] < D), other=0.0)
        if READ > 0:
            e = tl.load(E_read + row[:, None] * READ + k[None, :], mask=inside & (k[None, :] < READ), other=0.0)
        if WRITE > 0:
            of_write = inside & (k[None, :] >= READ) & (k[None, :] < K)
            e_write = tl.load(E_write + row[:, None] * WRITE + (k - READ)[None, :], mask=of_write, other=0.0)
            e = e + e_write if READ > 0 else e_write  # where one is, the other is 0
        if PREC == "bf16":
            total = add_product(total, tl.trans(h), e)
        else:
            total += tl.dot(tl.trans(h.to(tl.float32)), e.to(tl.float32), input_precision=PREC)
    own = partial + tl.program_id(1) * (D * K)
    tl.store(own + c[:, None] * K + k[None, :], total, mask=(c[:, None] < D) & (k[None, :] < K))
