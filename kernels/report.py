"""Tables of what `vwn_ref.kernels.bench` measured, in Markdown: `python -m vwn_ref.kernels.report`.

Reads figures/data/gpu/<device>/{rates,ops,steps,memory}.json and computes nothing but ratios of what stands there.
With --readme FILE it puts the tables between the two comment lines of that file that say so. What is not there is
"not measured", what was tried and ended in an error "failed"; where nothing is, the file only says that.

NOTES.md has, between such lines of its own (--notes FILE), what a step took before anything had been tuned on a GPU,
from figures/data/gpu-tuning, and what it takes now.

--limits prints what the instructions that `vwn_ref.kernels.aot` counted, and the bytes that our kernels move, allow at
best, with no GPU, and --notes puts it there too: a kernel reaches no larger share of the bandwidth, however well it
hides what it waits for.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from vwn_ref.kernels.traffic import kernel_bytes, minimal_bytes

FOLDER = Path(__file__).resolve().parents[1] / "figures" / "data" / "gpu"
BEGIN, END = (f"<!-- gpu: {x} -->" for x in ("begin, written by vwn_ref.kernels.report", "end"))
TUNED = tuple(f"<!-- tuned: {x} -->" for x in ("begin, written by vwn_ref.kernels.report", "end"))
LIMITS = tuple(f"<!-- limits: {x} -->" for x in ("begin, written by vwn_ref.kernels.report", "end"))
TOKENS = 16_384
WIDTHS = (1024, 2048, 4096)
SHAPES = {1.5: (2, 3), 2: (4, 8), 4: (4, 16), 8: (8, 64)}  # r -> (m, n)
NOT_MEASURED = "not measured"
NOTHING = "**Not measured: no GPU was at hand.** `python -m vwn_ref.kernels.report` prints the targets."

Rows = dict[str, list[dict]]  # stage -> rows


def load(folder: Path) -> Rows:
    """The rows of each stage kept in the folder of one device. Raises ValueError for a dry run: it measures nothing."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("dry_run"):
            raise ValueError(f"{path}: is of a dry run, must be of a GPU")
        found[content["stage"]] = content["rows"]
    return found


def find(rows: Iterable[dict], **wanted) -> dict:
    """The one row with these values; empty where there is none."""
    return next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), {})


def operation(rows: Rows, implementation: str, op: str, m: int, n: int, D: int, direction: str) -> dict:
    """The row of an operation alone, for `TOKENS` tokens."""
    wanted = {"implementation": implementation, "op": op, "m": m, "n": n, "D": D, "direction": direction}
    return find(rows.get("ops", ()), tokens=TOKENS, **wanted)


DRY_RUN = "dry-run"  # the folder of `vwn_ref.kernels.bench --dry-run`, which measures nothing


def devices(folder: Path) -> list[Path]:
    """The folders of the devices that were measured, in figures/data/gpu or wherever `folder` is."""
    return sorted(p for p in folder.glob("*") if p.is_dir() and p.name != DRY_RUN)


def commits(folder: Path) -> str:
    """Of which code each stage's rows are, in words; nothing where no file says so."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if commit := content.get("commit"):
            found.setdefault(commit[:7] + commit[40:], []).append(content["stage"])
    return "; ".join(f"{', '.join(stages)}: of commit {commit}" for commit, stages in found.items())


def both(rows: Rows, implementation: str, op: str, m: int, n: int, D: int) -> float | None:
    """Microseconds of forward and backward together."""
    times = [operation(rows, implementation, op, m, n, D, x).get("median_us") for x in ("forward", "backward")]
    return None if None in times else sum(times)


# ------------------------------------------------------------------------------------------------------- targets


class Found(NamedTuple):
    """What was measured, where, and between which quotients of quartiles it lies, where it is a quotient of those."""

    value: float
    where: str = ""
    quartiles: tuple[float, float] | None = None


class Target(NamedTuple):
    """`measured` gives what counts, the worst of all D where there are several; None if any of them is missing."""

    what: str
    limit: float
    at_least: bool
    measured: Callable[[Rows], Found | None]
    form: str

    def line(self, rows: Rows) -> str:
        found = self.measured(rows)
        sign = "≥" if self.at_least else "≤"
        said = NOT_MEASURED
        if found is not None:
            met = {x >= self.limit if self.at_least else x <= self.limit for x in found.quartiles or [found.value]}
            said = f"{self.form.format(found.value)}{spread(found, self.form)}{found.where}, "
            said += "open" if len(met) > 1 else "met" if met.pop() else "missed"
        return f"| {self.what} | {sign} {self.form.format(self.limit)} | {said} |"


def spread(found: Found, form: str) -> str:
    """Its quartiles in brackets, or nothing."""
    return "" if found.quartiles is None else " ({} to {})".format(*map(form.format, found.quartiles))


def worst(values: dict[int, float | None], of: Callable) -> Found | None:
    """Of all D."""
    if None in values.values():
        return None
    D = of(values, key=values.get)
    return Found(values[D], f" at D = {D}")


def share(op: str, shape: tuple[int, int], direction: str) -> Callable[[Rows], Found | None]:
    """Least share of the copy bandwidth, over D."""
    return lambda rows: worst(
        {D: operation(rows, "fused", op, *shape, D, direction).get("share_of_copy") for D in WIDTHS}, min
    )


def speedup(shape: tuple[int, int]) -> Callable[[Rows], Found | None]:
    """Least ratio of torch.compile's time to the fused kernel's, for a step, over D."""

    def measured(rows: Rows) -> Found | None:
        pairs = {D: [both(rows, way, "step", *shape, D) for way in ("compiled", "fused")] for D in WIDTHS}
        return worst({D: None if None in pair else pair[0] / pair[1] for D, pair in pairs.items()}, min)

    return measured


def training(rows: Rows, r: float, D: int, key: str = "step_ratio", way: str = "fused") -> float | None:
    """Of a whole training step, over the plain model's."""
    m, n = SHAPES[r]
    return find(rows.get("steps", ()), way=way, m=m, n=n, D=D).get(key)


def training_time(rows: Rows, r: float, D: int, way: str = "fused") -> Found | None:
    """The ratio of times, and what it is between the quartiles of this model and of plain, all times that it ran."""
    ratio = training(rows, r, D, "step_ratio", way)
    if ratio is None:
        return None
    first, last = (training(rows, r, D, key, way) for key in ("q1_us", "q3_us"))
    plain = [x for x in rows["steps"] if x["way"] == "plain" and x["D"] == D and "q3_us" in x]  # not one that failed
    if first is None or not plain:
        return Found(ratio)
    return Found(ratio, "", (first / max(x["q3_us"] for x in plain), last / min(x["q1_us"] for x in plain)))


def recomputed_peak(r: float) -> Callable[[Rows], Found | None]:
    """Largest ratio of peak memory to the plain model's, with recomputation in both, over the D that were measured."""
    m, n = SHAPES[r]

    def measured(rows: Rows) -> Found | None:
        wanted = {"way": "fused", "m": m, "n": n, "recompute": True}
        found = [x for x in rows.get("memory", ()) if wanted.items() <= x.items()]
        return worst({x["D"]: x.get("peak_ratio") for x in found}, max) if found else None

    return measured


def targets() -> list[Target]:
    found = []
    shares = [("depth", (2, 3), (0.85, 0.75)), ("depth", (4, 8), (0.85, 0.75)), ("step", (2, 3), (0.75, 0.60))]
    shares += [("step", (4, 8), (0.75, 0.60)), ("step", (8, 64), (0.50, 0.40))]
    for op, shape, limits in shares:
        for direction, limit in zip(("forward", "backward"), limits, strict=True):
            what = f"{op} {shape}, {direction}: share of copy bandwidth"
            found.append(Target(what, limit, True, share(op, shape, direction), "{:.0%}"))
    for shape, limit in (((2, 3), 2.0), ((8, 64), 4.0)):
        what = f"step {shape}, forward and backward: times faster than `torch.compile`"
        found.append(Target(what, limit, True, speedup(shape), "{:.2f}"))
    for r, limit in ((1.5, 1.04), (2, 1.05), (4, 1.10), (8, 1.20)):
        what = f"training step, r = {r}, D = 4096: time over the plain model's"
        found.append(Target(what, limit, False, functools.partial(training_time, r=r, D=4096), "{:.3f}"))
    what = "peak memory with recomputation, r = 1.5: over the plain model's"
    return [*found, Target(what, 1.10, False, recomputed_peak(1.5), "{:.3f}")]


# -------------------------------------------------------------------------------------------------------- tables


def number(value: float | None, form: str, *rows: dict) -> str:
    """A dash where it was not measured; "failed" where one of the rows that it comes from says so."""
    if value is None:
        return "failed" if any("error" in row for row in rows) else "–"
    return form.format(value)


def measured(lines: list[str]) -> list[str]:
    """Without the rows in which nothing but what they are of is there."""
    return [x for x in lines if set("".join(x.split("|")[3:])) - set(" –")]


def operations(rows: Rows, ops: Iterable[str] = ("width", "depth", "step")) -> list[str]:
    """µs and shares of the fused kernels; µs of the others, forward and backward together."""
    lines = [
        f"| {TOKENS:,} tokens | D | forward, µs | share | backward, µs | share | both | compiled | eager |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for m, n in ((1, 4), *SHAPES.values()):
        for op in ops:
            for D in WIDTHS:
                cells = []
                for direction in ("forward", "backward"):
                    row = operation(rows, "fused", op, m, n, D, direction)
                    cells.append(number(row.get("median_us"), "{:.0f}", row))
                    cells.append(number(row.get("share_of_copy"), "{:.0%}", row))
                for way in ("fused", "compiled", "reference"):
                    pair = [operation(rows, way, op, m, n, D, x) for x in ("forward", "backward")]
                    cells.append(number(both(rows, way, op, m, n, D), "{:.0f}", *pair))
                lines.append(f"| {op} ({m}, {n}) | {D} | {' | '.join(cells)} |")
    return measured(lines)


def training_steps(rows: Rows) -> list[str]:
    """Ratios to the plain model, in brackets between quartiles."""
    lines = [
        "| D | r | time: fused | by bytes and FLOPs | compiled | reference | FLOPs alone | peak memory: fused |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for D in WIDTHS:
        for r in SHAPES:
            time = training_time(rows, r, D)
            keys = (("predicted_step_ratio", "fused"), ("step_ratio", "compiled"), ("step_ratio", "reference"))
            keys += (("flops_ratio", "fused"), ("peak_ratio", "fused"))
            cells = ["–" if time is None else f"{time.value:.3f}{spread(time, '{:.3f}')}"]
            cells += [number(training(rows, r, D, key, way), "{:.3f}") for key, way in keys]
            lines.append(f"| {D} | {r} | {' | '.join(cells)} |")
    return measured(lines)


def tuned(folder: Path = FOLDER) -> str:
    """Of every device on which kernels were tuned: a step's µs and shares, before and after. "–" where not measured."""
    lines = []
    for before in sorted(folder.with_name("gpu-tuning").glob("*/before.json")):
        first, now = {"ops": json.loads(before.read_text(encoding="utf-8"))["rows"]}, load(folder / before.parent.name)
        lines += [f"| {before.parent.name}, µs | D | forward | share | backward | share |", "|---|---|---|---|---|---|"]
        for m, n in ((1, 4), *SHAPES.values()):
            for D in WIDTHS:
                cells = []
                for direction in ("forward", "backward"):
                    pair = [operation(rows, "fused", "step", m, n, D, direction) for rows in (first, now)]
                    for key, form in (("median_us", "{:.0f}"), ("share_of_copy", "{:.0%}")):
                        cells.append(" → ".join(number(row.get(key), form) for row in pair))
                lines.append(f"| step ({m}, {n}) | {D} | {' | '.join(cells)} |")
    return "\n".join(lines)


def markdown(folder: Path, ops: Iterable[str] = ("width", "depth", "step")) -> str:
    """The tables of every device that was measured; without one, that none was, and every target."""
    head = ["| target (H100 or H200, bfloat16) | | |", "|---|---|---|"]
    parts = []
    for device in devices(folder):
        rows, code = load(device), commits(device)
        lines = [
            f"**{device.name}**{f' ({code})' if code else ''}",
            "",
            *head,
            *(target.line(rows) for target in targets()),
        ]
        parts.append("\n".join([*lines, "", *operations(rows, ops), "", *training_steps(rows)]))
    if not parts:
        parts = ["\n".join([NOTHING, "", *head, *(target.line({}) for target in targets())])]
    return "\n\n".join(parts)


def for_readme(folder: Path) -> str:
    """The same of `step` alone; where nothing was measured README only says so."""
    whole = markdown(folder, ops=("step",))
    return NOTHING if whole.startswith(NOTHING) else whole


def into(text: str, table: str, lines: tuple[str, str] = (BEGIN, END)) -> str:
    """`text` with `table` between two lines. Raises ValueError unless they are there, once and in this order."""
    from vwn_ref.experiments.storage import between

    return between(text, *lines, table)


# -------------------------------------------------------------------------------------------------------- limits

# NVIDIA's data sheet of the H100 SXM, not measured: bytes a second, and float32 FLOPs a second outside the tensor
# cores, 2 by each of the 32 threads of a warp: so many instructions of a warp can start a second.
BANDWIDTH, ISSUES = 3.35e12, 67e12 / 64


class Limit(NamedTuple):
    """Nanoseconds a token of one operation, at best: to move the least there is, to move what our kernels move, and to
    start their instructions."""

    least: float
    moving: float
    starting: float

    @property
    def share(self) -> float:
        """Of the bandwidth, at most, counting the least bytes."""
        return self.least / max(self.moving, self.starting)


def limit(compiled: list[dict], op: str, direction: str, m: int, n: int, D: int) -> Limit | None:
    """From the rows of `vwn_ref.kernels.aot`, bfloat16 on sm_90; None where one is missing. Backward with
    `weights_kernel`, in the form in which a step's launches it."""
    from vwn_ref.kernels.launch import whole_rows  # which needs Triton

    wanted = {"m": m, "n": n, "D": D, "dtype": "bf16", "target": "sm_90", "dynamic": True, "norm": True}
    names = [op if direction == "forward" else f"{op}_backward"]
    if names == ["step_backward"] and not find(compiled, kernel="step_backward", **wanted):
        names = ["width_backward", "depth_backward"]
    one_kernel = len(names) == 1
    if direction == "backward":
        names.append("weights")
    counts = [find(compiled, kernel=name, **wanted).get("instructions") for name in names]
    if None in counts:
        return None
    size = (op, direction, m, n, D // m, 1, 2)
    bytes_moved = minimal_bytes(*size), kernel_bytes(*size, one_kernel, whole_rows(m, n, D // m, 16) > 0)
    return Limit(*(1e9 * x / BANDWIDTH for x in bytes_moved), 1e9 * sum(counts) / ISSUES)


def limits(compiled: list[dict], D: int = 1024) -> str:
    """Markdown: `Limit` of each operation that has a target, and of width."""
    aims = {target.what.removesuffix(": share of copy bandwidth"): target.limit for target in targets()}
    lines = [
        f"| bfloat16, D = {D} | instructions a token | ns to start them | ns for the least bytes | ns for ours "
        "| share at most | target |",
        "|---|---|---|---|---|---|---|",
    ]
    for op in ("width", "depth", "step"):
        for shape in ((2, 3), (4, 8), (8, 64)):
            for direction in ("forward", "backward"):
                found = limit(compiled, op, direction, *shape, D)
                if found is None:
                    continue
                what = f"{op} {shape}, {direction}"
                aim = f"{aims[what]:.0%}" if what in aims else "–"
                count = round(found.starting * ISSUES / 1e9)
                times = (f"{x:.1f}" for x in (found.starting, found.least, found.moving))
                cells = (f"{count:,}", *times, f"{found.share:.0%}", aim)
                lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def kept_limits(folder: Path = FOLDER) -> str:
    """`limits` of the table that `make test-kernels` leaves."""
    return limits(json.loads((folder / "aot.json").read_text(encoding="utf-8"))["rows"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vwn_ref.kernels.report", description=__doc__)
    parser.add_argument("--data", type=Path, default=FOLDER, help="default: figures/data/gpu of this repository")
    parser.add_argument("--readme", type=Path, help="a file with the two lines; default: print")
    parser.add_argument("--limits", action="store_true", help="print what the compiled kernels allow at best")
    parser.add_argument("--notes", type=Path, help="a file with two lines for that table; default: none")
    asked = parser.parse_args()
    if not asked.data.is_dir():
        parser.error(f"--data {asked.data}: must be a folder")
    from vwn_ref.experiments.storage import write_text

    for file, lines, table in (
        (asked.readme, (BEGIN, END), for_readme), (asked.notes, LIMITS, kept_limits), (asked.notes, TUNED, tuned)
    ):  # fmt: skip
        if file is not None:
            write_text(file, into(file.read_text(encoding="utf-8"), table(asked.data), lines))
    if asked.limits:
        print(kept_limits(asked.data))
    elif asked.readme is None and asked.notes is None:
        print(markdown(asked.data))


if __name__ == "__main__":
    main()
