"""Study E's pictures: the loss against each currency, each difference of `parts.CONTRASTS` with its interval, and, with
study B, what VWNs gain with each backbone.

`make figures` draws them into figures/, from the runs in `data`/a and its neighbours (see figures/README.md).
"""

from __future__ import annotations

import itertools
import math
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vwn_ref.config import VWNConfig
from vwn_ref.experiments import step_times
from vwn_ref.experiments.compare import paired
from vwn_ref.experiments.finished import LOSSES, NotRun, Runs, common_seeds, measures, runs_in, shared_seeds
from vwn_ref.experiments.parts import BACKBONES, CONTRASTS, CURRENCIES, Times, price_ratio, table_share
from vwn_ref.experiments.plots import COLOURS, MARKERS, PLAIN

FAMILIES = {
    "plain, wider: D = 16 to 32": ("plain", "plain-d20", "plain-d24", "plain-d28", "plain-d32"),
    "plain, deeper: 4 to 14 blocks": ("plain", "plain-l6", "plain-l10", "plain-l14"),
    "plain, longer: 3,000 to 5,700 steps": ("plain", "plain-4000", "plain-5700"),
    "VWN, wide table: r = 1, 2, 4, 8": ("r1", "r2", "r4", "r8"),
    "VWN, low-rank table: r = 1, 2, 4, 8": ("r1", "r2-lowrank", "r4-lowrank", "r8-lowrank"),
    "VWN, static, wide table: r = 1, 2, 4": ("r1-static", "r2-static", "r4-static"),
    "with n-grams: plain, r = 2, 4": ("plain-ngram", "r2-ngram", "r4-ngram"),
}
GAINS = {  # two with each table, which have one colour
    "r = 4, wide table": ("r4", "plain"),
    "r = 8, wide table": ("r8", "plain"),
    "r = 4, low-rank table": ("r4-lowrank", "plain"),
    "r = 8, low-rank table": ("r8-lowrank", "plain"),
}
LOOKS = (
    (PLAIN, "-"),
    (PLAIN, "--"),
    (PLAIN, ":"),
    *zip(COLOURS, ("-", "-", "--", "-."), strict=False),
)  # of the families

APART = 1.075  # from family to family, where all cost the same


def drawn_seeds(runs: Runs) -> list[int]:
    """The seeds that every model of `FAMILIES` has, of those that have run."""
    return common_seeds([runs[name] for name in dict.fromkeys(itertools.chain(*FAMILIES.values())) if name in runs])


def loss_against(ax: Axes, runs: Runs, currency: str, loss: str = "val_next", times: Times = None) -> None:
    """Draw the mean of the loss against the price in one currency, over plain's, a line for each of `FAMILIES`.

    What has not run is left out. All means are over the same seeds, those that every model drawn has; where there is
    more than one, small dots are the seeds. Families all of whose models cost the same would hide one another: they
    stand side by side in a grey band, which says so.
    """
    seeds = drawn_seeds(runs)
    drawn = []
    for (label, names), (colour, line), marker in zip(FAMILIES.items(), LOOKS, MARKERS, strict=False):
        groups = [[run for run in runs[name] if run.seed in seeds] for name in names if name in runs]
        prices = [price_ratio(group, runs["plain"], times)[currency] for group in groups]
        known = [(price, group) for price, group in zip(prices, groups, strict=True) if price is not None]
        if known:
            x = np.array([price for price, _ in known])
            losses = [[run.summary[loss] for run in group] for _, group in known]
            drawn.append((x, losses, line, {"label": label, "marker": marker, "color": colour}))
    upright = [k for k, (x, *_) in enumerate(drawn) if len(x) > 1 and np.ptp(x) == 0]
    for k, (x, losses, line, look) in enumerate(drawn):
        if k in upright and len(upright) > 1:
            x = x * APART ** (upright.index(k) - (len(upright) - 1) / 2)
        ax.plot(x, [statistics.fmean(row) for row in losses], line, ms=5, linewidth=1.3, **look)
        if len(seeds) > 1:
            ax.plot(x, losses, linestyle="", ms=2, alpha=0.5, marker=look["marker"], color=look["color"])
    title = {"backbone": "arithmetic of the backbone", "arithmetic": "all arithmetic"}.get(currency, currency)
    ax.set(xscale="log", title=title, xlabel="over plain's (log scale)")
    if currency == "CPU time" and drawn:
        note = {"fontsize": 8, "color": "0.4", "transform": ax.transAxes, "va": "bottom", "ha": "right"}
        ax.text(0.98, 0.02, "single builds of a\nmodel scatter widely", **note)
    if len(upright) > 1:
        end = APART ** (len(upright) / 2 + 0.2)
        ax.axvspan(1 / end, end, color="0.5", alpha=0.12, linewidth=0)
        text = {"fontsize": 8, "color": "0.4", "transform": ax.get_xaxis_transform()}
        ax.text(1.04 * end, 0.02, "grey: all at 1×,\nside by side", **text)
    ticks = [x for x in (1, 1.5, 2, 3, 4, 6) if x <= 1.05 * max([1.0, *(x.max() for x, *_ in drawn)])]
    ax.set_xticks(ticks, [f"{x:g}×" for x in ticks])
    ax.minorticks_off()


def study_runs(data: Path) -> Runs:
    """Runs in study A's folder, which study E shares. Raises NotRun before there is a wider plain model."""
    runs = runs_in(data / "a")
    if not {"plain", "plain-d32"} <= runs.keys():
        raise NotRun("no runs of plain models of two widths yet, study E")
    return runs


def what_pays(data: Path, loss: str = "val_next") -> Figure:
    """Study E: loss against each currency. Raises NotRun as `study_runs` does."""
    runs = study_runs(data)
    fig, axes = plt.subplots(1, 4, figsize=(12, 4.4), sharey=True)
    times = step_times.load(data / "a", runs)
    for ax, currency in zip(axes, CURRENCIES, strict=True):
        loss_against(ax, runs, currency, loss, times)
    axes[0].set_ylabel(f"validation loss, {LOSSES[loss]} (nats a token)")
    seeds = drawn_seeds(runs)
    of = f"means of {len(seeds)} seeds (small dots)" if len(seeds) > 1 else f"seed {seeds[0]} alone"
    fig.suptitle(f"One gain, four prices: {of}. Lower is better, further left is cheaper", fontsize=11)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8.5)
    return fig


def differences(data: Path, reach: float = 0.5) -> Figure:
    """Study E: each of `CONTRASTS` that has run, with its 95 % interval over the seeds, by next and next-2 token.

    Filled marks: the interval does not hold 0. Without a bar: one seed. The axis ends at ± reach, or beyond the
    largest mean, and cuts longer bars. Raises NotRun as `study_runs` does.
    """
    runs = study_runs(data)
    there = [one for one in CONTRASTS if one.model in runs and one.base in runs]
    groups = {about: list(rows) for about, rows in itertools.groupby(there, key=lambda one: one.about)}
    fig, ax = plt.subplots(figsize=(8.5, 0.235 * (len(there) + len(groups)) + 1))
    names = []
    for number, (about, rows) in enumerate(groups.items()):
        if number % 2:
            ax.axhspan(len(names) - 0.5, len(names) + len(rows) + 0.5, color="0.5", alpha=0.1, linewidth=0)
        names.append(about)
        for one in rows:
            for k, loss in enumerate(LOSSES):
                both = (runs[one.model], runs[one.base])
                if not all(measures(run, loss) for group in both for run in group):
                    continue
                mean, half = found = paired(*both, loss)
                at = len(names) + 0.36 * (k - 0.5)
                ax.plot([mean - half, mean + half], [at, at], color=COLOURS[k])
                ax.plot(mean, at, MARKERS[k], ms=4.5, color=COLOURS[k], mfc=COLOURS[k] if found.told_apart else "white")
                reach = max(reach, 1.1 * abs(mean))
            names.append(f"{one.what}: {one.model} − {one.base}")
    ax.axvline(0, color=PLAIN, linewidth=1)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    for label in ax.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in groups else "normal")
    ax.tick_params(axis="y", length=0)
    ax.set(xlim=(-reach, reach), ylim=(len(names) - 0.3, -0.7))
    ax.set_xlabel("difference of losses (nats a token); below 0: the first is better")
    ax.grid(visible=False, axis="y")
    marks = [Line2D([], [], color=COLOURS[k], marker=MARKERS[k], ms=4.5) for k in range(len(LOSSES))]
    empty = Line2D([], [], color="0.4", marker="o", ms=4.5, mfc="white")
    labels = [*LOSSES.values(), "hollow: not told apart from 0, or one seed"]
    fig.legend([*marks, empty], labels, loc="outside lower center", ncols=3, fontsize=8.5)
    return fig


def by_backbone(data: Path) -> Figure:
    """Studies A, B and E's bytes: what `GAINS` are with each backbone of `parts.BACKBONES`, by both losses.

    Bars are 95 % intervals over the seeds; hollow marks: the interval holds 0, or one seed. Raises NotRun before two
    backbones have a VWN of these.
    """
    found = {name: runs_in(data / name) for name in BACKBONES}
    found = {name: runs for name, runs in found.items() if any(set(pair) <= runs.keys() for pair in GAINS.values())}
    if len(found) < 2:
        raise NotRun("no two backbones yet, study B")
    panels = {loss: [runs for runs in found.values() if measures(runs["plain"][0], loss)] for loss in LOSSES}
    panels = {loss: there for loss, there in panels.items() if there}
    widths = [len(there) for there in panels.values()]
    fig, axes = plt.subplots(1, len(panels), figsize=(9.5, 3.9), sharey=True, squeeze=False, width_ratios=widths)
    for ax, (loss, there) in zip(axes[0], panels.items(), strict=True):
        for k, pair in enumerate(GAINS.values()):
            colour, marker = COLOURS[k // 2], MARKERS[k % 2]
            for place, runs in enumerate(there):
                if not (set(pair) <= runs.keys() and shared_seeds(runs, *pair)):
                    continue
                mean, half = gain = paired(*(runs[one] for one in pair), loss)
                x, face = place + 0.14 * (k - 1.5), colour if gain.told_apart else "white"
                ax.errorbar(x, mean, None if math.isnan(half) else half, color=colour, fmt=marker, ms=5, mfc=face)
        ax.axhline(0, color=PLAIN, linewidth=1)
        models = [VWNConfig(**runs["plain"][0].config["model"]) for runs in there]
        labels = [
            f"D = {m.dim}, {m.n_layers} blocks\nvocabulary {m.vocab_size}\ntable {table_share(m):.0%}" for m in models
        ]
        ax.set_xticks(range(len(there)), labels, fontsize=8.5)
        ax.set(title=LOSSES[loss], xlim=(-0.5, len(there) - 0.5))
        ax.grid(visible=False, axis="x")
    axes[0, 0].set_ylabel("loss minus plain's (nats a token)")
    axes[0, 0].set_xlabel("table: the embedding's share of plain's parameters", fontsize=9)
    looks = [{"color": COLOURS[k // 2], "marker": MARKERS[k % 2]} for k in range(len(GAINS))]
    marks = [Line2D([], [], linestyle="", ms=5, **look) for look in looks]
    empty = Line2D([], [], color="0.4", marker="o", linestyle="", ms=5, mfc="white")
    labels = [*GAINS, "hollow: not told apart from 0; gap: not run"]
    fig.legend([*marks, empty], labels, loc="outside lower center", ncols=5, fontsize=8.5, columnspacing=1.2)
    return fig
