"""`width`, `depth` and `step` for few slots: the formulas of width.py, depth.py and step.py with no walks along d_b.

A token's rows fit the registers of one warp for each 512 columns (with 4 slots some take 256): (2, 3) at D = 1024 has
48 numbers of state a thread. So they come from memory once and are mixed where they are; where registers are short, the
cache is asked again. `step` hands the new state on to the next width, and in the backward pass its gradient to the
depth before, with no memory in between. What is left to do are the multiply-and-adds of the formulas, sums over d_b,
loads and stores; NOTES.md counts the instructions. For which shapes all this is, `whole_rows` in launch.py says.

A program takes every so-many-th token, as many as there are programs, one at a time. Backward, where few warps are on
a multiprocessor, it reaches for the rows of its next token while it works on one (AHEAD).
"""

from __future__ import annotations

import triton
import triton.language as tl
from vwn_ref.kernels.rows import (
    add_rows,
    combine,
    gather,
    keep,
    load_row,
    load_rows,
    of_slots,
    pack,
    packed_size,
    store_row,
    sums,
    touch,
    unpack,
)  # fmt: skip
from vwn_ref.kernels.tiles import tanh

# -------------------------------------------------------------------------------------------------- coefficients


@triton.jit
def read_parameter(A, M: tl.constexpr, N: tl.constexpr, P: tl.constexpr):
    """A or S_α, packed: the m columns of Å."""
    i, k = tl.arange(0, P) % N, tl.arange(0, P) // N
    return tl.load(A + i * (M + N) + k, mask=k < M, other=0.0).to(tl.float32)


@triton.jit
def write_parameter(A, B, M: tl.constexpr, N: tl.constexpr, P: tl.constexpr):
    """A and B, or S_α and S_β, packed: the n columns of Â, then the m of Bᵀ."""
    i, k = tl.arange(0, P) % N, tl.arange(0, P) // N
    of_A = tl.load(A + i * (M + N) + M + k, mask=k < N, other=0.0).to(tl.float32)
    return of_A + tl.load(B + (k - N) * N + i, mask=(k >= N) & (k < N + M), other=0.0).to(tl.float32)


@triton.jit
def coefficients(
    h, V, static, scale, eps, K: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, P: tl.constexpr, DYNAMIC: tl.constexpr
):
    """C = scale ∘ tanh(q) + static with q = h Vᵀ / rms(h), that tanh, q, and 1/rms of its slot: all packed."""
    N: tl.constexpr = len(h)
    if DYNAMIC:
        products = ()
        for k in tl.static_range(K):
            v = load_row(V, k, D, BD)
            for i in tl.static_range(N):
                products += (h[i] * v,)
        for i in tl.static_range(N):
            products += (h[i] * h[i],)
        s = sums(products)
        roots = ()
        for i in tl.static_range(N):
            roots += (1.0 / tl.sqrt(s[N * K + i] / D + eps),)
        rstd = of_slots(roots, P)
        q = pack(s[: N * K], P) * rstd
        tanh_q = tanh(q)
        return scale * tanh_q + static, tanh_q, q, rstd
    else:
        return static, static, static, static


@triton.jit
def through_coefficients(dC, tanh_q, rstd, scale):
    """e = rstd · ∂L/∂q from ∂L/∂C: all packed."""
    return dC * scale * (1.0 - tanh_q * tanh_q) * rstd


@triton.jit
def through_projections(
    e, q, rstd, h, V, g_h, K: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """g_h + e V − h · rstd Σ_k(e ∘ q) / d_b: with what flows into the state through projections and RMSNorm."""
    N: tl.constexpr = len(h)
    pulls = unpack(e * q * (rstd / D), P)
    rows = ()
    for i in tl.static_range(N):
        pull = pulls[i]
        for k in tl.static_range(1, K):
            pull += pulls[k * N + i]
        rows += (g_h[i] - pull * h[i],)
    e = unpack(e, P)
    for k in tl.static_range(K):
        v = load_row(V, k, D, BD)
        added = ()
        for i in tl.static_range(N):
            added += (rows[i] + e[k * N + i] * v,)
        rows = added
    return rows


@triton.jit
def store_coefficients(pointer, packed, N: tl.constexpr, K: tl.constexpr, P: tl.constexpr):
    """Packed, into a contiguous [n, K]."""
    place = tl.arange(0, P)
    tl.store(pointer + place % N * K + place // N, packed, mask=place < N * K)


# --------------------------------------------------------------------------------------------------------- width


@triton.jit
def read(
    h, C, norm_gain, norm_eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, P: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """x = Åᵀ h, or y = x / rms(x) ∘ γ: m rows."""
    a = unpack(C, P)
    x = ()
    for k in tl.static_range(M):
        x += (combine(a, h, k * N, 1),)
    if NORM:
        square = x[0] * x[0]
        for k in tl.static_range(1, M):
            square += x[k] * x[k]
        rstd = 1.0 / tl.sqrt(tl.sum(square) / (M * D) + norm_eps)
        y = ()
        for k in tl.static_range(M):
            y += (x[k] * rstd * load_row(norm_gain, k, D, BD),)
        return y
    else:
        return x


@triton.jit(do_not_specialize=["T"])
def few_width_kernel(
    H, X, V, A, S_alpha, norm_gain, T, eps, norm_eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DYNAMIC: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """x, or y, of every token."""
    P: tl.constexpr = packed_size(N * M)
    static = read_parameter(A, M, N, P)
    scale = read_parameter(S_alpha, M, N, P) if DYNAMIC else static
    for token in range(tl.program_id(0), T, tl.num_programs(0)):
        t = tl.cast(token, tl.int64)
        h = load_rows(H + t * (N * D), N, D, BD)
        C, _, _, _ = coefficients(h, V, static, scale, eps, M, D, BD, P, DYNAMIC)
        x = read(h, C, norm_gain, norm_eps, M, N, D, BD, P, NORM)
        for k in tl.static_range(M):
            store_row(X + t * (M * D), x[k], k, D, BD)


@triton.jit
def read_backward(
    h, g, G_add, V, E, static, scale, norm_gain, sum_E, sum_ET, norm_sums, eps, norm_eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, P: tl.constexpr, DYNAMIC: tl.constexpr,
    NORM: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """∂L/∂h, n rows, from g = ∂L/∂x or ∂L/∂y, m rows; with ADD, plus the rows at G_add. e goes into memory at E, ∂L/∂γ
    is added to norm_sums; the sums of ∂L/∂Å (E in width.py, sum_E here) and ∂L/∂Å ∘ tanh come back with this token's
    added. Formulas: width.py."""
    C, tanh_q, q, rstd = coefficients(h, V, static, scale, eps, M, D, BD, P, DYNAMIC)
    a = unpack(C, P)
    if NORM:
        x = ()
        u = ()
        for k in tl.static_range(M):
            x += (combine(a, h, k * N, 1),)
            u += (g[k] * load_row(norm_gain, k, D, BD),)
        square = x[0] * x[0]
        inner = x[0] * u[0]
        for k in tl.static_range(1, M):
            square += x[k] * x[k]
            inner += x[k] * u[k]
        square, inner = sums((square, inner))
        rstd_x = 1.0 / tl.sqrt(square / (M * D) + norm_eps)
        pull_x = rstd_x * rstd_x * rstd_x * inner / (M * D)
        g_x = ()
        normed = ()
        for k in tl.static_range(M):
            g_x += (rstd_x * u[k] - pull_x * x[k],)
            normed += (g[k] * (rstd_x * x[k]),)
        add_rows(norm_sums, normed, BD, 32 // G_add.dtype.element_ty.primitive_bitwidth)
    else:
        g_x = g
    products = ()
    for k in tl.static_range(M):
        for i in tl.static_range(N):
            products += (h[i] * g_x[k],)
    dC = pack(sums(products), P)
    sum_E += dC
    g_h = ()
    for i in tl.static_range(N):
        row = combine(a, g_x, i, N)
        g_h += (row + load_row(G_add, i, D, BD) if ADD else row,)
    if DYNAMIC:
        sum_ET += dC * tanh_q
        e = through_coefficients(dC, tanh_q, rstd, scale)
        store_coefficients(E, e, N, M, P)
        g_h = through_projections(e, q, rstd, h, V, g_h, M, D, BD, P)
    return g_h, sum_E, sum_ET


@triton.jit(do_not_specialize=["T"])
def few_width_backward_kernel(
    H, G, G_add, G_H, E, partial, norm_partial, V, A, S_alpha, norm_gain, T, eps, norm_eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, AHEAD: tl.constexpr, DYNAMIC: tl.constexpr,
    NORM: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Its sums over tokens a program leaves in partial[p], [2, n, m], and norm_partial[p], [m, d_b]."""
    P: tl.constexpr = packed_size(N * M)
    program = tl.program_id(0)
    static = read_parameter(A, M, N, P)
    scale = read_parameter(S_alpha, M, N, P) if DYNAMIC else static
    sum_E = tl.zeros((P,), tl.float32)
    sum_ET = tl.zeros((P,), tl.float32)
    norm_sums = norm_partial + program * (M * BD)
    kept = tl.zeros((BD // 16,), tl.int16)
    for token in range(program, T, tl.num_programs(0)):
        t = tl.cast(token, tl.int64)
        h = load_rows(H + t * (N * D), N, D, BD)
        g = load_rows(G + t * (M * D), M, D, BD)
        if AHEAD:
            next_t = t + tl.num_programs(0)
            touched = touch(H + next_t * (N * D), T - next_t, N, D, BD)
            touched += touch(G + next_t * (M * D), T - next_t, M, D, BD)
            if ADD:
                touched += touch(G_add + next_t * (N * D), T - next_t, N, D, BD)
        g_h, sum_E, sum_ET = read_backward(
            h, g, G_add + t * (N * D), V, E + t * (N * M), static, scale, norm_gain, sum_E, sum_ET, norm_sums, eps,
            norm_eps, M, N, D, BD, P, DYNAMIC, NORM, ADD,
        )  # fmt: skip
        for i in tl.static_range(N):
            store_row(G_H + t * (N * D), g_h[i], i, D, BD)
        if AHEAD:
            kept = gather(kept, touched)
    if AHEAD:
        keep(G_H, kept, T)
    store_coefficients(partial + program * (2 * N * M), sum_E, N, M, P)
    if DYNAMIC:
        store_coefficients(partial + program * (2 * N * M) + N * M, sum_ET, N, M, P)


# --------------------------------------------------------------------------------------------------------- depth


@triton.jit
def write(h, z, C, M: tl.constexpr, N: tl.constexpr, P: tl.constexpr):
    """Âᵀ h + Bᵀ z: n rows."""
    c = unpack(C, P)
    rows = ()
    for k in tl.static_range(N):
        rows += (combine(c, h, k * N, 1) + combine(c, z, N * N + k, N),)
    return rows


@triton.jit(do_not_specialize=["T"])
def few_depth_kernel(
    H, Z, OUT, V, A, B, S_alpha, S_beta, T, eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DYNAMIC: tl.constexpr,
):  # fmt: skip
    """The new state of every token."""
    P: tl.constexpr = packed_size(N * (N + M))
    static = write_parameter(A, B, M, N, P)
    scale = write_parameter(S_alpha, S_beta, M, N, P) if DYNAMIC else static
    for token in range(tl.program_id(0), T, tl.num_programs(0)):
        t = tl.cast(token, tl.int64)
        h = load_rows(H + t * (N * D), N, D, BD)
        z = load_rows(Z + t * (M * D), M, D, BD)
        C, _, _, _ = coefficients(h, V, static, scale, eps, N + M, D, BD, P, DYNAMIC)
        out = write(h, z, C, M, N, P)
        for i in tl.static_range(N):
            store_row(OUT + t * (N * D), out[i], i, D, BD)


@triton.jit
def write_backward(
    H, Z, g, G_H, G_Z, E, V, C, tanh_q, q, rstd, scale, sum_E, sum_ET,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, P: tl.constexpr, DYNAMIC: tl.constexpr,
):  # fmt: skip
    """∂L/∂h, ∂L/∂z and e into memory, from g = ∂L/∂out, n rows, and what `coefficients` gave; the sums of ∂L/∂C and of
    ∂L/∂C ∘ tanh come back with this token's added. Formulas: depth.py."""
    h = load_rows(H, N, D, BD)
    z = load_rows(Z, M, D, BD)
    products = ()
    for k in tl.static_range(N):
        for i in tl.static_range(N):
            products += (h[i] * g[k],)
    for k in tl.static_range(M):
        for i in tl.static_range(N):
            products += (g[i] * z[k],)
    dC = pack(sums(products), P)
    sum_E += dC
    c = unpack(C, P)
    for k in tl.static_range(M):
        store_row(G_Z, combine(c, g, N * N + k * N, 1), k, D, BD)
    g_h = ()
    for i in tl.static_range(N):
        g_h += (combine(c, g, i, N),)
    if DYNAMIC:
        sum_ET += dC * tanh_q
        e = through_coefficients(dC, tanh_q, rstd, scale)
        store_coefficients(E, e, N, N + M, P)
        g_h = through_projections(e, q, rstd, h, V, g_h, N + M, D, BD, P)
    for i in tl.static_range(N):
        store_row(G_H, g_h[i], i, D, BD)
    return sum_E, sum_ET


@triton.jit(do_not_specialize=["T"])
def few_depth_backward_kernel(
    H, Z, G, G_H, G_Z, E, partial, V, A, B, S_alpha, S_beta, T, eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, AHEAD: tl.constexpr, DYNAMIC: tl.constexpr,
):  # fmt: skip
    """Its sums over tokens a program leaves in partial[p], [2, n, n+m]: columns of Â before those of Bᵀ."""
    K: tl.constexpr = N + M
    P: tl.constexpr = packed_size(N * K)
    program = tl.program_id(0)
    static = write_parameter(A, B, M, N, P)
    scale = write_parameter(S_alpha, S_beta, M, N, P) if DYNAMIC else static
    sum_E = tl.zeros((P,), tl.float32)
    sum_ET = tl.zeros((P,), tl.float32)
    kept = tl.zeros((BD // 16,), tl.int16)
    for token in range(program, T, tl.num_programs(0)):
        t = tl.cast(token, tl.int64)
        h = load_rows(H + t * (N * D), N, D, BD)
        if AHEAD:
            next_t = t + tl.num_programs(0)
            touched = touch(H + next_t * (N * D), T - next_t, N, D, BD)
            touched += touch(G + next_t * (N * D), T - next_t, N, D, BD)
            touched += touch(Z + next_t * (M * D), T - next_t, M, D, BD)
        C, tanh_q, q, rstd = coefficients(h, V, static, scale, eps, K, D, BD, P, DYNAMIC)
        g = load_rows(G + t * (N * D), N, D, BD)
        sum_E, sum_ET = write_backward(
            H + t * (N * D), Z + t * (M * D), g, G_H + t * (N * D), G_Z + t * (M * D), E + t * (N * K), V, C,
            tanh_q, q, rstd, scale, sum_E, sum_ET, M, N, D, BD, P, DYNAMIC,
        )  # fmt: skip
        if AHEAD:
            kept = gather(kept, touched)
    if AHEAD:
        keep(G_H, kept, T)
    store_coefficients(partial + program * (2 * N * K), sum_E, N, K, P)
    if DYNAMIC:
        store_coefficients(partial + program * (2 * N * K) + N * K, sum_ET, N, K, P)


# ---------------------------------------------------------------------------------------------------------- step


@triton.jit(do_not_specialize=["T"])
def few_step_kernel(
    H, Z, OUT, X, V, A, B, S_alpha, S_beta, next_A, next_S, norm_gain, T, eps, next_eps, norm_eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DYNAMIC: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """The next width reads the new state as it was stored, rounded."""
    P: tl.constexpr = packed_size(N * (N + M))
    next_P: tl.constexpr = packed_size(N * M)
    static = write_parameter(A, B, M, N, P)
    scale = write_parameter(S_alpha, S_beta, M, N, P) if DYNAMIC else static
    next_static = read_parameter(next_A, M, N, next_P)
    next_scale = read_parameter(next_S, M, N, next_P) if DYNAMIC else next_static
    for token in range(tl.program_id(0), T, tl.num_programs(0)):
        t = tl.cast(token, tl.int64)
        h = load_rows(H + t * (N * D), N, D, BD)
        z = load_rows(Z + t * (M * D), M, D, BD)
        C, _, _, _ = coefficients(h, V, static, scale, eps, N + M, D, BD, P, DYNAMIC)
        new = write(h, z, C, M, N, P)
        out = ()
        for i in tl.static_range(N):
            out += (store_row(OUT + t * (N * D), new[i], i, D, BD),)
        C, _, _, _ = coefficients(
            out, V + (N + M) * D, next_static, next_scale, next_eps, M, D, BD, next_P, DYNAMIC
        )  # fmt: skip
        x = read(out, C, norm_gain, norm_eps, M, N, D, BD, next_P, NORM)
        for k in tl.static_range(M):
            store_row(X + t * (M * D), x[k], k, D, BD)


@triton.jit(do_not_specialize=["T"])
def few_step_backward_kernel(
    H, Z, G_OUT, G_X, G_H, G_Z, E, next_E, partial, next_partial, norm_partial, V,
    A, B, S_alpha, S_beta, next_A, next_S, norm_gain, T, eps, next_eps, norm_eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, AHEAD: tl.constexpr, DYNAMIC: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """The state between is mixed again from h and z, n rows less to read, and rounded as it is stored; its gradient
    goes from one half to the other in registers, in float32."""
    K: tl.constexpr = N + M
    P: tl.constexpr = packed_size(N * K)
    next_P: tl.constexpr = packed_size(N * M)
    program = tl.program_id(0)
    static = write_parameter(A, B, M, N, P)
    scale = write_parameter(S_alpha, S_beta, M, N, P) if DYNAMIC else static
    next_static = read_parameter(next_A, M, N, next_P)
    next_scale = read_parameter(next_S, M, N, next_P) if DYNAMIC else next_static
    sum_E = tl.zeros((P,), tl.float32)
    sum_ET = tl.zeros((P,), tl.float32)
    next_sum_E = tl.zeros((next_P,), tl.float32)
    next_sum_ET = tl.zeros((next_P,), tl.float32)
    norm_sums = norm_partial + program * (M * BD)
    kept = tl.zeros((BD // 16,), tl.int16)
    for token in range(program, T, tl.num_programs(0)):
        t = tl.cast(token, tl.int64)
        h = load_rows(H + t * (N * D), N, D, BD)
        if AHEAD:
            next_t = t + tl.num_programs(0)
            touched = touch(H + next_t * (N * D), T - next_t, N, D, BD)
            touched += touch(Z + next_t * (M * D), T - next_t, M, D, BD)
            touched += touch(G_X + next_t * (M * D), T - next_t, M, D, BD)
            touched += touch(G_OUT + next_t * (N * D), T - next_t, N, D, BD)
        C, tanh_q, q, rstd = coefficients(h, V, static, scale, eps, K, D, BD, P, DYNAMIC)
        z = load_rows(Z + t * (M * D), M, D, BD)
        new = write(h, z, C, M, N, P)
        out = ()
        for i in tl.static_range(N):
            out += (new[i].to(H.dtype.element_ty).to(tl.float32),)
        g_x = load_rows(G_X + t * (M * D), M, D, BD)
        g, next_sum_E, next_sum_ET = read_backward(
            out, g_x, G_OUT + t * (N * D), V + K * D, next_E + t * (N * M), next_static, next_scale, norm_gain,
            next_sum_E, next_sum_ET, norm_sums, next_eps, norm_eps, M, N, D, BD, next_P, DYNAMIC, NORM, True,
        )  # fmt: skip
        tl.debug_barrier()  # or all rows are loaded at once, and do not fit
        sum_E, sum_ET = write_backward(
            H + t * (N * D), Z + t * (M * D), g, G_H + t * (N * D), G_Z + t * (M * D), E + t * (N * K), V, C,
            tanh_q, q, rstd, scale, sum_E, sum_ET, M, N, D, BD, P, DYNAMIC,
        )  # fmt: skip
        if AHEAD:
            kept = gather(kept, touched)
    if AHEAD:
        keep(G_H, kept, T)
    store_coefficients(partial + program * (2 * N * K), sum_E, N, K, P)
    store_coefficients(next_partial + program * (2 * N * M), next_sum_E, N, M, next_P)
    if DYNAMIC:
        store_coefficients(partial + program * (2 * N * K) + N * K, sum_ET, N, K, P)
        store_coefficients(next_partial + program * (2 * N * M) + N * M, next_sum_ET, N, M, next_P)
