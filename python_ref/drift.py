"""How quality changes along a rollout, while a run still trains: the plot that shows drift."""

from dataclasses import replace
from pathlib import Path

import torch

from python_ref.config import Config
from python_ref.data.prompts import evaluation_prompts
from python_ref.evaluate import generate_set
from python_ref.measures.report import Judge
from python_ref.models.captioned import CaptionedModel
from python_ref.plots import plot_drift
from python_ref.processes import is_first_process


@torch.no_grad()
def watch_drift(path: Path, name: str, network: CaptionedModel, config: Config) -> None:
    """Plots the measures of `config.logging.drift_videos` videos by frame, beside those of real ones.

    A causal model generates `config.evaluation.num_frames` frames, usually more than it is trained on. With several
    processes all generate and the first plots. Only moving digits can be measured.

    Args:
        path: the PNG.
        name: of the line in the plot.
        network: that generates.
        config: of the run.
    """
    digits, rollout = config.data.moving_digits, config.rollout
    prompts = evaluation_prompts(config.logging.drift_videos)
    settings = replace(config.evaluation, num_videos=len(prompts))
    is_causal = "rollout" in network.settings
    videos = generate_set(network, rollout if is_causal else None, prompts, settings, config.precision)
    if is_first_process():
        judge = Judge(digits, rollout.frames_per_block)
        real = judge.measure(*judge.real_videos(len(prompts), videos.shape[1]))
        measures = {"real": real, name: judge.measure(videos, prompts)}
        plot_drift(path, measures, digits.num_frames, rollout.frames_per_block)
