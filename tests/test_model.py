"""Algorithm 1 as a whole."""

import copy
import dataclasses
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from vwn_ref import GHC, DynamicGHC, VWNConfig, VWNTransformer
from vwn_ref.backbone import MoE, Sublayer
from vwn_ref.depth import record
from vwn_ref.model import cross_entropy, stream

SMALL = dict(vocab_size=50, dim=16, n_layers=3, n_heads=2)
SIZES = [(1, 1), (1, 4), (2, 3), (4, 4), (4, 8), (8, 24)]


def build(seed=0, dtype=torch.float64, **kwargs):
    torch.manual_seed(seed)
    return VWNTransformer(VWNConfig(**{**SMALL, **kwargs})).to(dtype)


def randomise(model, scale=0.3):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn_like(p))
    return model


@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("extra", [{}, {"n_experts": 4, "top_k": 2}, {"embed_rank": 16}, {"ngram_buckets": 31}])
@pytest.mark.parametrize("m, n", SIZES)
def test_first_m_slots_are_the_plain_transformer(m, n, dynamic, extra, kernels):
    """Exactly, at every layer: (15) and (16) mix nothing, and the backbone weights are the same."""
    plain = build(**{k: v for k, v in extra.items() if k != "embed_rank"})
    wide = build(m=m, n=n, dynamic=dynamic, kernels=kernels, **extra)
    tokens = torch.randint(0, 50, (2, 9))
    states = list(zip(plain.states(tokens), wide.states(tokens), strict=True))
    assert len(states) == 7
    for plain_state, wide_state in states:
        assert torch.equal(wide_state[..., :m, :].flatten(-2), plain_state.flatten(-2))


def test_all_other_slots_follow_the_same_updates():
    """At the start slot j takes what segment j mod m takes, on top of its own embedding."""
    model = build(m=2, n=5)
    first, *_, last = model.states(torch.randint(0, 50, (2, 9)))
    for j in range(5):
        torch.testing.assert_close((last - first)[..., j, :], (last - first)[..., j % 2, :], rtol=1e-12, atol=1e-12)


def test_with_reduce_first_and_no_norm_the_logits_are_the_plain_ones():
    tokens = torch.randint(0, 50, (2, 9))
    wide = build(m=4, n=8, reduce_init="first", reduce_norm=False)
    assert torch.equal(wide(tokens), build()(tokens))


def test_trained_alike_means_different():
    """The identity is a property of the start: away from it the models part."""
    tokens = torch.randint(0, 50, (2, 9))
    plain, wide = build(), build(m=2, n=4)
    for ghc in wide.connections:
        randomise(ghc)
    *_, plain_last = plain.states(tokens)
    *_, wide_last = wide.states(tokens)
    assert (wide_last[..., :2, :].flatten(-2) - plain_last.flatten(-2)).abs().max() > 0.1


@pytest.mark.parametrize("m, n", [(None, None), (2, 3), (4, 8)])
def test_causal(m, n):
    model = randomise(build(m=m, n=n, ngram_buckets=31))
    tokens = torch.randint(0, 49, (1, 9))
    base = model(tokens)[0]
    for changed in range(9):
        other = tokens.clone()
        other[0, changed] += 1
        differs = (model(other)[0] - base).abs().amax(-1) > 1e-9
        assert differs.tolist() == [i >= changed for i in range(9)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("m, n", [(None, None), (2, 3), (4, 8)])
def test_dtypes(m, n, dtype, tolerance):
    """bf16 has 8 bits: an error of a few 2⁻⁸ of the logits' size after 3 blocks."""
    exact = randomise(build(m=m, n=n, mtp_layers=1), 0.1)
    low = build(m=m, n=n, mtp_layers=1, dtype=dtype)
    low.load_state_dict(exact.state_dict())
    tokens = torch.randint(0, 50, (2, 9))
    error = (low(tokens).double() - exact(tokens)).norm() / exact(tokens).norm()
    assert 0 < error < tolerance
    low.loss(tokens).total.backward()
    assert all(p.grad.isfinite().all() for p in low.parameters())


def test_same_seed_same_model_and_the_global_stream_moves_alike():
    """Plain and wide use up the same global random numbers, so what is drawn after them agrees too."""
    models, after = [], []
    for kwargs in (dict(m=2, n=4), dict(m=2, n=4), {}):
        models.append(build(seed=5, **kwargs).state_dict())
        after.append(torch.rand(3))
    assert all(torch.equal(models[0][k], models[1][k]) for k in models[0])
    assert torch.equal(after[0], after[1]) and torch.equal(after[0], after[2])
    other = build(seed=6, m=2, n=4).state_dict()
    assert not torch.equal(models[0]["embedding.table"], other["embedding.table"])


def test_weight_decay_rule():
    model = build(m=2, n=4, n_experts=2, mtp_layers=1)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, exempt = ({names[id(p)] for p in g["params"]} for g in model.parameter_groups(0.1))
    assert decayed | exempt == set(names.values()) and not decayed & exempt
    for name in names.values():
        last = name.rsplit(".")[-1]
        static_or_gain = last in ("A", "B", "bias") or ("norm" in name and last == "weight")
        assert (name in exempt) == static_or_gain, name
    assert [g["weight_decay"] for g in model.parameter_groups(0.1)] == [0.1, 0.0]
    assert any(
        "connections" in names[id(p)] and names[id(p)].endswith("W_beta")
        for p in model.parameter_groups(0.1)[0]["params"]
    )
    with_static = model.parameter_groups(0.1, decay_static=True)[0]["params"]
    assert {names[id(p)] for p in with_static} - decayed == {n for n in names.values() if n.split(".")[-1] in "AB"}


@pytest.mark.parametrize("kernels", ["reference", "auto", "cpu"])
def test_copies_and_pickles(kernels):
    model = randomise(build(m=2, n=4, kernels=kernels, n_experts=2))
    tokens = torch.randint(0, 50, (2, 9))
    assert model.loss(tokens).balance.requires_grad  # a step leaves nothing behind that cannot be copied
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(tokens), model(tokens))


@pytest.mark.parametrize("widths", [{"m": 2, "n": 4}, {}], ids=["VWN", "plain"])
def test_generate(widths):
    model = randomise(build(**widths, max_seq_len=12)).train()
    start = torch.randint(0, 50, (2, 3))
    greedy = model.generate(start, 4, temperature=0.0)
    assert greedy.shape == (2, 7) and torch.equal(greedy[:, :3], start) and model.training
    assert torch.equal(greedy[:, -1], model(greedy[:, :-1])[:, -1].argmax(-1))
    assert torch.equal(greedy, model.generate(start, 4, top_k=1))
    draw = [model.generate(start, 20, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    assert draw[0].shape == (2, 23)  # past max_seq_len
    many = model.generate(start[:1].repeat(400, 1), 1, top_k=3)[:, -1]
    assert set(many.tolist()) <= set(model(start[:1])[0, -1].topk(3).indices.tolist())


def test_generate_leaves_every_mode_as_it_was():
    model = build(m=2, n=3).train()
    model.reduce.eval()
    before = [module.training for module in model.modules()]
    during = []
    model.norm.register_forward_hook(lambda module, *a: during.extend(part.training for part in model.modules()))
    model.generate(torch.zeros(1, 2, dtype=torch.long), 1)
    assert during and not any(during)
    assert [module.training for module in model.modules()] == before and True in before and False in before


def test_generate_at_the_edges():
    model = build(m=2, n=4)
    start = torch.randint(0, 50, (2, 3))
    cold = [model.generate(start, 4, temperature=t) for t in (0.0, 1e-29, 1e-45, 1e-300)]
    assert all(torch.equal(tokens, cold[0]) for tokens in cold)
    assert model.generate(start[:0], 2, top_k=99).shape == (0, 5)
    assert model.generate(start.int(), 2).dtype == torch.int32
    assert torch.equal(model.generate(start, 0), start)
    with torch.no_grad():
        model.unembedding.weight.zero_()  # every token is as likely
    assert len(set(model.generate(start[:1].repeat(200, 1), 1, top_k=3)[:, -1].tolist())) == 3
    model.train()
    with pytest.raises(IndexError):
        model.generate(start + 50, 1)
    assert model.training


def test_built_without_memory_and_then_filled():
    """On the meta device; to_empty gives memory, a state_dict the values."""
    model, tokens = build(m=2, n=4, n_experts=2, ngram_buckets=7), torch.randint(0, 50, (2, 9))
    with torch.device("meta"):
        empty = VWNTransformer(model.cfg).double()
    assert empty.loss(tokens.to("meta")).total.is_meta
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    assert torch.equal(empty(tokens), model(tokens))


@pytest.mark.parametrize("n_experts", [0, 3])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_built_and_trained_with_shapes_alone(kernels, n_experts):
    """In a FakeTensorMode, as tools that estimate memory use it."""
    cfg = VWNConfig(**SMALL, m=2, n=4, n_experts=n_experts, mtp_layers=1, ngram_buckets=7, kernels=kernels)
    with FakeTensorMode():
        model = VWNTransformer(cfg)
        loss = model.loss(torch.randint(0, 50, (3, 9))).total
        loss.backward()
        assert isinstance(loss, FakeTensor) and loss.shape == ()
        assert all(isinstance(p.grad, FakeTensor) and p.grad.shape == p.shape for p in model.parameters())
        assert model(torch.randint(0, 50, (3, 0))).shape == (3, 0, 50)
    sizes = {name: p.shape for name, p in VWNTransformer(cfg).named_parameters()}
    assert {name: p.shape for name, p in model.named_parameters()} == sizes


@pytest.mark.parametrize("kernels, n_experts", [("reference", 0), ("auto", 0), ("auto", 3)])
def test_gradients_by_sample(kernels, n_experts, no_shape_checks):
    model = randomise(build(m=2, n=4, ngram_buckets=7, kernels=kernels, n_experts=n_experts))
    tokens, weights = torch.randint(0, 50, (3, 9)), dict(model.named_parameters())

    def loss(weights, window):
        logits = torch.func.functional_call(model, weights, (window[None, :-1],))[0]
        return torch.nn.functional.cross_entropy(logits, window[1:])

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, tokens)
    for i, window in enumerate(tokens):
        model.zero_grad()
        model.loss(window[None]).next.backward()
        for name, p in weights.items():
            torch.testing.assert_close(found[name][i], p.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("n_experts", [0, 3])
def test_compiled_for_an_unknown_number_of_sequences(n_experts, no_shape_checks):
    """Where it depends on data, no size may be asked for: of the embedding, of a plain model, of experts."""
    model, wide = build(n_experts=n_experts), build(m=2, n=3, ngram_buckets=7).embedding
    tokens = torch.randint(0, 50, (3, 5))
    for module in (model, wide):
        unknown = tokens.clone()
        torch._dynamo.decorators.mark_unbacked(unknown, 0)
        found = torch.compile(module, fullgraph=True, backend="eager")(unknown)
        torch.testing.assert_close(found, module(tokens))


@pytest.mark.parametrize("n_experts", [0, 3])
def test_exported_for_any_number_of_tokens(n_experts, no_shape_checks):
    model = randomise(build(m=2, n=3, n_experts=n_experts)).eval()
    sizes = {0: torch.export.Dim("b", min=1, max=64), 1: torch.export.Dim("t", min=2, max=32)}
    exported = torch.export.export(model, (torch.randint(0, 50, (2, 7)),), dynamic_shapes=(sizes,)).module()
    tokens = torch.randint(0, 50, (3, 9))
    torch.testing.assert_close(exported(tokens), model(tokens))


@pytest.mark.parametrize("bad", [-100, -1, 50])
def test_every_token_counts_the_last_one_too(bad):
    """-100 is what PyTorch's cross-entropy leaves out."""
    with pytest.raises(IndexError, match=rf"tokens hold the id {bad}: must be in 0 … 49"):
        build(m=2, n=3).loss(torch.tensor([[1, 2, bad]]))
    with pytest.raises(IndexError, match=f"{bad} is out of bounds"):  # where the ids are not looked at, on a GPU
        cross_entropy(torch.randn(1, 2, 50), torch.tensor([[1, bad]]))


@pytest.mark.parametrize("mtp_layers, shortest", [(0, 2), (1, 3)])
def test_the_shortest_and_the_longest_window(mtp_layers, shortest, no_shape_checks):
    model = build(m=2, n=3, mtp_layers=mtp_layers, max_seq_len=6)
    for t in (shortest, 7):
        assert model.loss(torch.randint(50, (2, t))).total.isfinite()
    for t in (shortest - 1, 8):
        with pytest.raises(ValueError, match=rf"\(2, {t}\): must be .* {shortest} ≤ t ≤ 7"):
            model.loss(torch.randint(50, (2, t)))


def test_losses_of_16_bit_logits_are_summed_in_float32():
    logits, targets = torch.randn(3, 40, 50).bfloat16(), torch.randint(0, 50, (3, 40))
    p = logits.double().softmax(-1).gather(-1, targets[..., None])
    loss = cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(-p.log().mean().item(), rel=1e-6)
    assert cross_entropy(logits.double(), targets).dtype == torch.float64


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda m: m.generate(torch.zeros(1, 2, dtype=torch.long), 1, temperature=-1.0), "temperature = -1.0"),
        (lambda m: m.generate(torch.zeros(1, 2, dtype=torch.long), 1, top_k=0), "top_k = 0"),
        (lambda m: m.generate(torch.zeros(1, 2, dtype=torch.long), -1), "max_new_tokens = -1"),
        (lambda m: m.generate(torch.zeros(1, 0, dtype=torch.long), 1), "t ≥ 1"),
        (lambda m: m(torch.zeros(1, 1025, dtype=torch.long)), "max_seq_len = 1024"),
        (lambda m: m.loss(torch.zeros(1, 1, dtype=torch.long)), r"\(1, 1\): must be .* 2 ≤ t ≤ 1025"),
        (lambda m: m.loss(torch.zeros(1, 1026, dtype=torch.long)), r"\(1, 1026\): must be .* 2 ≤ t ≤ 1025"),
        (lambda m: record(m, torch.zeros(1, 1025, dtype=torch.long)), "max_seq_len = 1024"),
        (lambda m: m.loss(torch.zeros(0, 5, dtype=torch.long)), "b ≥ 1"),
        (lambda m: m.loss(torch.zeros(5, dtype=torch.long)), r"\(5,\): must be \[b, t\]"),
        (lambda m: m.loss(torch.zeros(2, 5, 3, dtype=torch.long)), r"\(2, 5, 3\): must be \[b, t\]"),
        (lambda m: m.generate(torch.zeros(2, 5, 3, dtype=torch.long), 1), r"\(2, 5, 3\): must be \[b, t\]"),
        (lambda m: m(torch.zeros(2, 5, 3, dtype=torch.long)), r"\(2, 5, 3\): must be \[b, t\]"),
    ],
)
def test_bad_calls(call, match, no_shape_checks):
    with pytest.raises(ValueError, match=match):
        call(build(m=2, n=3))


def test_token_out_of_range():
    with pytest.raises(IndexError, match="id 50: must be in 0 … 49"):
        build(m=2, n=3)(torch.tensor([[1, 50]]))


def test_wrong_dtype_between_state_and_parameters():
    model = build(m=2, n=3)
    model.connections[0].float()
    with pytest.raises(TypeError, match=r"H has dtype torch\.float64: must be torch\.float32"):
        model(torch.zeros(1, 2, dtype=torch.long))


@pytest.mark.parametrize("tokens_shape", [(1, 1), (0, 4), (2, 0)])
def test_one_token_and_none(tokens_shape):
    for m, n in [(None, None), (2, 3), (4, 8)]:
        for extra in ({}, {"n_experts": 2}):
            logits = build(m=m, n=n, **extra)(torch.zeros(tokens_shape, dtype=torch.long))
            assert logits.shape == (*tokens_shape, 50) and logits.isfinite().all()


def test_every_parameter_has_a_gradient():
    """After one step away from the start, where W = 0 hides nothing."""
    model = randomise(build(m=2, n=4, mtp_layers=1, n_experts=2, ngram_buckets=31))
    model.loss(torch.randint(0, 50, (4, 12))).total.backward()
    assert {n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0} == set()


COMPILE = """
import torch
from torch import nn
from vwn_ref import VWNConfig, VWNTransformer
torch.manual_seed(0)
tokens = torch.randint(0, 50, (2, 9))
cases = [("reference", 2, 3, 0), ("auto", 2, 4, 3)]
for kernels, m, n, experts in cases:
    cfg = VWNConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, m=m, n=n, mtp_layers=1, n_experts=experts,
                    ngram_buckets=31, kernels=kernels)
    model = VWNTransformer(cfg).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    eager = model.loss(tokens).total
    weights = list(model.parameters())
    gradients = torch.autograd.grad(eager, weights)
    compiled = torch.compile(model.loss, fullgraph=True, backend=BACKEND)(tokens).total
    torch.testing.assert_close(compiled, eager, rtol=1e-10, atol=1e-10)
    for a, b in zip(torch.autograd.grad(compiled, weights), gradients):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
print("compiled")
"""


def test_compiles_in_one_graph():
    """In a process of its own, without the run-time shape checks; aot_eager captures without a C++ compiler."""
    code = f"BACKEND = 'aot_eager'\n{COMPILE}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "compiled", run.stderr


def test_static_matrices_are_shared_by_all_tokens():
    model = build(m=2, n=3, dynamic=False)
    ghc = model.connections[0]
    assert type(ghc) is GHC
    A, B = ghc.matrices(torch.zeros(2, 5, 3, 8, dtype=torch.float64))
    assert A.shape == (2, 5, 3, 5) and B.shape == (2, 5, 2, 3) and torch.equal(A[1, 4], ghc.A)


def test_a_balance_of_no_tokens_and_a_sublayer_of_no_kind():
    model = build(m=2, n=4, n_experts=4)
    model(torch.zeros(0, 4, dtype=torch.long))
    assert [layer.balance_loss.item() for layer in model.modules() if isinstance(layer, MoE)] == [0.0] * 3
    with pytest.raises(ValueError, match="kind = 'Attention': must be one of 'attention', 'ffn'"):
        Sublayer(model.cfg, "Attention")


def test_total_is_the_weighted_sum():
    """By hand, with experts in every block: the balance is a mean over the layers, not their sum."""
    model = randomise(build(m=2, n=4, mtp_layers=1, n_experts=4, n_layers=3, mtp_weight=0.4, balance_weight=0.7))
    losses = model.loss(torch.randint(50, (2, 7)))
    balance = [layer.balance_loss for layer in model.modules() if isinstance(layer, MoE)]
    assert len(balance) == 4 and all(x > 0.9 for x in balance)
    torch.testing.assert_close(losses.balance, sum(balance) / 4)
    torch.testing.assert_close(losses.total, losses.next + 0.4 * losses.next2 + 0.7 * losses.balance)


CHANGES = {
    "vocab_size": 51, "dim": 24, "n_layers": 2, "n_heads": 4, "m": 4, "n": 8, "dynamic": False, "embed_rank": 5,
    "ngram_buckets": 7, "reduce_init": "random", "reduce_norm": False, "ffn_dim": 8, "n_experts": 2, "mtp_layers": 2,
    "rope_theta": 100.0, "norm_eps": 0.5, "embed_std": 0.7, "init_std": 0.05,
}  # fmt: skip
WITH_EXPERTS = {"top_k": 1, "balance_weight": 0.3, "mtp_weight": 0.9}


@pytest.mark.parametrize("field", [*CHANGES, *WITH_EXPERTS])
def test_every_field_reaches_the_model(field):
    """Changed on its own, each gives another loss from the same seed, or parameters that begin at 0: none is taken and
    then left lying."""
    base = {"m": 2, "n": 4, "mtp_layers": 1} | ({"n_experts": 3} if field in WITH_EXPERTS else {})

    def of(**more):
        model = build(**base | more)
        return model.loss(torch.arange(18).reshape(2, 9)).total.item(), model.state_dict().keys()

    (loss, names), (other, other_names) = of(), of(**{field: (CHANGES | WITH_EXPERTS)[field]})
    assert of() == (loss, names)
    assert abs(other - loss) > 1e-9 or (names != other_names and field in ("dynamic", "ngram_buckets"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_every_part_has_its_epsilon_and_its_kernels(dynamic):
    model = build(m=2, n=4, dynamic=dynamic, mtp_layers=1, norm_eps=0.25, kernels="cpu")
    ghcs = [part for part in model.modules() if isinstance(part, GHC)]
    assert {type(ghc) for ghc in ghcs} == {DynamicGHC if dynamic else GHC} and len(ghcs) == 2 * (model.cfg.n_layers + 1)
    assert {ghc.kernels for ghc in ghcs} == {"cpu"}
    assert {part.eps for part in model.modules() if isinstance(part, nn.RMSNorm | nn.GroupNorm)} == {0.25}


def test_these_are_all_fields_but_two():
    no_numbers = {"kernels", "max_seq_len"}
    assert {*CHANGES, *WITH_EXPERTS} == {field.name for field in dataclasses.fields(VWNConfig)} - no_numbers


def test_streams_of_random_numbers():
    """Fixed by seed and name, of which each matters, and nothing else is moved on."""

    def draw(seed, name):
        with stream(seed, name):
            return torch.randn(8).tolist()

    torch.manual_seed(0)
    before = torch.get_rng_state()
    drawn = [draw(seed, name) for seed in (1, 2, 2**62) for name in ("embedding", "backbone")]
    assert torch.equal(torch.get_rng_state(), before)
    assert len({tuple(numbers) for numbers in drawn}) == 6
    torch.manual_seed(1)
    assert draw(1, "embedding") == drawn[0]


@pytest.mark.parametrize("init_std", [0.02, 0.1, None])
def test_initial_weights(init_std):
    """init_std, 1/√fan_in without one, by 1/√(2 n_layers) where a sublayer writes; 1/D before the logits."""
    model = VWNTransformer(VWNConfig(vocab_size=400, dim=64, n_layers=3, n_heads=2, m=2, n=4, init_std=init_std))
    for name, weight in model.sublayers.named_parameters():
        if weight.ndim > 1:
            std = init_std or weight.shape[-1] ** -0.5
            wanted = std / 6**0.5 if ".out." in name else std
            assert weight.std().item() == pytest.approx(wanted, rel=0.05), name
    assert model.unembedding.weight.std().item() == pytest.approx(1 / 64, rel=0.05)
    assert model.embedding.table.std().item() == pytest.approx(0.3, rel=0.05)
