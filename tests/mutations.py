"""The reference functions, each with one mistake that is easy to make: `test_dynamic.py` shows that each is caught.

A mutation is (the functions of `vwn_ref` that it replaces, the (m, n) at which it is tried). Where a mistake needs
n = m to have matching shapes at all, it is tried there.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import einsum, rearrange

from vwn_ref import ghc

# ------------------------------------------------------------------------------------------ Eq. (10)


def width_with(mix=None, split=None, flatten=None):
    """`ghc.width` with one of its three steps replaced."""

    def width(H, A, B):
        m = B.shape[-2]
        mixed = (mix or (lambda A, H, m: A.mT @ H))(A, H, m)
        x, carried = (split or (lambda mixed, m: (mixed[..., :m, :], mixed[..., m:, :])))(mixed, m)
        return (flatten or (lambda x: x.flatten(-2)))(x), (B, carried)

    return width


def carry_not_transposed(A, H, m):
    return torch.cat([A[..., :m].mT @ H, A[..., m:] @ H], dim=-2)


def read_not_transposed(A, H, m):  # n = m
    return torch.cat([A[..., :m] @ H, A[..., m:].mT @ H], dim=-2)


def columns_swapped(mixed, m):  # A = (Â | Å)
    n = mixed.shape[-2] - m
    return mixed[..., n:, :], mixed[..., :n, :]


def read_from_the_end(mixed, m):
    return mixed[..., -m:, :], mixed[..., m:, :]


def depth_with(cut="... (m d) -> ... m d", equation="... m n, ... m d -> ... n d", use_carried=True):
    def depth(z, state):
        B, carried = state
        Z = rearrange(z, cut, m=B.shape[-2])
        return einsum(B, Z, equation) + (carried if use_carried else 0)

    return depth


def interleaved(x):
    return rearrange(x, "... m d -> ... (d m)")


# ------------------------------------------------------------------------------------ Eqs. (12)-(14)


def matrices_with(norm=None, tau=None, alpha=None, beta=None):
    """`dynamic.dynamic_matrices` with one of its steps replaced."""

    def dynamic_matrices(H, A, B, W_alpha, W_beta, S_alpha, S_beta, gain, eps):
        H_bar = norm(H, gain, eps) if norm else F.rms_norm(H, gain.shape, gain, eps)
        t = tau(H.shape[-1], B.shape[-2]) if tau else math.sqrt(H.shape[-1])
        b = beta or (lambda logits, S, B: S * torch.tanh(logits).mT + B)
        a = alpha or (lambda logits, S, A: S * torch.tanh(logits) + A)
        return a(H_bar @ W_alpha / t, S_alpha, A), b(H_bar @ W_beta / t, S_beta, B)

    return dynamic_matrices


def rms(H, dim, eps):
    return torch.sqrt(H.square().mean(dim, keepdim=True) + eps)


def norm_over_slots(H, gain, eps):
    return H / rms(H, -2, eps) * gain


def norm_over_the_state(H, gain, eps):
    return H / rms(H, (-2, -1), eps) * gain


def norm_without_gain(H, gain, eps):
    return H / rms(H, -1, eps)


def gain_plus_one(H, gain, eps):
    return H / rms(H, -1, eps) * (1 + gain)


def layer_norm(H, gain, eps):
    return F.layer_norm(H, gain.shape, gain, None, eps)


def eps_outside_the_root(H, gain, eps):
    return H / (rms(H, -1, 0.0) + eps) * gain


def no_norm(H, gain, eps):
    return H * gain


REFERENCE_WIDTH = ("vwn_ref.ops.reference.width", "vwn_ref.dynamic.width")
REFERENCE_DEPTH = ("vwn_ref.ops.reference.depth",)
MATRICES = ("vwn_ref.dynamic.dynamic_matrices",)


def patches(targets, function):
    return dict.fromkeys(targets, function)


MUTATIONS = {
    # Eq. (10)
    "Â for Âᵀ": (patches(REFERENCE_WIDTH, width_with(mix=carry_not_transposed)), (2, 3)),
    "Å for Åᵀ": (patches(REFERENCE_WIDTH, width_with(mix=read_not_transposed)), (4, 4)),
    "B for Bᵀ": (patches(REFERENCE_DEPTH, depth_with(equation="... m n, ... n d -> ... m d")), (4, 4)),
    "Å and Â swapped": (patches(REFERENCE_WIDTH, width_with(split=columns_swapped)), (2, 3)),
    "Å taken from the last columns": (patches(REFERENCE_WIDTH, width_with(split=read_from_the_end)), (2, 3)),
    "x interleaved": (patches(REFERENCE_WIDTH, width_with(flatten=interleaved)), (2, 3)),
    "z interleaved": (patches(REFERENCE_DEPTH, depth_with(cut="... (d m) -> ... m d")), (2, 3)),
    "x and z interleaved": (
        patches(REFERENCE_WIDTH, width_with(flatten=interleaved))
        | patches(REFERENCE_DEPTH, depth_with(cut="... (d m) -> ... m d")),
        (2, 3),
    ),
    "x in reversed order": (patches(REFERENCE_WIDTH, width_with(flatten=lambda x: x.flip(-2).flatten(-2))), (2, 3)),
    "nothing carried": (patches(REFERENCE_DEPTH, depth_with(use_carried=False)), (2, 3)),
    # Eqs. (12)-(14)
    "τ left out": (patches(MATRICES, matrices_with(tau=lambda d, m: 1.0)), (2, 3)),
    "τ = √D": (patches(MATRICES, matrices_with(tau=lambda d, m: math.sqrt(d * m))), (2, 3)),
    "τ = D/m": (patches(MATRICES, matrices_with(tau=lambda d, m: d)), (2, 3)),
    "1/τ for τ": (patches(MATRICES, matrices_with(tau=lambda d, m: 1 / math.sqrt(d))), (2, 3)),
    "norm over the slots": (patches(MATRICES, matrices_with(norm=norm_over_slots)), (2, 3)),
    "norm over the whole state": (patches(MATRICES, matrices_with(norm=norm_over_the_state)), (2, 3)),
    "gain left out": (patches(MATRICES, matrices_with(norm=norm_without_gain)), (2, 3)),
    "gain + 1": (patches(MATRICES, matrices_with(norm=gain_plus_one)), (2, 3)),
    "LayerNorm for RMSNorm": (patches(MATRICES, matrices_with(norm=layer_norm)), (2, 3)),
    "ε outside the root": (patches(MATRICES, matrices_with(norm=eps_outside_the_root)), (2, 3)),
    "norm left out": (patches(MATRICES, matrices_with(norm=no_norm)), (2, 3)),
    "S_α before tanh": (patches(MATRICES, matrices_with(alpha=lambda x, S, A: torch.tanh(S * x) + A)), (2, 3)),
    "S_β before tanh": (patches(MATRICES, matrices_with(beta=lambda x, S, B: torch.tanh(S * x.mT) + B)), (2, 3)),
    "A inside tanh": (patches(MATRICES, matrices_with(alpha=lambda x, S, A: S * torch.tanh(x + A))), (2, 3)),
    "tanh left out": (patches(MATRICES, matrices_with(alpha=lambda x, S, A: S * x + A)), (2, 3)),
    "S_α left out": (patches(MATRICES, matrices_with(alpha=lambda x, S, A: torch.tanh(x) + A)), (2, 3)),
    "S_β left out": (patches(MATRICES, matrices_with(beta=lambda x, S, B: torch.tanh(x).mT + B)), (2, 3)),
    "tanh of B not transposed": (
        patches(MATRICES, matrices_with(beta=lambda x, S, B: S * torch.tanh(x) + B)),
        (4, 4),
    ),
    "tanh of B reshaped, not transposed": (
        patches(MATRICES, matrices_with(beta=lambda x, S, B: S * torch.tanh(x).reshape(*x.shape[:-2], *B.shape) + B)),
        (2, 3),
    ),
}

# ------------------------------------------------------------------------------------ Eqs. (15), (16)

INITIAL_MUTATIONS = {
    "B by blocks: j // r for j mod m": (
        {"vwn_ref.ghc.initial_B": lambda m, n: torch.eye(m).repeat_interleave(-(-n // m), dim=1)[:, :n]},
        (2, 4),
    ),
    "B writes the first m slots only": (
        {"vwn_ref.ghc.initial_B": lambda m, n: torch.eye(m, n)},
        (2, 3),
    ),
    "Å reads the last m slots": (
        {"vwn_ref.ghc.initial_A": lambda m, n: torch.cat([torch.eye(n)[:, n - m :], torch.eye(n)], dim=1)},
        (2, 3),
    ),
    "A = (Â | Å)": (
        {"vwn_ref.ghc.initial_A": lambda m, n: torch.cat([torch.eye(n), torch.eye(n)[:, :m]], dim=1)},
        (2, 3),
    ),
    "Å sums the groups of slots": (
        {"vwn_ref.ghc.initial_A": lambda m, n: torch.cat([ghc.initial_B(m, n).mT, torch.eye(n)], dim=1)},
        (2, 3),
    ),
}
