"""The sublayers against their formulas."""

import cmath
import copy
import math

import pytest
import torch

from vwn_ref import VWNConfig
from vwn_ref.backbone import FFN, Attention, MoE, Residual, Sublayer, rotate


def randomised(module):
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.5)
    return module.double()


def test_rotation_by_complex_numbers():
    x = torch.randn(2, 3, 7, 10, dtype=torch.float64)
    turned = rotate(x, 100.0)
    for p in range(7):
        for i in range(5):
            turn = cmath.exp(1j * p * 100.0 ** (-2 * i / 10))
            z = torch.complex(x[:, :, p, i], x[:, :, p, i + 5]) * torch.tensor(turn, dtype=torch.complex128)
            torch.testing.assert_close(turned[:, :, p, i], z.real, rtol=1e-13, atol=1e-13)
            torch.testing.assert_close(turned[:, :, p, i + 5], z.imag, rtol=1e-13, atol=1e-13)


def test_rotation_in_16_bits_knows_its_position():
    """bfloat16 has no 1001: an angle in 16 bits would be off by up to 4."""
    x = torch.ones(1024, 8, dtype=torch.bfloat16)
    expected = rotate(x.double(), 1e4)
    torch.testing.assert_close(rotate(x, 1e4).double(), expected, rtol=0, atol=0.02)


def test_attention_by_loops():
    cfg = VWNConfig(vocab_size=5, dim=12, n_heads=3)
    attention = randomised(Attention(cfg))
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = (x @ w.T for w in attention.qkv.weight.chunk(3))
    y = torch.zeros_like(x)
    q, k = q.detach(), k.detach()
    for b in range(2):
        for h in range(3):
            head = slice(4 * h, 4 * h + 4)
            qh, kh = (rotate(a[b, None, None, :, head], cfg.rope_theta)[0, 0] for a in (q, k))
            for i in range(5):
                scores = [math.exp(float(qh[i] @ kh[j]) / 2) for j in range(i + 1)]  # √4 = 2; causal: j ≤ i
                y[b, i, head] = sum(s / sum(scores) * v[b, j, head] for j, s in enumerate(scores))
    torch.testing.assert_close(attention(x), y @ attention.out.weight.T, rtol=1e-10, atol=1e-10)


def test_ffn_by_formula():
    ffn = randomised(FFN(VWNConfig(vocab_size=5, dim=8, ffn_dim=11, n_heads=2)))
    x = torch.randn(3, 8, dtype=torch.float64)
    gate, up = ffn.gate_up.weight.split(11)
    g = x @ gate.T
    expected = ((g / (1 + torch.exp(-g))) * (x @ up.T)) @ ffn.out.weight.T
    torch.testing.assert_close(ffn(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n_experts, top_k", [(1, 1), (3, 1), (5, 2), (4, 4)])
def test_moe_by_loops(n_experts, top_k, monkeypatch):
    cfg = VWNConfig(vocab_size=5, dim=8, ffn_dim=11, n_heads=2, n_experts=n_experts, top_k=top_k)
    moe = randomised(MoE(cfg))
    x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    expected, load, prob = torch.zeros(2, 7, 8, dtype=torch.float64), [0.0] * n_experts, [0.0] * n_experts
    for b in range(2):
        for t in range(7):
            scores = (moe.router.weight @ x[b, t]).tolist()
            best = sorted(range(n_experts), key=lambda e: -scores[e])[:top_k]
            for e in best:
                gate, up = (moe.gate_up[e] @ x[b, t]).split(11)
                share = math.exp(scores[e]) / sum(math.exp(scores[f]) for f in best)
                expected[b, t] += share * (moe.out[e] @ (torch.nn.functional.silu(gate) * up))
                load[e] += 1 / (14 * top_k)
            for e in range(n_experts):
                prob[e] += math.exp(scores[e]) / sum(map(math.exp, scores)) / 14
    y = moe(x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    balance = n_experts * sum(f * p for f, p in zip(load, prob, strict=True))
    assert moe.balance_loss.item() == pytest.approx(balance, rel=1e-10)

    weights = [x, *moe.parameters()]
    gradients = torch.autograd.grad(y.square().sum() + moe.balance_loss, weights)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # the branch that torch.compile takes
    seen, expert = [], moe._expert
    monkeypatch.setattr(moe, "_expert", lambda e, tokens: seen.append(len(tokens)) or expert(e, tokens))
    dense = moe(x)
    assert seen == [14] * n_experts  # every expert sees every token, so that no shape depends on the data
    torch.testing.assert_close(dense, y, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(dense.square().sum() + moe.balance_loss, weights), gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_balance_of_one_token():
    moe = randomised(MoE(VWNConfig(vocab_size=5, dim=8, n_heads=2, n_experts=3, top_k=2)))
    x = torch.randn(1, 8, dtype=torch.float64)
    moe(x)
    probabilities = (x @ moe.router.weight.T).softmax(-1)[0].sort().values
    assert moe.balance_loss.item() == pytest.approx(3 * (probabilities[1] + probabilities[2]).item() / 2, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_router_weighs_16_bit_tokens_in_float32(dtype):
    """The balance loss is a sum over tokens, and 16 bits would round its terms."""
    moe = randomised(MoE(VWNConfig(vocab_size=5, dim=8, n_heads=2, n_experts=4, top_k=2))).to(dtype)
    x = torch.randn(50, 8).to(dtype)
    scores = moe.router(x)
    moe(x)
    wide = MoE(VWNConfig(vocab_size=5, dim=8, n_heads=2, n_experts=4, top_k=2))
    wide.router.forward = lambda _: scores.float()
    wide(x.float())
    assert moe.balance_loss.dtype == torch.float32
    torch.testing.assert_close(moe.balance_loss, wide.balance_loss, rtol=1e-6, atol=0)


def test_moe_is_copied_after_a_transform():
    """The balance loss that vmap has left behind is a tensor of a transform that is over."""
    moe = MoE(VWNConfig(vocab_size=5, dim=8, n_heads=2, n_experts=3, top_k=2))
    torch.nn.init.normal_(moe.gate_up), torch.nn.init.normal_(moe.out)
    x = torch.randn(3, 7, 8)
    torch.func.vmap(moe)(x)
    twin = copy.deepcopy(moe)
    assert twin.balance_loss == 0
    torch.testing.assert_close(twin(x), moe(x), rtol=0, atol=0)
    assert copy.deepcopy(moe).balance_loss == moe.balance_loss > 0


@pytest.mark.parametrize("kind", ["attention", "ffn"])
def test_sublayer_is_prenorm_without_residual(kind):
    sublayer = randomised(Sublayer(VWNConfig(vocab_size=5, dim=8, n_heads=2), kind))
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * sublayer.norm.weight
    torch.testing.assert_close(sublayer(x), sublayer.body(normed), rtol=1e-12, atol=1e-12)


def test_residual():
    H, layer = torch.randn(2, 3, 1, 8), torch.nn.Linear(8, 8)
    assert torch.equal(Residual()(H, layer), H + layer(H))
