"""Slopes and token ratios: curves with known answers, how often intervals cover, and the paper's own numbers."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from vwn_ref.experiments import paper, scaling
from vwn_ref.experiments.compare import interval
from vwn_ref.experiments.finished import common_seeds, load_runs
from vwn_ref.experiments.scaling import fine_grid, fit_log2, log_ratios, smoother, token_efficiency

R = [1.0, 2.0, 4.0, 8.0]
TOKENS = np.arange(50, 3001, 50) * 1024.0  # as a run of 3,000 steps logs them
SIMULATIONS, SEEDS = 2000, 5


def power_law(tokens):
    return 2.0 + 25 * tokens**-0.25


def covered(estimates, truth):
    """Share of intervals that hold the truth."""
    return np.mean([abs(estimate.mean - truth) <= estimate.half_width for estimate in estimates])


# ------------------------------------------------------------------------------------------------ loss against r


def test_an_exact_line():
    fit = fit_log2([1, 1.5, 2, 4, 8], 3.0 - 0.05 * np.log2([1, 1.5, 2, 4, 8]))
    assert (fit.slope, fit.intercept, fit.r_squared) == pytest.approx((-0.05, 3.0, 1.0), abs=1e-12)
    assert fit.at(16) == pytest.approx(2.8, abs=1e-12)
    assert fit.over_points.half_width == pytest.approx(0, abs=1e-12) and np.isnan(fit.over_seeds.half_width)


def test_losses_that_are_all_the_same():
    """No spread to explain: R² is no number."""
    fit = fit_log2([1, 2, 4], [3.0, 3.0, 3.0])
    assert fit.slope == 0 and fit.intercept == 3.0 and np.isnan(fit.r_squared)


def test_a_grid_ends_where_the_curve_does():
    for tokens in ([1000.0, 7919.0, 100_003.0], [3.0, 3.1]):
        grid = fine_grid(np.array(tokens))
        assert (grid[0], grid[-1]) == (tokens[0], tokens[-1]) and (np.diff(grid) > 0).all()
        assert np.diff(np.log2(grid)).max() <= 1 / 50
    assert len(fine_grid(np.array([1.0, 4.0]))) == 101


def test_slopes_by_hand():
    """Two seeds, r = 1, 2, 4: slopes (y₃ − y₁)/2 = −1 and −2; t(0.975, 1) = 12.7062, s/√2 = 0.5."""
    fit = fit_log2([1, 2, 4], [[5.0, 4.0, 3.0], [14.0, 13.0, 10.0]])
    assert fit.by_seed == pytest.approx((-1, -2)) and fit.slope == pytest.approx(-1.5)
    assert fit.over_seeds.mean == pytest.approx(-1.5) and fit.over_seeds.half_width == pytest.approx(6.3531, abs=1e-4)
    assert fit.intercept == pytest.approx(29 / 3)  # means 9.5, 8.5, 6.5: 8.1667 at log2 r = 1
    assert fit.r_squared == pytest.approx(1 - (1 / 6) / (14 / 3))


def test_over_points_is_the_textbooks():
    y = np.random.default_rng(0).normal(size=(3, 4))
    fit, line = fit_log2(R, y), stats.linregress(np.log2(R), y.mean(axis=0))
    assert (fit.slope, fit.intercept) == pytest.approx((line.slope, line.intercept))
    assert fit.r_squared == pytest.approx(line.rvalue**2)
    assert fit.over_points.half_width == pytest.approx(stats.t.ppf(0.975, 2) * line.stderr)


def test_what_a_seed_adds_to_all_its_losses_drops_out():
    y = np.random.default_rng(0).normal(size=(3, 4))
    fit, moved = fit_log2(R, y), fit_log2(R, y + np.array([[10.0], [-20.0], [30.0]]))
    assert moved.over_seeds == pytest.approx(fit.over_seeds) and moved.over_points == pytest.approx(fit.over_points)


def test_coverage_of_slopes():
    """The rates that `fit_log2` tells. 95 % ± 1.5 %: three standard errors of 2,000 simulations."""
    x, truth, draw = np.log2(R), -0.05, np.random.default_rng(1)

    def simulate(slope_sd):
        size = (SIMULATIONS, SEEDS)
        noise = draw.normal(0, 0.05, (*size, 1)) + draw.normal(0, slope_sd, (*size, 1)) * x
        return 3 + truth * x + noise + draw.normal(0, 0.01, (*size, 4))

    for slope_sd, points in ((0.0, 0.95), (0.01, 0.78)):
        losses = simulate(slope_sd)
        fits = [fit_log2(R, one) for one in losses]
        assert 0.935 <= covered([fit.over_seeds for fit in fits], truth) <= 0.965
        assert abs(covered([fit.over_points for fit in fits], truth) - points) < 0.03
        every = np.tile(x, SEEDS)
        pooled = [stats.linregress(every, one.ravel()) for one in losses[:500]]
        width = stats.t.ppf(0.975, len(every) - 2)
        assert np.mean([abs(line.slope - truth) <= width * line.stderr for line in pooled]) > 0.985


@pytest.mark.parametrize(
    ("r", "losses", "message"),
    [
        ([1, 2], [[1.0, 2.0, 3.0]], r"losses have shape \(1, 3\): must be \[seeds, 2\]"),
        ([2, 2], [1.0, 2.0], "must hold two different values"),
        ([1], [1.0], r"r = \[1\]: must be two or more numbers > 0"),
        ([0, 2], [1.0, 2.0], "must be two or more numbers > 0"),
        ([1, 2], [1.0, float("nan")], "losses: must hold finite numbers, has nan"),
        ([1, 2], [[1.0, 2.0], [1.0]], "losses: must be an array of numbers"),
        ([1, 2], np.zeros((0, 2)), r"losses have shape \(0, 2\)"),
        ([1, 2], np.zeros((3, 2, 4)), r"losses have shape \(3, 2, 4\)"),
        ([[1, 2], [3, 4]], [1.0, 2.0], r"r = \[\[1, 2\], \[3, 4\]\]: must be two or more numbers > 0"),
    ],
)
def test_bad_fits(r, losses, message):
    with pytest.raises(ValueError, match=message):
        fit_log2(r, losses)


# ---------------------------------------------------------------------------------------------- tokens for a loss


@pytest.mark.parametrize("ratio", [1.0, 1.3, 2.5])
def test_an_exact_ratio(ratio):
    """`power_law` is no parabola in log tokens: over a doubling the local fit is off by less than 1e-4 of the ratio."""
    for at in (1e6, 0.99 * TOKENS[-1] / ratio):  # just inside: beyond there would be no ratio
        found = token_efficiency(TOKENS, power_law(TOKENS), TOKENS, power_law(ratio * TOKENS), at=at)
        assert found.ratio == pytest.approx(ratio, rel=1e-4) and found.by_seed == (found.ratio,)
        assert np.isnan(found.low) and np.isnan(found.high) and str(found) == f"{ratio:.2f}× (no interval)"
    found = token_efficiency(TOKENS, power_law(TOKENS), TOKENS, power_law(ratio * TOKENS), reach="plain")
    assert found.ratio == pytest.approx(ratio, rel=1e-4)


def test_curves_at_different_tokens():
    sparse = np.geomspace(2e4, 4e6, 12)
    found = token_efficiency(TOKENS, power_law(TOKENS), sparse, power_law(2.5 * sparse), at=1e6, width=1.0)
    assert found.ratio == pytest.approx(2.5, rel=2e-3)  # 1.6 points a doubling: the parabola is wider


def test_a_curve_reaches_its_own_end():
    found = token_efficiency(TOKENS, power_law(TOKENS), TOKENS, power_law(TOKENS))
    assert found.ratio == pytest.approx(1, abs=1e-9) and found.bound == 1


def test_smoothing():
    grid = np.geomspace(TOKENS[0], TOKENS[-1], 200)

    def parabola(tokens):
        return 3 - 0.2 * np.log2(tokens) + 0.01 * np.log2(tokens) ** 2

    for tokens in (TOKENS, TOKENS[[0, 20, 40]]):
        weights = smoother(tokens, grid, 0.5).weights
        assert weights @ parabola(tokens) == pytest.approx(parabola(grid), abs=1e-9)
    weights = smoother(TOKENS, TOKENS[-1:], 0.5).weights[0]
    assert (weights[TOKENS[-1] * 2**-0.5 > TOKENS] == 0).all()  # nothing from further than half a doubling
    assert (weights**2).sum() < 0.6  # of the variance of a point, even at the end of the curve


def test_where_the_loss_is_never_reached():
    plain, wide = np.array([[0.0], [0.1]]) + power_law(TOKENS), power_law(2.5 * TOKENS) + np.zeros((2, 1))
    found = token_efficiency(TOKENS, plain, TOKENS, wide)
    assert (found.ratio, found.low, found.high, found.bootstrap) == (None,) * 4
    assert found.by_seed == (None, None) and found.bound == 1
    assert str(found) == "more than 1.00× (no seed reaches the loss)"
    found = token_efficiency(TOKENS, plain, TOKENS, wide, at=1.2e6)  # 2.5 × 1.2M = 3.0M: there, but for the second seed
    assert found.ratio is None and found.by_seed[0] == pytest.approx(2.5, rel=1e-3) and found.by_seed[1] is None
    assert found.bound == pytest.approx(3000 * 1024 / 1.2e6)
    assert str(found) == "no ratio: 1 of 2 seeds reach the loss, 2.50×; the others more than 2.56×"
    found = token_efficiency(TOKENS, wide, TOKENS, plain, reach="plain")  # a VWN that is worse
    assert str(found) == "less than 1.00× (no seed reaches the loss)"


def test_intervals_are_over_the_log_ratios():
    ratios = np.array([2.0, 2.5, 4.0])
    wide = np.array([power_law(ratio * TOKENS) for ratio in ratios])
    found = token_efficiency(TOKENS, [power_law(TOKENS)] * 3, TOKENS, wide, reach="plain")
    wanted = interval([float(x) for x in np.log2(ratios)])
    assert found.ratio == pytest.approx(20 ** (1 / 3), rel=1e-4)
    assert np.log2([found.low, found.high]) == pytest.approx([wanted[0] - wanted[1], wanted[0] + wanted[1]], abs=1e-3)
    assert 2.0 < found.bootstrap[0] < 20 ** (1 / 3) < found.bootstrap[1] < 4.0
    assert str(found) == f"{found.ratio:.2f}× ({found.low:.2f} to {found.high:.2f})"


@pytest.mark.parametrize("reach", ["plain", "vwn"])
def test_coverage_of_ratios(reach):
    """The rates that `token_efficiency` tells. Seeds move whole curves, batches move both models' points alike, and
    each has noise of its own."""
    draw, size = np.random.default_rng(2), (SIMULATIONS * SEEDS, len(TOKENS))
    common = draw.normal(0, 0.02, (size[0], 1)) + draw.normal(0, 0.03, size)

    def noisy(curve):
        return curve + common + draw.normal(0, 0.01, size) + draw.normal(0, 0.01, (size[0], 1))

    plain, wide = noisy(power_law(TOKENS)), noisy(power_law(2.5 * TOKENS))
    if reach == "plain":
        logs = -log_ratios(TOKENS, plain, TOKENS, wide, None, 0.5)[0]
    else:
        logs = log_ratios(TOKENS, wide, TOKENS, plain, 4e5, 0.5)[0]
    groups = [[float(x) for x in group] for group in logs.reshape(SIMULATIONS, SEEDS)]
    truth = np.log2(2.5)
    rate = covered([interval(group) for group in groups], truth)
    assert 0.935 <= rate <= 0.965
    ends = np.log2([scaling.bootstrap(group) for group in groups[:1000]])
    assert 0.80 <= np.mean((ends[:, 0] <= truth) & (truth <= ends[:, 1])) <= 0.88


def test_bad_curves(no_shape_checks):
    good = power_law(TOKENS)
    for changes, message in [
        ({"tokens_plain": TOKENS[::-1]}, "tokens_plain: must rise from point to point"),
        ({"tokens_vwn": [0, *TOKENS[1:]]}, "tokens_vwn = .*: must be two or more numbers > 0"),
        ({"loss_vwn": good[:-1]}, r"loss_vwn has shape \(59,\): must be \[seeds, 60\]"),
        ({"loss_plain": np.zeros((2, 60))}, "loss_vwn has 1 seeds: must have as many as loss_plain, 2"),
        ({"at": 1.0}, "at = 1: must be between the first and the last token count"),
        ({"at": 1e9}, "at = 1e[+]09: must be between"),
        ({"at": TOKENS[0], "loss_plain": good - 1}, "the other curve starts below the loss there; must be later"),
        ({"reach": "wide"}, "reach = 'wide': must be one of 'vwn', 'plain'"),
        ({"width": 0.0}, "width = 0.0: must be a finite number > 0"),
    ]:
        arguments = {"tokens_plain": TOKENS, "loss_plain": good, "tokens_vwn": TOKENS, "loss_vwn": good - 0.1}
        with pytest.raises(ValueError, match=message):
            token_efficiency(**{**arguments, **changes})


# ------------------------------------------------------------------------------------------------ of kept runs


@pytest.fixture
def kept(tmp_path):
    """Runs of plain and r = 1, 2, 4 with two seeds and one more: loss 4 − 0.1 log2 r + seed/10, ratio r + 1."""
    for name, r in (("plain", None), ("r1", 1), ("r2", 2), ("r4", 4)):
        for seed in (0, 1, 2) if name == "r4" else (0, 1):
            run = tmp_path / f"{name}-s{seed}"
            run.mkdir()
            model = {"m": r and 4, "n": r and 4 * r}
            (run / "config.json").write_text(json.dumps({"seed": seed, "model": model}))
            middles = TOKENS - TOKENS[0] / 2  # of the steps that a line of the log tells of
            losses = power_law((1 if r is None else r + 1) * middles)
            rows = [{"tokens": int(t), "train_next": loss} for t, loss in zip(TOKENS, losses, strict=True)]
            (run / "log.jsonl").write_text("\n".join(map(json.dumps, [{"tokens": 0, "val_next": 6.0}, *rows])))
            loss = 4 - 0.1 * np.log2(r or 1) + seed / 10
            (run / "summary.json").write_text(json.dumps({"val_next": loss}))
    return tmp_path


def test_fits_of_kept_runs(kept, capsys, monkeypatch):
    runs = load_runs(kept)
    groups = [runs[name] for name in ("r1", "r2", "r4")]
    seeds, losses = scaling.losses_of(groups)
    assert seeds == [0, 1] and losses == pytest.approx(np.array([[4.0, 3.9, 3.8], [4.1, 4.0, 3.9]]))
    assert [scaling.r_of(group[0]) for group in (*groups, runs["plain"])] == [1, 2, 4, 1]
    line = ["scaling", str(kept), "--variants", "r1", "r2", "r4", "--names", "next"]
    monkeypatch.setattr(sys, "argv", line)
    scaling.main()
    said = capsys.readouterr().out
    assert "per doubling of r: -0.1000 ± 0.0000 over seeds; -0.1000 ± 0.0000 over points" in said
    assert "R² 1.0000, at r = 1 on the line 4.0500" in said
    for name, ratio in (("r1", 2), ("r2", 3), ("r4", 5)):
        wanted = f"plain over {name}, tokens for plain's last train_next: {ratio}.00× ({ratio}.00 to {ratio}.00)"
        assert wanted in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--variants", "r1", "r2", "r2"],
            r"variants = \('r1', 'r2', 'r2'\): must be one or more names",
        ),
        (["--variants", "r1", "r2", "--names", "next", "next"], r"names = \('next', 'next'\): must be one or more"),
        (["--variants", "r1", "r2", "--names", "foo"], r"'foo' must be a loss that every one of these runs has"),
    ],
)
def test_names_that_make_no_fit(kept, monkeypatch, options, message):
    monkeypatch.setattr(sys, "argv", ["scaling", str(kept), *options])
    with pytest.raises(SystemExit, match=message):
        scaling.main()


def test_kept_runs_that_do_not_fit(kept, capsys, monkeypatch):
    runs = load_runs(kept)
    with pytest.raises(ValueError, match="r1, r4: must have a seed in common"):
        common_seeds([runs["r1"], runs["r4"][2:]])
    (runs["r4"][0].log).pop()
    with pytest.raises(ValueError, match="every seed's log must have train_next at the same steps"):
        scaling.curves_of(runs["r4"], [0, 1])
    monkeypatch.setattr(sys, "argv", ["scaling", str(kept)])
    with pytest.raises(SystemExit, match=r"must hold finished runs r8-s<seed>; there are plain, r1, r2, r4"):
        scaling.main()


# ------------------------------------------------------------------------------------------ the paper's numbers


def test_table_1_and_fig_8():
    """Where the paper's own numbers agree, and where they do not: notebooks/paper_notes.md, 34 and 35."""
    found = paper.table_1_against_fig_8()
    assert found.slope == pytest.approx(-0.0075, abs=1e-9)  # (0.035 − 0.020) / 2
    assert found.slope_range == pytest.approx((-0.0080, -0.0070), abs=1e-9)
    assert not found.slopes_agree  # -0.0069 is not among them, rounded itself: -0.00695 at most
    assert round(found.r_squared, 4) == 0.9985 and found.r_squared_agrees
    assert found.plain_above_line == pytest.approx(0.0131, abs=1e-9)
    assert (round(found.slope_with_plain, 4), round(found.r_squared_with_plain, 2)) == (-0.0113, 0.93)
    assert (round(found.points_slope, 5), round(found.points_r_squared, 4)) == (-0.00685, 0.9986)  # (1.6008 − 1.6145)/2
    assert paper.FIG_8_SLOPE.low <= found.points_slope <= paper.FIG_8_SLOPE.high + 1e-12
    line = [paper.FIG_8_INTERCEPT.value + paper.FIG_8_SLOPE.value * k for k in (1, 2, 3)]
    assert line == pytest.approx([point.value for point in paper.FIG_8_LOSS.values()], abs=4e-4)
    assert [round(x, 4) for x in found.implied_plain] == [1.6345, 1.6352, 1.6358]
    assert found.implied_rounding == pytest.approx(0.00055) and not found.one_plain_model
    assert replace(found, implied_plain=(1.6345, 1.6350, 1.6356)).one_plain_model
    assert "Fig. 8 prints -0.0069: does not agree" in str(found) and "0.9986: agrees" in str(found)
    assert str(found).endswith("by rounding: not one number")


def test_numbers_as_printed():
    number = paper.Number("-0.0069", "somewhere")
    assert (number.value, number.rounding) == (-0.0069, 0.00005)
    assert (number.low, number.high) == pytest.approx((-0.00695, -0.00685))
    assert paper.Number("4", "").rounding == 0.5
    for loss in ("next", "next2"):  # more width, more gain; and more for the token after next
        gains = [paper.TABLE_1[loss][r].value for r in paper.FIG_8_R]
        assert gains == sorted(gains)
        assert paper.FIG_1_GAP[loss][0].value < paper.FIG_1_GAP[loss][1].value
        ratios = [ratio.value for ratio in paper.FIG_1_RATIOS[loss]]
        assert ratios == sorted(ratios) and ratios[-1] == paper.FIG_1_SPEEDUP[loss].value
    assert all(paper.TABLE_1["next2"][r].value > paper.TABLE_1["next"][r].value for r in paper.FIG_8_R)
