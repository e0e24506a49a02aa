"""The interpreter as these tests use it (quick.py) computes what Triton's own does."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import test_triton_values as values
import torch
from quick import make_quick
from triton.language import core
from triton.language.semantic import TritonSemantic
from vwn_ref.kernels import fused, launch

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="nothing is interpreted here")


@pytest.fixture
def as_it_is(quick):
    """as_it_is(): from here to the end of the test with Triton's own interpreter."""
    yield quick.undo
    quick.undo()
    make_quick(quick)


@pytest.mark.parametrize("n, dtype", [(4, torch.float16), (6, torch.bfloat16), (18, torch.float32)], ids=str)
def test_the_same_bits(n, dtype, as_it_is):
    found = values.two_sublayers(fused, 2, n, 12, (3,), dtype)
    make_block = core.block_type.__init__
    as_it_is()
    assert core.block_type.__init__ is not make_block
    wanted = values.two_sublayers(fused, 2, n, 12, (3,), dtype)
    assert found.keys() == wanted.keys()
    for name, exact in wanted.items():
        assert exact.dtype == found[name].dtype and torch.equal(exact, found[name]), name


def test_what_is_wrong_is_refused_as_before():
    with pytest.raises(ValueError, match="power of 2"):
        core.block_type(core.float32, [4, 3])
    with pytest.raises(TypeError, match="0d block_type"):
        core.block_type(core.float32, [])
    assert core.block_type(core.float32, [core.constexpr(4), 8]) == core.block_type(core.float32, [4, 8])
    for _ in range(2):  # made, and remembered
        for dtype, name in ((core.float32, "fp32"), (core.float16, "fp16")):
            block = core.block_type(dtype, [4, 8])
            assert (str(block), block.numel, list(block.shape)) == (f"<['4', '8'], {name}>", 32, [4, 8])
            assert block.element_ty is dtype and block != core.block_type(dtype, [8, 4])
        assert core.block_type(core.float32, [4, 8]) != core.block_type(core.float16, [4, 8])
    assert core.dtype("fp32") == core.float32 != core.float16 and core.dtype("fp32") is not core.float32


def test_overflow_is_looked_for_where_it_is_asserted():
    for debug in (False, True):
        semantic = SimpleNamespace(builder=SimpleNamespace(options=SimpleNamespace(debug=debug)))
        with pytest.raises(AttributeError, match="type") if debug else contextlib.nullcontext():  # of None
            TritonSemantic.binary_op_sanitize_overflow_impl(semantic, None, None, None)
