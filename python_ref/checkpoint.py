"""Checkpoints: safetensors and JSON, written atomically, never pickle.

A checkpoint is a folder `step_00001200/` with one safetensors file per module, one per optimizer, and `state.json`.
It is written under a temporary name, flushed to disk and renamed, so a folder with the final name is always whole:
killing the process at any moment leaves the previous checkpoint usable. Random numbers need no state of their own,
since every draw of a run derives from (seed, stage, step).
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_NAME = re.compile(r"step_(\d{8})")
_TEMPORARY = ".writing_"


class Checkpointer:
    """Writes and reads the checkpoints of one run.

    Args:
        folder: where the `step_*` folders go; made when first needed.
        keep: how many of the newest checkpoints stay.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}; accepted: 1 or more")
        self.folder = Path(folder)
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match.group(1)) for match in found if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def set_aside(self) -> None:
        """Renames the folder to `<name>.old`, so that a run from the start never resumes from another run's end."""
        if self.steps():
            old = self.folder.with_name(f"{self.folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            self.folder.rename(old)

    def save(
        self,
        step: int,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        state: Mapping[str, Any],
    ) -> Path:
        """Writes the checkpoint of `step` and removes the oldest ones. `state` is anything JSON can hold."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(leftover)
        temporary = self.folder / f"{_TEMPORARY}step_{step:08d}"
        temporary.mkdir()
        for name, module in modules.items():
            _write_tensors(temporary / f"{name}.safetensors", module.state_dict())
        for name, optimizer in optimizers.items():
            _write_tensors(temporary / f"{name}.optimizer.safetensors", flatten_optimizer(optimizer))
        _write_text(temporary / "state.json", json.dumps({"step": step, **state}, indent=1))
        _sync_folder(temporary)
        final = self.path(step)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _sync_folder(self.folder)
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.path(old))
        return final

    def load(
        self,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        step: int | None = None,
    ) -> dict[str, Any]:
        """Fills modules and optimizers from the newest checkpoint (or that of `step`); returns its state."""
        steps = self.steps()
        if not steps:
            raise FileNotFoundError(f"{self.folder} holds no checkpoint; accepted: a folder with step_* folders")
        if step is not None and step not in steps:
            raise FileNotFoundError(f"step is {step}, which {self.folder} does not hold; accepted: {steps}")
        path = self.path(steps[-1] if step is None else step)
        for name, module in modules.items():
            module.load_state_dict(read_tensors(path / f"{name}.safetensors"))
        for name, optimizer in optimizers.items():
            restore_optimizer(optimizer, read_tensors(path / f"{name}.optimizer.safetensors"))
        return json.loads((path / "state.json").read_text())


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of every parameter as `<number>.<name>` tensors, e.g. `0.exp_avg`; rates come from the schedule."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": value for number, entries in state.items() for name, value in entries.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `flatten_optimizer`, for an optimizer over the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_weights(path: str | Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """One safetensors file that can be handed on: weights, and the settings needed to rebuild the model as JSON."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(_TEMPORARY + path.name)
    _write_tensors(temporary, tensors, {"settings": json.dumps(settings)})
    temporary.rename(path)
    _sync_folder(path.parent)


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and settings of a file made by `save_weights`."""
    tensors = read_tensors(Path(path))
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
    if "settings" not in metadata:
        raise ValueError(f"{path} carries no settings; accepted: a file written by python_ref.train")
    return tensors, json.loads(metadata["settings"])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, with an error that names a missing or damaged file."""
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint file {path} does not exist")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    plain = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    save_file(plain, path, metadata)
    path.chmod(0o644)  # safetensors makes files that their owner alone can read
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Makes new names in a folder durable; the files themselves are synced when written."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
