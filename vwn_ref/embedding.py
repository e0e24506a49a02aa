"""Over-width embedding: Eqs. (1)-(3) of arXiv 2511.11238, with optional n-gram input augmentation.

| paper    | here            | shape                                                            |
|----------|-----------------|------------------------------------------------------------------|
| h        | `h` of `segments` | [..., D] -> m segments [..., m, D/m], Eq. (1)                  |
| e, H′⁰   | result          | [..., n, d_b]: the n segments of e as rows, Eq. (2)              |
| E_base   | `table`         | [vocab_size, rank]; [vocab_size, D′] where no W_expand           |
| W_expand | `expand.weight` | [D′, rank], Eq. (3)                                              |
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from vwn_ref.backbone import has_values
from vwn_ref.config import check_float, check_int, check_widths

# Odd 63-bit multipliers: a bucket is a sum of token · multiplier, reduced mod the number of buckets.
HASH_MULTIPLIERS = (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB)


def segments(h: Float[Tensor, "*b D"], m: int) -> Float[Tensor, "*b m d"]:
    """Eq. (1): cut a vector into m contiguous segments, one a row.

    >>> segments(torch.arange(6.0), 2)
    tensor([[0., 1., 2.],
            [3., 4., 5.]])
    """
    return rearrange(h, "... (m d) -> ... m d", m=m)


def ngram_buckets(tokens: Int[Tensor, "*b t"], order: int, buckets: int) -> Int[Tensor, "*b t"]:
    """Hash of the `order` tokens that end at each position, in 0 … buckets − 1.

    A position with fewer tokens before it is hashed with "no token" in their place, so the same text gives the
    same buckets only where as much of it is visible. Collisions share a row, as in any hashed table.
    Raises ValueError unless 1 ≤ order ≤ 3 and buckets ≥ 1.
    """
    check_int("order", order)
    check_int("buckets", buckets)
    if order > len(HASH_MULTIPLIERS):
        raise ValueError(f"order = {order}: must be ≤ {len(HASH_MULTIPLIERS)}, each token has a multiplier of its own")
    mixed = torch.zeros_like(tokens, dtype=torch.int64)
    for back in range(order):
        # id + 1, with 0 for "no token" before the start; int64 products wrap around, which a hash may
        shifted = F.pad(tokens[..., : tokens.shape[-1] - back].long() + 1, (min(back, tokens.shape[-1]), 0))
        mixed = mixed + shifted * HASH_MULTIPLIERS[back]
    mixed = mixed ^ (mixed >> 29)  # the low bits of a product know nothing of the high ones
    return torch.remainder(mixed, buckets)


class OverWidthEmbedding(nn.Module):
    """Tokens -> H′⁰ [..., n, d_b]: a table D′ wide, Eq. (2), or a `rank`-wide one and W_expand, Eq. (3).

    Args:
        vocab_size: ids are 0 … vocab_size − 1.
        dim, m, n: D, segments and slots; D′ = (n/m) D.
        rank: width of the table before W_expand; the paper's choice is `dim`. None: no W_expand.
        ngram_buckets: rows of each hashed 2-gram and 3-gram table added to the token's row; 0: none.
        std: standard deviation of the initial table.

    Initial values: the first D columns are drawn first, so that one seed gives every n the table that the plain
    model (m = n = 1) has, with more columns to the right; W_expand copies its input into the first columns and
    fills the rest at random. The n-gram tables start at 0.

    Raises ValueError for a bad size, IndexError for a token id out of range (on CPU), TypeError for float tokens.

    >>> OverWidthEmbedding(vocab_size=100, dim=8, m=2, n=3)(torch.tensor([[5, 7, 99]])).shape
    torch.Size([1, 3, 3, 4])
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        m: int,
        n: int,
        rank: int | None = None,
        *,
        ngram_buckets: int = 0,
        std: float = 0.3,
    ) -> None:
        super().__init__()
        check_int("vocab_size", vocab_size)
        check_widths(dim, m, n)
        check_int("ngram_buckets", ngram_buckets, least=0)
        check_float("std", std)
        if rank is not None:
            check_int("rank", rank)
        self.vocab_size, self.n = vocab_size, n
        over_width = dim // m * n
        width = over_width if rank is None else rank
        first = min(dim, width)
        self.table = nn.Parameter(
            std * torch.cat([torch.randn(vocab_size, first), torch.randn(vocab_size, width - first)], dim=1)
        )
        self.expand = None if rank is None else nn.Linear(rank, over_width, bias=False)
        if self.expand is not None:
            with torch.no_grad():
                nn.init.normal_(self.expand.weight, std=width**-0.5)  # keeps the size of the entries
                self.expand.weight[:first] = torch.eye(first, width)
        self.ngram_tables = nn.ParameterList(
            nn.Parameter(torch.zeros(ngram_buckets, width)) for _ in range(2 if ngram_buckets else 0)
        )

    def forward(self, tokens: Int[Tensor, "*b t"]) -> Float[Tensor, "*b t n d"]:
        """Token ids [..., t] -> H′⁰ [..., t, n, d_b]; n-grams run along the last axis of `tokens`."""
        self.check_tokens(tokens)
        e = F.embedding(tokens, self.table)
        for order, table in enumerate(self.ngram_tables, start=2):
            e = e + F.embedding(ngram_buckets(tokens, order, table.shape[0]), table)
        if self.expand is not None:
            e = self.expand(e)  # Eq. (3)
        return segments(e, self.n)  # Eq. (2): n segments as wide as those of Eq. (1)

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise TypeError for tokens that are no integers, IndexError for an id out of range (on CPU)."""
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens have dtype {tokens.dtype}: must be torch.int64 or torch.int32")
        # On a GPU the check would wait for the device; there an id out of range stops the kernel itself.
        if not has_values(tokens) or tokens.device.type != "cpu" or not tokens.numel():  # traced, a size may be unknown
            return
        low, high = (int(v) for v in tokens.aminmax())
        if low < 0 or high >= self.vocab_size:
            raise IndexError(
                f"tokens hold the id {low if low < 0 else high}: must be in 0 … {self.vocab_size - 1} "
                f"(vocab_size = {self.vocab_size})"
            )
