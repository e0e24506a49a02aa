"""Many runs from one file: `python -m vwn_ref.experiments.sweep vwn_ref/experiments/studies/a_r_sweep.toml`.

A sweep is a TOML file. Its fields are those of `TrainConfig`; data.vocab_size sets the model's vocabulary too.

    seeds = [0, 1, 2]
    base_variant = "plain"            # what the table compares with, seed by seed
    out = "runs/small"                # default: runs/<name of the file>

    [base]                            # what all runs share; threads is 1 unless given
    steps = 2000
    model.dim = 32

    [variants.plain]                  # what each variant changes
    [variants."r1.5"]
    model.m = 4
    model.n = 6

    [grid]                            # optional: every variant with every combination of these
    lr = [0.005, 0.01]

A run lives in <out>/<variant>[-<field><value>…]-s<seed>, where `compare` and `load_run` find it; folders and text files
are relative to where the command is called. Runs are made in the order of the seeds, so that a sweep cut short has
whole seeds. What is finished is left alone, what was interrupted goes on from its checkpoint: after Ctrl-C, SIGTERM,
SIGKILL or a power cut the same command goes on.

    … sweep FILE --dry-run            # check file, folders and text, list the runs, train nothing
    … sweep FILE --table              # losses, and paired differences with 95 % intervals, of what is finished
    … sweep FILE --keep figures/data/small        # copy config, log and summary of what is finished

Several machines that share a disk, and its locks, may run the same command: a run that another process is at is left to
it. Or each takes its part; with Slurm (4 nodes, 16 runs at a time on each):

    sbatch --array=1-4 --cpus-per-task=16 --signal=TERM@60 --wrap \\
        'srun python -m vwn_ref.experiments.sweep FILE --jobs 16 --shard $SLURM_ARRAY_TASK_ID/4'

and with several GPUs in one machine `CUDA_VISIBLE_DEVICES=0 … --shard 1/2 & CUDA_VISIBLE_DEVICES=1 … --shard 2/2`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import types
import typing
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from tqdm import tqdm

from vwn_ref.config import VWNConfig
from vwn_ref.cost import model_parameters
from vwn_ref.experiments.compare import paired_or_why
from vwn_ref.experiments.console import Signals, note, told
from vwn_ref.experiments.data import DataConfig, find_files
from vwn_ref.experiments.finished import LOSSES, KeptRun, Runs, keep, read_run
from vwn_ref.experiments.run import Locked, Run, flat
from vwn_ref.experiments.train import Stopped, TrainConfig, train

STUDIES = Path(__file__).parent / "studies"
KEYS = ("seeds", "base_variant", "out", "base", "variants", "grid")
# Fields of TrainConfig that a sweep file does not set, and why.
NOT_HERE = {"seed": "seeds gives it", "out": "the run's name gives it", "resume": "a sweep always goes on"}
NOT_HERE |= {"progress": "the sweep shows its own", "model.vocab_size": "data.vocab_size gives it"}
STOPPED, LOCKED = 75, 76  # exit status of a child that was told to stop, or found another process at its run
POLL = 0.1  # seconds between two looks at the children


# ------------------------------------------------------------------------------------------------ the file


@dataclass(frozen=True)
class Planned:
    """One run: `name` is its folder, `variant` the same without the seed, `base` the variant it is paired with."""

    name: str
    variant: str
    base: str
    config: TrainConfig

    @property
    def folder(self) -> Path:
        return Path(str(self.config.out))

    @property
    def finished(self) -> bool:
        return (self.folder / "summary.json").exists()


@dataclass(frozen=True)
class Sweep:
    """What a file says: its runs in the order in which they are made, and the folder that holds them."""

    runs: tuple[Planned, ...]
    out: Path


def read_sweep(file: str | Path, out: str | Path | None = None) -> Sweep:
    """Read and check a sweep's file; `out` in place of the folder it names.

    Raises FileNotFoundError, or ValueError naming file and field, what it was and what it must be.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; must be the TOML file of a sweep")
    try:
        return planned(tomllib.loads(file.read_text(encoding="utf-8-sig")), file.stem, out)
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError among them
        raise ValueError(f"{file}: {error}") from error


def planned(content: dict[str, Any], stem: str, out: str | Path | None = None) -> Sweep:
    """The sweep that the file's `content` describes; `stem` is the file's name without its ending."""
    for key in content:
        if key not in KEYS:
            raise ValueError(f"{key}: no such key; must be one of {', '.join(KEYS)}")
    for key in ("base", "variants", "grid"):
        if not isinstance(content.get(key, {}), dict):
            raise ValueError(f"{key} = {content[key]!r}: must be a table, [{key}]")
    seeds, variants = content.get("seeds"), content.get("variants", {})
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ValueError(f"seeds = {seeds!r}: must be a list of one or more integers ≥ 0")
    if not variants:
        raise ValueError("variants: must have one or more tables, [variants.<name>]")
    first = content.get("base_variant", "plain")
    if not isinstance(first, str) or first not in variants:
        raise ValueError(f"base_variant = {first!r}: must be one of the variants, {', '.join(variants)}")
    folder = content.get("out", f"runs/{stem}")
    if not isinstance(folder, str) or not folder:
        raise ValueError(f"out = {folder!r}: must be the name of a folder")
    folder = Path(out or folder).expanduser()

    base = {"threads": 1, **typed(content.get("base", {}), "base")}
    overrides = {}
    for name, changes in variants.items():
        if not isinstance(changes, dict):
            raise ValueError(f"variants.{name} = {changes!r}: must be a table, [variants.{name}]")
        overrides[name] = typed(changes, f"variants.{name}")
    runs: dict[str, Planned] = {}
    points = list(grid_points(content.get("grid", {})))
    for seed, (suffix, point), name in itertools.product(seeds, points, variants):
        run = f"{name}{suffix}-s{seed}"
        if not re.fullmatch(r"\w[\w.+-]*", run, re.ASCII):
            raise ValueError(f"run {run!r}: is a folder's name, must be made of letters, digits and . _ + -")
        if run in runs:
            raise ValueError(f"run {run!r}: must be there once; two of variants, grid and seeds give the same name")
        try:
            config = build({**base, **overrides[name], **point, "seed": seed, "out": str(folder / run)})
        except ValueError as error:
            raise ValueError(f"run {run}: {error}") from error
        runs[run] = Planned(run, f"{name}{suffix}", f"{first}{suffix}", config)
    return Sweep(tuple(runs.values()), folder)


def grid_points(grid: dict[str, Any]) -> Iterator[tuple[str, dict]]:
    """Every combination of the grid's values: what it adds to a run's name, and the fields."""
    lists = flat(grid)
    for name, values in lists.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"grid.{name} = {values!r}: must be a list of one or more values")
    for values in itertools.product(*lists.values()):
        point = dict(zip(lists, values, strict=True))
        suffix = "".join(f"-{name.rpartition('.')[2]}{value}" for name, value in point.items())
        yield suffix, typed(point, "grid")


def typed(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Flat names and values, of the types that `TrainConfig` declares. Raises ValueError for a name or type that it
    does not have."""
    types_of = field_types(TrainConfig)
    found = {}
    for name, value in flat(values).items():
        if name not in types_of:
            groups = {group_of(n): [m for m in types_of if group_of(m) == group_of(n)] for n in types_of}
            there = [n for n in groups.get(group_of(name), groups[""]) if n not in NOT_HERE]
            raise ValueError(f"{where}.{name}: no such field; must be one of {', '.join(there)}")
        if name in NOT_HERE:
            raise ValueError(f"{where}.{name}: must be left out, {NOT_HERE[name]}")
        try:
            found[name] = fitted(value, types_of[name])
        except TypeError:
            hint = types_of[name]
            kind = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            raise ValueError(f"{where}.{name} = {value!r}: must be {kind}") from None
    return found


def group_of(name: str) -> str:
    """ "model" of "model.dim", "" of "lr"."""
    return name.rpartition(".")[0]


def field_types(kind: type, prefix: str = "") -> dict[str, Any]:
    """Flat field name -> annotation, of a dataclass and the dataclasses in it."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        if name in (field.name for field in dataclasses.fields(kind)):
            inner = dataclasses.is_dataclass(hint)
            found |= field_types(hint, f"{prefix}{name}.") if inner else {prefix + name: hint}
    return found


def fitted(value: Any, hint: Any) -> Any:
    """`value` as the annotation `hint` wants it: a list becomes a tuple, 1 becomes 1.0. Raises TypeError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for argument in arguments:
            try:
                return fitted(value, argument)
            except TypeError:
                continue
    elif origin is typing.Literal:
        if value in arguments:
            return value
    elif origin is tuple:
        if isinstance(value, list):
            return tuple(fitted(item, arguments[0]) for item in value)
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif type(value) is hint:
        return value
    raise TypeError(value)


def build(values: dict[str, Any]) -> TrainConfig:
    """The config of one run from flat names. Raises ValueError as `TrainConfig` does."""

    def part(prefix: str) -> dict[str, Any]:
        return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}

    data = DataConfig(**part("data."))
    model = VWNConfig(vocab_size=data.vocab_size, **part("model."))
    rest = {name: value for name, value in values.items() if "." not in name}
    return TrainConfig(model=model, data=data, resume=True, progress=False, **rest)


def shard(runs: Sequence[Planned], part: str) -> list[Planned]:
    """Every k-th run from the i-th, where `part` is "i/k". Raises ValueError for another `part`."""
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    i, k = map(int, match.groups()) if match else (0, 0)
    if not 1 <= i <= k:
        raise ValueError(f"shard = {part!r}: must be i/k with 1 ≤ i ≤ k, such as 2/4")
    return list(runs[i - 1 :: k])


def check_folders(runs: Sequence[Planned]) -> None:
    """Raise ValueError or FileExistsError, naming folder and fields, if a run's folder holds anything but that run."""
    for run in runs:
        Run(run.folder, dataclasses.asdict(run.config)).check(resume=True)


# --------------------------------------------------------------------------------------------- the children


class Child:
    """A process that trains one run. It stops, with a checkpoint, when its stdin ends: when `stop` is called, or when
    this process dies in whichever way."""

    def __init__(self, run: Planned) -> None:
        self.run = run
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        command = [sys.executable, "-c", "from vwn_ref.experiments.sweep import child; child()"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": self._errors}
        self.process = subprocess.Popen(command, **pipes)
        try:
            self.process.stdin.write(json.dumps(dataclasses.asdict(run.config)).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # it died at once; its exit status tells
            pass

    def stop(self) -> None:
        """Ask it to save and stop; once or more."""
        self.process.stdin.close()

    def last_words(self, lines: int = 10) -> str:
        """The end of what it wrote to stderr."""
        self._errors.seek(0)
        return "\n".join(self._errors.read().decode(errors="replace").splitlines()[-lines:])

    def close(self) -> None:
        """Forget a process that has ended."""
        self.process.stdin.close()
        self._errors.close()


def child() -> None:
    """What such a process does: train the config that is the first line of stdin."""
    config = TrainConfig.from_dict(json.loads(sys.stdin.readline()))
    signals = Signals(wanted=True)

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)  # returns at the end: nothing follows the first line
        signals.wish()

    threading.Thread(target=watch, daemon=True).start()
    with told(FloatingPointError, RuntimeError):
        try:
            train(config, signals)
        except Stopped:
            sys.exit(STOPPED)
        except Locked:
            sys.exit(LOCKED)


@dataclass
class Outcome:
    """Names of the runs that a sweep finished now, that failed, that another process is at; the signal, if any."""

    done: list[str]
    failed: list[str]
    elsewhere: list[str]
    signal: int | None = None


def run_sweep(runs: Sequence[Planned], jobs: int) -> Outcome:
    """Train what is missing, `jobs` runs at a time, one process each; tells of each run on stderr when it ends.

    A run that fails does not stop the others. Ctrl-C and SIGTERM stop them all, with checkpoints.
    """
    outcome = Outcome([], [], [])
    waiting = deque(run for run in runs if not run.finished)
    active: list[Child] = []
    signals, progress = Signals(wanted=True), SweepProgress(runs)
    try:
        while active or (waiting and signals.number is None):
            while waiting and len(active) < jobs and signals.number is None:
                run = waiting.popleft()
                if not run.finished:  # by another sweep, meanwhile
                    active.append(Child(run))
            if signals.number is not None:
                for one in active:
                    one.stop()
            for one in [one for one in active if one.process.poll() is not None]:
                active.remove(one)
                settle(one, outcome, stopping=signals.number is not None)
            progress.update([one.run for one in active])
            time.sleep(POLL)
    finally:  # also after a second Ctrl-C
        for one in active:
            one.stop()
        signals.restore()
        progress.close()
    outcome.signal = signals.number
    return outcome


def settle(one: Child, outcome: Outcome, stopping: bool) -> None:
    """Sort a child that has ended into `outcome`, and tell."""
    name, status = one.run.name, one.process.returncode
    if status == 0:
        outcome.done.append(name)
        summary = read_run(one.run.folder).summary
        note(f"{name}: finished, val_next {summary['val_next']:.4f}, {summary['seconds']:,.0f} s")
    elif status == LOCKED:
        outcome.elsewhere.append(name)
        note(f"{name}: another process is at it, left to that")
    elif not stopping:
        outcome.failed.append(name)
        how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        note(f"{name}: failed, {how}\n{one.last_words()}")
    one.close()


class SweepProgress:
    """A bar over the steps of all runs; on a terminal only."""

    def __init__(self, runs: Sequence[Planned]) -> None:
        self._runs = runs
        total = sum(run.config.steps for run in runs)
        self._bar = tqdm(total=total, initial=self._steps(runs), unit="step", disable=None)
        self._next = time.monotonic()

    def _steps(self, runs: Sequence[Planned]) -> int:
        return sum(steps_done(run) for run in runs)

    def update(self, active: Sequence[Planned]) -> None:
        """Look at the logs, once a second."""
        if not self._bar.disable and time.monotonic() >= self._next:
            self._bar.n = self._steps(self._runs)
            self._bar.set_postfix_str(" ".join(run.name for run in active))
            self._next = time.monotonic() + 1

    def close(self) -> None:
        self._bar.close()


def steps_done(run: Planned) -> int:
    """Steps that a run's log tells of."""
    if run.finished:
        return run.config.steps
    try:
        with (run.folder / "log.jsonl").open("rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - 4096))  # several lines
            return json.loads(log.read().splitlines(keepends=True)[-1])["step"]
    except (OSError, ValueError, LookupError, TypeError):  # none yet, or half a line
        return 0


def default_jobs(runs: Sequence[Planned]) -> int:
    """As many runs at a time as there are CPUs for; one where they train on a GPU."""
    if any(run.config.device != "cpu" for run in runs) and torch.cuda.is_available():
        return 1
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // max(run.config.threads or 1 for run in runs))


# ------------------------------------------------------------------------------------------------ the table


def kept_runs(sweep: Sweep) -> Runs:
    """The finished runs of each variant that has some, in the order of the file; what else its folder holds, such as
    another study's runs, is left out."""
    found: Runs = {}
    for run in sweep.runs:
        if run.finished:
            found.setdefault(run.variant, []).append(read_run(run.folder))
    return {name: found[name] for name in dict.fromkeys(run.variant for run in sweep.runs) if name in found}


def table(sweep: Sweep) -> str:
    """Markdown: parameters, mean loss over the seeds and paired difference to the base variant, of finished runs."""
    variants: dict[str, list[Planned]] = {}
    for run in sweep.runs:
        variants.setdefault(run.variant, []).append(run)
    kept = {name: [] for name in variants} | kept_runs(sweep)
    losses = [name for name in LOSSES if any(will_measure(runs[0], name) for runs in variants.values())]

    def cells(name: str, loss: str) -> list[str]:
        run = variants[name][0]
        if not kept[name] or not will_measure(run, loss):
            return ["", ""]
        mean = f"{statistics.fmean(one.summary[loss] for one in kept[name]):.4f}"
        base = variants[run.base][0]
        against = name != run.base and will_measure(base, loss)
        return [mean, difference(kept[name], kept[run.base], loss) if against else ""]

    bases = list(dict.fromkeys(run.base for run in sweep.runs))
    against = f"against {bases[0] if len(bases) == 1 else 'base'}"
    header = ["model", "parameters", "seeds", *(text for loss in losses for text in (f"{LOSSES[loss]} loss", against))]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for name, runs in variants.items():
        size = sum(model_parameters(runs[0].config.model).values())
        row = [name, f"{size:,}", f"{len(kept[name])}", *(text for loss in losses for text in cells(name, loss))]
        lines.append(f"| {' | '.join(row)} |")
    missing = [run.name for run in sweep.runs if not run.finished]
    if missing:
        lines += ["", f"Not finished, {len(missing)} of {len(sweep.runs)} runs: {', '.join(missing)}."]
    return "\n".join(lines)


def will_measure(run: Planned, loss: str) -> bool:
    """Whether a run will have this loss: that of the next token but one needs an MTP head."""
    return loss != "val_next2" or run.config.model.mtp_layers > 0


def difference(runs: list[KeptRun], base: list[KeptRun], loss: str) -> str:
    """The paired difference in words; empty where no seed has both."""
    common = {run.seed for run in runs} & {run.seed for run in base}
    return paired_or_why(runs, base, loss) if common else ""


def cpu_hours(runs: Sequence[Planned]) -> str:
    """CPU time of the finished runs, in a line."""
    found = [(run, read_run(run.folder).summary) for run in runs if run.finished]
    counted = [summary["cpu_seconds"] for _, summary in found if summary.get("cpu_seconds") is not None]
    text = f"{math.fsum(counted) / 3600:.2f} CPU-hours in {len(counted)} runs"
    if len(counted) < len(found):  # kept before CPU time was: one thread each, so the wall-clock of training is near it
        rest = [summary for _, summary in found if summary.get("cpu_seconds") is None]
        seconds = math.fsum(summary["seconds"] * summary["threads"] for summary in rest)
        text += f"; {seconds / 3600:.2f} thread-hours of training in {len(rest)} that did not count it"
    return text


# --------------------------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class SweepArguments:
    """Which sweep, where, and what to do with it."""

    file: tyro.conf.Positional[str]
    """TOML file that describes the runs."""
    out: str | None = None
    """Folder of the runs, in place of the file's."""
    jobs: int | None = None
    """Runs at a time. None: as many as there are CPUs for; one where there is a GPU."""
    shard: str | None = None
    """i/k: only every k-th run, from the i-th."""
    dry_run: bool = False
    """Check the file, the folders and that the text is there, list the runs, train nothing."""
    table: bool = False
    """Print the table of the finished runs, train nothing."""
    keep: str | None = None
    """Copy config, log and summary of the finished runs to this folder, train nothing."""


def listing(runs: Sequence[Planned]) -> str:
    """A line a run: its state and its size."""
    lines = []
    for run in runs:
        state = "finished" if run.finished else f"at {steps_done(run)}" if run.folder.exists() else "missing"
        config = run.config
        size, tokens = sum(model_parameters(config.model).values()), config.steps * config.batch_size * config.seq_len
        lines.append(f"{run.name:32} {state:10} {size:>12,} parameters {config.steps:>8,} steps {tokens:>14,} tokens")
    return "\n".join([*lines, f"{len(runs)} runs, {sum(run.finished for run in runs)} finished"])


def execute(arguments: SweepArguments, command: str) -> int:
    """Do what the command line says; returns the exit status. `command` is how to go on. Raises ValueError, OSError."""
    for name in ("out", "keep"):
        if getattr(arguments, name) == "":
            raise ValueError(f"{name} = '': must be the name of a folder")
    sweep = read_sweep(arguments.file, arguments.out)
    if arguments.jobs is not None and arguments.jobs < 1:
        raise ValueError(f"jobs = {arguments.jobs}: must be ≥ 1")
    runs = list(sweep.runs) if arguments.shard is None else shard(sweep.runs, arguments.shard)
    check_folders(sweep.runs)
    if not arguments.table and arguments.keep is None:
        for data in {run.config.data for run in runs if run.config.data.files}:
            find_files(data)  # before anything starts
    if arguments.dry_run:
        print(listing(runs))
        return 0
    if arguments.keep is not None:
        count = keep(sweep.out, arguments.keep, {run.name for run in runs})
        note(f"{count} of {len(runs)} runs copied to {arguments.keep}")
    if arguments.table:
        print(table(sweep))
        note(cpu_hours(sweep.runs))
    if arguments.table or arguments.keep is not None:
        return 0
    outcome = run_sweep(runs, arguments.jobs or default_jobs(runs))
    finished = sum(run.finished for run in runs)
    note(f"{finished} of {len(runs)} runs are finished, {len(outcome.done)} of them now; {cpu_hours(runs)}")
    if outcome.elsewhere:
        note(f"at another process: {', '.join(outcome.elsewhere)}")
    if outcome.failed:
        note(f"failed: {', '.join(outcome.failed)}")
    if outcome.signal is not None:
        note(f"stopped; go on with:\n  {command}")
        return 128 + outcome.signal
    return 1 if outcome.failed else 0


def main() -> None:
    """Run a sweep as the command line says; errors in it and in files are told in a line."""
    arguments = tyro.cli(SweepArguments, prog="python -m vwn_ref.experiments.sweep", description=__doc__)
    with told():
        sys.exit(execute(arguments, shlex.join(["python", "-m", "vwn_ref.experiments.sweep", *sys.argv[1:]])))


if __name__ == "__main__":
    main()
