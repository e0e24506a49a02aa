"""On a GPU, at the sizes of training, by `make gpu`. Elsewhere they are skipped.

Against the reference in float64, on the GPU too. What is checked at small sizes (every (m, n), lengths, strides,
errors) is in test_triton_*.py, which run on a GPU as well where there is one.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap

import helpers
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import every_kernel
import test_triton_values as values
from torch import nn
from vwn_ref.kernels import fused

from vwn_ref.config import VWNConfig
from vwn_ref.model import VWNTransformer

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: torch.cuda.is_available() is False"),
    pytest.mark.skipif(fused.INTERPRETED, reason="TRITON_INTERPRET is set: this is for the compiled kernels"),
]

# Root-mean-square errors relative to the tensor, as everywhere.
# bfloat16: each store rounds by 1.1e-3 in the mean square, eight of them lie between the first input and the last
# gradient, and tanh' and the norms spread what they leave. The interpreter gives up to 1.0e-2 for 40 to 400 tokens, for
# gradients of single tokens as for those of parameters (1.5e-2 for a W where e is bfloat16); here coefficients are
# rounded too, in the walks: to 2⁻¹¹ (tf32). float16: each store by 1.4e-4, and the walks' coefficients by as much.
# float32: up to 4e-7 there, with exact products. tf32x3 leaves 2⁻²² of each, and sums have up to 10⁵ terms. A factor
# rounded to plain tf32 by mistake would be 3e-4.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 2e-5}
DTYPES = (torch.bfloat16, torch.float32)
SHAPES = [(2, 3), (4, 8), (8, 64)]

outputs_full_of_nan = values.outputs_full_of_nan


@pytest.fixture(autouse=True)
def memory_given_back():
    """Several processes test on one GPU. One in which it has failed can do nothing more: another takes its place."""
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
    torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    "m, n, D, tokens, dtype",
    [
        *((*shape, 1024, tokens, dtype) for tokens in (4096, 16384) for shape in SHAPES for dtype in DTYPES),
        *((*shape, D, 4096, torch.bfloat16) for D in (4096, 2048) for shape in SHAPES),  # as bench.py times them
        *((*shape, D, 4096, torch.bfloat16) for D in (4096, 2048) for shape in ((1, 4), (4, 16))),
        (2, 3, 1024, 4099, torch.bfloat16),  # a last block that is not full
        (2, 3, 4096, 4096, torch.float32),  # rows of a token over eight warps
        (2, 4, 2048, 4096, torch.bfloat16),  # over four, and half as many columns each
        (1, 4, 1024, 4096, torch.bfloat16),
        (3, 4, 768, 4096, torch.bfloat16),
        (4, 16, 1024, 4096, torch.bfloat16),
        (5, 7, 960, 4097, torch.bfloat16),  # two tokens a tile, neither full, and the last alone
        (8, 8, 1024, 4096, torch.bfloat16),
        (3, 9, 768, 4096, torch.bfloat16),
        (4, 32, 2048, 2048, torch.bfloat16),
        (4, 8, 1024, 4096, torch.float16),  # walks
        (2, 3, 1000, 4096, torch.bfloat16),  # part of a row is padding
        (2, 3, 12288, 1022, torch.bfloat16),  # rows that are too long for the registers: four tokens a tile
        (2, 2, 12288, 1021, torch.bfloat16),  # eight
        (2, 4, 12288, 1024, torch.bfloat16),  # and a group that is too long
        (2, 4, 9000, 1024, torch.float32),  # walks
        (3, 6, 2880, 4096, torch.bfloat16),  # part of a group is padding
    ],
    ids=str,
)
def test_two_sublayers(m, n, D, tokens, dtype):
    """width and its norm, step and its norm, and last (depth where r is no integer), with every gradient."""
    case, groups = (m, n, D // m, (tokens,), dtype), n % m == 0
    found = values.two_sublayers(fused, *case, groups=groups)
    values.assert_close(found, values.two_sublayers(values.Reference, *case, groups=groups), TOLERANCE[dtype])


def test_two_slots_of_one_segment():
    """Eight tokens a tile. x is a sum of two slots here, and where both coefficients happen to be near 0 its norm
    divides by almost nothing: of a thousand tokens a few have so large gradients that storing tensors in bfloat16, with
    exact arithmetic otherwise, changes sums over tokens by up to a half (rounding.py). So it is the median token that
    is looked at; gradients of parameters at (1, 2) test_triton_values.py has, of fewer tokens."""
    case = (1, 2, 8192, (1021,), torch.bfloat16)
    found, wanted = (values.two_sublayers(ops, *case) for ops in (fused, values.Reference))
    assert all(t.isfinite().all() for t in found.values())
    for name in ("x0", "x1", "out", "g_H", "g_z0", "g_z1"):
        error, size = ((t.flatten(1).norm(dim=1)) for t in (found[name].double() - wanted[name], wanted[name]))
        assert (error / size).median() < TOLERANCE[torch.bfloat16] / 2, name


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("m, n", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_width_and_depth(m, n, dtype, static):
    """Without norms in between."""
    case = helpers.case(m, n, 1024 // m, (4096,), dtype)
    case = helpers.Case(tuple(t.cuda() for t in case.inputs), *(t.cuda() for t in case[1:]))
    found = helpers.run(fused, case, static=static)
    helpers.assert_close(found, helpers.oracle(case, static=static), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, n", [*SHAPES, (4, 16)], ids=str)
def test_the_same_bits_twice(m, n, dtype):
    case, groups = (m, n, 1024 // m, (16384,), dtype), n % m == 0
    first, second = (values.two_sublayers(fused, *case, groups=groups) for _ in range(2))
    assert all(torch.equal(t, second[name]) for name, t in first.items())


def test_a_state_of_more_than_2_to_the_31_elements():
    m, n, d = 2, 3, 512
    tokens = 2**31 // (n * d) + 100
    needed = 2 * tokens * d * (6 * n + 5 * m) + 4 * tokens * n * (n + 2 * m)  # states and gradients; e
    if torch.cuda.mem_get_info()[0] < 1.2 * needed:
        pytest.skip(f"{needed / 2**30:.0f} GiB of GPU memory are needed, and a fifth more")
    parameters = helpers.case(m, n, d, (), torch.float32).inputs[1:]
    own = fused.Parameters(*(t.cuda().requires_grad_() for t in parameters))
    norm = nn.RMSNorm(m * d, eps=1e-6, device="cuda")

    def random(*shape):
        return torch.randn(tokens, *shape, device="cuda", dtype=torch.bfloat16)

    H, z, g_x, g = random(n, d).requires_grad_(), random(m * d).requires_grad_(), random(m * d), random(n, d)
    assert H.numel() > 2**31
    x, state = fused.step(z, fused.State(H, own, helpers.EPS), own, helpers.EPS, norm)
    g_H, g_z, *of_parameters = torch.autograd.grad([x, state.H], [H, z, *own], [g_x, g])
    assert all(t.isfinite().all() for t in of_parameters)

    for ends in (slice(0, 50), slice(tokens - 50, None)):  # what a token gets back depends on that token alone
        h, s, back_x, back = (t.detach()[ends].double().requires_grad_() for t in (H, z, g_x, g))
        exact = fused.Parameters(*(p.detach().double() for p in own))
        double_norm = nn.RMSNorm(m * d, eps=1e-6, device="cuda", dtype=torch.float64)
        _, before = values.Reference.enter(h, exact, helpers.EPS, double_norm)
        H_next = values.Reference.depth(s, before)
        y, _ = values.Reference.enter(H_next, exact, helpers.EPS, double_norm)
        wanted = [y, H_next, *torch.autograd.grad([y, H_next], [h, s], [back_x, back])]
        for name, found, right in zip(("x", "H", "g_H", "g_z"), (x, state.H, g_H, g_z), wanted, strict=True):
            error = ((found.detach()[ends].double() - right).norm() / right.norm()).item()
            assert error < TOLERANCE[torch.bfloat16], f"{name}, tokens {ends}: {error:.1e}"


# ------------------------------------------------------------------------------------------------------- the model

CONFIG = {"vocab_size": 512, "dim": 256, "n_layers": 2, "n_heads": 4, "m": 4, "n": 8}


def model(kernels: str, dtype: torch.dtype = torch.float32) -> VWNTransformer:
    torch.manual_seed(0)
    made = VWNTransformer(VWNConfig(**CONFIG, kernels=kernels))
    for name, p in made.named_parameters():
        if name.startswith("connections") and "W_" in name:
            nn.init.normal_(p, std=0.5)  # zero at first: tanh would have nothing to do
    return made.to("cuda", dtype)  # now: float64 would draw other numbers


def gradients(made: VWNTransformer, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    made.loss(tokens).total.backward()
    return {"logits": made(tokens).detach()} | {f"g_{name}": p.grad for name, p in made.named_parameters()}


def test_the_whole_model_in_float32():
    tokens = torch.randint(0, 512, (4, 257), device="cuda")
    found, wanted = gradients(model("triton"), tokens), gradients(model("reference", torch.float64), tokens)
    for name, exact in wanted.items():
        error = ((found[name].double() - exact).norm() / exact.norm()).item()
        # as in test_triton_values.py: float32 through four sublayers and the loss, here of 1,024 tokens
        assert error < 1e-4, f"{name}: {error:.1e}"


def test_the_whole_model_under_autocast(monkeypatch):
    """No further from float64 than the reference under the same autocast is, within a half."""
    called = []
    step = fused.step
    monkeypatch.setattr(fused, "step", lambda *a: called.append(1) or step(*a))
    tokens = torch.randint(0, 512, (4, 257), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        found = gradients(model("auto"), tokens)
        other = gradients(model("reference"), tokens)
    assert len(called) == 2 * 3, "auto takes the fused step between four sublayers, in loss and logits"
    wanted = gradients(model("reference", torch.float64), tokens)
    for name, exact in wanted.items():
        ours, theirs = (((t[name].double() - exact).norm() / exact.norm()).item() for t in (found, other))
        assert found[name].isfinite().all() and ours < max(1.5 * theirs, 1e-2), f"{name}: {ours:.1e}, {theirs:.1e}"


def test_torch_compile_makes_one_graph_of_the_model():
    # in a process of its own: the shape checks of the other tests are Python code that cannot be traced
    code = """
        import torch
        from vwn_ref import VWNConfig, VWNTransformer
        model = VWNTransformer(VWNConfig(vocab_size=512, dim=256, n_layers=2, n_heads=4, m=4, n=8)).cuda()
        tokens = torch.randint(0, 512, (2, 65), device="cuda")
        whole = lambda tokens: model.loss(tokens).total
        results = []
        for f in (whole, torch.compile(whole, fullgraph=True)):
            model.zero_grad()
            loss = f(tokens)
            loss.backward()
            results.append([loss.detach(), *(p.grad for p in model.parameters())])
        for a, b in zip(*results):
            error = ((a - b).norm() / a.norm().clamp_min(1e-9)).item()
            assert error < 1e-4, error  # float32: only the order of sums outside our kernels differs
    """
    run(sys.executable, "-c", textwrap.dedent(code))


def test_operators_pass_opcheck():
    case = helpers.case(2, 4, 16, (5,), torch.float32)
    H, A, B, W_alpha, W_beta, S_alpha, S_beta, gain = (t.cuda().requires_grad_() for t in case.inputs)
    z, norm, weight, bias = (torch.randn(s, device="cuda", requires_grad=True) for s in ((5, 32), 32, 64, 64))
    own = (A, B, W_alpha, W_beta, S_alpha, S_beta, gain)
    operators = torch.ops.vwn_ref
    for operator, arguments in (
        (operators.ghc_triton_width, (H, A, W_alpha, S_alpha, gain, norm, 1e-6, 1e-6)),
        (operators.ghc_triton_depth, (H, z, *own, 1e-6)),
        (operators.ghc_triton_step, (H, z, *own, A, W_alpha, S_alpha, gain, norm, 1e-6, 1e-6, 1e-6)),
        (operators.ghc_triton_last, (H, z, *own, weight, bias, 1e-6, 1e-6)),
    ):
        torch.library.opcheck(operator.default, arguments)


# ---------------------------------------------------------------------------------------------- compute-sanitizer


@pytest.mark.parametrize("dtype", every_kernel.DTYPES, ids=str)
@pytest.mark.parametrize("m, n, d, walk", every_kernel.CASES, ids=str)
def test_small_sizes(m, n, d, walk, dtype):
    """What the sanitizer runs: compiled here, several at a time, and its numbers."""
    every_kernel.every_kernel(m, n, d, walk, dtype)
    case = (m, n, d, (every_kernel.TOKENS,), dtype)
    with every_kernel.long_rows(walk):
        found = values.two_sublayers(fused, *case)
    values.assert_close(found, values.two_sublayers(values.Reference, *case), TOLERANCE[dtype])


def run(*command: str, **environment) -> str:
    """Its output. It ends with all that it has started."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output = "not over after 300 s: " + process.communicate()[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if command[0] == sanitizer() and "Device not supported" in output:
        pytest.skip(f"{command[0]}: this machine does not let it at the GPU")
    named = sorted(set(re.findall(r"at (\w+)\+0x\w+ in (\S+)", output)))  # kernels and lines, by the sanitizer
    assert process.returncode == 0, (*named, output[-3000:])
    return output


def sanitizer() -> str | None:
    """The tool, where CUDA's toolkit is installed."""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


@pytest.fixture(scope="module")
def compiled():
    """The program, whose kernels are then in Triton's cache: outside the sanitizer, where that is quicker."""
    program = (sys.executable, every_kernel.__file__)
    run(*program)
    return program


@pytest.mark.skipif(sanitizer() is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer_finds_nothing(tool, compiled):
    options = ["--error-exitcode", "9", "--target-processes", "application-only"]
    # every tensor an allocation of its own, whose end is seen
    output = run(str(sanitizer()), "--tool", tool, *options, *compiled, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    assert "SUMMARY" in output, output[-4000:]
