"""`last`: the last sublayer's `depth` and the GroupNorm of reduce, Eq. (4), in one kernel.

    h = Bᵀ Z + Âᵀ H′                                   [n, d_b]
    y = (h − mean) / √(var + ε) ∘ weight + bias        mean and variance of each group of m slots: D numbers

h is never stored: it is mixed once for mean and variance and once more to be written. The variance is taken around the
mean, chunk by chunk and slot by slot (Chan, Golub, LeVeque), not as a difference of large numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from vwn_ref.kernels.depth import new_rows, write_matrices
from vwn_ref.kernels.tiles import add_partial, inverse_root, load_rows, row_mask, slot_mask, store_rows, tokens


@triton.jit
def same_group(M: tl.constexpr, N: tl.constexpr, NP: tl.constexpr):
    """[NP, NP]: True where slots i and j lie in one group of m."""
    i, j = tl.arange(0, NP)[:, None], tl.arange(0, NP)[None, :]
    return (i // M == j // M) & (i < N) & (j < N)


@triton.jit
def group_sum(x, group):
    """Σ over the slots of its group, for every slot: [BT, NP] -> [BT, NP]."""
    return tl.sum(tl.where(group[None, :, :], x[:, None, :], 0.0), axis=2)


@triton.jit
def statistics(
    H, Z, t, T, carry, write, group, eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, MANY: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Mean and 1/√(var + ε) of the group that each slot is in, [BT, NP] both."""
    mean = tl.zeros((BT, NP), tl.float32)
    squares = tl.zeros((BT, NP), tl.float32)  # Σ (h − mean)² of each slot
    for start in range(0, D, BD):
        c = start + tl.arange(0, BD)
        inside = row_mask(t, T, c, N, D, NP)
        h = new_rows(H, Z, t, T, c, carry, write, M, N, D, MP, NP, MANY, PREC)
        size = tl.minimum(D - start, BD).to(tl.float32)
        chunk_mean = tl.sum(tl.where(inside, h, 0.0), axis=2) / size
        around = tl.where(inside, h - chunk_mean[:, :, None], 0.0)
        step = chunk_mean - mean
        squares += tl.sum(around * around, axis=2) + step * step * (start * size / (start + size))
        mean += step * (size / (start + size))
    group_mean = group_sum(mean, group) / M
    away = mean - group_mean
    variance = group_sum(squares + D * away * away, group) / (M * D)
    return group_mean, inverse_root(variance, 1.0, eps, slot_mask(t, T, N, NP))


@triton.jit
def last_kernel(
    H, Z, Y, V, A, B, S_alpha, S_beta, weight, bias, T, eps, norm_eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, MANY: tl.constexpr, PREC: tl.constexpr, DYNAMIC: tl.constexpr,
):  # fmt: skip
    """One block of tokens a program."""
    t = tokens(tl.program_id(0), BT)
    first = tl.zeros_like(t)
    group = same_group(M, N, NP)
    carry, write = write_matrices(
        H, t, T, V, A, B, S_alpha, S_beta, eps, M, N, D, MP, NP, BT, BD, PREC, DYNAMIC
    )  # fmt: skip
    mean, rstd = statistics(
        H, Z, t, T, carry, write, group, norm_eps, M, N, D, MP, NP, BT, BD, MANY, PREC
    )  # fmt: skip
    for start in range(0, D, BD):
        c = start + tl.arange(0, BD)
        h = new_rows(H, Z, t, T, c, carry, write, M, N, D, MP, NP, MANY, PREC)
        y = (h - mean[:, :, None]) * rstd[:, :, None]
        y = y * load_rows(weight, first, 1, c, N, D, NP) + load_rows(bias, first, 1, c, N, D, NP)
        store_rows(Y, y, t, T, c, N, D, NP)


# ----------------------------------------------------------------------------------------------------- backward
#
#     ĥ = (h − mean) / √(var + ε);  u = weight ∘ g_y
#     g_h = (u − mean(u) − ĥ · mean(u ∘ ĥ)) / √(var + ε)      means over the group
#     g_weight = Σ g_y ∘ ĥ,  g_bias = Σ g_y                   over tokens
#
# g_h is then what `depth_backward_kernel` starts from.


@triton.jit
def last_backward_kernel(
    H, Z, G_Y, G, weight_partial, bias_partial, V, A, B, S_alpha, S_beta, weight, T, eps, norm_eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, MANY: tl.constexpr, PREC: tl.constexpr, DYNAMIC: tl.constexpr,
):  # fmt: skip
    """G = ∂L/∂h; program p adds its sums over tokens up in weight_partial[p] and bias_partial[p], [n, d_b] each."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    group = same_group(M, N, NP)
    for block in range(program, tl.cdiv(T, BT), programs):
        t = tokens(block, BT)
        first = tl.zeros_like(t)
        carry, write = write_matrices(
            H, t, T, V, A, B, S_alpha, S_beta, eps, M, N, D, MP, NP, BT, BD, PREC, DYNAMIC
        )  # fmt: skip
        mean, rstd = statistics(
            H, Z, t, T, carry, write, group, norm_eps, M, N, D, MP, NP, BT, BD, MANY, PREC
        )  # fmt: skip
        sum_u = tl.zeros((BT, NP), tl.float32)
        sum_uh = tl.zeros((BT, NP), tl.float32)
        for start in range(0, D, BD):
            c = start + tl.arange(0, BD)
            h = new_rows(H, Z, t, T, c, carry, write, M, N, D, MP, NP, MANY, PREC)
            h = (h - mean[:, :, None]) * rstd[:, :, None]
            g = load_rows(G_Y, t, T, c, N, D, NP)
            u = g * load_rows(weight, first, 1, c, N, D, NP)
            sum_u += tl.sum(u, axis=2)
            sum_uh += tl.sum(u * h, axis=2)
        mean_u = group_sum(sum_u, group) / (M * D)
        mean_uh = group_sum(sum_uh, group) / (M * D)
        for start in range(0, D, BD):
            c = start + tl.arange(0, BD)
            h = new_rows(H, Z, t, T, c, carry, write, M, N, D, MP, NP, MANY, PREC)
            h = (h - mean[:, :, None]) * rstd[:, :, None]
            g = load_rows(G_Y, t, T, c, N, D, NP)
            add_partial(weight_partial + program * (N * D), g * h, c, N, D, NP)
            add_partial(bias_partial + program * (N * D), g, c, N, D, NP)
            u = g * load_rows(weight, first, 1, c, N, D, NP)
            g_h = rstd[:, :, None] * (u - mean_u[:, :, None] - h * mean_uh[:, :, None])
            store_rows(G, g_h, t, T, c, N, D, NP)
