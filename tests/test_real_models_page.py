"""The commands of docs/real_models.md are taken by the programs that they name, with all their options."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from python_ref.config import load_config

PAGE = Path(__file__).parents[1] / "docs" / "real_models.md"
# What a program does once it has read its options: recorded instead of done.
WORK = {
    "python_ref.published.convert": "convert",
    "python_ref.published.generate": "generate",
    "python_ref.data.cache_latents": "cache",
    "python_ref.train": "train",
    "python_ref.plan": "print_plan",
}


def commands():
    for block in re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "-m" in words:
                module, *arguments = words[words.index("-m") + 1 :]
                yield module, arguments


@pytest.mark.parametrize(
    ("module", "arguments"), [pytest.param(*found, id=" ".join(found[1][:4])) for found in commands()]
)
def test_command(module, arguments, tmp_path, monkeypatch, capsys):
    program = importlib.import_module(module)
    if module == "python_ref.published.config":  # reads files that are not ours to carry
        monkeypatch.chdir(tmp_path)
        (tmp_path / "configs").mkdir()
        for name in ("default_config.yaml", "self_forcing_dmd.yaml"):
            (tmp_path / name).write_text("warp_denoising_step: true\ntimestep_shift: 8.0\n")
        assert program.main(arguments) == 0
        return
    done = []
    monkeypatch.setattr(program, WORK[module], lambda *options: done.append(options) or [])
    assert program.main(arguments) == 0, capsys.readouterr().err
    assert len(done) == 1
    if "--config" in arguments:
        load_config(arguments[arguments.index("--config") + 1])


def test_every_program_is_shown():
    assert {module for module, _ in commands()} == {*WORK, "python_ref.published.config"}
