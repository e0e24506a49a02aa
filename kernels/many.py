"""The kernels for more than 4 slots of bfloat16: a token's matrices whole, and every product but one, in
`read_backward`, on bfloat16 tensor cores. What they compute is described in width.py, depth.py and step.py.

    rows      X [RP, BD]   of a state, of x or of z: BD of the d_b columns, bfloat16 as they lie in memory
    matrix    C [NP, KP]   in float32, slots first: Å and Bᵀ, [n, m], and Â, [n, n]; their projections and gradients
    V         [K, 2, d_b]  see projections.py: every row in two parts

A tensor core takes 16 rows at least. More than 8 slots are filled up to NP, a power of two, and m to MP, 16 or more. Up
to 8 slots two tokens share a tile (PER = 2): rows of one above those of the other, 8 for each, and matrices on the
diagonal, 0 beside it. Products of rows by rows give what one token has to do with the other as well; it is never
stored, and every factor S or A that it meets is 0 there. (0 · NaN is NaN: what is not finite reaches both tokens.)

A product takes a state as it is, with no conversion on the way from memory to the tensor core. A factor in float32 is
taken in two parts of 8 bits each, which keeps some 16 (two such factors take three products); e = rstd · ∂L/∂q, which
is kept in bfloat16 for the weights' gradients where n > 8, in one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from vwn_ref.kernels.tiles import add_product

# ------------------------------------------------------------------------------------------------ loads and stores


@triton.jit
def of_token(RP: tl.constexpr, PER: tl.constexpr):
    """Of each of RP rows the token that it belongs to, 0 … PER − 1, and which of its rows it is."""
    r = tl.arange(0, RP)
    if PER == 1:
        return tl.zeros_like(r), r
    else:
        return r // (RP // PER), r % (RP // PER)


@triton.jit
def place(c, left, R: tl.constexpr, D: tl.constexpr, RP: tl.constexpr, PER: tl.constexpr):
    """Offsets of the columns `c` in a contiguous [PER, R, D], and where they lie inside: [RP, BD] both. `left`: so many
    tokens there are."""
    token, r = of_token(RP, PER)
    inside = r < R
    if PER > 1:
        r += token * R
        inside &= token < left
    return (r * D)[:, None] + c[None, :], inside[:, None] & (c[None, :] < D)


@triton.jit
def load_rows(pointer, c, left, R: tl.constexpr, D: tl.constexpr, RP: tl.constexpr, PER: tl.constexpr):
    """X [RP, BD]."""
    offsets, inside = place(c, left, R, D, RP, PER)
    return tl.load(pointer + offsets, mask=inside, other=0.0)


@triton.jit
def store_rows(pointer, X, c, left, R: tl.constexpr, D: tl.constexpr, RP: tl.constexpr, PER: tl.constexpr):
    """The inverse; rounds to the type of the memory."""
    offsets, inside = place(c, left, R, D, RP, PER)
    tl.store(pointer + offsets, X.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def add_rows(pointer, X, c, R: tl.constexpr, D: tl.constexpr, RP: tl.constexpr, PER: tl.constexpr):
    """Add the rows of all tokens to a contiguous [R, D], in memory that no other program touches."""
    if PER > 1:
        X = tl.sum(tl.reshape(X, (PER, RP // PER, X.shape[1])), axis=0)
    offsets, inside = place(c, 1, R, D, RP // PER, 1)
    before = tl.load(pointer + offsets, mask=inside, other=0.0)
    tl.debug_barrier()  # threads may hold copies of an element: all have read before one writes
    tl.store(pointer + offsets, before + X, mask=inside)
    tl.debug_barrier()


@triton.jit
def load_gain(pointer, c, R: tl.constexpr, D: tl.constexpr, RP: tl.constexpr, PER: tl.constexpr):
    """[RP, BD] in float32 of a contiguous [R, D], the same for every token."""
    _, r = of_token(RP, PER)
    inside = (r < R)[:, None] & (c[None, :] < D)
    return tl.load(pointer + (r * D)[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_V(
    V, part: tl.constexpr, c, row, K: tl.constexpr, D: tl.constexpr, KP: tl.constexpr, PER: tl.constexpr
):  # fmt: skip
    """One part of K rows of V from `row` on, for every token: [KP, BD]."""
    _, k = of_token(KP, PER)
    V += (2 * row + part) * D
    return tl.load(V + (k * (2 * D))[:, None] + c[None, :], mask=(k < K)[:, None] & (c[None, :] < D), other=0.0)


@triton.jit
def diagonal_place(
    row_stride, column_stride, size, R: tl.constexpr, K: tl.constexpr, RP: tl.constexpr, KP: tl.constexpr,
    PER: tl.constexpr,
):  # fmt: skip
    """Offsets of the matrices of PER tokens, [R, K] each and `size` numbers apart, and where there is one: [RP, KP]."""
    token, r = of_token(RP, PER)
    other, k = of_token(KP, PER)
    inside = (r < R)[:, None] & (k < K)[None, :]
    r *= row_stride
    if PER > 1:
        r += token * size
        inside &= token[:, None] == other[None, :]
    return r[:, None] + (k * column_stride)[None, :], inside


@triton.jit
def load_parameter(
    pointer, row_stride, column_stride, R: tl.constexpr, K: tl.constexpr, RP: tl.constexpr, KP: tl.constexpr,
    PER: tl.constexpr,
):  # fmt: skip
    """[RP, KP] of a parameter [R, K], for every token."""
    offsets, inside = diagonal_place(row_stride, column_stride, 0, R, K, RP, KP, PER)
    return tl.load(pointer + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_matrix(pointer, C, left, R: tl.constexpr, K: tl.constexpr, stride: tl.constexpr, PER: tl.constexpr):
    """C into the first K columns of a contiguous [PER, R, stride]."""
    offsets, inside = diagonal_place(stride, 1, R * stride, R, K, C.shape[0], C.shape[1], PER)
    if PER > 1:
        token, _ = of_token(C.shape[0], PER)
        inside &= (token < left)[:, None]
    tl.store(pointer + offsets, C.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def add_matrix(pointer, C, size, R: tl.constexpr, K: tl.constexpr, stride: tl.constexpr, PER: tl.constexpr):
    """Add C there, every token's `size` numbers from the last one's, in memory that no other program touches: sums of
    all tokens would not fit the registers."""
    offsets, inside = diagonal_place(stride, 1, size, R, K, C.shape[0], C.shape[1], PER)
    before = tl.load(pointer + offsets, mask=inside, other=0.0)
    tl.debug_barrier()  # threads may hold copies of an element: all have read before one writes
    tl.store(pointer + offsets, before + C, mask=inside)
    tl.debug_barrier()


# ----------------------------------------------------------------------------------------------- products and sums


@triton.jit
def product(X, Y):
    """X Y."""
    return add_product(tl.zeros((X.shape[0], Y.shape[1]), tl.float32), X, Y)


@triton.jit
def project(total, h, V, c, row, K: tl.constexpr, D: tl.constexpr, PER: tl.constexpr):
    """total + h Vᵀ, the columns `c` of K rows of V: [NP, KP]."""
    KP: tl.constexpr = total.shape[1]
    total = add_product(total, h, tl.trans(load_V(V, 1, c, row, K, D, KP, PER)))
    return add_product(total, h, tl.trans(load_V(V, 0, c, row, K, D, KP, PER)))


@triton.jit
def spread(total, e, V, c, row, K: tl.constexpr, D: tl.constexpr, PER: tl.constexpr):
    """total + e V: [NP, BD]. What `project` does to gradients."""
    KP: tl.constexpr = e.shape[1]
    total = add_product(total, e, load_V(V, 1, c, row, K, D, KP, PER))
    return add_product(total, e, load_V(V, 0, c, row, K, D, KP, PER))


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


@triton.jit
def token_sum(x, PER: tl.constexpr):
    """[KP] -> the sum over all that belongs to the same token, for each."""
    if PER == 1:
        return tl.broadcast_to(tl.sum(x), (x.shape[0],))
    own = tl.sum(tl.reshape(x, (PER, x.shape[0] // PER)), axis=1)
    return tl.reshape(tl.broadcast_to(own[:, None], (PER, x.shape[0] // PER)), (x.shape[0],))


# ------------------------------------------------------------------------------------------------- coefficients


@triton.jit
def quick_tanh(x):
    """To 2e-7, not relatively, and 0 of 0: a third of the instructions that `tiles.tanh` takes."""
    return 1.0 - tl.fdiv(2.0, 1.0 + tl.exp2(x * 2.8853900817779268))  # 2 / ln 2


@triton.jit
def inverse_root(total, count, eps):
    """1/√(total/count + ε), and 0 where both are 0."""
    mean = total / count + eps
    return tl.where(mean > 0.0, 1.0 / tl.sqrt(tl.where(mean > 0.0, mean, 1.0)), 0.0)


@triton.jit
def coefficients(
    p, rstd, static, scale, row_stride, column_stride, N: tl.constexpr, K: tl.constexpr, PER: tl.constexpr,
    DYNAMIC: tl.constexpr,
):  # fmt: skip
    """C = S ∘ tanh(rstd · p) + A, Eqs. (13) and (14), [n, k] of each token; `static` and `scale` point to A and S."""
    C = load_parameter(static, row_stride, column_stride, N, K, p.shape[0], p.shape[1], PER)
    if DYNAMIC:
        S = load_parameter(scale, row_stride, column_stride, N, K, p.shape[0], p.shape[1], PER)
        C += S * quick_tanh(p * rstd[:, None])
    return C


# ------------------------------------------------------------------------------------------------------ forward


@triton.jit
def read_tokens(
    H, X, left, V, A, S_alpha, norm_gain, eps, norm_eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    PER: tl.constexpr, DYNAMIC: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """x, or its norm y."""
    p = tl.zeros((NP, MP), tl.float32)
    square = tl.zeros((NP,), tl.float32)
    if DYNAMIC:
        for start in range(0, D, BD):
            c = start + tl.arange(0, BD)
            h = load_rows(H, c, left, N, D, NP, PER)
            square += squares(h)
            p = project(p, h, V, c, 0, M, D, PER)
    rstd = inverse_root(square, D, eps)
    Ct = tl.trans(coefficients(p, rstd, A, S_alpha, M + N, 1, N, M, PER, DYNAMIC))
    if NORM:
        square_x = tl.zeros((MP,), tl.float32)
        for start in range(0, D, BD):
            square_x += squares(product(Ct, load_rows(H, start + tl.arange(0, BD), left, N, D, NP, PER)))
        rstd_x = inverse_root(token_sum(square_x, PER), M * D, norm_eps)
    for start in range(0, D, BD):
        c = start + tl.arange(0, BD)
        x = product(Ct, load_rows(H, c, left, N, D, NP, PER))
        if NORM:
            x = x * rstd_x[:, None] * load_gain(norm_gain, c, M, D, MP, PER)
        store_rows(X, x, c, left, M, D, MP, PER)


@triton.jit
def write_tokens(
    H, Z, OUT, left, V, A, B, S_alpha, S_beta, eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    PER: tl.constexpr, DYNAMIC: tl.constexpr,
):  # fmt: skip
    """The new state."""
    p_carry = tl.zeros((NP, NP), tl.float32)
    p_write = tl.zeros((NP, MP), tl.float32)
    square = tl.zeros((NP,), tl.float32)
    if DYNAMIC:
        for start in range(0, D, BD):
            c = start + tl.arange(0, BD)
            h = load_rows(H, c, left, N, D, NP, PER)
            square += squares(h)
            p_carry = project(p_carry, h, V, c, 0, N, D, PER)
            p_write = project(p_write, h, V, c, N, M, D, PER)
    rstd = inverse_root(square, D, eps)
    write = coefficients(p_write, rstd, B, S_beta, 1, N, N, M, PER, DYNAMIC)  # B is [m, n], so transposed
    carry_t = tl.trans(coefficients(p_carry, rstd, A + M, S_alpha + M, M + N, 1, N, N, PER, DYNAMIC))
    for start in range(0, D, BD):
        c = start + tl.arange(0, BD)
        out = product(carry_t, load_rows(H, c, left, N, D, NP, PER))
        out = add_product(out, write, load_rows(Z, c, left, M, D, MP, PER))
        store_rows(OUT, out, c, left, N, D, NP, PER)


@triton.jit(do_not_specialize=["T"])
def many_width_kernel(
    H, X, V, A, S_alpha, norm_gain, T, eps, norm_eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    PER: tl.constexpr, DYNAMIC: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """x of every token."""
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, PER), tl.num_programs(0), disable_licm=True):
        t = tl.cast(tile, tl.int64) * PER
        left = T - tile * PER
        read_tokens(
            H + t * (N * D), X + t * (M * D), left, V, A, S_alpha, norm_gain, eps, norm_eps,
            M, N, D, MP, NP, BD, PER, DYNAMIC, NORM,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def many_depth_kernel(
    H, Z, OUT, V, A, B, S_alpha, S_beta, T, eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    PER: tl.constexpr, DYNAMIC: tl.constexpr,
):  # fmt: skip
    """The new state of every token."""
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, PER), tl.num_programs(0), disable_licm=True):
        t = tl.cast(tile, tl.int64) * PER
        left = T - tile * PER
        write_tokens(
            H + t * (N * D), Z + t * (M * D), OUT + t * (N * D), left, V, A, B, S_alpha, S_beta, eps,
            M, N, D, MP, NP, BD, PER, DYNAMIC,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def many_step_kernel(
    H, Z, OUT, X, V, A, B, S_alpha, S_beta, next_A, next_S, norm_gain, T, eps, next_eps, norm_eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    PER: tl.constexpr, DYNAMIC: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Both, of one tile of tokens after the other."""
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, PER), tl.num_programs(0), disable_licm=True):
        t = tl.cast(tile, tl.int64) * PER
        left = T - tile * PER
        write_tokens(
            H + t * (N * D), Z + t * (M * D), OUT + t * (N * D), left, V, A, B, S_alpha, S_beta, eps,
            M, N, D, MP, NP, BD, PER, DYNAMIC,
        )  # fmt: skip
        tl.debug_barrier()  # the rows that other threads of this program wrote are read from here on
        read_tokens(
            OUT + t * (N * D), X + t * (M * D), left, V + (N + M) * 2 * D, next_A, next_S, norm_gain, next_eps,
            norm_eps, M, N, D, MP, NP, BD, PER, DYNAMIC, NORM,
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------- backward


@triton.jit
def coefficients_backward(
    p, dC, rstd, static, scale, row_stride, column_stride, E, own, own_tanh, size, left,
    N: tl.constexpr, K: tl.constexpr, stride: tl.constexpr, PER: tl.constexpr, DYNAMIC: tl.constexpr,
):  # fmt: skip
    """From p and ∂L/∂C, [n, k]: C, e = rstd · ∂L/∂q and Σ_k(e ∘ p). e goes to E, and ∂L/∂C and ∂L/∂C ∘ tanh are added
    to `own` and `own_tanh`: into the first K of `stride` columns each."""
    NP: tl.constexpr = dC.shape[0]
    KP: tl.constexpr = dC.shape[1]
    add_matrix(own, dC, size, N, K, stride, PER)
    if DYNAMIC:
        tanh_q = quick_tanh(p * rstd[:, None])
        add_matrix(own_tanh, dC * tanh_q, size, N, K, stride, PER)
        S = load_parameter(scale, row_stride, column_stride, N, K, NP, KP, PER)
        e = dC * S * (1.0 - tanh_q * tanh_q) * rstd[:, None]
        pull = tl.sum(e * p, axis=1)
        e = e.to(E.dtype.element_ty)
        store_matrix(E, e, left, N, K, stride, PER)
        C = S * tanh_q + load_parameter(static, row_stride, column_stride, N, K, NP, KP, PER)
        return C, e.to(tl.bfloat16), pull
    else:
        return load_parameter(static, row_stride, column_stride, N, K, NP, KP, PER), dC, rstd


@triton.jit
def read_backward(
    H, G, G_add, G_H, E, own, norm_own, left, V, A, S_alpha, norm_gain, eps, norm_eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    PER: tl.constexpr, PREC: tl.constexpr, DYNAMIC: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """g_H′ (plus G_add, what else flows into H′) and e; ∂L/∂Å and ∂L/∂Å ∘ tanh are added to `own`.

    With H′ H′ᵀ nothing of x is needed before Å is known: H′ xᵀ = (H′ H′ᵀ) Å, and Σ x² and Σ x ∘ g are the sums of
    Å ∘ (H′ xᵀ) and Å ∘ (H′ gᵀ).
    """
    p = tl.zeros((NP, MP), tl.float32)
    dC = tl.zeros((NP, MP), tl.float32)
    gram = tl.zeros((NP, NP), tl.float32)
    for start in range(0, D, BD):
        c = start + tl.arange(0, BD)
        h = load_rows(H, c, left, N, D, NP, PER)
        g = load_rows(G, c, left, M, D, MP, PER)
        if NORM:
            g = g.to(tl.float32) * load_gain(norm_gain, c, M, D, MP, PER)
        dC = add_product(dC, h, tl.trans(g))
        gram = add_product(gram, h, tl.trans(h))
        if DYNAMIC:
            p = project(p, h, V, c, 0, M, D, PER)
    rstd = inverse_root(diagonal(gram), D, eps)
    C = load_parameter(A, M + N, 1, N, M, NP, MP, PER)
    if DYNAMIC:
        S = load_parameter(S_alpha, M + N, 1, N, M, NP, MP, PER)
        tanh_q = quick_tanh(p * rstd[:, None])
        C += S * tanh_q
    Ct = tl.trans(C)
    if NORM:
        # Where x is a small difference of large slots, two parts of 8 bits would not do for its square
        Hx = tl.dot(gram, C, input_precision=PREC)
        rstd_x = inverse_root(token_sum(tl.sum(C * Hx, axis=0), PER), M * D, norm_eps)
        pull_x = rstd_x * rstd_x * rstd_x * token_sum(tl.sum(C * dC, axis=0), PER) / (M * D)
        dC = rstd_x[None, :] * dC - pull_x[None, :] * Hx
    add_matrix(own, dC, 2 * N * M, N, M, M, PER)
    if DYNAMIC:
        add_matrix(own + N * M, dC * tanh_q, 2 * N * M, N, M, M, PER)
        e = dC * S * (1.0 - tanh_q * tanh_q) * rstd[:, None]
        pull = tl.sum(e * p, axis=1) * rstd * rstd / D
        e = e.to(E.dtype.element_ty)
        store_matrix(E, e, left, N, M, M, PER)
    for start in range(0, D, BD):
        c = start + tl.arange(0, BD)
        h = load_rows(H, c, left, N, D, NP, PER)
        g = load_rows(G, c, left, M, D, MP, PER)
        if NORM:
            x = product(Ct, h)
            g = g.to(tl.float32)
            add_rows(norm_own, g * x * rstd_x[:, None], c, M, D, MP, PER)
            g = rstd_x[:, None] * g * load_gain(norm_gain, c, M, D, MP, PER) - pull_x[:, None] * x
        g_h = product(C, g)
        if DYNAMIC:
            g_h = spread(g_h, e.to(tl.bfloat16), V, c, 0, M, D, PER) - pull[:, None] * h.to(tl.float32)
        if ADD:
            g_h += load_rows(G_add, c, left, N, D, NP, PER).to(tl.float32)
        store_rows(G_H, g_h, c, left, N, D, NP, PER)


@triton.jit
def write_backward(
    H, Z, G, G_H, G_Z, E, own, left, V, A, B, S_alpha, S_beta, eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    PER: tl.constexpr, DYNAMIC: tl.constexpr,
):  # fmt: skip
    """g_H′, g_z and e; ∂L/∂C and ∂L/∂C ∘ tanh, of Â and of Bᵀ, are added to `own`."""
    K: tl.constexpr = N + M
    d_carry = tl.zeros((NP, NP), tl.float32)
    d_write = tl.zeros((NP, MP), tl.float32)
    p_carry = tl.zeros((NP, NP), tl.float32)
    p_write = tl.zeros((NP, MP), tl.float32)
    square = tl.zeros((NP,), tl.float32)
    for start in range(0, D, BD):
        c = start + tl.arange(0, BD)
        h = load_rows(H, c, left, N, D, NP, PER)
        g = load_rows(G, c, left, N, D, NP, PER)
        if DYNAMIC:
            square += squares(h)
            p_carry = project(p_carry, h, V, c, 0, N, D, PER)
            p_write = project(p_write, h, V, c, N, M, D, PER)
        d_carry = add_product(d_carry, h, tl.trans(g))
        d_write = add_product(d_write, g, tl.trans(load_rows(Z, c, left, M, D, MP, PER)))
    rstd = inverse_root(square, D, eps)
    own_tanh = own + N * K
    carry, e_carry, pull_carry = coefficients_backward(
        p_carry, d_carry, rstd, A + M, S_alpha + M, M + N, 1, E, own, own_tanh, 2 * N * K, left, N, N, K, PER, DYNAMIC
    )  # fmt: skip
    write, e_write, pull = coefficients_backward(
        p_write, d_write, rstd, B, S_beta, 1, N, E + N, own + N, own_tanh + N, 2 * N * K, left, N, M, K, PER, DYNAMIC
    )  # fmt: skip
    pull = (pull + pull_carry) * rstd * rstd / D
    write_t = tl.trans(write)
    for start in range(0, D, BD):
        c = start + tl.arange(0, BD)
        g = load_rows(G, c, left, N, D, NP, PER)
        store_rows(G_Z, product(write_t, g), c, left, M, D, MP, PER)
        g_h = product(carry, g)
        if DYNAMIC:
            g_h = spread(g_h, e_carry, V, c, 0, N, D, PER)
            g_h = spread(g_h, e_write, V, c, N, M, D, PER)
            g_h -= pull[:, None] * load_rows(H, c, left, N, D, NP, PER).to(tl.float32)
        store_rows(G_H, g_h, c, left, N, D, NP, PER)


@triton.jit(do_not_specialize=["T"])
def many_width_backward_kernel(
    H, G, G_add, G_H, E, partial, norm_partial, V, A, S_alpha, norm_gain, T, eps, norm_eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    PER: tl.constexpr, PREC: tl.constexpr, DYNAMIC: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Program p adds its sums over tokens up in partial[p]: [PER, 2, n, m], zeros before."""
    program = tl.program_id(0)
    for tile in tl.range(program, tl.cdiv(T, PER), tl.num_programs(0), disable_licm=True):
        t = tl.cast(tile, tl.int64) * PER
        left = T - tile * PER
        read_backward(
            H + t * (N * D), G + t * (M * D), G_add + t * (N * D), G_H + t * (N * D), E + t * (N * M),
            partial + program * (PER * 2 * N * M), norm_partial + program * (M * D), left, V, A, S_alpha,
            norm_gain, eps, norm_eps, M, N, D, MP, NP, BD, PER, PREC, DYNAMIC, NORM, ADD,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def many_depth_backward_kernel(
    H, Z, G, G_H, G_Z, E, partial, V, A, B, S_alpha, S_beta, T, eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    PER: tl.constexpr, DYNAMIC: tl.constexpr,
):  # fmt: skip
    """The same with [PER, 2, n, n+m]: columns of Â before those of Bᵀ."""
    program = tl.program_id(0)
    for tile in tl.range(program, tl.cdiv(T, PER), tl.num_programs(0), disable_licm=True):
        t = tl.cast(tile, tl.int64) * PER
        left = T - tile * PER
        write_backward(
            H + t * (N * D), Z + t * (M * D), G + t * (N * D), G_H + t * (N * D), G_Z + t * (M * D),
            E + t * (N * (N + M)), partial + program * (PER * 2 * N * (N + M)), left, V, A, B, S_alpha, S_beta, eps,
            M, N, D, MP, NP, BD, PER, DYNAMIC,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def many_step_backward_kernel(
    H, Z, OUT, G_OUT, G_X, G_H, G_Z, E, next_E, partial, next_partial, norm_partial, between, V,
    A, B, S_alpha, S_beta, next_A, next_S, norm_gain, T, eps, next_eps, norm_eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    PER: tl.constexpr, PREC: tl.constexpr, DYNAMIC: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """The gradient of the state between goes from one half to the other through [PER, n, d_b] of memory of the
    program's own, which should stay in the cache."""
    program = tl.program_id(0)
    between += tl.cast(program, tl.int64) * (PER * N * D)
    for tile in tl.range(program, tl.cdiv(T, PER), tl.num_programs(0), disable_licm=True):
        t = tl.cast(tile, tl.int64) * PER
        left = T - tile * PER
        read_backward(
            OUT + t * (N * D), G_X + t * (M * D), G_OUT + t * (N * D), between, next_E + t * (N * M),
            next_partial + program * (PER * 2 * N * M), norm_partial + program * (M * D), left,
            V + (N + M) * 2 * D, next_A, next_S, norm_gain, next_eps, norm_eps,
            M, N, D, MP, NP, BD, PER, PREC, DYNAMIC, NORM, True,
        )  # fmt: skip
        tl.debug_barrier()  # what other threads wrote is read from here on
        write_backward(
            H + t * (N * D), Z + t * (M * D), between, G_H + t * (N * D), G_Z + t * (M * D), E + t * (N * (N + M)),
            partial + program * (PER * 2 * N * (N + M)), left, V, A, B, S_alpha, S_beta, eps,
            M, N, D, MP, NP, BD, PER, DYNAMIC,
        )  # fmt: skip
        tl.debug_barrier()  # and written again
