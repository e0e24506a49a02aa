"""What the kernels that walk along d_b are made of: rows in, rows out, and the five small products of a GHC.

Notation, as in `vwn_ref.ghc` and `vwn_ref.dynamic`; but a kernel's D is d_b (in last.py alone it is D). One program
works on BT tokens and walks along d_b in steps of BD.

    tile of rows   X [BT, RP, BD]   BT tokens, R rows of each, BD of the d_b columns; float32 in registers
    matrix         C [BT, IP, KP]   one matrix a token, whole, in registers
    RP, IP, KP     R, I, K rounded up to a power of two, because a Triton tile has no other sizes. What lies beyond
                   R, I, K and beyond the last token is loaded as 0, adds nothing to any sum, and is never stored.

16-bit numbers become float32 as they are loaded and 16-bit again as they are stored: all arithmetic is in float32.

These are the kernels for float32 and float16 with more than 4 slots, and with fewer where d_b is too long for the
registers: see rows.py and many.py for the others. Sums over slots and segments are short (R ≤ 72), sums over d_b are
long. Long ones go to the tensor cores (`tl.dot`). Of the short ones, `mix`, `unmix` and `spread` have two forms, chosen
by n (`MANY` is True from n = 5 on):

    few slots    multiply and add, element by element. A tensor core would fill its 16 × 8 tile with padding: for
                 (2, 3), the 9 of Â among 128 products would count, and the two fp32 operations a byte that it takes
                 are few.
    many slots   tensor cores. (8, 64) has some 36 flops a byte of float32, too many for multiply-and-add: an H100 is
                 bound by memory up to about 20. And element by element every thread holds all n (m+n) coefficients, in
                 the backward pass their gradients too: for (4, 8) 192 of the 255 registers there are.

PREC is how `tl.dot` treats float32: "tf32" (11 significant bits) where states have 16 bits, whose 8 or 11 bits it holds
without loss, so that only coefficients are rounded, to 2⁻¹¹; for float32 states "tf32x3" (three products, some 22
bits), and "ieee" (all 24) where there is no such thing, on AMD GPUs and in the interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
LEAST_SUM = 8 if VERSION >= (3, 8) else 16  # the fewest terms that `tl.dot` adds up


@triton.jit
def tanh(x):
    """To 2e-7, also relatively, near 0, where 1 − e cancels; there is no tanh that compiles and is interpreted."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    xx = x * x
    near = x * (1.0 + xx * (-1.0 / 3.0 + xx * (2.0 / 15.0 - xx * (17.0 / 315.0))))
    return tl.where(tl.abs(x) < 0.2, near, tl.where(x < 0.0, -far, far))


@triton.jit
def in_parts(x):
    """float32 as a sum of two bfloat16, to 2⁻¹⁶: its upper half, cut off, and what that leaves."""
    upper = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return upper.to(tl.bfloat16), (x - upper).to(tl.bfloat16)


# Two versions of each, not one that asks a global constant: with such a constant the key under which Triton keeps a
# compiled kernel depends on what the process compiled before it, and other processes compile it again
if type(tanh).__name__ == "InterpretedFunction":

    @triton.jit
    def rounded(x):
        """float32 -> the nearest bfloat16. The interpreter's own conversion cuts off."""
        bits = x.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True).to(tl.bfloat16)

    @triton.jit
    def add_short_product(total, X, Y):
        """total + X Y of two matrices in bfloat16, of which the interpreter has no product."""
        return total + tl.dot(X.to(tl.float32), Y.to(tl.float32), input_precision="ieee")

else:

    @triton.jit
    def rounded(x):
        """float32 -> the nearest bfloat16."""
        return x.to(tl.bfloat16)

    @triton.jit
    def add_short_product(total, X, Y):
        """total + X Y of two matrices in bfloat16."""
        return tl.dot(X, Y, total)


@triton.jit
def add_product(total, X, Y):
    """total + X Y of two matrices on bfloat16 tensor cores: of float32 factors two parts, and where both are, without
    the product of their lower parts."""
    if X.dtype == tl.float32:
        upper, lower = in_parts(X)
        if Y.dtype == tl.float32:
            Y_upper, Y_lower = in_parts(Y)
            total = add_short_product(total, lower, Y_upper)
            total = add_short_product(total, upper, Y_lower)
            return add_short_product(total, upper, Y_upper)
        else:
            return add_short_product(add_short_product(total, lower, Y), upper, Y)
    elif Y.dtype == tl.float32:
        upper, lower = in_parts(Y)
        return add_short_product(add_short_product(total, X, lower), X, upper)
    else:
        return add_short_product(total, X, Y)


# ------------------------------------------------------------------------------------------------- loads and stores


@triton.jit
def tokens(block, BT: tl.constexpr):
    """The token numbers of a block, in 64 bits: a state may have more than 2³¹ elements."""
    return tl.arange(0, BT) + (tl.zeros((BT,), tl.int64) + block) * BT


@triton.jit
def row_offsets(t, c, R: tl.constexpr, D: tl.constexpr, RP: tl.constexpr, first=0):
    """Of rows `first` … of tokens `t`, columns `c`, in a contiguous [T, R, D]: [BT, RP, BD]."""
    r = first + tl.arange(0, RP)
    return (t[:, None, None] * R + r[None, :, None]) * D + c[None, None, :]


@triton.jit
def row_mask(t, T, c, R: tl.constexpr, D: tl.constexpr, RP: tl.constexpr, first=0):
    """Where `row_offsets` lie inside."""
    r = first + tl.arange(0, RP)
    return (t[:, None, None] < T) & (r[None, :, None] < R) & (c[None, None, :] < D)


@triton.jit
def load_rows(pointer, t, T, c, R: tl.constexpr, D: tl.constexpr, RP: tl.constexpr, first=0):
    """X [BT, RP, BD] of a contiguous [T, R, D], from row `first` on, as float32."""
    offsets = row_offsets(t, c, R, D, RP, first)
    X = tl.load(pointer + offsets, mask=row_mask(t, T, c, R, D, RP, first), other=0.0)
    return X.to(tl.float32)


@triton.jit
def store_rows(pointer, X, t, T, c, R: tl.constexpr, D: tl.constexpr, RP: tl.constexpr):
    """The inverse; rounds to the type of the memory."""
    offsets = row_offsets(t, c, R, D, RP)
    tl.store(pointer + offsets, X.to(pointer.dtype.element_ty), mask=row_mask(t, T, c, R, D, RP))


@triton.jit
def load_parameter(
    pointer, column, R: tl.constexpr, K: tl.constexpr, row_stride: tl.constexpr, column_stride: tl.constexpr,
    RP: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """[RP, KP] of a parameter: R rows, and K columns from `column` on. Strides swapped, the transpose."""
    i, k = tl.arange(0, RP)[:, None], tl.arange(0, KP)[None, :]
    inside = (i < R) & (k < K)
    return tl.load(pointer + i * row_stride + (column + k) * column_stride, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_V(V, c, row, K, D: tl.constexpr, KP: tl.constexpr):
    """K rows of V [·, d_b] from `row` on, columns `c`, transposed: [BD, KP]. See `vwn_ref.kernels.projections`."""
    k = tl.arange(0, KP)[None, :]
    return tl.load(V + (row + k) * D + c[:, None], mask=(c[:, None] < D) & (k < K), other=0.0)


@triton.jit
def slot_mask(t, T, N: tl.constexpr, NP: tl.constexpr):
    """[BT, NP]: True for the slots that exist."""
    return (t[:, None] < T) & (tl.arange(0, NP)[None, :] < N)


@triton.jit
def store_matrix(pointer, C, t, T, column, K: tl.constexpr, R: tl.constexpr, stride: tl.constexpr, KP: tl.constexpr):
    """C [BT, RP, KP] into columns `column` … of a contiguous [T, R, stride]."""
    r, k = tl.arange(0, C.shape[1])[None, :, None], tl.arange(0, KP)[None, None, :]
    offsets = (t[:, None, None] * R + r) * stride + column + k
    tl.store(pointer + offsets, C, mask=(t[:, None, None] < T) & (r < R) & (k < K))


@triton.jit
def load_matrix(
    pointer, t, T, column, K, R: tl.constexpr, stride: tl.constexpr, RP: tl.constexpr, KP: tl.constexpr
):  # fmt: skip
    """C [BT, RP, KP] in float32, K of the columns from `column` on of a contiguous [T, R, stride]."""
    r, k = tl.arange(0, RP)[None, :, None], tl.arange(0, KP)[None, None, :]
    offsets = (t[:, None, None] * R + r) * stride + column + k
    C = tl.load(pointer + offsets, mask=(t[:, None, None] < T) & (r < R) & (k < K), other=0.0)
    return C.to(tl.float32)


@triton.jit
def store_partial(pointer, X, column, R: tl.constexpr, K: tl.constexpr, stride: tl.constexpr):
    """X [RP, KP], a sum over this program's tokens, into columns `column` … of its own [R, stride]."""
    i, k = tl.arange(0, X.shape[0])[:, None], tl.arange(0, X.shape[1])[None, :]
    tl.store(pointer + i * stride + column + k, X, mask=(i < R) & (k < K))


@triton.jit
def accumulate(
    total, X, pointer, column, R: tl.constexpr, K: tl.constexpr, stride: tl.constexpr, KEEP: tl.constexpr
):  # fmt: skip
    """total + Σ over tokens of X [BT, RP, KP]. Unless KEEP, that sum is added to memory, where `store_partial` would
    put it in the end, and `total` comes back as it was: zeros, which take no registers."""
    if KEEP:
        return total + tl.sum(X, axis=0)
    i, k = tl.arange(0, X.shape[1])[:, None], tl.arange(0, X.shape[2])[None, :]
    place, inside = pointer + i * stride + column + k, (i < R) & (k < K)
    before = tl.load(place, mask=inside, other=0.0)
    tl.debug_barrier()  # as in `add_partial`
    tl.store(place, before + tl.sum(X, axis=0), mask=inside)
    tl.debug_barrier()
    return total


@triton.jit
def add_partial(pointer, X, c, R: tl.constexpr, D: tl.constexpr, RP: tl.constexpr):
    """Add Σ over tokens of X [BT, RP, BD] to this program's own [R, D]. No other program touches it: no atomics."""
    r = tl.arange(0, RP)
    inside = (r[:, None] < R) & (c[None, :] < D)
    place = pointer + r[:, None] * D + c[None, :]
    before = tl.load(place, mask=inside, other=0.0)
    tl.debug_barrier()  # threads may hold copies of an element: all have read before one writes
    tl.store(place, before + tl.sum(X, axis=0), mask=inside)
    tl.debug_barrier()


# ---------------------------------------------------------------------------------------------------- products


@triton.jit
def per_token(X, Y, PREC: tl.constexpr):
    """X[t] Y[t], on tensor cores: [BT, I, K]. One token is a flat product, a quarter fewer instructions at (8, 64)."""
    if X.shape[0] == 1:
        flat = tl.dot(
            tl.reshape(X, (X.shape[1], X.shape[2])), tl.reshape(Y, (Y.shape[1], Y.shape[2])), input_precision=PREC
        )
        return tl.reshape(flat, (1, X.shape[1], Y.shape[2]))
    return tl.dot(X, Y, input_precision=PREC)


@triton.jit
def project(X, V, PREC: tl.constexpr):
    """Σ_d X[t, r, d] V[d, k], one V for all: [BT, RP, KP]. A flat product of BT · RP rows."""
    BT: tl.constexpr = X.shape[0]
    RP: tl.constexpr = X.shape[1]
    flat = tl.dot(tl.reshape(X, (BT * RP, X.shape[2])), V, input_precision=PREC)
    return tl.reshape(flat, (BT, RP, V.shape[1]))


@triton.jit
def per_token_on_diagonal(X, Y, PREC: tl.constexpr):
    """`per_token` where `tl.dot` takes no sum of 8: one flat product of all tokens, with X[t] on the diagonal, 0 beside
    it. Two tokens of 8 slots fill the tensor core's 16 × 16 numbers, so that it takes hardly more instructions."""
    BT: tl.constexpr = X.shape[0]
    IP: tl.constexpr = X.shape[1]
    J: tl.constexpr = X.shape[2]
    K: tl.constexpr = Y.shape[2]
    if BT == 1:
        return tl.reshape(tl.dot(tl.reshape(X, (IP, J)), tl.reshape(Y, (J, K)), input_precision=PREC), (1, IP, K))
    else:
        if J >= 16:
            return tl.dot(X, Y, input_precision=PREC)
        else:
            t = tl.arange(0, BT)
            diagonal = tl.where((t[:, None] == t[None, :])[:, None, :, None], X[:, :, None, :], 0.0)
            flat = tl.reshape(diagonal, (BT * IP, BT * J))
            return tl.reshape(tl.dot(flat, tl.reshape(Y, (BT * J, K)), input_precision=PREC), (BT, IP, K))


@triton.jit
def project_on_diagonal(X, V, PREC: tl.constexpr):
    """`project`, likewise: a V of fewer than 16 rows once for each token."""
    BT: tl.constexpr = X.shape[0]
    RP: tl.constexpr = X.shape[1]
    D: tl.constexpr = V.shape[0]
    K: tl.constexpr = V.shape[1]
    if D >= 16:
        return tl.reshape(tl.dot(tl.reshape(X, (BT * RP, D)), V, input_precision=PREC), (BT, RP, K))
    else:
        return per_token_on_diagonal(X, tl.broadcast_to(V[None, :, :], (BT, D, K)), PREC)


if LEAST_SUM > 8:
    per_token, project = per_token_on_diagonal, project_on_diagonal


@triton.jit
def correlate(X, Y, PREC: tl.constexpr):
    """Σ_d X[t, i, d] Y[t, k, d]: [BT, IP, KP]."""
    return per_token(X, tl.permute(Y, (0, 2, 1)), PREC)


@triton.jit
def mix(C, X, MANY: tl.constexpr, PREC: tl.constexpr):
    """Cᵀ X of each token, Σ_i C[t, i, k] X[t, i, d]: [BT, KP, BD]."""
    if MANY:
        return per_token(tl.permute(C, (0, 2, 1)), X, PREC)
    return tl.sum(C[:, :, :, None] * X[:, :, None, :], axis=1)


@triton.jit
def unmix(C, Y, MANY: tl.constexpr, PREC: tl.constexpr):
    """C Y of each token, Σ_k C[t, i, k] Y[t, k, d]: [BT, IP, BD]. What `mix` does to gradients."""
    return mix(tl.permute(C, (0, 2, 1)), Y, MANY, PREC)


@triton.jit
def spread(e, V, MANY: tl.constexpr, PREC: tl.constexpr):
    """Σ_k e[t, i, k] V[d, k]: [BT, IP, BD]. What `project` does to gradients."""
    if MANY:
        return project(e, tl.trans(V), PREC)
    Vt = tl.trans(V)
    return tl.sum(e[:, :, :, None] * Vt[None, None, :, :], axis=2)


@triton.jit
def inverse_root(total, count, eps, inside):
    """1/√(total/count + ε), and 0 outside: padding has total = 0, and with ε = 0 its infinity would spoil the sums."""
    return tl.where(inside, 1.0 / tl.sqrt(tl.where(inside, total / count + eps, 1.0)), 0.0)


# ------------------------------------------------------------------------------------------------- coefficients


@triton.jit
def coefficients(p, rstd, static, scale, DYNAMIC: tl.constexpr):
    """C = scale ∘ tanh(q) + static with q = rstd · p, Eqs. (13) and (14), and that tanh. All [BT, IP, KP].

    p = H V unnormalised: the RMSNorm of Eq. (12) is one factor a slot, so it can wait until the sum is done, and H is
    read once for the projection and for its mean square.
    """
    if DYNAMIC:
        T = tanh(p * rstd[:, :, None])
        return scale[None, :, :] * T + static[None, :, :], T
    C = tl.broadcast_to(static[None, :, :], p.shape)
    return C, C


@triton.jit
def through_tanh(E, T, scale):
    """∂L/∂q from E = ∂L/∂C: E ∘ S ∘ (1 − tanh²)."""
    return E * scale[None, :, :] * (1.0 - T * T)
