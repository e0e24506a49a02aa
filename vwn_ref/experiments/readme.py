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
from vwn_ref.experiments.compare import Estimate, holm, interval, paired
from vwn_ref.experiments.console import told
from vwn_ref.experiments.finished import LOSSES, runs_in
from vwn_ref.experiments.paper_figures import contrast, mtp_contrasts
from vwn_ref.experiments.parts import CONTRASTS, price_ratio
from vwn_ref.experiments.plots import r_families, signed
from vwn_ref.experiments.run import read_json
from vwn_ref.experiments.storage import between, write_text
from vwn_ref.experiments.sweep import STUDIES, kept_runs, read_sweep

DATA = Path(__file__).resolve().parents[2] / "figures" / "data"

NAMES = (
    "`r1` to `r8` have m = 4, n = 4r, dynamic GHC and the wide table (`r1.5`: no GroupNorm, not in the fits), "
    "`-lowrank` the table D wide.\nDifferences are paired by seed, with 95 % intervals; prices are those of a whole "
    "training run over plain's. CPU time is that of its\nsteps: all models took turns in one process, on one thread "
    "(`python -m vwn_ref.experiments.step_times`).\nThe MTP head's mixing matrix is D/m wide in a VWN and D wide in "
    "plain: next-2 losses differ in that too.\nEvery ± is over seeds, of weights and batches: text, tokenizer and "
    "validation windows are the same for all."
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
    """r = 2, 4, 8 minus `base`, and r = 8 with the table D wide."""
    return {f"r = {r}": minus(f"r{r}", base) for r in (2, 4, 8)} | {"r = 8, table D wide": minus("r8-lowrank", base)}


def wide_and_low_rank(r: int, base: str) -> dict[str, dict[str, int]]:
    """VWN minus `base` with the table rD and D wide."""
    return {"table rD wide": minus(f"r{r}", base), "table D wide": minus(f"r{r}-lowrank", base)}


def of_parts(about: str, *which: str, models: bool = False) -> dict[str, dict[str, int]]:
    """Some of study E's comparisons, by the names that `parts.CONTRASTS` has for them; `models`: by the models'."""
    found = {c.what: c for c in CONTRASTS if c.about == about}
    chosen = [found[what] for what in which]
    return {f"{c.model} − {c.base}" if models else c.what: minus(c.model, c.base) for c in chosen}


ANSWERS = {
    ("b_d32", "D = 32: r − plain"): widths("plain"),
    ("b_d64", "D = 64: r − plain"): widths("plain"),
    ("b_d64", "D = 64: r − plain at half its learning rate"): widths("plain-lr0.005"),
    ("c_m", "m = 8 − m = 4"): {f"r = {r}": minus(f"r{r}-m8", f"r{r}") for r in (2, 4, 8)},
    ("c_m", "m = 2 − m = 4"): {f"r = {r}": minus(f"r{r}-m2", f"r{r}") for r in (2, 4, 8)},
    ("c_m", "m = 1 − m = 4"): {f"r = {r}": minus(f"r{r}-m1", f"r{r}") for r in (2, 4, 8)},
    ("d_mtp", "VWN (2, 3) − plain"): both_backbones("VWN − plain"),
    ("d_mtp", "MTP − plain"): both_backbones("MTP − plain"),
    ("d_mtp", "what MTP does with VWN − without"): both_backbones("interaction"),
    ("e_parts", "routing alone: r = 1 − plain"): of_parts("routing, no width", "static", "dynamic"),
    ("e_parts", "a wider state and its connections: r with the table D wide − r = 1"): of_parts(
        "wider state and its connections, table D wide", "r = 2", "r = 4", "r = 8"
    ),
    ("e_parts", "a wider table alone: r = 1 with it − r = 1"): of_parts(
        "wide table, without the width", "2D wide, r = 1", "4D wide, r = 1"
    ),
    ("e_parts", "the wide table, with the width: table rD wide − D wide"): of_parts(
        "wide table, with the width", "r = 2", "r = 4", "r = 8"
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
        "r = 4, in 10 blocks",
        "r = 4, 1.5 × as wide",
        models=True,
    ),
    ("e_parts", "VWN − plain with about as much CPU time"): of_parts(
        "against plain with about as much time", "r = 2, 4,000 steps", "r = 4, 5,700 steps", models=True
    ),
    ("e_parts", "VWN − plain with n-gram tables"): of_parts(
        "against plain with n-grams", "r = 2 has 31 % fewer parameters", "r = 4 has 3 % more", models=True
    ),
    ("e_parts", "VWN − plain twice as wide"): of_parts("against plain, twice as wide", "r = 2", "r = 4", "r = 8"),
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


def r_sweep(data: Path) -> str:
    """Study A in two sentences and a table."""
    runs = kept_runs(read_sweep(STUDIES / "a_r_sweep.toml", data / "a"))
    if not {"plain", "r1", "r2", "r8"} <= runs.keys():
        raise ValueError(f"{data}: must hold study A in its folder a, plain and r = 1, 2 and 8 at least")
    plain = runs["plain"]
    rows, seeds = [], set()
    for (family, variants), low in zip(r_families(runs).items(), ("", "-lowrank"), strict=True):
        whole = {scaling.r_of(group[0]): group for group in variants if scaling.r_of(group[0]).is_integer()}
        for loss, what in (("val_next", "next token"), ("val_next2", "next-2 token")):
            cells = []
            for r in (list(whole), [r for r in paper.FIG_8_R if r in whole]):
                common, losses = scaling.losses_of([whole[x] for x in r], loss)
                cells.append(plus_minus(scaling.fit_log2(np.array(r), losses).over_seeds) if len(r) > 1 else "–")
                seeds.add(len(common))
            bend = {"r8" + low: 1, "r4" + low: -1, "r2" + low: -1, "r1": 1}
            for weights in (bend, minus("r8" + low, "plain")):
                found = contrast(runs, weights, loss)
                cells.append("–" if found is None else plus_minus(found.estimate))
            rows.append((loss, f"| {what} | {family} | {' | '.join(cells)} |"))
    times = step_times.load(data / "a", runs)
    ratio = price_ratio(runs["r8"], plain, times)
    spent = f" and {ratio['CPU time']:.1f} times its CPU time" if ratio["CPU time"] else ""
    config, tokens, model = plain[0].config, plain[0].summary["tokens"], plain[0].config["model"]
    of = " or ".join(str(count) for count in sorted(seeds))
    first = (
        f"With the backbone fixed (D = {model['dim']}, {model['n_layers']} blocks, {tokens / 1e6:.1f}M tokens of "
        f"Python, learning rate {config['lr']:g}) a doubling of r changes the validation loss, on average, by what the "
        f"table says (nats a token, 95 % intervals over {of} seeds). The cost is not equal: r = 8 has "
        f"{ratio['parameters']:.1f} times plain's {plain[0].summary['parameters']:,} parameters and takes "
        f"{ratio['arithmetic']:.1f} times its arithmetic{spent}."
    )
    second = (
        f"Nothing here shows a law (are the steps equal? fifth column), or measures the paper's slope, "
        f"{paper.FIG_8_SLOPE.printed.replace('-', '−')} at 0.8 billion active parameters: D = 16 was chosen after "
        f"single runs at D = 32 had shown a smaller gain, and all models have the learning rate that suited plain."
    )
    slopes = ["| loss | embedding | per doubling, r = 1 to 8 | r = 2, 4, 8 | last doubling − first | r = 8 − plain |"]
    slopes += ["|---|---|---|---|---|---|", *(row for _, row in sorted(rows, key=lambda row: row[0]))]
    lines = [
        "| model | seeds | parameters | arithmetic | CPU time | next token: plain's, then against it | next-2 token |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for name, group in runs.items():
        price = price_ratio(group, plain, times)
        cells = [
            name,
            str(len(group)),
            *(number(price[x]) for x in ("parameters", "arithmetic")),
            number(price["CPU time"], 1),
        ]
        for loss in LOSSES:
            mean = f"{statistics.fmean(run.summary[loss] for run in plain):.3f}"
            cells.append(mean if name == "plain" else plus_minus(paired(group, plain, loss)))
        lines.append(f"| {' | '.join(cells)} |")
    table = ["<details><summary>Model by model</summary>", "", *lines, "", NAMES, "", "</details>"]
    return "\n\n".join([textwrap.fill(f"{first} {second}", 139), "\n".join(slopes), "\n".join(table)])


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
    """What studies B to F say: `ANSWERS` as far as their runs are kept, next-token loss.

    What is told apart is bold; what still is when all these looks are counted (Holm) has a star.
    """
    lines = [
        "| study | difference of next-token validation losses, nats a token | 95 % over the seeds |",
        "|---|---|---|",
    ]
    folders = {name: Path(read_sweep(STUDIES / f"{name}.toml").out).name for name in {study for study, _ in ANSWERS}}
    runs = {folder: runs_in(data / folder) for folder in set(folders.values())}
    found = {
        (name, *weights): contrast(runs[folders[name]], weights)
        for (name, _), contrasts in ANSWERS.items()
        for weights in contrasts.values()
    }  # what stands in two rows is one look
    looks = {key: one for key, one in found.items() if one is not None and len(one.by_seed) > 1}
    apart = {key for key, one in looks.items() if one.estimate.told_apart}
    stars = {key for key, holds in zip(looks, holm([one.p for one in looks.values()]), strict=True) if holds}
    absent = []
    for (name, what), contrasts in ANSWERS.items():
        cells = []
        for label, weights in contrasts.items():
            key = (name, *weights)
            value = "not run yet" if found[key] is None else plus_minus(found[key].estimate)
            value = f"**{value}**" + "\\*" * (key in stars) if key in apart else value
            cells.append(f"{label} {value}")
        if all(cell.endswith("not run yet") for cell in cells):
            absent.append(f"{QUESTIONS[name][0]}, {what}")
        else:
            lines.append(f"| {QUESTIONS[name][0]} | {what} | {'; '.join(cells)} |")
    lines += middle_layers(data)
    lines.append(
        f"\n{len(apart)} of these {len(looks)} intervals do not hold 0; by luck alone {len(looks) / 20:.1f} would not. "
        f"A star: told apart also when all these looks are counted (Holm's correction), {len(stars)} of them."
    )
    return "\n".join(lines + ([f"\nNot run yet: {'; '.join(absent)}."] if absent else []))


def middle_layers(data: Path) -> list[str]:
    """Study F's row that is no difference of losses; none before its runs are measured."""
    deep = windows.load(data / "f_depth") if (data / "f_depth").is_dir() else {}
    cells = []
    for name, label in (("plain", "plain"), ("m1", "m = 1"), ("m2", "m = 2"), ("m4", "m = 4"), ("m8", "m = 8")):
        if name in deep:
            share = interval([windows.last_reads(row)[-1] for row in deep[name]])
            half = "" if math.isnan(share.half_width) else f" ± {share.half_width:.2f}"
            cells.append(f"{label} {signed(share.mean, 2).lstrip('+')}{half}")
    what = "part of what the last of 24 sublayers reads that layers 4 to 23 have written"
    return [f"| F | {what} (a share of 1) | {'; '.join(cells)} |"] if cells else []


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
