"""Static GHC, Eqs. (9), (10), (15), (16), against the loops of `oracle.py`."""

from __future__ import annotations

from inspect import signature

import oracle
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize, prune

import vwn_ref.ghc
from vwn_ref.config import VWNConfig
from vwn_ref.dynamic import DynamicGHC
from vwn_ref.embedding import OverWidthEmbedding
from vwn_ref.ghc import GHC, parameter_groups, routing_matrix
from vwn_ref.reduce import Reduce

SIZES = [(1, 1), (1, 4), (2, 3), (3, 5), (4, 4), (4, 8), (5, 7), (8, 64)]
LEADS = [(), (3,), (2, 5), (2, 1, 3), (0,), (1,), (2, 0), (1, 1)]
KERNELS = ["reference", "auto"]


def randomised(module: GHC, dtype=torch.float64) -> GHC:
    """Every parameter replaced by random numbers: at the initial values half of the equations do nothing."""
    module = module.to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def inputs(module: GHC, lead=(2,), dtype=torch.float64):
    H = 0.7 * torch.randn(*lead, module.n, module.slot_width, dtype=dtype)
    return H, torch.randn(*lead, module.dim, dtype=dtype)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, relative to the largest wanted number."""
    assert found.shape == wanted.shape
    if wanted.numel() == 0:
        return 0.0
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def check_against_oracle(module: GHC, lead=(2,), tolerance=1e-13) -> None:
    """x, A, B and the next H′ of `module` equal those of the loops, at its present parameters."""
    H, z = inputs(module, lead, module.A.dtype)
    want_x, want_A, want_B, want_H = oracle.run(module, H, z)
    seen = []

    def layer(x):
        seen.append(x)
        return z

    with torch.no_grad():
        A, B = module.matrices(H)
        x, state = module.width(H)
        found_H = module.depth(z, state)
        whole = module(H, layer)
    found = {"x": (x, want_x), "A": (A, want_A), "B": (B, want_B), "H": (found_H, want_H)}
    found |= {"x that the layer sees": (seen[0], want_x), "H of forward": (whole, want_H)}
    for name, (value, wanted) in found.items():
        assert value.dtype == module.A.dtype
        assert error(value, wanted) <= tolerance, f"{name} differs from the oracle by {error(value, wanted):.2e}"


def check_initial(module: GHC) -> None:
    """Eqs. (15) and (16), entry by entry."""
    assert module.A.tolist() == oracle.initial_A(module.m, module.n)
    assert module.B.tolist() == oracle.initial_B(module.m, module.n)


# ------------------------------------------------------------------------------------------- Eq. (10)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("m", "n"), SIZES)
@pytest.mark.parametrize("slot_width", [1, 3])
def test_equals_the_loops(m, n, slot_width, kernels):
    check_against_oracle(randomised(GHC(m * slot_width, m, n, kernels=kernels)))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("lead", LEADS)
def test_any_leading_shape(lead, kernels):
    check_against_oracle(randomised(GHC(10, 2, 3, kernels=kernels)), lead)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_float32_is_the_float64_result_rounded(m, n, kernels):
    check_against_oracle(randomised(GHC(m * 4, m, n, kernels=kernels), torch.float32), (5,), tolerance=2e-6)


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_state_that_is_not_contiguous(kernels):
    module = randomised(GHC(10, 2, 3, kernels=kernels))
    H, z = inputs(module, (4,))
    turned = H.mT.contiguous().mT
    assert not turned.is_contiguous()
    assert torch.equal(module(turned, lambda x: z), module(H, lambda x: z))


def forward_as_function(module: GHC):
    """(H, z, *parameters) -> (x, next H), a function of tensors alone for gradcheck and autograd."""
    names = [name for name, _ in module.named_parameters()]

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, H, z):
            x, state = self.inner.width(H)
            return x, self.inner.depth(z, state)

    both = Both()

    def function(H, z, *parameters):
        return functional_call(both, {f"inner.{k}": v for k, v in zip(names, parameters, strict=True)}, (H, z))

    return function, names


def leaves(module: GHC, lead):
    return [t.detach().clone().requires_grad_() for t in (*inputs(module, lead, module.A.dtype), *module.parameters())]


def check_gradients_against_oracle(module: GHC, lead=(2,), tolerance=1e-13) -> None:
    """Gradients for H, z and every parameter equal those of autograd through the loops."""
    function, names = forward_as_function(module)
    own = leaves(module, lead)
    theirs = [t.detach().double().requires_grad_() for t in own]
    x, H = function(*own)
    replaced = {k.replace("norm.weight", "gain"): v for k, v in zip(names, theirs[2:], strict=True)}
    want_x, _, _, want_H = oracle.run(module, theirs[0], theirs[1], differentiable=True, **replaced)
    weights = [torch.randn_like(x), torch.randn_like(H)]
    found = torch.autograd.grad([x, H], own, weights)
    wanted = torch.autograd.grad([want_x, want_H], theirs, [w.double() for w in weights])
    for name, g, w in zip(["H", "z", *names], found, wanted, strict=True):
        assert w.abs().max() > 0, f"the gradient for {name} is zero: the test would show nothing"
        assert error(g, w) <= tolerance, f"gradient for {name} differs by {error(g, w):.2e}"


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 4), (2, 3), (3, 5), (4, 4)])
def test_gradcheck(m, n, kernels):
    module = randomised(GHC(m * 2, m, n, kernels=kernels))
    function, _ = forward_as_function(module)
    assert torch.autograd.gradcheck(function, leaves(module, (2,)))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_gradients_equal_those_of_the_loops(m, n, kernels):
    lead, slot_width = ((1,), 1) if n > 8 else ((2,), 3)
    check_gradients_against_oracle(randomised(GHC(m * slot_width, m, n, kernels=kernels)), lead)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("m", "n"), [(1, 4), (2, 3), (4, 4), (4, 8)])
def test_float32_gradients(m, n, kernels):
    module = randomised(GHC(m * 4, m, n, kernels=kernels), torch.float32)
    check_gradients_against_oracle(module, (2,), tolerance=5e-6)


# ------------------------------------------------------------------------------------ Eqs. (15), (16)


@pytest.mark.parametrize("cls", [GHC, DynamicGHC])
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_initial_matrices(cls, m, n):
    check_initial(cls(m * 2, m, n))


def test_initial_matrices_by_hand():
    module = GHC(4, m=2, n=3)
    assert module.A.tolist() == [[1, 0, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 1]]
    assert module.B.tolist() == [[1, 0, 1], [0, 1, 0]]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("cls", [GHC, DynamicGHC])
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_at_first_slot_j_receives_segment_j_mod_m(cls, m, n, kernels):
    module = cls(m * 3, m, n, kernels=kernels)
    H, z = inputs(module, (2, 3), torch.float32)
    x, state = module.width(H)
    assert torch.equal(x, H[..., :m, :].flatten(-2))
    new = module.depth(z, state)
    for j in range(n):
        i = j % m
        assert torch.equal(new[..., j, :], H[..., j, :] + z[..., 3 * i : 3 * i + 3])


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("cls", [GHC, DynamicGHC])
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_at_first_m_slots_are_exactly_a_residual_stack(cls, m, n, kernels):
    dim, depth = m * 4, 5
    layers = [nn.Sequential(nn.RMSNorm(dim), nn.Linear(dim, dim), nn.GELU()) for _ in range(depth)]
    H = torch.randn(2, 3, n, 4)
    h = H[..., :m, :].flatten(-2)
    for layer in layers:
        H = cls(dim, m, n, kernels=kernels)(H, layer)
        h = h + layer(h)
    assert torch.equal(H[..., :m, :].flatten(-2), h)


# -------------------------------------------------------------------------------------------- Eq. (9)


def test_routing_matrix():
    A = torch.arange(10.0).reshape(2, 5)[:, :3]
    B = torch.tensor([[7.0, 8.0]])
    assert routing_matrix(A, B).tolist() == [[0, 7, 8], [0, 1, 2], [5, 6, 7]]


def test_routing_matrix_has_a_leading_shape_and_m_plus_n_rows():
    module = randomised(DynamicGHC(8, 2, 3))
    R = routing_matrix(*module.matrices(inputs(module, (4, 5))[0]))
    assert R.shape == (4, 5, 5, 5)
    assert not R[..., :2, :2].any()


# ----------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("cls", [GHC, DynamicGHC])
@pytest.mark.parametrize(
    ("dim", "m", "n", "message"),
    [
        (8, 2, 1, "n = 1: must be ≥ m = 2"),
        (8, 3, 4, "m = 3: must divide dim = 8"),
        (8, 0, 4, "m = 0: must be an integer ≥ 1"),
        (0, 1, 1, "dim = 0: must be an integer ≥ 1"),
    ],
)
def test_refuses_wrong_sizes(cls, dim, m, n, message):
    with pytest.raises(ValueError) as raised:
        cls(dim, m, n)
    assert message in str(raised.value)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("cls", [GHC, DynamicGHC])
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 4, 4), (4,), (3, 4, 1), (12,), (2, 4, 3)])
def test_refuses_a_state_of_the_wrong_shape(cls, shape, kernels):
    module = cls(8, 2, 3, kernels=kernels)
    if len(shape) == 1:
        shape = (1, *shape)
    for method in (module.width, module.matrices):
        with pytest.raises(ValueError, match=r"must be \[\.\.\., n, d_b\] = \[\.\.\., 3, 4\]") as raised:
            method(torch.zeros(shape))
        assert str(shape) in str(raised.value)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("cls", [GHC, DynamicGHC])
def test_refuses_a_state_of_another_dtype(cls, kernels):
    module = cls(8, 2, 3, kernels=kernels)
    for method in (module.width, module.matrices):
        with pytest.raises(TypeError, match=r"H has dtype torch.float64: must be torch.float32"):
            method(torch.zeros(2, 3, 4, dtype=torch.float64))


@pytest.mark.parametrize("kernels", KERNELS)
def test_refuses_a_sublayer_output_of_the_wrong_width(kernels):
    module = GHC(8, 2, 3, kernels=kernels)
    _, state = module.width(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"z has shape \(2, 6\): must be \[\.\.\., 8\]"):
        module.depth(torch.zeros(2, 6), state)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("cls", [GHC, DynamicGHC])
@pytest.mark.parametrize("autocast", [False, True])
def test_refuses_a_sublayer_output_of_other_tokens(cls, kernels, autocast, no_shape_checks):
    """Nothing is broadcast: not one token's output to all, not one row's state to many."""
    module = cls(8, 2, 3, kernels=kernels)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for H, z in (((2, 5, 3, 4), (2, 1, 8)), ((1, 5, 3, 4), (7, 5, 8)), ((5, 3, 4), (2, 5, 8))):
            _, state = module.width(torch.zeros(H))
            with pytest.raises(ValueError, match=r"z has shape \(.*\): must be"):
                module.depth(torch.zeros(z), state)


@pytest.mark.parametrize("kernels", KERNELS)
def test_refuses_what_is_no_sublayer_output(kernels, no_shape_checks):
    module = GHC(8, 2, 3, kernels=kernels)
    H = torch.zeros(2, 3, 4)
    with pytest.raises(
        TypeError, match=r"z is a tuple: must be a tensor \[\.\.\., 8\]; .* between `width` and `depth`"
    ):
        module(H, lambda x: (x, None))
    with pytest.raises(TypeError, match=r"z has dtype torch.bfloat16: must be torch.float32"):
        module(H, lambda x: x.bfloat16())
    with pytest.raises(ValueError, match=r"\[\.\.\., 3, 4\]; H\.unflatten\(-1, \(3, 4\)\) cuts a vector"):
        module.width(torch.zeros(2, 12))


def test_parameter_groups_of_any_module():
    own = torch.nn.ModuleDict({"ghc": DynamicGHC(8, 2, 3), "layer": torch.nn.Linear(8, 8)})
    names = {id(p): name for name, p in own.named_parameters()}
    decayed, exempt = parameter_groups(own, 0.3)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.3, 0.0)
    assert {names[id(p)] for p in exempt["params"]} == {"ghc.A", "ghc.B", "ghc.norm.weight", "layer.bias"}
    assert {names[id(p)] for p in decayed["params"]} == set(names.values()) - {names[id(p)] for p in exempt["params"]}


class Scaled(torch.nn.Module):
    def forward(self, A):
        return 2 * A


@pytest.mark.parametrize("name", ["A", "B"])
@pytest.mark.parametrize(
    "change, renamed",
    [
        (lambda ghc, name: parametrize.register_parametrization(ghc, name, Scaled()), "parametrizations.{}.original"),
        (lambda ghc, name: prune.l1_unstructured(ghc, name, 0.2), "{}_orig"),
    ],
    ids=["parametrized", "pruned"],
)
def test_parameter_groups_where_a_matrix_is_made_of_another(change, renamed, name):
    own = torch.nn.Sequential(DynamicGHC(8, 2, 3))
    change(own[0], name)
    names = {id(p): n for n, p in own.named_parameters()}
    static = {f"0.{renamed.format(name)}", f"0.{'AB'.replace(name, '')}"}
    for decay_static in (False, True):
        decayed, exempt = parameter_groups(own, 0.3, decay_static=decay_static)
        assert {names[id(p)] for p in exempt["params"]} == {"0.norm.weight"} | (set() if decay_static else static)
        assert len(decayed["params"]) + len(exempt["params"]) == len(names) == 7


def test_matrices_of_that_name_elsewhere_are_decayed():
    """A and B of a low-rank adapter, say, are no GHC's."""
    adapter = torch.nn.ParameterDict({"A": torch.randn(4, 2), "B": torch.randn(2, 4)})
    decayed, _ = parameter_groups(torch.nn.ModuleList([GHC(8, 2, 3), adapter]), 0.1)
    assert [id(p) for p in decayed["params"]] == [id(p) for p in adapter.parameters()]


def test_defaults_are_those_of_the_config():
    cfg = VWNConfig(vocab_size=5)
    assert DynamicGHC(8, 2, 3).eps == cfg.norm_eps == Reduce(8, 2, 4).norm.eps
    assert signature(OverWidthEmbedding).parameters["std"].default == cfg.embed_std


def test_parameter_groups_refuse_flattened_matrices():
    ghc = GHC(8, 2, 3)
    ghc.B.data = ghc.B.data.flatten()
    with pytest.raises(ValueError, match=r"B of a GHC has shape \(6,\), must be .* flattened by FullySharded"):
        parameter_groups(ghc, 0.1)


@pytest.mark.parametrize("cls", [GHC, DynamicGHC])
@pytest.mark.parametrize("kernels", KERNELS)
def test_matrices_of_ones_own(cls, kernels):
    """What the docstring says: override `matrices`, and `width` so that it is used."""

    class Softmax(cls):
        def matrices(self, H):
            A, B = super().matrices(H)
            return A.softmax(dim=-2), 2 * B

        def width(self, H):
            return vwn_ref.ghc.width(H, *self.matrices(H))

    own, H = Softmax(8, 2, 3, kernels=kernels), torch.randn(5, 3, 4)
    for p in own.parameters():
        torch.nn.init.normal_(p)
    A, B = own.matrices(H)
    z = torch.tanh((A[..., :2].mT @ H).flatten(-2))
    expected = B.mT @ z.unflatten(-1, (2, 4)) + A[..., 2:].mT @ H
    torch.testing.assert_close(own(H, torch.tanh), expected, rtol=1e-5, atol=1e-5)


def test_refuses_another_norm():
    ghc = DynamicGHC(8, 2, 3)
    ghc.norm = torch.nn.LayerNorm(4)
    for call in (ghc.width, ghc.matrices):
        with pytest.raises(TypeError, match="norm is a LayerNorm: must be an RMSNorm"):
            call(torch.randn(5, 3, 4))


def test_refuses_unknown_kernels():
    with pytest.raises(ValueError, match="kernels = 'fast': must be one of 'auto', 'reference'"):
        GHC(8, 2, 3, kernels="fast")


@pytest.mark.parametrize("eps", [-1.0, float("nan"), "a"])
def test_refuses_an_epsilon_that_is_none(eps, no_shape_checks):
    with pytest.raises(ValueError, match=f"eps = {eps!r}: must be a finite number ≥ 0"):
        DynamicGHC(8, 2, 3, eps=eps)


@pytest.mark.parametrize("decay", [-1.0, "x"])
def test_refuses_a_decay_that_is_none(decay, no_shape_checks):
    with pytest.raises(ValueError, match=f"weight_decay = {decay!r}: must be a finite number ≥ 0"):
        parameter_groups(GHC(8, 2, 3), decay)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("cls", [GHC, DynamicGHC])
@pytest.mark.parametrize("m, n", [(2, 4), (1, 3)])
def test_refuses_the_state_of_another_ghc(cls, kernels, m, n, no_shape_checks):
    x, state = cls(8, m, n, kernels=kernels).width(torch.zeros(5, n, 8 // m))
    with pytest.raises(
        ValueError, match=r"state: must be made by the width of this GHC, .* \[\.\.\., 3, 4\]; these are"
    ):
        cls(8, 2, 3, kernels=kernels).depth(x, state)
