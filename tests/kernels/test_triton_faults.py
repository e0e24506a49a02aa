"""Faults planted in the Triton kernels: each must turn the comparison with the reference red.

A fault is a change of the source of one kernel file. The changed files are loaded beside the real ones, and their
kernels put in the place of those that `fused` launches, so that the comparison is the one of test_triton_values.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import test_triton_values as values
import torch
from vwn_ref.kernels import fused, launch

# In the order in which they stand on each other
FILES = ("tiles", "projections", "rows", "few", "many", "width", "depth", "step", "last", "weights", "finish")

# name -> file, what is there, what is put in its place, and a tensor that must come out wrong (None: any)
FAULTS_OF_WALKS = {
    "a missing mask": (
        "tiles", "tl.load(pointer + offsets, mask=row_mask(t, T, c, R, D, RP, first)",
        "tl.load(pointer + offsets, mask=row_mask(t, T, c, R, D + 1, RP, first)", None,
    ),
    "a swapped stride": (
        "depth", "load_parameter(B, 0, N, M, 1, N, NP, MP)", "load_parameter(B, 0, N, M, M, 1, NP, MP)", "out"
    ),
    "a dropped partial sum of coefficients": (
        "tiles", "return total + tl.sum(X, axis=0)", "return tl.sum(X, axis=0)", "g_A0"
    ),
    "a dropped partial sum of projections": ("weights", "return total + tl.dot", "return tl.dot", "g_W_alpha0"),
    "the short stretch of rows lost": (
        "weights", "(whole % splits == split) & (rows % BR > 0)", "rows < 0", "g_W_alpha0"
    ),
    "the short stretch by every program": ("weights", "(whole % splits == split) & ", "", "g_W_alpha0"),
    "the short stretch not at its place": (
        "weights", "row = tl.cast(whole, tl.int64) * BR", "row = tl.cast(0, tl.int64)", "g_W_alpha0"
    ),
    "another stretch": ("weights", "tl.cast(stretch, tl.int64) * BR", "tl.cast(0, tl.int64)", "g_W_alpha0"),
    "rows of e as far apart as all its columns": (
        "weights", "tl.where(k < READ, READ, WRITE)", "tl.where(k < READ, READ, READ)", "g_W_alpha0"
    ),
    "tanh left out of the backward": ("tiles", " * (1.0 - T * T)", "", "g_W_alpha0"),
    "the gradient of a norm's gain missing": (
        "width", "add_partial(norm_partial, g * x", "add_partial(norm_partial, 0.0 * x", "g_norm0"
    ),
    "the slot's RMSNorm not differentiated": ("depth", " g_h -= pull", " g_h -= 0.0 * pull", "g_H"),
    "the gradient of the state that goes on lost": (
        "width", "g_h += load_rows(G_add", "g_h += 0.0 * load_rows(G_add", "g_z0"
    ),
    "a dropped program's sums": ("finish", "sums += tl.load(place", "sums = tl.load(place", "g_A0"),
    "sums of one kind for the other": ("finish", "(which * N + i", "((1 - which) * N + i", "g_S_alpha0"),
    "sums of one kind in the place of the other's": ("finish", "g_S_alpha, g_S_beta, total", "g_A, g_B, total", "g_A0"),
    "a dropped program's sums of the norm's gain": (
        "finish", "sums += tl.load(partial + p * (M", "sums = tl.load(partial + p * (M", "g_norm0"
    ),
    "the gain of another segment": ("finish", "g_norm + k * D", "g_norm + (M - 1 - k) * D", "g_norm0"),
    "a dropped part of g_V": ("finish", "g_V += tl.sum(x", "g_V = tl.sum(x", "g_W_alpha0"),
    "what is the other's not 0": ("finish", "tl.where(carry, total, 0.0)", "total", "g_A0"),
    "the gain twice in its own gradient": ("finish", "tl.sum(g_V * w", "tl.sum(g_W * w", "g_gain0"),
}  # fmt: skip
# Of the GroupNorm
FAULTS_OF_GROUPS = {
    "another group's weight": ("last", "w = load_row(weight, group, D, BD)", "w = load_row(weight, 0, D, BD)", "out"),
    "padding in the variance": ("last", "tl.where(c < D, x - mean, 0.0)", "x - mean", "out"),
    "the token before": ("last", "following = load_group(H, t + step,", "following = load_group(H, t,", "out"),
    "the groups of a program's tokens": ("last", "tl.num_programs(0) // R", "tl.num_programs(0)", None),
    "the mean not differentiated": ("last", "g_h = rstd * (g * w - mean_u - h", "g_h = rstd * (g * w - h", "g_H"),
    "nor the variance": ("last", "(g * w - mean_u - h * mean_uh)", "(g * w - mean_u)", "g_H"),
    "one token's gradient of the weight": ("last", "weight_sum += g * h", "weight_sum = g * h", "g_weight"),
    "one token's gradient of the bias": ("last", "bias_sum += g\n", "bias_sum = g\n", "g_bias"),
    "another group's sums": ("last", "(2 * R) + group) * D", "(2 * R)) * D", "g_weight"),
}  # fmt: skip
# Of one that is too long for the registers
FAULTS_OF_CHUNKS = {
    "padding in the variance of chunks": ("last", "tl.where(c < D, x - mean, 0.0)", "x - mean", "out"),
    "one chunk in the mean": ("last", "total += load_chunk(H", "total = load_chunk(H", "out"),
    "one chunk in the variance": ("last", "square += h * h", "square = h * h", "out"),
    "one chunk in the mean of u": ("last", "total_u += ", "total_u = ", "g_H"),
    "one chunk in the mean of u ĥ": ("last", "inner += ", "inner = ", "g_H"),
    "the last token's sums": ("last", "before + x, mask", "x, mask", "g_weight"),
    "what lay there before": ("last", "tl.where(again, known, 0.0)", "known", "g_bias"),
}  # fmt: skip
# Where a token's rows stay in registers
FAULTS_OF_ROWS = {
    "a missing mask of a row": ("rows", "mask=c < D, other", "mask=c < D + 1, other", None),
    "sums in another order": (
        "rows", "split_all(a, Q // 2) + split_all(b, Q // 2)", "split_all(b, Q // 2) + split_all(a, Q // 2)", "x0"
    ),
    "numbers in another order": ("rows", "(2, P // 2)), (1, 0))", "(P // 2, 2)), (0, 1))", "x0"),
    "1/rms of another slot": ("rows", "tl.where(slot == i, numbers[i]", "tl.where(slot == i, numbers[0]", "x0"),
    "B with its strides swapped": ("few", "B + (k - N) * N + i", "B + (k - N) + i * M", "out"),
    "a projection's other column": ("projections", "W_alpha + c * (M + N) + M + k", "W_alpha + c * (M + N) + k", "x1"),
    "a projection on top of another": (
        "projections", "first: tl.constexpr = N + M if DEPTH else 0", "first: tl.constexpr = 0", None
    ),
    "tanh left out of the backward, in registers": ("few", " * (1.0 - tanh_q * tanh_q)", "", "g_W_alpha0"),
    "RMSNorm of the slot not differentiated": ("few", "g_h[i] - pull * h[i]", "g_h[i]", "g_H"),
    "the norm of x not differentiated": ("few", " - pull_x * x[k]", "", "g_H"),
    "the gradient that goes on lost": ("few", "load_row(G_add, i, D, BD)", "0.0 * row", "g_z0"),
    "one token's gradient of the norm's gain": ("rows", "before[k] + row", "row", "g_norm1"),
    "one token's gradient of A": ("few", "sum_E += dC", "sum_E = dC", "g_A0"),
    "one token's gradient of S": ("few", "sum_ET += dC * tanh_q", "sum_ET = dC * tanh_q", "g_S_alpha0"),
    "e in another order": ("few", "place % N * K + place // N", "place", "g_W_alpha0"),
    "a transpose": ("few", "combine(c, h, k * N, 1)", "combine(c, h, k, N)", "out"),
    "a transpose in the backward": ("few", "combine(c, g, i, N)", "combine(c, g, i * N, 1)", "g_H"),
}  # fmt: skip
# The same of 16 bits, whose sums lie in pieces
FAULTS_OF_PIECES = {
    "the gradient of the norm's gain as threads left it": ("finish", " * PIECES + c // (BD", " + c // (BD", "g_norm0"),
    "one piece of it twice": ("finish", " * PIECES + c // (BD // PIECES)) * 4", " * PIECES) * 4", "g_norm0"),
}  # fmt: skip
# Of many.py, two tokens a tile
FAULTS_OF_TILES = {
    "a missing mask of a tile": (
        "many", "inside[:, None] & (c[None, :] < D)\n\n\n", "inside[:, None] & (c[None, :] < D + 1)\n\n\n", None
    ),
    "one token's matrix for the other": ("many", "r += token * size", "r += 0 * size", "g_W_alpha0"),
    "one token beside the other": (
        "many", "inside &= token[:, None] == other[None, :]", "inside &= (r < 1000)[:, None]", None
    ),
    "1/rms of both tokens": (
        "many", "(PER, x.shape[0] // PER)), axis=1)", "(PER, x.shape[0] // PER)), axis=1) * 1.5", "x0"
    ),
    "another row of V": ("many", "V + ((row + k) * D)[:, None]", "V + (k * D)[:, None]", "x1"),
    "B as it lies": (
        "many", "write = coefficients(p_write, rstd, B, S_beta, 1, N,",
        "write = coefficients(p_write, rstd, B, S_beta, M, 1,", "out",
    ),
    "Â not transposed": ("many", "return tl.trans(carry), write", "return carry, write", "out"),
    "tanh of a tile left out": (
        "many", "e = dC * S * (1.0 - tanh_q * tanh_q) * rstd[:, None]\n        pull = tl.sum(e * p, axis=1)\n",
        "e = dC * S * rstd[:, None]\n        pull = tl.sum(e * p, axis=1)\n", "g_W_beta0",
    ),
    "the norm of a tile's x not differentiated": ("many", " - pull_x[:, None] * x", "", "g_H"),
    "nor in the gradient of Å": ("many", " - pull_x[None, :] * Hx", "", "g_A0"),
    "H′ H′ᵀ of one chunk": (
        "many", "return add_product(total, h, tl.trans(h))", "return product(h, tl.trans(h))", "x0"
    ),
    "and in the backward": ("many", "gram = add_product(gram, h, tl.trans(h))", "gram = product(h, tl.trans(h))", None),
    "RMSNorm of a tile's slots not differentiated": (
        "many", "g_h -= pull[:, None]", "g_h -= 0.0 * pull[:, None]", "g_H"
    ),
    "the other gradient of a tile lost": (
        "many", "g_h += load_rows(G_add, c,", "g_h += 0.0 * load_rows(G_add, c,", "g_z0"
    ),
    "a program's last token only": (
        "many", 'tl.atomic_add(pointer + offsets, C, mask=inside, sem="relaxed")',
        "tl.store(pointer + offsets, C, mask=inside)", "g_A0",
    ),
    "and of the norm's gain": (
        "many", 'tl.atomic_add(pointer + offsets, X, mask=inside, sem="relaxed")',
        "tl.store(pointer + offsets, X, mask=inside)", "g_norm0",
    ),
    "the state before for the one between": (
        "many", "store_rows(between, g, c, left", "store_rows(between, g + g, c, left", "g_H"
    ),
    "z for g": ("many", "d_write = add_product(d_write, g,", "d_write = add_product(d_write, h,", "g_B0"),
    "the columns of a depth from where those of a width begin": (
        "weights", "E_write + (k - READ)", "E_write + k", "g_W_alpha0"
    ),
}  # fmt: skip
# Of the same with more than 32 slots
FAULTS_OF_LARGE_TILES = {
    "a program's first token only": ("many", "before + C, mask=inside", "C, mask=inside", "g_A0"),
    "Σ x² of one chunk": ("many", "square_x += squares", "square_x = squares", "x0"),
}
# Where the kernels keep sums and matrices in memory
FAULTS_OF_MANY = {
    "a dropped partial sum in memory": (
        "tiles", "before + tl.sum(X, axis=0), mask=inside)\n    tl.debug_barrier()\n    return",
        "tl.sum(X, axis=0), mask=inside)\n    tl.debug_barrier()\n    return", "g_A0",
    ),
    "the slots' second piece lost": ("depth", "in tl.range(0, N, 16", "in tl.range(0, 16, 16", "g_H"),
    "the first piece of the state taken twice": ("depth", "c, N, D, 16, k)", "c, N, D, 16, 0)", "g_H"),
    "another token's matrix": ("depth", "load_matrix(parked, own_t,", "load_matrix(parked, own_t * 0,", "g_H"),
}  # fmt: skip

FAULTS = (
    FAULTS_OF_WALKS | FAULTS_OF_GROUPS | FAULTS_OF_CHUNKS | FAULTS_OF_ROWS | FAULTS_OF_PIECES | FAULTS_OF_TILES
    | FAULTS_OF_LARGE_TILES | FAULTS_OF_MANY
)  # fmt: skip
CASE = (2, 4, 20, (5,), torch.float32)  # 20 columns: a second chunk of BD = 16, and part of it is padding
CASE_OF_PIECES = (2, 4, 20, (5,), torch.float16)
CASE_OF_TILES = (2, 6, 20, (5,), torch.bfloat16)
CASE_OF_LARGE_TILES = (2, 34, 20, (3,), torch.bfloat16)
CASE_OF_MANY = (2, 18, 20, (5,), torch.float32)
CASES = {
    fault: case
    for case, faults in (
        (CASE, FAULTS_OF_WALKS), (CASE, FAULTS_OF_GROUPS), (CASE, FAULTS_OF_CHUNKS), (CASE, FAULTS_OF_ROWS),
        (CASE_OF_PIECES, FAULTS_OF_PIECES), (CASE_OF_TILES, FAULTS_OF_TILES),
        (CASE_OF_LARGE_TILES, FAULTS_OF_LARGE_TILES), (CASE_OF_MANY, FAULTS_OF_MANY),
    )
    for fault in faults
}  # fmt: skip


SUMS = ("stretch", "coefficients_gradient_sizes", "norm_gradient_sizes", "projections_gradient_sizes")
AS_USUAL = {name: getattr(launch, name) for name in SUMS}


@pytest.fixture(scope="module")
def wanted():
    return {case: values.two_sublayers(values.Reference, *case) for case in set(CASES.values())}


outputs_full_of_nan = values.outputs_full_of_nan  # what lies in memory before is never right by chance


@pytest.fixture
def small_tiles(monkeypatch):
    """Several blocks a program (two share them) and several chunks: what is added up, is added up more than once."""
    monkeypatch.setattr(launch, "tile", lambda *_: launch.Tile(2, 16, 1))
    monkeypatch.setattr(launch, "many_tile", lambda kernel, n, d, target: launch.Tile(2 if n <= 8 else 1, 16, 1))
    monkeypatch.setattr(launch, "stretch", lambda *_: launch.Stretch(8, 16, 1, 1, 1))  # 2½ stretches, or more
    for name in SUMS[1:]:
        monkeypatch.setattr(launch, name, smaller(getattr(launch, name), BE=8, BC=8, BP=1, BS=1))


def smaller(sizes, **blocks):
    """The same with these sizes, where it has them."""
    return lambda *a: {k: blocks.get(k, v) for k, v in sizes(*a).items()}


def large_sums(monkeypatch):
    """With what is added up afterwards as usual: with thousands of coefficients it would take the interpreter long."""
    for name, function in AS_USUAL.items():
        monkeypatch.setattr(launch, name, function)


def walk(monkeypatch):
    """Along d_b, as where a row is too long for the registers."""
    monkeypatch.setattr(launch, "whole_rows", lambda *_: 0)


def load_kernels(folder: Path, fault: str | None, monkeypatch) -> None:
    """Put the kernels of the changed sources in the place of those that `fused` launches."""
    changed, old, new, _ = FAULTS[fault] if fault else (FILES[0], "", "", None)
    for name in FILES[FILES.index(changed) :]:
        source = Path(fused.__file__).with_name(f"{name}.py").read_text()
        if name == changed:
            assert source.count(old) >= 1, f"{name}.py no longer has: {old}"
            source = source.replace(old, new)
        path = folder / f"{name}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(f"vwn_ref.kernels.{name}", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # the files after it import from it
        spec.loader.exec_module(module)
        for kernel in vars(module):
            if kernel.removesuffix("_kernel") in launch.KERNELS:
                monkeypatch.setitem(launch.KERNELS, kernel.removesuffix("_kernel"), getattr(module, kernel))
            elif kernel.endswith("_kernel") and hasattr(launch, kernel):
                monkeypatch.setattr(launch, kernel, getattr(module, kernel))


def errors(found, wanted, case) -> set[str]:
    """Names of the tensors that are not what they should be."""
    wrong, tolerance = set(), values.TOLERANCE[case[-1]]
    for name, exact in wanted.items():
        try:
            values.assert_close({**found, "x0": found["x0"]}, {"x0": wanted["x0"], name: exact}, tolerance)
        except AssertionError as error:
            wrong.add(str(error).split(":")[0])
    return wrong


def chunks(monkeypatch):
    """Groups in chunks of 16, as where they are too long."""
    monkeypatch.setattr(launch, "LONGEST_GROUP", 32)


WAYS = {
    "walks": CASE, "rows": CASE, "chunks": CASE, "pieces": CASE_OF_PIECES, "tiles": CASE_OF_TILES,
    "large tiles": CASE_OF_LARGE_TILES, "many": CASE_OF_MANY,
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_without_a_fault_nothing_is_wrong(tmp_path, monkeypatch, small_tiles, wanted, way):
    load_kernels(tmp_path, None, monkeypatch)
    case = WAYS[way]
    if way in ("walks", "chunks", "large tiles"):
        {"walks": walk, "chunks": chunks, "large tiles": large_sums}[way](monkeypatch)
    assert errors(values.two_sublayers(fused, *case), wanted[case], case) == set()


@pytest.mark.skipif(values.DEVICE == "cuda", reason="a missing mask reads what is not ours: in the interpreter only")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(tmp_path, monkeypatch, small_tiles, wanted, fault):
    load_kernels(tmp_path, fault, monkeypatch)
    case = CASES[fault]
    must = FAULTS[fault][3]
    if fault in FAULTS_OF_WALKS:
        walk(monkeypatch)
    if fault in FAULTS_OF_CHUNKS:
        chunks(monkeypatch)
    if fault in FAULTS_OF_LARGE_TILES:
        large_sums(monkeypatch)
    wrong = errors(values.two_sublayers(fused, *case), wanted[case], case)
    assert wrong and (must is None or must in wrong), f"wrong were: {sorted(wrong)}"
