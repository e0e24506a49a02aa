"""Compare kept runs, seed by seed: `python -m vwn_ref.experiments.compare figures/data/first_training`.

Runs are paired: with one seed two models have the same backbone weights, batches and validation windows. The interval
of their difference is Student's t over the seeds. How much steadier it is than the losses, lesson 07 measures: along a
curve much, at its end hardly.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tyro

from vwn_ref.experiments.console import told
from vwn_ref.experiments.finished import KeptRun, load_runs


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
    """Student's t interval of the mean. Raises ValueError for no values, and for one that is not finite."""
    from scipy import stats

    if not len(values):
        raise ValueError("values = []: must be one number or more")
    if not all(map(math.isfinite, values)):
        raise ValueError(f"values = {list(values)}: must be finite numbers")
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


class NotPaired(ValueError):
    """Models whose losses are not of the same text."""


def check_comparable(runs: Sequence[KeptRun], name: str = "val_next") -> None:
    """Raise NotPaired for runs trained on different text or validated on different windows, ValueError for one without
    this loss."""
    names = " and ".join(dict.fromkeys(run.name for run in runs))
    if len({(run.summary.get("corpus") or {}).get("digest") for run in runs}) > 1:
        raise NotPaired(f"{names}: must be runs on the same corpus")
    for field in ("seq_len", "val_tokens"):  # these fix the windows
        if len({run.config.get(field) for run in runs}) > 1:
            raise NotPaired(f"{names}: must be runs with the same {field}")
    if name.endswith("next2") and not all(run.config.get("model", {}).get("mtp_layers", 1) for run in runs):
        raise ValueError(f"{names}: must have an MTP head, {name} is its loss")  # a summary says 0 without one


def paired(runs: Sequence[KeptRun], base: Sequence[KeptRun], name: str = "val_next") -> Estimate:
    """Loss of `runs` minus loss of `base` over the seeds that both have.

    Raises as `check_comparable`, and ValueError where they have no seed in common.
    """
    check_comparable([*runs, *base], name)
    there = {run.seed: run.summary[name] for run in base}
    differences = [run.summary[name] - there[run.seed] for run in runs if run.seed in there]
    if not differences:
        raise ValueError(f"{runs[0].name} and {base[0].name}: must have a seed in common")
    return interval(differences)


def paired_or_why(runs: Sequence[KeptRun], base: Sequence[KeptRun], name: str = "val_next") -> str:
    """`paired` for a table's cell, which says so where the two cannot be compared."""
    if not {run.seed for run in runs} & {run.seed for run in base}:
        return "no seed in common"
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


@dataclass(frozen=True)
class CompareConfig:
    """Which runs, against which."""

    folder: tyro.conf.Positional[str]
    """Folder of runs named <variant>-s<seed>."""
    base: str = "plain"
    """The variant that the others are paired with."""


def main() -> None:
    """Print the table."""
    config = tyro.cli(CompareConfig, prog="python -m vwn_ref.experiments.compare", description=__doc__)
    with told():
        print(table(config.folder, config.base))


if __name__ == "__main__":
    main()
