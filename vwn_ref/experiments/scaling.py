"""How loss falls with virtual width, and how many tokens that is worth.

    fit = fit_log2([1, 2, 4, 8], losses)             # losses [seeds, 4]: slope per doubling of r, R², 95 % intervals
    ratio = token_efficiency(tokens, plain, tokens, wide)      # tokens that plain needs for the loss that wide reaches
    python -m vwn_ref.experiments.scaling figures/data/a --variants r1 r1.5 r2 r4 r8

Seeds are the sample. With one seed all models have the same backbone weights and batches, so a row of losses (one seed,
every r) is one observation whose entries belong together, and rows are independent. Everything here is first computed
row by row, a slope or a log ratio for each seed, and the interval is Student's t over these numbers: right whichever
way the entries of a row depend on each other, as long as the numbers are about normal.
`tests/experiments/test_scaling.py` simulates how often the intervals cover; the rates are with the functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import tyro
from jaxtyping import Float
from numpy import ndarray

from vwn_ref.config import check_choice, check_float
from vwn_ref.experiments.compare import Estimate, check_comparable, interval
from vwn_ref.experiments.console import told
from vwn_ref.experiments.finished import KeptRun, common_seeds, load_runs, measures

# --------------------------------------------------------------------------------------------- loss against r


@dataclass(frozen=True)
class Log2Fit:
    """A line, loss = intercept + slope · log2 r, with what is known of its slope."""

    slope: float
    """Loss per doubling of r; negative where loss falls."""
    intercept: float
    """Loss on the line at r = 1."""
    r_squared: float
    """Share of the variance of the points that the line explains; a point is the mean over the seeds at one r."""
    by_seed: tuple[float, ...]
    """The slope of each seed; their mean is `slope`."""
    over_seeds: Estimate
    """Slope and 95 % interval by the seeds: what other seeds would give at these r."""
    over_points: Estimate
    """Slope and 95 % interval by the points' distances from the line, as for a fit to one point each r."""

    def at(self, r: int | float) -> float:
        """Loss on the line at r."""
        return self.intercept + self.slope * float(np.log2(r))


def finite(name: str, values: Sequence | ndarray) -> ndarray:
    """`values` as float64. Raises ValueError unless they are finite numbers in a box."""
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: must be an array of numbers, every row as long: {error}") from error
    if not np.isfinite(found).all():
        raise ValueError(f"{name}: must hold finite numbers, has {found[~np.isfinite(found)][0]}")
    return found


def positive(name: str, values: Sequence | ndarray) -> Float[ndarray, " k"]:
    """Two or more numbers > 0, as float64 [k]. Raises ValueError otherwise."""
    found = finite(name, values)
    if found.ndim != 1 or len(found) < 2 or found.min() <= 0:
        raise ValueError(f"{name} = {values!r:.80}: must be two or more numbers > 0")
    return found


def fit_log2(r: Sequence | ndarray, losses: Sequence | ndarray) -> Log2Fit:
    """Least squares of loss on log2 r.

    Args:
        r: virtual widths [k], k ≥ 2, not all the same.
        losses: [seeds, k], a row a seed; or [k], one point each r, as in the paper's Fig. 8.

    The slope of the means is the mean of the seeds' slopes, so both intervals are about one number:

    - `over_seeds`, t with seeds − 1 degrees of freedom, is the one to quote: a slope is one number a seed. NaN for one.
    - `over_points`, t with k − 2, is the textbook's for independent points. It takes every departure from the line for
      noise, so a true curve widens it; and it does not see that seeds differ in slope, which moves all points along.
      NaN for two points.

    Simulated 2,000 times with 5 seeds and r = 1, 2, 4, 8: the first covers 95 %. So does the second where all seeds
    have one slope; where slopes vary as much as points do, it covers 78 %. The points of all seeds as if independent,
    20 of them, would err the other way: what a seed adds to all its losses counts as noise there, and 99 % are covered.

    Raises ValueError for shapes that do not fit or numbers that are not finite.
    """
    x = np.log2(positive("r", r))
    y = finite("losses", losses)
    y = y[None] if y.ndim == 1 else y
    if y.ndim != 2 or y.shape[1] != len(x) or y.shape[0] < 1:
        raise ValueError(f"losses have shape {np.shape(losses)}: must be [seeds, {len(x)}], a column for each r")
    centred = x - x.mean()
    spread = float(centred @ centred)
    if spread == 0:
        raise ValueError(f"r = {list(r)}: must hold two different values")
    by_seed, means = y @ centred / spread, y.mean(axis=0)
    slope = float(by_seed.mean())
    intercept = float(means.mean() - slope * x.mean())
    residual = means - intercept - slope * x
    total = float(((means - means.mean()) ** 2).sum())
    rest = float(residual @ residual)
    return Log2Fit(
        slope=slope,
        intercept=intercept,
        r_squared=1 - rest / total if total else float("nan"),
        by_seed=tuple(float(value) for value in by_seed),
        over_seeds=interval([float(value) for value in by_seed]),
        over_points=Estimate(slope, half_width(rest, spread, len(x))),
    )


def half_width(rest: float, spread: float, points: int) -> float:
    """Of the 95 % interval of a line's slope: from the squared residuals' sum and that of the centred x."""
    from scipy import stats

    if points < 3:
        return float("nan")
    return float(stats.t.ppf(0.975, points - 2)) * (rest / (points - 2) / spread) ** 0.5


# ------------------------------------------------------------------------------------------ tokens for a loss


class Smoother(NamedTuple):
    """A linear map from a curve's points to a smoother curve on a finer grid."""

    tokens: Float[ndarray, " grid"]
    weights: Float[ndarray, "grid points"]


def smoother(tokens: Float[ndarray, " points"], grid: Float[ndarray, " grid"], width: int | float) -> Smoother:
    """Local quadratic regression in log2 tokens: at each grid point a parabola is fitted to the points around it.

    A point that is d doublings away has weight (1 − (d/width)³)³, none from `width` doublings on; near the start of a
    run, where points are far apart, `width` is enlarged to 1.5 times the distance of the fourth-nearest point. A curve
    that is a parabola in log tokens comes out unchanged.
    """
    d = np.log2(tokens) - np.log2(grid)[:, None]  # [grid, points]
    fourth = np.sort(abs(d), axis=1)[:, min(3, len(tokens) - 1)]
    reach = np.maximum(width, 1.5 * fourth)[:, None]
    root = np.clip(1 - (abs(d) / reach) ** 3, 0, None) ** 1.5  # of the weight
    powers = d[:, :, None] ** np.arange(min(3, len(tokens)))  # a line through two points
    return Smoother(grid, np.linalg.pinv(root[:, :, None] * powers)[:, 0] * root)  # the parabola's value at d = 0


def fine_grid(tokens: Float[ndarray, " points"], per_doubling: int = 50) -> Float[ndarray, " grid"]:
    """Token counts from the first to the last, evenly spaced in their logarithm; the ends are exact."""
    doublings = float(np.log2(tokens[-1] / tokens[0]))
    return np.geomspace(tokens[0], tokens[-1], 1 + max(1, int(np.ceil(per_doubling * doublings))))


def log_tokens_to_reach(curve: Smoother, losses: Float[ndarray, "seeds points"], targets: ndarray) -> ndarray:
    """log2 of the tokens after which each seed's smoothed curve is first at or below its target; NaN where it never is.

    Between two grid points the curve is a line in log tokens. −inf where it starts at or below the target.
    """
    smooth, x = losses @ curve.weights.T, np.log2(curve.tokens)
    found = []
    for row, target in zip(smooth, targets, strict=True):
        below = np.flatnonzero(row <= target + 1e-12)  # rounding: a curve reaches its own end
        if not len(below):
            found.append(np.nan)
        elif below[0] == 0:
            found.append(-np.inf)
        else:
            i = below[0]
            share = (row[i - 1] - target) / (row[i - 1] - row[i])
            found.append(x[i - 1] + share * (x[i] - x[i - 1]))
    return np.array(found)


@dataclass(frozen=True)
class TokenEfficiency:
    """How many times more tokens the plain model needs. All are ratios of token counts."""

    ratio: float | None
    """Geometric mean over the seeds; None where a seed's curve never reaches the loss: see `bound`."""
    low: float | None
    """Lower end of the 95 % interval, Student's t over the seeds' log ratios; NaN for one seed, None without ratio."""
    high: float | None
    """Its upper end."""
    bootstrap: tuple[float, float] | None
    """Percentile bootstrap over the seeds, for comparison: with few seeds it is too narrow, see `token_efficiency`."""
    by_seed: tuple[float | None, ...]
    """The ratio of each seed; None where the loss is not reached."""
    reach: str
    """Whose loss is to be reached: "vwn" or "plain"."""
    bound: float
    """For a seed that does not reach the loss the ratio is more than this (reach "vwn") or less than this ("plain")."""

    def __str__(self) -> str:
        if self.ratio is None:
            reached = sorted(ratio for ratio in self.by_seed if ratio is not None)
            bound = f"{'more' if self.reach == 'vwn' else 'less'} than {self.bound:.2f}×"
            if not reached:
                return f"{bound} (no seed reaches the loss)"
            where = f"{reached[0]:.2f}×" if len(reached) == 1 else f"{reached[0]:.2f} to {reached[-1]:.2f}×"
            return f"no ratio: {len(reached)} of {len(self.by_seed)} seeds reach the loss, {where}; the others {bound}"
        alone = len(self.by_seed) == 1
        return f"{self.ratio:.2f}× " + ("(no interval)" if alone else f"({self.low:.2f} to {self.high:.2f})")


def token_efficiency(
    tokens_plain: Sequence | ndarray,
    loss_plain: Sequence | ndarray,
    tokens_vwn: Sequence | ndarray,
    loss_vwn: Sequence | ndarray,
    at: int | float | None = None,
    *,
    reach: Literal["vwn", "plain"] = "vwn",
    width: int | float = 0.5,
) -> TokenEfficiency:
    """Tokens that the plain model needs for a loss, over the tokens that the VWN needs for it.

    Args:
        tokens_plain, tokens_vwn: token counts > 0 of the curves' points, rising; [points], at least 2.
        loss_plain, loss_vwn: [seeds, points], row by row the same seeds; or [points] for one seed.
        at: the loss to reach is the one after so many tokens. None: the last.
        reach: of whose curve. "vwn": the plain model's tokens for the loss of the VWN at `at`, over `at`. "plain": `at`
            over the VWN's tokens for the loss of the plain model at `at`, as in the paper's Fig. 1.
        width: of the smoothing, in doublings of the token count.

    Each curve is smoothed by local quadratic regression in log tokens (see `smoother`), both where the loss is taken
    and where it is looked for, and read off between its points, never beyond them: where a seed's curve does not get
    to the loss there is no ratio, only `bound`. With "vwn" and `at` None that is what happens to two runs of the
    same length, if the VWN is better: choose an earlier `at`, or "plain".

    The interval is Student's t over the seeds' log ratios. Simulated 2,000 times with 5 seeds, power laws 2.5× apart,
    noise of seeds and of points: it covers 95 %; the percentile bootstrap over the seeds covers 83 %.

    Along a run whose learning rate falls, a loss before the end is higher than that of a run planned to end there: read
    such a ratio as one of two equal schedules. The paper keeps the rate constant for Fig. 1 (§5.2.2).

    Raises ValueError for shapes that do not fit, or `at` outside the curve it is read from.
    """
    check_choice("reach", reach, ("vwn", "plain"))
    check_float("width", width, above=True)
    plain, vwn = curve("plain", tokens_plain, loss_plain), curve("vwn", tokens_vwn, loss_vwn)
    if len(plain[1]) != len(vwn[1]):
        raise ValueError(f"loss_vwn has {len(vwn[1])} seeds: must have as many as loss_plain, {len(plain[1])}")
    if reach == "vwn":
        logs, bound = log_ratios(*vwn, *plain, at, width)
    else:
        logs, bound = (-x for x in log_ratios(*plain, *vwn, at, width))
    by_seed, bound = tuple(None if np.isnan(x) else float(2.0**x) for x in logs), float(2.0**bound)
    if np.isnan(logs).any():
        return TokenEfficiency(None, None, None, None, by_seed, reach, bound)
    mean, half = interval([float(x) for x in logs])
    return TokenEfficiency(
        ratio=2.0**mean,
        low=2.0 ** (mean - half),
        high=2.0 ** (mean + half),
        bootstrap=bootstrap([float(x) for x in logs]),
        by_seed=by_seed,
        reach=reach,
        bound=bound,
    )


def log_ratios(
    tokens: ndarray, losses: ndarray, other: ndarray, other_losses: ndarray, at: int | float | None, width: int | float
) -> tuple[ndarray, float]:
    """log2 of the tokens that the other curves need for the losses of the first at `at`, over `at`: [seeds].

    NaN where they never get there; the second value is the log ratio at their end.
    """
    at = float(tokens[-1]) if at is None else float(at)
    if not tokens[0] <= at <= tokens[-1]:
        raise ValueError(f"at = {at:g}: must be between the first and the last token count, {tokens[[0, -1]]}")
    targets = losses @ smoother(tokens, np.array([at]), width).weights[0]
    needed = log_tokens_to_reach(smoother(other, fine_grid(other), width), other_losses, targets)
    if np.isneginf(needed).any():
        raise ValueError(f"at = {at:g}: the other curve starts below the loss there; must be later")
    return needed - np.log2(at), float(np.log2(other[-1] / at))


def curve(name: str, tokens: Sequence | ndarray, losses: Sequence | ndarray) -> tuple[ndarray, ndarray]:
    """Tokens [points] and losses [seeds, points], checked."""
    x, y = positive(f"tokens_{name}", tokens), finite(f"loss_{name}", losses)
    y = y[None] if y.ndim == 1 else y
    if not (np.diff(x) > 0).all():
        raise ValueError(f"tokens_{name}: must rise from point to point")
    if y.ndim != 2 or y.shape[1] != len(x) or not len(y):
        raise ValueError(f"loss_{name} has shape {np.shape(losses)}: must be [seeds, {len(x)}], as tokens_{name}")
    return x, y


def bootstrap(logs: Sequence[float], resamples: int = 2000) -> tuple[float, float]:
    """2 to the 2.5th and 97.5th percentile of the mean of `logs` drawn with replacement; always the same draws."""
    draws = np.random.default_rng(0).integers(len(logs), size=(resamples, len(logs)))
    low, high = np.percentile(np.array(logs)[draws].mean(axis=1), [2.5, 97.5])
    return float(2.0**low), float(2.0**high)


# ---------------------------------------------------------------------------------------------- of kept runs


def losses_of(groups: Sequence[Sequence[KeptRun]], name: str = "val_next") -> tuple[list[int], ndarray]:
    """Seeds that all groups of runs have, and their final losses [seeds, groups].

    Raises ValueError without such seeds, and as `compare.check_comparable`.
    """
    seeds = common_seeds(groups)
    check_comparable([run for runs in groups for run in runs], name)
    by_seed = [{run.seed: run.summary[name] for run in runs} for runs in groups]
    return seeds, np.array([[group[seed] for group in by_seed] for seed in seeds])


def curves_of(runs: Sequence[KeptRun], seeds: Sequence[int], name: str = "train_next") -> tuple[ndarray, ndarray]:
    """Tokens [points] > 0 and losses [seeds, points] of the log's lines that have `name`.

    A training loss is the mean over the steps since the line before; it is put in their middle.
    """
    found = {}
    for run in runs:
        tokens, losses = (np.array(values, dtype=np.float64) for values in run.curve(name))
        if name.startswith("train_"):
            tokens = (tokens + np.concatenate([[0.0], tokens[:-1]])) / 2
        found[run.seed] = tokens[tokens > 0], losses[tokens > 0]
    chosen = [found[seed] for seed in seeds]
    if any(not np.array_equal(tokens, chosen[0][0]) for tokens, _ in chosen):
        raise ValueError(f"{runs[0].name}: every seed's log must have {name} at the same steps")
    return chosen[0][0], np.array([losses for _, losses in chosen])


def r_of(run: KeptRun) -> float:
    """n/m of a run; 1 for the plain model."""
    model = run.config["model"]
    return 1.0 if model["m"] is None else model["n"] / model["m"]


# ---------------------------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class ScalingConfig:
    """Which runs to fit."""

    folder: tyro.conf.Positional[str]
    """Folder of finished runs named <variant>-s<seed>."""
    variants: tuple[str, ...] = ("r1", "r2", "r4", "r8")
    """The points of the line, one variant each r. (r1.5 has no GroupNorm before W_reduce.)"""
    base: str = "plain"
    """The model that token efficiency compares with."""
    names: tuple[str, ...] = ("next", "next2")
    """Losses, without val_ and train_."""


def report(config: ScalingConfig) -> str:
    """Slopes over the final validation losses, and token efficiencies over the training curves, in words."""
    found = load_runs(config.folder)
    for name in (config.base, *config.variants):
        if name not in found:
            raise ValueError(f"{config.folder}: must hold finished runs {name}-s<seed>; there are {', '.join(found)}")
    for field in ("variants", "names"):
        names = getattr(config, field)
        if not names or len(set(names)) < len(names):
            raise ValueError(f"{field} = {names}: must be one or more names, none of them twice")
    groups = [found[name] for name in config.variants]
    for name in config.names:
        if not all(measures(run, f"val_{name}") for group in (found[config.base], *groups) for run in group):
            raise ValueError(f"names = {config.names}: {name!r} must be a loss that every one of these runs has")
    lines = []
    for name in config.names:
        seeds, losses = losses_of(groups, f"val_{name}")
        fit = fit_log2([r_of(runs[0]) for runs in groups], losses)
        lines += [
            f"val_{name} of {', '.join(config.variants)}; seeds {', '.join(map(str, seeds))}",
            f"  per doubling of r: {fit.over_seeds} over seeds; {fit.over_points} over points",
            f"  R² {fit.r_squared:.4f}, at r = 1 on the line {fit.intercept:.4f}",
        ]
        for runs in groups:
            seeds = common_seeds([runs, found[config.base]])
            curves = [curves_of(group, seeds, f"train_{name}") for group in (found[config.base], runs)]
            efficiency = token_efficiency(*curves[0], *curves[1], reach="plain")
            of = f"{config.base} over {runs[0].name}, tokens for {config.base}'s last train_{name}"
            lines.append(f"  {of}: {efficiency}")
    return "\n".join(lines)


def main() -> None:
    """Print the report; errors are told in a line."""
    config = tyro.cli(ScalingConfig, prog="python -m vwn_ref.experiments.scaling", description=__doc__)
    with told():
        print(report(config))


if __name__ == "__main__":
    main()
