"""Fast versions of the operations of `vwn_ref.ghc` and `vwn_ref.dynamic`: the same functions, the same arguments.

    cpu            width, dynamic_width, depth on CPU tensors, float32 and float64
    cpu_backend()  what computes them here: "c++" compiled on first use, or "torch"

Nothing is compiled at import. `vwn_ref.ops.select` is the way in.
"""

from vwn_ref.kernels.backend import cpu_backend, cpu_backend_forced

__all__ = ["cpu_backend", "cpu_backend_forced"]
