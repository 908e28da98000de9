"""Wan2.1's video autoencoder: the AutoencoderKLWan of `diffusers`, frozen. Latents are what the models see.

`pip install selfforcing_ext[real]` brings what is needed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


class WanVideoAutoencoder:
    """Pixels to latents, normalised per channel (arXiv 2503.20314, section 4.1), and back.

    Args:
        folder: of a pipeline of diffusers, with `vae/`, or of the autoencoder itself.
        device: where it runs; it takes and returns tensors on the CPU.

    Raises:
        ImportError: without diffusers.
        FileNotFoundError: a folder without it.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        found = [path for path in (Path(folder) / "vae", Path(folder)) if (path / "config.json").is_file()]
        if not found:
            raise FileNotFoundError(
                f"{folder} holds no autoencoder; accepted: a folder with vae/config.json or config.json"
            )
        from diffusers import AutoencoderKLWan  # optional, and slow to import

        self.model = AutoencoderKLWan.from_pretrained(found[0], local_files_only=True).eval().requires_grad_(False)
        self.model.to(device)
        config = self.model.config
        self._mean, self._std = (
            torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std)
        )

    def latent_shape(self, num_frames: int, rows: int, columns: int) -> tuple[int, int, int, int]:
        """[F, C, H, W] of the latents of so many frames and pixels.

        ValueError for frames other than 1, 5, 9, ... (at a stride of 4) and sizes that the stride does not divide.
        """
        config = self.model.config
        time, space = config.scale_factor_temporal, config.scale_factor_spatial
        if num_frames % time != 1 or rows % space or columns % space:
            raise ValueError(
                f"a video has {num_frames} frames of {rows} x {columns} pixels; accepted: 1 frame more than a multiple "
                f"of {time}, and multiples of {space} pixels"
            )
        return (num_frames - 1) // time + 1, config.z_dim, rows // space, columns // space

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Video [B, F, 3, H, W] in -1..1 to latents float32 [B, F', C, H', W'], the mean of the posterior."""
        self.latent_shape(video.shape[1], *video.shape[-2:])
        mode = self.model.encode(video.transpose(1, 2).to(self.model.device, self.model.dtype)).latent_dist.mode()
        return ((mode.float().cpu() - self._mean) / self._std).transpose(1, 2)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, F', C, H', W'] to video float32 [B, F, 3, H, W] in -1..1."""
        scaled = latents.transpose(1, 2).float() * self._std + self._mean
        decoded = self.model.decode(scaled.to(self.model.device, self.model.dtype)).sample
        return decoded.float().cpu().clamp(-1, 1).transpose(1, 2)
