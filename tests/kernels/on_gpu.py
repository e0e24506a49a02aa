"""All that needs a GPU, unattended: `make gpu`; where nothing can be installed, `python3 tests/kernels/on_gpu.py`.

    values     test_gpu.py, several tests at a time. Where there are CPUs and memory for both, what the benchmark needs
               is compiled meanwhile
    alone      what needs the memory for itself
    bench      `vwn_ref.kernels.bench`, so many minutes, and README's table
    sanitizer  compute-sanitizer over the kernels that `values` has compiled

In this order, or those of --parts. One that fails, or takes far longer than it should and is ended, does not stop the
next, but is in the exit status. What the tests did is kept beside the measurements, in tests.json of
figures/data/gpu/<device>, written anew after each part, with what parts that did not run now had done before with the
same code. While a part runs, tests-<part>.jsonl there has a line for each test that is done, and keeps it if all is cut
short, until that part runs again.

Python needs PyTorch with CUDA, Triton, pytest, einops, jaxtyping and filelock; vwn_ref need not be installed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "figures" / "data" / "gpu"
ALONE, SANITIZER = "2_to_the_31", "sanitizer"
TESTS = {"values": f"not {ALONE} and not {SANITIZER}", "alone": ALONE, "sanitizer": SANITIZER}  # part -> pytest's -k
PARTS = ("values", "alone", "bench", "sanitizer")
GPU_BYTES_A_WORKER = 22e9  # the largest test, which a worker has beside its CUDA context; by PyTorch's profiler
KEPT = "VWN_REF_TESTS_KEPT"  # where conftest.py writes a line for each test
TIMED_OUT = 124


def overlay(folder: Path) -> dict[str, str]:
    """What the environment needs for a vwn_ref as an installation makes it, with kernels/ as vwn_ref.kernels: a folder
    of links, and that the current one does not come before it."""
    package = folder / "vwn_ref"
    package.mkdir()
    for path in (ROOT / "vwn_ref").iterdir():
        (package / path.name).symlink_to(path)
    if not (package / "kernels").exists():
        (package / "kernels").symlink_to(ROOT / "kernels")
    places = [str(folder), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, places)), "PYTHONSAFEPATH": "1"}


def outcome(lines: Path) -> dict:
    """Of a pytest run, from what conftest.py has written: counts, the names of what passed, and why others did not.
    A test with two outcomes, its own and that of what comes after it, has failed if one of them says so."""
    found: dict[str, dict] = {}
    for line in lines.read_text(encoding="utf-8").splitlines() if lines.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # of a line that was being written
            row = json.loads(line)
            if row["test"] not in found or row["outcome"] == "failed":
                found[row["test"]] = row
    of = {how: [row for row in found.values() if row["outcome"] == how] for how in ("passed", "failed", "skipped")}
    return {how: len(rows) for how, rows in of.items()} | {
        "tests": [row["test"] for row in of["passed"]],
        "failures": [{"test": row["test"], "why": row["why"]} for row in of["failed"]],
        "skips": [{"test": row["test"], "why": row["why"]} for row in of["skipped"]],
    }


def start(command: list[str], env: dict[str, str]) -> subprocess.Popen:
    """A Python module, in a process group of its own."""
    return subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, env=env, start_new_session=True)


def end(process: subprocess.Popen) -> None:
    """It, and all that it started: asked first, then killed."""
    for sent, seconds in ((signal.SIGTERM, 15), (signal.SIGKILL, 15)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sent)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


def run(*command: str, env: dict[str, str], seconds: float | None = None) -> int:
    """The exit status, `TIMED_OUT` where it took longer than that; the command is printed first."""
    print("$", *command, flush=True)
    process = start(list(command), env)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        print(f"not over after {seconds:.0f} s: ended", flush=True)
        return TIMED_OUT
    finally:
        end(process)


class Compiling:
    """The benchmark's code, compiled while tests run, where there are CPUs and memory for both. `done` tells whether it
    came to its end; it ends with the block at the latest, `minutes` after that."""

    def __init__(self, env: dict[str, str], minutes: float, wanted: bool) -> None:
        import torch

        enough = (os.cpu_count() or 1) >= 8 and torch.cuda.get_device_properties(0).total_memory > 100e9
        self.minutes, self.done = minutes, False
        command = ["vwn_ref.kernels.bench", "--compile-only", "--minutes", str(minutes)]
        self.process = start(command, env) if enough and wanted else None

    def __enter__(self) -> Compiling:
        return self

    def __exit__(self, error, *_) -> None:
        if self.process is not None:
            try:
                if error is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self.done = self.process.wait(60 * self.minutes) == 0
            finally:
                end(self.process)


def tests(part: str, env: dict[str, str], workers: int, minutes: float, folder: Path) -> dict:
    """What a part of test_gpu.py came to."""
    began, lines = time.monotonic(), folder / f"tests-{part}.jsonl"
    lines.unlink(missing_ok=True)
    options = ["-n", str(workers), "--dist", "load"] if part != "alone" and workers > 1 else []
    command = ["pytest", "tests/kernels/test_gpu.py", *options, "-k", TESTS[part], "-rs", "-q"]
    status = run(*command, env=env | {KEPT: str(lines)}, seconds=60 * minutes)
    found = outcome(lines) | {"status": status, "seconds": round(time.monotonic() - began, 1)}
    lines.unlink(missing_ok=True)
    return found


def earlier(file: Path, facts: dict) -> dict[str, dict]:
    """part -> row, of what was kept there by the same code on the same device."""
    with contextlib.suppress(OSError, json.JSONDecodeError):
        kept = json.loads(file.read_text(encoding="utf-8"))
        named = re.fullmatch("[0-9a-f]{7,40}", facts["commit"] or "")  # not "-dirty", nor a branch, which moves on
        if named and all(kept.get(name) == value for name, value in facts.items()):
            return {row["part"]: row for row in kept["rows"]}
    return {}


def git_commit() -> str | None:
    """Of what is checked out, with "-dirty" where it has been changed; None outside a repository. (As in
    `vwn_ref.experiments.provenance`, which is not found where vwn_ref is not installed.)"""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        git("ls-files", "--error-unmatch", here.name)  # unpacked into somebody else's repository: not ours
        return git("describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")


def about(commit: str | None) -> dict:
    """What the tests run on."""
    import torch
    import triton

    device = torch.cuda.get_device_name()
    return {"device": device, "torch": torch.__version__, "triton": triton.__version__, "commit": commit}


def stop(number: int, _) -> None:
    """A signal that would end this process, and leave what it has started at the GPU."""
    raise SystemExit(128 + number)


def main(arguments: list[str] | None = None) -> int:
    """Everything; 1 where anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, action="extend", help="default: all of them")
    parser.add_argument("--minutes", type=float, default=6.5, help="for the benchmark, default %(default)s")
    parser.add_argument(
        "--test-minutes", type=float, default=10, help="after which a part of the tests is ended, default %(default)s"
    )
    parser.add_argument("--workers", type=int, help="tests at a time; default: 6, or as many as CPUs and memory allow")
    parser.add_argument("--out", type=Path, default=FIGURES, help="default: figures/data/gpu, and README")
    parser.add_argument("--commit", help="name of the code that runs, where that cannot be asked of git")
    asked = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        parser.error("no GPU here: torch.cuda.is_available() is False")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    wanted = asked.parts or PARTS
    facts = about(asked.commit or git_commit())  # asked before any file is written
    asked.out = asked.out.resolve()  # what runs the parts does so in ROOT
    folder = asked.out / facts["device"].replace(" ", "-").replace("/", "-")
    folder.mkdir(parents=True, exist_ok=True)
    most = min(6, os.cpu_count() or 1, int(torch.cuda.get_device_properties(0).total_memory // GPU_BYTES_A_WORKER))
    workers = (asked.workers or max(1, most)) if importlib.util.find_spec("xdist") else 1
    rows, statuses, compiled = earlier(folder / "tests.json", facts), [], False
    with tempfile.TemporaryDirectory() as name:
        env = dict(os.environ)
        if importlib.util.find_spec("vwn_ref") is None or importlib.util.find_spec("vwn_ref.kernels") is None:
            env |= overlay(Path(name))
        for part in (x for x in PARTS if x in wanted):
            if part == "bench":
                out = ["--out", str(asked.out), *(["--commit", facts["commit"]] if facts["commit"] else [])]
                command = ["--minutes", str(asked.minutes), *out, *["--compiled"] * compiled]
                # it looks at its clock between two tasks: twice as long is more than that
                statuses.append(run("vwn_ref.kernels.bench", *command, env=env, seconds=120 * asked.minutes + 300))
                if (folder / "ops.json").exists():  # README is of what this repository keeps, and of nothing else
                    to = ["--readme", "README.md"] if asked.out == FIGURES else []
                    command = ["--data", str(asked.out), *to]
                    statuses.append(run("vwn_ref.kernels.report", *command, env=env, seconds=300))
                continue
            ahead = part == "values" and "bench" in wanted
            with Compiling(env, min(2.0, asked.minutes / 3), ahead) as compiling:
                found = tests(part, env, workers, asked.test_minutes, folder)
            compiled |= compiling.done
            rows[part] = {"part": part} | found
            statuses.append(found["status"])
            whole = {"stage": "tests", "dry_run": False, **facts, "rows": [rows[x] for x in PARTS if x in rows]}
            new = folder / "tests.json.new"
            new.write_text(json.dumps(whole, indent=1) + "\n")
            new.replace(folder / "tests.json")
    return int(any(statuses))


if __name__ == "__main__":
    sys.exit(main())
