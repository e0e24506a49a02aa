"""The raw operations by PyTorch alone, for a machine without a compiler. No autograd here.

The formulas are those of `ghc_cpu.cpp`, as few large operations: the slots of all tokens are the rows of one product
with W; sums over d_b are products with a vector of ones, for PyTorch reduces short rows slowly; and each product of
tiny matrices is one `bmm` on views that it takes without a copy. Keeping nothing but H, with a backward pass written
out, is what makes this faster than the reference, which says the same with more and smaller steps.

x, z, g_x, g_z [..., D]; H, carried and their gradients [..., n, d_b]; Bt = ℬᵀ [..., n, m], slots first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _rows(t: Tensor, rows: int, columns: int) -> Tensor:
    """[..., rows · columns in any split] -> [tokens, rows, columns]."""
    tokens = t.numel() // (rows * columns)
    return t.reshape(tokens, rows, columns)


def _own(t: Tensor, *shape: int) -> Tensor:
    """A contiguous copy, of another shape where one is given. Results must not share memory, nor be views: autograd
    lets nobody change a view in place that a Function has returned."""
    copy = t.new_empty(shape or t.shape)
    copy.view(t.shape).copy_(t)
    return copy


def _side_by_side(A: Tensor, B: Tensor) -> Tensor:
    """(A | Bᵀ) [n, K]: the order of the coefficient columns, Å | Â | ℬᵀ."""
    return torch.cat([A, B.mT], dim=1)


def _sum_last(t: Tensor, scale: float = 1.0) -> Tensor:
    """scale · Σ over the last axis, kept as an axis of one."""
    return t @ t.new_full((t.shape[-1], 1), scale)


def _coefficients(h: Tensor, W_alpha, W_beta, gain, eps):
    """rstd [T, n, 1], gain · W / τ [d, K] and tanh [T, n, K], Eqs. (12)-(14)."""
    d = h.shape[-1]
    rstd = _sum_last(h.square(), 1 / d).add_(eps).rsqrt_()
    W = torch.cat([W_alpha, W_beta], dim=1) * (gain / math.sqrt(d)).unsqueeze(1)
    return rstd, W, (h @ W).mul_(rstd).tanh_()


def dynamic_width(H, A, B, W_alpha, W_beta, S_alpha, S_beta, gain, eps):
    """-> x, carried, Bt."""
    (n, d), m = H.shape[-2:], B.shape[0]
    h = _rows(H, n, d)
    _, _, tanh = _coefficients(h, W_alpha, W_beta, gain, eps)
    C = torch.addcmul(_side_by_side(A, B), tanh, _side_by_side(S_alpha, S_beta))
    mixed = torch.bmm(C[..., : m + n].mT, h)  # one product: for smaller ones PyTorch has a slower code
    x = _own(mixed[:, :m], *H.shape[:-2], m * d)
    return x, _own(mixed[:, m:], *H.shape), _own(C[..., m + n :], *H.shape[:-1], m)


def dynamic_width_backward(H, A, B, W_alpha, W_beta, S_alpha, S_beta, gain, eps, g_x, g_carried, g_Bt):
    """-> gradients of the eight tensors."""
    (n, d), m = H.shape[-2:], B.shape[0]
    h = _rows(H, n, d)
    g = torch.cat([_rows(g_x, m, d), _rows(g_carried, n, d)], dim=1)  # of the m+n mixed rows
    rstd, W, tanh = _coefficients(h, W_alpha, W_beta, gain, eps)
    S = _side_by_side(S_alpha, S_beta)
    C = torch.addcmul(_side_by_side(A, B), tanh, S)
    E = torch.cat([torch.bmm(h, g.mT), _rows(g_Bt, n, m)], dim=2)  # of C = S ∘ tanh + static
    g_S, g_static = _sum_tokens(E * tanh), _sum_tokens(E)
    e = E.mul_(S).mul_(tanh.square_().neg_().add_(1)).mul_(rstd)  # of h W
    g_h = e @ W.mT
    pull = _sum_last(g_h * h, -1 / d).mul_(rstd.square_())  # through rstd: Σ_k e · h W = Σ_d h · e Wᵀ
    g_h = torch.baddbmm(g_h.addcmul_(h, pull), C[..., : m + n], g)
    g_W = h.reshape(-1, d).mT @ e.view(-1, e.shape[-1]) / math.sqrt(d)  # of gain · W
    g_gain = (g_W * torch.cat([W_alpha, W_beta], dim=1)).sum(1)
    parts = ((t[:, : m + n], t[:, m + n :]) for t in (g_static, g_W * gain.unsqueeze(1), g_S))
    (g_A, g_B), (g_W_alpha, g_W_beta), (g_S_alpha, g_S_beta) = parts
    parameters = (_own(t) for t in (g_A, g_B.mT, g_W_alpha, g_W_beta, g_S_alpha, g_S_beta.mT, g_gain))
    return g_h.view(H.shape), *parameters


def _sum_tokens(t: Tensor) -> Tensor:
    """Σ over tokens."""
    return (t.new_ones(1, t.shape[0]) @ t.flatten(1)).view(t.shape[1:])


def dynamic_depth(z, Bt, carried):
    """-> H."""
    (n, d), m = carried.shape[-2:], Bt.shape[-1]
    H = carried.new_empty(carried.shape)
    torch.baddbmm(_rows(carried, n, d), _rows(Bt, n, m), _rows(z, m, d), out=_rows(H, n, d))
    return H


def dynamic_depth_backward(z, Bt, g):
    """-> gradients of z and Bt; that of `carried` is g."""
    (n, d), m = g.shape[-2:], Bt.shape[-1]
    g, z_rows = _rows(g, n, d), _rows(z, m, d)
    return torch.bmm(_rows(Bt, n, m).mT, g).view(z.shape), torch.bmm(g, z_rows.mT).view(Bt.shape)


def _mixed(H, A):
    """Aᵀ H of every token, one A for all: [..., n, d_b], [n, k] -> [..., k, d_b]."""
    return torch.einsum("nk,...nd->...kd", A, H)


def _correlation(a, b):
    """Σ over tokens and d_b of a[..., i, d] b[..., k, d] -> [i, k]."""
    return torch.einsum("tid,tkd->ik", a.flatten(0, -3), b.flatten(0, -3))


def static_width(H, A):
    """-> x, carried."""
    m = A.shape[1] - A.shape[0]
    mixed = _mixed(H, A)
    return _own(mixed[..., :m, :]).flatten(-2), _own(mixed[..., m:, :])


def static_width_backward(H, A, g_x, g_carried):
    """-> gradients of H and A."""
    g = torch.cat([g_x.unflatten(-1, (-1, H.shape[-1])), g_carried], dim=-2)
    return _mixed(g, A.mT).contiguous(), _correlation(H, g)


def static_depth(z, B, carried):
    """-> H, with one B [m, n] for all tokens."""
    return carried + _mixed(z.unflatten(-1, (B.shape[0], -1)), B)


def static_depth_backward(z, B, g):
    """-> gradients of z and B."""
    return _mixed(g, B.mT).flatten(-2), _correlation(z.unflatten(-1, (B.shape[0], -1)), g)
