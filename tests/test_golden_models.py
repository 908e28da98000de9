"""Model forwards, gradients and cached calls against the published implementation."""

import pytest
import torch
from golden_files import (
    BACKENDS,
    assert_gradients_near,
    assert_near,
    case,
    load,
    model,
    parameters,
    wide_model,
)

from python_ref.models.wan import CausalWanModel, WanModel
from selfforcing_ext.mask import BlockCausalMask

MODELS = ["model_a", "model_b"]
CACHES = ["full", "rolling", "rolling_sink", "first_frame"]
WIDE_FORWARDS = sorted(name for name in parameters("wide/c_train_forward")["cases"] if not name.startswith("wide"))
WIDE_CACHES = sorted(
    name
    for name, entry in parameters("wide/c_kv_inference")["cases"].items()
    # A window without eviction shows its queries no sink in the published code: see the test of its own below.
    if entry["model"] == "c_small" and not name.startswith("window_only")
)


def load_model(kind, name, backend):
    prefix = "params."
    weights = {key[len(prefix) :]: tensor for key, tensor in load(name).items() if key.startswith(prefix)}
    return model(kind, name, weights, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_causal_forward(name, backend):
    entry, tensors = parameters(name), load(name)
    causal = load_model(CausalWanModel, name, backend)
    x, t, context = tensors["x"], tensors["timestep"], tensors["context"]
    sizes = (x.shape[1], entry["frame_seqlen"], entry["num_frame_per_block"])

    flow = causal(x, t, context, mask=BlockCausalMask(*sizes))
    assert_near(flow, tensors["block_causal.flow_pred"])
    flow.backward(tensors["grad_out"])
    assert_gradients_near(causal, tensors, "block_causal.grad.")

    with torch.no_grad():
        window = BlockCausalMask(*sizes, window_frames=entry["local_window_frames"])
        assert_near(causal(x, t, context, mask=window), tensors["local_window.flow_pred"])
        frames = entry["first_frame_alone_num_frames"]
        alone = BlockCausalMask(frames, *sizes[1:], first_frame_alone=True)
        assert_near(causal(x[:, :frames], t[:, :frames], context, mask=alone), tensors["first_frame_alone.flow_pred"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_teacher_forcing(name, backend):
    entry, tensors = parameters(name), load(name)
    causal = load_model(CausalWanModel, name, backend)
    arguments = tensors["x"], tensors["timestep"], tensors["context"]
    frames, clean_x = tensors["x"].shape[1], tensors["clean_x"]
    mask = BlockCausalMask(frames, entry["frame_seqlen"], entry["num_frame_per_block"], teacher_forcing=True)
    flow = causal(*arguments, mask=mask, clean_x=clean_x, clean_t=tensors["aug_t"])
    assert_near(flow, tensors["teacher_forcing.flow_pred"])
    assert_near(causal(*arguments, mask=mask, clean_x=clean_x), tensors["teacher_forcing.flow_pred_no_aug"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_bidirectional_forward(name, backend):
    tensors = load(name)
    flow = load_model(WanModel, name, backend)(tensors["x"], tensors["timestep"][:, 0], tensors["context"])
    assert_near(flow, tensors["bidirectional.flow_pred"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cached", CACHES)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_cached_calls(name, cached, backend):
    entry, tensors = parameters(f"{name}_cache_{cached}"), load(f"{name}_cache_{cached}")
    causal = load_model(CausalWanModel, name, backend)
    blocks = entry.get("frames_per_call") or [entry["num_frame_per_block"]] * entry["num_blocks"]
    window = entry.get("local_attn_size", -1)
    cache = causal.make_cache(
        tensors["call.0.0.x"].shape, sum(blocks), None if window == -1 else window, entry.get("sink_size", 0)
    )
    for block in range(len(blocks)):
        for step, timestep in enumerate(entry["timesteps"]):
            x = tensors[f"call.{block}.{step}.x"]
            t = torch.full(x.shape[:2], timestep)
            is_clean_pass = step + 1 == len(entry["timesteps"])
            flow = causal(x, t, tensors["context"], cache=cache, commit=is_clean_pass)
            assert_near(flow, tensors[f"call.{block}.{step}.flow_pred"], name=f"call {block}.{step}")


def frames_second(tensor):
    """[B, C, F, H, W] as the published model takes it, to [B, F, C, H, W]."""
    return tensor.transpose(1, 2)


def context_of(tensors, text_len):
    """Contexts of unequal length are padded with zeros, which are attended like text."""
    if "context" in tensors:
        return tensors["context"]
    texts = [tensors[key] for key in sorted(tensors) if key.startswith("context_")]
    return torch.stack([torch.nn.functional.pad(text, (0, 0, 0, text_len - len(text))) for text in texts])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WIDE_FORWARDS)
def test_wide_forward(name, backend):
    entry, tensors = parameters("wide/c_train_forward")["cases"][name], case("wide/c_train_forward", name)
    causal = wide_model(CausalWanModel, entry["model"], backend)
    mask = BlockCausalMask(
        entry["F"],
        entry["frame_seqlen"],
        entry["num_frame_per_block"],
        window_frames=None if entry["local_attn_size"] == -1 else entry["local_attn_size"],
        first_frame_alone=entry["independent_first_frame"],
        teacher_forcing=entry["teacher_forcing"],
    )
    x = frames_second(tensors["x"]).requires_grad_()
    clean_x = frames_second(tensors["clean_x"]).requires_grad_() if entry["teacher_forcing"] else None
    flow = causal(
        x,
        tensors["t"],
        context_of(tensors, causal.config.text_len),
        mask=mask,
        clean_x=clean_x,
        clean_t=tensors.get("aug_t"),
    )
    assert_near(frames_second(flow), tensors["out"])
    flow.backward(frames_second(tensors["w"]))
    assert_near(frames_second(x.grad), tensors["grad_x"], name="grad_x")
    if clean_x is not None:
        assert_near(frames_second(clean_x.grad), tensors["grad_clean_x"], name="grad_clean_x")
    assert_gradients_near(causal, tensors, "grad.")


@torch.no_grad()
def check_wide_cache(name, backend, sink_frames):
    entry, tensors = parameters("wide/c_kv_inference")["cases"][name], case("wide/c_kv_inference", name)
    causal = wide_model(CausalWanModel, entry["model"], backend)
    window = entry["local_attn_size"]
    shape = frames_second(tensors["call00.x"]).shape
    cache = causal.make_cache(shape, sum(entry["blocks"]), None if window == -1 else window, sink_frames)
    encoded = causal.encode_context(tensors["context"])
    for call in range(entry["num_calls"]):
        x, t, out = (tensors[f"call{call:02}.{key}"] for key in ("x", "t", "out"))
        is_clean_pass = (call + 1) % len(entry["steps"]) == 0
        flow = causal(frames_second(x), t, encoded, cache=cache, commit=is_clean_pass)
        assert_near(frames_second(flow), out, name=f"call {call}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WIDE_CACHES)
def test_wide_cached_calls(name, backend):
    check_wide_cache(name, backend, parameters("wide/c_kv_inference")["cases"][name]["sink_size"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_wide_window_in_a_larger_cache(backend):
    """Where its cache is larger than the window, the published code ignores the sink."""
    check_wide_cache("window_only_local4_sink1_bigcache", backend, sink_frames=0)
