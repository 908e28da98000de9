"""Loads the golden vectors of the published implementation."""

from __future__ import annotations

import importlib.util
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_close
from safetensors.torch import load_file
from torch import Tensor, nn

from python_ref.models.wan import CausalWanModel, WanConfig, WanModel
from python_ref.noise import ReplayNoise

FOLDER = Path(__file__).parent / "golden"
FLOAT32_TOLERANCE = 1e-5  # relative, norm-wise: the published code ran in float32
FLOAT64_TOLERANCE = 1e-10
ROW_STRIDE = 6  # of large gradients the files keep every sixth row

BACKENDS = [
    "reference",
    pytest.param(
        "ext",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("selfforcing_ext._C") is None, reason="the extension is not built"
        ),
    ),
]


def load(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


def case(name: str, prefix: str) -> dict[str, Tensor]:
    """The tensors of one case of a file, without the case's name."""
    return {key[len(prefix) + 1 :]: tensor for key, tensor in load(name).items() if key.startswith(prefix + ".")}


@lru_cache
def parameters(name: str) -> dict[str, Any]:
    """What cases.json says of a file."""
    folder, _, file = name.rpartition("wide/")
    index = FOLDER / ("wide" if _ else "") / "cases.json"
    return json.loads(index.read_text())[file if _ else folder or name]


def files(prefix: str) -> list[str]:
    """Names of the files that begin like this."""
    return sorted(
        str(path.relative_to(FOLDER))[: -len(".safetensors")] for path in FOLDER.glob(f"{prefix}*.safetensors")
    )


def replay(tensors: dict[str, Tensor]) -> ReplayNoise:
    return ReplayNoise([tensors[key] for key in sorted(tensors) if key.startswith("draw")])


def model(kind: type[nn.Module], name: str, weights: dict[str, Tensor], backend: str) -> CausalWanModel | WanModel:
    """A model with the sizes that cases.json gives for a file and these weights, loaded strictly."""
    made = kind(WanConfig(**parameters(name)["config"]), backend=backend)
    made.load_state_dict({key: weight.float() for key, weight in weights.items()}, strict=True)
    return made


def wide_model(kind: type[nn.Module], name: str, backend: str) -> CausalWanModel | WanModel:
    return model(kind, f"wide/models/{name}", load(f"wide/models/{name}"), backend)


def assert_near(got: Tensor, expected: Tensor, tolerance: float = FLOAT32_TOLERANCE, name: str = "output") -> None:
    """Of large gradients every sixth row is compared."""
    assert_close(got if got.shape == expected.shape else got[::ROW_STRIDE], expected, tolerance, name)


def assert_gradients_near(
    module: nn.Module, tensors: dict[str, Tensor], prefix: str, tolerance: float = FLOAT32_TOLERANCE
) -> None:
    """Every gradient recorded as ``prefix`` + parameter name."""
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    recorded = [key for key in tensors if key.startswith(prefix)]
    assert recorded
    for key in recorded:
        assert_near(gradients[key[len(prefix) :]], tensors[key], tolerance, key)


def dtype_of(backend: str) -> torch.dtype:
    """The widest dtype a backend computes in."""
    return torch.float64 if backend == "reference" else torch.float32


def tolerance_of(backend: str) -> float:
    return FLOAT64_TOLERANCE if backend == "reference" else FLOAT32_TOLERANCE
