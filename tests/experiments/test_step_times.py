"""Times of training steps side by side: the clock is made up, the steps of one small sweep are real."""

import dataclasses
import inspect
import json
import sys
import time

import pytest
import torch

from vwn_ref.experiments import step_times
from vwn_ref.experiments.checkpoint import CheckpointError
from vwn_ref.experiments.finished import KeptRun
from vwn_ref.experiments.train import TrainConfig, train

SWEEP = """
seeds = [3]
out = "nowhere"
[base]
steps = 60
batch_size = 4
seq_len = 16
warmup = 5
lr = 0.01
val_tokens = 300
data.files = ["{text}"]
data.vocab_size = 280
model.dim = 16
model.n_layers = 1
model.n_heads = 2
[variants.plain]
[variants.r2]
model = {{ m = 2, n = 4 }}
"""


@pytest.fixture
def sweep(tmp_path, text_folder):
    (tmp_path / "small.toml").write_text(SWEEP.format(text=text_folder))
    return str(tmp_path / "small.toml")


def test_turns_warm_up_and_the_fastest_quarter():
    """Step k of a model takes k seconds, of the other 10 + k; three warm-up rounds are not counted."""
    now, calls = [0.0], []

    def step(name, extra):
        def advance():
            calls.append(name)
            now[0] += extra + calls.count(name)

        return advance

    found = step_times.measure({"a": step("a", 0), "b": step("b", 10)}, rounds=12, clock=lambda: now[0])
    assert found == {"a": 5.0, "b": 15.0}  # the middle of 4, 5, 6 of 4 … 15
    rounds = [tuple(calls[i : i + 2]) for i in range(0, len(calls), 2)]
    assert len(rounds) == 15 and set(rounds) == {("a", "b"), ("b", "a")}


def test_a_step_is_that_of_training(sweep):
    """After `steps` of them the weights are those that `train` ends with."""
    config = step_times.configs_of((sweep,))["r2"]
    assert (config.out, config.seed, config.threads) == (None, 0, 1)
    kept = {}

    class Spy(step_times.VWNTransformer):
        def __init__(self, cfg):
            super().__init__(cfg)
            kept["model"] = self

    with pytest.MonkeyPatch.context() as patch, step_times.joined_world("cpu") as world:
        patch.setattr(step_times, "VWNTransformer", Spy)
        with step_times.torch_settings(1, world.device):
            step = step_times.stepper(config, step_times.load_corpus(config.data), world)
            for _ in range(config.steps):
                step()
    wanted = train(config).model.state_dict()
    assert all(kept["model"].state_dict()[name].equal(value) for name, value in wanted.items())


def test_the_command(sweep, tmp_path, monkeypatch, capsys):
    """One thread, the CPU's clock, the rounds asked for; each build's seconds as they come."""
    seen, plan = [], iter([{"plain": 0.2, "r2": 0.3}, {"r2": 0.5, "plain": 0.4}])

    default = inspect.signature(step_times.measure).parameters["clock"].default

    def spied(steps, rounds, clock=default):
        seen.append((tuple(steps), rounds, clock, torch.get_num_threads()))
        for step in steps.values():
            step()
        return next(plan)

    monkeypatch.setattr(step_times, "measure", spied)
    monkeypatch.setattr(sys, "argv", ["step_times", sweep, "--out", str(tmp_path), "--rounds", "7", "--builds", "2"])
    torch.set_num_threads(2)
    try:
        step_times.main()
    finally:
        torch.set_num_threads(1)
    assert [row[1:] for row in seen] == [(7, time.process_time, 1)] * 2
    assert {frozenset(row[0]) for row in seen} == {frozenset({"plain", "r2"})}
    found = json.loads((tmp_path / "step_times.json").read_text())
    assert {name: row["seconds"] for name, row in found["variants"].items()} == {"plain": [0.2, 0.4], "r2": [0.3, 0.5]}
    assert found["rounds"] == 7 and found["processor"] and found["torch"] and found["kernels"] in ("c++", "torch")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "plain" and "1.00×" in lines[0]
    assert lines[1].split() == ["r2", "400.0", "ms", "1.38×,", "builds", "1.25", "to", "1.50"]  # 0.3/0.2 and 0.5/0.4


def test_real_seconds(sweep, tmp_path):
    """The sum of all steps is no more than the process has taken."""
    before = time.process_time()
    seconds = step_times.run(step_times.StepTimesConfig((sweep,), str(tmp_path), rounds=4, builds=1))
    took = time.process_time() - before
    assert all(1e-4 < values[0] < took / (4 + step_times.WARM_UP) for values in seconds.values())


def test_what_is_read(sweep, tmp_path):
    assert step_times.load(tmp_path, {}) is None
    config = step_times.configs_of((sweep,))["r2"]
    row = {"model": dataclasses.asdict(config.model), "seq_len": config.seq_len, "batch_size": config.batch_size}
    runs = {"r2": [KeptRun("r2", row, [], {})]}
    good = {"seconds": [0.2, 0.4], "is": step_times.identity(**row)}

    def written(variants):
        (tmp_path / "step_times.json").write_text(json.dumps({"variants": variants}))
        return step_times.load(tmp_path, runs)

    other = {"seconds": [0.9], "is": "another"}
    found = written({"r2": good, "longer": good | {"seconds": [0.3, 0.7]}, "other": other})
    assert found == pytest.approx({"r2": 0.4, "longer": 0.4, "other": 0.9})  # one model, four builds
    for seconds in ([0], [-1.0], [float("nan")], [float("inf")], ["1"], [True], [], None, 3):
        with pytest.raises(CheckpointError, match=r"step_times\.json"):
            written({"r2": good | {"seconds": seconds}})
    for variants in (None, [], {"r2": 1}, {"r2": {}}):
        with pytest.raises(CheckpointError, match="damaged"):
            written(variants)
    row["seq_len"] += 1
    with pytest.raises(CheckpointError, match="r2: must be the model of the runs of that name"):
        written({"r2": good})


def test_bad_arguments(sweep, tmp_path, text_folder):
    with pytest.raises(ValueError, match="rounds = 0: must be ≥ 1"):
        step_times.measure({}, 0)
    for out in (str(tmp_path / "gone"), "", sweep):
        with pytest.raises(FileNotFoundError, match=r"out = .*: must be a folder that is there"):
            step_times.run(step_times.StepTimesConfig(sweeps=(sweep,), out=out))
    for name in ("rounds", "builds"):
        with pytest.raises(ValueError, match=f"{name} = 0: must be ≥ 1"):
            step_times.run(step_times.StepTimesConfig(sweeps=(sweep,), out=str(tmp_path), **{name: 0}))
    with pytest.raises(ValueError, match="sweeps: must name one or more files"):
        step_times.configs_of(())
    for change in (("n = 4", "n = 6"), ("steps = 60", "steps = 61")):
        other = tmp_path / "other.toml"
        other.write_text(SWEEP.format(text=text_folder).replace(*change))
        with pytest.raises(ValueError, match=r"other.toml: variant '\w+' must be what it is in the sweeps before"):
            step_times.configs_of((sweep, str(other)))
    assert isinstance(step_times.configs_of((sweep, sweep))["plain"], TrainConfig)
