"""modulated_layer_norm and gated_residual against their definitions, as torch ops, and with bad input."""

from dataclasses import dataclass

import pytest
import torch
from compare import assert_same_bits
from elementwise import DEVICES, DTYPES, NAMES, assert_parity, assert_whole_is_its_parts, num_threads, padded

from python_ref.ops import modulate as definition
from selfforcing_ext import gated_residual, modulated_layer_norm
from selfforcing_ext.library import ops


@dataclass(frozen=True)
class Case:
    batch: int
    frames: int
    frame_seqlen: int
    channels: int
    mean: float = 0.0  # of x

    @property
    def tokens(self) -> int:
        return self.frames * self.frame_seqlen


CASES = [
    Case(1, 1, 1, 8),
    Case(2, 3, 20, 48, mean=30.0),
    Case(3, 5, 7, 33),  # no multiple of any vector
    Case(2, 2, 50, 4, mean=-3.0),
    Case(16, 3, 16, 96),
    Case(1, 2, 300, 256, mean=1.0),  # enough for several threads and several ranges of a frame
    Case(2, 2, 9, 1100),  # rows that are taken one by one
    Case(0, 2, 2, 16),
]
LARGE = Case(4, 1, 1050, 1024)
LAYOUTS = {"contiguous": None, "strided": padded}


def features(case: Case, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    x = torch.randn(case.batch, case.tokens, case.channels, dtype=torch.float64) + case.mean
    return x.to(dtype)


def modulation(case: Case) -> torch.Tensor:
    return torch.randn(case.batch, case.frames, case.channels, dtype=torch.float64)


def every_case(test):
    test = pytest.mark.parametrize("device", DEVICES)(test)
    test = pytest.mark.parametrize("layout", LAYOUTS)(test)
    test = pytest.mark.parametrize("modulation_dtype", [torch.float32, None], ids=["float32 modulation", "same"])(test)
    test = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)(test)
    return pytest.mark.parametrize("case", CASES, ids=str)(test)


@every_case
def test_modulated_layer_norm_parity(case, dtype, modulation_dtype, layout, device):
    assert_parity(
        lambda x, shift, scale: modulated_layer_norm(x, shift, scale, 1e-4),
        lambda x, shift, scale: definition.modulated_layer_norm(x, shift, scale, 1e-4),
        {"x": features(case), "shift": modulation(case), "scale": modulation(case)},
        {"x": dtype, "shift": modulation_dtype or dtype, "scale": modulation_dtype or dtype},
        LAYOUTS[layout],
        device,
    )


@every_case
def test_gated_residual_parity(case, dtype, modulation_dtype, layout, device):
    assert_parity(
        gated_residual,
        definition.gated_residual,
        {"x": features(case), "y": features(case), "gate": modulation(case)},
        {"x": dtype, "y": dtype, "gate": modulation_dtype or dtype},
        LAYOUTS[layout],
        device,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_large_results(dtype):
    x, y = features(LARGE, dtype), features(LARGE, dtype)
    shift, scale = modulation(LARGE).float(), modulation(LARGE).float()
    assert_whole_is_its_parts(modulated_layer_norm, {"x": x, "shift": shift, "scale": scale})
    assert_whole_is_its_parts(gated_residual, {"x": x, "y": y, "gate": scale})


def test_chunks_of_one_modulation_need_no_copy():
    """Models compute all modulations of a block at once: [B, F, 6, C], taken apart by chunk."""
    case = CASES[4]
    x = features(case, torch.float32)
    e = torch.randn(16, 3, 6, 96, requires_grad=True)
    results = []
    for backend_norm, backend_gate in (
        (modulated_layer_norm, gated_residual),
        (definition.modulated_layer_norm, definition.gated_residual),
    ):
        shift, scale, gate = (part.squeeze(2) for part in e.chunk(6, dim=2)[:3])
        y = backend_gate(x, backend_norm(x, shift, scale), gate)
        results.append((y.detach(), torch.autograd.grad(y.square().sum(), e)[0]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_gradient_of_a_sum():
    """Its gradient is one expanded number, without a contiguous last dimension."""
    case = CASES[1]
    inputs = [features(case, torch.float32), modulation(case).float(), modulation(case).float()]
    leaves = [x.requires_grad_() for x in inputs]
    x, shift, scale = leaves
    for ours, theirs in (
        (modulated_layer_norm(x, shift, scale), definition.modulated_layer_norm(x, shift, scale)),
        (gated_residual(x, x, scale) + 0 * shift.sum(), definition.gated_residual(x, x, scale) + 0 * shift.sum()),
    ):
        torch.testing.assert_close(
            torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(theirs.sum(), leaves), rtol=1e-4, atol=1e-4
        )


def test_constant_rows_have_no_nan():
    """Variance 0: the normalised row is 0, what is left is the shift."""
    x = torch.full((1, 4, 24), 1000.1)
    shift, scale = torch.randn(1, 2, 24), torch.randn(1, 2, 24)
    y = modulated_layer_norm(x, shift, scale)
    torch.testing.assert_close(y, shift.repeat_interleave(2, dim=1), rtol=0, atol=1e-3)


def test_residual_keeps_its_dtype():
    """Under autocast y is bfloat16 and the residual stream float32."""
    case = CASES[1]
    x, gate = features(case, torch.float32), modulation(case).bfloat16()
    y = features(case, torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = gated_residual(x, y, gate)
        normed = modulated_layer_norm(x, gate, gate)
    assert out.dtype == normed.dtype == torch.float32
    torch.testing.assert_close(out, definition.gated_residual(x, y, gate))
    torch.testing.assert_close(normed, definition.modulated_layer_norm(x, gate, gate), rtol=1e-4, atol=1e-4)
    assert torch.autograd.grad(out.sum(), y)[0].dtype == torch.bfloat16


def test_compile_fullgraph():
    case = CASES[1]

    def block(x, shift, scale, gate):
        return gated_residual(x, modulated_layer_norm(x, shift, scale).relu(), gate)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for dtype in (torch.float32, torch.bfloat16):
        x = features(case, dtype).requires_grad_()
        leaves = (x, *(modulation(case).to(dtype).requires_grad_() for _ in range(3)))
        expected, actual = block(*leaves), compiled(*leaves)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual.square().sum(), leaves), torch.autograd.grad(expected.square().sum(), leaves)
        )


def test_same_bits_with_any_number_of_threads():
    case = CASES[5]
    x, y = features(case, torch.float32), features(case, torch.float32)
    modulations = [modulation(case).float() for _ in range(3)]
    results = []
    for threads in (1, 2, 2):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, y, *modulations)]
        with num_threads(threads):
            normed = modulated_layer_norm(leaves[0], leaves[2], leaves[3])
            out = gated_residual(normed, leaves[1], leaves[4])
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            assert_same_bits(actual.detach(), expected.detach())


X, M = torch.zeros(2, 6, 16), torch.zeros(2, 3, 16)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: modulated_layer_norm(X.double(), M, M),
            TypeError,
            "x is float64, but must be float32, bfloat16 or float16",
        ),
        (
            lambda: modulated_layer_norm(X[0], M, M),
            ValueError,
            r"x has shape \[6, 16\], but must have three dimensions",
        ),
        (lambda: modulated_layer_norm(X.mT, M, M), ValueError, "x has stride 16 in its last dimension"),
        (
            lambda: modulated_layer_norm(X[:, :5], M, M),
            ValueError,
            "x has 5 tokens, but must have a multiple of the 3 frames of shift",
        ),
        (
            lambda: modulated_layer_norm(X, M[:1], M),
            ValueError,
            r"shift has shape \[1, 3, 16\], but must have shape \[B, F, C\] = \[2, F, 16\]",
        ),
        (lambda: modulated_layer_norm(X, M, M[..., :8]), ValueError, r"scale has shape \[2, 3, 8\], but must"),
        (
            lambda: modulated_layer_norm(X, M[:, :2], M),
            ValueError,
            r"shift has shape \[2, 2, 16\], but must have shape \[2, 3, 16\]",
        ),
        (lambda: modulated_layer_norm(X, M.int(), M), TypeError, "shift is int32, but must be a floating-point tensor"),
        (lambda: modulated_layer_norm(X, M, 1.0), TypeError, "scale is float, but must be a floating-point tensor"),
        (lambda: modulated_layer_norm(X, M.to("meta"), M), ValueError, "shift is on meta, but must be on cpu like x"),
        (
            lambda: modulated_layer_norm(X, M, M.mT.contiguous().mT),
            ValueError,
            "scale has stride 3 in its last dimension",
        ),
        (lambda: modulated_layer_norm(X, M, M, eps=-1.0), ValueError, "eps is -1.0, but must not be below 0"),
        (
            lambda: gated_residual(X, X[:1], M),
            ValueError,
            r"y has shape \[1, 6, 16\], but must have shape \[2, 6, 16\] like x",
        ),
        (lambda: gated_residual(X, X.to("meta"), M), ValueError, "y is on meta, but must be on cpu like x"),
        (lambda: gated_residual(X, X.int(), M), TypeError, "y is int32, but must be float32"),
        (lambda: gated_residual(X, X, M[0]), ValueError, r"gate has shape \[3, 16\], but must"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


ROWS = torch.zeros(2, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.modulated_layer_norm(X[0], M, M, 0.0), r"x has shape \[6, 16\], but must be \[B, L, C\]"),
        (
            lambda: ops.modulated_layer_norm(X, M, M[..., :8], 0.0),
            r"scale has shape \[2, 3, 8\], but must be \[B, F, C\]",
        ),
        (lambda: ops.modulated_layer_norm(X, M.half(), M, 0.0), "shift is float16, but must be float32"),
        (
            lambda: ops.modulated_layer_norm(X[:, :4], M, M, 0.0),
            "x has 4 tokens, but must have a multiple of the 3 frames",
        ),
        (lambda: ops.modulated_layer_norm(X.mT.contiguous().mT, M, M, 0.0), "x has stride 6 in its last dimension"),
        (
            lambda: ops.modulated_layer_norm_backward(X.half(), X, M, ROWS, ROWS),
            "grad_y is float16, but must be float32",
        ),
        (
            lambda: ops.modulated_layer_norm_backward(X, X, M, ROWS[:1], ROWS),
            r"mean has shape \[1, 6\], but must be \[B, L\]",
        ),
        (lambda: ops.gated_residual(X, X[:1], M), r"y has shape \[1, 6, 16\], but must be \[B, L, C\] = \[2, 6, 16\]"),
        (lambda: ops.gated_residual_backward(X[:1], X, M), r"grad_out has shape \[1, 6, 16\], but must be \[B, L, C\]"),
    ],
)
def test_bad_input_of_the_op(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
