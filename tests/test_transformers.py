"""Models of Hugging Face transformers with our attention: the numbers of their own attention."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from compare import assert_as_accurate, assert_close, assert_same_bits
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_block_mask

from selfforcing_ext import BlockCausalMask

transformers = pytest.importorskip("transformers")

from selfforcing_ext.integrations.transformers import attention_forward, block_causal, register  # noqa: E402

register()

#: What the releases call the argument.
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaModel.forward).parameters else "past_key_values"
TOLERANCE = 5e-6  # of float32 models, relative to the same model with eager attention
VOCABULARY = 50
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def llama(implementation: str, **changes) -> nn.Module:
    config = transformers.LlamaConfig(**DECODER | changes)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)


def qwen2(implementation: str, **changes) -> nn.Module:
    """Full attention in the first layer, a window of 7 tokens in the others."""
    windows = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
    config = transformers.Qwen2Config(**DECODER | windows | changes)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)


def bert(implementation: str) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
    )
    return transformers.AutoModel.from_config(config, attn_implementation=implementation)


def vit(implementation: str) -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
    )
    return transformers.AutoModel.from_config(config, attn_implementation=implementation)


def pair(make, **changes) -> tuple[nn.Module, nn.Module]:
    """One model twice: with our attention, and with eager attention."""
    mine = make("selfforcing", **changes)
    eager = copy.deepcopy(mine)
    eager.set_attn_implementation("eager")
    assert mine.config._attn_implementation == "selfforcing"
    return mine.eval(), eager.eval()


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length))


def result(model: nn.Module, *args, **kwargs) -> Tensor:
    output = model(*args, **kwargs)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def assert_same_training(mine: nn.Module, eager: nn.Module, run) -> None:
    """Outputs and the gradients of all parameters."""
    out, wanted = run(mine), run(eager)
    assert_close(out, wanted, TOLERANCE, "output")
    weight = torch.randn_like(out)
    for output in (out, wanted):
        (output * weight).sum().backward()
    parameters = dict(eager.named_parameters())
    checked = 0
    for name, parameter in mine.named_parameters():
        true = parameters[name].grad
        if true is None:  # the pooler of an encoder
            assert parameter.grad is None
        elif true.norm() > 1e-3:  # the bias of keys has no gradient but rounding: it cancels in the softmax
            assert_close(parameter.grad, true, 20 * TOLERANCE, f"gradient of {name}")
            checked += 1
    assert checked > 10


@pytest.mark.parametrize("make", [llama, qwen2, bert], ids=["llama", "qwen2", "bert"])
def test_language_models(make):
    mine, eager = pair(make)
    ids = tokens(2, 40)
    assert_same_training(mine, eager, lambda model: result(model, ids))
    ones = torch.ones_like(ids)
    assert_same_bits(result(mine, ids, attention_mask=ones), result(mine, ids))


def test_vision_transformer():
    mine, eager = pair(vit)
    pixels = torch.randn(2, 3, 32, 32)
    assert_same_training(mine, eager, lambda model: result(model, pixels))


SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
BART = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}


def other(name: str, **settings) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**settings)
    return transformers.AutoModel.from_config(config, attn_implementation="selfforcing")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("GPT2", {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4} | SPECIAL_TOKENS),
        ("Mistral", DECODER | {"sliding_window": 5}),
        ("Gemma3Text", DECODER | {"sliding_window": 5, "head_dim": 16}),  # windows in some layers
        ("ModernBert", {"vocab_size": VOCABULARY, "local_attention": 8} | SMALL | SPECIAL_TOKENS),  # windows both ways
        ("Bart", {"vocab_size": VOCABULARY} | BART),  # an encoder, a decoder, and attention between them
        ("CLIPVision", {"image_size": 32, "patch_size": 8} | SMALL),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_architectures(name, settings):
    mine, eager = pair(lambda implementation: other(name, **settings))
    arguments = {"pixel_values": torch.randn(2, 3, 32, 32)} if name == "CLIPVision" else {"input_ids": tokens(2, 20)}
    if name == "Bart":
        arguments["decoder_input_ids"] = tokens(2, 13)
    with torch.no_grad():
        assert_close(result(mine, **arguments), result(eager, **arguments), TOLERANCE)


@pytest.mark.parametrize(
    ("name", "settings", "what"),
    [
        ("Gemma2", DECODER | {"head_dim": 16}, "softcap"),
        ("GptOss", DECODER | {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}, "s_aux"),
        ("T5", {"vocab_size": VOCABULARY} | T5, "position_bias"),
    ],
    ids=["Gemma2", "GptOss", "T5"],
)
def test_architectures_that_ask_for_more(name, settings, what):
    model = other(name, **settings).eval()
    arguments = {"decoder_input_ids": tokens(1, 13)} if name == "T5" else {}
    with pytest.raises(ValueError, match=f"this model's attention uses {what}, which spans do not have; use attn_impl"):
        model(tokens(1, 20), **arguments)


def test_low_precision_is_as_good_as_sdpa():
    exact = bert("eager").eval()
    mine, sdpa = (copy.deepcopy(exact).to(torch.bfloat16) for _ in range(2))
    mine.set_attn_implementation("selfforcing")
    sdpa.set_attn_implementation("sdpa")
    ids = tokens(2, 64)
    assert_as_accurate(result(mine, ids), result(sdpa, ids), result(exact, ids))


@pytest.mark.parametrize("make", [llama, qwen2], ids=["llama", "qwen2"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(make, cache):
    mine, eager = pair(make)
    ids = tokens(2, 12)
    settings = {
        "max_new_tokens": 15,
        "do_sample": False,
        "cache_implementation": cache,
        "disable_compile": True,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    out, wanted = (model.generate(ids, **settings) for model in (mine, eager))
    assert torch.equal(out.sequences, wanted.sequences)
    assert_close(torch.stack(out.logits), torch.stack(wanted.logits), TOLERANCE)


def test_prefill_in_two_pieces():
    mine, eager = pair(llama)
    ids = tokens(2, 30)
    outs = []
    for model in (mine, eager):
        cache = transformers.DynamicCache(config=model.config)
        arguments = {CACHE: cache, "use_cache": True}
        result(model, ids[:, :17], **arguments)
        outs.append(result(model, ids[:, 17:], **arguments))
    assert_close(outs[0], outs[1], TOLERANCE)
    assert_close(outs[0], result(eager, ids)[:, 17:], TOLERANCE)


def test_packed_sequences():
    """Position ids that start again: every sequence is alone."""
    mine, eager = pair(llama)
    ids = tokens(1, 30)
    positions = torch.cat([torch.arange(11), torch.arange(19)])[None]
    out = result(mine, ids, position_ids=positions, use_cache=False)
    assert_close(out, result(eager, ids, position_ids=positions, use_cache=False), TOLERANCE)
    assert_close(out[:, 11:], result(eager, ids[:, 11:]), TOLERANCE)


def test_padding():
    mine, eager = pair(llama)
    ids = tokens(2, 20)
    alike = torch.ones_like(ids)
    alike[:, :6] = 0
    out, wanted = (result(model, ids, attention_mask=alike) for model in (mine, eager))
    assert_close(out[:, 6:], wanted[:, 6:], TOLERANCE)
    unlike = torch.ones_like(ids)
    unlike[1, :6] = 0
    with pytest.raises(
        ValueError,
        match="all sequences of a batch must see alike, but query 0 sees key 0 in only one of the sequences",
    ):
        mine(ids, attention_mask=unlike)


MASKS = (
    BlockCausalMask(6, 5, 2),
    BlockCausalMask(7, 4, 2, first_frame_alone=True, window_frames=4, sink_frames=1),
    BlockCausalMask(4, 4, 2, teacher_forcing=True),
)


def as_eager_mask(mask: BlockCausalMask) -> Tensor:
    """Additive, [1, 1, L, L]: what transformers takes from a caller who makes a mask of his own."""
    return torch.where(mask.dense(), 0.0, torch.finfo(torch.float32).min)[None, None]


@pytest.mark.parametrize("make", [llama, qwen2, bert], ids=["llama", "qwen2", "bert"])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_block_causal(make, mask):
    mine, eager = pair(make)
    ids, dense = tokens(2, mask.seqlen), as_eager_mask(mask)
    if make is qwen2:
        dense = dict.fromkeys(("full_attention", "sliding_attention"), dense)

    def run(model: nn.Module) -> Tensor:
        if model is eager:
            return result(model, ids, attention_mask=dense)
        with block_causal(mask):
            return result(model, ids)

    assert_same_training(mine, eager, run)
    if make is not bert:
        assert not torch.allclose(run(mine), result(mine, ids), atol=1e-3), "the mask changed nothing"


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")  # the new name came with 5.24
def test_block_causal_with_checkpointed_layers():
    mask = MASKS[0]
    plain = llama("selfforcing").train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable()
    ids = tokens(1, mask.seqlen)
    for model in (plain, checkpointed):
        with block_causal(mask):
            out = result(model, ids, use_cache=False)
        out.square().sum().backward()  # recomputes outside
    for mine, true in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        assert_same_bits(mine.grad, true.grad)


def test_block_causal_prefill_then_tokens():
    """generate(): the prompt goes by the mask, new tokens see all before them."""
    mine, eager = pair(llama)
    mask = MASKS[0]
    ids = tokens(2, mask.seqlen)
    settings = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with block_causal(mask):
        out = mine.generate(ids, **settings)
    sequence = out.sequences
    visible = torch.ones(sequence.shape[1], sequence.shape[1], dtype=torch.bool).tril()
    visible[: mask.seqlen, : mask.seqlen] = mask.dense()
    dense = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]
    wanted = result(eager, sequence, attention_mask=dense)[:, mask.seqlen - 1 : -1]
    assert_close(torch.stack(out.logits, dim=1), wanted, TOLERANCE)


def test_flex_attention_masks():
    mine, eager = pair(llama)
    mask = MASKS[1]
    dense = mask.dense()
    block_mask = create_block_mask(lambda b, h, q, k: dense[q, k], None, None, *dense.shape, device="cpu")
    ids = tokens(2, mask.seqlen)
    out = result(mine, ids, attention_mask=block_mask)
    assert_close(out, result(eager, ids, attention_mask=as_eager_mask(mask)), TOLERANCE)


@torch.no_grad()
def test_compiled():
    torch._dynamo.reset()
    model = llama("selfforcing", num_hidden_layers=1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda ids: result(model, ids), backend=counter, fullgraph=True)
    ids = tokens(2, 24)
    own = result(model, ids)
    for _ in range(2):
        assert_close(compiled(ids), own, TOLERANCE)
        for mask in (BlockCausalMask(6, 4, 2), BlockCausalMask(6, 4, 3)):
            with block_causal(mask):
                assert_close(compiled(ids), result(model, ids), TOLERANCE)
    assert counter.frame_count <= 3  # without block_causal, with it, and with symbols for the sizes of tables


def test_compiled_training_breaks_where_the_mask_is_read():
    """Without a cache, transformers asks position ids for packed sequences: values that no graph can know."""
    torch._dynamo.reset()
    model = llama("selfforcing", num_hidden_layers=1)
    ids = tokens(2, 24)
    counter = CompileCounterWithBackend("aot_eager")
    out = torch.compile(lambda ids: result(model, ids, use_cache=False), backend=counter)(ids)
    assert_close(out, result(model, ids, use_cache=False), TOLERANCE)
    assert counter.frame_count >= 2


def test_switching_an_existing_model():
    model = llama("sdpa").eval()
    ids = tokens(1, 20)
    wanted = result(model, ids)
    model.set_attn_implementation("selfforcing")
    assert_close(result(model, ids), wanted, TOLERANCE)


def test_slow_masks_warn():
    """Sliding windows and packed sequences have a block for every token; whole causal sequences are left to torch."""
    model = qwen2("selfforcing").eval()
    with pytest.warns(UserWarning, match=r"the mask has 1\.0 queries per block"):
        model(tokens(1, 300))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(tokens(1, 200))
        llama("selfforcing").eval()(tokens(1, 300))


def test_models_without_a_mask_go_by_their_layers():
    """Layers that are called without a mask: causal if they say so."""
    query, key = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    layer = nn.Module()
    layer.is_causal = True
    causal = nn.functional.scaled_dot_product_attention(query, key, key, is_causal=True)
    full = nn.functional.scaled_dot_product_attention(query, key, key)
    for is_causal, wanted in ((None, causal), (True, causal), (False, full)):
        out, weights = attention_forward(layer, query, key, key, None, is_causal=is_causal)
        assert_close(out.transpose(1, 2), wanted, TOLERANCE)
        assert weights is None
    last, _ = attention_forward(layer, query[:, :, -1:], key, key, None)
    assert_close(last.transpose(1, 2), causal[:, :, -1:], TOLERANCE)


def test_what_spans_cannot_do_is_refused():
    model = llama("selfforcing", attention_dropout=0.1)
    ids = tokens(2, 12)
    with pytest.raises(ValueError, match=r"dropout is 0\.1, but must be 0: set the attention dropout"):
        model.train()(ids)
    model.eval()
    with pytest.raises(TypeError, match=r"attention_mask is a Tensor made by the caller .* inside block_causal"):
        model(ids, attention_mask=torch.zeros(2, 1, 12, 12))
    query = torch.randn(1, 2, 9, 8)
    with pytest.raises(ValueError, match="output_attentions is True, but there are no attention weights"):
        attention_forward(model, query, query, query, None, output_attentions=True)


def test_block_causal_says_what_it_needs():
    mask = MASKS[0]
    model = llama("selfforcing").eval()
    with pytest.raises(TypeError, match="mask is a Tensor, but must be a BlockCausalMask"), block_causal(mask.dense()):
        pass
    with (
        block_causal(mask),
        pytest.raises(
            ValueError, match=r"tokens 0 to 12 with room for 12 keys, but inside block_causal .* all 30 tokens"
        ),
    ):
        model(tokens(1, 12))
    with pytest.raises(RuntimeError, match="no model inside block_causal asked for a mask"), block_causal(mask):
        llama("eager").eval()(tokens(1, 12))
    with (
        pytest.raises(RuntimeError, match="active already"),
        block_causal(mask),
        block_causal(mask),
    ):
        pass
    with pytest.raises(ZeroDivisionError), block_causal(mask):
        raise ZeroDivisionError
    assert_close(result(model, ids := tokens(1, 12)), result(model, ids), 0)  # the mask is gone after an error
    encoder_decoder = transformers.BartConfig(vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=1)
    bart = transformers.AutoModel.from_config(encoder_decoder, attn_implementation="selfforcing").eval()
    with block_causal(mask), pytest.raises(ValueError, match="an encoder with a decoder"):
        bart(tokens(1, 30))


def test_the_package_does_without_transformers():
    code = "import sys; sys.modules['transformers'] = None\nimport selfforcing_ext.integrations.flex_attention"
    code += "\nfor name in selfforcing_ext.__all__: getattr(selfforcing_ext, name)"
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_example():
    example = Path(__file__).parents[1] / "examples" / "transformers_attention.py"
    result = subprocess.run([sys.executable, example], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for promised in ("Llama, block-causal", "ViT: difference"):
        assert promised in result.stdout
