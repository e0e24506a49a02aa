"""GHC by the Triton kernels: `width`, `dynamic_width` and `depth` with the arguments of the reference functions, and,
for a model that runs sublayer after sublayer, `step`, which does two of those things in one kernel, and `last`, `depth`
with the GroupNorm of reduce.

`state` is H′ itself and the parameters: `depth` computes the coefficients from H′ again.

Tensors on a CUDA or ROCm GPU, states in float32, bfloat16 or float16; or on the CPU in Triton's interpreter, for
tests and lessons, when TRITON_INTERPRET=1 was set before Triton was imported.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from vwn_ref.kernels.launch import INTERPRETED, Launch, e_dtype, fuses_step_backward
from vwn_ref.kernels.linked import UNLINKED, Link, LinkedOperation, nothing
from vwn_ref.kernels.operation import check_shape, transformed

from vwn_ref import dynamic, ghc

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_SLOTS = 64  # as many as were tested: a token's n × n coefficients want registers, or memory to park them in


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
    link: Tensor | None = None  # belongs to this H and these parameters: see `vwn_ref.kernels.linked`


def _new(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def suited(H: Tensor, *parameters: Tensor) -> bool:
    """True where the kernels compute what the reference would: what "auto" asks."""
    tensors = (H, *parameters)
    if any(t.dtype not in DTYPES or t.device != H.device for t in tensors) or H.shape[-2] > MOST_SLOTS:
        return False
    if any(t.ndim > 2 for t in parameters) or (H.device.type != "cuda" and not INTERPRETED):
        return False
    if transformed():
        return False
    return torch.compiler.is_compiling() or all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


# ----------------------------------------------------------------------------------------------- raw operations


def _width(H, A, W_alpha, S_alpha, gain, norm_gain, eps, norm_eps):
    H = H.contiguous()
    launch = Launch(H, A.shape[1] - A.shape[0], W_alpha is not None)
    x, V = _new(H, *H.shape[:-2], launch.m * launch.d), launch.projections("width", width=(W_alpha, gain))
    launch.start("width", H, x, V, A, S_alpha, norm_gain, launch.T, eps, norm_eps, NORM=norm_gain is not None)
    return x


def _width_gradients(
    H, A, W_alpha, S_alpha, gain, norm_gain, eps, norm_eps, g_x, *, link: Link = UNLINKED, add=None
):  # fmt: skip
    """With `add`, another gradient of H, the gradient of H is the sum of both."""
    H = H.contiguous()
    launch = Launch(H, A.shape[1] - A.shape[0], W_alpha is not None)
    name, m = "width_backward", launch.m
    if g_x is None:  # x was not used, but e came
        g_W, g_W_beta, g_gain = launch.weight_gradients(H, None, link.e, W_alpha, link.W_beta, gain)
        return (None, None, g_W, None, g_gain, None), None, g_W_beta
    g_x = g_x.contiguous()
    g_H, E, sums = torch.empty_like(H), launch.coefficient_gradients(m), launch.partial(name, m)
    norm_sums, V = launch.norm_partial(name, norm_gain), launch.projections(name, width=(W_alpha, gain))
    launch.start(
        name, H, g_x, add, g_H, E, sums, norm_sums, V, A, S_alpha, norm_gain, launch.T, eps, norm_eps,
        NORM=norm_gain is not None, ADD=add is not None,
    )  # fmt: skip
    g_A, _, g_S, _ = launch.gradients(sums, A, None, S_alpha, None)
    g_W, g_W_beta, g_gain = launch.weight_gradients(H, E, link.e, W_alpha, link.W_beta, gain)
    return (g_H, g_A, g_W, g_S, g_gain, launch.norm_gradient(name, norm_sums, norm_gain)), None, g_W_beta


def _depth(H, z, A, B, W_alpha, W_beta, S_alpha, S_beta, gain, eps):
    H, z = H.contiguous(), z.contiguous()
    launch = Launch(H, B.shape[0], W_alpha is not None)
    out, V = torch.empty_like(H), launch.projections("depth", depth=(W_alpha, W_beta, gain))
    launch.start("depth", H, z, out, V, A, B, S_alpha, S_beta, launch.T, eps)
    return out


def _depth_gradients(H, z, A, B, W_alpha, W_beta, S_alpha, S_beta, gain, eps, g, *, link: Link = UNLINKED):
    H, z, g = H.contiguous(), z.contiguous(), g.contiguous()
    launch = Launch(H, B.shape[0], W_alpha is not None)
    name, columns = "depth_backward", launch.n + launch.m
    g_H, g_z = torch.empty_like(H), torch.empty_like(z)
    E, sums = launch.coefficient_gradients(columns), launch.partial(name, columns)
    V = launch.projections(name, depth=(W_alpha, W_beta, gain))
    launch.start(name, H, z, g, g_H, g_z, E, sums, V, A, B, S_alpha, S_beta, launch.T, eps)
    return _of_depth(launch, H, g_H, g_z, E, sums, (A, B, W_alpha, W_beta, S_alpha, S_beta, gain), link)


def _of_depth(launch: Launch, H, g_H, g_z, E, sums, parameters, link: Link):
    """All gradients of a depth, and e. Where e goes on to the width before it, that one computes the gradients of W and
    gain, for both, and they are None here."""
    A, B, W_alpha, W_beta, S_alpha, S_beta, gain = parameters
    g_A, g_B, g_S_alpha, g_S_beta = launch.gradients(sums, A, B, S_alpha, S_beta)
    if link.hands_on:
        g_W_alpha = g_W_beta = g_gain = None
        E = E.view(*H.shape[:-1], E.shape[-1])
    else:
        g_W_alpha, g_W_beta, g_gain = launch.weight_gradients(H, None, E, W_alpha, W_beta, gain)
        E = None
    return (g_H, g_z, g_A, g_B, g_W_alpha, g_W_beta, g_S_alpha, g_S_beta, g_gain), E, None


def _step(
    H, z, A, B, W_alpha, W_beta, S_alpha, S_beta, gain, next_A, next_W, next_S, next_gain, norm_gain,
    eps, next_eps, norm_eps,
):  # fmt: skip
    H, z = H.contiguous(), z.contiguous()
    launch = Launch(H, B.shape[0], W_alpha is not None)
    out, x = torch.empty_like(H), _new(H, *z.shape)
    V = launch.projections("step", (W_alpha, W_beta, gain), (next_W, next_gain))
    launch.start(
        "step", H, z, out, x, V, A, B, S_alpha, S_beta, next_A, next_S, norm_gain, launch.T, eps, next_eps, norm_eps,
        NORM=norm_gain is not None,
    )  # fmt: skip
    return out, x


def _step_gradients(
    H, z, A, B, W_alpha, W_beta, S_alpha, S_beta, gain, next_A, next_W, next_S, next_gain, norm_gain, out,
    eps, next_eps, norm_eps, g_out, g_x, *, link: Link = UNLINKED,
):  # fmt: skip
    H, z, g_out, g_x = H.contiguous(), z.contiguous(), g_out.contiguous(), g_x.contiguous()
    launch = Launch(H, B.shape[0], W_alpha is not None)
    name, m, columns = "step_backward", launch.m, launch.n + launch.m
    parameters = (A, B, W_alpha, W_beta, S_alpha, S_beta, gain)
    if not fuses_step_backward(m, launch.n, launch.d, H.dtype):
        (g, *of_width), _, of_next = _width_gradients(
            out, next_A, next_W, next_S, next_gain, norm_gain, next_eps, norm_eps, g_x, link=link, add=g_out
        )  # fmt: skip
        of_depth, E, _ = _depth_gradients(H, z, *parameters, eps, g, link=link)
        return (*of_depth, *of_width), E, of_next
    g_H, g_z = torch.empty_like(H), torch.empty_like(z)
    E, next_E = launch.coefficient_gradients(columns), launch.coefficient_gradients(m)
    sums, next_sums = launch.partial(name, columns), launch.partial(name, m)
    norm_sums = launch.norm_partial(name, norm_gain)
    V = launch.projections(name, (W_alpha, W_beta, gain), (next_W, next_gain))
    family = launch.kernel(name).__name__.removesuffix("step_backward_kernel")
    states = (H, z) if family == "few_" else (H, z, out)  # it mixes `out` again
    between = (_new(H, launch.at_once(name), launch.n, launch.d),) if family == "many_" else ()
    launch.start(
        name, *states, g_out, g_x, g_H, g_z, E, next_E, sums, next_sums, norm_sums, *between, V, A, B, S_alpha, S_beta,
        next_A, next_S, norm_gain, launch.T, eps, next_eps, norm_eps, NORM=norm_gain is not None,
    )  # fmt: skip
    of_depth, E, _ = _of_depth(launch, H, g_H, g_z, E, sums, parameters, link)
    g_A, _, g_S, _ = launch.gradients(next_sums, next_A, None, next_S, None)
    g_W, of_next, g_gain = launch.weight_gradients(out, next_E, link.e, next_W, link.W_beta, next_gain)
    return (*of_depth, g_A, g_W, g_S, g_gain, launch.norm_gradient(name, norm_sums, norm_gain)), E, of_next


def _last(H, z, A, B, W_alpha, W_beta, S_alpha, S_beta, gain, weight, bias, eps, norm_eps):
    h = _depth(H, z, A, B, W_alpha, W_beta, S_alpha, S_beta, gain, eps)
    launch = Launch(h, B.shape[0], W_alpha is not None)
    launch.start("group_norm", h, h, weight, bias, launch.T, norm_eps)
    return h


def _last_gradients(
    H, z, A, B, W_alpha, W_beta, S_alpha, S_beta, gain, weight, bias, eps, norm_eps, g_y, *, link: Link = UNLINKED
):  # fmt: skip
    """h is made again, and its gradient takes its place."""
    parameters = (A, B, W_alpha, W_beta, S_alpha, S_beta, gain)
    h, g_y = _depth(H, z, *parameters, eps), g_y.contiguous()
    launch = Launch(h, B.shape[0], W_alpha is not None)
    name = "group_norm_backward"
    sums = torch.empty(launch.programs(name), 2, launch.n * launch.d, dtype=torch.float32, device=h.device)
    launch.start(name, h, g_y, h, sums, weight, launch.T, norm_eps)
    of_depth, E, _ = _depth_gradients(H, z, *parameters, eps, h, link=link)
    return (*of_depth, sums[:, 0].sum(0).to(weight.dtype), sums[:, 1].sum(0).to(bias.dtype)), E, None


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

_width_operation = LinkedOperation(
    "triton_width",
    "Tensor H, Tensor A, Tensor? W_alpha, Tensor? S_alpha, Tensor? gain, Tensor? norm_gain, float eps, float norm_eps",
    kept=6, outputs=1, run=_width, gradients=_width_gradients, reference=_reference_width,
    shapes=lambda H, A, *_: ((*H.shape[:-2], (A.shape[1] - A.shape[0]) * H.shape[-1]),),
    rest=lambda *g: (None, None),
)  # fmt: skip
_depth_operation = LinkedOperation(
    "triton_depth", f"Tensor H, Tensor z, {_PARAMETERS}, float eps",
    kept=9, outputs=1, run=_depth, gradients=_depth_gradients, reference=_reference_depth,
    shapes=lambda H, *_: (H.shape,), rest=lambda *g: (None,),
)  # fmt: skip
_step_operation = LinkedOperation(
    "triton_step",
    f"Tensor H, Tensor z, {_PARAMETERS}, Tensor next_A, Tensor? next_W, Tensor? next_S, Tensor? next_gain, "
    "Tensor? norm_gain, float eps, float next_eps, float norm_eps",
    kept=14, outputs=2, kept_outputs=(0,), run=_step, gradients=_step_gradients, reference=_reference_step,
    shapes=lambda H, z, *_: (H.shape, z.shape), rest=lambda *g: (None, None, None),
)  # fmt: skip
_last_operation = LinkedOperation(
    "triton_last", f"Tensor H, Tensor z, {_PARAMETERS}, Tensor weight, Tensor bias, float eps, float norm_eps",
    kept=11, outputs=1, run=_last, gradients=_last_gradients, reference=_reference_last,
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
    A, _, W_alpha, W_beta, S_alpha, _, slot_gain = parameters
    x, link = _width_operation(
        H, A, W_alpha, S_alpha, slot_gain, gain, eps, norm_eps, W_beta=W_beta, made=_of_e(H, parameters)
    )  # fmt: skip
    return x, State(H, parameters, eps, link)


def _of_e(H: Tensor, parameters: Parameters) -> tuple | None:
    """Shape and dtype of e, and so of a link: [..., n, n+m]. None where the GHC is static, has no W and so no e."""
    if parameters.W_beta is None:
        return None
    m, n = parameters.B.shape
    return (*H.shape[:-1], n + m), e_dtype(m, n, H.dtype)


def unmade_link(H: Tensor, parameters: Parameters) -> Tensor | None:
    """A link for a state that no operation has made: see `vwn_ref.kernels.linked`. For benchmarks and lessons."""
    of_e = _of_e(H, parameters)
    return None if of_e is None else nothing(H.device, *of_e)


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
    z, own = _checked_z(z, state), _contiguous(state.parameters)
    return _depth_operation(state.H, z, *own, state.eps, link=state.link)[0]


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
    own, parameters, eps = _contiguous(state.parameters), _contiguous(parameters), _epsilon(eps)
    gain, norm_eps = _norm(norm, z, z.shape[-1])
    A, _, W_alpha, W_beta, S_alpha, _, slot_gain = parameters
    H, x, link = _step_operation(
        state.H, z, *own, A, W_alpha, S_alpha, slot_gain, gain, state.eps, eps, norm_eps,
        link=state.link, W_beta=W_beta, made=_of_e(state.H, parameters),
    )  # fmt: skip
    return x, State(H, parameters, eps, link)


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
    own = _contiguous(state.parameters)
    return _last_operation(state.H, z, *own, *affine, state.eps, norm.eps, link=state.link)[0]
