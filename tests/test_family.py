"""Each member of the family against the method written on its own, from that method's own paper."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vwn_ref import depth, family
from vwn_ref.dynamic import DynamicGHC
from vwn_ref.ops import select

DOUBLE = torch.float64
D, LEAD = 6, (2, 5)


def layer(dim=D) -> nn.Module:
    """A nonlinear T: D -> D."""
    return nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, dim)).to(DOUBLE)


def error(found, wanted):
    assert found.shape == wanted.shape
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def randn(*shape):
    return torch.randn(*shape, dtype=DOUBLE)


def randomise(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()


@torch.no_grad()
def test_residual():
    T, h = layer(), randn(*LEAD, D)
    H = family.residual(D).to(DOUBLE)(h[..., None, :], T)
    assert torch.equal(H[..., 0, :], h + T(h))


# -------------------------------------------------------------------------------- Hyper-Connections


def hyper_connections_by_hand(streams, T, A_m, A_r, B, W_m, W_r, W_beta, s_alpha, s_beta, normalise):
    """HC, Eqs. (10)-(13) of its paper, with one list of streams: dynamic coefficients without τ, scalar scales."""
    n = len(streams)
    H_bar = [normalise(h) for h in streams]
    a_m = [s_alpha * torch.tanh(H_bar[i] @ W_m) + A_m[i] for i in range(n)]
    a_r = [[s_alpha * torch.tanh(H_bar[i] @ W_r[:, j]) + A_r[i, j] for j in range(n)] for i in range(n)]
    b = [s_beta * torch.tanh(H_bar[j] @ W_beta) + B[j] for j in range(n)]
    out = T(sum(a_m[i][..., None] * streams[i] for i in range(n)))
    return [b[j][..., None] * out + sum(a_r[i][j][..., None] * streams[i] for i in range(n)) for j in range(n)]


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("dynamic", [True, False])
def test_hyper_connections(n, dynamic):
    T, streams = layer(), [randn(*LEAD, D) for _ in range(n)]
    A_m, A_r, B = randn(n), randn(n, n), randn(n)
    W_m, W_r, W_beta = randn(D), randn(D, n), randn(D)
    s_alpha, s_beta = (0.7, -0.3) if dynamic else (0.0, 0.0)
    ghc = family.hyper_connections(D, n, dynamic=dynamic).to(DOUBLE)
    ghc.A.copy_(torch.cat([A_m[:, None], A_r], dim=1))
    ghc.B.copy_(B[None])
    if dynamic:
        ghc.W_alpha.copy_(D**0.5 * torch.cat([W_m[:, None], W_r], dim=1))
        ghc.W_beta.copy_(D**0.5 * W_beta[:, None])
        ghc.S_alpha.fill_(s_alpha)
        ghc.S_beta.fill_(s_beta)

    def normalise(h):
        return h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    wanted = hyper_connections_by_hand(streams, T, A_m, A_r, B, W_m, W_r, W_beta, s_alpha, s_beta, normalise)
    assert error(ghc(torch.stack(streams, -2), T), torch.stack(wanted, -2)) < 1e-13


@torch.no_grad()
def test_hyper_connections_with_the_layer_norm_of_their_paper_agree_on_slots_of_mean_zero_only():
    n, T = 3, layer()
    ghc = family.hyper_connections(D, n).to(DOUBLE)
    randomise(ghc)
    ghc.S_alpha.fill_(0.5)
    ghc.S_beta.fill_(0.5)
    ghc.norm.weight.fill_(1)
    W = torch.cat([ghc.W_alpha, ghc.W_beta], 1) / D**0.5

    def difference(H):
        arguments = (ghc.A[:, 0], ghc.A[:, 1:], ghc.B[0], W[:, 0], W[:, 1 : n + 1], W[:, n + 1], 0.5, 0.5)
        wanted = hyper_connections_by_hand(H.unbind(-2), T, *arguments, lambda h: F.layer_norm(h, (D,), eps=1e-6))
        return error(ghc(H, T), torch.stack(wanted, -2))

    H = randn(*LEAD, n, D)
    assert difference(H - H.mean(-1, keepdim=True)) < 1e-13
    assert difference(H) > 1e-3


@torch.no_grad()
def test_hyper_connections_start_as_a_residual_read_in_turn():
    T, h = layer(), randn(*LEAD, D)
    for l in range(5):  # noqa: E741
        ghc = family.hyper_connections(D, 3, layer=l).to(DOUBLE)
        assert ghc.A[:, 0].tolist() == [float(l % 3 == i) for i in range(3)]
        assert (ghc.B == 1).all() and torch.equal(ghc.A[:, 1:], torch.eye(3).to(DOUBLE))
        assert (ghc.S_alpha.float() == 0.01).all() and (ghc.S_beta.float() == 0.01).all()
        assert error(ghc(h[..., None, :].expand(*LEAD, 3, D), T), (h + T(h))[..., None, :].expand(*LEAD, 3, D)) < 1e-15


def package_module(n, **kwargs):
    module = pytest.importorskip("hyper_connections").HyperConnections(n, dim=D, layer_index=1, **kwargs).to(DOUBLE)
    randomise(module)
    return module


@pytest.mark.parametrize("n", [1, 2, 4])
def test_equals_the_package(n):
    """PyPI hyper-connections at random weights: outputs and gradients."""
    theirs, T = package_module(n), layer()
    ours = family.load_hyper_connections(theirs.state_dict())
    H = randn(*LEAD, n, D).requires_grad_()
    streams = H.movedim(-2, 1).flatten(0, 1)  # (b s) t d
    x, add = theirs(streams)
    wanted = add(T(x)).unflatten(0, (LEAD[0], n)).movedim(1, -2)
    found = ours(H, T)
    assert error(found, wanted) < 1e-13
    weights = torch.randn_like(wanted)
    grad_ours, grad_theirs = (
        torch.autograd.grad((y * weights).sum(), H, retain_graph=True)[0] for y in (found, wanted)
    )
    assert error(grad_ours, grad_theirs) < 1e-12
    for mine, other, factor in (("A", "static_alpha", 1), ("W_alpha", "dynamic_alpha_fn", D**0.5)):
        g, w = (
            torch.autograd.grad((y * weights).sum(), p, retain_graph=True)[0]
            for y, p in ((found, ours.get_parameter(mine)), (wanted, theirs.get_parameter(other)))
        )
        assert error(factor * g, w) < 1e-12


def test_package_starts_where_ours_does():
    theirs = pytest.importorskip("hyper_connections").HyperConnections(4, dim=D, layer_index=6)
    loaded, ours = family.load_hyper_connections(theirs.state_dict()), family.hyper_connections(D, 4, layer=6)
    for (name, p), q in zip(loaded.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(p, q), name


@torch.no_grad()
def test_package_without_tanh_and_with_fractions_is_not_this():
    theirs, T, n = package_module(2, tanh=False), layer(), 2
    ours = family.load_hyper_connections(theirs.state_dict())
    H = randn(*LEAD, n, D)
    x, add = theirs(H.movedim(-2, 1).flatten(0, 1))
    assert error(ours(H, T), add(T(x)).unflatten(0, (LEAD[0], n)).movedim(1, -2)) > 1e-3
    with pytest.raises(ValueError, match=r"must be \[n, 1\+n\]"):
        family.load_hyper_connections(package_module(2, num_fracs=2).state_dict())


# --------------------------------------------------------------------------------- Frac-Connections


@torch.no_grad()
@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize("dynamic", [True, False])
def test_frac_connections(m, dynamic):
    """FC with one β a segment, written for a plain vector h and its m segments."""
    d, T, h = D // m, layer(), randn(*LEAD, D)
    Y, A, beta, W_y, W_a, w_beta = randn(m, m), randn(m, m), randn(m), randn(d, m), randn(d, m), randn(d)
    s_alpha, s_beta = (0.6, -0.4) if dynamic else (0.0, 0.0)
    parts = [h[..., i * d : (i + 1) * d] for i in range(m)]
    bars = [p / (p.square().mean(-1, keepdim=True) + 1e-6).sqrt() for p in parts]
    y = [[s_alpha * torch.tanh(bars[i] @ W_y[:, j]) + Y[i, j] for j in range(m)] for i in range(m)]
    a = [[s_alpha * torch.tanh(bars[i] @ W_a[:, j]) + A[i, j] for j in range(m)] for i in range(m)]
    b = [s_beta * torch.tanh(bars[i] @ w_beta) + beta[i] for i in range(m)]
    out = T(torch.cat([sum(y[i][j][..., None] * parts[i] for i in range(m)) for j in range(m)], -1))
    wanted = [
        b[j][..., None] * out[..., j * d : (j + 1) * d] + sum(a[i][j][..., None] * parts[i] for i in range(m))
        for j in range(m)
    ]
    ghc = family.frac_connections(D, m, dynamic=dynamic).to(DOUBLE)
    ghc.A.copy_(torch.cat([Y, A], 1))
    ghc.B.copy_(torch.diag(beta))
    if dynamic:
        ghc.W_alpha.copy_(d**0.5 * torch.cat([W_y, W_a], 1))
        ghc.W_beta.copy_(d**0.5 * w_beta[:, None].expand(d, m))
        ghc.S_alpha.fill_(s_alpha)
        assert torch.equal(ghc.S_beta != 0, torch.eye(m) != 0)
        ghc.S_beta.copy_(s_beta * torch.eye(m, dtype=DOUBLE))
    assert error(ghc(torch.stack(parts, -2), T), torch.stack(wanted, -2)) < 1e-13


@torch.no_grad()
def test_frac_connections_start_as_a_residual():
    T, h = layer(), randn(*LEAD, D)
    for dynamic in (True, False):
        ghc = family.frac_connections(D, 3, dynamic=dynamic).to(DOUBLE)
        assert error(ghc(h.unflatten(-1, (3, 2)), T).flatten(-2), h + T(h)) < 1e-15
        assert ghc.n == ghc.m == 3


# --------------------------------------------------------------------------------------------- AltUp


def altup_by_hand(blocks, T, P, g, j):
    predicted = [sum(P[i, k] * blocks[k] for k in range(len(blocks))) for i in range(len(blocks))]
    computed = T(blocks[j])
    return [predicted[i] + g[i] * (computed - predicted[j]) for i in range(len(blocks))]


@torch.no_grad()
@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("with_residual", [False, True])
def test_altup(K, with_residual):
    """Three layers, the active block in turn."""
    blocks = [randn(*LEAD, D) for _ in range(K)]
    H = torch.stack(blocks, -2)
    for l in range(3):  # noqa: E741
        T, P, g = layer(), randn(K, K), randn(K)
        whole = (lambda x, T=T: x + T(x)) if with_residual else T
        blocks = altup_by_hand(blocks, whole, P, g, l % K)
        H = family.altup(D, P, g, l % K, residual=with_residual)(H, T)
    assert error(H, torch.stack(blocks, -2)) < 1e-12


def test_altup_predictor_that_is_right_is_left_alone():
    """g = 1 at the active block: it becomes x̃ itself, whatever was predicted for it."""
    P, g = randn(3, 3), torch.tensor([0.5, 1.0, 2.0], dtype=DOUBLE)
    ghc = family.altup(D, P, g, 1)
    assert ghc.A[:, 1 + 1].abs().max() < 1e-15  # nothing carried into block 1
    assert ghc.A[:, 0].tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="active = 3: must be ≥ 0 and < K = 3"):
        family.altup(D, P, g, 3)


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: family.altup(D, randn(1, 3), randn(3), 1), r"P has shape \(1, 3\): must be \[K, K\] = \(3, 3\)"),
        (lambda: family.altup(D, randn(3, 3), randn(3), True), "active = True: must be an integer ≥ 0"),
        (lambda: family.with_matrices(D, torch.zeros(3, 5), torch.zeros(3)), r"B has shape \(3,\): must be \[m, n\]"),
        (lambda: family.sinkhorn(randn(3, 3), 0), "iterations = 0: must be an integer ≥ 1"),
        (lambda: family.sinkhorn(randn(3, 2)), r"logits have shape \(3, 2\): must be \[n, n\]"),
    ],
)
def test_refused(call, match, no_shape_checks):
    with pytest.raises(ValueError, match=match):
        call()


# --------------------------------------------------------------------------------- dense connections


@torch.no_grad()
@pytest.mark.parametrize("L", [1, 4])
def test_dense_is_denseformer(L):
    """X_l = block_l(Y_{l−1}), Y_l = Σ_{s ≤ l} α[l][s] X_s, with blocks that have residuals of their own."""
    bodies = [layer() for _ in range(L)]
    blocks = [lambda y, T=T: y + T(y) for T in bodies]
    alphas = [torch.ones(1, dtype=DOUBLE)] + [randn(count) for count in range(2, L + 2)]
    embedding = randn(*LEAD, D)
    X, Y = [embedding], embedding
    for l, block in enumerate(blocks, start=1):  # noqa: E741
        X.append(block(Y))
        Y = sum(alphas[l][s] * X[s] for s in range(l + 1))

    H = family.first_slot(embedding, L + 1)
    for ghc, block in zip(family.dense(D, alphas[:L]), blocks, strict=True):
        H = ghc(H, block)
    assert error(H, torch.stack(X, -2)) < 1e-13
    assert error(torch.einsum("n,...nd->...d", alphas[L], H), Y) < 1e-13


def test_dense_refuses_the_wrong_number_of_weights():
    with pytest.raises(ValueError, match=r"weights\[1\] has shape \(1,\): must be \(2,\)"):
        family.dense(D, [torch.ones(1), torch.ones(1)])


def test_dense_reads_every_layer_in_the_depth_maps():
    weights = [randn(count) for count in range(1, 5)]
    ghcs = family.dense(D, weights)
    maps = depth.depth_maps([g.A.detach() for g in ghcs], [g.B.detach() for g in ghcs])
    for l in range(4):  # noqa: E741
        assert torch.equal(maps.embedding[l, 0, 0], weights[l][0])
        assert torch.equal(maps.layers[l, :l, 0, 0], weights[l][1:])


# ----------------------------------------------------------------------------------------------- mHC


def sinkhorn_by_hand(logits, iterations):
    """mHC: exp, then all columns divided by their sums, then all rows, so often."""
    n, M = len(logits), [[math.exp(x) for x in row] for row in logits]
    for _ in range(iterations):
        sums = [sum(M[i][j] for i in range(n)) for j in range(n)]
        M = [[M[i][j] / sums[j] for j in range(n)] for i in range(n)]
        M = [[x / sum(row) for x in row] for row in M]
    return torch.tensor(M, dtype=DOUBLE)


@torch.no_grad()
def test_manifold_constrained():
    n, T, streams = 4, layer(), randn(*LEAD, 4, D)
    pre, post, res = randn(n), randn(n), randn(n, n)
    H_pre, H_post = 1 / (1 + (-pre).exp()), 2 / (1 + (-post).exp())
    H_res = sinkhorn_by_hand(res.tolist(), 500)
    assert (H_res.sum(0) - 1).abs().max() < 1e-12 and (H_res.sum(1) - 1).abs().max() < 1e-12 and (H_res > 0).all()
    out = T(sum(H_pre[i] * streams[..., i, :] for i in range(n)))
    wanted = [H_post[i] * out + sum(H_res[i, k] * streams[..., k, :] for k in range(n)) for i in range(n)]
    ghc = family.manifold_constrained(D, pre, post, res, iterations=500)
    assert error(ghc(streams, T), torch.stack(wanted, -2)) < 1e-13
    carry = ghc.A[:, 1:]
    assert abs(depth.spectral_radius(carry).item() - 1) < 1e-12
    assert abs(torch.linalg.matrix_norm(carry, 2).item() - 1) < 1e-12
    kept = ghc(streams, torch.zeros_like).mean(-2)
    assert error(kept, streams.mean(-2)) < 1e-12


@torch.no_grad()
def test_mhc_ends_with_the_rows():
    """After few rounds rows and columns differ: each new stream is an exact mean, the mean of all nearly kept."""
    n, res = 3, 3 * randn(3, 3)
    carry = family.manifold_constrained(D, randn(n), randn(n), res, iterations=2).A[:, 1:]
    assert error(carry, sinkhorn_by_hand(res.tolist(), 2).T) < 1e-13
    assert (carry.sum(0) - 1).abs().max() < 1e-15 * 4 and (carry.sum(1) - 1).abs().max() > 1e-3


def test_with_matrices_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"A has shape \(3, 4\): must be \[n, m\+n\] = \(3, 5\)"):
        family.with_matrices(D, torch.zeros(3, 4), torch.zeros(2, 3))


def test_members_can_be_trained():
    ghc = family.hyper_connections(D, 3)
    assert isinstance(ghc, DynamicGHC)
    ghc(torch.randn(2, 3, D), torch.sin).sum().backward()
    assert ghc.A.grad is not None and ghc.W_alpha.grad is not None


def test_sinkhorn_of_large_logits():
    """exp(1000) would be infinite; what the rows are scaled by first changes nothing."""
    logits = torch.tensor([[1000.0, 999.0, 0.0], [1000.0, 1000.0, 998.0], [0.0, 1.0, 2.0]], dtype=torch.float64)
    found = family.sinkhorn(logits, 500)
    assert found.isfinite().all() and error(found.sum(1), torch.ones(3)) < 1e-12
    assert error(found, family.sinkhorn(logits - torch.tensor([[1000.0], [1000.0], [0.0]]), 500)) < 1e-12


def test_what_is_taken_where_nothing_is_said():
    """The methods' own starts: dynamic, their scales 0.01, mHC's 20 rounds; and any leading axes for H′⁰."""
    for ghc in (family.hyper_connections(D, 3), family.frac_connections(D, 2)):
        assert isinstance(ghc, DynamicGHC) and ghc.S_alpha.unique().tolist() == [pytest.approx(0.01)]
        assert ghc.S_beta.max().item() == pytest.approx(0.01)
    assert family.hyper_connections(D, 3).A[:, 0].tolist() == [1, 0, 0]
    logits = randn(3, 3)
    assert torch.equal(family.sinkhorn(logits), family.sinkhorn(logits, 20))
    ghcs = [family.manifold_constrained(D, randn(3), randn(3), logits, **given) for given in ({}, {"iterations": 20})]
    assert torch.equal(ghcs[0].A[:, 1:], ghcs[1].A[:, 1:])
    for lead in ((), (5,), (2, 5)):
        h = randn(*lead, D)
        H = family.first_slot(h, 3)
        assert H.shape == (*lead, 3, D) and torch.equal(H[..., 0, :], h) and not H[..., 1:, :].any()


WEIGHTS = {
    "static_alpha": torch.eye(3, 4), "static_beta": torch.ones(3), "norm.gamma": torch.zeros(D),
    "dynamic_alpha_fn": torch.zeros(D, 4), "dynamic_beta_fn": torch.zeros(D),
    "dynamic_alpha_scale": torch.tensor(0.01), "dynamic_beta_scale": torch.tensor(0.01),
}  # fmt: skip
MEMBERS = {
    "with_matrices": lambda **given: family.with_matrices(D, torch.eye(3, 4), torch.ones(1, 3), **given),
    "residual": lambda **given: family.residual(D, **given),
    "hyper_connections": lambda **given: family.hyper_connections(D, 3, **given),
    "static hyper_connections": lambda **given: family.hyper_connections(D, 3, dynamic=False, **given),
    "load_hyper_connections": lambda **given: family.load_hyper_connections(WEIGHTS, **given),
    "frac_connections": lambda **given: family.frac_connections(D, 2, **given),
    "static frac_connections": lambda **given: family.frac_connections(D, 2, dynamic=False, **given),
    "altup": lambda **given: family.altup(D, torch.eye(3), torch.ones(3), 1, **given),
    "dense": lambda **given: family.dense(D, [torch.ones(1), torch.ones(2)], **given)[-1],
    "manifold_constrained": lambda **given: family.manifold_constrained(D, *torch.eye(5, 3)[:2], torch.eye(3), **given),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_the_kernels_that_are_asked_for(name):
    """And matrices that depend on the token only where they are to."""
    assert MEMBERS[name]().kernels == "auto"
    for kernels in ("reference", "cpu"):
        ghc = MEMBERS[name](kernels=kernels)
        assert ghc.kernels == kernels and ghc.ops == select(kernels)
    dynamic = name in ("hyper_connections", "load_hyper_connections", "frac_connections")
    assert isinstance(ghc, DynamicGHC) == dynamic


def test_a_layer_before_the_first_is_refused():
    with pytest.raises(ValueError, match="layer = -1: must be an integer ≥ 0"):
        family.hyper_connections(D, 3, layer=-1)
