"""Checkpoints with the names that Wan2.1 and Self-Forcing publish, made here, go into our models strictly."""

import json

import published_wan
import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import save_file

from python_ref.models.discriminator import Discriminator
from python_ref.models.wan import CausalWanModel, WanConfig, WanModel
from python_ref.published.weights import load_published, parts_of, read_published

SIZES = {
    "dim": 24, "num_heads": 2, "num_layers": 2, "ffn_dim": 32, "freq_dim": 8, "text_dim": 6, "text_len": 5,
    "in_dim": 4, "out_dim": 4,
}  # fmt: skip


def ours(kind=WanModel):
    return kind(WanConfig(**SIZES), backend="reference")


def published(seed=0, kind=published_wan.WanModel):
    torch.manual_seed(seed)
    model = kind(**SIZES)
    torch.nn.init.normal_(model.head.head.weight)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def wrapped(state, prefix="model."):
    """As FSDP with activation checkpointing names a wrapper's weights."""
    names = {
        name: prefix + "_fsdp_wrapped_module." + name.replace(".self_attn", "._checkpoint_wrapped_module.self_attn", 1)
        for name in state
    }
    return {names[name]: tensor for name, tensor in state.items()}


def assert_holds(model, state):
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def write_shards(folder, state, suffix=".safetensors"):
    names = sorted(state)
    shards = {f"part-{number}{suffix}": names[number::3] for number in range(3)}
    for file, held in shards.items():
        tensors = {name: state[name].contiguous() for name in held}
        save_file(tensors, folder / file) if suffix == ".safetensors" else torch.save(tensors, folder / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    index = folder / f"diffusion_model{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize(
    ("kind", "theirs"), [(WanModel, published_wan.WanModel), (CausalWanModel, published_wan.CausalWanModel)]
)
def test_one_safetensors_file(kind, theirs, tmp_path):
    state = published(kind=theirs)
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    for path in (tmp_path, tmp_path / "diffusion_pytorch_model.safetensors"):
        model = ours(kind)
        load_published(model, path)
        assert_holds(model, state)


def test_a_loaded_model_computes_what_the_published_one_does(tmp_path):
    torch.manual_seed(0)
    theirs = published_wan.WanModel(**SIZES)
    torch.nn.init.normal_(theirs.head.head.weight)
    torch.save(theirs.state_dict(), tmp_path / "model.pt")
    model = ours()
    load_published(model, tmp_path / "model.pt")
    x, t, context = torch.randn(2, 3, 4, 4, 6), torch.tensor([30.0, 800.0]), torch.randn(2, 5, 6)
    expected = theirs(x.transpose(1, 2), t, context, seq_len=18).transpose(1, 2)
    torch.testing.assert_close(model(x, t, context), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards(suffix, tmp_path):
    state = published()
    index = write_shards(tmp_path, state, suffix)
    for path in (tmp_path, index):
        model = ours()
        load_published(model, path)
        assert_holds(model, state)
    (tmp_path / f"part-1{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match="part-1"):
        load_published(ours(), index)


def test_a_shard_that_is_not_as_the_index_says(tmp_path):
    index = write_shards(tmp_path, published())
    found = json.loads(index.read_text())
    found["weight_map"]["head.extra"] = "part-1.safetensors"
    index.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"part-1\.safetensors does not hold .*: head\.extra"):
        load_published(ours(), index)
    index.write_text("{}")
    with pytest.raises(ValueError, match="weight_map"):
        load_published(ours(), index)


@pytest.mark.parametrize("part", ["generator", "generator_ema", "critic"])
def test_the_models_of_a_trainers_file(part, tmp_path):
    states = {name: published(seed) for seed, name in enumerate(("generator", "generator_ema", "critic"))}
    torch.save({name: wrapped(state) for name, state in states.items()} | {"step": 600}, tmp_path / "model.pt")
    assert parts_of(read_published(tmp_path)) == ["critic", "generator", "generator_ema"]
    model = ours(CausalWanModel)
    load_published(model, tmp_path / "model.pt", part)
    assert_holds(model, states[part])


@pytest.mark.parametrize("prefix", ["", "model.", "module.model.", "generator.model.", "_orig_mod."])
def test_prefixes(prefix, tmp_path):
    """Of one model, its part need not be named."""
    state = published()
    save_file({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "x.safetensors")
    model = ours()
    load_published(model, tmp_path / "x.safetensors")
    assert_holds(model, state)


def test_a_nested_single_model(tmp_path):
    state = published()
    for nesting in ({"model": state}, {"generator": wrapped(state), "step": 3}):
        torch.save(nesting, tmp_path / "x.pt")
        model = ours()
        load_published(model, tmp_path / "x.pt")
        assert_holds(model, state)


def test_a_discriminator_keeps_what_stands_beside_the_model(tmp_path):
    discriminator = Discriminator(ours(), layers=(0, 1))
    torch.nn.init.normal_(discriminator.model.head.head.weight)
    state = {name: tensor.clone() for name, tensor in discriminator.state_dict().items()}
    torch.save({"critic": wrapped(state, prefix=""), "generator": published()}, tmp_path / "x.pt")
    other = Discriminator(ours(), layers=(0, 1))
    load_published(other, tmp_path / "x.pt", "critic")
    assert_holds(other, state)
    with pytest.raises(ValueError, match=r"unexpected: _cls_pred_branch\.0\.bias.* and \d+ more"):
        load_published(ours(), tmp_path / "x.pt", "critic")


@pytest.mark.parametrize(("heads", "layers", "ffn"), [(12, 30, 8960), (40, 40, 13824)])
def test_names_and_shapes_are_those_that_diffusers_converts(heads, layers, ffn):
    """Of the models of 1.3B and 14B parameters: what diffusers makes of our names is all that its model has."""
    with torch.device("meta"):
        state = WanModel(WanConfig(128 * heads, heads, layers, ffn), backend="reference").state_dict()
        theirs = WanTransformer3DModel(num_attention_heads=heads, num_layers=layers, ffn_dim=ffn).state_dict()
    converted = convert_wan_transformer_to_diffusers(state)
    assert {name: tensor.shape for name, tensor in converted.items()} == {n: t.shape for n, t in theirs.items()}


def test_a_model_saved_by_diffusers(tmp_path):
    torch.manual_seed(0)
    theirs = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, ffn_dim=32, freq_dim=8, text_dim=6, in_channels=4,
        out_channels=4,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")  # several files and an index
    model = ours()
    load_published(model, tmp_path)
    x, t, context = torch.randn(2, 3, 4, 4, 6), torch.tensor([30.0, 800.0]), torch.randn(2, 5, 6)
    expected = theirs(x.transpose(1, 2), t, context, return_dict=False)[0].transpose(1, 2)
    torch.testing.assert_close(model(x, t, context), expected, rtol=1e-4, atol=1e-5)
    back = convert_wan_transformer_to_diffusers(model.state_dict())
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.state_dict().items())


def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path):
    state = published()
    state["blocks.0.img_emb.weight"] = torch.zeros(2)
    del state["head.modulation"]
    state["time_embedding.0.weight"] = torch.zeros(24, 10)
    save_file(state, tmp_path / "x.safetensors")
    model = ours()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit") as caught:
        load_published(model, tmp_path / "x.safetensors")
    message = str(caught.value)
    assert "missing: head.modulation" in message
    assert "unexpected: blocks.0.img_emb.weight" in message
    assert "time_embedding.0.weight [24, 10] (the model: [24, 8])" in message
    assert_holds(model, before)


def test_parts_that_are_not_there(tmp_path):
    torch.save({"generator": published(), "critic": published()}, tmp_path / "two.pt")
    torch.save(published(), tmp_path / "one.pt")
    with pytest.raises(ValueError, match=r"several models; accepted: \['critic', 'generator'\]"):
        load_published(ours(), tmp_path / "two.pt")
    with pytest.raises(ValueError, match=r"'generator_ema'.*accepted: \['critic', 'generator'\]"):
        load_published(ours(), tmp_path / "two.pt", "generator_ema")
    with pytest.raises(ValueError, match="accepted: None"):
        load_published(ours(), tmp_path / "one.pt", "generator")


def test_files_that_are_no_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_published(ours(), tmp_path / "nothing.pt")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        load_published(ours(), tmp_path)
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"holds no patch_embedding\.weight"):
        load_published(ours(), tmp_path / "other.pt")
    torch.save(published_wan.WanModel(**SIZES), tmp_path / "pickled.pt")  # a module, which only arbitrary code rebuilds
    with pytest.raises(ValueError, match="weights_only=True"):
        load_published(ours(), tmp_path / "pickled.pt")
    (tmp_path / "broken.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="cannot be read"):
        load_published(ours(), tmp_path / "broken.pt")
    with pytest.raises(ValueError, match=r"broken\.pt, other\.pt, pickled\.pt; accepted: the path of one"):
        load_published(ours(), tmp_path)
