"""What the notebooks share: the exercise checker, and a counter of what Triton kernels read and write.

Plotting is in `vwn_ref.experiments.plots`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from vwn_ref.cost import Traffic


def check(student: Callable, reference: Callable, *cases: tuple, tolerance: float = 1e-5) -> None:
    """Call both functions on every case (a tuple of arguments) and print what differs, if anything does.

    Results may be numbers, tensors, or tuples of them. `tolerance` is relative to the largest expected entry.
    """
    for number, case in enumerate(cases, start=1):
        want = reference(*copies(case))
        try:
            got = student(*copies(case))
        except Exception as error:  # a student's function may fail in any way; say how
            print(f"✗ case {number} of {len(cases)}: raised {type(error).__name__}: {error}")
            return
        problem = difference(got, want, tolerance)
        if problem:
            print(f"✗ case {number} of {len(cases)}: {problem}")
            return
    print(f"✓ correct in all {len(cases)} cases")


def copies(case: tuple) -> list:
    """The arguments, tensors cloned, so that a function that writes into them spoils nothing."""
    return [value.clone() if isinstance(value, torch.Tensor) else value for value in case]


def difference(got: object, want: object, tolerance: float) -> str | None:
    """What is wrong with `got`, in words, or None."""
    if got is None:
        return "it returned None; is there a return statement?"
    if isinstance(want, tuple):
        if not isinstance(got, (tuple, list)) or len(got) != len(want):
            return f"expected {len(want)} results, got {len(got) if isinstance(got, (tuple, list)) else 1}"
        for index, pair in enumerate(zip(got, want, strict=True)):
            if problem := difference(*pair, tolerance):
                return f"result {index}: {problem}"
        return None
    try:
        got, want = (torch.as_tensor(value, dtype=torch.float64) for value in (got, want))
    except (TypeError, ValueError, RuntimeError):
        return f"expected a number or a tensor, got {type(got).__name__}"
    if got.shape != want.shape:
        return f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    off = ~((got - want).abs() <= tolerance * max(1e-12, want.abs().max().item() if want.numel() else 0.0))
    if not off.any():
        return None
    where = tuple(off.nonzero()[0].tolist())
    place = f"entry {list(where)}" if where else "the value"
    return f"{int(off.sum())} of {off.numel()} entries differ; {place} is {got[where]:.4g}, expected {want[where]:.4g}"


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
