"""`width`: x = Åᵀ H′, the rows that the sublayer reads, and on request the RMSNorm that the sublayer begins with.

    q = RMSNorm(H′) W_α / τ        [n, m]     the first m columns of W_α
    Å = S_α ∘ tanh(q) + A          [n, m]     the first m columns of Eq. (14), and of S_α and A; static GHC: of A
    x = Åᵀ H′                      [m, d_b]   the m rows side by side: D
    y = x / rms(x) ∘ γ             [m, d_b]   where a norm follows

Reads n rows of d_b a token, writes m. Âᵀ H′ is not computed here: `depth` makes it from H′ again, which costs n rows of
reading there; storing it would cost n rows written here and n read there.

Along d_b there are two passes over H′ (three with the norm): the coefficients must be there before anything can be
mixed. Only the first comes from memory; BT tokens are few enough to be in the cache still at the second. Where a
token's rows fit the registers there is one: see few.py. W_α comes as V, see projections.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from vwn_ref.kernels.tiles import (
    add_partial,
    coefficients,
    correlate,
    inverse_root,
    load_parameter,
    load_rows,
    load_V,
    mix,
    project,
    slot_mask,
    spread,
    store_matrix,
    store_partial,
    store_rows,
    through_tanh,
    tokens,
    unmix,
)  # fmt: skip


@triton.jit
def read_matrix(
    H, t, T, V, A, S_alpha, eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, PREC: tl.constexpr, DYNAMIC: tl.constexpr,
):  # fmt: skip
    """Å [BT, NP, MP], its tanh, rstd of the slots [BT, NP], and S_α."""
    p = tl.zeros((BT, NP, MP), tl.float32)
    square = tl.zeros((BT, NP), tl.float32)
    static = load_parameter(A, 0, N, M, M + N, 1, NP, MP)
    scale = static
    if DYNAMIC:
        scale = load_parameter(S_alpha, 0, N, M, M + N, 1, NP, MP)
        for start in range(0, D, BD):
            c = start + tl.arange(0, BD)
            h = load_rows(H, t, T, c, N, D, NP)
            square += tl.sum(h * h, axis=2)
            p += project(h, load_V(V, c, 0, M, D, MP), PREC)
    rstd = inverse_root(square, D, eps, slot_mask(t, T, N, NP) & DYNAMIC)
    C, tanh_q = coefficients(p, rstd, static, scale, DYNAMIC)
    return C, tanh_q, p, rstd, scale


@triton.jit
def width_block(
    H, X, t, T, V, A, S_alpha, norm_gain, eps, norm_eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, MANY: tl.constexpr, PREC: tl.constexpr, DYNAMIC: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """x, or y, of the tokens `t`."""
    C, _, _, _, _ = read_matrix(H, t, T, V, A, S_alpha, eps, M, N, D, MP, NP, BT, BD, PREC, DYNAMIC)
    if NORM:
        square = tl.zeros((BT,), tl.float32)
        for start in range(0, D, BD):
            x = mix(C, load_rows(H, t, T, start + tl.arange(0, BD), N, D, NP), MANY, PREC)
            square += tl.sum(tl.sum(x * x, axis=2), axis=1)
        rstd_x = inverse_root(square, M * D, norm_eps, t < T)
    for start in range(0, D, BD):
        c = start + tl.arange(0, BD)
        x = mix(C, load_rows(H, t, T, c, N, D, NP), MANY, PREC)
        if NORM:
            x = x * rstd_x[:, None, None] * load_rows(norm_gain, tl.zeros_like(t), 1, c, M, D, MP)
        store_rows(X, x, t, T, c, M, D, MP)


@triton.jit
def width_kernel(
    H, X, V, A, S_alpha, norm_gain, T, eps, norm_eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, MANY: tl.constexpr, PREC: tl.constexpr, DYNAMIC: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One block of tokens a program."""
    width_block(
        H, X, tokens(tl.program_id(0), BT), T, V, A, S_alpha, norm_gain, eps, norm_eps,
        M, N, D, MP, NP, BT, BD, MANY, PREC, DYNAMIC, NORM,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------- backward
#
#     E    = H′ g_xᵀ                                ∂L/∂Å, [n, m]; the static part of A gets Σ E, S_α gets Σ E ∘ tanh
#     e    = rstd · E ∘ S_α ∘ (1 − tanh²)           rstd · ∂L/∂q, with rstd = 1 / rms of the slot
#     g_H′ = Å g_x + e Vᵀ − H′ · rstd Σ_k(e ∘ q) / d_b               mixing, projection, RMSNorm of the slot
#     g_V  = Σ H′ᵀ e                                over tokens and slots; see weights.py. V is [d_b, K] here
#
# With the norm, x̂ = x / rms(x) and g_x = (γ ∘ g_y − x̂ · mean(x̂ ∘ γ ∘ g_y)) / rms(x). That mean needs all of x before
# g_x is known anywhere, but E is linear in g_x: E = (H′ (γ ∘ g_y)ᵀ − c · H′ xᵀ) / rms(x), and both products can be
# summed on the way.


@triton.jit
def width_backward_block(
    H, G, G_add, G_H, E, norm_partial, t, T, V, A, S_alpha, norm_gain, eps, norm_eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, MANY: tl.constexpr, PREC: tl.constexpr, DYNAMIC: tl.constexpr, NORM: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """g_H′ (plus G_add, what else flows into H′) and e of the tokens `t` -> Σ E, Σ E ∘ tanh, [NP, MP]."""
    C, tanh_q, p, rstd, scale = read_matrix(
        H, t, T, V, A, S_alpha, eps, M, N, D, MP, NP, BT, BD, PREC, DYNAMIC
    )  # fmt: skip
    first = tl.zeros_like(t)  # a parameter is one token of rows
    dC = tl.zeros((BT, NP, MP), tl.float32)
    rstd_x = tl.zeros((BT,), tl.float32) + 1.0
    pull_x = tl.zeros((BT,), tl.float32)
    if NORM:
        Hx = tl.zeros((BT, NP, MP), tl.float32)
        square = tl.zeros((BT,), tl.float32)
        inner = tl.zeros((BT,), tl.float32)
    for start in range(0, D, BD):
        c = start + tl.arange(0, BD)
        h = load_rows(H, t, T, c, N, D, NP)
        g = load_rows(G, t, T, c, M, D, MP)
        if NORM:
            g = g * load_rows(norm_gain, first, 1, c, M, D, MP)
            x = mix(C, h, MANY, PREC)
            square += tl.sum(tl.sum(x * x, axis=2), axis=1)
            inner += tl.sum(tl.sum(x * g, axis=2), axis=1)
            Hx += correlate(h, x, PREC)
        dC += correlate(h, g, PREC)
    if NORM:
        rstd_x = inverse_root(square, M * D, norm_eps, t < T)
        pull_x = rstd_x * rstd_x * rstd_x * inner / (M * D)
        dC = rstd_x[:, None, None] * dC - pull_x[:, None, None] * Hx
    if DYNAMIC:
        e = through_tanh(dC, tanh_q, scale) * rstd[:, :, None]
        pull = tl.sum(e * p, axis=2) * rstd * rstd / D
        store_matrix(E, e, t, T, 0, M, N, M, MP)
    for start in range(0, D, BD):
        c = start + tl.arange(0, BD)
        h = load_rows(H, t, T, c, N, D, NP)
        g = load_rows(G, t, T, c, M, D, MP)
        if NORM:
            x = mix(C, h, MANY, PREC)
            add_partial(norm_partial, g * x * rstd_x[:, None, None], c, M, D, MP)
            gamma = load_rows(norm_gain, first, 1, c, M, D, MP)
            g = rstd_x[:, None, None] * g * gamma - pull_x[:, None, None] * x
        g_h = unmix(C, g, MANY, PREC)
        if DYNAMIC:
            g_h += spread(e, load_V(V, c, 0, M, D, MP), MANY, PREC) - pull[:, :, None] * h
        if ADD:
            g_h += load_rows(G_add, t, T, c, N, D, NP)
        store_rows(G_H, g_h, t, T, c, N, D, NP)
    return tl.sum(dC, axis=0), tl.sum(dC * tanh_q, axis=0)


@triton.jit
def width_backward_kernel(
    H, G, G_add, G_H, E, partial, norm_partial, V, A, S_alpha, norm_gain, T, eps, norm_eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, MANY: tl.constexpr, PREC: tl.constexpr, DYNAMIC: tl.constexpr, NORM: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """Program p takes blocks p, p + P, …; its sums over tokens, of E and E ∘ tanh, go to partial[p]: [2, n, m]."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    sum_E = tl.zeros((NP, MP), tl.float32)
    sum_ET = tl.zeros((NP, MP), tl.float32)
    for block in range(program, tl.cdiv(T, BT), programs):
        a, b = width_backward_block(
            H, G, G_add, G_H, E, norm_partial + program * (M * D), tokens(block, BT), T, V, A, S_alpha,
            norm_gain, eps, norm_eps, M, N, D, MP, NP, BT, BD, MANY, PREC, DYNAMIC, NORM, ADD,
        )  # fmt: skip
        sum_E += a
        sum_ET += b
    own = partial + program * (2 * N * M)
    store_partial(own, sum_E, 0, N, M, M)
    if DYNAMIC:
        store_partial(own + N * M, sum_ET, 0, N, M, M)
