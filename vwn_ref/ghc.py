"""Generalized Hyper-Connections with static matrices: Eqs. (9), (10), (15), (16) of arXiv 2511.11238.

| paper          | here                      | shape                                             |
|----------------|---------------------------|---------------------------------------------------|
| H′ˡ            | `H`                       | [..., n, d_b], one row a slot                     |
| Aˡ = (Åˡ \\| Âˡ) | `A`; `A[:, :m]`, `A[:, m:]` | [n, m+n]; read Å [n, m], carry Â [n, n]           |
| Bˡ             | `B`                       | [m, n], write                                     |
| Xˡ = Åᵀ H′     | `x`                       | [..., D], the m rows one after the other          |
| zˡ = Tˡ(Xˡ)    | `z`                       | [..., D]                                          |
| Âᵀ H′          | `carried`                 | [..., n, d_b]                                     |

The paper prints (9) as 2m × (m+n) and A before (16) as n × n; the matrices are (m+n) × (m+n) and n × (m+n).
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vwn_ref.config import check_float, check_widths

State = tuple  # what depth() needs of width(): (B, carried) here, something else in the fused kernels


def initial_A(m: int, n: int) -> Float[Tensor, "n k"]:
    """Eq. (16): Å = the first m columns of I_n, Â = I_n. Slots 1 … m are read, every slot is carried."""
    identity = torch.eye(n)
    return torch.cat([identity[:, :m], identity], dim=1)


def initial_B(m: int, n: int) -> Float[Tensor, "m n"]:
    """Eq. (15): B[i, j] = 1 where i = j mod m. Segment i is written to slots i, i+m, i+2m, …"""
    return torch.eye(m)[:, torch.arange(n) % m]


def routing_matrix(A: Float[Tensor, "*b n k"], B: Float[Tensor, "*b m n"]) -> Float[Tensor, "*b k k"]:
    """Eq. (9): GHC = [[0, B], [Å, Â]], (m+n) × (m+n). For looking at; nothing computes with it."""
    zero = B.new_zeros(*B.shape[:-1], B.shape[-2])
    return torch.cat([torch.cat([zero, B], dim=-1), A], dim=-2)


def width(H: Float[Tensor, "*b n d"], A: Float[Tensor, "*#b n k"], B: Float[Tensor, "*#b m n"]) -> tuple[Tensor, State]:
    """Width connection, the inner half of Eq. (10): Aᵀ H′ has m + n rows.

    Returns x [..., D], the first m rows side by side, which go into Tˡ; and (B, carried), where
    carried = Âᵀ H′ [..., n, d_b] is the other n rows.
    """
    m = B.shape[-2]
    mixed = einsum(A, H, "... n k, ... n d -> ... k d")
    x, carried = mixed[..., :m, :], mixed[..., m:, :]
    return rearrange(x, "... m d -> ... (m d)"), (B, carried)


def depth(z: Float[Tensor, "*b D"], state: State) -> Float[Tensor, "*b n d"]:
    """Depth connection, the outer half of Eq. (10): H′ˡ = Bᵀ Z + carried, Z the m segments of z as rows.

    Raises ValueError where z is not of the tokens that the state is of; nothing is broadcast.
    """
    B, carried = state
    if z.shape[:-1] != carried.shape[:-2]:
        raise ValueError(
            f"z has shape {tuple(z.shape)}: must be [..., D] with H′ {tuple(carried.shape)}, [..., n, d_b]"
        )
    Z = rearrange(z, "... (m d) -> ... m d", m=B.shape[-2])
    return einsum(B, Z, "... m n, ... m d -> ... n d") + carried


def parameter_groups(module: nn.Module, weight_decay: float, *, decay_static: bool = False) -> list[dict]:
    """Two groups for an optimizer: weight decay on matrices, none on vectors and, after §3.3, on static A and B.

    Vectors are norm gains and biases. The dynamic part, W and S, is decayed. `decay_static` decays A and B as well, to
    see what it does. `module` is anything with GHCs in it, also where A or B is parametrized or pruned.

    >>> groups = parameter_groups(nn.ModuleList([GHC(8, 2, 3), nn.Linear(8, 8)]), weight_decay=0.1)
    >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
    [(1, 0.1), (3, 0.0)]

    Raises ValueError unless weight_decay is a finite number ≥ 0, and where A or B has been flattened, as by PyTorch's
    first FSDP (`FullyShardedDataParallel`): then no matrix is told from a vector. `fully_shard` keeps them apart.
    """
    check_float("weight_decay", weight_decay)
    static = set()
    for ghc in module.modules():
        for name, p in ghc.named_parameters() if isinstance(ghc, GHC) else ():
            if re.fullmatch(r"[AB]|[AB]_orig|parametrizations\.[AB]\.original\d*", name):
                if p.ndim != 2:
                    raise ValueError(
                        f"module: {name} of a GHC has shape {tuple(p.shape)}, must be [n, m+n] for A, [m, n] for B; is "
                        "it flattened by FullyShardedDataParallel? Use fully_shard"
                    )
                if not decay_static:
                    static.add(id(p))
    decayed, exempt = [], []
    for p in module.parameters():
        (exempt if id(p) in static or p.ndim < 2 else decayed).append(p)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]


class GHC(nn.Module):
    """Static GHC: H′ˡ = Bᵀ Tˡ(Åᵀ H′ˡ⁻¹) + Âᵀ H′ˡ⁻¹, Eq. (10), one routing matrix for all tokens.

    Args:
        dim: backbone width D.
        m: segments of the backbone vector; divides D.
        n: slots of the over-width state, each d_b = D/m wide; n ≥ m.
        kernels: what computes it, see `vwn_ref.ops`.

    Parameters: `A` [n, m+n] and `B` [m, n], initially Eqs. (16) and (15). They are to have no weight decay (§3.3):
    `parameter_groups` tells an optimizer.

    The sublayer brings its own norm, lambda x: attention(norm(x)), and does not add its input: Â carries, where a plain
    Transformer has its residual. One with more arguments or more outputs goes between `width` and `depth`.

    `matrices` is for looking at. To compute with other ones, override it and, so that it is used,
    `def width(self, H): return vwn_ref.ghc.width(H, *self.matrices(H))`.

    Raises ValueError unless m divides dim and n ≥ m, or for an unknown `kernels`.

    >>> ghc = GHC(dim=8, m=2, n=3)
    >>> x, state = ghc.width(torch.zeros(5, 7, 3, 4))      # H [..., n, d_b]
    >>> x.shape                                            # [..., D]
    torch.Size([5, 7, 8])
    >>> ghc.depth(x, state).shape
    torch.Size([5, 7, 3, 4])
    """

    def __init__(self, dim: int, m: int, n: int, *, kernels: str = "auto") -> None:
        super().__init__()
        check_widths(dim, m, n)
        from vwn_ref.ops import select  # the seam stands on the functions above

        self.dim, self.m, self.n, self.slot_width = dim, m, n, dim // m
        self.kernels, self.ops = kernels, select(kernels)
        self.A = nn.Parameter(initial_A(m, n))
        self.B = nn.Parameter(initial_B(m, n))

    @property
    def eps(self) -> float | None:
        """ε of the RMSNorm before the dynamic matrices; a static GHC has neither, and says 0."""
        return 0.0

    def parameters_in_order(self) -> tuple[Tensor, ...]:
        """As `vwn_ref.ghc.width` and `vwn_ref.dynamic.dynamic_width` take them."""
        return (self.A, self.B)

    def matrices(self, H: Float[Tensor, "*b n d"]) -> tuple[Float[Tensor, "*b n k"], Float[Tensor, "*b m n"]]:
        """A [..., n, m+n] and B [..., m, n] as this input meets them: the same for every token here."""
        lead = self._check_state(H).shape[:-2]
        return self.A.expand(*lead, -1, -1), self.B.expand(*lead, -1, -1)

    def width(self, H: Float[Tensor, "*b n d"]) -> tuple[Float[Tensor, "*b D"], State]:
        """H [..., n, d_b] -> x [..., D] for the sublayer, and the state that `depth` needs.

        Raises ValueError where H does not end in [n, d_b], TypeError where its dtype is not the parameters'.
        """
        return self.ops.width(self._check_state(H), self.A, self.B)

    def depth(self, z: Float[Tensor, "*b D"], state: State) -> Float[Tensor, "*b n d"]:
        """z [..., D], the sublayer's output, and `width`'s state -> the next H [..., n, d_b].

        Raises TypeError or ValueError where z is not a tensor of the dtype, the tokens and the width that x has, and
        ValueError for a state that another GHC's `width` made, with other m or n.
        """
        if not isinstance(z, Tensor):
            raise TypeError(
                f"z is a {type(z).__name__}: must be a tensor [..., {self.dim}]; a sublayer with more outputs goes "
                "between `width` and `depth`"
            )
        if z.dtype != self.A.dtype and not torch.is_autocast_enabled(z.device.type):
            raise TypeError(f"z has dtype {z.dtype}: must be {self.A.dtype}, the dtype of the parameters")
        if z.shape[-1:] != (self.dim,):
            raise ValueError(f"z has shape {tuple(z.shape)}: must be [..., {self.dim}], the sublayer's output")
        H = self.ops.depth(z, state)
        if H.shape[-2:] != (self.n, self.slot_width):
            raise ValueError(
                f"state: must be made by the width of this GHC, whose slots are [..., {self.n}, {self.slot_width}]; "
                f"these are {tuple(H.shape)}"
            )
        return H

    def forward(self, H: Float[Tensor, "*b n d"], layer: Callable[[Tensor], Tensor]) -> Float[Tensor, "*b n d"]:
        """Eq. (10) whole, around the sublayer `layer`: [..., D] -> [..., D], without a residual of its own."""
        x, state = self.width(H)
        return self.depth(layer(x), state)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, m={self.m}, n={self.n}"

    def _check_state(self, H: Tensor) -> Tensor:
        if H.shape[-2:] != (self.n, self.slot_width):
            over_width = self.n * self.slot_width
            hint = (
                f"; H.unflatten(-1, ({self.n}, {self.slot_width})) cuts a vector"
                if H.shape[-1:] == (over_width,)
                else ""
            )
            raise ValueError(
                f"H has shape {tuple(H.shape)}: must be [..., n, d_b] = [..., {self.n}, {self.slot_width}]{hint}"
            )
        if H.dtype != self.A.dtype and not torch.is_autocast_enabled(H.device.type):
            raise TypeError(f"H has dtype {H.dtype}: must be {self.A.dtype}, the dtype of the parameters")
        return H
