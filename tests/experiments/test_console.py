"""How a command ends: by itself, with a line, or with a traceback where one is wanted."""

from __future__ import annotations

import pytest

from vwn_ref.experiments import compare, sweep, windows
from vwn_ref.experiments.console import told


@pytest.mark.parametrize("error", [ValueError("lr = -1: must be > 0"), FileNotFoundError(2, "No such file", "x.toml")])
def test_an_error_is_a_line(error, monkeypatch):
    monkeypatch.delenv("VWN_REF_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as end, told():
        raise error
    assert end.value.code == f"error: {error}"


def test_others_only_when_named(monkeypatch):
    monkeypatch.delenv("VWN_REF_TRACEBACK", raising=False)
    with pytest.raises(RuntimeError), told():
        raise RuntimeError("diverged")
    with pytest.raises(SystemExit) as end, told(RuntimeError):
        raise RuntimeError("diverged")
    assert end.value.code == "error: diverged"


def test_traceback_on_demand(monkeypatch):
    monkeypatch.setenv("VWN_REF_TRACEBACK", "1")
    with pytest.raises(ValueError), told():
        raise ValueError("lr = -1: must be > 0")


def test_ctrl_c_and_exit_statuses():
    with pytest.raises(SystemExit) as end, told():
        raise KeyboardInterrupt
    assert end.value.code == 130
    with pytest.raises(SystemExit) as end, told():
        raise SystemExit(7)
    assert end.value.code == 7


@pytest.mark.parametrize("command", [compare, windows, sweep])
def test_a_wrong_folder_or_file_is_a_line(command, tmp_path, monkeypatch):
    monkeypatch.delenv("VWN_REF_TRACEBACK", raising=False)
    monkeypatch.setattr("sys.argv", [command.__name__, str(tmp_path / "absent")])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert str(end.value.code).startswith("error: ") and "absent" in str(end.value.code)
