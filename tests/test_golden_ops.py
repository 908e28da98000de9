"""Masks, attention and rotary embedding against the published implementation."""

import pytest
import torch
from golden_files import BACKENDS, assert_near, case, dtype_of, load, parameters, tolerance_of

from python_ref.backend import load_backend
from selfforcing_ext.mask import BlockCausalMask


def mask_of(parameters: dict) -> BlockCausalMask:
    window = parameters.get("local_attn_size")
    return BlockCausalMask(
        parameters["num_frames"],
        parameters["frame_seqlen"],
        parameters["num_frame_per_block"],
        window_frames=None if window in (None, -1) else window,
        first_frame_alone=parameters["kind"] in ("block_causal_first_frame_alone", "i2v"),
        teacher_forcing=parameters["kind"] in ("teacher_forcing", "tf"),
    )


CORE_CASES = {entry["case"]: entry for entry in parameters("masks_attention")["cases"]}
WIDE_CASES = parameters("wide/a_masks")["cases"]


def is_comparable(parameters: dict) -> bool:
    """Not: real queries that see padding, and windows smaller than a block, which cut the block itself."""
    window = parameters["local_attn_size"]
    return not parameters["real_queries_attend_padding"] and (
        window in (None, -1) or window >= parameters["num_frame_per_block"]
    )


COMPARABLE = {name: entry for name, entry in WIDE_CASES.items() if is_comparable(entry)}
OTHERS = {name: entry for name, entry in WIDE_CASES.items() if not is_comparable(entry)}
WITH_ATTENTION = sorted({key.rsplit(".", 1)[0] for key in load("wide/a_attention")} & set(COMPARABLE))


@pytest.mark.parametrize("name", CORE_CASES)
def test_mask(name):
    assert torch.equal(mask_of(CORE_CASES[name]).dense(), load("masks_attention")[f"{name}.mask"].bool())


@pytest.mark.parametrize("name", COMPARABLE)
def test_wide_mask(name):
    assert torch.equal(mask_of(COMPARABLE[name]).dense(), load("wide/a_masks")[name])


@pytest.mark.parametrize("name", OTHERS)
def test_mask_that_the_published_code_gets_wrong_is_refused(name):
    with pytest.raises(ValueError, match=r"num_frames is \d+, but must be|window_frames is \d+, but must be"):
        mask_of(OTHERS[name])


def check_attention(backend, mask, tensors, heads_first):
    dtype, tolerance = dtype_of(backend), tolerance_of(backend)
    tensors = {name: (t.transpose(1, 2) if heads_first else t).to(dtype) for name, t in tensors.items() if t.dim() == 4}
    q, k, v = (tensors[name].contiguous().requires_grad_() for name in ("q", "k", "v"))
    out = load_backend(backend).block_causal_attention(q, k, v, mask)
    assert_near(out, tensors["out"], tolerance)
    for name, gradient in zip("qkv", torch.autograd.grad(out, (q, k, v), tensors["grad_out"]), strict=True):
        assert_near(gradient, tensors[f"d{name}"], tolerance, name=f"d{name}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CORE_CASES)
def test_attention(name, backend):
    check_attention(backend, mask_of(CORE_CASES[name]), case("masks_attention", name), heads_first=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_wide_attention(name, backend):
    check_attention(backend, mask_of(COMPARABLE[name]), case("wide/a_attention", name), heads_first=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entry", parameters("rope3d")["cases"], ids=lambda entry: entry["case"])
def test_rope(entry, backend):
    tensors = case("rope3d", entry["case"])
    rope_3d = load_backend(backend).rope_3d
    assert_near(rope_3d(tensors["x"], tuple(entry["grid"]), entry["start_frame"]), tensors["y"])
    if backend == "reference":
        y64 = rope_3d(tensors["x"].double(), tuple(entry["grid"]), entry["start_frame"])
        assert_near(y64, tensors["y64"], tolerance_of(backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(name for name in parameters("wide/b_rope")["cases"] if name.endswith("f64")))
def test_wide_rope(name, backend):
    entry, tensors = parameters("wide/b_rope")["cases"][name], case("wide/b_rope", name)
    rope_3d = load_backend(backend).rope_3d
    compared = 0
    for start in entry["starts"]:
        for index, grid in enumerate(entry["grids"]):
            tokens = grid[0] * grid[1] * grid[2]  # what follows is padding, which ours never makes
            if f"causal_start{start}" in tensors:
                x, expected = (tensors[key][index : index + 1, :tokens] for key in ("x", f"causal_start{start}"))
                y = rope_3d(x.to(dtype_of(backend)).contiguous(), tuple(grid), start)
                assert_near(y, expected, tolerance_of(backend))
                compared += 1
    assert compared
