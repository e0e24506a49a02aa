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

from collections.abc import Callable

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vwn_ref.config import check_widths

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
    """Depth connection, the outer half of Eq. (10): H′ˡ = Bᵀ Z + carried, Z the m segments of z as rows."""
    B, carried = state
    Z = rearrange(z, "... (m d) -> ... m d", m=B.shape[-2])
    return einsum(B, Z, "... m n, ... m d -> ... n d") + carried


class GHC(nn.Module):
    """Static GHC: H′ˡ = Bᵀ Tˡ(Åᵀ H′ˡ⁻¹) + Âᵀ H′ˡ⁻¹, Eq. (10), one routing matrix for all tokens.

    Args:
        dim: backbone width D.
        m: segments of the backbone vector; divides D.
        n: slots of the over-width state, each d_b = D/m wide; n ≥ m.
        kernels: what computes it, see `vwn_ref.ops`.

    Parameters: `A` [n, m+n] and `B` [m, n], initially Eqs. (16) and (15). No weight decay on either.

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
        """ε of the RMSNorm, which a static GHC has not."""
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
        """z [..., D], the sublayer's output, and `width`'s state -> the next H [..., n, d_b]."""
        if z.shape[-1:] != (self.dim,):
            raise ValueError(f"z has shape {tuple(z.shape)}: must be [..., {self.dim}], the sublayer's output")
        return self.ops.depth(z, state)

    def forward(self, H: Float[Tensor, "*b n d"], layer: Callable[[Tensor], Tensor]) -> Float[Tensor, "*b n d"]:
        """Eq. (10) whole, around the sublayer `layer`: [..., D] -> [..., D]."""
        x, state = self.width(H)
        return self.depth(layer(x), state)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, m={self.m}, n={self.n}"

    def _check_state(self, H: Tensor) -> Tensor:
        if H.shape[-2:] != (self.n, self.slot_width):
            raise ValueError(
                f"H has shape {tuple(H.shape)}: must be [..., n, d_b] = [..., {self.n}, {self.slot_width}]"
            )
        if H.dtype != self.A.dtype and not torch.is_autocast_enabled(H.device.type):
            raise TypeError(f"H has dtype {H.dtype}: must be {self.A.dtype}, the dtype of the parameters")
        return H
