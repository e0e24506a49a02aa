"""Dynamic GHC, Eqs. (11)-(14), against the loops of `oracle.py`, and every mutation of both caught."""

from __future__ import annotations

import oracle
import pytest
import torch
from mutations import INITIAL_MUTATIONS, MUTATIONS
from test_ghc import (
    KERNELS,
    LEADS,
    SIZES,
    check_against_oracle,
    check_gradients_against_oracle,
    check_initial,
    error,
    forward_as_function,
    inputs,
    leaves,
    randomised,
)

from vwn_ref import dynamic, ops
from vwn_ref.dynamic import DynamicGHC
from vwn_ref.ghc import GHC

EPS = 0.3  # so large that where it stands matters


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("m", "n"), SIZES)
@pytest.mark.parametrize("slot_width", [1, 3])
def test_equals_the_loops(m, n, slot_width, kernels):
    check_against_oracle(randomised(DynamicGHC(m * slot_width, m, n, eps=EPS, kernels=kernels)), tolerance=1e-12)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("lead", LEADS)
def test_any_leading_shape(lead, kernels):
    check_against_oracle(randomised(DynamicGHC(10, 2, 3, kernels=kernels)), lead, tolerance=1e-12)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_float32_is_the_float64_result_rounded(m, n, kernels):
    module = randomised(DynamicGHC(m * 4, m, n, kernels=kernels), torch.float32)
    check_against_oracle(module, (5,), tolerance=5e-6)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 4), (2, 3), (3, 5), (4, 4)])
def test_gradcheck(m, n, kernels):
    module = randomised(DynamicGHC(m * 2, m, n, eps=EPS, kernels=kernels))
    function, _ = forward_as_function(module)
    assert torch.autograd.gradcheck(function, leaves(module, (2,)))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_gradients_equal_those_of_the_loops(m, n, kernels):
    lead, slot_width = ((1,), 1) if n > 8 else ((2,), 3)
    module = randomised(DynamicGHC(m * slot_width, m, n, eps=EPS, kernels=kernels))
    check_gradients_against_oracle(module, lead, tolerance=1e-12)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("m", "n"), [(1, 4), (2, 3), (4, 4), (4, 8)])
def test_float32_gradients(m, n, kernels):
    module = randomised(DynamicGHC(m * 4, m, n, eps=EPS, kernels=kernels), torch.float32)
    check_gradients_against_oracle(module, (2,), tolerance=1e-5)


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_zero_state_gives_the_static_matrices_and_finite_gradients(kernels):
    module = randomised(DynamicGHC(6, 2, 3, kernels=kernels))
    H = torch.zeros(4, 3, 3, dtype=torch.float64, requires_grad=True)
    A, B = module.matrices(H)
    assert torch.equal(A, module.A.expand_as(A)) and torch.equal(B, module.B.expand_as(B))
    module(H, torch.sin).sum().backward()
    assert H.grad is not None and H.grad.isfinite().all()


@pytest.mark.parametrize("kernels", KERNELS)
def test_each_token_has_its_own_matrices(kernels):
    module = randomised(DynamicGHC(6, 2, 3, kernels=kernels))
    H, z = inputs(module, (4,))
    whole = module(H, lambda x: z)
    for t in range(4):
        assert error(module(H[t], lambda x, t=t: z[t]), whole[t]) < 1e-14
    A, _ = module.matrices(H)
    assert (A[0] - A[1]).abs().max() > 0.1


def test_matrices_do_not_depend_on_the_length_of_the_slots():
    """Eq. (12): each slot is normed on its own, so its scale is forgotten, and another slot's does not matter."""
    module = randomised(DynamicGHC(6, 2, 3, eps=1e-30))
    H, _ = inputs(module, (4,))
    scale = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)[:, None]
    for found, wanted in zip(module.matrices(H * scale), module.matrices(H), strict=True):
        assert error(found, wanted) < 1e-13


# ------------------------------------------------------------------------------------ initial values


def test_initial_dynamic_parameters():
    module = DynamicGHC(8, 2, 3)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes == {
        "A": (3, 5), "B": (2, 3), "W_alpha": (4, 5), "W_beta": (4, 2), "S_alpha": (3, 5), "S_beta": (2, 3),
        "norm.weight": (4,),
    }  # fmt: skip
    assert not module.W_alpha.any() and not module.W_beta.any()
    assert (module.S_alpha == 1).all() and (module.S_beta == 1).all() and (module.norm.weight == 1).all()


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_starts_as_the_static_ghc(m, n, kernels):
    dynamic_one, static_one = DynamicGHC(m * 3, m, n, kernels=kernels), GHC(m * 3, m, n, kernels="reference")
    H, z = inputs(static_one, (2, 3), torch.float32)
    assert torch.equal(dynamic_one(H, lambda x: z), static_one(H, lambda x: z))


def test_the_first_step_of_training_moves_the_dynamic_part():
    module = DynamicGHC(8, 2, 3)
    H, _ = inputs(module, (5,), torch.float32)
    module(H, torch.sin).square().sum().backward()
    for name in ("A", "B", "W_alpha", "W_beta"):
        assert module.get_parameter(name).grad.abs().max() > 0, name
    for name in ("S_alpha", "S_beta", "norm.weight"):  # they multiply tanh(0) = 0
        assert not module.get_parameter(name).grad.any(), name


# --------------------------------------------------------------------------------- mistakes are caught


def check_all(m, n):
    """What the tests above compare: outputs and gradients, at random parameters."""
    torch.manual_seed(0)
    module = randomised(DynamicGHC(m * 3, m, n, eps=EPS, kernels="reference"))
    check_against_oracle(module, (2,), tolerance=1e-12)
    check_gradients_against_oracle(module, (2,), tolerance=1e-12)


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_caught(name, monkeypatch):
    patches, (m, n) = MUTATIONS[name]
    check_all(m, n)  # passes as it stands
    for target, function in patches.items():
        monkeypatch.setattr(target, function)
    with pytest.raises(AssertionError, match="differs"):
        check_all(m, n)


@pytest.mark.parametrize("name", INITIAL_MUTATIONS)
def test_mutation_of_the_initial_values_is_caught(name, monkeypatch):
    patches, (m, n) = INITIAL_MUTATIONS[name]
    check_initial(DynamicGHC(m * 3, m, n))
    for target, function in patches.items():
        monkeypatch.setattr(target, function)
    with pytest.raises(AssertionError):
        check_initial(DynamicGHC(m * 3, m, n))


def test_the_patched_functions_are_the_ones_that_run(monkeypatch):
    """Guards the two tests above: the seam looks its functions up where the mutations put theirs."""
    called = []
    for target in {target for patches, _ in MUTATIONS.values() for target in patches}:
        monkeypatch.setattr(target, lambda *a, target=target: called.append(target) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            static = "ops.reference.width" in target
            module = (GHC if static else DynamicGHC)(6, 2, 3, kernels="reference")
            module(torch.zeros(1, 3, 3), torch.sin)
        monkeypatch.undo()
    assert len(set(called)) == 4


def test_a_planted_error_of_one_part_in_a_billion_is_seen(monkeypatch):
    right = dynamic.dynamic_matrices
    monkeypatch.setattr(dynamic, "dynamic_matrices", lambda *a: tuple(t * (1 + 1e-9) for t in right(*a)))
    with pytest.raises(AssertionError, match="differs"):
        check_all(2, 3)


def test_oracle_on_one_token_by_hand():
    """The oracle itself on numbers small enough for paper: m = 1, n = 2, d_b = 1, no dynamic part."""
    p = oracle.Parameters(A=[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], B=[[10.0, 20.0]])
    [(x, _, _, H)] = oracle.ghc([[[1.0], [10.0]]], [[0.5]], p)
    assert x == [1 * 1 + 4 * 10]
    assert H == [[2 * 1 + 5 * 10 + 10 * 0.5], [3 * 1 + 6 * 10 + 20 * 0.5]]


def test_reference_is_what_select_names():
    assert ops.select("reference") is ops.reference
