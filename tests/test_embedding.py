"""Eqs. (1)-(3) and the n-gram tables."""

import pytest
import torch

from vwn_ref import OverWidthEmbedding
from vwn_ref.embedding import ngram_buckets, segments

SIZES = [(1, 1), (1, 4), (2, 3), (3, 5), (4, 4), (5, 7)]


def test_segments_are_contiguous():
    h = torch.arange(24.0).reshape(2, 12)
    for k in range(3):  # Eq. (1): the k-th row is entries kD/m … (k+1)D/m − 1
        assert torch.equal(segments(h, 3)[:, k], h[:, 4 * k : 4 * (k + 1)])


@pytest.mark.parametrize("m, n", SIZES)
@pytest.mark.parametrize("rank", [None, 60, 7])
def test_is_a_lookup_then_a_matrix_then_a_cut(m, n, rank):
    dim = 60
    embedding = OverWidthEmbedding(11, dim, m, n, rank).double()
    tokens = torch.randint(0, 11, (3, 5))
    H = embedding(tokens)
    assert H.shape == (3, 5, n, dim // m)
    for b, t, k, i in [(0, 0, 0, 0), (2, 4, n - 1, dim // m - 1), (1, 3, n // 2, 1)]:
        row = embedding.table[tokens[b, t]]
        if rank is not None:
            row = sum(embedding.expand.weight[:, j] * row[j] for j in range(rank))  # Eq. (3)
        torch.testing.assert_close(H[b, t, k, i], row[k * (dim // m) + i], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [None, 8, 20])
def test_first_columns_are_the_plain_table(rank):
    torch.manual_seed(3)
    plain = OverWidthEmbedding(50, 8, 1, 1)
    torch.manual_seed(3)
    wide = OverWidthEmbedding(50, 8, 2, 5, rank)
    tokens = torch.arange(50)[None]
    assert torch.equal(wide(tokens).flatten(-2)[..., :8], plain(tokens).flatten(-2))
    assert wide(tokens).flatten(-2)[..., 8:].std().item() == pytest.approx(0.3, rel=0.3)


def test_low_rank_has_rank_and_fewer_parameters():
    wide, low = OverWidthEmbedding(500, 8, 2, 16), OverWidthEmbedding(500, 8, 2, 16, rank=8)
    tokens = torch.arange(500)[None]
    assert torch.linalg.matrix_rank(wide(tokens)[0].flatten(-2)) == 64
    assert torch.linalg.matrix_rank(low(tokens)[0].flatten(-2)) == 8
    assert sum(p.numel() for p in low.parameters()) == 500 * 8 + 64 * 8


@pytest.mark.parametrize("order", [2, 3])
def test_ngram_hash_depends_on_just_the_last_tokens(order):
    tokens = torch.randint(0, 1000, (1, 40))
    base = ngram_buckets(tokens, order, 10_007)
    assert base.min() >= 0 and base.max() < 10_007
    for back in range(order + 2):
        changed = tokens.clone()
        changed[0, 20 - back] += 1
        same = ngram_buckets(changed, order, 10_007)[0, 20] == base[0, 20]
        assert bool(same) == (back >= order), back


def test_the_hash_is_what_it_always_was():
    """Trained tables would be of no use with another one. In Python's integers, cut to 64 bits."""
    multipliers = (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB)

    def bucket(tokens, at, order, buckets):
        there = [tokens[at - back] + 1 if at >= back else 0 for back in range(order)]
        mixed = sum(token * multiplier for token, multiplier in zip(there, multipliers, strict=False)) % 2**64
        mixed -= 2**64 * (mixed >= 2**63)  # int64
        return (mixed ^ (mixed >> 29)) % buckets

    tokens = [7, 0, 151_642, 3, 3]
    for order in (1, 2, 3):
        expected = [bucket(tokens, at, order, 10_007) for at in range(5)]
        assert ngram_buckets(torch.tensor([tokens]), order, 10_007)[0].tolist() == expected


def test_ngram_hash_spreads():
    pairs = torch.cartesian_prod(torch.arange(64), torch.arange(64))
    counts = torch.bincount(ngram_buckets(pairs, 2, 4096)[:, 1], minlength=4096).double()
    # 4096 pairs thrown into 4096 buckets at random leave e⁻¹ = 36.8 % empty
    assert (counts == 0).double().mean().item() == pytest.approx(0.368, abs=0.04)
    assert counts.max() <= 10


@pytest.mark.parametrize(
    "order, buckets, match", [(0, 5, "order = 0"), (4, 5, "order = 4: must be ≤ 3"), (2, 0, "buckets")]
)
def test_ngram_hash_refuses(order, buckets, match):
    with pytest.raises(ValueError, match=match):
        ngram_buckets(torch.zeros(1, 4, dtype=torch.long), order, buckets)


@pytest.mark.parametrize("length", [0, 1, 2, 5])
def test_ngrams_on_short_sequences(length):
    embedding = OverWidthEmbedding(9, 8, 2, 3, ngram_buckets=17)
    assert embedding(torch.zeros(2, length, dtype=torch.long)).shape == (2, length, 3, 4)


def test_ngram_tables_are_added_and_learn():
    embedding = OverWidthEmbedding(9, 8, 2, 3, rank=8, ngram_buckets=17).double()
    tokens = torch.randint(0, 9, (2, 6))
    before = embedding(tokens)
    embedding(tokens).sum().backward()
    for order, table in enumerate(embedding.ngram_tables, start=2):
        used = torch.zeros(17, dtype=torch.bool)
        used[ngram_buckets(tokens, order, 17).flatten()] = True
        assert torch.equal(table.grad.abs().sum(1) > 0, used)
    with torch.no_grad():
        embedding.ngram_tables[1][ngram_buckets(tokens, 3, 17)[1, 4]] += 1.0
    change = (embedding(tokens) - before)[1, 4].flatten()
    torch.testing.assert_close(change, embedding.expand.weight.sum(1))


@pytest.mark.parametrize(
    "kwargs, match",
    [
        (dict(vocab_size=0), "vocab_size = 0"),
        (dict(m=3), "m = 3: must divide dim = 8"),
        (dict(n=1), "n = 1: must be ≥ m = 2"),
        (dict(rank=0), "rank = 0"),
        (dict(ngram_buckets=-1), "ngram_buckets = -1"),
        (dict(std=float("nan")), "std = nan: must be a finite number ≥ 0"),
    ],
)
def test_bad_sizes(kwargs, match):
    with pytest.raises(ValueError, match=match):
        OverWidthEmbedding(**{"vocab_size": 5, "dim": 8, "m": 2, "n": 3, **kwargs})


@pytest.mark.parametrize("bad", [-1, 5, 2**40])
def test_token_out_of_range(bad):
    with pytest.raises(IndexError, match=rf"id {bad}: must be in 0 … 4"):
        OverWidthEmbedding(5, 8, 2, 3)(torch.tensor([[0, 4, bad]]))
