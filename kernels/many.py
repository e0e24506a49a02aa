"""The kernels for bfloat16 where a token's rows do not fit the registers (few.py): a token's matrices whole, and every
product on bfloat16 tensor cores but the one of H′ H′ᵀ and Å. What they compute is described in width.py, depth.py and
step.py.

    rows      X [RP, BD]   of a state, of x or of z: BD of the d_b columns, bfloat16 as they lie in memory
    matrix    C [NP, KP]   in float32, slots first: Å and Bᵀ, [n, m], and Â, [n, n]; their projections and gradients
    V         [K, d_b]     in bfloat16, see projections.py

A tensor core takes 16 rows at least. More than 8 slots are filled up to NP, a power of two, and m to MP, 16 or more. Up
to 8 slots PER tokens share a tile, two of 8 slots, four of 4, eight of 2: rows of one above those of the next, 16/PER
for each, and matrices on the diagonal, 0 beside it. Products of rows by rows give what one token has to do with another
as well; it is never stored, and every factor S or A that it meets is 0 there. (0 · NaN is NaN: what is not finite
reaches all of them.)

A product takes a state as it is, with no conversion on the way from memory to the tensor core. A factor in float32 is
taken in two parts of 8 bits each, which keeps some 16 (two such factors take three products); V, e = rstd · ∂L/∂q and
what flows back into x in one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from vwn_ref.kernels.tiles import add_product, rounded

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
def load_rows(
    pointer, c, left, R: tl.constexpr, D: tl.constexpr, RP: tl.constexpr, PER: tl.constexpr, LAST: tl.constexpr = False
):  # fmt: skip
    """X [RP, BD]. LAST: they are not read again, and the cache need not keep them."""
    offsets, inside = place(c, left, R, D, RP, PER)
    return tl.load(pointer + offsets, mask=inside, other=0.0, eviction_policy="evict_first" if LAST else "")


@triton.jit
def store_rows(pointer, X, c, left, R: tl.constexpr, D: tl.constexpr, RP: tl.constexpr, PER: tl.constexpr):
    """The inverse; rounds to the type of the memory."""
    offsets, inside = place(c, left, R, D, RP, PER)
    tl.store(pointer + offsets, X.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def add_rows(pointer, X, c, R: tl.constexpr, D: tl.constexpr, RP: tl.constexpr, PER: tl.constexpr):
    """Add the rows of all tokens to a contiguous [R, D], in memory that no other program touches. Each place is one
    thread's, so the sum is the same every time; atomic only so that nothing waits for it."""
    if PER > 1:
        X = tl.sum(tl.reshape(X, (PER, RP // PER, X.shape[1])), axis=0)
    offsets, inside = place(c, 1, R, D, RP // PER, 1)
    tl.atomic_add(pointer + offsets, X, mask=inside, sem="relaxed")


@triton.jit
def load_gain(pointer, c, R: tl.constexpr, D: tl.constexpr, RP: tl.constexpr, PER: tl.constexpr):
    """[RP, BD] in float32 of a contiguous [R, D], the same for every token."""
    _, r = of_token(RP, PER)
    inside = (r < R)[:, None] & (c[None, :] < D)
    return tl.load(pointer + (r * D)[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_V(V, c, row, K: tl.constexpr, D: tl.constexpr, KP: tl.constexpr, PER: tl.constexpr):
    """K rows of V from `row` on, for every token: [KP, BD]."""
    _, k = of_token(KP, PER)
    return tl.load(V + ((row + k) * D)[:, None] + c[None, :], mask=(k < K)[:, None] & (c[None, :] < D), other=0.0)


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
    if C.shape[0] <= 16:
        tl.atomic_add(pointer + offsets, C, mask=inside, sem="relaxed")  # nothing waits for it
    else:  # so many that they had better stay in the nearest cache
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
    return add_product(total, h, tl.trans(load_V(V, c, row, K, D, total.shape[1], PER)))


@triton.jit
def spread(total, e, V, c, row, K: tl.constexpr, D: tl.constexpr, PER: tl.constexpr):
    """total + e V: [NP, BD]. What `project` does to gradients."""
    return add_product(total, e, load_V(V, c, row, K, D, e.shape[1], PER))


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
    """Off by 2e-7 at most, absolute, and exactly 0 at 0: a third of the instructions that `tiles.tanh` takes."""
    return 1.0 - tl.fdiv(2.0, 1.0 + tl.exp2(x * 2.8853900817779268))  # 2 / ln 2


@triton.jit
def inverse_root(total, count, eps):
    """1/√(total/count + ε), and 0 where both are 0; NaN of NaN."""
    mean = total / count + eps
    empty = mean <= 0.0
    return tl.where(empty, 0.0, 1.0 / tl.sqrt(tl.where(empty, 1.0, mean)))


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
def no_squares(NP: tl.constexpr, GRAM: tl.constexpr):
    """Where `add_squares` begins."""
    if GRAM:
        return tl.zeros((NP, NP), tl.float32)
    else:
        return tl.zeros((NP,), tl.float32)


@triton.jit
def add_squares(total, h, GRAM: tl.constexpr):
    """With the columns in h: H′ H′ᵀ, or its diagonal."""
    if GRAM:
        return add_product(total, h, tl.trans(h))
    else:
        return total + squares(h)


@triton.jit
def read_matrix(
    H, left, p, total, A, S_alpha, eps, norm_eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    PER: tl.constexpr, GRAM: tl.constexpr, PREC: tl.constexpr, DYNAMIC: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Åᵀ [MP, NP], its rows divided by rms(x) where a norm follows, from p = H′ Vᵀ and what `add_squares` gave. With
    H′ H′ᵀ the sum of Å ∘ (H′ H′ᵀ Å) is Σ x²; without, x is made for that alone."""
    rstd = inverse_root(diagonal(total) if GRAM else total, D, eps)
    C = coefficients(p, rstd, A, S_alpha, M + N, 1, N, M, PER, DYNAMIC)
    if NORM:
        if GRAM:
            # Where x is a small difference of large slots, two parts of 8 bits would not do for its square
            square_x = tl.sum(C * tl.dot(total, C, input_precision=PREC), axis=0)
        else:
            square_x = tl.zeros((MP,), tl.float32)
            for start in range(0, D, BD):
                h = load_rows(H, start + tl.arange(0, BD), left, N, D, NP, PER)
                square_x += squares(product(tl.trans(C), h))
        C *= inverse_root(token_sum(square_x, PER), M * D, norm_eps)[None, :]
    return tl.trans(C)


@triton.jit
def read_rows(
    H, X, left, Ct, norm_gain,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    PER: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """x = Åᵀ H′, or with Åᵀ / rms(x) its norm y."""
    for start in range(0, D, BD):
        c = start + tl.arange(0, BD)
        x = product(Ct, load_rows(H, c, left, N, D, NP, PER))
        if NORM:
            x *= load_gain(norm_gain, c, M, D, MP, PER)
        store_rows(X, x, c, left, M, D, MP, PER)


@triton.jit
def write_matrices(
    H, left, V, A, B, S_alpha, S_beta, eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    PER: tl.constexpr, DYNAMIC: tl.constexpr,
):  # fmt: skip
    """Âᵀ [NP, NP] and Bᵀ [NP, MP]."""
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
    carry = coefficients(p_carry, rstd, A + M, S_alpha + M, M + N, 1, N, N, PER, DYNAMIC)
    return tl.trans(carry), write


@triton.jit
def write_chunk(
    H, Z, carry_t, write, c, left,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, PER: tl.constexpr,
):  # fmt: skip
    """Columns `c` of Âᵀ H′ + Bᵀ Z, rounded as they are stored."""
    out = product(carry_t, load_rows(H, c, left, N, D, NP, PER))
    return add_product(out, write, load_rows(Z, c, left, M, D, MP, PER)).to(H.dtype.element_ty)


@triton.jit(do_not_specialize=["T"])
def many_width_kernel(
    H, X, V, A, S_alpha, norm_gain, T, eps, norm_eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    PER: tl.constexpr, GRAM: tl.constexpr, PREC: tl.constexpr, DYNAMIC: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """x, or its norm y, of every token."""
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, PER), tl.num_programs(0), disable_licm=True):
        t = tl.cast(tile, tl.int64) * PER
        left = T - tile * PER
        p = tl.zeros((NP, MP), tl.float32)
        total = no_squares(NP, GRAM)
        if DYNAMIC or NORM:
            for start in range(0, D, BD):
                c = start + tl.arange(0, BD)
                h = load_rows(H + t * (N * D), c, left, N, D, NP, PER)
                total = add_squares(total, h, GRAM)
                if DYNAMIC:
                    p = project(p, h, V, c, 0, M, D, PER)
        Ct = read_matrix(
            H + t * (N * D), left, p, total, A, S_alpha, eps, norm_eps,
            M, N, D, MP, NP, BD, PER, GRAM, PREC, DYNAMIC, NORM,
        )  # fmt: skip
        read_rows(H + t * (N * D), X + t * (M * D), left, Ct, norm_gain, M, N, D, MP, NP, BD, PER, NORM)


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
        carry_t, write = write_matrices(
            H + t * (N * D), left, V, A, B, S_alpha, S_beta, eps, M, N, D, MP, NP, BD, PER, DYNAMIC
        )  # fmt: skip
        for start in range(0, D, BD):
            c = start + tl.arange(0, BD)
            out = write_chunk(H + t * (N * D), Z + t * (M * D), carry_t, write, c, left, M, N, D, MP, NP, PER)
            store_rows(OUT + t * (N * D), out, c, left, N, D, NP, PER)


@triton.jit(do_not_specialize=["T"])
def many_step_kernel(
    H, Z, OUT, X, V, A, B, S_alpha, S_beta, next_A, next_S, norm_gain, T, eps, next_eps, norm_eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    PER: tl.constexpr, GRAM: tl.constexpr, PREC: tl.constexpr, DYNAMIC: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Both, of one tile of tokens after the other. What the next GHC wants of the new state is summed up as that is
    made."""
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, PER), tl.num_programs(0), disable_licm=True):
        t = tl.cast(tile, tl.int64) * PER
        left = T - tile * PER
        carry_t, write = write_matrices(
            H + t * (N * D), left, V, A, B, S_alpha, S_beta, eps, M, N, D, MP, NP, BD, PER, DYNAMIC
        )  # fmt: skip
        p = tl.zeros((NP, MP), tl.float32)
        total = no_squares(NP, GRAM)
        for start in range(0, D, BD):
            c = start + tl.arange(0, BD)
            out = write_chunk(H + t * (N * D), Z + t * (M * D), carry_t, write, c, left, M, N, D, MP, NP, PER)
            store_rows(OUT + t * (N * D), out, c, left, N, D, NP, PER)
            if DYNAMIC or NORM:
                total = add_squares(total, out, GRAM)
            if DYNAMIC:
                p = project(p, out, V, c, N + M, M, D, PER)
        tl.debug_barrier()  # the rows that other threads of this program wrote are read from here on
        Ct = read_matrix(
            OUT + t * (N * D), left, p, total, next_A, next_S, next_eps, norm_eps,
            M, N, D, MP, NP, BD, PER, GRAM, PREC, DYNAMIC, NORM,
        )  # fmt: skip
        read_rows(OUT + t * (N * D), X + t * (M * D), left, Ct, norm_gain, M, N, D, MP, NP, BD, PER, NORM)


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
def read_matrices_backward(
    H, G, E, own, left, V, A, S_alpha, norm_gain, eps, norm_eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    PER: tl.constexpr, PREC: tl.constexpr, DYNAMIC: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Å, e and what `read_chunk_backward` takes with it; ∂L/∂Å and ∂L/∂Å ∘ tanh are added to `own`.

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
            g = rounded(g.to(tl.float32) * load_gain(norm_gain, c, M, D, MP, PER))
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
    rstd_x = tl.zeros((MP,), tl.float32)
    pull_x = tl.zeros((MP,), tl.float32)
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
        return C, e.to(tl.bfloat16), pull, rstd_x, pull_x
    else:
        return C, C, rstd, rstd_x, pull_x


@triton.jit
def read_chunk_backward(
    H, G, G_add, norm_own, V, norm_gain, found, c, left,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, PER: tl.constexpr,
    DYNAMIC: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Columns `c` of g_H′, plus those of G_add, what else flows into H′, rounded as they are stored. ∂L/∂γ is added to
    `norm_own`. `found`: by `read_matrices_backward`."""
    C, e, pull, rstd_x, pull_x = found
    h = load_rows(H, c, left, N, D, NP, PER, True)
    g = load_rows(G, c, left, M, D, MP, PER, True)
    if NORM:
        x = product(tl.trans(C), h)
        g = g.to(tl.float32)
        add_rows(norm_own, g * x * rstd_x[:, None], c, M, D, MP, PER)
        g = rounded(rstd_x[:, None] * g * load_gain(norm_gain, c, M, D, MP, PER) - pull_x[:, None] * x)
    g_h = product(C, g)
    if DYNAMIC:
        g_h = spread(g_h, e, V, c, 0, M, D, PER) - pull[:, None] * h.to(tl.float32)
    if ADD:
        g_h += load_rows(G_add, c, left, N, D, NP, PER, True).to(tl.float32)
    return g_h.to(H.dtype.element_ty)


@triton.jit
def no_sums(MP: tl.constexpr, NP: tl.constexpr):
    """Where `add_sums` begins."""
    carry = tl.zeros((NP, NP), tl.float32)
    write = tl.zeros((NP, MP), tl.float32)
    return carry, write, carry, write, tl.zeros((NP,), tl.float32)


@triton.jit
def add_sums(
    sums, H, Z, g, V, c, left,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, PER: tl.constexpr,
    DYNAMIC: tl.constexpr,
):  # fmt: skip
    """With the columns `c` added: ∂L/∂Â = H′ gᵀ, ∂L/∂Bᵀ = g zᵀ, H′ Vᵀ of both, and Σ h²."""
    d_carry, d_write, p_carry, p_write, square = sums
    h = load_rows(H, c, left, N, D, NP, PER)
    if DYNAMIC:
        square += squares(h)
        p_carry = project(p_carry, h, V, c, 0, N, D, PER)
        p_write = project(p_write, h, V, c, N, M, D, PER)
    d_carry = add_product(d_carry, h, tl.trans(g))
    d_write = add_product(d_write, g, tl.trans(load_rows(Z, c, left, M, D, MP, PER, True)))
    return d_carry, d_write, p_carry, p_write, square


@triton.jit
def write_backward(
    sums, H, G, G_H, G_Z, E, own, left, V, A, B, S_alpha, S_beta, eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    PER: tl.constexpr, DYNAMIC: tl.constexpr,
):  # fmt: skip
    """g_H′, g_z and e; ∂L/∂C and ∂L/∂C ∘ tanh, of Â and of Bᵀ, are added to `own`."""
    K: tl.constexpr = N + M
    d_carry, d_write, p_carry, p_write, square = sums
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
        g = load_rows(G, c, left, N, D, NP, PER, True)
        store_rows(G_Z, product(write_t, g), c, left, M, D, MP, PER)
        g_h = product(carry, g)
        if DYNAMIC:
            g_h = spread(g_h, e_carry, V, c, 0, N, D, PER)
            g_h = spread(g_h, e_write, V, c, N, M, D, PER)
            g_h -= pull[:, None] * load_rows(H, c, left, N, D, NP, PER, True).to(tl.float32)
        store_rows(G_H, g_h, c, left, N, D, NP, PER)


@triton.jit(do_not_specialize=["T"])
def many_width_backward_kernel(
    H, G, G_add, G_H, E, partial, norm_partial, V, A, S_alpha, norm_gain, T, eps, norm_eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    PER: tl.constexpr, PREC: tl.constexpr, DYNAMIC: tl.constexpr, NORM: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """Program p adds its sums over tokens up in partial[p]: [PER, 2, n, m], zeros before."""
    program = tl.program_id(0)
    for tile in tl.range(program, tl.cdiv(T, PER), tl.num_programs(0), disable_licm=True):
        t = tl.cast(tile, tl.int64) * PER
        left = T - tile * PER
        found = read_matrices_backward(
            H + t * (N * D), G + t * (M * D), E + t * (N * M), partial + program * (PER * 2 * N * M), left, V, A,
            S_alpha, norm_gain, eps, norm_eps, M, N, D, MP, NP, BD, PER, PREC, DYNAMIC, NORM,
        )  # fmt: skip
        for start in range(0, D, BD):
            c = start + tl.arange(0, BD)
            g_h = read_chunk_backward(
                H + t * (N * D), G + t * (M * D), G_add + t * (N * D), norm_partial + program * (M * D), V, norm_gain,
                found, c, left, M, N, D, MP, NP, PER, DYNAMIC, NORM, ADD,
            )  # fmt: skip
            store_rows(G_H + t * (N * D), g_h, c, left, N, D, NP, PER)


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
        sums = no_sums(MP, NP)
        for start in range(0, D, BD):
            c = start + tl.arange(0, BD)
            g = load_rows(G + t * (N * D), c, left, N, D, NP, PER)
            sums = add_sums(sums, H + t * (N * D), Z + t * (M * D), g, V, c, left, M, N, D, MP, NP, PER, DYNAMIC)
        write_backward(
            sums, H + t * (N * D), G + t * (N * D), G_H + t * (N * D), G_Z + t * (M * D), E + t * (N * (N + M)),
            partial + program * (PER * 2 * N * (N + M)), left, V, A, B, S_alpha, S_beta, eps,
            M, N, D, MP, NP, BD, PER, DYNAMIC,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def many_step_backward_kernel(
    H, Z, OUT, G_OUT, G_X, G_H, G_Z, E, next_E, partial, next_partial, norm_partial, between, V,
    A, B, S_alpha, S_beta, next_A, next_S, norm_gain, T, eps, next_eps, norm_eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    PER: tl.constexpr, PREC: tl.constexpr, DYNAMIC: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """The gradient of the state between is used as soon as it is made, and again later: meanwhile it is in
    [PER, n, d_b] of memory of the program's own, which should stay in the cache (long rows of few slots do not)."""
    program = tl.program_id(0)
    between += tl.cast(program, tl.int64) * (PER * N * D)
    for tile in tl.range(program, tl.cdiv(T, PER), tl.num_programs(0), disable_licm=True):
        t = tl.cast(tile, tl.int64) * PER
        left = T - tile * PER
        next_V = V + (N + M) * D
        found = read_matrices_backward(
            OUT + t * (N * D), G_X + t * (M * D), next_E + t * (N * M), next_partial + program * (PER * 2 * N * M),
            left, next_V, next_A, next_S, norm_gain, next_eps, norm_eps,
            M, N, D, MP, NP, BD, PER, PREC, DYNAMIC, NORM,
        )  # fmt: skip
        sums = no_sums(MP, NP)
        for start in range(0, D, BD):
            c = start + tl.arange(0, BD)
            g = read_chunk_backward(
                OUT + t * (N * D), G_X + t * (M * D), G_OUT + t * (N * D), norm_partial + program * (M * D), next_V,
                norm_gain, found, c, left, M, N, D, MP, NP, PER, DYNAMIC, NORM, True,
            )  # fmt: skip
            store_rows(between, g, c, left, N, D, NP, PER)
            sums = add_sums(sums, H + t * (N * D), Z + t * (M * D), g, V, c, left, M, N, D, MP, NP, PER, DYNAMIC)
        tl.debug_barrier()  # what other threads wrote is read from here on
        write_backward(
            sums, H + t * (N * D), between, G_H + t * (N * D), G_Z + t * (M * D), E + t * (N * (N + M)),
            partial + program * (PER * 2 * N * (N + M)), left, V, A, B, S_alpha, S_beta, eps,
            M, N, D, MP, NP, BD, PER, DYNAMIC,
        )  # fmt: skip
        tl.debug_barrier()  # and written again
