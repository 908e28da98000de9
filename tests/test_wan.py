"""The Wan-style models: names, shapes, precisions, and that shortcuts change nothing."""

import copy
from dataclasses import replace

import pytest
import torch
from compare import relative_error
from golden_files import BACKENDS

from python_ref.models.wan import CausalWanModel, WanConfig, WanModel
from selfforcing_ext.mask import BlockCausalMask

CONFIG = WanConfig(
    dim=32, num_heads=2, num_layers=2, ffn_dim=48, freq_dim=16, text_dim=6, text_len=3, in_dim=2, out_dim=2
)

# Parameters of a Wan2.1 text-to-video checkpoint with the numbers of its blocks left out.
WAN_NAMES = set(
    """
patch_embedding.weight patch_embedding.bias
text_embedding.0.weight text_embedding.0.bias text_embedding.2.weight text_embedding.2.bias
time_embedding.0.weight time_embedding.0.bias time_embedding.2.weight time_embedding.2.bias
time_projection.1.weight time_projection.1.bias
blocks.modulation blocks.norm3.weight blocks.norm3.bias
blocks.self_attn.q.weight blocks.self_attn.q.bias blocks.self_attn.k.weight blocks.self_attn.k.bias
blocks.self_attn.v.weight blocks.self_attn.v.bias blocks.self_attn.o.weight blocks.self_attn.o.bias
blocks.self_attn.norm_q.weight blocks.self_attn.norm_k.weight
blocks.cross_attn.q.weight blocks.cross_attn.q.bias blocks.cross_attn.k.weight blocks.cross_attn.k.bias
blocks.cross_attn.v.weight blocks.cross_attn.v.bias blocks.cross_attn.o.weight blocks.cross_attn.o.bias
blocks.cross_attn.norm_q.weight blocks.cross_attn.norm_k.weight
blocks.ffn.0.weight blocks.ffn.0.bias blocks.ffn.2.weight blocks.ffn.2.bias
head.modulation head.head.weight head.head.bias
""".split()  # noqa: SIM905
)


def make(kind=CausalWanModel, config=CONFIG, backend="reference"):
    torch.manual_seed(0)
    made = kind(config, backend=backend)
    torch.nn.init.normal_(made.head.head.weight, std=0.3)  # it starts at zero, which would hide everything
    return made


def inputs(config=CONFIG, batch=2, frames=4):
    torch.manual_seed(1)
    patch_frames, patch_rows, patch_columns = config.patch_size
    x = torch.randn(batch, frames * patch_frames, config.in_dim, 2 * patch_rows, 3 * patch_columns)
    return x, 1000 * torch.rand(batch, frames), torch.randn(batch, config.text_len, config.text_dim)


MASK = BlockCausalMask(4, 6, 2)


def test_parameter_names_are_those_of_wan_checkpoints():
    names = {name.replace("blocks.0.", "blocks.").replace("blocks.1.", "blocks.") for name in make().state_dict()}
    assert names == WAN_NAMES
    make(WanModel).load_state_dict(make().state_dict(), strict=True)


def test_position_embedding_tells_places_apart():
    config = replace(CONFIG, position_grid=(2, 3))
    placed = make(WanModel, config)
    x, t, context = inputs(config)
    same_everywhere = torch.zeros_like(x)
    with torch.no_grad():
        # Of rotary embedding alone equal patches come out equal, wherever they are.
        assert relative_error(*placed(same_everywhere, t[:, 0], context)[0, 0, :, ::2, ::2].flatten(1).T[:2]) < 1e-5
        torch.nn.init.normal_(placed.position_embedding)
        assert relative_error(*placed(same_everywhere, t[:, 0], context)[0, 0, :, ::2, ::2].flatten(1).T[:2]) > 1e-2
    make(CausalWanModel, config).load_state_dict(placed.state_dict(), strict=True)
    with pytest.raises(ValueError, match=r"token grid of 2 x 3, but the model has position_grid = \(3, 2\)"):
        make(WanModel, replace(CONFIG, position_grid=(3, 2)))(x, t[:, 0], context)


def test_default_sizes_are_those_of_wan_1_3b():
    with torch.device("meta"):
        generator = CausalWanModel(WanConfig(), backend="reference")
    assert 1.41e9 < sum(parameter.numel() for parameter in generator.parameters()) < 1.43e9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("patch_size", [(1, 2, 2), (1, 1, 1), (2, 2, 1), (1, 4, 4)])
@torch.no_grad()
def test_patches(patch_size, backend):
    config = WanConfig(**{**vars(CONFIG), "patch_size": patch_size})
    generator = make(config=config, backend=backend)
    x, t, context = inputs(config)
    assert generator(x, t, context, mask=MASK).shape == x.shape
    embedded = generator.patch_embedding(x.transpose(1, 2)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(generator._embed_patches(x), embedded)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{"qk_norm": False}, {"cross_attn_norm": False}], ids=str)
def test_without_norms(options, backend):
    config = WanConfig(**{**vars(CONFIG), **options})
    generator = make(config=config, backend=backend)
    assert not any("norm_q" in name or "norm3" in name for name in generator.state_dict()) or len(options) == 1
    x, t, context = inputs(config)
    flow = generator(x, t, context, mask=MASK)
    expected = make(config=config)(x, t, context, mask=MASK)
    assert relative_error(flow, expected) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_and_cached_calls_agree(backend):
    """Clean frames block by block through a cache, and all at once under the mask."""
    generator = make(backend=backend)
    x, _, context = inputs(frames=6)
    t = torch.full((2, 6), 100.0)
    with torch.no_grad():
        for window, sink in ((None, 0), (4, 1)):
            masked = generator(x, t, context, mask=BlockCausalMask(6, 6, 2, window, sink))
            cache = generator.make_cache(x.shape, 6, window, sink)
            cached = [
                generator(x[:, start : start + 2], t[:, :2], context, cache=cache, commit=True) for start in (0, 2, 4)
            ]
            if window is None:
                assert relative_error(torch.cat(cached, dim=1), masked) < 1e-5
            else:  # a cached key has seen its own past, which reaches further back than the mask's
                assert relative_error(torch.cat(cached, dim=1)[:, :4], masked[:, :4]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_encoded_context_is_the_context(backend):
    generator = make(backend=backend)
    x, t, context = inputs()
    encoded = generator.encode_context(context)
    assert torch.equal(generator(x, t, context, mask=MASK), generator(x, t, encoded, mask=MASK))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [CausalWanModel, WanModel])
def test_checkpointed_layers_give_the_same_gradients(kind, backend):
    model = make(kind, backend=backend)
    x, t, context = inputs()
    gradients = []
    for checkpoint_layers in (False, True):
        model.zero_grad()
        if kind is WanModel:
            flow = model(x, t[:, 0], context, checkpoint_layers=checkpoint_layers)
        else:
            flow = model(x, t, context, mask=MASK, checkpoint_layers=checkpoint_layers)
        flow.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(kept, recomputed) for kept, recomputed in zip(*gradients, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision(backend):
    """Under autocast and as a bfloat16 model; flow keeps the dtype of the latents."""
    generator = make(backend=backend)
    x, t, context = inputs()
    expected = generator(x, t, context, mask=MASK)
    with torch.autocast("cpu", torch.bfloat16):
        flow = generator(x, t, context, mask=MASK)
        cache = generator.make_cache(x.shape, 4)
        cached = generator(x[:, :2], t[:, :2], context, cache=cache, commit=True)
    assert flow.dtype == torch.float32
    assert cache.dtype == torch.bfloat16
    assert relative_error(flow, expected) < 0.03
    assert relative_error(cached, expected[:, :2]) < 0.03
    flow.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in generator.parameters())

    small = copy.deepcopy(generator).bfloat16()
    flow = small(x.bfloat16(), t, context.bfloat16(), mask=MASK)
    assert flow.dtype == torch.bfloat16
    assert relative_error(flow, expected) < 0.03


@pytest.mark.parametrize("backend", BACKENDS)
def test_timesteps_keep_their_precision_under_autocast(backend):
    """999 and 1000 are one number in bfloat16."""
    model = make(WanModel, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        first, second = (model._embed_time(torch.tensor([[t]]))[1] for t in (999.0, 1000.0))
    assert first.dtype == torch.float32
    assert relative_error(first, second) > 1e-3


@pytest.mark.parametrize("backend", BACKENDS[1:])
@torch.no_grad()
def test_compiled_model(backend):
    """One graph under a mask, and with a cache no new graph as the rollout advances."""
    generator = make(backend=backend)
    x, t, context = inputs(frames=8)
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(generator, backend=count, fullgraph=True)
    mask = BlockCausalMask(8, 6, 2)
    assert relative_error(compiled(x, t, context, mask=mask), generator(x, t, context, mask=mask)) < 1e-6
    assert len(graphs) == 1

    videos = []
    for model in (generator, compiled):
        cache = generator.make_cache(x.shape, 8, window_frames=5, sink_frames=1)
        encoded = generator.encode_context(context)
        flows, graphs_at_block = [], []
        for start in range(0, 8, 2):
            block = x[:, start : start + 2].clone(), t[:, start : start + 2].clone()
            flows += [model(*block, encoded, cache=cache), model(*block, encoded, cache=cache, commit=True)]
            graphs_at_block.append(len(graphs))
        videos.append(torch.cat(flows, dim=1))
    assert relative_error(videos[1], videos[0]) < 1e-6
    assert graphs_at_block[1:] == [graphs_at_block[0]] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of mask and cache must be given, but neither is"),
        ({"mask": MASK, "clean_x": torch.zeros(2, 4, 2, 4, 6)}, "clean_x is given, but must be given exactly when"),
        (
            {"mask": BlockCausalMask(4, 6, 2, teacher_forcing=True)},
            "clean_x is missing, but must be given exactly when",
        ),
        ({"mask": MASK, "commit": True}, "commit is True, but there is no cache to commit to"),
        ({"mask": MASK, "t": torch.zeros(2)}, r"t has shape \[2\], but must be \[B, F\] = \[2, 4\]"),
        ({"mask": MASK, "x": torch.zeros(2, 4, 2, 5, 6)}, r"latents have shape \[2, 4, 2, 5, 6\], but must be"),
        ({"mask": MASK, "context": torch.zeros(2, 4, 6)}, r"context has shape \[2, 4, 6\], but must be"),
        ({"mask": BlockCausalMask(2, 6, 2)}, r"24 tokens, but mask.seqlen is 12"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_bad_calls(arguments, message):
    x, t, context = inputs()
    with pytest.raises(ValueError, match=message):
        make()(**{"x": x, "t": t, "context": context, **arguments})


def test_bad_sizes():
    with pytest.raises(ValueError, match="num_heads is 5, but must divide dim = 32 into heads of an even size"):
        WanConfig(**{**vars(CONFIG), "num_heads": 5})
    with pytest.raises(ValueError, match="freq_dim is 7, but must be even"):
        WanConfig(**{**vars(CONFIG), "freq_dim": 7})
    with pytest.raises(ValueError, match=r"t has shape \[2, 4\], but must be \[B\]"):
        make(WanModel)(*inputs())
