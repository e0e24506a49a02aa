"""The parts of README.md that are results: `python -m vwn_ref.experiments.readme --readme README.md`.

All of it is computed from figures/data and stands between two comment lines of the file, one pair for each part. No
sentence depends on how a study ends, only the numbers in it.
"""

from __future__ import annotations

import math
import statistics
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from vwn_ref.experiments import paper, scaling, step_times, windows
from vwn_ref.experiments.compare import Estimate, paired
from vwn_ref.experiments.console import told
from vwn_ref.experiments.paper_figures import contrast, mtp_contrasts, runs_in
from vwn_ref.experiments.parts import CONTRASTS, LOSSES, price_ratio
from vwn_ref.experiments.plots import r_families, signed
from vwn_ref.experiments.run import read_json
from vwn_ref.experiments.storage import between, write_text
from vwn_ref.experiments.sweep import STUDIES, kept_runs, read_sweep

DATA = Path(__file__).resolve().parents[2] / "figures" / "data"

NAMES = (
    "`r1` to `r8` have m = 4, n = 4r, dynamic GHC and the wide table (`r1.5`: no GroupNorm, not in the fits), "
    "`-lowrank` the table D wide.\nDifferences are paired by seed, with 95 % intervals; prices are those of a whole "
    "training run over plain's. CPU time is that of its\nsteps: all models took turns in one process, on one thread "
    "(`python -m vwn_ref.experiments.step_times`)."
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


def wide_and_low_rank(r: int, base: str) -> dict[str, dict[str, int]]:
    """VWN minus `base` with the table rD and D wide."""
    return {"table rD wide": minus(f"r{r}", base), "table D wide": minus(f"r{r}-lowrank", base)}


def of_parts(about: str, *which: str) -> dict[str, dict[str, int]]:
    """Some of study E's comparisons, by the names that `parts.CONTRASTS` has for them."""
    found = {c.what: minus(c.model, c.base) for c in CONTRASTS if c.about == about}
    return {what: found[what] for what in which}


ANSWERS = {
    ("b_d32", "D = 32: r = 8 − plain"): wide_and_low_rank(8, "plain"),
    ("b_d64", "D = 64: r = 8 − plain"): wide_and_low_rank(8, "plain"),
    ("c_m", "m = 8 − m = 4"): {f"r = {r}": minus(f"r{r}-m8", f"r{r}") for r in (2, 4, 8)},
    ("c_m", "m = 1 − m = 4"): {f"r = {r}": minus(f"r{r}-m1", f"r{r}") for r in (2, 4, 8)},
    ("d_mtp", "VWN (2, 3) − plain"): both_backbones("VWN − plain"),
    ("d_mtp", "MTP − plain"): both_backbones("MTP − plain"),
    ("d_mtp", "what MTP does with VWN − without"): both_backbones("interaction"),
    ("e_parts", "routing alone: r = 1 − plain"): of_parts("routing, no width", "static", "dynamic"),
    ("e_parts", "wide state alone, table D wide − r = 1"): of_parts(
        "width of the state, without the table", "r = 2", "r = 4", "r = 8"
    ),
    ("e_parts", "wide table alone, state D wide − r = 1"): of_parts(
        "wide table, without the width", "2D wide, r = 1", "4D wide, r = 1"
    ),
    ("e_parts", "VWN − plain with as many parameters"): of_parts(
        "against plain with as many parameters", "r = 2, 1 % fewer", "r = 4, in 14 blocks"
    ),
    ("e_parts", "VWN − plain with as much arithmetic"): of_parts(
        "against plain with as much arithmetic", "r = 2, in 6 blocks", "r = 4, in 10 blocks"
    ),
    ("e_parts", "VWN − plain with about as much CPU time"): of_parts(
        "against plain with about as much time", "r = 2, 4,000 steps", "r = 4, 5,700 steps"
    ),
    ("e_bytes", "single bytes: r = 4 − plain"): wide_and_low_rank(4, "plain"),
    ("f_depth", "24 sublayers, r = 2: VWN − plain"): {f"m = {m}": minus(f"m{m}", "plain") for m in (1, 2, 4, 8)},
    ("f_depth", "the same at a quarter of the learning rate"): {
        f"m = {m}": minus(f"m{m}-lr0.005", "plain-lr0.005") for m in (1, 8)
    },
    ("f_depth", "the same with static matrices"): {f"m = {m}": minus(f"m{m}-static", "plain") for m in (4, 8)},
}
"""(study, what) -> label -> weights of the variants: the differences of final losses that README shows."""


def plus_minus(estimate: Estimate) -> str:
    """−0.080 ± 0.030; without ± for one seed."""
    half = "" if math.isnan(estimate.half_width) else f" ± {estimate.half_width:.3f}"
    return signed(estimate.mean) + half


def r_squared(x: np.ndarray, y: np.ndarray) -> float:
    """Of a line in x."""
    return float(np.corrcoef(x, y)[0, 1] ** 2)


def r_sweep(data: Path) -> str:
    """Study A in two sentences and a table."""
    runs = kept_runs(read_sweep(STUDIES / "a_r_sweep.toml", data / "a"))
    plain = runs["plain"]
    slopes, seeds, squares = {}, set(), {}
    for family, variants in r_families(runs).items():
        whole = [group for group in variants if scaling.r_of(group[0]).is_integer()]
        r = np.array([scaling.r_of(group[0]) for group in whole])
        for loss in LOSSES:
            common, losses = scaling.losses_of(whole, loss)
            slopes[family, loss] = plus_minus(scaling.fit_log2(r, losses).over_seeds)
            means = losses.mean(axis=0)
            squares[family, loss] = r_squared(np.log2(r), means), r_squared(1 / r, means)
            seeds.add(len(common))
    wide, low = r_families(runs)
    next_, next2 = LOSSES
    config, tokens = plain[0].config, plain[0].summary["tokens"]
    times = step_times.load(data / "a")
    ratio = price_ratio(runs["r8"], plain, times)
    model = config["model"]
    of = " or ".join(str(count) for count in sorted(seeds))
    log, inverse = squares[wide, next_]
    spent = f" and {ratio['CPU time']:.1f} times its CPU time" if ratio["CPU time"] else ""
    sentences = (
        f"With the backbone fixed (D = {model['dim']}, {model['n_layers']} blocks, {tokens / 1e6:.1f}M tokens of "
        f"Python), each doubling of r from 1 to 8 changes the validation loss by {slopes[wide, next_]} nats a token "
        f"where the embedding table grows with r, Eq. (2), and by {slopes[low, next_]} where it stays D wide, Eq. (3); "
        f"for the token after the next it is {slopes[wide, next2]} and {slopes[low, next2]} (95 % intervals over {of} "
        f"seeds). This is no measurement of the paper's slope, {paper.FIG_8_SLOPE.printed.replace('-', '−')} at 0.8 "
        f"billion active parameters, and it is not at equal cost: r = 8 has {ratio['parameters']:.1f} times plain's "
        f"{plain[0].summary['parameters']:,} parameters and takes {ratio['arithmetic']:.1f} times its arithmetic"
        f"{spent}, and four widths do not tell a line in log₂ r (R² {log:.2f}) from one in 1/r ({inverse:.2f})."
    )
    lines = ["| model | seeds | parameters | arithmetic | CPU time | next token, against plain | next-2 token |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, group in runs.items():
        price = price_ratio(group, plain, times)
        cells = [name, str(len(group)), *(number(price[x]) for x in ("parameters", "arithmetic", "CPU time"))]
        for loss in LOSSES:
            mean = f"{statistics.fmean(run.summary[loss] for run in plain):.3f}"
            cells.append(mean if name == "plain" else plus_minus(paired(group, plain, loss)))
        lines.append(f"| {' | '.join(cells)} |")
    table = ["<details><summary>Model by model</summary>", "", *lines, "", NAMES, "", "</details>"]
    return textwrap.fill(sentences, 139) + "\n\n" + "\n".join(table)


def number(ratio: float | None) -> str:
    """1.36×, or a dash."""
    return "–" if ratio is None else f"{ratio:.2f}×"


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
    """What studies B to F say: `ANSWERS` as far as their runs are kept, next-token loss; what is told apart is bold."""
    lines = ["| study | difference of validation losses, nats a token | 95 % over the seeds |", "|---|---|---|"]
    folders = {name: Path(read_sweep(STUDIES / f"{name}.toml").out).name for name in {study for study, _ in ANSWERS}}
    runs = {folder: runs_in(data / folder) for folder in set(folders.values())}
    absent = []
    for (name, what), contrasts in ANSWERS.items():
        cells = []
        for label, weights in contrasts.items():
            found = contrast(runs[folders[name]], weights)
            value = "not run yet" if found is None else plus_minus(found.estimate)
            if found is not None and abs(found.estimate.mean) > found.estimate.half_width:
                value = f"**{value}**"
            cells.append(f"{label} {value}")
        if all(cell.endswith("not run yet") for cell in cells):
            absent.append(f"{QUESTIONS[name][0]}, {what}")
        else:
            lines.append(f"| {QUESTIONS[name][0]} | {what} | {'; '.join(cells)} |")
    lines += middle_layers(data)
    return "\n".join(lines + ([f"\nNot run yet: {'; '.join(absent)}."] if absent else []))


def middle_layers(data: Path) -> list[str]:
    """Study F's row that is no difference of losses; none before its runs are measured."""
    deep = windows.load(data / "f_depth") if (data / "f_depth").is_dir() else {}
    cells = []
    for name, label in (("plain", "plain"), ("m1", "m = 1"), ("m2", "m = 2"), ("m4", "m = 4"), ("m8", "m = 8")):
        if name in deep:
            share = statistics.fmean(windows.last_reads(row)[-1] for row in deep[name])
            cells.append(f"{label} {signed(share, 2).lstrip('+')}")
    what = "part of what the last of 24 sublayers reads that layers 4 to 23 have written"
    return [f"| F | {what} (no difference; means of the seeds) | {'; '.join(cells)} |"] if cells else []


PARTS = {"r-sweep": r_sweep, "studies": studies, "answers": answers}


def rewritten(text: str, data: Path = DATA) -> str:
    """`text` with every part as the data have it now."""
    for name, part in PARTS.items():
        begin = f"<!-- {name}: begin, written by vwn_ref.experiments.readme -->"
        text = between(text, begin, f"<!-- {name}: end -->", part(data))
    return text


@dataclass(frozen=True)
class ReadmeConfig:
    """From where, into what."""

    readme: str | None = None
    """A file with the comment lines; without it the parts are printed."""
    data: str = str(DATA)
    """Folder of kept studies."""


def main() -> None:
    """Write or print; errors are told in a line."""
    config = tyro.cli(ReadmeConfig, prog="python -m vwn_ref.experiments.readme", description=__doc__)
    with told():
        if config.readme is None:
            print("\n\n".join(part(Path(config.data)) for part in PARTS.values()))
        else:
            file = Path(config.readme)
            write_text(file, rewritten(file.read_text(encoding="utf-8"), Path(config.data)))


if __name__ == "__main__":
    main()
