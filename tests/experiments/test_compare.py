"""Tables of kept runs."""

import json

import pytest

from vwn_ref.experiments.checkpoint import CheckpointError
from vwn_ref.experiments.compare import Estimate, holm, interval, paired, table
from vwn_ref.experiments.finished import keep, load_runs
from vwn_ref.experiments.paper_figures import contrast
from vwn_ref.experiments.scaling import losses_of
from vwn_ref.experiments.storage import write_whole


def write(folder, name, seed, loss, **config):
    run = folder / f"{name}-s{seed}"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"seed": seed, "lr": 0.1, "threads": seed, **config}))
    (run / "log.jsonl").write_text(json.dumps({"tokens": 0, "val_next": 9.0}) + "\n" + json.dumps({"tokens": 5}) + "\n")
    (run / "summary.json").write_text(json.dumps({"val_next": loss, "parameters": 12345}))
    (run / "weights.safetensors").write_bytes(b"x")
    return run


def test_interval_of_known_numbers():
    """t(0.975, 2) = 4.302653; mean 2, s = 1: 4.302653 / √3."""
    estimate = interval([1.0, 2.0, 3.0])
    assert not estimate.told_apart and interval([5.0, 6.0, 7.0]).told_apart
    assert not interval([9.0]).told_apart
    with pytest.raises(ValueError, match=r"values = \[1\.0, nan\]: must be finite"):
        interval([1.0, float("nan")])
    assert estimate.mean == 2.0 and estimate.half_width == pytest.approx(2.484138, abs=1e-6)
    two = interval([1.0, 3.0])  # t(0.975, 1) = 12.706205; s = √2
    assert two.mean == 2.0 and two.half_width == pytest.approx(12.706205, abs=1e-6)
    assert interval([1.0, 3.0], level=0.5).half_width == pytest.approx(1.0)  # t(0.75, 1) = 1
    assert not Estimate(2.0, 2.0).told_apart and not Estimate(-2.0, 2.0).told_apart  # 0 is an end of the interval
    assert Estimate(-2.0, 1.9).told_apart
    with pytest.raises(ValueError, match=r"values = \[\]: must be one number or more"):
        interval([])


def test_holm():
    """Four tests: 0.012 is above 0.05 / 4 no more than 0.0125, then 0.016 meets 0.05 / 3, 0.03 fails 0.05 / 2."""
    assert holm([0.03, 0.012, 0.9, 0.016]) == [False, True, False, True]
    assert holm([0.013, 0.013, 0.013, 0.013]) == [False] * 4  # the first fails, so do all
    assert holm([0.04]) == [True] and holm([]) == []
    assert holm([0.05]) == [True] and holm([0.025, 0.05]) == [True, True]  # at the level itself they hold
    assert holm([0.03, 0.01], level=0.02) == [False, True]


def test_pairs_by_seed_not_by_order(tmp_path):
    for seed, (plain, wide) in enumerate([(5.0, 4.9), (3.0, 2.8), (4.0, 3.7)]):
        write(tmp_path, "plain", 10 - seed, plain)
        write(tmp_path, "wide", 10 - seed, wide)
    write(tmp_path, "wide", 99, 0.0)  # no partner
    runs = load_runs(tmp_path)
    assert [run.seed for run in runs["plain"]] == [8, 9, 10]
    assert paired(runs["wide"], runs["plain"]).mean == pytest.approx(-0.2)
    assert "| wide | 12,345 | 3.7000, 2.8000, 4.9000, 0.0000 | 2.8500 | -0.2000 ± 0.2484 |" in table(tmp_path)
    assert runs["plain"][0].curve() == ([0], [9.0])


def test_keeps_finished_runs_without_weights(tmp_path):
    source = tmp_path / "runs"
    write(source, "plain", 0, 1.0)
    (write(source, "plain", 1, 1.0) / "summary.json").unlink()
    (source / "plain-s0" / "weights.safetensors").write_bytes(b"")
    (source / "plain-s0" / "windows.json").write_text("{}")  # measured of the trained model: kept
    assert keep(source, tmp_path / "kept") == 1
    names = sorted(p.name for p in (tmp_path / "kept").rglob("*.*"))
    assert names == ["config.json", "log.jsonl", "summary.json", "windows.json"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("summary.json", "[]", r"summary\.json is damaged: must hold objects"),
        ("summary.json", "3", r"summary\.json is damaged"),
        ("summary.json", '{"val_next": 1', r"summary\.json is damaged"),
        ("summary.json", "{}", r"summary\.json: val_next = None: must be a finite number"),
        ("summary.json", '{"val_next": NaN}', "val_next = nan: must be a finite number"),
        ("summary.json", '{"val_next": "3.2"}', "val_next = '3.2': must be a finite number"),
        ("summary.json", '{"val_next": 1.0, "train_next": true}', "train_next = True: must be"),
        ("log.jsonl", "1\n", r"log\.jsonl is damaged: must hold objects"),
        ("log.jsonl", '{"step": 7, "tokens": 0, "val_next": 9.0}\n', r"log\.jsonl: ends at step 7, not None"),
        ("config.json", "[]", r"config\.json is damaged: must hold objects"),
        ("config.json", "{}", "must be named after its run's seed, None"),
        ("config.json", '{"seed": 1}', "plain-s0: must be named after its run's seed, 1"),
    ],
)
def test_damaged_runs_are_named_and_not_kept(tmp_path, file, content, message):
    (write(tmp_path / "runs", "plain", 0, 1.0) / file).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_runs(tmp_path / "runs")
    with pytest.raises(CheckpointError, match=message):
        keep(tmp_path / "runs", tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_what_cannot_be_written_whole_leaves_nothing(tmp_path):
    def half(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    (tmp_path / "a.json").write_text("old")
    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "a.json", half)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "old")]


def test_runs_on_other_text_are_not_paired(tmp_path):
    for name, digest in (("plain", "a"), ("wide", "b"), ("other", "a")):
        path = write(tmp_path, name, 0, 1.0) / "summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"corpus": {"digest": digest}}))
    runs = load_runs(tmp_path)
    assert paired(runs["other"], runs["plain"]).mean == 0
    with pytest.raises(ValueError, match="wide and plain: must be runs on the same corpus"):
        paired(runs["wide"], runs["plain"])
    with pytest.raises(ValueError, match="wide and plain: must be runs on the same corpus"):
        contrast(runs, {"wide": 1, "plain": -1})
    with pytest.raises(ValueError, match="plain and wide: must be runs on the same corpus"):
        losses_of([runs["plain"], runs["wide"]])


@pytest.mark.parametrize("field", ["seq_len", "val_tokens"])
def test_other_windows_are_not_paired_and_cost_no_table(tmp_path, field):
    for name, value, loss in (("plain", 16, 3.0), ("long", 64, 1.0), ("r2", 16, 2.5)):
        write(tmp_path, name, 0, loss, **{field: value})
    runs = load_runs(tmp_path)
    with pytest.raises(ValueError, match=f"long and plain: must be runs with the same {field}"):
        paired(runs["long"], runs["plain"])
    lines = {line.split(" | ")[0]: line for line in table(tmp_path).splitlines()}
    assert lines["| long"].endswith(f"| not comparable, {field} differs |")
    assert lines["| r2"].endswith("| -0.5000 (no interval) |")


def test_no_seed_in_common_costs_no_table_and_the_base_comes_first(tmp_path):
    for name, seed, loss in (("a", 0, 1.0), ("plain", 0, 3.0), ("plain", 1, 3.5), ("z", 2, 2.0), ("r2", 1, 2.5)):
        write(tmp_path, name, seed, loss)
    runs = load_runs(tmp_path)
    with pytest.raises(ValueError, match="z and plain: must have a seed in common"):
        paired(runs["z"], runs["plain"])
    rows = [line.strip("| ").split(" | ") for line in table(tmp_path).splitlines()[2:]]
    assert [row[0] for row in rows] == ["plain", "a", "r2", "z"]
    assert [row[-1] for row in rows[1:]] == ["-2.0000 (no interval)", "-1.0000 (no interval)", "no seed in common"]
    names = [line.split(" | ")[0] for line in table(tmp_path, "r2").splitlines()[2:]]
    assert names == ["| r2", "| a", "| plain", "| z"]


def test_no_next2_loss_without_a_head(tmp_path):
    """The summary of such a run says 0, which is no loss."""
    for name, layers in (("plain", 1), ("bare", 0)):
        path = write(tmp_path, name, 0, 1.0, model={"mtp_layers": layers}) / "summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"val_next2": 2.0 * layers}))
    runs = load_runs(tmp_path)
    assert paired(runs["plain"], runs["plain"], "val_next2").mean == 0
    with pytest.raises(ValueError, match="bare and plain: must have an MTP head, val_next2 is its loss"):
        paired(runs["bare"], runs["plain"], "val_next2")


def test_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match="<variant>-s<seed>"):
        table(tmp_path)
    write(tmp_path, "plain", 0, 1.0)
    with pytest.raises(ValueError, match="base = 'wide': must be one of plain"):
        table(tmp_path, base="wide")
    write(tmp_path, "plain", 1, 1.0, lr=0.2)
    with pytest.raises(ValueError, match="differ in nothing but the seed"):
        load_runs(tmp_path)
