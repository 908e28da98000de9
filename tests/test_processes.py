"""What a process gets of batches and draws, and how gradients are put together for one exchange."""

import pytest
import torch

from python_ref import processes
from python_ref.batch_share import BatchShare
from python_ref.noise import TorchNoise
from python_ref.processes import average_gradients, mean_over_processes, process_device

CPU = torch.device("cpu")


def draws(source, batch: int) -> list[torch.Tensor]:
    return [
        source.randn((batch, 3, 2), torch.float32, CPU),
        source.randint(0, 1000, (batch, 5), CPU),
        source.randint(0, 1000, (7,), CPU),
        source.randn((batch, 4), torch.bfloat16, CPU),
    ]


def test_shares_of_draws_make_up_those_of_one_process():
    whole = draws(TorchNoise(3), 6)
    shares = [draws(BatchShare(index, 3).noise(torch.Generator().manual_seed(3)), 2) for index in range(3)]
    for number, expected in enumerate(whole):
        parts = [share[number] for share in shares]
        if number == 2:  # belongs to no sample: the same for all
            assert all(torch.equal(part, expected) for part in parts)
        else:
            assert torch.equal(torch.cat(parts), expected)


def test_shares_of_batches_are_neighbours():
    assert [BatchShare(index, 3).place(12, 6) for index in range(3)] == [(12, 2), (14, 2), (16, 2)]
    assert torch.equal(BatchShare(1, 2).rows(torch.arange(6)), torch.tensor([3, 4, 5]))
    with pytest.raises(ValueError, match="batch_size is 5; accepted with 2 data-parallel processes: a multiple"):
        BatchShare(0, 2).place(0, 5)


def test_gradients_are_averaged_in_buckets(monkeypatch):
    """As two processes with the same gradients would; the exchange itself is played."""
    reduced: list[torch.Tensor] = []

    def play_all_reduce(tensor: torch.Tensor) -> None:
        reduced.append(tensor.clone())
        tensor.mul_(2).add_(2)  # the other process's gradients are larger by two

    monkeypatch.setattr(processes, "BUCKET_BYTES", 40)
    monkeypatch.setattr(processes, "process_count", lambda: 2)
    monkeypatch.setattr(processes.dist, "all_reduce", play_all_reduce)
    sizes, half = ((2, 3), (4,), (3,), (5,), (2,), (12,)), 4  # one is in a half type, and the third has no gradient
    parameters = [
        torch.nn.Parameter(torch.zeros(size, dtype=torch.bfloat16 if number == half else torch.float32))
        for number, size in enumerate(sizes)
    ]
    for number, parameter in enumerate(parameters):
        parameter.grad = None if number == 2 else torch.full_like(parameter, number)
    average_gradients(parameters)
    assert [(len(tensor), tensor.dtype) for tensor in reduced] == [
        (10, torch.float32),  # as many bytes as a bucket may have
        (5, torch.float32),
        (2, torch.bfloat16),
        (12, torch.float32),  # larger than a bucket
    ]
    assert parameters[2].grad is None
    for number in (0, 1, 3, 4, 5):
        assert torch.all(parameters[number].grad == number + 1)


def test_one_process_needs_no_exchange():
    assert mean_over_processes({"loss": 2.0}) == {"loss": 2.0}
    assert process_device("cpu") == CPU
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="process 0 of this machine finds 0 GPUs; accepted: 'cpu'"):
            process_device("cuda")
