"""Fast versions of the operations of `vwn_ref.ghc` and `vwn_ref.dynamic`: the same functions, the same arguments.

    cpu            width, dynamic_width, depth on CPU tensors, float32 and float64
    cpu_backend()  what computes them here: "c++" compiled on first use, or "torch"
    fused          the same three by Triton kernels, for GPUs; and step and last, which join two of them in one kernel

`vwn_ref.ops.select` is the way in. Nothing is compiled at import, and Triton is not imported before it is wanted. To
read the kernels: tiles (what they are made of), width, depth, step and last, which have the formulas; rows and few, the
same for up to 4 slots, and many, for all others of bfloat16; projections, before them, and weights and finish, after
them; launch starts them for fused.
"""

from vwn_ref.kernels.backend import cpu_backend, cpu_backend_forced

__all__ = ["cpu_backend", "cpu_backend_forced"]
