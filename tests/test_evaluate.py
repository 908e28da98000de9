"""The measures are right on real videos, and each gets worse when its subject is spoilt."""

import json
import math
import time

import pytest
import torch
import torch.nn.functional as F

from python_ref.data.moving_digits import MovingDigits, MovingDigitsConfig
from python_ref.demo import check_claims
from python_ref.measures.report import Judge, parse_prompts, print_table
from python_ref.measures.straightness import bounce_triples
from python_ref.measures.tracking import crop_around, ink_centres
from python_ref.plots import plot_drift, plot_losses

BLOCK = 3


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(MovingDigitsConfig(), BLOCK)


@pytest.fixture(scope="module")
def real(judge):
    return judge.real_videos(150, 36)


@pytest.fixture(scope="module")
def measured(judge, real):
    return judge.measure(*real)


def test_real_videos_are_judged_good(judge, measured):
    assert judge.reader.held_out_accuracy > 0.95
    assert min(measured.identity) > 0.9
    assert measured.start_angle < 15
    assert measured.start_within_45 > 0.99
    assert max(measured.motion_angle) < 20
    assert max(measured.bend) < 0.1
    assert 0.8 < measured.jump_ratio < 1.2
    assert all(0.9 < s < 1.1 for s in measured.sharpness)
    assert all(0.9 < i < 1.1 for i in measured.ink)
    assert len(measured.identity) == 36
    assert len(measured.motion_angle) == 35
    assert len(measured.bend) == 34


def test_wrong_digits_are_seen(judge, real):
    video, prompts = real
    others = [f"a {(int(p.split()[1]) + 1) % 10} {p.split(' ', 2)[2]}" for p in prompts]
    assert max(judge.measure(video, others).identity) < 0.1


def test_a_digit_that_changes_is_seen_where_it_changes(judge, real):
    video, prompts = real
    changed = video.clone()
    changed[:, 20:] = video.roll(7, dims=0)[:, 20:]
    identity = judge.measure(changed, prompts).identity
    assert min(identity[:20]) > 0.9
    assert max(identity[20:]) < 0.35


def test_wrong_motion_is_seen(judge, real, measured):
    video, prompts = real
    backwards = judge.measure(video[:, :6].flip(1), prompts)
    assert backwards.start_angle > 120
    assert backwards.start_within_45 < 0.1
    turned = judge.measure(video.transpose(-1, -2), prompts)  # up and down become left and right
    straight = [i for i, p in enumerate(prompts) if " and " not in p]
    axis = judge.measure(video.transpose(-1, -2)[straight], [prompts[i] for i in straight])
    assert min(axis.motion_angle) > 60
    assert turned.start_angle > measured.start_angle + 30


def test_shuffled_frames_bend_the_path(judge, real, measured):
    video, prompts = real
    order = torch.randperm(36, generator=torch.Generator().manual_seed(0))
    shuffled = judge.measure(video[:, order], prompts)
    assert min(shuffled.bend) > 5 * max(measured.bend)
    assert abs(sum(shuffled.identity) - sum(judge.measure(*real).identity)) < 0.1  # each frame is still a good digit


def test_jumps_at_block_borders_are_told_from_jitter(judge, real):
    video, prompts = real
    generator = torch.Generator().manual_seed(0)

    def displaced(offsets: torch.Tensor) -> torch.Tensor:
        moved = video.clone()
        for b in range(len(video)):
            for f in range(36):
                moved[b, f, 0] = video[b, f, 0].roll(offsets[b, f].tolist(), dims=(0, 1))
        return moved

    per_block = torch.randint(-1, 2, (len(video), 12, 2), generator=generator).repeat_interleave(BLOCK, dim=1)
    per_frame = torch.randint(-1, 2, (len(video), 36, 2), generator=generator)
    jumps, jitter = judge.measure(displaced(per_block), prompts), judge.measure(displaced(per_frame), prompts)
    assert jumps.jump_ratio > 2
    assert jumps.bend_border > 0.3
    assert 0.8 < jitter.jump_ratio < 1.25
    assert jitter.bend_inside > 0.5


def test_blur_noise_and_fading_are_seen(judge, real):
    video, prompts = real
    blurred = F.avg_pool2d(video.flatten(0, 1), 3, stride=1, padding=1, count_include_pad=False).view_as(video)
    assert max(judge.measure(blurred, prompts).sharpness) < 0.75
    noisy = video + 0.3 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
    assert min(judge.measure(noisy, prompts).sharpness) > 1.1
    fading = (video + 1) * torch.linspace(1, 0.3, 36)[:, None, None, None] - 1
    ink = judge.measure(fading, prompts).ink
    assert ink[0] > 0.9
    assert ink[-1] < 0.4


def test_empty_videos_do_not_break(judge, real):
    empty = judge.measure(torch.full_like(real[0], -1), real[1])
    assert max(empty.identity) < 0.3
    assert empty.ink == [0.0] * 36
    assert math.isclose(empty.start_angle, 90, abs_tol=1e-3)
    document = json.dumps(empty.to_json(), allow_nan=False)
    assert "identity" in document


def test_bounces_are_found_from_the_path_alone():
    batch = MovingDigits(MovingDigitsConfig(num_frames=36)).batch(0, 200)
    touched = bounce_triples(ink_centres(batch.video), 24, 12).any(-1)
    true = batch.bounces[:, 1:-1, 0] | batch.bounces[:, 2:, 0]
    assert (touched & true).sum() / true.sum() > 0.98
    assert touched.float().mean() < 0.5


def test_crops_follow_subpixel_positions():
    image = torch.rand(5, 24, 24, generator=torch.Generator().manual_seed(0))
    whole = crop_around(image, torch.full((5, 2), 11.5), 12)
    assert torch.allclose(whole, image[:, 6:18, 6:18])
    half = crop_around(image, torch.tensor([11.5, 12.0]).expand(5, 2), 12)
    assert torch.allclose(half, (image[:, 6:18, 6:18] + image[:, 6:18, 7:19]) / 2)
    assert torch.equal(crop_around(image, torch.full((5, 2), -20.0), 12), torch.zeros(5, 12, 12))


def test_measuring_is_fast(judge, real):
    start = time.perf_counter()
    judge.measure(real[0][:100], real[1][:100])
    assert time.perf_counter() - start < 5  # 0.5 s on an idle core


def test_prompts_that_cannot_be_measured_are_named():
    labels, directions = parse_prompts(["a 3 moving left", "a 7 moving up and right"])
    assert labels.tolist() == [3, 7]
    assert torch.allclose(directions, torch.tensor([[0.0, -1.0], [-(0.5**0.5), 0.5**0.5]]), atol=1e-6)
    for bad in ("a 3", "a 3 moving left and a 5 moving up", "a cat moving left"):
        with pytest.raises(ValueError, match="cannot be measured"):
            parse_prompts([bad])
    with pytest.raises(ValueError, match="sideways"):
        parse_prompts(["a 3 moving sideways"])


def test_claims_can_fail(judge, real, measured):
    video, prompts = real
    drifting = video.clone()
    drifting[:, 18:] = video.roll(7, dims=0)[:, 18:]
    drifted = judge.measure(drifting, prompts)
    good = check_claims({"teacher-forced": judge.measure(drifting.roll(7, 0), prompts), "self-forced": measured})
    bad = check_claims({"teacher-forced": measured, "self-forced": drifted})
    assert all(good.values())
    assert not any(bad.values())  # the switch at frame 18 is a jump at a border too


def test_plots_and_table_are_made(tmp_path, measured, capsys):
    plot_drift(tmp_path / "drift.png", {"real": measured}, 12, BLOCK)
    log = [{"step": s, "generator_loss": 1 / s, **({"critic_loss": 2 / s} if s % 2 else {})} for s in range(1, 9)]
    plot_losses(tmp_path / "losses.png", {"causal": log, "self_forcing": log})
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("drift.png", "losses.png"))
    print_table({"real": measured}, "videos")
    assert "0.9" in capsys.readouterr().out
