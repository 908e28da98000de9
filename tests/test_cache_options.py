"""A model whose cache rotates on reading, is quantised or biased: the extension makes the videos and gradients of the
reference."""

from __future__ import annotations

import pytest
import torch
from compare import relative_error
from torch import nn

from python_ref.config import RolloutConfig
from python_ref.models.wan import CausalWanModel, WanConfig
from python_ref.noise import TorchNoise
from python_ref.pipelines.inference import CausalInferencePipeline
from python_ref.pipelines.training import CACHE_GRADIENTS, SelfForcingTrainingPipeline
from python_ref.schedule import FlowMatchSchedule

CONFIG = WanConfig(
    dim=64, num_heads=2, num_layers=2, ffn_dim=64, freq_dim=32, text_dim=16, text_len=4, in_dim=4, out_dim=4
)
# Another order of sums may move a value to the next step of a quantiser.
OPTIONS = {
    "on_read": ({"rope": "on_read"}, 1e-5),
    "biased": ({"past_bias": (-1.0, -0.5, 0.25)}, 1e-5),
    "int8": ({"quantization": "int8"}, 1e-4),
    "fp8_e4m3": ({"quantization": "fp8_e4m3"}, 5e-4),
    "int4": ({"quantization": "int4"}, 2e-3),
    "all": ({"quantization": "int8", "rope": "on_read", "past_bias": (-1.0, -0.5, 0.0)}, 1e-4),
}
GEOMETRY = {"frames_per_block": 2, "window_frames": 6, "sink_frames": 1}


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    made = [CausalWanModel(CONFIG, backend=backend) for backend in ("ext", "reference")]
    nn.init.normal_(made[0].head.head.weight)
    made[1].load_state_dict(made[0].state_dict())
    return made


def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 12, 4, 4, 6, generator=generator), torch.randn(2, 4, 16, generator=generator)


def generate(model, options):
    pipeline = CausalInferencePipeline(model, FlowMatchSchedule(5.0), [1000, 625], **GEOMETRY, cache_options=options)
    return pipeline.generate(*inputs(), TorchNoise(torch.Generator().manual_seed(2)))


@pytest.mark.parametrize(("options", "tolerance"), OPTIONS.values(), ids=OPTIONS)
def test_generation(models, options, tolerance):
    ours, reference = (generate(model, options) for model in models)
    assert relative_error(ours, reference) < tolerance
    assert relative_error(generate(models[0], {}), ours) > 2 * tolerance, "the option changes something"


@pytest.mark.parametrize("cache_gradient", CACHE_GRADIENTS)
@pytest.mark.parametrize(("options", "tolerance"), OPTIONS.values(), ids=OPTIONS)
def test_gradients(models, options, tolerance, cache_gradient):
    results = []
    for model in models:
        pipeline = SelfForcingTrainingPipeline(
            model,
            FlowMatchSchedule(5.0),
            [1000, 625],
            **GEOMETRY,
            checkpoint_activations=True,
            cache_gradient=cache_gradient,
            cache_options=options,
        )
        video = pipeline.rollout(*inputs(), TorchNoise(torch.Generator().manual_seed(2))).video
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(video.square().mean(), parameters, allow_unused=True)
        results.append(torch.cat([gradient.flatten() for gradient in gradients if gradient is not None]))
    assert relative_error(*results) < tolerance


def test_settings_of_a_run():
    assert RolloutConfig().cache_options() == {"rope": "on_write", "quantization": None, "past_bias": None}
    settings = RolloutConfig(rope="on_read", quantization="int4", past_bias=[-1, 0, 0])
    assert settings.cache_options() == {"rope": "on_read", "quantization": "int4", "past_bias": (-1, 0, 0)}
    for wrong, message in (
        ({"rope": "later"}, "rollout.rope is 'later'; accepted: 'on_write', 'on_read'"),
        ({"quantization": "int2"}, "rollout.quantization is 'int2'; accepted: 'int8', 'fp8_e4m3', 'int4'"),
        ({"past_bias": [0.0]}, r"rollout.past_bias is \[0.0\]; accepted: three numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            RolloutConfig(**wrong)
