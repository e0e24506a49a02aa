"""Compiling on first use: caches, damage, races, and no compiler at all."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from conftest import needs_compiler
from vwn_ref.kernels import compiler, cpu_backend, cpu_backend_forced

CHECK = """
    import torch
    from vwn_ref.dynamic import DynamicGHC
    from vwn_ref.kernels import cpu_backend
    ghcs = [DynamicGHC(4, 1, 1, kernels=k) for k in ("cpu", "reference")]
    H, out = torch.randn(5, 1, 4), []
    for ghc in ghcs:
        torch.manual_seed(0)
        for p in ghc.parameters():
            torch.nn.init.normal_(p)
        out.append(ghc(H, torch.tanh))
    torch.testing.assert_close(*out)
    print(cpu_backend())
"""


def _start(**environment) -> subprocess.Popen:
    kept = {k: v for k, v in os.environ.items() if k not in ("CXX", "VWN_REF_CPU_BACKEND")}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHECK)], env=kept | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache, and a process that has loaded nothing and warned of nothing."""
    monkeypatch.setenv("VWN_REF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "_libraries", {})
    monkeypatch.setattr(compiler, "_warned", False)
    return tmp_path / "cache"


def test_without_a_compiler_it_works_and_says_so_once(tmp_path):
    process = _start(PATH="", VWN_REF_CACHE=str(tmp_path))
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert out.strip() == "torch"
    assert error.count("RuntimeWarning: GHC runs on PyTorch operations, slower: no C++ compiler") == 1


@needs_compiler
def test_two_processes_compile_at_once(tmp_path):
    processes = [_start(VWN_REF_CACHE=str(tmp_path)) for _ in range(2)]
    for process in processes:
        out, error = process.communicate()
        assert process.returncode == 0 and "Warning" not in error, error
        assert out.strip() == "c++"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 1 and names[0].startswith("ghc_1_1_4_float"), names  # no temporary files left


@needs_compiler
def test_the_cache_is_private_and_used_again(fresh, monkeypatch):
    assert compiler.library(1, 1, 4, torch.float32) is not None
    assert stat.S_IMODE(fresh.stat().st_mode) == 0o700
    (made,) = fresh.iterdir()
    time = made.stat().st_mtime_ns
    monkeypatch.setattr(compiler, "_libraries", {})
    assert compiler.library(1, 1, 4, torch.float32) is not None
    assert [p.stat().st_mtime_ns for p in fresh.iterdir()] == [time]


@needs_compiler
@pytest.mark.parametrize("kept", [0, 10, 1000, 8192, -1])
def test_a_damaged_object_is_made_again(fresh, kept):
    """Some of these the loader would refuse, others end the process with SIGBUS."""
    made = compiler._compile(1, 1, 4, "float")  # not loaded: a loader that has a path open does not look at it again
    whole = made.read_bytes()
    made.write_bytes(whole[:kept])
    assert compiler.library(1, 1, 4, torch.float32) is not None
    assert [path.read_bytes() for path in fresh.iterdir()] == [whole]


@needs_compiler
def test_a_damaged_byte_is_seen(fresh):
    made = compiler._compile(1, 1, 4, "float")
    whole = made.read_bytes()
    made.write_bytes(whole[:4096] + bytes(64) + whole[4160:])
    assert compiler.library(1, 1, 4, torch.float32) is not None
    assert [path.read_bytes() for path in fresh.iterdir()] == [whole]


@needs_compiler
def test_what_does_not_load_is_made_again(fresh, monkeypatch):
    """Of another libc, say: whole, and of no use."""
    opened = []

    def once(path, load=compiler._open):
        opened.append(path)
        if len(opened) == 1:
            raise compiler.Unavailable("no such symbol")
        return load(path)

    monkeypatch.setattr(compiler, "_open", once)
    assert compiler.library(1, 1, 4, torch.float32) is not None and len(opened) == 2


@needs_compiler
@pytest.mark.parametrize("variable", ["CXX", "VWN_REF_CXXFLAGS"])
def test_a_quote_that_does_not_end(fresh, monkeypatch, variable):
    monkeypatch.setenv(variable, '-O2 "x')
    compiler.find_compiler.cache_clear()
    try:
        _falls_back(f"{variable} = '-O2 \"x': must be words, quoted as for a shell")
    finally:
        compiler.find_compiler.cache_clear()


def _falls_back(reason: str) -> None:
    with pytest.warns(RuntimeWarning, match=reason):
        assert compiler.library(1, 1, 4, torch.float32) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one warning is enough
        assert compiler.library(1, 1, 5, torch.float32) is None


@needs_compiler
def test_a_compiler_that_fails(fresh, monkeypatch):
    monkeypatch.setenv("VWN_REF_CXXFLAGS", "-no-such-flag-anywhere")
    _falls_back("no-such-flag-anywhere")
    assert list(fresh.iterdir()) == []


@needs_compiler
def test_a_cache_that_others_may_write_is_not_trusted(fresh):
    fresh.mkdir()
    fresh.chmod(0o777)
    _falls_back("writable by nobody else")


@needs_compiler
def test_a_cache_that_cannot_be_made(fresh, monkeypatch):
    fresh.write_text("a file where the directory should be")
    _falls_back("no cache directory")


@needs_compiler
def test_a_cache_that_cannot_be_written(fresh, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(compiler.tempfile, "mkstemp", refuse)
    _falls_back("Read-only file system")


@needs_compiler
def test_no_home_at_all(fresh, monkeypatch):
    def nobody(path):
        raise RuntimeError("Could not determine home directory.")

    for name in ("VWN_REF_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(compiler.Path, "expanduser", nobody)
    _falls_back("Could not determine home")


@needs_compiler
@pytest.mark.parametrize("chosen", [".", "~/größe mit leerzeichen"])
def test_where_the_cache_may_be(fresh, monkeypatch, chosen):
    fresh.mkdir(mode=0o700)
    monkeypatch.chdir(fresh)
    monkeypatch.setenv("HOME", str(fresh))
    monkeypatch.setenv("VWN_REF_CACHE", chosen)
    assert compiler.library(1, 1, 4, torch.float32) is not None
    assert len(list(fresh.rglob("ghc_1_1_4_float_*.so"))) == 1 and not (fresh / "~").exists()


def test_nothing_is_compiled_at_import(tmp_path):
    code = "import vwn_ref, vwn_ref.kernels.cpu; vwn_ref.DynamicGHC(8, 2, 3); from vwn_ref.kernels import compiler; "
    code += "assert not compiler._libraries"
    environment = os.environ | {"VWN_REF_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "cache").exists()


def test_the_name_says_what_it_was_made_from(fresh, monkeypatch, tmp_path):
    """Another source, flag or compiler version is another file; an old object is never taken for a new one."""

    def name():
        return compiler._compile(1, 1, 4, "float").name

    monkeypatch.setattr(compiler, "_run", lambda command: "")
    first = name()
    assert name() == first
    monkeypatch.setattr(compiler, "_compiler_version", lambda command: "another")
    second = name()
    monkeypatch.setenv("VWN_REF_CXXFLAGS", "-DANOTHER")
    third = name()
    (tmp_path / "ghc_cpu.cpp").write_text(compiler.SOURCE.read_text() + "\n")
    monkeypatch.setattr(compiler, "SOURCE", tmp_path / "ghc_cpu.cpp")
    assert len({first, second, third, name()}) == 4


def test_what_was_asked_for_is_there_or_an_error(fresh, monkeypatch):
    monkeypatch.setattr(compiler, "library", lambda *shape: None)
    with cpu_backend_forced("c++"), pytest.raises(RuntimeError, match=r"VWN_REF_CPU_BACKEND = 'c\+\+': must compile"):
        cpu_backend()
    with cpu_backend_forced("torch"):
        assert cpu_backend() == "torch"
    assert cpu_backend() == "torch"
