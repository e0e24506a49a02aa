"""§3.5: the formulas against operations counted one by one, against torch's flop counter, against real models."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from fractions import Fraction

import oracle
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vwn_ref import cost
from vwn_ref.config import VWNConfig
from vwn_ref.dynamic import DynamicGHC
from vwn_ref.ghc import GHC
from vwn_ref.model import VWNTransformer
from vwn_ref.mtp import BlockLinear

SIZES = [(1, 1), (1, 4), (2, 3), (3, 5), (4, 4), (4, 8), (8, 64)]


# ----------------------------------------------------------------------------------- the paper's words


def test_worked_example():
    D = 2048
    flops = {part: Fraction(f.total, D) for part, f in cost.ghc_flops(D, 2, 3).items()}
    assert flops == {"norm": 6, "coefficients": 21, "width": 15, "depth": 6}
    assert flops["norm"] + flops["coefficients"] + flops["width"] == 42
    assert cost.activation_bytes(D, 2, 3) == 10 * D
    assert cost.activation_bytes(D, 2, 3, eta=0.5) == 3 * D
    share = cost.activation_bytes(D, 2, 3, eta=0.5) / (cost.PLAIN_ACTIVATION_BYTES * D)
    assert round(float(share), 3) == 0.088


@pytest.mark.parametrize(("m", "n"), SIZES)
def test_formulas_as_printed(m, n):
    D, r = 8 * 3 * 5, Fraction(n, m)
    f = cost.ghc_flops(D, m, n)
    assert f["norm"].total == 4 * r * D
    assert f["coefficients"].total == Fraction(2 * (2 * m + n) * n, m) * D
    assert f["width"].total == Fraction(2 * (m + n) * n, m) * D
    assert f["depth"].total == 2 * n * D
    assert cost.activation_bytes(D, m, n) == 2 * 2 * (r + 1) * D
    for eta in (0, Fraction(1, 2), 1):
        assert cost.activation_bytes(D, m, n, eta=eta) == 4 * eta * r * D


def test_what_the_notes_say():
    D = 2048
    total = sum(f.total for f in cost.ghc_flops(D, 8, 64).values())
    assert total == 2592 * D
    assert round(2 * total / (24 * D * D), 3) == 0.105
    # 4D between the two formulas for memory, at η = 1: the inputs of B
    assert cost.activation_bytes(D, 2, 3) - cost.activation_bytes(D, 2, 3, eta=1) == 4 * D


# ------------------------------------------------------------------------------- operations one by one


class Counted:
    """A number that counts what is done to it; `oracle.py` runs on these as it does on floats."""

    operations = 0

    def __init__(self, value):
        self.value = float(value)

    def _do(self, result):
        Counted.operations += 1
        return Counted(result)

    def __add__(self, other):
        return self._do(self.value + float(other))

    def __mul__(self, other):
        return self._do(self.value * float(other))

    def __truediv__(self, other):
        return self._do(self.value / float(other))

    __radd__, __rmul__ = __add__, __mul__

    def __float__(self):
        return self.value


def counted(*shape):
    if not shape:
        return Counted(random.uniform(0.5, 1.5))
    return [counted(*shape[1:]) for _ in range(shape[0])]


def operations(function, *args, monkeypatch):
    """How many additions, multiplications, divisions, roots and tanh `function` takes."""

    def unary(f):
        def g(x):
            Counted.operations += 1
            return Counted(f(float(x)))

        return g

    monkeypatch.setattr(oracle, "tanh", unary(math.tanh))
    monkeypatch.setattr(oracle, "sqrt", unary(math.sqrt))
    Counted.operations = 0
    function(*args)
    return Counted.operations


@pytest.mark.parametrize("d", [1, 4, 7])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 4), (2, 3), (3, 5), (4, 4)])
def test_formulas_equal_the_operations_of_the_loops(m, n, d, monkeypatch):
    """Exactly, with what the paper leaves out written out. `oracle.dot` of k terms takes k additions, one onto 0."""
    D, f = m * d, cost.ghc_flops(m * d, m, n)
    H, p = counted(n, d), oracle.Parameters(counted(n, m + n), counted(m, n))
    p.W_alpha, p.W_beta, p.S_alpha, p.S_beta = counted(d, m + n), counted(d, m), counted(n, m + n), counted(m, n)
    p.gain = counted(d)

    def count(function, *args):
        return operations(function, *args, monkeypatch=monkeypatch)

    norm = count(lambda: [oracle.norm(row, p.gain, 1e-6) for row in H])
    assert norm == f["norm"].total + 3 * n  # mean, ε and root, once a slot
    coefficients = count(oracle.dynamic_matrices, H, p, 1e-6) - norm
    assert coefficients == f["coefficients"].total + 4 * n * (2 * m + n)  # τ, tanh, S, static
    assert count(oracle.width_of_token, H, p.A, p.B) == f["width"].total
    depth = count(oracle.depth_of_token, counted(D), p.B, counted(n, d))
    assert depth == f["depth"].total + n * d  # the additions onto 0, which nobody does: so 2nD is exact
    _, carried = oracle.width_of_token(H, p.A, p.B)
    assert depth == f["depth"].total + len(carried) * len(carried[0])


# ---------------------------------------------------------------------------------- torch's flop counter


def measured(function) -> int:
    """Products as torch sees them, in the attention that is made of two plain ones."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


@torch.no_grad()
@pytest.mark.parametrize("cls", [GHC, DynamicGHC])
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_ghc_matmuls_equal_torchs_count(cls, m, n):
    dim, tokens = m * 4, 5
    ghc = cls(dim, m, n, kernels="reference")
    H, z = torch.randn(tokens, n, 4), torch.randn(tokens, dim)
    parts = cost.ghc_flops(dim, m, n, dynamic=cls is DynamicGHC)
    if m == 1:
        del parts["depth"]  # a product over one term, which torch does not count as one
    if n == 1:
        del parts["width"]
    assert measured(lambda: ghc(H, lambda x: z)) == tokens * cost.add(*parts.values()).matmul


@torch.no_grad()
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_block_linear(m, n):
    dim = m * 4
    H = torch.randn(5, n, 4)
    mix = BlockLinear(dim, m)
    assert measured(lambda: mix(H, H)) == 5 * 4 * n * 4 * 4
    assert 4 * n * 4 * 4 == Fraction(4 * n * dim * dim, m * m)  # 4rD²/m, by the factor r·m under the dense 4r²D²


CONFIGS = {
    "plain": {},
    "2,3": {"m": 2, "n": 3},
    "1,1": {"m": 1, "n": 1},
    "2,2": {"m": 2, "n": 2},
    "static": {"m": 2, "n": 3, "dynamic": False},
    "4,8": {"m": 4, "n": 8},
    "8,64": {"m": 8, "n": 64, "embed_rank": 32},
    "no group norm": {"m": 4, "n": 8, "reduce_norm": False},
    "low rank": {"m": 4, "n": 8, "embed_rank": 12},
    "n-grams": {"m": 2, "n": 3, "ngram_buckets": 20},
    "n-grams, low rank": {"m": 2, "n": 4, "ngram_buckets": 20, "embed_rank": 12},
    "n-grams, plain": {"ngram_buckets": 20},
    "ffn": {"m": 2, "n": 4, "ffn_dim": 50},
    "moe": {"m": 4, "n": 8, "n_experts": 5, "top_k": 2},
    "moe, plain": {"n_experts": 3, "top_k": 1},
    "mtp": {"m": 2, "n": 3, "mtp_layers": 1},
    "mtp, plain": {"mtp_layers": 2},
    "all": {"m": 4, "n": 8, "n_experts": 4, "mtp_layers": 2, "ngram_buckets": 9, "embed_rank": 16, "ffn_dim": 24},
}


def config(name: str) -> VWNConfig:
    return VWNConfig(vocab_size=61, dim=32, n_layers=2, n_heads=4, kernels="reference", **CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_equal_the_models(name):
    cfg = config(name)
    model, parts = VWNTransformer(cfg), cost.model_parameters(cfg)

    def size(module):
        return 0 if module is None else sum(p.numel() for p in module.parameters())

    assert sum(parts.values()) == size(model)
    assert parts["embedding"] + parts["n-grams"] + parts["expand"] == size(model.embedding)
    assert parts["attention"] + parts["ffn"] + parts["norms"] == size(model.sublayers)
    assert parts["connections"] == size(model.connections)
    for part in ("reduce", "unembedding", "mtp"):
        assert parts[part] == size(getattr(model, part)), part
    assert parts["final norm"] == size(model.norm)


def test_active_parameters():
    cfg = config("moe")
    everything, active = cost.model_parameters(cfg), cost.model_parameters(cfg, active=True)
    expert = 3 * cfg.dim * cfg.ffn_width
    assert everything.pop("ffn") - active.pop("ffn") == cfg.n_layers * (5 - 2) * expert
    assert everything == active
    assert cost.model_parameters(config("all"), active=True)["mtp"] < cost.model_parameters(config("all"))["mtp"]


def matmuls(flops: dict[str, cost.Flops], *without: str) -> int:
    return sum(f.matmul for part, f in flops.items() if part not in without)


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"1,1"}))  # torch counts no product over one term
def test_matmuls_of_a_forward_equal_torchs_count(name):
    cfg, b, t = config(name), 2, 7
    model, flops = VWNTransformer(cfg), cost.model_flops(cfg, t)
    tokens = torch.randint(61, (b, t))
    assert measured(lambda: model(tokens)) == b * t * matmuls(flops, "mtp")
    if model.mtp is not None:
        H = model.embedding(tokens)
        found = measured(lambda: model.unembedding(model.mtp(H, H)))
        assert found == b * t * flops["mtp"].matmul


@pytest.mark.parametrize("name", ["plain", "2,3", "4,8", "8,64", "moe", "low rank", "static"])
def test_backward_is_twice_forward(name):
    """By torch's count, of products: a training step is 1 + BACKWARD forward passes."""
    cfg, b, t = config(name), 2, 7
    model, flops = VWNTransformer(cfg), cost.model_flops(cfg, t)
    tokens = torch.randint(61, (b, t))
    total = measured(lambda: model(tokens).sum().backward())
    assert total == (1 + cost.BACKWARD) * b * t * matmuls(flops, "mtp")


def test_elementwise_parts_by_hand():
    cfg = config("all")
    D, wide, layers = 32, 64, 2
    flops = {part: f.elementwise for part, f in cost.model_flops(cfg, 7).items()}
    assert flops["norms"] == layers * 2 * 4 * D
    assert flops["connections"] == layers * 2 * 4 * wide
    assert flops["reduce"] == 7 * wide
    assert flops["embedding"] == 2 * 16
    assert flops["mtp"] == 2 * 4 * wide + 2 * (2 * 4 * D + 2 * 4 * wide) + 7 * wide + 4 * D
    assert cost.model_flops(config("plain"), 7)["connections"] == cost.Flops(0, layers * 2 * D)


def test_ratio_to_plain():
    cfg = VWNConfig(vocab_size=32_000, dim=2048, n_layers=24, n_heads=16, m=2, n=3, embed_rank=2048)
    ratio = cost.ratio_to_plain(cfg, 4096)
    flops, flops_0 = (sum(cost.model_flops(c, 4096).values(), cost.Flops()).total for c in (cfg, cost.plain(cfg)))
    size, size_0 = (sum(cost.model_parameters(c).values()) for c in (cfg, cost.plain(cfg)))
    assert ratio == (flops / flops_0, size / size_0) and 1 < ratio.flops < 1.01 and 1 < ratio.parameters < 1.01
    wide = cost.ratio_to_plain(VWNConfig(vocab_size=32_000, dim=2048, n_layers=24, n_heads=16, m=8, n=64), 4096)
    assert wide.flops > 1.08  # not "nearly constant"
    same = cost.ratio_to_plain(cost.plain(cfg), 4096)
    assert same == (1, 1)
    assert cost.plain(cfg).is_plain and cost.plain(cfg).dim == 2048
    assert cost.plain(replace(cfg, n=4, reduce_norm=True)) == cost.plain(cfg)


# ------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize(("m", "n"), SIZES)
def test_kernel_traffic(m, n):
    D, slot = m * 4, 4

    def slots(fusion):
        return sum(t.total for t in cost.kernel_traffic(D, m, n, fusion=fusion).values()) // slot

    assert slots("separate") == 2 * m + 4 * n
    assert slots("recompute") == 2 * m + 3 * n
    assert slots("step") == 2 * m + 2 * n
    assert cost.kernel_traffic(D, m, n)["step"].total == 2 * (Fraction(n, m) + 1) * D


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cost.ghc_flops(8, 3, 3), "m = 3: must divide dim = 8"),
        (lambda: cost.ghc_parameters(8, 2, 1), "n = 1: must be ≥ m = 2"),
        (lambda: cost.activation_bytes(8, 2, 3, eta=1.5), "eta = 1.5: must be ≤ 1"),
        (lambda: cost.activation_bytes(8, 2, 3, eta=-1), "eta = -1.0: must be a finite number ≥ 0"),
        (lambda: cost.activation_bytes(8, 2, 3, eta="0.5"), "eta = '0.5': must be a finite number ≥ 0"),
        (lambda: cost.activation_bytes(8, 2, 3, eta=True), "eta = True: must be a finite number ≥ 0"),
        (lambda: cost.kernel_traffic(8, 2, 1), "n = 1: must be ≥ m = 2"),
        (lambda: cost.kernel_traffic(8, 2, 3, fusion="all"), "fusion = 'all': must be one of 'separate'"),
        (lambda: cost.model_flops(config("plain"), 0), "seq_len = 0: must be an integer ≥ 1"),
    ],
)
def test_refused(call, message, no_shape_checks):
    with pytest.raises(ValueError) as raised:
        call()
    assert message in str(raised.value)


def test_what_has_no_additions_counts_none():
    """No n-gram rows to add; no GroupNorm where r = 3/2."""
    without = cost.model_flops(VWNConfig(vocab_size=61, dim=32, n_heads=4, m=2, n=3), 8)
    assert without["embedding"] == cost.Flops() and without["reduce"] == cost.Flops(2 * 32 * 48, 0)
    assert cost.model_flops(VWNConfig(vocab_size=61, dim=32, n_heads=4), 8)["reduce"] == cost.Flops()


def test_dynamic_where_nothing_is_said():
    """As `VWNConfig` and the classes have it."""
    assert cost.ghc_parameters(8, 2, 3) == cost.ghc_parameters(8, 2, 3, dynamic=True)
    assert sum(cost.ghc_parameters(8, 2, 3).values()) == sum(p.numel() for p in DynamicGHC(8, 2, 3).parameters())
    assert cost.ghc_flops(8, 2, 3)["norm"].total > 0 == cost.ghc_flops(8, 2, 3, dynamic=False)["norm"].total


def test_sum_of_flops():
    parts = [cost.Flops(1, 2), cost.Flops(3, 4)]
    assert sum(parts, cost.Flops()) == parts[0] + parts[1] == cost.add(*parts) == cost.Flops(4, 6)
    assert cost.add() == cost.Flops()
