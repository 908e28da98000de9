"""The loop around a stage: steps, metrics, samples, checkpoints and resuming."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from python_ref.checkpoint import Checkpointer
from python_ref.config import Config, to_yaml
from python_ref.data.prompts import evaluation_prompts
from python_ref.drift import watch_drift
from python_ref.metrics import LogWindow, MetricsLog, ProgressLine, open_boards, read_metrics
from python_ref.plots import plot_losses
from python_ref.processes import is_first_process, mean_over_processes
from python_ref.randomness import derived_generator
from python_ref.run_facts import record_run
from python_ref.stages import Stage
from python_ref.video_output import grid, write_contact_sheet, write_gif


class Trainer:
    """Runs a stage and keeps what it makes in `config.output`:

    `<stage>.yaml` (all settings), logs/<stage>/ (run.json, metrics.jsonl and what boards keep), samples/ (videos,
    curves of losses, drift plots), checkpoints/<stage>/ and `<stage>.safetensors`: the averaged weights that later
    stages, `generate` and `evaluate` take, renewed with every checkpoint.

    With several processes each has a trainer. All of them make samples, whose networks may be spread over all; each
    writes its part of a checkpoint, and the first writes everything else.

    Args:
        config: the run's settings.
        stage: what to train.
        prompts: captions of the samples; None: digits, as many as `config.logging.sample_prompts`.
        show: makes samples that people can look at from the stage's, as a `TrainingSource` does.
    """

    def __init__(
        self,
        config: Config,
        stage: Stage,
        prompts: list[str] | None = None,
        show: Callable[[Tensor], Tensor] = lambda video: video,
    ) -> None:
        self.config, self.stage, self.show = config, stage, show
        self.folder = Path(config.output)
        self.prompts = prompts or evaluation_prompts(config.logging.sample_prompts)
        self.checkpointer = Checkpointer(self.folder / "checkpoints" / stage.name, config.logging.keep_checkpoints)
        self.weights_path = self.folder / f"{stage.name}.safetensors"

    def run(self) -> Path:
        """Trains from the newest checkpoint (with `resume=true`) or from the start; returns the weights file."""
        first_step = self._first_step()
        logging = self.config.logging
        record = _Record(self.config, self.stage, first_step) if is_first_process() else None
        try:
            for step in range(first_step, self.stage.total_steps):
                metrics = mean_over_processes(self.stage.train_step(step))
                done, last = step + 1, step + 1 == self.stage.total_steps
                if record is not None:
                    record.add(done, metrics, write=done % logging.log_every == 0 or last)
                if done % logging.checkpoint_every == 0 or last:
                    self._save(done)
                if done % logging.sample_every == 0 or last:
                    self._write_samples(done)
        finally:
            if record is not None:
                record.close()
        if first_step >= self.stage.total_steps:
            self._save_weights(first_step)
        return self.weights_path

    def _first_step(self) -> int:
        if not self.config.resume:
            self.checkpointer.set_aside()
            return 0
        state = self.checkpointer.load(self.stage.modules, self.stage.optimizers)
        if state["seed"] != self.config.seed:
            raise ValueError(f"seed is {self.config.seed}, but the checkpoint was made with seed {state['seed']}")
        return state["step"]

    def _save(self, step: int) -> None:
        self.checkpointer.save(step, self.stage.modules, self.stage.optimizers, {"seed": self.config.seed})
        self._save_weights(step)

    def _save_weights(self, step: int) -> None:
        self.stage.average.save(self.weights_path, stage=self.stage.name, step=step, seed=self.config.seed)

    def _write_samples(self, step: int) -> None:
        folder, stage = self.folder / "samples", self.stage.name
        name, block = f"{stage}_{step:06d}", self.config.rollout.frames_per_block
        with torch.no_grad():
            videos = self.stage.sample(self.prompts, derived_generator(self.config.seed, stage, "samples"))
        if is_first_process():
            folder.mkdir(exist_ok=True)
            videos = self.show(videos)
            write_contact_sheet(folder / f"{name}.png", videos, self.prompts, block=block)
            write_gif(folder / f"{name}.gif", grid(videos, columns=4))
            entries = read_metrics(self.folder / "logs" / stage / "metrics.jsonl")
            plot_losses(folder / f"{stage}_losses.png", {stage: entries})
        if self.config.logging.drift_videos:
            watch_drift(folder / f"{name}_drift.png", f"{stage}, step {step}", self.stage.average, self.config)


class _Record:
    """What a run tells of its steps: its settings, the metrics log and the progress line."""

    def __init__(self, config: Config, stage: Stage, first_step: int) -> None:
        folder = Path(config.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{stage.name}.yaml").write_text(to_yaml(config), encoding="utf-8")
        logs = folder / "logs" / stage.name
        record_run(logs, config, first_step)
        self.log = MetricsLog(logs, first_step, open_boards(config, logs, first_step))
        self.progress = ProgressLine(stage.name, first_step, stage.total_steps)
        self.window = LogWindow()

    def add(self, done: int, metrics: dict[str, float], write: bool) -> None:
        """Shows the metrics of one step, and if asked writes the means since the last time."""
        self.window.add(metrics)
        self.progress.update(done, {name: value for name, value in metrics.items() if "loss" in name})
        if write:
            self.log.write(done, self.window.close())

    def close(self) -> None:
        self.progress.close()
        self.log.close()
