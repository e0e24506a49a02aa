"""All that needs a GPU, unattended: `make gpu`; where nothing can be installed, `python3 tests/kernels/on_gpu.py`.

    tests    test_gpu.py, several at a time; alone what needs the memory for itself, and last compute-sanitizer.
             Where there are CPUs and memory for both, what the benchmark needs is compiled meanwhile
    bench    `vwn_ref.kernels.bench`, so many minutes
    report   README's table

One that fails does not stop the next, but is in the exit status. What the tests did is kept beside the measurements,
figures/data/gpu/<device>/tests.json. Python needs PyTorch with CUDA, Triton, pytest, einops, jaxtyping and filelock;
vwn_ref need not be installed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ALONE, SANITIZER = "2_to_the_31", "sanitizer"
PARTS = {"values": f"not {ALONE} and not {SANITIZER}", "alone": ALONE, "sanitizer": SANITIZER}


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


def outcome(junit: Path) -> dict:
    """Counts of a pytest run, and the names of what failed, from its JUnit file; an empty one where there is none."""
    counts: dict = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
    if not junit.exists():
        return counts
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        tags = {child.tag for child in case}
        how = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        counts[how] += 1
        if how == "failed":
            counts["failures"].append(case.get("name"))
    return counts


def run(*command: str, env: dict[str, str]) -> int:
    """The exit status; the command is printed first."""
    print("$", *command, flush=True)
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=env).returncode


@contextlib.contextmanager
def compiling(env: dict[str, str], minutes: float) -> Iterator[bool]:
    """The benchmark's code is compiled meanwhile; whether that is so. It ends with the block at the latest."""
    import torch

    enough = (os.cpu_count() or 1) >= 8 and torch.cuda.get_device_properties(0).total_memory > 100e9
    command = [sys.executable, "-m", "vwn_ref.kernels.bench", "--compile-only", "--minutes", str(minutes)]
    process = subprocess.Popen(command, cwd=ROOT, env=env) if enough else None
    try:
        yield enough
    finally:
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60 * minutes)
            process.kill()


def tests(env: dict[str, str], workers: int, scratch: Path) -> dict:
    """What each part of test_gpu.py came to."""
    found = {}
    for part, expression in PARTS.items():
        junit, began = scratch / f"{part}.xml", time.monotonic()
        options = ["-n", str(workers), "--dist", "load"] if part == "values" and workers > 1 else []
        options += ["-k", expression, "-rs", "-q", f"--junit-xml={junit}"]
        status = run("pytest", "tests/kernels/test_gpu.py", *options, env=env)
        found[part] = outcome(junit) | {"status": status, "seconds": round(time.monotonic() - began, 1)}
    return found


def main(arguments: list[str] | None = None) -> int:
    """Everything; 1 where anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6.5, help="for the benchmark, default %(default)s")
    parser.add_argument("--workers", type=int, help="tests at a time; default: 6, or as many as there are CPUs")
    parser.add_argument("--out", type=Path, default=ROOT / "figures" / "data" / "gpu", help="default: figures/data/gpu")
    parser.add_argument("--commit", help="name of the code that runs, where that cannot be asked of git")
    asked = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        parser.error("no GPU here: torch.cuda.is_available() is False")
    with tempfile.TemporaryDirectory() as name:
        env = dict(os.environ)
        if importlib.util.find_spec("vwn_ref") is None or importlib.util.find_spec("vwn_ref.kernels") is None:
            env |= overlay(Path(name))
        has_workers = importlib.util.find_spec("xdist") is not None
        workers = (asked.workers or min(6, os.cpu_count() or 1)) if has_workers else 1
        with compiling(env, min(2.0, asked.minutes / 3)) as compiled:
            found = tests(env, workers, Path(name))
        facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": asked.commit}
        folder = asked.out / facts["device"].replace(" ", "-").replace("/", "-")
        folder.mkdir(parents=True, exist_ok=True)
        whole = {"stage": "tests", "dry_run": False, "rows": [{"part": p} | row for p, row in found.items()], **facts}
        (folder / "tests.json").write_text(json.dumps(whole, indent=1) + "\n")
        commit = ["--commit", asked.commit] if asked.commit else []
        bench = ["--minutes", str(asked.minutes), "--out", str(asked.out), *commit, *["--compiled"] * compiled]
        statuses = [
            *(row["status"] for row in found.values()),
            run("vwn_ref.kernels.bench", *bench, env=env),
            run("vwn_ref.kernels.report", "--data", str(asked.out), "--readme", "README.md", env=env),
        ]
    return int(any(statuses))


if __name__ == "__main__":
    sys.exit(main())
