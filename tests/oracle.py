"""Eqs. (9)-(16) as plain loops over tokens, slots, segments and entries: what the vectorised code must equal.

Nothing here is shared with `vwn_ref`, and no tensor operation is used: a matrix is a list of rows, a number is
a Python float (64 bits), or a zero-dimensional tensor where a test wants gradients through the loops.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class Parameters:
    """Of a GHC, in the order of the paper; the dynamic ones are None for a static GHC."""

    A: list
    B: list
    W_alpha: list | None = None
    W_beta: list | None = None
    S_alpha: list | None = None
    S_beta: list | None = None
    gain: list | None = None


def tanh(x):
    return torch.tanh(x) if isinstance(x, Tensor) else math.tanh(x)


def sqrt(x):
    return torch.sqrt(x) if isinstance(x, Tensor) else math.sqrt(x)


def dot(xs, ys):
    total = 0.0
    for x, y in zip(xs, ys, strict=True):
        total = total + x * y
    return total


def column(M, j):
    return [row[j] for row in M]


def initial_A(m, n):
    """Eq. (16), entry by entry, in its block form: (I_m I_m 0) over (0 0 I_{n-m})."""
    A = [[0.0] * (m + n) for _ in range(n)]
    for i in range(m):
        A[i][i] = 1.0  # the first I_m
        A[i][m + i] = 1.0  # the second I_m
    for i in range(n - m):
        A[m + i][2 * m + i] = 1.0  # I_{n-m}
    return A


def initial_B(m, n):
    """Eq. (15): B[i, j] = 1 if i = j mod m, else 0."""
    return [[1.0 if i == j % m else 0.0 for j in range(n)] for i in range(m)]


def norm(row, gain, eps):
    """Eq. (12) for one slot: x / sqrt(mean of x² + eps), times the gain."""
    rms = sqrt(dot(row, row) / len(row) + eps)
    return [x / rms * g for x, g in zip(row, gain, strict=True)]


def dynamic_matrices(H, p: Parameters, eps):
    """Eqs. (13) and (14) for one token: A [n][m+n], B [m][n]."""
    m, n, tau = len(p.B), len(H), math.sqrt(len(H[0]))
    H_bar = [norm(row, p.gain, eps) for row in H]
    A = [
        [p.S_alpha[i][k] * tanh(dot(H_bar[i], column(p.W_alpha, k)) / tau) + p.A[i][k] for k in range(m + n)]
        for i in range(n)
    ]
    B = [
        [p.S_beta[i][j] * tanh(dot(H_bar[j], column(p.W_beta, i)) / tau) + p.B[i][j] for j in range(n)]
        for i in range(m)
    ]
    return A, B


def width_of_token(H, A, B):
    """x = the rows of Åᵀ H′ one after the other (D numbers), and Âᵀ H′ [n][d_b]."""
    m, n, d = len(B), len(H), len(H[0])
    x = []
    for k in range(m):  # row k of Åᵀ H′: sum over slots i of Å[i, k] H′[i]
        for c in range(d):
            x.append(dot([A[i][k] for i in range(n)], column(H, c)))
    carried = []
    for j in range(n):  # row j of Âᵀ H′: sum over slots i of Â[i, j] H′[i]
        carried.append([dot([A[i][m + j] for i in range(n)], column(H, c)) for c in range(d)])
    return x, carried


def depth_of_token(z, B, carried):
    """H′[j] = carried[j] + sum over segments i of B[i, j] Z[i], where Z[i] = z[i d_b : (i+1) d_b]."""
    m, n, d = len(B), len(carried), len(carried[0])
    H = []
    for j in range(n):
        H.append([carried[j][c] + dot(column(B, j), [z[i * d + c] for i in range(m)]) for c in range(d)])
    return H


def ghc(H_tokens, z_tokens, p: Parameters, eps=0.0):
    """Eq. (10) for a list of tokens, given what the sublayer puts out: x, A, B and the next H′ of each token."""
    out = []
    for H, z in zip(H_tokens, z_tokens, strict=True):
        A, B = (p.A, p.B) if p.gain is None else dynamic_matrices(H, p, eps)
        x, carried = width_of_token(H, A, B)
        out.append((x, A, B, depth_of_token(z, B, carried)))
    return out


# ------------------------------------------------------------------------------------- tensors in and out


def nest(t: Tensor, *, differentiable: bool = False):
    """Tensor -> nested lists of floats, or of zero-dimensional tensors that gradients flow through."""
    if not differentiable:
        return t.detach().double().tolist()
    return [nest(row, differentiable=True) for row in t.unbind()] if t.dim() else t


def unnest(rows) -> Tensor:
    """Nested lists of floats or zero-dimensional tensors -> tensor, float64."""
    if isinstance(rows, Tensor):
        return rows
    if isinstance(rows, float | int):
        return torch.tensor(rows, dtype=torch.float64)
    return torch.stack([unnest(row) for row in rows])


def parameters_of(module, *, differentiable: bool = False, **replaced: Tensor) -> Parameters:
    """The parameters of a GHC or DynamicGHC as nested lists; `replaced` ones are taken in place of its own."""
    names = {f.name: "norm.weight" if f.name == "gain" else f.name for f in fields(Parameters)}
    own = dict(module.named_parameters())
    found = {name: replaced.get(name, own.get(path)) for name, path in names.items()}
    return Parameters(**{k: nest(v, differentiable=differentiable) for k, v in found.items() if v is not None})


def run(module, H: Tensor, z: Tensor, *, differentiable: bool = False, **replaced: Tensor):
    """The oracle on tensors H [..., n, d_b], z [..., D] with `module`'s parameters -> x, A, B, H as tensors."""
    p = parameters_of(module, differentiable=differentiable, **replaced)
    eps = module.norm.eps if p.gain is not None else 0.0
    lead = H.shape[:-2]
    H_tokens = nest(H.reshape(-1, *H.shape[-2:]), differentiable=differentiable)
    z_tokens = nest(z.reshape(-1, z.shape[-1]), differentiable=differentiable)
    tokens = ghc(H_tokens, z_tokens, p, eps)
    shapes = [(module.dim,), (module.n, module.m + module.n), (module.m, module.n), H.shape[-2:]]
    if not tokens:
        return [torch.zeros(*lead, *shape, dtype=torch.float64) for shape in shapes]
    columns = zip(*tokens, strict=True)
    return [unnest(list(c)).reshape(*lead, *s) for c, s in zip(columns, shapes, strict=True)]
