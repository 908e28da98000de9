"""Checkpoints: the same bits come back, and a write that is killed costs nothing."""

import itertools
import json
import os
import signal

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from python_ref import checkpoint
from python_ref.checkpoint import Checkpointer, load_weights, read_tensors, save_weights
from python_ref.config import OptimizerConfig
from python_ref.learning import Learner, learning_rate, update_average


def make(seed: int) -> tuple[nn.Module, Learner]:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))
    return module, Learner(module, OptimizerConfig(lr=1e-2, warmup_steps=0), total_steps=20)


def train(module: nn.Module, learner: Learner, steps: range) -> None:
    for step in steps:
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        module(x).square().mean().backward()
        learner.step(step)


def test_training_goes_on_with_the_same_bits(tmp_path):
    module, learner = make(0)
    train(module, learner, range(5))
    checkpointer = Checkpointer(tmp_path)
    path = checkpointer.save(5, {"model": module}, {"model": learner.optimizer}, {"seed": 3})
    train(module, learner, range(5, 12))

    other, other_learner = make(1)
    state = Checkpointer(tmp_path).load({"model": other}, {"model": other_learner.optimizer})
    assert state == {"step": 5, "seed": 3}
    train(other, other_learner, range(5, 12))
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}


def test_the_optimizer_state_matters(tmp_path):
    """Without its moments training would go another way: the test above can fail."""
    module, learner = make(0)
    train(module, learner, range(5))
    fresh, fresh_learner = make(1)
    fresh.load_state_dict(module.state_dict())
    train(module, learner, range(5, 8))
    train(fresh, fresh_learner, range(5, 8))
    assert not torch.equal(module[0].weight, fresh[0].weight)


def test_the_newest_are_kept(tmp_path):
    module, learner = make(0)
    checkpointer = Checkpointer(tmp_path, keep=2)
    for step in (1, 2, 3, 10):
        with torch.no_grad():
            module[0].bias.fill_(step)
        checkpointer.save(step, {"model": module}, {"model": learner.optimizer}, {})
    assert checkpointer.steps() == [3, 10]
    checkpointer.load({"model": module}, {}, step=3)
    assert module[0].bias[0] == 3
    checkpointer.load({"model": module}, {})
    assert module[0].bias[0] == 10


def test_a_new_run_does_not_meet_old_checkpoints(tmp_path):
    module, learner = make(0)
    checkpointer = Checkpointer(tmp_path / "teacher")
    checkpointer.set_aside()  # nothing there yet
    for step in (7, 8):
        checkpointer.save(step, {"model": module}, {"model": learner.optimizer}, {})
        checkpointer.set_aside()
    assert checkpointer.steps() == []
    assert Checkpointer(tmp_path / "teacher.old").steps() == [8]


def save_and_die(folder, module: nn.Module, optimizer: torch.optim.Optimizer, moment: int) -> None:
    """In a child process: saves step 2 and is killed by SIGKILL at the given call of the writing functions."""
    calls = 0

    def then_die(function):
        def wrapped(*arguments):
            nonlocal calls
            calls += 1
            if calls == moment:
                if function is write_shards:  # half a file is on disk
                    (arguments[0] / "shard.safetensors").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return wrapped

    write_shards = checkpoint._write_shards
    for name in ("_write_shards", "_write_text", "_sync_folder"):
        setattr(checkpoint, name, then_die(getattr(checkpoint, name)))
    Checkpointer(folder).save(2, {"model": module}, {"model": optimizer}, {})


@pytest.mark.parametrize("moment", [1, 2, 3], ids=["shards", "state", "before the rename"])
def test_a_killed_write_leaves_the_previous_checkpoint(tmp_path, moment):
    module, learner = make(0)
    train(module, learner, range(2))
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, {"model": module}, {"model": learner.optimizer}, {})
    child = os.fork()
    if child == 0:
        save_and_die(tmp_path, module, learner.optimizer, moment)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL

    assert len(list(tmp_path.iterdir())) == 2  # the unfinished write is there ...
    assert checkpointer.steps() == [1]  # ... and does not count
    restored, restored_learner = make(1)
    checkpointer.load({"model": restored}, {"model": restored_learner.optimizer})
    assert torch.equal(restored[0].weight, module[0].weight)
    checkpointer.save(2, {"model": module}, {"model": learner.optimizer}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


def test_bad_checkpoints_are_explained(tmp_path):
    module, learner = make(0)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        Checkpointer(tmp_path / "empty").load({"model": module}, {})
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpointer(tmp_path, keep=0)
    checkpointer = Checkpointer(tmp_path)
    path = checkpointer.save(4, {"model": module}, {"model": learner.optimizer}, {})
    with pytest.raises(FileNotFoundError, match=r"step is 7.*accepted: \[4\]"):
        checkpointer.load({"model": module}, {}, step=7)
    for first, message in (
        (nn.Linear(4, 7), r"holds \[7, 5\] for modules\.model\.0\.weight; accepted by this run: \[7, 4\]"),
        (nn.Linear(5, 7, bias=False), r"holds \[7\] for modules\.model\.0\.bias; accepted by this run: nothing"),
        (nn.Sequential(module[0]), r"holds nothing for modules\.model\.0\.0\.bias; accepted by this run: \[7\]"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpointer.load({"model": nn.Sequential(first, *module[1:])}, {})
    (shard,) = path.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        checkpointer.load({"model": module}, {})
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors does not exist"):
        read_tensors(tmp_path / "nothing.safetensors")


def test_weights_travel_with_their_settings(tmp_path):
    module, _ = make(0)
    path = tmp_path / "folder" / "weights.safetensors"
    save_weights(path, module.state_dict(), {"dim": 5, "words": ["a", "b"]})
    tensors, settings = load_weights(path)
    assert settings == json.loads('{"dim": 5, "words": ["a", "b"]}')
    assert all(torch.equal(tensors[name], value) for name, value in module.state_dict().items())
    assert [p.name for p in path.parent.iterdir()] == ["weights.safetensors"]
    save_file({"x": torch.zeros(1)}, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="carries no settings"):
        load_weights(tmp_path / "bare.safetensors")


def test_learning_rate_warms_up_and_falls():
    config = OptimizerConfig(lr=1.0, warmup_steps=4, final_lr_ratio=0.1)
    rates = [learning_rate(step, 104, config) for step in range(105)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[54] == pytest.approx(0.55)
    assert rates[104] == pytest.approx(0.1)
    assert all(b <= a for a, b in itertools.pairwise(rates[4:]))


def test_gradients_are_clipped_and_nan_stops():
    module, learner = make(0)
    module(torch.full((1, 5), 1e3)).square().sum().backward()
    assert learner.step(0)["grad_norm"] > 1e3
    module(torch.full((1, 5), float("nan"))).sum().backward()
    with pytest.raises(RuntimeError, match="non-finite"):
        learner.step(1)


def test_average_follows_the_weights():
    module, _ = make(0)
    average, _ = make(1)
    first = average[0].weight.clone()
    update_average(average, module, decay=0.9, updates=10**6)
    assert torch.allclose(average[0].weight, 0.9 * first + 0.1 * module[0].weight)
    update_average(average, module, decay=0.9, updates=0)  # the first update takes nine tenths of the new weights
    assert torch.allclose(average[0].weight, 0.1 * (0.9 * first + 0.1 * module[0].weight) + 0.9 * module[0].weight)
