"""The paper's Figs. 1, 4-7 and 9 beside our small counterparts, and what each claim comes to here; lesson 08.

    fig_6(Path("figures/data"))                        # a Figure; NotRun where the runs for it are not there yet
    print(table(rows(Path("figures/data"))))           # every claim: the paper's number, ours, a verdict
    python -m vwn_ref.experiments.paper_figures        # the same table

The studies grow: a seed or a variant that is missing makes an interval wider, takes it away (one seed), or makes a
number None; nothing fails. Ours are validation losses after the last step, in nats a token, differences paired over the
seeds, with Student's t; curves are training losses. What is the paper's comes from `paper` and is drawn in grey.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vwn_ref.experiments import downstream, paper
from vwn_ref.experiments.compare import Estimate, check_comparable, interval
from vwn_ref.experiments.console import told
from vwn_ref.experiments.finished import KeptRun, NotRun, Runs, runs_in, shared_seeds
from vwn_ref.experiments.plots import COLOURS, MARKERS, PLAIN, signed
from vwn_ref.experiments.scaling import TokenEfficiency, curves_of, fine_grid, smoother, token_efficiency

HEADS = {"next": "next token", "next2": "next-2 token (MTP head)"}  # whose training curves are drawn
PAPERS = "0.45"  # the colour of what is the paper's
WIDTHS = (2, 4, 8)  # r of Figs. 6-8
SEGMENTS = (1, 2, 4, 8)  # m of study C
KINDS = {"n_experts0": "dense", "n_experts4": "MoE, 2 of 4 experts"}  # of study D, by the end of the variant's name
DOUBLINGS = 0.5  # how far a curve is smoothed, see scaling.smoother


def evaluated_in(folder: Path) -> Runs:
    """`downstream.load`, empty where nothing was evaluated."""
    try:
        return downstream.load(folder)
    except FileNotFoundError:
        return {}


# ------------------------------------------------------------------------------------------------- numbers


@dataclass(frozen=True)
class BySeed:
    """A number for each seed, most often a difference of losses; its mean and 95 % interval."""

    by_seed: Mapping[int, float]

    @property
    def estimate(self) -> Estimate:
        return interval(list(self.by_seed.values()))

    @property
    def ends(self) -> tuple[float, float]:
        """Of the interval; NaN for one seed."""
        mean, half = self.estimate
        return mean - half, mean + half

    @property
    def p(self) -> float:
        """Of Student's t test against 0, two-sided; NaN for one seed."""
        from scipy import stats

        values = list(self.by_seed.values())
        if len(values) < 2:
            return math.nan
        mean, error = statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5
        if not error:
            return 0.0 if mean else 1.0
        return 2 * float(stats.t.sf(abs(mean) / error, len(values) - 1))

    def __str__(self) -> str:
        mean, half = self.estimate
        seeds = len(self.by_seed)
        return f"{signed(mean)}, one seed" if seeds == 1 else f"{signed(mean)} ± {half:.3f}, {seeds} seeds"


def contrast(runs: Runs, weights: Mapping[str, int | float], name: str = "val_next") -> BySeed | None:
    """Sum of weight × final loss over the variants, seed by seed: {"r8": 1, "plain": -1} is a paired difference.

    Over the seeds that all the variants have; None where there is no such seed. Raises as `compare.check_comparable`.
    """
    seeds = shared_seeds(runs, *weights)
    if not seeds:
        return None
    check_comparable([run for variant in weights for run in runs[variant]], name)
    final = {variant: {run.seed: run.summary[name] for run in runs[variant]} for variant in weights}
    return BySeed({seed: sum(w * final[variant][seed] for variant, w in weights.items()) for seed in seeds})


def mtp_contrasts(kind: str) -> dict[str, dict[str, int]]:
    """Weights of Figs. 4 and 5's comparisons in study D: label -> variant -> weight. `kind` is a key of KINDS.

    The last one is the interaction: what MTP does with VWN, minus what it does without.
    """
    plain, mtp, vwn, both = (f"{name}-{kind}" for name in ("plain", "mtp", "vwn", "vwn-mtp"))
    return {
        "VWN − plain": {vwn: 1, plain: -1},
        "MTP − plain": {mtp: 1, plain: -1},
        "VWN+MTP − plain": {both: 1, plain: -1},
        "VWN+MTP − VWN": {both: 1, vwn: -1},
        "VWN+MTP − MTP": {both: 1, mtp: -1},
        "interaction": {both: 1, vwn: -1, mtp: -1, plain: 1},
    }


def with_m(r: int, m: int) -> str:
    """Study C's name of a variant; those with m = 4 are study A's."""
    return f"r{r}" if m == 4 else f"r{r}-m{m}"


def efficiency(runs: Runs, variant: str, loss: str, base: str = "plain") -> TokenEfficiency | None:
    """Times fewer tokens that `variant` needs for the base's last training loss, as in Fig. 1. loss: of HEADS."""
    seeds = shared_seeds(runs, base, variant)
    if not seeds:
        return None
    curves = [curves_of(runs[name], seeds, f"train_{loss}") for name in (base, variant)]
    return token_efficiency(*curves[0], *curves[1], reach="plain")


def smooth(runs: Runs, variant: str, seeds: Sequence[int], loss: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [grid] and smoothed training losses [seeds, grid]. Local quadratic regression over DOUBLINGS."""
    tokens, losses = curves_of(runs[variant], seeds, f"train_{loss}")
    grid = fine_grid(tokens)
    return grid, losses @ smoother(tokens, grid, DOUBLINGS).weights.T


def gap(runs: Runs, variant: str, loss: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Tokens [grid], and the smoothed loss minus that of plain with the same seed [seeds, grid]; None without seeds."""
    seeds = shared_seeds(runs, "plain", variant)
    if not seeds:
        return None
    (tokens, plain), (_, wide) = (smooth(runs, name, seeds, loss) for name in ("plain", variant))
    return tokens, wide - plain


def growth(runs: Runs, variant: str, loss: str) -> BySeed | None:
    """The gap to plain at the end of the run minus that after half its tokens: < 0 where the advantage grows."""
    found = gap(runs, variant, loss)
    if found is None:
        return None
    tokens, gaps = found
    half = int(np.argmin(abs(tokens - tokens[-1] / 2)))
    seeds = shared_seeds(runs, "plain", variant)
    return BySeed(dict(zip(seeds, (float(x) for x in gaps[:, -1] - gaps[:, half]), strict=True)))


@dataclass(frozen=True)
class Task:
    """A measure of study G: what it is, which side is better, and what a model gets that knows nothing of the task."""

    label: str
    side: int
    floor: Callable[[dict], float]
    floor_is: str
    best: Callable[[dict], float] | None = None
    """What a perfect model gets, where that is known."""


TASKS = {
    "heldout.loss": Task(
        "loss on held-out text\n(nats a token)", -1, lambda s: s["heldout.unigram"], "token frequencies alone"
    ),
    "copying.gain": Task(
        "copying: gain of repetition\n(nats a token)", 1, lambda s: 0.0, "no gain", lambda s: s["copying.control.loss"]
    ),
    "brackets.accuracy": Task(
        "brackets: right kind\n(share)", 1, lambda s: s["brackets.majority"], "the most frequent kind", lambda s: 1.0
    ),
    "identifiers.gain_same_name": Task(
        "identifiers: gain of recall\n(nats a name)", 1, lambda s: 0.0, "no gain"
    ),
}  # fmt: skip


def above_floor(runs: Sequence[KeptRun], measure: str) -> tuple[int, float | None]:
    """How many of the runs are better than the task's floor by 1.96 standard errors, over the windows of the text; and
    the mean share of the way from floor to perfect, None where perfect is not known."""
    task, shares, above = TASKS[measure], [], 0
    for run in runs:
        better = task.side * (run.summary[measure] - task.floor(run.summary))
        above += better > 1.96 * run.summary[f"{measure}.se"]
        if task.best is not None:
            shares.append(better / abs(task.best(run.summary) - task.floor(run.summary)))
    return above, float(np.mean(shares)) if shares else None


# ------------------------------------------------------------------------------------------------- claims


@dataclass(frozen=True)
class Row:
    """A claim of the paper and our number for it."""

    figure: str
    says: str
    printed: str
    """The paper's number or the difference of two, "" where it prints none."""
    side: int
    """Where our number is if the claim holds here: -1 below 0, 1 above 0 (a ratio: 1), 0 if no side is claimed."""
    ours: BySeed | TokenEfficiency | None
    """None: not run yet."""

    @property
    def verdict(self) -> str:
        if self.ours is None:
            return "not run yet"
        null, ends = (0, self.ours.ends) if isinstance(self.ours, BySeed) else (1, (self.ours.low, self.ours.high))
        if None in ends or math.isnan(ends[0]):
            return "no interval"
        if ends[0] <= null <= ends[1]:
            return f"not told apart from {null}"
        if not self.side:
            return "told apart; no side claimed"
        return "in that direction" if (self.side > 0) == (ends[0] > null) else "against it"


def rows(data: Path) -> list[Row]:
    """The claims of §5 and §8 that our studies can be set beside, and what they come to, in the order of the figures.

    The comparisons and their sides were written down when three seeds of study A were kept, and no run of C, D or G.
    """
    a, d, g = runs_in(data / "a"), runs_in(data / "d"), evaluated_in(data / "a")
    found = []
    for loss, what in (("next", "next-token"), ("next2", "next-2-token")):
        speedup, (early, late) = paper.FIG_1_SPEEDUP[loss], paper.FIG_1_GAP[loss]
        tokens = f"tokens for plain's last {what} loss"
        found.append(Row("Fig. 1", tokens, f"{speedup.printed}×", 1, efficiency(a, "r8", loss)))
        printed = f"{early.printed} → {late.printed}"
        found.append(Row("Fig. 1", f"{what} gap of r = 8 grows", printed, -1, growth(a, "r8", loss)))
    moe = mtp_contrasts("n_experts4")
    gain, words = paper.FIG_5_GAIN, "words only"
    for figure, says, printed, side, label in (
        ("Fig. 4", "MoE, r = 1.5: VWN lowers the loss", words, -1, "VWN − plain"),
        ("Fig. 4", "MTP alone raises it", words, 1, "MTP − plain"),
        ("Fig. 4", "VWN+MTP is below VWN", words, -1, "VWN+MTP − VWN"),  # "lowest among the augmented variants"
        ("Fig. 4", "VWN+MTP is below MTP", words, -1, "VWN+MTP − MTP"),
        ("Fig. 4", "VWN+MTP against the baseline", f"{paper.FIG_4_GAP.printed}, no sign", 0, "VWN+MTP − plain"),
        ("Fig. 4", "MTP hurts less with VWN than without", words, -1, "interaction"),  # follows from the rows above
        ("Fig. 5", "MoE, r = 1.5: VWN below plain", f"−{gain['vwn'].printed}", -1, "VWN − plain"),
        ("Fig. 5", "VWN+MTP below plain", f"−{gain['vwn+mtp'].printed}", -1, "VWN+MTP − plain"),
    ):
        found.append(Row(figure, says, printed, side, contrast(d, moe[label])))
    for r, few, many in ((2, 2, 4), (8, 4, 8)):  # r = 4 is m = 8 against 16 in the paper: not in study C
        says = f"r = {r}: m = {many} is below m = {few}"
        found.append(Row("Fig. 6", says, words, -1, contrast(a, {with_m(r, many): 1, with_m(r, few): -1})))
    saturates = {with_m(2, 8): 1, with_m(2, 4): -2, with_m(2, 2): 1}
    found.append(Row("Fig. 6", "past m = 4 less is gained (asked at r = 2)", words, 1, contrast(a, saturates)))
    for loss, what in (("next", "next-token"), ("next2", "next-2-token")):
        for r in WIDTHS:
            printed = f"−{paper.TABLE_1[loss][r].printed}"
            ours = contrast(a, {f"r{r}": 1, "plain": -1}, f"val_{loss}")
            found.append(Row("Fig. 7", f"{what} loss, r = {r}, below plain", printed, -1, ours))
    for few, many in ((2, 4), (4, 8)):
        ours = contrast(a, {f"r{many}": 1, f"r{few}": -1})
        printed = signed(paper.TABLE_1["next"][few].value - paper.TABLE_1["next"][many].value)
        found.append(Row("Fig. 7", f"next-token loss: r = {many} is below r = {few}", printed, -1, ours))
    slope = {"r2": -0.5, "r4": 0, "r8": 0.5}  # least squares of three points one doubling apart
    printed = paper.FIG_8_SLOPE.printed.replace("-", "−")
    found.append(Row("Fig. 8", "change a doubling of r, r = 2, 4, 8", printed, -1, contrast(a, slope)))
    gains = [number.value for number in paper.FIG_9.values()]
    for (measure, task), says in zip(
        TASKS.items(),
        (
            "six benchmarks rise; here held-out loss",
            "as above; copying",
            "as above; brackets",
            "as above; recall of names",
        ),
        strict=True,
    ):
        printed = f"+{min(gains):.2f} to +{max(gains):.2f} points" if measure == "heldout.loss" else ""
        found.append(Row("Fig. 9", says, printed, task.side, contrast(g, {"r8": 1, "plain": -1}, measure)))
    return found


def table(found: Sequence[Row]) -> str:
    """The rows in columns of fixed width."""
    cells = [("figure", "the paper says", "its number", "ours, 95 % interval", "verdict")]
    for row in found:
        ours = "–" if row.ours is None else str(row.ours)
        cells.append((row.figure, row.says, row.printed or "–", ours, row.verdict))
    widths = [max(len(line[k]) for line in cells) for k in range(5)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


# ------------------------------------------------------------------------------------------------- pictures


def need(runs: Runs, *names: str) -> list[int]:
    """Seeds that all these variants have. Raises NotRun where there is none."""
    seeds = shared_seeds(runs, *names)
    if not seeds:
        raise NotRun(f"no seed has finished runs of {', '.join(names)} yet")
    return seeds


def scale_of(runs: Runs, name: str) -> str:
    """What a picture must say of our runs."""
    run = runs[name][0]
    model, tokens = run.config["model"], run.summary["tokens"]
    return f"D = {model['dim']}, {model['n_layers']} blocks, {tokens / 1e6:.1f}M tokens"


def seeds_text(count: int) -> str:
    return f"{count} seed{'s'[: count - 1]}"


def dots(
    ax: Axes,
    place: int | float,
    values: Sequence[float],
    half: float,
    k: int | None,
    *,
    flat: bool = False,
    **options: object,
) -> None:
    """A small mark a seed, a large one for their mean with ± `half`, no bar where that is NaN; in the k-th look, black
    for None. `place` is on the x axis, with `flat` on the y axis. `options` go to the large mark."""
    look = {"color": PLAIN, "marker": "o"} if k is None else {"color": COLOURS[k], "marker": MARKERS[k]}
    small, large = ([place] * len(values), values), (place, float(np.mean(values)))
    ax.plot(*(small[::-1] if flat else small), linestyle="", ms=3.5, alpha=0.5, **look)
    bar = {} if math.isnan(half) else {"xerr" if flat else "yerr": half}
    ax.errorbar(*(large[::-1] if flat else large), **bar, capsize=3, elinewidth=1.2, markersize=7, **look, **options)


def room(marks: Sequence[float], bars: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis that shows all `marks`, and the ends of `bars` unless they are far off: such bars are cut."""
    low, high = min(marks), max(marks)
    span = high - low or 0.01
    ends = [bar for bar in bars if not math.isnan(bar)]
    low, high = max(min([low, *ends]), low - span), min(max([high, *ends]), high + span)
    margin = 0.06 * (high - low)
    return low - margin, high + margin


def half_of(found: BySeed | None) -> float:
    return math.nan if found is None else found.estimate.half_width


def fig_1(data: Path) -> Figure:
    """Loss against tokens, plain and r = 8: thin lines are seeds, thick ones means, all smoothed."""
    runs = runs_in(data / "a")
    seeds = need(runs, "plain", "r8")
    fig, axes = plt.subplots(1, 2, figsize=(9.5, 4.0))
    for ax, (loss, title) in zip(axes, HEADS.items(), strict=True):
        ends = []
        for name, label, colour in (("plain", "plain", PLAIN), ("r8", "VWN, r = 8", COLOURS[0])):
            tokens, curves = smooth(runs, name, seeds, loss)
            x, shown = tokens / 1e6, tokens > 0.08 * tokens[-1]
            ax.plot(x[shown], curves[:, shown].T, color=colour, linewidth=0.7, alpha=0.4)
            ax.plot(x[shown], curves.mean(axis=0)[shown], color=colour, linewidth=1.8, label=label)
            ends.append(float(curves[:, -1].mean()))
        found, last = efficiency(runs, "r8", loss), x[-1]
        theirs = paper.FIG_1_SPEEDUP[loss]
        ax.axhline(ends[0], color=PLAIN, linewidth=0.8, linestyle=(0, (1, 2)))
        if found is not None and found.ratio is not None:
            arrow = {"arrowstyle": "<->", "color": COLOURS[1], "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0}
            ax.annotate("", (last / found.ratio, ends[0]), (last, ends[0]), arrowprops=arrow)
        ax.plot([], [], color=COLOURS[1], label=f"ours: {found}")
        label = f"the paper's {theirs.printed}×"
        ax.plot(last / theirs.value, ends[0], "D", ms=7, mfc="white", mec=PAPERS, label=label, zorder=5)
        ax.set(title=title, xlabel="training tokens (millions)", xlim=(0, 1.03 * last))
        ax.legend(fontsize=8.5, loc="upper right")
    axes[0].set_ylabel("training loss, smoothed (nats a token)")
    scale = f"{scale_of(runs, 'plain')}, learning rate falling, {seeds_text(len(seeds))}"
    fig.suptitle(f"Beside Fig. 1: tokens for the plain model's last loss. {scale}", fontsize=10.5)
    return fig


def fig_4_5(data: Path) -> Figure:
    """Plain, MTP, VWN and both at (m, n) = (2, 3): final next-token losses, and the comparisons that matter."""
    runs = runs_in(data / "d")
    variants = {"plain": "plain", "mtp": "MTP", "vwn": "VWN", "vwn-mtp": "VWN+MTP"}
    there = [kind for kind in KINDS if shared_seeds(runs, *(f"{name}-{kind}" for name in variants))]
    if not there:
        raise NotRun(f"no seed has finished runs of {', '.join(variants)} of one kind yet")
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.2), width_ratios=(1, 1.25))
    losses, differences, bars, wide = [], [], [], []  # marks and ends of bars, left and right
    for k, kind in enumerate(KINDS):
        if kind not in there:
            continue
        aside = 0.2 * k - 0.1
        for x, name in enumerate(variants):
            found = contrast(runs, {f"{name}-{kind}": 1, f"plain-{kind}": -1})
            values = [run.summary["val_next"] for run in runs[f"{name}-{kind}"]]
            half = math.nan if name == "plain" else half_of(found)
            dots(left, x + aside, values, half, k, label=None if x else f"{KINDS[kind]}, {seeds_text(len(values))}")
            losses, bars = losses + values, [*bars, float(np.mean(values)) - half, float(np.mean(values)) + half]
        for y, weights in enumerate(mtp_contrasts(kind).values()):
            found = contrast(runs, weights)
            dots(right, y + aside, list(found.by_seed.values()), half_of(found), k, flat=True)
            differences, wide = [*differences, *found.by_seed.values()], [*wide, *found.ends]
    for y, printed in ((0, paper.FIG_5_GAIN["vwn"]), (2, paper.FIG_5_GAIN["vwn+mtp"])):
        label = None if y else "the paper's, Fig. 5"
        right.plot(-printed.value, y, "D", ms=8, mfc="none", mec=PAPERS, label=label, zorder=5, linestyle="")
    left.set_xticks(range(4), variants.values())
    left.set(ylabel="final validation loss, next token (nats)", xlim=(-0.5, 3.5), ylim=room(losses, bars))
    left.set_title("bars: 95 % interval of the difference to plain")
    right.axvline(0, color=PLAIN, linewidth=1)
    right.set_yticks(range(6), mtp_contrasts(there[0]))
    right.xaxis.set_major_locator(MaxNLocator(6))
    right.set(xlabel="difference of losses (nats a token)", ylim=(5.6, -0.6), xlim=room([0.0, *differences], wide))
    right.set_title("paired over seeds, 95 %")
    fig.legend(loc="outside lower center", ncols=3, fontsize=8.5)
    scale = scale_of(runs, f"plain-{there[0]}")
    fig.suptitle(f"Beside Figs. 4 and 5: (m, n) = (2, 3), with and without MTP. {scale}", fontsize=10.5)
    return fig


def fig_6(data: Path) -> Figure:
    """Final loss against m, a line for each r; right the same as paired differences to m = 4."""
    runs = runs_in(data / "a")
    others = [with_m(r, m) for r in WIDTHS for m in SEGMENTS if m != 4]
    if not any(name in runs for name in others):
        raise NotRun(f"no run of study C's own, m = {', '.join(str(m) for m in SEGMENTS if m != 4)}, is finished yet")
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.0))
    for k, r in enumerate(WIDTHS):
        there = [m for m in SEGMENTS if with_m(r, m) in runs]
        x = np.log2(there) + 0.12 * (k - 1)
        means = []
        for place, m in zip(x, there, strict=True):
            losses = [run.summary["val_next"] for run in runs[with_m(r, m)]]
            dots(left, place, losses, math.nan, k, label=f"r = {r}" if m == there[0] else None)
            means.append(np.mean(losses))
            found = None if m == 4 else contrast(runs, {with_m(r, m): 1, with_m(r, 4): -1})
            if found is not None:
                dots(right, place, list(found.by_seed.values()), half_of(found), k)
        left.plot(x, means, color=COLOURS[k], linewidth=1)
    right.axhline(0, color=PLAIN, linewidth=1)
    for ax in (left, right):
        ax.set_xticks(np.log2(SEGMENTS), [str(m) for m in SEGMENTS])
        ax.set(xlabel="segments m (n = r·m slots)", xlim=(-0.3, 3.3))
    plain = [run.summary["val_next"] for run in runs.get("plain", [])]
    if plain:
        left.axhline(np.mean(plain), color=PLAIN, linewidth=1, linestyle=(0, (4, 2)), label="plain")
    left.set(ylabel="final validation loss, next token (nats)", title="means and single seeds")
    fig.legend(loc="outside lower center", ncols=4, fontsize=8.5)
    right.set(ylabel="loss − loss at m = 4, same r (nats)", title="paired over seeds, 95 %")
    one = next(name for name in (with_m(r, m) for r in WIDTHS for m in SEGMENTS) if name in runs)
    fig.suptitle(f"Beside Fig. 6: finer segments at the same virtual width. {scale_of(runs, one)}", fontsize=10.5)
    return fig


def fig_7(data: Path) -> Figure:
    """The gap to plain along training, r = 2, 4, 8; at the right edge its 95 % interval at the end. And Table 1."""
    runs = runs_in(data / "a")
    there = [r for r in WIDTHS if shared_seeds(runs, "plain", f"r{r}")]
    if not there:
        raise NotRun("no seed has finished runs of plain and of r2, r4 or r8 yet")
    fig, axes = plt.subplots(1, 3, figsize=(10.5, 4.0), width_ratios=(1, 1, 0.75))
    for ax, (loss, title) in zip(axes, HEADS.items(), strict=False):
        for k, r in ((k, r) for k, r in enumerate(WIDTHS) if r in there):
            tokens, gaps = gap(runs, f"r{r}", loss)
            x, shown = tokens / 1e6, tokens > 0.03 * tokens[-1]
            ax.plot(x[shown], gaps[:, shown].T, color=COLOURS[k], linewidth=0.6, alpha=0.35)
            label = f"r = {r} ({seeds_text(len(gaps))})"
            ax.plot(x[shown], gaps.mean(axis=0)[shown], color=COLOURS[k], linewidth=1.8, label=label)
            mean, half = interval([float(end) for end in gaps[:, -1]])
            bar = None if math.isnan(half) else half
            ax.errorbar(x[-1] * (1.04 + 0.04 * k), mean, yerr=bar, marker=MARKERS[k], color=COLOURS[k], capsize=3)
        ax.axhline(0, color=PLAIN, linewidth=1)
        ax.set(title=title, xlabel="training tokens (millions)")
    axes[0].set_ylabel("ours: training loss − plain (nats a token)")
    axes[0].legend(fontsize=8.5)
    columns = {"next": ("next token", "o"), "next2": ("next-2 token", "s")}
    for loss, (label, marker) in columns.items():
        gains = [-number.value for number in paper.TABLE_1[loss].values()]
        axes[2].plot(range(3), gains, marker, linestyle="-", color=PAPERS, mfc="white", label=label)
    for x, r in enumerate(WIDTHS):
        points = f"+{paper.TABLE_1['accuracy'][r].printed}"
        axes[2].text(x, 0.004, points, ha="center", va="bottom", fontsize=8.5, color=PAPERS)
    axes[2].text(1, 0.0105, "gain of accuracy, in points", ha="center", va="bottom", fontsize=8.5, color=PAPERS)
    axes[2].axhline(0, color=PLAIN, linewidth=1)
    axes[2].set_xticks(range(3), [f"r = {r}" for r in WIDTHS])
    axes[2].set(title="the paper's Table 1: loss − plain", ylim=(-0.068, 0.02), xlim=(-0.4, 2.4))
    axes[2].legend(fontsize=8.5, loc="lower left")
    fig.suptitle(f"Beside Fig. 7: the gain along training. {scale_of(runs, 'plain')}", fontsize=10.5)
    return fig


def fig_9(data: Path) -> Figure:
    """Study G by r, with each task's floor; left the paper's own gains, in other units on other tasks."""
    runs = evaluated_in(data / "a")
    names = {"plain": "plain", "r1": "r = 1", "r2": "r = 2", "r4": "r = 4", "r8": "r = 8"}
    there = [name for name in names if name in runs]
    if "plain" not in there or len(there) < 2:
        raise NotRun("no evaluated runs of plain and of a VWN yet, study G")
    fig = plt.figure(figsize=(10, 5.6))
    grid = fig.add_gridspec(2, 3, width_ratios=(0.9, 1, 1))
    theirs = fig.add_subplot(grid[:, 0])
    gains = [number.value for number in paper.FIG_9.values()]
    theirs.barh(list(paper.FIG_9), gains, color="0.85", edgecolor=PAPERS, hatch="//")
    for y, number in enumerate(paper.FIG_9.values()):
        theirs.text(number.value + 0.1, y, f"+{number.printed}", va="center", fontsize=8.5, color="0.25")
    theirs.invert_yaxis()
    theirs.set(title="the paper's: VWN × 8 − plain\n(points of accuracy, 500B tokens)", xlim=(0, 11))
    theirs.grid(axis="y", visible=False)
    for panel, (measure, task) in enumerate(TASKS.items()):
        ax, marks, bars = fig.add_subplot(grid[panel // 2, 1 + panel % 2]), [], []
        for x, name in enumerate(there):
            values = [run.summary[measure] for run in runs[name]]
            found = None if name == "plain" else contrast(runs, {name: 1, "plain": -1}, measure)
            dots(ax, x, values, half_of(found), None if name == "plain" else 0)
            middle = float(np.mean(values))
            marks, bars = [*marks, *values], [*bars, middle - half_of(found), middle + half_of(found)]
        floor = task.floor(runs["plain"][0].summary)
        ax.axhline(floor, color=COLOURS[1], linestyle=(0, (4, 2)))
        ax.set_ylim(room(marks if measure == "heldout.loss" else [*marks, floor], bars))  # its floor is far away
        ax.set_xticks(range(len(there)), [names[name] for name in there])
        ax.set_title(task.label, fontsize=9.5)
        ax.set_xlabel(f"floor {floor:.2f}: {task.floor_is}", fontsize=8.5, color=COLOURS[1])
    count = len(shared_seeds(runs, *there))
    scale = f"{scale_of(runs, 'plain')}, {seeds_text(count)} in common"
    fig.suptitle(f"Beside Fig. 9: what our models can be asked. {scale}", fontsize=10.5)
    return fig


FIGURES = (fig_1, fig_4_5, fig_6, fig_7, fig_9)  # Fig. 8 is plots.r_sweep


def main(arguments: Sequence[str] = ()) -> None:
    """Print the table of claims; run from the repository's top folder."""
    about = {"prog": "python -m vwn_ref.experiments.paper_figures", "description": main.__doc__}
    argparse.ArgumentParser(**about).parse_args(arguments)
    data = Path("figures/data")
    if not data.is_dir():
        sys.exit("error: no folder figures/data here: run this in the top folder of the repository")
    with told():
        print(table(rows(data)))


if __name__ == "__main__":
    main(sys.argv[1:])
