"""The teaching API: it is what it says, beside the pipelines and ops that it explains. docs/tutorial.md runs in
tests/test_documentation.py."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import small_model
import torch
from PIL import Image

from python_ref.noise import TorchNoise
from python_ref.ops.attention import block_causal_attention
from python_ref.schedule import FlowMatchSchedule
from python_ref.tutorial import algorithm
from python_ref.tutorial.__main__ import PAGE, run_page
from python_ref.tutorial.algorithm import (
    SelfForcingLoss,
    SimpleKVCache,
    SimplifiedSelfForcingPipeline,
    attention_by_frame,
    record_calls,
)
from python_ref.tutorial.algorithm.cache_pictures import blocks_by_page
from selfforcing_ext.mask import BlockCausalMask

SCHEDULE = FlowMatchSchedule()


def make_pipeline() -> SimplifiedSelfForcingPipeline:
    return SimplifiedSelfForcingPipeline(small_model.model(), SCHEDULE, num_frames_per_block=2)


def make_inputs(frames: int = 6) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    noise, _, context = small_model.inputs(frames=frames)
    return noise, {"prompt_embeds": context}


SIGNATURES = {
    "SimplifiedSelfForcingPipeline": [
        "generator",
        "scheduler",
        "num_frames_per_block=3",
        "denoising_steps=[1000, 750, 500, 250]",
    ],
    "SimplifiedSelfForcingPipeline.simulate_inference": ["self", "noise", "conditional_dict"],
    "SimpleKVCache": ["batch_size", "max_length", "num_heads", "head_dim"],
    "SimpleKVCache.update": ["self", "k", "v"],
    "SimpleKVCache.get_cache": ["self"],
    "SelfForcingLoss": ["loss_type='mse'"],
    "SelfForcingLoss.compute_loss": ["self", "generated", "target"],
    "create_algorithm_diagram": ["path"],
    "explain_self_forcing": [],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_that_readers_know(name: str):
    target = algorithm
    for part in name.split("."):
        target = getattr(target, part)
    parameters = inspect.signature(target).parameters.values()
    assert [str(p.replace(annotation=p.empty)) for p in parameters] == SIGNATURES[name]


# ---- Pipeline


def test_simulated_inference_is_the_training_rollout_and_has_its_gradient():
    pipeline, (noise, condition) = make_pipeline(), make_inputs()
    torch.manual_seed(3)
    video = pipeline.simulate_inference(noise, condition)
    expected = pipeline.training.rollout(
        noise, condition["prompt_embeds"], TorchNoise(torch.Generator().manual_seed(3))
    ).video
    torch.testing.assert_close(video, expected)
    video.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in pipeline.generator.parameters())
    assert pipeline.generator.head.head.weight.grad.abs().sum() > 0


def test_calls_are_recorded_as_they_happen():
    pipeline, (noise, condition) = make_pipeline(), make_inputs()
    with record_calls(pipeline.generator, SCHEDULE) as calls:
        video = pipeline.generate(noise, condition)
    steps = SCHEDULE.warp([1000, 750, 500, 250]).tolist()
    assert [call.timestep for call in calls] == [*steps, 0, *steps, 0, *steps]
    assert [call.start_frame for call in calls] == 5 * [0] + 5 * [2] + 4 * [4]
    assert [call.clean_pass for call in calls] == 2 * (4 * [False] + [True]) + 4 * [False]
    torch.testing.assert_close(torch.cat([calls[i].x0 for i in (3, 8, 13)], dim=1), video)
    torch.testing.assert_close(calls[4].x_t, video[:, :2])
    pipeline.generate(noise, condition)
    assert len(calls) == 14  # the watch has ended


def test_embeddings_are_asked_for():
    noise, condition = make_inputs()
    with pytest.raises(KeyError, match=r"conditional_dict holds \['text'\], but must hold 'prompt_embeds'"):
        make_pipeline().simulate_inference(noise, {"text": condition["prompt_embeds"]})


# ---- Cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("block", "window"), [(1, 1), (2, 5), (3, 6), (3, 7), (2, 20)])
def test_the_ring_shows_what_a_window_mask_shows(block: int, window: int, dtype: torch.dtype):
    """In tokens: after its own update a block sees the newest `window` of them."""
    mask = BlockCausalMask(12, 1, block, window_frames=window)
    q, k, v = torch.randn(3, 2, 12, 2, 8, dtype=dtype, generator=torch.Generator().manual_seed(0))
    cache = SimpleKVCache(2, window, 2, 8)
    rows = []
    for queries, keys, values in zip(*(x.split(block, dim=1) for x in (q, k, v)), strict=True):
        cache.update(keys, values)
        rows.append(block_causal_attention(queries, *cache.get_cache(), None))
    torch.testing.assert_close(torch.cat(rows, dim=1), block_causal_attention(q, k, v, mask))
    assert (cache.length, cache.num_tokens) == (min(12, window), 12)


def test_the_ring_moves_nothing_and_keeps_no_graph():
    cache = SimpleKVCache(1, 4, 1, 1)
    numbers = torch.arange(7.0).view(1, 7, 1, 1).requires_grad_()
    cache.update(numbers[:, :4], numbers[:, :4])
    memory = cache._k.data_ptr()
    cache.update(numbers[:, 4:], -numbers[:, 4:])
    k, v = cache.get_cache()
    assert k.flatten().tolist() == [3, 4, 5, 6]
    assert v.flatten().tolist() == [3, -4, -5, -6]
    assert cache._k.flatten().tolist() == [4, 5, 6, 3]
    assert cache._k.data_ptr() == memory
    assert not k.requires_grad


BAD_UPDATES = {
    r"k has 5 tokens, but the cache holds max_length = 4": ((1, 5, 2, 8), (1, 5, 2, 8)),
    r"k has shape \[1, 2, 3, 8\], but must be \[B, L, H, D\] = \[1, L, 2, 8\]": ((1, 2, 3, 8), (1, 2, 3, 8)),
    r"v has shape \[1, 3, 2, 8\], but must be": ((1, 2, 2, 8), (1, 3, 2, 8)),
}


@pytest.mark.parametrize("message", BAD_UPDATES)
def test_bad_updates_change_nothing(message: str):
    cache = SimpleKVCache(1, 4, 2, 8)
    with pytest.raises(ValueError, match=message):
        cache.update(*(torch.ones(shape) for shape in BAD_UPDATES[message]))
    assert cache.num_tokens == 0
    assert cache.get_cache()[0].shape == (1, 0, 2, 8)


def test_bad_sizes():
    with pytest.raises(ValueError, match="max_length is 0, but must be at least 1"):
        SimpleKVCache(1, 0, 2, 8)


# ---- Loss


@pytest.mark.parametrize(
    ("loss_type", "expected"), [("mse", (4 + 0.25) / 2), ("l1", (2 + 0.5) / 2), ("huber", (1.5 + 0.125) / 2)]
)
def test_losses(loss_type: str, expected: float):
    generated = torch.tensor([2.0, 0.5], requires_grad=True)
    target = torch.zeros(2, requires_grad=True)
    loss = SelfForcingLoss(loss_type).compute_loss(generated, target)
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    assert target.grad is None
    assert generated.grad.abs().sum() > 0


def test_bad_losses():
    with pytest.raises(ValueError, match="loss_type is 'kl', but must be one of 'mse', 'l1', 'huber'"):
        SelfForcingLoss("kl")
    with pytest.raises(ValueError, match=r"target has shape \[3\], but must have \[2\]"):
        SelfForcingLoss().compute_loss(torch.zeros(2), torch.zeros(3))


# ---- Pictures


def test_pages_of_the_cache_picture_are_those_of_the_mask():
    """Whatever page it lies in, what is kept is what the mask shows."""
    for window, sink in ((None, 0), (3, 0), (3, 1), (4, 2)):
        visible = BlockCausalMask(9, 1, window_frames=window, sink_frames=sink).dense()
        history = blocks_by_page(9, window, sink)
        for turn, pages in enumerate(history):
            assert sorted(pages.values()) == visible[turn].nonzero().flatten().tolist()
        assert set(history[-1]) == set(range(window or 9))
    assert blocks_by_page(5, 3, 1)[-1] == {0: 0, 1: 3, 2: 4}


def test_cache_picture_wants_whole_blocks(tmp_path: Path):
    with pytest.raises(ValueError, match="window_frames is 8, but must be a multiple of frames_per_block = 3"):
        algorithm.visualize_kv_cache_growth(tmp_path / "cache.png", window_frames=8)


def test_attention_by_frame_is_attention():
    generator, (video, condition) = small_model.model(), make_inputs(frames=4)
    shares = attention_by_frame(generator, video, condition["prompt_embeds"], small_model.MASK)
    assert shares.shape == (small_model.CONFIG.num_layers, 4, 4)
    torch.testing.assert_close(shares.sum(-1), torch.ones(shares.shape[:2]))
    visible = small_model.MASK.dense()[:: small_model.FRAME_SEQLEN, :: small_model.FRAME_SEQLEN]
    assert torch.equal(shares > 0, visible.expand_as(shares))
    # Keys that are all alike share the attention evenly.
    for block in generator.blocks:
        torch.nn.init.zeros_(block.self_attn.norm_q.weight)
    even = attention_by_frame(generator, video, condition["prompt_embeds"], small_model.MASK)
    torch.testing.assert_close(even[0], visible / visible.sum(-1, keepdim=True))


def draw(name: str, path: Path) -> Path:
    pipeline, (noise, condition) = make_pipeline(), make_inputs()
    if name in ("visualize_autoregressive_generation", "visualize_denoising_process"):
        return getattr(algorithm, name)(pipeline, noise, condition, path)
    if name == "visualize_videos":
        return algorithm.visualize_videos({"one": noise[0], "another": noise[1]}, path, frames_per_block=2)
    if name == "visualize_attention_by_frame":
        mask = BlockCausalMask(6, small_model.FRAME_SEQLEN, 2)
        return algorithm.visualize_attention_by_frame(pipeline.generator, noise, condition["prompt_embeds"], mask, path)
    return getattr(algorithm, name)(path)


@pytest.mark.parametrize("name", [name for name in algorithm.__all__ if name.startswith(("visualize", "create"))])
def test_pictures_are_drawn_and_leave_no_trace(name: str, tmp_path: Path):
    before = dict(plt.rcParams), plt.get_fignums()
    path = draw(name, tmp_path / "new" / "picture.png")
    with Image.open(path) as picture:
        assert min(picture.size) > 150
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24)) > 20
    assert (dict(plt.rcParams), plt.get_fignums()) == before


# ---- Words


def test_the_explanation_names_what_matters(capsys: pytest.CaptureFixture[str]):
    algorithm.explain_self_forcing()
    text = capsys.readouterr().out
    for word in ("2506.08009", "exposure bias", "exit", "cache", "critic", "window", "sink"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_page_runs_in_a_folder_of_its_own(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        '# Page\n\n```python\nx = "a"\n```\n\n```bash\nfalse\n```\n\n```python\nopen(x, "w").close()\n1 / 0\n```\n'
    )
    before = Path.cwd()
    with pytest.raises(ZeroDivisionError) as error:
        run_page(page, tmp_path / "out")
    assert (tmp_path / "out" / "a").exists()
    assert Path.cwd() == before
    assert error.traceback[-1].lineno + 1 == 13


def test_every_picture_of_the_page_is_made_by_its_code():
    text = PAGE.read_text(encoding="utf-8")
    shown = set(re.findall(r"\(images/tutorial/(\S+\.png)\)", text))
    assert shown == set(re.findall(r'pictures / "(\S+\.png)"', text))
    assert shown == {path.name for path in (PAGE.parent / "images" / "tutorial").iterdir()}
