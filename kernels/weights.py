"""g_V = Σ H′ᵀ e over all tokens and slots: the gradient of the projections, V = gain ∘ W / τ.

e = rstd · ∂L/∂q comes from the backward kernels: [T, n, m] from the one of `width`, of the read columns, and [T, n,
n+m] from the one of `depth`, of the others; here are either or both. A product of [d_b, T n] by [T n, K] with a very
long sum: program (c, s) takes BD columns of H′ and every S-th stretch of rows, and writes its sum to partial[s]. The S
sums are added afterwards, always in the same order.

A number of H′ takes few instructions, so what is around it counts: one load brings both parts of e; only the first row
of a stretch is addressed in 64 bits; and only the last stretch, which may be short, has a mask of rows.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from vwn_ref.kernels.tiles import add_product


@triton.constexpr_function
def together(READ, WRITE):
    """How many columns of e lie side by side, and so aligned, wherever they begin: 1, 2, 4 or 8."""
    return math.gcd(READ, WRITE, 8)


@triton.jit
def places(E, row, columns, of_e, TOGETHER: tl.constexpr):
    """Pointers to e of the rows from `row` on. The compiler does not see by itself which lie side by side."""
    size: tl.constexpr = E.dtype.element_ty.primitive_bitwidth // 8
    pointers = (E + row * columns)[None, :] + of_e
    return tl.max_contiguous(tl.multiple_of(pointers, (1, TOGETHER * size)), (1, TOGETHER))


@triton.jit
def add_stretch(total, h, e, PREC: tl.constexpr):
    """total + hᵀ e."""
    if PREC == "bf16":
        return add_product(total, tl.trans(h), e)
    else:
        return total + tl.dot(tl.trans(h.to(tl.float32)), e.to(tl.float32), input_precision=PREC)


@triton.jit(do_not_specialize=["rows"])
def weights_kernel(
    H, E_read, E_write, partial, rows,
    D: tl.constexpr, READ: tl.constexpr, WRITE: tl.constexpr, KP: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """H [rows, D], E_read [rows, READ] and E_write [rows, WRITE] -> partial [S, D, READ + WRITE]; either may be 0."""
    K: tl.constexpr = READ + WRITE
    TOGETHER: tl.constexpr = together(READ, WRITE)
    r, c, k = tl.arange(0, BR), tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, KP)
    if READ == 0:  # where a column begins, and how many numbers its rows are apart
        E, columns = E_write + k, tl.full((KP,), WRITE, tl.int32)
    elif WRITE == 0:
        E, columns = E_read + k, tl.full((KP,), READ, tl.int32)
    else:
        E, columns = tl.where(k < READ, E_read + k, E_write + (k - READ)), tl.where(k < READ, READ, WRITE)
    of_h, of_e = r[:, None] * D + c[None, :], r[:, None] * columns[None, :]
    in_h, in_e = (c < D)[None, :], (k < K)[None, :]
    total = tl.zeros((BD, KP), tl.float32)
    whole, split, splits = rows // BR, tl.program_id(1), tl.num_programs(1)
    for stretch in range(split, whole, splits):
        row = tl.cast(stretch, tl.int64) * BR
        h = tl.load(H + row * D + of_h, mask=None if D % BD == 0 else in_h, other=None if D % BD == 0 else 0.0)
        e = tl.load(places(E, row, columns, of_e, TOGETHER), mask=in_e, other=0.0)
        total = add_stretch(total, h, e, PREC)
    if (whole % splits == split) & (rows % BR > 0):
        row = tl.cast(whole, tl.int64) * BR
        inside = r[:, None] < rows % BR
        h = tl.load(H + row * D + of_h, mask=in_h & inside, other=0.0)
        e = tl.load(places(E, row, columns, of_e, TOGETHER), mask=in_e & inside, other=0.0)
        total = add_stretch(total, h, e, PREC)
    own = partial + split * (D * K)
    tl.store(own + c[:, None] * K + k[None, :], total, mask=(c[:, None] < D) & (k[None, :] < K))
