"""`vwn_ref.kernels.tune`: what it changes, what it gives back, and what it refuses. Times need a GPU."""

from __future__ import annotations

import json
from typing import NamedTuple

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import torch
from vwn_ref.kernels import launch, tune

SHAPE = (4, 8, 256, torch.bfloat16)


def test_combinations():
    assert tune.combinations([], []) == [{}]
    assert tune.combinations(["A=1,2", "B=3"], [8]) == [
        {}, {"A": 1, "B": 3, "programs": 8}, {"A": 2, "B": 3, "programs": 8}
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"--set A=x: must be NAME=INTEGER"):
        tune.combinations(["A=x"], [])


def test_what_is_changed_and_put_back(monkeypatch):
    monkeypatch.setattr(launch, "programs", lambda device, each: 100 * each)
    before = launch.sizes("many_step_kernel", *SHAPE), launch.sizes("many_depth_kernel", *SHAPE)
    with tune.changed("many_step", {"BD": 16, "GRAM": 0, "maxnreg": 96, "programs": 3}):
        found = launch.sizes("many_step_kernel", *SHAPE)
        assert found == before[0] | {"BD": 16, "GRAM": False, "maxnreg": 96} and found["GRAM"] is False
        assert launch.sizes("many_depth_kernel", *SHAPE) == before[1]
        assert launch.programs(None, 8) == 300
    with tune.changed("many_step", {"maxnreg": 0}):
        assert launch.sizes("many_step_kernel", *SHAPE) == before[0]
    assert launch.sizes("many_step_kernel", *SHAPE) == before[0] and launch.programs(None, 8) == 800
    with tune.changed("weights", {"BR": 16}):
        assert launch.stretch(4, 8, 256, 16, torch.bfloat16).BR == 16
    assert launch.stretch(4, 8, 256, 16, torch.bfloat16).BR == 64


@pytest.mark.skipif(not launch.INTERPRETED, reason="a dry run is interpreted")
def test_a_dry_run(tmp_path, capsys):
    file = tmp_path / "rows.json"
    rows = tune.main([
        "step_backward", "2,3", "--widths", "1024", "--set", "num_warps=1,2", "--programs", "1", "--dry-run", "--out",
        str(file),
    ])  # fmt: skip
    head = {"kernel": "few_step_backward", "m": 2, "n": 3, "D": 16, "tokens": 3, "median_us": None}
    assert rows == [head, *(head | {"num_warps": x, "programs": 1} for x in (1, 2))]
    assert json.loads(file.read_text())["rows"] == rows
    assert capsys.readouterr().out.count("kernel few_step_backward") == 3


@pytest.mark.skipif(not launch.INTERPRETED, reason="a dry run is interpreted")
@pytest.mark.parametrize("kernel", ["weights", "group_norm", "width_backward"])
def test_other_kernels(kernel):
    rows = tune.main([kernel, "2,4", "--widths", "1024", "--set", "num_warps=2", "--dry-run"])
    assert [row.get("num_warps") for row in rows] == [None, 2] and rows[0]["kernel"].endswith(kernel)


def test_the_median_is_of_that_kernel(monkeypatch):
    class Event(NamedTuple):
        name: str
        device_time: float

    launched = [Event("few_step_kernel", 5.0), Event("other_kernel", 9.0), Event("few_step_kernel", 7.0)]

    class Profiler:
        def __init__(self, activities): ...
        def __enter__(self):
            return self

        def __exit__(self, *error): ...
        def events(self):
            return launched

    monkeypatch.setattr(torch.profiler, "profile", Profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls = []
    assert tune._median(lambda: calls.append(1), "few_step") == 6.0 and len(calls) == tune.REPEATS
    with pytest.raises(RuntimeError, match=r"no step_kernel among the launched: \['few_step_kernel', 'other_kernel'\]"):
        tune._median(lambda: None, "step")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["step", "4", "--dry-run"], "shape 4: must be m,n, such as 4,8"),
        (["step", "3,2", "--widths", "9"], "shape 3,2 with --widths 9: n = 2: must be ≥ m = 3"),
        (["step", "0,2", "--dry-run"], "m = 0: must be an integer ≥ 1"),
        (["step", "3,2", "--dry-run"], "n = 2: must be ≥ m = 3"),
        (["step", "2,3", "--widths", "64", "7"], "with --widths 7: m = 2: must divide dim = 7"),
        (["step", "2,3", "--tokens", "0", "--dry-run"], "--tokens 0: must be ≥ 1"),
        (["step", "2,3", "--set", "M=3", "--dry-run"], "--set M: must be of num_warps, maxnreg for few_step"),
        (["step", "2,3", "--set", "BD=16", "--dry-run"], "--set BD: must be of num_warps, maxnreg for few_step"),
        (["step", "2,3", "--programs", "0", "--dry-run"], "--programs 0: must be ≥ 1"),
        (["weights", "2,3", "--set", "BT=3", "--dry-run"], "--set BT: must be of BR, BD"),
        (["step", "2,3", "--set", "BD", "--dry-run"], "--set BD: must be NAME=INTEGER"),
        (["no_kernel", "2,3", "--dry-run"], "invalid choice: 'no_kernel'"),
    ],
    ids=str,
)
@pytest.mark.skipif(not launch.INTERPRETED, reason="a dry run is interpreted")
def test_what_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        tune.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_nothing_is_timed(capsys):
    with pytest.raises(SystemExit, match="2"):
        tune.main(["step", "2,3"])
    assert "no GPU here, and so nothing to time" in capsys.readouterr().err
