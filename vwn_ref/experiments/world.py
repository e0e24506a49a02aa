"""The processes that train together, and PyTorch's global settings while they do."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among those that train together."""

    rank: int
    size: int
    device: torch.device

    def mean(self, x: Tensor) -> Tensor:
        """Mean of `x` over the processes."""
        if self.size > 1:
            dist.all_reduce(x)
            x /= self.size
        return x

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process."""
        if self.size == 1:
            return flag
        x = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
        return bool(x)

    def wait(self) -> None:
        """Return when every process is here."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def joined_world(device: str) -> Iterator[World]:
    """The processes that `torchrun` started, or this one alone. Raises ValueError for a device that is not there."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    name = device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and size > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        found = torch.device(name)
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device = {device!r}: must be auto or a device of this machine: {error}") from error
    if found.type == "meta":
        raise ValueError(f"device = {device!r}: must be auto or a device that computes")
    if size == 1:
        yield World(0, 1, found)
        return
    if found.type == "cuda":
        torch.cuda.set_device(found)
    dist.init_process_group("nccl" if found.type == "cuda" else "gloo")
    try:
        yield World(rank, size, found)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def torch_settings(threads: int | None, device: torch.device) -> Iterator[None]:
    """Threads and deterministic operations, set here; they and the random state are put back at the end."""
    threads_before = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    cublas = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            if threads is not None:
                torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # a help in finding bugs, at a cost
            if device.type == "cuda" and cublas is None:
                os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # else matrix products may differ
            yield
        finally:
            torch.set_num_threads(threads_before)
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            torch.utils.deterministic.fill_uninitialized_memory = fill
            if device.type == "cuda" and cublas is None:
                os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
