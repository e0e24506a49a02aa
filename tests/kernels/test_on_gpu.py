"""What `make gpu` runs, with a GPU that is made up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import on_gpu
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
import test_gpu

JUNIT = """<testsuites><testsuite>
<testcase name="a"/><testcase name="b"><failure message="no"/></testcase>
<testcase name="c"><skipped message="why"/></testcase><testcase name="d"><error message="no"/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def gpu(monkeypatch):
    """A GPU by name, and the commands that were run; each ends with the status that `statuses` has for its module."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU/80")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80e9))
    commands, statuses = [], {}

    def run(*command, env):
        commands.append(command)
        for option in command:
            if option.startswith("--junit-xml="):
                (on_gpu.Path(option.partition("=")[2])).write_text(JUNIT)
        return statuses.get(command[0], 0)

    monkeypatch.setattr(on_gpu, "run", run)
    return commands, statuses


def test_outcome_by_hand(tmp_path):
    (tmp_path / "x.xml").write_text(JUNIT)
    assert on_gpu.outcome(tmp_path / "x.xml") == {"passed": 1, "failed": 2, "skipped": 1, "failures": ["b", "d"]}
    assert on_gpu.outcome(tmp_path / "none.xml")["passed"] == 0


def test_a_failure_stops_nothing_but_is_told(gpu, tmp_path):
    commands, statuses = gpu
    statuses["pytest"] = 1
    assert on_gpu.main(["--out", str(tmp_path), "--commit", "abc"]) == 1
    assert [c[0] for c in commands] == ["pytest"] * 3 + ["vwn_ref.kernels.bench", "vwn_ref.kernels.report"]
    kept = json.loads((tmp_path / "Some-GPU-80" / "tests.json").read_text())
    assert kept["device"] == "Some GPU/80" and kept["commit"] == "abc" and not kept["dry_run"]
    assert [(row["part"], row["failures"], row["status"]) for row in kept["rows"]] == [
        (part, ["b", "d"], 1) for part in on_gpu.PARTS
    ]
    statuses["pytest"], commands[:] = 0, []
    assert on_gpu.main(["--out", str(tmp_path), "--minutes", "3"]) == 0
    assert commands[3] == ("vwn_ref.kernels.bench", "--minutes", "3.0", "--out", str(tmp_path))


@pytest.mark.parametrize("cpus, memory, both", [(16, 141e9, True), (4, 141e9, False), (16, 80e9, False)])
def test_what_the_benchmark_needs_is_compiled_meanwhile(gpu, tmp_path, monkeypatch, cpus, memory, both):
    commands, _ = gpu
    events = []

    class Popen:
        def __init__(self, command, cwd, env):
            events.append(("started", len(commands), command[3:5]))

        def wait(self, timeout):
            events.append(("waited for", len(commands), timeout))

        def kill(self):
            events.append("ended")

    monkeypatch.setattr(on_gpu.subprocess, "Popen", Popen)
    monkeypatch.setattr(on_gpu.os, "cpu_count", lambda: cpus)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
    assert on_gpu.main(["--out", str(tmp_path), "--minutes", "3"]) == 0
    started = ("started", 0, ["--compile-only", "--minutes"])
    assert events == ([started, ("waited for", 3, 60.0), "ended"] if both else [])  # before the benchmark
    assert (commands[3][-1] == "--compiled") == both


def test_every_test_is_in_one_part():
    names = [name for name in dir(test_gpu) if name.startswith("test_")]
    counts = [sum(word in name for name in names) for word in (on_gpu.ALONE, on_gpu.SANITIZER)]
    assert counts == [1, 1] and not any(on_gpu.ALONE in name and on_gpu.SANITIZER in name for name in names)
    assert on_gpu.PARTS["values"] == " and ".join(f"not {word}" for word in (on_gpu.ALONE, on_gpu.SANITIZER))


def test_the_package_need_not_be_installed(tmp_path):
    code = "import vwn_ref, vwn_ref.kernels.tiles as t; print(vwn_ref.__file__); print(t.__file__)"
    env = os.environ | on_gpu.overlay(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=on_gpu.ROOT)
    assert done.stdout.split() == [str(tmp_path / "vwn_ref" / x) for x in ("__init__.py", "kernels/tiles.py")], done


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit, match="2"):
        on_gpu.main([])
    assert "no GPU here" in capsys.readouterr().err
