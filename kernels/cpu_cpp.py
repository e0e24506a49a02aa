"""The raw operations by `ghc_cpu.cpp`: shapes and pointers, nothing else. No autograd here.

x, z, g_x, g_z [..., D]; H, carried and their gradients [..., n, d_b]; Bt = ℬᵀ [..., n, m], slots first.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _ready(t: Tensor) -> Tensor:
    """The same numbers, one after the other in memory."""
    return t.resolve_neg().contiguous()


def _tokens(H: Tensor) -> int:
    return H.numel() // (H.shape[-2] * H.shape[-1])


class Operations:
    """The functions of one shared object (one shape), on tensors."""

    def __init__(self, library) -> None:
        self.library = library

    def dynamic_width(self, H, A, B, W_alpha, W_beta, S_alpha, S_beta, gain, eps):
        """-> x, carried, Bt."""
        inputs = [_ready(t) for t in (H, A, B, W_alpha, W_beta, S_alpha, S_beta, gain)]
        H, m = inputs[0], B.shape[0]
        x = H.new_empty((*H.shape[:-2], m * H.shape[-1]))
        carried, Bt = torch.empty_like(H), H.new_empty((*H.shape[:-1], m))
        self._call("ghc_dynamic_width", _tokens(H), *inputs, x, carried, Bt, eps=eps)
        return x, carried, Bt

    def dynamic_width_backward(self, H, A, B, W_alpha, W_beta, S_alpha, S_beta, gain, eps, g_x, g_carried, g_Bt):
        """-> gradients of the eight tensors."""
        inputs = [_ready(t) for t in (H, A, B, W_alpha, W_beta, S_alpha, S_beta, gain)]
        gradients = [_ready(t) for t in (g_x, g_carried, g_Bt)]
        results = [torch.empty_like(t) for t in inputs]
        self._call("ghc_dynamic_width_backward", _tokens(H), *inputs, *gradients, *results, eps=eps)
        return tuple(results)

    def dynamic_depth(self, z, Bt, carried):
        """-> H."""
        return self._depth("ghc_dynamic_depth", z, Bt, carried)

    def dynamic_depth_backward(self, z, Bt, g):
        """-> gradients of z and Bt; that of `carried` is g."""
        return self._depth_backward("ghc_dynamic_depth_backward", z, Bt, g)

    def static_width(self, H, A):
        """-> x, carried."""
        H, A = _ready(H), _ready(A)
        x, carried = H.new_empty((*H.shape[:-2], (A.shape[1] - A.shape[0]) * H.shape[-1])), torch.empty_like(H)
        self._call("ghc_static_width", _tokens(H), H, A, x, carried)
        return x, carried

    def static_width_backward(self, H, A, g_x, g_carried):
        """-> gradients of H and A."""
        H, A, g_x, g_carried = _ready(H), _ready(A), _ready(g_x), _ready(g_carried)
        g_H, g_A = torch.empty_like(H), torch.empty_like(A)
        self._call("ghc_static_width_backward", _tokens(H), H, A, g_x, g_carried, g_H, g_A)
        return g_H, g_A

    def static_depth(self, z, B, carried):
        """-> H, with one B [m, n] for all tokens."""
        return self._depth("ghc_static_depth", z, B, carried)

    def static_depth_backward(self, z, B, g):
        """-> gradients of z and B."""
        return self._depth_backward("ghc_static_depth_backward", z, B, g)

    def _depth(self, name, z, B, carried):
        z, B, carried = _ready(z), _ready(B), _ready(carried)
        H = torch.empty_like(carried)
        self._call(name, _tokens(H), z, B, carried, H)
        return H

    def _depth_backward(self, name, z, B, g):
        z, B, g = _ready(z), _ready(B), _ready(g)
        g_z, g_B = torch.empty_like(z), torch.empty_like(B)
        self._call(name, _tokens(g), z, B, g, g_z, g_B)
        return g_z, g_B

    def _call(self, name: str, tokens: int, *tensors: Tensor, eps: float | None = None) -> None:
        numbers = (tokens, torch.get_num_threads()) if eps is None else (tokens, torch.get_num_threads(), eps)
        getattr(self.library, name)(*numbers, *[t.data_ptr() for t in tensors])
