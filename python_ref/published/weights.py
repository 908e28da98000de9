"""Checkpoints as Wan2.1 (arXiv 2503.20314) and Self-Forcing (arXiv 2506.08009) publish them, loaded strictly.

Wan2.1 publishes safetensors, in one file or in shards with an index, also under the names of `diffusers`; Self-Forcing
a file of `torch.save` that holds several models ("generator", "generator_ema", "critic") whose names still show how
they were wrapped.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from python_ref.checkpoint import read_tensors

# What FSDP, activation checkpointing, torch.compile and DDP put into the names of what they wrap.
WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module")
ANCHOR = "patch_embedding.weight"  # every Wan model has it once, so what stands before it is a model's prefix
LISTED_NAMES = 8  # of each kind in an error

# Pieces of the names of diffusers' WanTransformer3DModel, which no name of Wan2.1 has, and what Wan2.1 calls them.
DIFFUSERS_NAMES = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "proj_out": "head.head",
}


def load_published(model: nn.Module, path: str | Path, part: str | None = None) -> None:
    """Fills `model` from a published checkpoint; each of its weights must be there, and nothing else.

    Args:
        model: a WanModel or CausalWanModel, or a module that holds one, such as a Discriminator.
        path: a .safetensors file; a .pt, .pth or .bin file of `torch.save`; the .index.json of a sharded checkpoint; or
            a folder that holds one of them.
        part: which model, where the file holds several: "generator", "generator_ema", "critic". None: the only one.

    Raises:
        FileNotFoundError: the file, or a shard that the index names, is not there.
        ValueError: a file that cannot be read, a part that it does not hold, or weights that do not fit the model,
            with the names that are missing or unexpected and the shapes that differ. The model is unchanged then.
    """
    target = model.state_dict()
    (prefix,) = _prefixes(target)
    tensors = _with_prefix(_part_of(read_published(path), part, path), prefix)
    complaints = [
        _listing("missing", target.keys() - tensors.keys()),
        _listing("unexpected", tensors.keys() - target.keys()),
        _listing(
            "of another shape",
            (
                f"{name} {list(tensors[name].shape)} (the model: {list(target[name].shape)})"
                for name in target.keys() & tensors.keys()
                if tensors[name].shape != target[name].shape
            ),
        ),
    ]
    if any(complaints):
        raise ValueError(f"{path} does not fit the model; " + "; ".join(filter(None, complaints)))
    model.load_state_dict(tensors)


def read_published(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a published checkpoint, by their names in it without those of wrappers, and Wan2.1's where it has
    those of diffusers.

    A nested file gives dotted names, e.g. "generator_ema.model.head.head.weight". Large files are mapped, not read.
    """
    path = _file_in(Path(path))
    if path.name.endswith(".index.json"):
        tensors = dict(_read_shards(path))
    elif path.suffix == ".safetensors":
        tensors = read_tensors(path)
    else:
        tensors = dict(_tensors_in(_read_pickle(path)))
    named = {_without_wrappers(name): tensor for name, tensor in tensors.items()}
    if any("condition_embedder." in name for name in named):
        named = {_from_diffusers(name): tensor for name, tensor in named.items()}
    if len(named) != len(tensors):
        raise ValueError(f"{path} holds two weights of one name once wrappers' names are left out")
    return named


def parts_of(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the models that a checkpoint holds; "" for one that stands at the top."""
    return sorted({prefix.partition(".")[0] for prefix in _prefixes(tensors)})


def _prefixes(tensors: Mapping[str, Tensor]) -> list[str]:
    """What stands before a Wan model's names, for each of the models."""
    return sorted(name.removesuffix(ANCHOR) for name in tensors if name == ANCHOR or name.endswith(f".{ANCHOR}"))


def _part_of(tensors: dict[str, Tensor], part: str | None, path: str | Path) -> dict[str, Tensor]:
    """The weights of one model, still with its prefix."""
    prefixes = _prefixes(tensors)
    if not prefixes:
        raise ValueError(f"{path} holds no {ANCHOR}; accepted: a checkpoint with the names of Wan2.1")
    if part is None:
        if len(prefixes) > 1:
            raise ValueError(f"part is None, but {path} holds several models; accepted: {parts_of(tensors)}")
        return tensors if prefixes[0].count(".") < 2 else _below(tensors, prefixes[0].partition(".")[0])
    if not any(prefix.startswith(f"{part}.") for prefix in prefixes):
        found = parts_of(tensors)
        accepted = "None, since it holds one model without a name" if found == [""] else found
        raise ValueError(f"part is {part!r}, which {path} does not hold; accepted: {accepted}")
    return _below(tensors, part)


def _below(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}


def _with_prefix(tensors: dict[str, Tensor], wanted: str) -> dict[str, Tensor]:
    """The weights of one model with another prefix; those that stand outside the model keep their names."""
    (prefix,) = _prefixes(tensors)
    return {
        wanted + name.removeprefix(prefix) if name.startswith(prefix) else name: tensor
        for name, tensor in tensors.items()
    }


def _without_wrappers(name: str) -> str:
    return ".".join(piece for piece in name.split(".") if piece not in WRAPPERS)


def _from_diffusers(name: str) -> str:
    for theirs, ours in DIFFUSERS_NAMES.items():
        name = re.sub(rf"(?<![^.]){re.escape(theirs)}(?![^.])", ours, name)
    table = "modulation" if "blocks." in name else "head.modulation"
    return re.sub(r"(?<![^.])scale_shift_table$", table, name)


def _listing(what: str, names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - LISTED_NAMES} more" if len(ordered) > LISTED_NAMES else ""
    return f"{what}: {', '.join(ordered[:LISTED_NAMES])}{more}" if ordered else ""


def _file_in(path: Path) -> Path:
    """The path itself, or the one checkpoint in a folder: an index before the shards that it names."""
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"checkpoint {path} does not exist")
        return path
    for pattern in ("*.index.json", "*.safetensors", "*.pt", "*.pth", "*.bin"):
        found = sorted(path.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(
                f"{path} holds {', '.join(file.name for file in found)}; accepted: the path of one of them"
            )
    raise FileNotFoundError(
        f"{path} holds no checkpoint; accepted: a .safetensors, .index.json, .pt, .pth or .bin file"
    )


def _read_shards(index: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of all shards, each from the file that the index names for it."""
    try:
        files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f'{index} is no index; accepted: JSON with a "weight_map" of names to files') from error
    for file in sorted(set(files.values())):
        shard = index.with_name(file)
        tensors = read_tensors(shard) if shard.suffix == ".safetensors" else dict(_tensors_in(_read_pickle(shard)))
        named = {name for name, where in files.items() if where == file}
        if named != tensors.keys():
            differing = _listing("the names that differ", named ^ tensors.keys())
            raise ValueError(f"{shard} does not hold what {index.name} says; {differing}")
        yield from tensors.items()


def _read_pickle(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint file {path} does not exist")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path} cannot be read: {reason}; accepted: what torch.load(weights_only=True) reads"
        ) from error


def _tensors_in(loaded: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested mappings by dotted names; what else a trainer keeps beside them, such as a step, is left."""
    if isinstance(loaded, Tensor):
        yield prefix, loaded
    elif isinstance(loaded, Mapping):
        for name, value in loaded.items():
            yield from _tensors_in(value, f"{prefix}.{name}" if prefix else str(name))
