"""The small trained model that the lessons look at, kept in the repository with a passage of text.

    kept = load_trained_small()
    kept.model(kept.tokens)                  # [3, 128, vocab_size]
    kept.pieces[0][:3]                       # the text of the first three tokens

D = 32, (m, n) = (4, 8), dynamic, six blocks. Made by the command below; then `checkpoint.safetensors` was removed.

    python -m vwn_ref.experiments.train --data.vocab-size 512 --model.dim 32 --model.n-layers 6 --model.n-heads 4 \\
        --model.m 4 --model.n 8 --model.max-seq-len 128 --model.init-std None --model.kernels reference \\
        --steps 2500 --batch-size 8 --lr 4e-3 --threads 1 --no-progress --out figures/data/trained_small

It was trained on Python's standard library; the passage, `passage.json`, was written for this repository, and its
token ids are kept because another version of that library trains another tokenizer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from vwn_ref.config import VWNConfig
from vwn_ref.experiments.data import decode, load_tokenizer
from vwn_ref.model import VWNTransformer

TRAINED_SMALL = Path(__file__).resolve().parents[2] / "figures" / "data" / "trained_small"


@dataclass(frozen=True)
class Kept:
    """A trained model in eval mode, a passage that it was not trained on, and what its training log ended with."""

    model: VWNTransformer
    tokens: Tensor  # [3, 128], int64: windows of the passage, one after the other
    pieces: list[list[str]]  # the text of each token
    summary: dict  # final losses, tokens, parameters, versions


def load_trained_small(folder: Path = TRAINED_SMALL) -> Kept:
    """The kept model; the same tensors on every machine. Raises FileNotFoundError outside a copy of the repository."""
    if not (folder / "passage.json").is_file():
        raise FileNotFoundError(f"{folder}: the kept model is in the repository, not in an installed package")
    config, summary, passage = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("config", "summary", "passage")
    )
    with torch.random.fork_rng(devices=[]):
        model = VWNTransformer(VWNConfig(**config["model"]))
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    pieces = [[decode(tokenizer, [token]) for token in row] for row in passage["tokens"]]
    return Kept(model.eval(), torch.tensor(passage["tokens"]), pieces, summary)
