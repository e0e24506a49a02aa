"""figures/gpu.png: what was measured is drawn, what was not leaves a gap."""

from __future__ import annotations

import json

import matplotlib.pyplot as plt
import pytest

from vwn_ref.experiments.gpu_figures import gpu
from vwn_ref.experiments.paper_figures import NotRun


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_without_a_device(tmp_path):
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "aot.json").write_text("{}")
    (tmp_path / "gpu" / "dry-run").mkdir()  # of a benchmark that measured nothing
    for stage in ("ops", "steps"):
        (tmp_path / "gpu" / "dry-run" / f"{stage}.json").write_text(json.dumps({"stage": stage, "dry_run": True}))
    with pytest.raises(NotRun, match="no GPU has been measured"):
        gpu(tmp_path)


def test_what_was_measured_is_drawn(tmp_path):
    folder = tmp_path / "gpu" / "Some-GPU"
    folder.mkdir(parents=True)
    step = {"implementation": "fused", "op": "step", "m": 2, "n": 3, "D": 2048, "tokens": 16_384}
    ops = [
        step | {"direction": "forward", "share_of_copy": 0.5},
        step | {"direction": "backward", "share_of_copy": 0.25},
        step | {"direction": "forward", "share_of_copy": 0.125, "implementation": "compiled"},
    ]
    steps = [{"way": "fused", "m": 8, "n": 64, "D": 4096, "step_ratio": 1.5, "predicted_step_ratio": 1.125}]
    for stage, rows in {"ops": ops, "steps": steps}.items():
        (folder / f"{stage}.json").write_text(json.dumps({"stage": stage, "rows": rows}))
    forward, backward, training = gpu(tmp_path).axes
    written = [[t.get_text() for t in ax.texts if t.get_text()] for ax in (forward, backward)]
    # of two ways and four shapes
    assert sorted(written[0]) == ["12", "50"] + ["not measured"] * 6
    assert sorted(written[1]) == ["25"] + ["not measured"] * 7
    place = {round(t.get_position()[0], 1) for t in forward.texts if t.get_text() == "not measured"}
    assert place == {0.8, 1.2, 1.8, 2.2, 2.8, 3.2}  # beside the bars of (2, 3)
    assert [t.get_text() for t in training.texts if t.get_text()] == ["12.5", "50.0"]
    assert forward.get_ylabel().startswith("Some GPU")
    heights = [[bar.get_height() for bar in kind] for kind in training.containers]
    assert heights[0][3] == 12.5 and heights[1][3] == 50.0 and all(h != h for h in heights[0][:3])
