"""The CPU kernels against the reference in float64: outputs and every gradient."""

from __future__ import annotations

import itertools

import helpers
import pytest
import torch
from vwn_ref.kernels import cpu

from vwn_ref import ghc

# Errors are relative to the root mean square of a tensor. float32 rounds to 6e-8; the longest sums run over 1000 tokens
# times d_b, where rounding adds up like a random walk, and 72 terms go into one mixed element. Measured: at most 1e-6.
# A wrong formula shows at 1e-2 and above.
TOLERANCE = {torch.float32: 4e-6, torch.float64: 1e-13}


@pytest.mark.parametrize("shape", helpers.SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_equals_the_reference(either_backend, shape, dtype, static):
    for lead in ((1000,), (33,), (7, 1)) if shape[1] < 64 else ((3, 11),):
        case = helpers.case(*shape, lead, dtype)
        found = helpers.run(cpu, case, static=static)
        assert all(t.dtype == dtype for t in found.values())
        helpers.assert_close(found, helpers.oracle(case, static=static), TOLERANCE[dtype])


@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 0, 3), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_any_leading_shape(either_backend, lead, static):
    case = helpers.case(2, 3, 32, lead, torch.float32)
    helpers.assert_close(helpers.run(cpu, case, static=static), helpers.oracle(case, static=static), 4e-6)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_inputs_and_gradients_that_are_not_contiguous(either_backend, static):
    case = helpers.case(3, 5, 5, (6, 10), torch.float64)
    H, *parameters = case.inputs
    strided = case._replace(
        inputs=(H.transpose(0, 1).contiguous().transpose(0, 1), *(p.mT.contiguous().mT for p in parameters[:-1]),
                torch.stack([parameters[-1]] * 2, dim=1)[:, 0]),
        z=case.z.repeat(1, 1, 2)[..., : case.z.shape[-1]],
        g=case.g[:1, :1].expand_as(case.g),
        g_x=case.g_x[..., :1].expand_as(case.g_x),
    )  # fmt: skip
    assert not any(t.is_contiguous() for t in (*strided.inputs, strided.z, strided.g, strided.g_x))
    helpers.assert_close(helpers.run(cpu, strided, static=static), helpers.oracle(strided, static=static), 1e-13)


def test_a_state_expanded_over_tokens_and_one_that_is_negated(either_backend):
    case = helpers.case(3, 5, 5, (9,), torch.float64)
    expanded = case._replace(inputs=(case.inputs[0][:1].expand(9, -1, -1), *case.inputs[1:]))
    helpers.assert_close(helpers.run(cpu, expanded), helpers.oracle(expanded), 1e-13)
    negated = case._replace(inputs=(torch._neg_view(case.inputs[0]), *case.inputs[1:]))
    helpers.assert_close(helpers.run(cpu, negated), helpers.oracle(negated), 1e-13)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_gradcheck_once_and_twice(either_backend, static):
    case = helpers.case(2, 3, 4, (2,), torch.float64)
    inputs = [t.requires_grad_() for t in (*case.inputs[: 3 if static else None], case.z)]

    def whole(*t):
        x, state = cpu.width(*t[:-1]) if static else cpu.dynamic_width(*t[:-1], 1e-6)
        return x, cpu.depth(x.tanh() * t[-1], state)

    assert torch.autograd.gradcheck(whole, inputs)
    assert torch.autograd.gradgradcheck(whole, inputs)  # by way of the reference


def test_only_some_inputs_want_gradients(either_backend):
    case = helpers.case(2, 3, 32, (5,), torch.float64)
    wanted = helpers.oracle(case)
    for index, name in enumerate(helpers.NAMES):
        inputs = [t.requires_grad_(i == index) for i, t in enumerate(t.clone() for t in case.inputs)]
        x, state = cpu.dynamic_width(*inputs, helpers.EPS)
        H_next = cpu.depth(x + case.z, state)
        (g,) = torch.autograd.grad([x, H_next], [inputs[index]], [case.g_x, case.g])
        torch.testing.assert_close(g, wanted[f"g_{name}"], rtol=1e-10, atol=1e-11)


def test_x_alone_and_the_state_alone(either_backend):
    case = helpers.case(2, 3, 32, (5,), torch.float64)
    for pick in (lambda x, H: x, lambda x, H: H):
        found, wanted = [], []
        for ops, into in ((cpu, found), (helpers.Reference, wanted)):
            H = case.inputs[0].clone().requires_grad_()
            x, state = ops.dynamic_width(H, *case.inputs[1:], helpers.EPS)
            pick(x, ops.depth(case.z, state)).square().sum().backward()
            into.append(H.grad)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tanh_to_the_last_places(dtype):
    # d_b = 1 and ε = 0 make p = sign(H) W: the kernel's tanh itself, here at W from 1e-30 to 1e30
    n_points = 40
    magnitudes = torch.cat([torch.logspace(-30, 30, n_points // 2), torch.linspace(0.01, 12, n_points // 2)]).to(dtype)
    zeros = torch.zeros(1, n_points + 1, dtype=dtype)
    B = torch.zeros(1, n_points, dtype=dtype)
    H = torch.ones(1, n_points, 1, dtype=dtype)
    A = zeros.expand(n_points, -1)
    W = torch.cat([magnitudes, magnitudes[:1]]).view(1, -1)
    _, state = cpu.dynamic_width(
        H, A, B, W, magnitudes[:1].view(1, 1), torch.ones_like(A), torch.ones_like(B), torch.ones(1, dtype=dtype), 0.0
    )
    # carried_j = Σ_i tanh(W_{j+1}) H_i = n tanh(W_{j+1})
    found = state.carried[0, :, 0].double() / n_points
    exact = torch.tanh(W[0, 1:].double())
    ulp = torch.finfo(dtype).eps
    assert ((found - exact).abs() <= (8 * ulp) * exact.abs()).all()  # 40 equal terms: their sum rounds too


def test_nan_and_infinity_stay_in_their_token(either_backend):
    case = helpers.case(2, 3, 32, (40,), torch.float32)
    for bad in (float("nan"), float("inf")):
        H = case.inputs[0].clone()
        H[17, 1, 2] = bad
        x, state = cpu.dynamic_width(H, *case.inputs[1:], helpers.EPS)
        out = torch.cat([x, cpu.depth(case.z, state).flatten(1)], dim=1)
        fine = torch.arange(40) != 17
        assert out[fine].isfinite().all() and not out[17].isfinite().all()


def test_nan_and_infinite_parameters_show_where_the_reference_shows_them(either_backend):
    case = helpers.case(2, 3, 32, (40,), torch.float32)
    for index, bad in itertools.product(range(1, 8), (float("nan"), float("inf"))):
        inputs = [t.clone() for t in case.inputs]
        inputs[index].view(-1)[1] = bad
        outputs = []
        for ops in (cpu, helpers.Reference):
            x, state = ops.dynamic_width(*inputs, helpers.EPS)
            outputs.append((x.isfinite(), ops.depth(case.z, state).isfinite()))
        name = helpers.NAMES[index]
        assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True)), f"{name} = {bad}"


def test_zero_state_with_epsilon_zero_in_a_short_last_block():
    # padding of the last block of tokens must not reach the sums: rstd is infinite there when ε = 0
    case = helpers.case(2, 3, 32, (33,), torch.float64)
    inputs = [t.clone().requires_grad_() for t in case.inputs]
    x, _ = cpu.dynamic_width(*inputs, 0.0)
    gradients = torch.autograd.grad(x, inputs, case.g_x, materialize_grads=True)
    assert all(g.isfinite().all() for g in gradients)


def test_first_gradients_with_create_graph_where_one_ghc_is_used_twice(either_backend):
    # paths from one input of an operation to another are not its own
    case = helpers.case(2, 3, 4, (2,), torch.float64)
    results = []
    for ops, graph in ((cpu, True), (cpu, False), (helpers.Reference, False)):
        t = [x.clone().requires_grad_() for x in case.inputs]
        H = t[0]
        for _ in range(2):
            x, state = ops.dynamic_width(H, *t[1:], helpers.EPS)
            H = ops.depth(x.tanh(), state)
        results.append(torch.autograd.grad(H.square().sum(), t, create_graph=graph))
    for found in results[:2]:
        torch.testing.assert_close(found, results[2], rtol=1e-9, atol=1e-9)


def once_around(ops, H, *parameters):
    """A GHC around a sublayer whose second derivative is not 0."""
    x, state = ops.dynamic_width(H, *parameters, helpers.EPS)
    return ops.depth(x.tanh(), state)


@pytest.mark.parametrize("one", range(8))
def test_second_derivatives_by_one_input_alone(either_backend, one):
    """Where not every output depends on what is differentiated by: on B alone x does not."""
    case = helpers.case(2, 3, 4, (5,), torch.float64)
    found = []
    for ops in (cpu, helpers.Reference):
        t = [x.clone().requires_grad_(i == one) for i, x in enumerate(case.inputs)]
        (first,) = torch.autograd.grad(once_around(ops, *t).square().sum(), t[one], create_graph=True)
        found.append((first, *torch.autograd.grad(first.square().sum(), t[one])))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_gradients_in_batches(either_backend):
    """is_grads_batched, and with it the vectorised jacobian and hessian: `vmap` over a backward pass alone."""
    case = helpers.case(2, 3, 4, (5,), torch.float64)
    found = []
    for ops in (cpu, helpers.Reference):
        t = [x.clone().requires_grad_() for x in case.inputs]
        H = once_around(ops, *t)
        several = torch.stack([H.detach().cos(), H.detach().sin()])
        batched = torch.autograd.grad(H, t, several, is_grads_batched=True)

        def of_state(h, ops=ops):
            return once_around(ops, h, *case.inputs[1:])

        jacobian = torch.autograd.functional.jacobian(of_state, case.inputs[0], vectorize=True)
        hessian = torch.autograd.functional.hessian(
            lambda h: of_state(h).square().sum(), case.inputs[0], vectorize=True
        )
        found.append((*batched, jacobian, hessian))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_static_gradients_in_batches(either_backend):
    A, B, H = torch.randn(3, 5).double(), torch.randn(2, 3).double(), torch.randn(4, 3, 6).double()
    found = []
    for ops in (cpu, ghc):
        t = [x.clone().requires_grad_() for x in (H, A, B)]
        x, state = ops.width(*t)
        out = ops.depth(x.tanh(), state)
        found.append(torch.autograd.grad(out, t, torch.stack([out.detach(), -out.detach()]), is_grads_batched=True))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
