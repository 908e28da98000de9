"""The README's first example runs as printed and prints what it says."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_first_example():
    example = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert example is not None
    promised = re.findall(r"# (True 9)$", example[1], re.MULTILINE)
    result = subprocess.run(
        [sys.executable, "-c", example[1]], cwd=README.parent, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:-1] == promised
