"""What a VWN costs: §3.5 of arXiv 2511.11238, the same for whole models, and the bytes that kernels must move.

| paper                     | here                        | per token                                   |
|---------------------------|-----------------------------|---------------------------------------------|
| normalization             | `ghc_flops(...)["norm"]`    | 4rD FLOPs                                   |
| dynamic parameters        | `["coefficients"]`          | 2(2m+n) rD                                  |
| width connection          | `["width"]`                 | 2(m+n) rD                                   |
| depth connection          | `["depth"]`                 | 2nD                                         |
| activations               | `activation_bytes`          | 4(r+1)D bytes a layer before recomputation  |
| η, share of inputs kept   | `activation_bytes(eta=...)` | 4ηrD after                                  |
| a plain layer             | `PLAIN_ACTIVATION_BYTES`    | 34D                                         |

A multiply and an add are two FLOPs. Matrix products and the paper's four terms are counted, and norms and residual adds
beside them; softmax, rotary positions, SiLU, tanh and top-k are not. PyTorch's own FlopCounterMode sees nothing of the
fused kernels: count with kernels="reference".

Whether the paper's numbers add up:

- (2,3): 6D + 21D + 15D = 42D and 6D: yes. These are per GHC; a layer has two, so 96D. The paper does not say so here,
  but counts memory per layer.
- 2nD for the depth connection is exact, the addition of what was carried included. 2(m+n) rD is one addition a sum too
  many, (m+n) D/m in all. Left out of the four terms: 4n(2m+n) for τ, tanh, S and the static matrices, and 3n for the
  roots of the norm; neither grows with D. `tests/test_cost.py` counts every operation of a loop.
- 3D of 34D = 8.8 %: yes. From 4(r+1)D to 4ηrD, 4D more than the factor η is gone: the inputs of B, which the text says
  are kept. It adds up if the inputs of attention and FFN, 4D of the 34D, are recomputed in their place.
- "When m is small, VWN adds roughly n/m − 1 times the cost of layer normalization and residual addition" is about
  bytes. In FLOPs (2,3) adds 48D to the 5D of an RMSNorm and an addition.
- "Nearly constant" is what the abstract says of the backbone's compute; §1 and §3.1 say as much without that word. What
  the connections add is small for small m and n; (8,64) costs 2592D a GHC, 5184D a layer: at D = 2048 that is 10.5 % of
  a plain layer's 24D².
- "Solely from the extra parameters, a negligible amount" at inference: the GHCs' are few, but a table D′ wide has
  (r − 1)D more a token of the vocabulary. W_expand, Eq. (3), avoids it.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from numbers import Rational
from typing import NamedTuple

from vwn_ref.config import VWNConfig, check_choice, check_float, check_int, check_widths

BACKWARD = 2
"""FLOPs of a backward pass for one of the forward: each product has two gradients of its own size."""
PLAIN_ACTIVATION_BYTES = 34
"""Bytes a token that a plain layer stores for the backward pass, in units of D (Korthikanti et al. 2023): attention 11,
FFN 19, norms 4, at 16 bits, with a 4D-wide GELU FFN and dropout, attention scores recomputed."""


class Flops(NamedTuple):
    """FLOPs of matrix products and of everything else that is counted."""

    matmul: int = 0
    elementwise: int = 0

    @property
    def total(self) -> int:
        return self.matmul + self.elementwise

    def __add__(self, other: Flops) -> Flops:  # not the tuples one behind the other
        return Flops(self.matmul + other.matmul, self.elementwise + other.elementwise)

    def times(self, factor: int) -> Flops:
        return Flops(factor * self.matmul, factor * self.elementwise)


def add(*parts: Flops) -> Flops:
    """Sum of several."""
    return sum(parts, Flops())


# ------------------------------------------------------------------------------------------- one GHC


def ghc_flops(dim: int, m: int, n: int, *, dynamic: bool = True) -> dict[str, Flops]:
    """§3.5 for one token and one GHC, forward: "norm", "coefficients", "width", "depth". A static one has no first two.
    Raises ValueError for bad widths.

    >>> {part: f.total // 1000 for part, f in ghc_flops(1000, 2, 3).items()}      # in units of D
    {'norm': 6, 'coefficients': 21, 'width': 15, 'depth': 6}
    """
    check_widths(dim, m, n)
    over_width = n * (dim // m)  # rD
    return {
        "norm": Flops(elementwise=4 * over_width if dynamic else 0),
        "coefficients": Flops(matmul=2 * (2 * m + n) * over_width if dynamic else 0),
        "width": Flops(matmul=2 * (m + n) * over_width),
        "depth": Flops(matmul=2 * n * dim),
    }


def ghc_parameters(dim: int, m: int, n: int, *, dynamic: bool = True) -> dict[str, int]:
    """Parameters of one GHC: "static" A and B; "dynamic" W_α, W_β, S_α, S_β and the norm's gain.

    Raises ValueError for bad widths.
    """
    check_widths(dim, m, n)
    static, slot_width = n * (2 * m + n), dim // m
    return {"static": static, "dynamic": static + slot_width * (2 * m + n + 1) if dynamic else 0}


def activation_bytes(dim: int, m: int, n: int, *, eta: int | float | Fraction | None = None) -> Fraction:
    """Bytes a token that VWN adds to one *layer* (two GHCs) for the backward pass, at 16 bits.

    eta None: before recomputation, 2 · 2 · (r+1)D. Otherwise the share η of width-connection inputs that are kept,
    the rest being recomputed: 4ηrD. The plain layer has `PLAIN_ACTIVATION_BYTES` · D.
    Raises ValueError for bad widths, or η outside 0 … 1.

    >>> activation_bytes(1000, 2, 3) / 1000, activation_bytes(1000, 2, 3, eta=Fraction(1, 2)) / 1000
    (Fraction(10, 1), Fraction(3, 1))
    """
    check_widths(dim, m, n)
    if eta is None:
        return Fraction(4 * (n + m) * dim, m)
    check_float("eta", float(eta) if isinstance(eta, Rational) and not isinstance(eta, bool) else eta)
    if eta > 1:
        raise ValueError(f"eta = {eta}: must be ≤ 1, it is a share")
    return 4 * Fraction(eta) * n * dim / m


class Traffic(NamedTuple):
    """Elements a token read and written, of states, sublayer inputs and outputs."""

    read: int
    write: int

    @property
    def total(self) -> int:
        return self.read + self.write


FUSIONS = ("separate", "recompute", "step")


def kernel_traffic(dim: int, m: int, n: int, *, fusion: str = "step") -> dict[str, Traffic]:
    """Least elements a token that the kernels of one GHC must move forward, each as wide as a slot, D/m numbers.

    Args:
        fusion: "separate": a width kernel (norm, coefficients, mix) that stores the carried state, then a depth kernel:
            2m + 4n slots. "recompute": the same two, the second reading H′ and mixing it again: 2m + 3n. "step": the
            depth connection of one sublayer and the width connection of the next in one kernel, the carried state
            never stored: 2m + 2n, so 2(r+1)D.

    The coefficients themselves (at most n(2m+n) a token) and the weights are left out; backward moves about 3(r+1)D.
    Raises ValueError for bad widths or an unknown `fusion`.
    """
    check_widths(dim, m, n)
    check_choice("fusion", fusion, FUSIONS)
    slots = {
        "separate": {"width": (n, m + n), "depth": (m + n, n)},
        "recompute": {"width": (n, m), "depth": (m + n, n)},
        "step": {"step": (n + m, n + m)},
    }[fusion]
    slot_width = dim // m
    return {kernel: Traffic(read * slot_width, write * slot_width) for kernel, (read, write) in slots.items()}


# -------------------------------------------------------------------------------------- whole models


def model_flops(cfg: VWNConfig, seq_len: int) -> dict[str, Flops]:
    """FLOPs of one forward pass, per token of a sequence of `seq_len`, by part; a training step is 1 + BACKWARD times.

    Attention is counted over all `seq_len` keys, as usual, though causality uses half. A MoE token meets its top_k
    experts and the router. "mtp" is the whole head with its own pass through the unembedding.
    Raises ValueError for seq_len < 1.
    """
    check_int("seq_len", seq_len)
    backbone = _stack_flops(cfg, cfg.n_layers, seq_len)
    unembedding = Flops(matmul=2 * cfg.dim * cfg.vocab_size)
    final_norm = Flops(elementwise=4 * cfg.dim)
    mtp = Flops()
    if cfg.mtp_layers:
        head = _stack_flops(cfg, cfg.mtp_layers, seq_len)
        mixing = Flops(matmul=4 * cfg.over_width * cfg.slot_width, elementwise=8 * cfg.over_width)  # two norms
        mtp = add(mixing, *head.values(), _reduce_flops(cfg), final_norm, unembedding)
    return {
        "embedding": _embedding_flops(cfg),
        **backbone,
        "reduce": _reduce_flops(cfg),
        "final norm": final_norm,
        "unembedding": unembedding,
        "mtp": mtp,
    }


def _stack_flops(cfg: VWNConfig, n_layers: int, seq_len: int) -> dict[str, Flops]:
    D, F = cfg.dim, cfg.ffn_width
    experts = cfg.top_k if cfg.n_experts else 1
    if cfg.m is None or cfg.n is None:
        connection = Flops(elementwise=D)  # H + T(H)
    else:
        connection = add(*ghc_flops(D, cfg.m, cfg.n, dynamic=cfg.dynamic).values())
    return {
        "attention projections": Flops(matmul=8 * D * D).times(n_layers),
        "attention scores": Flops(matmul=4 * seq_len * D).times(n_layers),
        "ffn": Flops(matmul=experts * 6 * D * F + 2 * D * cfg.n_experts).times(n_layers),
        "norms": Flops(elementwise=4 * D).times(2 * n_layers),
        "connections": connection.times(2 * n_layers),
    }


def _embedding_flops(cfg: VWNConfig) -> Flops:
    width = cfg.over_width if cfg.embed_rank is None else cfg.embed_rank
    return Flops(
        matmul=0 if cfg.embed_rank is None else 2 * width * cfg.over_width,
        elementwise=2 * width if cfg.ngram_buckets else 0,
    )


def _has_reduce_norm(cfg: VWNConfig) -> bool:
    return not cfg.is_plain and (cfg.r.denominator == 1 if cfg.reduce_norm is None else cfg.reduce_norm)


def _reduce_flops(cfg: VWNConfig) -> Flops:
    if cfg.is_plain:
        return Flops()
    # a GroupNorm subtracts a mean and has a bias: 7 FLOPs where an RMSNorm has 4
    return Flops(2 * cfg.dim * cfg.over_width, 7 * cfg.over_width if _has_reduce_norm(cfg) else 0)


def model_parameters(cfg: VWNConfig, *, active: bool = False) -> dict[str, int]:
    """Parameters by part, from the configuration alone. active: of the experts only the top_k that a token meets."""
    D, width = cfg.dim, cfg.over_width if cfg.embed_rank is None else cfg.embed_rank
    backbone, reduce = _stack_parameters(cfg, cfg.n_layers, active), _reduce_parameters(cfg)
    mtp = 0
    if cfg.mtp_layers:
        head = sum(_stack_parameters(cfg, cfg.mtp_layers, active).values())
        mtp = 2 * cfg.slot_width + 2 * cfg.slot_width**2 + head + reduce + D
    return {
        "embedding": cfg.vocab_size * width,
        "n-grams": 2 * cfg.ngram_buckets * width,
        "expand": 0 if cfg.embed_rank is None else width * cfg.over_width,
        **backbone,
        "reduce": reduce,
        "final norm": D,
        "unembedding": D * cfg.vocab_size,
        "mtp": mtp,
    }


def _stack_parameters(cfg: VWNConfig, n_layers: int, active: bool) -> dict[str, int]:
    D, F = cfg.dim, cfg.ffn_width
    experts = (cfg.top_k if active else cfg.n_experts) if cfg.n_experts else 1
    ghc = 0 if cfg.m is None or cfg.n is None else sum(ghc_parameters(D, cfg.m, cfg.n, dynamic=cfg.dynamic).values())
    return {
        "attention": n_layers * 4 * D * D,
        "ffn": n_layers * (experts * 3 * D * F + D * cfg.n_experts),
        "norms": 2 * n_layers * D,
        "connections": 2 * n_layers * ghc,
    }


def _reduce_parameters(cfg: VWNConfig) -> int:
    if cfg.is_plain:
        return 0
    return cfg.dim * cfg.over_width + (2 * cfg.over_width if _has_reduce_norm(cfg) else 0)


class Ratio(NamedTuple):
    """A VWN over the plain model with the same backbone; 1.02 is 2 % more."""

    flops: float
    parameters: float


def plain(cfg: VWNConfig) -> VWNConfig:
    """The plain Transformer that `cfg` is compared with: the same, with m = n = None."""
    return replace(cfg, m=None, n=None, embed_rank=None, reduce_norm=None)


def ratio_to_plain(cfg: VWNConfig, seq_len: int) -> Ratio:
    """FLOPs and parameters of `cfg` over those of `plain(cfg)`; backward is twice forward in both, so it drops out."""
    flops, flops_0 = (add(*model_flops(c, seq_len).values()).total for c in (cfg, plain(cfg)))
    size, size_0 = (sum(model_parameters(c).values()) for c in (cfg, plain(cfg)))
    return Ratio(flops / flops_0, size / size_0)
