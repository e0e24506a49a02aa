"""Tensors and a JSON state in one safetensors file: written whole, checked by digest when read, no pickle."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vwn_ref.experiments.storage import write_whole


class CheckpointError(ValueError):
    """A file that is damaged, or belongs to another model or run."""


def save(path: Path, tensors: dict[str, Tensor], state: dict) -> None:
    """Write `tensors` and the JSON object `state` to `path`, atomically: never a mixture of two moments."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    about = {"state": state, "sha256": digest(tensors, state)}
    # One metadata entry: the order of several is not fixed, and equal checkpoints should be equal files.
    metadata = {"vwn_ref": json.dumps(about, sort_keys=True)}

    def write(temporary: Path) -> None:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the user's umask has it; safetensors makes files for their owner alone
        save_file(tensors, temporary, metadata)
        temporary.chmod(mode)

    try:
        write_whole(path, write)
    except (SafetensorError, OSError) as error:  # the first is how the library tells of a full disk
        raise OSError(f"{path} cannot be written: {error}") from error


def load(path: Path) -> tuple[dict[str, Tensor], dict]:
    """What `save` wrote. Raises FileNotFoundError, or CheckpointError for a damaged file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["vwn_ref"])
            # Copies: what get_tensor gives may be a map of the file, which the next checkpoint replaces.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
        if digest(tensors, about["state"]) != about["sha256"]:
            raise ValueError("its content does not match its checksum")
        return tensors, about["state"]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, MemoryError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error!s:.200}): remove it and start again, or put back a copy"
        ) from error


def digest(tensors: dict[str, Tensor], state: dict) -> str:
    """SHA-256 over names, types, shapes and bytes of CPU tensors, and over a JSON object; in hex."""
    whole = hashlib.sha256(json.dumps(state, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        whole.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return whole.hexdigest()


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as tensors named `optimizer/<parameter>/<entry>`."""
    names = parameter_names(model, optimizer)
    return {
        f"optimizer/{names[i]}/{entry}": value
        for i, entries in optimizer.state_dict()["state"].items()
        for entry, value in entries.items()
    }


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give `optimizer` the state that `optimizer_tensors` took; other entries of `tensors` are left alone."""
    index = {name: i for i, name in enumerate(parameter_names(model, optimizer))}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, name, entry = key.split("/")
            state.setdefault(index[name], {})[entry] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's parameters, in its order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def load_weights(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy `tensors` (name → weight) into `model`. Raises CheckpointError if they are of another model."""
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{path} holds another model than its config.json describes: {error}") from error
