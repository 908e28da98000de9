"""The loop around a stage: steps, metrics, samples, checkpoints and resuming."""

from pathlib import Path

import torch

from python_ref.checkpoint import Checkpointer
from python_ref.config import Config, to_yaml
from python_ref.data.prompts import evaluation_prompts
from python_ref.metrics import LogWindow, MetricsLog, ProgressLine
from python_ref.randomness import derived_generator
from python_ref.stages import Stage
from python_ref.video_output import grid, write_contact_sheet, write_gif


class Trainer:
    """Runs a stage and keeps what it makes in `config.output`:

    `<stage>.yaml` (all settings), logs/<stage>/ (metrics.jsonl and TensorBoard), samples/, checkpoints/<stage>/ and
    `<stage>.safetensors`: the averaged weights that later stages, `generate` and `evaluate` take, renewed with every
    checkpoint.

    Args:
        config: the run's settings.
        stage: what to train.
        prompts: captions of the samples; None: digits, as many as `config.logging.sample_prompts`.
    """

    def __init__(self, config: Config, stage: Stage, prompts: list[str] | None = None) -> None:
        self.config, self.stage = config, stage
        self.folder = Path(config.output)
        self.prompts = prompts or evaluation_prompts(config.logging.sample_prompts)
        self.checkpointer = Checkpointer(self.folder / "checkpoints" / stage.name, config.logging.keep_checkpoints)
        self.weights_path = self.folder / f"{stage.name}.safetensors"

    def run(self) -> Path:
        """Trains from the newest checkpoint (with `resume=true`) or from the start; returns the weights file."""
        first_step = self._first_step()
        logging = self.config.logging
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{self.stage.name}.yaml").write_text(to_yaml(self.config), encoding="utf-8")
        log = MetricsLog(self.folder / "logs" / self.stage.name, first_step, logging.tensorboard)
        progress = ProgressLine(self.stage.name, first_step, self.stage.total_steps)
        window = LogWindow()
        try:
            for step in range(first_step, self.stage.total_steps):
                metrics = self.stage.train_step(step)
                done, last = step + 1, step + 1 == self.stage.total_steps
                window.add(metrics)
                progress.update(done, {name: value for name, value in metrics.items() if "loss" in name})
                if done % logging.log_every == 0 or last:
                    log.write(done, window.close())
                if done % logging.checkpoint_every == 0 or last:
                    self._save(done)
                if done % logging.sample_every == 0 or last:
                    self._write_samples(done)
        finally:
            progress.close()
            log.close()
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
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        with torch.no_grad():
            videos = self.stage.sample(self.prompts, derived_generator(self.config.seed, self.stage.name, "samples"))
        name = f"{self.stage.name}_{step:06d}"
        write_contact_sheet(folder / f"{name}.png", videos, self.prompts, block=self.config.rollout.frames_per_block)
        write_gif(folder / f"{name}.gif", grid(videos, columns=4))
