"""Files that are there whole or not at all: atomic writes, digests, and cached folders with a manifest."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

MANIFEST = "manifest.json"


def sync(path: Path) -> None:
    """Force the file or folder `path` to disk; a no-op for folders where the system has no such call."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary)` and move the result to `path`: a reader sees the old file or the new one.

    What a killed writer leaves behind is `.<name>.tmp`, which nothing reads and the next writer replaces;
    one writer at a time, then.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:  # a full disk, Ctrl-C
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_whole` for a string, as UTF-8 with newlines as given."""
    write_whole(path, lambda temporary: temporary.write_bytes(text.encode()))


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(value: object) -> str:
    """SHA-256 of a JSON value, in hex; equal values give equal digests."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def cached_folder(folder: Path, build: Callable[[Path], dict]) -> dict:
    """The manifest of `folder`, which `build` fills first if it is missing or damaged.

    `build(temporary)` writes its files into an empty folder and returns facts about them, a JSON object.
    The manifest is those facts and, under "files", the size and SHA-256 of every file; they are checked at
    every call. Processes that ask for the same folder at once wait for the first of them to build it.

    Raises OSError if a damaged folder cannot be removed, and whatever `build` raises.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        manifest = intact(folder)
        if manifest is not None:
            return manifest
        if folder.exists():
            shutil.rmtree(folder)
        # Builders hold the lock, so any older temporary folder of this name belongs to a killed process.
        for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
        temporary.mkdir()
        try:
            manifest = build(temporary)
            files = sorted(temporary.iterdir())
            manifest["files"] = {f.name: {"bytes": f.stat().st_size, "sha256": file_digest(f)} for f in files}
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
            for path in (*files, temporary / MANIFEST, temporary):
                sync(path)
            os.replace(temporary, folder)
            sync(folder.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return manifest


def intact(folder: Path) -> dict | None:
    """The manifest of `folder` if every file is as it says, else None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, entry in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != entry["bytes"] or file_digest(path) != entry["sha256"]:
                return None
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return manifest


def between(text: str, begin: str, end: str, part: str) -> str:
    """`text` with `part` between two of its lines. Raises ValueError unless they are there, once and in this order."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the file must have the lines {begin} and {end}, once and in this order")
    return text[: text.index(begin) + len(begin)] + f"\n{part}\n" + text[text.index(end) :]
