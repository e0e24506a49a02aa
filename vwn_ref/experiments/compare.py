"""Compare kept runs, seed by seed: `python -m vwn_ref.experiments.compare figures/data/first_training`.

Runs are paired: with one seed two models have the same backbone weights, batches and validation windows. The interval
of their difference is Student's t over the seeds. How much steadier it is than the losses, lesson 07 measures: along a
curve much, at its end hardly.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import tyro

from vwn_ref.experiments.checkpoint import CheckpointError
from vwn_ref.experiments.console import told
from vwn_ref.experiments.run import fixed_fields, read_json
from vwn_ref.experiments.storage import write_whole

FILES = ("config.json", "log.jsonl", "summary.json")  # what is kept of a run: no weights, no checkpoint
MEASURED = ("downstream.json", "windows.json")  # and these, by the modules of that name, where there are any


class Estimate(NamedTuple):
    """Mean over the seeds and half the width of its 95 % interval (NaN for one seed)."""

    mean: float
    half_width: float

    @property
    def told_apart(self) -> bool:
        """Whether the interval does not hold 0; one seed tells nothing apart."""
        return self.half_width < abs(self.mean)

    def __str__(self) -> str:
        width = "(no interval)" if math.isnan(self.half_width) else f"± {self.half_width:.4f}"
        return f"{self.mean:+.4f} {width}"


def interval(values: Sequence[float], level: float = 0.95) -> Estimate:
    """Student's t interval of the mean."""
    from scipy import stats

    if len(values) < 2:
        return Estimate(float(values[0]), float("nan"))
    quantile = float(stats.t.ppf(0.5 + level / 2, len(values) - 1))
    return Estimate(statistics.fmean(values), quantile * statistics.stdev(values) / len(values) ** 0.5)


def holm(p: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which of several tests hold when all are counted: Holm's correction of their p values."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    holds = [False] * len(p)
    for rank, i in enumerate(order):
        if not p[i] <= level / (len(p) - rank):
            break
        holds[i] = True
    return holds


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


def load_runs(folder: str | Path) -> dict[str, list[KeptRun]]:
    """Runs in `folder`/<variant>-s<seed>/, by variant name, each list in the order of the seeds.

    Raises FileNotFoundError where there is none, ValueError where runs of one name differ in more than the seed,
    CheckpointError where one is damaged.
    """
    found: dict[str, list[KeptRun]] = {}
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


class NotPaired(ValueError):
    """Two models whose losses are not of the same text."""


def paired(runs: Sequence[KeptRun], base: Sequence[KeptRun], name: str = "val_next") -> Estimate:
    """Loss of `runs` minus loss of `base` over the seeds that both have.

    Raises NotPaired where they were trained on different text or validated on different windows, ValueError where they
    have no seed in common.
    """
    both = f"{runs[0].name} and {base[0].name}"
    if len({(run.summary.get("corpus") or {}).get("digest") for run in (*runs, *base)}) > 1:
        raise NotPaired(f"{both}: must be runs on the same corpus")
    for field in ("seq_len", "val_tokens"):  # these fix the windows
        if len({run.config.get(field) for run in (*runs, *base)}) > 1:
            raise NotPaired(f"{both}: must be runs with the same {field}")
    if name.endswith("next2") and not all(run.config.get("model", {}).get("mtp_layers", 1) for run in (*runs, *base)):
        raise ValueError(f"{both}: must have an MTP head, {name} is its loss")  # a summary says 0 without one
    there = {run.seed: run.summary[name] for run in base}
    differences = [run.summary[name] - there[run.seed] for run in runs if run.seed in there]
    if not differences:
        raise ValueError(f"{both}: must have a seed in common")
    return interval(differences)


def paired_or_why(runs: Sequence[KeptRun], base: Sequence[KeptRun], name: str = "val_next") -> str:
    """`paired` for a table's cell, which says so where the two cannot be compared."""
    try:
        return str(paired(runs, base, name))
    except NotPaired as reason:
        return f"not comparable, {str(reason).rpartition('same ')[2]} differs"


def table(folder: str | Path, base: str = "plain") -> str:
    """Markdown: parameters, the validation loss of every seed, the mean, and the paired difference to `base`."""
    found = load_runs(folder)
    if base not in found:
        raise ValueError(f"base = {base!r}: must be one of {', '.join(found)}")
    lines = ["| model | parameters | validation loss by seed | mean | against " + base + " |", "|---|---|---|---|---|"]
    for name, runs in sorted(found.items(), key=lambda item: (item[0] != base, item[0])):
        losses = [run.summary["val_next"] for run in runs]
        difference = "" if name == base else paired_or_why(runs, found[base])
        lines.append(
            f"| {name} | {runs[0].summary['parameters']:,} | {', '.join(f'{x:.4f}' for x in losses)} "
            f"| {statistics.fmean(losses):.4f} | {difference} |"
        )
    return "\n".join(lines)


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


@dataclass(frozen=True)
class CompareConfig:
    """Which runs, against which."""

    folder: tyro.conf.Positional[str]
    """Folder of runs named <variant>-s<seed>."""
    base: str = "plain"
    """The variant that the others are paired with."""
    keep_from: str | None = None
    """First copy the finished runs of this folder here (config, log and summary; no weights)."""


def main() -> None:
    """Print the table."""
    config = tyro.cli(CompareConfig, prog="python -m vwn_ref.experiments.compare", description=__doc__)
    with told():
        if config.keep_from is not None:
            keep(config.keep_from, config.folder)
        print(table(config.folder, config.base))


if __name__ == "__main__":
    main()
