"""Pictures come from kept data alone."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

from vwn_ref.experiments import paper_figures, plots
from vwn_ref.experiments.finished import KeptRun
from vwn_ref.experiments.readme import DATA

matplotlib.use("Agg")


def test_overview_draws_the_paired_differences(monkeypatch, tmp_path):
    def runs(losses):
        return [
            KeptRun("x", {"seed": s}, [{"tokens": 0, "val_next": 7.0}, {"tokens": 2_000_000, "val_next": x}], {})
            for s, x in enumerate(losses)
        ]

    monkeypatch.setattr(plots, "load_runs", lambda folder: {"plain": runs([3.0, 4.0]), "r2": runs([2.5, 3.7])})
    lines = plots.overview(tmp_path).axes[-1].get_lines()
    drawn = [(line.get_xdata()[-1], round(line.get_ydata()[-1], 9)) for line in lines[:3]]
    assert drawn == [(2.0, -0.5), (2.0, -0.3), (2.0, -0.4)]  # each seed, then the mean


def test_matrix_leaves_nan_empty_and_out_of_the_scale():
    values = np.array([[0.5, np.nan], [-2.0, 1.0]])
    _, ax = plt.subplots()
    image = plots.matrix(ax, values)
    written = {text.get_position(): text.get_text() for text in ax.texts}  # (column, row)
    assert written == {(0, 0): "0.5", (0, 1): "-2", (1, 1): "1"}
    assert image.get_clim() == (-2.0, 2.0)


def sweep_run(name, seed, loss, m, n, rank=None):
    model = {"m": m, "n": n, "embed_rank": rank, "dim": 16, "n_layers": 4}
    return KeptRun(name, {"seed": seed, "model": model}, [], {"val_next": loss, "val_next2": loss + 1, "tokens": 5000})


@pytest.fixture
def sweep():
    """Wide: 3 − 0.1 log2 r, seed s adds s/100 but to plain, which is 4 for all; low-rank: −0.05, one seed short."""
    runs = {"plain": [sweep_run("plain", s, 4.0, None, None) for s in range(4)]}
    for n, r in ((8, 8.0), (4, 4.0), (2, 2.0), (1, 1.0)):  # order does not matter
        runs[f"r{n}"] = [sweep_run(f"r{n}", s, 3 - 0.1 * np.log2(r) + s / 100, 1, n) for s in range(3)]
    runs["r1.5"] = [sweep_run("r1.5", s, 3.5, 2, 3) for s in range(3)]  # far off the line
    for n in (2, 4):
        some = [sweep_run(f"r{n}-lowrank", s, 3 - 0.05 * np.log2(n) + s / 100, 1, n, 16) for s in range(n // 2)]
        runs[f"r{n}-lowrank"] = some
    return runs


def test_loss_against_r(sweep):
    """Slopes over the integer r and the seeds that a whole line has; bars from the paired differences."""
    ax = plt.figure().subplots()
    plots.loss_against_r(ax, sweep, reference=("elsewhere: −1", -1.0))
    said = [text.get_text() for text in ax.get_legend().get_texts()]
    assert said == [
        "wide table, Eq. (2): −0.100 ± 0.000 (3 seeds)",
        "low-rank table, Eq. (3): −0.050 (1 seed)",
        "elsewhere: −1",
    ]
    lines = {line.get_label(): line for line in ax.get_lines()}
    np.testing.assert_allclose(lines[said[0]].get_ydata(), [3.01, 2.71], atol=1e-12)  # the mean of seeds 0, 1, 2
    np.testing.assert_allclose(lines[said[1]].get_ydata(), [3.0, 2.9], atol=1e-12)  # seed 0 alone
    np.testing.assert_allclose(lines[said[2]].get_ydata(), [2.91, 0.91], atol=1e-12)  # from the first line's r = 2
    bars = {round(float(bar[0].get_ydata()[0]), 6): bar for bar in ax.containers}
    assert sorted(bars) == [2.71, 2.81, 2.9, 2.91, 2.95, 3.01, 3.5]  # r = 1 once
    assert [bar[0].get_markerfacecolor() for y, bar in bars.items() if y == 3.5] == ["white"]
    low, high = bars[2.71][1][0].get_ydata()[0], bars[2.71][1][1].get_ydata()[0]
    # seeds 0, 0.01, 0.02 above plain's common value: t(0.975, 2) · 0.01 / √3
    assert (high - low) / 2 == pytest.approx(0.02484138, abs=1e-6)
    assert len(bars[2.95][1]) == 0  # one seed has no bar
    (band,) = [c for c in ax.collections if len(c.get_paths()) == 1 and len(c.get_paths()[0].vertices) > 50]
    y = band.get_paths()[0].vertices[:, 1]  # the seeds' lines are parallel: as far from the mean line everywhere
    assert (y.max(), y.min()) == pytest.approx((3.01 + 0.02484138, 2.71 - 0.02484138), abs=1e-6)
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1", "1.5", "2", "4", "8"]
    bottom, top = ax.get_ylim()
    assert bottom < 2.71 and top > 4.0  # every seed is inside


def test_r_sweep_has_both_losses_and_the_papers_slopes(monkeypatch, tmp_path, sweep):
    monkeypatch.setattr(
        plots, "kept_runs", lambda study: sweep if study.runs[0].folder.parent == tmp_path / "a" else {}
    )
    axes = plots.r_sweep(tmp_path).axes
    said = [[text.get_text() for text in ax.get_legend().get_texts()] for ax in axes]
    assert said[0][2] == "the paper's, its Fig. 8: −0.0069"
    assert said[1][2] == "the paper's, fitted to its Table 1: −0.0140"  # 0.030, 0.045, 0.058: (0.058 − 0.030) / 2
    assert said[0][:2] == said[1][:2]  # the losses differ by 1
    assert axes[1].get_lines()[-1].get_ydata()[0] == pytest.approx(axes[0].get_lines()[-1].get_ydata()[0] + 1)


def test_help_and_unknown_options_draw_nothing(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for arguments, status in ((["--help"], "0"), (["--nonsense"], "2")):
        for module in (plots, paper_figures):
            with pytest.raises(SystemExit, match=status):
                module.main(arguments)


def test_main_wants_the_top_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="figures/data"):
        plots.main()


@pytest.mark.parametrize("draw", plots.every_figure(), ids=lambda draw: draw.__name__)
def test_nothing_is_cut_off(draw):
    """Of the pictures in `figures`, as they are drawn: titles and labels end inside."""
    plots.style()
    picture = draw(DATA)
    picture.canvas.draw()
    drawn, (width, height) = picture.get_tightbbox(), picture.get_size_inches()
    plt.close(picture)
    assert min(drawn.x0, drawn.y0, width - drawn.x1, height - drawn.y1) > -0.01, (drawn, width, height)
