"""GHC by the Triton kernels: `width`, `dynamic_width` and `depth` with the arguments of the reference functions, and,
for a model that runs sublayer after sublayer, `step` and `last`, which do two of those things in one kernel.

`state` is H′ itself and the parameters: `depth` computes the coefficients from H′ again.

Tensors on a CUDA or ROCm GPU, states in float32, bfloat16 or float16; or on the CPU in Triton's interpreter, for
tests and lessons, when TRITON_INTERPRET=1 was set before Triton was imported.
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.autograd import forward_ad
from triton import next_power_of_2
from vwn_ref.kernels.depth import depth_backward_kernel, depth_kernel, own_size
from vwn_ref.kernels.last import last_backward_kernel, last_kernel
from vwn_ref.kernels.operation import Operation, check_shape
from vwn_ref.kernels.step import step_backward_kernel, step_kernel
from vwn_ref.kernels.tiles import LEAST_SUM
from vwn_ref.kernels.weights import weights_kernel
from vwn_ref.kernels.width import width_backward_kernel, width_kernel

from vwn_ref import dynamic, ghc

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = type(width_kernel).__name__ == "InterpretedFunction"
MOST_SLOTS = 64  # n × n coefficients of a token stay in registers


class Parameters(NamedTuple):
    """Of one GHC; the last five are None where it is static."""

    A: Tensor
    B: Tensor
    W_alpha: Tensor | None = None
    W_beta: Tensor | None = None
    S_alpha: Tensor | None = None
    S_beta: Tensor | None = None
    gain: Tensor | None = None


class State(NamedTuple):
    """What `width` hands to `depth`."""

    H: Tensor
    parameters: Parameters
    eps: float


# ------------------------------------------------------------------------------------------------------ launching


class Tile(NamedTuple):
    """Block sizes of a launch: see `vwn_ref.kernels.tiles`."""

    BT: int
    BD: int
    num_warps: int
    num_stages: int = 3  # Triton's own: loads of the next two chunks are under way; 1 holds fewer registers


def is_many(n: int) -> bool:
    """Whether sums over slots go to the tensor cores: see `vwn_ref.kernels.tiles`."""
    return n > 4


def tile(kernel: str, m: int, n: int, d: int, bits: int) -> Tile:
    """One good choice a kernel, the same for every number of tokens, among those that `vwn_ref.kernels.aot` compiles
    without spilling registers. Which is fastest, `vwn_ref.kernels.bench` says where there is a GPU.

    As a rule one warp a program, so that no warp waits for another, and several tokens, so that one load of the
    projections serves them all. More than 16 slots: four or more warps, which share a token's matrix products.
    """
    if INTERPRETED:  # every operation of every program costs the same there: few programs, and more than one chunk
        tile = Tile(8 if n <= 8 else 4, 32, 1)
    elif kernel.startswith("weights"):
        tile = Tile(1, 64, 4 if m + n <= 64 else 8)
    else:
        name = kernel.removesuffix("_kernel")
        tile = _TILES[name if (name, bits) in _TILES else "forward", bits][_kind(n)]
    most = next_power_of_2(d)
    if n > 16 and kernel.endswith("backward_kernel"):
        most //= 2  # a single chunk is no loop: the compiler loads all matrices at once, and spills
    return tile._replace(BD=max(16, min(tile.BD, most)))


def _kind(n: int) -> int:
    return 0 if not is_many(n) else 1 if n <= 8 else 2 if n <= 16 else 3


# (kernel, bits of the state) -> for n ≤ 4, n ≤ 8, n ≤ 16, more. Of the tiles that do not spill on an H100, those whose
# machine code has the fewest instructions a token: see NOTES.md.
_TILES = {
    ("forward", 16): (Tile(4, 64, 1), Tile(2, 64, 1), Tile(1, 64, 1), Tile(1, 64, 4)),
    ("forward", 32): (Tile(4, 32, 1), Tile(2, 32, 1), Tile(1, 32, 1), Tile(1, 32, 4)),
    ("step", 16): (Tile(4, 32, 1), Tile(2, 64, 1), Tile(1, 64, 1), Tile(1, 64, 4)),
    ("last", 16): (Tile(4, 64, 1), Tile(2, 32, 1), Tile(1, 64, 1), Tile(1, 64, 4)),
    ("last", 32): (Tile(4, 32, 1), Tile(2, 32, 1), Tile(1, 32, 1), Tile(1, 32, 4)),
    ("width_backward", 16): (Tile(2, 32, 1), Tile(2, 32, 1), Tile(1, 32, 1), Tile(1, 64, 4)),
    ("width_backward", 32): (Tile(2, 16, 1), Tile(2, 16, 1), Tile(1, 32, 1), Tile(1, 32, 4)),
    ("depth_backward", 16): (Tile(1, 64, 1), Tile(2, 32, 1), Tile(2, 32, 2), Tile(1, 64, 8, 2)),
    ("depth_backward", 32): (Tile(1, 32, 1), Tile(2, 16, 1), Tile(1, 16, 2), Tile(1, 16, 8)),
    ("step_backward", 16): (Tile(1, 32, 1), Tile(1, 32, 1), Tile(1, 32, 1), Tile(1, 32, 8)),
    ("step_backward", 32): (Tile(1, 32, 1), Tile(1, 32, 1), Tile(1, 32, 1), Tile(1, 32, 8)),
    ("last_backward", 16): (Tile(1, 64, 1), Tile(2, 32, 1), Tile(2, 32, 2), Tile(1, 64, 8)),
    ("last_backward", 32): (Tile(4, 32, 1), Tile(2, 16, 1), Tile(1, 16, 1), Tile(1, 32, 4, 1)),
}
if LEAST_SUM > 8:  # Triton before 3.8: a sum over 8 slots takes two tokens a program, or 16 slots' registers
    _TILES["step", 16] = (Tile(4, 32, 1), Tile(2, 32, 1), Tile(1, 64, 1), Tile(1, 64, 4))
    _TILES["step_backward", 16] = (Tile(1, 32, 1), Tile(2, 16, 1), Tile(1, 32, 1), Tile(1, 32, 8))


@functools.cache
def programs(device: torch.device, many: bool) -> int:
    """How many programs share the tokens in a backward pass: each leaves a partial sum of the gradients behind."""
    if device.type == "cpu":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count * (2 if many else 8)


def fuses_step_backward(n: int, bits: int) -> bool:
    """Whether a step's backward is one kernel. Else it is two, of width and of depth, and moves 2n more rows a token:
    for many slots, and for float32, one kernel would spill, or walk along d_b in steps of 16."""
    return INTERPRETED or (n <= 8 and bits == 16)


def sizes(kernel: str, m: int, n: int, d: int, dtype: torch.dtype) -> dict:
    """The compile-time arguments that all kernels but `weights_kernel` have, and num_warps and num_stages."""
    BT, BD, num_warps, num_stages = tile(kernel, m, n, d, 8 * dtype.itemsize)
    many, MP, NP = is_many(n), next_power_of_2(m), next_power_of_2(n)
    least = (8 if BT > 1 else LEAST_SUM) if many else 1  # what a sum on the tensor cores is padded to
    return {
        "M": m, "N": n, "D": d, "BT": BT, "BD": BD, "MANY": many, "PREC": precision(dtype), "num_warps": num_warps,
        "num_stages": num_stages,
        "MP": max(least, MP), "NP": max(least, NP),
    }  # fmt: skip


def precision(dtype: torch.dtype) -> str:
    """How `tl.dot` treats float32 for states of a dtype: see `vwn_ref.kernels.tiles`."""
    if INTERPRETED or torch.version.hip:
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "tf32"


def weight_sizes(m: int, n: int, d: int, K: int, dtype: torch.dtype) -> dict:
    """The compile-time arguments of `weights_kernel`, for K columns, and num_warps."""
    tiling = tile("weights_kernel", m, n, d, 8 * dtype.itemsize)
    return {
        "D": d, "K": K, "KP": max(16, next_power_of_2(K)), "BR": 64, "BD": tiling.BD, "PREC": precision(dtype),
        "num_warps": tiling.num_warps,
    }  # fmt: skip


class Launch:
    """A state H [..., n, d_b] as the kernels see it, and what belongs to starting them."""

    def __init__(self, H: Tensor, m: int, dynamic: bool) -> None:
        self.n, self.d = H.shape[-2:]
        self.m, self.dynamic = m, dynamic
        self.T = H.numel() // (self.n * self.d)
        self.device = H.device
        self.dtype = H.dtype
        # of a backward pass; no more than tokens, since a block has at least one
        self.programs = min(self.T, programs(H.device, is_many(self.n)))

    def start(self, kernel, *arguments, count: int | None = None, **more) -> None:
        """Run `count` programs, or one a block. For an absent tensor another stands in, which no kernel touches."""
        if self.T:
            chosen = sizes(kernel.__name__, self.m, self.n, self.d, self.dtype)
            arguments = [arguments[0] if a is None else a for a in arguments]
            with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
                count = triton.cdiv(self.T, chosen["BT"]) if count is None else count
                kernel[(count,)](*arguments, **chosen, **more, DYNAMIC=self.dynamic)

    def zeros(self, *shape: int) -> Tensor:
        """float32, for sums."""
        return torch.zeros(shape, dtype=torch.float32, device=self.device)

    def partial(self, columns: int, kernel=None) -> Tensor:
        """Room for the sums of each program: [P, 2, n, columns]; for more than 16 slots that `kernel`, with a depth in
        it, adds to them, so they are zeros, and behind each program's lies its room for Â: see `vwn_ref.kernels.depth`.
        """
        size = own = 2 * self.n * columns
        if kernel is not None:
            chosen = sizes(kernel.__name__, self.m, self.n, self.d, self.dtype)
            own = own_size.fn(self.m, self.n, chosen["NP"], chosen["BT"])
        make = torch.empty if self.T and self.dynamic and own == size else torch.zeros
        whole = make(max(self.programs, 1), own, dtype=torch.float32, device=self.device)
        return whole[:, :size].unflatten(1, (2, self.n, columns))

    def coefficient_gradients(self, columns: int) -> Tensor:
        """Room for rstd · ∂L/∂q: [T, n, columns]."""
        shape = (self.T, self.n, columns) if self.dynamic else (0,)
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def weight_gradient(self, H: Tensor, E: Tensor) -> Tensor:
        """Σ H′ᵀ E over tokens and slots: [d_b, columns]."""
        rows, d, K = self.T * self.n, self.d, E.shape[-1]
        constants = weight_sizes(self.m, self.n, d, K, H.dtype)
        splits = min(triton.cdiv(rows, constants["BR"]), 2 if self.device.type == "cpu" else 128)
        partial = torch.empty((splits, d, K), dtype=torch.float32, device=self.device)
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            weights_kernel[(triton.cdiv(d, constants["BD"]), splits)](H, E, partial, rows, **constants)
        return partial.sum(0)


def _new(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _split(launch: Launch, sums: Tensor, H: Tensor, E: Tensor, W: tuple[Tensor, ...], gain: Tensor):
    """Sums [P, 2, n, K] and e -> Σ E, Σ E ∘ tanh [n, K], and the gradients of W (side by side) and of the gain."""
    static, scale = sums.sum(0)
    if not launch.dynamic:
        return static, None, None, None
    if not launch.T:
        return static, scale, launch.zeros(launch.d, E.shape[-1]), launch.zeros(launch.d)
    g_V = launch.weight_gradient(H, E) * launch.d**-0.5
    side_by_side = torch.cat([w.float() for w in W], dim=1)
    return static, scale, g_V * gain.float()[:, None], (g_V * side_by_side).sum(1)


def _into(like: Tensor, part: Tensor, columns: slice) -> Tensor:
    """Zeros like `like`, with `part` in those columns."""
    whole = torch.zeros_like(like)
    whole[:, columns] = part.to(like.dtype)
    return whole


def suited(H: Tensor, *parameters: Tensor) -> bool:
    """True where the kernels compute what the reference would: what "auto" asks."""
    tensors = (H, *parameters)
    if any(t.dtype not in DTYPES or t.device != H.device for t in tensors) or H.shape[-2] > MOST_SLOTS:
        return False
    if any(t.ndim > 2 for t in parameters) or (H.device.type != "cuda" and not INTERPRETED):
        return False
    if torch.compiler.is_compiling():
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return False
    return all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


def _own(t: Tensor, like: Tensor) -> Tensor:
    """A contiguous copy in the dtype of `like`: the results of an operator must not share memory."""
    return t.clone(memory_format=torch.contiguous_format).to(like.dtype)


# ----------------------------------------------------------------------------------------------- raw operations


def _width(H, A, W_alpha, S_alpha, gain, norm_gain, eps, norm_eps):
    H = H.contiguous()
    launch = Launch(H, A.shape[1] - A.shape[0], W_alpha is not None)
    x = _new(H, *H.shape[:-2], launch.m * launch.d)
    launch.start(
        width_kernel, H, x, A, W_alpha, S_alpha, gain, norm_gain, launch.T, eps, norm_eps,
        NORM=norm_gain is not None,
    )  # fmt: skip
    return x


def _read_gradients(launch: Launch, sums: Tensor, H: Tensor, E: Tensor, norm_sums: Tensor, A, W_alpha, S_alpha, gain,
                    norm_gain) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of A, W_alpha, S_alpha, gain and norm_gain from the sums of a width's backward."""
    columns = slice(0, launch.m)
    W = None if W_alpha is None else (W_alpha[:, columns],)
    static, scale, g_W, g_gain = _split(launch, sums, H, E, W, gain)
    g_norm = None if norm_gain is None else norm_sums.sum(0).to(norm_gain.dtype)
    if not launch.dynamic:
        return _into(A, static, columns), None, None, None, g_norm
    return (
        _into(A, static, columns), _into(W_alpha, g_W, columns), _into(S_alpha, scale, columns),
        g_gain.to(gain.dtype), g_norm,
    )  # fmt: skip


def _width_backward(H, A, W_alpha, S_alpha, gain, norm_gain, eps, norm_eps, g_x, add=None):
    """With `add`, another gradient of H, the gradient of H is the sum of both."""
    H, g_x = H.contiguous(), g_x.contiguous()
    launch = Launch(H, A.shape[1] - A.shape[0], W_alpha is not None)
    m, d = launch.m, launch.d
    g_H, E, sums = torch.empty_like(H), launch.coefficient_gradients(m), launch.partial(m)
    norm_sums = launch.zeros(len(sums), m * d) if norm_gain is not None else sums
    launch.start(
        width_backward_kernel, H, g_x, add, g_H, E, sums, norm_sums, A, W_alpha, S_alpha, gain, norm_gain, launch.T,
        eps, norm_eps, NORM=norm_gain is not None, ADD=add is not None, count=launch.programs,
    )  # fmt: skip
    return g_H, *_read_gradients(launch, sums, H, E, norm_sums, A, W_alpha, S_alpha, gain, norm_gain)


def _depth(H, z, A, B, W_alpha, W_beta, S_alpha, S_beta, gain, eps):
    H, z = H.contiguous(), z.contiguous()
    launch = Launch(H, B.shape[0], W_alpha is not None)
    out = torch.empty_like(H)
    launch.start(
        depth_kernel, H, z, out, A, B, W_alpha, W_beta, S_alpha, S_beta, gain, launch.T, eps
    )  # fmt: skip
    return out


def _write_gradients(launch: Launch, sums: Tensor, H, E, A, B, W_alpha, W_beta, S_alpha, S_beta, gain):
    """Gradients of the seven parameters from the sums of a depth's backward."""
    n, carry = launch.n, slice(launch.m, None)
    W = None if W_alpha is None else (W_alpha[:, carry], W_beta)
    static, scale, g_W, g_gain = _split(launch, sums, H, E, W, gain)
    g_A, g_B = _into(A, static[:, :n], carry), _own(static[:, n:].mT, B)
    if not launch.dynamic:
        return g_A, g_B, None, None, None, None, None
    return (
        g_A, g_B, _into(W_alpha, g_W[:, :n], carry), _own(g_W[:, n:], W_beta),
        _into(S_alpha, scale[:, :n], carry), _own(scale[:, n:].mT, S_beta), g_gain.to(gain.dtype),
    )  # fmt: skip


def _depth_backward(H, z, A, B, W_alpha, W_beta, S_alpha, S_beta, gain, eps, g):
    H, z, g = H.contiguous(), z.contiguous(), g.contiguous()
    launch = Launch(H, B.shape[0], W_alpha is not None)
    parameters = (A, B, W_alpha, W_beta, S_alpha, S_beta, gain)
    columns = launch.n + launch.m
    g_H, g_z = torch.empty_like(H), torch.empty_like(z)
    E, sums = launch.coefficient_gradients(columns), launch.partial(columns, depth_backward_kernel)
    launch.start(
        depth_backward_kernel, H, z, g, g_H, g_z, E, sums, *parameters, launch.T, eps, count=launch.programs
    )  # fmt: skip
    return g_H, g_z, *_write_gradients(launch, sums, H, E, *parameters)


def _step(
    H, z, A, B, W_alpha, W_beta, S_alpha, S_beta, gain, next_A, next_W, next_S, next_gain, norm_gain,
    eps, next_eps, norm_eps,
):  # fmt: skip
    H, z = H.contiguous(), z.contiguous()
    launch = Launch(H, B.shape[0], W_alpha is not None)
    out, x = torch.empty_like(H), _new(H, *z.shape)
    launch.start(
        step_kernel, H, z, out, x, A, B, W_alpha, W_beta, S_alpha, S_beta, gain, next_A, next_W, next_S,
        next_gain, norm_gain, launch.T, eps, next_eps, norm_eps, NORM=norm_gain is not None,
    )  # fmt: skip
    return out, x


def _step_backward(
    H, z, A, B, W_alpha, W_beta, S_alpha, S_beta, gain, next_A, next_W, next_S, next_gain, norm_gain, out,
    eps, next_eps, norm_eps, g_out, g_x,
):  # fmt: skip
    H, z, g_out, g_x = H.contiguous(), z.contiguous(), g_out.contiguous(), g_x.contiguous()
    launch = Launch(H, B.shape[0], W_alpha is not None)
    m, columns = launch.m, launch.n + launch.m
    parameters = (A, B, W_alpha, W_beta, S_alpha, S_beta, gain)
    reading = (next_A, next_W, next_S, next_gain, norm_gain)
    if not fuses_step_backward(launch.n, 8 * H.dtype.itemsize):
        g, *of_width = _width_backward(out, *reading, next_eps, norm_eps, g_x, add=g_out)
        return *_depth_backward(H, z, *parameters, eps, g), *of_width
    g_H, g_z = torch.empty_like(H), torch.empty_like(z)
    E, next_E = launch.coefficient_gradients(columns), launch.coefficient_gradients(m)
    sums, next_sums = launch.partial(columns, step_backward_kernel), launch.partial(m)
    norm_sums = launch.zeros(len(sums), m * launch.d) if norm_gain is not None else sums
    launch.start(
        step_backward_kernel, H, z, out, g_out, g_x, g_H, g_z, E, next_E, sums, next_sums, norm_sums,
        *parameters, *reading, launch.T, eps, next_eps, norm_eps, NORM=norm_gain is not None, count=launch.programs,
    )  # fmt: skip
    return (
        g_H, g_z, *_write_gradients(launch, sums, H, E, *parameters),
        *_read_gradients(launch, next_sums, out, next_E, norm_sums, *reading),
    )  # fmt: skip


def _last(H, z, A, B, W_alpha, W_beta, S_alpha, S_beta, gain, weight, bias, eps, norm_eps):
    H, z = H.contiguous(), z.contiguous()
    launch = Launch(H, B.shape[0], W_alpha is not None)
    y = torch.empty_like(H)
    launch.start(
        last_kernel, H, z, y, A, B, W_alpha, W_beta, S_alpha, S_beta, gain, weight, bias, launch.T, eps,
        norm_eps,
    )  # fmt: skip
    return y


def _last_backward(H, z, A, B, W_alpha, W_beta, S_alpha, S_beta, gain, weight, bias, eps, norm_eps, g_y):
    H, z, g_y = H.contiguous(), z.contiguous(), g_y.contiguous()
    launch = Launch(H, B.shape[0], W_alpha is not None)
    parameters = (A, B, W_alpha, W_beta, S_alpha, S_beta, gain)
    g = torch.empty_like(H)
    weight_sums, bias_sums = launch.zeros(2, max(launch.programs, 1), launch.n * launch.d)
    launch.start(
        last_backward_kernel, H, z, g_y, g, weight_sums, bias_sums, *parameters, weight, launch.T, eps,
        norm_eps, count=launch.programs,
    )  # fmt: skip
    of_depth = _depth_backward(H, z, *parameters, eps, g)
    return *of_depth, weight_sums.sum(0).to(weight.dtype), bias_sums.sum(0).to(bias.dtype)


# ------------------------------------------------------------------------- the same by the reference, for autograd


def _reference_width(H, A, W_alpha, S_alpha, gain, norm_gain, eps, norm_eps):
    n = A.shape[0]
    m = A.shape[1] - n
    B = A.new_zeros(m, n)
    if W_alpha is None:
        x, _ = ghc.width(H, A, B)
    else:
        x, _ = dynamic.dynamic_width(H, A, B, W_alpha, W_alpha.new_zeros(H.shape[-1], m), S_alpha, B, gain, eps)
    return x if norm_gain is None else F.rms_norm(x, norm_gain.shape, norm_gain, norm_eps)


def _reference_depth(H, z, A, B, W_alpha, W_beta, S_alpha, S_beta, gain, eps):
    if W_alpha is None:
        return ghc.depth(z, ghc.width(H, A, B)[1])
    return ghc.depth(z, dynamic.dynamic_width(H, A, B, W_alpha, W_beta, S_alpha, S_beta, gain, eps)[1])


def _reference_step(H, z, *rest):
    parameters, reading, (eps, next_eps, norm_eps) = rest[:7], rest[7:12], rest[12:]
    out = _reference_depth(H, z, *parameters, eps)
    return out, _reference_width(out, *reading, next_eps, norm_eps)


def _reference_last(H, z, *rest):
    parameters, (weight, bias, eps, norm_eps) = rest[:7], rest[7:]
    h = _reference_depth(H, z, *parameters, eps).flatten(-2)
    groups = h.shape[-1] // z.shape[-1]
    return F.group_norm(h.reshape(-1, h.shape[-1]), groups, weight, bias, norm_eps).view(H.shape)


_PARAMETERS = "Tensor A, Tensor B, Tensor? W_alpha, Tensor? W_beta, Tensor? S_alpha, Tensor? S_beta, Tensor? gain"

_width_operation = Operation(
    "triton_width",
    "Tensor H, Tensor A, Tensor? W_alpha, Tensor? S_alpha, Tensor? gain, Tensor? norm_gain, float eps, float norm_eps",
    kept=6, outputs=1, run=_width, run_backward=_width_backward, reference=_reference_width,
    shapes=lambda H, A, *_: ((*H.shape[:-2], (A.shape[1] - A.shape[0]) * H.shape[-1]),),
    rest=lambda *g: (None, None),
)  # fmt: skip
_depth_operation = Operation(
    "triton_depth", f"Tensor H, Tensor z, {_PARAMETERS}, float eps",
    kept=9, outputs=1, run=_depth, run_backward=_depth_backward, reference=_reference_depth,
    shapes=lambda H, *_: (H.shape,), rest=lambda *g: (None,),
)  # fmt: skip
_step_operation = Operation(
    "triton_step",
    f"Tensor H, Tensor z, {_PARAMETERS}, Tensor next_A, Tensor? next_W, Tensor? next_S, Tensor? next_gain, "
    "Tensor? norm_gain, float eps, float next_eps, float norm_eps",
    kept=14, outputs=2, kept_outputs=(0,), run=_step, run_backward=_step_backward, reference=_reference_step,
    shapes=lambda H, z, *_: (H.shape, z.shape), rest=lambda *g: (None, None, None),
)  # fmt: skip
_last_operation = Operation(
    "triton_last", f"Tensor H, Tensor z, {_PARAMETERS}, Tensor weight, Tensor bias, float eps, float norm_eps",
    kept=11, outputs=1, run=_last, run_backward=_last_backward, reference=_reference_last,
    shapes=lambda H, *_: (H.shape,), rest=lambda *g: (None, None),
)  # fmt: skip


# -------------------------------------------------------------------------------------------------- the functions


def _prepared(name: str, t: Tensor) -> Tensor:
    """`t` as autocast wants it. Raises where the kernels cannot take it."""
    if t.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {t.dtype}: must be float32, bfloat16 or float16 for the Triton kernels")
    if torch.is_autocast_enabled(t.device.type):
        t = t.to(torch.get_autocast_dtype(t.device.type))
    if t.device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"{name} is on {t.device}: must be on a GPU for the Triton kernels "
            "(or set TRITON_INTERPRET=1 before Python starts, to interpret them, slowly)"
        )
    return t


def _check(H: Tensor, parameters: Parameters) -> None:
    """Raise ValueError or TypeError for parameters that do not belong to H."""
    if H.ndim < 2:
        raise ValueError(f"H has shape {tuple(H.shape)}: must be [..., n, d_b]")
    A, B, W_alpha, W_beta, S_alpha, S_beta, gain = parameters
    n, d = H.shape[-2:]
    if 0 in (n, d):
        raise ValueError(f"H has shape {tuple(H.shape)}: must be [..., n, d_b] with n ≥ 1 and d_b ≥ 1")
    if B.ndim != 2 or 0 in B.shape:
        raise ValueError(f"B has shape {tuple(B.shape)}: must be [m, n]")
    m = B.shape[0]
    if n > MOST_SLOTS:
        raise ValueError(f"H has n = {n} slots: must be ≤ {MOST_SLOTS} for the Triton kernels")
    wanted = [("B", B, (m, n), "[m, n]"), ("A", A, (n, m + n), "[n, m+n]")]
    if W_alpha is not None:
        wanted += [
            ("W_alpha", W_alpha, (d, m + n), "[d_b, m+n]"), ("W_beta", W_beta, (d, m), "[d_b, m]"),
            ("S_alpha", S_alpha, (n, m + n), "[n, m+n]"), ("S_beta", S_beta, (m, n), "[m, n]"),
            ("gain", gain, (d,), "[d_b]"),
        ]  # fmt: skip
    for name, t, shape, meaning in wanted:
        check_shape(name, t, shape, meaning)
        _check_beside(name, t, H)


def _check_beside(name: str, t: Tensor, H: Tensor) -> None:
    if t.device != H.device:
        raise ValueError(f"{name} is on {t.device}: must be where H is, on {H.device}")
    if t.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {t.dtype}: must be float32, bfloat16 or float16")


def _epsilon(eps: float | None) -> float:
    """None is the machine epsilon of float32, in which 16-bit numbers are normalised too, as in torch's RMSNorm."""
    return torch.finfo(torch.float32).eps if eps is None else eps


def _contiguous(parameters: Parameters) -> Parameters:
    """The kernels read parameters as they were allocated, row after row."""
    return Parameters(*(None if t is None else t.contiguous() for t in parameters))


def enter(H: Tensor, parameters: Parameters, eps: float | None, norm=None) -> tuple[Tensor, State]:
    """The first `width`: H [..., n, d_b] -> x [..., D], after `norm` (an nn.RMSNorm) if there is one, and the state.

    Raises ValueError for shapes or devices that do not fit and TypeError for dtypes that the kernels do not take.
    """
    H = _prepared("H", H)
    _check(H, parameters)
    parameters, eps = _contiguous(parameters), _epsilon(eps)
    gain, norm_eps = _norm(norm, H, parameters.B.shape[0] * H.shape[-1])
    A, _, W_alpha, _, S_alpha, _, slot_gain = parameters
    return _width_operation(H, A, W_alpha, S_alpha, slot_gain, gain, eps, norm_eps), State(H, parameters, eps)


def _norm(norm, like: Tensor, width: int) -> tuple[Tensor | None, float]:
    """γ and ε of an nn.RMSNorm over D numbers, or of none."""
    if norm is None:
        return None, 0.0
    if norm.weight is None:  # elementwise_affine=False
        return torch.ones(width, dtype=torch.float32, device=like.device), _epsilon(norm.eps)
    check_shape("norm.weight", norm.weight, (width,), "[D]")
    _check_beside("norm.weight", norm.weight, like)
    return norm.weight.contiguous(), _epsilon(norm.eps)


def width(H: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, State]:
    """`vwn_ref.ghc.width`: H [..., n, d_b], A [n, m+n], B [m, n] -> x [..., D] and the state for `depth`."""
    return enter(H, Parameters(A, B), 0.0)


def dynamic_width(
    H: Tensor, A: Tensor, B: Tensor, W_alpha: Tensor, W_beta: Tensor, S_alpha: Tensor, S_beta: Tensor, gain: Tensor,
    eps: float | None,
) -> tuple[Tensor, State]:  # fmt: skip
    """`vwn_ref.dynamic.dynamic_width`, with the parameters of `DynamicGHC`, in the order of its arguments."""
    return enter(H, Parameters(A, B, W_alpha, W_beta, S_alpha, S_beta, gain), eps)


def _checked_z(z: Tensor, state: State) -> Tensor:
    H, B = state.H, state.parameters.B
    check_shape("z", z, (*H.shape[:-2], B.shape[0] * H.shape[-1]), "[..., D]")
    _check_beside("z", z, H)
    return z.to(H.dtype)


def depth(z: Tensor, state: State) -> Tensor:
    """`vwn_ref.ghc.depth`: z [..., D] and the state of `width` or `dynamic_width` -> H [..., n, d_b]."""
    return _depth_operation(state.H, _checked_z(z, state), *state.parameters, state.eps)


def step(z: Tensor, state: State, parameters: Parameters, eps: float | None, norm=None) -> tuple[Tensor, State]:
    """`depth`, and the `width` of the next sublayer's GHC: z [..., D] -> its x [..., D] and state.

    Both GHCs are dynamic or both static, of one (m, n). Raises as `enter` does.
    """
    z = _checked_z(z, state)
    _check(state.H, parameters)
    if parameters.B.shape != state.parameters.B.shape:
        raise ValueError(f"B has shape {tuple(parameters.B.shape)}: must be {tuple(state.parameters.B.shape)}")
    if (parameters.gain is None) != (state.parameters.gain is None):
        raise ValueError("parameters: must be dynamic where those of the state are, and static where they are")
    parameters, eps = _contiguous(parameters), _epsilon(eps)
    gain, norm_eps = _norm(norm, z, z.shape[-1])
    A, _, W_alpha, _, S_alpha, _, slot_gain = parameters
    H, x = _step_operation(
        state.H, z, *state.parameters, A, W_alpha, S_alpha, slot_gain, gain, state.eps, eps, norm_eps
    )  # fmt: skip
    return x, State(H, parameters, eps)


def last(z: Tensor, state: State, norm) -> Tensor:
    """`depth`, and `norm`, the nn.GroupNorm of reduce, with r groups: z [..., D] -> [..., n, d_b], normalised."""
    z = _checked_z(z, state)
    n, m = state.H.shape[-2], state.parameters.B.shape[0]
    if norm.num_groups * m != n:
        raise ValueError(f"norm has {norm.num_groups} groups: must be r = n/m = {n}/{m}")
    affine = []
    for name in ("weight", "bias"):
        t = getattr(norm, name)
        if t is None:
            raise ValueError(f"norm.{name} is None: must be a tensor, GroupNorm(..., affine=True)")
        check_shape(f"norm.{name}", t, (n * state.H.shape[-1],), "[D′]")
        _check_beside(f"norm.{name}", t, state.H)
        affine.append(t.contiguous())
    return _last_operation(state.H, z, *state.parameters, *affine, state.eps, norm.eps)
