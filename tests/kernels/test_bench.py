"""The benchmark: the byte model by hand, and that it goes through everything without inventing a number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import weakref
from types import SimpleNamespace

import pytest
import torch

from vwn_ref import VWNConfig, VWNTransformer

pytest.importorskip("triton", reason="Triton is not installed")
from vwn_ref.kernels import bench, launch, traffic

D = 1024


@pytest.mark.parametrize(
    "op, direction, m, n, rows",
    [
        ("width", "forward", 2, 3, 3 + 2),
        ("depth", "forward", 2, 3, 3 + 2 + 3),
        ("step", "forward", 2, 3, 3 + 2 + 3 + 2),
        ("last", "forward", 4, 8, 8 + 4 + 8),
        ("width", "backward", 2, 3, 3 + 2 + 3),
        ("depth", "backward", 2, 3, 3 + 2 + 3 + 3 + 2),
        ("step", "backward", 2, 3, 3 + 2 + 3 + 2 + 3 + 2),
        ("step", "backward", 8, 64, 3 * 72),
        ("last", "backward", 4, 8, 8 + 4 + 8 + 8 + 4),
    ],
)
def test_minimal_bytes_by_hand(op, direction, m, n, rows):
    assert traffic.minimal_bytes(op, direction, m, n, D // m, 7, 2) == rows * (D // m) * 2 * 7


def test_quartiles_by_hand():
    assert bench.quartiles([30.0, 10.0, 20.0]) == {"median_us": 20.0, "q1_us": 10.0, "q3_us": 30.0, "repeats": 3}


@pytest.mark.parametrize("op", traffic.OPS)
def test_minimal_bytes_are_those_of_the_tensors(op):
    """Forward what goes in and comes out; backward the same inputs, gradients in and gradients out."""
    t = bench.Task("fused", op, 2, 4, 16, 5)
    function, inputs, fresh = bench.work(t, bench.Bench(True, torch.device("cpu")))
    outputs = function(*inputs)
    stored = [y for y in outputs if y.stride(-1)]  # a link has no numbers
    states = sum(x.nbytes for x in inputs[:fresh])
    shape = (op, 2, 4, 8, 5, 4)
    assert traffic.minimal_bytes(*shape[:1], "forward", *shape[1:]) == states + sum(y.nbytes for y in stored)
    back = [torch.ones_like(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, inputs, back)  # every input is used, or this raises
    moved = states + sum(t.nbytes for t in (*stored, *gradients[:fresh]))
    assert traffic.minimal_bytes(*shape[:1], "backward", *shape[1:]) == moved


@pytest.mark.parametrize(
    "op, way, rows, coefficients",
    [
        ("width", {}, 3 * 3 + 2, 3 * 2),
        ("depth", {}, 4 * 3 + 2 * 2, 3 * 5),
        ("step", {}, 5 * 3 + 3 * 2, 3 * 5 + 3 * 2),  # the new state twice, once by weights_kernel
        ("step", {"mixes_again": True}, 4 * 3 + 3 * 2, 3 * 5 + 3 * 2),  # the new state by weights_kernel only
        ("step", {"one_kernel": False}, (3 * 3 + 2) + (3 * 3 + 2 * 2) + 3, 3 * 5 + 3 * 2),  # width, depth, weights
        ("last", {}, (2 * 3 + 2) + 3 * 3 + (3 * 3 + 2 * 2) + 3, 3 * 5),  # depth, the norm's backward, depth's, weights
    ],
    ids=str,
)
def test_bytes_of_our_backward_kernels_by_hand(op, way, rows, coefficients):
    found = traffic.kernel_bytes(op, "backward", 2, 3, 512, 1, 2, **way)
    assert found == rows * 512 * 2 + 2 * coefficients * 4  # bytes; e is written and read


@pytest.mark.parametrize("op, rows", [("width", 3 + 2), ("depth", 2 * 3 + 2), ("last", (2 * 3 + 2) + 2 * 3)])
def test_bytes_of_our_forward_kernels_by_hand(op, rows):
    assert traffic.kernel_bytes(op, "forward", 2, 3, 512, 1, 2) == rows * 512 * 2


@pytest.mark.parametrize(
    "m, n, dtype, way",
    [
        (2, 3, torch.bfloat16, {"mixes_again": True}), (4, 8, torch.bfloat16, {}), (8, 64, torch.bfloat16, {}),
        (8, 64, torch.float16, {"one_kernel": False}),
    ],
    ids=str,
)  # fmt: skip
def test_the_bytes_of_the_kernels_that_run(monkeypatch, m, n, dtype, way):
    monkeypatch.setattr(launch, "INTERPRETED", False)  # where a step's backward is always one kernel
    task = bench.Task("fused", "step", m, n, 1024, 7)
    found = bench._model(task, "backward", SimpleNamespace(dtype=dtype))
    assert found["kernel_bytes"] == traffic.kernel_bytes("step", "backward", m, n, 1024 // m, 7, 2, **way)


def test_the_plain_model_leaves_room():
    assert bench.fitting_batch(1024, 2048, 8, 80 * 10**9) == 16
    assert 1 <= bench.fitting_batch(4096, 2048, 8, 80 * 10**9) < 16
    assert bench.fitting_batch(4096, 2048, 8, 24 * 10**9) == 1


def test_the_predicted_ratio_by_hand():
    t = bench.Model("fused", 2, 3, 1024, 8, 1, 2048)
    known = bench.Bench(True, torch.device("cpu"), copy_rate=3e12, matrix_rate=7e14)
    assert bench.predicted_ratio(t, None, known) is None
    moved = 16 * 2048 * 2 * (25 * 512 - 9 * 1024)  # 16 GHCs, 10 and 15 rows; the norms and additions of the plain model
    table, reduce, ghc = 8192 * 512, 1024 * 1536, 512 * 8 + 2 * 3 * 7
    bytes_ = moved + 28 * (table + reduce + 16 * ghc)
    products = 3 * 2048 * 2 * reduce
    seconds = bytes_ / 3e12 + products / 7e14
    assert bench.predicted_ratio(t, 50_000, known) == pytest.approx(1 + seconds / 0.05, rel=1e-12)


def test_everything_important_is_asked_for():
    full = bench.tasks(False)
    assert len(set(full)) == len(full)
    for m, n in ((2, 3), (4, 8), (8, 64)):
        for width in (1024, 2048, 4096):
            for op in ("width", "depth", "step"):
                for name in ("fused", "reference", "compiled"):
                    assert bench.Task(name, op, m, n, width, 16_384) in full
    assert {t.tokens for t in full if t.implementation == "fused"} == {8_192, 16_384, 32_768, 65_536}
    assert {(t.m, t.n) for t in full if t.implementation.startswith("package")} == {(1, 4)}


def test_what_is_compiled_ahead(monkeypatch):
    plain = bench.Model("plain", None, None, 1024, 8, 16, 2048)
    vwn = [plain._replace(way=way, m=2, n=3) for way in bench.WAYS]
    asked = []
    monkeypatch.setattr(bench, "models", lambda made: [plain, *vwn, vwn[0]._replace(m=4, n=8), plain])
    monkeypatch.setattr(bench, "warm", lambda f, jobs, seconds, most=16: asked.append((f, list(jobs), seconds, most)))
    made = bench.Bench(False, torch.device("cuda"), deadline=time.monotonic() + 100)
    bench.compile_only(made)
    (f, models, seconds, most), (g, ops, rest, _) = asked
    assert (f, g, most) == (bench._warm_model, bench._warm, 4) and 39 < seconds < 41 and 99 < rest < 101
    assert set(models) == {plain, vwn[0]._replace(m=4, n=8), vwn[2]} or set(models) == {plain, vwn[0], vwn[2]}
    fused = {t._replace(tokens=0) for t in bench.tasks(False) if t.implementation == "fused"}
    ours = [t for together in ops for t in together if t.implementation == "fused"]
    assert {t._replace(tokens=0) for t in ours} == fused and len(ours) == len(fused)
    assert {tuple(t.op for t in x) for x in ops} == {("width",), ("depth",), ("depth", "last"), ("step",)}
    assert {t.op for x in ops for t in x if t.implementation != "fused"} == {"step"}

    asked.clear()
    made.deadline, made.compiled_before = 0.0, True  # then nothing is compiled, and with no time left nothing measured
    for stage in (bench.ops, bench.steps):
        assert stage(made)["rows"] == []
    assert asked == []


# ------------------------------------------------------------------------------------------------------ a dry run


def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "vwn_ref.kernels.bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=kept | environment)


MEASURED = {
    "median_us", "q1_us", "q3_us", "bytes_per_second", "flops_per_second", "share_of_copy", "peak_bytes", "seconds",
    "kept_bytes_per_token_and_layer", "more_than_plain", "peak_ratio", "step_ratio", "predicted_step_ratio",
}  # fmt: skip
COUNTED = {  # by formulas, or names of what ran
    "implementation", "op", "m", "n", "D", "tokens", "dtype", "direction", "minimal_bytes", "kernel_bytes", "repeats",
    "what", "bytes", "flops", "way", "layers", "batch", "seq_len", "graphs", "flops_ratio", "recompute", "formula",
}  # fmt: skip
FACTS = {"date", "commit", "python", "torch", "triton", "dry_run", "device", "stage", "not_measured", "seconds", "rows"}


@pytest.mark.slow
def test_a_dry_run_goes_through_all_and_measures_nothing(tmp_path):
    # --dry-run sets the variable itself, and then has to import everything a second time
    done = start("--dry-run", "--out", str(tmp_path), "--commit", "a name", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    files = {p.name: json.loads(p.read_text()) for p in (tmp_path / "dry-run").iterdir()}
    assert set(files) == {f"{stage}.json" for stage in bench.STAGES}
    for found in files.values():
        assert set(found) >= FACTS and found["dry_run"] and found["commit"] == "a name"
        assert found["device"].startswith("none") and found["not_measured"] == [] and found["rows"]
        for row in found["rows"]:
            assert "error" not in row, row
            assert set(row) <= MEASURED | COUNTED, set(row) - MEASURED - COUNTED
            assert all(row[key] is None for key in MEASURED & set(row)), row
            assert row.get("repeats", 0) == 0
    ops = {(r["implementation"], r["op"], r["direction"]) for r in files["ops.json"]["rows"]}
    assert ops == {(t.implementation, t.op, x) for t in bench.tasks(True) for x in traffic.DIRECTIONS}
    assert [r["way"] for r in files["steps.json"]["rows"]] == ["plain", "fused", "compiled"]
    # a graph for attention and one for the FFN, also where there are two blocks
    assert [(r["layers"], r["graphs"]) for r in files["steps.json"]["rows"]] == [(2, 2), (1, 2), (2, 2)]
    assert [(r["way"], r["recompute"]) for r in files["memory.json"]["rows"]] == [
        (way, recompute) for way in ("plain", "reference") for recompute in (False, True)
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--out", str(tmp_path)])
    assert "no GPU here, and so nothing to measure" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_one_failure_does_not_end_the_rest():
    def fails():
        raise RuntimeError("no")

    assert bench.attempt({"op": "step"}, fails) == {"op": "step", "error": "RuntimeError: no"}
    assert bench.attempt({"op": "step"}, lambda: {"median_us": 1.0}) == {"op": "step", "median_us": 1.0}


@pytest.fixture
def clock(monkeypatch):
    """A GPU whose events say 5 µs each, and which has waited for Python wherever the pause is below `enough`."""
    pauses, enough = [], [0]

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            pass

        def query(self):
            return pauses[-1] < enough[0]

        def elapsed_time(self, other):
            return 0.005

    properties = SimpleNamespace(L2_cache_size=4)
    for name, value in (
        ("Event", Event), ("_sleep", pauses.append), ("synchronize", lambda: None),
        ("get_device_properties", lambda device: properties),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return pauses, enough


def test_the_pause_grows_until_python_is_ahead(clock):
    pauses, enough = clock
    made = bench.Bench(False, torch.device("cpu"))
    enough[0] = 3 * made.pause
    found = made.times(lambda: None, lambda state: None)
    assert found["median_us"] == 5.0 and found["repeats"] >= 7 and "late" not in found and found["python_us"] >= 0
    assert pauses[:3] == [4_000_000, 8_000_000, 16_000_000] and set(pauses[2:]) == {16_000_000}
    enough[0] = 10**12  # never
    late = made.times(lambda: None, lambda state: None)
    assert late["late"] and late["repeats"] >= 7 and max(pauses) == bench.LONGEST_PAUSE
    pauses.clear()

    def prepare():  # late at first, even with the longest pause
        enough[0] = 10**12 if len(pauses) < 3 else 0

    found = made.times(prepare, lambda state: None)
    assert found["late"] and set(pauses) == {bench.LONGEST_PAUSE} and len(pauses) >= 7


def test_a_stage_stops_when_its_time_is_over_or_the_gpu_has_failed(clock, monkeypatch):
    made = bench.Bench(False, torch.device("cpu"))
    assert made.why_stop() is None
    monkeypatch.setattr(made, "deadline", 0.0)
    assert made.why_stop() == "time"

    def fails():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    monkeypatch.setattr(made, "deadline", float("inf"))
    assert made.why_stop() == "the GPU failed: an illegal memory access was encountered"
    monkeypatch.setattr(torch.cuda, "empty_cache", fails)
    made.free()


def test_what_a_stage_has_is_kept_as_it_goes(tmp_path, monkeypatch):
    """A stage that dies leaves its rows."""
    seen = []

    def stage(made):
        made.keep([{"op": "one"}])
        seen.append(json.loads((tmp_path / "dry-run" / "ops.json").read_text()))
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "ops", stage)
    monkeypatch.setattr(bench.fused, "INTERPRETED", True)
    with pytest.raises(KeyboardInterrupt):
        bench.main(["--dry-run", "--stages", "ops", "--out", str(tmp_path), "--commit", "a name"])
    assert seen[0]["rows"] == [{"op": "one"}] and seen[0]["commit"] == "a name" and seen[0]["stage"] == "ops"
    assert seen[0]["not_measured"] == ["the stage was cut short here"]


def test_ops_keeps_its_rows_and_lists_what_is_left(monkeypatch):
    """A minute is too little for max-autotune, and is over after the third task."""
    made, kept = bench.Bench(True, torch.device("cpu"), deadline=time.monotonic() + 60), []
    made.keep = lambda rows: kept.append([row["task"] for row in rows])

    def run_task(t, made):
        made.deadline = 0.0 if t.implementation == "package" else made.deadline
        return [{"task": t.implementation}]

    names = ("fused", "max-autotune", "package", "reference")
    monkeypatch.setattr(bench, "tasks", lambda dry: [bench.Task(name, "step", 1, 4, 8, 3) for name in names])
    monkeypatch.setattr(bench, "run_task", run_task)
    found = bench.ops(made)
    assert kept == [["fused"], ["fused", "package"]] and [row["task"] for row in found["rows"]] == kept[-1]
    assert [(row["implementation"], row["reason"]) for row in found["not_measured"]] == [
        ("max-autotune", "time"),
        ("reference", "time"),
    ]


def test_steps_keep_their_ratios_as_they_go(monkeypatch):
    """To the plain models of one width that there are so far: 100 µs, later 100 and 140."""
    made, kept = bench.Bench(True, torch.device("cpu")), []
    made.keep = lambda rows: kept.append([row.get("step_ratio") for row in rows])
    plain = bench.Model("plain", None, None, 16, 2, 1, 4)
    times = {0: 100.0, 1: 150.0, 2: 140.0}
    monkeypatch.setattr(bench, "models", lambda made: [plain, plain._replace(way="fused", m=2, n=3), plain])
    monkeypatch.setattr(bench, "run_model", lambda t, made: t._asdict() | {"median_us": times[len(kept)]})
    rows = bench.steps(made)["rows"]
    assert kept == [[None], [None, 1.5], [None, 1.25, None]] and rows[1]["step_ratio"] == 1.25


def test_models_have_one_state_type_and_give_their_memory_back():
    """The plain model's stream too; parameters of compiled modules lie in cycles."""
    made = bench.Bench(True, torch.device("cpu"))
    plain, *vwns = bench.models(made)
    for t in (plain, vwns[0]):
        model = bench.on_device(t, SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16))
        assert model.embedding(torch.zeros(1, 2, dtype=torch.long)).dtype == torch.bfloat16
    model = bench.build(plain, made)
    weight = weakref.ref(next(model.parameters()))
    cycle = [model]
    cycle.append(cycle)
    del model, cycle
    made.free()
    assert weight() is None


def test_recomputing_changes_no_gradient():
    """What the memory benchmark measures is the same loss, and the same gradients, as without recomputation."""
    torch.manual_seed(0)
    cfg = VWNConfig(vocab_size=20, dim=16, n_layers=3, n_heads=2, m=2, n=4)
    model = VWNTransformer(cfg).double()
    tokens = torch.randint(20, (2, 7))
    losses = bench.checkpointed_loss(model, tokens), model.loss(tokens).total
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    for one, two in zip(*(torch.autograd.grad(loss, list(model.parameters())) for loss in losses), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-14)
