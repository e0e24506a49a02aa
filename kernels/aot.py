"""Compile every Triton kernel ahead of time, with no GPU: `python -m vwn_ref.kernels.aot --out FILE.json`.

For each kernel, forward and backward, each (m, n), D, state type and target: does it compile, how many registers does
a thread take, how many bytes of them spill into memory, how much shared memory does a program take, and does that fit.
Registers and spills are read from the finished binary with `cuobjdump`, which Triton brings along, for NVIDIA targets.

Not in a process where TRITON_INTERPRET is set: interpreted kernels cannot be compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # multiply-and-add as one instruction, whatever the default

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vwn_ref.kernels import fused
from vwn_ref.kernels.depth import depth_backward_kernel, depth_kernel
from vwn_ref.kernels.last import last_backward_kernel, last_kernel
from vwn_ref.kernels.step import step_backward_kernel, step_kernel
from vwn_ref.kernels.weights import weights_kernel
from vwn_ref.kernels.width import width_backward_kernel, width_kernel

KERNELS = {
    kernel.fn.__name__: kernel
    for kernel in (
        width_kernel, width_backward_kernel, depth_kernel, depth_backward_kernel, step_kernel, step_backward_kernel,
        last_kernel, last_backward_kernel, weights_kernel,
    )
}  # fmt: skip
TARGETS = {  # name -> target, bytes of shared memory that one program may have
    "sm_80": (GPUTarget("cuda", 80, 32), 166_912),
    "sm_90": (GPUTarget("cuda", 90, 32), 232_448),
    "sm_100": (GPUTarget("cuda", 100, 32), 232_448),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65_536),
}
SHAPES = [(2, 3), (4, 8), (4, 16), (8, 64)]
WIDTHS = [512, 1024, 2048, 4096]
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Pointers to states and to what is as wide as a state; the others are float32.
STATES = {"H", "X", "Z", "OUT", "Y", "G", "G_H", "G_Z", "G_X", "G_Y", "G_OUT", "G_add"}


def compile_one(name: str, m: int, n: int, dim: int, dtype: str, target: str, *, dynamic=True, norm=True) -> dict:
    """One kernel for one configuration -> what is in the table; "error" holds the message where it fails."""
    kernel, (gpu, limit) = KERNELS[name], TARGETS[target]
    if name == "weights_kernel":
        constants = fused.weight_sizes(m, n, dim // m, m + n, TYPES[dtype])
    else:
        constants = fused.sizes(name, m, n, dim // m, TYPES[dtype])
        constants |= {"DYNAMIC": dynamic, "NORM": norm, "ADD": True}
    if gpu.backend == "hip":
        constants["PREC"] = "ieee"
    warps = constants.pop("num_warps")
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    # every float argument is a number (ε), every other pointer a float32 tensor
    scalars = {"T": "i32", "rows": "i32", "eps": "fp32", "next_eps": "fp32", "norm_eps": "fp32"}
    signature = {
        a: "constexpr" if a in constants else scalars.get(a) or (f"*{dtype}" if a in STATES else "*fp32")
        for a in kernel.arg_names
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(k),): v for k, v in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if signature[a].startswith("*")},
    )
    row = {"kernel": name.removesuffix("_kernel"), "m": m, "n": n, "D": dim, "dtype": dtype, "target": target}
    row |= {k: constants[k] for k in ("BT", "BD") if k in constants} | {"num_warps": warps}
    try:
        compiled = triton.compile(source, target=gpu, options={"num_warps": warps})
    except Exception as error:  # whatever the compiler raises is the result
        return row | {"error": f"{type(error).__name__}: {error}"[:2000]}
    row |= {"shared": compiled.metadata.shared, "shared_limit": limit}
    return row | (resources(compiled.asm["cubin"]) if gpu.backend == "cuda" else {})


def resources(cubin: bytes) -> dict:
    """Registers a thread, and bytes of local memory a thread: arrays (none here) and spilled registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        "registers": int(re.search(r"REG:(\d+)", text)[1]),
        "spilled": int(re.search(r"STACK:(\d+)", text)[1]) + int(re.search(r"LOCAL:(\d+)", text)[1]),
    }


def table(rows: list[dict]) -> str:
    """Markdown, a line a row."""
    columns = ("kernel", "m", "n", "D", "dtype", "target", "BT", "BD", "num_warps", "registers", "spilled", "shared")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [str(row.get(c, "")) for c in columns]
        lines.append("| " + " | ".join(cells) + " |" + (f" {row['error'].splitlines()[0]}" if "error" in row else ""))
    return "\n".join(lines)


def main() -> None:
    """Compile what is asked for, print the table, write it to --out."""
    parser = argparse.ArgumentParser(prog="python -m vwn_ref.kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", nargs="*", default=list(KERNELS), choices=list(KERNELS))
    parser.add_argument("--shapes", nargs="*", default=[f"{m},{n}" for m, n in SHAPES], help="m,n m,n ...")
    parser.add_argument("--widths", nargs="*", type=int, default=WIDTHS, help="D, several")
    parser.add_argument("--dtypes", nargs="*", default=list(TYPES), choices=list(TYPES))
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    asked = parser.parse_args()
    if fused.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: kernels that are interpreted cannot be compiled; unset it")
    jobs = [
        (name, *map(int, shape.split(",")), dim, dtype, target)
        for target in asked.targets
        for shape in asked.shapes
        for dim in asked.widths
        for dtype in asked.dtypes
        for name in asked.kernels
        if name != "step_backward_kernel" or fused.fuses_step_backward(int(shape.split(",")[1]), int(dtype[2:]))
    ]
    rows = []
    with ThreadPoolExecutor(asked.jobs) as pool:
        for row in pool.map(lambda job: compile_one(*job), jobs):
            rows.append(row)
            print(table([row]).splitlines()[-1], flush=True)
    if asked.out:
        from vwn_ref.experiments.storage import write_text

        asked.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(asked.out, json.dumps({"triton": triton.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
