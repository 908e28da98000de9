"""The comparison of methods end to end, on a tiny model: the code, not the claim."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import TINY

from python_ref.comparison import VARIANTS, Comparison, FinishedRun, folder_name
from python_ref.config import load_config
from python_ref.data.sample_videos import CAPTIONS, copy_sample_videos
from python_ref.data.shards import read_settings
from python_ref.plots import plot_by_frame
from python_ref.reproduce import main as reproduce

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("teacher forcing", "ODE regression", "Self-Forcing, SiD")


@pytest.fixture(scope="module")
def arguments(starts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduce")
    file = folder / "config.yaml"
    file.write_text(
        "reproduce:\n  methods:\n    teacher forcing: [stage=causal]\n    ODE regression: [stage=ode]\n"
        "    Self-Forcing, SiD: [stage=self_forcing, self_forcing.objective=sid]\n"
    )
    small = [
        *("reproduce.seeds=[0,1]", "reproduce.seconds=0.1", "reproduce.workers=1", "reproduce.start_steps=2"),
        *("reproduce.pairs=4", "reproduce.long_factor=3", "evaluation.num_videos=10", "ode.batch_size=2"),
        *("rollout.window_frames=6", "logging.checkpoint_every=2", f"output={folder}/output"),
    ]
    return folder, ["--config", str(file), *TINY, *starts, *small, f"reproduce.report={folder}/results.md"]


@pytest.fixture(scope="module")
def reproduced(arguments):
    folder, options = arguments
    assert reproduce(options) == 0
    return folder


def test_the_report_tells_of_every_method(reproduced):
    text = (reproduced / "results.md").read_text()
    for method in METHODS:
        assert text.count(f"| {method} |") == 4
        assert f"![Videos of {method}](images/results/{folder_name(method)}.png)" in text
    assert "| videos | frame 1 | frame 3 | frame 6 | frame 12 | frame 18 | sharpness |" in text
    assert "±" in text
    assert f"with torch {torch.__version__}." in text
    pictures = {path.name for path in (reproduced / "images" / "results").iterdir()}
    sheets = {f"{folder_name(method)}.png" for method in METHODS}
    assert pictures == {"quality.png", "rolling.png", "runs.json", *sheets}
    for run in json.loads((reproduced / "images" / "results" / "runs.json").read_text()):
        assert run["seconds"] > 0
        assert set(run["measures"]) == set(VARIANTS)
        assert len(run["measures"]["window"]["identity"]) == 18


def test_a_killed_comparison_goes_on(reproduced, arguments):
    """Finished runs stay as they are; one that was killed goes on from its checkpoint, and gives the same measures."""
    runs = reproduced / "output" / "runs"
    finished = {path: path.stat().st_mtime_ns for path in runs.glob("*/*/result.json")}
    assert len(finished) == 6
    killed = runs / folder_name(METHODS[2]) / "seed_1"
    result = json.loads((killed / "result.json").read_text())
    (killed / "result.json").unlink()
    newest = max((killed / "checkpoints" / "self_forcing").glob("step_*"))
    shutil.rmtree(newest)  # what was done since the checkpoint before it
    assert reproduce(arguments[1]) == 0
    again = json.loads((killed / "result.json").read_text())
    assert again["seconds"] is None  # it was interrupted
    assert again["measures"] == result["measures"]
    assert "interrupted" in (reproduced / "results.md").read_text()
    del finished[killed / "result.json"]
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())


def test_other_settings_need_another_folder(reproduced, arguments, capsys):
    assert reproduce([*arguments[1], "reproduce.seconds=7"]) == 2
    assert (
        "plan.json was made with other settings; accepted: those, or another output folder" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("reproduce.clock=sun", "reproduce.clock is 'sun'; accepted: 'cpu', 'wall'"),
        ("reproduce.seconds=0", "seconds is 0.0; accepted: above 0"),
        ("data.source=latents", "data.source is 'latents'; accepted here: 'moving_digits' or 'video_files'"),
    ],
)
def test_bad_settings_are_explained(option, message, arguments, capsys):
    assert reproduce([*arguments[1], option]) == 2
    assert message in capsys.readouterr().err


def test_methods_are_needed(config_file, capsys):
    assert reproduce(["--config", str(config_file)]) == 2
    assert "reproduce.methods is empty" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "count"), [("reproduce", 9), ("reproduce_videos", 5)])
def test_the_shipped_comparisons_are_valid(name, count):
    """Every method's own settings are accepted, and the stages are those of its name."""
    file = ROOT / "configs" / f"{name}.yaml"
    methods = load_config(file).reproduce.methods
    assert len(methods) == count
    for own in methods.values():
        assert load_config(file, own).stage in ("causal", "ode", "consistency", "self_forcing")


def test_video_files_are_compared_from_a_teacher_of_their_own(tmp_path):
    """The real files; the report measures the distance to their frames."""
    copy_sample_videos(tmp_path / "files")
    file = tmp_path / "config.yaml"
    file.write_text(
        "data:\n  source: video_files\n"
        f"  video_files: {{folder: {tmp_path}/files, num_frames: 6, channels: 1, fps: 15}}\n"
        "reproduce:\n  methods:\n    ODE regression: [stage=ode]\n    CausVid: [stage=self_forcing, "
        "self_forcing.videos=noised_data]\n"
    )
    small = [
        *("reproduce.seeds=[0]", "reproduce.seconds=0.1", "reproduce.workers=1", "reproduce.teacher_steps=2"),
        *("reproduce.start_steps=2", "reproduce.pairs=4", "reproduce.long_factor=2", "evaluation.num_videos=4"),
        *("ode.batch_size=2", "rollout.window_frames=6", f"output={tmp_path}/output"),
        f"reproduce.report={tmp_path}/results_videos.md",
    ]
    assert reproduce(["--config", str(file), *TINY, *small]) == 0
    text = (tmp_path / "results_videos.md").read_text()
    assert "# Results: clips of real video files" in text
    assert "a teacher of its own (2 steps of 4 videos)" in text
    assert "| a real frame and the next | 0.03" in text
    assert "![Videos of CausVid](images/results_videos/causvid.png)" in text
    for run in json.loads((tmp_path / "images" / "results_videos" / "runs.json").read_text()):
        measures = run["measures"]["window and sink"]
        assert {name: len(values) for name, values in measures.items() if name != "jump_ratio"} == {
            "distance": 12, "sharpness": 12, "motion": 11,
        }  # fmt: skip
    pairs = read_settings(tmp_path / "output" / "ode_pairs" / "shard_00000.safetensors")
    assert set(pairs["captions"]) <= set(CAPTIONS.values())


def test_runs_are_kept_apart_by_method_and_seed():
    def run(method, seed, values):
        return FinishedRun(method, seed, 1.0, {"window": {"identity": values, "jump_ratio": seed}})

    comparison = Comparison([run("b", 0, [1, None]), run("a", 0, [3, 4]), run("b", 1, [5, 6])])
    assert comparison.methods == ["b", "a"]
    np.testing.assert_equal(comparison.by_frame("b", "window", "identity"), [[1, np.nan], [5, 6]])
    np.testing.assert_equal(comparison.number("b", "window", "jump_ratio"), [0, 1])


def test_a_plot_of_one_run_has_no_spread(tmp_path):
    plot_by_frame(tmp_path / "one.png", {"a measure": {"a line": np.ones((1, 6))}}, 3)
    assert (tmp_path / "one.png").stat().st_size > 1000
