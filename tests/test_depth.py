"""Eq. (17), depth maps, windows: §4."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from vwn_ref import depth
from vwn_ref.backbone import Residual
from vwn_ref.config import VWNConfig
from vwn_ref.dynamic import DynamicGHC
from vwn_ref.ghc import GHC, initial_B
from vwn_ref.model import VWNTransformer

DOUBLE = torch.float64
SIZES = [(1, 1), (1, 4), (2, 3), (3, 5), (4, 4), (4, 8)]


def randomised(module: nn.Module) -> nn.Module:
    module = module.to(DOUBLE)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def stack(cls, m, n, depth_=5, lead=(2, 3), slot_width=3):
    """`depth_` randomised GHCs around random nonlinear sublayers, and a random H′⁰."""
    dim = m * slot_width
    connections = [randomised(cls(dim, m, n)) for _ in range(depth_)]
    layers = [randomised(nn.Sequential(nn.RMSNorm(dim), nn.Linear(dim, dim), nn.Tanh())) for _ in range(depth_)]
    return connections, layers, torch.randn(*lead, n, slot_width, dtype=DOUBLE)


def error(found, wanted):
    assert found.shape == wanted.shape
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def random_matrices(m, n, layers, lead=()):
    As = [torch.randn(*lead, n, m + n, dtype=DOUBLE) for _ in range(layers)]
    return As, [torch.randn(*lead, m, n, dtype=DOUBLE) for _ in range(layers)]


# ------------------------------------------------------------------------------------------ Eq. (17)


def test_as_many_connections_as_layers():
    connections, layers, H = stack(GHC, 2, 3)
    with pytest.raises(ValueError, match="shorter"):
        depth.trace(connections, layers[:-1], H)


@torch.no_grad()
def test_layers_that_work_in_place_are_recorded_as_the_others():
    connections, _, H = stack(GHC, 2, 3)
    found, wanted = (depth.trace(connections, [layer] * 5, H) for layer in (torch.sigmoid_, torch.sigmoid))
    for name in ("x", "z", "H"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=0, atol=0)


@torch.no_grad()
def test_a_plain_model_is_recorded_as_the_ghc_it_is():
    model = VWNTransformer(VWNConfig(vocab_size=9, dim=8, n_layers=1, n_heads=2))
    recording = depth.record(model, torch.randint(9, (2, 3)))
    assert [(A.shape, B.shape) for A, B in zip(recording.A, recording.B, strict=True)] == [
        ((2, 3, 1, 2), (2, 3, 1, 1))
    ] * 2
    assert all(M.eq(1).all() for M in (*recording.A, *recording.B))


@torch.no_grad()
@pytest.mark.parametrize("cls", [GHC, DynamicGHC, Residual])
def test_states_of_one_token_and_of_three_axes(cls):
    """Each token has the numbers that it has alone, however many axes the tokens have."""
    if cls is Residual:
        _, layers, _ = stack(GHC, 1, 1)
        connections, H = [Residual()] * 5, torch.randn(2, 3, 4, 1, 3, dtype=DOUBLE)
    else:
        connections, layers, H = stack(cls, 2, 3, lead=(2, 3, 4))

    def numbers(H):
        recording = depth.trace(connections, layers, H)
        size, parts = depth.strength(depth.depth_maps(recording.A, recording.B)), depth.contributions(recording)
        shares = depth.contributions(recording, share=True)
        return size, parts, shares, depth.effective_window(parts, 0.5), depth.unrolled_state(recording, 5)

    whole, alone = numbers(H), numbers(H[1, 2, 3])
    for *tables, state in (whole, alone):
        assert [t.shape[:2] for t in tables[:3]] == [(5, 5)] * 3 and tables[3].shape[0] == 5
        assert state.shape == (H if tables[0].ndim > 2 else H[1, 2, 3]).shape
    for several, one in zip(whole[:4], alone[:4], strict=True):
        torch.testing.assert_close(several[..., 1, 2, 3], one.expand_as(several[..., 1, 2, 3]))
    torch.testing.assert_close(whole[4][1, 2, 3], alone[4])


def test_maps_of_one_layer():
    As, Bs = random_matrices(2, 3, 1)
    maps = depth.depth_maps(As, Bs)
    assert torch.equal(maps.embedding[0], As[0][:, :2].mT) and not maps.layers.any()
    assert maps.layers.shape == (1, 1, 2, 2)


@torch.no_grad()
@pytest.mark.parametrize("cls", [GHC, DynamicGHC])
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_unrolled_sum_equals_the_recurrence(cls, m, n):
    connections, layers, H = stack(cls, m, n)
    recording = depth.trace(connections, layers, H)
    for l in range(6):  # noqa: E741
        assert error(depth.unrolled_state(recording, l), recording.H[l]) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("cls", [GHC, DynamicGHC])
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_trace_is_the_forward_pass(cls, m, n):
    connections, layers, H0 = stack(cls, m, n)
    recording = depth.trace(connections, layers, H0)
    H = H0
    for l, (connection, layer) in enumerate(zip(connections, layers, strict=True)):  # noqa: E741
        x, _ = connection.width(H)
        A, B = connection.matrices(H)
        assert torch.equal(recording.x[l], x) and torch.equal(recording.z[l], layer(x))
        assert torch.equal(recording.A[l], A) and torch.equal(recording.B[l], B)
        H = connection(H, layer)
        assert torch.equal(recording.H[l + 1], H)
    assert torch.equal(recording.H[0], H0)


@torch.no_grad()
@pytest.mark.parametrize("cls", [GHC, DynamicGHC])
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_a_layer_reads_the_sum_of_its_depth_maps(cls, m, n):
    recording = depth.trace(*stack(cls, m, n))
    for l in range(1, 6):  # noqa: E741
        x = depth.depth_map(recording.A, recording.B, l, 0) @ recording.H[0]
        for s in range(1, l):
            Z = recording.z[s - 1].unflatten(-1, (m, -1))
            x = x + depth.depth_map(recording.A, recording.B, l, s) @ Z
        assert error(x.flatten(-2), recording.x[l - 1]) < 1e-12


def test_depth_map_is_the_derivative():
    """Static GHC, sublayers whose outputs are constants: x_l depends on z_s by the map and by nothing else."""
    m, n, d, L = 2, 3, 1, 4
    As, Bs = random_matrices(m, n, L)
    connections = [GHC(m * d, m, n).to(DOUBLE) for _ in range(L)]
    for connection, A, B in zip(connections, As, Bs, strict=True):
        connection.A.data, connection.B.data = A, B

    def inputs(zs):
        recording = depth.trace(connections, [lambda x, z=z: z for z in zs], torch.ones(n, d, dtype=DOUBLE))
        return torch.stack(recording.x)

    zs = tuple(torch.randn(m * d, dtype=DOUBLE) for _ in range(L))
    jacobian = torch.autograd.functional.jacobian(lambda *zs: inputs(zs), zs)
    maps = depth.depth_maps(As, Bs)
    for l, s in itertools.product(range(L), range(L)):  # noqa: E741
        wanted = jacobian[s][l]
        assert (maps.layers[l, s] - wanted).abs().max() < 1e-12
        if s >= l:
            assert not maps.layers[l, s].any()


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_depth_maps_equal_depth_map(m, n, lead):
    As, Bs = random_matrices(m, n, 5, lead)
    maps = depth.depth_maps(As, Bs)
    assert maps.layers.shape == (5, 5, *lead, m, m) and maps.embedding.shape == (5, *lead, m, n)
    for l in range(1, 6):  # noqa: E741
        assert error(maps.embedding[l - 1], depth.depth_map(As, Bs, l, 0)) < 1e-12
        for s in range(1, l):
            assert error(maps.layers[l - 1, s - 1], depth.depth_map(As, Bs, l, s)) < 1e-12
        assert not maps.layers[l - 1, l - 1 :].any()


def test_depth_map_by_hand():
    """m = 1, n = 2: x₃ = (Å³)ᵀ (Â²)ᵀ (B¹)ᵀ z₁ with small numbers."""
    As = [torch.tensor(A) for A in ([[1.0, 1, 2], [2, 3, 4]], [[1.0, 1, 2], [2, 3, 4]], [[5.0, 0, 0], [7, 0, 0]])]
    Bs = [torch.tensor([[10.0, 1.0]])] * 3
    # (Â²)ᵀ (B¹)ᵀ = (1·10 + 3·1, 2·10 + 4·1) = (13, 24); (Å³)ᵀ of it = 5·13 + 7·24
    assert depth.depth_map(As, Bs, 3, 1).tolist() == [[233.0]]
    assert depth.depth_map(As, Bs, 2, 1).tolist() == [[12.0]]


def test_carry_and_state_map():
    As, Bs = random_matrices(2, 3, 3)
    hats = [A[:, 2:] for A in As]
    assert torch.equal(depth.carry(As, 2, 2), torch.eye(3, dtype=DOUBLE))
    assert error(depth.carry(As, 3, 0), hats[2].T @ hats[1].T @ hats[0].T) < 1e-13
    assert error(depth.state_map(As, Bs, 3, 1), hats[2].T @ hats[1].T @ Bs[0].T) < 1e-13
    assert torch.equal(depth.state_map(As, Bs, 3, 3), Bs[2].T)
    assert torch.equal(depth.state_map(As, Bs, 3, 0), depth.carry(As, 3, 0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda As, Bs: depth.depth_map(As, Bs, 2, 2), "l = 2, s = 2: must be 0 ≤ s < l ≤ 3"),
        (lambda As, Bs: depth.depth_map(As, Bs, 4, 1), "l = 4, s = 1: must be 0 ≤ s < l ≤ 3"),
        (lambda As, Bs: depth.depth_map(As, Bs, 2, -1), "l = 2, s = -1: must be"),
        (lambda As, Bs: depth.state_map(As, Bs, 1, 2), "l = 1, s = 2: must be 0 ≤ s ≤ l ≤ 3"),
        (lambda As, Bs: depth.carry(As, 4, 0), "l = 4, s = 0: must be"),
    ],
)
def test_refuses_layers_that_are_not_there(call, message):
    with pytest.raises(ValueError) as raised:
        call(*random_matrices(2, 3, 3))
    assert message in str(raised.value)


# ----------------------------------------------------------------------------------------- summaries


def test_strength_is_one_where_a_layer_is_read_whole():
    for m, n in SIZES:
        ghc = GHC(m * 2, m, n)
        table = depth.strength(depth.depth_maps([ghc.A.detach()] * 4, [ghc.B.detach()] * 4))
        assert torch.allclose(table, torch.ones(4, 4).tril())  # a residual stack: everything is read


@torch.no_grad()
def test_strength_has_the_norms_of_the_maps():
    As, Bs = random_matrices(2, 3, 4, (5,))
    table = depth.strength(depth.depth_maps(As, Bs))
    assert table.shape == (4, 4, 5)
    for l, s in itertools.product(range(1, 5), range(4)):  # noqa: E741
        wanted = depth.depth_map(As, Bs, l, s).square().sum((-2, -1)).div(2).sqrt() if s < l else torch.zeros(5)
        assert torch.allclose(table[l - 1, s], wanted.to(DOUBLE))


@torch.no_grad()
@pytest.mark.parametrize("cls", [GHC, DynamicGHC])
def test_contributions(cls):
    recording = depth.trace(*stack(cls, 2, 3))
    shares = depth.contributions(recording, share=True)
    assert shares.shape == (5, 5, 2, 3)
    assert (shares.sum(1) - 1).abs().max() < 1e-10
    norms = depth.contributions(recording)
    l, s = 4, 2  # noqa: E741
    term = depth.depth_map(recording.A, recording.B, l, s) @ recording.z[s - 1].unflatten(-1, (2, -1))
    x = recording.x[l - 1]
    assert torch.allclose(norms[l - 1, s], term.flatten(-2).norm(dim=-1) / x.norm(dim=-1))
    assert torch.allclose(shares[l - 1, s], (term.flatten(-2) * x).sum(-1) / x.square().sum(-1))
    assert not torch.stack([norms[i, i + 1 :].abs().sum() for i in range(4)]).any()


def test_spectral_radius():
    assert depth.spectral_radius(torch.tensor([[0.0, 2.0], [-2.0, 0.0]])).item() == pytest.approx(2.0)
    assert depth.spectral_radius(torch.tensor([[0.5, 100.0], [0.0, -0.7]])).item() == pytest.approx(0.7)
    many = torch.randn(4, 5, 3, 3)
    assert depth.spectral_radius(many).shape == (4, 5)
    for i, j in itertools.product(range(4), range(5)):  # Gelfand: ‖Âᵏ‖^(1/k) → ρ, by squaring a matrix of size 1
        power, log_size = many[i, j].double(), 0.0
        for k in range(40):
            size = power.norm()
            log_size += size.log().item() / 2**k
            power = (power / size) @ (power / size)
        found = depth.spectral_radius(many.double())[i, j].item()
        assert found == pytest.approx(math.exp(log_size), rel=1e-10)
    assert depth.spectral_radius(many.bfloat16()).dtype == torch.float32
    ruined = many.clone()
    ruined[1, 2, 0, 1], ruined[3, 4, 1, 1] = float("nan"), float("inf")
    found, known = depth.spectral_radius(ruined), depth.spectral_radius(many)
    assert found.isnan().nonzero().tolist() == [[1, 2], [3, 4]]
    assert torch.equal(found.nan_to_num(0.0), torch.where(found.isnan(), 0, known))


def test_radius_under_one_decays_for_one_matrix_and_need_not_for_several():
    """The paper's claim holds for a constant Â; it does not for an Â that changes from layer to layer."""
    A_hat = torch.randn(4, 4, dtype=DOUBLE)
    A_hat *= 0.8 / depth.spectral_radius(A_hat)
    As = [torch.cat([torch.ones(4, 1, dtype=DOUBLE), A_hat], dim=1)] * 200
    assert torch.linalg.matrix_norm(depth.carry(As, 200, 0)) < 1e-15
    up, down = torch.tensor([[0.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    assert depth.spectral_radius(up) == depth.spectral_radius(down) == 0
    As = [torch.cat([torch.ones(2, 1), hat], dim=1) for hat in (up, down) * 5]
    assert depth.spectral_radius(depth.carry(As, 10, 0)).item() == 4.0**5


# ------------------------------------------------------------------------------------------- windows


def static(dim, A, B) -> GHC:
    ghc = GHC(dim, *B.shape).to(A.dtype)
    ghc.A.data, ghc.B.data = A, B
    return ghc


def run_window(m, n, A, B, layers=9, slot_width=3):
    """A stack of random sublayers under (A, B), each of them reading and writing."""
    _, sublayers, H = stack(GHC, m, n, layers, slot_width=slot_width)
    with torch.no_grad():
        return depth.trace([static(m * slot_width, A.to(DOUBLE), B.to(DOUBLE))] * layers, sublayers, H)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 3), (1, 8), (2, 4), (2, 5), (4, 8), (3, 3), (3, 8)])
@pytest.mark.parametrize("reads", ["newest", "all"])
def test_hard_window_holds_the_last_r_layers_whole(m, n, reads):
    read = None if reads == "newest" else initial_B(m, n).mT
    recording = run_window(m, n, *depth.hard_window(m, n, read=read))
    for l in range(10):  # noqa: E741
        segments = [z.unflatten(-1, (m, -1)) for z in reversed(recording.z[:l])]  # newest first
        segments += [recording.H[0]]  # older than the first layer: the slots of H′⁰, also moved on
        wanted = torch.cat(segments, dim=-2)[..., :n, :]
        assert torch.equal(recording.H[l], wanted)


@pytest.mark.parametrize(("m", "n"), [(1, 3), (2, 3), (2, 6), (4, 8), (3, 3)])
@pytest.mark.parametrize("weights", ["mean", "segment", "given"])
def test_hard_window_holds_the_last_n_layers_compressed(m, n, weights):
    compress = {"mean": None, "segment": torch.eye(m)[m - 1], "given": torch.randn(m)}[weights]
    recording = run_window(m, n, *depth.hard_window(m, n, keep="compressed", compress=compress))
    c = (torch.full((m,), 1 / m) if compress is None else compress).to(DOUBLE)
    for l in range(10):  # noqa: E741
        slots = [sum(c[i] * z.unflatten(-1, (m, -1))[..., i, :] for i in range(m)) for z in recording.z[:l]]
        wanted = torch.cat([*(s.unsqueeze(-2) for s in reversed(slots)), recording.H[0]], dim=-2)[..., :n, :]
        assert error(recording.H[l], wanted) < 1e-15


@pytest.mark.parametrize(
    ("m", "n", "keep", "window"), [(1, 4, "whole", 4), (2, 6, "whole", 3), (2, 6, "compressed", 6)]
)
def test_hard_window_holds_nothing_older(m, n, keep, window):
    A, B = depth.hard_window(m, n, keep=keep)
    As, Bs = [A] * 12, [B] * 12
    for s, l in itertools.combinations(range(1, 13), 2):  # noqa: E741
        held = depth.state_map(As, Bs, l, s)
        assert held.any().item() == (l - s < window)
    assert not depth.state_map(As, Bs, 12, 0).any()
    assert depth.spectral_radius(depth.split(A)[1]) == 0


def test_what_a_state_can_tell_apart_is_n():
    """Whatever A and B: the maps from all layers into the state have rank ≤ n together, n/m layers of rank m."""
    for m, n in SIZES:
        As, Bs = random_matrices(m, n, 12)
        held = torch.cat([depth.state_map(As, Bs, 12, s) for s in range(1, 13)], dim=-1)
        assert torch.linalg.matrix_rank(held).item() == n
    A, B = depth.residual_window()
    held = [depth.state_map([A] * 12, [B] * 12, 12, s).item() for s in range(1, 13)]
    assert held == [1.0] * 12  # the residual: everything, in one sum


def test_windows_of_section_4():
    L = 7
    layer = torch.arange(1, L + 1)

    def window(A, B):
        return depth.effective_window(depth.strength(depth.depth_maps([A] * L, [B] * L)))

    assert window(*depth.no_residual_window()).tolist() == (layer - 1).clamp(max=1).tolist()
    assert window(*depth.residual_window()).tolist() == (layer - 1).tolist()  # by Eq. (17); as one sum
    assert window(*depth.dense_window(L)).tolist() == (layer - 1).tolist()
    for n in (1, 2, 4):
        A, B = depth.hard_window(1, n, read=torch.ones(n, 1))
        assert window(A, B).tolist() == (layer - 1).clamp(max=n).tolist()
    A, B = depth.hard_window(2, 6, read=initial_B(2, 6).mT)
    assert window(A, B).tolist() == (layer - 1).clamp(max=3).tolist()
    A, B = depth.hard_window(2, 4, keep="compressed", read=initial_B(2, 4).mT)
    assert window(A, B).tolist() == (layer - 1).clamp(max=4).tolist()


@torch.no_grad()
def test_windows_compute_what_they_are_named_after():
    _, layers, H = stack(GHC, 1, 6)
    alone = H.clone()
    alone[..., 1:, :] = 0  # the dense window begins with the embedding in slot 0 and room for 5 outputs
    h = plain = H[..., 0, :]
    outputs = [h]
    for layer in layers:
        h, plain = h + layer(h), layer(plain)
        outputs.insert(0, layer(torch.stack(outputs).sum(0)))

    def last_state(A, B, H):
        return depth.trace([static(3, A.to(DOUBLE), B.to(DOUBLE))] * 5, layers, H).H[-1]

    assert torch.equal(last_state(*depth.no_residual_window(), H[..., :1, :])[..., 0, :], plain)
    assert torch.equal(last_state(*depth.residual_window(), H[..., :1, :])[..., 0, :], h)
    assert error(last_state(*depth.dense_window(5), alone), torch.stack(outputs, dim=-2)) < 1e-13


def test_effective_window_of_a_soft_window():
    """m = n = 1, Â = ρ: maps ρ^(l−s−1), so the window at a fraction f is 1 + ⌊log f / log ρ⌋."""
    A, B = torch.tensor([[1.0, 0.5]], dtype=DOUBLE), torch.ones(1, 1, dtype=DOUBLE)
    table = depth.strength(depth.depth_maps([A] * 10, [B] * 10))
    for fraction, reach in ((1.0, 1), (0.5, 2), (0.3, 2), (0.25, 3), (0.1, 4), (0.001, 9)):
        assert depth.effective_window(table, fraction)[-1].item() == reach
    assert depth.effective_window(table).tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 4, 4]


@pytest.mark.parametrize("lead", [(), (4,), (2, 3)])
def test_effective_window_by_loops(lead):
    """Of tables with entries of both signs, as shares are, each token by itself."""
    L, table = 6, torch.randn(6, 6, *lead, dtype=DOUBLE) ** 3
    table[4, 1:] = 0  # of a layer that reads no earlier one

    def by_loop(token, fraction):
        found = []
        for l in range(1, L + 1):  # noqa: E741
            row = [abs(token[l - 1][s]) for s in range(1, l)]
            found.append(max((l - s for s in range(1, l) if 0 < row[s - 1] >= fraction * max(row)), default=0))
        return found

    for fraction in (0.1, 0.5, 1.0):
        window = depth.effective_window(table, fraction).reshape(L, -1)
        tokens = table.reshape(L, L, -1).movedim(-1, 0).tolist()
        assert window.T.tolist() == [by_loop(token, fraction) for token in tokens]
    assert torch.equal(depth.effective_window(table), depth.effective_window(table, 0.1))
    row = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [1.0, 0.105, 1.0, 1.0], [1.0, 0.095, 1.0, 1.0]])
    assert depth.effective_window(row).tolist() == [0, 1, 2, 2]


def test_effective_window_of_no_numbers():
    with pytest.raises(ValueError, match="table holds NaN"):
        depth.effective_window(torch.tensor([[1.0, 0.0], [float("nan"), 1.0]]))


def test_effective_window_per_token_and_of_contributions():
    recording = depth.trace(*stack(DynamicGHC, 2, 3))
    window = depth.effective_window(depth.contributions(recording), 0.5)
    assert window.shape == (5, 2, 3)
    assert not window[0].any() and (window[1] == 1).all() and (window[4] >= 1).all() and (window <= 4).sum() == 30
    assert depth.effective_window(torch.ones(1, 1)).tolist() == [0]
    for fraction in (0.0, -1.0, 1.5):
        with pytest.raises(ValueError, match="must be > 0 and ≤ 1"):
            depth.effective_window(torch.ones(2, 2), fraction)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"m": 3, "n": 2}, "n = 2: must be ≥ m = 3"),
        ({"m": 0, "n": 2}, "m = 0: must be an integer ≥ 1"),
        ({"m": 1, "n": 2.0}, "n = 2.0: must be an integer ≥ 1"),
        ({"m": 1, "n": 2, "keep": "half"}, "keep = 'half': must be one of 'whole', 'compressed'"),
        ({"m": 2, "n": 2, "compress": torch.ones(2)}, "compress is given: must be None"),
        ({"m": 2, "n": 3, "read": torch.ones(3, 5)}, "read has shape (3, 5): must be (3, 2)"),
        ({"m": 2, "n": 3, "keep": "compressed", "compress": torch.ones(3)}, "compress has shape (3,): must be (2,)"),
    ],
)
def test_hard_window_refuses(arguments, message, no_shape_checks):
    with pytest.raises(ValueError) as raised:
        depth.hard_window(**arguments)
    assert message in str(raised.value)


# --------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize(
    "choice",
    [
        {"m": 2, "n": 3},
        {"m": 2, "n": 4, "dynamic": False},
        {"m": 4, "n": 8, "n_experts": 3, "embed_rank": 16},
        {"m": None, "n": None},
    ],
)
def test_record_of_a_model(choice):
    model = randomised_connections(VWNTransformer(VWNConfig(vocab_size=50, dim=16, n_layers=2, n_heads=2, **choice)))
    tokens = torch.randint(50, (2, 5))
    recording = depth.record(model, tokens)
    with torch.no_grad():
        states = list(model.states(tokens))
    assert len(states) == len(recording.H) == 5
    for l, H in enumerate(states):  # noqa: E741
        assert torch.equal(recording.H[l], H)
        assert error(depth.unrolled_state(recording, l), H) < 1e-12
    assert not recording.H[-1].requires_grad
    assert depth.record(model, tokens, grad=True).H[-1].requires_grad
    table = depth.strength(depth.depth_maps(recording.A, recording.B))
    assert table.shape == (4, 4, 2, 5)


def randomised_connections(model: VWNTransformer) -> VWNTransformer:
    model = model.to(DOUBLE)
    with torch.no_grad():
        for parameter in model.connections.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model
