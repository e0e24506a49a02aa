from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from vwn_ref.kernels import cpu_backend_forced
from vwn_ref.kernels.compiler import find_compiler

sys.path.insert(0, str(Path(__file__).parent))

from kept import pytest_configure  # noqa: F401
from quick import make_quick

if importlib.util.find_spec("triton") is None:  # it is made for Linux
    collect_ignore_glob = ["test_triton_*.py", "test_aot.py", "test_bench.py", "test_gpu.py", "test_tune.py"]


# Of test_gpu.py: what takes longest, so that no worker is left alone with it, and what is compiled for others
FIRST = ("torch_compile", "small_sizes", "opcheck", "autocast", "8-64", "[4-16-", "1-4-4096", "2048-4096")


def pytest_collection_modifyitems(items) -> None:
    if all(item.path.name == "test_gpu.py" for item in items):
        items.sort(key=lambda item: next((k for k, part in enumerate(FIRST) if part in item.name), len(FIRST)))


@pytest.fixture(scope="session", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        yield patch


needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler here")


@pytest.fixture(params=[pytest.param("c++", marks=needs_compiler), "torch"])
def either_backend(request):
    """The test runs twice: on the C++ kernels, and as on a machine without a compiler."""
    with cpu_backend_forced(request.param):
        yield request.param
