"""rope_3d and qk_norm_rope against their definitions, as torch ops, and with bad input."""

from dataclasses import dataclass

import pytest
import torch
from compare import assert_same_bits
from elementwise import DEVICES, DTYPES, NAMES, assert_parity, assert_whole_is_its_parts, num_threads, padded

from python_ref.ops import rope as definition
from selfforcing_ext import qk_norm_rope, rope_3d
from selfforcing_ext.library import ops
from selfforcing_ext.rope import rope_table


@dataclass(frozen=True)
class Case:
    batch: int
    grid: tuple[int, int, int]
    heads: int
    head_dim: int
    start_frame: int | tuple[int, ...] = 0  # or one per batch entry

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    def start(self, device: torch.device | None = None) -> int | torch.Tensor:
        if isinstance(self.start_frame, int):
            return self.start_frame
        return torch.tensor(self.start_frame, dtype=torch.int32, device=device)


CASES = [
    Case(1, (1, 1, 1), 1, 8),
    Case(2, (3, 4, 5), 2, 24, start_frame=7),
    Case(1, (4, 2, 2), 12, 128, start_frame=100_000),
    Case(3, (5, 1, 7), 2, 40, start_frame=-2),
    Case(1, (2, 2, 3), 2, 256, start_frame=3),
    Case(2, (3, 16, 16), 3, 64),  # enough for several threads
    Case(3, (3, 16, 16), 3, 64, start_frame=(9, 9, 9)),
    Case(4, (2, 8, 16), 3, 64, start_frame=(3, 3, 40, 0)),
    Case(2, (0, 4, 4), 2, 16),
    Case(0, (2, 2, 2), 2, 16),
]
ODD_HEAD_DIMS = [Case(2, (2, 3, 4), 3, 2, start_frame=5), Case(1, (3, 3, 3), 2, 6), Case(2, (2, 3, 2), 1, 34)]
LARGE = Case(4, (5, 14, 15), 8, 128, start_frame=3)
RAGGED = Case(3, (2, 3, 4), 2, 16, start_frame=(5, 0, 12))
LAYOUTS = {"contiguous": None, "strided": padded}


def heads(case: Case, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(case.batch, case.tokens, case.heads, case.head_dim, dtype=dtype)


def features(case: Case, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(case.batch, case.tokens, case.heads * case.head_dim, dtype=dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("case", [*CASES, *ODD_HEAD_DIMS], ids=str)
def test_rope_3d_parity(case, dtype, layout, device):
    assert_parity(
        lambda x: rope_3d(x, case.grid, case.start(x.device)),
        lambda x: definition.rope_3d(x, case.grid, case.start()),
        {"x": heads(case)},
        {"x": dtype},
        (lambda x: padded(x, (0, 1, 2))) if layout == "strided" else None,
        device,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weight_dtype", [torch.float32, None], ids=["float32 weight", "same weight"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_qk_norm_rope_parity(case, dtype, weight_dtype, layout, device):
    assert_parity(
        lambda x, weight: qk_norm_rope(x, weight, case.heads, case.grid, case.start(x.device), 1e-3),
        lambda x, weight: definition.qk_norm_rope(x, weight, case.heads, case.grid, case.start(), 1e-3),
        {"x": features(case), "weight": torch.randn(case.heads * case.head_dim, dtype=torch.float64)},
        {"x": dtype, "weight": weight_dtype or dtype},
        (lambda x: padded(x) if x.ndim == 3 else x) if layout == "strided" else None,
        device,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_large_results(dtype):
    x, weight = features(LARGE, dtype), torch.randn(LARGE.heads * LARGE.head_dim)
    position = LARGE.grid, LARGE.start_frame
    assert_whole_is_its_parts(lambda x: rope_3d(x, *position), {"x": heads(LARGE, dtype)})
    assert_whole_is_its_parts(
        lambda x, weight: qk_norm_rope(x, weight, LARGE.heads, *position), {"x": x}, {"weight": weight}
    )


def test_gradient_of_a_sum():
    """Its gradient is one expanded number, without a contiguous last dimension."""
    case = CASES[1]
    x, weight = features(case, torch.float32).requires_grad_(), torch.rand(48, requires_grad=True)
    for ours, theirs in (
        (rope_3d(x.unflatten(-1, (2, -1)), case.grid), definition.rope_3d(x.unflatten(-1, (2, -1)), case.grid)),
        (qk_norm_rope(x, weight, 2, case.grid), definition.qk_norm_rope(x, weight, 2, case.grid)),
    ):
        torch.testing.assert_close(torch.autograd.grad(ours.sum(), x), torch.autograd.grad(theirs.sum(), x))


def test_rotation_depends_on_relative_position_alone():
    """<rope(q, m), rope(k, n)> is a function of m - n (RoFormer, equation 16)."""
    q, k = torch.randn(2, 1, 6, 1, 48)
    scores = [
        torch.einsum("bqhd,bkhd->bqk", rope_3d(q, (6, 1, 1), start), rope_3d(k, (6, 1, 1), start))
        for start in (0, 1000)
    ]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)


def test_blocks_make_the_whole():
    case = Case(2, (6, 2, 3), 2, 32)
    x = heads(case, torch.float32)
    blocks = [rope_3d(part, (2, 2, 3), start) for part, start in zip(x.split(12, dim=1), (0, 2, 4), strict=True)]
    torch.testing.assert_close(torch.cat(blocks, dim=1), rope_3d(x, case.grid))


def test_start_frame_tensor_is_read_when_the_op_runs():
    case = CASES[1]
    x, weight = features(case, torch.float32), torch.rand(48)
    position = torch.tensor([0], dtype=torch.int32)
    for start in (3, 11):
        position.fill_(start)
        assert torch.equal(
            qk_norm_rope(x, weight, 2, case.grid, position), qk_norm_rope(x, weight, 2, case.grid, start)
        )


def test_batch_entries_with_starts_of_their_own_are_calls_of_their_own():
    x, weight = features(RAGGED, torch.float32).requires_grad_(), torch.rand(32, requires_grad=True)
    grads = torch.randn(3, RAGGED.tokens, 2, 16)
    y = qk_norm_rope(x, weight, 2, RAGGED.grid, RAGGED.start())
    (grad_x,) = torch.autograd.grad(y, x, grads)
    for i, start in enumerate(RAGGED.start_frame):
        own = x[i : i + 1].detach().requires_grad_()
        expected = qk_norm_rope(own, weight, 2, RAGGED.grid, start)
        assert_same_bits(y[i : i + 1].detach(), expected.detach())
        assert_same_bits(grad_x[i : i + 1], torch.autograd.grad(expected, own, grads[i : i + 1])[0])


@pytest.mark.parametrize("head_dim", [2, 8, 34, 64, 128])
def test_rope_table_has_the_turns_of_every_axis(head_dim):
    """Of the vector (1, 0, 1, 0, ...) rope_3d makes the cosines and sines."""
    grid = (40, 3, 5)
    table = rope_table(grid, head_dim)
    x = torch.zeros(1, grid[0] * grid[1] * grid[2], 1, head_dim)
    x[..., ::2] = 1
    turns = rope_3d(x, grid).view(*grid, head_dim // 2, 2)
    pairs = [head_dim // 2 - 2 * (head_dim // 6), head_dim // 6, head_dim // 6]
    frame, row, column = turns.split(pairs, dim=3)
    expected = torch.cat([frame[:, 0, 0].flatten(0, 1), row[0, :, 0].flatten(0, 1), column[0, 0].flatten(0, 1)])
    assert (table.dtype, table.shape) == (torch.float32, expected.shape)
    torch.testing.assert_close(table, expected, rtol=0, atol=torch.finfo(torch.float32).eps)


def test_rope_3d_twice_differentiable():
    x = heads(CASES[1], torch.float32).requires_grad_()
    (first,) = torch.autograd.grad(rope_3d(x, CASES[1].grid).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, torch.full_like(x, 2.0))  # a rotation keeps |x|^2


def test_compile_fullgraph():
    case = CASES[1]

    def block(x, weight, start_frame):
        q = qk_norm_rope(x, weight, case.heads, case.grid, start_frame)
        return rope_3d(q, case.grid, 2).square().sum()

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for start_frame in (4, 9, *(torch.tensor(start, dtype=torch.int32) for start in ([5], [5, 70]))):
        x, weight = features(case, torch.float32).requires_grad_(), torch.rand(48, requires_grad=True)
        expected, actual = block(x, weight, start_frame), compiled(x, weight, start_frame)
        torch.testing.assert_close(actual, expected)
        for ours, theirs in zip(
            torch.autograd.grad(actual, (x, weight)), torch.autograd.grad(expected, (x, weight)), strict=True
        ):
            torch.testing.assert_close(ours, theirs)


def test_autocast_changes_nothing():
    x, weight = features(CASES[1], torch.float32), torch.rand(48)
    expected = qk_norm_rope(x, weight, 2, CASES[1].grid)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(qk_norm_rope(x, weight, 2, CASES[1].grid), expected)
        assert rope_3d(expected, CASES[1].grid).dtype == torch.float32


def test_same_bits_with_any_number_of_threads():
    case = CASES[7]
    x, weight = features(case, torch.float32), torch.rand(192)
    weights = torch.randn(4, case.tokens, 3, 64)
    results = []
    for threads in (1, 2, 2):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        with num_threads(threads):
            y = qk_norm_rope(*leaves, 3, case.grid, case.start())
            results.append((y, *torch.autograd.grad((y * weights).sum(), leaves), rope_3d(y, case.grid, case.start())))
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            assert_same_bits(actual.detach(), expected.detach())


GRID = (2, 3, 4)
X4, X3, WEIGHT = torch.zeros(1, 24, 2, 8), torch.zeros(1, 24, 16), torch.ones(16)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rope_3d(X4.double(), GRID), TypeError, "x is float64, but must be float32, bfloat16 or float16"),
        (lambda: rope_3d(X3, GRID), ValueError, r"x has shape \[1, 24, 16\], but must have four dimensions"),
        (lambda: rope_3d(X4.transpose(2, 3), GRID), ValueError, "x has stride 8 in its last dimension"),
        (lambda: rope_3d(X4[..., :7], GRID), ValueError, "x has head dim 7, but must have an even one up to 256"),
        (lambda: rope_3d(torch.zeros(1, 24, 1, 258), GRID), ValueError, "x has head dim 258, but must"),
        (lambda: rope_table(GRID, 7), ValueError, "head_dim is 7, but must be even and up to 256"),
        (lambda: rope_table((2, 3), 8), ValueError, r"grid is \(2, 3\), but must be the numbers of tokens"),
        (lambda: rope_3d(X4, (2, 3, 5)), ValueError, r"x has 24 tokens, but grid \(2, 3, 5\) has 30"),
        (lambda: rope_3d(X4, (6, 4)), ValueError, r"grid is \(6, 4\), but must be the numbers of tokens"),
        (lambda: rope_3d(X4, (-2, -3, 4)), ValueError, r"grid is \(-2, -3, 4\), but must be the numbers"),
        (
            lambda: rope_3d(X4, GRID, torch.tensor([1])),
            TypeError,
            "start_frame is int64, but must be an int or an int32",
        ),
        (lambda: rope_3d(X4, GRID, 1.5), TypeError, "start_frame is float, but must be an int or an int32 tensor"),
        (lambda: rope_3d(X4, GRID, 2**31), ValueError, "start_frame is 2147483648, but must be in"),
        (
            lambda: rope_3d(X4, GRID, torch.zeros(2, dtype=torch.int32)),
            ValueError,
            r"start_frame has shape \[2\], but must be an int or have shape \[1\] or \[1\] like the batch of x",
        ),
        (
            lambda: rope_3d(X4.repeat(3, 1, 1, 1), GRID, torch.zeros(1, 3, dtype=torch.int32)),
            ValueError,
            r"start_frame has shape \[1, 3\], but must be an int or have shape \[1\] or \[3\] like the batch of x",
        ),
        (
            lambda: rope_3d(X4, GRID, torch.zeros(1, dtype=torch.int32, device="meta")),
            ValueError,
            "start_frame is on meta, but must be on cpu like x",
        ),
        (lambda: qk_norm_rope(X4, WEIGHT, 2, GRID), ValueError, r"but must have three dimensions \[B, L, H \* D\]"),
        (lambda: qk_norm_rope(X3.int(), WEIGHT, 2, GRID), TypeError, "x is int32, but must be float32"),
        (lambda: qk_norm_rope(X3[..., ::2], WEIGHT[::2], 1, GRID), ValueError, "x has stride 2 in its last dimension"),
        (lambda: qk_norm_rope(X3, WEIGHT, 3, GRID), ValueError, "num_heads is 3, but must divide the 16 channels of x"),
        (
            lambda: qk_norm_rope(X3, WEIGHT, 4, GRID),
            ValueError,
            "x has head dim 4, but must have a multiple of 8 up to 256",
        ),
        (
            lambda: qk_norm_rope(X3, WEIGHT[:8], 2, GRID),
            ValueError,
            r"weight has shape \[8\], but must have shape \[16\]",
        ),
        (lambda: qk_norm_rope(X3, WEIGHT.int(), 2, GRID), TypeError, "weight is int32, but must be a floating dtype"),
        (lambda: qk_norm_rope(X3, WEIGHT.to("meta"), 2, GRID), ValueError, "weight is on meta, but must be on cpu"),
        (lambda: qk_norm_rope(X3, WEIGHT, 2, GRID, eps=-1.0), ValueError, r"eps is -1.0, but must not be below 0"),
        (lambda: qk_norm_rope(X3, WEIGHT, 2, (1, 3, 4)), ValueError, r"x has 24 tokens, but grid \(1, 3, 4\) has 12"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


START = torch.zeros(1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.rope_3d(X3, START, GRID, False),
            r"rope_3d: x has shape \[1, 24, 16\], but must be \[B, L, H, D\]",
        ),
        (lambda: ops.rope_3d(X4, START, (1, 2, 3), False), r"x has 24 tokens, but grid \[1, 2, 3\] has 6"),
        (lambda: ops.rope_3d(X4, START, (24,), False), "grid has 1 sizes, but must have 3"),
        (lambda: ops.rope_3d(X4, START.long(), GRID, False), "start_frame is int64, but must be int32"),
        (
            lambda: ops.rope_3d(X4.repeat(3, 1, 1, 1), START.repeat(2), GRID, False),
            r"start_frame has shape \[2\], but must be \[1\] or \[B\] = \[3\]",
        ),
        (lambda: ops.rope_3d(X4, START[0], GRID, False), r"start_frame has shape \[\], but must be \[1\]"),
        (
            lambda: ops.rope_3d(X4.double(), START, GRID, False),
            "x is float64, but must be float32, bfloat16 or float16",
        ),
        (lambda: ops.rope_3d(X4.transpose(2, 3), START, GRID, False), "x has stride 8 in its last dimension"),
        (lambda: ops.rope_3d(X4[..., :7], START, GRID, False), "head dim 7, but must have a multiple of 2 up to 256"),
        (lambda: ops.qk_norm_rope(X3, WEIGHT.half(), START, 2, GRID, 0.0), "weight is float16, but must be float32"),
        (lambda: ops.qk_norm_rope(X3, WEIGHT, START, 5, GRID, 0.0), "num_heads is 5, but must divide the 16 channels"),
        (
            lambda: ops.qk_norm_rope_backward(X4, X3, WEIGHT, torch.zeros(1, 23), START, GRID),
            r"rstd has shape \[1, 23\], but must be \[B, L\] = \[1, 24\]",
        ),
        (
            lambda: ops.qk_norm_rope_backward(X4.half(), X3, WEIGHT, torch.zeros(1, 24), START, GRID),
            "grad_y is float16, but must be float32 like x",
        ),
    ],
)
def test_bad_input_of_the_op(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
