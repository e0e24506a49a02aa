"""The one seam for speed: what computes `width` and `depth`, chosen once, when a GHC is built.

A set of operations is a module (or namespace) with three functions of the same meaning and arguments as

    vwn_ref.ghc.width(H, A, B)                                       -> x, state
    vwn_ref.dynamic.dynamic_width(H, A, B, W_α, W_β, S_α, S_β, gain, eps) -> x, state
    vwn_ref.ghc.depth(z, state)                                      -> H

`state` belongs to the set that made it and is opaque to everything else.

    "reference"  the readable functions themselves
    "cpu"        `vwn_ref.kernels.cpu`: C++ compiled on first use, PyTorch operations where there is no compiler
    "auto"       the fastest for the tensors that come: "cpu" for those it is made for, else the reference
"""

from __future__ import annotations

from types import SimpleNamespace

from vwn_ref import dynamic, ghc
from vwn_ref.config import KERNELS, check_choice

reference = SimpleNamespace(width=ghc.width, dynamic_width=dynamic.dynamic_width, depth=ghc.depth)


def select(kernels: str):
    """The operations that `kernels` names: "reference", "cpu", "triton", or "auto" for the fastest here.

    Raises ValueError for another name, and for "triton", which this version does not have.
    """
    check_choice("kernels", kernels, KERNELS)
    if kernels == "reference":
        return reference
    if kernels == "triton":
        raise ValueError(
            "kernels = 'triton': fused Triton kernels are not part of this version; "
            "must be 'auto', 'cpu' or 'reference'"
        )
    from vwn_ref.kernels import cpu  # which stands on the reference

    # Tensors that it is not made for it hands to the reference, one by one. Not the module itself: a model holds this,
    # and modules can be neither copied nor pickled.
    return SimpleNamespace(width=cpu.width, dynamic_width=cpu.dynamic_width, depth=cpu.depth)
