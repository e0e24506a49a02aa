"""Study E, what pays: `python -m vwn_ref.experiments.parts figures/data/a`.

Two tables of the runs in a folder that belong to studies/e_parts.toml or to another sweep with its names. The first has
each model's price in four currencies, over that of plain, and its losses:

    parameters        all of them
    backbone          arithmetic of attention, FFN and norms of the blocks, over the whole training
    arithmetic        all of it, over the whole training
    CPU time          of all training steps, where `vwn_ref.experiments.step_times` has measured a step of each model

The second has `CONTRASTS`: what each part adds where nothing else is changed, and what is left of the gain against a
plain model that gets as much of a currency. Differences are paired by seed, with 95 % intervals; there are many rows,
so one in twenty excludes 0 by chance.

`python -m vwn_ref.experiments.parts figures/data --across` sets the main ones side by side for each backbone.
`parts_figures` draws both tables.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tyro

from vwn_ref.config import VWNConfig
from vwn_ref.cost import BACKWARD, add, model_flops, model_parameters
from vwn_ref.experiments import step_times
from vwn_ref.experiments.compare import paired
from vwn_ref.experiments.console import told
from vwn_ref.experiments.finished import (
    LOSSES,
    KeptRun,
    Runs,
    common_seeds,
    load_runs,
    measures,
    runs_in,
    shared_seeds,
)

Times = dict[str, float] | None  # seconds a training step, by variant
CURRENCIES = ("parameters", "backbone", "arithmetic", "CPU time")
BACKBONE = ("attention projections", "attention scores", "ffn", "norms")


class Contrast(NamedTuple):
    """Loss of `model` minus loss of `base` answers a question, under a heading."""

    about: str
    what: str
    model: str
    base: str


CONTRASTS = (
    Contrast("routing, no width", "static", "r1-static", "plain"),
    Contrast("routing, no width", "dynamic", "r1", "plain"),
    Contrast("routing, no width", "dynamic, no GroupNorm", "r1-nonorm", "plain"),
    Contrast("dynamics", "at r = 1", "r1", "r1-static"),
    Contrast("dynamics", "at r = 2", "r2", "r2-static"),
    Contrast("dynamics", "at r = 4", "r4", "r4-static"),
    Contrast("dynamics", "at r = 2, low-rank table", "r2-lowrank", "r2-static-lowrank"),
    Contrast("dynamics", "at r = 4, low-rank table", "r4-lowrank", "r4-static-lowrank"),
    Contrast("wider state and its connections, low-rank table", "r = 2, static", "r2-static-lowrank", "r1-static"),
    Contrast("wider state and its connections, low-rank table", "r = 4, static", "r4-static-lowrank", "r1-static"),
    Contrast("wider state and its connections, low-rank table", "r = 2", "r2-lowrank", "r1"),
    Contrast("wider state and its connections, low-rank table", "r = 4", "r4-lowrank", "r1"),
    Contrast("wider state and its connections, low-rank table", "r = 8", "r8-lowrank", "r1"),
    Contrast("wide table, with the width", "r = 2, static", "r2-static", "r2-static-lowrank"),
    Contrast("wide table, with the width", "r = 4, static", "r4-static", "r4-static-lowrank"),
    Contrast("wide table, with the width", "r = 2", "r2", "r2-lowrank"),
    Contrast("wide table, with the width", "r = 4", "r4", "r4-lowrank"),
    Contrast("wide table, with the width", "r = 8", "r8", "r8-lowrank"),
    Contrast("wide table, without the width", "2D wide, r = 1", "r1-table2", "r1"),
    Contrast("wide table, without the width", "4D wide, r = 1", "r1-table4", "r1"),
    Contrast("all together", "r = 2", "r2", "plain"),
    Contrast("all together", "r = 4", "r4", "plain"),
    Contrast("all together", "r = 8", "r8", "plain"),
    Contrast("n-grams", "plain", "plain-ngram", "plain"),
    Contrast("n-grams", "r = 2", "r2-ngram", "r2"),
    Contrast("n-grams", "r = 4", "r4-ngram", "r4"),
    Contrast("initial W_reduce, against its default, mean", "first, r = 2", "r2-first", "r2"),
    Contrast("initial W_reduce, against its default, mean", "random, r = 2", "r2-random", "r2"),
    Contrast("initial W_reduce, against its default, mean", "first, r = 4", "r4-first", "r4"),
    Contrast("initial W_reduce, against its default, mean", "random, r = 4", "r4-random", "r4"),
    Contrast("no GroupNorm before W_reduce", "r = 1", "r1-nonorm", "r1"),
    Contrast("no GroupNorm before W_reduce", "r = 2", "r2-nonorm", "r2"),
    Contrast("no GroupNorm before W_reduce", "r = 4", "r4-nonorm", "r4"),
    Contrast("weight decay on A and B", "r = 2", "r2-decay", "r2"),
    Contrast("weight decay on A and B", "r = 4", "r4-decay", "r4"),
    Contrast("against plain with as many parameters", "r = 2 has 1 % fewer", "r2", "plain-d20"),
    Contrast("against plain with as many parameters", "r = 4 has 14 % more", "r4", "plain-d24"),
    Contrast("against plain with as many parameters", "r = 4 has 14 % fewer", "r4", "plain-d28"),
    Contrast("against plain with as many parameters", "r = 4, in 14 blocks", "r4", "plain-l14"),
    Contrast("against plain with n-grams", "r = 2 has 31 % fewer parameters", "r2", "plain-ngram"),
    Contrast("against plain with n-grams", "r = 4 has 3 % more", "r4", "plain-ngram"),
    Contrast("against plain with n-grams", "r = 2, n-grams too", "r2-ngram", "plain-ngram"),
    Contrast("against plain with n-grams", "r = 4, n-grams too", "r4-ngram", "plain-ngram"),
    Contrast("against plain with as much arithmetic", "r = 2, in 6 blocks", "r2", "plain-l6"),
    Contrast("against plain with as much arithmetic", "r = 2, 1.25 × as wide", "r2", "plain-d20"),
    Contrast("against plain with as much arithmetic", "r = 4, in 10 blocks", "r4", "plain-l10"),
    Contrast("against plain with as much arithmetic", "r = 4, 1.5 × as wide", "r4", "plain-d24"),
    Contrast("against plain with about as much time", "r = 2, 4,000 steps", "r2", "plain-4000"),
    Contrast("against plain with about as much time", "r = 4, 5,700 steps", "r4", "plain-5700"),
    Contrast("against plain, twice as wide", "r = 2", "r2", "plain-d32"),
    Contrast("against plain, twice as wide", "r = 4", "r4", "plain-d32"),
    Contrast("against plain, twice as wide", "r = 8", "r8", "plain-d32"),
)


class Price(NamedTuple):
    """Of a whole training run: a number, FLOPs, FLOPs."""

    parameters: int
    backbone: float
    arithmetic: float


def price(run: KeptRun) -> Price:
    """What a run cost."""
    model = VWNConfig(**run.config["model"])
    flops, tokens = model_flops(model, run.config["seq_len"]), run.summary["tokens"]
    backbone = add(*(flops[part] for part in BACKBONE)).total
    total = add(*flops.values()).total
    size = sum(model_parameters(model).values())
    steps = (1 + BACKWARD) * tokens
    return Price(size, float(steps * backbone), float(steps * total))


def price_ratio(runs: list[KeptRun], base: list[KeptRun], times: Times) -> dict[str, float | None]:
    """Price of a run of `runs` over that of one of `base`, by currency. CPU time: None where `times` lacks a model."""
    run, other = runs[0], base[0]
    exact = [one / two for one, two in zip(price(run), price(other), strict=True)]
    spent = None
    if times and run.name in times and other.name in times:
        spent = run.config["steps"] * times[run.name] / (other.config["steps"] * times[other.name])
    return dict(zip(CURRENCIES, (*exact, spent), strict=True))


def price_table(runs: Runs, base: str = "plain", times: Times = None) -> str:
    """Markdown: each model's price over that of `base`, and its losses, over the seeds that `base` has as well."""
    losses = [name for name in LOSSES if all(measures(run, name) for run in runs[base])]
    heads = [f"{LOSSES[name]} | against {base}" for name in losses]
    lines = [f"| model | seeds | {' | '.join(CURRENCIES)} | {' | '.join(heads)} |"]
    lines.append("|" + "---|" * (2 + len(CURRENCIES) + 2 * len(heads)))
    for name, group in sorted(runs.items(), key=lambda item: (item[0] != base, item[0])):
        seeds = common_seeds([group, runs[base]])
        group = [run for run in group if run.seed in seeds]
        cells = [name, str(len(group))]
        cells += ["" if x is None else f"{x:.2f}×" for x in price_ratio(group, runs[base], times).values()]
        for loss in losses:
            if not all(measures(run, loss) for run in group):
                cells += ["", ""]
                continue
            cells.append(f"{statistics.fmean(run.summary[loss] for run in group):.4f}")
            cells.append("" if name == base else str(paired(group, runs[base], loss)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def contrast_table(runs: Runs) -> str:
    """Markdown: `CONTRASTS` of which both models have run, by next-token and next-2-token loss; then what has not."""
    pairs = [(*runs[c.model], *runs[c.base]) for c in CONTRASTS if c.model in runs and c.base in runs]
    losses = [name for name in LOSSES if any(all(measures(run, name) for run in pair) for pair in pairs)]
    lines = [f"| what | | model − base | seeds | {' | '.join(LOSSES[name] for name in losses)} |"]
    lines.append("|" + "---|" * (4 + len(losses)))
    before = None
    for contrast in CONTRASTS:
        if contrast.model in runs and contrast.base in runs:
            model, base = runs[contrast.model], runs[contrast.base]
            about = contrast.about if contrast.about != before else ""
            before = contrast.about
            cells = [about, contrast.what, f"{contrast.model} − {contrast.base}", str(len(common_seeds([model, base])))]
            for name in losses:  # a model without an MTP head has one loss
                there = all(measures(run, name) for run in (*model, *base))
                cells.append(str(paired(model, base, name)) if there else "–")
            lines.append(f"| {' | '.join(cells)} |")
    absent = dict.fromkeys(name for c in CONTRASTS for name in (c.model, c.base) if name not in runs)
    return "\n".join(lines + ([f"\nNot run: {', '.join(absent)}."] if absent else []))


BACKBONES = ("a", "b_d32", "b_d64", "e_bytes")
SPLIT = {
    "routing: r1 − plain": ("r1", "plain"),
    "width: r4-lowrank − r1": ("r4-lowrank", "r1"),
    "width: r8-lowrank − r1": ("r8-lowrank", "r1"),
    "routing and width: r4-lowrank − plain": ("r4-lowrank", "plain"),
    "table: r4 − r4-lowrank": ("r4", "r4-lowrank"),
    "all: r4 − plain": ("r4", "plain"),
}


def table_share(plain: VWNConfig) -> float:
    """The part of a model's parameters that its embedding takes."""
    sizes = model_parameters(plain)
    return sizes["embedding"] / sum(sizes.values())


def across_table(data: Path, loss: str = "val_next") -> str:
    """Markdown: where does the width itself pay? `SPLIT` by backbone and vocabulary, in the folders `BACKBONES`."""
    lines = [f"| D | blocks | vocabulary | embedding's share of plain | {' | '.join(SPLIT)} |"]
    lines.append("|" + "---|" * (4 + len(SPLIT)))
    for name in BACKBONES:
        runs = runs_in(data / name)
        if "plain" not in runs:
            continue
        model = VWNConfig(**runs["plain"][0].config["model"])
        cells = [str(model.dim), str(model.n_layers), str(model.vocab_size), f"{table_share(model):.0%}"]
        for one, other in SPLIT.values():
            seeds = shared_seeds(runs, one, other)
            cells.append(f"{paired(runs[one], runs[other], loss)}, {len(seeds)} seeds" if seeds else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class PartsConfig:
    """Of which runs."""

    folder: tyro.conf.Positional[str]
    """Folder of finished runs named <variant>-s<seed>; with --across, of such folders."""
    base: str = "plain"
    """The model whose price is 1."""
    across: bool = False
    """Instead: what routing, width and table give with other backbones, one line each."""


def report(config: PartsConfig) -> str:
    """Both tables, or that of all backbones. Raises ValueError where `base` has no runs."""
    if config.across:
        if not any((Path(config.folder) / name).is_dir() for name in BACKBONES):
            raise FileNotFoundError(f"{config.folder}: must hold one of the folders {', '.join(BACKBONES)}")
        return across_table(Path(config.folder))
    runs = load_runs(config.folder)
    if config.base not in runs:
        raise ValueError(f"base = {config.base!r}: must be one of {', '.join(runs)}")
    return price_table(runs, config.base, step_times.load(Path(config.folder), runs)) + "\n\n" + contrast_table(runs)


def main() -> None:
    """Print the tables; errors are told in a line."""
    config = tyro.cli(PartsConfig, prog="python -m vwn_ref.experiments.parts", description=__doc__)
    with told():
        print(report(config))


if __name__ == "__main__":
    main()
