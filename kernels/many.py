"""The kernels for more than 8 slots of bfloat16: one token at a time, its matrices whole, every product on bfloat16
tensor cores. What they compute is described in width.py, depth.py and step.py, formula by formula.

    rows      X [RP, BD]   of a state, of x or of z: BD of the d_b columns, bfloat16 as they lie in memory
    matrix    C [NP, KP]   of the token, in float32; slots first. Read and written matrices, [n, m], and Â, [n, n]
    V         [K, 2, d_b]  see projections.py: every row in two parts

n and m are filled up with zeros to NP, a power of two, and MP, at least 16, which is what `tl.dot` takes. A product has
the state as it is, with no conversion on the way from memory to the tensor core. Of a factor in float32 it takes two
parts of 8 bits each, which makes some 16; of ∂L/∂q, which is kept in bfloat16 for the weights' gradients, one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from vwn_ref.kernels.tiles import add_product, load_parameter

# ------------------------------------------------------------------------------------------------ loads and stores


@triton.jit
def place(c, R: tl.constexpr, D: tl.constexpr, RP: tl.constexpr):
    """Offsets of the columns `c` in a contiguous [R, D], and where they lie inside: [RP, BD] both."""
    r = tl.arange(0, RP)[:, None]
    return r * D + c[None, :], (r < R) & (c[None, :] < D)


@triton.jit
def load_rows(pointer, c, R: tl.constexpr, D: tl.constexpr, RP: tl.constexpr):
    """X [RP, BD], columns `c` of a contiguous [R, D]."""
    offsets, inside = place(c, R, D, RP)
    return tl.load(pointer + offsets, mask=inside, other=0.0)


@triton.jit
def store_rows(pointer, X, c, R: tl.constexpr, D: tl.constexpr, RP: tl.constexpr):
    """The inverse; rounds to the type of the memory."""
    offsets, inside = place(c, R, D, RP)
    tl.store(pointer + offsets, X.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def load_V(V, part: tl.constexpr, c, row, K: tl.constexpr, D: tl.constexpr, KP: tl.constexpr):
    """One part of K rows of V from `row` on: [KP, BD]."""
    k = tl.arange(0, KP)[:, None]
    V += (2 * row + part) * D
    return tl.load(V + k * (2 * D) + c[None, :], mask=(k < K) & (c[None, :] < D), other=0.0)


@triton.jit
def store_matrix(pointer, C, column, R: tl.constexpr, K: tl.constexpr, stride: tl.constexpr):
    """C into columns `column` … of a contiguous [R, stride]."""
    r, k = tl.arange(0, C.shape[0])[:, None], tl.arange(0, C.shape[1])[None, :]
    tl.store(pointer + r * stride + column + k, C.to(pointer.dtype.element_ty), mask=(r < R) & (k < K))


@triton.jit
def add_matrix(pointer, C, column, R: tl.constexpr, K: tl.constexpr, stride: tl.constexpr):
    """Add C there, in memory that no other program touches: sums of all tokens would not fit the registers."""
    r, k = tl.arange(0, C.shape[0])[:, None], tl.arange(0, C.shape[1])[None, :]
    places, inside = pointer + r * stride + column + k, (r < R) & (k < K)
    before = tl.load(places, mask=inside, other=0.0)
    tl.debug_barrier()  # threads may hold copies of an element: all have read before one writes
    tl.store(places, before + C, mask=inside)
    tl.debug_barrier()


# ---------------------------------------------------------------------------------------------------- products


@triton.jit
def product(X, Y):
    """X Y."""
    return add_product(tl.zeros((X.shape[0], Y.shape[1]), tl.float32), X, Y)


@triton.jit
def project(total, h, V, c, row, K: tl.constexpr, D: tl.constexpr):
    """total + h Vᵀ, the columns `c` of K rows of V: [NP, KP]."""
    KP: tl.constexpr = total.shape[1]
    total = add_product(total, h, tl.trans(load_V(V, 1, c, row, K, D, KP)))
    return add_product(total, h, tl.trans(load_V(V, 0, c, row, K, D, KP)))


@triton.jit
def spread(total, e, V, c, row, K: tl.constexpr, D: tl.constexpr):
    """total + e V: [NP, BD]. What `project` does to gradients."""
    KP: tl.constexpr = e.shape[1]
    total = add_product(total, e, load_V(V, 1, c, row, K, D, KP))
    return add_product(total, e, load_V(V, 0, c, row, K, D, KP))


@triton.jit
def diagonal(C):
    """C[i, i]."""
    i = tl.arange(0, C.shape[0])
    return tl.sum(tl.where(i[:, None] == i[None, :], C, 0.0), axis=1)


@triton.jit
def squares(x):
    """Σ x² of each row."""
    x = x.to(tl.float32)
    return tl.sum(x * x, axis=1)


# ------------------------------------------------------------------------------------------------- coefficients


@triton.jit
def quick_tanh(x):
    """To 2e-7, not relatively, and 0 of 0: a third of the instructions that `tiles.tanh` takes."""
    return 1.0 - tl.fdiv(2.0, 1.0 + tl.exp2(x * 2.8853900817779268))  # 2 / ln 2


@triton.jit
def inverse_root(total, count, eps):
    """1/√(total/count + ε), and 0 where both are."""
    mean = total / count + eps
    return tl.where(mean > 0.0, 1.0 / tl.sqrt(tl.where(mean > 0.0, mean, 1.0)), 0.0)


@triton.jit
def coefficient(p, static, scale, DYNAMIC: tl.constexpr):
    """scale ∘ tanh(p) + static, and that tanh."""
    if DYNAMIC:
        tanh_q = quick_tanh(p)
        return scale * tanh_q + static, tanh_q
    else:
        return static, static


@triton.jit
def write_coefficients(
    p_carry, p_write, rstd, A, B, S_alpha, S_beta,
    M: tl.constexpr, N: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, DYNAMIC: tl.constexpr,
):  # fmt: skip
    """Â [NP, NP], its tanh and its S; and those of Bᵀ [NP, MP]; from the projections p."""
    static_carry = load_parameter(A, M, N, N, M + N, 1, NP, NP)
    static_write = load_parameter(B, 0, N, M, 1, N, NP, MP)  # B is [m, n]: strides swapped
    scale_carry, scale_write = static_carry, static_write
    if DYNAMIC:
        scale_carry = load_parameter(S_alpha, M, N, N, M + N, 1, NP, NP)
        scale_write = load_parameter(S_beta, 0, N, M, 1, N, NP, MP)
    carry, tanh_carry = coefficient(p_carry * rstd[:, None], static_carry, scale_carry, DYNAMIC)
    write, tanh_write = coefficient(p_write * rstd[:, None], static_write, scale_write, DYNAMIC)
    return carry, tanh_carry, scale_carry, write, tanh_write, scale_write


@triton.jit
def read_matrix(
    H, V, A, S_alpha, eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    DYNAMIC: tl.constexpr,
):  # fmt: skip
    """Å [NP, MP], its tanh, its projections, rstd of the slots [NP], and S_α."""
    p = tl.zeros((NP, MP), tl.float32)
    square = tl.zeros((NP,), tl.float32)
    static = load_parameter(A, 0, N, M, M + N, 1, NP, MP)
    scale = static
    if DYNAMIC:
        scale = load_parameter(S_alpha, 0, N, M, M + N, 1, NP, MP)
        for start in range(0, D, BD):
            c = start + tl.arange(0, BD)
            h = load_rows(H, c, N, D, NP)
            square += squares(h)
            p = project(p, h, V, c, 0, M, D)
    rstd = inverse_root(square, D, eps)
    C, tanh_q = coefficient(p * rstd[:, None], static, scale, DYNAMIC)
    return C, tanh_q, p, rstd, scale


# ------------------------------------------------------------------------------------------------------ forward


@triton.jit
def read_token(
    H, X, V, A, S_alpha, norm_gain, eps, norm_eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    DYNAMIC: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """x, or its norm y, of a token."""
    C, _, _, _, _ = read_matrix(H, V, A, S_alpha, eps, M, N, D, MP, NP, BD, DYNAMIC)
    Ct = tl.trans(C)
    rstd_x = 1.0
    if NORM:
        square = tl.zeros((MP,), tl.float32)
        for start in range(0, D, BD):
            square += squares(product(Ct, load_rows(H, start + tl.arange(0, BD), N, D, NP)))
        rstd_x = inverse_root(tl.sum(square), M * D, norm_eps)
    for start in range(0, D, BD):
        c = start + tl.arange(0, BD)
        x = product(Ct, load_rows(H, c, N, D, NP))
        if NORM:
            x = x * rstd_x * load_rows(norm_gain, c, M, D, MP).to(tl.float32)
        store_rows(X, x, c, M, D, MP)


@triton.jit
def write_token(
    H, Z, OUT, V, A, B, S_alpha, S_beta, eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    DYNAMIC: tl.constexpr,
):  # fmt: skip
    """The new state of a token."""
    p_carry = tl.zeros((NP, NP), tl.float32)
    p_write = tl.zeros((NP, MP), tl.float32)
    square = tl.zeros((NP,), tl.float32)
    if DYNAMIC:
        for start in range(0, D, BD):
            c = start + tl.arange(0, BD)
            h = load_rows(H, c, N, D, NP)
            square += squares(h)
            p_carry = project(p_carry, h, V, c, 0, N, D)
            p_write = project(p_write, h, V, c, N, M, D)
    rstd = inverse_root(square, D, eps)
    carry, _, _, write, _, _ = write_coefficients(p_carry, p_write, rstd, A, B, S_alpha, S_beta, M, N, MP, NP, DYNAMIC)
    carry_t = tl.trans(carry)
    for start in range(0, D, BD):
        c = start + tl.arange(0, BD)
        out = product(carry_t, load_rows(H, c, N, D, NP))
        out = add_product(out, write, load_rows(Z, c, M, D, MP))
        store_rows(OUT, out, c, N, D, NP)


@triton.jit(do_not_specialize=["T"])
def many_width_kernel(
    H, X, V, A, S_alpha, norm_gain, T, eps, norm_eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    DYNAMIC: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """x of every token."""
    for token in tl.range(tl.program_id(0), T, tl.num_programs(0), disable_licm=True):
        t = tl.cast(token, tl.int64)
        read_token(
            H + t * (N * D), X + t * (M * D), V, A, S_alpha, norm_gain, eps, norm_eps,
            M, N, D, MP, NP, BD, DYNAMIC, NORM,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def many_depth_kernel(
    H, Z, OUT, V, A, B, S_alpha, S_beta, T, eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    DYNAMIC: tl.constexpr,
):  # fmt: skip
    """The new state of every token."""
    for token in tl.range(tl.program_id(0), T, tl.num_programs(0), disable_licm=True):
        t = tl.cast(token, tl.int64)
        write_token(
            H + t * (N * D), Z + t * (M * D), OUT + t * (N * D), V, A, B, S_alpha, S_beta, eps,
            M, N, D, MP, NP, BD, DYNAMIC,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def many_step_kernel(
    H, Z, OUT, X, V, A, B, S_alpha, S_beta, next_A, next_S, norm_gain, T, eps, next_eps, norm_eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    DYNAMIC: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Both, of one token after the other."""
    for token in tl.range(tl.program_id(0), T, tl.num_programs(0), disable_licm=True):
        t = tl.cast(token, tl.int64)
        write_token(
            H + t * (N * D), Z + t * (M * D), OUT + t * (N * D), V, A, B, S_alpha, S_beta, eps,
            M, N, D, MP, NP, BD, DYNAMIC,
        )  # fmt: skip
        tl.debug_barrier()  # the rows that other threads of this program wrote are read from here on
        read_token(
            OUT + t * (N * D), X + t * (M * D), V + (N + M) * 2 * D, next_A, next_S, norm_gain, next_eps, norm_eps,
            M, N, D, MP, NP, BD, DYNAMIC, NORM,
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------- backward


@triton.jit
def coefficient_backward(
    p, dC, rstd, static, scale, first, row_stride, column_stride, E, own, own_tanh, column,
    N: tl.constexpr, K: tl.constexpr, stride: tl.constexpr, DYNAMIC: tl.constexpr,
):  # fmt: skip
    """From p and ∂L/∂C: C, rstd · e and Σ_k(e ∘ p). e goes to E, and ∂L/∂C and ∂L/∂C ∘ tanh are added to `own` and
    `own_tanh`, columns `column` … of [N, stride]."""
    NP: tl.constexpr = dC.shape[0]
    KP: tl.constexpr = dC.shape[1]
    add_matrix(own, dC, column, N, K, stride)
    if DYNAMIC:
        tanh_q = quick_tanh(p * rstd[:, None])
        add_matrix(own_tanh, dC * tanh_q, column, N, K, stride)
        S = load_parameter(scale, first, N, K, row_stride, column_stride, NP, KP)
        e = dC * S * (1.0 - tanh_q * tanh_q) * rstd[:, None]
        pull = tl.sum(e * p, axis=1)
        e = e.to(E.dtype.element_ty)
        store_matrix(E, e, column, N, K, stride)
        tl.debug_barrier()
        C = S * tanh_q + load_parameter(static, first, N, K, row_stride, column_stride, NP, KP)
        return C, e.to(tl.bfloat16), pull
    else:
        return load_parameter(static, first, N, K, row_stride, column_stride, NP, KP), dC, rstd


@triton.jit
def read_backward(
    H, G, G_add, G_H, E, own, norm_partial, V, A, S_alpha, norm_gain, eps, norm_eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    DYNAMIC: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """g_H′ (plus G_add, what else flows into H′) and rstd · e of a token; ∂L/∂Å and ∂L/∂Å ∘ tanh are added to `own`."""
    p = tl.zeros((NP, MP), tl.float32)
    dC = tl.zeros((NP, MP), tl.float32)
    gram = tl.zeros((NP, NP), tl.float32)  # H′ H′ᵀ
    for start in range(0, D, BD):
        c = start + tl.arange(0, BD)
        h = load_rows(H, c, N, D, NP)
        g = load_rows(G, c, M, D, MP)
        if NORM:
            g = g.to(tl.float32) * load_rows(norm_gain, c, M, D, MP).to(tl.float32)
        dC = add_product(dC, h, tl.trans(g))
        gram = add_product(gram, h, tl.trans(h))
        if DYNAMIC:
            p = project(p, h, V, c, 0, M, D)
    rstd = inverse_root(diagonal(gram), D, eps)
    C = load_parameter(A, 0, N, M, M + N, 1, NP, MP)
    if DYNAMIC:
        scale = load_parameter(S_alpha, 0, N, M, M + N, 1, NP, MP)
        tanh_q = quick_tanh(p * rstd[:, None])
        C += scale * tanh_q
    Ct = tl.trans(C)
    if NORM:
        Hx = product(gram, C)  # = H′ xᵀ
        rstd_x = inverse_root(tl.sum(C * Hx), M * D, norm_eps)
        pull_x = rstd_x * rstd_x * rstd_x * tl.sum(C * dC) / (M * D)
        dC = rstd_x * dC - pull_x * Hx
    add_matrix(own, dC, 0, N, M, M)
    if DYNAMIC:
        add_matrix(own + N * M, dC * tanh_q, 0, N, M, M)
        e = dC * scale * (1.0 - tanh_q * tanh_q) * rstd[:, None]
        pull = tl.sum(e * p, axis=1) * rstd * rstd / D
        e = e.to(E.dtype.element_ty)
        store_matrix(E, e, 0, N, M, M)
    for start in range(0, D, BD):
        c = start + tl.arange(0, BD)
        h = load_rows(H, c, N, D, NP)
        g = load_rows(G, c, M, D, MP)
        if NORM:
            x = product(Ct, h)
            g = g.to(tl.float32)
            add_matrix(norm_partial + start, g * x * rstd_x, 0, M, D - start, D)
            g = rstd_x * g * load_rows(norm_gain, c, M, D, MP).to(tl.float32) - pull_x * x
        g_h = product(C, g)
        if DYNAMIC:
            g_h = spread(g_h, e.to(tl.bfloat16), V, c, 0, M, D) - pull[:, None] * h.to(tl.float32)
        if ADD:
            g_h += load_rows(G_add, c, N, D, NP).to(tl.float32)
        store_rows(G_H, g_h, c, N, D, NP)


@triton.jit
def write_backward(
    H, Z, G, G_H, G_Z, E, own, V, A, B, S_alpha, S_beta, eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    DYNAMIC: tl.constexpr,
):  # fmt: skip
    """g_H′, g_z and rstd · e of a token; ∂L/∂C and ∂L/∂C ∘ tanh, of Â and of Bᵀ, are added to `own`."""
    K: tl.constexpr = N + M
    d_carry = tl.zeros((NP, NP), tl.float32)
    d_write = tl.zeros((NP, MP), tl.float32)
    p_carry = tl.zeros((NP, NP), tl.float32)
    p_write = tl.zeros((NP, MP), tl.float32)
    square = tl.zeros((NP,), tl.float32)
    for start in range(0, D, BD):
        c = start + tl.arange(0, BD)
        h = load_rows(H, c, N, D, NP)
        g = load_rows(G, c, N, D, NP)
        if DYNAMIC:
            square += squares(h)
            p_carry = project(p_carry, h, V, c, 0, N, D)
            p_write = project(p_write, h, V, c, N, M, D)
        d_carry = add_product(d_carry, h, tl.trans(g))
        d_write = add_product(d_write, g, tl.trans(load_rows(Z, c, M, D, MP)))
    rstd = inverse_root(square, D, eps)
    own_tanh = own + N * K
    write, e_write, pull = coefficient_backward(
        p_write, d_write, rstd, B, S_beta, 0, 1, N, E, own, own_tanh, N, N, M, K, DYNAMIC
    )  # fmt: skip
    carry, e_carry, pull_carry = coefficient_backward(
        p_carry, d_carry, rstd, A, S_alpha, M, M + N, 1, E, own, own_tanh, 0, N, N, K, DYNAMIC
    )  # fmt: skip
    pull = (pull + pull_carry) * rstd * rstd / D
    write_t = tl.trans(write)
    for start in range(0, D, BD):
        c = start + tl.arange(0, BD)
        g = load_rows(G, c, N, D, NP)
        g_h = product(carry, g)
        if DYNAMIC:
            g_h = spread(g_h, e_carry, V, c, 0, N, D)
            g_h = spread(g_h, e_write, V, c, N, M, D)
            g_h -= pull[:, None] * load_rows(H, c, N, D, NP).to(tl.float32)
        g_z = product(write_t, g)
        store_rows(G_H, g_h, c, N, D, NP)
        store_rows(G_Z, g_z, c, M, D, MP)


@triton.jit(do_not_specialize=["T"])
def many_width_backward_kernel(
    H, G, G_add, G_H, E, partial, norm_partial, V, A, S_alpha, norm_gain, T, eps, norm_eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    DYNAMIC: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Program p adds its sums over tokens up in partial[p]: [2, n, m], zeros before."""
    program = tl.program_id(0)
    for token in tl.range(program, T, tl.num_programs(0), disable_licm=True):
        t = tl.cast(token, tl.int64)
        read_backward(
            H + t * (N * D), G + t * (M * D), G_add + t * (N * D), G_H + t * (N * D), E + t * (N * M),
            partial + program * (2 * N * M), norm_partial + program * (M * D), V, A, S_alpha, norm_gain, eps, norm_eps,
            M, N, D, MP, NP, BD, DYNAMIC, NORM, ADD,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def many_depth_backward_kernel(
    H, Z, G, G_H, G_Z, E, partial, V, A, B, S_alpha, S_beta, T, eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    DYNAMIC: tl.constexpr,
):  # fmt: skip
    """The same with [2, n, n+m]: columns of Â before those of Bᵀ."""
    program = tl.program_id(0)
    for token in tl.range(program, T, tl.num_programs(0), disable_licm=True):
        t = tl.cast(token, tl.int64)
        write_backward(
            H + t * (N * D), Z + t * (M * D), G + t * (N * D), G_H + t * (N * D), G_Z + t * (M * D),
            E + t * (N * (N + M)), partial + program * (2 * N * (N + M)), V, A, B, S_alpha, S_beta, eps,
            M, N, D, MP, NP, BD, DYNAMIC,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def many_step_backward_kernel(
    H, Z, OUT, G_OUT, G_X, G_H, G_Z, E, next_E, partial, next_partial, norm_partial, between, V,
    A, B, S_alpha, S_beta, next_A, next_S, norm_gain, T, eps, next_eps, norm_eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    DYNAMIC: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """The gradient of the state between goes from one half to the other through [n, d_b] of memory of the program's
    own, which stays in the cache."""
    program = tl.program_id(0)
    between += tl.cast(program, tl.int64) * (N * D)
    for token in tl.range(program, T, tl.num_programs(0), disable_licm=True):
        t = tl.cast(token, tl.int64)
        read_backward(
            OUT + t * (N * D), G_X + t * (M * D), G_OUT + t * (N * D), between, next_E + t * (N * M),
            next_partial + program * (2 * N * M), norm_partial + program * (M * D), V + (N + M) * 2 * D, next_A, next_S,
            norm_gain, next_eps, norm_eps, M, N, D, MP, NP, BD, DYNAMIC, NORM, True,
        )  # fmt: skip
        tl.debug_barrier()  # what other threads wrote is read from here on
        write_backward(
            H + t * (N * D), Z + t * (M * D), between, G_H + t * (N * D), G_Z + t * (M * D), E + t * (N * (N + M)),
            partial + program * (2 * N * (N + M)), V, A, B, S_alpha, S_beta, eps, M, N, D, MP, NP, BD, DYNAMIC,
        )  # fmt: skip
        tl.debug_barrier()  # and written again
