"""Shared by all tests: one thread a worker, shapes checked, a seed, and what nbval does not compare."""

import importlib.util
import os
from pathlib import Path

# Before torch is imported, and inherited by the notebooks' kernels: two workers with two threads each on two cores
# only wait for each other, and with one thread a sum is taken in the same order everywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jaxtyping
import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "vwn_ref"

# Every annotated function of vwn_ref checks the shapes and types of its arguments and results while under test.
# Module by module, because `--jaxtyping-packages=vwn_ref` would take vwn_ref.kernels as well: there the hook wraps what
# stands under @triton.jit, and Triton then looks up the kernel's globals in jaxtyping.
if importlib.util.find_spec("beartype") is not None:  # a GPU machine that one may not install on can lack it
    jaxtyping.install_import_hook(
        [f"vwn_ref.{file.stem}" for file in PACKAGE.glob("*.py") if file.stem != "__init__"] + ["vwn_ref.experiments"],
        "beartype.beartype",
    )

import torch  # noqa: E402 -- after OMP_NUM_THREADS

# Before Triton is imported: without a GPU its kernels are interpreted on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as it is used; unset, Triton warns that it will change


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random state, whichever ran before it."""
    torch.manual_seed(0)


QUICK = {}  # loaded libraries
HERE = Path(__file__).parent
AS_SHIPPED = ("test_cpu_values.py", "test_readme.py", "test_packaging.py")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request):
    """The C++ kernels with -O0: the tests here and in kernels/ compile close to a hundred shapes and time none.

    As they are shipped in `AS_SHIPPED`, which looks at the values of many shapes, and in the other folders, which
    compare what this process trains with what others do: -O0 rounds differently. Hence libraries of their own.
    """
    if request.path.parent not in (HERE, HERE / "kernels") or request.path.name in AS_SHIPPED:
        yield
        return
    from vwn_ref.kernels import compiler

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VWN_REF_CXXFLAGS", "-O0")
        patch.setattr(compiler, "_libraries", QUICK)
        yield


@pytest.fixture
def no_shape_checks(monkeypatch):
    """For tests of a function's own error message: with the checks on, jaxtyping is the first to complain."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def pytest_configure():
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items):
    """nbval ignores PNG. A warning on stderr that another machine gives, and SVG, are not compared either.

    The lesson on Triton kernels is left out where there is no Triton.
    """
    if importlib.util.find_spec("triton") is None:
        for item in items:
            if item.path.name.startswith("06_"):
                item.add_marker(pytest.mark.skip(reason="Triton is not installed: it is made for Linux"))
    for file in {item.parent for item in items if hasattr(item.parent, "skip_compare")}:
        file.skip_compare += ("stderr", "image/svg+xml")
