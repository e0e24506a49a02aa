"""Lesson 08's numbers and pictures, on made-up runs: with a few seeds, with one, and with whole variants missing."""

import json
import math
import shutil

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

from vwn_ref.experiments import paper, paper_figures, plots, scaling
from vwn_ref.experiments.compare import paired
from vwn_ref.experiments.finished import NotRun, load_runs
from vwn_ref.experiments.paper_figures import BySeed, Row, contrast, mtp_contrasts, rows, with_m

matplotlib.use("Agg")

TOKENS = np.arange(50, 1001, 50) * 1024
NOISE = (0.0, 0.01, -0.01)  # by seed, of every model but plain


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def write(folder, name, seed, loss, *, mtp=True, tasks=None, **model):
    """A finished run whose loss, a power law of the tokens, ends at `loss`; the MTP head's is 0.1 higher."""
    path = folder / f"{name}-s{seed}"
    path.mkdir(parents=True)
    both = {"next": loss, "next2": loss + 0.1} if mtp else {"next": loss}
    curve = {at: {key: end + 20 * at**-0.25 - 20 * TOKENS[-1] ** -0.25 for key, end in both.items()} for at in TOKENS}
    lines = [{"tokens": int(at), **{f"train_{key}": value for key, value in curve[at].items()}} for at in TOKENS]
    summary = {"tokens": int(TOKENS[-1]), "parameters": 1000, **{f"val_{key}": value for key, value in both.items()}}
    config = {"seed": seed, "model": {"dim": 16, "n_layers": 4, "m": None, "n": None, "embed_rank": None, **model}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    if tasks is not None:
        (path / "downstream.json").write_text(json.dumps({"digest": "one", **tasks}))


def answers(heldout, gain):
    """What study G leaves of a run, as far as it is read here."""

    def value(mean):
        return {"mean": mean, "se": 0.01}

    return {
        "heldout": {"loss": value(heldout), "unigram": 5.0},
        "copying": {"gain": value(gain), "control": {"loss": value(4.0)}},
        "brackets": {"accuracy": value(0.85), "majority": 0.75},
        "identifiers": {"gain_same_name": value(0.015)},
    }


def fill(data, seeds):
    """Studies A, C, D and G: r2, r4, r8 are 0.2, 0.3, 0.4 below plain, and with MTP the VWN does better by 0.05."""
    for seed in range(seeds):
        noise = NOISE[seed]
        write(data / "a", "plain", seed, 3.5, tasks=answers(3.6, 0.0))
        for r, gain in ((2, 0.2), (4, 0.3), (8, 0.4)):
            for m in (1, 2, 4, 8):
                loss = 3.5 - gain - 0.01 * np.log2(m) + 0.02 + noise
                tasks = answers(3.3 + noise, 0.4) if (r, m) == (8, 4) else None  # r8, study A's
                write(data / "a", with_m(r, m), seed, loss, m=m, n=r * m, tasks=tasks)
        for kind, experts in (("n_experts0", 0), ("n_experts4", 4)):
            model = {"n_experts": experts}
            write(data / "d", f"plain-{kind}", seed, 3.5, mtp=False, **model)
            write(data / "d", f"mtp-{kind}", seed, 3.6 + noise, **model)
            write(data / "d", f"vwn-{kind}", seed, 3.4, mtp=False, m=2, n=3, **model)
            write(data / "d", f"vwn-mtp-{kind}", seed, 3.35, m=2, n=3, **model)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    data = tmp_path_factory.mktemp("three")
    fill(data, 3)
    return data


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    data = tmp_path_factory.mktemp("one")
    fill(data, 1)
    return data


# ------------------------------------------------------------------------------------------------- numbers


def test_a_contrast_of_two_is_the_paired_difference(three):
    runs = load_runs(three / "a")
    found = contrast(runs, {"r8": 1, "plain": -1})
    assert found.estimate == pytest.approx(paired(runs["r8"], runs["plain"]), abs=1e-12)
    assert found.by_seed == pytest.approx({0: -0.4, 1: -0.39, 2: -0.41})
    assert str(found) == "−0.400 ± 0.025, 3 seeds"  # t(0.975, 2) · 0.01 / √3 = 0.0248


def test_the_interaction(three):
    """MTP adds 0.1 without VWN and takes 0.05 away with it; seeds differ in the first alone."""
    found = contrast(load_runs(three / "d"), mtp_contrasts("n_experts4")["interaction"])
    assert found.by_seed == pytest.approx({0: -0.15, 1: -0.16, 2: -0.14})


def test_only_seeds_that_all_have_count(three):
    runs = load_runs(three / "a")
    some = {"r8": runs["r8"][1:], "plain": runs["plain"][:2]}
    assert list(contrast(some, {"r8": 1, "plain": -1}).by_seed) == [1]
    assert contrast(some, {"r8": 1, "r4": -1}) is None
    assert contrast({"r8": runs["r8"][2:], "plain": runs["plain"][:2]}, {"r8": 1, "plain": -1}) is None
    with pytest.raises(KeyError):  # a misspelt loss is no missing run
        contrast(runs, {"r8": 1, "plain": -1}, "val_nxet")


def test_gap_and_growth(three):
    """All curves are one power law, shifted: the gap is the same everywhere and does not grow."""
    runs = load_runs(three / "a")
    tokens, gaps = paper_figures.gap(runs, "r4", "next")
    assert tokens[-1] == TOKENS[-1] - 25 * 1024  # the middle of the last line's steps
    np.testing.assert_allclose(gaps, np.array([[-0.3], [-0.29], [-0.31]]) * np.ones_like(gaps), atol=1e-9)
    assert paper_figures.growth(runs, "r4", "next").by_seed == pytest.approx({0: 0, 1: 0, 2: 0}, abs=1e-9)
    for run in runs["r4"]:  # from now on the gap is −0.3 − tokens · 1e-7
        for line in run.log:
            line["train_next"] -= 1e-7 * (line["tokens"] - 25 * 1024)
    half = tokens[np.argmin(abs(tokens - tokens[-1] / 2))]
    expected = -1e-7 * (tokens[-1] - half)
    grown = paper_figures.growth(runs, "r4", "next").by_seed
    assert grown == pytest.approx({0: expected, 1: expected, 2: expected}, rel=2e-3)  # a line is smoothed to a line


def test_tokens_are_those_of_scaling(three):
    runs = load_runs(three / "a")
    found = paper_figures.efficiency(runs, "r8", "next2")
    curves = [scaling.curves_of(runs[name], [0, 1, 2], "train_next2") for name in ("plain", "r8")]
    assert found == scaling.token_efficiency(*curves[0], *curves[1], reach="plain")
    assert found.low > 1
    assert paper_figures.efficiency(runs, "r16", "next") is None


def test_above_floor(three):
    runs = paper_figures.evaluated_in(three / "a")
    assert paper_figures.above_floor(runs["r8"], "copying.gain") == (3, pytest.approx(0.1))  # 0.4 of 4 nats
    assert paper_figures.above_floor(runs["plain"], "copying.gain") == (0, pytest.approx(0.0))
    assert paper_figures.above_floor(runs["plain"], "brackets.accuracy") == (3, pytest.approx(0.4))
    # 1.5 standard errors above 0 are not enough; nobody knows what perfect recall would be
    assert paper_figures.above_floor(runs["plain"], "identifiers.gain_same_name") == (0, None)
    assert paper_figures.above_floor(runs["plain"], "heldout.loss") == (3, None)  # lower is better


# ------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("values", "side", "word"),
    [
        ((-0.3, -0.31, -0.29), -1, "in that direction"),
        ((-0.3, -0.31, -0.29), 1, "against it"),
        ((0.3, 0.31, 0.29), 1, "in that direction"),
        ((-0.3, 0.3, 0.1), 1, "not told apart from 0"),
        ((-0.3, -0.31, -0.29), 0, "told apart; no side claimed"),
        ((-0.3,), -1, "no interval"),
        (None, -1, "not run yet"),
    ],
)
def test_verdict(values, side, word):
    ours = None if values is None else BySeed(dict(enumerate(values)))
    assert Row("", "", "", side, ours).verdict == word


def test_verdict_on_ratios():
    def row(speed):  # plain reaches at 1024 tokens what the other has at 1024 / speed
        tokens = 2.0 ** np.arange(2, 11)
        other = [3 - np.log2(speed * tokens * (1 + e)) / 10 for e in (0, 0.01, 0.02)]
        plain = [3 - np.log2(tokens) / 10] * 3
        return Row("", "", "", 1, scaling.token_efficiency(tokens, plain, tokens, other, reach="plain"))

    assert [row(speed).verdict for speed in (2, 0.99)] == ["in that direction", "no interval"]  # 0.99: not reached
    assert row(1.0).verdict == "not told apart from 1"


def test_rows_know_what_there_is(three, one, tmp_path):
    verdicts = {(row.figure, row.says): row.verdict for row in rows(three)}
    assert verdicts["Fig. 4", "MTP alone raises it"] == "in that direction"
    assert verdicts["Fig. 4", "VWN+MTP is below MTP"] == "in that direction"
    assert verdicts["Fig. 4", "VWN+MTP against the baseline"] == "told apart; no side claimed"
    assert verdicts["Fig. 4", "MTP hurts less with VWN than without"] == "in that direction"
    assert verdicts["Fig. 6", "r = 2: m = 4 is below m = 2"] == "in that direction"
    assert verdicts["Fig. 8", "change a doubling of r, r = 2, 4, 8"] == "in that direction"
    assert len(verdicts) == len(rows(three))  # no claim twice
    steps = [row.printed for row in rows(tmp_path) if "is below r" in row.says]
    assert steps == ["−0.008", "−0.007"]  # Table 1: 0.020, 0.028, 0.035
    assert {row.verdict for row in rows(one)} == {"no interval"}
    assert {row.verdict for row in rows(tmp_path)} == {"not run yet"}
    assert [row.printed for row in rows(one)] == [row.printed for row in rows(tmp_path)]  # the paper's stay
    said = paper_figures.table(rows(one)).splitlines()
    assert len(said) == 2 + len(verdicts) and max(map(len, said)) <= 130
    assert sum("one seed" in line for line in said) == len(verdicts) - 2  # two are ratios: (no interval)


def test_fig_8s_slope_is_the_fits(three):
    runs = load_runs(three / "a")
    _, losses = scaling.losses_of([runs[f"r{r}"] for r in (2, 4, 8)])
    (row,) = [row for row in rows(three) if row.figure == "Fig. 8"]
    assert row.ours.estimate == pytest.approx(scaling.fit_log2([2, 4, 8], losses).over_seeds, abs=1e-12)


# ------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("draw", paper_figures.FIGURES)
def test_nothing_to_draw(draw, tmp_path):
    with pytest.raises(NotRun, match="yet"):
        draw(tmp_path)


def test_one_seed_is_drawn(one):
    for draw in paper_figures.FIGURES:
        assert "1 seed" in words(draw(one)) or draw.__name__ == "fig_6"


def words(fig):
    legends = [*fig.legends, *(ax.get_legend() for ax in fig.axes if ax.get_legend())]
    texts = [text.get_text() for legend in legends for text in legend.get_texts()]
    return " ".join([fig.get_suptitle(), *texts])


def test_fig_1_marks_the_papers_ratio(three):
    ax = paper_figures.fig_1(three).axes[0]
    (mark,) = [line for line in ax.get_lines() if line.get_label() == "the paper's 2.5×"]
    last = (TOKENS[-1] - 25 * 1024) / 1e6
    assert mark.get_xdata()[0] == pytest.approx(last / 2.5)
    assert mark.get_ydata()[0] == pytest.approx(3.5, abs=0.02)  # plain's last loss, half a line earlier


def test_figs_4_and_5_have_both_kinds_and_the_papers_gains(three):
    left, right = paper_figures.fig_4_5(three).axes
    assert [text.get_text() for text in right.get_yticklabels()][-1] == "interaction"
    marks = [line for line in right.get_lines() if line.get_marker() == "D" and line.get_markersize() == 8]
    assert [line.get_xdata()[0] for line in marks] == [-paper.FIG_5_GAIN[key].value for key in ("vwn", "vwn+mtp")]
    means = [bar[0].get_ydata()[0] for bar in left.containers]
    assert means == pytest.approx(2 * [3.5, 3.6, 3.4, 3.35])


def test_fig_6_has_a_line_for_each_r(three):
    left, right = paper_figures.fig_6(three).axes
    lines = [line.get_ydata() for line in left.get_lines() if len(line.get_ydata()) == 4]
    np.testing.assert_allclose(lines[0], 3.3 + 0.02 - 0.01 * np.arange(4), atol=1e-12)
    differences = [bar[0].get_ydata()[0] for bar in right.containers]
    assert differences == pytest.approx(3 * [0.02, 0.01, -0.01])


def test_fig_7_and_9_have_the_papers_numbers(three):
    table_1 = paper_figures.fig_7(three).axes[2]
    assert [text.get_text() for text in table_1.texts][:3] == ["+3.20", "+3.50", "+4.16"]
    fig = paper_figures.fig_9(three)
    assert [text.get_text() for text in fig.axes[0].texts] == [f"+{number.printed}" for number in paper.FIG_9.values()]
    assert fig.axes[3].get_xlabel() == "floor 0.75: the most frequent kind"


def test_room():
    assert paper_figures.room([1.0, 2.0], [0.5, 2.5]) == pytest.approx((0.38, 2.62))
    assert paper_figures.room([1.0, 2.0], [-9.0, 9.0, math.nan]) == pytest.approx((-0.18, 3.18))  # cut a span away


def test_figures_without_runs_are_passed_by(monkeypatch, tmp_path, capsys):
    (tmp_path / "figures" / "data").mkdir(parents=True)
    fill(tmp_path / "figures" / "data", 2)
    for path in (tmp_path / "figures" / "data" / "d").iterdir():
        (path / "summary.json").unlink()
    for name in ("overview", "r_sweep"):
        drawn = plt.figure()
        monkeypatch.setattr(plots, name, lambda data, drawn=drawn: drawn)
        getattr(plots, name).__name__ = name
    monkeypatch.setattr(paper_figures, "FIGURES", (paper_figures.fig_4_5, paper_figures.fig_6))
    monkeypatch.chdir(tmp_path)
    plots.main()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 9 and "fig_4_5.png: not drawn, no seed has finished runs of plain, mtp, vwn" in said[2]
    there = {path.name for path in (tmp_path / "figures").glob("*.png")}
    assert there == {"overview.png", "r_sweep.png", "fig_6.png"}


def test_fig_6_needs_no_model_of_study_A(tmp_path):
    fill(tmp_path, 2)
    for path in (tmp_path / "a").iterdir():
        if not path.name.startswith("r4-m8-"):
            shutil.rmtree(path)
    assert len(paper_figures.fig_6(tmp_path).axes) == 2
