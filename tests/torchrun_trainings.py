"""What torchrun starts in the tests: trainings one after the other, of which one process may die while it saves.

The argument is a JSON file with lists of arguments of `python -m python_ref.train`: "runs" that work and those that are
"refused"; and with "kill", if wanted: the "rank" of the process that kills itself, the "function" of the checkpoint
module in which it does, and at which call ("time"). "device" is that of all runs, if not the CPU.
"""

import json
import os
import signal
import sys
from pathlib import Path

from python_ref import checkpoint
from python_ref.processes import process_group
from python_ref.train import main


def die_in(function: str, time: int) -> None:
    """Lets this process kill itself; with half a file on disk where the function writes shards."""
    original, calls = getattr(checkpoint, function), 0

    def wrapped(path: Path, *arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls == time:
            if function == "_write_shards":
                (path / "half.safetensors").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        original(path, *arguments)

    setattr(checkpoint, function, wrapped)


if __name__ == "__main__":
    orders = json.loads(Path(sys.argv[1]).read_text())
    kill = orders.get("kill")
    if kill is not None and kill["rank"] == int(os.environ["RANK"]):
        die_in(kill["function"], kill["time"])
    with process_group(orders.get("device", "cpu")):
        for arguments in orders["runs"]:
            assert main(arguments) == 0
        for arguments in orders.get("refused", ()):
            assert main(arguments) == 2
