"""diffusers' Wan transformer with our attention against the same model with its own, and with a cache."""

import copy
import itertools
from types import SimpleNamespace

import accelerate as accelerate_library
import pytest
import torch
from compare import assert_as_accurate, assert_close
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn

from selfforcing_ext import BlockCausalMask
from selfforcing_ext.integrations.diffusers import (
    TEXT_TOKENS,
    SelfForcingAttnProcessor,
    accelerate,
    forward_with_cache,
    is_accelerated,
    make_kv_cache,
    restore,
)

# What the same sums in another order cost a float32 model of two layers; gradients of biases nearly cancel.
MODEL_TOLERANCE = 2e-6
GRADIENT_TOLERANCE = 1e-5
FRAMES, ROWS, COLUMNS = 6, 8, 6  # of latents; a patch is 2 x 2
FRAME_SEQLEN = ROWS * COLUMNS // 4
HEADS, HEAD_DIM = 2, 24


def make_model(**config) -> WanTransformer3DModel:
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "num_layers": 2, "ffn_dim": 64}
    sizes |= {"in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 32, "rope_max_seq_len": 32}
    model = WanTransformer3DModel(**sizes | config)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones and zeros hide mistakes
            nn.init.normal_(parameter, mean=float("weight" in name), std=0.3)
    return model


def make_image_model() -> WanTransformer3DModel:
    return make_model(image_dim=20, added_kv_proj_dim=HEADS * HEAD_DIM)


def make_inputs(model: WanTransformer3DModel, frames: int = FRAMES, batch_size: int = 2) -> dict[str, Tensor]:
    """Latents, a timestep per video, a text, and the image of an image-to-video model."""
    inputs = {
        "hidden_states": torch.randn(batch_size, model.config.in_channels, frames, ROWS, COLUMNS),
        "timestep": torch.tensor([900.0, 300.0])[:batch_size],
        "encoder_hidden_states": torch.randn(batch_size, 7, model.config.text_dim),
    }
    if model.config.image_dim is not None:
        inputs["encoder_hidden_states"] = torch.randn(batch_size, TEXT_TOKENS, model.config.text_dim)
        inputs["encoder_hidden_states_image"] = torch.randn(batch_size, 5, model.config.image_dim)
    return inputs


def per_token(timestep: Tensor) -> Tensor:
    """[B, F] to [B, L]."""
    return timestep.repeat_interleave(FRAME_SEQLEN, dim=1)


class DenseMaskProcessor(WanAttnProcessor):
    """The model's own attention with a dense mask on self-attention."""

    def __init__(self, mask: BlockCausalMask):
        super().__init__()
        self.visible = mask.dense()

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        visible = self.visible if encoder_hidden_states is None else None
        return super().__call__(attn, hidden_states, encoder_hidden_states, visible, rotary_emb)


class TwiceRope(nn.Module):
    """The model's rotation for a clean and a noisy video in a row."""

    def __init__(self, rope: nn.Module):
        super().__init__()
        self.rope = rope

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        clean, _ = hidden_states.chunk(2, dim=2)
        return tuple(table.repeat(1, 2, 1, 1) for table in self.rope(clean))


def with_dense_mask(model: WanTransformer3DModel, mask: BlockCausalMask) -> WanTransformer3DModel:
    """A copy that computes what an accelerated model should, all of it in diffusers' own way."""
    dense = copy.deepcopy(model)
    dense.set_attn_processor(DenseMaskProcessor(mask))
    if mask.teacher_forcing:
        dense.rope = TwiceRope(dense.rope)
    return dense


def output_and_gradients(model: WanTransformer3DModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The prediction, and the gradients of inputs and parameters for a fixed gradient of it."""
    leaves = {name: value.clone().requires_grad_(name != "timestep") for name, value in inputs.items()}
    model.zero_grad(set_to_none=True)
    output = model(**leaves).sample
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)))
    gradients = {name: leaf.grad for name, leaf in itertools.chain(leaves.items(), model.named_parameters())}
    return {"output": output.detach()} | {name: grad for name, grad in gradients.items() if grad is not None}


def assert_same_model(ours: WanTransformer3DModel, theirs: WanTransformer3DModel, inputs: dict[str, Tensor]) -> None:
    actual, expected = output_and_gradients(ours, inputs), output_and_gradients(theirs, inputs)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(actual[name], value, MODEL_TOLERANCE if name == "output" else GRADIENT_TOLERANCE, name)


def generate(model: WanTransformer3DModel, cache, inputs: dict[str, Tensor], frames_per_block: int) -> Tensor:
    """Predictions [B, C, F, H, W] for the blocks of a video, each of which is committed as it is."""
    x, t, text = inputs.values()
    flows = []
    for start in range(0, x.shape[2], frames_per_block):
        frames = slice(start, start + frames_per_block)
        block_t = t.unflatten(1, (-1, FRAME_SEQLEN))[:, frames].flatten(1) if t.ndim == 2 else t
        block = x[:, :, frames], block_t, text
        flows.append(forward_with_cache(model, cache, *block))
        forward_with_cache(model, cache, *block, commit=True)
    return torch.cat(flows, dim=2)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("make", [make_model, make_image_model])
def test_whole_model_equals_its_own_attention(make, fused):
    theirs = make()
    ours = accelerate(copy.deepcopy(theirs))
    if fused:
        theirs.fuse_qkv_projections()
        ours.fuse_qkv_projections()
    assert_same_model(ours, theirs, make_inputs(theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cross", [False, True])
def test_layer_is_as_accurate_as_its_own_attention(cross, dtype):
    model = make_model()
    rope = None if cross else model.rope(torch.empty(1, 4, FRAMES, ROWS, COLUMNS))
    accelerate(model)
    positions = None if cross else model.rope(torch.empty(1, 4, FRAMES, ROWS, COLUMNS))
    layer = (model.blocks[1].attn2 if cross else model.blocks[1].attn1).to(dtype)
    hidden = torch.randn(2, FRAMES * FRAME_SEQLEN, HEADS * HEAD_DIM).to(dtype)
    context = torch.randn(2, 40, HEADS * HEAD_DIM).to(dtype) if cross else None
    grad = torch.randn(hidden.shape).to(dtype)

    def run(processor, dtype, where):
        own = copy.deepcopy(layer).to(dtype)
        own.set_processor(processor)
        inputs = [None if x is None else x.to(dtype, copy=True).requires_grad_() for x in (hidden, context)]
        out = own(*inputs, None, where)
        out.backward(grad.to(dtype))
        gradients = [x.grad for x in inputs if x is not None] + [parameter.grad for parameter in own.parameters()]
        return [out.detach(), *gradients]

    ours = run(SelfForcingAttnProcessor(), dtype, positions)
    theirs = run(WanAttnProcessor(), dtype, rope)
    exact = run(WanAttnProcessor(), torch.float64, rope)
    names = ["out", "hidden", *(["context"] if cross else []), *(name for name, _ in layer.named_parameters())]
    for name, *values in zip(names, ours, theirs, exact, strict=True):
        assert_as_accurate(*values, name=name)


@pytest.mark.parametrize(
    "mask",
    [
        BlockCausalMask(FRAMES, FRAME_SEQLEN, frames_per_block=2),
        BlockCausalMask(FRAMES, FRAME_SEQLEN, frames_per_block=2, window_frames=4, sink_frames=1),
        BlockCausalMask(FRAMES - 2, FRAME_SEQLEN, frames_per_block=3, first_frame_alone=True),
        BlockCausalMask(FRAMES // 2, FRAME_SEQLEN, window_frames=2, teacher_forcing=True),
    ],
    ids=["blocks", "window and sink", "first frame alone", "teacher forcing"],
)
def test_block_causal_equals_dense_mask(mask):
    theirs = make_model()
    frames = mask.seqlen // FRAME_SEQLEN
    inputs = make_inputs(theirs, frames)
    inputs["timestep"] = per_token(torch.rand(2, frames) * 1000)
    ours = accelerate(copy.deepcopy(theirs), mask)
    assert_same_model(ours, with_dense_mask(theirs, mask), inputs)


def test_processor_alone_uses_the_models_tables():
    theirs = make_model()
    mask = BlockCausalMask(FRAMES, FRAME_SEQLEN, frames_per_block=3)
    ours = copy.deepcopy(theirs)
    ours.set_attn_processor(SelfForcingAttnProcessor(mask))
    assert not is_accelerated(ours)
    assert_same_model(ours, with_dense_mask(theirs, mask), make_inputs(theirs))


def test_other_rotation_is_kept():
    theirs = make_model()
    angles = torch.linspace(0, 3, 32).unsqueeze(1) * torch.rand(theirs.rope.t_dim // 2).repeat_interleave(2)
    theirs.rope.freqs_cos[:, : theirs.rope.t_dim] = angles.cos()
    theirs.rope.freqs_sin[:, : theirs.rope.t_dim] = angles.sin()
    inputs = make_inputs(theirs)
    assert_same_model(accelerate(copy.deepcopy(theirs)), theirs, inputs)

    mask = BlockCausalMask(FRAMES // 2, FRAME_SEQLEN, teacher_forcing=True)
    assert_same_model(accelerate(copy.deepcopy(theirs), mask), with_dense_mask(theirs, mask), inputs)

    causal = BlockCausalMask(FRAMES, FRAME_SEQLEN, frames_per_block=2)
    with torch.no_grad():
        expected = with_dense_mask(theirs, causal)(**inputs).sample
        cache = make_kv_cache(accelerate(theirs), inputs["hidden_states"].shape)
        assert_close(generate(theirs, cache, inputs, 2), expected, MODEL_TOLERANCE)


def test_rotation_of_a_model_moved_to_bfloat16_is_recognised():
    """Its tables are rounded then; ours are not."""
    model = make_model().to(torch.bfloat16)
    inputs = {name: value.to(torch.bfloat16) for name, value in make_inputs(model).items()}
    with torch.no_grad():
        exact = copy.deepcopy(model).float()(**{name: value.float() for name, value in inputs.items()}).sample
        theirs = model(**inputs).sample
        accelerate(model)
        assert model.rope(inputs["hidden_states"]).tables is None
        assert_as_accurate(model(**inputs).sample, theirs, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [{}, {"window_frames": 4}, {"window_frames": 4, "sink_frames": 1}])
def test_blocks_from_the_cache_equal_the_whole_video(window, dtype):
    model = make_model()
    inputs = make_inputs(model, frames=10)
    inputs["timestep"] = per_token(torch.rand(2, 10) * 1000)
    mask = BlockCausalMask(10, FRAME_SEQLEN, frames_per_block=2, **window)
    with torch.no_grad():
        expected = with_dense_mask(model, mask)(**inputs).sample
        ours = accelerate(copy.deepcopy(model).to(dtype))
        inputs = {name: value.to(dtype) for name, value in inputs.items()}
        cache = make_kv_cache(ours, inputs["hidden_states"].shape, **window)
        actual = generate(ours, cache, inputs, frames_per_block=2)
        if dtype == torch.float32:
            assert_close(actual, expected, MODEL_TOLERANCE)
        else:
            theirs = with_dense_mask(model, mask).to(dtype)(**inputs).sample
            assert_as_accurate(actual, theirs, expected)
    assert cache.num_frames == 10


def test_cache_in_autocast():
    model = accelerate(make_model())
    inputs = make_inputs(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = make_kv_cache(model, inputs["hidden_states"].shape)
        assert cache.dtype == torch.bfloat16
        actual = generate(model, cache, inputs, frames_per_block=3)
        expected = accelerate(model, BlockCausalMask(FRAMES, FRAME_SEQLEN, frames_per_block=3))(**inputs).sample
    assert_close(actual, expected, torch.finfo(torch.bfloat16).eps)


def test_cache_takes_the_place_of_a_mask():
    model = make_model()
    inputs = make_inputs(model, frames=2)
    with torch.no_grad():
        block = inputs.values()
        expected = model(*block).sample
        accelerate(model, BlockCausalMask(FRAMES, FRAME_SEQLEN, teacher_forcing=True))
        cache = make_kv_cache(model, inputs["hidden_states"].shape)
        assert_close(forward_with_cache(model, cache, *block), expected, MODEL_TOLERANCE)


def test_gradient_checkpointing_sees_the_cache_as_it_was():
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = accelerate(copy.deepcopy(original))
        if checkpointing:
            model.enable_gradient_checkpointing()
        cache = make_kv_cache(model, inputs["hidden_states"].shape, window_frames=3)
        flows = []
        for x in inputs["hidden_states"].split(2, dim=2):
            block = x, inputs["timestep"], inputs["encoder_hidden_states"]
            flows.append(forward_with_cache(model, cache, *block))
            with torch.no_grad():
                forward_with_cache(model, cache, *block, commit=True)
        torch.cat(flows, dim=2).square().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    original = make_model()
    inputs = make_inputs(original)
    for kept, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert_close(recomputed, kept, GRADIENT_TOLERANCE)


def test_commit_is_refused_where_checkpointing_would_repeat_it():
    model = accelerate(make_model())
    model.enable_gradient_checkpointing()
    inputs = make_inputs(model, frames=1)
    cache = make_kv_cache(model, inputs["hidden_states"].shape)
    with pytest.raises(ValueError, match=r"commit is True, but gradient checkpointing"):
        forward_with_cache(model, cache, *inputs.values(), commit=True)
    assert cache.num_frames == 0


def test_a_failed_call_leaves_model_and_cache_as_they_were():
    model = accelerate(make_model())
    inputs = make_inputs(model, frames=2)
    cache = make_kv_cache(model, inputs["hidden_states"].shape, max_frames=1)
    with torch.no_grad():
        expected = model(**inputs).sample
        with pytest.raises(ValueError, match="max_frames is 1"):
            forward_with_cache(model, cache, *inputs.values(), commit=True)
        assert cache.num_frames == 0
        assert torch.equal(model(**inputs).sample, expected)


def test_weights_that_a_hook_loads_on_demand():
    model = accelerate(make_model())
    inputs = make_inputs(model)
    with torch.no_grad():
        expected = model(**inputs).sample
        accelerate_library.cpu_offload(model, torch.device("cpu"))
        assert model.blocks[0].attn1.norm_q.weight.is_meta
        assert_close(model(**inputs).sample, expected, MODEL_TOLERANCE)
        cache = make_kv_cache(model, inputs["hidden_states"].shape, device="cpu")
        assert_close(forward_with_cache(model, cache, *inputs.values(), commit=True), expected, MODEL_TOLERANCE)


def test_restore_and_state_dict(tmp_path):
    model = make_model()
    inputs = make_inputs(model)
    names, processors, rope = list(model.state_dict()), model.attn_processors, model.rope
    expected = model(**inputs).sample
    assert accelerate(model) is model
    accelerate(model, BlockCausalMask(FRAMES, FRAME_SEQLEN))
    assert is_accelerated(model)
    assert list(model.state_dict()) == names

    model.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path)
    assert not is_accelerated(loaded)
    assert torch.equal(loaded(**inputs).sample, expected)

    assert restore(model) is model
    assert restore(model) is model  # nothing left to undo
    assert not is_accelerated(model)
    assert model.rope is rope
    assert model.attn_processors == processors
    assert torch.equal(model(**inputs).sample, expected)


def test_compiled_rollout_takes_two_graphs():
    """One reads the cache, one writes it too; neither depends on the position or on the cache."""
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    model = accelerate(make_model(num_layers=1))
    compiled = torch.compile(model, fullgraph=True, backend=count)
    inputs = make_inputs(model, frames=10)
    with torch.no_grad():
        caches = [make_kv_cache(model, inputs["hidden_states"].shape, window_frames=4) for _ in range(3)]
        expected = generate(model, caches[0], inputs, frames_per_block=2)
        for cache in caches[1:]:
            assert_close(generate(compiled, cache, inputs, frames_per_block=2), expected, MODEL_TOLERANCE)
    assert len(graphs) == 2


def test_errors_name_what_is_wrong():
    model = make_model()
    with pytest.raises(TypeError, match="transformer is a Linear, but must be a WanTransformer3DModel"):
        accelerate(nn.Linear(1, 1))
    with pytest.raises(TypeError, match="mask is a Tensor, but must be a BlockCausalMask or None"):
        accelerate(model, torch.ones(2, 2))
    with pytest.raises(ValueError, match="transformer has head dim 12, but must have a multiple of 8"):
        accelerate(make_model(attention_head_dim=12))
    parallel = make_model()
    parallel._parallel_config = SimpleNamespace(context_parallel_config="given")  # by enable_parallelism
    with pytest.raises(ValueError, match="transformer is under context parallelism"):
        accelerate(parallel)
    with pytest.raises(ValueError, match="transformer is under context parallelism"):
        SelfForcingAttnProcessor()._parallel_config = "given"
    assert not is_accelerated(parallel)

    inputs = make_inputs(model)
    double = accelerate(make_model().double())
    with pytest.raises(TypeError, match="float64, but must be float32, bfloat16 or float16"):
        double(**{name: value.double() for name, value in inputs.items()})
    cache = make_kv_cache(model, inputs["hidden_states"].shape)
    with pytest.raises(ValueError, match="transformer is not accelerated"):
        forward_with_cache(model, cache, *inputs.values())

    accelerate(model, BlockCausalMask(FRAMES - 1, FRAME_SEQLEN))
    with pytest.raises(ValueError, match="hidden_states has 6 frames of 12 tokens, but the mask has 5 frames of 12"):
        model(**inputs)
    accelerate(model, BlockCausalMask(FRAMES, FRAME_SEQLEN, teacher_forcing=True))
    with pytest.raises(ValueError, match="but the mask has 2 x 6 frames of 12"):
        model(**inputs)
    hidden = torch.randn(1, FRAME_SEQLEN, HEADS * HEAD_DIM)
    with pytest.raises(ValueError, match="attention_mask is given, but must be None"):
        model.blocks[0].attn2(hidden, hidden, attention_mask=torch.ones(1, 1, FRAME_SEQLEN, FRAME_SEQLEN))
