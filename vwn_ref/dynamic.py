"""Dynamic GHC: matrices that depend on the token, Eqs. (11)-(14) of arXiv 2511.11238.

| paper     | here               | shape                                          |
|-----------|--------------------|------------------------------------------------|
| H̄′        | `H_bar`            | [..., n, d_b]                                  |
| W_α, W_β  | `W_alpha`, `W_beta` | [d_b, m+n], [d_b, m]; shared by the slots, initially 0 |
| S_α, S_β  | `S_alpha`, `S_beta` | [n, m+n], [m, n]; initially 1                  |
| τ         | `tau`              | √(D/m) = √d_b                                  |
| 𝒜(H′), ℬ(H′) | `A`, `B` of `matrices` | [..., n, m+n], [..., m, n]; Eq. (11) is (9) with these |
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vwn_ref.config import check_float
from vwn_ref.ghc import GHC, State, width


def dynamic_matrices(
    H: Float[Tensor, "*b n d"],
    A: Float[Tensor, "n k"],
    B: Float[Tensor, "m n"],
    W_alpha: Float[Tensor, "d k"],
    W_beta: Float[Tensor, "d m"],
    S_alpha: Float[Tensor, "n k"],
    S_beta: Float[Tensor, "m n"],
    gain: Float[Tensor, " d"],
    eps: float,
) -> tuple[Float[Tensor, "*b n k"], Float[Tensor, "*b m n"]]:
    """𝒜(H′) [..., n, m+n] and ℬ(H′) [..., m, n], one pair of matrices a token."""
    tau = math.sqrt(H.shape[-1])
    H_bar = F.rms_norm(H, gain.shape, gain, eps)  # Eq. (12): each slot on its own, one gain for all
    B = S_beta * torch.tanh(H_bar @ W_beta / tau).mT + B  # Eq. (13)
    A = S_alpha * torch.tanh(H_bar @ W_alpha / tau) + A  # Eq. (14)
    return A, B


def dynamic_width(
    H: Float[Tensor, "*b n d"], A: Tensor, B: Tensor, W_alpha: Tensor, W_beta: Tensor, S_alpha: Tensor,
    S_beta: Tensor, gain: Tensor, eps: float,
) -> tuple[Tensor, State]:  # fmt: skip
    """`vwn_ref.ghc.width` with the matrices of Eqs. (13) and (14): x [..., D], and the state."""
    return width(H, *dynamic_matrices(H, A, B, W_alpha, W_beta, S_alpha, S_beta, gain, eps))


class DynamicGHC(GHC):
    """GHC whose matrices depend on the token: 𝒜 = S_α ∘ tanh(H̄′ W_α / τ) + A, ℬ = S_β ∘ tanh(H̄′ W_β / τ)ᵀ + B.

    W_α = W_β = 0 at first, so that it starts as the static GHC. Weight decay on W and S, none on A and B.

    Args: as `GHC`; eps: ε of the RMSNorm, None for the machine epsilon. Raises as `GHC`, and for ε < 0. Of `norm`
    only gain and ε are used: its `forward`, and hooks on it, are not called.

    >>> ghc = DynamicGHC(dim=8, m=2, n=3)
    >>> A, B = ghc.matrices(torch.randn(5, 3, 4))
    >>> A.shape, B.shape
    (torch.Size([5, 3, 5]), torch.Size([5, 2, 3]))
    """

    def __init__(self, dim: int, m: int, n: int, *, eps: float | None = 1e-6, kernels: str = "auto") -> None:
        super().__init__(dim, m, n, kernels=kernels)
        if eps is not None:
            check_float("eps", eps)
        self.W_alpha = nn.Parameter(torch.zeros(self.slot_width, m + n))
        self.W_beta = nn.Parameter(torch.zeros(self.slot_width, m))
        self.S_alpha = nn.Parameter(torch.ones(n, m + n))
        self.S_beta = nn.Parameter(torch.ones(m, n))
        self.norm = nn.RMSNorm(self.slot_width, eps=eps)

    def matrices(self, H: Float[Tensor, "*b n d"]) -> tuple[Float[Tensor, "*b n k"], Float[Tensor, "*b m n"]]:
        """Eqs. (13) and (14) for this input: A [..., n, m+n] and B [..., m, n]."""
        return dynamic_matrices(self._check_state(H), *self.parameters_in_order(), self.eps)

    def width(self, H: Float[Tensor, "*b n d"]) -> tuple[Float[Tensor, "*b D"], State]:
        """As `GHC.width`, with this input's matrices."""
        return self.ops.dynamic_width(self._check_state(H), *self.parameters_in_order(), self.eps)

    @property
    def eps(self) -> float | None:
        """ε of the RMSNorm; None is the machine epsilon. Raises TypeError where another norm has been put there."""
        if not isinstance(self.norm, nn.RMSNorm):
            raise TypeError(f"norm is a {type(self.norm).__name__}: must be an RMSNorm, of which gain and ε are used")
        return self.norm.eps

    def parameters_in_order(self) -> tuple[Tensor, ...]:
        """As `dynamic_width` takes them."""
        return (self.A, self.B, self.W_alpha, self.W_beta, self.S_alpha, self.S_beta, self.norm.weight)
