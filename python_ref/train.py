"""Training from the command line: `python -m python_ref.train --config configs/teacher.yaml key=value ...`; in several
processes: `torchrun --nproc-per-node 2 -m python_ref.train --config ... distributed.strategy=ddp`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from python_ref.command_line import add_overrides, exit_status
from python_ref.config import Config, load_config
from python_ref.data.source import TrainingSource, open_source
from python_ref.distributed import batch_share
from python_ref.processes import is_first_process, process_device, process_group
from python_ref.stages import Stage
from python_ref.stages.causal import CausalStage
from python_ref.stages.consistency import ConsistencyStage
from python_ref.stages.ode import OdeStage
from python_ref.stages.self_forcing import SelfForcingStage
from python_ref.stages.teacher import TeacherStage
from python_ref.trainer import Trainer

KINDS = {kind.name: kind for kind in (TeacherStage, CausalStage, OdeStage, ConsistencyStage, SelfForcingStage)}


def make_stage(config: Config, source: TrainingSource) -> Stage:
    """The stage that `config.stage` names, its networks built or loaded."""
    return KINDS[config.stage](config, source)


def train(config: Config) -> Path:
    """Runs one stage, within a `process_group` together with other processes; returns the file of averaged weights."""
    torch.set_num_threads(config.threads)
    source = open_source(config.data)
    own_captions = config.data.source == "moving_digits" and not config.samples_continue_data
    prompts = None if own_captions else source.captions(0, config.logging.sample_prompts)
    stage = make_stage(config, source.for_process(batch_share(config.distributed), process_device(config.device)))
    return Trainer(config, stage, prompts, source.show).run()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m python_ref.train", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file such as configs/teacher.yaml")
    add_overrides(parser)
    parsed = parser.parse_args(arguments)

    def run() -> None:
        config = load_config(parsed.config, parsed.overrides)
        with process_group(config.device):
            weights = train(config)
            if is_first_process():
                print(f"weights: {weights}")

    return exit_status(run, if_interrupted="the same command with resume=true goes on from the last checkpoint")


if __name__ == "__main__":
    sys.exit(main())
