from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from vwn_ref.kernels import cpu_backend_forced
from vwn_ref.kernels.compiler import find_compiler

sys.path.insert(0, str(Path(__file__).parent))

if importlib.util.find_spec("triton") is None:  # it is made for Linux
    collect_ignore_glob = ["test_triton_*.py", "test_aot.py", "test_bench.py", "test_gpu.py"]

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler here")


@pytest.fixture(params=[pytest.param("c++", marks=needs_compiler), "torch"])
def either_backend(request):
    """The test runs twice: on the C++ kernels, and as on a machine without a compiler."""
    with cpu_backend_forced(request.param):
        yield request.param
