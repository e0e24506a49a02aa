"""The symbols of the paper and every check on them.

| paper | here          | meaning                                                        |
|-------|---------------|----------------------------------------------------------------|
| D     | `dim`         | backbone width: attention and FFN work here                    |
| m     | `m`           | fraction rate: segments that the backbone vector is cut into   |
| n     | `n`           | slots of the over-width state                                  |
| r     | `r`           | virtual width factor n / m; need not be an integer             |
| D′    | `over_width`  | width of the over-width state, rD                              |
| d_b   | `slot_width`  | width of one slot, D / m = D′ / n                              |
| L     | `n_sublayers` | sublayers Tˡ: two a transformer block, attention and FFN       |
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from fractions import Fraction
from numbers import Integral, Real
from typing import Literal


def check_int(name: str, value: object, least: int = 1) -> None:
    """Raise ValueError unless `value` is an integer ≥ `least`; the message names the field."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        kind = "a Python int" if isinstance(value, Integral) and not isinstance(value, int) else "an integer"
        raise ValueError(f"{name} = {value!r}: must be {kind} ≥ {least}")


def check_float(name: str, value: object, least: float = 0.0, *, above: bool = False) -> None:
    """Raise ValueError unless `value` is a finite number ≥ `least` (> `least` with `above`)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not least <= value < float("inf") or (above and value == least):
        other = isinstance(value, Real) and not isinstance(value, bool) and not number  # NumPy's float32
        kind = "a Python int or float" if other else "a finite number"
        raise ValueError(f"{name} = {value!r}: must be {kind} {'>' if above else '≥'} {least}")


def check_bool(name: str, value: object) -> None:
    """Raise ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} = {value!r}: must be True or False")


def check_text(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a string that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} = {value!r}: must be a string, and not an empty one")


def check_choice(name: str, value: object, choices: tuple) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if not isinstance(value, str | None) or value not in choices:
        raise ValueError(f"{name} = {value!r}: must be one of {', '.join(map(repr, choices))}")


def check_widths(dim: int, m: int, n: int) -> None:
    """Raise ValueError unless (D, m, n) is a Virtual Width Network: m divides D, and n ≥ m.

    n = m is allowed although Eq. (2) says n > m: Eq. (16) gives that case a matrix of its own.
    """
    check_int("dim", dim)
    check_int("m", m)
    check_int("n", n)
    if dim % m:
        raise ValueError(f"m = {m}: must divide dim = {dim}, so that a segment is dim/m wide")
    if n < m:
        raise ValueError(f"n = {n}: must be ≥ m = {m}, the over-width state is no narrower than the backbone")


KERNELS = ("auto", "reference", "cpu", "triton")
REDUCE_INITS = ("mean", "first", "random")


@dataclass(frozen=True)
class VWNConfig:
    """Everything that fixes a model. `m = n = None` is the plain pre-norm Transformer it is compared with.

    `python -m vwn_ref.experiments.train --help` explains every field.

    Raises ValueError at construction for every inconsistent choice, naming the field, its value and what
    it must be.
    """

    vocab_size: int
    """Token ids are 0 … vocab_size − 1."""
    dim: int = 64
    """Backbone width D."""
    n_layers: int = 4
    """Transformer blocks; each has two sublayers (attention, FFN) and so two GHCs."""
    n_heads: int = 4
    """Attention heads; must divide dim into an even head width (rotary positions turn pairs)."""
    m: int | None = None
    """Fraction rate: segments that the backbone vector is cut into. None (with n = None): plain Transformer."""
    n: int | None = None
    """Slots of the over-width state; r = n/m. (2, 3) is r = 1.5, (8, 64) is r = 8."""
    dynamic: bool = True
    """Input-dependent matrices, Eqs. (11)-(14); False: the static ones of Eqs. (9)-(10)."""
    embed_rank: int | None = None
    """Width of the embedding table before W_expand, Eq. (3) (the paper: dim). None: a table D′ wide, Eq. (2)."""
    ngram_buckets: int = 0
    """Rows of each of the hashed 2- and 3-gram tables added to the embedding (Over-Encoding). 0: none."""
    reduce_init: Literal["mean", "first", "random"] = "mean"
    """Initial W_reduce, Eq. (4): mean of the r groups, the first D of D′, or random (the paper does not say)."""
    reduce_norm: bool | None = None
    """GroupNorm before W_reduce. None: where r is an integer (§3.2, §5.1); True then demands an integer r."""
    ffn_dim: int | None = None
    """Hidden width of the SwiGLU FFN, of each expert in a MoE. None: 8/3 · dim rounded up to a multiple of 8."""
    n_experts: int = 0
    """Experts of a top-k MoE FFN. 0: a dense FFN."""
    top_k: int = 2
    """Experts that each token visits; must be ≤ n_experts where there are any."""
    balance_weight: float = 0.01
    """Weight of the MoE load-balancing loss."""
    mtp_layers: int = 0
    """Transformer blocks in the multi-token-prediction head, §3.4. 0: no head."""
    mtp_weight: float = 0.3
    """Weight of the next-2-token loss beside the next-token loss (the paper gives none)."""
    max_seq_len: int = 1024
    """Longest sequence, in tokens."""
    rope_theta: float = 10_000.0
    """Base of the rotary position frequencies."""
    norm_eps: float = 1e-6
    """ε inside every RMSNorm and GroupNorm."""
    embed_std: float = 0.3
    """Standard deviation of the initial embedding table."""
    init_std: float | None = 0.02
    """Standard deviation of the initial linear weights (None: 1/√fan_in), by 1/√(2·n_layers) where they write
    (in the MTP head's blocks too)."""
    kernels: Literal["auto", "reference", "cpu", "triton"] = "auto"
    """What computes a GHC: "reference" (the readable code), "cpu" or "triton" (fused), "auto" (fastest here)."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "top_k", "max_seq_len"):
            check_int(name, getattr(self, name))
        for name in ("ngram_buckets", "n_experts", "mtp_layers"):
            check_int(name, getattr(self, name), least=0)
        for name in ("embed_rank", "ffn_dim"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name))
        for name in ("balance_weight", "mtp_weight"):
            check_float(name, getattr(self, name))
        for name in ("rope_theta", "norm_eps", "embed_std", "init_std"):
            if not (name == "init_std" and self.init_std is None):
                check_float(name, getattr(self, name), above=True)
        check_bool("dynamic", self.dynamic)
        if self.reduce_norm is not None:
            check_bool("reduce_norm", self.reduce_norm)
        check_choice("kernels", self.kernels, KERNELS)
        check_choice("reduce_init", self.reduce_init, REDUCE_INITS)

        if self.dim % self.n_heads:
            raise ValueError(f"n_heads = {self.n_heads}: must divide dim = {self.dim}")
        if (self.dim // self.n_heads) % 2:
            raise ValueError(
                f"n_heads = {self.n_heads}: dim/n_heads = {self.dim // self.n_heads} must be even, "
                "rotary positions turn pairs"
            )
        if self.n_experts and self.top_k > self.n_experts:
            raise ValueError(f"top_k = {self.top_k}: must be ≤ n_experts = {self.n_experts}")
        if (self.m is None) != (self.n is None):
            raise ValueError(f"m = {self.m}, n = {self.n}: give both, or neither for the plain Transformer")
        if self.m is not None and self.n is not None:
            check_widths(self.dim, self.m, self.n)
        if self.is_plain:
            if self.embed_rank is not None:
                raise ValueError(f"embed_rank = {self.embed_rank}: must be None where m = n = None")
            if self.reduce_norm:
                raise ValueError("reduce_norm = True: must be None or False where m = n = None")
        elif self.reduce_norm and self.r.denominator != 1:
            raise ValueError(f"reduce_norm = True: r = n/m = {self.r} must be an integer, the groups are D wide")

    @property
    def is_plain(self) -> bool:
        """True for the plain Transformer: no over-width state."""
        return self.m is None

    @property
    def r(self) -> Fraction:
        """Virtual width factor n/m, exact; 1 for the plain Transformer."""
        return Fraction(1) if self.m is None or self.n is None else Fraction(self.n, self.m)

    @property
    def over_width(self) -> int:
        """D′ = rD."""
        return int(self.r * self.dim)

    @property
    def slot_width(self) -> int:
        """d_b = D/m = D′/n."""
        return self.dim // (self.m or 1)

    @property
    def n_sublayers(self) -> int:
        """Sublayers Tˡ of the backbone, the MTP head not counted."""
        return 2 * self.n_layers

    @property
    def ffn_width(self) -> int:
        """`ffn_dim`, or its default of 8/3 · D rounded up to a multiple of 8."""
        return self.ffn_dim if self.ffn_dim is not None else -(-8 * self.dim // 24) * 8

    def to_dict(self) -> dict:
        """Field name → value, for JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self)}
