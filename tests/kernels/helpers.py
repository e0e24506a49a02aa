"""Random GHCs, and what the reference says about them in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vwn_ref import dynamic, ghc

SHAPES = [(1, 1, 40), (1, 4, 64), (2, 3, 32), (3, 5, 5), (4, 4, 12), (4, 8, 16), (5, 7, 8), (8, 64, 8)]  # m, n, d_b
NAMES = ("H", "A", "B", "W_alpha", "W_beta", "S_alpha", "S_beta", "gain")
EPS = 1e-6


class Case(NamedTuple):
    """Inputs of `dynamic_width`, and what the sublayer returns (z) and its reader sends back (g_x, g)."""

    inputs: tuple[torch.Tensor, ...]
    z: torch.Tensor
    g_x: torch.Tensor
    g: torch.Tensor


def case(m: int, n: int, d: int, lead: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Case:
    """Everything random, nothing at its initial value; W large enough that tanh bends."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).mul(scale).to(dtype)

    k = m + n
    inputs = (
        random(*lead, n, d, scale=2.0), random(n, k), random(m, n), random(d, k), random(d, m),
        random(n, k), random(m, n), random(d),
    )  # fmt: skip
    return Case(inputs, random(*lead, m * d), random(*lead, m * d), random(*lead, n, d))


def run(ops, case: Case, *, static: bool = False) -> dict[str, torch.Tensor]:
    """Outputs of width then depth, and every gradient, with `ops`.

    The gradient at x is case.g_x; the sublayer is x ↦ x + z, so that depth's gradient comes back through x as well.
    """
    inputs = tuple(t.detach().requires_grad_() for t in case.inputs[: 3 if static else None])
    z = case.z.detach().requires_grad_()
    x, state = ops.width(*inputs) if static else ops.dynamic_width(*inputs, EPS)
    H_next = ops.depth(x + z, state)
    gradients = torch.autograd.grad([x, H_next], [*inputs, z], [case.g_x, case.g])
    found = dict(zip((*NAMES[: len(inputs)], "z"), gradients, strict=True))
    return {"x": x.detach(), "H_next": H_next.detach()} | {f"g_{name}": g for name, g in found.items()}


class Reference:
    """The readable functions."""

    width = staticmethod(ghc.width)
    dynamic_width = staticmethod(dynamic.dynamic_width)
    depth = staticmethod(ghc.depth)


def oracle(case: Case, *, static: bool = False) -> dict[str, torch.Tensor]:
    """`run` of the reference in float64."""
    doubled = Case(tuple(t.double() for t in case.inputs), case.z.double(), case.g_x.double(), case.g.double())
    return run(Reference, doubled, static=static)


def assert_close(found: dict, wanted: dict, tolerance: float) -> None:
    """Root-mean-square error of each tensor against the root mean square of what is wanted, and no NaN.

    A parameter's gradient is a sum over tokens and d_b of terms of size one: it is measured against the square root of
    their number at least, which is its size unless they happen to cancel.
    """
    assert found.keys() == wanted.keys()
    terms = wanted["g_H"][..., 0, :].numel()
    for name, exact in wanted.items():
        assert found[name].shape == exact.shape, name
        if exact.numel():
            least = 1e-30 if name in ("x", "H_next", "g_H", "g_z") else max(terms, 1) ** 0.5
            scale = exact.square().mean().sqrt().clamp_min(least)
            error = ((found[name].double() - exact).square().mean().sqrt() / scale).item()
            assert error < tolerance, f"{name}: relative error {error:.2e}, at most {tolerance:.0e} allowed"
