"""Solutions of a teacher's ODE, kept on disk: what ODE regression learns from. `make_ode_pairs` writes them.

A folder of `shard_*.safetensors`, each with `trajectory` [N, T, F, C, H, W] and, as settings, the N captions and how
the solutions were made.
"""

from __future__ import annotations

import bisect
from itertools import accumulate
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from python_ref.data.shards import read_settings


class OdePairs(Dataset):
    """Item i is a trajectory [T, F, C, H, W], from noise to the clean end, and its caption.

    Args:
        folder: where `python -m python_ref.make_ode_pairs` wrote.

    Attributes:
        denoising_steps: uniform timesteps (before ``FlowMatchSchedule.warp``) of all states but the clean end.

    Raises:
        FileNotFoundError: the folder holds no shard.
        ValueError: the shards were not made in the same way.
    """

    def __init__(self, folder: str | Path) -> None:
        self.paths = sorted(Path(folder).glob("shard_*.safetensors"))
        if not self.paths:
            raise FileNotFoundError(
                f"{folder} holds no shard_*.safetensors; accepted: a folder written by python_ref.make_ode_pairs"
            )
        settings = [read_settings(path) for path in self.paths]
        self.captions = [caption for shard in settings for caption in shard["captions"]]
        self._starts = [0, *accumulate(len(shard["captions"]) for shard in settings)]
        recipe = settings[0]["recipe"]
        for path, shard in zip(self.paths, settings, strict=True):
            if shard["recipe"] != recipe:
                raise ValueError(f"{path} was not made as {self.paths[0]} was; accepted: shards of one recipe")
        self.denoising_steps: list[int] = recipe["denoising_steps"]

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        if not 0 <= index < len(self):
            raise IndexError(f"index is {index}, but must lie in [0, {len(self)})")
        shard = bisect.bisect_right(self._starts, index) - 1
        with safe_open(str(self.paths[shard]), framework="pt") as file:  # reads this one trajectory only
            return file.get_slice("trajectory")[index - self._starts[shard]], self.captions[index]
