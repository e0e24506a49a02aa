"""Every Triton kernel once, forward and backward, at small sizes, for compute-sanitizer: `python every_kernel.py`.

33 tokens and d_b of 24 leave the last block and the last chunk partly empty. test_gpu.py compiles the same kernels
before, and looks at their numbers.
"""

from __future__ import annotations

import contextlib
import itertools
from unittest import mock

import torch
from torch import nn
from vwn_ref.kernels import fused, launch

TOKENS = 33
CASES = [  # m, n, d_b, and whether rows are taken to be too long for the registers
    (2, 4, 24, False),
    (2, 4, 520, False),  # rows over four warps
    (2, 4, 24, True),  # four tokens a tile, float32 by walks
    (4, 8, 24, False),
    (8, 64, 24, False),  # float32: step's backward is two kernels
]
DTYPES = (torch.bfloat16, torch.float32)


def long_rows(walk: bool):
    """As if they did not fit the registers."""
    return mock.patch.object(launch, "whole_rows", lambda *_, **__: 0) if walk else contextlib.nullcontext()


def every_kernel(m: int, n: int, d: int, walk: bool, dtype: torch.dtype) -> None:
    """width, step with a norm behind it and without, depth, last; and all their gradients."""
    k = m + n
    shapes = [(n, k), (m, n), (d, k), (d, m), (n, k), (m, n), (d,)]
    own = fused.Parameters(*(torch.randn(s, device="cuda", requires_grad=True) for s in shapes))
    H = torch.randn(TOKENS, n, d, device="cuda", dtype=dtype, requires_grad=True)
    norm = nn.RMSNorm(m * d, eps=1e-6, device="cuda")
    with long_rows(walk):
        x, state = fused.enter(H, own, 1e-6, norm)
        x, state = fused.step(x, state, own, 1e-6, norm)
        x, state = fused.step(x, state, own, 1e-6)
        y = fused.last(x, state, nn.GroupNorm(n // m, n * d, device="cuda"))
        (y.float().square().mean() + fused.depth(x, state).float().square().mean()).backward()
    assert y.isfinite().all() and own.W_alpha.grad.isfinite().all()


if __name__ == "__main__":
    for case, dtype in itertools.product(CASES, DTYPES):
        every_kernel(*case, dtype)
    torch.cuda.synchronize()
