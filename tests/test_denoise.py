"""The denoising steps and dmd_gradient against their definitions, as torch ops, and with bad input."""

import functools

import pytest
import torch
from compare import assert_same_bits
from elementwise import DEVICES, DTYPES, NAMES, assert_as_accurate, assert_parity, num_threads, padded

from python_ref.ops import denoise as definition
from selfforcing_ext import PhiloxNoise, add_noise, denoise_step, dmd_gradient, guided_denoise_step
from selfforcing_ext.library import ops

SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 4, 5, 7),
    (16, 3, 1, 16, 16),
    (1, 4, 16, 30, 52),  # enough for several threads
    (2, 0, 4, 2, 2),
]
LAYOUTS = {
    "contiguous": None,
    "frames and channels strided": lambda x: padded(x, (0, 1, 2)),
    "planes strided": lambda x: padded(x, (3, 4)),
    "channels before frames": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "last dimension strided": lambda x: x.transpose(3, 4).contiguous().transpose(3, 4),
}


def latents(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def sigmas(shape: tuple[int, ...]) -> torch.Tensor:
    """Levels from 0 to 1, both ends among them, as a transposed view."""
    levels = torch.linspace(0, 1, shape[0] * shape[1])
    return levels[torch.randperm(len(levels))].view(shape[1], shape[0]).t()


def every_case(test):
    test = pytest.mark.parametrize("device", DEVICES)(test)
    test = pytest.mark.parametrize("layout", LAYOUTS)(test)
    test = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)(test)
    return pytest.mark.parametrize("shape", SHAPES, ids=str)(test)


def levels(shape: tuple[int, ...], next_step: bool) -> dict[str, torch.Tensor]:
    return {name: sigmas(shape) for name in (["sigma", "sigma_next"] if next_step else ["sigma"])}


@every_case
@pytest.mark.parametrize("next_step", [False, True], ids=["x0 alone", "next step"])
def test_denoise_step_parity(shape, dtype, layout, device, next_step):
    names = ["flow", "x_t", "noise"] if next_step else ["flow", "x_t"]
    inputs = {name: latents(shape) for name in names}
    dtypes = dict.fromkeys(names, dtype)
    constants = levels(shape, next_step)
    assert_parity(denoise_step, definition.denoise_step, inputs, dtypes, LAYOUTS[layout], device, constants)


@every_case
@pytest.mark.parametrize("next_step", [False, True], ids=["x0 alone", "next step"])
def test_guided_denoise_step_parity(shape, dtype, layout, device, next_step):
    names = ["flow_cond", "flow_uncond", "x_t", *(["noise"] if next_step else [])]
    assert_parity(
        functools.partial(guided_denoise_step, guidance_scale=3.5),
        functools.partial(definition.guided_denoise_step, guidance_scale=3.5),
        {name: latents(shape) for name in names},
        dict.fromkeys(names, dtype),
        LAYOUTS[layout],
        device,
        levels(shape, next_step),
    )


@every_case
def test_add_noise_parity(shape, dtype, layout, device):
    inputs = {"x0": latents(shape), "noise": latents(shape)}
    dtypes = dict.fromkeys(inputs, dtype)
    constants = levels(shape, next_step=False)
    assert_parity(add_noise, definition.add_noise, inputs, dtypes, LAYOUTS[layout], device, constants)


@every_case
@pytest.mark.parametrize("guidance_scale", [None, 2.0])
def test_dmd_gradient_parity(shape, dtype, layout, device, guidance_scale):
    names = ["x", "x0_fake", "x0_real_cond", *(["x0_real_uncond"] if guidance_scale else [])]
    inputs = {name: latents(shape, dtype) for name in names}
    scale = guidance_scale or 0.0
    arrange = LAYOUTS[layout] or (lambda x: x)
    ours = dmd_gradient(**{name: arrange(x.to(device)) for name, x in inputs.items()}, guidance_scale=scale)
    theirs = definition.dmd_gradient(**inputs, guidance_scale=scale)
    exact = definition.dmd_gradient(**{name: x.double() for name, x in inputs.items()}, guidance_scale=scale)
    assert ours.dtype == dtype
    assert_as_accurate(ours, theirs, exact)


def test_noise_levels_are_constants():
    x = latents((1, 2, 1, 2, 2), torch.float32).requires_grad_()
    sigma = torch.rand(1, 2, requires_grad=True)
    x0, x_next = denoise_step(x, x, sigma, sigma, x)
    (x0.sum() + x_next.sum() + add_noise(x, x, sigma).sum()).backward()
    assert x.grad is not None
    assert sigma.grad is None


def test_dtypes_and_levels_are_cast():
    """A bfloat16 prediction of float32 latents (autocast), with float64 levels."""
    shape = (2, 3, 2, 4, 4)
    flow = latents(shape, torch.bfloat16).requires_grad_()
    x_t, noise, sigma = latents(shape, torch.float32), latents(shape, torch.float16), sigmas(shape)
    actual = denoise_step(flow, x_t, sigma.double(), sigma.bfloat16().float(), noise)
    expected = definition.denoise_step(flow, x_t, sigma, sigma.bfloat16().float(), noise)
    torch.testing.assert_close(actual, expected)
    (gradient,) = torch.autograd.grad(actual[1].sum(), flow)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient, torch.autograd.grad(expected[1].sum(), flow)[0])


@pytest.mark.parametrize(
    ("which", "wanted"),
    [
        *(((0,), wanted) for wanted in (["flow"], ["x_t"], ["flow", "x_t"])),  # noise is no part of x0
        *(((1,), wanted) for wanted in (["flow"], ["x_t"], ["noise"], ["flow", "noise"])),
        *(((0, 1), wanted) for wanted in (["flow"], ["x_t"], ["noise"], ["x_t", "noise"])),
    ],
    ids=str,
)
def test_only_the_gradients_that_are_asked_for(which, wanted):
    shape = (2, 3, 2, 4, 4)
    sigma, sigma_next = sigmas(shape), sigmas(shape)
    inputs = {name: latents(shape, torch.float32).requires_grad_(name in wanted) for name in ("flow", "x_t", "noise")}
    leaves = [inputs[name] for name in wanted]
    gradients = []
    for op in (denoise_step, definition.denoise_step):
        outputs = op(inputs["flow"], inputs["x_t"], sigma, sigma_next, inputs["noise"])
        gradients.append(torch.autograd.grad(sum(outputs[i].square().sum() for i in which), leaves))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_dmd_gradient_of_equal_and_of_broken_predictions(dtype):
    x = latents((3, 2, 2, 4, 4), dtype)
    fake, real = latents(x.shape, dtype), x.clone()  # mean |x - real| is 0
    real[1] += 1.0
    fake[0, 0, 0, 0, 0] = real[0, 0, 0, 0, 0]  # 0 / 0
    fake[1, 0, 0, 0, 0] = torch.nan
    fake[1, 0, 0, 0, 1] = torch.inf
    actual, expected = dmd_gradient(x, fake, real), definition.dmd_gradient(x, fake, real)
    assert not actual.isnan().any()
    assert actual[0, 0, 0, 0, 0] == actual[1, 0, 0, 0, 0] == 0
    torch.testing.assert_close(actual, expected)


def test_dmd_gradient_is_constant_to_autograd():
    x, fake, real, uncond = (latents((1, 2, 1, 4, 4), torch.float32).requires_grad_() for _ in range(4))
    assert not dmd_gradient(x, fake, real, uncond, 2.0).requires_grad


def test_compile_fullgraph():
    shape = (2, 3, 2, 4, 4)

    def step(flow, uncond, x_t, sigma, sigma_next, noise):
        x0, x_next = guided_denoise_step(flow, uncond, 3.0, x_t, sigma, sigma_next, noise)
        last, _ = denoise_step(flow, add_noise(x_next, noise, sigma), sigma)
        return last + dmd_gradient(x0, x_t, noise)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    flow, uncond, x_t, noise = (latents(shape, torch.float32).requires_grad_() for _ in range(4))
    arguments = (flow, uncond, x_t, sigmas(shape), sigmas(shape), noise)
    expected, actual = step(*arguments), compiled(*arguments)
    torch.testing.assert_close(actual, expected)
    leaves = (flow, uncond, x_t, noise)
    torch.testing.assert_close(
        torch.autograd.grad(actual.square().sum(), leaves), torch.autograd.grad(expected.square().sum(), leaves)
    )


def test_autocast_changes_nothing():
    x = latents((1, 2, 1, 4, 4), torch.float32)
    sigma = torch.rand(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        x0, x_next = denoise_step(x, x, sigma, sigma, x)
    assert_same_bits(x0, denoise_step(x, x, sigma)[0])
    assert_same_bits(x_next, denoise_step(x, x, sigma, sigma, x)[1])


def test_same_bits_with_any_number_of_threads():
    shape = SHAPES[3]
    flow, x_t, noise, real = (latents(shape, torch.float32) for _ in range(4))
    sigma, sigma_next = sigmas(shape), sigmas(shape)
    results = []
    for threads in (1, 2, 2):
        leaf = flow.clone().requires_grad_()
        with num_threads(threads):
            x0, x_next = denoise_step(leaf, x_t, sigma, sigma_next, noise)
            (gradient,) = torch.autograd.grad((x0 * x_next).sum(), leaf)
            results.append((x0, x_next, gradient, dmd_gradient(x_t, flow, real, noise, 2.0)))
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            assert_same_bits(actual.detach(), expected.detach())


X, SIGMA, SEED = torch.zeros(2, 3, 1, 4, 4), torch.zeros(2, 3), torch.tensor([3])
MANY_PLANES = torch.zeros(1).expand(3, 2**15, 2**15, 1, 1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: denoise_step(X, X.double(), SIGMA),
            TypeError,
            "x_t is float64, but must be float32, bfloat16 or float16",
        ),
        (lambda: denoise_step(X.int(), X, SIGMA), TypeError, "flow is int32, but must be float32"),
        (
            lambda: denoise_step(X, X[0], SIGMA),
            ValueError,
            r"x_t has shape \[3, 1, 4, 4\], but must have five dimensions",
        ),
        (
            lambda: denoise_step(X[:1], X, SIGMA),
            ValueError,
            r"flow has shape \[1, 3, 1, 4, 4\], but must have shape \[2, 3",
        ),
        (lambda: denoise_step(X.to("meta"), X, SIGMA), ValueError, "flow is on meta, but must be on cpu like x_t"),
        (
            lambda: denoise_step(X, X, SIGMA[:, :2]),
            ValueError,
            r"sigma has shape \[2, 2\], but must have shape \[B, F\] = \[2, 3\]",
        ),
        (lambda: denoise_step(X, X, SIGMA.long()), TypeError, "sigma is int64, but must be a floating-point tensor"),
        (lambda: denoise_step(X, X, 0.5), TypeError, "sigma is float, but must be a floating-point tensor"),
        (lambda: denoise_step(X, X, SIGMA.to("meta")), ValueError, "sigma is on meta, but must be on cpu"),
        (
            lambda: denoise_step(X, X, SIGMA, SIGMA),
            ValueError,
            "noise is None, but must be given together with sigma_next",
        ),
        (
            lambda: denoise_step(X, X, SIGMA, noise=X),
            ValueError,
            "sigma_next is None, but must be given together with noise",
        ),
        (lambda: denoise_step(X, X, SIGMA, SIGMA[0], X), ValueError, r"sigma_next has shape \[3\], but must"),
        (
            lambda: denoise_step(X, X, SIGMA, SIGMA, X[..., :2]),
            ValueError,
            r"noise has shape \[2, 3, 1, 4, 2\], but must",
        ),
        (lambda: guided_denoise_step(X[:1], X, 2.0, X, SIGMA), ValueError, r"flow_cond has shape \[1, 3, 1, 4, 4\]"),
        (lambda: guided_denoise_step(X, X[:1], 2.0, X, SIGMA), ValueError, r"flow_uncond has shape \[1, 3, 1, 4, 4\]"),
        (lambda: add_noise(X.double(), X, SIGMA), TypeError, "x0 is float64, but must be float32"),
        (lambda: add_noise(X, X[:1], SIGMA), ValueError, "noise has shape"),
        (
            lambda: add_noise(X, PhiloxNoise(0.5), SIGMA),
            TypeError,
            "seed of noise is float, but must be an int or an int64 tensor",
        ),
        (
            lambda: add_noise(X, PhiloxNoise(2**63), SIGMA),
            ValueError,
            r"seed of noise is 9223372036854775808, but must be",
        ),
        (
            lambda: add_noise(X, PhiloxNoise(SEED, SEED.int()), SIGMA),
            TypeError,
            "offset of noise is int32, but must be an int or an int64 tensor",
        ),
        (
            lambda: add_noise(X, PhiloxNoise(SEED.repeat(3)), SIGMA),
            ValueError,
            r"seed of noise has shape \[3\], but must be an int or have shape \[1\] or \[2\] like the batch",
        ),
        (
            lambda: add_noise(X, PhiloxNoise(SEED.to("meta")), SIGMA),
            ValueError,
            "seed of noise is on meta, but must be on cpu like the latents",
        ),
        (lambda: dmd_gradient(X[0], X, X), ValueError, r"x has shape \[3, 1, 4, 4\], but must have five dimensions"),
        (lambda: dmd_gradient(X, X[:1], X), ValueError, "x0_fake has shape"),
        (lambda: dmd_gradient(X, X, X[:1]), ValueError, "x0_real_cond has shape"),
        (lambda: dmd_gradient(X, X, X, X[:1]), ValueError, "x0_real_uncond has shape"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.denoise_x0(X, None, X[0], SIGMA, 1.0),
            r"denoise_x0: x_t has shape \[3, 1, 4, 4\], but must be \[B, F",
        ),
        (
            lambda: ops.denoise_x0(MANY_PLANES, None, MANY_PLANES, SIGMA, 1.0),
            r"B \* F \* C is 3221225472, but must be less than 2\^31",
        ),
        (lambda: ops.denoise_x0(X.half(), None, X, SIGMA, 1.0), "flow is float16, but must be float32 like x_t"),
        (lambda: ops.denoise_x0(X, None, X, SIGMA.double(), 1.0), "sigma is float64, but must be float32"),
        (
            lambda: ops.denoise_x0(X, None, X, SIGMA[:1], 1.0),
            r"sigma has shape \[1, 3\], but must be \[B, F\] = \[2, 3\]",
        ),
        (lambda: ops.denoise_step(X, None, X, SIGMA, SIGMA, X[:1], None, None, 1.0), "noise has shape"),
        (
            lambda: ops.denoise_step(X, None, X, SIGMA, SIGMA, X, SEED, SEED, 1.0),
            "denoise_step: either noise or seed and offset must be given",
        ),
        (
            lambda: ops.add_noise(X, None, SEED, None, SIGMA),
            "add_noise: either noise or seed and offset must be given",
        ),
        (
            lambda: ops.add_noise(X, None, SEED, SEED.repeat(3), SIGMA),
            r"add_noise: offset has shape \[3\], but must be \[1\] or \[B\] = \[2\]",
        ),
        (lambda: ops.add_noise(X, None, SEED.int(), SEED, SIGMA), "add_noise: seed is int32, but must be int64"),
        (
            lambda: ops.denoise_backward(None, None, SIGMA, None, 1.0, True, False, False, False),
            "grad_x0 and grad_x_next are both None, but one of them must be given",
        ),
        (
            lambda: ops.denoise_backward(None, X, SIGMA, None, 1.0, True, False, False, False),
            "sigma_next is None, but must be given with grad_x_next",
        ),
        (
            lambda: ops.denoise_backward(X, None, SIGMA, None, 1.0, True, False, False, True),
            "needs_noise is true, but noise has no gradient without grad_x_next",
        ),
        (lambda: ops.add_noise(X, X.half(), None, None, SIGMA), "noise is float16, but must be float32 like x0"),
        (lambda: ops.dmd_gradient(X, X[:1], X, None, 0.0), "x0_fake has shape"),
    ],
)
def test_bad_input_of_the_op(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
