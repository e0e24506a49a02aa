"""Time one kernel with other block sizes than those that `launch.py` chooses, on the GPU that is here.

    python -m vwn_ref.kernels.tune step_backward 4,8 --widths 1024 4096 --set BD=64,128 maxnreg=0,168 --programs 8 12

times every combination; the first line of each width is launch.py's own choice. --set takes those of BD, BT,
num_warps, num_stages, AHEAD and GRAM that `launch.sizes` gives for the kernel, but no BD that is a whole row (of
few.py, and `group_norm`), and maxnreg (registers of a thread at most, 0 for no limit); of `weights` BR, BD, num_warps,
num_stages and each, see `launch.Stretch`. --programs: on a multiprocessor, of however many warps (of `group_norm` for
each group; the forward walks have as many as there are blocks of tokens). Without it a backward kernel with maxnreg has
as many as that many registers allow.

A time is the median by PyTorch's profiler over a few runs of the operation that launches the kernel, forward and
backward, inputs drawn anew and L2 read full of something else before each. --dry-run calls every combination once,
tiny, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from vwn_ref.kernels import bench, launch

from vwn_ref.config import check_widths

OPERATIONS = {"group_norm": "last", "weights": "step"}  # kernel -> the operation that launches it; else its own name
SETTABLE = ("BD", "BT", "num_warps", "num_stages", "AHEAD", "GRAM")
REPEATS = 4


def combinations(given: list[str], programs: list[int]) -> list[dict]:
    """From "A=1,2" and "B=3": nothing at all, {A: 1, B: 3}, {A: 2, B: 3}; with "programs" where there are some."""
    lists = {}
    for text in given:
        name, _, values = text.partition("=")
        try:
            lists[name] = [int(x) for x in values.split(",")]
        except ValueError as error:
            raise ValueError(f"--set {text}: must be NAME=INTEGER,INTEGER…") from error
    if programs:
        if min(programs) < 1:
            raise ValueError(f"--programs {min(programs)}: must be ≥ 1")
        lists["programs"] = programs
    found = [dict(zip(lists, chosen, strict=True)) for chosen in itertools.product(*lists.values())]
    return [{}, *(x for x in found if x)]


@contextlib.contextmanager
def changed(kernel: str, change: dict) -> Iterator[None]:
    """launch.py with this kernel's sizes changed; `kernel` with its family before, few_ or many_."""
    sizes, stretch, programs = launch.sizes, launch.stretch, launch.programs
    own = {k: v for k, v in change.items() if k != "programs"}

    def changed_sizes(name: str, *shape) -> dict:
        found = sizes(name, *shape)
        if name.removesuffix("_kernel") != kernel:
            return found
        whole = name.startswith(("few_", "group_"))  # its rows, of BD places: with fewer another thing is computed
        known = [x for x in SETTABLE if x in found and not (x == "BD" and whole)] + ["maxnreg"]
        if own.keys() - set(known):
            raise ValueError(f"--set {', '.join(own)}: must be of {', '.join(known)} for {kernel}")
        found |= {k: type(found[k])(v) if k in found else v for k, v in own.items()}
        return {k: v for k, v in found.items() if k != "maxnreg" or v}

    try:
        if kernel == "weights":
            if own.keys() - set(launch.Stretch._fields):
                raise ValueError(f"--set {', '.join(own)}: must be of {', '.join(launch.Stretch._fields)} for weights")
            launch.stretch = lambda *shape: stretch(*shape)._replace(**own)
        else:
            launch.sizes = changed_sizes
        if "programs" in change:
            launch.programs = lambda device, each: programs(device, change["programs"])
        yield
    finally:
        launch.sizes, launch.stretch, launch.programs = sizes, stretch, programs


def times(task: bench.Task, kernel: str, changes: list[dict], clock: bench.Bench) -> list[float | None]:
    """Median µs of that kernel for each change; None in a dry run, and where it does not compile or run."""
    function, inputs, fresh = bench.work(task, clock)
    elsewhere = None if clock.dry else torch.zeros(2**26, device=clock.device)

    def prepare() -> None:
        with torch.no_grad():
            for x in inputs[:fresh]:
                x.normal_()
        if elsewhere is not None:
            elsewhere.amax()

    def once() -> None:
        prepare()
        with clock.autocast():
            outputs = [y for y in function(*inputs) if y.requires_grad]
        gradients = [torch.randn_like(y) for y in outputs]
        if elsewhere is not None:
            elsewhere.amax()
        torch.autograd.grad(outputs, inputs, gradients)

    found: list[float | None] = []
    for change in changes:
        with changed(kernel, change):
            try:
                once()  # compiles
                found.append(None if clock.dry else _median(once, kernel))
            except ValueError:
                raise
            except Exception as error:
                print(f"{kernel} {change}: {type(error).__name__}: {error}"[:300], file=sys.stderr)
                found.append(None)
    return found


def _median(once: Callable[[], None], kernel: str) -> float:
    """Raises RuntimeError where the kernel was not launched."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPEATS):
            once()
        torch.cuda.synchronize()
    found = [x.device_time for x in profiler.events() if x.name == f"{kernel}_kernel"]
    if not found:
        raise RuntimeError(f"no {kernel}_kernel among the launched: {sorted({x.name for x in profiler.events()})}")
    return statistics.median(found)


def main(arguments: list[str] | None = None) -> list[dict]:
    """Print a line for each combination; all of them, as rows."""
    known = sorted({name.split("_", 1)[1] if name.startswith(("few_", "many_")) else name for name in launch.KERNELS})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel", choices=[*known, "weights"])
    parser.add_argument("shape", help="m,n")
    parser.add_argument("--widths", nargs="+", type=int, default=[1024, 4096], help="D, default 1024 4096")
    parser.add_argument("--tokens", type=int, default=16_384, help="default %(default)s")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=A,B", help="values to try")
    parser.add_argument("--programs", nargs="+", type=int, default=[], help="on a multiprocessor, values to try")
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU, timing nothing")
    asked = parser.parse_args(arguments)
    try:
        m, n = map(int, asked.shape.split(","))
    except ValueError:
        parser.error(f"shape {asked.shape}: must be m,n, such as 4,8")
    if asked.tokens < 1:
        parser.error(f"--tokens {asked.tokens}: must be ≥ 1")
    try:
        for D in [8 * max(m, 1)] if asked.dry_run else asked.widths:
            check_widths(D, m, n)
    except ValueError as error:
        parser.error(f"shape {asked.shape} with --widths {D}: {error}")
    if asked.dry_run:
        bench.interpret("vwn_ref.kernels.tune", arguments)
    elif not torch.cuda.is_available():
        parser.error("no GPU here, and so nothing to time: must run where there is one, or with --dry-run")
    clock = bench.Bench(asked.dry_run, torch.device("cpu" if asked.dry_run else "cuda"))
    op = OPERATIONS.get(asked.kernel.removesuffix("_backward"), asked.kernel.removesuffix("_backward"))
    rows = []
    for D in asked.widths:
        D, tokens = (8 * m, 3) if asked.dry_run else (D, asked.tokens)
        family = "" if asked.kernel == "weights" else launch.family(asked.kernel, m, n, D // m, clock.dtype)
        try:
            changes = combinations(asked.set, asked.programs)
            found = times(bench.Task("fused", op, m, n, D, tokens), family + asked.kernel, changes, clock)
        except ValueError as error:
            parser.error(str(error))
        for change, median in zip(changes, found, strict=True):
            head = {"kernel": family + asked.kernel, "m": m, "n": n, "D": D, "tokens": tokens}
            rows.append(head | change | {"median_us": median})
            bench.show(rows[-1:])
        if asked.out is not None:
            facts = {k: v for k, v in bench.about(clock, None).items() if k != "dry_run"}
            bench.write_text(asked.out, json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
