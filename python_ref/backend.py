"""The one door between the models and the ops: the reference in this package or the compiled extension."""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import SimpleNamespace

PACKAGES = {"reference": "python_ref.ops", "ext": "selfforcing_ext"}

# Both packages keep an op in the module of its name.
PUBLIC_NAMES = {
    "attention": ("block_causal_attention",),
    "kv_cache": ("PagedKVCache", "PagePool"),
    "rope": ("rope_3d", "qk_norm_rope"),
    "denoise": ("denoise_step", "guided_denoise_step", "add_noise", "dmd_gradient"),
    "modulate": ("modulated_layer_norm", "gated_residual"),
}


@lru_cache
def load_backend(name: str) -> SimpleNamespace:
    """The ops of a backend under their public names, and its own name as ``name``.

    Args:
        name: "reference" (plain PyTorch) or "ext" (the compiled extension).

    Raises:
        ValueError: another name.
        ImportError: the extension is asked for but not built.
    """
    if name not in PACKAGES:
        raise ValueError(f"backend is {name!r}, but must be one of {', '.join(map(repr, PACKAGES))}")
    backend = SimpleNamespace(name=name)
    for module_name, public_names in PUBLIC_NAMES.items():
        try:
            module = importlib.import_module(f"{PACKAGES[name]}.{module_name}")
        except ImportError as error:
            raise ImportError(
                f"backend {name!r} cannot be loaded: {error}. Build the extension with `make build` or "
                "`pip install --no-build-isolation .`, or use backend 'reference'"
            ) from error
        for public_name in public_names:
            setattr(backend, public_name, getattr(module, public_name))
    return backend
