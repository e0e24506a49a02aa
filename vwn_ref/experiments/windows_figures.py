"""Study F's picture: how far back the last layer looks, what it reads, and what Â does with it, by m.

`make figures` draws it into figures/, from what `windows` has measured.
"""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from vwn_ref.experiments.finished import NotRun
from vwn_ref.experiments.plots import COLOURS, MARKERS, PLAIN
from vwn_ref.experiments.windows import FRACTIONS, SHARES, last_reads, load


def how_far_back(data: Path) -> Figure:
    """Study F (`data`/f_depth, see figures/README.md): by m, how far the last layer looks, what it reads; radii of Â.

    Raises NotRun before there is a measured run.
    """
    folder = data / "f_depth"
    measured = load(folder) if folder.is_dir() else {}
    by_m = {m: measured[f"m{m}"] for m in (1, 2, 4, 8) if f"m{m}" in measured}  # not their controls
    if not by_m:
        raise NotRun("no measured runs yet, study F")
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(12.5, 4.4))
    ms = sorted(by_m)
    L = len(by_m[ms[0]][0]["state"])
    columns = {f"m = {m}": by_m[m] for m in ms} | ({"plain": measured["plain"]} if "plain" in measured else {})
    looks = itertools.product([("strength", "map", 0), ("contributions", "what is added", 1)], FRACTIONS)
    for k, ((name, text, colour), fraction) in enumerate(looks):
        reach = [[row["back"][name][str(fraction)][-1] for row in rows] for rows in columns.values()]
        middles, ends = [statistics.fmean(one) for one in reach], [(min(one), max(one)) for one in reach]
        places = np.arange(len(columns)) + (k - 1.5) * 0.17
        look = {"color": COLOURS[colour], "marker": MARKERS[colour], "linestyle": "", "ms": 6}
        fill = {} if fraction == FRACTIONS[0] else {"markerfacecolor": "white"}
        left.vlines(places, *zip(*ends, strict=True), color=COLOURS[colour], linewidth=1.5)
        left.plot(places, middles, **look, **fill, label=f"{text} ≥ 1/{1 / fraction:.0f} of largest")
    for x, m in enumerate(ms):
        hard = "n, §4's hard routing"
        left.hlines(min(by_m[m][0]["n"], L), x - 0.4, x + 0.4, color="0.45", ls="--", label=None if x else hard)
    left.axhline(L - 1, color=PLAIN, linewidth=1, label="all earlier layers", zorder=1)
    left.set_xticks(range(len(columns)), list(columns))
    left.set(ylabel="layers back; bars: range of seeds", title=f"how far back layer {L} looks", ylim=(0, 1.05 * L))
    parts = np.array([np.mean([last_reads(row) for row in rows], axis=0) for rows in columns.values()]).T
    below = np.zeros(len(columns))
    for text, part, shade in zip(SHARES, parts, ("0.35", "0.65", COLOURS[4]), strict=True):
        middle.bar(list(columns), part, bottom=below, color=shade, width=0.7, label=text)
        below += part
    for x, rows in enumerate(columns.values()):
        ends = [1 - last_reads(row)[-1] for row in rows]
        middle.plot([x] * len(ends), ends, "_", color="black", ms=11, label="" if x else "start of later, by seed")
    middle.set(title=f"share of what layer {L} reads", ylim=(0, 1.05), yticks=[0, 0.25, 0.5, 0.75, 1])
    for k, m in enumerate(ms):
        radii = np.mean([row["radius"] for row in by_m[m]], axis=0)  # [L, 3]: 5 %, 50 %, 95 % of the tokens
        right.plot(range(1, L + 1), radii[:, 1], color=COLOURS[k], marker=MARKERS[k], ms=3.5, label=f"m = {m}")
        right.fill_between(range(1, L + 1), radii[:, 0], radii[:, 2], color=COLOURS[k], alpha=0.15, linewidth=0)
    right.axhline(1, color=PLAIN, linewidth=1, label="plain")
    right.set_xlabel("layer")
    right.set(title="spectral radius of Â by layer, 5 % to 95 % of tokens")
    for ax in (left, middle, right):
        ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, columnspacing=1)
    return fig
