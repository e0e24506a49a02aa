"""What the notebooks share: the exercise checker, and a counter of what Triton kernels read and write.

Plotting is in `vwn_ref.experiments.plots`.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from numbers import Number

import numpy as np
import torch

from vwn_ref.cost import Traffic


def check(student: Callable, reference: Callable, *cases: tuple, tolerance: float = 1e-5) -> None:
    """Call both functions on every case (a tuple of arguments) and print what differs, if anything does.

    Results may be numbers, tensors, or tuples of them. `tolerance` is relative to the largest expected entry.
    """
    changed = False
    for number, case in enumerate(cases, start=1):
        want, given = reference(*copies(case)), copies(case)
        try:
            got = student(*given)
        except Exception as error:  # a student's function may fail in any way; say how and where
            print(f"✗ case {number} of {len(cases)}: raised {type(error).__name__}: {error}{line_of(error, student)}")
            return
        problem = "it returned None; is there a return statement?" if got is None else difference(got, want, tolerance)
        if problem:
            print(f"✗ case {number} of {len(cases)}: {problem}")
            return
        pairs = zip(case, given, strict=True)
        changed |= any(isinstance(a, torch.Tensor) and not torch.equal(a, b) for a, b in pairs)
    warning = "; but it writes into a tensor that it is given: whoever calls it loses theirs" if changed else ""
    print(f"✓ correct in all {len(cases)} cases{warning}")


def copies(case: tuple) -> list:
    """The arguments, copied, so that a function that writes into them spoils nothing."""
    return [value.clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value) for value in case]


def line_of(error: Exception, student: Callable) -> str:
    """The line of the student's own cell in which it happened, in words."""
    cell = getattr(getattr(student, "__code__", None), "co_filename", None)
    lines = [frame.line for frame in traceback.extract_tb(error.__traceback__) if frame.filename == cell and frame.line]
    return f" (in the line {lines[-1]!r})" if lines else ""


def difference(got: object, want: object, tolerance: float) -> str | None:
    """What is wrong with `got`, in words, or None."""
    if isinstance(want, tuple):
        array = isinstance(got, (np.ndarray, torch.Tensor))
        stacked = array and got.ndim > 0 and all(tuple(got.shape[1:]) == np.shape(one) for one in want)
        if not (isinstance(got, (tuple, list)) or stacked or (array and got.ndim == 1)):
            shape = f" of shape {tuple(got.shape)}" if array else ""
            return f"expected {len(want)} results, a tuple, got one {type(got).__name__}{shape}"
        if len(got) != len(want):
            return f"expected {len(want)} results, got {len(got)}"
        for number, pair in enumerate(zip(got, want, strict=True), start=1):
            if problem := difference(*pair, tolerance):
                return f"result {number} of {len(want)}: {problem}"
        return None
    try:
        if isinstance(got, np.ndarray):  # PyTorch takes no negative strides
            got = np.array(got, dtype=complex if np.iscomplexobj(got) else float)
        if isinstance(got, Number) and not isinstance(got, complex):
            got = float(got)  # a Fraction, too
        found = torch.as_tensor(got)
        if found.is_complex():
            return "expected real numbers, got complex ones"
        got, want = found.to(torch.float64), torch.as_tensor(want, dtype=torch.float64)
        if got.shape != want.shape:
            return f"shape {tuple(got.shape)}, expected {tuple(want.shape) or 'a single number'}"
        apart = (got - want).abs()
        near = tolerance * max([1e-12, *want[want.isfinite()].abs().tolist()])
        off = ~((apart <= near) | (got == want))  # inf - inf is no number
    except Exception:  # whatever PyTorch raises for what is no ordinary tensor
        rows = isinstance(got, (tuple, list)) and any(isinstance(row, torch.Tensor) for row in got)
        return f"expected a number or a tensor, got {type(got).__name__}{' (torch.stack makes one of rows)' * rows}"
    if not off.any():
        return None
    worst = int(torch.where(off, apart.nan_to_num(torch.inf), -1.0).argmax())
    where = tuple(int(i) for i in np.unravel_index(worst, off.shape))
    place = f"entry {list(where)}" if where else "the value"
    is_, expected = in_digits(got[where].item(), want[where].item())
    coarse = f" (yours are of {found.dtype})" if found.dtype in (torch.float16, torch.bfloat16) else ""
    return f"{int(off.sum())} of {off.numel()} entries differ; {place} is {is_}, expected {expected}{coarse}"


def in_digits(one: float, other: float) -> tuple[str, str]:
    """Both in so many digits that they look different; whole numbers in full."""
    if one.is_integer() and other.is_integer():
        return f"{one:.0f}", f"{other:.0f}"
    pairs = ((f"{one:.{digits}g}", f"{other:.{digits}g}") for digits in range(4, 18))
    return next((pair for pair in pairs if pair[0] != pair[1]), (str(one), str(other)))


class KernelTraffic:
    """What Triton kernels read from memory and write to it, seen in Triton's interpreter (TRITON_INTERPRET=1).

        with KernelTraffic() as traffic:
            kernel[(4,)](H, X, ...)
        traffic.of(H)  # Traffic(read=..., write=...), numbers of H

    Within one launch a number is counted once, however often it is asked for, and it is not counted as read where the
    launch has written it before: what is left has to come from memory even if the cache keeps everything else.
    """

    _watched = ("create_masked_load", "create_masked_store", "set_grid_dim")

    def __enter__(self) -> KernelTraffic:
        from triton.runtime.interpreter import interpreter_builder as builder

        self.launches: list[dict[str, set[int]]] = []  # addresses
        original = {name: getattr(builder, name) for name in self._watched}

        def addresses(pointers, mask) -> set[int]:
            return set(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].tolist())

        def load(pointers, mask, *rest):
            launch = self.launches[-1]
            launch["read"] |= addresses(pointers, mask) - launch["write"]
            return original["create_masked_load"](pointers, mask, *rest)

        def store(pointers, value, mask, *rest):
            self.launches[-1]["write"] |= addresses(pointers, mask)
            return original["create_masked_store"](pointers, value, mask, *rest)

        def begin(*grid):
            self.launches.append({"read": set(), "write": set()})
            return original["set_grid_dim"](*grid)

        for name, function in zip(self._watched, (load, store, begin), strict=True):
            setattr(builder, name, function)
        return self

    def __exit__(self, *exception: object) -> None:
        from triton.runtime.interpreter import interpreter_builder as builder

        for name in self._watched:
            delattr(builder, name)  # what was set on the object; the class has the original

    def of(self, tensor: torch.Tensor) -> Traffic:
        """How many numbers of a contiguous `tensor` all launches together read and wrote; it must still be alive."""
        first = tensor.data_ptr()
        behind = first + tensor.numel() * tensor.element_size()

        def count(kind: str) -> int:
            return sum(first <= address < behind for launch in self.launches for address in launch[kind])

        return Traffic(count("read"), count("write"))
