"""The one seam for speed: what computes `width` and `depth`, chosen once, when a GHC is built.

A set of operations is a module (or namespace) with three functions of the same meaning and arguments as

    vwn_ref.ghc.width(H, A, B)                                       -> x, state
    vwn_ref.dynamic.dynamic_width(H, A, B, W_α, W_β, S_α, S_β, gain, eps) -> x, state
    vwn_ref.ghc.depth(z, state)                                      -> H

`state` belongs to the set that made it and is opaque to everything else.

    "reference"  the readable functions themselves
    "cpu"        `vwn_ref.kernels.cpu`: C++ compiled on first use, PyTorch operations where there is no compiler
    "triton"     `vwn_ref.kernels.fused`: Triton kernels for GPUs
    "auto"       the fastest for the tensors that come: "triton" or "cpu" for those it is made for, else the reference

`through` runs a stack of sublayers, the loop of Algorithm 1. The Triton kernels also have one for what happens between
two sublayers, `depth` of one and `width` of the next; where they are chosen it uses that.
"""

from __future__ import annotations

import functools
import sys
from types import ModuleType, SimpleNamespace

from torch import Tensor, nn

from vwn_ref import dynamic, ghc
from vwn_ref.backbone import Sublayer
from vwn_ref.config import KERNELS, check_choice
from vwn_ref.reduce import Reduce

reference = SimpleNamespace(width=ghc.width, dynamic_width=dynamic.dynamic_width, depth=ghc.depth)


@functools.cache
def triton_kernels() -> ModuleType | None:
    """`vwn_ref.kernels.fused`, None where Triton is not installed."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return None
    from vwn_ref.kernels import fused

    return fused


def select(kernels: str):
    """The operations that `kernels` names: "reference", "cpu", "triton", or "auto" for the fastest here.

    Raises ValueError for another name, and for "triton" where Triton is not installed.
    """
    check_choice("kernels", kernels, KERNELS)
    if kernels == "reference":
        return reference
    # Namespaces, since a model holds them, and modules can be neither copied nor pickled.
    if kernels == "triton":
        fused = triton_kernels()
        if fused is None:
            raise ValueError(
                "kernels = 'triton': Triton is not installed (pip install triton; it is made for Linux with an NVIDIA "
                "or AMD GPU); without it must be 'auto', 'cpu' or 'reference'"
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


# ------------------------------------------------------------------------------------------------ whole stacks


def through(H: Tensor, connections: nn.ModuleList, layers: nn.ModuleList, reduce: nn.Module | None = None) -> Tensor:
    """H′⁰ [..., n, d_b] through all sublayers -> H′ᴸ; with `reduce`, which it is handed to, h_reduce [..., D].

    connections: a GHC or residual for each of `layers`, the sublayers Tˡ of `vwn_ref.backbone`.
    """
    fused = triton_kernels() if _may_fuse(H, connections, layers) else None
    if fused is None:
        for connection, layer in zip(connections, layers, strict=True):
            H = connection(H, layer)  # Eq. (10)
        return H if reduce is None else reduce(H)

    # The same in another rhythm: width | body, depth + width | body, depth + width | … | body, depth. A sublayer's
    # RMSNorm goes with the width before it, the GroupNorm of reduce with the last depth.
    connections[0]._check_state(H)
    parameters = [fused.Parameters(*c.parameters_in_order()) for c in connections]
    x, state = fused.enter(H, parameters[0], connections[0].eps, layers[0].norm)
    for l in range(1, len(layers)):  # noqa: E741 - the paper's letter
        x, state = fused.step(layers[l - 1].body(x), state, parameters[l], connections[l].eps, layers[l].norm)
    z = layers[-1].body(x)
    if type(reduce) is Reduce and reduce.norm is not None and not _watched(reduce, reduce.norm):
        return reduce.linear(fused.last(z, state, reduce.norm).flatten(-2))
    H = fused.depth(z, state)
    return H if reduce is None else reduce(H)


def _may_fuse(H: Tensor, connections: nn.ModuleList, layers: nn.ModuleList) -> bool:
    """True where every connection is a GHC of one kind that the Triton kernels compute, and nobody watches it.

    The fused path calls neither the connections nor the layers nor their norms, only bodies: they must be exactly what
    it takes them for, not subclasses or wrappers, and nobody's hooks may be passed over.
    """
    if len(connections) != len(layers) or len(layers) == 0:
        return False
    if not all(type(c) in (ghc.GHC, dynamic.DynamicGHC) and c.kernels in ("auto", "triton") for c in connections):
        return False
    if H.device.type != "cuda" and any(c.kernels == "auto" for c in connections):
        return False
    if not all(type(layer) is Sublayer and type(layer.norm) is nn.RMSNorm for layer in layers):
        return False
    fused = triton_kernels()
    if fused is None or len({(type(c), c.dim, c.m, c.n) for c in connections}) > 1:
        return False
    if _watched(*connections, *layers, *(layer.norm for layer in layers)):
        return False
    return all(fused.suited(H, *c.parameters_in_order()) for c in connections)


def _watched(*modules: nn.Module) -> bool:
    """True where a hook waits for one of these modules, or for any."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    anywhere = (f"_global{name}" for name in hooks)
    return any(getattr(m, name) for m in modules for name in hooks) or any(
        getattr(nn.modules.module, name) for name in anywhere
    )
