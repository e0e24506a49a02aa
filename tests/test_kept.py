"""The trained model that the lessons look at is there, undamaged, and trained."""

import json
import math

import pytest
import torch

from vwn_ref.experiments.kept import TRAINED_SMALL, load_trained_small
from vwn_ref.experiments.train import load_run


@pytest.fixture(scope="module")
def kept():
    return load_trained_small()


def test_it_is_what_its_summary_says(kept):
    cfg = kept.model.cfg
    assert (cfg.dim, cfg.m, cfg.n, cfg.dynamic, cfg.n_layers) == (32, 4, 8, True, 6)
    assert sum(p.numel() for p in kept.model.parameters()) == kept.summary["parameters"]
    assert not kept.model.training
    assert all(p.isfinite().all() for p in kept.model.parameters())


@torch.no_grad()
def test_it_predicts_the_passage(kept):
    """Far better than chance on text it has not seen, though not as well as on text of its own kind."""
    loss = kept.model.loss(kept.tokens).next.item()
    assert kept.summary["val_next"] < 0.5 * math.log(512)
    assert loss < 0.6 * math.log(512)


def test_matrices_have_moved(kept):
    for ghc in kept.model.connections:
        assert ghc.W_alpha.abs().max() > 0.1 and (ghc.S_alpha - 1).abs().max() > 0.01
        assert (ghc.A - type(ghc)(ghc.dim, ghc.m, ghc.n).A).abs().max() > 0.05


def test_passage(kept):
    """The kept ids are the text's, and the pieces are the text again."""
    passage = json.loads((TRAINED_SMALL / "passage.json").read_text(encoding="utf-8"))
    _, tokenizer, _ = load_run(TRAINED_SMALL)
    assert kept.tokens.shape == (3, 128) and kept.tokens.dtype == torch.int64
    assert tokenizer.encode(passage["text"]).ids == kept.tokens.flatten().tolist()
    assert "".join("".join(row) for row in kept.pieces) == passage["text"]


def test_small_enough_for_a_clone():
    files = [path for path in TRAINED_SMALL.iterdir() if not path.name.startswith(".")]
    assert sum(path.stat().st_size for path in files) < 700_000
    assert not [path for path in files if path.name.startswith("checkpoint")]


def test_says_where_it_would_be(tmp_path):
    with pytest.raises(FileNotFoundError, match="in the repository"):
        load_trained_small(tmp_path)
