"""The tables of measurements: from made-up rows, and in README.md from the kept ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from vwn_ref.kernels import report

ROOT = Path(__file__).resolve().parents[2]
README, NOTES = ROOT / "README.md", ROOT / "kernels" / "NOTES.md"


def op(implementation, op, shape, D, direction, us, share=None, tokens=16_384):
    row = {"implementation": implementation, "op": op, "m": shape[0], "n": shape[1], "D": D, "direction": direction}
    return row | {"tokens": tokens, "median_us": us, "share_of_copy": share}


@pytest.fixture
def device(tmp_path):
    """A folder of measurements: depth (2, 3) at three D, step (2, 3) fused and compiled, one training step."""
    ops = [op("fused", "depth", (2, 3), D, "forward", 10.0, s) for D, s in ((1024, 0.9), (2048, 0.88), (4096, 0.86))]
    ops += [op("fused", "depth", (2, 3), D, "backward", 20.0, s) for D, s in ((1024, 0.8), (2048, 0.7), (4096, 0.9))]
    ops += [
        op("fused", "depth", (4, 8), 1024, "forward", 5.0, 0.9),
        op("fused", "depth", (4, 8), 2048, "forward", None),
    ]
    for D, us in ((1024, 30.0), (2048, 50.0), (4096, 90.0)):
        ops += [op("fused", "step", (2, 3), D, "forward", 1.0, tokens=8_192)]  # of another length: not meant
        ops += [op("fused", "step", (2, 3), D, x, us) for x in ("forward", "backward")]
        ops += [op("compiled", "step", (2, 3), D, x, 2.5 * us) for x in ("forward", "backward")]
    fused = {"way": "fused", "m": 2, "n": 3, "D": 4096}
    steps = [fused | {"step_ratio": 1.0312, "flops_ratio": 1.01, "peak_ratio": 1.2, "q1_us": 1031.0, "q3_us": 1039.5}]
    steps += [{"way": "plain", "D": 4096, "q1_us": 995.0, "q3_us": 1005.0}]
    steps += [{"way": "plain", "D": 4096, "q1_us": 990.0, "q3_us": 1010.0}]  # run twice: the outer ones count
    steps += [{"way": "plain", "D": 2048, "q1_us": 1.0, "q3_us": 2.0}]
    steps += [fused | {"m": 4, "n": 8, "step_ratio": 1.02, "q1_us": 1022.5, "q3_us": 1030.0}]
    steps += [fused | {"m": 4, "n": 16, "step_ratio": 1.105}]
    memory = [fused | {"D": D, "recompute": True, "peak_ratio": x} for D, x in ((2048, 1.05), (4096, 1.12))]
    memory += [fused | {"recompute": False, "peak_ratio": 1.9}]
    memory += [fused | {"way": "reference", "recompute": True, "peak_ratio": 1.8}]
    folder = tmp_path / "gpu" / "some-gpu"
    folder.mkdir(parents=True)
    for stage, rows in {"ops": ops, "steps": steps, "memory": memory}.items():
        (folder / f"{stage}.json").write_text(json.dumps({"stage": stage, "dry_run": False, "rows": rows}))
    (tmp_path / "gpu" / "aot.json").write_text("{}")  # lies there too, and is no device
    return folder


def test_targets_met_missed_and_not_measured(device):
    lines = report.markdown(device.parent).splitlines()
    assert lines[0] == "**some-gpu**"
    said = {
        line.split(" | ")[0][2:]: line.split(" | ")[2][:-2]
        for line in lines
        if line.endswith(("met |", "missed |", "open |", "measured |"))
    }
    assert said["depth (2, 3), forward: share of copy bandwidth"] == "86% at D = 4096, met"  # the worst D counts
    assert said["depth (2, 3), backward: share of copy bandwidth"] == "70% at D = 2048, missed"
    assert said["depth (4, 8), forward: share of copy bandwidth"] == "not measured"  # at one D only
    assert said["step (2, 3), forward and backward: times faster than `torch.compile`"] == "2.50 at D = 1024, met"
    assert said["training step, r = 1.5, D = 4096: time over the plain model's"] == "1.031 (1.021 to 1.050), open"
    assert said["training step, r = 2, D = 4096: time over the plain model's"] == "1.020 (1.012 to 1.040), met"
    assert said["training step, r = 4, D = 4096: time over the plain model's"] == "1.105, missed"  # quartiles unknown
    assert said["training step, r = 8, D = 4096: time over the plain model's"] == "not measured"
    assert said["peak memory with recomputation, r = 1.5: over the plain model's"] == "1.120 at D = 4096, missed"
    assert "| depth (2, 3) | 2048 | 10 | 88% | 20 | 70% | 30 | – | – |" in lines
    assert "| step (2, 3) | 1024 | 30 | – | 30 | – | 60 | 150 | – |" in lines
    assert "| 4096 | 1.5 | 1.031 (1.021 to 1.050) | – | – | – | 1.010 | 1.200 |" in lines


def test_without_measurements_nothing_is_claimed(tmp_path):
    (tmp_path / "aot.json").write_text("{}")
    for folder in (tmp_path, tmp_path / "nowhere"):
        lines = report.markdown(folder).splitlines()
        assert lines[0].startswith("**Not measured: no GPU was at hand.**")
        assert sum(x.endswith("| not measured |") for x in lines) == len(report.targets()) == len(lines) - 4
        assert report.for_readme(folder) == lines[0]  # README has no table of what is not there


def test_readme_has_what_was_measured_of_steps(device):
    whole, short = (f(device.parent).splitlines() for f in (report.markdown, report.for_readme))
    assert short == [x for x in whole if not (x.startswith(("| width (", "| depth (")) and "copy" not in x)]
    assert any(x.startswith("| depth (2, 3) | 1024 |") for x in whole)
    for lines in (whole, short):  # and no row of what was not
        assert not any(x.startswith(("| step (8, 64) |", "| 1024 | 1.5 |")) for x in lines)


def test_a_dry_run_is_refused(device):
    (device / "rates.json").write_text(json.dumps({"stage": "rates", "dry_run": True, "rows": []}))
    with pytest.raises(ValueError, match=r"rates\.json: is of a dry run, must be of a GPU"):
        report.markdown(device.parent)


def test_the_folder_of_dry_runs_is_passed_by(device):
    before = report.markdown(device.parent)
    (device.parent / report.DRY_RUN).mkdir()
    (device.parent / report.DRY_RUN / "ops.json").write_text(json.dumps({"stage": "ops", "dry_run": True, "rows": []}))
    assert report.markdown(device.parent) == before


def test_what_failed_is_not_called_not_measured(device):
    ops, steps = (json.loads((device / f"{stage}.json").read_text()) for stage in ("ops", "steps"))
    for line in ops["rows"]:
        if (line["op"], line["D"], line["implementation"]) == ("step", 2048, "compiled"):
            line.update(error="out of memory", median_us=None)
        if (line["op"], line["m"], line["D"]) == ("depth", 4, 2048):
            line.update(error="illegal")
    steps["rows"].append({"way": "plain", "D": 4096, "error": "out of memory"})
    for name, content in (("ops", ops), ("steps", steps)):
        (device / f"{name}.json").write_text(json.dumps(content))
    lines = report.markdown(device.parent).splitlines()
    assert "| step (2, 3) | 2048 | 50 | – | 50 | – | 100 | failed | – |" in lines
    assert "| depth (4, 8) | 2048 | failed | failed | – | – | failed | – | – |" in lines
    assert "| 4096 | 1.5 | 1.031 (1.021 to 1.050) | – | – | – | 1.010 | 1.200 |" in lines  # by the plain ones that ran


def test_of_which_code_the_rows_are(device):
    for stage, commit in (("ops", "0" * 39 + "1"), ("steps", "0" * 40 + "-dirty"), ("memory", "0" * 39 + "2")):
        content = json.loads((device / f"{stage}.json").read_text())
        (device / f"{stage}.json").write_text(json.dumps(content | {"commit": commit}))
    said = report.markdown(device.parent).splitlines()[0]
    assert said == "**some-gpu** (memory, ops: of commit 0000000; steps: of commit 0000000-dirty)"


def test_a_folder_that_is_not_there_empties_no_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "README.md").write_text(f"{report.BEGIN}\nold\n{report.END}\n")
    arguments = ["report", "--data", str(tmp_path / "typo"), "--readme", str(tmp_path / "README.md")]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit, match="2"):
        report.main()
    assert "typo: must be a folder" in capsys.readouterr().err and "old" in (tmp_path / "README.md").read_text()


def test_into():
    text = f"a\n{report.BEGIN}\nold\n{report.END}\nb\n"
    assert report.into(text, "new") == f"a\n{report.BEGIN}\nnew\n{report.END}\nb\n"
    for bad in ("a", f"{report.END}\n{report.BEGIN}", text + text):
        with pytest.raises(ValueError, match="must have the lines"):
            report.into(bad, "new")


def test_readme_says_what_the_kept_data_say():
    text = README.read_text(encoding="utf-8")
    assert report.into(text, report.for_readme(report.FOLDER)) == text


def row(kernel, instructions, m=2, n=4, **other):
    fields = {"kernel": kernel, "m": m, "n": n, "D": 1024, "dtype": "bf16", "target": "sm_90", "dynamic": True}
    return fields | {"norm": True, "instructions": instructions} | other


def test_limits_by_hand():
    """d_b = 512: a row has 1,024 bytes. width reads 4 rows and writes 2: 6,144 bytes, 1.834 ns."""
    found = report.limit([row("width", 3840), row("width", 1, dtype="fp32")], "width", "forward", 2, 4, 1024)
    assert found.least == pytest.approx(6144 / 3350) and found.starting == pytest.approx(3840 * 64 / 67e3)
    assert found.moving == found.least  # a forward kernel moves no more
    assert found.share == pytest.approx((6144 / 3350) / (3840 * 64 / 67e3))
    assert report.limit([row("width", 100)], "width", "forward", 2, 4, 1024).share == 1.0
    assert report.limit([row("width", 100)], "depth", "forward", 2, 4, 1024) is None


def test_limits_of_a_step_backward():
    """One kernel, or where it is two, both, and that of the weights; a width or depth of its own is not made of
    others."""
    two = [row("width_backward", 1000), row("depth_backward", 1600), row("weights", 400)]
    for rows, count in (([row("step_backward", 2100), *two], 2500), (two, 3000)):
        found = report.limit(rows, "step", "backward", 2, 4, 1024)
        assert found.starting == pytest.approx(count * 64 / 67e3)
        assert found.least == pytest.approx((3 * 4 + 3 * 2) * 1024 / 3350)
        slots, e = 4 * 4 + 3 * 2 + (0 if count == 2500 else 2 * 4), 4 * (2 * 2 + 4)  # g between two kernels
        assert found.moving == pytest.approx((slots * 1024 + 2 * 4 * e) / 3350)
        assert found.share == pytest.approx(found.least / max(found.moving, found.starting))
    assert report.limit(two[:2], "step", "backward", 2, 4, 1024) is None
    for op, direction in (("depth", "backward"), ("last", "backward"), ("step", "forward")):
        assert report.limit([two[0], two[2], row("depth_backward", 2000, D=2048)], op, direction, 2, 4, 1024) is None
    assert report.limit(two, "last", "backward", 2, 4, 1024) is None
    assert report.limit(two, "step", "forward", 2, 4, 1024) is None


def test_limits_stand_beside_their_targets():
    lines = report.limits([row("depth", 3350, m=2, n=3), row("width", 3350, m=2, n=3)]).splitlines()
    assert len(lines) == 4 and lines[2].startswith("| width (2, 3), forward | 3,350 | 3.2 | 1.5 | 1.5 | 48% | – |")
    assert lines[3] == "| depth (2, 3), forward | 3,350 | 3.2 | 2.4 | 2.4 | 76% | 85% |"


def test_notes_say_what_the_kept_tables_say():
    text = NOTES.read_text(encoding="utf-8")
    assert report.into(text, report.kept_limits(), report.LIMITS) == text
    assert report.into(text, report.tuned(), report.TUNED) == text


def test_before_and_after(device):
    """A step of both, one that was measured before only, and one in neither."""
    before = device.parent.with_name("gpu-tuning") / device.name / "before.json"
    before.parent.mkdir(parents=True)
    step = {"implementation": "fused", "op": "step", "m": 2, "n": 3, "tokens": 16_384, "direction": "forward"}
    rows = [step | {"D": D, "median_us": 200.0, "share_of_copy": 0.4} for D in (1024, 2048)]
    before.write_text(json.dumps({"rows": rows}))
    now = [step | {"D": 1024, "median_us": 100.0, "share_of_copy": 0.8}]
    (device / "ops.json").write_text(json.dumps({"stage": "ops", "rows": now}))
    lines = report.tuned(device.parent).splitlines()
    assert lines[0].startswith(f"| {device.name}, µs |") and len(lines) == 2 + 5 * 3
    assert "| step (2, 3) | 1024 | 200 → 100 | 40% → 80% | – → – | – → – |" in lines
    assert "| step (2, 3) | 2048 | 200 → – | 40% → – | – → – | – → – |" in lines


def test_main_writes_what_is_asked_for(device, tmp_path, monkeypatch, capsys):
    rows = {"rows": [row("depth", 3350, m=2, n=3)]}
    (device.parent / "aot.json").write_text(json.dumps(rows))
    readme, notes = tmp_path / "README.md", tmp_path / "NOTES.md"
    readme.write_text(f"a\n{report.BEGIN}\n{report.END}\n")
    notes.write_text("\n".join(["b", *report.LIMITS, *report.TUNED, ""]))
    files = ["--readme", str(readme), "--notes", str(notes)]
    monkeypatch.setattr("sys.argv", ["report", "--data", str(device.parent), *files])
    report.main()
    assert "**some-gpu**" in readme.read_text() and "| depth (2, 3), forward | 3,350 |" in notes.read_text()
    assert capsys.readouterr().out == ""
    for option, text in (([], "**some-gpu**"), (["--limits"], "| depth (2, 3), forward | 3,350 |")):
        monkeypatch.setattr("sys.argv", ["report", "--data", str(device.parent), *option])
        report.main()
        assert text in capsys.readouterr().out
