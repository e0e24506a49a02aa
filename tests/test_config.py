"""VWNConfig: every inconsistent choice is refused with the field, its value and what it must be."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
from fractions import Fraction

import numpy as np
import pytest

from vwn_ref.config import VWNConfig, check_choice, check_float, check_int, check_widths

VWN = {"vocab_size": 100, "m": 2, "n": 3}
PLAIN = {"vocab_size": 100}

INTEGERS_FROM_ONE = ("vocab_size", "dim", "n_layers", "n_heads", "top_k", "max_seq_len")
INTEGERS_FROM_ZERO = ("ngram_buckets", "n_experts", "mtp_layers")
INTEGERS_OR_NONE = ("embed_rank", "ffn_dim")
FLOATS_FROM_ZERO = ("balance_weight", "mtp_weight")
FLOATS_ABOVE_ZERO = ("rope_theta", "norm_eps", "embed_std", "init_std")

REFUSED = [
    *[(VWN, {f: v}, f"{f} = {v}: must be an integer ≥ 1") for f in INTEGERS_FROM_ONE for v in (0, -1)],
    *[(VWN, {f: -1}, f"{f} = -1: must be an integer ≥ 0") for f in INTEGERS_FROM_ZERO],
    *[(VWN, {f: v}, f"{f} = {v}: must be an integer ≥ 1") for f in INTEGERS_OR_NONE for v in (0, -4)],
    *[(VWN, {f: -0.5}, f"{f} = -0.5: must be a finite number ≥ 0") for f in FLOATS_FROM_ZERO],
    *[(VWN, {f: float("nan")}, f"{f} = nan: must be a finite number ≥ 0") for f in FLOATS_FROM_ZERO],
    *[(VWN, {f: float("inf")}, f"{f} = inf: must be a finite number") for f in FLOATS_FROM_ZERO],
    *[(VWN, {f: 0.0}, f"{f} = 0.0: must be a finite number > 0") for f in FLOATS_ABOVE_ZERO],
    *[(VWN, {f: -1.0}, f"{f} = -1.0: must be a finite number > 0") for f in FLOATS_ABOVE_ZERO],
    *[(VWN, {f: float("inf")}, f"{f} = inf: must be a finite number") for f in FLOATS_ABOVE_ZERO],
    (VWN, {"n_heads": 5}, "n_heads = 5: must divide dim = 64"),
    (VWN, {"n_heads": 64}, "n_heads = 64: dim/n_heads = 1 must be even"),
    (VWN, {"dim": 12, "n_heads": 4}, "n_heads = 4: dim/n_heads = 3 must be even"),
    (VWN, {"n_experts": 2, "top_k": 3}, "top_k = 3: must be ≤ n_experts = 2"),
    (VWN, {"m": None}, "m = None, n = 3: give both, or neither"),
    (VWN, {"n": None}, "m = 2, n = None: give both, or neither"),
    (VWN, {"m": 0}, "m = 0: must be an integer ≥ 1"),
    (VWN, {"m": 3}, "m = 3: must divide dim = 64"),
    (VWN, {"m": 4}, "n = 3: must be ≥ m = 4"),
    (VWN, {"n": 0}, "n = 0: must be an integer ≥ 1"),
    (VWN, {"n": -3}, "n = -3: must be an integer ≥ 1"),
    (VWN, {"reduce_norm": True}, "reduce_norm = True: r = n/m = 3/2 must be an integer"),
    (PLAIN, {"reduce_norm": True}, "reduce_norm = True: must be None or False where m = n = None"),
    (PLAIN, {"embed_rank": 8}, "embed_rank = 8: must be None where m = n = None"),
]


@pytest.mark.parametrize(("base", "change", "message"), REFUSED)
def test_refused(base, change, message):
    VWNConfig(**base)  # the base itself is accepted
    with pytest.raises(ValueError) as raised:
        VWNConfig(**base | change)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: check_int("dim", 64.0), "dim = 64.0: must be an integer ≥ 1"),
        (lambda: check_int("dim", True), "dim = True: must be an integer ≥ 1"),
        (lambda: check_int("dim", np.int64(64)), "dim = np.int64(64): must be a Python int ≥ 1"),
        (lambda: check_int("dim", "64"), "dim = '64': must be an integer ≥ 1"),
        (lambda: check_int("n_experts", None, least=0), "n_experts = None: must be an integer ≥ 0"),
        (lambda: check_float("mtp_weight", "a"), "mtp_weight = 'a': must be a finite number ≥ 0"),
        (lambda: check_float("norm_eps", True, above=True), "norm_eps = True: must be a finite number > 0"),
        (lambda: check_float("std", np.float32(0.3)), "std = np.float32(0.3): must be a Python int or float ≥ 0"),
        (lambda: check_float("norm_eps", None), "norm_eps = None: must be a finite number ≥ 0"),
        (lambda: check_choice("kernels", "cuda", ("auto", "cpu")), "kernels = 'cuda': must be one of 'auto', 'cpu'"),
        (lambda: check_choice("kernels", 1, ("auto",)), "kernels = 1: must be one of 'auto'"),
        (lambda: check_choice("kernels", ["auto"], ("auto",)), "kernels = ['auto']: must be one of 'auto'"),
        (lambda: check_widths(8, 3, 3), "m = 3: must divide dim = 8"),
        (lambda: check_widths(8, 2, 1), "n = 1: must be ≥ m = 2"),
    ],
)
def test_checks(check, message, no_shape_checks):
    with pytest.raises(ValueError) as raised:
        check()
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": None}, "vocab_size = None: must be an integer ≥ 1"),
        ({"dim": 64.0}, "dim = 64.0: must be an integer ≥ 1"),
        ({"n_layers": True}, "n_layers = True: must be an integer ≥ 1"),
        ({"n": 3.0}, "n = 3.0: must be an integer ≥ 1"),
        ({"embed_rank": "full"}, "embed_rank = 'full': must be an integer ≥ 1"),
        ({"mtp_weight": "0.3"}, "mtp_weight = '0.3': must be a finite number ≥ 0"),
        ({"embed_std": None}, "embed_std = None: must be a finite number > 0"),
        ({"dynamic": 1}, "dynamic = 1: must be True or False"),
        ({"dynamic": None}, "dynamic = None: must be True or False"),
        ({"reduce_norm": "yes"}, "reduce_norm = 'yes': must be True or False"),
        ({"kernels": "cuda"}, "kernels = 'cuda': must be one of 'auto', 'reference', 'cpu', 'triton'"),
        ({"kernels": None}, "kernels = None: must be one of"),
        ({"reduce_init": "zero"}, "reduce_init = 'zero': must be one of 'mean', 'first', 'random'"),
    ],
)
def test_wrong_types_and_names(change, message, no_shape_checks):
    with pytest.raises(ValueError) as raised:
        VWNConfig(**VWN | change)
    assert message in str(raised.value)


def test_every_field_is_checked_or_free_on_purpose():
    """A field added to VWNConfig must be given a refused value here."""
    tested = {name for base, change, _ in REFUSED for name in change} | {"dynamic", "kernels", "reduce_init"}
    assert tested == {f.name for f in dataclasses.fields(VWNConfig)}


def test_every_field_says_what_it_means():
    body = ast.parse(inspect.getsource(VWNConfig)).body[0].body
    for here, after in itertools.pairwise(body):
        if isinstance(here, ast.AnnAssign):
            assert isinstance(after, ast.Expr) and isinstance(after.value.value, str), here.target.id


@pytest.mark.parametrize(
    ("m", "n", "r", "over_width", "slot_width"),
    [
        (None, None, Fraction(1), 64, 64),
        (1, 1, Fraction(1), 64, 64),
        (2, 3, Fraction(3, 2), 96, 32),
        (4, 4, Fraction(1), 64, 16),
        (8, 64, Fraction(8), 512, 8),
        (16, 25, Fraction(25, 16), 100, 4),
    ],
)
def test_derived_widths(m, n, r, over_width, slot_width):
    cfg = VWNConfig(vocab_size=10, dim=64, m=m, n=n)
    assert (cfg.r, cfg.over_width, cfg.slot_width) == (r, over_width, slot_width)
    assert cfg.is_plain == (m is None)
    assert cfg.over_width == (n or 1) * cfg.slot_width


def test_derived_sizes():
    cfg = VWNConfig(vocab_size=10, dim=64, n_layers=3)
    assert cfg.n_sublayers == 6
    assert cfg.ffn_width == 176  # 8/3 · 64 = 170.7, up to a multiple of 8
    assert VWNConfig(vocab_size=10, dim=48).ffn_width == 128  # exact
    assert VWNConfig(vocab_size=10, ffn_dim=100).ffn_width == 100


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        VWNConfig(vocab_size=10).dim = 3


def test_to_dict_through_json_gives_it_back():
    cfg = VWNConfig(vocab_size=10, m=2, n=3, n_experts=4, mtp_layers=1, ffn_dim=100)
    assert VWNConfig(**json.loads(json.dumps(cfg.to_dict()))) == cfg


def test_top_k_is_free_where_there_are_no_experts():
    assert VWNConfig(vocab_size=10, n_experts=0, top_k=7).top_k == 7
