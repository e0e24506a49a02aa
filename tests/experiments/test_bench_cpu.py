"""The CPU benchmark with a clock of its own: which time is divided by which, and where the numbers go."""

from __future__ import annotations

import json

import pytest

from vwn_ref.experiments import bench_cpu

TOOK = {"plain": 2.0, "reference": 6.0, "torch": 3.0, "forward": 0.5, "backward": 0.25}  # seconds


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the work moves: a step or half a GHC takes what `TOOK` says."""
    now = [0.0]

    def work(name):
        def run():
            now[0] += TOOK[name]

        return run

    def step(config, way):
        return work("plain" if config.is_plain else way)

    monkeypatch.setattr(bench_cpu, "_step", step)
    monkeypatch.setattr(bench_cpu, "_ghc", lambda m, n, way: (work("forward"), work("backward")))
    return lambda: now[0]


def test_ratios_are_over_the_plain_model(clock):
    found = bench_cpu.measure(2, 3, ("reference", "torch"), 3, clock)
    assert found["plain_step_ms"] == 2000.0 and found["flops_ratio"] > 1
    assert found["reference"] == {
        "step_ratio": 3.0,
        "step_ms": 6000.0,
        "ghc_forward_ms": 500.0,
        "ghc_backward_ms": 250.0,
    }
    assert found["torch"]["step_ratio"] == 1.5


def test_the_fastest_quarter(clock):
    assert bench_cpu.undisturbed([9.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 5.0]) == 1.5
    assert bench_cpu.undisturbed([4.0]) == 4.0


def test_the_file(clock, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_cpu.time, "perf_counter", clock)
    monkeypatch.setattr(bench_cpu, "cpu_backend", lambda: "torch")
    path = tmp_path / "new" / "bench.json"
    found = bench_cpu.main(["--threads", "1", "--rounds", "2", "--shapes", "2,3", "--json", str(path)])
    kept = json.loads(path.read_text())
    assert kept["results"] == found and kept["clock"] == "wall" and len(found) == 1
    assert kept["command"].endswith("bench_cpu --threads 1 --rounds 2 --shapes 2,3 --json " + str(path))
    assert kept["rounds"] == 2 and kept["model"]["dim"] == bench_cpu.DIM and {"commit", "processor"} <= kept.keys()
    assert (found[0]["m"], found[0]["n"], found[0]["threads"]) == (2, 3, 1)
    assert "3.00" in capsys.readouterr().out and [one.name for one in path.parent.iterdir()] == ["bench.json"]


def test_a_state_too_wide_for_the_kernels(capsys):
    with pytest.raises(SystemExit):
        bench_cpu.main(["--shapes", "1,105"])
    assert "n = 105: too wide a state for the kernels" in capsys.readouterr().err
