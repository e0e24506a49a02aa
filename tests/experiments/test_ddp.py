"""Two processes train what one does."""

import json
import os
import subprocess
import sys

import pytest
import torch

from vwn_ref.experiments.train import load_run, parse, train

MODEL = "--model.dim 16 --model.n-layers 1 --model.n-heads 2 --model.m 2 --model.n 4 --model.mtp-layers 1"
REST = "--data.vocab-size 280 --seq-len 16 --batch-size 4 --steps 12 --warmup 3 --val-tokens 300 --log-interval 3"


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun's rendezvous")
def test_two_processes_equal_one(text_folder, tmp_path):
    line = f"{MODEL} {REST} --data.files {text_folder} --device cpu --threads 1".split()
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = [*start, "-m", "vwn_ref.experiments.train", *line, "--micro-batch", "1", "--out", str(tmp_path / "two")]
    done = subprocess.run(two, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    rows = [json.loads(row) for row in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    one = train(parse([*line, "--no-progress"]))
    assert len(rows) == len(one.log) == 5
    for a, b in zip(one.log, rows, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    summary = json.loads(done.stdout[done.stdout.index("{") :])  # printed once, and kept
    assert summary == json.loads((tmp_path / "two" / "summary.json").read_text()) and summary["processes"] == 2
    model, _, config = load_run(tmp_path / "two")
    assert config.micro_batch == 1
    for a, b in zip(model.parameters(), one.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
