"""The Triton kernels, in Triton's interpreter, against the reference in float64: outputs and every gradient.

Every tensor that a kernel is to fill is full of NaN before. On a machine with a GPU the same tests run there.
"""

from __future__ import annotations

import functools
import itertools
import operator

import helpers
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import nn
from triton.runtime.interpreter import InterpreterBuilder
from vwn_ref.kernels import fused, rows, tiles
from vwn_ref.kernels import launch as launching

from vwn_ref import dynamic, ghc
from vwn_ref.config import VWNConfig
from vwn_ref.model import VWNTransformer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Root-mean-square errors relative to the tensor. float32: rounding to 6e-8 in sums of up to 33 tokens times 96 columns;
# measured at most 5e-7. 16-bit states: every state, x, z and gradient is rounded as it is stored, to 2⁻⁹ (bfloat16) or
# 2⁻¹² (float16), some eight times on the way through two sublayers, and a sum over few tokens may cancel; measured at
# most 1.0e-2 and 1.1e-3. (The interpreter truncates to bfloat16, which is twice a GPU's error.) The reference rounds
# nothing. What a wrong formula does, test_triton_faults.py shows.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
E_ROUNDED = 2e-2  # where e is kept in bfloat16 too: measured at most 1.6e-2, in the gain's gradient at (8, 64)

SHAPES = [(1, 1), (1, 4), (2, 3), (3, 5), (4, 8), (5, 7), (4, 16), (8, 64)]
COLUMNS = [8, 12, 40, 64, 96]
TOKENS = [33, 7, 1]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def outputs_full_of_nan(monkeypatch):
    """torch.empty is not empty, it is whatever was there; here it is the worst there can be."""
    empty, empty_like = torch.empty, torch.empty_like

    def fill(t):
        return t.fill_(float("nan")) if t.is_floating_point() else t

    monkeypatch.setattr(fused.torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(fused.torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))


class Reference:
    """`enter`, `step` and `last` of `fused` by the readable functions."""

    @staticmethod
    def enter(H, parameters, eps, norm):
        if parameters.gain is None:
            x, state = ghc.width(H, *parameters[:2])
        else:
            x, state = dynamic.dynamic_width(H, *parameters, eps)
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps), state

    @staticmethod
    def step(z, state, parameters, eps, norm):
        return Reference.enter(ghc.depth(z, state), parameters, eps, norm)

    @staticmethod
    def last(z, state, norm):
        H = ghc.depth(z, state)
        return F.group_norm(H.flatten(-2).flatten(0, -2), norm.num_groups, norm.weight, norm.bias, norm.eps).view_as(H)

    depth = staticmethod(ghc.depth)


def random(*shape, seed=0, scale=1.0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device=DEVICE).mul(scale)


def two_sublayers(ops, m, n, d, lead, dtype, *, static=False, groups=True) -> dict[str, torch.Tensor]:
    """width+norm | step+norm | last (or depth), with a sublayer x ↦ x + z between: outputs and every gradient."""
    at = dtype if ops is fused else torch.float64
    inputs: dict[str, torch.Tensor] = {"H": random(*lead, n, d, seed=1, scale=2.0)}
    for layer in (0, 1):
        case = helpers.case(m, n, d, (), torch.float64, seed=2 + layer)
        for name, p in zip(helpers.NAMES[1 : 3 if static else None], case.inputs[1:], strict=False):
            inputs[f"{name}{layer}"] = p
        inputs[f"z{layer}"] = random(*lead, m * d, seed=5 + layer)
        inputs[f"norm{layer}"] = random(m * d, seed=8 + layer)
    if groups:
        inputs |= {"weight": random(n * d, seed=11), "bias": random(n * d, seed=12)}
    inputs = {k: t.to(DEVICE).to(dtype).to(at).requires_grad_() for k, t in inputs.items()}

    def parameters(layer):
        return fused.Parameters(*(inputs.get(f"{name}{layer}") for name in helpers.NAMES[1:]))

    def norm(layer):
        made = nn.RMSNorm(m * d, eps=1e-6)
        made.weight = None
        del made.weight
        made.weight = inputs[f"norm{layer}"]
        return made

    x0, state = ops.enter(inputs["H"], parameters(0), 1e-6, norm(0))
    x1, state = ops.step(x0 + inputs["z0"], state, parameters(1), 1e-5, norm(1))
    z = x1 + inputs["z1"]
    if groups:
        group_norm = nn.GroupNorm(n // m, n * d, eps=1e-4, affine=False)
        del group_norm.weight, group_norm.bias
        group_norm.weight, group_norm.bias = inputs["weight"], inputs["bias"]
        out = ops.last(z, state, group_norm)
    else:
        out = ops.depth(z, state)
    outputs = {"x0": x0, "x1": x1, "out": out}
    back = [random(*t.shape, seed=20 + i).to(dtype).to(at) for i, t in enumerate(outputs.values())]
    gradients = torch.autograd.grad(list(outputs.values()), list(inputs.values()), back)
    return {k: t.detach() for k, t in outputs.items()} | {f"g_{k}": g for k, g in zip(inputs, gradients, strict=True)}


def relative_error(name, found, exact, tokens):
    """Root mean square. A gradient that sums over tokens has at least the square root of their number."""
    rows = name in ("x0", "x1", "out", "g_H", "g_z0", "g_z1")
    scale = exact.square().mean().sqrt().clamp_min(1e-30 if rows else max(tokens, 1) ** 0.5)
    return ((found.double() - exact).square().mean().sqrt() / scale).item()


def assert_close(found, wanted, tolerance):
    """As `helpers.assert_close`."""
    tokens = wanted["x0"][..., 0].numel()
    for name, exact in wanted.items():
        assert found[name].shape == exact.shape, name
        if exact.numel():
            error = relative_error(name, found[name], exact, tokens)
            assert error < tolerance, f"{name}: relative error {error:.2e}, at most {tolerance:.0e} allowed"


# Every (m, n) with every d_b, and with these every number of tokens, dtype and kind several times. Of many slots a
# program has one token, and every one takes the interpreter as long: fewer.
MATRIX = [
    (*shape, d, min(TOKENS[(i + j) % 3], 9 if shape[1] > 8 else 33), DTYPES[(2 * i + j) % 3], (i + j) % 4 == 3)
    for (i, shape), (j, d) in itertools.product(enumerate(SHAPES), enumerate(COLUMNS))
]


@pytest.mark.parametrize("m, n, d, tokens, dtype, static", MATRIX, ids=str)
def test_width_and_depth(m, n, d, tokens, dtype, static):
    case = helpers.case(m, n, d, (tokens,), dtype)
    case = helpers.Case(tuple(t.to(DEVICE) for t in case.inputs), *(t.to(DEVICE) for t in case[1:]))
    found = helpers.run(fused, case, static=static)
    assert all(t.dtype == dtype for t in found.values())
    helpers.assert_close(found, helpers.oracle(case, static=static), TOLERANCE[dtype])


# One d_b and all three dtypes for each (m, n): two sublayers are twice the work. GroupNorm where r is an integer.
@pytest.mark.parametrize(
    "m, n, d, tokens, dtype, static",
    [
        (*shape, COLUMNS[i % 5], (7, 5 if shape[1] > 8 else 11, 5)[k], dtype, (i + k) % 3 == 0)
        for (i, shape), (k, dtype) in itertools.product(enumerate(SHAPES), enumerate(DTYPES))
    ],
    ids=str,
)
def test_two_sublayers_with_their_norms(m, n, d, tokens, dtype, static):
    case = (m, n, d, (tokens,), dtype)
    options = {"static": static, "groups": n % m == 0}
    tolerance = E_ROUNDED if launching.e_dtype(m, n, dtype) == torch.bfloat16 else TOLERANCE[dtype]
    assert_close(two_sublayers(fused, *case, **options), two_sublayers(Reference, *case, **options), tolerance)


@pytest.mark.parametrize(
    "m, n, d, tokens, dtype, static",
    [
        (1, 1, 8, 7, torch.float32, False),
        (1, 4, 12, 5, torch.float16, False),
        (1, 4, 12, 5, torch.bfloat16, False),
        (2, 3, 96, 7, torch.float32, False),
        (2, 4, 40, 5, torch.float16, False),
        (3, 3, 12, 3, torch.float32, True),
        (1, 1, 35, 21, torch.bfloat16, False),  # eight tokens a tile
        (1, 2, 72, 9, torch.bfloat16, False),
        (2, 2, 40, 1, torch.bfloat16, True),
        (1, 4, 96, 5, torch.bfloat16, False),  # four
        (2, 3, 40, 11, torch.bfloat16, False),
        (3, 3, 12, 3, torch.bfloat16, True),
        (2, 4, 64, 4, torch.bfloat16, False),
        (4, 3, 33, 6, torch.bfloat16, False),
    ],
    ids=str,
)
def test_few_slots_of_rows_too_long_for_the_registers(monkeypatch, m, n, d, tokens, dtype, static):
    """bfloat16 several tokens a tile, the others by walks."""
    monkeypatch.setattr(launching, "whole_rows", lambda *_: 0)
    assert launching.family("step", m, n, d, dtype) == ("many_" if dtype == torch.bfloat16 else "")
    case, options = (m, n, d, (tokens,), dtype), {"static": static, "groups": n % m == 0}
    # V is rounded to bfloat16 there: measured at most 1.7e-2 in these two, whose sums over tokens cancel
    tolerance = 2e-2 if dtype == torch.bfloat16 and (m, n) in ((1, 1), (2, 3)) else TOLERANCE[dtype]
    assert_close(two_sublayers(fused, *case, **options), two_sublayers(Reference, *case, **options), tolerance)


@pytest.mark.parametrize(
    "m, n, d, tokens, dtype",
    [
        (1, 2, 35, 7, torch.float32), (2, 6, 40, 5, torch.bfloat16), (3, 3, 16, 5, torch.float16),
        (2, 4, 20, 1, torch.float32),  # one token for two programs
    ],
    ids=str,
)  # fmt: skip
def test_groups_in_chunks(monkeypatch, m, n, d, tokens, dtype):
    monkeypatch.setattr(launching, "LONGEST_GROUP", 32)  # of 16, the last one full or not
    case = (m, n, d, (tokens,), dtype)
    assert_close(two_sublayers(fused, *case), two_sublayers(Reference, *case), TOLERANCE[dtype])


def test_what_was_timed_is_of_one_target(monkeypatch):
    """Of another, many.py has narrower tiles, and no limit of registers, which AMD's compiler does not know."""
    monkeypatch.setattr(launching, "INTERPRETED", False)

    def asked(kernel, n, target, d=256):
        found = launching.sizes(f"many_{kernel}_kernel", 4, n, d, torch.bfloat16, target)
        return found["BD"], found["num_stages"], found.get("maxnreg")

    assert [asked("step", n, "sm_90") for n in (8, 16, 64)] == [(128, 1, 168), (128, 1, 128), (128, 1, 168)]
    assert [asked("step", n, "sm_90", 512) for n in (8, 16, 64)] == [(128, 1, 128), (128, 1, 128), (128, 1, 168)]
    assert [asked("depth", n, "sm_90", 512) for n in (8, 16, 64)] == [(128, 1, 168), (128, 1, 128), (128, 1, 168)]
    assert [asked("step_backward", n, "sm_90") for n in (8, 16, 64)] == [(128, 1, None)] * 3
    for target in ("sm_80", "sm_100", "hip", "gfx942"):
        assert asked("step", 64, target) == asked("step_backward", 64, target) == (64, 1, None)
    assert [asked("step", n, "sm_90")[0] for n in (1, 2, 3, 4)] == [32, 32, 128, 128]
    for kernel, target in (("step", "sm_80"), ("step_backward", "sm_90"), ("width", "sm_90")):
        assert [asked(kernel, n, target)[0] for n in (1, 2, 3, 4)] == [32, 32, 64, 64]
    assert launching.target_of(torch.device("cpu")) == "sm_90"
    targets = ("sm_90", "sm_80", "hip", "gfx942")
    stages = [launching.weight_sizes(8, 64, 128, 8, 72, torch.bfloat16, target)["num_stages"] for target in targets]
    assert stages == [4, 4, 2, 2]


@pytest.mark.parametrize(
    "kernel, m, n, d, dtype, target, registers",
    [
        ("step_backward", 1, 4, 1024, torch.bfloat16, "sm_90", 168),
        ("step_backward", 1, 4, 1024, torch.bfloat16, "sm_80", None),
        ("step_backward", 1, 4, 1024, torch.float32, "sm_90", None),
        ("step_backward", 1, 4, 2048, torch.bfloat16, "sm_90", None),
        ("step_backward", 2, 4, 1024, torch.bfloat16, "sm_90", None),
        ("step_backward", 1, 3, 1024, torch.bfloat16, "sm_90", None),
        ("depth_backward", 1, 4, 1024, torch.bfloat16, "sm_90", None),
        ("step", 1, 4, 1024, torch.bfloat16, "sm_90", None),
    ],
    ids=str,
)  # fmt: skip
def test_registers_of_few_slots(monkeypatch, kernel, m, n, d, dtype, target, registers):
    monkeypatch.setattr(launching, "INTERPRETED", False)
    assert launching.sizes(f"few_{kernel}_kernel", m, n, d, dtype, target).get("maxnreg") == registers


def test_as_many_programs_as_registers_allow(monkeypatch):
    asked = []
    monkeypatch.setattr(launching, "INTERPRETED", False)
    monkeypatch.setattr(launching, "programs", lambda device, each: asked.append(each) or each)
    for kernel, m, n, d in (
        ("depth_backward", 2, 3, 2048), ("depth_backward", 2, 3, 512), ("step_backward", 2, 3, 512),
        ("step_backward", 1, 4, 1024), ("step_backward", 2, 64, 128), ("group_norm_backward", 2, 4, 512),
    ):  # fmt: skip
        launch = launching.Launch(torch.empty(100, n, d, dtype=torch.bfloat16), m, True)
        launch.programs(kernel)
    assert asked == [8 // 4, 8, 8, 12 // 4, 8 // 4, 16 // 2 // 2]  # the last: two warps, and two groups


@pytest.mark.parametrize(
    "n, d, dtype, each",
    [(3, 512, torch.bfloat16, 64), (3, 2048, torch.bfloat16, 64), (4, 2048, torch.bfloat16, 8),
     (64, 128, torch.bfloat16, 16)],
    ids=str,
)  # fmt: skip
def test_how_many_programs_a_step_has(monkeypatch, n, d, dtype, each):
    """Forward 64 warps a multiprocessor; up to 3 slots 64 programs."""
    monkeypatch.setattr(launching, "INTERPRETED", False)
    monkeypatch.setattr(launching, "programs", lambda device, each: each)
    launch = launching.Launch(torch.empty(100, n, d, dtype=dtype), 1, True)
    grids = []

    class Kernel:
        __name__ = launch.kernel("step").__name__

        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *_, **__: None

    monkeypatch.setattr(launch, "kernel", lambda name: Kernel())
    launch.start("step", torch.empty(0))
    assert grids == [(each,)]


@pytest.mark.parametrize(
    "kernel, d, dtype, ahead",
    [
        ("step_backward", 1024, torch.bfloat16, True), ("step_backward", 2048, torch.bfloat16, False),
        ("depth_backward", 2048, torch.bfloat16, True), ("step_backward", 512, torch.float32, False),
        ("step", 512, torch.bfloat16, None),
    ],
    ids=str,
)  # fmt: skip
def test_who_reaches_for_the_next_rows(monkeypatch, kernel, d, dtype, ahead):
    monkeypatch.setattr(launching, "AHEAD", True)
    assert launching.sizes(f"few_{kernel}_kernel", 2, 3, d, dtype).get("AHEAD") is ahead


@pytest.mark.parametrize(
    "D, BD, warps",
    [(1, 32, 1), (512, 512, 1), (513, 1024, 2), (4096, 4096, 8), (8192, 8192, 16), (8193, 4096, 16)],
    ids=str,
)
def test_which_groups_stay_in_registers(D, BD, warps):
    assert launching.group_sizes(1, 3, D) == {"R": 3, "D": D, "BD": BD, "num_warps": warps}


@pytest.mark.parametrize(
    "m, n, d, bits, warps",
    [
        (2, 3, 1, 16, 1), (2, 3, 512, 16, 1), (2, 3, 513, 16, 2), (2, 3, 4096, 16, 8), (2, 3, 4097, 16, 0),
        (2, 3, 512, 32, 2), (2, 3, 4096, 32, 0), (2, 2, 512, 32, 1), (1, 4, 2048, 16, 8), (1, 4, 4096, 16, 0),
        (4, 5, 64, 16, 0), (5, 4, 64, 16, 0),
    ],
    ids=str,
)  # fmt: skip
def test_whose_rows_stay_in_registers(m, n, d, bits, warps):
    assert launching.whole_rows(m, n, d, bits) == warps
    forward = launching.whole_rows(m, n, d, bits, backward=False)
    assert forward in (warps, warps / 2) and bool(forward) == bool(warps)


@pytest.mark.parametrize(
    "name, m, n, dtype, tokens, each",
    [
        ("depth_backward", 2, 3, torch.bfloat16, 1, 8), ("step_backward", 4, 8, torch.bfloat16, 2, 8),
        ("step_backward", 1, 4, torch.bfloat16, 4, 8),
        ("step_backward", 4, 16, torch.bfloat16, 1, 8), ("step_backward", 8, 64, torch.bfloat16, 1, 2),
        ("depth_backward", 8, 64, torch.float32, 1, 1), ("group_norm_backward", 4, 8, torch.bfloat16, 1, 4),
        ("group_norm_backward", 1, 3, torch.float32, 1, 2), ("group_norm_backward", 1, 64, torch.float32, 1, 1),
    ],
    ids=str,
)  # fmt: skip
def test_programs_of_a_multiprocessor(name, m, n, dtype, tokens, each, monkeypatch):
    """Eight warps, sixteen of the norm and of all its groups together, at least one; and sums for each, and for each of
    the tokens in a tile."""
    monkeypatch.setattr(launching, "INTERPRETED", False)
    monkeypatch.setattr(launching, "programs", lambda device, each: each)
    width = 4096 if n == 4 else 1024
    launch = launching.Launch(torch.zeros(99, n, width // m, dtype=dtype, device=DEVICE), m, dynamic=True)
    assert (launch.programs(name), launch.at_once(name)) == (each, each * tokens)
    if name == "step_backward":
        assert launch.partial(name, m).shape == (each * tokens, 2, n, m)


@pytest.mark.parametrize("n, dtype", [(3, torch.bfloat16), (6, torch.float32), (6, torch.bfloat16)], ids=str)
def test_projections(n, dtype):
    """In float32, and rounded to the nearest bfloat16 where many.py takes them."""
    case = helpers.case(2, n, 133, (1,), torch.float32)  # a second block of columns, and part of it is padding
    H, _, _, W_alpha, W_beta, _, _, gain = (t.to(DEVICE) for t in case.inputs)
    launch = launching.Launch(H.to(dtype), 2, dynamic=True)
    depth, width = (W_alpha, W_beta, gain), (W_alpha.flip(0), gain.flip(0))
    V = torch.cat([W_alpha[:, 2:], W_beta], dim=1).mul(gain[:, None]).mT * 133**-0.5
    V_next = (width[0][:, :2] * width[1][:, None]).mT * 133**-0.5
    for found, wanted in (
        (launch.projections("depth", depth=depth), V),
        (launch.projections("width", width=width), V_next),
        (launch.projections("step", depth, width), torch.cat([V, V_next])),
    ):
        assert found.dtype == (dtype if n > 4 else torch.float32)
        nearest = wanted.to(found.dtype).float()
        exact = found.dtype == torch.float32
        torch.testing.assert_close(found.float(), wanted, rtol=1e-6 if exact else 2**-8, atol=0.0)
        # the last bit of float32 is another here and there: then the nearest may be the other one
        assert exact or (found.float() == nearest).double().mean() > 0.99


@pytest.mark.skipif(not launching.INTERPRETED, reason="a GPU rounds so by itself")
def test_rounded():
    """To the nearest bfloat16, and halfway to the even one, as PyTorch does."""
    x = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, float("inf")])])
    out = torch.empty_like(x)

    @triton.jit
    def kernel(pointer, out, count, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        x = tl.load(pointer + i, mask=i < count, other=0.0)
        tl.store(out + i, tiles.rounded(x).to(tl.float32), mask=i < count)

    kernel[(1,)](x, out, len(x), BLOCK=1024)
    assert torch.equal(out, x.bfloat16().float())


@pytest.mark.parametrize(
    "m, n, d, dtype", [(2, 3, 40, torch.float16), (1, 4, 24, torch.bfloat16), (2, 4, 40, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("groups", [True, False])
def test_reaching_for_the_next_rows_changes_nothing(monkeypatch, m, n, d, dtype, groups):
    found = []
    for ahead in (False, True):
        monkeypatch.setattr(launching, "AHEAD", ahead)
        found.append(two_sublayers(fused, m, n, d, (5,), dtype, groups=groups and n % m == 0))
    assert all(torch.equal(t, found[1][name]) for name, t in found[0].items())


@pytest.mark.parametrize("left", [3, 1, 0, -2])
def test_touch_reads_every_32_bytes_of_rows_that_are_there(left):
    """And nothing of what lies behind a row or behind the last token."""
    R, D, BD = 3, 40, 64
    x = torch.randint(1, 2**14, (4 * R * D,), dtype=torch.int16).to(DEVICE)
    found = torch.full((BD // 16,), -1, dtype=torch.int16, device=DEVICE)

    @triton.jit
    def kernel(pointer, left, out, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
        touched = rows.touch(pointer, left, R, D, BD)
        tl.store(out + tl.arange(0, BD // 16), rows.gather(tl.zeros((BD // 16,), tl.int16), touched))

    kernel[(1,)](x.view(torch.bfloat16), left, found, R=R, D=D, BD=BD)
    there = x[: R * D].view(R, D)[:, ::16]  # columns 0, 16 and 32
    wanted = [functools.reduce(operator.or_, column.tolist()) for column in there.T] if left > 0 else [0, 0, 0]
    assert found.tolist() == [*wanted, 0]


@pytest.mark.parametrize("m, n", [(2, 3), (4, 8)], ids=str)
def test_a_step_is_a_depth_and_a_width(m, n):
    """To the last bit: x is read from the state as it is stored, rounded."""
    case = helpers.case(m, n, 24, (5,), torch.bfloat16)
    H, *parameters = (t.to(DEVICE) for t in case.inputs)
    state = fused.State(H, fused.Parameters(*parameters), helpers.EPS)
    following = fused.Parameters(*(p.flip(-1) for p in parameters))
    x, new = fused.step(case.z.to(DEVICE), state, following, helpers.EPS)
    H_next = fused.depth(case.z.to(DEVICE), state)
    assert torch.equal(new.H, H_next)
    assert torch.equal(x, fused.enter(H_next, following, helpers.EPS)[0])


def test_a_step_backward_reads_the_state_as_it_is_stored():
    """Mixed again, and rounded: what the next width's A gets back is what it gets where the stored state is read."""
    case = helpers.case(2, 3, 24, (5,), torch.bfloat16)
    H, *parameters = (t.to(DEVICE) for t in case.inputs)
    A, *rest = (p.float() for p in parameters)
    state = fused.State(H, fused.Parameters(*parameters), helpers.EPS)
    found = []
    for read in (
        lambda following: fused.step(case.z.to(DEVICE), state, following, helpers.EPS)[0],
        lambda following: fused.enter(fused.depth(case.z.to(DEVICE), state), following, helpers.EPS)[0],
    ):
        own = A.clone().requires_grad_()
        found += torch.autograd.grad(read(fused.Parameters(own, *rest)), own, case.g_x.to(DEVICE))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5 * found[1].abs().max().item())


@pytest.mark.parametrize(
    "m, n, dtype, kept",
    [
        (8, 64, torch.bfloat16, torch.bfloat16), (8, 64, torch.float16, torch.float32),
        (8, 64, torch.float32, torch.float32), (4, 8, torch.bfloat16, torch.float32),
        (5, 10, torch.bfloat16, torch.float32),
    ],
    ids=str,
)  # fmt: skip
def test_what_e_is_kept_in(m, n, dtype, kept):
    launch = launching.Launch(torch.zeros(2, n, 8, dtype=dtype, device=DEVICE), m, dynamic=True)
    assert launch.coefficient_gradients(m).dtype == kept


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_step_backward_of_two_kernels(monkeypatch, static):
    monkeypatch.setattr(fused, "fuses_step_backward", lambda *shape: False)
    case = (2, 4, 12, (7,), torch.float32)
    found, wanted = (two_sublayers(ops, *case, static=static) for ops in (fused, Reference))
    assert_close(found, wanted, TOLERANCE[torch.float32])


@pytest.mark.skipif(not launching.INTERPRETED, reason="the Triton that is here decides")
@pytest.mark.parametrize("m, n, BT", [(4, 8, 2), (5, 7, 4), (4, 8, 1), (3, 9, 2)], ids=str)
def test_as_before_triton_3_8(m, n, BT, monkeypatch):
    """Where `tl.dot` takes no sum of 8: several tokens on the diagonal of one product; a single one has 16 slots."""
    monkeypatch.setattr(tiles, "per_token", tiles.per_token_on_diagonal)
    monkeypatch.setattr(tiles, "project", tiles.project_on_diagonal)
    monkeypatch.setattr(launching, "LEAST_SUM", 16)
    monkeypatch.setattr(launching, "tile", lambda *_: launching.Tile(BT, 16, 1))
    sums, product = [], InterpreterBuilder.create_dot
    note = lambda self, X, *rest: sums.append(X.data.shape[-1]) or product(self, X, *rest)  # noqa: E731
    monkeypatch.setattr(InterpreterBuilder, "create_dot", note)
    case = (m, n, 24, (5,), torch.float32)
    found, wanted = (two_sublayers(ops, *case, groups=n % m == 0) for ops in (fused, Reference))
    assert_close(found, wanted, TOLERANCE[torch.float32])
    assert sums and min(sums) >= 16


@pytest.mark.parametrize("lead", [(), (0,), (2, 0, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_any_leading_shape(lead, static):
    case = helpers.case(2, 3, 12, lead, torch.float32)
    case = helpers.Case(tuple(t.to(DEVICE) for t in case.inputs), *(t.to(DEVICE) for t in case[1:]))
    helpers.assert_close(helpers.run(fused, case, static=static), helpers.oracle(case, static=static), 4e-6)


@pytest.mark.parametrize("lead", [(0,), (1, 1)], ids=str)
def test_no_token_and_one_through_step_and_last(lead):
    if lead == (0,):
        found = two_sublayers(fused, 2, 4, 12, lead, torch.float32)
        assert all(not t.any() for name, t in found.items() if t.numel()), "a sum over no tokens is 0"
    else:
        found, wanted = (two_sublayers(ops, 2, 4, 12, lead, torch.float32) for ops in (fused, Reference))
        assert_close(found, wanted, 4e-6)


def test_not_contiguous_and_expanded():
    case = helpers.case(3, 5, 5, (3, 4), torch.float32)
    H, *parameters = (t.to(DEVICE) for t in case.inputs)
    strided = helpers.Case(
        inputs=(H.transpose(0, 1).contiguous().transpose(0, 1), *(p.mT.contiguous().mT for p in parameters[:-1]),
                torch.stack([parameters[-1]] * 2, dim=1)[:, 0]),
        z=case.z.to(DEVICE).repeat(1, 1, 2)[..., : case.z.shape[-1]],
        g=case.g.to(DEVICE)[:1, :1].expand_as(case.g),
        g_x=case.g_x.to(DEVICE)[..., :1].expand_as(case.g_x),
    )  # fmt: skip
    assert not any(t.is_contiguous() for t in (*strided.inputs, strided.z, strided.g, strided.g_x))
    helpers.assert_close(helpers.run(fused, strided), helpers.oracle(strided), 4e-6)
    expanded = strided._replace(inputs=(H[:1, :1].expand_as(H), *strided.inputs[1:]))
    helpers.assert_close(helpers.run(fused, expanded), helpers.oracle(expanded), 4e-6)


def test_the_same_bits_twice():
    first, second = (two_sublayers(fused, 2, 4, 12, (11,), torch.float32) for _ in range(2))
    assert all(torch.equal(t, second[name]) for name, t in first.items())


@pytest.mark.parametrize(
    "m, n, dtype", [(2, 3, torch.float32), (4, 8, torch.bfloat16), (3, 9, torch.bfloat16)], ids=str
)
def test_epsilon_zero_in_a_short_last_block(m, n, dtype):
    # padding of the last block of tokens has zero rows, whose 1/rms is infinite when ε = 0: it must not reach the sums
    case = helpers.case(m, n, 12, (9,), dtype)
    inputs = [t.to(DEVICE).requires_grad_() for t in case.inputs]
    x, state = fused.dynamic_width(*inputs, 0.0)
    gradients = torch.autograd.grad([x, fused.depth(x, state)], inputs, [case.g_x.to(DEVICE), case.g.to(DEVICE)])
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize(
    "m, n, dtype, reached",
    [
        (2, 3, torch.float32, [4]), (3, 9, torch.bfloat16, [4]), (4, 16, torch.float32, [4]),
        # with Triton before 3.8 a tile's tokens share a product
        (4, 8, torch.float32, [4] if tiles.LEAST_SUM == 8 else list(range(8))),
        (4, 8, torch.bfloat16, [4, 5]),  # tokens 4 and 5 share a tile: 0 · NaN is NaN
    ],
    ids=str,
)  # fmt: skip
def test_nan_and_infinity_stay_in_their_token(m, n, dtype, reached):
    case = helpers.case(m, n, 12, (9,), dtype)
    for bad in (float("nan"), float("inf")):
        H, *parameters = (t.to(DEVICE).clone() for t in case.inputs)
        H[4, 1, 2] = bad
        x, state = fused.dynamic_width(H, *parameters, helpers.EPS)
        out = torch.cat([x, fused.depth(case.z.to(DEVICE), state).flatten(1)], dim=1)
        fine = [t for t in range(9) if t not in reached]
        assert out[fine].isfinite().all() and not out[4].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("m, n", [(2, 3), (2, 16), (2, 64)], ids=str)
def test_a_norm_hides_no_nan(m, n, static, dtype):
    """Of x with a NaN in it nothing is a number after its norm."""
    H, *parameters = (t.to(DEVICE).clone() for t in helpers.case(m, n, 12, (3,), dtype).inputs)
    H[1, 0, 2] = float("nan")
    own = fused.Parameters(*(parameters[:2] if static else parameters))
    x, _ = fused.enter(H, own, helpers.EPS, nn.RMSNorm(m * 12, eps=1e-6, device=DEVICE))
    assert x[1].isnan().all() and x[[0, 2]].isfinite().all()


@pytest.mark.parametrize("static", [True, False])
def test_a_state_made_by_hand_may_hold_parameters_that_are_not_contiguous(static):
    H, *parameters = (t.to(DEVICE) for t in helpers.case(2, 4, 12, (3,), torch.float32).inputs)
    own = fused.Parameters(*(parameters[:2] if static else parameters))
    turned = fused.Parameters(*(None if t is None else t.mT.contiguous().mT if t.ndim == 2 else t for t in own))
    assert not turned.A.is_contiguous()
    z, groups = torch.randn(3, 24, device=DEVICE), nn.GroupNorm(2, 48, device=DEVICE)
    for run in (
        lambda p: fused.depth(z, fused.State(H, p, helpers.EPS)),
        lambda p: fused.last(z, fused.State(H, p, helpers.EPS), groups),
        lambda p: fused.step(z, fused.State(H, p, helpers.EPS), p, helpers.EPS)[0],
    ):
        assert torch.equal(run(own), run(turned))


@pytest.mark.parametrize("n", [8, 16])
def test_a_norm_of_small_differences(n):
    """Slots that are nearly equal, and x the difference of two of them: 300 times smaller, and normed."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    H = (draw(6, 1, 64) + 0.003 * draw(6, n, 64)).bfloat16()
    A = 0.01 * draw(n, 2 + n)
    A[:, :2] = torch.eye(n)[:, :2].double() - torch.eye(n)[:, 2:4].double()
    own = (A, draw(2, n), *(0.0 * draw(64, k) for k in (2 + n, 2)), draw(n, 2 + n), draw(2, n), draw(64))
    back, found = draw(6, 128).bfloat16(), []
    for ops, dtype in ((fused, torch.float32), (Reference, torch.float64)):
        H_, *rest = (t.to(DEVICE, dtype).requires_grad_() for t in (H, *own))
        H_ = H_.detach().to(torch.bfloat16 if ops is fused else dtype).requires_grad_()
        norm = nn.RMSNorm(128, eps=1e-12, device=DEVICE, dtype=dtype)
        x, _ = ops.enter(H_, fused.Parameters(*rest), helpers.EPS, norm)
        found.append([x.detach(), *torch.autograd.grad(x, [H_, rest[0]], back.to(DEVICE, x.dtype))])
    for one, other in zip(*found, strict=True):
        assert (one.double() - other).square().mean().sqrt() < 1e-2 * other.square().mean().sqrt()


def test_tanh_near_zero_and_far():
    # d_b = 1, ε = 0: q = W itself; read through Å of a state of ones
    W = torch.tensor([1e-30, 1e-6, 1e-3, 0.05, 0.199, 0.2, 0.201, 1.0, 5.0, 9.0, 30.0, 1e30])
    W = torch.cat([W, -W]).to(DEVICE)
    m = len(W)
    n = 32
    H = torch.ones(1, n, 1, device=DEVICE)
    zeros = torch.zeros(n, m + n, device=DEVICE)
    ones = torch.ones(n, m + n, device=DEVICE)
    W_alpha = torch.cat([W, W.new_zeros(n)])[None]
    B = torch.zeros(m, n, device=DEVICE)
    x, _ = fused.dynamic_width(
        H, zeros, B, W_alpha, W[None], ones, torch.ones_like(B), torch.ones(1, device=DEVICE), 0.0
    )
    found, exact = x[0].double() / n, torch.tanh(W.double())
    # 2e-7 relative: the two forms of tanh; another 2e-7 for the sum of 32 equal terms
    assert ((found - exact).abs() <= 4e-7 * exact.abs()).all()


def test_only_some_inputs_want_gradients():
    case = helpers.case(2, 3, 8, (3,), torch.float32)
    wanted = helpers.oracle(case)
    for index, name in enumerate(helpers.NAMES):
        inputs = [t.to(DEVICE).clone().requires_grad_(i == index) for i, t in enumerate(case.inputs)]
        x, state = fused.dynamic_width(*inputs, helpers.EPS)
        H_next = fused.depth(x + case.z.to(DEVICE), state)
        loss = (x * case.g_x.to(DEVICE)).sum() + (H_next * case.g.to(DEVICE)).sum()
        (g,) = torch.autograd.grad(loss, [inputs[index]])
        exact = wanted[f"g_{name}"].to(DEVICE)
        torch.testing.assert_close(g.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())


def test_second_derivatives_come_from_the_reference():
    case = helpers.case(2, 3, 8, (2,), torch.float32)
    found = []
    for ops, dtype in ((fused, torch.float32), (helpers.Reference, torch.float64)):
        inputs = [t.to(DEVICE, dtype).requires_grad_() for t in case.inputs]
        x, state = ops.dynamic_width(*inputs, helpers.EPS)
        first = torch.autograd.grad(ops.depth(x.tanh(), state).square().sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs[0])[0].double())
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4 * found[1].abs().max().item())


# ------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize(
    "options",
    [
        {"m": 2, "n": 4},
        {"m": 2, "n": 3, "n_layers": 2},
        {"m": 2, "n": 4, "dynamic": False, "mtp_layers": 1},
        {"m": 1, "n": 2, "n_experts": 2, "top_k": 1},
    ],
    ids=str,
)
def test_the_whole_model(options):
    results = []
    tokens = torch.randint(0, 20, (1, 5), device=DEVICE)
    for kernels, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        torch.manual_seed(0)
        model = VWNTransformer(VWNConfig(vocab_size=20, dim=8, n_heads=2, kernels=kernels, **{"n_layers": 1} | options))
        for p in model.parameters():
            nn.init.normal_(p, std=0.5)
        for i, norm in enumerate(part for part in model.modules() if isinstance(part, nn.RMSNorm)):
            norm.eps = 0.05 * (i + 1)  # so that another one's shows
        model = model.to(DEVICE, dtype)
        losses = model.loss(tokens)
        losses.total.backward()
        results.append(
            {"logits": model(tokens).detach(), "loss": losses.total.detach()}
            | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        )
    found, wanted = results
    assert found.keys() == wanted.keys()
    for name, exact in wanted.items():
        error = ((found[name].double() - exact).norm() / exact.norm().clamp_min(1e-6)).item()
        # float32 through four sublayers and the loss; the float32 reference itself is off by up to 1e-5
        assert error < 5e-5, f"{name}: {error:.1e}"
