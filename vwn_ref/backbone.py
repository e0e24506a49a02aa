"""What a Virtual Width Network wraps: the sublayers Tˡ: D → D of an ordinary pre-norm Transformer.

RMSNorm; causal attention with rotary positions; SwiGLU FFN, or a top-k mixture of experts. Nothing here knows of n.
`Residual` is the connection that GHC replaces, with GHC's interface.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from vwn_ref.config import VWNConfig, check_choice


def rotate(x: Float[Tensor, "*b t d"], theta: float) -> Float[Tensor, "*b t d"]:
    """Rotary positions: turn the pair (x_i, x_{i+d/2}) at position p by the angle p · θ^(−2i/d)."""
    t, d = x.shape[-2:]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32  # 16-bit angles lose the position
    pair = torch.arange(0, d, 2, device=x.device, dtype=wide)
    angle = torch.outer(torch.arange(t, device=x.device, dtype=wide), theta ** (-pair / d))  # [t, d/2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def at_least_float32(x: Tensor) -> Tensor:
    """x, widened where it has 16 bits: softmaxes and losses need the precision."""
    return x if x.dtype == torch.float64 else x.float()


def has_values(x: Tensor) -> bool:
    """Whether the values of x may be looked at: not while torch.compile or torch.export traces, nor in a transform of
    torch.func, nor those of a tensor on the meta device or of a FakeTensorMode, which has none."""
    traced = torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
    return not (traced or x.is_meta or isinstance(x, FakeTensor))


class Attention(nn.Module):
    """Causal multi-head attention, [b, t, D] -> [b, t, D]."""

    def __init__(self, cfg: VWNConfig) -> None:
        super().__init__()
        self.n_heads, self.theta = cfg.n_heads, cfg.rope_theta
        self.qkv = nn.Linear(cfg.dim, 3 * cfg.dim, bias=False)
        self.out = nn.Linear(cfg.dim, cfg.dim, bias=False)

    def forward(self, x: Float[Tensor, "b t D"]) -> Float[Tensor, "b t D"]:
        qkv = rearrange(self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.n_heads)
        q, k = rotate(qkv[:2], self.theta)
        y = F.scaled_dot_product_attention(q, k, qkv[2], is_causal=True)
        return self.out(rearrange(y, "b h t d -> b t (h d)"))


class FFN(nn.Module):
    """SwiGLU: W_down (silu(W_gate x) ∘ W_up x), [..., D] -> [..., D]."""

    def __init__(self, cfg: VWNConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(cfg.dim, 2 * cfg.ffn_width, bias=False)
        self.out = nn.Linear(cfg.ffn_width, cfg.dim, bias=False)

    def forward(self, x: Float[Tensor, "*b D"]) -> Float[Tensor, "*b D"]:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * up)


class MoE(nn.Module):
    """Top-k mixture of SwiGLU experts, no token dropped, [..., D] -> [..., D].

    A token's k experts are weighted by the softmax over its k largest router scores. After a forward,
    `balance_loss` is E Σ_e f_e P_e, with f_e the share of choices that fell on expert e and P_e its mean router
    probability: 1 where the load is even, up to E/k where k experts take all; 0 for no tokens. It is not an output of
    the forward: activation checkpointing must be the kind with use_reentrant=False, the other would cut its gradient.
    """

    def __init__(self, cfg: VWNConfig) -> None:
        super().__init__()
        self.n_experts, self.top_k = cfg.n_experts, cfg.top_k
        self.router = nn.Linear(cfg.dim, cfg.n_experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(cfg.n_experts, 2 * cfg.ffn_width, cfg.dim))
        self.out = nn.Parameter(torch.empty(cfg.n_experts, cfg.dim, cfg.ffn_width))
        self.balance_loss: Tensor = torch.zeros(())

    def forward(self, x: Float[Tensor, "*b D"]) -> Float[Tensor, "*b D"]:
        flat = x.reshape(-1, x.shape[-1])  # [tokens, D]
        scores = at_least_float32(self.router(flat))  # [tokens, E]; 16-bit scores would tie
        top, chosen = scores.topk(self.top_k, dim=-1)  # [tokens, k]
        weight = top.softmax(dim=-1).to(x.dtype)
        hits = torch.zeros_like(scores).scatter(1, chosen, 1.0)  # [tokens, E], 0 or 1
        share = hits.sum(dim=0) / max(chosen.numel(), 1)
        P = scores.softmax(dim=-1).sum(dim=0) / max(flat.shape[0], 1)  # `len` would fix it in an export
        self.balance_loss = self.n_experts * (share * P).sum()
        y = torch.zeros_like(flat)
        fixed = not has_values(x)  # then no shape may depend on the data: every expert sees every token
        for e in range(self.n_experts):
            if fixed:
                gain = torch.where(chosen == e, weight, 0).sum(dim=-1, keepdim=True)
                y = y + gain * self._expert(e, flat)
            else:
                token, slot = (chosen == e).nonzero(as_tuple=True)
                y = y.index_add(0, token, weight[token, slot, None] * self._expert(e, flat[token]))
        return y.reshape(x.shape)

    def __getstate__(self) -> dict:  # for copy.deepcopy and pickle, which take no tensor that has a history
        loss = self.balance_loss
        gone = torch._C._functorch.is_functorch_wrapped_tensor(loss)  # of a transform of torch.func that has ended
        return {**self.__dict__, "balance_loss": torch.zeros(()) if gone else loss.detach()}

    def _expert(self, e: int, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_up[e]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.out[e])


class Sublayer(nn.Module):
    """Tˡ: pre-norm, then attention or FFN; [b, t, D] -> [b, t, D]. The residual is not in it."""

    def __init__(self, cfg: VWNConfig, kind: str) -> None:
        super().__init__()
        check_choice("kind", kind, ("attention", "ffn"))
        self.norm = nn.RMSNorm(cfg.dim, eps=cfg.norm_eps)
        self.body = Attention(cfg) if kind == "attention" else MoE(cfg) if cfg.n_experts else FFN(cfg)
        for name, weight in self.body.named_parameters():
            scale = (2 * cfg.n_layers) ** -0.5 if name.startswith("out") else 1.0  # 2·n_layers writes add up
            std = cfg.init_std if cfg.init_std is not None else weight.shape[-1] ** -0.5
            nn.init.normal_(weight, std=scale * std)

    def forward(self, x: Float[Tensor, "b t D"]) -> Float[Tensor, "b t D"]:
        return self.body(self.norm(x))


class Residual(nn.Module):
    """The plain residual connection H + T(H), with GHC's interface: one slot, D wide.

    What it hands to the sublayer is H itself, not a copy: a sublayer that changes its input in place changes H.
    """

    def width(self, H: Float[Tensor, "*b 1 D"]) -> tuple[Float[Tensor, "*b D"], tuple[Tensor, ...]]:
        """H [..., 1, D] -> what the sublayer reads [..., D], and the state that `depth` needs."""
        return H.squeeze(-2), (H,)

    def depth(self, z: Float[Tensor, "*b D"], state: tuple[Tensor, ...]) -> Float[Tensor, "*b 1 D"]:
        """The sublayer's output z [..., D] and `width`'s state -> the next H [..., 1, D]."""
        return state[0] + z.unsqueeze(-2)

    def forward(self, H: Float[Tensor, "*b 1 D"], layer) -> Float[Tensor, "*b 1 D"]:
        """H + T(H), around the sublayer `layer`, [..., D] -> [..., D]."""
        x, state = self.width(H)
        return self.depth(layer(x), state)


def unembedding(cfg: VWNConfig) -> nn.Linear:
    """D → vocab_size, drawn small (std 1/D) so that the first predictions are near uniform."""
    linear = nn.Linear(cfg.dim, cfg.vocab_size, bias=False)
    nn.init.normal_(linear.weight, std=1 / cfg.dim)
    return linear


def sublayers(cfg: VWNConfig, n_layers: int) -> list[Sublayer]:
    """T¹ … of `n_layers` blocks: attention, FFN, attention, FFN, …"""
    return [Sublayer(cfg, kind) for _ in range(n_layers) for kind in ("attention", "ffn")]
