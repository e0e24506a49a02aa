"""The seam for speed: what computes `width` and `depth` of a GHC.

A GHC asks for its set of operations when it is built; "auto" is a set that looks at the tensors of every call. Whole
stacks of sublayers have a second seam, `vwn_ref.stack`, which fuses what lies between two of them.

A set of operations is a module (or namespace) with three functions of the same meaning and arguments as

    vwn_ref.ghc.width(H, A, B)                                       -> x, state
    vwn_ref.dynamic.dynamic_width(H, A, B, W_α, W_β, S_α, S_β, gain, eps) -> x, state
    vwn_ref.ghc.depth(z, state)                                      -> H

`state` belongs to the set that made it and is opaque to everything else.

    "reference"  the readable functions themselves
    "cpu"        `vwn_ref.kernels.cpu`: C++ compiled on first use, PyTorch operations where there is no compiler
    "triton"     `vwn_ref.kernels.fused`: Triton kernels for GPUs
    "auto"       the fastest for the tensors that come: "triton" or "cpu" for those it is made for, else the reference
"""

from __future__ import annotations

import functools
import sys
from types import ModuleType, SimpleNamespace

from torch import Tensor

from vwn_ref import dynamic, ghc
from vwn_ref.config import KERNELS, check_choice

OLDEST_TRITON = (3, 5)  # before it the matrices of a product must have 16 rows and columns

reference = SimpleNamespace(width=ghc.width, dynamic_width=dynamic.dynamic_width, depth=ghc.depth)


@functools.cache
def triton_kernels() -> ModuleType | None:
    """`vwn_ref.kernels.fused`, None where Triton is not installed, or too old."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return None
    from vwn_ref.kernels.tiles import VERSION

    if VERSION < OLDEST_TRITON:
        return None
    from vwn_ref.kernels import fused

    return fused


def select(kernels: str) -> SimpleNamespace:
    """The operations that `kernels` names: "reference", "cpu", "triton", or "auto" for the fastest here.

    Raises ValueError for another name, and for "triton" where Triton 3.5 or newer is not installed.
    """
    check_choice("kernels", kernels, KERNELS)
    if kernels == "reference":
        return reference
    # Namespaces, since a model holds them, and modules can be neither copied nor pickled.
    if kernels == "triton":
        fused = triton_kernels()
        if fused is None:
            raise ValueError(
                "kernels = 'triton': Triton 3.5 or newer is not installed (pip install triton; it is made for Linux "
                "with an NVIDIA or AMD GPU); without it must be 'auto', 'cpu' or 'reference'"
            )
        return SimpleNamespace(width=fused.width, dynamic_width=fused.dynamic_width, depth=fused.depth)
    if kernels == "auto":
        return SimpleNamespace(width=_width, dynamic_width=_dynamic_width, depth=_depth)
    from vwn_ref.kernels import cpu  # which stands on the reference

    # Tensors that it is not made for it hands to the reference, one by one.
    return SimpleNamespace(width=cpu.width, dynamic_width=cpu.dynamic_width, depth=cpu.depth)


def _fastest(*tensors: Tensor) -> ModuleType:
    """What "auto" means for these tensors, H first."""
    if tensors[0].device.type == "cuda":
        fused = triton_kernels()
        if fused is not None and fused.suited(*tensors):
            return fused
    from vwn_ref.kernels import cpu

    return cpu


def _width(H: Tensor, A: Tensor, B: Tensor):
    return _fastest(H, A, B).width(H, A, B)


def _dynamic_width(H: Tensor, *parameters):
    return _fastest(H, *parameters[:-1]).dynamic_width(H, *parameters)


def _depth(z: Tensor, state: tuple):
    fused = sys.modules.get("vwn_ref.kernels.fused")
    if fused is not None and isinstance(state, fused.State):
        return fused.depth(z, state)
    from vwn_ref.kernels import cpu

    return cpu.depth(z, state)
