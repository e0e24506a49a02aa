"""What storing tensors in bfloat16 does by itself: `python tests/kernels/rounding.py` prints it for some shapes.

The reference in float64, its tensors and their gradients rounded where tensors lie between operations, and nowhere
else. (A kernel may round less: that of a step's gradient keeps the one of the state between in registers, for few
slots.)
"""

from __future__ import annotations

import argparse

import test_triton_values as values
import torch
from torch import Tensor

from vwn_ref import ghc


class Stored(torch.autograd.Function):
    """As bfloat16, and so is its gradient."""

    @staticmethod
    def forward(ctx, t: Tensor) -> Tensor:
        return t.to(torch.bfloat16).to(t.dtype)

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return g.to(torch.bfloat16).to(g.dtype)


class Rounded:
    """`enter`, `step`, `last` and `depth` of `fused`, in exact arithmetic."""

    @staticmethod
    def enter(H, parameters, eps, norm):
        x, state = values.Reference.enter(H, parameters, eps, norm)
        return Stored.apply(x), state

    @staticmethod
    def step(z, state, parameters, eps, norm):
        return Rounded.enter(Stored.apply(ghc.depth(z, state)), parameters, eps, norm)

    @staticmethod
    def last(z, state, norm):
        return Stored.apply(values.Reference.last(z, state, norm))

    @staticmethod
    def depth(z, state):
        return Stored.apply(ghc.depth(z, state))


def errors(m: int, n: int, d: int, tokens: int, draw: int = 0) -> dict[str, float]:
    """Of each output and gradient of two sublayers, measured as the tests do; `draw` chooses other inputs."""
    plain = values.random
    values.random = lambda *shape, seed=0, scale=1.0: plain(*shape, seed=seed + 1000 * draw, scale=scale)
    try:
        case, groups = (m, n, d, (tokens,), torch.bfloat16), n % m == 0
        found, wanted = (values.two_sublayers(ops, *case, groups=groups) for ops in (Rounded, values.Reference))
    finally:
        values.random = plain
    return {name: values.relative_error(name, found[name], wanted[name], tokens) for name in wanted}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=4, help="for each shape, default %(default)s")
    asked = parser.parse_args()
    for shape in (
        (1, 2, 2048, 1021),
        (1, 2, 4096, 1021),
        (1, 2, 8192, 1021),
        (2, 2, 2048, 1021),
        (2, 3, 512, 1021),
        (4, 8, 128, 1021),
    ):
        for draw in range(asked.draws):
            found = errors(*shape, draw)
            worst = sorted(found, key=found.get)[:-4:-1]
            print(shape, draw, *(f" {name} {found[name]:.1e}" for name in worst), flush=True)
