"""Bits, threads, tracing, and everything that has to go to the reference or be refused."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import helpers
import pytest
import torch
from conftest import needs_compiler
from torch.fx.experimental.proxy_tensor import make_fx
from vwn_ref.kernels import backend, cpu

from vwn_ref import ops
from vwn_ref.dynamic import DynamicGHC
from vwn_ref.ghc import GHC


@needs_compiler
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_the_same_bits_for_any_number_of_threads(static):
    case = helpers.case(2, 3, 32, (1000,), torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 1, 2, 2, 3):
            torch.set_num_threads(threads)
            results.append(helpers.run(cpu, case, static=static))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, t in results[0].items():
            # the sublayer of `run` is x + z, an elementwise sum: nothing else in it depends on the threads
            assert torch.equal(t, other[name]), name


@needs_compiler
def test_no_second_openmp_runtime():
    maps = subprocess.run(
        [sys.executable, "-c", textwrap.dedent("""
            import torch
            def runtimes():
                return {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rsplit("/", 1)[-1]}
            torch.ones(100_000).add(1)
            before = runtimes()
            from vwn_ref.dynamic import DynamicGHC
            DynamicGHC(64, 2, 3).width(torch.randn(4096, 3, 32))
            from vwn_ref.kernels import compiler
            assert any(compiler._libraries.values())
            assert runtimes() == before, runtimes()
        """)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert maps.returncode == 0, maps.stderr


def test_operators_pass_opcheck(either_backend):
    m, n, d = 2, 3, 32
    case = helpers.case(m, n, d, (4, 5), torch.float32)
    inputs = tuple(t.requires_grad_() for t in case.inputs)
    Bt = torch.randn(4, 5, n, m, requires_grad=True)
    carried = torch.randn(4, 5, n, d, requires_grad=True)
    z = case.z.requires_grad_()
    torch.library.opcheck(torch.ops.vwn_ref.ghc_dynamic_width.default, (*inputs, helpers.EPS))
    torch.library.opcheck(torch.ops.vwn_ref.ghc_dynamic_depth.default, (z, Bt, carried))
    torch.library.opcheck(torch.ops.vwn_ref.ghc_static_width.default, inputs[:2])
    torch.library.opcheck(torch.ops.vwn_ref.ghc_static_depth.default, (z, inputs[2], carried))


@needs_compiler
def test_torch_compile_makes_one_graph_with_the_same_results():
    # in a process of its own: the shape checks of the other tests are Python code that cannot be traced
    code = """
        import torch
        from vwn_ref.dynamic import DynamicGHC
        from vwn_ref.ghc import GHC
        for kind in (DynamicGHC, GHC):
            torch.manual_seed(0)
            ghc = kind(64, 2, 3, kernels="cpu")
            for p in ghc.parameters():
                torch.nn.init.normal_(p)
            H, results = torch.randn(4, 9, 3, 32, requires_grad=True), []
            seen = []
            def backend(graph, inputs):
                seen.extend(str(node.target) for node in graph.graph.nodes)
                from torch._dynamo.backends.debugging import aot_eager
                return aot_eager(graph, inputs)
            whole = lambda H: ghc(H, torch.tanh)
            for f in (whole, torch.compile(whole, backend=backend, fullgraph=True)):
                out = f(H)
                results.append([out, *torch.autograd.grad(out.square().sum(), [H, *ghc.parameters()])])
            assert any("vwn_ref" in s for s in seen), seen
            torch.testing.assert_close(*results, rtol=0, atol=0)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def _same_as_reference(kind, H, **to):
    modules = [kind(64, 2, 3, kernels=k).to(**to) for k in ("auto", "reference")]
    for p, q in zip(*(m.parameters() for m in modules), strict=True):
        torch.nn.init.normal_(p)
        q.data.copy_(p.data)
    found, wanted = (m(H, torch.tanh) for m in modules)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [GHC, DynamicGHC])
def test_other_tensors_go_to_the_reference(kind):
    for dtype in (torch.bfloat16, torch.float16):
        _same_as_reference(kind, torch.randn(4, 3, 32, dtype=dtype), dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        _same_as_reference(kind, torch.randn(4, 3, 32))
    ghc = kind(64, 2, 3).to("meta")
    assert ghc(torch.empty(4, 3, 32, device="meta"), torch.tanh).device.type == "meta"


@pytest.mark.parametrize("kind", [GHC, DynamicGHC])
def test_function_transforms(kind):
    ghc, H = kind(64, 2, 3), torch.randn(5, 3, 32)
    whole = lambda h: ghc(h, torch.tanh)  # noqa: E731
    torch.testing.assert_close(torch.vmap(whole)(H), whole(H))
    gradient = torch.func.grad(lambda h: whole(h).square().sum())(H)
    leaf = H.clone().requires_grad_()
    whole(leaf).square().sum().backward()
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-4, atol=1e-5)
    _, tangent = torch.func.jvp(whole, (H,), (torch.ones_like(H),))
    step = 1e-2 * torch.ones_like(H)
    torch.testing.assert_close(tangent, (whole(H + step) - whole(H - step)) / 2e-2, rtol=1e-3, atol=1e-3)


@needs_compiler
def test_compiled_function_transforms():
    """The operators have no rule for a tangent, and one that is left out would be 0: the reference has to do it."""
    code = """
        import torch
        from vwn_ref import GHC, DynamicGHC
        for kind in (DynamicGHC, GHC):
            torch.manual_seed(0)
            ghc, H = kind(8, 2, 3), torch.randn(4, 3, 4)
            for p in ghc.parameters():
                torch.nn.init.normal_(p)
            total = lambda H: ghc(H, torch.tanh).square().sum()
            transforms = [lambda H: torch.func.jvp(total, (H,), (torch.ones_like(H),))[1]]
            transforms += [torch.func.vmap(torch.func.grad(total))] if kind is DynamicGHC else []
            for f in transforms:
                found = torch.compile(f, backend="eager", fullgraph=True)(H)
                assert found.abs().max() > 1
                torch.testing.assert_close(found, f(H), rtol=1e-4, atol=1e-4)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("kind", [GHC, DynamicGHC])
def test_a_tracer_sees_what_is_computed(kind, either_backend, no_shape_checks):
    ghc, H = kind(64, 2, 3, kernels="cpu"), torch.randn(5, 3, 32)
    for p in ghc.parameters():
        torch.nn.init.normal_(p)

    def gradients(H):
        H = H.detach().requires_grad_()
        out = ghc(H, torch.tanh)
        (once,) = torch.autograd.grad(out.square().sum(), H, create_graph=True)
        return out, once, *torch.autograd.grad(once.sin().sum(), H)

    graph = make_fx(gradients)(torch.randn_like(H))
    torch.testing.assert_close(graph(H), gradients(H), rtol=1e-5, atol=1e-4)


def test_an_exported_program_is_loaded_by_another_process(tmp_path, no_shape_checks):
    """By one that has registered the operators."""

    class Sublayer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.ghc = DynamicGHC(8, 2, 3)

        def forward(self, H):
            return self.ghc(H, torch.tanh)

    model, H, path = Sublayer(), torch.randn(5, 3, 4), tmp_path / "ghc.pt2"
    torch.nn.init.normal_(model.ghc.W_alpha)
    torch.export.save(torch.export.export(model, (H,)), path)
    torch.save({"H": H, "out": model(H).detach()}, tmp_path / "values.pt")
    code = f"""
        import torch, vwn_ref.kernels.cpu
        values = torch.load({str(tmp_path / "values.pt")!r})
        torch.testing.assert_close(torch.export.load({str(path)!r}).module()(values["H"]), values["out"])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("kind", [GHC, DynamicGHC])
def test_results_can_be_changed_in_place(kind, either_backend):
    ghc, H = kind(64, 2, 3, kernels="cpu"), torch.randn(5, 3, 32)
    expected = ghc(H, torch.relu) + 1
    found = ghc(H, torch.nn.ReLU(inplace=True))
    found += 1
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    found.sum().backward()
    x, state = ghc.width(H)
    x.mul_(2), state[1].mul_(2)
    torch.testing.assert_close(ghc.depth(x, state), 2 * ghc(H, lambda x: x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [GHC, DynamicGHC])
def test_second_derivative_where_only_the_carry_wants_a_gradient(kind):
    found = []
    for kernels in ("cpu", "reference"):
        torch.manual_seed(0)
        ghc = kind(64, 2, 3, kernels=kernels).double()
        H = torch.randn(5, 3, 32, dtype=torch.float64, requires_grad=True)
        ghc.A.data.normal_()
        ghc.B.requires_grad_(False)
        (once,) = torch.autograd.grad((ghc(H, torch.zeros_like) ** 3).sum(), H, create_graph=True)
        found.append((once, *torch.autograd.grad(once.square().sum(), H)))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_matrices_of_each_token_go_to_the_reference():
    H, A, B = torch.randn(5, 3, 32), torch.randn(5, 3, 5), torch.randn(5, 2, 3)
    x, state = cpu.width(H, A, B)
    torch.testing.assert_close(cpu.depth(x, state), helpers.Reference.depth(*helpers.Reference.width(H, A, B)))


def test_a_sublayer_of_another_dtype_meets_the_reference():
    case = helpers.case(2, 3, 32, (5,), torch.float32)
    _, state = cpu.dynamic_width(*case.inputs, 1e-6)
    _, readable = helpers.Reference.dynamic_width(*case.inputs, 1e-6)
    for functions, s in ((cpu, state), (helpers.Reference, readable)):
        with pytest.raises(RuntimeError, match="Float but found Double"):
            functions.depth(case.z.double(), s)


@pytest.mark.parametrize(
    ("name", "index", "shape", "wanted"),
    [
        ("A", 1, (3, 4), "[n, m+n] = [3, 5]"),
        ("B", 2, (2, 4), "[m, n] = [2, 3]"),
        ("W_alpha", 3, (31, 5), "[d_b, m+n] = [32, 5]"),
        ("W_beta", 4, (32, 3), "[d_b, m] = [32, 2]"),
        ("S_alpha", 5, (5, 3), "[n, m+n] = [3, 5]"),
        ("S_beta", 6, (3, 2), "[m, n] = [2, 3]"),
        ("gain", 7, (1,), "[d_b] = [32]"),
        ("H", 0, (32,), "[..., n, d_b]"),
    ],
)
def test_wrong_shapes_are_named(name, index, shape, wanted):
    inputs = list(helpers.case(2, 3, 32, (5,), torch.float32).inputs)
    inputs[index] = torch.zeros(shape)
    with pytest.raises(ValueError) as error:
        cpu.dynamic_width(*inputs, 1e-6)
    assert str(error.value).startswith(f"{name} has shape {tuple(shape)}: must be") and wanted in str(error.value)


def test_a_wrong_z_is_named():
    case = helpers.case(2, 3, 32, (5,), torch.float32)
    _, state = cpu.dynamic_width(*case.inputs, 1e-6)
    with pytest.raises(ValueError, match=r"z has shape \(4, 64\): must be \[\.\.\., D\] = \[5, 64\]"):
        cpu.depth(case.z[:4], state)


def test_the_seam():
    case = helpers.case(2, 3, 32, (5,), torch.float32)
    assert ops.select("reference") is ops.reference
    chosen = ops.select("cpu")
    assert (chosen.width, chosen.dynamic_width, chosen.depth) == (cpu.width, cpu.dynamic_width, cpu.depth)
    assert isinstance(ops.select("auto").dynamic_width(*case.inputs, 1e-6)[1], cpu.DynamicState)
    with pytest.raises(ValueError, match="kernels = 'fast'"):
        ops.select("fast")


def test_the_backend_by_name(monkeypatch):
    monkeypatch.setenv("VWN_REF_CPU_BACKEND", "torch")
    assert backend.cpu_backend() == "torch"
    monkeypatch.setenv("VWN_REF_CPU_BACKEND", "fortran")
    with pytest.raises(ValueError, match="VWN_REF_CPU_BACKEND = 'fortran'"):
        backend.cpu_backend()
    with pytest.raises(ValueError, match="name = 'fortran'"), backend.cpu_backend_forced("fortran"):
        pass
