"""What the Triton kernels promise besides values: errors, torch.compile, checkpointing, DDP, autocast, the seam."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import textwrap

import helpers
import pytest
import test_triton_values as values
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from vwn_ref.kernels import cpu, fused, launch

from vwn_ref import GHC, DynamicGHC, ops, stack
from vwn_ref.config import VWNConfig
from vwn_ref.model import VWNTransformer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(m=2, n=3, d=8, lead=(3,), dtype=torch.float32):
    case = helpers.case(m, n, d, lead, dtype)
    return [t.to(DEVICE) for t in case.inputs], case.z.to(DEVICE)


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("index, name", list(enumerate(helpers.NAMES)))
def test_a_wrong_shape_is_named(index, name):
    tensors, _ = inputs()
    if name == "H":
        tensors[0] = tensors[0][0, 0]
    else:
        shape = list(tensors[index].shape)
        tensors[index] = torch.zeros([shape[0] + 1, *shape[1:]], device=DEVICE)
        name = "A" if name == "B" else name  # another B is another m: then A is the first that does not fit
    with pytest.raises(ValueError, match=rf"^{name} has shape .*: must be \["):
        fused.dynamic_width(*tensors, helpers.EPS)


def test_a_wrong_dtype_is_named():
    tensors, z = inputs()
    with pytest.raises(TypeError, match=r"H has dtype torch\.float64: must be float32, bfloat16 or float16"):
        fused.dynamic_width(tensors[0].double(), *tensors[1:], helpers.EPS)
    with pytest.raises(TypeError, match=r"S_alpha has dtype torch\.int64: must be"):
        fused.dynamic_width(*tensors[:5], tensors[5].long(), *tensors[6:], helpers.EPS)
    _, state = fused.width(*tensors[:3])
    with pytest.raises(TypeError, match=r"z has dtype torch\.int32: must be"):
        fused.depth(z.int(), state)


def test_a_mix_of_devices_is_named():
    tensors, z = inputs()
    with pytest.raises(ValueError, match=r"gain is on meta: must be where H is, on (cpu|cuda)"):
        fused.dynamic_width(*tensors[:-1], tensors[-1].to("meta"), helpers.EPS)
    _, state = fused.width(*tensors[:3])
    with pytest.raises(ValueError, match=r"z is on meta: must be where H is, on (cpu|cuda)"):
        fused.depth(z.to("meta"), state)


def test_a_wrong_z_is_named():
    tensors, z = inputs()
    _, state = fused.dynamic_width(*tensors, helpers.EPS)
    with pytest.raises(ValueError, match=r"z has shape \(2, 16\): must be \[\.\.\., D\] = \[3, 16\]"):
        fused.depth(z[:2], state)


def test_too_many_slots_are_refused():
    H = torch.zeros(1, 65, 8, device=DEVICE)
    with pytest.raises(ValueError, match="H has n = 65 slots: must be ≤ 64"):
        fused.width(H, torch.zeros(65, 66, device=DEVICE), torch.zeros(1, 65, device=DEVICE))


def test_steps_between_unlike_connections_are_refused():
    tensors, z = inputs()
    _, state = fused.width(*tensors[:3])
    with pytest.raises(ValueError, match="parameters: must be dynamic where those of the state are"):
        fused.step(z, state, fused.Parameters(*tensors[1:]), helpers.EPS)
    other = fused.Parameters(torch.zeros(3, 4, device=DEVICE), torch.zeros(1, 3, device=DEVICE))
    with pytest.raises(ValueError, match=r"B has shape \(1, 3\): must be \(2, 3\)"):
        fused.step(z, state, other, 0.0)


def test_a_group_norm_of_other_groups_is_refused():
    tensors, z = inputs(2, 4)
    _, state = fused.dynamic_width(*tensors, helpers.EPS)
    with pytest.raises(ValueError, match="norm has 4 groups: must be r = n/m = 4/2"):
        fused.last(z, state, nn.GroupNorm(4, 32))
    with pytest.raises(ValueError, match=r"norm\.weight has shape \(16,\): must be \[D′\] = \[32\]"):
        fused.last(z, state, nn.GroupNorm(2, 16))


def test_cpu_tensors_where_nothing_is_interpreted():
    code = """
        import torch
        from vwn_ref import DynamicGHC
        ghc = DynamicGHC(16, 2, 3, kernels="triton")
        try:
            ghc.width(torch.zeros(3, 3, 8))
        except ValueError as error:
            assert "H is on cpu: must be on a GPU for the Triton kernels" in str(error), error
        else:
            raise SystemExit("no error")
    """
    done = _python(code, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("there", ["sys.modules['triton'] = None", "triton.__version__ = '3.4.0'"], ids=str)
def test_without_triton(there):
    code = f"""
        import sys, triton
        {there}
        import torch
        from vwn_ref import DynamicGHC, VWNConfig, VWNTransformer
        VWNTransformer(VWNConfig(vocab_size=5, dim=8, n_layers=1, n_heads=2, m=2, n=3))(torch.zeros(1, 2).long())
        try:
            DynamicGHC(16, 2, 3, kernels="triton")
        except ValueError as error:
            assert "Triton 3.5 or newer is not installed (pip install triton" in str(error), error
        else:
            raise SystemExit("no error")
    """
    done = _python(code)
    assert done.returncode == 0, done.stderr[-2000:]


def _python(code: str, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env={**os.environ, **environment}
    )


# -------------------------------------------------------------------------------------------------------- the seam


def test_the_seam():
    chosen = ops.select("triton")
    assert (chosen.width, chosen.dynamic_width, chosen.depth) == (fused.width, fused.dynamic_width, fused.depth)
    copy.deepcopy(chosen)
    pickle.loads(pickle.dumps(DynamicGHC(16, 2, 3, kernels="triton")))


def test_auto_takes_triton_on_a_gpu_and_the_cpu_elsewhere():
    for kind in (GHC, DynamicGHC):
        ghc = kind(16, 2, 3).to(DEVICE)
        x, state = ghc.width(torch.randn(5, 3, 8, device=DEVICE))
        assert type(state) in ((fused.State,) if DEVICE == "cuda" else (cpu.StaticState, cpu.DynamicState))
        assert ghc.depth(x, state).shape == (5, 3, 8)


@pytest.fixture
def calls(monkeypatch):
    """Names of the functions of `fused` that were called."""
    seen = []
    for name in ("enter", "step", "last", "depth"):
        function = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *a, name=name, function=function: seen.append(name) or function(*a))
    return seen


def small(**options):
    return VWNTransformer(VWNConfig(vocab_size=9, dim=8, n_layers=1, n_heads=2, kernels="triton", **options)).to(DEVICE)


TOKENS = torch.zeros(1, 2, dtype=torch.long, device=DEVICE)


def test_a_model_goes_in_steps(calls):
    small(m=2, n=4)(TOKENS)
    assert calls == ["enter", "step", "last"]
    calls.clear()
    small(m=2, n=3)(TOKENS)  # no GroupNorm where r is no integer
    assert calls == ["enter", "step", "depth"]


def test_a_hooked_model_calls_what_is_hooked(calls):
    model, seen = small(m=2, n=3), []
    for connection in model.connections:
        connection.register_forward_hook(lambda *a: seen.append(a))
    model(TOKENS)
    assert len(seen) == 2 and "step" not in calls


def test_the_plain_model_has_nothing_to_fuse(calls):
    small()(TOKENS)
    assert calls == []


# -------------------------------------------------------------------------------- what PyTorch does with operators


def test_opcheck():
    tensors, z = inputs(2, 4, 8, (2,))
    H, A, B, W_alpha, W_beta, S_alpha, S_beta, gain = (t.requires_grad_() for t in tensors)
    z, norm = z.requires_grad_(), torch.randn(16, device=DEVICE, requires_grad=True)
    depth = (H, z, A, B, W_alpha, W_beta, S_alpha, S_beta, gain)
    group = [torch.randn(32, device=DEVICE, requires_grad=True) for _ in range(2)]
    check = torch.library.opcheck
    check(torch.ops.vwn_ref.ghc_triton_width.default, (H, A, W_alpha, S_alpha, gain, norm, 1e-6, 1e-6))
    check(torch.ops.vwn_ref.ghc_triton_width.default, (H, A, None, None, None, None, 0.0, 0.0))
    check(torch.ops.vwn_ref.ghc_triton_depth.default, (*depth, 1e-6))
    check(
        torch.ops.vwn_ref.ghc_triton_step.default,
        (*depth, A, W_alpha, S_alpha, gain, norm, 1e-6, 1e-6, 1e-6),
    )
    check(torch.ops.vwn_ref.ghc_triton_last.default, (*depth, *group, 1e-6, 1e-5))


def test_torch_compile_makes_one_graph_with_the_same_results():
    # in a process of its own: the shape checks of the other tests are Python code that cannot be traced
    code = f"""
        import torch
        from vwn_ref import VWNConfig, VWNTransformer
        torch.manual_seed(0)
        cfg = VWNConfig(vocab_size=9, dim=8, n_layers=1, n_heads=2, m=2, n=4, kernels="triton")
        model = VWNTransformer(cfg).to({DEVICE!r})
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.5)
        seen, results = [], []
        def backend(graph, inputs):
            seen.extend(str(node.target) for node in graph.graph.nodes)
            from torch._dynamo.backends.debugging import aot_eager
            return aot_eager(graph, inputs)
        tokens = torch.zeros(1, 2, dtype=torch.long, device={DEVICE!r})
        for f in (model, torch.compile(model, backend=backend, fullgraph=True)):
            out = f(tokens)
            results.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
        assert sum("ghc_triton" in s for s in seen) == 3, seen
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
    """
    done = _python(code)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_tracer_sees_what_is_computed(no_shape_checks):
    ghc, H = DynamicGHC(16, 2, 3, kernels="triton").to(DEVICE), torch.randn(3, 3, 8, device=DEVICE)
    for p in ghc.parameters():
        nn.init.normal_(p)

    def gradient(H):
        H = H.detach().requires_grad_()
        out = ghc(H, torch.tanh)
        return out, *torch.autograd.grad(out.square().sum(), H)

    graph = make_fx(gradient)(torch.randn_like(H))
    assert sum("ghc_triton" in str(node.target) for node in graph.graph.nodes) == 4
    torch.testing.assert_close(graph(H), gradient(H), rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing():
    ghc = DynamicGHC(16, 2, 3, kernels="triton").to(DEVICE)
    for p in ghc.parameters():
        nn.init.normal_(p)
    H = torch.randn(3, 3, 8, device=DEVICE, requires_grad=True)
    results = []
    for run in (ghc, lambda H, layer: checkpoint(ghc, H, layer, use_reentrant=False)):
        out = run(H, torch.tanh)
        results.append([out, *torch.autograd.grad(out.square().sum(), [H, *ghc.parameters()])])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_autocast():
    ghc = DynamicGHC(16, 2, 3, kernels="triton").to(DEVICE)
    H = torch.randn(3, 3, 8, device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = ghc(H, torch.tanh)
    assert out.dtype == torch.bfloat16
    # bfloat16 rounds H, x, z and the result: four times 2⁻⁹, of numbers up to 4
    torch.testing.assert_close(out.float(), ghc(H, torch.tanh), rtol=2e-2, atol=3e-2)


def test_ddp_reduces_the_gradients():
    code = f"""
        import torch, torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel
        from vwn_ref import VWNConfig, VWNTransformer
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        cfg = VWNConfig(vocab_size=9, dim=8, n_layers=1, n_heads=2, m=2, n=4, kernels="triton")
        torch.manual_seed(0)
        model = VWNTransformer(cfg).to({DEVICE!r})
        tokens = torch.zeros(1, 2, dtype=torch.long, device={DEVICE!r})
        gradients = []
        for f in (model, DistributedDataParallel(model)):
            model.zero_grad()
            f(tokens).square().sum().backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        torch.testing.assert_close(*gradients, rtol=0, atol=0)
    """
    done = _python(code)
    assert done.returncode == 0, done.stderr[-3000:]


def test_epsilon_none_is_the_machine_epsilon():
    tensors, _ = inputs()
    x, _ = fused.dynamic_width(*tensors, None)
    H = tensors[0]
    q = F.rms_norm(H, (8,), tensors[-1], torch.finfo(H.dtype).eps) @ tensors[3] / 8**0.5
    A = tensors[5] * q.tanh() + tensors[1]
    torch.testing.assert_close(x, (A[..., :2].mT @ H).flatten(-2), rtol=1e-5, atol=1e-5)


def test_first_gradients_with_create_graph_where_inputs_hang_together():
    # z depends on H, and both widths are of one GHC: paths from one input to another are not the operation's own
    tensors, _ = inputs(2, 3, 4, (2,))
    results = []
    for ops_, dtype, graph in (
        (fused, torch.float32, True),
        (fused, torch.float32, False),
        (helpers.Reference, torch.float64, False),
    ):
        t = [x.to(dtype).requires_grad_() for x in tensors]
        H = t[0]
        for _ in range(2):
            x, state = ops_.dynamic_width(H, *t[1:], helpers.EPS)
            H = ops_.depth(x.tanh(), state)
        results.append([g.double() for g in torch.autograd.grad(H.square().sum(), t, create_graph=graph)])
    for found in results[:2]:
        for g, exact in zip(found, results[2], strict=True):
            torch.testing.assert_close(g, exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


def test_norm_gains_that_are_not_contiguous_or_not_the_right_size():
    tensors, _ = inputs()
    parameters, norm = fused.Parameters(*tensors[1:]), nn.RMSNorm(16, eps=1e-6)
    norm.weight = nn.Parameter(torch.randn(32, device=DEVICE)[::2])
    x, _ = fused.enter(tensors[0], parameters, helpers.EPS, norm)
    plain, _ = fused.enter(tensors[0], parameters, helpers.EPS)
    torch.testing.assert_close(x, F.rms_norm(plain, (16,), norm.weight, 1e-6), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"norm\.weight has shape \(5,\): must be \[D\] = \[16\]"):
        fused.enter(tensors[0], parameters, helpers.EPS, nn.RMSNorm(5, device=DEVICE))


def test_sums_are_float32_whatever_the_default_dtype():
    tensors, z = inputs(dtype=torch.bfloat16)
    torch.set_default_dtype(torch.float64)
    try:
        t = [x.requires_grad_() for x in tensors]
        x, state = fused.dynamic_width(*t, helpers.EPS)
        gradients = torch.autograd.grad(fused.depth(z, state).sum() + x.sum(), t)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(g.isfinite().all() and g.dtype == torch.bfloat16 for g in gradients)


def test_one_slot_and_one_segment_as_an_operator():
    tensors, z = inputs(1, 1, 4, (2,))
    torch.library.opcheck(
        torch.ops.vwn_ref.ghc_triton_depth.default,
        (tensors[0].requires_grad_(), z, *(t.requires_grad_() for t in tensors[1:]), 1e-6),
        test_utils=("test_aot_dispatch_dynamic",),
    )


def changed(model, how):
    if how == "another norm":
        model.sublayers[0].norm = nn.LayerNorm(8).to(DEVICE)
    elif how == "a subclass":
        model.connections[0].__class__ = type("Own", (DynamicGHC,), {})
    elif how == "a hook on a norm":
        model.sublayers[0].norm.register_forward_hook(lambda *a: None)
    else:
        model.connections[0].register_full_backward_pre_hook(lambda *a: None)
    return model


@pytest.mark.parametrize("how", ["another norm", "a subclass", "a hook on a norm", "a backward hook"])
def test_what_is_not_the_usual_is_not_fused(calls, how):
    changed(small(m=2, n=3), how)(TOKENS)
    assert "step" not in calls


@pytest.mark.parametrize("part", ["reduce", "reduce.norm"])
def test_a_watched_reduce_is_called(calls, part):
    model = small(m=2, n=4)
    expected, seen = model(TOKENS), []
    assert calls.count("last") == 1
    model.get_submodule(part).register_forward_hook(lambda *a: seen.append(part))
    torch.testing.assert_close(model(TOKENS), expected)
    assert seen == [part] and calls.count("last") == 1


def test_no_sublayers_do_nothing():
    H = torch.randn(1, 5, 3, 4, device=DEVICE)
    assert stack.through(H, nn.ModuleList(), nn.ModuleList()) is H


def test_a_connection_too_few_is_refused():
    model = small(m=2, n=3)
    H = model.embedding(TOKENS)
    with pytest.raises(ValueError, match="zip"):
        stack.through(H, model.connections, model.sublayers[:1])


def test_a_state_of_another_shape_is_refused_by_a_stack(no_shape_checks):
    model = small(m=2, n=3)
    with pytest.raises(ValueError, match=r"H has shape \(1, 5, 4, 4\): must be \[\.\.\., n, d_b\]"):
        stack.through(torch.zeros(1, 5, 4, 4, device=DEVICE), model.connections, model.sublayers)


@pytest.mark.parametrize(
    "H, B, message",
    [
        (torch.zeros(2, 3, 0), torch.zeros(2, 3), r"H has shape \(2, 3, 0\): must be \[\.\.\., n, d_b\] with n ≥ 1"),
        (torch.zeros(2, 3, 8), torch.zeros(()), r"B has shape \(\): must be \[m, n\]"),
        (torch.zeros(2, 3, 8), torch.zeros(0, 3), r"B has shape \(0, 3\): must be \[m, n\]"),
    ],
)
def test_empty_shapes_are_named(H, B, message):
    with pytest.raises(ValueError, match=message):
        fused.width(H.to(DEVICE), torch.zeros(3, 5, device=DEVICE), B.to(DEVICE))


@pytest.mark.skipif(not launch.INTERPRETED, reason="what a launch is given is looked at in the interpreter")
def test_every_launch_says_whether_products_are_fused(monkeypatch):
    """Triton's default is about to change. Not fused: walks for few slots, and `projections_gradient`, alone."""
    from triton.runtime import interpreter

    said = {}
    run = interpreter.InterpretedFunction.run

    def recording(self, *arguments, grid, warmup, **options):
        said.setdefault(self.__name__, set()).add(options.get("enable_fp_fusion"))
        return run(self, *arguments, grid=grid, warmup=warmup, **options)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", recording)
    for shape, dtype in (((2, 4), torch.float32), ((2, 6), torch.bfloat16), ((2, 6), torch.float32)):
        values.two_sublayers(fused, *shape, 8, (2,), dtype)
    walks = ("width", "depth", "step", "width_backward", "depth_backward", "step_backward")
    assert {f"few_{name}_kernel" for name in ("width", "step", "depth_backward")} < set(said)
    assert {f"many_{name}_kernel" for name in ("width", "step", "depth_backward")} < set(said)
    assert {"width_kernel", "weights_kernel", "projections_kernel", "norm_gradient_kernel"} < set(said)
    assert said.pop("projections_gradient_kernel") == {False}
    assert set().union(*said.values()) == {True}, said
    monkeypatch.setattr(launch, "whole_rows", lambda *_, **__: 0)
    said.clear()
    values.two_sublayers(fused, 2, 4, 8, (2,), torch.float32)
    assert {said[f"{name}_kernel"] == {False} for name in walks if f"{name}_kernel" in said} == {True}
    assert said["weights_kernel"] == {True}
