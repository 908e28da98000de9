"""Videos as files that people look at: GIF, MP4 and contact sheets."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

BORDER = 40  # grey level between the frames of a contact sheet


def to_pixels(video: Tensor, scale: int = 1) -> np.ndarray:
    """Video [F, C, H, W] in -1..1 to uint8 RGB [F, scale*H, scale*W, 3], each pixel enlarged `scale` times."""
    pixels = ((video.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    if pixels.shape[1] == 1:
        pixels = pixels.expand(-1, 3, -1, -1)
    pixels = pixels.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def grid(videos: Tensor, columns: int, border: int = 1) -> Tensor:
    """Videos [N, F, C, H, W] side by side in one video [F, C, rows*(H+2*border), columns*(W+2*border)]."""
    count, frames, channels = videos.shape[:3]
    rows = -(-count // columns)
    level = BORDER / 127.5 - 1
    framed = F.pad(videos, (border,) * 4, value=level)
    missing = framed.new_full((rows * columns - count, *framed.shape[1:]), level)
    framed = torch.cat([framed, missing]).unflatten(0, (rows, columns))  # [rows, columns, F, C, h, w]
    return framed.permute(2, 3, 0, 4, 1, 5).reshape(frames, channels, rows * framed.shape[-2], -1)


def write_gif(path: str | Path, video: Tensor, fps: float = 8, scale: int = 4) -> None:
    """An endlessly repeating GIF of a video [F, C, H, W] in -1..1."""
    iio.imwrite(path, to_pixels(video, scale), extension=".gif", duration=1000 / fps, loop=0)


def write_mp4(path: str | Path, video: Tensor, fps: float = 8, scale: int = 4) -> None:
    """An H.264 file of a video [F, C, H, W] in -1..1; an odd size gets one more row or column, as yuv420p needs."""
    pixels = to_pixels(video, scale)
    pixels = np.pad(pixels, ((0, 0), (0, pixels.shape[1] % 2), (0, pixels.shape[2] % 2), (0, 0)))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "12"})
        stream.height, stream.width, stream.pix_fmt = pixels.shape[1], pixels.shape[2], "yuv420p"
        for image in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_contact_sheet(
    path: str | Path, videos: Tensor, captions: Sequence[str], scale: int = 2, block: int | None = None
) -> None:
    """A PNG with one row per video and one column per frame, its caption above each row.

    Args:
        path: the file.
        videos: [N, F, C, H, W] in -1..1.
        captions: N texts.
        scale: pixels per pixel.
        block: frames per block; blocks are set apart by a gap, so that jumps between them show.
    """
    frames = videos.shape[1]
    height, width = videos.shape[-2] * scale, videos.shape[-1] * scale
    line, gap = 13, 1
    wide = [f * (width + gap) + (f // block * 4 * gap if block else 0) for f in range(frames)]
    sheet = Image.new("RGB", (wide[-1] + width, len(videos) * (height + line)), (BORDER,) * 3)
    draw = ImageDraw.Draw(sheet)
    for row, (video, caption) in enumerate(zip(videos, captions, strict=True)):
        top = row * (height + line)
        draw.text((2, top), caption, fill=(220, 220, 220))
        for f, image in enumerate(to_pixels(video, scale)):
            sheet.paste(Image.fromarray(image), (wide[f], top + line))
    sheet.save(path)
