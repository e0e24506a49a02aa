"""Other ways to connect layers as choices of (m, n, A, B): §1, §2 and §4 of arXiv 2511.11238, as a table.

mHC is later than the paper; the other methods are named there.

| method               | m | n     | A = (Å | Â)                                  | B            | dynamic            |
|----------------------|---|-------|----------------------------------------------|--------------|--------------------|
| no residual          | 1 | 1     | (1 | 0)                                      | 1            | no                 |
| residual             | 1 | 1     | (1 | 1)                                      | 1            | no                 |
| Hyper-Connections    | 1 | n     | free; at first (e_k | I)                     | free; ones   | yes, scalar scales |
| Frac-Connections     | m | m     | free; at first (I | I)                       | diagonal; I  | yes, scalar scales |
| AltUp                | 1 | K     | (e_j | Pᵀ − P[j]ᵀ gᵀ)                        | gᵀ           | no                 |
| dense (DenseFormer)  | 1 | L + 1 | (α of this layer | I)                        | e_l          | no                 |
| mHC                  | 1 | n     | (positive | doubly stochastic)               | positive     | no                 |
| VWN                  | m | n ≥ m | free; (I_m over 0 | I)                       | free; (15)   | yes, scale each    |

Each function gives a GHC, or one a layer, that computes the method exactly. They are starting points, not constraints:
training one moves every entry of A and B, where the method's own parameters would keep its form.

Not settings of GHC: DeepNorm and post-norm (a norm on the state), highway networks and MUDD (gates on each feature,
other reads for q, k, v), and dynamic mHC (its matrices look at the whole state at once, Eqs. (13), (14) at one slot).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from vwn_ref.config import check_int
from vwn_ref.dynamic import DynamicGHC
from vwn_ref.ghc import GHC


def with_matrices(dim: int, A: Float[Tensor, "n k"], B: Float[Tensor, "m n"], *, kernels: str = "auto") -> GHC:
    """A static GHC with these matrices (copied, in A's dtype); m and n are read off B [m, n].

    Raises ValueError where B is not [m, n] and A [n, m+n], m does not divide dim, or n < m.
    """
    if B.ndim != 2:
        raise ValueError(f"B has shape {tuple(B.shape)}: must be [m, n]")
    m, n = B.shape
    if A.shape != (n, m + n):
        raise ValueError(f"A has shape {tuple(A.shape)}: must be [n, m+n] = {(n, m + n)} for B {tuple(B.shape)}")
    ghc = GHC(dim, m, n, kernels=kernels).to(A.dtype)
    with torch.no_grad():
        ghc.A.copy_(A)
        ghc.B.copy_(B)
    return ghc


def residual(dim: int, *, kernels: str = "auto") -> GHC:
    """h + T(h): m = n = 1 as it is initialised."""
    return GHC(dim, 1, 1, kernels=kernels)


# -------------------------------------------------------------------------------- Hyper-Connections


def hyper_connections(
    dim: int, n: int, layer: int = 0, *, dynamic: bool = True, scale: float = 0.01, kernels: str = "auto"
) -> GHC:
    """Hyper-Connections (Zhu et al. 2024, arXiv 2409.19606) at their initial values: n copies of the stream, m = 1.

    HC = ((0, B), (A_m, A_r)), H ← Bᵀ T(A_mᵀ H) + A_rᵀ H: Eq. (10) with Å = A_m, Â = A_r. What differs from a VWN at
    m = 1 is the start: Å = e_k with k = `layer` mod n, so that layers read the streams in turn, and one learned number
    s_α, s_β, at first 0.01, where VWN has a matrix of ones.
    """
    check_int("layer", layer, least=0)
    ghc = DynamicGHC(dim, 1, n, kernels=kernels) if dynamic else GHC(dim, 1, n, kernels=kernels)
    with torch.no_grad():
        ghc.A[:, 0] = torch.eye(n)[layer % n]
        if isinstance(ghc, DynamicGHC):
            ghc.S_alpha.fill_(scale)
            ghc.S_beta.fill_(scale)
    return ghc


def load_hyper_connections(weights: dict[str, Tensor], *, kernels: str = "auto") -> DynamicGHC:
    """Weights of `HyperConnections` of the PyPI package hyper-connections (one input view, no fractions) as a GHC.

    | there                            | here                              |
    |----------------------------------|-----------------------------------|
    | static_alpha [n, 1 + n]          | A, the same: input first          |
    | static_beta [n]                  | B[0]                              |
    | dynamic_alpha_fn [D, 1 + n]      | W_α / τ, so W_α = √D times it     |
    | dynamic_beta_fn [D]              | W_β[:, 0] / τ, likewise           |
    | dynamic_alpha_scale, beta_scale  | every entry of S_α; of S_β        |
    | norm.gamma [D], at first 0       | gain − 1                          |

    The same mathematics: that package's norm is x / max(‖x‖, 1e-12) · √D, an RMSNorm without ε, hence eps = 1e-30 here.
    Its paper has a LayerNorm in this place, which no gain turns into an RMSNorm: they agree on slots of mean 0 only.
    Neither the package nor the paper divides by τ, so the same W there is √D times as strong. Streams lie side by side
    in the batch there, (b s) … d, and in an axis of their own here, b … s d. With tanh = False it is no GHC.
    Raises ValueError for weights of another shape (more input views, fractions), KeyError for missing ones.
    """
    n, dim = weights["static_alpha"].shape[0], weights["norm.gamma"].shape[0]
    if weights["static_alpha"].shape[1] != 1 + n:
        raise ValueError(
            f"static_alpha has shape {tuple(weights['static_alpha'].shape)}: must be [n, 1+n], "
            "one input view and no fractions"
        )
    tau = dim**0.5
    ghc = DynamicGHC(dim, 1, n, eps=1e-30, kernels=kernels).to(weights["static_alpha"].dtype)
    with torch.no_grad():
        ghc.A.copy_(weights["static_alpha"])
        ghc.B[0] = weights["static_beta"]
        ghc.W_alpha.copy_(tau * weights["dynamic_alpha_fn"])
        ghc.W_beta[:, 0] = tau * weights["dynamic_beta_fn"]
        ghc.S_alpha.fill_(weights["dynamic_alpha_scale"])
        ghc.S_beta.fill_(weights["dynamic_beta_scale"])
        ghc.norm.weight.copy_(1 + weights["norm.gamma"])
    return ghc


# --------------------------------------------------------------------------------- Frac-Connections


def frac_connections(dim: int, m: int, *, dynamic: bool = True, scale: float = 0.01, kernels: str = "auto") -> GHC:
    """Frac-Connections (Zhu et al. 2025, arXiv 2503.14125) at their initial values: n = m, nothing is widened.

    FC = ((0, B), (Y, A)), [m+1, 2m]: H ← B ∘ T(Yᵀ H) + Aᵀ H with H the m segments of h and one β a segment, so that
    segment i of the output can only be written back to segment i. Here: Å = Y, Â = A, and a diagonal B, which the
    initial B is at n = m. The dynamic β_i = s_β tanh(H̄_i · w_β) + β_i is W_β with w_β τ in each column and S_β = s_β I.
    """
    ghc = DynamicGHC(dim, m, m, kernels=kernels) if dynamic else GHC(dim, m, m, kernels=kernels)
    if isinstance(ghc, DynamicGHC):
        with torch.no_grad():
            ghc.S_alpha.fill_(scale)
            ghc.S_beta.copy_(scale * torch.eye(m))
    return ghc


# --------------------------------------------------------------------------------------------- AltUp


def altup(
    dim: int,
    P: Float[Tensor, "K K"],
    g: Float[Tensor, " K"],
    active: int,
    *,
    residual: bool = False,
    kernels: str = "auto",
) -> GHC:
    """Alternating Updates (Baykal et al. 2023, arXiv 2301.13310): K blocks D wide, one computed with; m = 1, n = K.

    With j = `active`, which alternates over the layers:
        predict  x̂_i = Σ_k P[i, k] x_k
        compute  x̃ = T(x_j)
        correct  x_i ← x̂_i + g_i (x̃ − x̂_j)
    The correction takes out g_i x̂_j = g_i Σ_k P[j, k] x_k, so what block i keeps of block k is P[i, k] − g_i P[j, k]:
        Å = e_j,   Â[k, i] = P[i, k] − g_i P[j, k],   B[0, i] = g_i.

    residual: T(x) = x + F(x), and it is F that the GHC is put around. Its x_j goes into Â as well: Â[j, i] += g_i.
    Raises ValueError unless P is [K, K] and 0 ≤ active < K.
    """
    K = len(g)
    if P.shape != (K, K):
        raise ValueError(f"P has shape {tuple(P.shape)}: must be [K, K] = {(K, K)} for the {K} numbers of g")
    check_int("active", active, least=0)
    if active >= K:
        raise ValueError(f"active = {active}: must be ≥ 0 and < K = {K}, the number of blocks")
    read = torch.eye(K, dtype=P.dtype, device=P.device)[:, active : active + 1]
    carry = P.T - torch.outer(P[active], g)
    if residual:
        carry = carry + torch.outer(read[:, 0], g)
    return with_matrices(dim, torch.cat([read, carry], dim=1), g[None, :], kernels=kernels)


# --------------------------------------------------------------------------------- dense connections


def dense(dim: int, weights: list[Tensor], *, kernels: str = "auto") -> list[GHC]:
    """Dense connections with a weight each: layer l reads Σ_{s<l} weights[l−1][s] · X_s, m = 1, n = L + 1.

    X_0 is the embedding and X_l = T^l(…) the output of layer l. So DenseFormer (Pagliardini et al. 2024,
    arXiv 2402.02622), where T^l is a whole block with its residual and weights[l−1] is α of the average after block
    l − 1 (weights[0] = (1), there is none before the first); its last average is a row of what reads the state after
    the last layer. DenseNet's concatenation is not this, each layer would read L times D.

    Slot s is X_s for good: Â = I, layer l writes slot l, B = e_l, and reads by Å = (weights[l−1], 0 …). H′⁰ must hold
    the embedding in slot 0 and zeros elsewhere: `first_slot`. n grows with the depth, which is why VWN's does not: see
    `vwn_ref.depth.hard_window` for what n slots can hold. Raises ValueError where weights[l−1] does not have l numbers.
    """
    n = len(weights) + 1
    ghcs = []
    for l, alpha in enumerate(weights, start=1):  # noqa: E741 - the paper's letter
        if alpha.shape != (l,):
            raise ValueError(
                f"weights[{l - 1}] has shape {tuple(alpha.shape)}: must be ({l},), one for each of X_0 … X_{l - 1}"
            )
        read = torch.cat([alpha, alpha.new_zeros(n - l)])[:, None]
        identity = torch.eye(n, dtype=alpha.dtype, device=alpha.device)
        ghcs.append(with_matrices(dim, torch.cat([read, identity], dim=1), identity[l : l + 1], kernels=kernels))
    return ghcs


def first_slot(h: Float[Tensor, "*b D"], n: int) -> Float[Tensor, "*b n D"]:
    """H′⁰ for m = 1 with h in slot 0 and zeros in the others."""
    return torch.nn.functional.pad(h.unsqueeze(-2), (0, 0, 0, n - 1))


# ----------------------------------------------------------------------------------------------- mHC


def sinkhorn(logits: Float[Tensor, "n n"], iterations: int = 20) -> Float[Tensor, "n n"]:
    """exp(logits) with columns and rows scaled in turn so that each sums to 1: rows exactly, columns nearly.

    The order is mHC's, rows last. How near the columns come depends on the logits: the wider spread, the slower.
    Raises ValueError for iterations < 1 or logits that are not square.
    """
    check_int("iterations", iterations)
    if logits.ndim != 2 or logits.shape[0] != logits.shape[1]:
        raise ValueError(f"logits have shape {tuple(logits.shape)}: must be [n, n]")
    log_M = logits  # of logarithms, so that nothing overflows
    for _ in range(iterations):
        log_M = log_M - log_M.logsumexp(dim=0, keepdim=True)
        log_M = log_M - log_M.logsumexp(dim=1, keepdim=True)
    return log_M.exp()


def manifold_constrained(
    dim: int,
    pre: Float[Tensor, " n"],
    post: Float[Tensor, " n"],
    res: Float[Tensor, "n n"],
    *,
    iterations: int = 20,
    kernels: str = "auto",
) -> GHC:
    """The static part of mHC (Xie et al. 2025, arXiv 2512.24880) from its logits: Hyper-Connections held in bounds.

    x ← H_res x + H_postᵀ F(H_pre x), H_pre = σ(pre), H_post = 2σ(post), H_res = sinkhorn(res) doubly stochastic. So
    Å = H_preᵀ, B = H_post, Â = H_resᵀ. Each new stream is carried as a weighted mean of old ones, exactly, and the mean
    of all streams is carried whole, as nearly as Sinkhorn has converged; then ‖Â‖ = 1, and no product of them grows.
    """
    A = torch.cat([pre.sigmoid()[:, None], sinkhorn(res, iterations).T], dim=1)
    return with_matrices(dim, A, 2 * post.sigmoid()[None, :], kernels=kernels)
