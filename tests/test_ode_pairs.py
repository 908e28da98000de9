"""The pair generator and its data set: what is on disk are solutions of the teacher's ODE, made once."""

from dataclasses import asdict

import pytest
import torch
from compare import relative_error
from torch.utils.data import DataLoader

from python_ref.config import FlowConfig, ModelConfig
from python_ref.data.ode_pairs import OdePairs, read_settings
from python_ref.make_ode_pairs import main, states_at
from python_ref.models.captioned import CaptionedModel
from python_ref.noise import TorchNoise
from python_ref.objectives.ode_regression import ODERegression
from python_ref.pipelines.bidirectional import sample_bidirectional

SIZES = ModelConfig(dim=16, num_heads=2, num_layers=1, ffn_dim=24, freq_dim=8, patch_size=[1, 4, 4], text_dim=8)
WORDS = ["a", "red", "blue", "ball"]
PROMPTS = ["a red ball", "a blue ball", "a ball"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A weights file."""
    torch.manual_seed(0)
    settings = {"model": asdict(SIZES), "flow": asdict(FlowConfig()), "words": WORDS}
    network = CaptionedModel({**settings, "num_frames": 4, "channels": 1, "frame_size": 8}, False, "reference")
    torch.nn.init.normal_(network.model.head.head.weight, std=0.3)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    network.save(path, stage="teacher")
    return path


@pytest.fixture
def make(teacher, tmp_path):
    """Runs the command into ``folder``."""

    def run(folder, pairs, *more):
        prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
        sizes = ["--pairs", str(pairs), "--shard-size", "4", "--batch-size", "3", "--sample-steps", "8"]
        how = ["--backend", "reference", "--threads", "1", "--precision", "fp32"]
        return main(["--checkpoint", str(teacher), "--output", str(tmp_path / folder), *prompts, *sizes, *how, *more])

    return run


def test_pairs_are_solutions(make, teacher, tmp_path, capsys):
    assert make("pairs", 6) == 0
    assert "ODE pairs 6/6" in capsys.readouterr().out
    pairs = OdePairs(tmp_path / "pairs")
    assert [len(read_settings(path)["captions"]) for path in pairs.paths] == [4, 2]
    assert len(pairs) == 6
    assert pairs.denoising_steps == [1000, 750, 500, 250]

    network = CaptionedModel.load(teacher, False, "reference").frozen()
    for index in (0, 3, 4, 5):
        trajectory, caption = pairs[index]
        assert caption == PROMPTS[index % 3]
        assert trajectory.shape == (5, 4, 1, 8, 8)
        video = sample_bidirectional(
            network.model, network.schedule(8), trajectory[None, 0], *network.contexts([caption]), 2.0
        )
        assert relative_error(trajectory[-1], video[0]) < 1e-5
    with pytest.raises(IndexError, match=r"index is 6, but must lie in \[0, 6\)"):
        pairs[6]


def test_states_lie_at_the_noise_levels_of_the_denoising_steps(teacher):
    """The solution in 8 steps passes the levels that a generator with the same shift is given."""
    schedule = CaptionedModel.load(teacher, False, "reference").schedule
    steps = [1000, 750, 500, 250]
    passed = torch.cat((schedule(8).timesteps, torch.zeros(1)))[states_at(steps, 8, 1000)]
    torch.testing.assert_close(passed, torch.cat((schedule().warp(steps), torch.zeros(1))))


def test_interrupted_work_goes_on(make, tmp_path):
    assert make("whole", 10) == 0
    assert make("resumed", 6) == 0
    first, second = sorted((tmp_path / "resumed").iterdir())
    written = first.stat().st_mtime_ns
    second.unlink()
    assert make("resumed", 10) == 0
    assert first.stat().st_mtime_ns == written
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "resumed" / path.name).read_bytes()
    assert make("resumed", 5) == 0  # fewer are there already
    assert len(OdePairs(tmp_path / "resumed")) == 10


def test_a_pair_depends_on_its_number_alone(make, tmp_path):
    """Not on its batch; and no two pairs are alike."""
    assert make("threes", 6) == 0
    assert make("twos", 6, "--batch-size", "2") == 0
    trajectories = [torch.stack([pair for pair, _ in OdePairs(tmp_path / name)]) for name in ("threes", "twos")]
    assert relative_error(*trajectories) < 1e-5
    starts = trajectories[0][:, 0].flatten(1)
    assert (torch.cdist(starts, starts) > 1).sum() == 6 * 5


def test_more_pairs_fill_a_short_shard(make, tmp_path):
    assert make("pairs", 5) == 0
    assert len(OdePairs(tmp_path / "pairs")) == 5
    assert make("pairs", 8) == 0
    assert len(OdePairs(tmp_path / "pairs")) == 8


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seed", "1"], "was made with another seed; accepted"),
        (["--prompt", "a blue blue ball", "--pairs", "4"], "was made from other captions; accepted"),
        (["--denoising-steps", "1000", "700"], "denoising_steps is [1000, 700]; accepted: falling from 1000"),
        (["--denoising-steps", "750", "500"], "denoising_steps is [750, 500]; accepted: falling from 1000"),
        (["--batch-size", "0"], "batch_size is 0; accepted: 1 or more"),
    ],
)
def test_errors_name_what_differs(make, capsys, more, message):
    assert make("pairs", 4) == 0
    assert make("pairs", 4, *more) == 2
    assert message in capsys.readouterr().err


def test_shards_of_different_recipes_are_refused(make, tmp_path):
    assert make("pairs", 4) == 0
    assert make("other", 8, "--seed", "1") == 0
    (tmp_path / "other" / "shard_00001.safetensors").rename(tmp_path / "pairs" / "shard_00001.safetensors")
    with pytest.raises(ValueError, match=r"shard_00001.safetensors was not made as .*shard_00000.safetensors was"):
        OdePairs(tmp_path / "pairs")
    with pytest.raises(FileNotFoundError, match="holds no shard_"):
        OdePairs(tmp_path / "nothing")


def test_a_causal_model_learns_from_the_pairs(make, teacher, tmp_path):
    """From the file's weights on: the command, the data set, a loader and the loss fit together."""
    assert make("pairs", 8) == 0
    pairs = OdePairs(tmp_path / "pairs")
    student = CaptionedModel.load(teacher, True, "reference")
    schedule = student.schedule()
    objective = ODERegression(student.model, schedule, schedule.warp(pairs.denoising_steps), frames_per_block=2)
    optimizer = torch.optim.Adam(student.model.parameters(), lr=1e-2)
    ((trajectory, captions),) = DataLoader(pairs, batch_size=8)
    context, _ = student.contexts(captions)
    losses = []
    for _ in range(15):
        loss, _ = objective.loss(trajectory, context, TorchNoise(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
