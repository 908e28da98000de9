"""The streaming pipeline of diffusers' parts against Self-Forcing's published inference, with its weights and noise."""

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from golden_files import assert_near, files, load, parameters, replay
from torch import Tensor

from selfforcing_ext.integrations import diffusers_pipeline
from selfforcing_ext.integrations.diffusers_pipeline import SelfForcingWanPipeline

# Without a first frame or image of its own. Steps that are not warped fall between the published table's noise levels,
# and the published code takes the nearest; diffusers' scheduler takes them as they are.
INFERENCES = [
    name
    for name in files("wide/g_inference/")
    if not parameters(name)["args"]["independent_first_frame"]
    and "init" not in parameters(name)["params"]
    and "nowarp" not in name
]


def make_transformer(config: dict[str, int], weights: dict[str, Tensor]) -> WanTransformer3DModel:
    """The published model's weights under diffusers' names."""
    model = WanTransformer3DModel(
        num_attention_heads=config["num_heads"],
        attention_head_dim=config["dim"] // config["num_heads"],
        in_channels=config["in_dim"],
        out_channels=config["out_dim"],
        **{name: config[name] for name in ("text_dim", "freq_dim", "ffn_dim", "num_layers")},
    )
    model.load_state_dict(convert_wan_transformer_to_diffusers(dict(weights)), strict=True)
    return model


@pytest.mark.parametrize("name", INFERENCES)
def test_published_inference(name, monkeypatch):
    entry, tensors = parameters(name), load(name)
    transformer = make_transformer(
        parameters(f"wide/models/{entry['model']}")["config"], load(f"wide/models/{entry['model']}")
    )
    block, steps = entry["args"]["num_frame_per_block"], tensors["denoising_step_list"].tolist()
    pipeline = SelfForcingWanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=AutoencoderKLWan(base_dim=4, z_dim=4, num_res_blocks=1),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),  # the recorded steps are shifted already
        transformer=transformer,
        denoising_steps=steps,
        frames_per_block=block,
        window_frames=entry["params"].get("loc"),
        sink_frames=entry["params"].get("sink", 0),
        context_noise=entry["args"]["context_noise"],
    )
    pipeline.set_progress_bar_config(disable=True)

    noise, source = tensors["noise"], replay(tensors)  # [B, F, C, H, W]
    batch_size, num_frames, channels, rows, columns = noise.shape

    def recorded_noise():
        for start in noise.split(block, dim=1):
            yield start
            for _ in steps[1:]:
                yield source.randn(start.shape, start.dtype, start.device)
            yield torch.zeros_like(start)  # what the last step draws for noise level 0

    draws = recorded_noise()
    monkeypatch.setattr(diffusers_pipeline, "randn_tensor", lambda *_: next(draws).transpose(1, 2))
    latents = pipeline(
        prompt_embeds=tensors["prompt_embeds"],
        height=8 * rows,
        width=8 * columns,
        num_frames=4 * (num_frames - 1) + 1,
        output_type="latent",
    ).frames
    assert next(draws, None) is None
    assert source.consumed == len(source.draws)
    assert latents.shape == (batch_size, channels, num_frames, rows, columns)
    assert_near(latents.transpose(1, 2), tensors["output_latents"])
