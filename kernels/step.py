"""`step`: `depth` of one sublayer and `width` of the next, for the same tokens, in one kernel.

    H′ˡ = Bᵀ Z + Âᵀ H′ˡ⁻¹        with the matrices of sublayer l, from H′ˡ⁻¹
    x   = Åᵀ H′ˡ                  with the matrices of sublayer l+1, from H′ˡ; on request its RMSNorm

Reads n + m rows a token and writes n + m: 2 (r + 1) D numbers, the least there is, since the state must come in and go
out. What `width` needs, `depth` has just written, and it is in the cache of the same multiprocessor. As two kernels the
state would be read once more.
"""

from __future__ import annotations

import triton
import triton.language as tl
from vwn_ref.kernels.depth import depth_backward_block, depth_block, own_size, store_depth_partial
from vwn_ref.kernels.tiles import store_partial, tokens
from vwn_ref.kernels.width import width_backward_block, width_block


@triton.jit
def step_kernel(
    H, Z, OUT, X, V, A, B, S_alpha, S_beta, next_A, next_S, norm_gain, T, eps, next_eps, norm_eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, MANY: tl.constexpr, PREC: tl.constexpr, DYNAMIC: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One block of tokens a program."""
    t = tokens(tl.program_id(0), BT)
    depth_block(
        H, Z, OUT, t, T, V, A, B, S_alpha, S_beta, eps,
        M, N, D, MP, NP, BT, BD, MANY, PREC, DYNAMIC,
    )  # fmt: skip
    tl.debug_barrier()  # the rows that other threads of this program wrote are read from here on
    width_block(
        OUT, X, t, T, V + (N + M) * D, next_A, next_S, norm_gain, next_eps, norm_eps,
        M, N, D, MP, NP, BT, BD, MANY, PREC, DYNAMIC, NORM,
    )  # fmt: skip


@triton.jit
def step_backward_kernel(
    H, Z, OUT, G_OUT, G_X, G_H, G_Z, E, next_E, partial, next_partial, norm_partial, V,
    A, B, S_alpha, S_beta, next_A, next_S, norm_gain, T, eps, next_eps, norm_eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, MANY: tl.constexpr, PREC: tl.constexpr, DYNAMIC: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """The backward of `width` turns g_x into a gradient of H′ˡ, added to G_OUT and left in G_H, where the backward of
    `depth` finds it, and puts its own result in its place."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    carry, carry_tanh = tl.zeros((NP, NP), tl.float32), tl.zeros((NP, NP), tl.float32)
    write, write_tanh = tl.zeros((NP, MP), tl.float32), tl.zeros((NP, MP), tl.float32)
    read, read_tanh = tl.zeros((NP, MP), tl.float32), tl.zeros((NP, MP), tl.float32)
    own = partial + program * own_size(M, N, NP, BT)
    for block in range(program, tl.cdiv(T, BT), programs):
        t = tokens(block, BT)
        a, b = width_backward_block(
            OUT, G_X, G_OUT, G_H, next_E, norm_partial + program * (M * D), t, T, V + (N + M) * D,
            next_A, next_S, norm_gain, next_eps, norm_eps, M, N, D, MP, NP, BT, BD, MANY, PREC, DYNAMIC, NORM, True,
        )  # fmt: skip
        read += a
        read_tanh += b
        tl.debug_barrier()
        carry, carry_tanh, write, write_tanh = depth_backward_block(
            H, Z, G_H, G_H, G_Z, E, own, t, T, V, A, B, S_alpha, S_beta, eps,
            carry, carry_tanh, write, write_tanh, M, N, D, MP, NP, BT, BD, MANY, PREC, DYNAMIC,
        )  # fmt: skip
    store_depth_partial(own, carry, carry_tanh, write, write_tanh, M, N, DYNAMIC)
    own = next_partial + program * (2 * N * M)
    store_partial(own, read, 0, N, M, M)
    if DYNAMIC:
        store_partial(own + N * M, read_tanh, 0, N, M, M)
