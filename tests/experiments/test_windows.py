"""What is measured of trained models' depth: against matrices whose window is known, and from run folders."""

import json
import math
import shutil
import sys
from dataclasses import replace

import pytest
import torch

from vwn_ref.depth import hard_window, record, residual_window, trace
from vwn_ref.experiments import windows, windows_figures
from vwn_ref.experiments.checkpoint import CheckpointError
from vwn_ref.experiments.data import load_corpus
from vwn_ref.experiments.finished import NotRun
from vwn_ref.experiments.train import load_run, train, val_starts


class Fixed:
    """A connection with the same (A, B) for every token."""

    def __init__(self, A, B):
        self.A, self.B = A, B

    def matrices(self, H):
        return self.A.expand(*H.shape[:-2], *self.A.shape), self.B.expand(*H.shape[:-2], *self.B.shape)

    def width(self, H):
        m = self.B.shape[0]
        return (self.A[:, :m].mT @ H).flatten(-2), self.A[:, m:].mT @ H

    def depth(self, z, carried):
        return self.B.mT @ z.unflatten(-1, (self.B.shape[0], -1)) + carried


def measured(A, B, L=6):
    H = torch.randn(2, 3, A.shape[0], 5)
    return windows.measure(trace([Fixed(A, B)] * L, [torch.tanh] * L, H))


@pytest.mark.parametrize("held", [1, 2, 3])
def test_hard_windows(held):
    """m = 2, n = 2 · held, read whole: layer l sees the last `held` layers and nothing older."""
    m, n = 2, 2 * held
    found = measured(*hard_window(m, n, read=torch.eye(m).repeat(held, 1)))
    for name, fractions in found["back"].items():
        for back in fractions.values():
            if name == "strength":  # every map is 1 or 0
                assert back == [min(layer, held) for layer in range(6)]
            assert all(b <= held for b in back)
    table = torch.tensor(found["strength"])
    for back in range(6):  # column s is layer s; layer back + 1 reads s = back - held + 1 … back
        seen = [1.0 if back - held < s <= back else 0.0 for s in range(1, 6)]
        assert table[back, 1:].tolist() == pytest.approx(seen)
    assert found["radius"] == [[0.0, 0.0, 0.0]] * 6 and found["state"][-1] == 0.0
    assert torch.tensor(found["share"]).sum(1).tolist() == pytest.approx([1.0] * 6, abs=1e-5)


def test_residual_and_growing_states():
    found = measured(*residual_window())
    assert found["back"]["strength"]["0.5"] == [0, 1, 2, 3, 4, 5] and found["state"] == [1.0] * 6
    A, B = residual_window()
    found = measured(A * torch.tensor([1.0, 2.0]), B)
    assert found["radius"] == [[2.0] * 3] * 6 and found["state"] == [2.0**k for k in range(1, 7)]
    found = measured(A * torch.tensor([1.0, 0.3]), B)  # 0.3^k ≥ 1/10 for k ≤ 1, ≥ 1/2 for k = 0
    assert found["back"]["strength"] == {"0.1": [0, 1, 2, 2, 2, 2], "0.5": [0, 1, 1, 1, 1, 1]}


def test_what_is_added_is_not_the_map():
    """Residual connections around layers that put out more and more: every map is 1, what is added grows fourfold."""
    A, B = residual_window()
    layers = [lambda x, size=4.0**k: torch.full_like(x, size) for k in range(6)]
    found = windows.measure(trace([Fixed(A, B)] * 6, layers, torch.randn(2, 3, 1, 5)))["back"]
    assert found["strength"] == {"0.1": [0, 1, 2, 3, 4, 5], "0.5": [0, 1, 2, 3, 4, 5]}
    assert found["contributions"] == {"0.1": [0, 1, 2, 2, 2, 2], "0.5": [0, 1, 1, 1, 1, 1]}


class ByToken(Fixed):
    """Carries token t with the factor t / 100."""

    def matrices(self, H):
        A, B = super().matrices(H)
        return A * torch.stack([torch.ones(101), torch.arange(101) / 100], -1)[None, :, None], B


def test_radii_of_tokens():
    found = windows.measure(trace([ByToken(*residual_window())], [torch.tanh], torch.randn(1, 101, 1, 5)))
    assert found["radius"][0] == pytest.approx([0.05, 0.5, 0.95])


def test_picture(tmp_path):
    with pytest.raises(NotRun, match="study F"):
        windows_figures.how_far_back(tmp_path)
    runs = (("m1", 1, 0, 2.0), ("m1", 1, 1, 4.0), ("m4", 4, 0, 5.0), ("m4-static", 4, 0, 9.0))  # a control: not drawn
    for variant, m, seed, far in runs:
        folder = tmp_path / "f_depth" / f"{variant}-s{seed}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"seed": seed, "m": m}))
        (folder / "log.jsonl").write_text("")
        (folder / "summary.json").write_text('{"val_next": 3.0}')
        back = {name: {"0.1": [0.0, far], "0.5": [0.0, 1.0]} for name in ("strength", "contributions")}
        radius = [[0.5, 1.0, 1.5 + seed], [0.5, 2.0, 2.5]]
        row = {"tokens": 9, "m": m, "n": 2 * m, "back": back, "radius": radius, "state": [1.0, 2.0]}
        row["share"] = [[1.0], [0.5 + seed / 4, 0.1, 0.06, 0.04, 0.3 - seed / 8, -seed / 8]]
        (folder / windows.FILE).write_text(json.dumps(row))
    left, middle, right = windows_figures.how_far_back(tmp_path).axes
    heights = [bar.get_height() for bars in middle.containers for bar in bars]  # m = 1, m = 4; bottom to top
    assert heights == pytest.approx([0.625, 0.5, 0.2, 0.2, 0.175, 0.3])
    line = left.lines[0]  # by the map, down to a tenth
    assert [round(x) for x in line.get_xdata()] == [0, 1] and line.get_ydata().tolist() == [3.0, 5.0]
    bars = [bar.get_segments() for bar in left.collections]
    assert [segment[:, 1].tolist() for segment in bars[0]] == [[2.0, 4.0], [5.0, 5.0]]  # m = 1's seeds, m = 4's
    assert [hard[0][:, 1].tolist() for hard in bars[4:]] == [[2, 2], [2, 2]]  # n slots, but there are two layers
    assert right.lines[0].get_ydata().tolist() == [1.0, 2.0]
    marks = [line.get_ydata() for line in middle.lines if line.get_marker() == "_"]  # where a seed's last part begins
    assert [list(row) for row in marks] == [pytest.approx([0.7, 0.95]), pytest.approx([0.7])]
    path = tmp_path / "f_depth" / "m4-s0" / windows.FILE
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"tokens": 10}))
    with pytest.raises(ValueError, match=r"must be measured on the same tokens, not 9, 10 \(--again\)"):
        windows.load(tmp_path / "f_depth")
    for broken in ([], {}, whole | {"state": []}, {"share": whole["share"]}, whole | {"tokens": "9"}):
        path.write_text(json.dumps(broken))
        with pytest.raises((CheckpointError, TypeError), match=r"windows\.json is damaged|row"):
            windows.load(tmp_path / "f_depth")


def test_run_folders(tiny, tmp_path, monkeypatch, capsys):
    for seed in (0, 1):
        train(tiny(seed=seed, out=str(tmp_path / f"r2-s{seed}")))
    shutil.copytree(tmp_path / "r2-s1", tmp_path / "gone-s1")
    (tmp_path / "gone-s1" / "weights.safetensors").unlink()

    def command(*options):
        monkeypatch.setattr(sys, "argv", ["windows", str(tmp_path), *options])
        windows.main()
        return capsys.readouterr()

    seen = []
    monkeypatch.setattr(windows, "record", lambda model, tokens: seen.append(tokens) or record(model, tokens))
    first = command("--tokens", "100")
    config = load_run(tmp_path / "r2-s0")[2]
    text = load_corpus(config.data).val
    starts = val_starts(text, replace(config, val_tokens=100))
    assert [tokens.shape for tokens in seen] == [(7, 16)] * 2
    for row, start in zip(seen[0], starts, strict=True):  # what the model reads; its last target is left out
        assert row.tolist() == text[start : start + 16].tolist()
    assert first.err.splitlines()[-1] == "2 runs measured, 1 have no weights"
    found = windows.load(tmp_path)
    assert set(found) == {"r2"} and len(found["r2"]) == 2 and found["r2"][0]["tokens"] == 112  # 7 windows of 16
    radii = [sum(x[1] for x in row["radius"]) / len(row["radius"]) for row in found["r2"]]
    assert all(math.isfinite(x) for row in found["r2"] for x in row["state"])
    assert "| r2 | 2 | " in first.out and f"| {sum(radii) / 2:.2f} ± " in first.out
    before = (tmp_path / "r2-s0" / windows.FILE).stat().st_mtime_ns
    assert command().err.endswith("0 runs measured, 1 have no weights\n")
    assert (tmp_path / "r2-s0" / windows.FILE).stat().st_mtime_ns == before
    assert command("--table").out == first.out
    for tokens in (97, 112):  # 7 windows as well
        assert command("--tokens", str(tokens)).err.endswith("0 runs measured, 1 have no weights\n")
    assert command("--tokens", "113").err.endswith("2 runs measured, 1 have no weights\n")
    assert [row["tokens"] for row in windows.load(tmp_path)["r2"]] == [128, 128]
    kept = (tmp_path / "r2-s0" / "config.json").read_text()
    (tmp_path / "r2-s0" / "config.json").write_text(json.dumps(json.loads(kept) | {"unknown": 1}))
    with pytest.raises(SystemExit, match=r"config\.json is damaged, or of another version"):
        command("--tokens", "113")
    (tmp_path / "r2-s0" / "config.json").write_text(kept)
    with monkeypatch.context() as patch:  # what has been measured wants no text
        patch.setattr(windows, "load_corpus", None)
        assert command("--tokens", "120").err.endswith("0 runs measured, 1 have no weights\n")
    for measured in (2, 0):  # all of the text, which is less
        assert command("--tokens", "1000000").err.endswith(f"{measured} runs measured, 1 have no weights\n")
    weights = "weights.safetensors"
    shutil.copyfile(tmp_path / "r2-s1" / weights, tmp_path / "r2-s0" / weights)  # other weights
    assert command().err.endswith("1 runs measured, 1 have no weights\n")
    command("--again", "--tokens", "50")
    assert json.loads((tmp_path / "r2-s0" / windows.FILE).read_text())["tokens"] == 64
    with pytest.raises(SystemExit, match="tokens = 0: must be ≥ 1"):
        command("--tokens", "0")
