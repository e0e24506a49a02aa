"""What the notebooks share: the exercise checker. Plotting is in `vwn_ref.experiments.plots`."""

from __future__ import annotations

from collections.abc import Callable

import torch


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
        if not isinstance(got, tuple) or len(got) != len(want):
            return f"expected {len(want)} results, got {len(got) if isinstance(got, tuple) else 1}"
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
