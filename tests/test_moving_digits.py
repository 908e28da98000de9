"""Moving digits: determinism, geometry and captions."""

import time

import numpy as np
import pytest
import torch

from python_ref.data.moving_digits import (
    DIRECTIONS,
    MovingDigits,
    MovingDigitsConfig,
    caption_words,
    direction_vector,
    hashed_uniform,
    scans,
)
from python_ref.data.prompts import evaluation_prompts, read_prompts
from python_ref.models.text import Vocabulary


def test_shapes_range_and_types():
    batch = MovingDigits(MovingDigitsConfig(num_digits=2, num_frames=7)).batch(3, 5)
    assert batch.video.shape == (5, 7, 1, 24, 24)
    assert batch.video.dtype == torch.float32
    assert batch.video.min() == -1
    assert 0.5 < batch.video.max() <= 1
    assert batch.labels.shape == (5, 2)
    assert batch.centres.shape == (5, 7, 2, 2)
    assert batch.velocities.shape == (5, 2, 2)
    assert len(batch.captions) == 5


def test_a_video_depends_on_seed_and_index_alone():
    digits = MovingDigits(MovingDigitsConfig())
    whole, part = digits.batch(0, 16), MovingDigits(MovingDigitsConfig()).batch(5, 3)
    assert torch.equal(whole.video[5:8], part.video)
    assert whole.captions[5:8] == part.captions
    other = MovingDigits(MovingDigitsConfig(seed=1)).batch(0, 16)
    assert not torch.equal(whole.video, other.video)
    longer = MovingDigits(MovingDigitsConfig(num_frames=36)).batch(0, 16)
    assert torch.equal(longer.video[:, :12], whole.video)


def test_hash_is_uniform_and_uncorrelated():
    draws = hashed_uniform(7, np.arange(20000), 4)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert np.abs(draws.mean(0) - 0.5).max() < 0.01
    assert np.abs(draws.var(0) - 1 / 12).max() < 0.003
    assert np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.03
    assert np.abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.03
    assert len(np.unique(draws)) == draws.size


def test_digits_are_where_the_path_says():
    batch = MovingDigits(MovingDigitsConfig()).batch(0, 64)
    ink = (batch.video[:, :, 0] + 1) / 2
    pixel = torch.arange(24.0)
    mass = ink.sum((-1, -2))
    centre = torch.stack([(ink.sum(-1) * pixel).sum(-1), (ink.sum(-2) * pixel).sum(-1)], -1) / mass[..., None]
    offset = centre - batch.centres[:, :, 0]  # the ink's own offset within its scan: small and constant
    assert offset.abs().max() < 3
    assert (offset - offset[:, :1]).abs().max() < 1e-3


def test_paths_are_straight_between_bounces_and_stay_inside():
    config = MovingDigitsConfig(num_frames=40, num_digits=2)
    batch = MovingDigits(config).batch(0, 64)
    half = (config.digit_size - 1) / 2
    assert batch.centres.min() >= half - 1e-4
    assert batch.centres.max() <= config.frame_size - 1 - half + 1e-4
    second = (batch.centres[:, 2:] - 2 * batch.centres[:, 1:-1] + batch.centres[:, :-2]).norm(dim=-1)
    bounced = batch.bounces[:, 1:-1] | batch.bounces[:, 2:]
    assert second[~bounced].max() < 1e-4
    assert second[bounced].max() > 0.1
    assert not batch.bounces[:, : config.straight_frames + 1].any()
    speed = (batch.centres[:, 1] - batch.centres[:, 0]).norm(dim=-1)
    assert speed.min() >= config.min_speed - 1e-4
    assert speed.max() <= config.max_speed + 1e-4
    assert torch.allclose(batch.centres[:, 1] - batch.centres[:, 0], batch.velocities, atol=1e-4)


def test_captions_tell_digit_and_direction():
    batch = MovingDigits(MovingDigitsConfig(omit_motion_probability=0.25)).batch(0, 400)
    without = 0
    for text, label, velocity in zip(batch.captions, batch.labels, batch.velocities, strict=True):
        digit, _, motion = text.partition(" moving ")
        assert digit == f"a {label.item()}"
        if not motion:
            without += 1
            continue
        wanted = torch.tensor(direction_vector(motion))
        cosine = (velocity[0] @ wanted) / velocity[0].norm()
        assert cosine > np.cos(np.pi / 8) - 1e-5
    assert 60 < without < 140
    two = MovingDigits(MovingDigitsConfig(num_digits=2, omit_motion_probability=0)).batch(0, 50)
    assert all(text.count("moving") == 2 and text.count("a ") == 2 for text in two.captions)
    Vocabulary(caption_words(), text_len=16).encode(batch.captions + two.captions)


def test_splits_share_no_scan():
    train, _ = scans(12, "train")
    held_out, labels = scans(12, "held_out")
    assert len(train) + len(held_out) == 1797
    assert len(held_out) > 300
    assert torch.bincount(labels).min() > 20
    nearest = torch.cdist(held_out.flatten(1), train.flatten(1)).min(1).values
    assert nearest.min() > 0


def test_upscaling_is_smooth():
    """Bicubic edges are softer than repeated pixels, and keep the ink."""
    small, _ = scans(8, "train")
    large, _ = scans(16, "train")
    blocky = small.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert (large.diff(dim=-1).abs().amax((-1, -2)) < blocky.diff(dim=-1).abs().amax((-1, -2))).float().mean() > 0.9
    assert torch.allclose(large.mean((-1, -2)), small.mean((-1, -2)), atol=0.03)


def test_a_batch_is_fast():
    digits = MovingDigits(MovingDigitsConfig())
    digits.batch(0, 32)
    seconds = []
    for i in range(10):
        start = time.perf_counter()
        digits.batch(32 * i, 32)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.02  # 2.4 ms on an idle core; a training step takes a hundred times as long


def test_evaluation_prompts_are_balanced():
    prompts = evaluation_prompts(80)
    assert len(set(prompts)) == 80
    assert {p.split(" moving ")[1] for p in prompts[:10]} == set(DIRECTIONS)
    assert evaluation_prompts(10) == prompts[:10]
    assert evaluation_prompts(100)[80:] == prompts[:20]
    with pytest.raises(ValueError, match="count is 0"):
        evaluation_prompts(0)


def test_prompts_from_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("# two prompts\na 3 moving left\n\na 5\n")
    assert read_prompts(["a 1"], file) == ["a 1", "a 3 moving left", "a 5"]
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt"):
        read_prompts([], tmp_path / "nothing.txt")
    with pytest.raises(ValueError, match="no prompt"):
        read_prompts([])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"digit_size": 24}, "digit_size is 24"),
        ({"num_digits": 3}, "num_digits is 3; accepted: 1 or 2"),
        ({"num_frames": 0}, "num_frames is 0"),
        ({"split": "test"}, "split is 'test'"),
        ({"min_speed": 3.0}, "min_speed is 3.0"),
        ({"max_speed": 5.0}, "max_speed 5.0"),
        ({"omit_motion_probability": 1.5}, "omit_motion_probability is 1.5"),
    ],
)
def test_bad_settings_are_named(bad, message):
    with pytest.raises(ValueError, match=message):
        MovingDigitsConfig(**bad)
    with pytest.raises(ValueError, match="sideways"):
        direction_vector("sideways")
    with pytest.raises(ValueError, match="size 0"):
        MovingDigits(MovingDigitsConfig()).batch(0, 0)
