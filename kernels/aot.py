"""Compile every Triton kernel ahead of time, with no GPU: `python -m vwn_ref.kernels.aot --out FILE.json`.

For each kernel, forward and backward, each (m, n), D, state type and target: does it compile, how many registers does
a thread take, how many bytes of them spill into memory, how much shared memory does a program take, and does that fit;
and, on NVIDIA targets, how many instructions the warps of a program issue for one token.
Registers, spills and instructions come from the finished binary: on NVIDIA targets from `cuobjdump`, which Triton
brings along, on AMD ones from the notes in the assembly, whose registers are counted with the accumulation registers.

A row is kept with a digest of everything it was made from, so that a run that was ended goes on where it stopped, and
an edit compiles again what it concerns. Exit status 1 where a row of those asked for is not as `faults` wants it.

Not in a process where TRITON_INTERPRET is set: interpreted kernels cannot be compiled.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # multiply-and-add as one instruction, whatever the default

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import ConstexprFunction, JITFunction
from vwn_ref.kernels import launch
from vwn_ref.kernels.finish import (
    coefficients_gradient_kernel,
    norm_gradient_kernel,
    projections_gradient_kernel,
)  # fmt: skip
from vwn_ref.kernels.projections import projections_kernel
from vwn_ref.kernels.weights import weights_kernel

KERNELS = {  # by what they do; which of its family is launched, `launch.family` says
    **{name: kernel for name, kernel in launch.KERNELS.items() if not name.startswith(("few_", "many_"))},
    "weights": weights_kernel,
    "projections": projections_kernel,
    "coefficients_gradient": coefficients_gradient_kernel,
    "norm_gradient": norm_gradient_kernel,
    "projections_gradient": projections_gradient_kernel,
}
ONCE = (  # a launch, whatever the number of tokens
    "projections", "coefficients_gradient", "norm_gradient", "projections_gradient"
)  # fmt: skip
TARGETS = {  # name -> target, bytes of shared memory that one program may have
    "sm_90": (GPUTarget("cuda", 90, 32), 232_448),
    "sm_80": (GPUTarget("cuda", 80, 32), 166_912),
    "sm_100": (GPUTarget("cuda", 100, 32), 232_448),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65_536),
}
SHAPES = ((2, 3), (4, 8), (4, 16), (8, 64))
WIDTHS = (512, 1024, 2048, 4096)
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
NO_SPILLS = "sm_90"  # the target that tile sizes are chosen for
# Bytes a thread there of bfloat16 kernels, by family: how these work was chosen by time on such a GPU, with Triton 3.6,
# and the fastest spill some. No more than they do now
SPILLED_BY_CHOICE = {
    "many_": {
        "width": 32, "depth": 24, "step": 64, "width_backward": 8, "depth_backward": 32, "step_backward": 216
    },
    "few_": {"width_backward": 8},
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")  # of `launch.sizes`, not the kernel's own
# Pointers to states and to what is as wide as a state; the others are float32.
STATES = {"H", "X", "Z", "OUT", "Y", "G", "G_H", "G_Z", "G_X", "G_Y", "G_OUT", "G_add", "between"}
# Arguments that are numbers; the rest are pointers, aligned as an allocator aligns them.
NUMBERS = {
    **dict.fromkeys(("T", "rows", "stride", "P", "S"), "i32"),
    "eps": "fp32",
    "next_eps": "fp32",
    "norm_eps": "fp32",
}


class Job(NamedTuple):
    """One kernel for one configuration. `dynamic`, `norm`: what the compile-time arguments of these names say."""

    kernel: str
    m: int
    n: int
    D: int
    dtype: str
    target: str
    dynamic: bool = True
    norm: bool = True


def matrix(
    kernels: Iterable[str] = tuple(KERNELS), shapes: Iterable[tuple[int, int]] = SHAPES,
    widths: Iterable[int] = WIDTHS, dtypes: Iterable[str] = ("bf16", "fp32"), targets: Iterable[str] = tuple(TARGETS),
    dynamic: bool = True, norm: bool = True,
) -> Iterator[Job]:  # fmt: skip
    """All combinations of kernels that are ever launched, the target that matters most first."""
    for target in targets:
        for dim in widths:
            for dtype in dtypes:
                for m, n in shapes:
                    for kernel in kernels:
                        fuses = launch.fuses_step_backward(m, n, dim // m, TYPES[dtype])
                        if kernel == "step_backward" and not fuses:
                            continue  # two kernels do it, both in the list
                        if kernel in ("weights", "projections", "projections_gradient") and not dynamic:
                            continue  # a static GHC has no projections
                        if kernel.startswith("group_norm") and (n % m or not dynamic):
                            continue  # r is an integer there; and they know no GHC, so that one of both is enough
                        if kernel == "norm_gradient" and not norm:
                            continue
                        if kernel in ONCE and (dim, dtype) != (1024, "bf16"):
                            continue  # D and the type of the state change little in them
                        yield Job(kernel, m, n, dim, dtype, target, dynamic, norm)


def everything() -> list[Job]:
    """The whole matrix; at D = 1024 static ones, ones with no norm, and float16; and m = 1, Hyper-Connections."""
    some = {"shapes": ((2, 3), (8, 64)), "widths": (1024,)}
    return [
        *matrix(),
        *matrix(shapes=((1, 4),), widths=(1024,), dtypes=("bf16",), targets=("sm_90",)),
        *matrix(shapes=((1, 4),), widths=(4096,), dtypes=("bf16",)),  # rows too long for the registers
        *matrix(shapes=((1, 2),), widths=(8192,), dtypes=("bf16",), targets=("sm_90",)),
        *matrix(shapes=((2, 4),), widths=(9216,), dtypes=("fp32",), targets=("sm_90",)),  # walks
        *matrix(**some, dtypes=("bf16",), dynamic=False),
        *matrix(**some, dtypes=("bf16",), norm=False, kernels=("width", "width_backward", "step", "step_backward")),
        *matrix(**some, dtypes=("fp16",)),
    ]


def covering() -> list[Job]:
    """A small part of `everything`: each kernel, each target, few slots and many; the larger ones static, for speed."""
    return [
        Job("step", 2, 3, 1024, "bf16", "sm_90"),
        Job("step_backward", 2, 3, 1024, "bf16", "sm_90", dynamic=False),
        Job("weights", 2, 3, 1024, "bf16", "sm_90"),
        *(Job(kernel, 2, 3, 1024, "bf16", "sm_90") for kernel in ONCE),
        Job("depth_backward", 2, 3, 1024, "bf16", "gfx942"),
        Job("step", 4, 8, 1024, "bf16", "sm_90", dynamic=False),
        Job("step_backward", 4, 8, 1024, "bf16", "sm_90", dynamic=False),
        Job("width_backward", 4, 8, 1024, "bf16", "sm_90", dynamic=False),
        Job("width", 4, 8, 1024, "bf16", "sm_100", dynamic=False),
        Job("depth_backward", 8, 64, 1024, "bf16", "sm_80", dynamic=False),
        Job("width", 2, 3, 1024, "bf16", "sm_100"),
        Job("group_norm", 4, 8, 1024, "bf16", "sm_80"),
        Job("width_backward", 2, 3, 1024, "bf16", "sm_90", dynamic=False),
        Job("depth", 4, 8, 1024, "bf16", "gfx942", dynamic=False),
        Job("group_norm_backward", 4, 8, 1024, "bf16", "gfx942"),
        Job("width", 1, 4, 4096, "bf16", "gfx942", dynamic=False),
    ]


# -------------------------------------------------------------------------------------------------- one compilation


class Build(NamedTuple):
    """What `triton.compile` is given."""

    source: ASTSource
    target: GPUTarget
    options: dict  # num_warps, and num_stages where the tile says it
    constants: dict


def build(job: Job) -> Build:
    """The arguments of a compilation as `vwn_ref.kernels.launch` would have them."""
    gpu, dtype, d = TARGETS[job.target][0], TYPES[job.dtype], job.D // job.m
    family = launch.family(job.kernel, job.m, job.n, d, dtype)
    kernel = launch.KERNELS[family + job.kernel] if family else KERNELS[job.kernel]
    if job.kernel == "weights":  # of a width and the depth after it
        constants = launch.weight_sizes(job.m, job.n, d, job.m, job.m + job.n, dtype, job.target)
    elif job.kernel == "projections":  # those of a step
        constants = {"M": job.m, "N": job.n, "D": d, "DEPTH": True, "WIDTH": True, **launch.PROJECTIONS}
    elif job.kernel == "coefficients_gradient":
        constants = {"M": job.m, "N": job.n, "DEPTH": True, **launch.coefficients_gradient_sizes(job.m, job.n)}
    elif job.kernel == "norm_gradient":  # of a width's sums
        name = launch.family("width_backward", job.m, job.n, d, dtype) + "width_backward_kernel"
        constants = launch.norm_gradient_sizes(name, job.m, job.n, d, dtype)
    elif job.kernel == "projections_gradient":
        constants = {"M": job.m, "N": job.n, "D": d, "READ": job.m, "WRITE": job.m + job.n}
        constants |= launch.projections_gradient_sizes(job.m, job.n)
    else:
        constants = launch.sizes(kernel.fn.__name__, job.m, job.n, d, dtype, job.target)
        constants |= {"DYNAMIC": job.dynamic, "NORM": job.norm, "ADD": True}
    if gpu.backend == "hip":
        constants["PREC"] = "ieee"
    options = {k: constants.pop(k) for k in OPTIONS if k in constants}
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    states = STATES | ({"E", "next_E", "E_read", "E_write"} if launch.e_dtype(job.m, job.n, dtype) == dtype else set())
    if (launch.family("step", job.m, job.n, d, dtype) if job.kernel == "projections" else family) == "many_":
        states |= {"V"}
    signature = {
        a: "constexpr" if a in constants else NUMBERS.get(a) or (f"*{job.dtype}" if a in states else "*fp32")
        for a in kernel.arg_names
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(k),): v for k, v in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if signature[a].startswith("*")},
    )
    return Build(source, gpu, options, constants)


def code(kernel: JITFunction | ConstexprFunction, seen: set[str] | None = None) -> list[str]:
    """A kernel and all that it calls, without comments, docstrings and line numbers."""
    seen = set() if seen is None else seen
    if kernel.fn.__name__ in seen:
        return []
    seen.add(kernel.fn.__name__)
    function = ast.parse(kernel.src).body[0]
    function.body = [x for x in function.body if not (isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant))]
    called = (kernel.fn.__globals__.get(name) for name in kernel.fn.__code__.co_names)
    ours = (JITFunction, ConstexprFunction)
    return [ast.dump(function)] + [t for other in called if isinstance(other, ours) for t in code(other, seen)]


def digest(job: Job) -> str:
    """Of what a row depends on."""
    source, _, options, constants = build(job)
    parts = (triton.__version__, job, *(sorted(x.items()) for x in (options, constants, source.signature)))
    return hashlib.sha256("\0".join(map(repr, [*parts, *code(source.fn)])).encode()).hexdigest()[:16]


def compile_one(job: Job) -> dict:
    """What is in the table; "error" holds the message where it fails."""
    source, gpu, options, constants = build(job)
    row = job._asdict() | {k: constants[k] for k in ("BT", "BD") if k in constants} | options
    row["digest"] = digest(job)
    try:
        compiled = triton.compile(source, target=gpu, options=options)
    except Exception as error:  # whatever the compiler raises is the result
        return row | {"error": f"{type(error).__name__}: {error}"[:2000]}
    row["shared"] = compiled.metadata.shared
    if gpu.backend == "hip":
        return row | amd_resources(compiled.asm["amdgcn"])
    cubin = compiled.asm["cubin"]
    row |= resources(cuobjdump(cubin, "--dump-resource-usage"))
    if job.kernel in ONCE:
        return row
    chunks = -(-constants["D"] // constants["BD"])
    tokens = (
        Fraction(constants["BR"], job.n * chunks)
        if job.kernel == "weights"
        else constants.get("BT", constants.get("PER", Fraction(1, constants.get("R", 1))))
    )
    pieces = -(-job.n // 16) if job.n > 16 else 1
    issued = options["num_warps"] * instructions(cuobjdump(cubin, "-sass"), chunks, source.fn.fn.__name__, pieces)
    return row | {"instructions": round(issued / tokens)}


def cuobjdump(cubin: bytes, option: str) -> str:
    """What the tool prints about a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(sass: str, chunks: int, kernel: str, pieces: int = 1) -> int:
    """Instructions that a warp issues for one block of tokens, counted in the disassembly.

    A backward branch is a loop. In backward kernels, in those of few.py, many.py and last.py and in `weights` the
    outermost one takes a block of tokens (or a stretch of rows) a turn: one turn is counted, and what stands around it
    is not, as there are many turns. Every other loop walks along d_b, in `chunks` turns; one inside such a walk takes
    the slots in `pieces`. Branches that skip something are taken to skip nothing.
    """
    places = {int(address, 16): text for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/ +([^;]+);", sass)}
    order = {address: i for i, address in enumerate(places)}
    loops = []
    for address, text in places.items():
        jump = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if jump and int(jump[1], 16) < address:  # a jump to itself, behind the end, is no loop
            loops.append((order[int(jump[1], 16)], order[address]))
    first, last = 0, len(places) - 1
    if loops and (kernel.startswith(("few", "many", "group_norm", "weights")) or kernel.endswith("backward_kernel")):
        first, last = max(loops, key=lambda loop: loop[1] - loop[0])
        loops = [(a, b) for a, b in loops if first <= a and b <= last and (a, b) != (first, last)]
    total = last - first + 1
    for a, b in loops:
        inside = any(c <= a and b <= d for c, d in loops if (c, d) != (a, b))
        total += (chunks * (pieces - 1) if inside else chunks - 1) * (b - a + 1)
    return total


def resources(text: str) -> dict:
    """Registers a thread, and bytes of local memory a thread: arrays (none here) and spilled registers."""
    return {
        "registers": int(re.search(r"REG:(\d+)", text)[1]),
        "spilled": int(re.search(r"STACK:(\d+)", text)[1]) + int(re.search(r"LOCAL:(\d+)", text)[1]),
    }


def amd_resources(assembly: str) -> dict:
    """The same from the notes that AMD's compiler leaves in the assembly."""
    return {
        "registers": int(re.search(r"\.vgpr_count: +(\d+)", assembly)[1]),
        "spilled": int(re.search(r"\.private_segment_fixed_size: +(\d+)", assembly)[1]),
    }


# ------------------------------------------------------------------------------------------------------- the table


def job_of(row: dict) -> Job:
    """The job that a row answers."""
    return Job(*(row[field] for field in Job._fields))


def faults(row: dict) -> str:
    """What is wrong with a row, or "": an error, too much shared memory, or spills on `NO_SPILLS`."""
    if "error" in row:
        return row["error"].splitlines()[0]
    limit = TARGETS[row["target"]][1]
    if row["shared"] > limit:
        return f"shared = {row['shared']}: must be ≤ {limit}"
    family = launch.family(row["kernel"], row["m"], row["n"], row["D"] // row["m"], TYPES[row["dtype"]])
    most = SPILLED_BY_CHOICE.get(family, {}).get(row["kernel"], 0) if row["dtype"] == "bf16" else 0
    if row["spilled"] > most and row["target"] == NO_SPILLS:
        return f"spilled = {row['spilled']}: must be {'≤ ' if most else ''}{most} on {NO_SPILLS}"
    return ""


COLUMNS = (
    *Job._fields,
    "BT",
    "BD",
    "num_warps",
    "num_stages",
    "maxnreg",
    "registers",
    "spilled",
    "shared",
    "instructions",
)
HEAD = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]


def line(row: dict) -> str:
    """A row of Markdown, and behind it what is wrong."""
    return "| " + " | ".join(str(row.get(c, "")) for c in COLUMNS) + f" | {faults(row)}".rstrip()


def read(path: Path) -> dict[Job, dict]:
    """The rows of a file that today's code would give again, by job; none where there is no file."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return {job_of(row): row for row in rows if row["digest"] == digest(job_of(row))}


def write(path: Path, rows: dict[Job, dict]) -> None:
    """JSON, a line a row, sorted; whole or not at all."""
    from vwn_ref.experiments.storage import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(rows[job]) for job in sorted(rows))
    write_text(path, f'{{"triton": {json.dumps(triton.__version__)}, "rows": [\n{lines}\n]}}\n')


def _pair(text: str) -> tuple[int, int]:
    try:
        m, n = map(int, text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: must be m,n such as 4,8") from error
    if not 1 <= m <= n:
        raise argparse.ArgumentTypeError(f"{text}: must be m,n with 1 ≤ m ≤ n")
    return m, n


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be an integer ≥ 1")
    return int(text)


def main() -> int:
    """Compile what is asked for, print the table, keep it in --out; how many rows are not as they should be."""
    parser = argparse.ArgumentParser(prog="python -m vwn_ref.kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", nargs="+", choices=list(KERNELS))
    parser.add_argument("--shapes", nargs="+", type=_pair, metavar="M,N")
    parser.add_argument("--widths", nargs="+", type=_positive, metavar="D")
    parser.add_argument("--dtypes", nargs="+", choices=list(TYPES))
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS))
    parser.add_argument("--static", action="store_true", help="a static GHC; dynamic otherwise")
    parser.add_argument("--no-norm", action="store_true", help="no RMSNorm after width; with it otherwise")
    parser.add_argument("--covering", action="store_true", help="the part of it all that `make test` compiles")
    parser.add_argument("--jobs", type=_positive, default=os.cpu_count(), help="compilations at a time")
    parser.add_argument("--out", type=Path, help="JSON file: its rows are kept, new ones added as they are made")
    asked = parser.parse_args()
    if launch.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: kernels that are interpreted cannot be compiled; unset it")

    chosen = {k: v for k in ("kernels", "shapes", "widths", "dtypes", "targets") if (v := getattr(asked, k))}
    if asked.covering:
        jobs = covering()
    elif asked.static or asked.no_norm or chosen:
        jobs = list(matrix(**chosen, dynamic=not asked.static, norm=not asked.no_norm))
        if bad := next((job for job in jobs if job.D % job.m), None):
            parser.error(f"D = {bad.D}: must be a multiple of m = {bad.m}; choose --widths")
        if not jobs:
            parser.error("no kernel of these --kernels is launched for such a GHC, see `matrix`")
    else:
        jobs = everything()
    rows = read(asked.out) if asked.out else {}
    missing = [job for job in jobs if job not in rows]
    print(f"{len(jobs)} configurations, {len(jobs) - len(missing)} of them kept; Triton {triton.__version__}")
    print("\n".join(HEAD))
    written = time.monotonic()
    with ThreadPoolExecutor(asked.jobs) as pool:
        try:
            for row in pool.map(compile_one, missing):
                rows[job_of(row)] = row
                print(line(row), flush=True)
                if asked.out and time.monotonic() - written > 10:
                    write(asked.out, rows)
                    written = time.monotonic()
        finally:
            pool.shutdown(cancel_futures=True)
            if asked.out:
                write(asked.out, rows)
    wrong = [rows[job] for job in jobs if faults(rows[job])]
    print(f"\n{len(jobs)} configurations, {len(wrong)} not as they should be")
    if wrong:
        print("\n".join([*HEAD, *map(line, wrong)]))
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main() > 0)
