"""What a training step costs, before there is a GPU: `python -m python_ref.plan --config FILE --processes 64`.

Parameters and bytes of the KV cache are exact, activations and operations follow from the sizes of the model
(`python_ref.costs`). Time is operations over what a GPU reaches: its peak times an assumed share of it. Left out are
traffic between GPUs, the encoders, what is needed only while a layer runs, and what the allocator loses to fragments.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Column, Table

from python_ref.command_line import add_overrides, exit_status
from python_ref.config import Config, load_config
from python_ref.costs import WIDE, Flops, activation_bytes, count_parameters, forward_flops, text_flops
from python_ref.data.source import video_shape
from python_ref.models.captioned import wan_config
from python_ref.models.wan import CausalWanModel
from python_ref.models.wan_layers import WanConfig
from python_ref.published.sizes import NAMES, model_config
from selfforcing_ext.kv_cache import PagedKVCache
from selfforcing_ext.mask import BlockCausalMask


@dataclass(frozen=True)
class Gpu:
    """A GPU of a data sheet: dense products of bfloat16 with float32 sums, and memory."""

    name: str
    peak_tflops: float
    memory_gb: float
    source: str


GPUS = (
    Gpu("RTX 4090", 165.2, 24, "NVIDIA Ada GPU Architecture, appendix A"),
    Gpu("A100 80GB SXM", 312, 80, "NVIDIA A100 Tensor Core GPU data sheet"),
    Gpu("H100 SXM", 989.5, 80, "NVIDIA H100 Tensor Core GPU data sheet, half of the figure with sparsity"),
    Gpu("H200 SXM", 989.5, 141, "NVIDIA H200 Tensor Core GPU data sheet, half of the figure with sparsity"),
    Gpu("B200 (HGX)", 2250, 180, "NVIDIA HGX B200 data sheet, an eighth of the board's dense figure"),
)


@dataclass
class Plan:
    """Costs of a run.

    Attributes:
        videos: of an optimizer step, over all processes and accumulated parts.
        per_process: videos that a process computes together.
        parameters: of each network.
        states: bytes per process that stay: weights, moments, gradients, the cache.
        activations: bytes per process of each backward pass, kept and with recomputation; only one pass is alive.
        work: per video, and how often in an optimizer step.
    """

    videos: int
    per_process: int
    parameters: dict[str, int] = field(default_factory=dict)
    states: dict[str, float] = field(default_factory=dict)
    activations: dict[str, tuple[int, int]] = field(default_factory=dict)
    work: dict[str, tuple[Flops, float]] = field(default_factory=dict)

    def memory(self, recompute: bool) -> float:
        """Bytes per process at the most."""
        return sum(self.states.values()) + max(sizes[recompute] for sizes in self.activations.values())

    def flops(self) -> float:
        """Of an optimizer step, all videos."""
        return self.videos * sum(flops.total * times for flops, times in self.work.values())


def make_plan(config: Config, processes: int = 1, teacher: WanConfig | None = None) -> Plan:
    """The costs of `config.stage`.

    Args:
        config: of the run.
        processes: that share it, one per GPU.
        teacher: sizes of the teacher of self-forcing; None: those of `config.model`.

    Raises:
        ValueError: a stage or a way to train that is not planned, or a batch that processes cannot share.
    """
    if config.stage == "self_forcing":
        return _plan_self_forcing(config, processes, teacher)
    if config.stage in ("teacher", "causal"):
        return _plan_examples(config, processes)
    raise ValueError(f"stage is {config.stage!r}; accepted: 'teacher', 'causal' and 'self_forcing'")


class _Sizes:
    """What all plans start from."""

    def __init__(self, config: Config, processes: int, batch_size: int) -> None:
        if processes < 1 or batch_size % processes:
            raise ValueError(f"processes is {processes}; accepted: what divides batch_size = {batch_size}")
        if processes > 1 and config.distributed.strategy == "none":
            raise ValueError(f"processes is {processes}; accepted with distributed.strategy=none: 1")
        self.frames, channels, frame_shape = video_shape(config.data)
        self.model = wan_config(config.model, channels, frame_shape)
        if config.model.patch_size[0] != 1:
            raise ValueError(f"model.patch_size is {config.model.patch_size}; accepted: one frame per token")
        self.frame_seqlen = frame_seqlen(config)
        self.narrow = 2 if config.precision == "bf16" else WIDE
        self.per_process = batch_size // processes
        self.shards = processes if config.distributed.strategy == "fsdp" else 1

    def add_states(self, plan: Plan, networks: Mapping[str, WanConfig], trained: Sequence[str]) -> None:
        """Weights, moments and gradients of the networks; only one network's gradients are alive at a time."""
        plan.parameters = {name: count_parameters(network) for name, network in networks.items()}
        learning = [plan.parameters[name] for name in trained]
        plan.states["weights"] = WIDE * sum(plan.parameters.values()) / self.shards
        plan.states["AdamW's moments"] = 2 * WIDE * sum(learning) / self.shards
        plan.states["gradients"] = WIDE * max(learning) / self.shards
        if self.shards > 1:
            layers = (plan.parameters[name] / network.num_layers for name, network in networks.items())
            plan.states["a layer, gathered"] = WIDE * max(layers)

    def activations(
        self, model: WanConfig, tokens: int, timesteps: int, calls: int = 1, videos: int = 1
    ) -> tuple[int, int]:
        """Of `videos` for each video of the process; kept, and with recomputation."""
        videos = videos * self.per_process
        kept, recomputed = (
            activation_bytes(model, tokens, timesteps, self.narrow, calls, videos, recompute)
            for recompute in (False, True)
        )
        return kept, recomputed


def _plan_examples(config: Config, processes: int) -> Plan:
    """One pass over whole videos, forward and backward."""
    settings = config.teacher if config.stage == "teacher" else config.causal
    sizes = _Sizes(config, processes, settings.batch_size)
    model, frames, seqlen = sizes.model, sizes.frames, sizes.frame_seqlen
    plan = Plan(settings.batch_size * settings.accumulate, sizes.per_process)
    sizes.add_states(plan, {"model": model, "average": model}, ["model"])
    tokens, timesteps, pairs = frames * seqlen, 1, (frames * seqlen) ** 2
    if config.stage == "causal":
        forced = config.causal.forcing == "teacher"
        mask = BlockCausalMask(frames, 1, **config.rollout.blocks(), teacher_forcing=forced)
        tokens, timesteps = (2 if forced else 1) * tokens, (2 if forced else 1) * frames
        pairs = int(mask.dense().sum()) * seqlen**2
    forward = forward_flops(model, tokens, pairs, timesteps) + text_flops(model)
    plan.activations["backward"] = sizes.activations(model, tokens, timesteps)
    plan.work["forward"] = forward, 1
    plan.work["backward"] = forward.backward(), 1
    if config.checkpoint_activations:
        plan.work["recomputation"] = forward, 1
    return plan


def _plan_self_forcing(config: Config, processes: int, teacher: WanConfig | None) -> Plan:
    """A generator update every `generator_every` steps, a critic update in each."""
    settings, rollout = config.self_forcing, config.rollout
    for name, value, accepted in (
        ("objective", settings.objective, ("dmd", "sid")),
        ("videos", settings.videos, ("rollout",)),
        ("cache_gradient", settings.cache_gradient, ("constant",)),
        ("stream_steps", settings.stream_steps, (0,)),
        ("given_frames", settings.given_frames, (0,)),
        ("lora_rank", settings.lora_rank, (0,)),
    ):
        if value not in accepted:
            raise ValueError(f"self_forcing.{name} is {value!r}; accepted in a plan: {', '.join(map(repr, accepted))}")
    sizes = _Sizes(config, processes, settings.batch_size)
    generator, seqlen = sizes.model, sizes.frame_seqlen
    teacher = teacher or generator
    critic = generator if settings.critic_init else teacher
    plan = Plan(settings.batch_size * settings.accumulate, sizes.per_process)
    networks = {"generator": generator, "average": generator, "critic": critic, "teacher": teacher}
    sizes.add_states(plan, networks, ["generator", "critic"])

    # The rollout: what all blocks see together is what the mask of the whole video shows.
    frames = settings.max_frames or rollout.frames_within(sizes.frames)
    mask = BlockCausalMask(frames, 1, **rollout.blocks())
    seen = mask.dense().sum(1).tolist()  # frames, by frame
    blocks = mask.frame_blocks

    def passes(chosen: Sequence[tuple[int, int]]) -> Flops:
        count = sum(end - start for start, end in chosen)
        pairs = sum(sum(seen[start:end]) for start, end in chosen) * seqlen**2
        return forward_flops(generator, count * seqlen, pairs, count)

    steps = len(rollout.denoising_steps)
    before_exit = steps - 1 if settings.last_step_only else (steps - 1) / 2
    scored = min(frames, sizes.frames)
    with_gradient = [(start, end) for start, end in blocks if start >= frames - (settings.gradient_frames or scored)]
    text = text_flops(generator)
    denoising = passes(blocks) * before_exit
    clean, exits = passes(blocks[:-1]), passes(blocks)
    exit_backward = (passes(with_gradient) + text).backward()

    tokens = scored * seqlen
    score_of = {
        name: forward_flops(network, tokens, tokens**2, 1) + text_flops(network)
        for name, network in (("critic", critic), ("teacher", teacher))
    }
    fake = 2 if settings.fake_guidance_scale else 1
    real = 2 if settings.guidance_scale else 1
    scores = score_of["critic"] * fake + score_of["teacher"] * real
    often = 1 / settings.generator_every
    plan.work = {
        "generator: denoising before the exit": (denoising, often),
        "generator: clean passes": (clean, often),
        "generator: exit steps": (exits + text, often),
        "generator: scores": (scores, often),
        "generator: backward": (exit_backward, often),
        "critic: rollout": (denoising + clean + exits + text, 1),
        "critic: forward": (score_of["critic"], 1),
        "critic: backward": (score_of["critic"].backward(), 1),
    }
    if settings.objective == "sid":
        plan.work["generator: backward through scores"] = (scores.backward(weights=False), often)
    if config.checkpoint_activations:
        again = passes(with_gradient) + (scores if settings.objective == "sid" else Flops())
        plan.work["generator: recomputation"] = (again, often)
        plan.work["critic: recomputation"] = (score_of["critic"], 1)

    longest = max(end - start for start, end in with_gradient)
    kept, recomputed = sizes.activations(generator, longest * seqlen, longest, calls=len(with_gradient))
    if settings.objective == "sid":  # both scores are alive with the rollout
        fake_bytes = sizes.activations(critic, tokens, 1, videos=fake)
        real_bytes = sizes.activations(teacher, tokens, 1, videos=real)
        kept, recomputed = kept + fake_bytes[0] + real_bytes[0], recomputed + fake_bytes[1] + real_bytes[1]
    plan.activations = {"generator": (kept, recomputed), "critic": sizes.activations(critic, tokens, 1)}
    plan.states["KV cache"] = training_cache_bytes(config, frames, sizes.per_process)
    return plan


def frame_seqlen(config: Config) -> int:
    """Tokens per frame."""
    _, _, (rows, columns) = video_shape(config.data)
    _, patch_rows, patch_columns = config.model.patch_size
    return (rows // patch_rows) * (columns // patch_columns)


def training_cache_bytes(config: Config, frames: int, videos: int) -> int:
    """Bytes of the cache of a rollout with gradient.

    The pages that backward will read are not recycled, so that the pool of a window grows. How far, is told by a cache
    of one narrow layer that goes through the same blocks.
    """
    rollout = config.rollout
    size = cache_bytes(config, frames, videos, rollout.window_frames, rollout.sink_frames)
    seqlen = frame_seqlen(config)
    probe = PagedKVCache(1, 1, 8, seqlen, videos, rollout.window_frames, rollout.sink_frames, max_frames=frames)
    before, views = probe.nbytes, []
    for start, end in BlockCausalMask(frames, 1, **rollout.blocks()).frame_blocks[:-1]:  # the last is not written
        views.append(probe.view())
        block = torch.zeros(videos, (end - start) * seqlen, 1, 8)
        probe.write(0, block, block)
        probe.commit(end - start)
    return size * probe.nbytes // before


def cache_bytes(config: Config, frames: int, videos: int, window_frames: int | None, sink_frames: int = 0) -> int:
    """Bytes of the cache of rollouts of `frames` frames without gradient, as it allocates them."""
    _, channels, frame_shape = video_shape(config.data)
    with torch.device("meta"):
        model = CausalWanModel(wan_config(config.model, channels, frame_shape), backend="ext")
    model.to(torch.bfloat16 if config.precision == "bf16" else torch.float32)
    latents = (videos, frames, channels, *frame_shape)
    return model.make_cache(latents, frames, window_frames, sink_frames, **config.rollout.cache_options()).nbytes


def print_plan(config: Config, plan: Plan, processes: int, utilisation: float) -> None:
    """The plan as tables on the terminal."""
    console = Console(width=110, highlight=False)
    console.print(
        f"stage {config.stage}: {plan.videos} videos per optimizer step on {processes} process"
        f"{'es' if processes > 1 else ''}, {plan.per_process} at a time on each\n"
    )
    table = Table("network", _right("parameters"), title="Parameters")
    for name, count in plan.parameters.items():
        table.add_row(name, f"{count:,}")
    console.print(table)

    table = Table("per process", _right("kept, GB"), _right("recomputed, GB"), title="Memory (GB: 10^9 bytes)")
    for name, size in plan.states.items():
        table.add_row(name, _giga(size), _giga(size))
    for name, sizes in plan.activations.items():
        table.add_row(f"activations, {name}", *map(_giga, sizes))
    table.add_row("at the most", *(_giga(plan.memory(recompute)) for recompute in (False, True)), style="bold")
    console.print(table)
    if config.stage == "self_forcing":
        rollout = config.rollout
        frames = config.self_forcing.max_frames or rollout.frames_within(video_shape(config.data)[0])
        size = cache_bytes(config, frames, 1, rollout.window_frames, rollout.sink_frames)
        console.print(f"KV cache when {frames} frames of one video are generated: {_giga(size)} GB\n")

    table = Table("per video", _right("TFLOP"), _right("times per step"), title="Operations")
    for name, (flops, times) in plan.work.items():
        table.add_row(name, f"{flops.total / 1e12:,.1f}", f"{times:.3g}")
    table.add_row("an optimizer step, all videos", f"{plan.flops() / 1e12:,.0f}", "", style="bold")
    console.print(table)

    needed = plan.memory(config.checkpoint_activations) / 1e9
    table = Table("GPU", _right("memory, GB"), "fits", _right("seconds per step"), title="Estimate")
    for gpu in GPUS:
        seconds = plan.flops() / (processes * gpu.peak_tflops * 1e12 * utilisation)
        table.add_row(gpu.name, f"{gpu.memory_gb:g}", "yes" if needed < gpu.memory_gb else "no", f"{seconds:,.3g}")
    console.print(table)
    activations = "recomputed" if config.checkpoint_activations else "kept"
    console.print(
        f"{needed:,.1f} GB with activations {activations}; {utilisation:.0%} of the peak is an assumption. Peaks and "
        "memory from data sheets:"
    )
    for gpu in GPUS:
        console.print(f"  {gpu.name}: {gpu.peak_tflops:g} TFLOP/s ({gpu.source})")


def _right(title: str) -> Column:
    return Column(title, justify="right")


def _giga(size: float) -> str:
    return f"{size / 1e9:,.3f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m python_ref.plan", description=__doc__)
    parser.add_argument("--config", required=True, help="such as configs/wan2.1_1.3b_self_forcing_dmd.yaml")
    parser.add_argument("--processes", type=int, default=1, help="GPUs that share the run")
    parser.add_argument("--teacher", choices=NAMES, help="sizes of the teacher; left out: those of the configuration")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of the peak that is assumed, 0 to 1")
    add_overrides(parser)
    parsed = parser.parse_args(arguments)

    def plan() -> None:
        if not 0 < parsed.utilisation <= 1:
            raise ValueError(f"utilisation is {parsed.utilisation}; accepted: above 0, at most 1")
        config = load_config(parsed.config, parsed.overrides)
        channels, frame_shape = video_shape(config.data)[1:]
        teacher = wan_config(model_config(parsed.teacher), channels, frame_shape) if parsed.teacher else None
        print_plan(config, make_plan(config, parsed.processes, teacher), parsed.processes, parsed.utilisation)

    return exit_status(plan)


if __name__ == "__main__":
    sys.exit(main())
