"""Ways to train a causal video model, compared: `python -m python_ref.reproduce --config configs/reproduce.yaml` (what
`make reproduce` runs).

Self-Forcing (arXiv 2506.08009) says that quality which decays along a rollout under teacher and diffusion forcing
stays if a model is trained on its own rollouts. Here each method starts from the same causal model, trains for the same
time on moving digits or on clips of video files, with several seeds, and generates videos several times as long as
those of training, which are measured frame by frame. The report is written whatever comes out.

The same command goes on where it was killed: finished runs are not done again, and others go on from their checkpoint.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from python_ref import make_ode_pairs
from python_ref.checkpoint import Checkpointer
from python_ref.command_line import add_overrides, exit_status
from python_ref.comparison import VARIANTS, FinishedRun, folder_name, write_report
from python_ref.config import Config, RolloutConfig, load_config
from python_ref.data.source import open_source, video_shape
from python_ref.evaluate import generate_set, load_for_generation
from python_ref.train import make_stage, train
from python_ref.video_output import write_contact_sheet
from python_ref.yardsticks import open_yardstick

CLOCKS = {"cpu": time.process_time, "wall": time.monotonic}
MEASURED_CYCLES = 2  # of the generator's updates, to tell how long a step takes
SHOWN_VIDEOS = 6


@dataclass(frozen=True)
class Reproduction:
    """The settings of all runs, as they were given.

    Args:
        file: YAML.
        overrides: `section.key=value`, of all runs.
    """

    file: str
    overrides: tuple[str, ...]

    @property
    def config(self) -> Config:
        return load_config(self.file, self.overrides)

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def teacher(self) -> str:
        """Its weights: those given, or those that are trained first."""
        own = self.config.reproduce.teacher_steps
        return str(self.output / "start" / "teacher.safetensors") if own else self.config.self_forcing.teacher

    def folder(self, method: str, seed: int) -> Path:
        return self.output / "runs" / folder_name(method) / f"seed_{seed}"

    def run_config(self, method: str, seed: int, steps: int) -> Config:
        """Of one method's run, whose stage starts from the common start."""
        start, pairs = self.output / "start" / "causal.safetensors", self.output / "ode_pairs"
        own = self.config.reproduce.methods[method]
        stage = load_config(self.file, [*self.overrides, *own]).stage
        common = [
            *(f"{section}.init={start}" for section in ("causal", "ode", "consistency", "self_forcing")),
            f"self_forcing.teacher={self.teacher}",
            f"consistency.teacher={start}",
            f"ode.pairs={pairs}",
            f"output={self.folder(method, seed)}",
            f"seed={seed}",
            f"{stage}.steps={steps}",
        ]
        return load_config(self.file, [*self.overrides, *own, *common])


def reproduce(reproduction: Reproduction) -> Path:
    """Does what is not done yet, then writes the report; returns its path."""
    config = reproduction.config
    settings = config.reproduce
    if not settings.methods:
        raise ValueError("reproduce.methods is empty; accepted: names with overrides, as in configs/reproduce.yaml")
    yardstick = open_yardstick(config)
    prepare_start(reproduction)
    steps = plan_steps(reproduction)
    tasks = [(reproduction, method, seed, steps[method]) for seed in settings.seeds for method in settings.methods]
    with ProcessPoolExecutor(settings.workers, mp_context=get_context("spawn")) as pool:
        runs = []
        for run in pool.map(finish_run, *zip(*tasks, strict=True)):
            runs.append(run)
            print(f"{len(runs)}/{len(tasks)}: {run.method}, seed {run.seed}", flush=True)
    return write_report(Path(settings.report), config, yardstick, runs, steps)


def prepare_start(reproduction: Reproduction) -> None:
    """The teacher, if it is not given, the causal model that all methods start from, and the solutions of the teacher's
    ODE."""
    config = reproduction.config
    start = replace(config, stage="causal", output=str(reproduction.output / "start"))
    if config.reproduce.teacher_steps:
        _train(replace(start, stage="teacher", teacher=replace(config.teacher, steps=config.reproduce.teacher_steps)))
    start.causal = replace(start.causal, init=reproduction.teacher, steps=config.reproduce.start_steps)
    _train(start)
    if any("stage=ode" in own for own in config.reproduce.methods.values()):
        arguments = [
            *("--checkpoint", reproduction.teacher, "--output", str(reproduction.output / "ode_pairs")),
            *("--pairs", str(config.reproduce.pairs), "--threads", str(config.threads)),
            *("--precision", config.precision, "--backend", config.backend),
            *("--denoising-steps", *map(str, config.rollout.denoising_steps)),
            *("--config", str(reproduction.output / "start" / "causal.yaml")),  # whose captions count
        ]
        if make_ode_pairs.main(arguments) != 0:
            raise ValueError("the ODE pairs could not be made")


def plan_steps(reproduction: Reproduction) -> dict[str, int]:
    """Training steps that fill the time of each method. They are measured once and kept, so that a run which goes on
    has the same learning rates."""
    file = reproduction.output / "plan.json"
    settings = reproduction.config.reproduce
    wanted = {key: value for key, value in asdict(settings).items() if key not in ("workers", "report", "seeds")}
    if file.is_file():
        plan = json.loads(file.read_text(encoding="utf-8"))
        if plan["settings"] != wanted:
            raise ValueError(f"{file} was made with other settings; accepted: those, or another output folder")
        return plan["steps"]
    seconds = {method: seconds_per_step(reproduction, method) for method in settings.methods}
    steps = {method: max(1, round(settings.seconds / cost)) for method, cost in seconds.items()}
    _write(file, {"settings": wanted, "steps": steps, "seconds_per_step": seconds})
    return steps


def seconds_per_step(reproduction: Reproduction, method: str) -> float:
    """On average over whole cycles of generator and critic, after one that warms up."""
    config = reproduction.run_config(method, 0, steps=1)
    torch.set_num_threads(config.threads)
    stage = make_stage(config, open_source(config.data))
    cycle = config.self_forcing.generator_every
    clock = CLOCKS[config.reproduce.clock]
    start = 0.0
    for step in range(cycle * (1 + MEASURED_CYCLES)):
        if step == cycle:
            start = clock()
        stage.train_step(step)
    return (clock() - start) / (cycle * MEASURED_CYCLES)


def finish_run(reproduction: Reproduction, method: str, seed: int, steps: int) -> FinishedRun:
    """Trains and measures one method with one seed, unless that was done."""
    folder = reproduction.folder(method, seed)
    result = folder / "result.json"
    if result.is_file():
        return FinishedRun(**json.loads(result.read_text(encoding="utf-8")))
    config = reproduction.run_config(method, seed, steps)
    folder.mkdir(parents=True, exist_ok=True)
    clock = CLOCKS[config.reproduce.clock]
    with open(folder / "log.txt", "a", encoding="utf-8") as log, redirect_stdout(log):
        began = clock()
        goes_on = _train(config)
        seconds = None if goes_on else clock() - began
        run = FinishedRun(method, seed, seconds, measure(config, folder))
    _write(result, asdict(run))
    return run


def measure(config: Config, folder: Path) -> dict[str, dict[str, Any]]:
    """Measures of long videos under every variant of the cache, and a sheet of them."""
    weights = folder / f"{config.stage}.safetensors"
    network, _ = load_for_generation(weights, config.backend)
    trained, block = video_shape(config.data)[0], config.rollout.frames_per_block
    settings = replace(config.evaluation, num_frames=config.reproduce.long_factor * trained)
    yardstick = open_yardstick(config)
    prompts = yardstick.prompts(settings.num_videos)
    found = {}
    for name, rollout in variants(config).items():
        videos = generate_set(network, rollout, prompts, settings, config.precision)
        found[name] = yardstick.measure(videos, prompts)
        every_block = videos[:SHOWN_VIDEOS, block - 1 :: block]
        write_contact_sheet(folder / f"{name.replace(' ', '_')}.png", every_block, prompts[:SHOWN_VIDEOS])
    return found


def variants(config: Config) -> dict[str, RolloutConfig]:
    """What a block sees: all, the window of training, or that and a sink."""
    rollout, window, sink = config.rollout, config.rollout.window_frames, config.reproduce.sink_frames
    seen = ({"window_frames": None}, {"window_frames": window}, {"window_frames": window, "sink_frames": sink})
    return {name: replace(rollout, **options) for name, options in zip(VARIANTS, seen, strict=True)}


def _train(config: Config) -> bool:
    """Trains to the end; whether it went on from a checkpoint."""
    checkpoints = Checkpointer(Path(config.output) / "checkpoints" / config.stage)
    goes_on = bool(checkpoints.steps())
    train(replace(config, resume=goes_on))
    return goes_on


def _write(path: Path, document: dict[str, Any]) -> None:
    temporary = path.with_suffix(".writing")
    temporary.write_text(json.dumps(document, indent=1), encoding="utf-8")
    temporary.rename(path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m python_ref.reproduce", description=__doc__)
    parser.add_argument("--config", default="configs/reproduce.yaml")
    add_overrides(parser)
    parsed = parser.parse_args(arguments)
    return exit_status(
        lambda: print(f"written: {reproduce(Reproduction(parsed.config, tuple(parsed.overrides)))}"),
        if_interrupted="the same command goes on",
    )


if __name__ == "__main__":
    sys.exit(main())
