"""Which code computes a GHC on the CPU: compiled C++, or PyTorch operations where there is no compiler."""

from __future__ import annotations

import contextlib
import os

import torch
from torch import Tensor
from vwn_ref.kernels import compiler, cpu_cpp, cpu_torch

CHOICES = ("c++", "torch")
_forced: str | None = None


def _wanted() -> str | None:
    """What somebody asked for: `cpu_backend_forced`, or the environment variable; None: the fastest there is."""
    wanted = _forced or os.environ.get("VWN_REF_CPU_BACKEND") or None
    if wanted is not None and wanted not in CHOICES:
        raise ValueError(f"VWN_REF_CPU_BACKEND = {wanted!r}: must be one of {', '.join(map(repr, CHOICES))}")
    return wanted


def of(m: int, n: int, slot_width: int, dtype: torch.dtype):
    """The raw operations for a shape: an object with the functions of `cpu_torch`."""
    if _wanted() != "torch":
        library = compiler.library(m, n, slot_width, dtype)
        if library is not None:
            return cpu_cpp.Operations(library)
        if _wanted() == "c++":
            raise RuntimeError(
                f"VWN_REF_CPU_BACKEND = 'c++': must compile here, for m = {m}, n = {n}, d_b = {slot_width}, {dtype}"
            )
    return cpu_torch


@torch.compiler.assume_constant_result
def is_compiled(m: int, n: int, slot_width: int, dtype: torch.dtype) -> bool:
    """True where the C++ kernels run for this shape. While tracing this is asked once, and compiles for real."""
    return of(m, n, slot_width, dtype) is not cpu_torch


def of_state(H: Tensor, m: int):
    """The raw operations for a state H [..., n, d_b]."""
    return of(m, H.shape[-2], H.shape[-1], H.dtype)


def cpu_backend() -> str:
    """ "c++" where the compiled kernels run on this machine, "torch" where PyTorch operations stand in for them.

    Compiles the smallest shape (a few seconds the first time; later calls and processes find it in the cache).
    """
    return "c++" if is_compiled(1, 1, 4, torch.float32) else "torch"


@contextlib.contextmanager
def cpu_backend_forced(name: str | None):
    """Within this context: "c++", or RuntimeError where it does not compile, or "torch"; None lifts it. What neither is
    made for (see `vwn_ref.kernels.cpu`) still goes to the reference.

    For tests and timings; the environment's VWN_REF_CPU_BACKEND does the same for a process.
    """
    global _forced
    if name is not None and name not in CHOICES:
        raise ValueError(f"name = {name!r}: must be one of {', '.join(map(repr, CHOICES))} or None")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before
