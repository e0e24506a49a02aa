"""The raw operations by PyTorch alone, for a machine without a compiler. No autograd here.

The formulas are those of `ghc_cpu.cpp`. A product of two tiny matrices a token costs some microseconds in PyTorch, so
the dynamic operations turn the tokens to the innermost axis: there a product is a few multiply-adds of long vectors.
One static matrix for all tokens makes one large product, which needs no such turn.

x, z, g_x, g_z [..., D]; H, carried and their gradients [..., n, d_b]; Bt = ℬᵀ [..., n, m], slots first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _inward(t: Tensor, rows: int, columns: int) -> Tensor:
    """[..., rows · columns in any split] -> [rows, columns, tokens]."""
    return t.reshape(-1, rows * columns).mT.contiguous().view(rows, columns, -1)


def _outward(t: Tensor, shape: tuple) -> Tensor:
    """[rows, columns, tokens] -> `shape`, tokens first again."""
    return t.flatten(0, 1).mT.reshape(shape).contiguous()


def _product(left: Tensor, right: Tensor, start: Tensor | None = None) -> Tensor:
    """start + Σ_i left[i, k] right[i, d], every token: [i, k, T], [i, d, T] -> [k, d, T]."""
    out = right.new_zeros(left.shape[1], *right.shape[1:]) if start is None else start
    for a, b in zip(left.unsqueeze(2), right.unsqueeze(1), strict=True):
        out.addcmul_(a, b)
    return out


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Σ_d left[i, d] right[k, d], every token: [i, d, T], [k, d, T] -> [i, k, T]."""
    out = right.new_zeros(left.shape[0], right.shape[0], right.shape[-1])
    for d in range(left.shape[1]):  # as many multiply-adds as d_b, each over [i, k, T]
        out.addcmul_(left[:, d].unsqueeze(1), right[:, d])
    return out


def _coefficients(h, W_alpha, W_beta, gain, eps):
    """rstd [n, 1, T], gain · W / τ [d, K] and tanh [n, K, T], Eqs. (12)-(14); columns (Å | Â | ℬᵀ)."""
    rstd = (h.square().mean(1, keepdim=True) + eps).rsqrt_()
    W = torch.cat([W_alpha, W_beta], dim=1) * (gain / math.sqrt(h.shape[1])).unsqueeze(1)
    return rstd, W, (W.mT @ h).mul_(rstd).tanh_()


def _side_by_side(A, B):
    """(A | Bᵀ) [n, K, 1], one for all tokens."""
    return torch.cat([A, B.mT], dim=1).unsqueeze(2)


def dynamic_width(H, A, B, W_alpha, W_beta, S_alpha, S_beta, gain, eps):
    """-> x, carried, Bt."""
    (n, d), m = H.shape[-2:], B.shape[0]
    h = _inward(H, n, d)
    _, _, tanh = _coefficients(h, W_alpha, W_beta, gain, eps)
    C = tanh.mul_(_side_by_side(S_alpha, S_beta)).add_(_side_by_side(A, B))
    mixed = _product(C[:, : m + n], h)
    x = _outward(mixed[:m], (*H.shape[:-2], m * d))
    return x, _outward(mixed[m:], H.shape), _outward(C[:, m + n :], (*H.shape[:-1], m))


def dynamic_width_backward(H, A, B, W_alpha, W_beta, S_alpha, S_beta, gain, eps, g_x, g_carried, g_Bt):
    """-> gradients of the eight tensors."""
    (n, d), m = H.shape[-2:], B.shape[0]
    h = _inward(H, n, d)
    g = torch.cat([_inward(g_x, m, d), _inward(g_carried, n, d)])  # of the m+n mixed rows
    rstd, W, tanh = _coefficients(h, W_alpha, W_beta, gain, eps)
    S, static = _side_by_side(S_alpha, S_beta), _side_by_side(A, B)
    E = torch.cat([_dot(h, g), _inward(g_Bt, n, m)], dim=1)  # of C = S tanh + static
    g_S, g_static = (E * tanh).sum(2), E.sum(2)
    C = tanh * S + static
    e = E.mul_(S).mul_(1 - tanh.square()).mul_(rstd)  # of h W
    h_W_e = (W @ e).mul_(h).sum(1, keepdim=True)  # Σ_k e · h W: through rstd
    g_H = torch.addcmul(W @ e, h, h_W_e.mul_(rstd.square()), value=-1 / d)
    _product(C[:, : m + n].transpose(0, 1), g, g_H)
    g_W = (h @ e.mT).sum(0) / math.sqrt(d)  # of gain · W
    g_gain = (g_W * torch.cat([W_alpha, W_beta], dim=1)).sum(1)
    g_W = g_W * gain.unsqueeze(1)
    parts = [(t[:, : m + n].contiguous(), t[:, m + n :]) for t in (g_static, g_W, g_S)]
    (g_A, g_B), (g_W_alpha, g_W_beta), (g_S_alpha, g_S_beta) = parts
    return (
        _outward(g_H, H.shape), g_A, g_B.mT.contiguous(), g_W_alpha, g_W_beta.contiguous(), g_S_alpha,
        g_S_beta.mT.contiguous(), g_gain,
    )  # fmt: skip


def dynamic_depth(z, Bt, carried):
    """-> H."""
    (n, d), m = carried.shape[-2:], Bt.shape[-1]
    written = _product(_inward(Bt, n, m).transpose(0, 1), _inward(z, m, d))
    return carried + _outward(written, carried.shape)


def dynamic_depth_backward(z, Bt, g):
    """-> gradients of z and Bt; that of `carried` is g."""
    (n, d), m = g.shape[-2:], Bt.shape[-1]
    g = _inward(g, n, d)
    g_z = _product(_inward(Bt, n, m), g)
    return _outward(g_z, z.shape), _outward(_dot(g, _inward(z, m, d)), Bt.shape)


def _mixed(H, A):
    """Aᵀ H of every token: [..., n, d_b], [n, k] -> [..., k, d_b], one product with the tokens as rows."""
    return (H.mT @ A).mT


def _correlation(a, b):
    """Σ over tokens and d_b of a[..., i, d] b[..., k, d] -> [i, k]."""
    return a.mT.reshape(-1, a.shape[-2]).mT @ b.mT.reshape(-1, b.shape[-2])


def static_width(H, A):
    """-> x, carried."""
    m = A.shape[1] - A.shape[0]
    mixed = _mixed(H, A)
    return mixed[..., :m, :].flatten(-2), mixed[..., m:, :].contiguous()


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
