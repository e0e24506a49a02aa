"""One look for every picture, in the notebooks and under figures/.

`python -m vwn_ref.experiments.plots` redraws figures/*.png from the numbers kept in figures/data.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from vwn_ref.experiments import paper, scaling
from vwn_ref.experiments.compare import interval
from vwn_ref.experiments.console import told
from vwn_ref.experiments.finished import KeptRun, NotRun, load_runs
from vwn_ref.experiments.storage import write_whole
from vwn_ref.experiments.sweep import STUDIES, kept_runs, read_sweep

# Okabe and Ito's palette: told apart with any kind of colour vision. Black is kept for the plain model.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
PLAIN = "#000000"
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SIGNED = "RdBu_r"  # matrices: blue negative, white zero, red positive
POSITIVE = "cividis"  # norms


def style() -> None:
    """Set Matplotlib's defaults: notebook width, quiet axes, the palette above."""
    mpl.rcParams.update(
        {
            "figure.figsize": (7.0, 3.4),
            "figure.dpi": 110,
            "savefig.dpi": 200,
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "axes.titlesize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "axes.prop_cycle": mpl.cycler(color=COLOURS),
            "legend.frameon": False,
            "image.interpolation": "nearest",
        }
    )


def matrix(
    ax: Axes,
    values: object,
    *,
    title: str = "",
    rows: str = "",
    columns: str = "",
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    split: int | None = None,
    limit: float | None = None,
    numbers: bool | None = None,
) -> AxesImage:
    """Draw a small matrix as a picture: blue negative, white zero, red positive.

    Args:
        values: [rows, columns], a tensor or an array; NaN leaves a place empty.
        rows, columns: what the axes are, e.g. "slot j".
        row_labels, column_labels: one label each; default 1, 2, …, as the paper counts.
        split: draw a line before this column (0-based), to part Å from Â.
        limit: the colour scale runs from −limit to limit; default the largest |entry|.
        numbers: write the entries; default where there are at most 80.
    """
    array = values.detach().cpu().double().numpy() if hasattr(values, "detach") else values
    height, width = array.shape
    limit = limit or max(np.nanmax(abs(array)), 1e-12)
    image = ax.imshow(array, cmap=SIGNED, vmin=-limit, vmax=limit, aspect="equal")
    ax.set(title=title, xlabel=columns, ylabel=rows)
    for axis, count, labels in ((ax.xaxis, width, column_labels), (ax.yaxis, height, row_labels)):
        step = 1 if labels is not None else max(1, -(-count // 12))  # no more than 12 default labels
        ticks = range(0, count, step)
        axis.set_ticks(list(ticks), [str(t + 1) for t in ticks] if labels is None else list(labels))
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    if split is not None:
        ax.axvline(split - 0.5, color="black", linewidth=1)
    if numbers if numbers is not None else array.size <= 80:
        for i, j in np.argwhere(~np.isnan(array)):
            shade = "white" if abs(array[i, j]) > 0.65 * limit else "black"
            ax.text(j, i, f"{array[i, j]:.2g}", ha="center", va="center", fontsize=7, color=shade)
    return image


def wiring(ax: Axes, A: object, B: object, *, title: str = "") -> None:
    """Draw A [n, m+n] and B [m, n] as wires from the old slots (left) to the new (right), the sublayer T above.

    Blue wires read (Å), orange ones write (B), grey ones carry (Â). A wire is as thick as its weight, dashed where the
    weight is negative, absent where it is 0; weights other than 1 are written beside it.
    """
    A, B = (np.asarray(M.detach().cpu().double() if hasattr(M, "detach") else M) for M in (A, B))
    m, n = B.shape
    left, into, out, right = 0.0, 1.1, 1.9, 3.0
    slots = -np.arange(n)
    ports = m + 0.3 - np.arange(m)  # segment 1 on top
    ax.add_patch(mpl.patches.Rectangle((into, 0.75), out - into, m + 0.1, facecolor="0.92", edgecolor="0.3"))
    ax.text((into + out) / 2, m + 0.95, "T", ha="center", va="bottom", fontsize=12)
    # Where along a wire its weight is written: where it meets few others, for one segment half way up to the next slot.
    up = 0.5 / (ports[0] - slots)
    at_read, at_write = (up, 1 - up) if m == 1 else (np.full(n, 0.75), np.full(n, 0.35))
    wires = (  # weights [from, to], where from and to are, the colour, that place
        (A[:, :m], (left, slots), (into, ports), COLOURS[0], at_read[:, None]),
        (A[:, m:], (left, slots), (right, slots), "0.55", 0.3),
        (B, (out, ports), (right, slots), COLOURS[1], at_write),
    )
    for weights, (x0, y0), (x1, y1), colour, places in wires:
        for ((i, j), weight), along in zip(
            np.ndenumerate(weights), np.broadcast_to(places, weights.shape).flat, strict=True
        ):
            if not weight:
                continue
            line = "--" if weight < 0 else "-"
            ax.plot([x0, x1], [y0[i], y1[j]], line, color=colour, linewidth=0.6 + 1.8 * abs(weight), zorder=1)
            if weight != 1:
                place = (x0 + along * (x1 - x0), y0[i] + along * (y1[j] - y0[i]))
                box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
                ax.text(*place, f"{weight:.2g}", color=colour, fontsize=8, ha="center", va="center", bbox=box)
    for x, ys, name, side in (
        (left, slots, "slot ", "right"),
        (into, ports, "", "left"),
        (out, ports, "", "right"),
        (right, slots, "slot ", "left"),
    ):
        ax.scatter([x] * len(ys), ys, s=26, color="0.2", zorder=2)
        for k, y in enumerate(ys, start=1):
            gap = 0.15 if name else 0.09
            ax.text(x + (gap if side == "left" else -gap), y, f"{name}{k}", ha=side, va="center", fontsize=8)
    ax.set(title=title, xlim=(left - 0.7, right + 0.7), ylim=(-n + 0.5, m + 1.7))
    ax.axis("off")


def bars(
    ax: Axes, groups: Sequence[str], series: dict[str, Sequence[float | None]], *, numbers: bool | str = False
) -> None:
    """Draw grouped bars: for each of `groups` one bar of every series, label → heights, with a gap where it is None.

    numbers: write the heights above the bars, in this format, "%.2f" where it is True.
    """
    width = 0.8 / len(series)
    for k, (label, heights) in enumerate(series.items()):
        places = [group + (k - (len(series) - 1) / 2) * width for group in range(len(groups))]
        drawn = ax.bar(places, [np.nan if h is None else h for h in heights], width=0.92 * width, label=label)
        if numbers:
            form = "%.2f" if numbers is True else numbers
            ax.bar_label(drawn, ["" if h is None else form % h for h in heights], fontsize=8)
    ax.set_xticks(range(len(groups)), groups)
    ax.grid(axis="x", visible=False)


def memory_flow(ax: Axes, kernels: Sequence[tuple[str, str, str]], *, title: str = "") -> None:
    """Draw what runs, from left to right, above a line that is the memory: (name, what it reads, what it writes).

    Grey and without arrows where nothing is said of reading and writing.
    """
    for k, (name, reads, writes) in enumerate(kernels):
        box = {"boxstyle": "round,pad=0.4", "fc": COLOURS[5] if reads or writes else "0.9", "ec": "none"}
        ax.text(k, 0.75, name, ha="center", va="center", bbox=box)
        for text, side, style in ((reads, -0.22, "->"), (writes, 0.22, "<-")):
            if text:
                arrow = {"arrowstyle": style, "color": "0.35"}
                ax.annotate("", (k + side, 0.58), (k + side, 0.17), arrowprops=arrow)
                ax.text(k + 1.25 * side, 0.37, text, ha="right" if side < 0 else "left", va="center", fontsize=8)
    ax.axhline(0.15, color=PLAIN, linewidth=2)
    ax.text(-0.72, 0.02, "memory", fontsize=8, va="top")
    ax.set(xlim=(-0.75, len(kernels) - 0.25), ylim=(-0.12, 1), title=title)
    ax.axis("off")


def schematic(ax: Axes, title: str, *, state: float, layer: float, n: int = 1, m: int = 1) -> None:
    """Draw one block from the embedding up: widths to scale, the state cut into n slots, the layer into m segments.

    Args:
        state, layer: widths of the state and of attention and FFN, in units of D.
    """

    def box(y: float, width: float, pieces: int, label: str, colour: str) -> None:
        for k in range(pieces):
            left = -width / 2 + k * width / pieces
            ax.add_patch(mpl.patches.Rectangle((left, y), width / pieces, 0.5, fc=colour, ec="white", lw=1))
        ax.text(0, y + 0.25, label, ha="center", va="center", fontsize=7, bbox={"fc": colour, "ec": "none", "pad": 0.5})

    def join(y: float, below: float, above: float, label: str) -> None:
        if below == above:
            ax.annotate("", (0, y + 0.5), (0, y), arrowprops={"arrowstyle": "->", "color": "0.35"})
            return
        corners = [(-below / 2, y + 0.04), (below / 2, y + 0.04), (above / 2, y + 0.46), (-above / 2, y + 0.46)]
        ax.add_patch(mpl.patches.Polygon(corners, fc="0.9", ec="0.6", lw=0.8))
        ax.text(0, y + 0.25, label, ha="center", va="center", fontsize=8)

    wide, backbone = COLOURS[5], COLOURS[4]
    names = ("embedding", "attention", "state", "FFN", "state")
    for level, name in enumerate(names):
        of_state = level % 2 == 0
        box(float(level), state if of_state else layer, n if of_state else m, name, wide if of_state else backbone)
    for level, label in enumerate(("read Å", "write B", "read Å", "write B")):
        ends = (state, layer) if level % 2 == 0 else (layer, state)
        join(level + 0.5, *ends, label)
    for level in (0, 2):
        arrow = {"arrowstyle": "->", "color": "0.35", "connectionstyle": "bar,fraction=-0.1"}
        ax.annotate("", (-state / 2, level + 2.15), (-state / 2, level + 0.35), arrowprops=arrow)
        ax.text(-state / 2 - 0.26, level + 1.25, "+" if n == m else "Â", ha="right", va="center", fontsize=9)
    join(4.5, state, layer, "reduce")
    box(5.0, layer, 1, "unembedding", "0.85")
    ax.set(xlim=(-1.75, 1.15), ylim=(-0.1, 5.6), title=title)
    ax.axis("off")


def overview(data: Path) -> Figure:
    """The README's picture: the idea, and what the first runs gave (`data`/first_training, see figures/README.md)."""
    fig, axes = plt.subplots(1, 4, figsize=(11, 4.2), width_ratios=(1, 1, 1, 1.5))
    schematic(axes[0], "plain: all D wide", state=1.0, layer=1.0)
    schematic(axes[1], "wider: all 2D, 4× the work", state=2.0, layer=2.0)
    schematic(axes[2], "VWN: state 2D, layers D", state=2.0, layer=1.0, n=8, m=4)
    runs = load_runs(data / "first_training")
    ax = axes[3]
    shown = [("r2", "VWN, r = 2", 0), ("r4", "VWN, r = 4", 1)]
    for name, label, colour in (entry for entry in shown if entry[0] in runs):
        base = {run.seed: run.curve() for run in runs["plain"]}
        curves = [np.subtract(run.curve()[1], base[run.seed][1]) for run in runs[name]]
        tokens = np.array(runs[name][0].curve()[0]) / 1e6
        for curve in curves:
            ax.plot(tokens, curve, color=COLOURS[colour], linewidth=0.7, alpha=0.6)
        ax.plot(tokens, np.mean(curves, axis=0), color=COLOURS[colour], marker=MARKERS[colour], ms=4, label=label)
    ax.axhline(0, color=PLAIN, linewidth=1, label="plain Transformer, same seed")
    ax.set(xlabel="training tokens (millions)", ylabel="validation loss − plain (nats a token)")
    ax.set_title("trained at D = 32: three seeds, mean")
    ax.legend(fontsize=8)
    return fig


def r_families(runs: dict[str, list[KeptRun]]) -> dict[str, list[list[KeptRun]]]:
    """Variants of a sweep over r in the order of r: those with a wide table, Eq. (2), and those with a low-rank one,
    Eq. (3). r = 1 needs no wider table, so it begins both."""
    found: dict[str, list[list[KeptRun]]] = {"wide table, Eq. (2)": [], "low-rank table, Eq. (3)": []}
    for variant in runs.values():
        model = variant[0].config["model"]
        if model["m"] is not None:
            lowrank = model["embed_rank"] is not None
            for name in found if model["n"] == model["m"] else list(found)[lowrank : lowrank + 1]:
                found[name].append(variant)
    return {name: sorted(variants, key=lambda one: scaling.r_of(one[0])) for name, variants in found.items()}


def signed(value: float, digits: int = 3) -> str:
    """A number with a minus sign that is as wide as a plus."""
    return f"{value:+.{digits}f}".replace("-", "−")


def loss_against_r(
    ax: Axes, runs: dict[str, list[KeptRun]], name: str = "val_next", *, reference: tuple[str, float] | None = None
) -> None:
    """Draw the final loss `name` of a sweep against log2 r, a line for each of `r_families`, and the variant "plain".

    Small marks are seeds, large ones their means. A bar is the 95 % interval of the difference to the plain model with
    the same seed, around the mean. The line is `fit_log2` of the integer r; the band is the 95 % interval over the
    seeds' own lines. Hollow marks have an r that is no integer: no GroupNorm before W_reduce, not in the fit. A
    line's numbers are from the seeds that plain and all its variants have; the shared r = 1 is drawn with those of the
    first line. The axis spans the seeds, and cuts longer bars.

    reference: label and slope of a line to compare with; it starts on the first fit at r = 2.
    """
    low, high = [], []  # of what the axis has to hold
    for k, (family, variants) in enumerate(r_families(runs).items()):
        if len(variants) < 2:
            continue
        seeds, losses = scaling.losses_of([runs["plain"], *variants], name)
        plain, losses = losses[:, 0], losses[:, 1:]
        x = np.log2([scaling.r_of(one[0]) for one in variants])
        whole = x == np.round(x)
        for i in range(losses.shape[1]):
            shared = x[i] == 0
            if shared and k:
                continue
            aside = (-1, 1)[k]
            place = x[i] + (0 if shared else 0.045 * aside)
            look = {"color": "0.4" if shared else COLOURS[k], "marker": "D" if shared else MARKERS[k]}
            fill = {} if whole[i] else {"markerfacecolor": "white"}
            half = interval(list(losses[:, i] - plain)).half_width
            ax.plot([place + 0.075 * aside] * len(seeds), losses[:, i], linestyle="", ms=3.5, alpha=0.5, **look, **fill)
            drawn = {"yerr": None if np.isnan(half) else half, "capsize": 3, "elinewidth": 1.2, "zorder": 4}
            ax.errorbar(place, losses[:, i].mean(), markersize=7, **drawn, **look, **fill)
        fit = scaling.fit_log2(2 ** x[whole], losses[:, whole])
        half, ends = fit.over_seeds.half_width, np.array([x[whole].min(), x[whole].max()])
        label = f"{family}: {signed(fit.slope)} " + ("" if np.isnan(half) else f"± {half:.3f} ")
        line = fit.intercept + fit.slope * ends
        ax.plot(ends, line, color=COLOURS[k], linewidth=1.8, label=f"{label}({len(seeds)} seed{'s'[: len(seeds) - 1]})")
        if not np.isnan(half):
            places = np.linspace(*ends)
            by_seed = [np.polyval(np.polyfit(x[whole], row, 1), places) for row in losses[:, whole]]
            middle, width = np.array([interval(list(values)) for values in np.transpose(by_seed)]).T
            ax.fill_between(places, middle - width, middle + width, color=COLOURS[k], alpha=0.13, lw=0)
        low, high = [*low, losses.min(), line.min()], [*high, losses.max(), line.max(), plain.max()]
        if k == 0:
            ax.axhspan(plain.min(), plain.max(), color=PLAIN, alpha=0.1, linewidth=0)
            ax.axhline(plain.mean(), color=PLAIN, linewidth=1.2)
            if reference is not None and ends[1] > 1:
                text, slope = reference
                start = fit.at(2)
                to = start + slope * (ends[1] - 1)
                ax.plot([1, ends[1]], [start, to], color="0.35", linestyle=(0, (1.5, 1.5)), label=text)
    span = max(high) - min(low)
    ax.set(ylim=(min(low) - 0.27 * span, max(high) + 0.05 * span))  # the legend stands below
    ax.set_xlabel("virtual width r, log scale")
    ticks = sorted({scaling.r_of(one[0]) for one in runs.values()})
    ax.set_xticks(np.log2(ticks), [f"{r:g}" for r in ticks])
    handles, labels = ax.get_legend_handles_labels()
    last = sorted(range(len(labels)), key=lambda i: reference is not None and labels[i] == reference[0])
    look = {"title": "slope per doubling of r", "title_fontsize": 8.5, "alignment": "left", "fontsize": 8.5}
    look |= {"frameon": True, "framealpha": 0.85, "edgecolor": "none"}  # over bars that are cut
    ax.legend([handles[i] for i in last], [labels[i] for i in last], loc="lower left", **look)


def r_sweep(data: Path) -> Figure:
    """Loss against the virtual width, study A (`data`/a, see figures/README.md), beside the slopes of the paper."""
    runs = kept_runs(read_sweep(STUDIES / "a_r_sweep.toml", data / "a"))
    next2 = scaling.fit_log2(list(paper.TABLE_1["next2"]), [-gain.value for gain in paper.TABLE_1["next2"].values()])
    panels = {
        "val_next": ("next token", ("the paper's, its Fig. 8", paper.FIG_8_SLOPE.value)),
        "val_next2": ("next-2 token (MTP head)", ("the paper's, fitted to its Table 1", next2.slope)),
    }
    fig, axes = plt.subplots(1, 2, figsize=(9.5, 5.0))
    for ax, (name, (title, (label, slope))) in zip(axes, panels.items(), strict=True):
        loss_against_r(ax, runs, name, reference=(f"{label}: {signed(slope, 4)}", slope))
        ax.set_title(title)
    axes[0].set_ylabel("validation loss (nats a token)")
    config, tokens = runs["plain"][0].config, runs["plain"][0].summary["tokens"]
    fig.suptitle(
        f"Loss against virtual width at the same backbone: D = {config['model']['dim']}, "
        f"{config['model']['n_layers']} blocks, {tokens / 1e6:.1f}M tokens",
        fontsize=11,
    )
    dot = partial(mpl.lines.Line2D, [], [], linestyle="", color="0.4")
    stroke = mpl.collections.LineCollection([], colors="0.4", linewidths=1.2)
    bar = mpl.container.ErrorbarContainer((dot(marker="o", ms=6), (), (stroke,)), has_yerr=True)
    handles = {
        "plain, and the range of its seeds": (mpl.patches.Patch(fc="0.9"), mpl.lines.Line2D([], [], color=PLAIN)),
        "r = 1: routing without width, on both lines": dot(marker="D", ms=5),
        "r = 1.5: no GroupNorm, not in the fit": dot(marker="o", markerfacecolor="white"),
        "one seed": dot(marker="o", ms=3.5, alpha=0.5),
        "mean; bar: 95 % interval of its difference to plain": bar,
        "95 % interval of the line, over seeds": mpl.patches.Patch(fc=COLOURS[0], alpha=0.2),
    }
    fig.legend(handles.values(), handles, loc="outside lower center", ncols=3, fontsize=8.5)
    return fig


def every_figure() -> tuple[Callable[[Path], Figure], ...]:
    """What draws each picture in `figures`, from the folder of kept studies; its name is the file's."""
    # these stand on this module
    from vwn_ref.experiments.gpu_figures import gpu
    from vwn_ref.experiments.paper_figures import FIGURES
    from vwn_ref.experiments.parts_figures import by_backbone, differences, what_pays
    from vwn_ref.experiments.windows_figures import how_far_back

    return (overview, r_sweep, *FIGURES, what_pays, differences, by_backbone, how_far_back, gpu)


def main(arguments: Sequence[str] = ()) -> None:
    """Redraw every figure of this repository; run from its top folder. One without runs yet is passed by."""
    argparse.ArgumentParser(prog="python -m vwn_ref.experiments.plots", description=main.__doc__).parse_args(arguments)
    figures = Path("figures")
    if not (figures / "data").is_dir():
        sys.exit("error: no folder figures/data here: run this in the top folder of the repository")
    mpl.use("Agg")
    style()
    for draw in every_figure():
        path = figures / f"{draw.__name__}.png"
        try:
            with told():
                picture = draw(figures / "data")
        except NotRun as reason:
            print(f"{path}: not drawn, {reason}")
            continue
        # without Matplotlib's version in it the same numbers give the same file
        with told():
            write_whole(path, partial(picture.savefig, format="png", metadata={"Software": None}))
        plt.close(picture)
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
