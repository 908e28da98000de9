"""What a run tells while it goes: a JSON line per logged step, TensorBoard, Weights & Biases, and a progress line."""

import json
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from python_ref.config import Config


class LogWindow:
    """Means of the metrics since the last logged step; a metric counts in the steps that have it."""

    def __init__(self) -> None:
        self._restart()

    def add(self, metrics: dict[str, float]) -> None:
        """The metrics of one step."""
        self._steps += 1
        for name, value in metrics.items():
            self._values.setdefault(name, []).append(value)

    def close(self) -> dict[str, float]:
        """The means and the steps per second of the window, which starts anew."""
        means = {name: sum(values) / len(values) for name, values in self._values.items()}
        means["steps_per_second"] = self._steps / max(time.monotonic() - self._start, 1e-9)
        self._restart()
        return means

    def _restart(self) -> None:
        self._values: dict[str, list[float]] = {}
        self._steps, self._start = 0, time.monotonic()


class Board(Protocol):
    """Where metrics are shown beside `metrics.jsonl`."""

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """TensorBoard events in `folder/tensorboard`; those after `first_step` are hidden when a run is resumed."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, which a resumed run goes on with; WANDB_MODE and WANDB_API_KEY count as usual.

    Args:
        folder: where wandb keeps its files, and `wandb_run_id.txt` says which run it is.
        first_step: 0 begins a run of its own.
        project: of wandb.
        settings: of the run, as JSON can hold them.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, folder: Path, first_step: int, project: str, settings: dict[str, Any]) -> None:
        try:
            import wandb  # optional
        except ImportError as error:
            raise ImportError(
                "logging.wandb is true, but wandb is not installed: `pip install wandb`, or set logging.wandb=false"
            ) from error
        name = folder / "wandb_run_id.txt"
        if not first_step or not name.is_file():
            name.write_text(uuid.uuid4().hex, encoding="utf-8")
        self._run = wandb.init(
            project=project, id=name.read_text(encoding="utf-8"), resume="allow", dir=str(folder), config=settings
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def open_boards(config: Config, folder: Path, first_step: int) -> list[Board]:
    """The boards that `config.logging` asks for; arguments as theirs."""
    boards: list[Board] = []
    if config.logging.wandb:
        boards.append(WeightsAndBiases(folder, first_step, config.logging.wandb_project, asdict(config)))
    if config.logging.tensorboard:
        boards.append(TensorBoard(folder, first_step))
    return boards


class MetricsLog:
    """Writes `metrics.jsonl` of one run, and shows the same on boards.

    Args:
        folder: the run's folder.
        first_step: the step a resumed run goes on from; lines of later steps, left by a killed run, are dropped.
        boards: further places.
    """

    def __init__(self, folder: Path, first_step: int, boards: Sequence[Board] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.boards = boards
        self.path = folder / "metrics.jsonl"
        kept = [entry for entry in read_metrics(self.path) if entry["step"] <= first_step] if first_step else []
        self.path.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Metrics after `step` optimizer steps."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for board in self.boards:
            board.write(step, values)

    def close(self) -> None:
        for board in self.boards:
            board.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The entries of a metrics.jsonl; a last line cut short by a kill is dropped."""
    if not path.is_file():
        return []
    *whole, _ = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in whole]


class ProgressLine:
    """A live bar on a terminal, or a plain line every `every` seconds in a log file."""

    def __init__(self, title: str, first_step: int, total_steps: int, every: float = 10.0) -> None:
        self.title, self.total, self.every = title, total_steps, every
        self.first_step, self.start = first_step, time.monotonic()
        self._last_print = -float("inf")
        self._shown: dict[str, float] = {}
        self._bar: Progress | None = None
        if sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TimeRemainingColumn(), TextColumn("{task.fields[values]}"), console=Console(),
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task(title, total=total_steps, completed=first_step, values="")

    def update(self, step: int, values: dict[str, float]) -> None:
        """Shows progress after `step` steps; a value that this step does not have stays as it was."""
        self._shown.update(values)
        elapsed = time.monotonic() - self.start
        rate = (step - self.first_step) / max(elapsed, 1e-9)
        text = "  ".join(f"{name} {value:.4g}" for name, value in self._shown.items())
        text = f"{text}  {rate:.2f} steps/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, values=text)
        elif elapsed - self._last_print >= self.every or step == self.total:
            self._last_print = elapsed
            left = (self.total - step) / max(rate, 1e-9)
            print(f"{self.title} {step}/{self.total}  {text}  {elapsed:.0f} s gone, {left:.0f} s left", flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
