"""Real clips: taken from a folder or fetched, checked by digest, split for training and validation, read in crops."""

import functools
import hashlib
import http.server
import threading
from argparse import Namespace

import pytest
import torch

from mirage_min.data import real_clips
from mirage_min.data.pixels import to_bytes
from mirage_min.data.real_clips import RealClips, Source
from mirage_min.data.video import read_clip, write_clip
from mirage_min.networks import weights
from tests import scripts


def draws(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A video of 12 frames and the same as images, in a folder."""
    folder = tmp_path_factory.mktemp("published")
    x = torch.rand(3, 12, 32, 48, generator=draws(0)) * 2 - 1
    write_clip(folder / "drive.mp4", x, fps=10, crf=0)
    return folder


def source(published, **changes) -> Source:
    digest = hashlib.sha256((published / "drive.mp4").read_bytes()).hexdigest()
    return Source(**dict(name="drive.mp4", url="", sha256=digest, train=(0, 7), val=(9, 12)) | changes)


def test_training_and_validation_frames_are_kept_apart_and_are_the_files_own(published, tmp_path):
    real_clips.keep(source(published), published / "drive.mp4", tmp_path)
    whole = to_bytes(read_clip(published / "drive.mp4"))
    train, val = (weights.load_tensors(tmp_path / part / "drive.safetensors")[0]["x"] for part in ("train", "val"))
    assert torch.equal(train, whole[:, :7]) and torch.equal(val, whole[:, 9:12])


def test_a_wide_clip_is_kept_at_most_960_columns_wide(published, tmp_path, monkeypatch):
    monkeypatch.setattr(real_clips, "WIDEST", 24)
    real_clips.keep(source(published), published / "drive.mp4", tmp_path)
    assert weights.load_tensors(tmp_path / "train" / "drive.safetensors")[0]["x"].shape == (3, 7, 16, 24)


def test_another_file_under_the_name_is_refused_with_both_digests(published):
    wrong = source(published, sha256="0" * 64)
    with pytest.raises(ValueError, match=f"drive.mp4: wanted sha256 {'0' * 64}, got [0-9a-f]{{64}}"):
        real_clips.check(wrong, published / "drive.mp4")


def test_a_clip_that_is_too_short_is_refused_and_leaves_nothing(published, tmp_path):
    with pytest.raises(ValueError, match="wanted frames 0 to 19, got 12"):
        real_clips.keep(source(published, train=(0, 20)), published / "drive.mp4", tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_clip_is_fetched_as_a_video_or_as_images(published, tmp_path):
    images = published / "images"
    images.mkdir(exist_ok=True)
    for n in range(3):
        (images / f"{n:02d}.jpg").write_bytes(b"image %d" % n)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=published)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        video = real_clips.fetch(source(published, url=f"{url}/drive.mp4"), tmp_path)
        assert video.read_bytes() == (published / "drive.mp4").read_bytes()
        folder = real_clips.fetch(source(published, name="cam.mp4", url=f"{url}/images/{{n:02d}}.jpg", sha256=None,
                                         train=(0, 3), val=(0, 0)), tmp_path)
        assert [p.read_bytes() for p in sorted(folder.iterdir())] == [b"image 0", b"image 1", b"image 2"]
    finally:
        server.shutdown()


def test_the_list_gives_no_frame_to_both_training_and_validation():
    for clip in real_clips.SOURCES:
        both = set(range(*clip.train)) & set(range(*clip.val))
        assert not both and clip.url.startswith("https://"), clip.name
    assert sum(clip.val[1] - clip.val[0] for clip in real_clips.SOURCES) > 100


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    """Two clips whose pixels tell where and when they are: red the column, green the row, blue the frame."""
    folder = tmp_path_factory.mktemp("streets")
    for name, T in (("long", 60), ("short", 20)):
        t, y, x = torch.meshgrid(torch.arange(T), torch.arange(64), torch.arange(96), indexing="ij")
        weights.save_tensors(folder / f"{name}.safetensors", {"x": torch.stack([x * 2, y * 3, t * 4]).byte()})
    weights.save_tensors(folder / "too_short.safetensors", {"x": torch.zeros(3, 4, 64, 96, dtype=torch.uint8)})
    return folder


def test_a_crop_keeps_its_proportions_at_a_random_scale_place_and_time(streets):
    clips, scales, mirrored, starts, counts = RealClips(streets, 5), [], 0, set(), {}
    assert clips.names == ["long", "short"]
    for seed in range(200):
        x, name = clips.crop((16, 24), draws(seed))
        assert x.shape == (3, 5, 16, 24)
        v = (x + 1) * 127.5
        across = (v[0, 0, 8, -4] - v[0, 0, 8, 3]) / 2 / 17  # columns of the clip to one of the crop
        down = (v[1, 0, -4, 12] - v[1, 0, 3, 12]) / 3 / 9
        assert abs(abs(across) - down) < 0.12 * down, f"{across} columns and {down} rows to a pixel"
        scales.append(float(down))
        mirrored += bool(across < 0)
        starts.add(round(float(v[2, 0].mean()) / 4))
        assert (v[2].mean(dim=(1, 2)).diff() / 4 - 1).abs().max() < 0.05, "frames in a row"
        counts[name] = counts.get(name, 0) + 1
    assert min(scales) < 1.15 and max(scales) > 3.4, "from the clip's own pixels to the whole frame"
    assert 70 < mirrored < 130 and len(starts) > 30 and 115 < counts["long"] < 185


def test_a_window_about_a_box_holds_as_much_of_it_as_fits_and_lies_anywhere_that_does():
    whole, size = (60, 100), (20, 50)                                  # rows and columns
    for box in ((40.0, 25.0, 62.0, 31.0),
                (2.0, 3.0, 30.0, 9.0), (80.0, 50.0, 98.0, 58.0),       # in two corners
                (20.0, 10.0, 90.0, 45.0),                              # larger than the window
                (-30.0, 52.0, 10.0, 75.0)):                            # partly outside of the frame
        found = [real_clips.window_about(torch.tensor(box), whole, size, draws(seed)) for seed in range(300)]
        for start, a, b, n, m in zip(zip(*found), (box[1], box[0]), (box[3], box[2]), whole, size):
            held = [min(at + m, b) - max(at, a) for at in range(n - m + 1)]  # pixels of the box, by where it begins
            places = [at for at, pixels in enumerate(held) if pixels > max(held) - 1]  # a window is of whole pixels
            assert set(start) <= set(places), f"{box}: from {min(start)} to {max(start)}, wanted within {places}"
            assert min(start) <= places[0] + 2 and max(start) >= places[-1] - 2, f"{box}: only {sorted(set(start))}"


def test_a_folder_without_clips_and_a_file_without_x_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="wanted NAME.safetensors clips of at least 5 frames, found none"):
        RealClips(tmp_path, 5)
    for tensors in ({"y": torch.zeros(1)}, {"x": torch.zeros(3, 9, 8, 8)}, {"x": torch.zeros(9, 8, 8).byte()},
                    {"x": torch.zeros(4, 9, 8, 8).byte()}, {}):
        weights.save_tensors(tmp_path / "a.safetensors", tensors)
        with pytest.raises(ValueError, match=r"a.safetensors: wanted a tensor x, uint8 \[3, T, H, W\], got"):
            RealClips(tmp_path, 5)
    (tmp_path / "a.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="a.safetensors: truncated or corrupt"):
        RealClips(tmp_path, 5)


def test_clips_are_taken_from_a_folder_wherever_they_lie_in_it_and_those_that_are_there_stay(published, tmp_path,
                                                                                           monkeypatch):
    (tmp_path / "from" / "below").mkdir(parents=True)
    for name in ("drive.mp4", "below/other.mp4"):
        (tmp_path / "from" / name).write_bytes((published / "drive.mp4").read_bytes())
    monkeypatch.setattr(real_clips, "SOURCES", (source(published, val=(0, 0)), source(published, name="other.mp4")))
    (tmp_path / "out" / "train").mkdir(parents=True)
    (tmp_path / "out" / "train" / "other.safetensors").write_bytes(b"there already")
    real_clips.main(Namespace(folder=tmp_path / "from", out=tmp_path / "out"))
    found = {path.relative_to(tmp_path / "out").as_posix(): path for path in tmp_path.glob("out/*/*")}
    assert found.keys() == {"train/drive.safetensors", "train/other.safetensors", "val/other.safetensors"}
    assert found["train/other.safetensors"].read_bytes() == b"there already"
    whole = to_bytes(read_clip(published / "drive.mp4"))
    assert torch.equal(weights.load_tensors(found["train/drive.safetensors"])[0]["x"], whole[:, :7])
    assert torch.equal(weights.load_tensors(found["val/other.safetensors"])[0]["x"], whole[:, 9:12])


def test_the_command_lists_its_clips_and_names_one_that_a_folder_lacks(tmp_path):
    listed = scripts.run("-m", "mirage_min.data.real_clips")
    assert listed.returncode == 0 and all(clip.name in listed.stdout for clip in real_clips.SOURCES)
    missing = scripts.run("-m", "mirage_min.data.real_clips", "--out", tmp_path / "out", "--folder", tmp_path)
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1
    assert f"real_clips: {tmp_path}: there is no {real_clips.SOURCES[0].name}" in missing.stderr
