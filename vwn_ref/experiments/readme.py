"""The results in README.md and figures/README.md: `python -m vwn_ref.experiments.readme --root .` writes them.

All of it is computed from figures/data and stands between two comment lines of those files, one pair for each part. No
sentence depends on how a study ends, only the numbers in it.
"""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from vwn_ref.experiments import paper, scaling, step_times, windows
from vwn_ref.experiments.compare import Estimate, holm, interval, paired, table
from vwn_ref.experiments.console import told
from vwn_ref.experiments.finished import LOSSES, Runs, measures, runs_in, shared_seeds
from vwn_ref.experiments.paper_figures import BySeed, contrast, efficiency, evaluated_in, mtp_contrasts
from vwn_ref.experiments.parts import CONTRASTS, price_ratio
from vwn_ref.experiments.plots import r_families, signed
from vwn_ref.experiments.run import read_json
from vwn_ref.experiments.storage import between, write_text
from vwn_ref.experiments.sweep import STUDIES, kept_runs, read_sweep

DATA = Path(__file__).resolve().parents[2] / "figures" / "data"

NAMES = (
    "`r1` to `r8` have m = 4, n = 4r, dynamic GHC and the wide table (`r1.5`: no GroupNorm, not in the fits), "
    "`-lowrank` the low-rank one.\nDifferences are paired by seed, with 95 % intervals; prices are those of a whole "
    "training run over plain's. CPU time is that of its\nsteps: all models took turns in one process, on one thread "
    "(`figures/README.md` has the command); a model's slowest build takes up to\n1.6 times as long as its fastest, and "
    "means of one model under two names differ by up to a tenth. Every ± is over seeds, of weights and\nbatches: text, "
    "tokenizer and validation windows are the same for all."
)

QUESTIONS = {
    "a_r_sweep": "A. Does the loss fall with r?",
    "b_d32": "B. And at D = 32?",
    "b_d64": "B. And at D = 64?",
    "c_m": "C. Does a finer partition m pay?",
    "d_mtp": "D. Do virtual width and multi-token prediction help each other?",
    "e_parts": "E. Which part of it pays?",
    "e_bytes": "E. And where the table is small?",
    "f_depth": "F. How far back do the layers look?",
}
"""Studies on a CPU, in the order in which runs that two of them share are counted."""


def minus(one: str, other: str) -> dict[str, int]:
    """Weights of a difference of two variants."""
    return {one: 1, other: -1}


def both_backbones(label: str) -> dict[str, dict[str, int]]:
    """One of study D's comparisons, dense and MoE."""
    return {kind: mtp_contrasts(key)[label] for kind, key in (("dense", "n_experts0"), ("MoE", "n_experts4"))}


def widths(base: str) -> dict[str, dict[str, int]]:
    """r = 2, 4, 8 minus `base`, and r = 8 with the low-rank table."""
    return {f"r = {r}": minus(f"r{r}", base) for r in (2, 4, 8)} | {"r = 8, low-rank table": minus("r8-lowrank", base)}


def tables_of_r4(kind: str) -> dict[str, dict[str, int]]:
    """`e_bytes`: r = 4, dynamic or static, with both tables, minus plain."""
    return {"wide table": minus(f"r4{kind}", "plain"), "low-rank table": minus(f"r4{kind}-lowrank", "plain")}


def of_parts(about: str, *which: str, models: bool = False) -> dict[str, dict[str, int]]:
    """Some of study E's comparisons, by the names that `parts.CONTRASTS` has for them; `models`: by the models'."""
    found = {c.what: c for c in CONTRASTS if c.about == about}
    chosen = [found[what] for what in which]
    return {f"{c.model} − {c.base}" if models else c.what: minus(c.model, c.base) for c in chosen}


ANSWERS = {
    ("a_r_sweep", "r − plain"): {f"r = {r}": minus(f"r{r}", "plain") for r in (1, 1.5, 2, 4, 8)},
    ("a_r_sweep", "r, low-rank table − plain"): {f"r = {r}": minus(f"r{r}-lowrank", "plain") for r in (1.5, 2, 4, 8)},
    **{
        (f"b_d{dim}", f"D = {dim}: {what}"): contrasts
        for dim, rs in ((32, (4, 8)), (64, (8,)))
        for what, contrasts in (
            ("r − plain", widths("plain")),
            ("a wider state, low-rank table: r − r = 1", {f"r = {r}": minus(f"r{r}-lowrank", "r1") for r in rs}),
            ("the wide table: r − r, low-rank table", {f"r = {r}": minus(f"r{r}", f"r{r}-lowrank") for r in rs}),
        )
    },
    ("b_d32", "D = 32: plain at twice its learning rate − plain"): {"": minus("plain-lr0.02", "plain")},
    ("b_d64", "D = 64: plain at half its learning rate − plain"): {"": minus("plain-lr0.005", "plain")},
    ("b_d64", "D = 64: r − plain at half its learning rate"): widths("plain-lr0.005"),
    ("c_m", "m = 8 − m = 4"): {f"r = {r}": minus(f"r{r}-m8", f"r{r}") for r in (2, 4, 8)},
    ("c_m", "m = 2 − m = 4"): {f"r = {r}": minus(f"r{r}-m2", f"r{r}") for r in (2, 4, 8)},
    ("c_m", "m = 1 − m = 4"): {f"r = {r}": minus(f"r{r}-m1", f"r{r}") for r in (2, 4, 8)},
    ("d_mtp", "VWN (2, 3) − plain"): both_backbones("VWN − plain"),
    ("d_mtp", "MTP − plain"): both_backbones("MTP − plain"),
    ("d_mtp", "interaction: what MTP does in a VWN minus what it does in plain"): both_backbones("interaction"),
    ("e_parts", "routing alone: r = 1 − plain"): of_parts(
        "routing, no width", "static", "dynamic", "dynamic, no GroupNorm"
    ),
    ("e_parts", "no GroupNorm before reduce: without − with"): of_parts(
        "no GroupNorm before W_reduce", "r = 1", "r = 2", "r = 4"
    ),
    ("e_parts", "another initial W_reduce − its mean"): of_parts(
        "initial W_reduce, against its default, mean", "first, r = 2", "random, r = 2", "first, r = 4", "random, r = 4"
    ),
    ("e_parts", "weight decay on A and B: with − without"): of_parts("weight decay on A and B", "r = 2", "r = 4"),
    ("e_parts", "matrices that depend on the token: dynamic − static"): of_parts(
        "dynamics", "at r = 1", "at r = 2", "at r = 4", "at r = 2, low-rank table", "at r = 4, low-rank table"
    ),
    ("e_parts", "a wider state, low-rank table: r − r = 1"): of_parts(
        "wider state and its connections, low-rank table", "r = 2", "r = 4", "r = 8", "r = 2, static", "r = 4, static"
    ),
    ("e_parts", "a wider table alone: r = 1 with it − r = 1"): of_parts(
        "wide table, without the width", "2D wide, r = 1", "4D wide, r = 1"
    ),
    ("e_parts", "the wide table: r − r, low-rank table"): of_parts(
        "wide table, with the width", "r = 2", "r = 4", "r = 8", "r = 2, static", "r = 4, static"
    ),
    ("e_parts", "VWN − plain with as many parameters"): of_parts(
        "against plain with as many parameters",
        "r = 2 has 1 % fewer",
        "r = 4 has 14 % more",
        "r = 4 has 14 % fewer",
        "r = 4, in 14 blocks",
        models=True,
    ),
    ("e_parts", "VWN − plain with as much arithmetic"): of_parts(
        "against plain with as much arithmetic",
        "r = 2, in 6 blocks",
        "r = 2, 1.25 × as wide",
        "r = 4, in 10 blocks",
        "r = 4, 1.5 × as wide",
        models=True,
    ),
    ("e_parts", "VWN − plain with about as much CPU time"): of_parts(
        "against plain with about as much time", "r = 2, 4,000 steps", "r = 4, 5,700 steps", models=True
    ),
    ("e_parts", "VWN − plain with n-gram tables"): of_parts(
        "against plain with n-grams",
        "r = 2 has 31 % fewer parameters",
        "r = 4 has 3 % more",
        "r = 2, n-grams too",
        "r = 4, n-grams too",
        models=True,
    ),
    ("e_parts", "n-gram tables: with − without"): of_parts("n-grams", "plain", "r = 2", "r = 4"),
    ("e_parts", "VWN − plain twice as wide"): of_parts("against plain, twice as wide", "r = 2", "r = 4", "r = 8"),
    ("e_parts", "plain with more blocks − plain"): {f"{x} blocks": minus(f"plain-l{x}", "plain") for x in (6, 10, 14)},
    ("e_bytes", "single bytes: r = 4 − plain"): tables_of_r4(""),
    ("e_bytes", "single bytes: r = 4, static − plain"): tables_of_r4("-static"),
    ("e_bytes", "single bytes: the wide table: r = 4 − r = 4, low-rank table"): {
        "dynamic": minus("r4", "r4-lowrank"),
        "static": minus("r4-static", "r4-static-lowrank"),
    },
    ("e_bytes", "single bytes: dynamic − static"): {
        "wide table": minus("r4", "r4-static"),
        "low-rank table": minus("r4-lowrank", "r4-static-lowrank"),
    },
    ("e_bytes", "single bytes: a wider plain model − plain"): {
        f"D = {dim}": minus(f"plain-d{dim}", "plain") for dim in (36, 40)
    },
    ("e_bytes", "single bytes: r = 4 − a wider plain model"): {
        f"{model} − plain-d{dim}": minus(model, f"plain-d{dim}")
        for model, dim in (("r4-static", 36), ("r4-static-lowrank", 36), ("r4", 40), ("r4-lowrank", 40))
    },
    ("e_bytes", "single bytes, at half the learning rate: r = 4 − plain"): {
        kind: minus(f"r4{name}-lr0.005", "plain-lr0.005") for kind, name in (("dynamic", ""), ("static", "-static"))
    },
    ("e_bytes", "single bytes: half the learning rate − the whole"): {
        name: minus(f"{name}-lr0.005", name) for name in ("plain", "r4", "r4-static")
    },
    ("f_depth", "24 sublayers, r = 2: VWN − plain"): {f"m = {m}": minus(f"m{m}", "plain") for m in (1, 2, 4, 8)},
    ("f_depth", "the same at a quarter of the learning rate"): {
        f"m = {m}": minus(f"m{m}-lr0.005", "plain-lr0.005") for m in (1, 8)
    },
    ("f_depth", "the same with static matrices"): {f"m = {m}": minus(f"m{m}-static", "plain") for m in (4, 8)},
}
"""(study, what) -> label -> weights of the variants: the differences of final losses that the tables show."""

HELD_OUT = {f"r = {r}": minus(f"r{r}", "plain") for r in (2, 4, 8)}
"""Likewise of study G, whose loss is not of a run but of what `downstream` measured of it."""


def plus_minus(estimate: Estimate, digits: int = 3) -> str:
    """−0.080 ± 0.030, without a line break inside; without ± for one seed."""
    half = "" if math.isnan(estimate.half_width) else f"\u00a0±\u00a0{estimate.half_width:.{digits}f}"
    return signed(estimate.mean, digits) + half


def cell(found: BySeed | None) -> str:
    """An estimate in a table, or a dash."""
    return "–" if found is None else plus_minus(found.estimate)


def slope(runs: Runs, variants: Sequence[str], loss: str) -> BySeed | None:
    """Least squares of the loss on log2 r, seed by seed; None where a variant is missing, or without a common seed."""
    if not set(variants) <= runs.keys() or not shared_seeds(runs, *variants):
        return None
    groups = [runs[name] for name in variants]
    seeds, losses = scaling.losses_of(groups, loss)
    fit = scaling.fit_log2(np.array([scaling.r_of(group[0]) for group in groups]), losses)
    return BySeed(dict(zip(seeds, (float(x) for x in fit.by_seed), strict=True)))


WHOLE = ("r1", "r2", "r4", "r8")  # the r that are in the fits


def r_sweep(data: Path) -> str:
    """Study A: a paragraph, a table of slopes, what the paper counts, and a folded table of all models."""
    runs = kept_runs(read_sweep(STUDIES / "a_r_sweep.toml", data / "a"))
    if not {"plain", "r1", "r2", "r8"} <= runs.keys():
        raise ValueError(f"{data}: must hold study A in its folder a, plain and r = 1, 2 and 8 at least")
    times = step_times.load(data / "a", runs)
    parts = [textwrap.fill(in_words(data, runs), 139), slopes(runs), textwrap.fill(fewer_tokens(data, runs), 139)]
    return "\n\n".join([*parts, every_model(runs, times)])


def in_words(data: Path, runs: Runs) -> str:
    """What the main picture shows, and what it does not."""
    plain = runs["plain"]
    ratio = price_ratio(runs["r8"], plain, None)
    bend = {"r8": 1, "r4": -1, "r2": -1, "r1": 1}
    each = {loss: slope(runs, WHOLE, loss) for loss in LOSSES}
    tokens, model = plain[0].summary["tokens"], plain[0].config["model"]
    first = (
        f"With the backbone fixed (D = {model['dim']}, {model['n_layers']} blocks, {tokens / 1e6:.1f}M tokens of "
        f"Python, {len(each['val_next'].by_seed)} seeds), each doubling of r from 1 to 8 changes the next-token loss "
        f"by {cell(each['val_next'])} nats on average and the next-2-token loss by {cell(each['val_next2'])}; r = 8 "
        f"costs {ratio['parameters']:.1f} times plain's parameters and {ratio['arithmetic']:.1f} times its arithmetic, "
        f"a ratio that falls as D grows."
    )
    second = (
        f"Whether that is a line: the last doubling minus the first, 0 for a line, is "
        f"{' and '.join(cell(contrast(runs, bend, loss)) for loss in LOSSES)} (next and next-2 token, here and below). "
        f"It is no measurement of the paper's slope, "
        f"{paper.FIG_8_SLOPE.printed.replace('-', '−')} at 0.8 billion active parameters."
    )
    others = []
    wider = runs_in(data / "b_d64")
    there = [slope(wider, WHOLE, loss) for loss in LOSSES]
    if all(there):
        others.append(f"At D = 64 the slopes are {' and '.join(map(cell, there))}.")
    rival = [contrast(runs_in(data / "a"), minus("r4", "plain-d24"), loss) for loss in LOSSES]
    if all(rival):
        others.append(
            f"At D = {model['dim']}, r = 4 minus a plain model 1.5 times as wide, which costs less in all, is "
            f"{' and '.join(map(cell, rival))}."
        )
    return " ".join([first, second, *others])


def slopes(runs: Runs) -> str:
    """Least squares, bends and differences of both families, by both losses."""
    lines = [
        "| loss | embedding | slope a doubling, r = 1 to 8 | slope, r = 2 to 8 (the paper's r) | last doubling minus "
        "first (0: a line) | r = 8 − plain |",
        "|---|---|---|---|---|---|",
    ]
    for loss, what in LOSSES.items():
        for family, low in zip(r_families(runs), ("", "-lowrank"), strict=True):
            names = ["r1", *(f"r{r}{low}" for r in paper.FIG_8_R)]
            bend = {"r8" + low: 1, "r4" + low: -1, "r2" + low: -1, "r1": 1}
            cells = [slope(runs, names, loss), slope(runs, names[1:], loss)]
            cells += [contrast(runs, bend, loss), contrast(runs, minus("r8" + low, "plain"), loss)]
            lines.append(f"| {what} | {family} | {' | '.join(map(cell, cells))} |")
    return "\n".join(lines)


def fewer_tokens(data: Path, runs: Runs) -> str:
    """The currency of the paper's Fig. 1."""
    found = []
    others = ((f"D = {dim}", runs_in(data / f"b_d{dim}")) for dim in (32, 64))
    for where, there in ((f"D = {runs['plain'][0].config['model']['dim']}", runs), *others):
        ratios = [efficiency(there, "r8", loss) for loss in ("next", "next2")]
        if all(ratios):
            found.append(f"{' and '.join(map(str, ratios))} at {where}")
    return (
        f"The paper counts tokens: r = 8 needs {paper.FIG_1_SPEEDUP['next'].printed} and "
        f"{paper.FIG_1_SPEEDUP['next2'].printed} times fewer for plain's loss, next and next-2 token (Fig. 1; the "
        f"abstract: “over 2×” and “3×”). Here it needs fewer for plain's last training loss by these factors: "
        f"{'; '.join(found)}."
    )


def every_model(runs: Runs, times: dict[str, float] | None) -> str:
    """Prices, losses of plain, and differences to them."""
    plain = runs["plain"]
    lines = [
        "| model | seeds | parameters | arithmetic | CPU time | next-token loss: plain's, then minus plain's "
        "| next-2 token, likewise |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, group in runs.items():
        price = price_ratio(group, plain, times)
        cells = [name, str(len(group)), *(number(price[x]) for x in ("parameters", "arithmetic"))]
        cells.append(number(price["CPU time"], 1))
        for loss in LOSSES:
            mean = f"{statistics.fmean(run.summary[loss] for run in plain):.3f}"
            cells.append(mean if name == "plain" else plus_minus(paired(group, plain, loss)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(["<details><summary>Model by model</summary>", "", *lines, "", NAMES, "", "</details>"])


def backbones(data: Path) -> str:
    """Studies A and B side by side: what a doubling of r brings with each D, and from which part it comes."""
    lines = [
        "| D | tokens for each of plain's parameters | seeds | loss | slope a doubling, r = 1 to 8 | r = 8 − plain "
        "| which is: r = 1 − plain | and the wider state: r = 8, low-rank table − r = 1 "
        "| and the wide table: r = 8 − r = 8, low-rank table |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in ("a", "b_d32", "b_d64"):
        runs = runs_in(data / name)
        if not {"plain", *WHOLE} <= runs.keys():
            continue
        one = runs["plain"][0]
        size = f"{one.config['model']['dim']} | {one.summary['tokens'] / one.summary['parameters']:.0f}"
        for loss, what in LOSSES.items():
            cells = [slope(runs, WHOLE, loss)]
            for pair in (("r8", "plain"), ("r1", "plain"), ("r8-lowrank", "r1"), ("r8", "r8-lowrank")):
                cells.append(contrast(runs, minus(*pair), loss))
            seeds = len(shared_seeds(runs, "plain", *WHOLE))
            lines.append(f"| {size} | {seeds} | {what} | {' | '.join(map(cell, cells))} |")
    return "\n".join(lines)


def number(ratio: float | None, digits: int = 2) -> str:
    """1.36×, or a dash."""
    return "–" if ratio is None else f"{ratio:.{digits}f}×"


def studies(data: Path) -> str:
    """What has been run and what it cost: a table of `QUESTIONS`."""
    lines = ["| study | file in `vwn_ref/experiments/studies` | runs kept | CPU-hours |", "|---|---|---|---|"]
    seen: set[Path] = set()
    total = 0.0
    for name, question in QUESTIONS.items():
        sweep = read_sweep(STUDIES / f"{name}.toml")
        folders = [data / Path(sweep.out).name / run.name for run in sweep.runs]
        there = [folder for folder in folders if (folder / "summary.json").exists()]
        own = [folder for folder in there if folder not in seen]
        seen.update(own)
        hours = sum(cpu_seconds(folder) for folder in own) / 3600
        total += hours
        shared = f", {len(there) - len(own)} of them from above" if len(own) < len(there) else ""
        lines.append(f"| {question} | `{name}.toml` | {len(there)} of {len(folders)}{shared} | {hours:.1f} |")
    tried = sum(cpu_seconds(path.parent) for path in data.glob("lr_grid*/*/summary.json")) / 3600
    lines.append(f"| learning rates tried before | `lr_grid.toml` and more | | {tried:.1f} |")
    lines.append(f"| together | | | {total + tried:.1f} |")
    return "\n".join(lines)


def cpu_seconds(folder: Path) -> float:
    """CPU time of a kept run; of those that did not count it, the time that its threads had for training."""
    summary = read_json(folder / "summary.json")
    counted = summary.get("cpu_seconds")
    return summary["seconds"] * summary["threads"] if counted is None else counted


def answers(data: Path) -> str:
    """What the studies say: `ANSWERS` as far as their runs are kept, by both losses; and the middle layers.

    What is told apart is bold; what still is when all these looks are counted (Holm) has a star.
    """
    folders = {name: Path(read_sweep(STUDIES / f"{name}.toml").out).name for name in {study for study, _ in ANSWERS}}
    runs = {folder: runs_in(data / folder) for folder in set(folders.values())}
    found: dict[tuple, BySeed | None] = {}  # by folder, loss and weights: what stands in two rows is one look
    for (name, _), contrasts in ANSWERS.items():
        there = runs[folders[name]]
        for weights in contrasts.values():
            for loss in LOSSES:
                measured = all(measures(run, loss) for variant in weights for run in there.get(variant, ()))
                found[folders[name], loss, *weights] = contrast(there, weights, loss) if measured else None
    evaluated = evaluated_in(data / "a")
    for weights in HELD_OUT.values():
        found["g", "val_next", *weights] = contrast(evaluated, weights, "heldout.loss")
    looks = {key: one for key, one in found.items() if one is not None and len(one.by_seed) > 1}
    apart = {key for key, one in looks.items() if one.estimate.told_apart}
    stars = {key for key, holds in zip(looks, holm([one.p for one in looks.values()]), strict=True) if holds}

    def text(key: tuple) -> str:
        value = cell(found.get(key))
        return f"**{value}**" + "\\*" * (key in stars) if key in apart else value

    lines = ["| study | difference | | seeds | next token | next-2 token |", "|---|---|---|---|---|---|"]
    absent = []
    for (name, what), contrasts in (ANSWERS | {("g", "text of another source: r − plain"): HELD_OUT}).items():
        letter = QUESTIONS[name][0] if name in QUESTIONS else "G"
        rows = {
            label: [(folders.get(name, name), loss, *weights) for loss in LOSSES]
            for label, weights in contrasts.items()
        }
        rows = {label: keys for label, keys in rows.items() if any(found.get(key) for key in keys)}
        if not rows:
            absent.append(f"{letter}, {what}")
        for label, keys in rows.items():
            seeds = len(next(found[key] for key in keys if found.get(key)).by_seed)
            lines.append(f"| {letter} | {what} | {label} | {seeds} | {' | '.join(map(text, keys))} |")
            letter = what = ""
    lower = sum(looks[key].estimate.mean < 0 for key in apart)
    lines.append(
        f"\n{len(apart)} of these {len(looks)} intervals exclude 0, {lower} of them below it; were there no difference "
        f"anywhere, about {len(looks) / 20:.1f} would. A star: also when all these looks are counted (Holm's "
        f"correction), {len(stars)} of them."
    )
    return "\n".join(lines + middle_layers(data) + ([f"\nNot run yet: {'; '.join(absent)}."] if absent else []))


def middle_layers(data: Path) -> list[str]:
    """What study F says that is no difference of losses; nothing before its runs are measured."""
    deep = windows.load(data / "f_depth") if (data / "f_depth").is_dir() else {}
    cells = []
    for name, label in (("plain", "plain"), ("m1", "m = 1"), ("m2", "m = 2"), ("m4", "m = 4"), ("m8", "m = 8")):
        if name in deep:
            share = interval([windows.last_reads(row)[-1] for row in deep[name]])
            cells.append(f"{label} {plus_minus(share, 2).lstrip('+')}")
    what = "Study F besides: the share of what the last of 24 sublayers reads that sublayers 4 to 23 have written"
    return [f"\n{what}: {'; '.join(cells)}."] if cells else []


PARTS = {
    "r-sweep": ("README.md", r_sweep),
    "backbones": ("README.md", backbones),
    "studies": ("figures/README.md", studies),
    "answers": ("figures/README.md", answers),
    "first runs": ("figures/README.md", lambda data: table(data / "first_training")),
}
"""Part -> the file that it stands in, and what computes it."""


def rewritten(file: str, text: str, data: Path = DATA) -> str:
    """`text`, that of `file`, with every part as the data have it now."""
    for name, (where, part) in PARTS.items():
        if where == file:
            begin = f"<!-- {name}: begin, written by vwn_ref.experiments.readme -->"
            text = between(text, begin, f"<!-- {name}: end -->", part(data))
    return text


@dataclass(frozen=True)
class ReadmeConfig:
    """From where, into what."""

    root: str | None = None
    """Folder with README.md and figures/README.md; without it the parts are printed."""
    data: str = str(DATA)
    """Folder of kept studies."""


def main() -> None:
    """Write or print; errors are told in a line."""
    config = tyro.cli(ReadmeConfig, prog="python -m vwn_ref.experiments.readme", description=__doc__)
    with told():
        if config.root is None:
            print("\n\n".join(part(Path(config.data)) for _, part in PARTS.values()))
            return
        files = {name: Path(config.root) / name for name in dict.fromkeys(where for where, _ in PARTS.values())}
        texts = {name: rewritten(name, file.read_text("utf-8"), Path(config.data)) for name, file in files.items()}
        for name, text in texts.items():  # all of them or none
            write_text(files[name], text)


if __name__ == "__main__":
    main()
