"""§3.4: the block-level linear and the head."""

import pytest
import torch

from vwn_ref import BlockLinear, MTPHead, VWNConfig, VWNTransformer


@pytest.mark.parametrize("m, n", [(1, 1), (1, 4), (2, 3), (4, 8), (5, 7)])
def test_block_linear_by_loops(m, n):
    mix = BlockLinear(3 * m, m).double()
    H, E = torch.randn(2, 2, 5, n, 3, dtype=torch.float64)  # each [2, 5, n, d_b]
    W = mix.linear.weight
    for k in range(n):
        expected = H[:, :, k] @ W[:, :3].T + E[:, :, k] @ W[:, 3:].T  # the same small W for every slot
        torch.testing.assert_close(mix(H, E)[:, :, k], expected, rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in mix.parameters()) == 2 * 3 * 3


@pytest.mark.parametrize("dim, m", [(256, 1), (256, 4)])
def test_initial_block_linear_keeps_the_size(dim, m):
    """Of two inputs of variance 1: each output is a sum of 2 d_b terms."""
    weight = BlockLinear(dim, m).linear.weight
    assert weight.std().item() == pytest.approx((2 * dim // m) ** -0.5, rel=0.05)
    assert weight.mean().abs() < 0.05 * weight.std()


def test_block_linear_refuses(no_shape_checks):
    with pytest.raises(ValueError, match="m = 3: must divide dim = 8"):
        BlockLinear(8, 3)
    with pytest.raises(ValueError, match=r"\(5, 3, 4\) and \(5, 2, 4\)"):
        BlockLinear(8, 2)(torch.zeros(5, 3, 4), torch.zeros(5, 2, 4))


def test_a_head_needs_layers():
    with pytest.raises(ValueError, match="mtp_layers = 0: must be an integer ≥ 1"):
        MTPHead(VWNConfig(vocab_size=40, dim=16, n_heads=2))


def build(m, n, **kwargs):
    cfg = VWNConfig(vocab_size=40, dim=16, n_layers=2, n_heads=2, m=m, n=n, mtp_layers=1, **kwargs)
    model = VWNTransformer(cfg).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("m, n", [(None, None), (2, 3), (4, 8)])
def test_losses_by_hand(m, n):
    """Which prediction meets which token: written out position by position."""
    model = build(m, n, mtp_weight=0.7)
    tokens = torch.randint(0, 40, (3, 9))
    *_, H = model.states(tokens)
    E = model.embedding(tokens)
    logits = model(tokens)
    next_losses = [-logits[b, i].log_softmax(-1)[tokens[b, i + 1]] for b in range(3) for i in range(8)]
    predictions = model.unembedding(model.mtp(H[:, :7], E[:, 1:8]))
    next2_losses = [-predictions[b, i].log_softmax(-1)[tokens[b, i + 2]] for b in range(3) for i in range(7)]
    losses = model.loss(tokens)
    assert losses.next.item() == pytest.approx(sum(next_losses).item() / 24, rel=1e-12)
    assert losses.next2.item() == pytest.approx(sum(next2_losses).item() / 21, rel=1e-12)
    assert losses.total.item() == pytest.approx(losses.next.item() + 0.7 * losses.next2.item(), rel=1e-12)


@pytest.mark.parametrize("m, n", [(None, None), (2, 3)])
def test_head_sees_no_later_token(m, n):
    """The prediction of token i+2 may depend on tokens up to i+1, and does."""
    model = build(m, n)
    tokens = torch.randint(0, 39, (1, 8))

    def head(tokens):
        *_, H = model.states(tokens)
        return model.mtp(H[:, :-1], model.embedding(tokens)[:, 1:])[0]

    base = head(tokens)
    for changed in range(8):
        other = tokens.clone()
        other[0, changed] += 1
        differs = (head(other) - base).abs().amax(-1) > 1e-9
        assert differs.tolist() == [i + 1 >= changed for i in range(7)]


def test_every_parameter_of_the_head_learns():
    model = build(2, 3)
    model.loss(torch.randint(0, 40, (2, 6))).next2.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.mtp.parameters())
