"""Eq. (4)."""

from itertools import product

import pytest
import torch

from vwn_ref import Reduce
from vwn_ref.reduce import initial_W_reduce

SIZES = [(1, 1), (1, 4), (2, 3), (3, 5), (4, 4), (4, 8), (2, 16)]


def reduce_by_loops(H, module, eps=1e-6):
    """h_reduce = W GroupNorm(h′) for one token, groups D wide, every sum a Python loop."""
    h = [x for slot in H.tolist() for x in slot]
    if module.norm is not None:
        gain, bias, D = module.norm.weight.tolist(), module.norm.bias.tolist(), module.dim
        for start in range(0, len(h), D):
            group = h[start : start + D]
            mean = sum(group) / D
            var = sum((x - mean) ** 2 for x in group) / D
            for i, x in enumerate(group, start):
                h[i] = (x - mean) / (var + eps) ** 0.5 * gain[i] + bias[i]
    W = module.linear.weight.tolist()
    return torch.tensor([sum(w * x for w, x in zip(row, h, strict=True)) for row in W], dtype=torch.float64)


def random_reduce(m, n, **kwargs):
    module = Reduce(12 * m, m, n, **kwargs).double()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    return module


@pytest.mark.parametrize("m, n", SIZES)
def test_equals_loops(m, n):
    module = random_reduce(m, n)
    assert (module.norm is None) == (n % m != 0)  # §5.1: no GroupNorm where r is no integer
    H = torch.randn(3, n, 12, dtype=torch.float64)
    expected = torch.stack([reduce_by_loops(token, module) for token in H])
    torch.testing.assert_close(module(H), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("m, n", [(2, 4), (2, 3)])
def test_leading_shapes_and_gradients(lead, m, n):
    module = random_reduce(m, n)
    H = torch.randn(*lead, n, 12, dtype=torch.float64, requires_grad=True)
    assert module(H).shape == (*lead, module.dim)
    assert torch.equal(module(H).reshape(-1, module.dim), module(H.reshape(-1, n, 12)))
    if 0 < H.numel() < 100:
        assert torch.autograd.gradcheck(module, H)


@pytest.mark.parametrize("m, n", SIZES)
def test_mean_averages_the_slots_of_each_segment(m, n):
    H = torch.randn(5, n, 6, dtype=torch.float64)
    h = H.flatten(-2) @ initial_W_reduce(6 * m, m, n, "mean").double().T
    for i in range(m):
        torch.testing.assert_close(h[:, 6 * i : 6 * i + 6], H[:, i::m].mean(1), rtol=1e-6, atol=1e-7)  # float32 weights
    if n % m == 0:
        groups = H.reshape(5, n // m, 6 * m)
        torch.testing.assert_close(h, groups.mean(1), rtol=1e-6, atol=1e-7)


def test_first_and_random():
    H = torch.randn(5, 6, 4)
    assert torch.equal(H.flatten(-2) @ initial_W_reduce(8, 2, 6, "first").T, H[:, :2].flatten(-2))
    W = initial_W_reduce(64, 2, 6, "random")
    assert W.std().item() == pytest.approx(192**-0.5, rel=0.05)


@pytest.mark.parametrize(
    "kwargs, match",
    [
        (dict(init="zeros"), "init = 'zeros': must be one of 'mean', 'first', 'random'"),
        (dict(n=3, norm=True), "norm = True: r = n/m = 3/2 must be an integer"),
        (dict(dim=7), "m = 2: must divide dim = 7"),
        (dict(eps=-1.0), "eps = -1.0: must be a finite number ≥ 0"),
        (dict(norm="x"), "norm = 'x': must be True or False"),
    ],
)
def test_bad_arguments(kwargs, match, no_shape_checks):
    with pytest.raises(ValueError, match=match):
        Reduce(**{"dim": 8, "m": 2, "n": 4, **kwargs})


def test_a_norm_where_it_was_asked_for():
    for n, norm in ((2, True), (4, True), (4, None)):
        assert Reduce(8, 2, n, norm=norm).norm.num_groups == n // 2
    for n, norm in ((4, False), (3, False), (3, None)):
        assert Reduce(8, 2, n, norm=norm).norm is None


def test_bad_state(no_shape_checks):
    for shape in product([(3,), ()], [(4, 5), (5, 4), (16,)]):
        with pytest.raises(ValueError, match=r"must be \[..., n, d_b\] = \[..., 4, 4\]"):
            Reduce(8, 2, 4)(torch.zeros(*shape[0], *shape[1]))


@pytest.mark.parametrize(
    "sizes, match", [((4, 2, 4, "mena"), "init = 'mena'"), ((5, 2, 3), "m = 2: must divide dim = 5")]
)
def test_initial_W_reduce_refuses(sizes, match, no_shape_checks):
    with pytest.raises(ValueError, match=match):
        initial_W_reduce(*sizes)
