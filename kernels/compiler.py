"""Compiles `ghc_cpu.cpp` for one shape, once, and loads it; says None where that cannot be done.

One shared object per shape (m, n, d_b, scalar type) is kept in a cache directory of the user's: `$VWN_REF_CACHE`, or
`vwn_ref` in `$XDG_CACHE_HOME` or `~/.cache`. It is made readable by its owner alone, since what lies in it is loaded as
code. The name of an object is a hash of everything it was made from (source, flags, compiler version, processor), and
one of its content, which is compared before it is loaded, since a damaged object can end the process. It is compiled
under a temporary name and then renamed, so that processes compiling the same shape at once do no harm.

`$CXX` names the compiler; otherwise the first of c++, g++ and clang++ that is found.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
import warnings
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("ghc_cpu.cpp")
SCALARS = {torch.float32: "float", torch.float64: "double"}
# No -ffast-math: it would break NaN and infinity, and linking with it changes the rounding mode of the whole process.
# These two flags only say that nobody reads errno or traps floating-point exceptions.
FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
TIMEOUT = 120  # seconds that one compilation may take

_i64, _int, _double, _pointer = ctypes.c_int64, ctypes.c_int, ctypes.c_double, ctypes.c_void_p
SIGNATURES = {  # function -> arguments after (tokens, threads)
    "ghc_dynamic_width": [_double] + [_pointer] * 11,
    "ghc_dynamic_width_backward": [_double] + [_pointer] * 19,
    "ghc_dynamic_depth": [_pointer] * 4,
    "ghc_dynamic_depth_backward": [_pointer] * 5,
    "ghc_static_width": [_pointer] * 4,
    "ghc_static_width_backward": [_pointer] * 6,
    "ghc_static_depth": [_pointer] * 4,
    "ghc_static_depth_backward": [_pointer] * 5,
}

_lock = threading.Lock()
_warned = False


class Unavailable(Exception):
    """No shared object: the message says why."""


def words(variable: str) -> list[str]:
    """An environment variable, cut as a shell would. Raises Unavailable where it cannot be."""
    text = os.environ.get(variable, "")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise Unavailable(f"{variable} = {text!r}: must be words, quoted as for a shell: {error}") from error


@functools.cache
def find_compiler() -> tuple[str, ...] | None:
    """The compiler's command, `$CXX` (which may carry flags) or the first one on PATH; None where there is none.
    Raises Unavailable for a `$CXX` that is no command line."""
    for command in (words("CXX"), ["c++"], ["g++"], ["clang++"]):
        if command and shutil.which(command[0]):
            return tuple(command)
    return None


def cache_dir() -> Path:
    """The cache directory, made with mode 0700. Raises Unavailable where it belongs to somebody else."""
    chosen = os.environ.get("VWN_REF_CACHE")
    path = Path(chosen or os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    path = path if chosen else path / "vwn_ref"
    try:
        path = path.expanduser().absolute()  # a bare file name would be searched on the library path
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        raise Unavailable(f"no cache directory {path}: {error}") from error
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        raise Unavailable(f"cache directory {path}: must be yours and writable by nobody else; set VWN_REF_CACHE")
    return path


@functools.cache
def _machine() -> str:
    """What -march=native depends on."""
    text = f"{platform.system()} {platform.machine()}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        text += "".join(sorted({x for x in lines if x.startswith(("model name", "flags", "Features", "CPU part"))}))
    except OSError:
        text += platform.processor()
    return text


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"{command[0]}: {error}") from error
    if done.returncode:
        raise Unavailable(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return done.stdout


@functools.cache
def _compiler_version(compiler: tuple[str, ...]) -> str:
    return _run([*compiler, "--version"])


def _compile(m: int, n: int, d: int, scalar: str) -> Path:
    compiler = find_compiler()
    if compiler is None:
        raise Unavailable("no C++ compiler: set CXX, or put c++, g++ or clang++ on the PATH")
    defines = [f"-DGHC_M={m}", f"-DGHC_N={n}", f"-DGHC_D={d}", f"-DGHC_SCALAR={scalar}"]
    extra = words("VWN_REF_CXXFLAGS")
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    arguments = [*FLAGS, native, *extra, *defines]
    parts = (SOURCE.read_text(), *arguments, *compiler, _compiler_version(compiler), _machine())
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    folder, name = cache_dir(), f"ghc_{m}_{n}_{d}_{scalar}_{digest}"
    for kept in folder.glob(f"{name}_*.so"):
        if kept.stem == f"{name}_{_content_digest(kept)}":
            return kept
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".building_", suffix=".so")
    os.close(handle)
    try:
        _run([*compiler, *arguments, str(SOURCE), "-o", temporary])
        target = folder / f"{name}_{_content_digest(Path(temporary))}.so"
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target


def _content_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:24]


def _open(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        for name, arguments in SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes = [_i64, _int, *arguments]
            function.restype = None
    except (OSError, AttributeError) as error:
        raise Unavailable(f"{path}: {error}") from error
    return library


def _build(m: int, n: int, d: int, dtype: torch.dtype) -> ctypes.CDLL:
    path = _compile(m, n, d, SCALARS[dtype])
    try:
        return _open(path)
    except Unavailable:  # made with libraries that are no longer there, perhaps: once more from the source
        path.unlink(missing_ok=True)
        return _open(_compile(m, n, d, SCALARS[dtype]))


_libraries: dict[tuple, ctypes.CDLL | None] = {}


def library(m: int, n: int, d: int, dtype: torch.dtype) -> ctypes.CDLL | None:
    """The functions of `ghc_cpu.cpp` for this shape, compiled if need be; None (and one warning) where that fails."""
    global _warned
    key = (m, n, d, dtype)
    try:
        return _libraries[key]
    except KeyError:
        pass
    with _lock:
        if key not in _libraries:
            try:
                _libraries[key] = _build(m, n, d, dtype)
            except (Unavailable, OSError) as reason:  # OSError: a cache that cannot be written
                _libraries[key] = None
                if not _warned:
                    _warned = True
                    warnings.warn(f"GHC runs on PyTorch operations, slower: {reason}", RuntimeWarning, stacklevel=2)
    return _libraries[key]
