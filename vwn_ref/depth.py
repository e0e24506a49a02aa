"""Depth as attention: Eq. (17) and §4 of arXiv 2511.11238. Layers l, s = 1 … L are sublayers; s = 0 is the embedding.

| paper                                    | here                    | shape                                   |
|------------------------------------------|-------------------------|-----------------------------------------|
| Aˡ, Bˡ                                   | `As[l - 1]`, `Bs[l - 1]` | [..., n, m+n], [..., m, n]             |
| Xˡ, zˡ                                   | `x[l - 1]`, `z[l - 1]`  | [..., D], what Tˡ reads and puts out    |
| H′ˡ                                      | `H[l]`                  | [..., n, d_b]                           |
| (Âˡ)ᵀ (Âˡ⁻¹)ᵀ … (Âˢ⁺¹)ᵀ                  | `carry(As, l, s)`       | [..., n, n]                             |
| … (Bˢ)ᵀ: what H′ˡ holds of layer s       | `state_map(As, Bs, l, s)` | [..., n, m]; [..., n, n] for s = 0    |
| (Åˡ)ᵀ …: what layer l reads of layer s   | `depth_map(As, Bs, l, s)` | [..., m, m]; [..., m, n] for s = 0    |

Where the paper and Eq. (17) part:

- §4 calls a residual a window of 2: it counts hidden states hˡ. Eq. (17) counts sublayer outputs, and by it a
  residual reads *every* earlier layer with the map 1. They do not differ in reach but in what can be told apart:
  all that H′ˡ holds are n numbers for each of d_b places, so at most n/m layers whole, or n at D/m each.
- §4 says that a spectral radius under 1 makes old contributions decay. So it does for one Â used again and again;
  for Â that differ by layer or token the radius of each says nothing about that of their product:
  (0 2; 0 0) and (0 0; 2 0) both have radius 0, their product 4. `depth_maps` shows the products themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from vwn_ref.config import check_choice, check_int
from vwn_ref.embedding import segments

Matrices = list[Tensor] | tuple[Tensor, ...]  # one a layer


@dataclass(frozen=True)
class Recording:
    """One forward pass: matrices, sublayer inputs and outputs, states. Lists over the layers; `H` begins with H′⁰."""

    A: list[Tensor]  # L × [..., n, m+n]
    B: list[Tensor]  # L × [..., m, n]
    x: list[Tensor]  # L × [..., D]
    z: list[Tensor]  # L × [..., D]
    H: list[Tensor]  # (L + 1) × [..., n, d_b]


def trace(connections: Iterable, layers: Iterable[Callable], H: Float[Tensor, "*b n d"]) -> Recording:
    """Run Eq. (10) through a stack of GHCs around `layers`, each [..., D] -> [..., D], and keep everything.

    A plain residual connection is recorded as the GHC that it is, m = n = 1 with A = (1 1), B = 1.
    """
    kept = Recording(A=[], B=[], x=[], z=[], H=[H])
    for connection, layer in zip(connections, layers, strict=True):
        if hasattr(connection, "matrices"):
            A, B = connection.matrices(H)
        else:
            A, B = H.new_ones(*H.shape[:-2], 1, 2), H.new_ones(*H.shape[:-2], 1, 1)
        x, state = connection.width(H)
        z = layer(x.clone())  # a layer may work in place
        H = connection.depth(z, state)
        kept.A.append(A)
        kept.B.append(B)
        kept.x.append(x)
        kept.z.append(z)
        kept.H.append(H)
    return kept


def record(model, tokens: Int[Tensor, "b t"], *, grad: bool = False) -> Recording:
    """`trace` of a VWNTransformer on tokens [b, t]; the MTP head is not in it. Without gradients unless `grad`.

    Raises ValueError where t > max_seq_len.
    """
    with torch.set_grad_enabled(grad):
        return trace(model.connections, model.sublayers, model._embedded(tokens))


# ------------------------------------------------------------------------------------------ Eq. (17)


def split(A: Float[Tensor, "*b n k"]) -> tuple[Float[Tensor, "*b n m"], Float[Tensor, "*b n n"]]:
    """A [..., n, m+n] -> Å [..., n, m] and Â [..., n, n]."""
    m = A.shape[-1] - A.shape[-2]
    return A[..., :m], A[..., m:]


def carry(As: Matrices, l: int, s: int) -> Float[Tensor, "*b n n"]:  # noqa: E741 - the paper's letter
    """(Âˡ)ᵀ (Âˡ⁻¹)ᵀ … (Âˢ⁺¹)ᵀ, the identity for s = l: what becomes of H′ˢ on its way to H′ˡ."""
    _check_layers(As, l, s, least=s)
    product = torch.eye(As[0].shape[-2], dtype=As[0].dtype, device=As[0].device).expand_as(split(As[0])[1])
    for A in As[s:l]:
        product = split(A)[1].mT @ product
    return product


def state_map(As: Matrices, Bs: Matrices, l: int, s: int) -> Float[Tensor, "*b n k"]:  # noqa: E741
    """What H′ˡ holds of layer s ≤ l: H′ˡ = … + map · Zˢ. For s = 0, of H′⁰.

    Raises ValueError unless 0 ≤ s ≤ l ≤ L.
    """
    kept = carry(As, l, s)
    return kept @ Bs[s - 1].mT if s else kept


def depth_map(As: Matrices, Bs: Matrices, l: int, s: int) -> Float[Tensor, "*b m k"]:  # noqa: E741
    """What layer l reads of layer s < l: Xˡ = … + map · Zˢ, (Åˡ)ᵀ (Âˡ⁻¹)ᵀ … (Âˢ⁺¹)ᵀ (Bˢ)ᵀ. For s = 0, of H′⁰.

    Raises ValueError unless 0 ≤ s < l ≤ L.
    """
    _check_layers(As, l, s, least=s + 1)
    return split(As[l - 1])[0].mT @ state_map(As, Bs, l - 1, s)


def unrolled_state(recording: Recording, l: int) -> Float[Tensor, "*b n d"]:  # noqa: E741
    """H′ˡ as the sum of Eq. (17), from the matrices and sublayer outputs alone, no state but H′⁰.

    Raises ValueError unless 0 ≤ l ≤ L.
    """
    As, Bs = recording.A, recording.B
    _check_layers(As, l, 0, least=0)
    H = carry(As, l, 0) @ recording.H[0]
    for t in range(l):  # the paper's t: layer l - t
        s = l - t
        H = H + carry(As, l, s) @ Bs[s - 1].mT @ segments(recording.z[s - 1], Bs[s - 1].shape[-2])
    return H


class DepthMaps(NamedTuple):
    """All maps at once: `layers[l-1, s-1]` = depth_map(l, s), zero for s ≥ l; `embedding[l-1]` = depth_map(l, 0)."""

    layers: Tensor  # [L, L, ..., m, m]
    embedding: Tensor  # [L, ..., m, n]


def depth_maps(As: Matrices, Bs: Matrices) -> DepthMaps:
    """Every `depth_map` of a stack of L layers, in one pass over the layers."""
    (n, L), m = (As[0].shape[-2], len(As)), Bs[0].shape[-2]
    lead, like = As[0].shape[:-2], As[0]
    held = like.new_zeros(*lead, n, L * m + n)  # H′ˡ as a map of (Z¹ … Zᴸ, H′⁰)
    held[..., L * m :] = torch.eye(n, dtype=like.dtype, device=like.device)
    rows = []
    for s, (A, B) in enumerate(zip(As, Bs, strict=True)):
        read, keep = split(A)
        rows.append(read.mT @ held)
        held = keep.mT @ held
        held[..., s * m : (s + 1) * m] = B.mT  # layer s + 1 has not been written before
    table = torch.stack(rows)  # [L, ..., m, L·m + n]
    layers = table[..., : L * m].unflatten(-1, (L, m)).movedim(-2, 1)
    return DepthMaps(layers, table[..., L * m :])


# ----------------------------------------------------------------------------------------- summaries


def strength(maps: DepthMaps) -> Float[Tensor, "L L *b"]:
    """One number a map, for a heatmap: row l − 1, column s = 0 … L − 1, with the embedding in column 0.

    ‖map‖_F / √m, which is 1 where layer l reads layer s whole and unchanged, 0 where it reads nothing of it.
    """
    m = maps.layers.shape[-1]
    layers = torch.linalg.matrix_norm(maps.layers)[:, :-1]  # nothing reads the last layer
    embedding = torch.linalg.matrix_norm(maps.embedding)[:, None]
    return torch.cat([embedding, layers], dim=1) / m**0.5


def contributions(recording: Recording, *, share: bool = False) -> Float[Tensor, "L L *b"]:
    """As `strength`, with the maps weighted by what really went through them.

    ‖map · Zˢ‖ / ‖Xˡ‖; these need not add up to 1, terms may cancel. With `share`, ⟨map · Zˢ, Xˡ⟩ / ‖Xˡ‖² instead:
    each row adds up to 1, and a term that the others cancel is negative.
    """
    maps, m = depth_maps(recording.A, recording.B), recording.B[0].shape[-2]
    L = len(recording.A)
    table = maps.layers.new_zeros(L, L, *recording.H[0].shape[:-2])
    for row in range(L):
        X = segments(recording.x[row], m)
        size = torch.linalg.matrix_norm(X)
        for s in range(row + 1):
            if s == 0:
                term = maps.embedding[row] @ recording.H[0]
            else:
                term = maps.layers[row, s - 1] @ segments(recording.z[s - 1], m)
            if share:
                table[row, s] = einsum(term, X, "... m d, ... m d -> ...") / size.square()
            else:
                table[row, s] = torch.linalg.matrix_norm(term) / size
    return table


def effective_window(table: Float[Tensor, "L L *b"], fraction: float = 0.1) -> Int[Tensor, " L *b"]:
    """How many layers back each layer looks, from `strength` or `contributions`.

    The largest l − s, s = 1 … l − 1, at which the entry is at least `fraction` of the largest entry of row l (the
    embedding left out); beyond it everything is smaller. 0 where a layer reads no earlier layer.
    Raises ValueError unless 0 < fraction ≤ 1, and for a table with a NaN in it.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction = {fraction}: must be > 0 and ≤ 1")
    if table.isnan().any():
        raise ValueError("table holds NaN: must be numbers, no window is known without them")
    L = table.shape[0]
    number = torch.arange(L, device=table.device)
    back = number[:, None] + 1 - number  # l − s for row l − 1, column s
    real = (back > 0) & (number > 0)  # earlier layers; column 0 is the embedding
    back, real = (t.reshape(L, L, *[1] * (table.ndim - 2)) for t in (back, real))
    size = torch.where(real, table.abs(), 0)
    seen = (size > 0) & (size >= fraction * size.amax(dim=1, keepdim=True))
    return torch.where(seen, back, 0).amax(dim=1)


def spectral_radius(A_hat: Float[Tensor, "*b n n"]) -> Float[Tensor, "*b"]:
    """Largest |eigenvalue| of Â, one a token; computed in at least float32. NaN where Â is not finite."""
    wide = A_hat if A_hat.dtype == torch.float64 else A_hat.float()
    finite = wide.isfinite().all(dim=-1).all(dim=-1)
    known = torch.where(finite[..., None, None], wide, 0)  # LAPACK may crash at a NaN
    return torch.where(finite, torch.linalg.eigvals(known).abs().amax(dim=-1), torch.nan)


# ------------------------------------------------------------------------------------------- windows


def no_residual_window() -> tuple[Tensor, Tensor]:
    """Window 1, (A, B) at m = n = 1: Å = 1, Â = 0, B = 1, so H′ˡ = Tˡ(H′ˡ⁻¹) and nothing older is left."""
    return torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0]])


def residual_window() -> tuple[Tensor, Tensor]:
    """Window 2 in the paper's count of states, (A, B) at m = n = 1: Å = Â = B = 1, H′ˡ = Tˡ(H′ˡ⁻¹) + H′ˡ⁻¹."""
    return torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0]])


def dense_window(n_layers: int) -> tuple[Tensor, Tensor]:
    """Window of all layers, (A, B) at m = 1, n = L + 1: nothing is dropped in L layers, and each reads the sum.

    Raises ValueError for n_layers < 1.
    """
    check_int("n_layers", n_layers)
    return hard_window(1, n_layers + 1, read=torch.ones(n_layers + 1, 1))


def hard_window(
    m: int,
    n: int,
    *,
    keep: str = "whole",
    compress: Float[Tensor, " m"] | None = None,
    read: Float[Tensor, "n m"] | None = None,
) -> tuple[Float[Tensor, "n k"], Float[Tensor, "m n"]]:
    """Shift-register matrices (A, B): the state is the outputs of the last layers, newest first, and nothing older.

    Args:
        keep: "whole": a layer takes m slots, its segments in order, and the others move m slots on. Holds the last
            ⌊n/m⌋ layers (and where m does not divide n, the first n mod m segments of the one before).
            "compressed": a layer takes slot 0, the others move one on. Holds the last n layers at D/m each.
            For m = 1 they are the same.
        compress: for "compressed", the weights of the m segments in that slot, B's first column: 1/m each, their
            mean, unless given. A linear map of whole segments is all that B can do; a choice *inside* a segment is not
            open to it. `torch.eye(m)[i]` keeps segment i and drops the others.
        read: Å. The first m columns of I_n unless given, as in Eq. (16): "whole" then reads the newest layer alone,
            "compressed" the m newest, one a segment. `initial_B(m, n).mT` reads the sum of all groups of m slots.

    Raises ValueError where n < m, for an unknown `keep`, for `compress` where it is not used, and for `compress` or
    `read` of another shape.

    >>> A, B = hard_window(1, 3)
    >>> A, B
    (tensor([[1., 0., 1., 0.],
            [0., 0., 0., 1.],
            [0., 0., 0., 0.]]), tensor([[1., 0., 0.]]))
    """
    check_int("m", m)
    check_int("n", n)
    if n < m:
        raise ValueError(f"n = {n}: must be ≥ m = {m}")
    check_choice("keep", keep, ("whole", "compressed"))
    for name, given, shape in (("compress", compress, (m,)), ("read", read, (n, m))):
        if given is not None and given.shape != shape:
            raise ValueError(f"{name} has shape {tuple(given.shape)}: must be {shape}")
    if keep == "whole":
        if compress is not None:
            raise ValueError('compress is given: must be None for keep = "whole"')
        step, B = m, torch.eye(m, n)
    else:
        weights = torch.full((m,), 1 / m) if compress is None else compress
        step, B = 1, torch.cat([weights[:, None], weights.new_zeros(m, n - 1)], dim=1)
    A_hat = torch.diag(torch.ones(n - step), step)  # Â[i, i + step] = 1: slot i moves to slot i + step
    A_ring = torch.eye(n, m) if read is None else read
    return torch.cat([A_ring, A_hat.to(A_ring.dtype)], dim=1), B


def _check_layers(As: Matrices, l: int, s: int, least: int) -> None:  # noqa: E741
    if s < 0 or not least <= l <= len(As):
        raise ValueError(
            f"l = {l}, s = {s}: must be 0 ≤ s {'<' if least > s else '≤'} l ≤ {len(As)}, the number of layers"
        )
