"""CPU time of a training step, every variant of a sweep beside the others.

    python -m vwn_ref.experiments.step_times vwn_ref/experiments/studies/e_parts.toml --out figures/data/a

The runs of a sweep are made at different hours, beside different neighbours, and on a busy core the same step takes
half as long again: their own CPU times are what a study cost, and no measure of what a variant costs. Here one process
holds all variants and every round takes one training step of each, in random order, so that whatever else the machine
does strikes all alike. It can only add time: a step's time is the median of the fastest quarter of the rounds. Where a
model lies in memory matters, too, by several per cent: all are built anew, in another order, `builds` times, and the
time is the mean. Steps are on one thread of the CPU, eager, whatever the sweep says of device, threads and compile.

Writes `step_times.json` into the folder of the kept runs, where `vwn_ref.experiments.parts` looks for it.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
import tyro

from vwn_ref.config import VWNConfig
from vwn_ref.experiments.bench_cpu import undisturbed
from vwn_ref.experiments.checkpoint import CheckpointError
from vwn_ref.experiments.console import told
from vwn_ref.experiments.data import Corpus, load_corpus
from vwn_ref.experiments.finished import KeptRun, is_number
from vwn_ref.experiments.provenance import git_commit, processor
from vwn_ref.experiments.run import read_json
from vwn_ref.experiments.storage import json_digest, write_text
from vwn_ref.experiments.sweep import read_sweep
from vwn_ref.experiments.train import Objective, TrainConfig, advance, check_corpus, check_share, optimizer_of
from vwn_ref.experiments.world import World, joined_world, torch_settings
from vwn_ref.kernels import cpu_backend
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


def identity(model: dict[str, Any], seq_len: int, batch_size: int) -> str:
    """Digest of what a step's time hangs on."""
    return json_digest({**dataclasses.asdict(VWNConfig(**model)), "batch": [batch_size, seq_len]})


def configs_of(files: tuple[str, ...]) -> dict[str, TrainConfig]:
    """A config for each variant of these sweeps, without a folder. Raises ValueError where one name is two configs."""
    if not files:
        raise ValueError("sweeps: must name one or more files")
    found: dict[str, TrainConfig] = {}
    for file in files:
        for run in read_sweep(file).runs:
            config = replace(run.config, out=None, resume=False, seed=0, threads=1, device="cpu")
            if found.setdefault(run.variant, config) != config:
                raise ValueError(f"{file}: variant {run.variant!r} must be what it is in the sweeps before")
    return found


def stepper(config: TrainConfig, corpus: Corpus, world: World) -> Callable[[], object]:
    """What takes the next training step of a new model, as `train` does; after the last the rate stays as it is."""
    torch.manual_seed(config.seed)
    model = VWNTransformer(config.model).to(world.device)
    optimizer, objective = optimizer_of(model, config, world.device), Objective(model, config, world.device)
    steps = count()
    return lambda: advance(objective, optimizer, corpus, config, world, min(next(steps), config.steps - 1))


def load(folder: Path, runs: Mapping[str, Sequence[KeptRun]]) -> dict[str, float] | None:
    """Mean seconds a step by variant, as `main` has written them into `folder`; None where it has not.

    Raises CheckpointError for a damaged file, or one that has timed other models than those of `runs`.
    """
    path = folder / FILE
    if not path.exists():
        return None
    kept = read_json(path)
    found: dict[str, list[float]] = {}
    same: dict[str, list[float]] = {}
    try:
        for name, row in kept["variants"].items():
            seconds = row["seconds"]
            if not seconds or not all(is_number(x) and x > 0 for x in seconds):
                raise CheckpointError(f"{path}: {name} = {seconds}: must be seconds > 0")
            for run in runs.get(name, [])[:1]:
                if row["is"] != identity(run.config["model"], run.config["seq_len"], run.config["batch_size"]):
                    raise CheckpointError(f"{path}: {name}: must be the model of the runs of that name")
            same.setdefault(row["is"], []).extend(seconds)
            found[name] = same[row["is"]]  # models that are one, such as a longer run's, share what was measured
    except (LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    return {name: statistics.fmean(seconds) for name, seconds in found.items()}


@dataclass(frozen=True)
class StepTimesConfig:
    """Of which sweeps."""

    sweeps: tyro.conf.Positional[tuple[str, ...]]
    """TOML files; with more than one, a variant of the same name must be the same."""
    out: str
    """Folder of the kept runs: `step_times.json` is written there."""
    rounds: int = 16
    """Timed rounds of each build."""
    builds: int = 4
    """How many times all models are built anew."""


def run(options: StepTimesConfig) -> dict[str, list[float]]:
    """Measure and write. Raises ValueError or FileNotFoundError, naming file or field, for a bad sweep or folder."""
    out = Path(options.out).expanduser()
    if not options.out or not out.is_dir():
        raise FileNotFoundError(f"out = {options.out!r}: must be a folder that is there")
    for name in ("rounds", "builds"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} = {getattr(options, name)}: must be ≥ 1")
    configs = configs_of(options.sweeps)
    corpora = {data: load_corpus(data) for data in {config.data: None for config in configs.values()}}
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    with joined_world("cpu") as world, torch_settings(1, world.device):
        for config in configs.values():
            check_corpus(corpora[config.data], config)
            check_share(config, world)
        for build in range(options.builds):
            order = random.Random(build).sample(list(configs), len(configs))
            steps = {name: stepper(configs[name], corpora[configs[name].data], world) for name in order}
            for name, value in measure(steps, options.rounds).items():
                seconds[name].append(value)
    found = {
        "what": "seconds of CPU time of a training step, one thread: median of the fastest quarter, one for each build",
        "rounds": options.rounds,
        "kernels": cpu_backend(),
        "platform": platform.platform(),
        "processor": processor(),
        "torch": torch.__version__,
        "commit": git_commit(),
        "variants": {
            name: {
                "seconds": [round(value, 6) for value in values],
                "is": identity(dataclasses.asdict(config.model), config.seq_len, config.batch_size),
            }
            for (name, config), values in zip(configs.items(), seconds.values(), strict=True)
        },
    }
    write_text(out / FILE, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return seconds


def main() -> None:
    """Measure, write, and print what came out; errors are told in a line."""
    options = tyro.cli(StepTimesConfig, prog="python -m vwn_ref.experiments.step_times", description=__doc__)
    with told():
        seconds = run(options)
    for name, values in seconds.items():
        line = f"{name:24}{1e3 * statistics.fmean(values):8.1f} ms"
        if "plain" in seconds:
            ratios = [one / other for one, other in zip(values, seconds["plain"], strict=True)]
            line += f"{statistics.fmean(ratios):8.2f}×, builds {min(ratios):.2f} to {max(ratios):.2f}"
        print(line)


if __name__ == "__main__":
    main()
