"""What `vwn_ref.kernels.bench` measured on GPUs, as a picture: figures/gpu.png, in README. See plots.py."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from vwn_ref.experiments.paper_figures import NotRun
from vwn_ref.experiments.plots import COLOURS, PLAIN, bars
from vwn_ref.kernels import report

D_ALONE, D_TRAINED = 2048, 4096


def gpu(data: Path) -> Figure:
    """For each device a step alone, as a share of a copy's bandwidth, and what a VWN adds to a training step. Raises
    NotRun where no device has been measured."""
    there = report.devices(data / "gpu")
    folders = [x for x in there if (x / "ops.json").exists() and (x / "steps.json").exists()]
    if not folders:
        raise NotRun("no GPU has been measured")
    fig, axes = plt.subplots(len(folders), 3, figsize=(9.5, 2.9 * len(folders)), squeeze=False)
    shapes = list(report.SHAPES.values())
    for row, folder in zip(axes, folders, strict=True):
        rows = report.load(folder)
        for ax, direction in zip(row, ("forward", "backward"), strict=False):
            shares = {}
            for label, way in {"Triton kernels": "fused", "torch.compile": "compiled"}.items():
                found = [report.operation(rows, way, "step", *shape, D_ALONE, direction) for shape in shapes]
                shares[label] = [x.get("share_of_copy") for x in found]
            bars(ax, [f"({m}, {n})" for m, n in shapes], in_percent(shares), numbers="%.0f")
            for k, values in enumerate(shares.values()):
                for at in (place for place, value in enumerate(values) if value is None):
                    ax.text(at + 0.4 * k - 0.2, 2, "not measured", rotation=90, fontsize=7, color="0.4", ha="center")
            ax.axhline(100, color=PLAIN, linestyle="--", linewidth=1)
            ax.set(title=f"a step, {direction}, D = {D_ALONE}", xlabel="(m, n)", ylim=(0, 108))
        row[0].set_ylabel(f"{folder.name.replace('-', ' ')}\n% of a copy's bandwidth")
        row[0].legend(fontsize=8, loc="upper right", bbox_to_anchor=(1.0, 0.93))
        keys = {"by bytes and FLOPs": "predicted_step_ratio", "Triton kernels, measured": "step_ratio"}
        extra = {}
        for label, key in keys.items():
            ratios = [report.training(rows, r, D_TRAINED, key) for r in report.SHAPES]
            extra[label] = [None if x is None else x - 1 for x in ratios]
        row[2].set_prop_cycle(color=["0.65", COLOURS[0]])  # what is measured is the Triton kernels'
        bars(row[2], [f"{r:g}" for r in report.SHAPES], in_percent(extra), numbers="%.1f")
        row[2].set(title=f"a training step, D = {D_TRAINED}", xlabel="r", ylabel="% over the plain model")
        row[2].margins(y=0.12)
        row[2].legend(fontsize=8, loc="upper left")
    return fig


def in_percent(series: dict[str, list[float | None]]) -> dict[str, list[float | None]]:
    """Of shares; None stays None."""
    return {label: [None if x is None else 100 * x for x in values] for label, values in series.items()}
