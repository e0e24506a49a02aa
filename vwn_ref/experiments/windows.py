"""How far back the layers of trained models look: `python -m vwn_ref.experiments.windows FOLDER`.

Study F. §4 of arXiv 2511.11238 reads VWN as attention over depth: under hard routing m decides how many layers the
state can hold, and a spectral radius of Â below 1 makes them fade. Here both are measured, on validation text, of every
finished run below FOLDER that has its weights; the result lies beside them in `windows.json`. Means over tokens, layers
l = 1 … L being sublayers, column s of a table what comes from layer s (0: the embedding):

    strength             size of the map from layer s to layer l, `vwn_ref.depth.strength`
    share                what layer s adds to what layer l reads, as a part of it, `vwn_ref.depth.contributions`
    back                 layers back that layer l looks, `vwn_ref.depth.effective_window`, token by token: the farthest
                         that counts, by strength or by size of what is added, for a tenth or a half of the largest
    radius               spectral radius of Â of each layer: 5 %, 50 % and 95 % of the tokens
    state                what Â leaves: ‖map from H′⁰ to H′ˡ‖₂, the largest growth of any direction; median token

With --table, the numbers of layer L by variant.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

from vwn_ref.depth import (
    Recording,
    carry,
    contributions,
    depth_maps,
    effective_window,
    record,
    spectral_radius,
    split,
    strength,
)
from vwn_ref.experiments.checkpoint import CheckpointError
from vwn_ref.experiments.compare import interval
from vwn_ref.experiments.console import note, told
from vwn_ref.experiments.data import load_corpus
from vwn_ref.experiments.finished import load_runs
from vwn_ref.experiments.run import read_json
from vwn_ref.experiments.storage import file_digest, write_text
from vwn_ref.experiments.train import TrainConfig, load_config, load_run, val_starts, windows

FILE = "windows.json"
FRACTIONS = (0.1, 0.5)
TOKENS = 4096


def mean(table: Tensor, over: int) -> list:
    """Mean over the last `over` of its dimensions, as nested lists."""
    return table.double().flatten(-over).mean(-1).tolist()


def measure(recording: Recording) -> dict:
    """What the module's text lists, of one forward pass over tokens [b, t]."""
    size, added = strength(depth_maps(recording.A, recording.B)), contributions(recording)
    radius = torch.stack([spectral_radius(split(A)[1]).flatten() for A in recording.A]).double()
    quantiles = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    products = [carry(recording.A, layer + 1, 0) for layer in range(len(recording.A))]
    return {
        "strength": mean(size, 2),
        "share": mean(contributions(recording, share=True), 2),
        "back": {
            name: {str(fraction): mean(effective_window(table, fraction), 2) for fraction in FRACTIONS}
            for name, table in (("strength", size), ("contributions", added))
        },
        "radius": radius.quantile(quantiles, dim=1).T.tolist(),
        "state": [torch.linalg.matrix_norm(product, ord=2).median().item() for product in products],
    }


def places(config: TrainConfig, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """A run's validation text, and the starts of windows with `tokens` tokens of it."""
    text = load_corpus(config.data).val
    return text, val_starts(text, dataclasses.replace(config, val_tokens=tokens))


def measure_run(folder: Path, tokens: int) -> dict:
    """`measure` of a run, on `tokens` tokens or a window more of its validation text, spread over all of it; on all of
    it where it has fewer."""
    model, _, config = load_run(folder)
    text, starts = places(config, tokens)
    with torch.no_grad():
        found = measure(record(model, torch.from_numpy(windows(text, starts, config.seq_len))[:, :-1]))
    weights = file_digest(folder / "weights.safetensors")
    tokens = len(starts) * config.seq_len
    return {"weights": weights, "tokens": tokens, "m": config.model.m, "n": config.model.n, **found}


def is_done(folder: Path, tokens: int | None) -> bool:
    """Whether the weights that a run has now have been measured, on as many tokens where a number is given."""
    try:
        row = read_json(folder / FILE)
        if row["weights"] != file_digest(folder / "weights.safetensors"):
            return False
        measured_on = row["tokens"]
    except (FileNotFoundError, CheckpointError, KeyError, TypeError):
        return False
    if tokens is None:
        return True
    config = load_config(folder)
    if measured_on == math.ceil(tokens / config.seq_len) * config.seq_len:
        return True
    return measured_on == len(places(config, tokens)[1]) * config.seq_len  # all of a text that has fewer


def checked(path: Path, row: object) -> dict:
    """`row`, what `path` holds. Raises CheckpointError where that is nothing that `measure` gives."""
    try:
        last_reads(row), [r[1] for r in row["radius"]], row["state"][-1], range(row["tokens"])
        [row["back"][name][str(x)][-1] for name in ("strength", "contributions") for x in FRACTIONS]
    except (LookupError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    return row


def load(folder: str | Path) -> dict[str, list[dict]]:
    """variant -> the windows.json of its seeds, those that have one.

    Raises CheckpointError for a damaged one, ValueError where they were measured on different numbers of tokens.
    """
    found = {}
    for variant, runs in load_runs(folder).items():
        paths = [Path(folder) / f"{run.name}-s{run.seed}" / FILE for run in runs]
        rows = [checked(path, read_json(path)) for path in paths if path.exists()]
        if rows:
            found[variant] = rows
    counts = sorted({row["tokens"] for rows in found.values() for row in rows})
    if len(counts) > 1:
        raise ValueError(f"{folder}: must be measured on the same tokens, not {', '.join(map(str, counts))} (--again)")
    return found


def table(folder: str | Path) -> str:
    """Markdown: how far back the last layer looks, what it reads, and the radii; means over seeds, 95 % intervals."""
    lines = [
        "| model | seeds | layers back, by map, to 1/10 | to 1/2 | by what is added, to 1/10 | to 1/2 "
        "| share of layers 4 and later | radius of Â, mean of layers | log10 ‖H′⁰ → H′ᴸ‖ |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for variant, rows in load(folder).items():
        columns = [[r["back"][k][str(f)][-1] for r in rows] for k in ("strength", "contributions") for f in FRACTIONS]
        columns += [[last_reads(r)[-1] for r in rows]]
        columns += [[statistics.fmean(x[1] for x in r["radius"]) for r in rows]]
        columns += [[math.log10(r["state"][-1]) for r in rows]]
        cells = []
        for values in columns:
            estimate = interval(values)
            width = "" if len(values) < 2 else f" ± {estimate.half_width:.2f}"
            cells.append(f"{estimate.mean:.2f}{width}")
        lines.append(f"| {variant} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines)


SHARES = ("embedding", "layers 1 to 3", "all later layers")


def last_reads(row: dict) -> tuple[float, float, float]:
    """`SHARES` of what the last layer of a measured run reads; they add up to 1, and a part may be negative."""
    share = row["share"][-1]
    return share[0], math.fsum(share[1:4]), math.fsum(share[4:])


@dataclass(frozen=True)
class WindowsConfig:
    """Of which runs."""

    folder: tyro.conf.Positional[str]
    """Folder of runs named <variant>-s<seed>, with their weights."""
    tokens: int | None = None
    """Tokens of validation text. Not given: 4096 of what is measured now; what has been measured stays."""
    again: bool = False
    """Also of runs whose weights have been measured, on as many tokens."""
    table: bool = False
    """Measure nothing: print what has been measured."""


def execute(config: WindowsConfig) -> None:
    """Measure what is missing, unless only the table is wanted, and print it. Raises ValueError."""
    if config.tokens is not None and config.tokens < 1:
        raise ValueError(f"tokens = {config.tokens}: must be ≥ 1")
    if not config.table:
        folders = [path.parent for path in sorted(Path(config.folder).glob("*/summary.json"))]
        missing = [f for f in folders if not (f / "weights.safetensors").exists()]
        todo = [f for f in folders if f not in missing and (config.again or not is_done(f, config.tokens))]
        for folder in todo:
            write_text(folder / FILE, json.dumps(measure_run(folder, config.tokens or TOKENS)) + "\n")
            note(f"{folder.name}: measured")
        note(f"{len(todo)} runs measured, {len(missing)} have no weights")
    print(table(config.folder))


def main() -> None:
    """Measure as the command line says; errors in it and in files are told in a line."""
    config = tyro.cli(WindowsConfig, prog="python -m vwn_ref.experiments.windows", description=__doc__)
    with told():
        execute(config)


if __name__ == "__main__":
    main()
