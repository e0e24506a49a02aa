"""The results in README.md: from made-up runs with known slopes and prices."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest

from vwn_ref.experiments import readme, step_times
from vwn_ref.experiments.storage import between
from vwn_ref.experiments.sweep import read_sweep


@pytest.fixture
def data(tmp_path):
    """Study A with two seeds of everything: 3 − 0.25 log2 r (next token), less by a tenth where low-rank; plain 4.

    Seed 1 is 0.5 higher in all, the low-rank r = 8 is not there. Two runs of another study lie in the same folder.
    """
    sweep = read_sweep(readme.STUDIES / "a_r_sweep.toml")
    for run in sweep.runs:
        r, seed = run.config.model.r, run.config.seed
        if seed > 1 or run.name.startswith("r8-lowrank"):
            continue
        loss = 4.0 if run.config.model.is_plain else 3 - (0.15 if "lowrank" in run.name else 0.25) * math.log2(r)
        off = 1.0 if run.variant.startswith("r1.5") else 0.0  # not in the fits, so it may lie anywhere
        keep(tmp_path / "a" / run.name, run.config, loss + off + seed / 2)
    for run in read_sweep(readme.STUDIES / "e_parts.toml").runs:
        if run.name in ("r2-static-s0", "plain-d20-s1"):
            keep(tmp_path / "a" / run.name, run.config, 0.0)
    for run in sweep.runs:
        if run.name in ("plain-s0", "plain-s1", "r2-s0", "r2-s1"):
            keep(tmp_path / "first_training" / run.name, run.config, 2.0 + run.config.seed)
    seconds, timed = {"plain": 0.1, "r2": 0.13, "r4": 0.2, "r8": 0.8}, {}
    for run in sweep.runs:
        if run.variant in seconds:
            identity = step_times.identity(asdict(run.config.model), run.config.seq_len, run.config.batch_size)
            timed[run.variant] = {"seconds": [seconds[run.variant]], "is": identity}
    (tmp_path / "a" / "step_times.json").write_text(json.dumps({"variants": timed}))
    return tmp_path


def keep(folder, config, loss):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    lines = []
    for k in range(17):  # four doublings of the tokens: each takes 1 off the loss
        part = 2 ** ((k - 16) / 4)
        losses = {"train_next": loss + (16 - k) / 4, "train_next2": loss + 1 + (16 - k) / 4}
        lines.append(json.dumps({"step": round(config.steps * part), "tokens": round(1e6 * part), **losses}))
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    seconds = 3600.0 * (1 if config.model.is_plain else float(config.model.r))
    summary = {
        "val_next": loss,
        "val_next2": loss + 1,
        "tokens": 1_000_000,
        "parameters": 33_760,
        "cpu_seconds": seconds,
    }
    (folder / "summary.json").write_text(json.dumps(summary))


def test_slopes_prices_and_differences(data):
    whole = readme.r_sweep(data).replace("\u00a0", " ")
    text, lines = whole.replace("\n", " "), whole.splitlines()
    wide = "−0.250 ± 0.000"
    assert f"2 seeds), each doubling of r from 1 to 8 changes the next-token loss by {wide} nats on average" in text
    assert "times plain's parameters and 3.5 times its arithmetic" in text
    assert "by these factors: 3.36× (3.36 to 3.36) and 3.36× (3.36 to 3.36) at D = 16." in text  # 2 ** 1.75
    assert "a line, is +0.000 ± 0.000 and +0.000 ± 0.000 (next" in text and "0.8 billion active parameters." in text
    assert f"| next token | wide table, Eq. (2) | {wide} | {wide} | +0.000 ± 0.000 | −1.750 ± 0.000 |" in lines
    assert "| next-2 token | low-rank table, Eq. (3) | – | – | – | – |" in lines  # no r8-lowrank
    assert "| plain | 2 | 1.00× | 1.00× | 1.0× | 4.250 | 5.250 |" in lines
    assert next(x for x in lines if x.startswith("| r4 |")).endswith("2.0× | −1.500 ± 0.000 | −1.500 ± 0.000 |")
    assert " – | " in next(x for x in lines if x.startswith("| r2-lowrank |"))  # its step was not timed
    assert not any("static" in line or "d20" in line or "r8-lowrank" in line for line in lines)


def test_prices_without_times(data):
    (data / "a" / "step_times.json").unlink()
    lines = readme.r_sweep(data).splitlines()
    assert "| plain | 2 | 1.00× | 1.00× | – | 4.250 | 5.250 |" in lines


def test_runs_are_counted_once(data):
    lines = readme.studies(data).splitlines()
    hours = 2 * (1 + (1 + 1.5 + 2 + 4 + 8) + (1.5 + 2 + 4))  # wide, low-rank
    assert f"| A. Does the loss fall with r? | `a_r_sweep.toml` | 18 of 50 | {hours:.1f} |" in lines
    shared = 2 * 4  # plain, r2, r4, r8
    assert any(f"`c_m.toml` | {shared} of 39, {shared} of them from above | 0.0 |" in line for line in lines)
    assert any("`e_parts.toml` | 14 of 102, 12 of them from above | 3.0 |" in line for line in lines)
    assert lines[-1] == f"| together | | | {hours + 3:.1f} |"


def test_answers_are_differences_of_the_kept_runs(data):
    """r4-lowrank is 2.7 and r1 3.0 for both seeds, so the difference has no spread; r8-lowrank has no runs."""

    def table():
        lines = readme.answers(data).replace("\u00a0", " ").splitlines()
        rows, above = {}, ["", ""]
        for line in lines[2:]:
            if line.startswith("|"):
                study, what, label, *cells = line.strip("| ").split(" | ")
                above = [new.strip() or old for new, old in zip((study, what), above, strict=True)]
                rows[*above, label.strip()] = cells
        return lines, rows

    lines, rows = table()
    count = next(line for line in lines if "intervals exclude 0" in line)
    assert count.startswith("24 of these 24 intervals exclude 0, 24 of them below it; were there no difference"), count
    absent = ("B, D = 32: r − plain", "B, D = 32: a wider state, low-rank table: r − r = 1", "B, D = 32: the wide")
    assert lines[-1].startswith("Not run yet: " + "; ".join(absent))
    assert not any("VWN (2, 3)" in key[1] for key in rows) and "D, VWN (2, 3) − plain" in lines[-1]
    wider = "E", "a wider state, low-rank table: r − r = 1"
    assert rows[*wider, "r = 2"] == ["2", "**−0.150 ± 0.000**\\*", "**−0.150 ± 0.000**\\*"]
    assert (*wider, "r = 8") not in rows
    for run in read_sweep(readme.STUDIES / "c_m.toml").runs:
        if run.variant == "r2-m8" and run.config.seed < 2:  # r2 is 2.75 and 3.25
            keep(data / "a" / run.name, run.config, 2.75 + (0.2 if run.config.seed else -0.2))
    _, rows = table()
    assert rows["C", "m = 8 − m = 4", "r = 2"] == ["2", "−0.250 ± 0.635", "−0.250 ± 0.635"]  # −0.2, −0.3: t is 12.7


def test_no_next_2_loss_without_a_head(data):
    """Where a run has no MTP head its summary still has a number, which is none."""
    for run in read_sweep(readme.STUDIES / "d_mtp.toml").runs:
        if run.variant.endswith("n_experts0") and run.config.seed < 2:
            keep(data / "d" / run.name, run.config, 3.0 if run.variant.startswith("vwn") else 3.5)
    row = next(x for x in readme.answers(data).replace("\u00a0", " ").splitlines() if "VWN (2, 3) − plain" in x)
    assert row == "| D | VWN (2, 3) − plain | dense | 2 | **−0.500 ± 0.000**\\* | – |"


def test_backbones_side_by_side(data):
    for run in read_sweep(readme.STUDIES / "b_d32.toml").runs:
        if run.config.seed == 0 and run.variant in ("plain", "r1", "r2", "r4", "r8"):
            r = 1 if run.config.model.is_plain else run.config.model.r
            keep(data / "b_d32" / run.name, run.config, 3 - 0.1 * math.log2(r))
    lines = readme.backbones(data).splitlines()[2:]
    slope, gain, routing = (f"−{x:.3f}\u00a0±\u00a00.000" for x in (0.25, 1.75, 1.0))
    assert lines[0] == f"| 16 | 30 | 2 | next token | {slope} | {gain} | {routing} | – | – |"  # no r8-lowrank
    assert lines[2] == "| 32 | 30 | 1 | next token | −0.100 | −0.300 | +0.000 | – | – |" and len(lines) == 4


def test_what_the_middle_layers_give(data):
    """Shares of the last layer: embedding, layers 1 to 3, and the rest, of two seeds 0.3 and 0.1."""
    for run in read_sweep(readme.STUDIES / "f_depth.toml").runs:
        if run.name in ("m2-s0", "m2-s1", "m4-static-s0"):
            folder = data / "f_depth" / run.name
            keep(folder, run.config, 3.0)
            rest = [0.1, 0.2] if run.config.seed == 0 else [-0.1, 0.2]
            back = {name: {"0.1": [1.0], "0.5": [1.0]} for name in ("strength", "contributions")}
            row = {"share": [[1.0], [0.6 - sum(rest), 0.1, 0.1, 0.2, *rest]], "radius": [[1, 1, 1]], "state": [1.0]}
            row["tokens"] = 9
            row["back"] = back
            (folder / "windows.json").write_text(json.dumps(row))
    assert any(
        x.startswith("Study F besides") and x.endswith(": m = 2 0.20\u00a0±\u00a01.27.")
        for x in readme.answers(data).splitlines()
    )


def test_every_answer_names_variants_of_its_study():
    studies = {name: read_sweep(readme.STUDIES / f"{name}.toml") for name in readme.QUESTIONS}
    for (name, what), contrasts in readme.ANSWERS.items():  # of its folder, more exactly: E's is A's as well
        variants = {run.variant for one in studies.values() if one.out == studies[name].out for run in one.runs}
        for weights in contrasts.values():
            assert weights.keys() <= variants, (name, what)
            assert sum(weights.values()) == 0


def test_time_that_was_not_counted(data):
    path = data / "a" / "plain-s0" / "summary.json"
    summary = json.loads(path.read_text()) | {"cpu_seconds": None, "seconds": 1800.0, "threads": 2}
    path.write_text(json.dumps(summary))
    assert readme.cpu_seconds(path.parent) == 3600.0


def test_between():
    assert between("a\n<\nold\n>\nb", "<", ">", "new") == "a\n<\nnew\n>\nb"
    for text in ("", "<", "> <", "< > < >"):
        with pytest.raises(ValueError, match="must have the lines < and >, once and in this order"):
            between(text, "<", ">", "new")


def test_main_prints_or_writes(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["readme", "--data", str(data)])
    readme.main()
    printed = capsys.readouterr().out
    by = "written by vwn_ref.experiments.readme"
    files = {"README.md": tmp_path / "README.md", "figures/README.md": tmp_path / "figures" / "README.md"}
    (tmp_path / "figures").mkdir()
    for name, file in files.items():
        marks = [f"<!-- {x}: begin, {by} -->\n<!-- {x}: end -->" for x, (of, _) in readme.PARTS.items() if of == name]
        file.write_text("\n".join(["before", *marks, "after"]), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["readme", "--root", str(tmp_path), "--data", str(data)])
    readme.main()
    written = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    assert all(part in "".join(written.values()) for part in printed.strip().split("\n\n"))
    assert all(text.endswith("after") and readme.rewritten(name, text, data) == text for name, text in written.items())
    files["figures/README.md"].write_text("nothing")
    files["README.md"].write_text(written["README.md"].replace("5 seeds", "6 seeds"))
    with pytest.raises(SystemExit, match="error: the file must have the lines"):
        readme.main()
    assert files["figures/README.md"].read_text() == "nothing"
