"""A folder of real video files, cut into captioned clips.

Captions stand in `captions.json` ({"file name": "caption"}) or in a text file beside each video (`clip.mp4` and
`clip.txt`). The folder is checked when it is opened, so that a long training never meets a bad file in the middle.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import ColorRange
from torch import Tensor

from python_ref.data.order import shuffled

SUFFIXES = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".gif", ".m4v")


@dataclass
class VideoFilesConfig:
    """Which clips to cut."""

    folder: str = ""
    num_frames: int = 12  # frames of a clip
    frame_size: int = 24  # rows; frames are scaled to cover a rectangle, then cropped to its middle
    frame_columns: int | None = None  # None: frame_size, a square
    fps: float | None = None  # frames per second of the clips; None: those of each file
    stride: int | None = None  # frames between the starts of two clips; None: num_frames, clips do not overlap
    channels: int = 3  # 1: grey, 3: RGB
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in ("num_frames", "frame_size", "frame_columns") and value is not None and value < 1:
                raise ValueError(f"{name} is {value}; accepted: 1 or more")
        if self.stride is not None and self.stride < 1:
            raise ValueError(f"stride is {self.stride}; accepted: 1 or more, or None for num_frames")
        if self.fps is not None and self.fps <= 0:
            raise ValueError(f"fps is {self.fps}; accepted: above 0, or None for the file's own")
        if self.channels not in (1, 3):
            raise ValueError(f"channels is {self.channels}; accepted: 1 (grey) or 3 (RGB)")

    @property
    def frame_shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.frame_size, self.frame_columns or self.frame_size


@dataclass
class Clip:
    """Where a clip is found and what its caption says."""

    path: Path
    start: int  # first frame, counted at the clip's frame rate
    caption: str


class VideoFiles:
    """Clips of a folder. `len()`, `clip(i)` and `batch(first, size)`, the latter in a shuffled order without end."""

    def __init__(self, config: VideoFilesConfig) -> None:
        self.config = config
        folder = Path(config.folder)
        paths = find_videos(folder)
        captions = read_captions(folder, paths)
        self._videos: dict[Path, Tensor] = {}
        self.clips: list[Clip] = []
        for path in paths:
            video = read_video(path, config.frame_shape, config.channels, config.fps)
            if len(video) < config.num_frames:
                raise ValueError(
                    f"{path} has {len(video)} frames at {config.fps or 'its own'} fps; "
                    f"accepted: at least num_frames = {config.num_frames}"
                )
            self._videos[path] = video
            for start in range(0, len(video) - config.num_frames + 1, config.stride or config.num_frames):
                self.clips.append(Clip(path, start, captions[path]))

    def __len__(self) -> int:
        return len(self.clips)

    def videos_by_caption(self) -> dict[str, list[Tensor]]:
        """The whole files, each [F, C, H, W] uint8 at the clips' size and frame rate."""
        found: dict[str, list[Tensor]] = {}
        for path, caption in {clip.path: clip.caption for clip in self.clips}.items():
            found.setdefault(caption, []).append(self._videos[path])
        return found

    def clip(self, index: int) -> tuple[Tensor, str]:
        """Clip `index`: [F, C, H, W] float32 in -1..1, and its caption."""
        clip = self.clips[index]
        frames = self._videos[clip.path][clip.start : clip.start + self.config.num_frames]
        return frames.float() / 127.5 - 1, clip.caption

    def batch(self, first: int, size: int) -> tuple[Tensor, list[str]]:
        """Clips `first` to `first + size - 1` of an endless sequence: every epoch is a permutation of all clips.

        Returns video [B, F, C, H, W] in -1..1 and B captions. Depends on (seed, first, size) alone.
        """
        order = shuffled(first, size, len(self), self.config.seed)
        videos, captions = zip(*(self.clip(index) for index in order), strict=True)
        return torch.stack(videos), list(captions)


def find_videos(folder: Path) -> list[Path]:
    """The video files of a folder, by name; FileNotFoundError if there are none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"folder is {str(folder)!r}; accepted: an existing folder of video files")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise FileNotFoundError(f"folder {folder} holds no video; accepted: files ending in {', '.join(SUFFIXES)}")
    return paths


def read_captions(folder: Path, paths: list[Path]) -> dict[Path, str]:
    """The caption of every video, from captions.json or the text file beside it."""
    side_file = folder / "captions.json"
    table: dict[str, str] = {}
    if side_file.is_file():
        try:
            table = json.loads(side_file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{side_file} is not JSON: {error}") from error
        if not isinstance(table, dict) or not all(isinstance(text, str) for text in table.values()):
            raise ValueError(f'{side_file} accepts one object of texts: {{"file name": "caption"}}')
        unknown = sorted(set(table) - {path.name for path in paths})
        if unknown:
            raise ValueError(f"{side_file} names {', '.join(unknown)}, which {folder} does not hold")
    captions = {}
    for path in paths:
        beside = path.with_suffix(".txt")
        if path.name in table:
            captions[path] = table[path.name]
        elif beside.is_file():
            captions[path] = beside.read_text(encoding="utf-8").strip()
    missing = [path.name for path in paths if path not in captions]
    if missing:
        raise ValueError(
            f"no caption for {', '.join(missing)}; accepted: an entry in {side_file} or a .txt file beside the video"
        )
    return captions


def read_video(path: Path, size: tuple[int, int], channels: int, fps: float | None = None) -> Tensor:
    """All frames of a file, [F, C, rows, columns] uint8, resampled to `fps` by taking the newest frame at each tick.

    ValueError names a file that holds no readable video.
    """
    frames, times = [], []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} holds no video stream")
            stream = container.streams.video[0]
            for frame in container.decode(stream):
                pixels = frame.to_ndarray(format="rgb24", dst_color_range=ColorRange.JPEG)
                frames.append(cover(torch.from_numpy(pixels).permute(2, 0, 1), size, channels))
                times.append(frame.time if frame.time is not None else len(times) / float(stream.average_rate or 25))
    except av.FFmpegError as error:
        raise ValueError(f"{path} cannot be read as a video: {error}") from error
    if not frames:
        raise ValueError(f"{path} holds no video frames")
    video = torch.stack(frames)
    if fps is not None:
        seconds = np.asarray(times) - times[0]
        frame_time = (seconds[-1] / (len(seconds) - 1)) if len(seconds) > 1 else 1 / fps
        ticks = np.arange(int((seconds[-1] + frame_time) * fps + 1e-6)) / fps
        newest = np.searchsorted(seconds, ticks + 1e-6, side="right") - 1
        video = video[torch.from_numpy(newest)]
    return video


def cover(image: Tensor, size: tuple[int, int], channels: int) -> Tensor:
    """An RGB image [3, H, W] uint8, scaled to cover `size` and cropped to its middle: [channels, rows, columns]."""
    scale = max(wanted / found for wanted, found in zip(size, image.shape[1:], strict=True))
    shape = [max(wanted, round(found * scale)) for wanted, found in zip(size, image.shape[1:], strict=True)]
    scaled = F.interpolate(image[None].float(), size=shape, mode="bilinear", antialias=True, align_corners=False)[0]
    top, left = ((found - wanted) // 2 for wanted, found in zip(size, shape, strict=True))
    cropped = scaled[:, top : top + size[0], left : left + size[1]]
    if channels == 1:
        luma = torch.tensor([0.299, 0.587, 0.114])  # ITU-R BT.601
        cropped = (cropped * luma[:, None, None]).sum(0, keepdim=True)
    return cropped.round().clamp(0, 255).to(torch.uint8)
