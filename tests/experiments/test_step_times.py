"""Times of training steps side by side: the clock is made up, the steps of one small sweep are real."""

import json
import sys

import pytest

from vwn_ref.experiments import step_times
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
    assert step_times.load(tmp_path) is None
    monkeypatch.setattr(sys, "argv", ["step_times", sweep, "--out", str(tmp_path), "--rounds", "2"])
    step_times.main()
    found = json.loads((tmp_path / "step_times.json").read_text())
    assert found["rounds"] == 2 and found["processor"] and found["torch"]
    assert step_times.load(tmp_path) == found["seconds"] and found["seconds"].keys() == {"plain", "r2"}
    assert all(0 < seconds < 10 for seconds in found["seconds"].values())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "plain" and lines[0].endswith("1.00×")


def test_bad_arguments(sweep, tmp_path, text_folder):
    with pytest.raises(ValueError, match="rounds = 0: must be ≥ 1"):
        step_times.measure({}, 0)
    options = step_times.StepTimesConfig(sweeps=(sweep,), out=str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match="gone': must be a folder that is there"):
        step_times.run(options)
    other = tmp_path / "other.toml"
    other.write_text(SWEEP.format(text=text_folder).replace("n = 4", "n = 6"))
    with pytest.raises(ValueError, match=r"other.toml: variant 'r2' must be what it is in the sweeps before"):
        step_times.configs_of((sweep, str(other)))
    assert isinstance(step_times.configs_of((sweep, sweep))["plain"], TrainConfig)
