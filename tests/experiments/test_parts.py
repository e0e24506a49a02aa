"""Study E's tables: prices against sums by hand, contrasts on made-up runs, names against the study's file."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest

from vwn_ref.experiments import parts, parts_figures, step_times
from vwn_ref.experiments.finished import KeptRun, NotRun
from vwn_ref.experiments.sweep import read_sweep

matplotlib.use("Agg")
STUDY = Path(parts.__file__).parent / "studies" / "e_parts.toml"
CONFIGS = {run.variant: run.config for run in read_sweep(STUDY).runs}


def kept(name, seed, loss, steps=5, **model):
    """A run of 10 tokens with `vocab_size` 11, D = 4 and one block."""
    model = {"vocab_size": 11, "dim": 4, "n_heads": 2, "n_layers": 1, "m": None, "n": None, **model}
    summary = {"val_next": loss, "tokens": 10}
    return KeptRun(name, {"seed": seed, "steps": steps, "seq_len": 3, "batch_size": 1, "model": model}, [], summary)


def test_price_by_hand():
    """D = 4, FFN 12 wide (the default), 3 tokens a sequence, one block; multiplications and additions counted apart."""
    found = parts.price(kept("plain", 0, 1.0, ffn_dim=12))
    attention, ffn, norms = 8 * 4 * 4 + 4 * 3 * 4, 6 * 4 * 12, 2 * 4 * 4
    assert found.backbone == 3 * 10 * (attention + ffn + norms)
    residual, final_norm, unembedding = 2 * 4, 4 * 4, 2 * 4 * 11
    assert found.arithmetic == found.backbone + 3 * 10 * (residual + final_norm + unembedding)
    assert found.parameters == 2 * 11 * 4 + 4 * 4 * 4 + 3 * 4 * 12 + 2 * 4 + 4
    wide = parts.price(kept("r2", 0, 1.0, ffn_dim=12, m=2, n=4))
    assert wide.backbone == found.backbone and wide.arithmetic > found.arithmetic


def test_time_is_steps_times_what_a_step_takes():
    base, runs = [kept("plain", 0, 1.0)], [kept("r2", 0, 1.0, steps=20, m=2, n=4)]
    found = parts.price_ratio(runs, base, {"plain": 0.25, "r2": 0.375})
    assert found["CPU time"] == 6.0 and found["backbone"] == 1.0  # 20 · 0.375 over 5 · 0.25
    for times in (None, {"plain": 0.25}, {"r2": 0.375}):
        assert parts.price_ratio(runs, base, times)["CPU time"] is None


def test_contrasts_name_models_of_the_study_and_change_one_thing():
    others = {"r8", "r8-lowrank"}  # study A's, in the same folder
    names = {name for c in parts.CONTRASTS for name in (c.model, c.base)}
    assert names - others <= CONFIGS.keys()
    assert CONFIGS.keys() <= names
    assert {name for family in parts_figures.FAMILIES.values() for name in family} - others <= CONFIGS.keys()
    alone = {
        "dynamics": {"dynamic"},
        "wider state and its connections, low-rank table": {"n", "embed_rank"},
        "wide table, with the width": {"embed_rank"},
        "wide table, without the width": {"embed_rank"},
        "n-grams": {"ngram_buckets"},
        "initial W_reduce, against its default, mean": {"reduce_init"},
        "no GroupNorm before W_reduce": {"reduce_norm"},
    }
    for c in parts.CONTRASTS:
        if c.about in alone and not {c.model, c.base} & others:
            one, other = (vars(CONFIGS[name].model) for name in (c.model, c.base))
            assert {key for key in one if one[key] != other[key]} == alone[c.about], c


def test_what_the_contrasts_say_of_parameters():
    def size(name):
        return parts.price(
            KeptRun(name, {"seq_len": 64, "model": vars(CONFIGS[name].model)}, [], {"tokens": 1})
        ).parameters

    said = {c.base: (size(c.model) / size(c.base) - 1, c.what) for c in parts.CONTRASTS if "parameters" in c.about}
    assert {base: f"{abs(100 * x):.0f} % {'more' if x > 0 else 'fewer'}" for base, (x, _) in said.items()} == {
        "plain-d20": "1 % fewer",
        "plain-d24": "14 % more",
        "plain-d28": "14 % fewer",
        "plain-l14": "2 % more",
    }
    assert all(base == "plain-l14" or f"{abs(100 * x):.0f} %" in what for base, (x, what) in said.items())


@pytest.fixture
def folder(tmp_path):
    """plain and r2 with three seeds, r2-static with two: differences −1, −2, −3 and 0.5, 0.5."""
    timed = {}
    made = [("plain", s, 5.0 + s, {}) for s in range(3)]
    made += [("r2", s, 4.0, {"m": 2, "n": 4}) for s in range(3)]
    made += [("r2-static", s, 3.5, {"m": 2, "n": 4, "dynamic": False}) for s in (0, 1)]
    for name, seed, loss, model in made:
        run = kept(name, seed, loss, **model)
        path = tmp_path / f"{name}-s{seed}"
        path.mkdir()
        (path / "config.json").write_text(json.dumps(run.config))
        (path / "summary.json").write_text(json.dumps(run.summary))
        (path / "log.jsonl").write_text("")
    for run, seconds in ((kept("plain", 0, 0.0), 0.1), (kept("r2", 0, 0.0, m=2, n=4), 0.15)):
        identity = step_times.identity(run.config["model"], run.config["seq_len"], run.config["batch_size"])
        timed[run.name] = {"seconds": [seconds], "is": identity}
    (tmp_path / "step_times.json").write_text(json.dumps({"variants": timed}))
    return tmp_path


def test_tables(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["parts", str(folder)])
    parts.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| plain | 3 | 1.00× | 1.00× | 1.00× | 1.00× | 6.0000 |  |")
    assert next(x for x in lines if x.startswith("| r2 |")).split(" | ")[5] == "1.50×"
    assert next(x for x in lines if x.startswith("| r2-static |")).split(" | ")[5] == ""
    half = 4.302653 / math.sqrt(3)  # Student's t, two degrees of freedom; standard deviation 1
    assert f"| all together | r = 2 | r2 − plain | 3 | -2.0000 ± {half:.4f} |" in lines
    assert "| dynamics | at r = 2 | r2 − r2-static | 2 | +0.5000 ± 0.0000 |" in lines
    assert sum(" − " in line for line in lines) == 3  # the head and two contrasts
    assert lines[-1].startswith("Not run: r1-static, r1,") and " r2-static," not in lines[-1]


def test_a_run_without_a_head_hides_nobodys_second_loss(folder, monkeypatch, capsys):
    """plain and r2 have one, r2-static has none: a dash in its row."""
    (folder / "step_times.json").unlink()  # of other models
    for path in [*folder.glob("plain-s*"), *folder.glob("r2-s[0-9]")]:
        config, summary = (json.loads((path / f"{name}.json").read_text()) for name in ("config", "summary"))
        config["model"]["mtp_layers"] = 1
        (path / "config.json").write_text(json.dumps(config))
        (path / "summary.json").write_text(json.dumps({**summary, "val_next2": 2 * summary["val_next"]}))
    monkeypatch.setattr(sys, "argv", ["parts", str(folder)])
    parts.main()
    half, lines = 4.302653 / math.sqrt(3), capsys.readouterr().out.splitlines()
    assert f"| all together | r = 2 | r2 − plain | 3 | -2.0000 ± {half:.4f} | -4.0000 ± {2 * half:.4f} |" in lines
    assert "| dynamics | at r = 2 | r2 − r2-static | 2 | +0.5000 ± 0.0000 | – |" in lines


def test_across(folder, tmp_path, monkeypatch, capsys):
    """Folder a: r2 alone, nothing to compare; b_d32: plain and r4, one seed in common."""
    for run in list(folder.glob("*-s*")):
        shutil.move(run, tmp_path / "a" / run.name)
    for name, seed in (("plain", 0), ("plain", 1), ("r2", 1)):
        shutil.copytree(tmp_path / "a" / f"{name}-s{seed}", tmp_path / "b_d32" / f"{name.replace('2', '4')}-s{seed}")
    monkeypatch.setattr(sys, "argv", ["parts", str(tmp_path), "--across"])
    parts.main()
    lines = capsys.readouterr().out.splitlines()
    share = 11 * 4 / parts.price(kept("plain", 0, 1.0)).parameters
    assert lines[2] == f"| 4 | 1 | 11 | {share:.0%} | – | – | – | – | – | – |"
    assert lines[3].endswith("| – | – | – | – | – | -2.0000 (no interval), 1 seeds |") and len(lines) == 4


def test_across_of_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["parts", str(tmp_path), "--across"])
    with pytest.raises(SystemExit, match="must hold one of the folders a, b_d32, b_d64, e_bytes"):
        parts.main()


def test_a_loss_that_nothing_predicts_is_no_loss():
    """Without an MTP head summaries say val_next2 = 0; with one beside it the column is the head's alone."""
    runs = {name: [kept(name, 0, 3.0, mtp_layers=layers)] for name, layers in (("plain", 1), ("r2", 0))}
    for group in runs.values():
        group[0].summary["val_next2"] = 0.0 if group[0].name == "r2" else 4.0
    assert parts.price_table(runs).splitlines()[-1].endswith("| 3.0000 | +0.0000 (no interval) |  |  |")
    assert "next-2" not in parts.price_table(runs, base="r2") + parts.contrast_table(runs)


def test_wrong_base(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["parts", str(folder), "--base", "r9"])
    with pytest.raises(SystemExit, match="error: base = 'r9': must be one of plain, r2, r2-static"):
        parts.main()


@pytest.fixture
def data(folder, tmp_path):
    """The same runs as study A's folder, and a wider plain model, without which there is no picture."""
    for run in list(folder.glob("*-s*")):
        shutil.move(run, tmp_path / "a" / run.name)
    for draw in (parts_figures.what_pays, parts_figures.differences):
        with pytest.raises(NotRun, match="two widths"):
            draw(tmp_path)
    shutil.copytree(tmp_path / "a" / "plain-s0", tmp_path / "a" / "plain-d32-s0")
    return tmp_path


def test_picture(folder, data):
    figure = parts_figures.what_pays(data)
    first = figure.axes[0]
    assert [len(line.get_xdata()) for line in first.lines] == [2, 1, 1, 1, 1]  # no low-rank run, one r2-static
    by_label = {line.get_label(): line for line in first.lines}
    line = by_label["VWN, wide table: r = 1, 2, 4, 8"]
    assert line.get_ydata()[0] == 4.0 and line.get_xdata()[0] > 1
    assert first.lines[0].get_ydata().tolist() == [5.0, 5.0]  # of plain's seeds the one that plain-d32 has
    assert figure.axes[1].lines[3].get_xdata()[0] == 1.0  # the same backbone
    assert not figure.axes[3].lines  # nothing timed
    shutil.copy(folder / "step_times.json", data / "a")
    assert any(line.get_xdata()[0] == pytest.approx(1.5) for line in parts_figures.what_pays(data).axes[3].lines)


def loss_line(ax, label):
    return next(line for line in ax.lines if line.get_label() == label)


def test_families_of_one_price_stand_side_by_side():
    """Two VWN families on one backbone, three seeds: verticals apart, dots at every seed, means over them."""
    runs = {"plain": [kept("plain", s, 5.0) for s in range(3)], "plain-d20": [kept("p", s, 4.0, dim=8) for s in (0, 1)]}
    for name, n, model in (("r1", 2, {}), ("r2", 4, {}), ("r2-lowrank", 4, {"embed_rank": 4})):
        runs[name] = [kept(name, s, n + s / 4, m=2, n=n, **model) for s in range(3)]
    ax = plt.figure().subplots()
    parts_figures.loss_against(ax, runs, "backbone")
    wide, low = loss_line(ax, "VWN, wide table: r = 1, 2, 4, 8"), loss_line(ax, "VWN, low-rank table: r = 1, 2, 4, 8")
    left, right = wide.get_xdata(), low.get_xdata()  # around 1
    assert len(set(left)) == len(set(right)) == 1 and left[0] < 1 < right[0] and left[0] * right[0] == pytest.approx(1)
    assert wide.get_ydata().tolist() == [2.125, 4.125]  # plain-d20 has no seed 2
    dots = [line.get_ydata().tolist() for line in ax.lines if line.get_markersize() == 2]
    assert dots.count([2.0, 4.0]) == dots.count([2.25, 4.25]) == 2 and len(dots) == 10  # plain begins three lines
    assert [text.get_text() for text in ax.texts] == ["grey: all at 1×,\nside by side"]
    parts_figures.loss_against(ax := plt.figure().subplots(), runs, "parameters")
    assert loss_line(ax, "VWN, low-rank table: r = 1, 2, 4, 8").get_xdata()[0] > 1 and not ax.texts


def test_by_backbone(tmp_path):
    """Three seeds at D = 4, one at D = 8, which has no MTP head; r = 8 at D = 4 alone."""

    def write(study, name, seed, loss, heads=1, dim=4):
        model = {} if name == "plain" else {"m": 1, "n": int(name[1])}
        run = kept(name, seed, loss, dim=dim, mtp_layers=heads, **model)
        run.summary["val_next2"] = 2 * loss
        path = tmp_path / study / f"{name}-s{seed}"
        path.mkdir(parents=True)
        for file, value in (("config", run.config), ("summary", run.summary)):
            (path / f"{file}.json").write_text(json.dumps(value))
        (path / "log.jsonl").write_text("")

    for seed in range(3):
        write("a", "plain", seed, 5.0 + seed)
        write("a", "r4", seed, 4.0 + seed)
        write("a", "r8", seed, 4.0)
    write("b_d32", "plain", 0, 5.0, heads=0, dim=8)
    with pytest.raises(NotRun, match="no two backbones"):
        parts_figures.by_backbone(tmp_path)
    write("b_d32", "r4", 0, 4.5, heads=0, dim=8)
    first, second = parts_figures.by_backbone(tmp_path).axes
    marks = [
        [
            (round(b[0].get_xdata()[0]), b[0].get_ydata()[0], b[0].get_markerfacecolor() == "white")
            for b in ax.containers
        ]
        for ax in (first, second)
    ]
    assert marks == [[(0, -1.0, False), (1, -0.5, True), (0, -2.0, True)], [(0, -2.0, False), (0, -4.0, True)]]
    half = 4.302653 / math.sqrt(3)  # Student's t, two degrees of freedom; standard deviation 1
    (bar,) = first.containers[2][2]
    (low, high) = bar.get_segments()[0][:, 1]
    assert high - low == pytest.approx(2 * half)
    assert not first.containers[1][2]  # one seed has no bar
    looks = [(b[0].get_color(), b[0].get_marker()) for b in first.containers]  # r = 4, 4, 8
    assert looks[0] == looks[1] and looks[2][0] == looks[0][0] and looks[2][1] != looks[0][1]
    names = [label.get_text().split(", ")[0] for label in first.get_xticklabels()]
    assert names == ["D = 4", "D = 8"] and len(second.get_xticklabels()) == 1


def test_differences(data):
    (ax,) = parts_figures.differences(data).axes
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == [
        *("dynamics", "at r = 2: r2 − r2-static"),
        *("all together", "r = 2: r2 − plain"),
        *("against plain, twice as wide", "r = 2: r2 − plain-d32"),
    ]
    assert [label.get_fontweight() for label in ax.get_yticklabels()] == ["bold", "normal"] * 3
    bars = [line.get_xdata().tolist() for line in ax.lines[:-1:2]]
    assert bars[0] == [0.5, 0.5] and bars[1] == pytest.approx([-2 - 2.4841, -2 + 2.4841], abs=1e-4)  # t, 2 d. f.
    assert all(math.isnan(end) for end in bars[2])  # one seed
    marks = [(line.get_xdata()[0], line.get_markerfacecolor() == "white") for line in ax.lines[1:-1:2]]
    assert marks == [(0.5, False), (-2.0, True), (-1.0, True)]
    assert [line.get_ydata()[0] for line in ax.lines[1:-1:2]] == pytest.approx([0.82, 2.82, 4.82])
    assert ax.get_xlim() == pytest.approx((-2.2, 2.2))
