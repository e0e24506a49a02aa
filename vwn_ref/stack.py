"""The loop of Algorithm 1 of arXiv 2511.11238, lines 8-14: H′⁰ through all sublayers, and the reduce behind them.

    for each l:  H′ˡ = Bᵀ Tˡ(Åᵀ H′ˡ⁻¹) + Âᵀ H′ˡ⁻¹        Eq. (10)
    h = W_reduce GroupNorm(H′ᴸ)                          Eq. (4)

On a GPU the same is computed in another rhythm: one kernel does what happens between two sublayers, the depth
connection of one and the width connection of the next.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor, nn

from vwn_ref.backbone import Residual, Sublayer
from vwn_ref.config import VWNConfig
from vwn_ref.dynamic import DynamicGHC
from vwn_ref.ghc import GHC
from vwn_ref.ops import triton_kernels
from vwn_ref.reduce import Reduce


def connections_for(cfg: VWNConfig, n_layers: int) -> nn.ModuleList:
    """One connection for each sublayer of `n_layers` blocks: GHC, dynamic or static, or the plain residual."""

    def build() -> nn.Module:
        if cfg.m is None or cfg.n is None:
            return Residual()
        if cfg.dynamic:
            return DynamicGHC(cfg.dim, cfg.m, cfg.n, eps=cfg.norm_eps, kernels=cfg.kernels)
        return GHC(cfg.dim, cfg.m, cfg.n, kernels=cfg.kernels)

    return nn.ModuleList(build() for _ in range(2 * n_layers))


def reduce_for(cfg: VWNConfig) -> nn.Module:
    """Eq. (4), [..., n, d_b] -> [..., D]; for the plain model only the slot axis goes."""
    if cfg.m is None or cfg.n is None:
        return nn.Flatten(-2)
    return Reduce(cfg.dim, cfg.m, cfg.n, norm=cfg.reduce_norm, init=cfg.reduce_init, eps=cfg.norm_eps)


def through(H: Tensor, connections: nn.ModuleList, layers: nn.ModuleList, reduce: nn.Module | None = None) -> Tensor:
    """H′⁰ [..., n, d_b] through all sublayers -> H′ᴸ; with `reduce`, which it is handed to, h_reduce [..., D].

    connections: a GHC or residual for each of `layers`, the sublayers Tˡ of `vwn_ref.backbone`.
    """
    fused = _fused(H, connections, layers)
    if fused is not None:
        return _through_kernels(fused, H, connections, layers, reduce)
    for connection, layer in zip(connections, layers, strict=True):
        H = connection(H, layer)  # Eq. (10)
    return H if reduce is None else reduce(H)


def _through_kernels(
    fused: ModuleType, H: Tensor, connections: nn.ModuleList, layers: nn.ModuleList, reduce: nn.Module | None
) -> Tensor:
    """width | body, depth + width | body, depth + width | … | body, depth.

    A sublayer's RMSNorm goes with the width before it, the GroupNorm of reduce with the last depth.
    """
    connections[0]._check_state(H)
    parameters = [fused.Parameters(*c.parameters_in_order()) for c in connections]
    x, state = fused.enter(H, parameters[0], connections[0].eps, layers[0].norm)
    for l in range(1, len(layers)):  # noqa: E741 - the paper's letter
        x, state = fused.step(layers[l - 1].body(x), state, parameters[l], connections[l].eps, layers[l].norm)
    z = layers[-1].body(x)
    if type(reduce) is Reduce and reduce.norm is not None and not _watched(reduce, reduce.norm):
        return reduce.linear(fused.last(z, state, reduce.norm).flatten(-2))
    H = fused.depth(z, state)
    return H if reduce is None else reduce(H)


def _fused(H: Tensor, connections: nn.ModuleList, layers: nn.ModuleList) -> ModuleType | None:
    """`vwn_ref.kernels.fused` where every connection is a GHC of one kind that it computes, and nobody watches it.

    The fused path calls neither the connections nor the layers nor their norms, only bodies: they must be exactly what
    it takes them for, not subclasses or wrappers, and nobody's hooks may be passed over.
    """
    if len(connections) != len(layers) or len(layers) == 0:
        return None
    if not all(type(c) in (GHC, DynamicGHC) and c.kernels in ("auto", "triton") for c in connections):
        return None
    if H.device.type != "cuda" and any(c.kernels == "auto" for c in connections):
        return None
    if not all(type(layer) is Sublayer and type(layer.norm) is nn.RMSNorm for layer in layers):
        return None
    if len({(type(c), c.dim, c.m, c.n) for c in connections}) > 1:
        return None
    if _watched(*connections, *layers, *(layer.norm for layer in layers)):
        return None
    fused = triton_kernels()
    suited = fused is not None and all(fused.suited(H, *c.parameters_in_order()) for c in connections)
    return fused if suited else None


def _watched(*modules: nn.Module) -> bool:
    """True where a hook waits for one of these modules, or for any."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    anywhere = (f"_global{name}" for name in hooks)
    return any(getattr(m, name) for m in modules for name in hooks) or any(
        getattr(nn.modules.module, name) for name in anywhere
    )
