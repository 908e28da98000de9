"""Checkpoints: safetensors and JSON, written atomically, never pickle, by any number of processes.

A checkpoint is a folder `step_00001200/` with `state.json` and one safetensors file per process, which holds that
process's part of all modules and optimizers. `torch.distributed.checkpoint` writes and reads them, so that a run can go
on with another number of processes, its weights sharded or not. The folder is written under a temporary name, flushed
to disk and renamed by the first process once all have written, so a folder with the final name is always whole: killing
any process at any moment leaves the previous checkpoint usable. Random numbers need no state of their own, since every
draw of a run derives from (seed, stage, step).
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from python_ref.processes import is_first_process, part_of_batch, wait_for_all, whole_tensors

_NAME = re.compile(r"step_(\d{8})")
_TEMPORARY = ".writing_"
_MODULES, _OPTIMIZERS = "modules.", "optimizers."  # what the names of a checkpoint's tensors start with


class Checkpointer:
    """Writes and reads the checkpoints of one run. Where there are several processes, all call the same methods.

    Args:
        folder: where the `step_*` folders go; made when first needed. All processes must see the same.
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
        if is_first_process() and self.steps():
            old = self.folder.with_name(f"{self.folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            self.folder.rename(old)
        wait_for_all()

    def save(
        self,
        step: int,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        state: Mapping[str, Any],
    ) -> Path:
        """Writes the checkpoint of `step` and removes the oldest ones. `state` is anything JSON can hold."""
        temporary = self.folder / f"{_TEMPORARY}step_{step:08d}"
        if is_first_process():
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(f"{_TEMPORARY}*"):
                shutil.rmtree(leftover)
            temporary.mkdir()
        wait_for_all()
        tensors = _module_tensors(modules)
        for name, optimizer in optimizers.items():
            tensors |= {f"{_OPTIMIZERS}{name}.{key}": value for key, value in flatten_optimizer(optimizer).items()}
        _write_shards(temporary, tensors)
        if is_first_process():
            _write_text(temporary / "state.json", json.dumps({"step": step, **state}, indent=1))
            _sync_folder(temporary)
            if self.path(step).exists():
                shutil.rmtree(self.path(step))
            temporary.rename(self.path(step))
            _sync_folder(self.folder)
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.path(old))
        wait_for_all()
        return self.path(step)

    def load(
        self,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        step: int | None = None,
    ) -> dict[str, Any]:
        """Fills modules and optimizers from the newest checkpoint (or that of `step`); returns its state.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: a file is damaged, or holds other tensors than the modules and optimizers have.
        """
        steps = self.steps()
        if not steps:
            raise FileNotFoundError(f"{self.folder} holds no checkpoint; accepted: a folder with step_* folders")
        if step is not None and step not in steps:
            raise FileNotFoundError(f"step is {step}, which {self.folder} does not hold; accepted: {steps}")
        path = self.path(steps[-1] if step is None else step)
        stored = _stored_shapes(path)
        tensors = _module_tensors(modules)
        for name, optimizer in optimizers.items():
            tensors |= _empty_state(f"{_OPTIMIZERS}{name}.", optimizer, stored)
        prefixes = [f"{_MODULES}{name}." for name in modules] + [f"{_OPTIMIZERS}{name}." for name in optimizers]
        wanted = {key: shape for key, shape in stored.items() if key.startswith(tuple(prefixes))}
        _check_same(path, wanted, {key: tensor.shape for key, tensor in tensors.items()})
        with _single_process_is_fine():
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)))
        for module in modules.values():
            module.load_state_dict(module.state_dict())  # the values are there; this tells the module so
        for name, optimizer in optimizers.items():
            prefix = f"{_OPTIMIZERS}{name}."
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            restore_optimizer(optimizer, state)
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
    """One safetensors file that can be handed on: weights, and the settings needed to rebuild the model as JSON.

    Where there are several processes, all call it; sharded weights are put together, and the first process writes.
    """
    tensors = whole_tensors(tensors)
    if not is_first_process():
        return
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


def _module_tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Weights and buffers under the names that they have in a checkpoint. Buffers named in `batch_dims` of their module
    are this process's part, along that dimension, of what belongs to a whole batch."""
    tensors = {}
    for name, module in modules.items():
        batch_dims = getattr(module, "batch_dims", {})
        for key, tensor in module.state_dict().items():
            part = part_of_batch(tensor, batch_dims[key]) if key in batch_dims else tensor
            tensors[f"{_MODULES}{name}.{key}"] = part
    return tensors


def _empty_state(prefix: str, optimizer: torch.optim.Optimizer, stored: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Tensors for the stored state of an optimizer: scalars, and what is shaped and sharded as its parameter is."""
    empty = {}
    for number, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        for key, shape in stored.items():
            if key.startswith(f"{prefix}{number}."):
                empty[key] = torch.zeros_like(parameter) if shape else torch.zeros(())
    return empty


def _check_same(path: Path, stored: Mapping[str, torch.Size], wanted: Mapping[str, torch.Size]) -> None:
    for key in sorted(stored.keys() | wanted.keys()):
        if stored.get(key) != wanted.get(key):
            has, needs = (list(shapes[key]) if key in shapes else "nothing" for shapes in (stored, wanted))
            raise ValueError(f"{path} holds {has} for {key}; accepted by this run: {needs}")


def _stored_shapes(path: Path) -> dict[str, torch.Size]:
    """Shape of every tensor in a checkpoint, put together from its files."""
    try:
        metadata = HuggingFaceStorageReader(str(path)).read_metadata()
    except SafetensorError as error:
        raise ValueError(f"{path} holds a file that is not a whole safetensors file: {error}") from error
    return {key: entry.size for key, entry in metadata.state_dict_metadata.items()}


def _write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Each process writes its part to a file of its own, flushed to disk; returns when all have."""
    with _single_process_is_fine():
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


@contextmanager
def _single_process_is_fine() -> Iterator[None]:
    """Keeps torch from warning that there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    save_file(dict(tensors), path, metadata)
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
