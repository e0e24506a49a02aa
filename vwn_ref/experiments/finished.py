"""Finished runs, read back: what is kept of them, and how they are found.

    runs = load_runs("figures/data/a")     # {"plain": [seed 0, seed 1, ...], "r1": [...], ...}
    runs["r2"][0].summary["val_next"]

A run's folder is named <variant>-s<seed>. `compare` pairs them.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vwn_ref.experiments.checkpoint import CheckpointError
from vwn_ref.experiments.run import fixed_fields, read_json
from vwn_ref.experiments.storage import write_whole

FILES = ("config.json", "log.jsonl", "summary.json")  # what is kept of a run: no weights, no checkpoint
MEASURED = ("downstream.json", "windows.json")  # and these, by the modules of that name, where there are any
LOSSES = {"val_next": "next token", "val_next2": "next-2 token"}  # final ones, by their names in a summary


@dataclass(frozen=True)
class KeptRun:
    """One finished run: what its three files say."""

    name: str
    config: dict
    log: list[dict]
    summary: dict

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def variant(self) -> str:
        """Everything but the seed, as one string: runs of one variant differ in the seed alone."""
        return json.dumps({k: v for k, v in fixed_fields(self.config).items() if k != "seed"}, sort_keys=True)

    def curve(self, name: str = "val_next") -> tuple[list[int], list[float]]:
        """Tokens and values of the lines of the log that have `name`."""
        lines = [line for line in self.log if name in line]
        return [line["tokens"] for line in lines], [line[name] for line in lines]


Runs = dict[str, list[KeptRun]]  # by variant, in the order of the seeds


def read_run(folder: Path) -> KeptRun:
    """The finished run in `folder`, which is named <variant>-s<seed>.

    Raises CheckpointError, naming the file, for what is damaged or is not of this run.
    """
    config, log, summary = values = [read_json(folder / name) for name in FILES]
    for file, value, kind in zip(FILES, values, (dict, list, dict), strict=True):
        if not isinstance(value, kind) or not all(isinstance(line, dict) for line in value if kind is list):
            raise CheckpointError(f"{folder / file} is damaged: must hold objects")
    if "seed" not in config or not folder.name.endswith(f"-s{config['seed']}"):
        raise CheckpointError(f"{folder}: must be named after its run's seed, {config.get('seed')}")
    for name in ("val_next", *(key for key in summary if key.startswith(("val_", "train_")))):
        if not is_number(summary.get(name)):
            raise CheckpointError(f"{folder / 'summary.json'}: {name} = {summary.get(name)!r}: must be a finite number")
    if log and log[-1].get("step") != config.get("steps"):
        raise CheckpointError(f"{folder / 'log.jsonl'}: ends at step {log[-1].get('step')}, not {config.get('steps')}")
    return KeptRun(folder.name.rpartition("-s")[0], config, log, summary)


def is_number(value: object) -> bool:
    """Finite, and neither a bool nor a string."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def load_runs(folder: str | Path) -> Runs:
    """Runs in `folder`/<variant>-s<seed>/, by variant name, each list in the order of the seeds.

    Raises FileNotFoundError where there is none, ValueError where runs of one name differ in more than the seed,
    CheckpointError where one is damaged.
    """
    found: Runs = {}
    for path in sorted(Path(folder).glob("*/summary.json")):
        name = path.parent.name.rpartition("-s")[0]
        if not name:
            raise ValueError(f"{path.parent}: must be named <variant>-s<seed>")
        found.setdefault(name, []).append(read_run(path.parent))
    if not found:
        raise FileNotFoundError(f"{folder}: must hold folders <variant>-s<seed> of finished runs")
    for name, runs in found.items():
        if len({run.variant for run in runs}) > 1:
            raise ValueError(f"{folder}: the runs {name}-s… must differ in nothing but the seed")
        runs.sort(key=lambda run: run.seed)
    return found


def runs_in(folder: Path) -> Runs:
    """`load_runs`, empty where there is none."""
    try:
        return load_runs(folder)
    except FileNotFoundError:
        return {}


class NotRun(LookupError):
    """The runs that a figure is drawn from are not there yet."""


def common_seeds(groups: Sequence[Sequence[KeptRun]]) -> list[int]:
    """Seeds that every group has. Raises ValueError if there are none."""
    seeds = sorted(set.intersection(*({run.seed for run in runs} for runs in groups)))
    if not seeds:
        raise ValueError(f"{', '.join(runs[0].name for runs in groups)}: must have a seed in common")
    return seeds


def shared_seeds(runs: Runs, *names: str) -> list[int]:
    """Seeds that all these variants have; none where a variant is missing."""
    return sorted(set.intersection(*({run.seed for run in runs.get(name, [])} for name in names)))


def measures(run: KeptRun, loss: str) -> bool:
    """Whether a run has this final loss. Without an MTP head there is no next-2 token loss, whatever is written."""
    return loss in run.summary and (loss != "val_next2" or run.config["model"].get("mtp_layers", 0) > 0)


def keep(source: str | Path, target: str | Path, names: Collection[str] | None = None) -> int:
    """Copy what is kept of the finished runs below `source` into `target`; returns how many there are.

    `names`: of these folders only; None: of all.
    """
    runs = [path.parent for path in sorted(Path(source).glob("*/summary.json"))]
    runs = [run for run in runs if names is None or run.name in names]
    for run in runs:
        read_run(run)  # damaged ones are not kept
        (Path(target) / run.name).mkdir(parents=True, exist_ok=True)
        for name in (*FILES, *(name for name in MEASURED if (run / name).exists())):
            write_whole(Path(target) / run.name / name, partial(shutil.copyfile, run / name))
    return len(runs)
