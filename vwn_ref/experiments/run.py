"""The folder of a run, and what of it is true after a crash.

config.json             every field; written first
tokenizer.json          so that `load_run` needs no corpus
log.jsonl               a JSON line a report: nothing in it depends on the clock or the machine's load
checkpoint.safetensors  weights, optimizer, random state, and how long the log was: one file, one moment
weights.safetensors     final weights under the model's own names
summary.json            written last: the run is finished if it is there
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from vwn_ref.experiments import checkpoint
from vwn_ref.experiments.checkpoint import CheckpointError
from vwn_ref.experiments.storage import json_digest, write_text

# Fields that do not change what is computed, though some may change its last digits; `fixed_fields` has an exception.
MAY_CHANGE = {"out", "resume", "progress", "device", "compile", "threads", "micro_batch"}
MAY_CHANGE |= {"checkpoint_interval", "data.cache_dir"}
# Fields that older runs do not have in their config (or did not have among the fixed ones), with the values that stand
# for what those runs did. A field with that value is left out of a comparison, so that an older run still counts as one
# of the same config, and goes on from its checkpoint.
CAME_LATER = {"decay_static": False, "micro_batch": None}


class Locked(RuntimeError):
    """Another process is training in this folder."""


def flat(config: dict, prefix: str = "") -> dict:
    """{"data": {"files": ...}} -> {"data.files": ...}"""
    items = {}
    for name, value in config.items():
        items |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return items


def fixed_fields(config: dict) -> dict:
    """The fields that must be the same when a run goes on.

    Where there are experts micro_batch is one: the balance loss is a product of two means over the sequences at once.
    """
    may_change = MAY_CHANGE - ({"micro_batch"} if config.get("model", {}).get("n_experts") else set())
    values = {name: value for name, value in flat(config).items() if name not in may_change}
    return {name: value for name, value in values.items() if name not in CAME_LATER or value != CAME_LATER[name]}


class Run:
    """Log and files of one run. Nothing is written with `folder` None, nor before `open`, which only one process
    of a data-parallel run calls."""

    def __init__(self, folder: Path | None, config: dict) -> None:
        self.folder = folder
        self.config = json.loads(json.dumps(config))  # as it will be read back: tuples are lists
        self.log: list[dict] = []
        self._log_digest = hashlib.sha256()
        self._log_bytes = 0
        self._file = None
        self._lock: FileLock | None = None
        self._claimed: list[Path] = []  # what a new run has written, until the first line of its log

    def check(self, resume: bool) -> None:
        """Raise unless this run may be started or, with `resume`, continued in its folder. Writes nothing.

        FileExistsError: the folder holds something else; ValueError: a run with another config.
        """
        folder = self.folder
        if folder is None:
            if resume:
                raise ValueError("resume = True: must come with out, the folder of the run to continue")
            return
        for path in (folder, *folder.parents):
            if path.exists() and not path.is_dir():
                raise FileExistsError(f"out = {folder}: {path} is a file, must be a folder")
        if not (folder / "config.json").exists():
            if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
                raise FileExistsError(f"out = {folder}: holds files but no run; must be a new or empty folder")
        elif resume:
            kept, asked = fixed_fields(read_config(folder)), fixed_fields(self.config)
            differ = sorted(name for name in kept | asked if kept.get(name) != asked.get(name))
            if differ:
                kept, asked = CAME_LATER | kept, CAME_LATER | asked
                lines = [f"  {name}: the run has {kept.get(name)!r}, asked for {asked.get(name)!r}" for name in differ]
                raise ValueError("\n".join([f"resume: {folder} is a run with another config:", *lines]))
        elif self.finished:
            raise FileExistsError(f"out = {folder}: holds a finished run; choose another folder or remove this one")
        else:
            raise FileExistsError(f"out = {folder}: holds an unfinished run; add --resume, or choose another folder")

    @property
    def finished(self) -> bool:
        """Whether the folder holds a summary."""
        return self.folder is not None and (self.folder / "summary.json").exists()

    def open(self, tokenizer: str, resume: bool) -> None:
        """Claim the folder and start the log. Raises Locked if another process is writing here."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / ".lock")
        try:
            self._lock.acquire(timeout=0)  # the system gives it back when a process dies
        except Timeout:
            raise Locked(f"out = {self.folder}: another process is training in this folder") from None
        self.check(resume)  # again: since the first look another process may have started, or finished, a run here
        files = {"config.json": json.dumps(self.config, indent=1), "tokenizer.json": tokenizer}
        if not (self.folder / "config.json").exists():
            self._claimed = [self.folder / name for name in (*files, "log.jsonl")]
        for name, text in files.items():
            if not (self.folder / name).exists():
                write_text(self.folder / name, text)
        self._file = (self.folder / "log.jsonl").open("ab")

    def check_tokenizer(self, tokenizer: str) -> None:
        """Raise CheckpointError unless the tokenizer in the folder is this one, the corpus's."""
        if self.folder is not None:
            path = self.folder / "tokenizer.json"
            if path.read_bytes() != tokenizer.encode():
                raise CheckpointError(f"{path} is not the corpus's tokenizer: remove it, and it is written anew")

    def close(self) -> None:
        """Give the folder back; what failed before the first line of its log leaves no run behind."""
        if self._file is not None:
            self._file.close()
        for path in self._claimed:
            path.unlink(missing_ok=True)
        self._claimed = []
        if self._lock is not None:
            self._lock.release()

    def write(self, row: dict) -> None:
        """Add one line to the log."""
        self.log.append(row)
        self._claimed = []
        if self._file is not None:
            line = (json.dumps(row) + "\n").encode()
            self._file.write(line)
            self._file.flush()
            self._log_digest.update(line)
            self._log_bytes += len(line)

    def save(self, tensors: dict[str, Tensor], state: dict) -> None:
        """Replace the checkpoint. Does nothing without a folder."""
        if self.folder is None or self._file is None:
            return
        os.fsync(self._file.fileno())  # the log must be on disk before a checkpoint counts on it
        log = {"log_bytes": self._log_bytes, "log_sha256": self._log_digest.hexdigest()}
        state = {**state, **log, "config": json_digest(fixed_fields(self.config))}
        checkpoint.save(self.folder / "checkpoint.safetensors", tensors, state)

    def load(self) -> tuple[dict[str, Tensor], dict] | None:
        """The last checkpoint, None before the first; `log` becomes what it was then.

        Raises CheckpointError if checkpoint or log are damaged or the checkpoint is another run's.
        """
        if self.folder is None:
            return None
        path = self.folder / "checkpoint.safetensors"
        if not path.exists():
            return None
        tensors, state = checkpoint.load(path)
        if state.get("config") != json_digest(fixed_fields(self.config)):
            raise CheckpointError(f"{path} belongs to a run with another config than the one beside it")
        log = self.folder / "log.jsonl"
        content = log.read_bytes()[: state["log_bytes"]] if log.exists() else b""
        self._log_digest = hashlib.sha256(content)
        self._log_bytes = len(content)
        if self._log_digest.hexdigest() != state["log_sha256"]:
            raise CheckpointError(f"{log} is damaged: it is not the log that {path.name} goes on from")
        self.log = [json.loads(line) for line in content.splitlines()]
        return tensors, state

    def cut_log(self) -> None:
        """Drop the lines that a killed run wrote after its last checkpoint."""
        if self._file is not None:
            self._file.truncate(self._log_bytes)

    def finish(self, weights: dict[str, Tensor], summary: dict) -> None:
        """Write final weights and, last, the summary. Does nothing without a folder."""
        if self.folder is not None and self._file is not None:
            checkpoint.save(self.folder / "weights.safetensors", weights, {})
            write_text(self.folder / "summary.json", json.dumps(summary, indent=1))


def read_config(folder: Path) -> dict:
    """config.json of a run. Raises FileNotFoundError where there is none, CheckpointError where it is damaged."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: must be the folder of a run, there is no config.json in it")
    config = read_json(path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is damaged: must be a JSON object")
    return config


def read_json(path: Path) -> Any:
    """The JSON value in a file, of a .jsonl the list of its lines'. Raises CheckpointError where it is damaged."""
    try:
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
