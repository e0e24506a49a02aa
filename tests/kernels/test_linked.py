"""Links: the gradients of a GHC's projections, made once, whoever needs its coefficients and however often."""

from __future__ import annotations

import helpers
import pytest
import test_triton_values as values
import torch
from torch.utils.checkpoint import checkpoint
from vwn_ref.kernels import fused
from vwn_ref.kernels import launch as launching

from vwn_ref import dynamic, ghc

DEVICE = values.DEVICE
M, N, D = 2, 4, 12
INPUTS = ("H", "z", *fused.Parameters._fields)


def parameters(m: int = M, n: int = N) -> tuple[torch.Tensor, ...]:
    """Of a dynamic GHC, float64, all random."""
    return tuple(t.to(DEVICE) for t in helpers.case(m, n, D, (), torch.float64).inputs[1:])


def states(m: int = M, n: int = N, tokens: int = 5):
    """H, z and what flows back into x and H."""
    case = helpers.case(m, n, D, (tokens,), torch.float64)
    return tuple(t.to(DEVICE) for t in (case.inputs[0], *case[1:]))


class Reference:
    """`enter`, `step` and `depth` of `fused`, with no norms."""

    depth = staticmethod(ghc.depth)

    @staticmethod
    def enter(H, parameters, eps):
        return dynamic.dynamic_width(H, *parameters, eps)

    @staticmethod
    def step(z, state, parameters, eps):
        return Reference.enter(ghc.depth(z, state), parameters, eps)


def gradients(ops, use, m: int = M, n: int = N) -> list[torch.Tensor | None]:
    """Of H, z and the parameters, after `use`(ops, H, z, parameters) -> outputs and what flows back into them."""
    dtype = torch.float64 if ops is Reference else torch.float32
    H, z, *back = (t.float().to(dtype) for t in states(m, n))
    own = fused.Parameters(*(t.float().to(dtype) for t in parameters(m, n)))
    inputs = [t.requires_grad_() for t in (H, z, *own)]
    outputs, flow = use(ops, H, z, own, *back)
    return list(torch.autograd.grad(outputs, inputs, flow, allow_unused=True))


def assert_gradients(use, names: tuple[str, ...], m: int, n: int) -> None:
    """Of `names`: float32 against the reference in float64, relative to the largest."""
    found, wanted = (dict(zip(INPUTS, gradients(ops, use, m, n), strict=True)) for ops in (fused, Reference))
    for name in names:
        one, other = found[name], wanted[name]
        assert (one is None) == (other is None) or not (other if one is None else one).any(), name
        if one is not None and other is not None:
            error = (one - other).abs().max() / other.abs().max().clamp_min(1.0)
            assert error < 1e-5, f"{name}: off by {error:.1e} of the largest"


def both(ops, H, z, own, g_x, g):
    x, state = ops.enter(H, own, helpers.EPS)
    return [x, ops.depth(z, state)], [g_x, g]


def written_alone(ops, H, z, own, g_x, g):
    """Nothing flows back into x."""
    return [ops.depth(z, ops.enter(H, own, helpers.EPS)[1])], [g]


def read_alone(ops, H, z, own, g_x, g):
    return [ops.enter(H, own, helpers.EPS)[0]], [g_x]


def written_twice(ops, H, z, own, g_x, g):
    x, state = ops.enter(H, own, helpers.EPS)
    return [x, ops.depth(z, state), ops.depth(z.flip(-1) * 0.5, state)], [g_x, g, g.flip(-1)]


def again_in_a_checkpoint(ops, H, z, own, g_x, g):
    x, state = ops.enter(H, own, helpers.EPS)
    return [x, checkpoint(lambda z: ops.depth(z * z, state), z, use_reentrant=False)], [g_x, g]


def all_in_a_checkpoint(ops, H, z, own, g_x, g):
    def sublayer(H, z):
        x, state = ops.enter(H, own, helpers.EPS)
        return x, ops.depth(z, state)

    return list(checkpoint(sublayer, H, z, use_reentrant=False)), [g_x, g]


def one_state_for_two(ops, H, z, own, g_x, g):
    """The same parameters in both GHCs of a step, and the state before it used again."""
    x, state = ops.enter(H, own, helpers.EPS)
    read, following = ops.step(z + x, state, own, helpers.EPS)
    return [x, read, ops.depth(read, following), ops.depth(z, state)], [g_x, g_x.flip(-1), g, g.flip(-1)]


def stepped_and_not_read(ops, H, z, own, g_x, g):
    """Nothing flows back into the x of a step."""
    x, state = ops.enter(H, own, helpers.EPS)
    return [x, ops.depth(z, ops.step(z + x, state, own, helpers.EPS)[1])], [g_x, g]


def of_a_state_cut_off(ops, H, z, own, g_x, g):
    """Width with no graph: depth has all gradients itself."""
    with torch.no_grad():
        _, state = ops.enter(H, own, helpers.EPS)
    if ops is fused:
        assert state.link is None
        state = state._replace(parameters=own)
    else:
        state = ops.enter(H.detach(), own, helpers.EPS)[1]
    return [ops.depth(z, state)], [g]


@pytest.mark.parametrize(
    "use",
    [
        both, written_alone, read_alone, written_twice, again_in_a_checkpoint, all_in_a_checkpoint, one_state_for_two,
        stepped_and_not_read, of_a_state_cut_off,
    ],
)  # fmt: skip
def test_gradients_are_those_of_the_reference(use):
    assert_gradients(use, INPUTS[1:] if use is of_a_state_cut_off else INPUTS, M, N)


def test_gradients_with_more_slots():
    assert_gradients(one_state_for_two, INPUTS, 4, 8)


@pytest.mark.parametrize("m, n, dtype", [(2, 4, torch.float32), (4, 8, torch.bfloat16)], ids=str)
def test_with_and_without_a_link(m, n, dtype, monkeypatch):
    """The same numbers: e is the same, and only the sums are made elsewhere."""
    case = (m, n, D, (7,), dtype)
    found = values.two_sublayers(fused, *case)
    monkeypatch.setattr(fused, "_of_e", lambda H, parameters: None)
    alone = values.two_sublayers(fused, *case)
    for name, one in found.items():
        scale = alone[name].abs().max().item()
        assert (one - alone[name]).abs().max().item() <= (1e-6 if dtype == torch.float32 else 1e-2) * scale, name
        if not name.startswith(("g_W", "g_gain")):
            assert torch.equal(one, alone[name]), name


def launches(monkeypatch) -> list[tuple]:
    """(columns of a width, columns of a depth) of each time that g_V is summed."""
    found, partial = [], launching.Launch.weight_partial

    def note(self, H, *E):
        found.append(tuple(None if e is None else e.shape[-1] for e in E))
        return partial(self, H, *E)

    monkeypatch.setattr(launching.Launch, "weight_partial", note)
    return found


def test_each_ghc_reads_its_state_once(monkeypatch):
    found = launches(monkeypatch)
    values.two_sublayers(fused, M, N, D, (3,), torch.float32)
    assert found == [(M, N + M)] * 2  # not four times
    found.clear()
    gradients(fused, read_alone)
    gradients(fused, written_alone)
    gradients(fused, of_a_state_cut_off)
    assert found == [(M, None), (None, N + M), (None, N + M)]


def test_a_link_has_no_memory_and_no_numbers():
    H, *_ = states()
    own = fused.Parameters(*(t.float().requires_grad_() for t in parameters()))
    _, state = fused.enter(H.float(), own, helpers.EPS)
    assert state.link.shape == (5, N, N + M) and state.link.requires_grad and state.link.isnan().all()
    assert state.link.untyped_storage().nbytes() == state.link.element_size()
    _, static = fused.enter(H.float(), fused.Parameters(*own[:2]), helpers.EPS)
    assert static.link is None


def test_what_a_width_alone_leaves_without_a_gradient():
    """W_β has none where no depth was: None, as before, and not zeros that an optimizer would decay."""
    found = dict(zip(INPUTS, gradients(fused, read_alone), strict=True))
    assert [name for name, g in found.items() if g is None] == ["z", "B", "W_beta", "S_beta"]


class Undefined(torch.autograd.Function):
    """The identity of both; no gradient for the first."""

    @staticmethod
    def forward(ctx, a, b):
        return a.clone(), b.clone()

    @staticmethod
    def backward(ctx, of_a, of_b):
        return None, of_b


def test_a_gradient_that_a_later_node_leaves_undefined():
    """Of x, of the state after depth, or of both; with nothing left to do, there is nothing to do."""
    H, z, g_x, g = (t.float() for t in states())
    own = fused.Parameters(*(t.float().requires_grad_() for t in parameters()))
    for of_x, of_state in ((True, False), (False, True), (True, True)):
        x, state = fused.enter(H.requires_grad_(), own, helpers.EPS)
        out = fused.depth(z.requires_grad_(), state)
        if of_x:
            x, _ = Undefined.apply(x, out.detach())
        if of_state:
            out, _ = Undefined.apply(out, x.detach())
        found = torch.autograd.grad([x, out], [H, own.W_alpha], [g_x, g], allow_unused=True)
        assert all(t is None for t in found) == (of_x and of_state)


def test_only_the_last_matrix_wants_a_gradient():
    """Then x does not, and a sublayer after it is not differentiated for nothing; depth makes W_β's gradient."""
    H, z, _, g = (t.float() for t in states())
    own = fused.Parameters(*(t.float() for t in parameters()))
    own.W_beta.requires_grad_()
    x, state = fused.enter(H, own, helpers.EPS)
    assert not x.requires_grad and state.link is None
    (found,) = torch.autograd.grad(fused.depth(z, state), own.W_beta, g)
    assert found.isfinite().all() and found.any()


def test_a_link_is_of_the_mode_it_was_made_in():
    """No tensor of a tracer, or of inference mode, is kept for others."""
    H, *_ = (t.float() for t in states())
    own = fused.Parameters(*(t.float().requires_grad_() for t in parameters()))
    with torch.inference_mode():
        assert fused.enter(H, own, helpers.EPS)[1].link is None
    module = Width(own)
    for _ in range(2):
        torch.export.export(module, (H,), strict=False)
    link = fused.enter(H, own, helpers.EPS)[1].link
    assert type(link) is torch.Tensor and not link.is_inference()


class Width(torch.nn.Module):
    def __init__(self, own):
        super().__init__()
        self.own = torch.nn.ParameterList(own)

    def forward(self, H):
        return fused.enter(H, fused.Parameters(*self.own), helpers.EPS)[0]


def test_no_second_derivative_is_lost():
    """Where the first one is differentiated again, depth's own gradients are the reference's, and no link is used."""

    def twice(ops):
        wide = torch.float64
        H, z, g_x, g = (t.to(wide) for t in states())
        own = fused.Parameters(*(t.to(wide).requires_grad_() for t in parameters()))
        if ops is fused:
            H, z, g_x, g = (t.float() for t in (H, z, g_x, g))
            own = fused.Parameters(*(t.detach().float().requires_grad_() for t in own))
        outputs, flow = both(ops, H.requires_grad_(), z.requires_grad_(), own, g_x, g)
        first = torch.autograd.grad(outputs, [H, own.W_beta, own.W_alpha], flow, create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), [H, own.W_beta, own.A])

    for one, other in zip(twice(fused), twice(Reference), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-3 * other.abs().max().item())


def test_gradients_in_batches():
    """Many backward passes at once are the reference's, too, and no link is used."""

    def twice(ops):
        wide = torch.float32 if ops is fused else torch.float64
        H, z, g_x, g = (t.to(wide) for t in states())
        own = fused.Parameters(*(t.to(wide).requires_grad_() for t in parameters()))
        outputs, flow = both(ops, H.requires_grad_(), z.requires_grad_(), own, g_x, g)
        several = [torch.stack([t, t.flip(0)]) for t in flow]
        return torch.autograd.grad(outputs, [H, z, *own], several, is_grads_batched=True)

    for one, other in zip(twice(fused), twice(Reference), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4 * other.abs().max().item())
