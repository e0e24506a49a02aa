"""The byte model: what an operation must move through memory at the least, and what our kernels move besides."""

from __future__ import annotations

from vwn_ref.cost import kernel_traffic

OPS = ("width", "depth", "step", "last")
DIRECTIONS = ("forward", "backward")


def minimal_slots(op: str, direction: str, m: int, n: int) -> int:
    """Rows of d_b numbers a token that an operation cannot avoid to move: what comes in once, what goes out once.

    Forward these are `vwn_ref.cost.kernel_traffic`'s. Backward, what the forward pass could compute again from its
    inputs is not counted:

        width    H′, g_x in; g_H′ out                       2n +  m
        depth    H′, z, g in; g_H′, g_z out                 3n + 2m       (g: the gradient of the new state)
        step     H′, z, g, g_x in; g_H′, g_z out            3n + 3m
        last     H′, z, g_y in; g_H′, g_z out               3n + 2m

    Coefficients and parameters are left out.
    """
    if direction == "backward":
        return {"width": 2 * n + m, "depth": 3 * n + 2 * m, "step": 3 * n + 3 * m, "last": 3 * n + 2 * m}[op]
    fusion, kernel = ("step", "step") if op == "step" else ("recompute", "depth" if op == "last" else op)
    return kernel_traffic(m, m, n, fusion=fusion)[kernel].total  # D = m: slots one number wide


def minimal_bytes(op: str, direction: str, m: int, n: int, d: int, tokens: int, itemsize: int) -> int:
    """`minimal_slots` in bytes, for slots of `d` numbers of `itemsize` bytes."""
    return minimal_slots(op, direction, m, n) * d * itemsize * tokens


def kernel_bytes(
    op: str, direction: str, m: int, n: int, d: int, tokens: int, itemsize: int, one_kernel: bool = True,
    mixes_again: bool = False,
) -> int:  # fmt: skip
    """What our kernels are written to move through memory: the minimum, and what they store and read besides.

    Backward there are e, the gradients of the coefficients, [n, m] of width and [n, n+m] of depth, in float32, or with
    more than 8 slots in as many bytes as a state (true of bfloat16, and even n and m), written by one kernel and read
    by `weights_kernel` together with H′. step leaves its own depth's to the step before, and does what the next one
    left to it. It reads the new state too, unless it makes it again (`mixes_again`), and where its backward is two
    kernels (not `one_kernel`) the gradient between them is stored and read. last is a depth and a GroupNorm: the state
    between them is stored and read, backward as well, where it is made again, and so is its gradient. A second read
    that should come from the cache is not counted.
    """
    slots, e = minimal_slots(op, direction, m, n), 0
    if direction == "forward":
        slots += 2 * n if op == "last" else 0
    else:
        e = {"width": n * m, "step": n * (n + 2 * m)}.get(op, n * (n + m))
        slots += {"width": n, "depth": n, "step": 2 * n, "last": 6 * n + m}[op]  # read once more, or other kernels
        if op == "step":
            slots += (0 if one_kernel else 2 * n) - (n if mixes_again else 0)
    return (slots * d * itemsize + 2 * e * (itemsize if n > 8 else 4)) * tokens
