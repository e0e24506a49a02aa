"""Reduce: the over-width state back to the backbone's width, Eq. (4) of arXiv 2511.11238.

| paper     | here            | shape                                                  |
|-----------|-----------------|--------------------------------------------------------|
| h′ᴸ       | `H`             | [..., n, d_b], flattened to D′                         |
| GroupNorm | `norm`          | r groups, each D wide; left out where r is no integer (§5.1: at r = 1.5) |
| W_reduce  | `linear.weight` | [D, D′]                                                |

What the paper does not say is the initial W_reduce. Ours averages the slots that Eq. (15) gives the same segment;
for an integer r that is the mean of the r groups. figures/README.md has the comparison with the other two.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vwn_ref.config import REDUCE_INITS, check_bool, check_choice, check_float, check_widths
from vwn_ref.ghc import initial_B


def initial_W_reduce(dim: int, m: int, n: int, init: str = "mean") -> Float[Tensor, "D Dn"]:
    """W_reduce [D, D′]: "mean" of the slots j with the same j mod m, "first" D of D′, or "random".

    Raises ValueError for bad widths or an unknown `init`.
    """
    check_widths(dim, m, n)
    check_choice("init", init, REDUCE_INITS)
    slot_width = dim // m
    if init == "random":
        return torch.randn(dim, n * slot_width) * (n * slot_width) ** -0.5
    if init == "first":
        return torch.eye(dim, n * slot_width)
    slots = initial_B(m, n)  # Eq. (15): which slots hold the same segment
    return torch.kron(slots / slots.sum(dim=1, keepdim=True), torch.eye(slot_width))


class Reduce(nn.Module):
    """h_reduce = W_reduce GroupNorm(h′), Eq. (4).

    Args:
        dim, m, n: D, segments and slots; r = n/m.
        norm: GroupNorm before the linear. None: where r is an integer.
        init: initial W_reduce, "mean", "first" or "random".
        eps: ε of the GroupNorm.

    Raises ValueError for bad widths, an unknown `init`, an ε < 0, or norm=True where r is no integer.

    >>> Reduce(dim=8, m=2, n=4)(torch.randn(5, 7, 4, 4)).shape
    torch.Size([5, 7, 8])
    """

    def __init__(
        self, dim: int, m: int, n: int, *, norm: bool | None = None, init: str = "mean", eps: float = 1e-6
    ) -> None:
        super().__init__()
        check_widths(dim, m, n)
        check_float("eps", eps)
        if norm is not None:
            check_bool("norm", norm)
        if norm and n % m:
            raise ValueError(f"norm = True: r = n/m = {n}/{m} must be an integer, the groups are D wide")
        self.dim, self.n, self.slot_width = dim, n, dim // m
        over_width = n * self.slot_width
        use_norm = n % m == 0 if norm is None else norm
        self.norm = nn.GroupNorm(n // m, over_width, eps=eps) if use_norm else None
        self.linear = nn.Linear(over_width, dim, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(initial_W_reduce(dim, m, n, init))

    def forward(self, H: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b D"]:
        """H′ᴸ [..., n, d_b] -> h_reduce [..., D]. Raises ValueError where H does not end in [n, d_b]."""
        if H.shape[-2:] != (self.n, self.slot_width):
            raise ValueError(
                f"H has shape {tuple(H.shape)}: must be [..., n, d_b] = [..., {self.n}, {self.slot_width}]"
            )
        h = rearrange(H, "... n d -> ... (n d)")
        if self.norm is not None and h.numel():  # GroupNorm refuses an empty batch
            h = self.norm(h.reshape(-1, h.shape[-1])).reshape(h.shape)  # GroupNorm wants [tokens, D′]
        return self.linear(h)
