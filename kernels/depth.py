"""`depth`: H′ˡ = Bᵀ Z + Âᵀ H′ˡ⁻¹, the sublayer's output written into the slots, beside what they carry on.

    q = RMSNorm(H′) (W_α | W_β) / τ    [n, n] and [n, m]    the last n columns of W_α; W_β
    Â = S_α ∘ tanh(q_α) + A            [n, n]               the last n columns of Eq. (14), and of S_α and A
    ℬᵀ = S_βᵀ ∘ tanh(q_β) + Bᵀ         [n, m]               Eq. (13), transposed: slots first, like the rest
    out = Âᵀ H′ + ℬᵀ Z                 [n, d_b]             Z: the m segments of z as rows; static GHC: ℬ = B, Â of A

Reads n rows of H′ and m of z a token, writes n. The coefficients are computed from H′ here; neither they nor Âᵀ H′ are
ever stored. Two passes along d_b, as in `width`; one in few.py. W_α and W_β come as V, see projections.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from vwn_ref.kernels.tiles import (
    accumulate,
    coefficients,
    correlate,
    inverse_root,
    load_matrix,
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
def write_coefficients(
    p_carry, p_write, rstd, A, B, S_alpha, S_beta,
    M: tl.constexpr, N: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, DYNAMIC: tl.constexpr,
):  # fmt: skip
    """Â [BT, NP, NP], its tanh and its S; and those of Bᵀ [BT, NP, MP]; from the projections p."""
    static_carry = load_parameter(A, M, N, N, M + N, 1, NP, NP)
    static_write = load_parameter(B, 0, N, M, 1, N, NP, MP)  # B is [m, n]: strides swapped
    scale_carry, scale_write = static_carry, static_write
    if DYNAMIC:
        scale_carry = load_parameter(S_alpha, M, N, N, M + N, 1, NP, NP)
        scale_write = load_parameter(S_beta, 0, N, M, 1, N, NP, MP)
    carry, tanh_carry = coefficients(p_carry, rstd, static_carry, scale_carry, DYNAMIC)
    write, tanh_write = coefficients(p_write, rstd, static_write, scale_write, DYNAMIC)
    return carry, tanh_carry, scale_carry, write, tanh_write, scale_write


@triton.jit
def write_matrices(
    H, t, T, V, A, B, S_alpha, S_beta, eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, PREC: tl.constexpr, DYNAMIC: tl.constexpr,
):  # fmt: skip
    """Â [BT, NP, NP] and Bᵀ [BT, NP, MP]."""
    p_carry = tl.zeros((BT, NP, NP), tl.float32)
    p_write = tl.zeros((BT, NP, MP), tl.float32)
    square = tl.zeros((BT, NP), tl.float32)
    if DYNAMIC:
        for start in range(0, D, BD):
            c = start + tl.arange(0, BD)
            h = load_rows(H, t, T, c, N, D, NP)
            square += tl.sum(h * h, axis=2)
            p_carry += project(h, load_V(V, c, 0, N, D, NP), PREC)
            p_write += project(h, load_V(V, c, N, M, D, MP), PREC)
    rstd = inverse_root(square, D, eps, slot_mask(t, T, N, NP) & DYNAMIC)
    carry, _, _, write, _, _ = write_coefficients(p_carry, p_write, rstd, A, B, S_alpha, S_beta, M, N, MP, NP, DYNAMIC)
    return carry, write


@triton.jit
def new_rows(
    H, Z, t, T, c, carry, write,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, MANY: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Âᵀ H′ + Bᵀ Z in the columns `c`: [BT, NP, BD]."""
    carried = mix(carry, load_rows(H, t, T, c, N, D, NP), MANY, PREC)
    return carried + unmix(write, load_rows(Z, t, T, c, M, D, MP), MANY, PREC)


@triton.jit
def depth_block(
    H, Z, OUT, t, T, V, A, B, S_alpha, S_beta, eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, MANY: tl.constexpr, PREC: tl.constexpr, DYNAMIC: tl.constexpr,
):  # fmt: skip
    """The new state of the tokens `t`."""
    carry, write = write_matrices(
        H, t, T, V, A, B, S_alpha, S_beta, eps, M, N, D, MP, NP, BT, BD, PREC, DYNAMIC
    )  # fmt: skip
    for start in range(0, D, BD):
        c = start + tl.arange(0, BD)
        store_rows(OUT, new_rows(H, Z, t, T, c, carry, write, M, N, D, MP, NP, MANY, PREC), t, T, c, N, D, NP)


@triton.jit
def depth_kernel(
    H, Z, OUT, V, A, B, S_alpha, S_beta, T, eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, MANY: tl.constexpr, PREC: tl.constexpr, DYNAMIC: tl.constexpr,
):  # fmt: skip
    """One block of tokens a program."""
    depth_block(
        H, Z, OUT, tokens(tl.program_id(0), BT), T, V, A, B, S_alpha, S_beta, eps,
        M, N, D, MP, NP, BT, BD, MANY, PREC, DYNAMIC,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------- backward
#
#     E_α  = H′ Gᵀ          [n, n]     ∂L/∂Â, from G = ∂L/∂out
#     E_β  = G Zᵀ           [n, m]     ∂L/∂Bᵀ
#     e    = rstd · E ∘ S ∘ (1 − tanh²)        rstd · ∂L/∂q, of both
#     g_z  = B G            [m, d_b]
#     g_H′ = Â G + e_α V_αᵀ + e_β V_βᵀ − H′ · rstd Σ_k(e ∘ q) / d_b        V is [d_b, K] here


@triton.jit
def own_size(M: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr):
    """Numbers of memory that a program has for itself: see `depth_backward_block`."""
    return 2 * N * (N + M) + (NP > 16) * BT * N * N


@triton.jit
def depth_backward_block(
    H, Z, G, G_H, G_Z, E, own, t, T, V, A, B, S_alpha, S_beta, eps,
    carry_sum, carry_tanh_sum, write_sum, write_tanh_sum,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, MANY: tl.constexpr, PREC: tl.constexpr, DYNAMIC: tl.constexpr,
):  # fmt: skip
    """g_H′, g_z and e of the tokens `t`; the four sums, of E and E ∘ tanh, of Â and of Bᵀ, with theirs added.

    G and G_H may be one tensor. More than 16 slots (FEW is False): matrices and sums do not fit the registers together.
    Sums are then added to `own` memory, Â waits behind them, e where it is stored anyway, and the last pass takes both
    from there 16 columns at a time.
    """
    FEW: tl.constexpr = NP <= 16
    own_tanh = own + N * (N + M)
    parked = own_tanh + N * (N + M)
    own_t = tokens(0, BT)
    d_carry = tl.zeros((BT, NP, NP), tl.float32)
    d_write = tl.zeros((BT, NP, MP), tl.float32)
    p_carry = tl.zeros((BT, NP, NP), tl.float32)
    p_write = tl.zeros((BT, NP, MP), tl.float32)
    square = tl.zeros((BT, NP), tl.float32)
    for start in range(0, D, BD):
        c = start + tl.arange(0, BD)
        h = load_rows(H, t, T, c, N, D, NP)
        if DYNAMIC:
            square += tl.sum(h * h, axis=2)
            p_carry += project(h, load_V(V, c, 0, N, D, NP), PREC)
            p_write += project(h, load_V(V, c, N, M, D, MP), PREC)
        g = load_rows(G, t, T, c, N, D, NP)
        d_carry += correlate(h, g, PREC)
        d_write += correlate(g, load_rows(Z, t, T, c, M, D, MP), PREC)
    rstd = inverse_root(square, D, eps, slot_mask(t, T, N, NP) & DYNAMIC)
    carry, tanh_carry, scale_carry, write, tanh_write, scale_write = write_coefficients(
        p_carry, p_write, rstd, A, B, S_alpha, S_beta, M, N, MP, NP, DYNAMIC
    )
    carry_sum = accumulate(carry_sum, d_carry, own, 0, N, N, N + M, FEW)
    write_sum = accumulate(write_sum, d_write, own, N, N, M, N + M, FEW)
    if DYNAMIC:
        carry_tanh_sum = accumulate(carry_tanh_sum, d_carry * tanh_carry, own_tanh, 0, N, N, N + M, FEW)
        write_tanh_sum = accumulate(write_tanh_sum, d_write * tanh_write, own_tanh, N, N, M, N + M, FEW)
        e_carry = through_tanh(d_carry, tanh_carry, scale_carry) * rstd[:, :, None]
        e_write = through_tanh(d_write, tanh_write, scale_write) * rstd[:, :, None]
        pull = (tl.sum(e_carry * p_carry, axis=2) + tl.sum(e_write * p_write, axis=2)) * rstd * rstd / D
        store_matrix(E, e_carry, t, T, 0, N, N, N + M, NP)
        store_matrix(E, e_write, t, T, N, M, N, N + M, MP)
    if not FEW:
        store_matrix(parked, carry, own_t, BT, 0, N, N, N, NP)
        tl.debug_barrier()  # other threads read it
    for start in range(0, D, BD):
        c = start + tl.arange(0, BD)
        g = load_rows(G, t, T, c, N, D, NP)
        g_h = tl.zeros((BT, NP, BD), tl.float32)
        if DYNAMIC:
            g_h += spread(e_write, load_V(V, c, N, M, D, MP), MANY, PREC)
            g_h -= pull[:, :, None] * load_rows(H, t, T, c, N, D, NP)
        if FEW:
            g_h += unmix(carry, g, MANY, PREC)
            if DYNAMIC:
                g_h += spread(e_carry, load_V(V, c, 0, N, D, NP), MANY, PREC)
        else:
            for k in tl.range(0, N, 16, num_stages=1):
                part = load_matrix(parked, own_t, BT, k, N - k, N, N, NP, 16)
                g_h += unmix(part, load_rows(G, t, T, c, N, D, 16, k), MANY, PREC)
                if DYNAMIC:
                    e_part = load_matrix(E, t, T, k, N - k, N, N + M, NP, 16)
                    g_h += spread(e_part, load_V(V, c, k, N - k, D, 16), MANY, PREC)
        g_z = mix(write, g, MANY, PREC)
        tl.debug_barrier()  # where G_H is G: every thread has read before one writes
        store_rows(G_H, g_h, t, T, c, N, D, NP)
        store_rows(G_Z, g_z, t, T, c, M, D, MP)
    return carry_sum, carry_tanh_sum, write_sum, write_tanh_sum


@triton.jit
def store_depth_partial(
    own, carry, carry_tanh, write, write_tanh, M: tl.constexpr, N: tl.constexpr, DYNAMIC: tl.constexpr
):
    """Sums of one program: [2, n, n+m], of E and E ∘ tanh, columns of Â before those of Bᵀ."""
    if carry.shape[0] > 16:
        return  # they are there
    store_partial(own, carry, 0, N, N, N + M)
    store_partial(own, write, N, N, M, N + M)
    if DYNAMIC:
        store_partial(own + N * (N + M), carry_tanh, 0, N, N, N + M)
        store_partial(own + N * (N + M), write_tanh, N, N, M, N + M)


@triton.jit
def depth_backward_kernel(
    H, Z, G, G_H, G_Z, E, partial, V, A, B, S_alpha, S_beta, T, eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, MANY: tl.constexpr, PREC: tl.constexpr, DYNAMIC: tl.constexpr,
):  # fmt: skip
    """Program p takes blocks p, p + P, …, and writes its sums over tokens to partial[p]."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    carry, carry_tanh = tl.zeros((NP, NP), tl.float32), tl.zeros((NP, NP), tl.float32)
    write, write_tanh = tl.zeros((NP, MP), tl.float32), tl.zeros((NP, MP), tl.float32)
    own = partial + program * own_size(M, N, NP, BT)
    for block in range(program, tl.cdiv(T, BT), programs):
        carry, carry_tanh, write, write_tanh = depth_backward_block(
            H, Z, G, G_H, G_Z, E, own, tokens(block, BT), T, V, A, B, S_alpha, S_beta, eps,
            carry, carry_tanh, write, write_tanh, M, N, D, MP, NP, BT, BD, MANY, PREC, DYNAMIC,
        )  # fmt: skip
    store_depth_partial(own, carry, carry_tanh, write, write_tanh, M, N, DYNAMIC)
