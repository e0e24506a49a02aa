"""Multi-token prediction with a block-level linear: §3.4 of arXiv 2511.11238.

The head at position i knows the over-width state of position i and the over-width embedding of token i+1, mixes the
two slot by slot, runs VWN sublayers of its own on the result and predicts token i+2 through the shared unembedding.

| paper                     | here          | shape                                                  |
|---------------------------|---------------|--------------------------------------------------------|
| h′ᴸ at position i         | `H`           | [..., n, d_b]                                          |
| e of token i+1            | `E`           | [..., n, d_b]                                          |
| the linear 2D/m → D/m     | `BlockLinear` | [d_b, 2 d_b], one for all n slots; dense would be rD × 2rD |

Fig. 3 (c) has a norm before the linear for each input, H-Norm and E-Norm, without saying of which kind or over what: as
in the model that the paper cites (DeepSeek-V3) these are RMSNorms, here over each slot as in Eq. (12). The head has a
reduce and a final norm of its own. The loss weight is not given.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vwn_ref.backbone import sublayers
from vwn_ref.config import VWNConfig, check_int, check_widths
from vwn_ref.stack import connections_for, reduce_for, through


class BlockLinear(nn.Module):
    """One linear 2D/m → D/m that every slot shares: two [..., n, d_b] -> [..., n, d_b].

    Costs 4 n d_b² FLOPs a token = 4 r D²/m, against 4 r² D² for the dense 2rD → rD.
    At m = 1, n = 1 it is the dense linear of the plain model's head. Raises ValueError unless m divides dim.

    >>> mix = BlockLinear(dim=8, m=2)
    >>> mix(torch.randn(5, 3, 4), torch.randn(5, 3, 4)).shape, sum(p.numel() for p in mix.parameters())
    (torch.Size([5, 3, 4]), 32)
    """

    def __init__(self, dim: int, m: int) -> None:
        super().__init__()
        check_widths(dim, m, n=m)
        self.slot_width = dim // m
        self.linear = nn.Linear(2 * self.slot_width, self.slot_width, bias=False)
        nn.init.normal_(self.linear.weight, std=(2 * self.slot_width) ** -0.5)

    def forward(self, H: Float[Tensor, "*b n d"], E: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n d"]:
        """Raises ValueError where H and E differ in shape or are not slots d_b wide."""
        if H.shape != E.shape or H.shape[-1] != self.slot_width:
            raise ValueError(
                f"H and E have shapes {tuple(H.shape)} and {tuple(E.shape)}: both must be "
                f"[..., n, d_b] with d_b = {self.slot_width}"
            )
        return self.linear(torch.cat([H, E], dim=-1))


class MTPHead(nn.Module):
    """Over-width state of position i and embedding of token i+1 -> the D-wide vector that predicts token i+2.

    H, E [b, t, n, d_b] -> [b, t, D]. Attention inside is causal over the t positions.

    Raises ValueError for a `cfg` with mtp_layers = 0.
    """

    def __init__(self, cfg: VWNConfig) -> None:
        super().__init__()
        check_int("mtp_layers", cfg.mtp_layers)
        self.state_norm = nn.RMSNorm(cfg.slot_width, eps=cfg.norm_eps)
        self.token_norm = nn.RMSNorm(cfg.slot_width, eps=cfg.norm_eps)
        self.mix = BlockLinear(cfg.dim, cfg.m or 1)
        self.sublayers = nn.ModuleList(sublayers(cfg, cfg.mtp_layers))
        self.connections = connections_for(cfg, cfg.mtp_layers)
        self.reduce = reduce_for(cfg)
        self.norm = nn.RMSNorm(cfg.dim, eps=cfg.norm_eps)

    def forward(self, H: Float[Tensor, "b t n d"], E: Float[Tensor, "b t n d"]) -> Float[Tensor, "b t D"]:
        """Raises ValueError where H and E differ in shape, see `BlockLinear`."""
        H = self.mix(self.state_norm(H), self.token_norm(E))
        return self.norm(through(H, self.connections, self.sublayers, self.reduce))
