"""What docs/cache_recipes.md promises, exactly and with both backends; test_documentation.py runs the page itself."""

from __future__ import annotations

import pytest
import torch
from compare import assert_close, assert_same_bits, relative_error
from small_model import CONFIG, FRAME_SEQLEN, LATENT
from torch import Tensor, nn

from python_ref.models.wan import CausalWanModel

LATENTS, NOISE = torch.randn(1, 8, *LATENT), torch.randn(1, 2, *LATENT)
OLD, NEW = torch.randn(2, 1, CONFIG.text_len, CONFIG.text_dim)
NOTICEABLE = 1e-5  # ten times float32's rounding: a caption matters little to a model that is not trained
WINDOWS = {"everything": {}, "window": {"window_frames": 6, "sink_frames": 2, "rollback_frames": 2}}


class Studio:
    """A model, a pool and the recipes."""

    def __init__(self, backend: str) -> None:
        torch.manual_seed(0)
        self.model = CausalWanModel(CONFIG, backend=backend).requires_grad_(False)
        nn.init.normal_(
            self.model.head.head.weight, std=0.1
        )  # it starts at zero, which would hide everything before it
        shape = CONFIG.num_layers, CONFIG.num_heads, CONFIG.head_dim
        self.pool = self.model.ops.PagePool(100, 4, *shape)

    def open(self, **window: int):
        return self.pool.open_stream(frame_seqlen=FRAME_SEQLEN, **window)

    def write(self, stream, latents: Tensor, context: Tensor) -> None:
        cache = self.model.ops.PagedKVCache.of_streams([stream])
        for block in latents.split(2, dim=1):
            self.model(block, torch.zeros(block.shape[:2]), context, cache=cache, commit=True)

    def rewind(self, stream, latents: Tensor, context: Tensor) -> None:
        stream.rollback(latents.shape[1])
        self.write(stream, latents, context)

    def predict(self, stream, context: Tensor) -> Tensor:
        cache = self.model.ops.PagedKVCache.of_streams([stream])
        return self.model(NOISE, torch.full((1, 2), 500.0), context, cache=cache)


@pytest.fixture(params=["ext", "reference"])
def studio(request) -> Studio:
    return Studio(request.param)


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_rewound_frames_are_as_if_written_under_the_new_caption(studio: Studio, window: dict[str, int]):
    stream, other = studio.open(**window), studio.open(**window)
    studio.write(stream, LATENTS, OLD)
    used, before = studio.pool.stats().used, studio.predict(stream, NEW)
    studio.rewind(stream, LATENTS[:, 4:], NEW)
    assert studio.pool.stats().used == used
    after = studio.predict(stream, NEW)
    assert relative_error(after, before) > NOTICEABLE
    studio.write(other, LATENTS[:, :4], OLD)
    studio.write(other, LATENTS[:, 4:], NEW)
    assert_same_bits(after, studio.predict(other, NEW))


def test_frames_are_rewound_in_place():
    studio = Studio("ext")
    stream = studio.open()
    studio.write(stream, LATENTS, OLD)
    pages = studio.pool.table.row(stream._number)
    studio.rewind(stream, LATENTS[:, 4:], NEW)
    assert studio.pool.table.row(stream._number) == pages


def test_a_rewound_branch_leaves_the_stream_alone(studio: Studio):
    stream = studio.open()
    studio.write(stream, LATENTS, OLD)
    before = studio.predict(stream, OLD)
    branch = stream.fork()
    studio.rewind(branch, LATENTS[:, 6:], NEW)
    assert_same_bits(studio.predict(stream, OLD), before)
    assert relative_error(studio.predict(branch, OLD), before) > NOTICEABLE


def test_guidance_reads_one_past_twice(studio: Studio):
    stream = studio.open(**WINDOWS["window"])
    studio.write(stream, LATENTS, OLD)
    used = studio.pool.stats().used
    both = studio.model.ops.PagedKVCache.of_streams([stream, stream.fork()])
    flows = studio.model(NOISE.repeat(2, 1, 1, 1, 1), torch.full((2, 2), 500.0), torch.cat((OLD, NEW)), cache=both)
    assert studio.pool.stats().used == used
    for flow, context in zip(flows.split(1), (OLD, NEW), strict=True):
        assert_close(flow, studio.predict(stream, context), 1e-5)
