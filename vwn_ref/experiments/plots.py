"""One look for every picture, in the notebooks and under figures/."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

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
        values: [rows, columns], a tensor or an array.
        rows, columns: what the axes are, e.g. "slot j".
        row_labels, column_labels: one label each; default 1, 2, …, as the paper counts.
        split: draw a line before this column (0-based), to part Å from Â.
        limit: the colour scale runs from −limit to limit; default the largest |entry|.
        numbers: write the entries; default where there are at most 80.
    """
    array = values.detach().cpu().double().numpy() if hasattr(values, "detach") else values
    height, width = array.shape
    limit = limit or max(abs(array).max(), 1e-12)
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
        for (i, j), value in ((index, array[index]) for index in np.ndindex(array.shape)):
            shade = "white" if abs(value) > 0.65 * limit else "black"
            ax.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize=7, color=shade)
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
    wires = (  # weights [from, to], where from and to are, the colour, where along the wire its weight is written
        (A[:, :m], (left, slots), (into, ports), COLOURS[0], 0.75),
        (A[:, m:], (left, slots), (right, slots), "0.55", 0.3),
        (B, (out, ports), (right, slots), COLOURS[1], 0.35),
    )
    for weights, (x0, y0), (x1, y1), colour, along in wires:
        for (i, j), weight in np.ndenumerate(weights):
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
            ax.text(x + (0.09 if side == "left" else -0.09), y, f"{name}{k}", ha=side, va="center", fontsize=8)
    ax.set(title=title, xlim=(left - 0.6, right + 0.6), ylim=(-n + 0.5, m + 1.7))
    ax.axis("off")
