"""CPU time of a training step, every variant of a sweep beside the others.

    python -m vwn_ref.experiments.step_times vwn_ref/experiments/studies/e_parts.toml --out figures/data/a

The runs of a sweep are made at different hours, beside different neighbours, and on a busy core the same step takes
half as long again: their own CPU times are what a study cost, and no measure of what a variant costs. Here one process
holds all variants and every round takes one training step of each, in a new order, so that whatever else the machine
does strikes all alike. It can only add time: a step's time is the median of the fastest quarter of the rounds.

Writes `step_times.json` into the folder of the kept runs, where `vwn_ref.experiments.parts` looks for it.
"""

from __future__ import annotations

import json
import platform
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import torch
import tyro

from vwn_ref.experiments.bench_cpu import undisturbed
from vwn_ref.experiments.console import told
from vwn_ref.experiments.data import Corpus, DataConfig, load_corpus
from vwn_ref.experiments.run import read_json
from vwn_ref.experiments.storage import write_text
from vwn_ref.experiments.sweep import read_sweep
from vwn_ref.experiments.train import Objective, TrainConfig, advance, git_commit, optimizer_of
from vwn_ref.experiments.world import World, joined_world, torch_settings
from vwn_ref.model import VWNTransformer

FILE = "step_times.json"
WARM_UP = 3  # rounds: kernels are compiled, buffers are there


def measure(
    steps: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Seconds of each of `steps` by `clock`, called once a round. Raises ValueError for rounds < 1."""
    if rounds < 1:
        raise ValueError(f"rounds = {rounds}: must be ≥ 1")
    order, times = random.Random(0), {name: [] for name in steps}
    for round_ in range(-WARM_UP, rounds):
        for name in order.sample(list(steps), len(steps)):
            start = clock()
            steps[name]()
            if round_ >= 0:
                times[name].append(clock() - start)
    return {name: undisturbed(values) for name, values in times.items()}


def configs_of(files: tuple[str, ...]) -> dict[str, TrainConfig]:
    """A config for each variant of these sweeps, without a folder. Raises ValueError where one name is two configs."""
    found: dict[str, TrainConfig] = {}
    for file in files:
        for run in read_sweep(file).runs:
            config = replace(run.config, out=None, resume=False, seed=0, threads=1, device="cpu")
            if found.setdefault(run.variant, config) != config:
                raise ValueError(f"{file}: variant {run.variant!r} must be what it is in the sweeps before")
    return found


def stepper(config: TrainConfig, corpus: Corpus, world: World) -> Callable[[], object]:
    """What takes the next training step of a new model, as `train` does."""
    torch.manual_seed(config.seed)
    model = VWNTransformer(config.model).to(world.device)
    optimizer, objective = optimizer_of(model, config, world.device), Objective(model, config, world.device)
    steps = count()
    return lambda: advance(objective, optimizer, corpus, config, world, next(steps))


def load(folder: Path) -> dict[str, float] | None:
    """Seconds a step by variant, as `main` has written them into `folder`; None where it has not."""
    path = folder / FILE
    return read_json(path)["seconds"] if path.exists() else None


@dataclass(frozen=True)
class StepTimesConfig:
    """Of which sweeps."""

    sweeps: tyro.conf.Positional[tuple[str, ...]]
    """TOML files; with more than one, a variant of the same name must be the same."""
    out: str
    """Folder of the kept runs: `step_times.json` is written there."""
    rounds: int = 40
    """Timed rounds."""


def run(options: StepTimesConfig) -> dict[str, float]:
    """Measure and write. Raises ValueError or FileNotFoundError, naming file or field, for a bad sweep or folder."""
    out = Path(options.out)
    if not out.is_dir():
        raise FileNotFoundError(f"out = {options.out!r}: must be a folder that is there")
    configs = configs_of(options.sweeps)
    corpora: dict[DataConfig, Corpus] = {}
    with joined_world("cpu") as world, torch_settings(1, world.device):
        steps = {}
        for name, config in configs.items():
            if config.data not in corpora:
                corpora[config.data] = load_corpus(config.data)
            steps[name] = stepper(config, corpora[config.data], world)
        seconds = measure(steps, options.rounds)
    found = {
        "what": "CPU time of one training step, one thread: median of the fastest quarter of the rounds",
        "rounds": options.rounds,
        "platform": platform.platform(),
        "processor": processor(),
        "torch": torch.__version__,
        "commit": git_commit(),
        "seconds": {name: round(value, 6) for name, value in seconds.items()},
    }
    write_text(out / FILE, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return seconds


def processor() -> str:
    """The CPU's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    """Measure, write, and print what came out; errors are told in a line."""
    options = tyro.cli(StepTimesConfig, prog="python -m vwn_ref.experiments.step_times", description=__doc__)
    with told():
        seconds = run(options)
    base = seconds.get("plain")
    for name, value in seconds.items():
        print(f"{name:24}{1e3 * value:8.1f} ms" + (f"{value / base:8.2f}×" if base else ""))


if __name__ == "__main__":
    main()
