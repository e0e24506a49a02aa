"""The exercises refuse wrong answers, the ones that are easily made, and take right ones of another style."""

import ast
import json
import os
import re
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


@cache
def code_cells(number: str) -> list[str]:
    (path,) = NOTEBOOKS.glob(f"{number}_*.ipynb")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def exercise(number: str, name: str) -> tuple[int, str]:
    """The cell that asks for the function `name`, and the line in it to be replaced; "" where it is in another cell."""
    for i, cell in enumerate(code_cells(number)):
        stub = re.search(rf"^def {name}\(.*\.\.\.$", cell, re.M)
        if stub or f"check(scaled({name})" in cell:
            return i, stub.group() if stub else ""
    raise ValueError(f"{name}: no exercise of lesson {number}")


@pytest.fixture
def answer(monkeypatch, capsys, tmp_path):
    """(lesson, answer in Python) -> what the checker prints. Of the cells before the exercise imports, functions and
    classes are run, assignments to the names in `NEEDS`, and what sets PyTorch's defaults."""
    before = torch.get_default_dtype(), torch.is_grad_enabled()
    monkeypatch.chdir(NOTEBOOKS)
    monkeypatch.syspath_prepend(NOTEBOOKS)

    def run(number: str, text: str) -> str:
        if number == "06":
            pytest.importorskip("triton", reason="Triton is not installed")
        if "@triton.jit" in text and os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("kernels are compiled here, not interpreted")
        (name,) = (node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef))
        cells = code_cells(number)
        at, stub = exercise(number, name)
        kept = []
        for node in (node for cell in cells[:at] for node in ast.parse(cell).body):
            names = {target.id for x in getattr(node, "targets", ()) for target in ast.walk(x) if hasattr(target, "id")}
            defined = isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef)
            if defined or names & NEEDS.get(number, set()) or ast.unparse(node).startswith("torch.set_"):
                kept.append(ast.unparse(node))
        file = tmp_path / "cells.py"  # Triton wants the source of its kernels
        file.write_text("\n".join([*kept, text, cells[at].replace(stub, "")]), encoding="utf-8")
        capsys.readouterr()
        exec(compile(file.read_text(encoding="utf-8"), str(file), "exec"), {"__name__": "lesson"})
        return capsys.readouterr().out

    yield run
    plt.close("all")
    torch.set_default_dtype(before[0])
    torch.set_grad_enabled(before[1])


KERNEL = """@triton.jit
def scale_kernel(X, factor, Y, T, K: tl.constexpr, KP: tl.constexpr):
    t, k = tl.program_id(0) * 4 + tl.arange(0, 4)[:, None], tl.arange(0, KP)[None, :]
    x = tl.load(X + t * K + k, mask={x}, other=0.0)
    f = tl.load(factor + t, mask={f}, other=0.0)
    tl.store(Y + t * K + k, x * f, mask={y})
"""
WRONG = [
    ("00", "def widths_of(dim, m, n): return dim * (n // m), dim // m, n / m"),
    ("00", "def eq10(H, A, B, layer): return B.T @ layer(H[:2].flatten()).view(len(B), -1) + A[:, len(B):].T @ H"),
    ("01", "def my_slots(e, n): return e.reshape(*e.shape[:-1], -1, n).mT"),
    ("01", "def my_reduce(H, W, r): g = H.flatten(-2).unflatten(-1, (r, -1)); g = g - g.mean(-1, keepdim=True); "
           "return (g / g.square().mean(-1, keepdim=True).sqrt()).flatten(-2) @ W.T"),  # no ε
    ("01", "def my_reduce(H, W, r): g = H.flatten(-2).unflatten(-1, (r, -1)); "
           "return F.layer_norm(g, g.shape[-1:]).flatten(-2) @ W.T"),  # another ε
    ("01", "def my_reduce(H, W, r): h = H.reshape(-1, W.shape[1]); "
           "return (torch.nn.functional.group_norm(h, r, eps=1e-6) @ W.T).squeeze(0)"),  # one leading axis at most
    ("02", "def my_width(H, A, m): M = A.mT @ H; return M[..., :m, :].reshape(*H.shape[:-2], 6 * m), M[..., m:, :]"),
    ("02", "def my_initial_values(m, n): A = torch.eye(n, m + n); A[:, m:] = torch.eye(n); "
           "return A, torch.eye(m).repeat_interleave(-(-n // m), 1)[:, :n]"),
    ("03", "def my_norm(H, gain, eps): return gain * H / (H.square().sum(-1, keepdim=True) / 4 + eps).sqrt()"),
    ("03", "def my_B(H, ghc): s = ghc.norm(H) @ ghc.W_beta / math.sqrt(ghc.slot_width); "
           "return ghc.S_beta * torch.tanh(s).transpose(1, 2) + ghc.B"),
    ("03", "@torch.no_grad()\ndef my_B(H, ghc): "
           "s = torch.rms_norm(H, H.shape[-1:], ghc.norm.weight, 1e-20) @ ghc.W_beta / math.sqrt(ghc.slot_width); "
           "return ghc.S_beta * torch.tanh(s).mT + ghc.B"),  # no ε
    ("04", "def my_carry(As, n, layer, s):\n    M = torch.eye(n)\n    for A in As[s:layer]: M = A[:, 2:].T @ M\n"
           "    return M"),
    ("04", "def my_reach(rho, fraction, L): return min(L - 1, math.ceil(math.log(fraction) / math.log(rho)))"),
    ("05", "def mix_slots(H, E, W): return H @ W[:, :4].T + E @ W[:, 4:].T"),
    ("05", "def next2_loss(model, tokens):\n    *_, H, _ = model.states(tokens)\n    E = model.embedding(tokens)\n"
           "    logits = model.unembedding(model.mtp(H[:, :-2], E[:, 1:-1]))\n"
           "    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 2:].flatten()).detach()"),
    ("05", "def most_slots(m, budget): n = math.floor(budget * m * m); return n if n > m else 0"),
    ("06", "def my_bytes(D, m, n): return 2 * 2 * (n + m) * D // m + 2 * n * (2 * m + n)"),
    ("06", "def my_warps(registers, warps): return warps * min(4 * min(16384 // (32 * registers), 16) // warps, 32)"),
    ("06", "def my_warps(registers, warps): "
           "return warps * min(4 * (16384 // (256 * math.ceil(registers / 8))) // warps, 32)"),
    ("06", "def my_warps(registers, warps): "
           "return min(4 * min(16384 // (256 * math.ceil(registers / 8)), 16), 32 * warps)"),
    ("06", KERNEL.format(x="(t < T) & (k < K)", f="t <= T", y="(t < T) & (k < K)")),
    ("06", KERNEL.format(x="(t <= T) & (k < K)", f="t <= T", y="(t < T) & (k < K)")),
    ("06", KERNEL.format(x="t < T", f="t < T", y="(t < T) & (k < K)")),
    ("07", "def paired_interval(model, base): return tuple(interval([model[s] - base[s] for s in base]))"),
    ("07", "def paired_interval(model, base): "
           "return tuple(interval([model[s] - base[s] for s in range(min(len(model), len(base)))]))"),
    ("07", "def predict(r, losses, r_new): return tuple(interval("
           "[np.polyval(np.polyfit(range(len(r)), row, 1), np.log2(r_new)) for row in losses]))"),
    ("08", "def parameters_of_ghc(dim, m, r): n, d = r * m, dim // m; return 2 * n * (n + 2 * m) + d * (n + 2 * m)"),
    ("08", "def seeds_needed(sd, effect):\n    S = max(2, np.ceil((1.96 * sd / effect) ** 2))\n"
           "    for _ in range(5): S = max(2, np.ceil((stats.t.ppf(0.975, S - 1) * sd / effect) ** 2))\n    return S"),
    ("09", "def my_scaled_residual(a, b, c): return [[c, a]], [[0 if a == 1 else 1 / a]]"),
    ("09", "def my_scaled_residual(a, b, c): return a, b, c"),
    ("09", "def my_scaled_residual(a, b, c): return torch.tensor([[a, c]]), torch.tensor([[b]])"),
    ("09", "def my_prediction(carry, g, j): return carry.T + torch.outer(g, carry[:, j])"),
]  # fmt: skip
RIGHT = [
    ("00", "def widths_of(dim, m, n): import numpy as np; return np.array([dim * n / m, dim / m, n / m])"),
    ("02", "def my_width(H, A, m): M = torch.einsum('...nk,...nd->...kd', A.double(), H.double()).numpy(); "
           "return M[..., :m, :].reshape(*M.shape[:-2], -1), M[..., m:, :]"),
    ("07", "def paired_interval(model, base):\n    for s in set(model) - set(base): model.pop(s)\n"
           "    return np.array(interval([x - base[s] for s, x in model.items()]))"),
    ("07", "def predict(r, losses, r_new): losses += 0; "
           "return tuple(interval([np.polyval(np.polyfit(np.log2(r), row, 1), np.log2(r_new)) for row in losses]))"),
    ("09", "def my_scaled_residual(a, b, c): return [[c, a]], [[b]]"),
    ("09", "def my_parallel(): return [[1, 1, 0], [0, 0, 1]], [[0, 1]], [[1, 0, 0], [0, 1, 1]], [[1, 1]]"),
]  # fmt: skip
NEEDS = {"03": {"kept"}, "05": {"V", "cfg", "model"}, "07": {"DATA", "STUDY", "study", "runs"}, "09": {"READABLE"}}


def solutions() -> list[tuple[str, str]]:
    """Of every lesson, with the exercise's name."""
    found = []
    for number in (f"{i:02}" for i in range(10)):
        for cell in code_cells(number):
            for node in ast.parse(cell).body:
                if isinstance(node, ast.FunctionDef) and node.name.endswith("_solution"):
                    node.name = node.name.removesuffix("_solution")
                    found.append((number, ast.unparse(node)))
    return found


@pytest.mark.parametrize(("number", "text"), [*solutions(), *RIGHT])
def test_a_right_answer_is_taken(answer, number, text):
    """The solutions, too: so that a wrong answer is not refused for something else."""
    assert answer(number, text).startswith("✓ correct in all ")


@pytest.mark.parametrize(("number", "text"), WRONG)
def test_a_wrong_answer_is_refused(answer, number, text):
    said = answer(number, text)
    assert said.startswith("✗ case ") and "NameError" not in said, said
