"""Experiments have one door: one way to start, one place to write to, nothing from scripts or tests."""

import argparse
import ast
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from experiments import common, measuring, real_pairs, streaming, tables
from mirage_min.data.video import read_clip
from tests import scripts, small

ROOT = Path(__file__).parents[1]
SOURCES = {path.stem: path.read_text() for path in sorted((ROOT / "experiments").glob("*.py"))}
EXPERIMENTS = [name for name, source in SOURCES.items() if 'if __name__ == "__main__":' in source]


# ---- one door --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_says_how_it_starts_writes_to_runs_and_is_in_the_list(name):
    experiment = importlib.import_module(f"experiments.{name}")
    assert f"python -m experiments.{name}" in experiment.__doc__
    assert "common.start(main, flags())" in SOURCES[name]
    flags = {action.dest: action for action in experiment.flags()._actions}
    assert flags["out"].default == Path("runs/experiments") and len(flags) <= 14
    for action in flags.values():
        if action.dest != "out" and isinstance(action.default, Path):
            assert action.default.parts[0] in ("runs", "weights", "data", "assets"), f"--{action.dest} {action.default}"
    assert f"`{name}`" in (ROOT / "experiments" / "README.md").read_text(), "experiments/README.md lists it"


@pytest.mark.parametrize("name", SOURCES)
def test_an_experiment_imports_the_package_and_experiments_alone_and_leaves_the_search_path(name):
    top_level = {path.stem for path in ROOT.glob("*.py")}
    for node in ast.walk(ast.parse(SOURCES[name])):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for top in (imported.partition(".")[0] for imported in names):
            assert top not in top_level | {"tests", "assignments", "docs"}, f"{name} imports {top}"
    assert "sys.path" not in SOURCES[name] and "pyplot" not in SOURCES[name]


def test_wrong_input_is_one_line_and_status_2():
    run = scripts.run("-m", "experiments.real_pairs", "--pairs", "no such folder", "--perceptual", "x")
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1, run.stderr
    assert "no such folder: wanted NAME_ni.mp4 and NAME_gt.mp4" in run.stderr


def test_a_picture_of_few_colours_is_the_same_picture_in_less_room(tmp_path):
    figure = common.picture(torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    files = [tmp_path / name for name in ("many.png", "few.png")]
    common.save_figure(files[0], figure)
    common.save_figure(files[1], figure, colours=64)
    many, few = (Image.open(file).convert("RGB") for file in files)
    assert len(few.getcolors(2**20)) <= 64 < len(many.getcolors(2**20)) and few.size == many.size
    apart = sum(abs(a - b) for a, b in zip(many.tobytes(), few.tobytes())) / len(many.tobytes())
    assert apart < 16 and files[1].stat().st_size < files[0].stat().st_size / 2, f"{apart:.1f} of 255 apart"


def test_a_picture_has_the_frames_colours_and_fifty_pixels_an_inch():
    x = torch.linspace(-1.2, 1.2, 3 * 40 * 60).view(3, 40, 60)
    figure = common.picture(x)
    (image,) = figure.axes[0].images
    assert figure.get_size_inches().tolist() == pytest.approx([1.2, 0.8])
    wanted = ((x + 1) / 2).clamp(0, 1).movedim(0, 2)
    assert (torch.tensor(image.get_array()) - wanted).abs().max() < 1e-6


def test_results_are_written_with_the_folders_above_them_and_a_part_takes_the_place_of_its_last_figures(tmp_path):
    path = tmp_path / "a" / "b" / "speed.json"
    measuring.record(path, "one", {"x": 1})
    measuring.record(path, "two", {"x": 2})
    measuring.record(path, "one", {"y": 3})
    found = json.loads(path.read_text())
    assert found["two"]["x"] == 2 and found["one"]["y"] == 3 and "x" not in found["one"]
    assert found["one"]["torch"] == torch.__version__
    assert common.table(["a", "b"], [[1, "x"], [2, "y"]]) == "| a | b |\n| --- | ---: |\n| 1 | x |\n| 2 | y |"


# ---- measuring -------------------------------------------------------------------------------------------------------

class Engine:
    """Something to measure."""

    def run(self, n: int) -> int:
        return n + 1


def test_a_stopwatch_adds_up_the_calls_of_a_method_and_leaves_it_as_it_was(monkeypatch):
    clock, before, waits = iter([10.0, 11.0, 20.0, 24.0]), Engine.__dict__["run"], []
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(clock))
    with measuring.stopwatch({"work": (Engine, "run")}, lambda: waits.append(1)) as spent:
        assert Engine().run(1) == 2 and Engine().run(2) == 3
    assert spent == {"work": 1.0 + 4.0} and len(waits) == 4
    assert Engine.__dict__["run"] is before


def test_the_noise_clip_is_blocks_of_four_pixels_and_changes_in_every_frame(tmp_path):
    x = read_clip(measuring.noise_clip(tmp_path / "a.mp4", 3, 18, 24))
    assert x.shape == (3, 3, 18, 24)
    assert (x[:, 0] - x[:, 1]).abs().mean() > 0.2
    blocks = x[:, 0, :16, :24].reshape(3, 4, 4, 6, 4)
    assert blocks.std(dim=(2, 4)).mean() < 0.3 * blocks.mean(dim=(2, 4)).std()


def test_a_script_that_fails_says_so(tmp_path, monkeypatch, capsys):
    (tmp_path / "good.py").write_text("import sys\nprint(*sys.argv)\n")
    (tmp_path / "bad.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.setattr(measuring, "ROOT", tmp_path)
    argv = list(sys.argv)
    measuring.run_script("good.py", "a", 1)
    assert capsys.readouterr().out.endswith("good.py a 1\n")
    with pytest.raises(ValueError, match="bad.py ended with status 3"):
        measuring.run_script("bad.py")
    assert sys.argv == argv


@pytest.mark.skipif(sys.platform != "linux", reason="the process's memory is read from /proc: needs Linux")
def test_memory_is_what_a_call_takes_above_what_there_was():
    def call():
        torch.ones(2**23)  # 32 MiB
    seconds, taken = measuring.timed(call)
    assert seconds > 0 and 30 * 2**20 < taken < 64 * 2**20, f"{taken / 2**20:.1f} MiB, wanted about 32"


# ---- streaming -------------------------------------------------------------------------------------------------------

class Brightening:
    """A stand-in for a Mirage: every other window comes out brighter by `by`, from its second latent on."""

    temporal_patch = 1

    def __init__(self, by: float):
        self.by, self.vae = by, small.mirage().vae

    def stream(self, frames, window: int, **settings):
        for t, frame in enumerate(frames):
            window_of_latent = ((t + 3) // 4 - 1) // (window - 1)
            yield frame + self.by * (window_of_latent % 2)


def test_the_memory_of_a_stream_is_what_infer_takes_above_the_loaded_model(monkeypatch):
    loaded, peaks = argparse.Namespace(stdout=f"{100 * 2**20}\n"), iter([150 * 2**20, 151 * 2**20])
    monkeypatch.setattr(measuring, "noise_clip", lambda path, *size: size)
    monkeypatch.setattr(measuring, "peak_of_script", lambda script, size, *argv: (seen.append(size), next(peaks))[1])
    monkeypatch.setattr(streaming.subprocess, "run", lambda *given, **more: loaded)
    seen = []
    assert streaming.memory_above_model("model", [33, 330]) == {"33": 50, "330": 51}
    assert seen == [(33, 64, 96), (330, 64, 96)]


def test_the_clips_of_a_stream_are_a_still_a_made_up_and_a_recorded_one(tmp_path):
    real = measuring.noise_clip(tmp_path / "real.mp4", 6, 272, 480)
    found = streaming.clips(real, 5)
    assert {name: list(x.shape) for name, x in found.items()} == {
        "static": [3, 5, 96, 144], "toy": [3, 5, 96, 144], "real": [3, 5, 136, 240]}
    assert torch.equal(found["static"], found["toy"][:, :1].expand(-1, 5, -1, -1))


@pytest.mark.parametrize("by", [0.0, 0.2])
def test_seams_are_found_where_windows_meet_and_nowhere_else(by):
    x = torch.zeros(3, 1, 4, 4).expand(-1, 49, -1, -1)
    found = streaming.seams(Brightening(by), x, window=5)
    assert (found["offsets"], found["overlap"], found["input"]) == (4, 1, 0) and found["borders"] > 2
    assert found["inside"] == 0, "a change inside of a window"
    assert (found["across"] > 0) == (by > 0) and found["offset_largest"] == pytest.approx(127.5 * by, abs=1e-4)


def test_seams_of_a_model_that_changes_nothing_are_the_clips_own_changes():
    torch.manual_seed(0)
    x = torch.rand(3, 49, 4, 4)
    found = streaming.seams(Brightening(0.0), x, window=5)
    assert found["across"] == pytest.approx(found["input"]) and found["inside"] == pytest.approx(found["input"])
    assert found["offset_mean"] == 0
    slow = [(x[:, t] - x[:, t - 1]).abs().mean().item() * 127.5 for t in range(1, 49)]
    assert streaming.differences(x).tolist() == pytest.approx(slow, rel=1e-5)


def test_tiles_are_compared_with_the_whole_frame_and_the_report_has_every_figure(tmp_path):
    mirage, x = small.mirage(window=5), torch.rand(3, 9, 32, 48) * 2 - 1
    rows = streaming.tiled(mirage, x, 2, [0, 2])
    whole, cut = (torch.stack(list(mirage.stream(x.unbind(1), **how)), 1) for how in ({}, {"tiles": 2, "margin": 0}))
    assert rows[0]["mean"] == pytest.approx((127.5 * (cut - whole).abs().mean()).item(), rel=1e-4)
    assert 0 < rows[1]["mean"] < rows[0]["mean"] <= rows[0]["largest"]
    figures = {"frames": 9, "window": 5, "overlap": 1, "borders": 2, "offsets": 4, "input": 1.0, "across": 3.0,
               "inside": 2.0, "offset_mean": 0.25, "offset_p99": 4.5, "offset_largest": 17.0}
    text = streaming.report({"command": "python x", "date": "2001-02-03", "memory": {"33": 12.34},
                             "seams": {"toy": figures}, "tiles": {"toy": rows}})
    for line in ("Made by `python x`", "CPU, 2001-02-03.", "| 33 | 12.3 |", "| toy | 0.25 | 4.5 | 17 |",
                 "| toy | 9 | 3.000 | 2.000 | 1.500 | 1.000 |", f"| toy | 2x2 | 2 | {rows[1]['mean']:.2f} |"):
        assert line in text, f"{line} is not in the report"


# ---- other experiments -----------------------------------------------------------------------------------------------

def test_real_pairs_are_copied_under_the_names_that_evaluate_wants(tmp_path):
    pairs, work = tmp_path / "pairs", tmp_path / "work"
    pairs.mkdir()
    for name in ("b", "a"):
        for side in ("ni", "gt"):
            (pairs / f"{name}_{side}.mp4").write_text(f"{name} {side}")
    (work / "ni").mkdir(parents=True)
    (work / "ni" / "stale.mp4").touch()
    assert real_pairs.copy_pairs(pairs, work) == ["a", "b"]
    assert (work / "gt" / "b.mp4").read_text() == "b gt"
    assert sorted(path.name for path in (work / "ni").iterdir()) == ["a.mp4", "b.mp4"]


def test_flags_can_be_changed_without_touching_the_others():
    args = argparse.Namespace(steps=3, clips=4)
    changed = tables.with_settings(args, clips=1)
    assert (changed.steps, changed.clips, args.clips) == (3, 1, 4)
