"""Triton's interpreter, quicker: what it works out again for every operation on a tensor is remembered.

Two thirds of the time of the interpreted tests went into types made anew, their names and shapes, and into checks of
integer overflow that nothing asserted. The results are the same bits (test_triton_quick).
"""

from __future__ import annotations

import functools
import math
import sys

import pytest


def make_quick(patch: pytest.MonkeyPatch) -> None:
    """Until `patch` is undone; nothing where kernels are compiled, or where the interpreter is not as expected here."""
    interpreter, launch = (sys.modules.get(name) for name in ("triton.runtime.interpreter", "vwn_ref.kernels.launch"))
    if getattr(launch, "INTERPRETED", False) and hasattr(interpreter, "_patch_lang"):
        patch.setattr(interpreter, "_patch_lang", one_preparation_a_launch(interpreter._patch_lang))
        remember_types(patch, interpreter)
        leave_out_what_is_not_asserted(patch)


def one_preparation_a_launch(prepare):
    """The interpreter prepares `triton.language` for a kernel, and again for every call of a function inside it.

    Once for each file that they come from is enough; the rest took half of the tests' time.
    """
    prepared = set()

    def once(function):
        file = id(function.__globals__)
        if file in prepared:
            return None  # for a function inside a kernel, which does nothing with it
        first, scope = not prepared, prepare(function)
        prepared.add(file)
        if first and scope is not None:  # Triton 3.5 restores by itself
            restore = scope.restore
            scope.restore = lambda: (prepared.clear(), restore())
        return scope

    return once


def remember_types(patch, interpreter) -> None:
    """Shapes, names and NumPy's types, which are made for every tensor."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic

    make_block, equal, np_dtype = core.block_type.__init__, core.dtype.__eq__, interpreter._get_np_dtype
    broadcast = TritonSemantic.broadcast_impl_value
    shapes, blocks, np_dtypes = {}, {}, {}

    def block(self, element_ty, shape):
        sizes = tuple(shape)
        key = (sizes, element_ty.name) if all(type(size) is int for size in sizes) else None
        if key not in blocks:
            make_block(self, element_ty, shape)
            if key is None:
                return
            blocks[key] = shapes.setdefault(sizes, self.shape), self.numel, self.name
        self.element_ty, (self.shape, self.numel, self.name) = element_ty, blocks[key]

    @functools.cache
    def sizes_of(shape):
        return core.constexpr(math.prod(shape)), core.tuple([core.constexpr(size) for size in shape])

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = sizes_of(tuple(type.shape) if type.is_block() else ())

    def broadcast_once(self, lhs, rhs):
        same = getattr(lhs.type, "shape", None) is getattr(rhs.type, "shape", None)  # one shape, or two scalars
        return (lhs, rhs) if same else broadcast(self, lhs, rhs)

    def np_dtype_of(dtype):
        name = dtype.scalar.name
        if name not in np_dtypes:
            np_dtypes[name] = np_dtype(dtype)
        return np_dtypes[name]

    patch.setattr(core.block_type, "__init__", block)
    patch.setattr(core.tensor, "__init__", tensor)
    patch.setattr(core.dtype, "__eq__", lambda self, other: self is other or equal(self, other))
    patch.setattr(interpreter, "_get_np_dtype", np_dtype_of)
    patch.setattr(TritonSemantic, "broadcast_impl_value", broadcast_once)


def leave_out_what_is_not_asserted(patch) -> None:
    """Whether integers overflow is worked out by a dozen operations, and asserted with `debug` alone."""
    from triton.language.semantic import TritonSemantic

    check = TritonSemantic.binary_op_sanitize_overflow_impl

    def checked(self, *arguments):
        if self.builder.options.debug:
            check(self, *arguments)

    patch.setattr(TritonSemantic, "binary_op_sanitize_overflow_impl", checked)
