"""The arithmetic of costs against what torch counts and what autograd really keeps, on small models."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from python_ref.costs import (
    WIDE,
    Flops,
    activation_bytes,
    cast_weight_bytes,
    count_parameters,
    forward_flops,
    layer_activation_bytes,
    text_flops,
)
from python_ref.models.wan import CausalWanModel, WanModel
from python_ref.models.wan_layers import WanConfig
from python_ref.noise import TorchNoise
from python_ref.pipelines.training import SelfForcingTrainingPipeline
from python_ref.precision import network_precision
from python_ref.schedule import FlowMatchSchedule
from selfforcing_ext.mask import BlockCausalMask

CONFIG = WanConfig(
    dim=96, num_heads=4, num_layers=3, ffn_dim=320, freq_dim=32, text_dim=48, text_len=20, in_dim=4, out_dim=4
)
FRAMES, ROWS, COLUMNS, BATCH = 4, 16, 20, 2  # of the latents
FRAME_SEQLEN = 80
NARROW = {"fp32": 4, "bf16": 2}


def make(kind, backend):
    torch.manual_seed(0)
    return kind(CONFIG, backend)


def inputs(frames=FRAMES):
    return torch.randn(BATCH, frames, 4, ROWS, COLUMNS), torch.randn(BATCH, CONFIG.text_len, CONFIG.text_dim)


def counted(run):
    """FLOPs of the products that torch sees: batched ones are those of attention."""
    with FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    attention = sum(count for op, count in counts.items() if "bmm" in str(op))
    return Flops(sum(counts.values()) - attention, attention)


def bytes_kept(run, *without):
    """Bytes of the different storages that autograd keeps, those of `without` left out; and what `run` returned."""
    known = {tensor.untyped_storage().data_ptr() for tensor in without}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = tensor  # alive, so that no other storage takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), result


def test_parameters():
    assert count_parameters(CONFIG) == sum(p.numel() for p in WanModel(CONFIG).parameters())
    assert count_parameters(WanConfig()) == 1_418_996_800  # Wan2.1-1.3B, and 14B:
    assert (
        count_parameters(WanConfig(dim=5120, num_heads=40, num_layers=40, ffn_dim=13824)) == 14_288_491_584
    )  # and 14B


def test_forward_flops_of_a_bidirectional_pass():
    model, (x, context) = make(WanModel, "reference"), inputs()
    encoded = model.encode_context(context)
    tokens = FRAMES * FRAME_SEQLEN
    found = counted(lambda: model(x, torch.rand(BATCH), encoded))
    assert found == forward_flops(CONFIG, tokens, tokens**2, timesteps=1) * BATCH
    assert counted(lambda: model.encode_context(context)) == text_flops(CONFIG) * BATCH


def test_backward_flops():
    """torch's products keep the scores, ours recompute them; inputs of the first products need no gradient."""
    model, (x, context) = make(WanModel, "reference"), inputs()
    tokens = FRAMES * FRAME_SEQLEN
    forward = (forward_flops(CONFIG, tokens, tokens**2, timesteps=1) + text_flops(CONFIG)) * BATCH
    loss = model(x, torch.rand(BATCH), context).square().sum()
    found = counted(loss.backward)
    assert found.attention == pytest.approx(forward.backward().attention * 2 / 2.5)
    assert found.linear == pytest.approx(forward.backward().linear, rel=0.02)
    x.requires_grad_()
    loss = model.requires_grad_(False)(x, torch.rand(BATCH), context).square().sum()
    expected = (forward_flops(CONFIG, tokens, tokens**2, timesteps=0) * BATCH).backward(weights=False)
    assert counted(loss.backward).linear == pytest.approx(expected.linear, rel=1e-6)


@pytest.mark.parametrize(("window", "sink"), [(None, 0), (3, 1)])
@torch.no_grad()
def test_flops_with_a_cache(window, sink):
    """All blocks of a rollout see together what the mask of the whole video shows."""
    model, (x, context) = make(CausalWanModel, "reference"), inputs()
    encoded = model.encode_context(context)
    cache = model.make_cache(x.shape, FRAMES, window, sink)

    def all_blocks():
        for block in x.split(1, dim=1):
            model(block, torch.zeros(BATCH, 1), encoded, cache=cache, commit=True)

    pairs = BlockCausalMask(FRAMES, 1, 1, window_frames=window, sink_frames=sink).dense().sum().item() * FRAME_SEQLEN**2
    expected = forward_flops(CONFIG, FRAMES * FRAME_SEQLEN, pairs, timesteps=FRAMES) * BATCH
    assert counted(all_blocks) == expected


@pytest.mark.parametrize("precision", NARROW)
def test_activations_of_a_pass(precision):
    """Within 3 %: what is left out (timesteps, patches, the embedding of the text) is small in real models."""
    model, (x, context) = make(WanModel, "ext"), inputs()
    with network_precision(precision):
        found, _ = bytes_kept(lambda: model(x, torch.rand(BATCH), context), *model.parameters())
    expected = activation_bytes(CONFIG, FRAMES * FRAME_SEQLEN, 1, NARROW[precision], videos=BATCH)
    assert expected == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("precision", NARROW)
def test_activations_of_a_checkpointed_pass(precision):
    """After the forward, before a layer is computed again."""
    model, (x, context) = make(WanModel, "ext"), inputs()
    with network_precision(precision):
        found, _ = bytes_kept(lambda: model(x, torch.rand(BATCH), context, checkpoint_layers=True), *model.parameters())
    narrow, tokens = NARROW[precision], FRAMES * FRAME_SEQLEN
    layer = BATCH * layer_activation_bytes(CONFIG, tokens, 1, narrow) + cast_weight_bytes(CONFIG, narrow)
    expected = activation_bytes(CONFIG, tokens, 1, narrow, videos=BATCH, recompute=True) - layer
    assert expected == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("precision", NARROW)
def test_activations_of_a_rollout(precision):
    """The exit steps of all blocks are kept together; the pages of the cache are counted with the cache."""
    model, (x, context) = make(CausalWanModel, "ext"), inputs()
    caches = []
    make_cache = model.make_cache
    model.make_cache = lambda *arguments, **options: caches.append(make_cache(*arguments, **options)) or caches[-1]
    pipeline = SelfForcingTrainingPipeline(model, FlowMatchSchedule(), [1000.0, 500.0], frames_per_block=2)
    noise = TorchNoise(torch.Generator().manual_seed(0))
    with network_precision(precision):
        found, result = bytes_kept(lambda: pipeline.rollout(x, context, noise), *model.parameters())
    pages = caches[0].nbytes
    narrow = NARROW[precision]
    expected = activation_bytes(CONFIG, 2 * FRAME_SEQLEN, 2, narrow, calls=2, videos=BATCH)
    assert result.video.requires_grad
    assert expected == pytest.approx(found - pages, rel=0.03)


def test_casts_are_kept_under_autocast_alone():
    assert cast_weight_bytes(CONFIG, WIDE) == 0
    assert cast_weight_bytes(CONFIG, 2) == 2 * (6 * 96**2 + 2 * 96 * 320)
