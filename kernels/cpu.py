"""GHC on a CPU: `width`, `dynamic_width` and `depth` with the arguments of the reference functions of those names.

`backend` computes the raw operations, forward and backward, in C++ or by PyTorch operations; `operation` makes them
differentiable.

What they cannot do goes to the reference: other devices and dtypes, autocast, `torch.func` transforms, forward-mode
AD, tensor subclasses, matrices with token dimensions of their own, very wide states. So does a second derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from vwn_ref.kernels import backend
from vwn_ref.kernels.compiler import SCALARS
from vwn_ref.kernels.operation import Operation, check_shape, transformed

from vwn_ref import dynamic, ghc

LARGEST = 2**15  # elements of one token's state, and of its coefficients, that the kernels' tiles are meant for


class StaticState(NamedTuple):
    """What `width` hands to `depth`: B [m, n] and Âᵀ H′ [..., n, d_b]."""

    B: Tensor
    carried: Tensor


class DynamicState(NamedTuple):
    """What `dynamic_width` hands to `depth`: ℬᵀ [..., n, m], slots first, and Âᵀ H′ [..., n, d_b]."""

    Bt: Tensor
    carried: Tensor


# --------------------------------------------------------------------------------------------------- operations


def _reference_dynamic_width(*arguments):
    x, (B, carried) = dynamic.dynamic_width(*arguments)
    return x, carried, B.mT


def _reference_static_width(H, A):
    m = A.shape[1] - A.shape[0]
    x, (_, carried) = ghc.width(H, A, A.new_zeros(m, A.shape[0]))
    return x, carried


def _reference_dynamic_depth(z, Bt):
    return (ghc.depth(z, (Bt.mT, z.new_zeros(*Bt.shape[:-1], z.shape[-1] // Bt.shape[-1]))),)


def _reference_static_depth(z, B):
    return (ghc.depth(z, (B, z.new_zeros(*z.shape[:-1], B.shape[1], z.shape[-1] // B.shape[0]))),)


def _operation(name: str, state: Callable, **rest) -> Operation:
    """Of the backends' function `name`; state: (inputs) -> (the over-width tensor among them, m), which selects one."""

    def run(*arguments):
        return getattr(backend.of_state(*state(arguments)), name)(*arguments)

    def run_backward(*arguments):  # the gradient of H, carried or H_next has the shape of H
        return getattr(backend.of_state(*state(arguments)), f"{name}_backward")(*arguments)

    return Operation(name, run=run, run_backward=run_backward, device_types="cpu", **rest)


_H_SHAPES = "Tensor H, Tensor A, Tensor B, Tensor W_alpha, Tensor W_beta, Tensor S_alpha, Tensor S_beta, Tensor gain"

_dynamic_width = _operation(
    "dynamic_width",
    inputs=f"{_H_SHAPES}, float eps",
    kept=8,
    outputs=3,
    state=lambda t: (t[0], t[2].shape[0]),
    shapes=lambda H, A, B, *_: (
        (*H.shape[:-2], B.shape[0] * H.shape[-1]),
        H.shape,
        (*H.shape[:-1], B.shape[0]),
    ),
    reference=_reference_dynamic_width,
    rest=lambda *g: (None,),
)
_static_width = _operation(
    "static_width",
    inputs="Tensor H, Tensor A",
    kept=2,
    outputs=2,
    state=lambda t: (t[0], t[1].shape[1] - t[1].shape[0]),
    shapes=lambda H, A: ((*H.shape[:-2], (A.shape[1] - A.shape[0]) * H.shape[-1]), H.shape),
    reference=_reference_static_width,
    rest=lambda *g: (),
)
_dynamic_depth = _operation(
    "dynamic_depth",
    inputs="Tensor z, Tensor Bt, Tensor carried",
    kept=2,
    outputs=1,
    state=lambda t: (t[2], t[1].shape[-1]),
    shapes=lambda z, Bt, carried: (carried.shape,),
    reference=_reference_dynamic_depth,
    rest=lambda g: (g,),
)
_static_depth = _operation(
    "static_depth",
    inputs="Tensor z, Tensor B, Tensor carried",
    kept=2,
    outputs=1,
    state=lambda t: (t[2], t[1].shape[0]),
    shapes=lambda z, B, carried: (carried.shape,),
    reference=_reference_static_depth,
    rest=lambda g: (g,),
)


# ------------------------------------------------------------------------------------------------ which tensors


def _suited(*tensors: Tensor) -> bool:
    """True where the kernels compute what the reference would."""
    first = tensors[0]
    if first.dtype not in SCALARS or first.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    if any(t.dtype is not first.dtype or t.device.type != "cpu" for t in tensors):
        return False
    if transformed():
        return False
    return torch.compiler.is_compiling() or all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


def _check_state(H: Tensor) -> tuple[int, int]:
    if H.ndim < 2:
        raise ValueError(f"H has shape {tuple(H.shape)}: must be [..., n, d_b]")
    return H.shape[-2], H.shape[-1]


# ------------------------------------------------------------------------------------------------- the functions


def width(H: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`vwn_ref.ghc.width`: H [..., n, d_b], A [n, m+n], B [m, n] -> x [..., D] and the state for `depth`."""
    n, d = _check_state(H)
    if A.ndim != 2 or B.ndim != 2 or n * max(d, A.shape[1]) > LARGEST or not _suited(H, A, B):
        return ghc.width(H, A, B)
    m = B.shape[0]
    check_shape("B", B, (m, n), "[m, n]")
    check_shape("A", A, (n, m + n), "[n, m+n]")
    if not backend.is_compiled(m, n, d, H.dtype):
        return ghc.width(H, A, B)  # one matrix for all tokens: PyTorch alone does no better than the reference
    x, carried = _static_width(H, A)
    return x, StaticState(B, carried)


def dynamic_width(
    H: Tensor, A: Tensor, B: Tensor, W_alpha: Tensor, W_beta: Tensor, S_alpha: Tensor, S_beta: Tensor, gain: Tensor,
    eps: float | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """`vwn_ref.dynamic.dynamic_width`, with the parameters of `DynamicGHC`, in the order of its arguments:

    H [..., n, d_b] -> x [..., D] and the state for `depth`. eps None is the machine epsilon, as in torch's RMSNorm.
    """
    tensors = (H, A, B, W_alpha, W_beta, S_alpha, S_beta, gain)
    n, d = _check_state(H)
    if n * max(d, 3 * n) > LARGEST or not _suited(*tensors):
        return dynamic.dynamic_width(*tensors, eps)
    m = B.shape[0]
    check_shape("B", B, (m, n), "[m, n]")
    check_shape("A", A, (n, m + n), "[n, m+n]")
    check_shape("W_alpha", W_alpha, (d, m + n), "[d_b, m+n]")
    check_shape("W_beta", W_beta, (d, m), "[d_b, m]")
    check_shape("S_alpha", S_alpha, (n, m + n), "[n, m+n]")
    check_shape("S_beta", S_beta, (m, n), "[m, n]")
    check_shape("gain", gain, (d,), "[d_b]")
    x, carried, Bt = _dynamic_width(*tensors, torch.finfo(H.dtype).eps if eps is None else eps)
    return x, DynamicState(Bt, carried)


def depth(z: Tensor, state: tuple[Tensor, ...]) -> Tensor:
    """`vwn_ref.ghc.depth`: z [..., D] and the state of `width` or `dynamic_width` -> H [..., n, d_b]."""
    if not isinstance(state, StaticState | DynamicState):
        return ghc.depth(z, state)
    matrix, carried = state
    m = matrix.shape[0] if isinstance(state, StaticState) else matrix.shape[-1]
    check_shape("z", z, (*carried.shape[:-2], m * carried.shape[-1]), "[..., D]")
    if not _suited(z, matrix, carried):
        return ghc.depth(z, (matrix if isinstance(state, StaticState) else matrix.mT, carried))
    return (_static_depth if isinstance(state, StaticState) else _dynamic_depth)(z, matrix, carried)
