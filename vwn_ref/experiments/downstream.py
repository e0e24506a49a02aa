"""What trained models do on text of another source: `python -m vwn_ref.experiments.downstream runs/a`, then `--table`.

Every finished run with weights below the folder is evaluated on one text and gets a downstream.json beside its
summary.json. The text is the source of a pinned package of requirements.txt, pytest, so that every installation has it;
the default training corpus is Python's standard library. `--files` names other text.

heldout      Loss in nats a token and in bits a byte. The documents stand in a row, the token `end` before the first
             and after each; every token but that first is a target once, in windows of the run's seq_len, one after
             the other, with nothing before a window in view: as in validation. The nats of `end` are in both numbers.
copying      A window of seq_len + 1 tokens: a passage of text, other text, and the last k tokens of the passage, the
             span, again; k is a quarter of seq_len or 8, the smaller. Scored: the span's tokens from its 2nd on.
             `first`: at the first occurrence; `second`: at the second; `control`: at the same place of the same
             window with another passage of the text in place of the first, so that nothing is repeated but by chance.
             `gain` = control − second is what repetition gives; in `gain_first` = first − second there is also that
             the second occurrence is torn from its context. `near`, `far`: the other text is at most, is more than
             half as long as there is room for.
brackets     Every `)`, `]`, `}` of code with which a token begins, spaces aside, and whose opening bracket is in view.
             The probability of a kind is the sum over all tokens that begin with it, spaces aside; right is the kind
             that has most of the three, a tie counts as its share. `majority`: what one has who always says the kind
             that is most frequent there. `balanced`: the mean of the accuracies by kind, 1/3 by chance and for
             `majority`. `loss`: nats of the right kind among the three, ln 3 by chance. `distance`: in tokens from the
             opening bracket.
identifiers  Names in code (no keywords; match, case, type and _ count as names) whose tokens, spaces aside, hold
             nothing else. `repeated`: the same name is in view, whole, before it; `first`: it is not. Scored: all
             tokens of a name. Names that occur again are other, shorter and more frequent names, hence
             `gain_same_name`: nats of a name where it is new in the window minus where it is not, over the names that
             have both, each weighted by its repetitions. That still compares places early in a window with later ones.

Which tokens are brackets and names, `vwn_ref.experiments.code_text` says. A document that is not Python takes part in
the first two tasks only.
Standard errors take the windows for independent (for gain_same_name: the names), not the tokens in them; they tell of
other windows of this text, not of other texts. Every choice is the same for all models of one seq_len and tokenizer, so
that models can be paired.

What this shows: whether a difference in validation loss is there on text of another source (still Python, still by
programmers), and in which of three abilities that need no knowledge. What it cannot show: the paper's downstream gains.
Its benchmarks, Collection A (ARC Challenge, BBH, DROP, WinoGrande, HellaSwag, MMLU, MMLU-Pro, C-Eval, TriviaQA,
Ape210K, GSM8K, MATH, MBPP, HumanEval, AGIEval, GPQA) and Collection B (MMLU, MMLU-Pro, C-Eval, AGIEval, BBH, DROP,
KOR-Bench-Easy, MATH, MBPP+, HumanEval, McEval, TriviaQA, Chinese SimpleQA), need models a thousand times larger and
more: the paper's smallest activates 0.4 billion parameters, those of study A have 34 to 123 thousand. They would guess.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from jaxtyping import Bool, Float, Int
from tokenizers import Tokenizer
from torch import Tensor

from vwn_ref.backbone import at_least_float32
from vwn_ref.config import check_int
from vwn_ref.experiments import finished
from vwn_ref.experiments.checkpoint import CheckpointError
from vwn_ref.experiments.code_text import CLOSERS, Name, Stream, encode_text
from vwn_ref.experiments.compare import paired
from vwn_ref.experiments.console import note, told
from vwn_ref.experiments.data import END, DataConfig, decode, find_files, is_text, kind, n_bytes, read_documents
from vwn_ref.experiments.finished import KeptRun, load_runs
from vwn_ref.experiments.run import flat, read_json
from vwn_ref.experiments.storage import file_digest, json_digest, write_text
from vwn_ref.experiments.train import load_run
from vwn_ref.experiments.world import torch_settings

RESULT = "downstream.json"
FORMAT = 1  # raised when the code below makes other numbers from the same model and text
PACKAGE = "pytest"
BATCH_TOKENS = 4096  # at once through a model: what its logits take is bounded
SHORTEST = 8  # tokens in a window; in fewer there is nothing to copy
DISTANCES = {"1-4": (1, 4), "5-16": (5, 16), "17-64": (17, 64), "65-": (65, math.inf)}

# What --table shows: task -> measure -> what it is.
MEASURES = {
    "held-out text": {"heldout.loss": "nats a token", "heldout.bits_per_byte": "bits a byte"},
    "copying": {"copying.gain": "gain of repetition, nats", "copying.second.accuracy": "accuracy"},
    "brackets": {"brackets.accuracy": "accuracy", "brackets.loss": "nats among three kinds"},
    "identifiers": {"identifiers.repeated.loss": "repeated, nats a token", "identifiers.first.loss": "first"},
    "identifiers, same names": {"identifiers.gain_same_name": "gain of recall, nats a name"},
}

Model = Callable[[Tensor], Tensor]  # tokens [b, t] -> logits [b, t, v]


@dataclass(frozen=True)
class Settings:
    """What is evaluated, the same for every model. Raises ValueError for a number out of range."""

    files: tuple[str, ...] = ()
    """Held-out text: files, folders or patterns as in data.files. Empty: the Python sources of `package`."""
    package: str = PACKAGE
    """An installed package whose sources are the held-out text."""
    max_bytes: int = 500_000
    """Stop before the document that would bring the text over this many bytes of UTF-8."""
    copies: int = 1000
    """Items of the copying task."""
    seed: int = 0
    """Fixes what is copied."""

    def __post_init__(self) -> None:
        check_int("max_bytes", self.max_bytes)
        check_int("copies", self.copies, least=2)
        check_int("seed", self.seed, least=0)


# ------------------------------------------------------------------------------------------------------- text


@dataclass(frozen=True)
class Text:
    """Held-out documents, where they come from in words, and the files."""

    documents: tuple[str, ...]
    source: str
    files: tuple[Path, ...] = ()

    @property
    def digest(self) -> str:
        return json_digest(self.documents)


def package_files(name: str) -> list[Path]:
    """The Python sources of an installed package that are UTF-8, by path. Raises FileNotFoundError."""
    try:
        listed = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(f"package = {name!r}: must be an installed package, or name text with files") from None
    paths = [Path(file.locate()) for file in sorted(listed, key=lambda file: file.as_posix()) if file.suffix == ".py"]
    paths = [path for path in paths if path.is_file() and is_text(path)]
    if not paths:
        raise FileNotFoundError(f"package = {name!r}: must have Python sources where it is installed")
    return paths


def load_text(settings: Settings) -> Text:
    """The held-out text. Raises FileNotFoundError for what is not there, ValueError for what cannot be read."""
    if settings.files:
        source = ", ".join(settings.files)
        config = DataConfig(files=settings.files, max_bytes=settings.max_bytes)
        paths = find_files(config)
    else:
        paths = package_files(settings.package)
        source = f"{settings.package} {importlib.metadata.version(settings.package)}"
        config = DataConfig(files=tuple(map(str, paths)), max_bytes=settings.max_bytes)
    documents = tuple(read_documents(paths, config))
    if not documents:
        raise ValueError(f"max_bytes = {settings.max_bytes}: must be at least the first document of {source}")
    return Text(documents, source, tuple(paths))


def trained_on(data: DataConfig, files: Sequence[Path]) -> list[Path] | None:
    """Those of `files` that a corpus has, by content; None where that cannot be told.

    It can where the corpus is text files that are here; in a dataset of the hub, or in tables, nobody looks.
    """
    if data.dataset is not None:
        return None
    try:
        corpus = find_files(data)
    except FileNotFoundError:
        return None
    sizes = {path.stat().st_size for path in files if path.stat().st_size}
    digests = {file_digest(path) for path in corpus if path.stat().st_size in sizes}
    both = [path for path in files if path.stat().st_size and file_digest(path) in digests]
    return None if not both and any(kind(path) != "text" for path in corpus) else both


# ------------------------------------------------------------------------------------------------ statistics


class Part(NamedTuple):
    """Values whose mean is taken, the cluster of each, and the weight of the mean."""

    values: np.ndarray
    clusters: np.ndarray
    weight: float = 1.0


def estimate(*parts: Part) -> dict | None:
    """Weighted sum of the means: {"mean", "se", "n": values in all}; None if a part has no value.

    Clusters are independent draws, shared between the parts; the standard error is the linearised one of a sum of
    ratios, None for a single cluster. With one part of clusters of one value it is that of a mean.
    """
    if not all(len(part.values) for part in parts):
        return None
    names, index = np.unique(np.concatenate([part.clusters for part in parts]), return_inverse=True)
    index = np.split(index, np.cumsum([len(part.values) for part in parts])[:-1])
    means = [float(np.mean(part.values, dtype=np.float64)) for part in parts]
    influence = np.zeros(len(names))
    for part, mean, where in zip(parts, means, index, strict=True):
        influence += np.bincount(where, part.values - mean, len(names)) * (part.weight / len(part.values))
    groups = len(names)
    se = math.sqrt(groups / (groups - 1) * float(influence @ influence)) if groups > 1 else None
    mean = math.fsum(part.weight * mean for part, mean in zip(parts, means, strict=True))
    return {"mean": mean, "se": se, "n": sum(len(part.values) for part in parts)}


# ------------------------------------------------------------------------------------------------------ scores


class Scores(NamedTuple):
    """What a model makes of windows: at [w, i] of the target, token i + 1 of window w."""

    nats: Float[np.ndarray, "w t"]  # −log p of the target
    right: Bool[np.ndarray, "w t"]  # it is the likeliest token (of equal ones the first)
    closers: Float[np.ndarray, "w t 3"]  # log of the summed probability of the tokens that begin with each of CLOSERS


def closer_tokens(tokenizer: Tokenizer) -> list[Tensor]:
    """Ids of the tokens that begin with each of CLOSERS, spaces aside."""
    texts = [decode(tokenizer, [token]).lstrip(" ") for token in range(tokenizer.get_vocab_size())]
    return [torch.tensor([i for i, text in enumerate(texts) if text.startswith(closer)]) for closer in CLOSERS]


@torch.no_grad()
def score(model: Model, tokenizer: Tokenizer, tokens: Int[np.ndarray, "w t1"]) -> Scores:
    """Scores of windows of t + 1 tokens, the last of which is only a target."""
    groups, found = closer_tokens(tokenizer), []
    rows = max(1, BATCH_TOKENS // tokens.shape[1])
    for batch in torch.from_numpy(tokens).split(rows):
        logits = at_least_float32(model(batch[:, :-1]))
        targets = batch[:, 1:]
        logs = logits.log_softmax(-1)
        nats = -logs.gather(-1, targets[..., None])[..., 0]
        closers = torch.stack([logs[..., group].logsumexp(-1) for group in groups], dim=-1)
        found.append((nats.double().numpy(), (logits.argmax(-1) == targets).numpy(), closers.double().numpy()))
    return Scores(*(np.concatenate(part) for part in zip(*found, strict=True)))


def tile(tokens: Int[np.ndarray, " n"], seq_len: int) -> Int[np.ndarray, "w t1"]:
    """Windows of seq_len + 1 tokens that overlap by one: token i ≥ 1 is target (i − 1) % seq_len of window
    (i − 1) // seq_len. The last is filled up with the last token; what is predicted there is nobody's target."""
    count = math.ceil((len(tokens) - 1) / seq_len)
    filled = np.concatenate([tokens, np.full(count * seq_len + 1 - len(tokens), tokens[-1])])
    return filled[np.arange(count)[:, None] * seq_len + np.arange(seq_len + 1)]


class View(NamedTuple):
    """Scores of a whole stream: the target of index i in the stream is at i − 1."""

    nats: Float[np.ndarray, " n"]
    right: Bool[np.ndarray, " n"]
    closers: Float[np.ndarray, "n 3"]
    seq_len: int

    def window(self, token: int) -> int:
        """Which window has this token, by index in the stream, for a target."""
        return (token - 1) // self.seq_len

    def seen_from(self, token: int) -> int:
        """The earliest token that is in view where this one is predicted."""
        return self.window(token) * self.seq_len


def view(model: Model, tokenizer: Tokenizer, stream: Stream, seq_len: int) -> View:
    """Every token of a stream but the first, predicted."""
    scores = score(model, tokenizer, tile(stream.tokens, seq_len))
    targets = len(stream.tokens) - 1
    return View(*(part.reshape(-1, *part.shape[2:])[:targets] for part in scores), seq_len)


# ------------------------------------------------------------------------------------------------------- tasks


def heldout(seen: View, stream: Stream, text: Text) -> dict:
    """Loss on the text; `unigram` is what a model has that knows this text's frequencies of tokens alone."""
    windows = np.arange(len(seen.nats)) // seen.seq_len
    loss, size = estimate(Part(seen.nats, windows)), sum(map(n_bytes, text.documents))
    bits = len(seen.nats) / (math.log(2) * size)
    _, counts = np.unique(stream.tokens[1:], return_counts=True)
    return {
        "tokens": len(seen.nats),
        "bytes": size,
        "loss": loss,
        "bits_per_byte": {"mean": loss["mean"] * bits, "se": loss["se"] and loss["se"] * bits},
        "accuracy": estimate(Part(seen.right, windows)),
        "unigram": float(-(counts / counts.sum()) @ np.log(counts / counts.sum())),
    }


class Copies(NamedTuple):
    """Windows of the copying task and of its control; where in the windows the span stands first."""

    windows: Int[np.ndarray, "c t1"]
    control: Int[np.ndarray, "c t1"]
    start: Int[np.ndarray, " c"]
    other: Int[np.ndarray, " c"]  # tokens between the two
    span: int


def draw_copies(tokens: Int[np.ndarray, " n"], seq_len: int, count: int, seed: int) -> Copies:
    """`count` windows [passage that ends in the span | other text | span], and each with another passage.

    The three places in the text do not overlap. Of the seq_len + 1 − 2k tokens that are not the span the other text has
    1 up to all but one. Raises ValueError for too short a window or text.
    """
    if seq_len < SHORTEST:
        raise ValueError(f"seq_len = {seq_len}: must be ≥ {SHORTEST}, in less there is no room for a copy")
    if len(tokens) < 8 * seq_len:  # three pieces, each shorter than seq_len, find room wherever the first one is
        raise ValueError(f"the held-out text has {len(tokens)} tokens: must be ≥ 8 · seq_len = {8 * seq_len}")
    span = min(8, seq_len // 4)
    rest, draw = seq_len + 1 - 2 * span, np.random.default_rng([seed, seq_len])
    rows, control, starts, others = [], [], [], []
    while len(rows) < count:
        gap = int(draw.integers(1, rest))
        passage = rest - gap + span
        lengths = (passage, gap, passage)
        places = [int(draw.integers(len(tokens) - length + 1)) for length in lengths]
        order = sorted(zip(places, lengths, strict=True))
        if any(a + length > b for (a, length), (b, _) in itertools.pairwise(order)):
            continue
        first, other, instead = (tokens[a : a + length] for a, length in zip(places, lengths, strict=True))
        rows.append(np.concatenate([first, other, first[-span:]]))
        control.append(np.concatenate([instead, other, first[-span:]]))
        starts.append(passage - span)
        others.append(gap)
    return Copies(np.stack(rows), np.stack(control), np.array(starts), np.array(others), span)


def copying(model: Model, tokenizer: Tokenizer, stream: Stream, seq_len: int, settings: Settings) -> dict:
    """The copying task, see above."""
    copies = draw_copies(stream.tokens, seq_len, settings.copies, settings.seed)
    again, control = (score(model, tokenizer, windows) for windows in (copies.windows, copies.control))
    tail = np.arange(seq_len + 1 - copies.span, seq_len)[None]  # targets of the span's 2nd to last token, at the end
    head = copies.start[:, None] + np.arange(copies.span - 1)  # and where it stands first
    places = {"first": (again, head), "second": (again, tail), "control": (control, tail)}
    nats = {name: np.take_along_axis(s.nats, at, 1) for name, (s, at) in places.items()}
    right = {name: np.take_along_axis(s.right, at, 1) for name, (s, at) in places.items()}

    def mean_of(values: np.ndarray, rows: np.ndarray) -> dict | None:
        return estimate(Part(values[rows].ravel(), np.repeat(np.flatnonzero(rows), values.shape[1])))

    every, near = np.ones(len(copies.other), bool), copies.other <= (seq_len + 1 - 2 * copies.span) / 2
    return {
        "items": len(copies.other),
        "span": copies.span,
        **{name: {"loss": mean_of(nats[name], every), "accuracy": mean_of(right[name], every)} for name in places},
        "gain": mean_of(nats["control"] - nats["second"], every),
        "gain_near": mean_of(nats["control"] - nats["second"], near),
        "gain_far": mean_of(nats["control"] - nats["second"], ~near),
        "gain_first": mean_of(nats["first"] - nats["second"], every),
        "gain_accuracy": mean_of(right["second"].astype(float) - right["control"], every),
    }


def brackets(seen: View, stream: Stream) -> dict | None:
    """The bracket task, see above; None where the text has no item."""
    items = [item for item in stream.brackets if item.opening >= seen.seen_from(item.closing)]
    if not items:
        return None
    opening, closing, kinds = np.array(items).T
    logs, rows = seen.closers[closing - 1], np.arange(len(items))
    best = logs == logs.max(1, keepdims=True)
    won = best[rows, kinds] / best.sum(1)
    nats = np.logaddexp.reduce(logs, axis=1) - logs[rows, kinds]
    windows, distance = (closing - 1) // seen.seq_len, closing - opening

    def of(rows: np.ndarray) -> dict:
        return {"accuracy": estimate(Part(won[rows], windows[rows])), "majority": majority(kinds[rows])}

    there = np.unique(kinds)
    strata = {name: (distance >= low) & (distance <= high) for name, (low, high) in DISTANCES.items()}
    return {
        "items": len(items),
        "loss": estimate(Part(nats, windows)),
        **of(rows),
        "balanced": estimate(*(Part(won[kinds == k], windows[kinds == k], 1 / len(there)) for k in there)),
        "kind": {CLOSERS[k]: estimate(Part(won[kinds == k], windows[kinds == k])) for k in there},
        "distance": {name: of(np.flatnonzero(inside)) for name, inside in strata.items() if inside.any()},
    }


def majority(kinds: np.ndarray) -> float:
    """Share of the most frequent kind."""
    return float(np.bincount(kinds).max() / len(kinds))


class Recalled(NamedTuple):
    """Names whose tokens are all targets of one window, new in it or not, and how many were left out."""

    first: list[Name]
    repeated: list[Name]
    left_out: int


def sort_names(stream: Stream, seen: View) -> Recalled:
    """Names by whether they were seen in their window. Left out: names whose tokens hold something else, that two
    windows share, or of which the last occurrence is in view in part."""
    found, before = Recalled([], [], 0), {}
    left_out = 0
    for name in stream.names:
        start, earlier = seen.seen_from(name.first), before.get(name.text)
        before[name.text] = name
        partly = earlier is not None and earlier.first < start <= earlier.last
        if not name.alone or partly or seen.window(name.last) != seen.window(name.first):
            left_out += 1
        elif earlier is not None and earlier.first >= start:
            found.repeated.append(name)
        else:
            found.first.append(name)
    return found._replace(left_out=left_out)


def identifiers(seen: View, stream: Stream) -> dict | None:
    """The identifier task, see above; None where the text has no name, new or repeated."""
    found = sort_names(stream, seen)
    if not found.first or not found.repeated:
        return None

    def tokens(names: list[Name]) -> np.ndarray:
        return np.concatenate([np.arange(name.first, name.last + 1) for name in names])

    def nats(name: Name) -> float:
        return float(seen.nats[name.first - 1 : name.last].sum())

    new, again = tokens(found.first) - 1, tokens(found.repeated) - 1
    parts = {
        name: [Part(values[at], at // seen.seq_len) for values in (seen.nats, seen.right)]
        for name, at in (("first", new), ("repeated", again))
    }
    fresh: dict[str, list[float]] = {}
    for name in found.first:
        fresh.setdefault(name.text, []).append(nats(name))
    both = [name for name in found.repeated if name.text in fresh]
    gains = np.array([statistics.fmean(fresh[name.text]) - nats(name) for name in both])
    return {
        "names": {"first": len(found.first), "repeated": len(found.repeated), "left_out": found.left_out},
        **{name: {"loss": estimate(loss), "accuracy": estimate(right)} for name, (loss, right) in parts.items()},
        "gain": estimate(parts["first"][0], parts["repeated"][0]._replace(weight=-1.0)),
        "gain_same_name": estimate(Part(gains, np.array([name.text for name in both]))),
    }


def evaluate(model: Model, tokenizer: Tokenizer, seq_len: int, text: Text, settings: Settings) -> dict:
    """All tasks: a JSON object. The model is in eval mode, on the CPU; its numbers are float32."""
    stream = encode_text(tokenizer, text.documents)
    seen = view(model, tokenizer, stream, seq_len)
    return {
        "vocab_size": tokenizer.get_vocab_size(),
        "seq_len": seq_len,
        "documents": {"all": stream.documents, "python": stream.python},
        "heldout": heldout(seen, stream, text),
        "copying": copying(model, tokenizer, stream, seq_len, settings),
        "brackets": brackets(seen, stream),
        "identifiers": identifiers(seen, stream),
    }


# ------------------------------------------------------------------------------------------------------- runs


def find_runs(folder: str | Path) -> list[Path]:
    """Folders of finished runs with weights in `folder`, or below it. Raises FileNotFoundError where there is none."""
    needed = ("config.json", "tokenizer.json", "weights.safetensors")
    done = sorted(path.parent for path in Path(folder).expanduser().rglob("summary.json"))
    runs = [run for run in done if all((run / name).is_file() for name in needed)]
    if not runs:
        raise FileNotFoundError(
            f"folder = {str(folder)!r}: must hold finished runs with weights, has {len(done)} finished without"
        )
    return runs


def settings_digest(text: Text, settings: Settings) -> str:
    """Of everything but the model that the numbers depend on."""
    return json_digest({"format": FORMAT, "text": text.digest, "copies": settings.copies, "seed": settings.seed})


def is_done(run: Path, digest: str) -> bool:
    """Whether a run has a result of these settings and of the weights it has now."""
    try:
        kept = read_json(run / RESULT)
        return (kept["digest"], kept["weights"]) == (digest, file_digest(run / "weights.safetensors"))
    except (FileNotFoundError, CheckpointError, KeyError, TypeError):
        return False


def evaluate_run(run: Path, text: Text, settings: Settings, threads: int | None = 1) -> dict:
    """Evaluate a run and write its downstream.json, which is returned.

    Raises ValueError for a vocabulary that does not fit, for text that the model was trained on and for a damaged run,
    FileNotFoundError where a file is missing.
    """
    with torch_settings(threads, torch.device("cpu")):
        model, tokenizer, config = load_run(run)
        size = tokenizer.get_vocab_size()
        if size != config.model.vocab_size or tokenizer.token_to_id(END) is None:
            raise ValueError(
                f"{run}: model.vocab_size = {config.model.vocab_size}: must be the {size} tokens of tokenizer.json, "
                f"with {END} among them"
            )
        known = trained_on(config.data, text.files)
        if known:
            raise ValueError(f"{run}: the held-out text must not be text that it was trained on, as {known[0]} is")
        clock, cpu = time.perf_counter(), time.process_time()
        result = evaluate(model, tokenizer, config.seq_len, text, settings)
        seconds, cpu_seconds = time.perf_counter() - clock, time.process_time() - cpu
    result = {
        "digest": settings_digest(text, settings),
        "weights": file_digest(run / "weights.safetensors"),
        "text": {"source": text.source, "digest": text.digest, "checked_not_trained_on": known is not None},
        "settings": {"max_bytes": settings.max_bytes, "copies": settings.copies, "seed": settings.seed},
        **result,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "versions": {name: importlib.metadata.version(name) for name in ("vwn_ref", "torch", "numpy", "tokenizers")},
    }
    write_text(run / RESULT, json.dumps(result, indent=1, allow_nan=False))
    return result


def load(folder: str | Path) -> dict[str, list[KeptRun]]:
    """`load_runs` of the runs that were evaluated, with every measure in the summary: "heldout.loss", ….

    Raises FileNotFoundError where none was, ValueError where they were not evaluated in the same way.
    """
    found: dict[str, list[KeptRun]] = {}
    digests = {}
    for name, runs in load_runs(folder).items():
        for run in runs:
            path = Path(folder) / f"{name}-s{run.seed}" / RESULT
            if not path.is_file():
                continue
            result = read_json(path)
            digests.setdefault(result["digest"], path.parent.name)
            tasks = {task: result[task] for task in ("heldout", "copying", "brackets", "identifiers") if result[task]}
            measures = {key.removesuffix(".mean"): value for key, value in flat(tasks).items()}
            found.setdefault(name, []).append(dataclasses.replace(run, summary=run.summary | measures))
    if not found:
        raise FileNotFoundError(f"{folder}: must hold runs with {RESULT}, evaluate them first")
    if len(digests) > 1:
        raise ValueError(f"{folder}: {', '.join(digests.values())} must be evaluated on one text with one setting")
    return found


def table(folder: str | Path, base: str = "plain") -> str:
    """Markdown, a table a task: mean over the seeds of each measure, and the paired difference to the base variant."""
    found = load(folder)
    if base not in found:
        raise ValueError(f"base = {base!r}: must be one of {', '.join(found)}")
    order = sorted(found, key=lambda name: (name != base, name))
    lines = []
    for task, measures in MEASURES.items():
        header = ["model", "parameters", "seeds", *(text for what in measures.values() for text in (what, "against"))]
        lines += [f"**{task}**, against {base}", "", f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
        for name in order:
            runs = found[name]
            row = [name, f"{runs[0].summary['parameters']:,}", f"{len(runs)}"]
            for measure in measures:
                row += cells(runs, found[base], measure)
            lines.append(f"| {' | '.join(row)} |")
        if task == "brackets" and "brackets.majority" in found[base][0].summary:
            lines += ["", f"Always the most frequent kind: accuracy {found[base][0].summary['brackets.majority']:.4f}."]
        lines.append("")
    return "\n".join(lines)


def cells(runs: list[KeptRun], base: list[KeptRun], measure: str) -> list[str]:
    """Mean, and difference to the base; empty where a run lacks the measure or no seed has both."""
    if any(run.summary.get(measure) is None for run in (*runs, *base)):
        return ["", ""]
    mean = f"{statistics.fmean(run.summary[measure] for run in runs):.4f}"
    common = {run.seed for run in runs} & {run.seed for run in base}
    return [mean, str(paired(runs, base, measure)) if common and runs is not base else ""]


def keep(source: str | Path, target: str | Path) -> int:
    """Copy what is kept of the evaluated runs, downstream.json with it; returns how many there are."""
    names = {path.parent.name for path in Path(source).glob(f"*/{RESULT}")}
    return finished.keep(source, target, names)


# ----------------------------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class DownstreamArguments(Settings):
    """Which runs, on which text, and what to do."""

    folder: tyro.conf.Positional[str] = "runs"
    """Folder of runs."""
    again: bool = False
    """Evaluate also what was evaluated with these settings."""
    threads: int = 1
    """Threads of PyTorch's CPU operations."""
    table: bool = False
    """Print the tables of what was evaluated, evaluate nothing."""
    base: str = "plain"
    """In the tables, the variant that the others are paired with."""
    keep: str | None = None
    """Copy config, log, summary and result of the evaluated runs to this folder, evaluate nothing."""


def execute(arguments: DownstreamArguments) -> int:
    """Do what the command line says; returns the exit status, 1 if a run could not be evaluated."""
    check_int("threads", arguments.threads)
    if arguments.keep is not None:
        note(f"{keep(arguments.folder, arguments.keep)} runs copied to {arguments.keep}")
    if arguments.table:
        print(table(arguments.folder, arguments.base))
    if arguments.table or arguments.keep is not None:
        return 0
    runs, text, failed = find_runs(arguments.folder), load_text(arguments), 0
    digest = settings_digest(text, arguments)
    for run in runs:
        if not arguments.again and is_done(run, digest):
            note(f"{run.name}: done before")
            continue
        try:
            result = evaluate_run(run, text, arguments, arguments.threads)
        except (ValueError, OSError) as error:
            failed += 1
            note(f"{run.name}: failed: {error}")
            continue
        loss = result["heldout"]["loss"]
        doubt = "" if result["text"]["checked_not_trained_on"] else "; whether it was trained on this text is not known"
        note(f"{run.name}: {loss['mean']:.4f} ± {loss['se']:.4f} nats a token, {result['seconds']:.1f} s{doubt}")
    return 1 if failed else 0


def main() -> None:
    """Evaluate as the command line says; errors in it and in files are told in a line."""
    arguments = tyro.cli(DownstreamArguments, prog="python -m vwn_ref.experiments.downstream", description=__doc__)
    with told():
        sys.exit(execute(arguments))


if __name__ == "__main__":
    main()
