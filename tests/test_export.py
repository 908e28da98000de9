"""torch.export of models with our ops: exported, saved, loaded and run."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare import assert_close, assert_same_bits
from small_model import MASK, inputs, model
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

OPS = {"attention", "gated_residual", "modulated_layer_norm", "qk_norm_rope"}


class Masked(nn.Module):
    """The model with its mask."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = model()

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.generator(x, t, context, mask=MASK)


class Cached(nn.Module):
    """The model with a cache that holds the first block; a call reads it, or writes the next block."""

    def __init__(self, x: Tensor, t: Tensor, context: Tensor, commit: bool) -> None:
        super().__init__()
        self.generator, self.commit = model(), commit
        self.cache = self.generator.make_cache(x.shape, max_frames=8)
        self.generator(x, t, context, cache=self.cache, commit=True)

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.generator(x, t, context, cache=self.cache, commit=self.commit)


def ops_of(program: ExportedProgram) -> set[str]:
    targets = (str(node.target) for node in program.graph.nodes if node.op == "call_function")
    return {target.split(".")[1] for target in targets if target.startswith("selfforcing.")}


def saved_and_loaded(program: ExportedProgram) -> ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@pytest.fixture(scope="module")
def masked() -> tuple[Masked, ExportedProgram]:
    module, batch = Masked(), Dim("batch", min=1, max=64)
    return module, torch.export.export(module, inputs(), dynamic_shapes=({0: batch},) * 3, strict=True)


def test_model(masked):
    """The ops stay whole in the graph, and a saved program computes what the model computes, for any batch size."""
    module, program = masked
    assert ops_of(program) == OPS
    loaded = saved_and_loaded(program)
    assert ops_of(loaded) == OPS
    for batch in (1, 2, 3):
        expected = module(*inputs(batch))
        assert_same_bits(program.module()(*inputs(batch)), expected)
        assert_same_bits(loaded.module()(*inputs(batch)), expected)


def test_gradients(masked):
    module, program = masked
    exported = program.module()
    exported(*inputs()).square().mean().backward()
    module(*inputs()).square().mean().backward()
    expected = {name: parameter.grad for name, parameter in module.named_parameters()}
    grads = {name: parameter.grad for name, parameter in exported.named_parameters()}
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert_close(grad, expected[name], 1e-6, name)


def test_core_aten_program(masked):
    """After decomposition to the core operators, as backends of torch.export take it."""
    module, program = masked
    with torch.no_grad():
        decomposed = program.run_decompositions()
        assert ops_of(decomposed) == OPS
        assert_close(decomposed.module()(*inputs()), module(*inputs()), 1e-6)


@torch.no_grad()
def test_another_process_loads_programs(masked, tmp_path: Path):
    """Which needs nothing but the ops. A program that writes a cache says that the cache is elsewhere."""
    module, program = masked
    torch.export.save(program, tmp_path / "masked.pt2")
    torch.save((inputs(), module(*inputs())), tmp_path / "expected.pt")
    block = inputs(frames=2)
    writing = Cached(*block, commit=True)
    program = torch.export.export(writing, block)
    torch.export.save(program, tmp_path / "writing.pt2")
    program.module()(*block)
    assert writing.cache.num_frames == 4
    torch.save(block, tmp_path / "block.pt")
    code = (
        f"import torch\ntorch.set_num_threads({torch.get_num_threads()})  # which decides about the bits\n"
        + """
from selfforcing_ext import *
inputs, expected = torch.load("expected.pt")
assert torch.equal(torch.export.load("masked.pt2").module()(*inputs), expected)
cache = PagedKVCache(2, 2, 16, 6, batch_size=2)  # not the one
try:
    torch.export.load("writing.pt2").module()(*torch.load("block.pt"))
except RuntimeError as error:
    assert "belongs to a cache that is gone or lives in another process" in str(error)
else:
    raise AssertionError("a program has written to a cache of another process")
"""
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


@torch.no_grad()
def test_model_with_a_cache():
    """A step that reads a cache. A saved program keeps what the cache held."""
    x, t, context = inputs(frames=2)
    module = Cached(x, t, context, commit=False)
    expected = module(2 * x, t, context)
    program = torch.export.export(module, (x, t, context))
    assert ops_of(program) >= OPS
    assert_same_bits(program.module()(2 * x, t, context), expected)
    loaded = saved_and_loaded(program)
    module.cache.reset()
    assert_same_bits(loaded.module()(2 * x, t, context), expected)
