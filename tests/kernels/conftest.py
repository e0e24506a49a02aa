from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from vwn_ref.kernels import cpu_backend_forced
from vwn_ref.kernels.compiler import find_compiler

sys.path.insert(0, str(Path(__file__).parent))

from kept import pytest_configure  # noqa: F401

if importlib.util.find_spec("triton") is None:  # it is made for Linux
    collect_ignore_glob = ["test_triton_*.py", "test_aot.py", "test_bench.py", "test_gpu.py", "test_tune.py"]


# Of test_gpu.py: what takes longest, so that no worker is left alone with it, and what is compiled for others
FIRST = ("torch_compile", "small_sizes", "opcheck", "autocast", "8-64", "[4-16-", "1-4-4096", "2048-4096")


def pytest_collection_modifyitems(items) -> None:
    if all(item.path.name == "test_gpu.py" for item in items):
        items.sort(key=lambda item: next((k for k, part in enumerate(FIRST) if part in item.name), len(FIRST)))


@pytest.fixture(scope="session", autouse=True)
def one_preparation_a_launch():
    """Triton's interpreter prepares `triton.language` for a kernel, and again for every call of a function inside it.

    Once for each file that they come from is enough; the rest took half of the tests' time.
    """
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if not hasattr(interpreter, "_patch_lang"):
        yield
        return
    prepare, prepared = interpreter._patch_lang, set()

    def once(function):
        file = id(function.__globals__)
        if file in prepared:
            return None  # for a function inside a kernel, which does nothing with it
        first, scope = not prepared, prepare(function)
        prepared.add(file)
        if first:
            restore = scope.restore
            scope.restore = lambda: (prepared.clear(), restore())
        return scope

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", once)
        yield


needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler here")


@pytest.fixture(params=[pytest.param("c++", marks=needs_compiler), "torch"])
def either_backend(request):
    """The test runs twice: on the C++ kernels, and as on a machine without a compiler."""
    with cpu_backend_forced(request.param):
        yield request.param
