"""Algorithm 1 of arXiv 2511.11238: the Virtual Width Transformer, and the plain one from the same code.

Line by line: H′⁰ = Reshape(e); for each sublayer H′ˡ = Bᵀ Tˡ(Åᵀ H′ˡ⁻¹) + Âᵀ H′ˡ⁻¹; h = Linear(GroupNorm(H′ᴸ));
y = Unembedding(Norm(h)). The algorithm also lists a matrix R ∈ R^{n×m} that it never uses; there is none here.

With m = n = None the state has one slot, D wide, the connection is the plain residual and reduce only drops the
slot axis. Each part draws its initial weights from a stream of its own, so one seed gives both the same backbone. (Not
the same MTP head: its mixing matrix, whose size depends on m, is drawn before its blocks.)

Not included: dropout, biases, weight tying, key-value cache.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from vwn_ref.backbone import MoE, at_least_float32, sublayers, unembedding
from vwn_ref.config import VWNConfig, check_float, check_int
from vwn_ref.embedding import OverWidthEmbedding
from vwn_ref.ghc import parameter_groups
from vwn_ref.mtp import MTPHead
from vwn_ref.stack import connections_for, reduce_for, through


class Losses(NamedTuple):
    """Scalars, in nats a token. total = next + mtp_weight · next2 + balance_weight · balance."""

    total: Tensor
    next: Tensor  # cross-entropy of token i+1
    next2: Tensor  # cross-entropy of token i+2 by the MTP head; 0 without one
    balance: Tensor  # MoE load balance, mean over the layers; 0 without experts


class VWNTransformer(nn.Module):
    """Tokens [b, t] -> logits [b, t, vocab_size].

    >>> cfg = VWNConfig(vocab_size=1024, dim=64, n_layers=4, n_heads=4, m=4, n=8)
    >>> model = VWNTransformer(cfg)
    >>> model(torch.zeros(2, 5, dtype=torch.long)).shape
    torch.Size([2, 5, 1024])
    """

    def __init__(self, cfg: VWNConfig) -> None:
        super().__init__()
        self.cfg = cfg
        with unset_fake_temporarily():  # a FakeTensorMode draws nothing
            seed = int(torch.randint(2**62, (), device="cpu"))  # the device is given for models built elsewhere
        with stream(seed, "embedding"):
            m, n = (1, 1) if cfg.m is None or cfg.n is None else (cfg.m, cfg.n)
            self.embedding = OverWidthEmbedding(
                cfg.vocab_size, cfg.dim, m, n, cfg.embed_rank, ngram_buckets=cfg.ngram_buckets, std=cfg.embed_std
            )
        with stream(seed, "backbone"):
            self.sublayers = nn.ModuleList(sublayers(cfg, cfg.n_layers))
        self.connections = connections_for(cfg, cfg.n_layers)
        with stream(seed, "reduce"):
            self.reduce = reduce_for(cfg)
        self.norm = nn.RMSNorm(cfg.dim, eps=cfg.norm_eps)
        with stream(seed, "unembedding"):
            self.unembedding = unembedding(cfg)
        with stream(seed, "mtp"):
            self.mtp = MTPHead(cfg) if cfg.mtp_layers else None

    def states(self, tokens: Int[Tensor, "b t"]) -> Iterator[Float[Tensor, "b t n d"]]:
        """H′⁰, H′¹, …, H′ᴸ, each [b, t, n, d_b] ([b, t, 1, D] for the plain model).

        For looking at: `forward` computes the same by `vwn_ref.stack.through`, which need not make every state.
        Raises ValueError where the sequence is longer than `max_seq_len`; see also `OverWidthEmbedding`.
        """
        H = self._embedded(tokens)
        yield H
        for connection, layer in zip(self.connections, self.sublayers, strict=True):
            H = connection(H, layer)  # Eq. (10)
            yield H

    def forward(self, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b t v"]:
        """Tokens [b, t] -> logits [b, t, vocab_size]; position i predicts token i+1.

        Raises ValueError unless tokens are [b, t] with t ≤ max_seq_len; see also `OverWidthEmbedding`.
        """
        h = through(self._embedded(tokens), self.connections, self.sublayers, self.reduce)
        return self.unembedding(self.norm(h))

    def loss(self, tokens: Int[Tensor, "b t"]) -> Losses:
        """Training losses of windows of t ≥ 2 tokens (≥ 3 with MTP): each token but the first is a target.

        The next-2-token loss, where there is an MTP head, covers the targets that have two tokens before them.
        Every token is one of the text: there is no padding and no mask.
        Raises ValueError for windows too short to have a target, or longer than max_seq_len + 1, and IndexError for a
        token id out of range (on CPU).
        """
        shortest, longest = 3 if self.mtp else 2, self.cfg.max_seq_len + 1
        if tokens.ndim != 2 or tokens.shape[0] == 0 or not shortest <= tokens.shape[1] <= longest:
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}: must be [b, t] with b ≥ 1 and {shortest} ≤ t ≤ {longest}, "
                "the last token is only a target"
            )
        self.embedding.check_tokens(tokens[:, -1:])  # these are not embedded
        E = self._embedded(tokens[:, :-1])
        if self.mtp is None:
            h = through(E, self.connections, self.sublayers, self.reduce)
        else:
            H = through(E, self.connections, self.sublayers)  # two read it: reduce and the head
            h = self.reduce(H)
        loss_next = cross_entropy(self.unembedding(self.norm(h)), tokens[:, 1:])
        zero = loss_next.new_zeros(())
        loss_next2 = zero
        if self.mtp is not None:
            h = self.mtp(H[:, :-1], E[:, 1:])  # position i: state of i, embedding of token i+1
            loss_next2 = cross_entropy(self.unembedding(h), tokens[:, 2:])
        routers = [layer.balance_loss for layer in self.modules() if isinstance(layer, MoE)]
        balance = torch.stack(routers).mean() if routers else zero
        total = loss_next + self.cfg.mtp_weight * loss_next2 + self.cfg.balance_weight * balance
        return Losses(total, loss_next, loss_next2, balance)

    @torch.no_grad()
    def generate(
        self,
        tokens: Int[Tensor, "b t"],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "b t2"]:
        """Continue `tokens` [b, t ≥ 1] by sampling -> [b, t + max_new_tokens].

        temperature 0 takes the likeliest token; top_k keeps that many candidates. Past `max_seq_len` tokens the
        oldest are out of view. Raises ValueError for a bad argument.
        """
        check_int("max_new_tokens", max_new_tokens, least=0)
        check_float("temperature", temperature)
        if top_k is not None:
            check_int("top_k", top_k)
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}: must be [b, t] with t ≥ 1 to continue")
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            for _ in range(max_new_tokens):
                H = through(
                    self._embedded(tokens[:, -self.cfg.max_seq_len :]), self.connections, self.sublayers
                )  # only the last position goes on from here
                logits = at_least_float32(self.unembedding(self.norm(self.reduce(H[:, -1]))))
                if temperature == 0:
                    choice = logits.argmax(dim=-1, keepdim=True)
                else:
                    if top_k is not None:
                        best = logits.topk(min(top_k, logits.shape[-1]))
                        logits = torch.full_like(logits, float("-inf")).scatter(1, best.indices, best.values)
                    # below 1e-30 the quotient would overflow; the likeliest token is long certain there
                    p = (logits / max(temperature, 1e-30)).softmax(dim=-1)
                    choice = torch.multinomial(p, 1, generator=generator)
                tokens = torch.cat([tokens, choice.to(tokens.dtype)], dim=1)
        finally:
            for module in training:
                module.training = True
        return tokens

    def parameter_groups(self, weight_decay: float, *, decay_static: bool = False) -> list[dict]:
        """`vwn_ref.ghc.parameter_groups` of this model."""
        return parameter_groups(self, weight_decay, decay_static=decay_static)

    def _embedded(self, tokens: Tensor) -> Tensor:
        """H′⁰, if the tokens are what a model takes."""
        if tokens.ndim != 2 or tokens.shape[1] > self.cfg.max_seq_len:
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}: must be [b, t] with t ≤ max_seq_len = {self.cfg.max_seq_len}"
            )
        return self.embedding(tokens)


def cross_entropy(logits: Float[Tensor, "b t v"], targets: Int[Tensor, "b t"]) -> Float[Tensor, ""]:
    """Mean over all positions, in nats, summed in at least float32. No id is a mask, not -100 either."""
    no_mask = torch.iinfo(torch.int64).min
    return F.cross_entropy(at_least_float32(logits).flatten(0, 1), targets.flatten().long(), ignore_index=no_mask)


@contextmanager
def stream(seed: int, name: str) -> Iterator[None]:
    """Draw from a random stream that only `seed` and `name` fix; the global one is left as it was.

    Covers the CPU's generator, and the current GPU's where torch's default device is a GPU.
    """
    devices = [torch.cuda.current_device()] if torch.get_default_device().type == "cuda" else []
    number = (seed + zlib.crc32(name.encode())) % 2**63
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(number)  # torch.manual_seed would reseed every GPU, for good
        if devices:
            torch.cuda.manual_seed(number)
        yield
