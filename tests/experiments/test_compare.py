"""Tables of kept runs."""

import json

import pytest

from vwn_ref.experiments.compare import interval, keep, load_runs, paired, table


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
    assert estimate.mean == 2.0 and estimate.half_width == pytest.approx(2.484138, abs=1e-6)


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


def test_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match="<variant>-s<seed>"):
        table(tmp_path)
    write(tmp_path, "plain", 0, 1.0)
    with pytest.raises(ValueError, match="base = 'wide': must be one of plain"):
        table(tmp_path, base="wide")
    write(tmp_path, "plain", 1, 1.0, lr=0.2)
    with pytest.raises(ValueError, match="differ in nothing but the seed"):
        load_runs(tmp_path)
