"""The numbers that arXiv 2511.11238 reports in §5 and §8, each as it is printed and where; and whether they agree.

Nothing is read off a curve; what is printed inside a figure is text in the PDF. Losses are training losses; a gain is
the plain model's loss minus that of the VWN; averages of accuracy are in points of the paper's own weighting (Fig. 1,
§5.2.1), comparable within the paper only. MTP is on in all models
of §5.2 (Figs. 1, 6-9, Table 1); §5.1 (Figs. 4, 5) compares with and without.

    TABLE_1["next"][8].value              # 0.035
    print(table_1_against_fig_8())        # does Table 1 give the slope that Fig. 8 prints? No.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from vwn_ref.experiments.scaling import fit_log2


@dataclass(frozen=True)
class Number:
    """A number as printed, and where. The number behind it lies between `low` and `high` if it was rounded."""

    printed: str
    where: str

    @property
    def value(self) -> float:
        return float(self.printed)

    @property
    def rounding(self) -> float:
        """Half a unit of the last digit."""
        return 0.5 * 10.0 ** -len(self.printed.partition(".")[2])

    @property
    def low(self) -> float:
        return self.value - self.rounding

    @property
    def high(self) -> float:
        return self.value + self.rounding


# ------------------------------------------------------------------- Table 1 and Figs. 7, 8: MoE-A0.8B, m = 8

TABLE_1_TOKENS = 500e9
"""Tokens of every run of Table 1 and Figs. 7, 9."""
TABLE_1_M = 8
"""Segments m in Table 1 and Figs. 7, 8: n = 16, 32, 64."""
TABLE_1 = {
    "next": {
        2: Number("0.020", "Table 1, VWN×2, Δ NTP loss"),
        4: Number("0.028", "Table 1, VWN×4, Δ NTP loss"),
        8: Number("0.035", "Table 1, VWN×8, Δ NTP loss; also Fig. 7"),
    },
    "next2": {
        2: Number("0.030", "Table 1, VWN×2, Δ next-2 loss"),
        4: Number("0.045", "Table 1, VWN×4, Δ next-2 loss"),
        8: Number("0.058", "Table 1, VWN×8, Δ next-2 loss; also Fig. 7"),
    },
    "accuracy": {
        2: Number("3.20", "Table 1, VWN×2, Acc. (+pts), Collection B"),
        4: Number("3.50", "Table 1, VWN×4, Acc. (+pts), Collection B"),
        8: Number("4.16", "Table 1, VWN×8, Acc. (+pts), Collection B; also Fig. 7"),
    },
}
"""Gains over the plain model after 500B tokens, by r."""

FIG_8_SLOPE = Number("-0.0069", "Fig. 8, coefficient of log2 r; also §5.2.1 and §6")
FIG_8_INTERCEPT = Number("1.6212", "Fig. 8, constant")
FIG_8_R_SQUARED = Number("0.9986", "Fig. 8, R²")
FIG_8_R = (2, 4, 8)
"""The virtual widths of the fit."""
FIG_8_LOSS = {
    2: Number("1.6145", "Fig. 8, point at r = 2"),
    4: Number("1.6072", "Fig. 8, point at r = 4"),
    8: Number("1.6008", "Fig. 8, point at r = 8"),
}
"""The points that it fits: losses of which kind, and after how many tokens, is not said."""

# ------------------------------------------------------------- Fig. 1 and §5.2.2: MoE-A3.3B, (m, n) = (8, 64)

FIG_1_WIDTH = (8, 64)
"""(m, n) of MoE-A3.3B-VWNx8."""
FIG_1_TOKENS = 3e12
"""Where the later gaps are measured, §5.2.2."""
FIG_1_SPEEDUP = {
    "next": Number("2.5", "Fig. 1, left, and §5.2.2; the abstract has 'over 2×'"),
    "next2": Number("3.5", "Fig. 1, middle, and §5.2.2; the abstract has '3×'"),
}
"""Times fewer tokens than the plain model for the plain model's loss."""
FIG_1_RATIOS = {
    "next": tuple(Number(printed, "Fig. 1, left, inside") for printed in ("1.6", "2.0", "2.5")),
    "next2": tuple(Number(printed, "Fig. 1, middle, inside") for printed in ("2.1", "2.8", "3.5")),
}
"""The same along the curves, the last at their end; at how many tokens the others stand is not printed."""
FIG_1_GAP = {
    "next": (
        Number("0.025", "§5.2.2, next-token gap at early stages"),
        Number("0.032", "§5.2.2, next-token gap at 3T tokens"),
    ),
    "next2": (
        Number("0.049", "§5.2.2, next-2-token gap at early stages"),
        Number("0.056", "§5.2.2, next-2-token gap at 3T tokens"),
    ),
}
"""Gains, early and at 3T tokens."""
FIG_1_ACCURACY = Number("2.16", "§5.2.2, peak average accuracy above the plain model's, Collection B")

# ---------------------------------------------------------------------- Figs. 4 and 5: (m, n) = (2, 3), r = 1.5

FIG_4_GAP = Number("0.016", "Fig. 4, caption and §5.1: VWN+MTP against 'the baseline metric when MTP is included'")
"""MoE-0.4B/4B, next-token loss. The paper's words leave its sign open; see notebooks/paper_notes.md, 40. Inside the
figure "x1.5" is printed beside it, and "x1.4" beside the 0.015 of Fig. 5."""
FIG_5_GAIN = {
    "vwn": Number("0.015", "§5.1: both variants 'approximately 0.015 below the baseline'"),
    "vwn+mtp": Number("0.015", "Fig. 5, caption, and §5.1"),
}
"""MoE-2.5B/25B, next-token loss, at the end of training."""

# ------------------------------------------------------------------------- Fig. 6: MoE-A0.8B, m at the same r

FIG_6_M = {2: (2, 4), 4: (8, 16), 8: (4, 8)}
"""r -> the two values of m that are compared. No number is printed."""
FIG_6_SAYS = {
    2: "m from 2 to 4: 'a modest but visible improvement'",
    4: "m = 8 and 16 'nearly overlap'",
    8: "m = 4 and 8 'similarly close, with marginal advantage for m = 8'",
}

# ------------------------------------------------------------ Fig. 9, §8: MoE-A0.8B, r = 8, 500B tokens, points

FIG_9 = {
    name: Number(printed, f"Fig. 9, caption, {name}")
    for name, printed in (
        ("DROP", "8.92"),
        ("HumanEval", "2.44"),
        ("MATH", "4.20"),
        ("MMLU", "3.95"),
        ("MMLU-Pro", "5.25"),
        ("TriviaQA", "7.45"),
    )
}
"""Gains of accuracy of VWN×8 over the plain model."""


# ------------------------------------------------------------------------------------------- what agrees


@dataclass(frozen=True)
class Agreement:
    """Table 1's next-token gains against points and line of Fig. 8. Slopes are per doubling of r."""

    points_slope: float
    """Least-squares slope of the points that Fig. 8 prints, and its R²."""
    points_r_squared: float
    slope: float
    """Least-squares slope of Table 1: loss against log2 r at r = 2, 4, 8."""
    slope_range: tuple[float, float]
    """What it can be if Table 1's numbers were rounded."""
    printed_slope: Number
    r_squared: float
    r_squared_range: tuple[float, float]
    printed_r_squared: Number
    plain_above_line: float
    """How far Table 1's plain model lies above Fig. 8's line at r = 1, where the line meets Table 1 at r = 2."""
    slope_with_plain: float
    """Slope if the plain model is taken as r = 1."""
    r_squared_with_plain: float
    implied_plain: tuple[float, float, float]
    """The plain model's loss by Fig. 8's point plus Table 1's gain, at r = 2, 4, 8: one number, if they agreed."""
    implied_rounding: float
    """How far off each of these can be because what it is the sum of was rounded."""

    @property
    def slopes_agree(self) -> bool:
        low, high = self.slope_range
        return self.printed_slope.low <= high and low <= self.printed_slope.high

    @property
    def r_squared_agrees(self) -> bool:
        low, high = self.r_squared_range
        return self.printed_r_squared.low <= high and low <= self.printed_r_squared.high

    @property
    def one_plain_model(self) -> bool:
        """Can the three of `implied_plain` be one number?"""
        return max(self.implied_plain) - min(self.implied_plain) <= 2 * self.implied_rounding

    def __str__(self) -> str:
        no, low, high = "agrees" if self.slopes_agree else "does not agree", *self.slope_range
        fits = "agrees" if self.r_squared_agrees else "does not agree"
        one = "one number" if self.one_plain_model else "not one number"
        return (
            f"Fig. 8: its points give slope {self.points_slope:.5f} and R² {self.points_r_squared:.4f}; printed are "
            f"{self.printed_slope.printed} and {self.printed_r_squared.printed}\n"
            f"slope: Table 1 gives {self.slope:.4f} ({low:.4f} to {high:.4f} by rounding), Fig. 8 prints "
            f"{self.printed_slope.printed}: {no}\n"
            f"R²: Table 1 gives {self.r_squared:.4f} ({self.r_squared_range[0]:.4f} to {self.r_squared_range[1]:.4f}), "
            f"Fig. 8 prints {self.printed_r_squared.printed}: {fits}\n"
            f"plain model: {self.plain_above_line:.4f} above the line at r = 1; taken as r = 1 it makes the slope "
            f"{self.slope_with_plain:.4f} and R² {self.r_squared_with_plain:.2f}\n"
            f"its loss, point plus gain: {', '.join(f'{x:.4f}' for x in self.implied_plain)} from r = 2, 4, 8, each "
            f"± {self.implied_rounding:.5f} by rounding: {one}"
        )


def table_1_against_fig_8(steps: int = 7) -> Agreement:
    """Fit Table 1 as Fig. 8 says, and see what rounding leaves open: each gain runs over `steps` values of its own."""
    gains = [TABLE_1["next"][r] for r in FIG_8_R]
    values = np.array([gain.value for gain in gains])
    fit = fit_log2(FIG_8_R, -values)
    every = itertools.product(*(np.linspace(gain.low, gain.high, steps) for gain in gains))
    fits = [fit_log2(FIG_8_R, -np.array(values)) for values in every]
    slopes, squares = [f.slope for f in fits], [f.r_squared for f in fits]
    with_plain = fit_log2((1, *FIG_8_R), -np.array([0.0, *values]))
    points = np.array([FIG_8_LOSS[r].value for r in FIG_8_R])
    of_points = fit_log2(FIG_8_R, points)
    return Agreement(
        points_slope=of_points.slope,
        points_r_squared=of_points.r_squared,
        slope=fit.slope,
        slope_range=(min(slopes), max(slopes)),
        printed_slope=FIG_8_SLOPE,
        r_squared=fit.r_squared,
        r_squared_range=(min(squares), max(squares)),
        printed_r_squared=FIG_8_R_SQUARED,
        plain_above_line=gains[0].value + FIG_8_SLOPE.value,  # line: 0.0069 from r = 1 to 2; plain: 0.020
        slope_with_plain=with_plain.slope,
        r_squared_with_plain=with_plain.r_squared,
        implied_plain=tuple(float(x) for x in points + values),
        implied_rounding=max(FIG_8_LOSS[r].rounding + TABLE_1["next"][r].rounding for r in FIG_8_R),
    )
