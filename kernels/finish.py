"""The gradients of a GHC's parameters, from what the programs of a backward pass leave behind.

    Σ E and Σ E ∘ tanh     [P, 2, n, K] of P programs     -> g_A and g_S_α, with a depth also g_B and g_S_β
    Σ ∂L/∂y ∘ x / rms(x)   [P, m, d_b] of P programs      -> that of the next norm's gain
    Σ H′ᵀ e = g_V          [S, d_b, K] of weights.py      -> g_W = g_V ∘ gain / τ, g_gain = Σ_k g_V ∘ W / τ

A depth has K = n + m columns, those of Â and Bᵀ, and a width m, those of Å; g_V may be of both, n + 2m. A and S_α
belong to both: the columns that are the other's become 0 here, and autograd adds the two up. Sums run over P or S in
the same order every time. P is some hundreds to eight thousand, an element's sums far apart: a program has few
elements, so that many programs wait for memory at the same time.
As PyTorch operations this was some twenty small kernels for a depth.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_coefficients_gradient(
    of_A, of_B, total, i, k, inside, M: tl.constexpr, N: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """Elements (i, k) of a sum [n, K] to A and B, or to S_α and S_β."""
    if DEPTH:  # k of K are n of Â, then m of Bᵀ; in A the m columns before those of Â are Å's
        carry = k < N
        column = tl.where(carry, M + k, k - N)
        tl.store(of_A + i * (M + N) + column, tl.where(carry, total, 0.0).to(of_A.dtype.element_ty), mask=inside)
        tl.store(of_B + (k - N) * N + i, total.to(of_B.dtype.element_ty), mask=inside & (k >= N))
    else:
        tl.store(of_A + i * (M + N) + k, total.to(of_A.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["P"])
def coefficients_gradient_kernel(
    partial, stride, P, g_A, g_B, g_S_alpha, g_S_beta,
    M: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """BE elements of [n, n + m] a program, of the first sum or of the second; those of a program of the backward pass
    are `stride` numbers from the last one's."""
    K: tl.constexpr = N + M if DEPTH else M
    which = tl.program_id(1)
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    i, k = e // (M + N), e % (M + N)
    inside = i < N
    sums = tl.zeros((BP, BE), tl.float32)
    for start in range(0, P, BP):
        p = start + tl.arange(0, BP)[:, None]
        place = partial + p * stride + (which * N + i[None, :]) * K + k[None, :]
        sums += tl.load(place, mask=(p < P) & (inside & (k < K))[None, :], other=0.0)
    total = tl.sum(sums, axis=0)
    if which == 0:
        store_coefficients_gradient(g_A, g_B, total, i, k, inside, M, N, DEPTH)
    else:
        store_coefficients_gradient(g_S_alpha, g_S_beta, total, i, k, inside, M, N, DEPTH)


@triton.jit(do_not_specialize=["P"])
def norm_gradient_kernel(
    partial, P, g_norm,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """BC of the m · BD places a program. A row lies in PIECES, as `add_rows` wants it: its columns [BD / 4 / PIECES,
    PIECES, 4] as [PIECES, BD / 4 / PIECES, 4]. One piece is a row in order, of any BD."""
    place = tl.program_id(0) * BC + tl.arange(0, BC)
    sums = tl.zeros((BP, BC), tl.float32)
    for start in range(0, P, BP):
        p = start + tl.arange(0, BP)[:, None]
        sums += tl.load(partial + p * (M * BD) + place[None, :], mask=(p < P) & (place < M * BD)[None, :], other=0.0)
    k, c = place // BD, place % BD
    column = (c % (BD // PIECES) // 4 * PIECES + c // (BD // PIECES)) * 4 + c % 4
    total = tl.sum(sums, axis=0).to(g_norm.dtype.element_ty)
    tl.store(g_norm + k * D + column, total, mask=(k < M) & (column < D))


@triton.jit(do_not_specialize=["S"])
def projections_gradient_kernel(
    partial, S, W_alpha, W_beta, gain, g_W_alpha, g_W_beta, g_gain,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, KP: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
    READ: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """BD rows of W a program, and those of their columns that are in `partial`: READ of a width, before WRITE of a
    depth."""
    K: tl.constexpr = READ + WRITE
    c = tl.program_id(0) * BD + tl.arange(0, BD)[:, None]
    k = tl.arange(0, KP)[None, :]
    column = k + (M - READ)  # of (W_α | W_β)
    inside = (c < D) & (k < K)
    of_alpha, of_beta = inside & (column < M + N), inside & (column >= M + N)
    g_V = tl.zeros((BD, KP), tl.float32)
    for start in range(0, S, BS):
        s = start + tl.arange(0, BS)[:, None, None]
        x = tl.load(partial + (s * D + c[None]) * K + k[None], mask=(s < S) & inside[None], other=0.0)
        g_V += tl.sum(x, axis=0)
    g_V = g_V * (1.0 / tl.sqrt(D * 1.0))
    g_W = g_V * tl.load(gain + c, mask=c < D, other=0.0).to(tl.float32)
    alpha, beta = c * (M + N) + column, c * M + (column - (M + N))
    w = tl.load(W_alpha + alpha, mask=of_alpha, other=0.0).to(tl.float32)
    tl.store(g_W_alpha + alpha, g_W.to(g_W_alpha.dtype.element_ty), mask=of_alpha)
    if WRITE > 0:
        w += tl.load(W_beta + beta, mask=of_beta, other=0.0).to(tl.float32)
        tl.store(g_W_beta + beta, g_W.to(g_W_beta.dtype.element_ty), mask=of_beta)
    row = tl.sum(g_V * w, axis=1, keep_dims=True)
    tl.store(g_gain + c, row.to(g_gain.dtype.element_ty), mask=c < D)
