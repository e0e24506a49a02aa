"""What Virtual Width costs on this CPU: one training step, and one GHC, beside the FLOPs it should cost.

    python -m vwn_ref.experiments.bench_cpu                 # one thread, then as many as torch would take
    python -m vwn_ref.experiments.bench_cpu --threads 1
    python -m vwn_ref.experiments.bench_cpu --clock cpu     # on a busy machine: processor time, one thread

A step is loss, backward pass and AdamW on a batch of 16 × 128 tokens; D = 64, 6 blocks (12 GHCs), dynamic matrices.
All models take turns within each round, so that what else the machine does strikes all alike. It can only add time:
a time is the median of the fastest quarter of the rounds, and a ratio is one such time over another. GHC times are
milliseconds of one `width` and `depth` over the whole batch, and of their backward pass.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vwn_ref import DynamicGHC, VWNConfig, VWNTransformer
from vwn_ref.cost import ratio_to_plain
from vwn_ref.experiments.provenance import git_commit, processor
from vwn_ref.experiments.storage import write_text
from vwn_ref.kernels import cpu_backend, cpu_backend_forced
from vwn_ref.kernels.cpu import LARGEST

SHAPES = ((2, 3), (4, 8), (4, 16), (8, 64))
BATCH, SEQ_LEN, VOCAB, DIM, BLOCKS = 16, 128, 1024, 64, 6
WAYS = ("reference", "c++", "torch")  # the readable code; the kernels with a compiler; the kernels without one


def _backend(way: str):
    return contextlib.nullcontext() if way == "reference" else cpu_backend_forced(way)


def _kernels(way: str) -> str:
    return "reference" if way == "reference" else "cpu"


def _step(config: VWNConfig, way: str) -> Callable[[], None]:
    torch.manual_seed(0)
    model = VWNTransformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ_LEN + 1))

    def step() -> None:
        with _backend(way):
            model.loss(tokens).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _ghc(m: int, n: int, way: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """Forward and backward of one GHC around nothing; backward needs a forward before it."""
    torch.manual_seed(0)
    ghc = DynamicGHC(DIM, m, n, kernels=_kernels(way))
    H = torch.randn(BATCH, SEQ_LEN, n, DIM // m, requires_grad=True)
    z, g_x = torch.randn(BATCH, SEQ_LEN, DIM, requires_grad=True), torch.randn(BATCH, SEQ_LEN, DIM)
    g = torch.randn_like(H)
    made = []

    def forward() -> None:
        with _backend(way):
            x, state = ghc.width(H)
            made[:] = [x, ghc.depth(z, state)]

    def backward() -> None:
        with _backend(way):
            torch.autograd.grad(made, [H, z, *ghc.parameters()], [g_x, g])

    return forward, backward


def _timed(function: Callable[[], None], clock: Callable[[], float]) -> float:
    start = clock()
    function()
    return clock() - start


def undisturbed(times: list[float]) -> float:
    """Median of the fastest quarter."""
    return statistics.median(sorted(times)[: max(1, len(times) // 4)])


def measure(m: int, n: int, ways: tuple[str, ...], rounds: int, clock: Callable[[], float]) -> dict:
    """Milliseconds for one (m, n), and step ratios to the plain model, for each way."""
    common = dict(vocab_size=VOCAB, dim=DIM, n_layers=BLOCKS, n_heads=4)
    steps = {"plain": _step(VWNConfig(**common), "reference")}
    steps |= {way: _step(VWNConfig(**common, m=m, n=n, kernels=_kernels(way)), way) for way in ways}
    ghcs = {way: _ghc(m, n, way) for way in ways}
    step_times, forward, backward = ({key: [] for key in steps} for _ in range(3))
    for round_ in range(-2, rounds):  # two rounds to warm up
        for key, step in steps.items():
            took = _timed(step, clock)
            if round_ >= 0:
                step_times[key].append(took)
        for way, functions in ghcs.items():
            for _ in range(3):
                took = [_timed(f, clock) for f in functions]
                if round_ >= 0:
                    forward[way].append(took[0])
                    backward[way].append(took[1])

    def ms(times: list[float]) -> float:
        return round(1e3 * undisturbed(times), 3)

    def ratio(way: str) -> float:
        return round(undisturbed(step_times[way]) / undisturbed(step_times["plain"]), 3)

    flops = ratio_to_plain(VWNConfig(**common, m=m, n=n), SEQ_LEN).flops
    found = {"m": m, "n": n, "flops_ratio": round(flops, 3), "plain_step_ms": ms(step_times["plain"])}
    for way in ways:
        found[way] = {
            "step_ratio": ratio(way),
            "step_ms": ms(step_times[way]),
            "ghc_forward_ms": ms(forward[way]),
            "ghc_backward_ms": ms(backward[way]),
        }
    return found


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be an integer ≥ 1")
    return value


def _pair(text: str) -> tuple[int, int]:
    try:
        m, n = map(int, text.split(","))
        VWNConfig(vocab_size=VOCAB, dim=DIM, m=m, n=n)
        if n * max(DIM // m, 3 * n) > LARGEST:
            raise ValueError(f"n = {n}: too wide a state for the kernels, the readable code would be timed thrice")
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: must be m,n such as 4,8 ({error})") from error
    return m, n


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measure, print the tables, return the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=_positive, help="torch threads (default: a table for 1 and one for all)")
    parser.add_argument("--rounds", type=_positive, default=15, help="timed rounds, default %(default)s")
    parser.add_argument("--shapes", type=_pair, nargs="+", default=list(SHAPES), metavar="M,N")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="default %(default)s")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there as well")
    options = parser.parse_args(arguments)
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)  # now, not when all is measured
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    before = torch.get_num_threads()
    threads = [options.threads] if options.threads else sorted({1, before if options.clock == "wall" else 1})
    ways = WAYS if cpu_backend() == "c++" else ("reference", "torch")

    print(f"{platform.machine()}, torch {torch.__version__}, {options.clock} clock, kernels here: {cpu_backend()}")
    results = []
    try:
        for count in threads:
            torch.set_num_threads(count)
            results += _table(count, options, ways, clock)
    finally:
        torch.set_num_threads(before)
    if options.json:
        given = sys.argv[1:] if arguments is None else arguments
        content = {
            "command": shlex.join(["python", "-m", "vwn_ref.experiments.bench_cpu", *given]),
            "commit": git_commit(),
            "platform": platform.platform(),
            "processor": processor(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "clock": options.clock,
            "rounds": options.rounds,
            "model": {"vocab_size": VOCAB, "dim": DIM, "n_layers": BLOCKS, "batch_size": BATCH, "seq_len": SEQ_LEN},
            "results": results,
        }
        write_text(Path(options.json), json.dumps(content, indent=1) + "\n")
    return results


def _table(threads: int, options: argparse.Namespace, ways: tuple[str, ...], clock) -> list[dict]:
    print(f"\n{threads} thread{'s' * (threads > 1)}: step over the plain model's, and ms of one GHC forward + backward")
    print(f"{'m, n':>6}{'FLOPs':>8}{'plain ms':>10}" + "".join(f"{way:>12}{'GHC fwd + bwd':>18}" for way in ways))
    results = []
    for m, n in options.shapes:
        row = measure(m, n, ways, options.rounds, clock)
        cells = ""
        for way in ways:
            r = row[way]
            cells += f"{r['step_ratio']:>11.2f}x{r['ghc_forward_ms']:>9.2f} +{r['ghc_backward_ms']:>7.2f}"
        print(f"{f'{m}, {n}':>6}{row['flops_ratio']:>7.2f}x{row['plain_step_ms']:>10.1f}{cells}", flush=True)
        results.append({"threads": threads} | row)
    return results


if __name__ == "__main__":
    main()
