"""A line for each test that is done, in a file, where on_gpu.py asks for one."""

from __future__ import annotations

import json
import os


class Kept:
    """Writes at once, to a file that is open as long as pytest runs."""

    def __init__(self, path: str) -> None:
        self.file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            row = {"test": report.nodeid.split("::")[-1], "outcome": report.outcome}
            why = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
            self.file.write(json.dumps(row | {"seconds": round(report.duration, 1), "why": why[-4000:]}) + "\n")


def pytest_configure(config) -> None:
    path = os.environ.get("VWN_REF_TESTS_KEPT")
    if path and not hasattr(config, "workerinput"):  # what workers report comes to the first process, too
        config.pluginmanager.register(Kept(path))
