"""What quantised caches cost: error of attention, drift of a rollout, and time of a write.

    python benchmarks/kv_quantization.py [--checkpoint outputs/demo/self_forcing.safetensors]
        [--num-videos N] [--num-frames F] [--backend ext|reference] [--precision fp32|bf16] [--threads N]

Prints Markdown tables. Without a checkpoint the model is the teacher that ships, which cannot roll out: no drift.

"Error of attention": the model's queries, keys and values on real held-out videos, recorded in a clean pass; the last
block attends to a quantised past and to its own keys as they are. Errors are ||actual - exact|| / ||exact|| in float64,
the mean over layers. Keys are stored as the two kinds of cache store them: after rotary embedding ("on write") or
before ("on read"). An offset is the mean of the keys of videos from the training split.

"Drift": videos of the evaluation's prompts, rolled out with the same noise in all rows. The difference is the root mean
square of pixels (-1 to 1) from the rollout with an unquantised cache of the same kind; "model in bfloat16" shows for
comparison what rounding all of the model does. Identity: share of the videos whose digit is read as the one asked for.

"Time of a write": one layer's block into pages, against pages that are not quantised and against the definition in
plain PyTorch, in turns in one process; medians.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parents[1]))

from timing import median_times

from python_ref.config import EvaluationConfig, RolloutConfig
from python_ref.data.moving_digits import MovingDigits, MovingDigitsConfig
from python_ref.data.prompts import evaluation_prompts
from python_ref.evaluate import generate_set, load_for_generation
from python_ref.measures.report import Judge
from python_ref.models.captioned import CaptionedModel
from python_ref.models.wan import CausalWanModel
from python_ref.ops.quantization import INT4_GROUP, LARGEST, STORAGE, dequantise, quantise
from python_ref.ops.rope import rope_3d
from selfforcing_ext.library import ops
from selfforcing_ext.mask import BlockCausalMask

TEACHER = Path(__file__).parents[1] / "assets" / "teacher.safetensors"
FORMATS = list(LARGEST)
Layer = tuple[Tensor, Tensor, Tensor]  # q, k, v [B, L, H, D]


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}\n")
    for row in (columns, ["---"] + ["---:"] * (len(columns) - 1), *rows):
        print(f"| {' | '.join(row)} |")


def root_mean_square(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


# ---- Error of attention


@torch.no_grad()
def record(network: CaptionedModel, video: Tensor, captions: list[str], frames_per_block: int) -> list[Layer]:
    """Queries, keys and values of every layer in a clean pass over whole videos, float32, after rotary embedding."""
    layers: list[Layer] = []

    def listen(_: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        *others, attend = arguments

        def recording(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            layers.append((q, k, v))
            return attend(q, k, v)

        return (*others, recording)

    model, context = network.model, network.contexts(captions)[0]
    hooks = [block.register_forward_pre_hook(listen) for block in model.blocks]
    if isinstance(model, CausalWanModel):
        _, rows, columns = model.config.grid(video.shape)
        mask = BlockCausalMask(video.shape[1], rows * columns, frames_per_block)
        model(video, video.new_zeros(video.shape[:2]), context, mask=mask)
    else:
        model(video, video.new_zeros(video.shape[0]), context)
    for hook in hooks:
        hook.remove()
    return layers


def unrotated(k: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Rotates by minus the angles: as complex numbers, the conjugate of the conjugate's rotation."""
    conjugate = torch.ones(k.shape[-1])
    conjugate[1::2] = -1
    return conjugate * rope_3d(conjugate * k, grid)


def read_back(x: Tensor, format: str | None, offset: Tensor | None = None) -> Tensor:
    if format is None:
        return x.bfloat16().float()
    return dequantise(*quantise(x, format, offset), format, offset)


def attention_error(q: Tensor, keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor], own: int) -> float:
    """Relative error of the last ``own`` tokens' attention. ``keys`` and ``values``: as read back, and exact."""

    def attend(k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q[:, -own:], k, v)))

    read_k, read_v = (torch.cat([read[:, :-own], exact[:, -own:]], dim=1) for read, exact in (keys, values))
    return relative_error(attend(read_k, read_v), attend(keys[1], values[1]))


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact.double()).norm() / exact.double().norm())


def errors_of(
    layer: Layer, grid: tuple[int, int, int], own: int, format: str | None, offsets: tuple[Any, Any]
) -> list[float]:
    """Relative errors of stored keys, of values, and of attention with either kind of cache. ``format`` None: bfloat16.
    ``offsets``: of keys on write and on read, or None."""
    q, k, v = layer
    on_write, on_read = offsets
    keys, values = read_back(k, format, on_write), read_back(v, format)
    rotated = rope_3d(read_back(unrotated(k, grid), format, on_read), grid)
    return [
        relative_error(keys, k),
        relative_error(values, v),
        attention_error(q, (keys, k), (values, v), own),
        attention_error(q, (rotated, k), (values, v), own),
    ]


def mean_keys(layers: list[Layer], grid: tuple[int, int, int]) -> list[tuple[Tensor, Tensor]]:
    """Per layer, the mean [H, D] of keys as they are stored on write and on read."""
    return [(k.mean(dim=(0, 1)), unrotated(k, grid).mean(dim=(0, 1))) for _, k, _ in layers]


def attention_table(
    layers: list[Layer], grid: tuple[int, int, int], frames_per_block: int, offsets: list[tuple[Tensor, Tensor]]
) -> None:
    own = frames_per_block * grid[1] * grid[2]
    kinds = {"none": [(None, None)] * len(layers), "mean key": offsets}
    rows = []
    for format, kind in [(None, "none"), *((format, kind) for format in FORMATS for kind in kinds)]:
        errors = [
            errors_of(layer, grid, own, format, of_layer) for layer, of_layer in zip(layers, kinds[kind], strict=True)
        ]
        means = [statistics.mean(of_layers) for of_layers in zip(*errors, strict=True)]
        rows.append([format or "bfloat16", kind, *(f"{100 * mean:.3f} %" for mean in means)])
    table(
        "Error of attention",
        ["pages", "offset", "keys", "values", "attention, rope on write", "attention, rope on read"],
        rows,
    )


# ---- Drift


def videos_and_bits(
    network: CaptionedModel,
    rollout: RolloutConfig,
    settings: EvaluationConfig,
    precision: str,
    key_offset: Tensor | None,
) -> tuple[Tensor, float]:
    """Videos of the evaluation's prompts, and bits of the cache's pages per number."""
    prompts = evaluation_prompts(settings.num_videos)
    make_cache = type(network.model).make_cache
    bits = []

    def make_and_measure(*arguments: Any, **options: Any) -> Any:
        cache = make_cache(network.model, *arguments, **options, key_offset=key_offset)
        elements = {"fp32": 4, "bf16": 2}[precision]  # bytes of one, without quantisation
        plain = make_cache(network.model, *arguments, **options | {"quantization": None})
        bits.append(8 * elements * cache.nbytes / plain.nbytes)
        return cache

    network.model.make_cache = make_and_measure
    return generate_set(network, rollout, prompts, settings, precision), bits[0]


def drift_rows(
    network: CaptionedModel,
    rollout: RolloutConfig,
    settings: EvaluationConfig,
    precision: str,
    key_offset: Tensor,
) -> Iterator[list[str]]:
    judge = Judge(digits_of(network), rollout.frames_per_block)
    prompts = evaluation_prompts(settings.num_videos)
    block = rollout.frames_per_block
    kinds = [("not quantised", precision, None, None)]
    if precision == "fp32":
        kinds.append(("not quantised, model in bfloat16", "bf16", None, None))
    for format in FORMATS:
        kinds += [(format, precision, format, None), (f"{format}, mean key as offset", precision, format, key_offset)]
    exact = None
    for name, in_precision, format, offset in kinds:
        changed = replace(rollout, quantization=format)
        video, bits = videos_and_bits(network, changed, settings, in_precision, offset)
        exact = video if exact is None else exact
        early, late = ((video - exact)[:, frames] for frames in (slice(block, 2 * block), slice(-block, None)))
        summary = judge.measure(video, prompts).summary
        identity = [summary[f"identity{part}"] for part in ("", "_first_block", "_last_block", "_lowest")]
        differences = [f"{root_mean_square(x):.4f}" for x in (early, late)]
        yield [name, rollout.rope, f"{bits:.1f}", *differences, *(f"{x:.3f}" for x in identity)]


def drift_table(
    network: CaptionedModel,
    rollout: RolloutConfig,
    settings: EvaluationConfig,
    precision: str,
    offsets: list[tuple[Tensor, Tensor]],
) -> None:
    rows: list[list[str]] = []
    for rope, key_offset in zip(("on_write", "on_read"), map(torch.stack, zip(*offsets, strict=True)), strict=True):
        rows += drift_rows(network, replace(rollout, rope=rope), settings, precision, key_offset)
    columns = ["pages", "rope", "bits per number", "difference, block 2", "difference, last block"]
    columns += ["identity", "first block", "last block", "lowest frame"]
    table(f"Drift: {settings.num_videos} videos of {settings.num_frames} frames, model in {precision}", columns, rows)


# ---- Time of a write


@dataclass(frozen=True)
class Size:
    batch: int
    tokens: int
    num_heads: int
    head_dim: int


SIZES = {"demo": Size(16, 48, 3, 32), "wan": Size(1, 4680, 12, 128)}  # as in benchmarks/kv_cache.py
PAGE_SIZE = 64


def write_rows(name: str, size: Size, dtype: torch.dtype, seconds: float) -> Iterator[list[str]]:
    k, v = torch.randn(2, size.batch, size.tokens, size.num_heads, size.head_dim).to(dtype)
    row = -(-size.tokens // PAGE_SIZE)
    page_table = torch.arange(size.batch * row, dtype=torch.int32).view(size.batch, row)
    where = page_table, torch.zeros(size.batch, dtype=torch.int32)

    def pages(channels: int, dtype: torch.dtype) -> list[Tensor]:
        shape = (size.batch * row, PAGE_SIZE, size.num_heads, channels)
        return [torch.zeros(shape, dtype=dtype) for _ in range(2)]

    plain = pages(size.head_dim, dtype)
    for format in FORMATS:
        int4 = format == "int4"
        quantised = pages(size.head_dim // 2 if int4 else size.head_dim, STORAGE[format])
        scales = pages(size.head_dim // INT4_GROUP if int4 else 1, torch.bfloat16)
        ours, definition, copy = median_times(
            [
                functools.partial(ops.kv_cache_write, *quantised, *where, k, v, *scales),
                lambda format=format: (quantise(k, format), quantise(v, format)),
                functools.partial(ops.kv_cache_write, *plain, *where, k, v),
            ],
            seconds,
        )
        times = [f"{1e3 * seconds:.3f} ms" for seconds in (ours, copy, definition)]
        yield [
            name,
            str(dtype).removeprefix("torch."),
            format,
            *times,
            f"{copy / ours:.2f}",
            f"{definition / ours:.1f}",
        ]


def write_table(seconds: float) -> None:
    rows = [
        row
        for name, size in SIZES.items()
        for dtype in (torch.float32, torch.bfloat16)
        for row in write_rows(name, size, dtype, seconds)
    ]
    columns = ["size", "from", "pages", "write", "not quantised", "definition", "of not quantised", "of definition"]
    table(f"Time of a write, {torch.get_num_threads()} threads", columns, rows)


# ---- The command line


def digits_of(network: CaptionedModel, **changes: Any) -> MovingDigitsConfig:
    settings = {"frame_size": network.settings["frame_size"], "num_frames": network.settings["num_frames"]}
    return MovingDigitsConfig(**settings | changes)


def study(options: argparse.Namespace) -> None:
    network, rollout = load_for_generation(options.checkpoint, options.backend)
    frames_per_block = (rollout or RolloutConfig()).frames_per_block
    recorded = {}
    for split in ("train", "held_out"):
        digits = digits_of(network, split=split, omit_motion_probability=0.0)
        batch = MovingDigits(digits).batch(0, options.num_videos)
        recorded[split] = record(network, batch.video, batch.captions, frames_per_block)
    grid = network.model.config.grid(batch.video.shape)
    offsets = mean_keys(recorded["train"], grid)
    attention_table(recorded["held_out"], grid, frames_per_block, offsets)
    settings = EvaluationConfig(options.num_videos, options.num_frames)
    if rollout is not None:
        drift_table(network, rollout, settings, options.precision, offsets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(TEACHER), help="weights of a causal model or of a teacher")
    parser.add_argument("--num-videos", type=int, default=EvaluationConfig.num_videos)
    parser.add_argument("--num-frames", type=int, default=EvaluationConfig.num_frames)
    parser.add_argument("--backend", default="ext", choices=("ext", "reference"))
    parser.add_argument("--precision", default="fp32", choices=("bf16", "fp32"))
    parser.add_argument("--seconds", type=float, default=1.0, help="per row of timings")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    study(options)
    write_table(options.seconds)


if __name__ == "__main__":
    main()
