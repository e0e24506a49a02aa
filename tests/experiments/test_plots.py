"""Pictures come from kept data alone."""

import matplotlib
import pytest

from vwn_ref.experiments import plots
from vwn_ref.experiments.compare import KeptRun

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


def test_main_wants_the_top_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="figures/data"):
        plots.main()
