"""What the kernels for up to 4 slots are made of: whole rows in registers, sums, and coefficients.

One program works on one token at a time. A *row* is a tensor [BD] in float32, the d_b numbers of a slot or segment,
filled up with zeros to BD, a power of two; rows of a state are a tuple of n of them, those of x or z a tuple of m. So
nothing is padded to four slots, every sum over slots is multiply-and-add, and a row is read from memory once.

Coefficients exist twice. As *numbers*, a tuple of scalars, which multiply rows; every thread of a program has each. And
*packed*, [P], a coefficient a thread, where tanh and its derivative are taken, so that a warp takes all tanh at once.
Coefficient (i, k), of slot i and column k, has the place k n + i in both.
"""

from __future__ import annotations

import triton
import triton.language as tl

# ---------------------------------------------------------------------------------------------------------- rows


@triton.jit
def load_row(pointer, i, D: tl.constexpr, BD: tl.constexpr):
    """Row i of a contiguous [R, D], as float32."""
    c = tl.arange(0, BD)
    if D == BD:
        return tl.load(pointer + i * D + c).to(tl.float32)
    return tl.load(pointer + i * D + c, mask=c < D, other=0.0).to(tl.float32)


@triton.jit
def load_rows(pointer, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """All R rows."""
    rows = ()
    for i in tl.static_range(R):
        rows += (load_row(pointer, i, D, BD),)
    return rows


@triton.jit
def store_row(pointer, row, i, D: tl.constexpr, BD: tl.constexpr):
    """The inverse; rounds to the type of the memory. Returns the row as it was stored."""
    c = tl.arange(0, BD)
    row = row.to(pointer.dtype.element_ty)
    if D == BD:
        tl.store(pointer + i * D + c, row)
    else:
        tl.store(pointer + i * D + c, row, mask=c < D)
    return row.to(tl.float32)


@triton.jit
def touch(pointer, left, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Of each of R rows of 16-bit numbers that come later one in every 32 bytes: then all of them are in the cache when
    they are wanted. `left`: so many tokens come later. `gather` and `keep` see to it that the compiler does not leave
    out these loads."""
    c = 16 * tl.arange(0, BD // 16)
    kept = ()
    for i in tl.static_range(R):
        x = tl.load(pointer + i * D + c, mask=(c < D) & (left > c * 0), other=0.0)
        kept += (x.to(tl.int16, bitcast=True),)
    return kept


@triton.jit
def gather(kept, touched):
    """kept, with what was touched."""
    for i in tl.static_range(len(touched)):
        kept |= touched[i]
    return kept


@triton.jit
def keep(pointer, kept, T):
    """Nothing, since no T is negative: but that the compiler does not know."""
    i = tl.arange(0, kept.shape[0])
    tl.store(pointer + i, kept.to(pointer.dtype.element_ty, bitcast=True), mask=i * 0 > T)


@triton.jit
def add_rows(pointer, rows, BD: tl.constexpr, PIECES: tl.constexpr):
    """Add rows to a float32 [R, BD] that no other program touches.

    A thread that loaded sixteen bytes of a row has eight neighbouring columns of 16-bit numbers, but four of float32.
    So a row lies there in PIECES, [2, BD / 8, 4] for 16 bits and [1, BD / 4, 4] for 32: then each thread reads and
    writes its own columns, sixteen bytes at a time, and none change hands (from Triton 3.7 on). That order
    `norm_gradient_kernel` undoes.
    """
    piece, four = tl.arange(0, PIECES)[:, None, None], tl.arange(0, BD // PIECES // 4)[None, :, None]
    place = pointer + piece * (BD // PIECES) + four * 4 + tl.arange(0, 4)[None, None, :]
    before = ()
    for k in tl.static_range(len(rows)):
        before += (tl.load(place + k * BD),)
    tl.debug_barrier()  # threads may hold copies of an element: all have read before one writes
    for k in tl.static_range(len(rows)):
        row = tl.permute(tl.reshape(rows[k], (BD // PIECES // 4, PIECES, 4)), (1, 0, 2))
        tl.store(place + k * BD, before[k] + row)
    tl.debug_barrier()


@triton.jit
def combine(numbers, rows, first: tl.constexpr, step: tl.constexpr):
    """Σ_j numbers[first + step · j] · rows[j]: a column of Cᵀ X with step = 1, a row of C X with step = n."""
    row = numbers[first] * rows[0]
    for j in tl.static_range(1, len(rows)):
        row += numbers[first + step * j] * rows[j]
    return row


# ---------------------------------------------------------------------------------------------------------- sums


@triton.jit
def join_all(rows, Q: tl.constexpr):
    """Q rows, a power of two, as one tensor [BD, 2, …, 2]."""
    if Q == 1:
        return rows[0]
    else:
        pairs = ()
        for i in tl.static_range(Q // 2):
            pairs += (tl.join(rows[2 * i], rows[2 * i + 1]),)
        return join_all(pairs, Q // 2)


@triton.jit
def split_all(x, Q: tl.constexpr):
    """[2, …, 2] as Q numbers: the inverse."""
    if Q == 1:
        return (x,)
    else:
        a, b = tl.split(x)
        return split_all(a, Q // 2) + split_all(b, Q // 2)


@triton.jit
def sums(rows, Q: tl.constexpr = 8):
    """Σ_d of each row -> numbers. Q at a time: several warps then meet once for Q sums, not once for each."""
    numbers = ()
    for i in tl.static_range(0, len(rows) // Q * Q, Q):
        numbers += split_all(tl.sum(join_all(rows[i : i + Q], Q), axis=0), Q)
    if len(rows) % Q > 0:
        numbers += sums(rows[len(rows) // Q * Q :], Q // 2)
    return numbers


# -------------------------------------------------------------------------------------------------- coefficients


@triton.constexpr_function
def packed_size(count):
    """P for so many coefficients: at least 32, or every thread would have them all."""
    return max(32, triton.next_power_of_2(count))


@triton.jit
def pack(numbers, P: tl.constexpr):
    """Numbers -> [P], zeros behind them."""
    place = tl.arange(0, P)
    packed = tl.zeros((P,), tl.float32)
    for j in tl.static_range(len(numbers)):
        packed = tl.where(place == j, numbers[j], packed)
    return packed


@triton.jit
def unpack(packed, P: tl.constexpr):
    """[P] -> P numbers."""
    if P == 1:
        return (tl.sum(packed),)
    elif P == 2:
        return tl.split(packed)
    else:
        a, b = tl.split(tl.permute(tl.reshape(packed, (2, P // 2)), (1, 0)))
        return unpack(a, P // 2) + unpack(b, P // 2)


@triton.jit
def of_slots(numbers, P: tl.constexpr):
    """A number a slot, for each of the slot's coefficients: packed."""
    slot = tl.arange(0, P) % len(numbers)
    packed = tl.zeros((P,), tl.float32)
    for i in tl.static_range(len(numbers)):
        packed = tl.where(slot == i, numbers[i], packed)
    return packed
