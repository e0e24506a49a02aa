from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from vwn_ref.kernels import compiler, cpu_backend_forced
from vwn_ref.kernels.compiler import find_compiler

sys.path.insert(0, str(Path(__file__).parent))

if importlib.util.find_spec("triton") is None:  # it is made for Linux
    collect_ignore_glob = ["test_triton_*.py", "test_aot.py", "test_bench.py", "test_gpu.py"]

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler here")


QUICK = {}  # loaded libraries


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """-O1: these tests compile some twenty shapes and time none of them.

    Kept apart from the user's own objects, on disk and in this process: -O1 rounds differently, and tests of other
    folders compare what this process trains with what others do.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VWN_REF_CXXFLAGS", "-O1")
        patch.setattr(compiler, "_libraries", QUICK)
        yield


@pytest.fixture(params=[pytest.param("c++", marks=needs_compiler), "torch"])
def either_backend(request):
    """The test runs twice: on the C++ kernels, and as on a machine without a compiler."""
    with cpu_backend_forced(request.param):
        yield request.param
