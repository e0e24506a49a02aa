"""What the Triton kernels take on this GPU, beside the reference: `make gpu`, or `python -m vwn_ref.kernels.bench`.

    rates    copy bandwidth and bf16 matrix rate of the device: every share below is a share of these
    ops      width, depth, step and last, forward and backward: GPU microseconds, and bytes by `traffic`
    steps    a whole training step (forward, backward, AdamW) of 8 blocks, over the plain Transformer's
    memory   bytes that are kept for the backward pass, and peak memory with recomputation

Each stage has a file of its own, figures/data/gpu/<device>/<stage>.json, written whole after each of its rows. What a
stage's share of --minutes did not suffice for is listed there under "not_measured", most important things first done.

A time is a median of CUDA-event times: inputs drawn anew each time, L2 flushed, the launches queued behind a pause so
that Python's time is not in it (it is in `steps`); "python_us" is how long Python took to queue them, and a row where
it took longer than the longest pause is "late". Everything runs under autocast to bfloat16, as in training: states in
bfloat16, parameters in float32. The plain model's residual stream is made bfloat16 too, which autocast leaves in
float32: otherwise its additions and norms would move twice the bytes that a VWN's state does. The compared:

    fused              the kernels here
    reference          `vwn_ref.dynamic` and `vwn_ref.ghc`, eager
    compiled           the same under torch.compile, static shapes
    max-autotune       the same, mode "max-autotune-no-cudagraphs" (graphs would copy the inputs, at their cost)
    package            hyper-connections from PyPI, at (1, 4), where the mathematics is the same
    package compiled   that under torch.compile

The reference splits the work in another place, its `width` stores the carried state Âᵀ H′ and `depth` adds to it, so
that its width and depth compare with ours only together; `step`, from one sublayer's output to the next one's input,
is the same for all.

--dry-run goes through all of it at tiny sizes, on a CPU, in Triton's interpreter, each function called once. It
measures nothing: what would be a measurement is null.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # multiply-and-add as one instruction, whatever the default

from vwn_ref.kernels import fused
from vwn_ref.kernels.launch import family, fuses_step_backward
from vwn_ref.kernels.traffic import DIRECTIONS, OPS, kernel_bytes, minimal_bytes

from vwn_ref import dynamic, ghc
from vwn_ref.config import VWNConfig
from vwn_ref.cost import BACKWARD, activation_bytes, model_flops, model_parameters, ratio_to_plain
from vwn_ref.experiments.provenance import git_commit
from vwn_ref.experiments.storage import write_text
from vwn_ref.model import VWNTransformer, cross_entropy
from vwn_ref.stack import through

FOLDER = Path(__file__).resolve().parents[1] / "figures" / "data" / "gpu"
STAGES = {"rates": 0.05, "ops": 0.5, "steps": 0.35, "memory": 0.1}  # and their shares of the time
SHAPES = ((2, 3), (4, 8), (8, 64), (4, 16), (1, 4))
EPS = 1e-6
LONGEST_PAUSE = 64_000_000  # clock cycles, some 32 milliseconds


# ----------------------------------------------------------------------------------------------- the device's clock


@dataclass
class Bench:
    """The device, how long things may take, and how they are timed; `dry` calls once and times nothing."""

    dry: bool
    device: torch.device
    copy_rate: float | None = None  # bytes a second, measured by `rates`
    matrix_rate: float | None = None  # FLOPs a second
    deadline: float = float("inf")
    flush: Tensor | None = field(default=None, repr=False)
    pause: int = 4_000_000  # clock cycles, some two milliseconds, in which Python queues what is timed
    keep: Callable[[list[dict]], None] = lambda rows: None  # writes the rows that a stage has so far
    compiled_before: bool = False  # by --compile-only

    def why_stop(self) -> str | None:
        """Why nothing more can be measured in this stage: its time is over, or an error has left the GPU unusable."""
        if time.monotonic() > self.deadline:
            return "time"
        try:
            if not self.dry:
                torch.cuda.synchronize()
        except RuntimeError as error:
            return f"the GPU failed: {error}"[:200]
        return None

    def autocast(self):
        return contextlib.nullcontext() if self.dry else torch.autocast(self.device.type, torch.bfloat16)

    @property
    def dtype(self) -> torch.dtype:
        """Of states. The interpreter's own float32 is enough to go through the motions."""
        return torch.float32 if self.dry else torch.bfloat16

    def compiled(self, function: Callable, mode: str | None = None) -> Callable:
        """torch.compile, for static shapes; a dry run only traces."""
        if self.dry:
            return torch.compile(function, dynamic=False, backend="eager")
        return torch.compile(function, dynamic=False, mode=mode)

    def times(self, prepare: Callable, run: Callable) -> dict:
        """Microseconds of run(prepare()): median, quartiles, and of how many; all null in a dry run."""
        if self.dry:
            run(prepare())
            return {"median_us": None, "q1_us": None, "q3_us": None, "repeats": 0}
        if self.flush is None:  # four times L2 of float32
            self.flush = torch.zeros(torch.cuda.get_device_properties(self.device).L2_cache_size, device=self.device)
        for _ in range(2):  # compiles, and sets up what is set up once
            run(prepare())
        torch.cuda.synchronize()
        found: list[float] = []
        python: list[float] = []
        began, any_late = time.monotonic(), False
        while len(found) < 7 or (len(found) < 21 and time.monotonic() - began < 0.4):
            state = prepare()
            self.flush.amax()  # read, not written: what L2 holds then need not be written back
            torch.cuda._sleep(self.pause)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            queued = time.perf_counter()
            run(state)
            end.record()
            late = start.query()  # the pause was over before all was queued: the GPU may have waited for Python
            python.append(1e6 * (time.perf_counter() - queued))
            torch.cuda.synchronize()
            if late and self.pause < LONGEST_PAUSE:
                self.pause, found = 2 * self.pause, []
                continue
            any_late |= late
            found.append(1e3 * start.elapsed_time(end))
        return quartiles(found) | {"python_us": statistics.median(python)} | ({"late": True} if any_late else {})

    def free(self, compiled: bool = True) -> None:
        """Give memory back between tasks. What torch.compile has made is freed by the collector alone."""
        if compiled:
            gc.collect()
        if not self.dry:
            with contextlib.suppress(RuntimeError):  # after a fault of the GPU, which `why_stop` tells
                torch.cuda.empty_cache()


def quartiles(times: list[float]) -> dict:
    """Of repeated measurements of one thing, in µs."""
    q1, median, q3 = statistics.quantiles(times, n=4)
    return {"median_us": median, "q1_us": q1, "q3_us": q3, "repeats": len(times)}


def attempt(row: dict, measure: Callable[[], dict]) -> dict:
    """The row with what `measure` found, or with the "error" that it ended in: one failure does not end the rest."""
    try:
        return row | measure()
    except torch.OutOfMemoryError:
        return row | {"error": "out of memory"}
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {error}"[:1000]}


# ------------------------------------------------------------------------------------------------------------ rates


def rates(bench: Bench) -> dict:
    """Bandwidth of a copy, bytes read and written, and rate of a bf16 matrix product, both of random data."""
    count, side = (64, 8) if bench.dry else (2**29, 8192)
    a = torch.randn(count, device=bench.device).to(torch.bfloat16)
    b = torch.empty_like(a)
    copy = bench.times(lambda: None, lambda _: b.copy_(a))
    x, y = (torch.randn(side, side, device=bench.device).to(torch.bfloat16) for _ in range(2))
    product = bench.times(lambda: None, lambda _: x @ y)
    bench.copy_rate, bench.matrix_rate = (
        None if t["median_us"] is None else amount / (1e-6 * t["median_us"])
        for t, amount in ((copy, 4 * count), (product, 2 * side**3))
    )
    return {
        "rows": [
            {"what": "copy", "bytes": 4 * count, **copy, "bytes_per_second": bench.copy_rate},
            {"what": "matrix product", "flops": 2 * side**3, **product, "flops_per_second": bench.matrix_rate},
        ],
        "not_measured": [],
    }


# -------------------------------------------------------------------------------------------------------------- ops


class Task(NamedTuple):
    """One row of `ops`, forward and backward together."""

    implementation: str
    op: str
    m: int
    n: int
    D: int
    tokens: int


class Work(NamedTuple):
    """A function with its inputs: floating-point leaves, of which the first `fresh` are drawn anew each time."""

    function: Callable[..., tuple[Tensor, ...]]
    inputs: list[Tensor]
    fresh: int


def tasks(dry: bool) -> list[Task]:
    """The most important first: the kernels, then what they are compared with, then other lengths."""

    def some(name: str, ops: Iterable[str], shapes: Iterable[tuple], widths: Iterable[int], lengths: Iterable[int]):
        return [
            Task(name, op, m, n, D, tokens)
            for tokens, D, (m, n), op in itertools.product(lengths, widths, shapes, ops)
            if op != "last" or n % m == 0
        ]

    if dry:
        tiny = ([(1, 4)], [8], [3])
        return [
            *some("fused", OPS, *tiny),
            *some("reference", OPS, *tiny),
            *some("compiled", ["step"], *tiny),
            *some("package", OPS[:3], *tiny),
            *some("package compiled", ["depth"], *tiny),
        ]
    D, length, first, parts = (1024, 2048, 4096), (16_384,), SHAPES[:3], ("width", "depth")
    return [
        *some("fused", OPS, SHAPES, D, length),
        *some("compiled", ["step"], first, D, length),
        *some("reference", ["step"], first, D, length),
        *some("package", ["step"], [(1, 4)], D, length),
        *some("package compiled", ["step"], [(1, 4)], D, length),
        *some("reference", parts, first, D, length),
        *some("package", parts, [(1, 4)], D, length),
        *some("fused", ["step"], SHAPES, D, (8_192, 32_768, 65_536)),
        *some("reference", OPS, SHAPES[3:], D, length),
        *some("compiled", parts, first, D, length),
        *some("package compiled", parts, [(1, 4)], D, length),
        *some("fused", ("width", "depth", "last"), SHAPES, D, (8_192, 32_768, 65_536)),
        *some("compiled", ["step"], SHAPES[3:], D, length),
        *some("reference", OPS[:3], SHAPES, D, (8_192, 32_768, 65_536)),
        *some("max-autotune", ["step"], [(2, 3), (8, 64)], [2048], length),  # minutes each, and nothing can end it
    ]


def parameters(m: int, n: int, d: int, device: torch.device) -> tuple[Tensor, ...]:
    """Of a dynamic GHC, in order, float32: random, tanh bent (q is about standard normal)."""
    shapes = [(n, m + n), (m, n), (d, m + n), (d, m), (n, m + n), (m, n), (d,)]
    return tuple(torch.randn(s, device=device, requires_grad=True) for s in shapes)


def _norm(module: nn.Module, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """A norm on a given device, with random gain."""
    module.weight = nn.Parameter(weight)
    if bias is not None:
        module.bias = nn.Parameter(bias)
    return module


def fused_work(t: Task, bench: Bench) -> Work:
    """Our kernels."""
    d, draw = t.D // t.m, functools.partial(torch.randn, device=bench.device)
    H, z = draw(t.tokens, t.n, d, dtype=bench.dtype), draw(t.tokens, t.D, dtype=bench.dtype)
    own, following = (fused.Parameters(*parameters(t.m, t.n, d, bench.device)) for _ in range(2))
    norm = _norm(nn.RMSNorm(t.D, eps=EPS), draw(t.D))
    groups = _norm(nn.GroupNorm(t.n // t.m, t.n * d), draw(t.n * d), draw(t.n * d)) if t.op == "last" else None

    # the parameters are the functions' own: autograd finds them
    if t.op == "width":
        used = [own.A, own.W_alpha, own.S_alpha, own.gain, norm.weight]
        return Work(lambda H, *_: (fused.enter(H, own, EPS, norm)[0],), [H, *used], 1)
    if t.op == "depth":
        return Work(lambda H, z, *_: (fused.depth(z, fused.State(H, own, EPS)),), [H, z, *own], 2)
    if t.op == "last":
        inputs = [H, z, *own, groups.weight, groups.bias]
        return Work(lambda H, z, *_: (fused.last(z, fused.State(H, own, EPS), groups),), inputs, 2)

    # As between two others in a model: it hands its e on to the one before, and gets the e of the one after.
    link = fused.unmade_link(H, own).requires_grad_()

    def step(H, z, link, *_):
        x, state = fused.step(z, fused.State(H, own, EPS, link), following, EPS, norm)
        return x, state.H, state.link

    reading = [following.A, following.W_alpha, following.W_beta, following.S_alpha, following.gain, norm.weight]
    return Work(step, [H, z, link, own.A, own.B, own.S_alpha, own.S_beta, *reading], 2)


def reference_width(H, gain, *own):
    """x after the norm, and what depth needs."""
    x, (B, carried) = dynamic.dynamic_width(H, *own, EPS)
    return F.rms_norm(x, gain.shape, gain, EPS), B, carried


def reference_depth(z, B, carried):
    """The new state."""
    return (ghc.depth(z, (B, carried)),)


def reference_step(z, B, carried, gain, *following):
    """From a sublayer's output to the next one's input, and what its depth needs."""
    return reference_width(ghc.depth(z, (B, carried)), gain, *following)


def reference_last(z, B, carried, weight, bias):
    """The last state, normalised in groups D wide."""
    h = ghc.depth(z, (B, carried)).flatten(-2)
    return (F.group_norm(h, h.shape[-1] // z.shape[-1], weight, bias, EPS),)


def reference_work(t: Task, bench: Bench) -> Work:
    """The readable code."""
    d, draw = t.D // t.m, functools.partial(torch.randn, device=bench.device)
    state = draw(t.tokens, t.n, d, dtype=bench.dtype)  # H′, or Âᵀ H′, which has its shape
    z, B = draw(t.tokens, t.D, dtype=bench.dtype), draw(t.tokens, t.m, t.n)
    own, gain = parameters(t.m, t.n, d, bench.device), draw(t.D)
    if t.op == "width":
        return Work(reference_width, [state, gain, *own], 1)
    if t.op == "depth":
        return Work(reference_depth, [z, B, state], 3)
    if t.op == "last":
        return Work(reference_last, [z, B, state, draw(t.n * d), draw(t.n * d)], 3)
    return Work(reference_step, [z, B, state, gain, *own], 3)


def package_work(t: Task, bench: Bench) -> Work:
    """`HyperConnections`: n streams side by side in the batch, [(b n), t, D]."""
    from hyper_connections import HyperConnections

    first, second = (HyperConnections(t.n, dim=t.D, layer_index=0).to(bench.device) for _ in range(2))
    draw = functools.partial(torch.randn, device=bench.device)
    batch = 1 if bench.dry else t.tokens // 2048
    lead = (batch, t.tokens // batch)
    streams = draw(batch * t.n, lead[1], t.D, dtype=bench.dtype)
    z, beta, gain = draw(*lead, t.D, dtype=bench.dtype), draw(*lead, t.n, 1, dtype=bench.dtype), draw(t.D)

    def width(module, streams, gain):
        x, carried, beta = module.width_connection(streams)
        return F.rms_norm(x, gain.shape, gain, EPS), carried, beta["beta"]

    if t.op == "width":
        return Work(lambda streams, gain, *_: width(second, streams, gain), [streams, gain, *_used(second)], 1)
    if t.op == "depth":
        return Work(lambda z, beta, streams: (first.depth_connection(z, streams, beta=beta),), [z, beta, streams], 3)
    return Work(
        lambda z, beta, streams, gain, *_: width(second, first.depth_connection(z, streams, beta=beta), gain),
        [z, beta, streams, gain, *_used(second)],
        3,
    )


def _used(module: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in module.parameters() if p.requires_grad)


def work(t: Task, bench: Bench) -> Work:
    """What a task runs, compiled where it is to be; every input wants a gradient."""
    make = {"fused": fused_work, "package": package_work}.get(t.implementation.split()[0], reference_work)
    function, inputs, fresh = make(t, bench)
    for x in inputs:
        x.requires_grad_()
    if t.implementation.endswith("compiled"):
        function = bench.compiled(function)
    elif t.implementation == "max-autotune":
        function = bench.compiled(function, "max-autotune-no-cudagraphs")
    return Work(function, inputs, fresh)


def run_task(t: Task, bench: Bench) -> list[dict]:
    """Two rows, forward and backward."""
    compiled = t.implementation.endswith("compiled") or t.implementation == "max-autotune"
    if compiled:
        torch._dynamo.reset()  # shapes are static: without this, the ninth of them would run eagerly
    head = t._asdict() | {"dtype": str(bench.dtype).removeprefix("torch.")}
    rows = [head | {"direction": direction} | _model(t, direction, bench) for direction in DIRECTIONS]

    made = functools.cache(lambda: work(t, bench))  # once for both directions: compiling is what takes long

    def measure(direction: str) -> dict:
        function, inputs, fresh = made()

        def draw():
            with torch.no_grad():
                for x in inputs[:fresh]:
                    x.normal_()

        def forward(_=None) -> tuple[Tensor, ...]:
            with bench.autocast():
                return function(*inputs)

        def gradients_wanted():
            draw()
            outputs = [y for y in forward() if y.requires_grad]
            return outputs, [torch.randn_like(y) for y in outputs]

        if direction == "forward":
            return bench.times(draw, forward)
        return bench.times(gradients_wanted, lambda state: torch.autograd.grad(state[0], inputs, state[1]))

    rows = [attempt(row, lambda row=row: measure(row["direction"])) for row in rows]
    bench.free(compiled)
    for row in rows:
        taken = row.get("median_us")
        known = taken is not None and bench.copy_rate is not None
        row["share_of_copy"] = row["minimal_bytes"] / (1e-6 * taken * bench.copy_rate) if known else None
    return rows


def _model(t: Task, direction: str, bench: Bench) -> dict:
    size = (t.m, t.n, t.D // t.m, t.tokens, bench.dtype.itemsize)
    found = {"minimal_bytes": minimal_bytes(t.op, direction, *size)}
    if t.implementation == "fused":
        shape = (t.m, t.n, t.D // t.m, bench.dtype)
        mixes_again = family("step_backward", *shape) == "few_"
        found["kernel_bytes"] = kernel_bytes(t.op, direction, *size, fuses_step_backward(*shape), mixes_again)
    return found


def _warm(together: tuple[Task, ...]) -> None:
    """In a process of its own: compile what tasks need, into the caches on disk that all processes share."""
    bench = Bench(False, torch.device("cuda"))
    for t in together:
        small = t._replace(tokens=64) if t.implementation == "fused" else t  # kernels of ours are made for any length
        with failing_aloud(t):
            function, inputs, _ = work(small, bench)
            with bench.autocast():
                outputs = [y for y in function(*inputs) if y.requires_grad]
            torch.autograd.grad(outputs, inputs, [torch.randn_like(y) for y in outputs])


@contextlib.contextmanager
def failing_aloud(job: NamedTuple) -> Iterator[None]:
    """Print what goes wrong and go on: the measurement itself will meet it again, and keep it."""
    try:
        yield
    except Exception as error:
        print(f"not compiled ahead: {job}: {type(error).__name__}: {error}"[:500], flush=True)


def warm(function: Callable, jobs: Iterable, seconds: float, most: int = 16) -> bool:
    """Call `function` for all jobs, in several processes, for no longer than that; whether that was enough."""
    jobs = list(jobs)
    pool = multiprocessing.get_context("spawn").Pool(min(most, os.cpu_count() or 1), maxtasksperchild=8)
    try:
        pool.map_async(function, jobs, chunksize=1).get(timeout=max(0.0, seconds))
        return True
    except multiprocessing.TimeoutError:
        print(f"not all of {len(jobs)} jobs compiled ahead within {seconds:.0f} s", flush=True)
        return False
    finally:
        pool.terminate()
        pool.join()


def ops_to_compile() -> list[tuple[Task, ...]]:
    """Of `tasks`: the reference's steps that are measured first; and each kernel of ours once, those of a depth and of
    a last together, since a last has a depth in it and two processes would both compile that."""
    todo = tasks(False)
    ours: dict[tuple, dict[str, Task]] = {}
    for t in todo:
        if t.implementation == "fused":
            kernels = "depth" if t.op == "last" else t.op
            ours.setdefault((kernels, t.m, t.n, t.D), {}).setdefault(t.op, t)
    steps = [(t,) for t in todo if t.implementation == "compiled" and t.op == "step"]
    return [*steps, *(tuple(together.values()) for together in ours.values())]


def ops(bench: Bench) -> dict:
    """Every operation alone."""
    todo = tasks(bench.dry)
    if not bench.dry and not bench.compiled_before:
        warm(_warm, ops_to_compile(), 0.4 * (bench.deadline - time.monotonic()))
    rows, missing = [], []
    for t in todo:
        reason = bench.why_stop()
        if t.implementation == "max-autotune" and bench.deadline - time.monotonic() < 120:
            reason = reason or "time"
        if reason is not None:
            missing.append(t._asdict() | {"reason": reason})
        else:
            rows += run_task(t, bench)
            show(rows[-2:])
            bench.keep(rows)
    return {"rows": rows, "not_measured": missing}


# ------------------------------------------------------------------------------------------- a whole training step

WAYS = ("fused", "reference", "compiled")  # how a VWN's connections are computed


class Model(NamedTuple):
    """A model of `steps` or `memory`; m = n = None and way "plain" for the plain Transformer."""

    way: str
    m: int | None
    n: int | None
    D: int
    layers: int
    batch: int
    seq_len: int


def config(t: Model) -> VWNConfig:
    """A small vocabulary: the step is to be that of the blocks."""
    dry = t.D < 64
    kernels = "triton" if t.way == "fused" else "reference"
    return VWNConfig(
        vocab_size=32 if dry else 8192, dim=t.D, n_layers=t.layers, n_heads=2 if dry else t.D // 128, m=t.m, n=t.n,
        max_seq_len=t.seq_len, kernels=kernels,
    )  # fmt: skip


def on_device(t: Model, bench: Bench) -> nn.Module:
    """The model, with a state or residual stream of `bench.dtype` from the embedding on."""
    with bench.device:
        model = VWNTransformer(config(t))
    model.embedding.register_forward_hook(lambda module, inputs, output: output.to(bench.dtype))
    return model


def build(t: Model, bench: Bench) -> nn.Module:
    """The model, every sublayer compiled; where the connection is plain or "compiled", together with it.

    One graph serves all blocks: torch.compile takes parameters as inputs.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = on_device(t, bench)
    options = {"dynamic": False} | ({"backend": "eager"} if bench.dry else {})
    for module in model.connections if t.way in ("plain", "compiled") else [x.body for x in model.sublayers]:
        module.compile(**options)
    return model


def train_step(model: nn.Module, t: Model, bench: Bench) -> tuple[Callable, Callable]:
    """(draw a batch, step on it)."""
    fast = {} if bench.dry else {"fused": True}
    optimizer = torch.optim.AdamW(model.parameter_groups(weight_decay=0.1), lr=1e-4, **fast)
    size = (t.batch, t.seq_len + 1)

    def draw() -> Tensor:
        return torch.randint(model.cfg.vocab_size, size, device=bench.device)

    def step(tokens: Tensor) -> None:
        with bench.autocast():
            loss = model.loss(tokens).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return draw, step


def fitting_batch(D: int, seq_len: int, layers: int, total: int) -> int:
    """Sequences, a power of two, of which the plain model takes no more than half of `total` bytes; 16 at most.

    18 bytes a parameter: itself, its gradient and two moments in float32, and a copy in bfloat16; 34 D a token and
    layer, `vwn_ref.cost.PLAIN_ACTIVATION_BYTES`; logits in float32 three times.
    """
    size = VWNConfig(vocab_size=8192, dim=D, n_layers=layers, n_heads=D // 128)
    fixed = 18 * (layers * (4 * D * D + 3 * D * size.ffn_width) + 2 * size.vocab_size * D)
    each = seq_len * (34 * D * layers + 12 * size.vocab_size)
    batch = 16
    while batch > 1 and fixed + batch * each > total / 2:
        batch //= 2
    return batch


def models(bench: Bench) -> list[Model]:
    """For each D the plain model first and last, so that a drift of the clock shows."""
    if bench.dry:
        plain = Model("plain", None, None, 16, 2, 1, 4)
        return [plain, plain._replace(way="fused", m=2, n=3, layers=1), plain._replace(way="compiled", m=2, n=3)]
    total = torch.cuda.get_device_properties(bench.device).total_memory
    sizes = [(D, 8, fitting_batch(D, 2048, 8, total), 2048) for D in (4096, 2048, 1024)]
    shapes = [(2, 3), (4, 8), (4, 16), (8, 64)]
    found = []
    for size in sizes:
        plain = Model("plain", None, None, *size)
        found += [plain, *(Model("fused", *shape, *size) for shape in shapes), plain]
    # then what they are compared with, and the smallest first: most of it that way
    return found + [Model(way, *shape, *size) for size in sizes[::-1] for way in WAYS[1:] for shape in shapes]


def predicted_ratio(t: Model, plain_us: float | None, bench: Bench) -> float | None:
    """Step time over the plain model's, from the plain model's measured time, the byte model and the FLOP count.

    Added: a step of minimal bytes forward and backward at each of the GHCs, at the copy bandwidth; the matrix products
    of reduce, at the matrix rate; AdamW on the parameters that are more (28 bytes each: parameter, gradient and two
    moments read, all but the gradient written). Taken away: RMSNorm and residual addition, 9 D numbers a token and
    sublayer (forward H read twice, x and z, H written; backward g_x, H and g read, g written).
    """
    if plain_us is None or bench.copy_rate is None or bench.matrix_rate is None:
        return None
    tokens, sublayers = t.batch * t.seq_len, 2 * t.layers
    moved = sum(minimal_bytes("step", x, t.m, t.n, t.D // t.m, tokens, 2) for x in DIRECTIONS)
    moved -= 9 * t.D * 2 * tokens
    vwn, plain = config(t), config(t._replace(way="plain", m=None, n=None))
    more = sum(model_parameters(vwn).values()) - sum(model_parameters(plain).values())
    products = (1 + BACKWARD) * model_flops(vwn, t.seq_len)["reduce"].matmul * tokens
    added = (sublayers * moved + 28 * more) / bench.copy_rate + products / bench.matrix_rate
    return 1 + added / (1e-6 * plain_us)


def _graphs() -> int:
    """How many graphs torch.compile has made since it was last reset: two, attention and FFN, if one serves all."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def run_model(t: Model, bench: Bench) -> dict:
    """Time of a step and the most memory that it took."""

    def measure() -> dict:
        model = build(t, bench)
        draw, step = train_step(model, t, bench)
        if bench.dry:
            return bench.times(draw, step) | {"peak_bytes": None, "graphs": _graphs()}
        for _ in range(2):
            step(draw())
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        found = []
        for _ in range(5):
            tokens = draw()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            step(tokens)
            end.record()
            torch.cuda.synchronize()
            found.append(1e3 * start.elapsed_time(end))
        return quartiles(found) | {"peak_bytes": torch.cuda.max_memory_allocated(), "graphs": _graphs()}

    row = attempt(t._asdict(), measure)
    bench.free()
    return row


def _warm_model(t: Model) -> None:
    """As `_warm`, for the graphs of a model, of which one block has all."""
    bench = Bench(False, torch.device("cuda"))
    with failing_aloud(t):
        small = t._replace(layers=1)
        draw, step = train_step(build(small, bench), small, bench)
        step(draw())


def models_to_compile(bench: Bench) -> list[Model]:
    """Of `models`; by our kernels, which `ops` compiles, the sublayers' graphs are those of any (m, n)."""
    todo = [t for t in models(bench) if t.way != "reference"]
    return list({(t.way, t.D, (t.m, t.n) if t.way == "compiled" else None): t for t in todo}.values())


def compile_only(bench: Bench) -> bool:
    """Into the caches on disk, until the deadline: what may be done while the tests run, and not while times are
    measured. Whether the time was enough."""
    of_models = warm(_warm_model, models_to_compile(bench), 0.4 * (bench.deadline - time.monotonic()), most=4)
    return warm(_warm, ops_to_compile(), bench.deadline - time.monotonic()) and of_models


def steps(bench: Bench) -> dict:
    """Whole training steps, and their ratios to the plain model's."""
    todo = models(bench)
    bench.flush = None  # it would be in every peak
    if not bench.dry and not bench.compiled_before:
        warm(_warm_model, models_to_compile(bench), 0.4 * (bench.deadline - time.monotonic()), most=4)
    rows, missing = [], []
    for t in todo:
        reason = bench.why_stop()
        if reason is not None:
            missing.append(t._asdict() | {"reason": reason})
        else:
            rows.append(run_model(t, bench))
            show(rows[-1:])
            add_ratios(rows, bench)
            bench.keep(rows)
    return {"rows": rows, "not_measured": missing}


def add_ratios(rows: list[dict], bench: Bench) -> None:
    """Each VWN's time and peak over those of the plain model of its width, as far as that has been measured."""
    for row in rows:
        if row["m"] is None:
            continue
        t = Model(*(row[name] for name in Model._fields))
        plain = [r for r in rows if r["way"] == "plain" and r["D"] == t.D]
        time_of, peak_of = (_mean([r.get(key) for r in plain]) for key in ("median_us", "peak_bytes"))
        row |= {
            "step_ratio": _quotient(row.get("median_us"), time_of),
            "peak_ratio": _quotient(row.get("peak_bytes"), peak_of),
            "predicted_step_ratio": predicted_ratio(t, time_of, bench),
            "flops_ratio": ratio_to_plain(config(t), t.seq_len).flops,
        }


def _mean(values: list) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.mean(known) if known else None


def _quotient(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


# ----------------------------------------------------------------------------------------------------------- memory


def checkpointed_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """`model.loss` with every block of two sublayers recomputed in the backward pass: only its input H′ is kept."""
    H = model.embedding(tokens[:, :-1])
    for i in range(0, len(model.sublayers), 2):
        block = model.connections[i : i + 2], model.sublayers[i : i + 2]
        H = checkpoint(through, H, *block, use_reentrant=False)
    return cross_entropy(model.unembedding(model.norm(model.reduce(H))), tokens[:, 1:])


def kept_bytes(t: Model, recompute: bool, bench: Bench) -> dict:
    """Memory between forward and backward pass, less what was there before, and the most during both. Nothing is
    compiled: what eager PyTorch keeps of a sublayer is the same in all models."""
    model = on_device(t, bench)
    tokens = torch.randint(model.cfg.vocab_size, (t.batch, t.seq_len + 1), device=bench.device)

    def loss() -> Tensor:
        with bench.autocast():
            return checkpointed_loss(model, tokens) if recompute else model.loss(tokens).total

    loss().backward()  # gradients are there, kernels compiled
    if bench.dry:
        return {"kept_bytes": None, "peak_bytes": None}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value = loss()
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before
    value.backward()
    torch.cuda.synchronize()
    return {"kept_bytes": kept, "peak_bytes": torch.cuda.max_memory_allocated()}


def memory(bench: Bench) -> dict:
    """Bytes a token and layer that a VWN keeps beyond the plain model, against §3.5; peaks with recomputation.

    The difference between `layers` and half of them is free of embedding, reduce and loss, and the plain model's of
    the same is free of the backbone. With recomputation of whole blocks H′ is kept for one GHC in two, η = 1/2, and
    the plain model keeps D numbers there.
    """
    D, layers, batch, seq_len = (2048, 8, 2, 2048) if not bench.dry else (16, 2, 1, 4)
    shapes, ways = [(2, 3), (4, 8), (4, 16), (8, 64)], ("fused", "reference")
    if bench.dry:
        shapes, ways = [(2, 3)], ("reference",)  # the interpreter takes seconds, and `steps` has been through it
    plain = Model("plain", None, None, D, layers, batch, seq_len)
    todo = [plain, *(Model(way, *shape, *plain[3:]) for way in ways for shape in shapes)]
    bench.flush = None  # it would be in every peak
    rows, missing, per_token = [], [], {}
    for t, recompute in itertools.product(todo, (False, True)):
        key = t._asdict() | {"recompute": recompute}
        reason = bench.why_stop()
        if reason is not None:
            missing.append(key | {"reason": reason})
            continue

        def measure(t=t, recompute=recompute) -> dict:
            whole, half = (kept_bytes(t._replace(layers=n), recompute, bench) for n in (layers, layers // 2))
            difference = None
            if whole["kept_bytes"] is not None:
                difference = (whole["kept_bytes"] - half["kept_bytes"]) / (layers - layers // 2) / (batch * seq_len)
            return {"kept_bytes_per_token_and_layer": difference, "peak_bytes": whole["peak_bytes"]}

        row = attempt(key, measure)
        bench.free()
        of_plain = per_token.setdefault(recompute, row)  # the plain model comes first
        if t.m is not None:
            own, base = (r.get("kept_bytes_per_token_and_layer") for r in (row, of_plain))
            formula = activation_bytes(D, t.m, t.n, eta=0.5) if recompute else activation_bytes(D, t.m, t.n)
            row |= {
                "more_than_plain": None if own is None or base is None else own - base,
                "formula": float(formula) - (2 * D if recompute else 0),
                "peak_ratio": _quotient(row.get("peak_bytes"), of_plain.get("peak_bytes")),
            }
        rows.append(row)
        show([row])
        bench.keep(rows)
    return {"rows": rows, "not_measured": missing}


# ------------------------------------------------------------------------------------------------------------- main


def show(rows: list[dict]) -> None:
    """One line a row."""
    for row in rows:
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


def about(bench: Bench, commit: str | None) -> dict:
    """Where and with what the numbers were made."""
    import triton

    if commit is None:
        commit = git_commit()
    facts = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "dry_run": bench.dry,
        "device": "none: a dry run, nothing is measured",
    }
    if not bench.dry:
        properties = torch.cuda.get_device_properties(bench.device)
        facts |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda or torch.version.hip,
            "driver": driver(),
        }
    with contextlib.suppress(ImportError):
        from importlib.metadata import PackageNotFoundError, version

        with contextlib.suppress(PackageNotFoundError):
            facts["hyper_connections"] = version("hyper-connections")
    return facts


def driver() -> str | None:
    """Version of the NVIDIA driver, None where its tool is not there."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return found[0] if found else None


def interpret(module: str, arguments: list[str] | None) -> None:
    """Start the module again where nothing is interpreted: Triton asks as it is imported, which it has been."""
    if not fused.INTERPRETED:
        os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", module, *(arguments or sys.argv[1:])])


def main(arguments: list[str] | None = None) -> Path:
    """Run the stages asked for, write a file each; the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="rates are always measured")
    parser.add_argument("--minutes", type=float, default=6.5, help="for all stages together, default %(default)s")
    parser.add_argument("--out", type=Path, default=FOLDER, help="default: figures/data/gpu of this repository")
    parser.add_argument("--commit", help="name of the code that runs, where that cannot be asked of git")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU, timing nothing")
    parser.add_argument(
        "--compile-only", action="store_true", help="measure nothing, compile what the stages will need"
    )
    parser.add_argument("--compiled", action="store_true", help="that has been done: compile nothing ahead")
    asked = parser.parse_args(arguments)
    if asked.dry_run:
        interpret("vwn_ref.kernels.bench", arguments)
    elif not torch.cuda.is_available():
        parser.error("no GPU here, and so nothing to measure: must run where there is one, or with --dry-run")
    elif fused.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: the interpreter is no measure of a GPU; unset it")
    if not asked.dry_run and asked.minutes <= 0:
        parser.error(f"--minutes {asked.minutes}: must be > 0")

    bench = Bench(asked.dry_run, torch.device("cpu" if asked.dry_run else "cuda"), compiled_before=asked.compiled)
    if asked.compile_only:
        bench.deadline = time.monotonic() + 60 * asked.minutes
        if not compile_only(bench):
            parser.exit(1, "not all of it was compiled\n")
        return asked.out
    facts = about(bench, asked.commit)
    name = "dry-run" if bench.dry else facts["device"].replace(" ", "-").replace("/", "-")
    folder = asked.out / name
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [s for s in STAGES if s == "rates" or s in asked.stages]
    per_share = 60 * asked.minutes / sum(STAGES[s] for s in chosen)
    torch.manual_seed(0)
    end = time.monotonic()
    for stage in chosen:
        end += per_share * STAGES[stage]  # what a stage leaves over is the next one's
        bench.deadline = end
        began = time.monotonic()

        def write(found: dict, stage: str = stage, began: float = began) -> None:
            took = {"stage": stage, "seconds": None if bench.dry else round(time.monotonic() - began, 1)}
            write_text(folder / f"{stage}.json", json.dumps(facts | took | found, indent=1) + "\n")

        bench.keep = lambda rows, write=write: write({"rows": rows, "not_measured": ["the stage was cut short here"]})
        found = globals()[stage](bench)
        write(found)
        print(f"{folder / f'{stage}.json'}: {len(found['rows'])} rows, {len(found['not_measured'])} not measured")
    return folder


if __name__ == "__main__":
    main()
