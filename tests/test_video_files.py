"""Clips from real video files that the test writes itself."""

import json
from pathlib import Path

import pytest
import torch
from video_writing import write_video

from python_ref.data.video_files import VideoFiles, VideoFilesConfig, read_video


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_video(tmp_path / "one.mp4", 10)
    write_video(tmp_path / "two.mp4", 7, level=60)
    (tmp_path / "captions.json").write_text(json.dumps({"one.mp4": "a square moving right"}))
    (tmp_path / "two.txt").write_text("a grey room\n")
    return tmp_path


def test_clips_and_captions(folder: Path):
    files = VideoFiles(VideoFilesConfig(str(folder), num_frames=3, frame_size=32))
    assert [(c.path.name, c.start) for c in files.clips] == [
        ("one.mp4", 0), ("one.mp4", 3), ("one.mp4", 6), ("two.mp4", 0), ("two.mp4", 3),
    ]  # fmt: skip
    video, caption = files.clip(1)
    assert video.shape == (3, 3, 32, 32)
    assert video.dtype == torch.float32
    assert caption == "a square moving right"
    assert files.clip(3)[1] == "a grey room"
    # The frame is halved and cropped by 8 columns, so at frame 3 + f the square's middle is column (36 + 4 f) / 2 - 8.
    ink = (video[:, 0] > 0).float()
    columns = (ink.sum(1) * torch.arange(32)).sum(-1) / ink.sum((1, 2))
    assert torch.allclose(columns, torch.tensor([9.5, 11.5, 13.5]), atol=0.3)
    assert -1 <= video.min() < -0.95
    assert 0.9 < video.max() <= 1
    assert abs(files.clip(3)[0][:, :, 0, 0].mean() - (60 / 127.5 - 1)) < 0.05


def test_stride_overlaps_and_grey(folder: Path):
    files = VideoFiles(VideoFilesConfig(str(folder), num_frames=4, frame_size=16, stride=2, channels=1))
    assert [c.start for c in files.clips] == [0, 2, 4, 6, 0, 2]
    assert files.clip(0)[0].shape == (4, 1, 16, 16)
    assert torch.equal(files.clip(0)[0][2:], files.clip(1)[0][:2])


def test_frame_rate_is_resampled(folder: Path):
    own = read_video(folder / "one.mp4", (32, 32), 1)
    half = read_video(folder / "one.mp4", (32, 32), 1, fps=5)
    double = read_video(folder / "one.mp4", (32, 32), 1, fps=20)
    assert len(own) == 10
    assert torch.equal(half, own[::2])
    assert torch.equal(double, own.repeat_interleave(2, 0))


def test_batches_are_shuffled_epochs(folder: Path):
    files = VideoFiles(VideoFilesConfig(str(folder), num_frames=3, frame_size=16))
    video, captions = files.batch(0, 10)
    assert video.shape == (10, 3, 3, 16, 16)
    assert len(captions) == 10
    clips = torch.stack([files.clip(i)[0] for i in range(5)])
    order = [[int((v - clips).abs().sum((1, 2, 3, 4)).argmin()) for v in half] for half in (video[:5], video[5:])]
    assert sorted(order[0]) == sorted(order[1]) == list(range(5))
    again, _ = VideoFiles(files.config).batch(4, 3)
    assert torch.equal(again, video[4:7])


def test_bad_folders_are_explained(folder: Path):
    config = VideoFilesConfig(str(folder), num_frames=3, frame_size=16)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        VideoFiles(VideoFilesConfig(str(folder / "nowhere")))
    with pytest.raises(ValueError, match=r"two\.mp4 has 7 frames at its own fps; accepted: at least num_frames = 8"):
        VideoFiles(VideoFilesConfig(str(folder), num_frames=8, frame_size=16))
    (folder / "two.txt").unlink()
    with pytest.raises(ValueError, match=r"no caption for two\.mp4; accepted: an entry in"):
        VideoFiles(config)
    (folder / "captions.json").write_text('{"one.mp4": "x", "tow.mp4": "y"}')
    with pytest.raises(ValueError, match=r"names tow\.mp4"):
        VideoFiles(config)
    (folder / "captions.json").write_text("not json")
    with pytest.raises(ValueError, match="is not JSON"):
        VideoFiles(config)
    (folder / "captions.json").write_text('["one.mp4"]')
    with pytest.raises(ValueError, match="accepts one object of texts"):
        VideoFiles(config)
    (folder / "captions.json").write_text('{"one.mp4": "x", "two.mp4": "y"}')
    (folder / "one.mp4").write_bytes(b"this is no video")
    with pytest.raises(ValueError, match=r"one\.mp4 cannot be read as a video"):
        VideoFiles(config)
    empty = folder / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="holds no video"):
        VideoFiles(VideoFilesConfig(str(empty)))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"num_frames": 0}, "num_frames is 0"),
        ({"frame_size": 0}, "frame_size is 0"),
        ({"stride": 0}, "stride is 0"),
        ({"fps": 0.0}, "fps is 0.0"),
        ({"channels": 2}, "channels is 2; accepted: 1"),
    ],
)
def test_bad_settings_are_named(bad, message):
    with pytest.raises(ValueError, match=message):
        VideoFilesConfig("x", **bad)
