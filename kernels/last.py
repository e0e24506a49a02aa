"""The GroupNorm of reduce, Eq. (4), behind the last sublayer's `depth`: two kernels, see `_last` in fused.py.

    h = Bᵀ Z + Âᵀ H′                                   [n, d_b], by a kernel of `depth`, and rounded as states are
    y = (h − mean) / √(var + ε) ∘ weight + bias        mean and variance of each group of m slots: D numbers

The m slots of a group lie one behind the other, so h [T, n, d_b] is rows [T · r, D] here. The variance is taken around
the mean, not as a difference of large numbers.

A program has one group of every so-many-th token. A row of up to `LONGEST_GROUP` numbers (launch.py) is in its
registers whole, and comes from memory once, where registers allow it while the row before it is worked on. A longer one
is read chunk by chunk, again for each of three walks along it. Y may be H, and so may G_H: a row is read before it is
written, and by no other program.
"""

from __future__ import annotations

import triton
import triton.language as tl
from vwn_ref.kernels.rows import load_row, store_row


@triton.jit
def group_of(R: tl.constexpr):
    """Of this program: its group, its first token, and how far on the next one is."""
    program = tl.program_id(0)
    return program % R, program // R, tl.num_programs(0) // R


@triton.jit
def load_group(pointer, token, T, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """The row of a token as it lies in memory, [BD]; zeros where there is no such token."""
    c = tl.arange(0, BD)
    t = tl.zeros((BD,), tl.int64) + token
    if D == BD:
        return tl.load(pointer + t * (R * D) + c, mask=t < T, other=0.0)
    return tl.load(pointer + t * (R * D) + c, mask=(t < T) & (c < D), other=0.0)


@triton.jit
def centred(x, mean, c, D: tl.constexpr, BD: tl.constexpr):
    """x − mean, and 0 in columns that do not exist."""
    if D % BD == 0:
        return x - mean
    return tl.where(c < D, x - mean, 0.0)


@triton.jit
def load_chunk(pointer, c, D: tl.constexpr, BD: tl.constexpr):
    """Columns `c` of a row, as float32."""
    if D % BD == 0:
        return tl.load(pointer + c).to(tl.float32)
    return tl.load(pointer + c, mask=c < D, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T"])
def group_norm_kernel(H, Y, weight, bias, T, eps, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """y of every token."""
    group, first, step = group_of(R)
    H += group * D
    Y += group * D
    c = tl.arange(0, BD)
    if D <= BD:
        w = load_row(weight, group, D, BD)
        b = load_row(bias, group, D, BD)
        following = load_group(H, first, T, R, D, BD)
        for token in range(first, T, step):
            t = tl.cast(token, tl.int64)
            h = following.to(tl.float32)
            following = load_group(H, t + step, T, R, D, BD)
            h = centred(h, tl.sum(h) / D, c, D, BD)
            rstd = 1.0 / tl.sqrt(tl.sum(h * h) / D + eps)
            store_row(Y + t * (R * D), h * rstd * w + b, 0, D, BD)
    else:
        weight += group * D
        bias += group * D
        for token in range(first, T, step):
            offset = tl.cast(token, tl.int64) * (R * D)
            total = tl.zeros((BD,), tl.float32)
            square = tl.zeros((BD,), tl.float32)
            for start in range(0, D, BD):
                total += load_chunk(H + offset, start + c, D, BD)
            mean = tl.sum(total) / D
            for start in range(0, D, BD):
                h = centred(load_chunk(H + offset, start + c, D, BD), mean, start + c, D, BD)
                square += h * h
            rstd = 1.0 / tl.sqrt(tl.sum(square) / D + eps)
            for start in range(0, D, BD):
                k = start + c
                h = (load_chunk(H + offset, k, D, BD) - mean) * rstd
                y = h * load_chunk(weight, k, D, BD) + load_chunk(bias, k, D, BD)
                tl.store(Y + offset + k, y.to(Y.dtype.element_ty), mask=k < D)


# ----------------------------------------------------------------------------------------------------- backward
#
#     ĥ = (h − mean) / √(var + ε);  u = weight ∘ g_y
#     g_h = (u − mean(u) − ĥ · mean(u ∘ ĥ)) / √(var + ε)      means over the group
#     g_weight = Σ g_y ∘ ĥ,  g_bias = Σ g_y                   over tokens
#
# g_h is then what a backward kernel of `depth` starts from.


@triton.jit
def add_chunk(pointer, x, c, again, D: tl.constexpr):
    """Add x to columns `c` of sums that no other program touches; unless `again`, put it there."""
    known = tl.load(pointer + c, mask=c < D, other=0.0)
    before = tl.where(again, known, 0.0)
    tl.debug_barrier()  # threads may hold copies of an element: all have read before one writes
    tl.store(pointer + c, before + x, mask=c < D)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["T"])
def group_norm_backward_kernel(
    H, G_Y, G_H, partial, weight, T, eps, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr
):
    """g_h of every token; the sums over its tokens, of g_y ∘ ĥ and of g_y, go to partial[p]: [2, r, D]."""
    group, first, step = group_of(R)
    H += group * D
    G_Y += group * D
    G_H += group * D
    partial += (tl.cast(first, tl.int64) * (2 * R) + group) * D
    c = tl.arange(0, BD)
    if D <= BD:
        w = load_row(weight, group, D, BD)
        weight_sum = tl.zeros((BD,), tl.float32)
        bias_sum = tl.zeros((BD,), tl.float32)
        AHEAD: tl.constexpr = H.dtype.element_ty.primitive_bitwidth == 16  # rows of float32 take too many registers
        if AHEAD:
            following = load_group(H, first, T, R, D, BD)
            g_following = load_group(G_Y, first, T, R, D, BD)
        for token in range(first, T, step):
            t = tl.cast(token, tl.int64)
            if AHEAD:
                h = following.to(tl.float32)
                g = g_following.to(tl.float32)
                following = load_group(H, t + step, T, R, D, BD)
                g_following = load_group(G_Y, t + step, T, R, D, BD)
            else:
                h = load_row(H + t * (R * D), 0, D, BD)
                g = load_row(G_Y + t * (R * D), 0, D, BD)
            mean_u = tl.sum(g * w) / D
            h = centred(h, tl.sum(h) / D, c, D, BD)
            rstd = 1.0 / tl.sqrt(tl.sum(h * h) / D + eps)
            h *= rstd
            mean_uh = tl.sum(g * w * h) / D
            weight_sum += g * h
            bias_sum += g
            g_h = rstd * (g * w - mean_u - h * mean_uh)
            store_row(G_H + t * (R * D), g_h, 0, D, BD)
        store_row(partial, weight_sum, 0, D, BD)
        store_row(partial + R * D, bias_sum, 0, D, BD)
    else:
        weight += group * D
        for token in range(first, T, step):
            offset = tl.cast(token, tl.int64) * (R * D)
            total = tl.zeros((BD,), tl.float32)
            total_u = tl.zeros((BD,), tl.float32)
            for start in range(0, D, BD):
                k = start + c
                total += load_chunk(H + offset, k, D, BD)
                total_u += load_chunk(G_Y + offset, k, D, BD) * load_chunk(weight, k, D, BD)
            mean = tl.sum(total) / D
            mean_u = tl.sum(total_u) / D
            square = tl.zeros((BD,), tl.float32)
            inner = tl.zeros((BD,), tl.float32)
            for start in range(0, D, BD):
                k = start + c
                h = centred(load_chunk(H + offset, k, D, BD), mean, k, D, BD)
                square += h * h
                inner += h * (load_chunk(G_Y + offset, k, D, BD) * load_chunk(weight, k, D, BD))
            rstd = 1.0 / tl.sqrt(tl.sum(square) / D + eps)
            mean_uh = rstd * tl.sum(inner) / D
            for start in range(0, D, BD):
                k = start + c
                h = (load_chunk(H + offset, k, D, BD) - mean) * rstd
                g = load_chunk(G_Y + offset, k, D, BD)
                add_chunk(partial, g * h, k, token > first, D)
                add_chunk(partial + R * D, g, k, token > first, D)
                g_h = rstd * (g * load_chunk(weight, k, D, BD) - mean_u - h * mean_uh)
                tl.store(G_H + offset + k, g_h.to(G_H.dtype.element_ty), mask=k < D)
