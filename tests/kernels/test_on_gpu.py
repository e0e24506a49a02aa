"""What `make gpu` runs, with a GPU that is made up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import on_gpu
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
import test_gpu

LINES = [
    {"test": "a", "outcome": "passed", "seconds": 1.0, "why": ""},
    {"test": "b", "outcome": "failed", "seconds": 1.0, "why": "no"},
    {"test": "c", "outcome": "skipped", "seconds": 0.0, "why": "too small"},
    {"test": "d", "outcome": "passed", "seconds": 1.0, "why": ""},
    {"test": "d", "outcome": "failed", "seconds": 0.0, "why": "after it"},
    {"test": "f", "outcome": "skipped", "seconds": 0.0, "why": "too small"},
    {"test": "f", "outcome": "failed", "seconds": 0.0, "why": "after that"},
    {"test": "f", "outcome": "passed", "seconds": 0.0, "why": ""},
]


def write_lines(path) -> None:
    on_gpu.Path(path).write_text("".join(json.dumps(line) + "\n" for line in LINES) + '{"test": "e", "outc')


@pytest.fixture
def gpu(monkeypatch):
    """A GPU by name, and the commands that were run; each ends with the status that `statuses` has for its module."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU/80")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80e9))
    monkeypatch.setattr(on_gpu.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(on_gpu.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(on_gpu, "git_commit", lambda: "here-dirty")
    monkeypatch.setattr(on_gpu.signal, "signal", lambda *_: None)
    commands, statuses = [], {}

    def run(*command, env, seconds=None):
        commands.append(command)
        if on_gpu.KEPT in env:
            write_lines(env[on_gpu.KEPT])
        if command[0] == "vwn_ref.kernels.bench" and not statuses.get(command[0]):
            (on_gpu.Path(command[command.index("--out") + 1]) / "Some-GPU-80" / "ops.json").write_text("{}")
        return statuses.get(command[0], 0)

    monkeypatch.setattr(on_gpu, "run", run)
    return commands, statuses


def kept(folder) -> dict:
    return json.loads((folder / "Some-GPU-80" / "tests.json").read_text())


def test_outcome_by_hand(tmp_path):
    write_lines(tmp_path / "x")
    found = on_gpu.outcome(tmp_path / "x")
    assert (found["passed"], found["failed"], found["skipped"], found["tests"]) == (1, 3, 1, ["a"])
    assert [x["test"] + " " + x["why"] for x in found["failures"]] == ["b no", "d after it", "f after that"]
    assert found["skips"] == [{"test": "c", "why": "too small"}]
    assert on_gpu.outcome(tmp_path / "none")["passed"] == 0


@pytest.mark.parametrize("module, status", [("pytest", 1), ("pytest", 124), ("vwn_ref.kernels.bench", 1)])
def test_a_failure_stops_nothing_but_is_told(gpu, tmp_path, module, status):
    commands, statuses = gpu
    statuses[module] = status
    assert on_gpu.main(["--out", str(tmp_path), "--commit", "abcdef0"]) == 1
    bench = ["vwn_ref.kernels.bench", "vwn_ref.kernels.report"][: 1 if module == "vwn_ref.kernels.bench" else 2]
    assert [c[0] for c in commands] == ["pytest"] * 2 + bench + ["pytest"]  # the sanitizer is last
    found = kept(tmp_path)
    assert found["device"] == "Some GPU/80" and found["commit"] == "abcdef0" and not found["dry_run"]
    assert [(row["part"], row["failed"], row["status"]) for row in found["rows"]] == [
        (part, 3, statuses.get("pytest", 0)) for part in ("values", "alone", "sanitizer")
    ]
    assert {path.name for path in tmp_path.glob("*/*")} - {"ops.json"} == {"tests.json"}  # all of it is there


def test_without_a_failure(gpu, tmp_path):
    commands, _ = gpu
    assert on_gpu.main(["--out", str(tmp_path), "--minutes", "3"]) == 0
    assert commands[2] == (
        "vwn_ref.kernels.bench", "--minutes", "3.0", "--out", str(tmp_path), "--commit", "here-dirty"
    )  # fmt: skip


def test_only_what_is_kept_here_goes_into_README(gpu, tmp_path, monkeypatch):
    commands, _ = gpu
    for here, out in ((False, []), (True, ["--out", str(tmp_path / "elsewhere")])):
        monkeypatch.setattr(on_gpu, "FIGURES", tmp_path)
        commands.clear()
        on_gpu.main([*(out or ["--out", str(tmp_path)]), "--parts", "bench"])
        assert ("--readme" in commands[-1]) is not here and commands[-1][0] == "vwn_ref.kernels.report"


def test_a_folder_named_from_where_one_is(gpu, tmp_path, monkeypatch):
    commands, _ = gpu
    monkeypatch.chdir(tmp_path)
    on_gpu.main(["--out", "results", "--parts", "values", "bench"])
    assert commands[1][commands[1].index("--out") + 1] == str(tmp_path / "results") and kept(tmp_path / "results")


@pytest.mark.parametrize("commit", ["main", "abcdef0-dirty", None])
def test_what_names_no_code_keeps_nothing(gpu, tmp_path, commit):
    facts = on_gpu.about(commit)
    (tmp_path / "x.json").write_text(json.dumps({**facts, "rows": [{"part": "alone"}]}))
    assert on_gpu.earlier(tmp_path / "x.json", facts) == {}


def test_the_commit_of_another_repository_is_not_ours(tmp_path, monkeypatch):
    for arguments in (
        ["init", "-q"],
        ["-c", "user.name=x", "-c", "user.email=x", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    monkeypatch.setattr(on_gpu, "__file__", str(tmp_path / "on_gpu.py"))
    (tmp_path / "on_gpu.py").touch()
    assert on_gpu.git_commit() is None


def test_workers_that_the_memory_holds(gpu, tmp_path):
    """80 GB: three at a time, and one for what needs it all."""
    commands, _ = gpu
    on_gpu.main(["--out", str(tmp_path)])
    workers = [c[c.index("-n") + 1] if "-n" in c else None for c in commands if c[0] == "pytest"]
    assert workers == ["3", None, "3"]


def test_some_parts_and_what_was_kept_of_others(gpu, tmp_path):
    commands, _ = gpu
    out = ["--out", str(tmp_path), "--commit"]
    on_gpu.main([*out, "abcdef0", "--parts", "alone", "--parts", "values"])
    assert [c[0] for c in commands] == ["pytest"] * 2
    first = kept(tmp_path)["rows"]
    on_gpu.main([*out, "abcdef0", "--parts", "sanitizer"])
    assert kept(tmp_path)["rows"][:2] == first and len(kept(tmp_path)["rows"]) == 3
    on_gpu.main([*out, "def0123", "--parts", "alone"])  # other code
    assert [row["part"] for row in kept(tmp_path)["rows"]] == ["alone"]
    on_gpu.main(["--out", str(tmp_path), "--parts", "values"])  # code that has been changed is no name
    on_gpu.main(["--out", str(tmp_path), "--parts", "alone"])
    assert [row["part"] for row in kept(tmp_path)["rows"]] == ["alone"]


@pytest.mark.parametrize("status", [0, 1, None])
@pytest.mark.parametrize("cpus, memory, both", [(16, 141e9, True), (4, 141e9, False), (16, 80e9, False)])
def test_what_the_benchmark_needs_is_compiled_meanwhile(gpu, tmp_path, monkeypatch, cpus, memory, both, status):
    """And counts as compiled where that came to its end. None: it had not when its time was over."""
    commands, _ = gpu
    events = []

    def wait(timeout):
        events.append(("waited for", len(commands), timeout))
        if status is None:
            raise subprocess.TimeoutExpired("bench", timeout)
        return status

    def start(command, env):
        events.append(("started", len(commands), command[:2]))
        return SimpleNamespace(wait=wait)

    monkeypatch.setattr(on_gpu, "start", start)
    monkeypatch.setattr(on_gpu, "end", lambda process: events.append("ended"))
    monkeypatch.setattr(on_gpu.os, "cpu_count", lambda: cpus)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
    assert on_gpu.main(["--out", str(tmp_path), "--minutes", "3"]) == 0
    started = ("started", 0, ["vwn_ref.kernels.bench", "--compile-only"])
    # before the test that needs the memory for itself, and before the benchmark
    assert events == ([started, ("waited for", 1, 60.0), "ended"] if both else [])
    assert (commands[2][-1] == "--compiled") == (both and status == 0)
    events.clear()
    on_gpu.main(["--out", str(tmp_path), "--parts", "values"])
    assert not events  # nothing will be measured


def test_compiling_ends_at_once_with_an_error(monkeypatch):
    ended = []
    process = SimpleNamespace(wait=lambda timeout: pytest.fail("it waits"))
    monkeypatch.setattr(on_gpu, "start", lambda command, env: process)
    monkeypatch.setattr(on_gpu, "end", ended.append)
    monkeypatch.setattr(on_gpu.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=141e9))
    with pytest.raises(KeyboardInterrupt), on_gpu.Compiling({}, 1.0, wanted=True) as compiling:
        raise KeyboardInterrupt
    assert ended == [process] and not compiling.done


def test_what_takes_too_long(tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr(on_gpu, "ROOT", tmp_path)
    assert on_gpu.run("slow", env=dict(os.environ), seconds=0.3) == on_gpu.TIMED_OUT
    assert on_gpu.run("platform", env=dict(os.environ), seconds=600) == 0


def test_what_is_ended_ends_with_all_it_started(tmp_path, monkeypatch):
    """A child that does not listen, too."""
    code = f"""
import pathlib, signal, subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
process.stdout.readline()
pathlib.Path({str(tmp_path / "new")!r}).write_text(str(process.pid))
pathlib.Path({str(tmp_path / "new")!r}).rename({str(tmp_path / "pid")!r})
time.sleep(600)
"""
    (tmp_path / "slow.py").write_text(code)
    monkeypatch.setattr(on_gpu, "ROOT", tmp_path)
    process = on_gpu.start(["slow"], dict(os.environ))
    wait_for((tmp_path / "pid").exists)
    on_gpu.end(process)
    wait_for(lambda: not alive(int((tmp_path / "pid").read_text())))
    assert process.poll() is not None


def wait_for(condition) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = on_gpu.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # one that nobody has waited for is none either


def test_a_signal_ends_what_was_started(gpu, tmp_path, monkeypatch):
    """SIGTERM is an exception here: whatever waits for a process then ends it."""
    handlers = {}
    monkeypatch.setattr(on_gpu.signal, "signal", handlers.__setitem__)
    on_gpu.main(["--out", str(tmp_path), "--parts", "alone"])
    with pytest.raises(SystemExit, match="143"):
        handlers[signal.SIGTERM](signal.SIGTERM, None)


@pytest.mark.parametrize("workers, sent", [([], None), (["-n", "2"], signal.SIGKILL)], ids=["one", "killed"])
def test_a_line_for_each_test_that_is_done(tmp_path, workers, sent):
    """Also when pytest is killed."""
    (tmp_path / "conftest.py").write_text(on_gpu.Path(on_gpu.__file__).with_name("kept.py").read_text())
    (tmp_path / "test_some.py").write_text(
        "import os, pathlib, pytest, signal, time\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2, 'the reason'\n"
        "def test_left_out(): pytest.skip('no time')\n"
        "@pytest.fixture\n"
        "def broken():\n    yield\n    raise RuntimeError('after it')\n"
        "def test_right_but_then(broken): pass\n"
    )
    lines = tmp_path / "lines"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers, "--confcutdir", str(tmp_path)]
    if sent:
        with open(tmp_path / "test_some.py", "a") as file:
            file.write("def test_zzz(): time.sleep(600)\n")
    env = os.environ | {on_gpu.KEPT: str(lines), "PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen([*command, str(tmp_path)], env=env, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        if sent:
            wait_for(lambda: lines.exists() and lines.read_text().count("\n") >= 5)
            os.killpg(process.pid, sent)
        process.wait(120)
    finally:
        on_gpu.end(process)
    found = on_gpu.outcome(lines)
    assert found["tests"] == ["test_right"] and [x["test"] for x in found["skips"]] == ["test_left_out"]
    why = {x["test"]: x["why"] for x in found["failures"]}
    assert "the reason" in why["test_wrong"] and "after it" in why["test_right_but_then"] and len(why) == 2
    assert found["skips"][0]["why"].endswith("no time")


def test_every_test_is_in_one_part():
    names = [name for name in dir(test_gpu) if name.startswith("test_")]
    counts = [sum(word in name for name in names) for word in (on_gpu.ALONE, on_gpu.SANITIZER)]
    assert counts == [1, 1] and not any(on_gpu.ALONE in name and on_gpu.SANITIZER in name for name in names)
    assert on_gpu.TESTS["values"] == " and ".join(f"not {word}" for word in (on_gpu.ALONE, on_gpu.SANITIZER))
    assert {*on_gpu.TESTS, "bench"} == set(on_gpu.PARTS)


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
