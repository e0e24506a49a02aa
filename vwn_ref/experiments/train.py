"""Train one model: `python -m vwn_ref.experiments.train --model.m 4 --model.n 8 --steps 2000 --out runs/r2`.

    result = train(TrainConfig(model=VWNConfig(vocab_size=1024, m=4, n=8), steps=2000))     # in Python, in memory
    model, tokenizer, config = load_run("runs/r2")

The seed fixes everything: initial weights, batches, and so the log, to the last bit on one machine. A run that was
killed goes on with `--resume` and ends as if it had not been. `torchrun --nproc-per-node 2 -m
vwn_ref.experiments.train` shares each batch between processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import shlex
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vwn_ref.config import VWNConfig, check_bool, check_choice, check_float, check_int, check_text
from vwn_ref.experiments import checkpoint
from vwn_ref.experiments.checkpoint import CheckpointError
from vwn_ref.experiments.console import Clock, Progress, Signals, note, told
from vwn_ref.experiments.data import Corpus, DataConfig, describe, load_corpus, load_tokenizer, path_text
from vwn_ref.experiments.provenance import git_commit
from vwn_ref.experiments.run import Run, read_config, read_json
from vwn_ref.experiments.world import World, joined_world, torch_settings
from vwn_ref.model import Losses, VWNTransformer


@dataclass(frozen=True)
class TrainConfig:
    """Everything that fixes a run. Raises ValueError at construction for every inconsistent choice.

    `python -m vwn_ref.experiments.train --help` explains every field.
    """

    model: VWNConfig = field(default_factory=lambda: VWNConfig(vocab_size=DataConfig.vocab_size))
    """The model; its vocabulary must be as large as data.vocab_size (the command line sees to that)."""
    data: DataConfig = field(default_factory=DataConfig)
    """The corpus and its tokenizer."""
    out: str | None = None
    """Folder of the run. None: keep nothing."""
    resume: bool = False
    """Go on with the run in `out` where its last checkpoint left it."""
    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 16
    """Sequences a step, over all processes."""
    micro_batch: int | None = None
    """Sequences at once in a process, to save memory; gradients are added up. None: its whole share of the batch. The
    load balance of a MoE is taken over the sequences at once, so that its loss depends on this and on the processes."""
    seq_len: int = 128
    """Tokens predicted in each sequence."""
    lr: float = 3e-3
    """Highest learning rate of AdamW."""
    final_lr: float = 0.1
    """Learning rate at the end, as a share of `lr`."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls to its end after the warm-up."""
    warmup: int = 100
    """Steps over which the learning rate rises from 0, in a line."""
    beta1: float = 0.9
    """Decay of AdamW's mean of gradients."""
    beta2: float = 0.95
    """Decay of AdamW's mean of squared gradients."""
    weight_decay: float = 0.1
    """On matrices. Static A and B have none, as in the paper, section 3.3; nor have norm gains (not said there)."""
    decay_static: bool = False
    """Weight decay on static A and B as well, to see what it does."""
    grad_clip: float = 1.0
    """Largest norm of the gradient, over all parameters. 0: no limit."""
    seed: int = 0
    """Fixes initial weights and batches; models of one seed see the same batches."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast, weights stay in float32. A VWN's state is then bfloat16, while the plain model's residual
    stream, a sum, stays in float32: two models compared so do not carry with equal precision."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda where there is one."""
    compile: bool = False
    """Compile the model with torch.compile."""
    threads: int | None = None
    """Threads of PyTorch's CPU operations. None: as they are."""
    log_interval: int = 20
    """Steps between lines of the log; a line gives means over the steps since the last one."""
    val_interval: int = 500
    """Steps between validations; there is one at the start and one at the end besides."""
    val_tokens: int = 200_000
    """Tokens predicted in validation, always the same ones; all there are where the corpus has fewer."""
    checkpoint_interval: int = 500
    """Steps between checkpoints; there is one at the end and one on Ctrl-C besides."""
    progress: bool = True
    """Show progress on stderr."""

    def __post_init__(self) -> None:
        for name, kind in (("model", VWNConfig), ("data", DataConfig)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be a {kind.__name__}")
        for name in ("steps", "batch_size", "seq_len", "log_interval", "val_interval", "val_tokens"):
            check_int(name, getattr(self, name))
        check_int("checkpoint_interval", self.checkpoint_interval)
        check_int("warmup", self.warmup, least=0)
        check_int("seed", self.seed, least=0)
        if self.seed >= 2**63:
            raise ValueError(f"seed = {self.seed}: must be < 2**63")
        if self.out is not None:
            object.__setattr__(self, "out", path_text("out", self.out))
        check_text("device", self.device)
        for name in ("micro_batch", "threads"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name))
        check_float("lr", self.lr, above=True)
        for name in ("final_lr", "beta1", "beta2", "weight_decay", "grad_clip"):
            check_float(name, getattr(self, name))
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be < 1")
        for name in ("decay_static", "resume", "compile", "progress"):
            check_bool(name, getattr(self, name))
        check_choice("schedule", self.schedule, ("cosine", "linear", "constant"))
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        if self.model.vocab_size != self.data.vocab_size:
            raise ValueError(
                f"model.vocab_size = {self.model.vocab_size}: must be data.vocab_size = {self.data.vocab_size}"
            )
        if self.seq_len > self.model.max_seq_len:
            raise ValueError(f"seq_len = {self.seq_len}: must be ≤ model.max_seq_len = {self.model.max_seq_len}")
        if self.model.mtp_layers and self.seq_len < 2:
            raise ValueError(f"seq_len = {self.seq_len}: must be ≥ 2 where model.mtp_layers > 0")

    @classmethod
    def from_dict(cls, values: dict) -> TrainConfig:
        """The inverse of `dataclasses.asdict`, also after a trip through JSON."""
        data = {**values["data"], "files": tuple(values["data"]["files"])}
        return cls(**{**values, "model": VWNConfig(**values["model"]), "data": DataConfig(**data)})


@dataclass(frozen=True)
class TrainResult:
    """A trained model in eval mode, the lines of its log, and the summary."""

    model: VWNTransformer
    log: list[dict]
    """Each line has step and tokens; lines of training lr, grad_norm, train_total, train_next, train_next2 and
    train_balance (means since the last line, nats a token); lines of validation val_total, val_next, ..."""
    summary: dict
    """Wall-clock (seconds), cpu_seconds, tokens_per_second, parameters, final losses, versions, git commit."""


class Stopped(KeyboardInterrupt):
    """Training ended early on a signal, after a checkpoint."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


# ------------------------------------------------------------------------------------------- pure functions


def lr_at(config: TrainConfig, step: int) -> float:
    """Learning rate of step 0 … steps − 1."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    fall = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[config.schedule]
    return config.lr * (config.final_lr + (1 - config.final_lr) * fall)


def train_batch(tokens: np.ndarray, config: TrainConfig, step: int) -> np.ndarray:
    """The whole batch of a step, [batch_size, seq_len + 1]: a function of seed and step, there is no loader state."""
    last = len(tokens) - config.seq_len  # window starts are 0 … last − 1
    starts = np.random.default_rng([config.seed, step]).integers(last, size=config.batch_size)
    return windows(tokens, starts, config.seq_len)


def val_starts(tokens: np.ndarray, config: TrainConfig) -> np.ndarray:
    """Starts of the validation windows: no two overlap, and they are spread evenly over `tokens`."""
    there = (len(tokens) - 1) // config.seq_len
    wanted = min(there, math.ceil(config.val_tokens / config.seq_len))
    return np.arange(wanted) * there // wanted * config.seq_len


def windows(tokens: np.ndarray, starts: np.ndarray, seq_len: int) -> np.ndarray:
    """Windows [len(starts), seq_len + 1], int64."""
    return tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64)


def check_corpus(corpus: Corpus, config: TrainConfig) -> None:
    """Raise ValueError if training or validation has not one window."""
    for name, tokens in (("training", corpus.train), ("validation", corpus.val)):
        if len(tokens) <= config.seq_len:
            raise ValueError(
                f"seq_len = {config.seq_len}: must be < the tokens for {name}, the corpus has {len(tokens)} of them; "
                "give more text or a smaller seq_len"
            )


def check_share(config: TrainConfig, world: World) -> None:
    """Raise ValueError if the batch cannot be dealt out evenly."""
    if config.batch_size % world.size:
        raise ValueError(
            f"batch_size = {config.batch_size}: must be a multiple of the {world.size} processes that share it"
        )
    share = config.batch_size // world.size
    if config.micro_batch is not None and share % config.micro_batch:
        raise ValueError(f"micro_batch = {config.micro_batch}: must divide the {share} sequences of a process")


# --------------------------------------------------------------------------------------------------- training


class Objective(nn.Module):
    """`model.loss` as a forward, which is what DDP and torch.compile wrap. Tokens [b, t+1] -> the four Losses [4]."""

    def __init__(self, model: VWNTransformer, config: TrainConfig, device: torch.device) -> None:
        super().__init__()
        self.model = model
        self._autocast = {"device_type": device.type, "dtype": torch.bfloat16, "enabled": config.dtype == "bfloat16"}

    def forward(self, tokens: Tensor) -> Tensor:
        with torch.autocast(**self._autocast):
            return torch.stack([part.float() for part in self.model.loss(tokens)])


def train(config: TrainConfig, signals: Signals | None = None) -> TrainResult:
    """Train, or with `config.resume` go on, to the last step.

    `signals` is for a caller that has other ways to be told to stop; by default Ctrl-C and SIGTERM are listened to
    where there is a folder.

    Raises ValueError or FileExistsError for a bad config, corpus or folder, naming the field; CheckpointError for a
    damaged checkpoint; Locked where another process trains in the folder; FloatingPointError if the loss, in training
    or in validation, is no longer finite; Stopped after Ctrl-C or SIGTERM, with a checkpoint written where there is a
    folder.
    """
    with joined_world(config.device) as world, torch_settings(config.threads, world.device):
        check_share(config, world)
        folder = None if config.out is None else Path(config.out).expanduser()
        run = Run(folder, dataclasses.asdict(config))
        run.check(config.resume)
        if run.finished:
            if config.progress:
                note(f"{folder}: this run is finished")
            return load_result(folder)
        corpus = load_corpus(config.data)
        check_corpus(corpus, config)
        world.wait()  # until every process has looked at the folder
        signals = signals or Signals(wanted=folder is not None)
        try:
            if world.rank == 0:
                run.open((corpus.folder / "tokenizer.json").read_text(encoding="utf-8"), config.resume)
            return train_loop(config, corpus, world, run, signals)
        finally:
            signals.restore()
            run.close()


def train_loop(config: TrainConfig, corpus: Corpus, world: World, run: Run, signals: Signals) -> TrainResult:
    """Steps, log, validation and checkpoints; see `train`."""
    torch.manual_seed(config.seed)
    model = VWNTransformer(config.model).to(world.device)
    optimizer = optimizer_of(model, config, world.device)
    sums = torch.zeros(len(Losses._fields), device=world.device)  # of the losses since the last line of the log
    since = 0  # steps in `sums`
    first, clock = 0, Clock()
    commit = git_commit()  # of the code that runs, whatever is committed while it does
    tokens_per_step = config.batch_size * config.seq_len

    kept = run.load() if config.resume else None
    if kept is not None:
        tensors, state = kept
        if state["corpus"] != corpus.digest:
            raise ValueError(f"resume: {run.folder} was trained on another corpus than {describe(corpus)}")
        processes = state.get("processes", world.size)  # what older checkpoints do not say
        if config.model.n_experts and processes != world.size:
            raise ValueError(
                f"resume: {run.folder} was trained by {processes} processes, these are {world.size}; with experts must "
                "be as many, the balance loss is taken over the sequences of a process"
            )
        restore(tensors, model, optimizer, run)
        sums.copy_(tensors["sums"])
        first, since, clock = state["step"], state["since"], Clock(state["seconds"], state.get("cpu_seconds"))
    if config.resume and world.rank == 0:
        run.check_tokenizer((corpus.folder / "tokenizer.json").read_text(encoding="utf-8"))
        run.cut_log()
        if config.progress:
            goes_on = f"goes on at step {first} of {config.steps}"
            note(f"{run.folder}: {goes_on if kept is not None else 'starts, there is no checkpoint to go on from'}")

    def save(step: int) -> None:
        world.mean(sums)
        state = {"step": step, "since": since, "corpus": corpus.digest, "processes": world.size}
        state |= {"seconds": clock.seconds, "cpu_seconds": clock.cpu_seconds}
        with clock.paused():
            run.save({**captured(model, optimizer), "sums": sums}, state)

    objective: nn.Module = Objective(model, config, world.device)
    if config.compile:
        objective = torch.compile(objective)
    parallel = DistributedDataParallel(objective) if world.size > 1 else objective
    progress = Progress(first, config.steps, tokens_per_step, wanted=config.progress and world.rank == 0)
    try:
        if kept is None:
            with clock.paused():
                run.write({"step": 0, "tokens": 0, **validate(objective, corpus, config, world)})
        for step in range(first, config.steps):
            losses, norm = advance(parallel, optimizer, corpus, config, world, step)
            sums += losses
            since += 1
            done = step + 1
            progress.step()

            last = done == config.steps
            if last or done % config.log_interval == 0 or done % config.val_interval == 0:
                means = (world.mean(sums) / since).tolist()
                row = {"step": done, "tokens": done * tokens_per_step, "lr": lr_at(config, step)}
                row |= {
                    "grad_norm": norm.item(),
                    **{f"train_{name}": x for name, x in zip(Losses._fields, means, strict=True)},
                }
                if not math.isfinite(sum(means)):
                    raise FloatingPointError(
                        f"the loss at step {done} is {row['train_total']}: lr = {config.lr} may be too high"
                    )
                sums.zero_()
                since = 0
                if last or done % config.val_interval == 0:
                    with clock.paused():
                        row |= validate(objective, corpus, config, world)
                    if not math.isfinite(row["val_total"]):  # the last update can ruin what was well until then
                        raise FloatingPointError(
                            f"the validation loss after step {done} is {row['val_total']}: lr = {config.lr} may be too "
                            "high"
                        )
                run.write(row)
                progress.report(row)
            stop = world.any(signals.number is not None)
            if stop or last or done % config.checkpoint_interval == 0:
                save(done)
            if stop and not last:
                raise Stopped(f"stopped after step {done} of {config.steps}", signals.number or signal.SIGTERM)
    finally:
        progress.close()

    summary = summarise(config, corpus, world, model, run.log, clock, commit)
    run.finish(model.state_dict(), summary)
    world.wait()  # nobody leaves before the summary is written
    return TrainResult(model.eval(), run.log, summary)


def optimizer_of(model: VWNTransformer, config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW; what does not decay is said by the model."""
    return torch.optim.AdamW(
        model.parameter_groups(config.weight_decay, decay_static=config.decay_static),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        fused=device.type in ("cpu", "cuda"),
    )


def advance(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    corpus: Corpus,
    config: TrainConfig,
    world: World,
    step: int,
) -> tuple[Tensor, Tensor]:
    """One training step -> what `backward` gives."""
    for group in optimizer.param_groups:
        group["lr"] = lr_at(config, step)
    found = backward(objective, corpus, config, world, step)
    optimizer.step()
    optimizer.zero_grad()
    return found


def backward(
    objective: nn.Module, corpus: Corpus, config: TrainConfig, world: World, step: int
) -> tuple[Tensor, Tensor]:
    """Gradients of one step, clipped -> this process's mean losses [4] and the norm before clipping, a scalar."""
    share = config.batch_size // world.size
    mine = train_batch(corpus.train, config, step)[world.rank * share :][:share]
    parts = torch.from_numpy(mine).to(world.device).split(config.micro_batch or share)
    losses = torch.zeros(len(Losses._fields), device=world.device)
    for i, tokens in enumerate(parts):
        # DDP averages gradients over the processes in the last backward only
        synced = i == len(parts) - 1 or not isinstance(objective, DistributedDataParallel)
        with contextlib.nullcontext() if synced else objective.no_sync():
            part = objective(tokens) / len(parts)
            part[0].backward()
        losses += part.detach()
    largest = config.grad_clip or math.inf
    return losses, nn.utils.clip_grad_norm_(objective.parameters(), largest)


@torch.no_grad()
def validate(objective: nn.Module, corpus: Corpus, config: TrainConfig, world: World) -> dict:
    """Mean losses over the validation windows, shared between the processes: val_total, val_next, ..."""
    objective.eval()
    starts = val_starts(corpus.val, config)
    sums = torch.zeros(len(Losses._fields), device=world.device, dtype=torch.float32)
    mine = starts[world.rank :: world.size]
    for i in range(0, len(mine), config.batch_size):
        tokens = torch.from_numpy(windows(corpus.val, mine[i : i + config.batch_size], config.seq_len))
        sums += objective(tokens.to(world.device)) * len(tokens)
    objective.train()
    means = (world.mean(sums) * world.size / len(starts)).tolist()
    return {f"val_{name}": mean for name, mean in zip(Losses._fields, means, strict=True)}


def captured(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that the next step depends on, as tensors: weights, optimizer, random state."""
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    tensors |= checkpoint.optimizer_tensors(model, optimizer)
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    return tensors


def restore(tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer, run: Run) -> None:
    """Undo `captured`."""
    checkpoint.load_weights(model, weights(tensors), run.folder / "checkpoint.safetensors")
    checkpoint.load_optimizer(model, optimizer, tensors)
    torch.set_rng_state(tensors["random/cpu"])
    if torch.cuda.is_available() and "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"])


def weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's part of a checkpoint."""
    return {name.removeprefix("model/"): x for name, x in tensors.items() if name.startswith("model/")}


def summarise(config, corpus: Corpus, world: World, model: nn.Module, log: list[dict], clock: Clock, commit) -> dict:
    """What summary.json says."""
    tokens, seconds = config.steps * config.batch_size * config.seq_len, clock.seconds
    return {
        **{name: value for name, value in log[-1].items() if name.startswith(("val_", "train_"))},
        "steps": config.steps,
        "tokens": tokens,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": seconds,  # of training alone: no validation, no checkpoints
        "cpu_seconds": clock.cpu_seconds,  # of this process: validation and checkpoints too; lost steps are not counted
        "tokens_per_second": tokens / seconds,
        "corpus": {"digest": corpus.digest, "is": describe(corpus)},
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type,
        "processes": world.size,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("vwn_ref", "torch", "numpy", "tokenizers")},
        "git": commit,
    }


# ------------------------------------------------------------------------------------------------- kept runs


def load_config(folder: Path) -> TrainConfig:
    """The config of a run. Raises FileNotFoundError where there is no run, CheckpointError for a damaged file."""
    try:
        return TrainConfig.from_dict(read_config(folder))
    except (KeyError, TypeError) as error:  # a field too few or too many
        raise CheckpointError(f"{folder / 'config.json'} is damaged, or of another version: {error!r}") from error


def load_run(folder: str | Path) -> tuple[VWNTransformer, Tokenizer, TrainConfig]:
    """Model (on the CPU, in eval mode), tokenizer and config of a run, finished or not.

    Raises FileNotFoundError where there is no run, or no checkpoint yet, CheckpointError for a damaged file.
    """
    folder = Path(folder).expanduser()
    config = load_config(folder)
    path = folder / "weights.safetensors"
    if path.exists():
        tensors, _ = checkpoint.load(path)
    else:
        path = folder / "checkpoint.safetensors"
        tensors = weights(checkpoint.load(path)[0])
    with torch.random.fork_rng(devices=[]):
        model = VWNTransformer(config.model)
    checkpoint.load_weights(model, tensors, path)
    return model.eval(), load_tokenizer(folder / "tokenizer.json"), config


def load_result(folder: Path) -> TrainResult:
    """The result of a finished run."""
    return TrainResult(load_run(folder)[0], read_json(folder / "log.jsonl"), read_json(folder / "summary.json"))


# ---------------------------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class ModelArguments(VWNConfig):
    """The model's fields but vocab_size, which the tokenizer gives."""

    vocab_size: tyro.conf.Suppress[int] = DataConfig.vocab_size


@dataclass(frozen=True)
class Arguments(TrainConfig):
    """TrainConfig as the command line shows it."""

    model: ModelArguments = field(default_factory=ModelArguments)
    """The model."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", VWNConfig(**{**self.model.to_dict(), "vocab_size": self.data.vocab_size}))
        super().__post_init__()


def parse(arguments: list[str] | None = None) -> TrainConfig:
    """The config that the command line describes; data.vocab_size sets the model's vocabulary too."""
    parsed = tyro.cli(Arguments, prog="python -m vwn_ref.experiments.train", description=__doc__, args=arguments)
    return TrainConfig(**{f.name: getattr(parsed, f.name) for f in dataclasses.fields(TrainConfig)})


def command(arguments: list[str]) -> str:
    """The command that goes on with the run that `arguments` started."""
    size = os.environ.get("WORLD_SIZE")
    start = ["python"] if size is None else ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", size)]
    rest = [argument for argument in arguments if argument != "--resume"]
    return shlex.join([*start, "-m", "vwn_ref.experiments.train", *rest, "--resume"])


def main() -> None:
    """Train as the command line says; errors in it and in files are told in a line."""
    config = parse()
    leader = os.environ.get("RANK", "0") == "0"
    if config.out is None and leader:
        note("out is not given: nothing will be kept")
    if leader and config.warmup >= config.steps:
        note(f"warmup = {config.warmup}: the run's {config.steps} steps are all warm-up, it never has lr = {config.lr}")
    with told(FloatingPointError, RuntimeError):
        try:
            result = train(config)
        except Stopped as stop:
            if leader:
                note(f"{stop}; go on with:\n  {command(sys.argv[1:])}")
            sys.exit(128 + stop.number)
    if leader:
        print(json.dumps(result.summary, indent=1))


if __name__ == "__main__":
    main()
