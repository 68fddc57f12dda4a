"""python infer.py in out: every kind of video comes out as it went in, and every mistake is one line and status 2.

The model is no part of most of this: a stand-in that gives back what it gets, some frames later, takes its place.
"""

import json
import os
import re
import shutil
import signal
import time
import weakref
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

import infer
from mirage_min.data import desk, video
from mirage_min.data.video import Video, read_clip, write_clip
from mirage_min.networks.weights import load_tensors, save_tensors
from mirage_min.systems import load
from mirage_min.systems.mirage import Mirage
from tests import scripts, signals, small
from tests.media import HEIGHT, RATE, WIDTH, break_frame, encode, packets_of, picture, pictures

ROOT = Path(__file__).parents[1]
needs_weights = pytest.mark.skipif(not (ROOT / "weights" / "stage_a.safetensors").exists(),
                                   reason="needs the trained model in weights/")


class StandIn:
    """Gives back every frame, five frames after it got it; `at`: what to do when it has got so many."""

    def __init__(self, at=None):
        self.at = at or {}

    def stream(self, frames):
        held = []
        for number, frame in enumerate(frames):
            if number in self.at:
                self.at[number]()
            held.append(frame)
            if len(held) > 5:
                yield held.pop(0)
        yield from held


def put(monkeypatch, from_pretrained):
    """Whatever folder is named, it holds what from_pretrained returns, with the options of a Mirage."""
    system = SimpleNamespace(Options=Mirage.Options, from_pretrained=from_pretrained)
    monkeypatch.setattr(infer, "system_in", lambda path: system)


@pytest.fixture
def stand_in(monkeypatch):
    """Puts the stand-in in the model's place; the test may give it something to do at a frame."""
    model = StandIn()
    put(monkeypatch, lambda *path, **settings: model)
    return model


def run(capsys, *argv):
    """infer.py's status, and what it wrote on stdout and stderr."""
    status = infer.cli([str(argument) for argument in argv])
    out, err = capsys.readouterr()
    return status, out, err


def succeed(capsys, *argv):
    status, out, err = run(capsys, *argv)
    assert status == 0, err
    return out, err


def fail(capsys, wanted, *argv):
    """The run must end with status 2, exactly one line that has `wanted` in it, and leave no temporary file."""
    status, out, err = run(capsys, *argv)
    assert status == 2 and not out
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("infer.py: ") and re.search(wanted, lines[0]), err
    assert not list(Path(argv[1]).parent.glob("*.part"))


def shape_of(path):
    with Video(path) as clip:
        times = len(list(clip)), [pts * clip.format.time_base for pts, _ in clip.times]
        return (*times, clip.format.height, clip.format.width)


def difference(a, b):
    """Largest difference between two videos [3, T, H, W], of 255."""
    assert a.shape == b.shape
    return float((a - b).abs().max() * 127.5)


# ---- what comes out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T, H, W", [(1, 16, 16), (9, 16, 16), (1, 67, 101), (9, 67, 101), (2, 540, 960)])
def test_size_number_order_and_colours_of_the_frames_stay(tmp_path, capsys, stand_in, T, H, W):
    source, target = encode(tmp_path / "in.mkv", pictures(T, H, W), pix_fmt="yuv444p"), tmp_path / "out.mp4"
    out, err = succeed(capsys, source, target)
    x, y = read_clip(source), read_clip(target)
    assert difference(x, y) < 12, "of 255"
    shift = ((y - x).mean(dim=(1, 2, 3)) * 127.5).abs().max()
    assert shift < (2 if H == 16 else 1), f"a channel's mean shifted by {shift:.2f} of 255"  # 16x16: a single block
    assert re.fullmatch(rf"{target}: {T} frames, [\d.]+ frames/s, peak memory [\d.]+ GiB\n", out)
    assert (err.count("\n") == 1 and "yuv444p" in err) if H % 2 else not err


@pytest.mark.parametrize("T", [1, 2, 5, 8, 9, 10, 17, 33])
def test_a_real_stream_gives_back_as_many_frames_at_the_same_times(tmp_path, capsys, monkeypatch, T):
    put(monkeypatch, lambda *path, **settings: small.mirage(window=3))
    source, target = encode(tmp_path / "in.mp4", pictures(T, 16, 18)), tmp_path / "out.mp4"
    succeed(capsys, source, target)
    assert shape_of(target) == shape_of(source) == (T, [Fraction(t, RATE) for t in range(T)], 16, 18)


def test_irregular_times_sound_and_rotation_survive(tmp_path, capsys, stand_in):
    pts = [0, 1, 5, 6, 20, 21, 22, 30, 31, 49]
    source = encode(tmp_path / "in.mp4", pictures(10), pts=[100 * t for t in pts], time_base=Fraction(1, 1000),
                    sound="aac", rotation=90)
    succeed(capsys, source, tmp_path / "out.mp4")
    assert shape_of(tmp_path / "out.mp4") == (10, [Fraction(t, 10) for t in pts], WIDTH, HEIGHT)
    assert difference(read_clip(source), read_clip(tmp_path / "out.mp4")) < 12
    assert [p for _, p in packets_of(tmp_path / "out.mp4", "audio")] == [p for _, p in packets_of(source, "audio")]


def test_a_gif_becomes_an_mp4(tmp_path, capsys, stand_in):
    images = [Image.fromarray(picture(20 * t)) for t in range(4)]
    images[0].save(tmp_path / "in.gif", save_all=True, append_images=images[1:], duration=[50, 120, 70, 400])
    succeed(capsys, tmp_path / "in.gif", tmp_path / "out.mp4")
    assert shape_of(tmp_path / "out.mp4")[:2] == (4, [Fraction(t, 100) for t in (0, 5, 17, 24)])


def test_a_folder_of_images_becomes_a_folder_without_loss_or_an_mp4_of_its_own_rate(tmp_path, capsys, stand_in):
    (tmp_path / "in").mkdir()
    for t in range(8, 12):
        Image.fromarray(picture(t)).save(tmp_path / "in" / f"{t}.png")
    succeed(capsys, tmp_path / "in", tmp_path / "out")
    assert torch.equal(read_clip(tmp_path / "in"), read_clip(tmp_path / "out"))
    succeed(capsys, tmp_path / "in", tmp_path / "out.mp4", "--set", "fps=12.5", "--set", "crf=2")
    assert shape_of(tmp_path / "out.mp4")[1] == [Fraction(2 * t, 25) for t in range(4)]


def test_compare_puts_the_input_beside_the_result(tmp_path, capsys, monkeypatch):
    model = StandIn()
    model.stream = lambda frames: (-frame for frame in StandIn().stream(frames))
    put(monkeypatch, lambda *path, **settings: model)
    source, target = encode(tmp_path / "in.mp4", pictures(12)), tmp_path / "out.mp4"
    succeed(capsys, source, target, "--compare")
    x, y = read_clip(source), read_clip(target)
    assert difference(torch.cat([x, -x], dim=3), y) < 40  # only at the border between the two
    assert (x - y[..., :WIDTH]).abs().mean() * 127.5 < 1 and (x + y[..., WIDTH:]).abs().mean() * 127.5 < 1


@pytest.mark.parametrize("target, page", [("out.mp4", "out.html"), ("out.d", "out.d.html")])
def test_a_report_shows_the_input_and_the_result_of_every_frame(tmp_path, capsys, monkeypatch, target, page):
    model = StandIn()
    model.stream = lambda frames: (frame - 0.2 for frame in StandIn().stream(frames))
    put(monkeypatch, lambda *path, **settings: model)
    source = encode(tmp_path / "in.mp4", [np.full((HEIGHT, WIDTH, 3), 120, np.uint8)] * 7)
    succeed(capsys, source, tmp_path / target, "--report", "--compare")
    text = (tmp_path / page).read_text()
    assert "</output> of 7</p>" in text and "changes by 25.5 of 255 on average" in text
    assert "-25.5, -25.5, -25.5" in text
    shutil.rmtree(tmp_path / target) if target == "out.d" else (tmp_path / target).unlink()
    fail(capsys, rf"{page}: exists \(--overwrite", source, tmp_path / target, "--report")


def test_the_flags_reach_the_model(tmp_path, capsys, monkeypatch):
    seen = {}

    def from_pretrained(path, **settings):
        seen.update(settings, path=path)
        return StandIn()

    put(monkeypatch, from_pretrained)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)  # a processor that has no bfloat16
    source = encode(tmp_path / "in.mp4", pictures(2))
    succeed(capsys, source, tmp_path / "a.mp4", "--device", "cpu")
    assert seen == dict(path=ROOT / "weights", base="", vae2d="", device="cpu", dtype=torch.float32, window=0, tiles=1,
                        margin=8, change_only=True)
    succeed(capsys, source, tmp_path / "b.mp4", "--model", "m", "--base", "b", "--vae2d", "v", "--dtype", "bfloat16",
            "--window", "5", "--device", "cpu", "--set", "tiles=2", "--set", "margin=4",
            "--set", "change_only=no")
    assert seen == dict(path=Path("m"), base="b", vae2d="v", device="cpu", dtype=torch.bfloat16, window=5, tiles=2,
                        margin=4, change_only=False)


@pytest.mark.parametrize("can, card, wanted", [
    ({"amx_bf16": True}, "bfloat16: moves", torch.bfloat16), ({"amx_bf16": True}, "license: mit", torch.float32),
    ({"avx512_bf16": True}, "bfloat16: .2", torch.float32), ({"avx512_f": True}, "bfloat16: .2", torch.float32)])
def test_auto_is_bfloat16_where_it_is_faster_and_the_card_says_what_it_moves(tmp_path, monkeypatch, can, card, wanted):
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can, raising=False)
    assert infer.choose_dtype("cpu", tmp_path) == wanted
    assert infer.choose_dtype("cuda", tmp_path) == torch.bfloat16
    assert infer.choose_dtype("mps", tmp_path) == torch.float32


def test_at_a_height_of_its_own_the_change_is_enlarged_and_the_detail_stays(tmp_path, capsys, monkeypatch):
    """The model darkens the left half: so must the frames, and what it never saw, their fine grain, must survive."""
    shapes = []

    def darken(frames):
        for x in StandIn().stream(frames):
            shapes.append(tuple(x.shape[1:]))
            yield x - 0.4 * (torch.arange(x.shape[2]) < x.shape[2] // 2)

    put(monkeypatch, lambda *path, **settings: SimpleNamespace(stream=darken))
    grain = np.random.default_rng(0).integers(100, 156, (12, HEIGHT, WIDTH, 3), np.uint8)
    write_clip(tmp_path / "in", torch.from_numpy(grain).permute(3, 0, 1, 2) / 127.5 - 1)
    succeed(capsys, tmp_path / "in", tmp_path / "out", "--set", "at_height=16")
    assert set(shapes) == {(16, 24)} and len(shapes) == 12
    change = read_clip(tmp_path / "out") - read_clip(tmp_path / "in")
    left, right = WIDTH // 2 - 4, WIDTH // 2 + 4                      # between them the change is smooth
    assert (change[..., :left] + 0.4).abs().max() < 0.01 and change[..., right:].abs().max() < 0.01


def test_frames_are_shrunk_with_a_filter_that_leaves_nothing_of_stripes_as_fine_as_pixels():
    stripes, seen = torch.ones(3, 48, 48), []
    stripes[..., ::2] = -1
    list(infer.at_height(16, lambda frames: (seen.append(s) or s for s in frames), [stripes]))
    assert seen[0].shape == (3, 16, 16)
    assert seen[0].abs().max() < 0.2, "without a filter it is 1"


def test_a_change_is_kept_inside_the_boxes_of_its_video_and_nowhere_else(tmp_path, capsys, monkeypatch):
    """With --compare, at a height of its own, and for a system that gives frames back late."""
    put(monkeypatch, lambda *path, **settings: SimpleNamespace(
        stream=lambda frames: (x - 0.4 for x in StandIn().stream(frames))))
    grain = np.random.default_rng(0).integers(120, 136, (12, HEIGHT, WIDTH, 3), np.uint8)
    write_clip(tmp_path / "in", torch.from_numpy(grain).permute(3, 0, 1, 2) / 127.5 - 1)
    boxes = {"in": [None] * 6 + [[10, 5, 50, 40]] * 6, "other": []}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    x, keep = read_clip(tmp_path / "in"), ["--set", f"keep={tmp_path / 'boxes.json'}"]
    succeed(capsys, tmp_path / "in", tmp_path / "a", *keep)
    succeed(capsys, tmp_path / "in", tmp_path / "b", "--set", "edge=0", "--set", "at_height=32", "--compare", *keep)
    a, b = read_clip(tmp_path / "a"), read_clip(tmp_path / "b")[..., WIDTH:]
    for y in (a, b):
        assert torch.equal(y[:, :6], x[:, :6])
        outside = torch.ones(HEIGHT, WIDTH, dtype=torch.bool)
        outside[5:40, 10:50] = False
        assert torch.equal(y[..., outside], x[..., outside])
        assert (y[:, 6:, 20:25, 25:35] - x[:, 6:, 20:25, 25:35] + 0.4).abs().max() < 0.02
    assert (b[:, 6:, 5, 10] - x[:, 6:, 5, 10] + 0.4).abs().max() < 0.02, "without an edge at once"
    assert (a[:, 6:, 5, 10] - x[:, 6:, 5, 10]).abs().max() < 0.1, "with one from nothing on"
    (tmp_path / "boxes.json").write_text(json.dumps({"other": [None] * 12}))
    fail(capsys, "boxes.json: has no boxes for 'in', but for 'other'", tmp_path / "in", tmp_path / "c", *keep)
    (tmp_path / "boxes.json").write_text("[null]")
    fail(capsys, "there are boxes for 1 frames, and the video has more", tmp_path / "in", tmp_path / "c", *keep)


def test_a_pairs_file_is_a_video_too_and_its_result_may_be_one(tmp_path, capsys, stand_in):
    levels = torch.randint(0, 256, (3, 9, 16, 24), dtype=torch.uint8)
    save_tensors(tmp_path / "pair.safetensors", {"x_ni": levels, "x_gt": 255 - levels})
    succeed(capsys, tmp_path / "pair.safetensors", tmp_path / "out.safetensors")
    succeed(capsys, tmp_path / "pair.safetensors", tmp_path / "out")
    (name, x_dr), = load_tensors(tmp_path / "out.safetensors")[0].items()
    assert name == "x_dr" and torch.equal(x_dr, levels)
    assert difference(read_clip(tmp_path / "out"), levels / 127.5 - 1) < 1e-3
    save_tensors(tmp_path / "truth.safetensors", {"x_gt": levels})
    fail(capsys, "truth.safetensors: wanted x_ni, uint8", tmp_path / "truth.safetensors", tmp_path / "b.mp4")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["out.mp4", "out"])
def test_a_result_that_is_not_finite_is_one_line_with_its_frame_and_no_output(tmp_path, capsys, monkeypatch, value,
                                                                               name):
    model = small.mirage(window=3)
    decode = model.vae.decode_group

    def overflowing(z, cache=None, inject=None):
        y, new = decode(z, cache, inject)
        if cache:  # the second group, frames 9 and on
            y[:, :, 3] = value
        return y, new
    model.vae.decode_group = overflowing
    put(monkeypatch, lambda *path, **settings: model)
    fail(capsys, r"^infer.py: frame 12 \(counted from 0\): .* not finite", encode(tmp_path / "in.mp4", pictures(17)),
         tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]


@pytest.mark.parametrize("height", [15, 65, -1])
def test_a_height_that_does_not_fit_is_one_line_and_status_2(tmp_path, capsys, stand_in, height):
    source = encode(tmp_path / "in.mp4", pictures(2))
    fail(capsys, "at_height must be from 16 to the frames' own 64", source, tmp_path / "out.mp4", "--set",
         f"at_height={height}")


@pytest.mark.parametrize("flags", [[], ["--compare"]])
def test_a_long_video_is_never_in_memory_as_a_whole(tmp_path, capsys, monkeypatch, stand_in, flags):
    frames, most = [], 0

    def counted(pixels, to_float=video.to_float):
        nonlocal most
        frames.append(weakref.ref(frame := to_float(pixels)))
        most = max(most, sum(ref() is not None for ref in frames))
        return frame

    monkeypatch.setattr(video, "to_float", counted)
    succeed(capsys, encode(tmp_path / "in.mp4", pictures(120, 16, 16)), tmp_path / "out.mp4", *flags)
    assert len(frames) == 120 and most <= 25, f"{most} of 120 frames were in memory at once"


def test_help_explains_every_flag_in_a_line_and_there_are_at_most_twelve(capsys):
    with pytest.raises(SystemExit) as stop:
        infer.parse(["--help"])
    text = capsys.readouterr().out
    lines = [line for line in text[text.index("positional") :].splitlines() if line.startswith(" ")]
    assert all(re.match(r"  (-h, )?(--)?[a-z][\w-]*( [A-Z=]+)?  +\S.*\S", line) for line in lines), text
    flags = [line for line in lines if line.startswith("  --")]
    assert stop.value.code == 0 and 10 < len(flags) <= 12, f"input, output and --help are no flags: {flags}"


# ---- damage ---------------------------------------------------------------------------------------------------------


def test_a_broken_frame_ends_the_run_unless_it_may_be_skipped(tmp_path, capsys, stand_in):
    source, target = encode(tmp_path / "in.mp4", pictures(20), options={"g": "4", "bf": "0"}), tmp_path / "out.mp4"
    break_frame(source, 11)
    fail(capsys, r"in\.mp4: frame 11 \(counted from 0\) does not decode", source, target)
    assert not target.exists()
    out, err = succeed(capsys, source, target, "--skip-broken")
    y = read_clip(target)
    assert y.shape[1] == 20 and difference(y[:, 11], y[:, 10]) < 3 and "did not decode" in err and "11" in err


def test_a_file_that_was_cut_off_ends_the_run(tmp_path, capsys, stand_in):
    noise = [np.random.default_rng(t).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8) for t in range(12)]
    source = encode(tmp_path / "in.mp4", noise, container={"movflags": "faststart"})
    source.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    fail(capsys, r"in\.mp4: frame \d+ ", source, tmp_path / "out.mp4")


# ---- every bad input ------------------------------------------------------------------------------------------------


def test_bad_paths_are_one_line_and_status_2(tmp_path, capsys, monkeypatch, stand_in):
    clip = encode(tmp_path / "clip.mp4", pictures(2))
    before = clip.read_bytes()
    (tmp_path / "text.mp4").write_text("hello" * 99)
    (tmp_path / "none").mkdir()
    (tmp_path / "link.mp4").symlink_to(clip)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("ten years of work")
    write_clip(tmp_path / "tiny", torch.zeros(3, 2, 15, 40))
    out = tmp_path / "out.mp4"
    fail(capsys, "is the input", clip, clip, "--overwrite")
    fail(capsys, "is the input", clip, tmp_path / "link.mp4", "--overwrite")
    fail(capsys, "is the input", tmp_path / "tiny", tmp_path / "tiny", "--overwrite")
    fail(capsys, "exists .*--overwrite", clip, tmp_path / "text.mp4")
    fail(capsys, "holds more than numbered PNGs: thesis.tex", clip, tmp_path / "mine", "--overwrite")
    fail(capsys, "there is no folder", clip, tmp_path / "nowhere" / "out.mp4")
    for name in ("out.avi", "out.mkv", "out.MOV", "out.ts", "out.webm", "out.gif", "out.png", "out.h264"):
        fail(capsys, "NAME.mp4, or a folder", clip, tmp_path / name)
    (tmp_path / "result").write_text("a file")
    fail(capsys, "NAME.mp4, or a folder", clip, tmp_path / "result", "--overwrite")
    write_clip(tmp_path / "frames", torch.zeros(3, 2, 16, 16))
    fail(capsys, "holds the input", tmp_path / "frames" / "000000.png", tmp_path / "frames", "--overwrite")
    assert len(list((tmp_path / "frames").iterdir())) == 2
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "frames")
    fail(capsys, "frames: is a mount point", clip, tmp_path / "frames", "--overwrite")
    fail(capsys, "absent.mp4: .*No such file", tmp_path / "absent.mp4", out)
    fail(capsys, "text.mp4: cannot be read as video", tmp_path / "text.mp4", out)
    fail(capsys, "none: holds no frames", tmp_path / "none", out)
    fail(capsys, "tiny: frames are 40x15, wanted at least 16x16", tmp_path / "tiny", out)
    assert clip.read_bytes() == before and not out.exists() and (tmp_path / "mine" / "thesis.tex").exists()


def test_bad_settings_are_one_line_and_status_2(tmp_path, capsys, stand_in):
    clip, out = encode(tmp_path / "clip.mp4", pictures(2)), tmp_path / "out.mp4"
    fail(capsys, "unknown key 'quality', there are crf, preset, fps, at_height, .*, margin, change_only$",
         clip, out, "--set", "quality=3")
    fail(capsys, "tiles: wanted an integer from 1 to", clip, out, "--set", "tiles=0")
    fail(capsys, "no such file", clip, out, "--set", "keep=nowhere.json")
    fail(capsys, "crf must be int, got 'best'", clip, out, "--set", "crf=best")
    fail(capsys, "x264 takes no such settings: .*preset=quick", clip, out, "--set", "preset=quick")
    write_clip(tmp_path / "images", torch.zeros(3, 2, 16, 16))
    fail(capsys, "fps must be from 1/1001", tmp_path / "images", out, "--set", "fps=0")
    if not torch.cuda.is_available():
        fail(capsys, "--device cuda", clip, out, "--device", "cuda")


def test_a_model_that_does_not_fit_is_one_line_and_status_2(tmp_path, capsys, monkeypatch):
    clip, out = encode(tmp_path / "clip.mp4", pictures(2)), tmp_path / "out.mp4"
    fail(capsys, "nowhere: no such folder, and not a hub id", clip, out, "--model", tmp_path / "nowhere")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "stage_a.safetensors").write_bytes(b"junk" * 9)
    fail(capsys, "stage_a.safetensors: truncated or corrupt", clip, out, "--model", tmp_path / "model")

    def from_pretrained(*path, **settings):
        raise ValueError("vae.safetensors does not fit the model\n  1 missing: decoder.conv_in.weight\n  1 more: a")

    put(monkeypatch, from_pretrained)
    fail(capsys, "does not fit the model 1 missing: decoder.conv_in.weight", clip, out)


def test_a_write_that_fails_while_the_model_works_is_one_line_and_status_2(tmp_path, capsys, monkeypatch, stand_in):
    written = []

    def write(writer, x, pts, duration, whole=video.Mp4.write):
        written.append(pts)
        if len(written) == 8:
            raise OSError("No space left on device")
        whole(writer, x, pts, duration)

    monkeypatch.setattr(video.Mp4, "write", write)
    source, target = encode(tmp_path / "in.mp4", pictures(30)), tmp_path / "out.mp4"
    fail(capsys, "No space left", source, target, "--set", "crf=20")
    assert not target.exists()


@pytest.mark.parametrize("error", [RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9\nTry"),
                                   torch.OutOfMemoryError("CUDA out of memory."), MemoryError("no array of 9 GiB")])
def test_memory_that_does_not_suffice_is_one_line_and_status_2(tmp_path, capsys, stand_in, error):
    def full():
        raise error
    stand_in.at[3] = full
    fail(capsys, "the memory does not suffice .*--set tiles=2", encode(tmp_path / "in.mp4", pictures(9)),
         tmp_path / "out.mp4")


@pytest.mark.parametrize("error, goes_on", [(torch.OutOfMemoryError("CUDA out of memory."), True),
                                            (MemoryError("no array of 9 GiB"), True), (RuntimeError("a bug"), False)])
def test_a_video_for_which_the_memory_does_not_suffice_ends_no_folder(tmp_path, capsys, stand_in, error, goes_on):
    def full():
        raise error
    clips, out = tmp_path / "clips", tmp_path / "out"
    clips.mkdir()
    for name, T in (("a.mp4", 3), ("b.mp4", 9), ("c.mp4", 4)):
        encode(clips / name, pictures(T))
    stand_in.at[8] = full  # only b.mp4 is that long
    if not goes_on:
        with pytest.raises(RuntimeError, match="^a bug$"):
            run(capsys, clips, out)
        return
    status, said, err = run(capsys, clips, out)
    line = f"infer.py: {clips / 'b.mp4'}: the memory does not suffice (--set tiles=2 takes less)\n"
    assert status == 1 and err == line
    assert said.splitlines()[-1] == f"{out}: 2 videos done, 0 were there, 1 failed"
    assert sorted(path.name for path in out.iterdir()) == ["a.mp4", "c.mp4"]


def test_a_bug_is_not_hidden_behind_a_line(tmp_path, capsys, stand_in):
    stand_in.at[1] = lambda: {}["missing"]
    with pytest.raises(KeyError):
        infer.cli([str(encode(tmp_path / "clip.mp4", pictures(3))), str(tmp_path / "out.mp4")])
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize("name", ["out.mp4", "out"])
def test_what_appears_under_the_outputs_name_while_the_model_works_stays(tmp_path, capsys, stand_in, name):
    def appear():
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious.txt").write_text("precious")
    stand_in.at[3] = appear
    fail(capsys, f"{name}: has appeared in the meantime", encode(tmp_path / "in.mp4", pictures(9)), tmp_path / name)
    assert (tmp_path / name / "precious.txt").read_text() == "precious"


def test_what_the_reader_noticed_is_said(tmp_path, capsys, stand_in):
    with av.open(str(tmp_path / "in.mkv"), "w") as out:
        for _ in range(2):
            stream = out.add_stream("libx264", rate=RATE)
            stream.width, stream.height = WIDTH, HEIGHT
        for stream in out.streams:
            for t in range(3):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(picture(t), format="rgb24")))
            out.mux(stream.encode())
    assert "holds 2 videos; read is the one of 96x64" in succeed(capsys, tmp_path / "in.mkv", tmp_path / "out.mp4")[1]


# ---- a folder of videos ---------------------------------------------------------------------------------------------


def test_a_folder_of_videos_is_done_with_one_model_whole_or_reported_and_continued(tmp_path, capsys, monkeypatch):
    loaded = []
    put(monkeypatch, lambda *path, **settings: (loaded.append(path), StandIn())[1])
    clips, out = tmp_path / "clips", tmp_path / "out"
    clips.mkdir()
    for name, T in (("a.mp4", 3), ("b.mkv", 4), ("d.mov", 7), ("f.3gp", 2)):
        encode(clips / name, pictures(T))
    (clips / "c.mp4").write_text("no video" * 99)
    save_tensors(clips / "e.safetensors", {"x_ni": torch.zeros(3, 2, 16, 16, dtype=torch.uint8)})
    (clips / "notes.txt").touch()
    status, said, err = run(capsys, clips, out)
    assert status == 1 and len(loaded) == 1
    line, = err.splitlines()
    assert re.match(r"infer.py: .*clips/c\.mp4: cannot be read as video", line), err
    assert said.splitlines()[-1] == f"{out}: 5 videos done, 0 were there, 1 failed; passed over: notes.txt"
    assert sorted(path.name for path in out.iterdir()) == ["a.mp4", "b.mp4", "d.mp4", "e.mp4", "f.mp4"]
    assert [len(shape_of(out / f"{name}.mp4")[1]) for name in "abde"] == [3, 4, 7, 2]

    (clips / "c.mp4").unlink()
    encode(clips / "c.mp4", pictures(5))
    before = (out / "a.mp4").stat().st_mtime_ns
    said, err = succeed(capsys, clips, out)
    assert said.splitlines()[-1] == f"{out}: 1 videos done, 5 were there, 0 failed; passed over: notes.txt" and not err
    assert (out / "a.mp4").stat().st_mtime_ns == before and len(shape_of(out / "c.mp4")[1]) == 5
    succeed(capsys, clips, out, "--overwrite")
    assert (out / "a.mp4").stat().st_mtime_ns > before
    succeed(capsys, clips, out)
    assert len(loaded) == 3, "the last run had nothing to do"


def test_processes_share_a_folder_of_videos(tmp_path, capsys, monkeypatch, stand_in):
    clips, out = tmp_path / "clips", tmp_path / "out"
    clips.mkdir()
    for name in ("v9", "v10", "v11"):
        encode(clips / f"{name}.mp4", pictures(2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, wanted in ((1, ["v10.mp4"]), (0, ["v10.mp4", "v11.mp4", "v9.mp4"])):
        monkeypatch.setenv("RANK", str(rank))
        succeed(capsys, clips, out)
        assert sorted(path.name for path in out.iterdir()) == wanted
    fail(capsys, "one video takes one process", clips / "v9.mp4", tmp_path / "a.mp4")


def test_folders_that_are_not_one_thing_and_outputs_that_do_not_fit_are_refused(tmp_path, capsys, stand_in):
    clips = tmp_path / "clips"
    clips.mkdir()
    encode(clips / "a.mp4", pictures(2))
    fail(capsys, "wanted a folder for the results", clips, tmp_path / "out.mp4")
    fail(capsys, "clips: is the input: name another folder", clips, clips)
    fail(capsys, "No such file or directory", clips, tmp_path / "nowhere" / "out")
    encode(clips / "a.mkv", pictures(2))
    encode(clips / "a.mob.mp4", pictures(2))  # by the alphabet between the two
    fail(capsys, "the results of a.mkv and a.mp4 would have one name", clips, tmp_path / "out")
    (clips / "a.mkv").unlink()
    Image.fromarray(picture(0)).save(clips / "0.png")
    fail(capsys, r"holds pictures \(0.png\), the frames of one video, and videos \(a.mob.mp4\)", clips,
         tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_signal_among_many_videos_leaves_those_that_are_done(tmp_path, capsys, stand_in):
    clips, out = tmp_path / "clips", tmp_path / "out"
    clips.mkdir()
    for name, T in (("a", 9), ("b", 20)):
        encode(clips / f"{name}.mp4", pictures(T))
    stand_in.at[12] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    before = {each: signal.signal(each, desk.interrupt) for each in desk.SIGNALS}
    try:
        status, said, err = run(capsys, clips, out)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert status == 128 + signal.SIGTERM and [path.name for path in out.iterdir()] == ["a.mp4"]
    assert err == f"infer.py: stopped by SIGTERM; what is in {out} is whole, and the same command continues\n"


# ---- stopped --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out.mp4", "out"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_and_leaves_nothing(tmp_path, capsys, stand_in, name, number):
    source = encode(tmp_path / "in.mp4", pictures(30))
    stand_in.at[20] = lambda: os.kill(os.getpid(), number)
    before = {each: signal.signal(each, desk.interrupt) for each in desk.SIGNALS}
    try:
        status, out, err = run(capsys, source, tmp_path / name)
        assert all(signal.getsignal(each) == signal.SIG_IGN for each in desk.SIGNALS), "a second must not disturb"
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert status == 128 + number and err == f"infer.py: stopped by {number.name}; nothing was written\n" and not out
    assert [p.name for p in tmp_path.iterdir()] == ["in.mp4"]


def infer_and_stall(source: Path, target: Path, reached: Path, out: Path, err: Path) -> None:
    """In a forked process: `python infer.py source target`, whose model touches `reached` at frame 120, and stays."""
    def stream(frames):
        for number, frame in enumerate(frames):
            if number == 120:
                reached.touch()
                for _ in range(6000):
                    time.sleep(0.1)
            yield frame
    model = SimpleNamespace(stream=stream, Options=Mirage.Options, from_pretrained=lambda *path, **settings: model)
    load.system_in = lambda path: model
    signals.heard()
    scripts.become(["infer.py", str(source), str(target)], ROOT, out, err)


def test_a_signal_to_the_process_ends_it_with_128_and_its_number_and_leaves_nothing(tmp_path):
    source, made = encode(tmp_path / "in.mp4", pictures(150)), tmp_path / "made"
    made.mkdir()
    numbers, processes = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP), []
    for number in numbers:
        reached, out, err = (tmp_path / f"{number.name} {name}" for name in ("reached", "out", "err"))
        given = source, made / f"{number.name}.mp4", reached, out, err
        processes.append(scripts.warm.Process(target=infer_and_stall, args=given, daemon=True))
        processes[-1].start()
    for number, process in zip(numbers, processes):
        err = tmp_path / f"{number.name} err"
        while not (tmp_path / f"{number.name} reached").exists():
            assert process.is_alive(), err.read_text()
            time.sleep(0.01)
        assert len(list(made.glob(f"{number.name}.mp4.*.part"))) == 1
        os.kill(process.pid, number)
        process.join()
        assert process.exitcode == 128 + number
        assert err.read_text() == f"infer.py: stopped by {number.name}; nothing was written\n"
    assert not list(made.iterdir())


# ---- the trained model ----------------------------------------------------------------------------------------------


@needs_weights
@pytest.mark.parametrize("T, H, W", [(1, 16, 16), (10, 67, 101)])
def test_the_trained_model_takes_any_size_and_length(tmp_path, capsys, T, H, W):
    source, target = encode(tmp_path / "in.mkv", pictures(T, H, W), pix_fmt="yuv444p"), tmp_path / "out.mp4"
    succeed(capsys, source, target, "--device", "cpu")
    assert shape_of(target) == shape_of(source)


@needs_weights
def test_the_trained_model_leaves_a_plain_grey_frame_about_as_grey(tmp_path, capsys):
    source = encode(tmp_path / "in.mkv", [np.full((16, 16, 3), 128, np.uint8)], pix_fmt="yuv444p")
    target = tmp_path / "out"
    target.mkdir()
    succeed(capsys, source, target, "--device", "cpu", "--overwrite")
    shift = (read_clip(target) - read_clip(source)).mean() * 127.5
    assert abs(shift) < 14, f"its mean moved by {shift:.1f} of 255, allowed 14"


@needs_weights
def test_the_trained_model_changes_the_demo_clip_and_keeps_its_scene(tmp_path, capsys):
    source, target = tmp_path / "in.mp4", tmp_path / "out.mp4"
    with Video(ROOT / "assets" / "naive_insertion.mp4") as clip:
        write_clip(source, torch.stack(list(islice(clip, 9)), dim=1))  # one group of frames is enough
    succeed(capsys, source, target, "--device", "cpu")
    x, y = read_clip(source), read_clip(target)
    error = (y - x).abs().mean(dim=0)[::8].flatten() * 127.5           # first and last frame
    assert y.shape == x.shape and x.shape[1] == 9
    assert error.median() < 8, f"half of the pixels moved by {error.median():.1f} of 255 or more, allowed 8"
    assert error.quantile(0.999) > 30, "nothing was harmonised: hardly a pixel moved by 30 of 255"
