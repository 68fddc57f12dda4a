"""Real driving clips to train on: where they are, which frames are for training, and how they are kept.

    python -m mirage_min.data.real_clips --out data/real                    # fetches them (56 MB)
    python -m mirage_min.data.real_clips --out data/real --folder DIR       # takes the files from a folder instead

Both write data/real/train and data/real/val, a file a clip: uint8 [3, T, H, W] under the key x, at most 960 columns
wide, which `RealClips` reads in crops. Training never sees the frames in val, by which models are chosen.

    recordings of Udacity's self-driving-car courses       MIT         motorways and a country road, by day
    PandaSet, sequence 002 (Hesai and Scale AI)            CC BY 4.0   San Francisco by day, six cameras

Whoever ships weights trained on PandaSet names it, as weights/README.md does; its terms forbid identifying persons.
"""

if __name__ == "__main__":
    from . import desk

    desk.open_up()  # before the imports that take seconds

import argparse
import hashlib
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Generator, Tensor
from torch.nn import functional as nnf

from ..networks.weights import one_line, save_tensors
from . import desk
from .photometric import uniform
from .pixels import from_bytes, to_bytes
from .video import Video

RAW = "https://raw.githubusercontent.com"
WIDEST = 960  # columns


@dataclass(frozen=True)
class Source:
    """One clip: where it is published, the digest of the file, and the frames for training and for validation."""

    name: str
    url: str                   # one file; with {n:02d}, one image a frame
    sha256: str | None         # None: images, pinned by the commit in the url
    train: tuple[int, int]     # first frame, and the one after the last
    val: tuple[int, int] = (0, 0)


def pandaset(camera: str, train: tuple[int, int], val: tuple[int, int] = (0, 0)) -> Source:
    """A camera of PandaSet's sequence 002."""
    commit = "scaleapi/pandaset-devkit/6c518f9c061429c4e0d32870449802bc0ce40c2f"
    return Source(f"{camera}.mp4", f"{RAW}/{commit}/test/data/002/camera/{camera}/{{n:02d}}.jpg", None, train, val)


SOURCES = (
    Source("highway_dashcam.mp4",
           f"{RAW}/udacity/CarND-LaneLines-P1/master/test_videos/solidWhiteRight.mp4",
           "2d8e14b46fe89afbc8ad1f718685cf09b83e85a324095031c38186a9f0535417", (0, 110), (150, 221)),
    Source("U1a_project_video_000-199.mp4",
           f"{RAW}/hortovanyi/udacity-advanced-lane-finding-project/5e057ab77e591606a2e01005f589812a58b884be"
           "/project_video_short.mp4",
           "17cc12e5e0173409466397cee15dd9bd1997caa077f59773cd82913b0399b33e", (0, 200)),
    Source("U1b_project_video_125-299.mp4",
           f"{RAW}/ranamagdi/Car_detection_HOG/59e83714b934699532072fdcddacb3b435a59dfb/project_video_sample.mp4",
           "4fa57f99fef05f358d05c4f43cb79b7ee26f0442f1e0395a4eb4a7957d6e2d29", (75, 175)),
    Source("U3_challenge_video.mp4",
           f"{RAW}/ihangulo/SDC_P4_AdvancedLaneFinding/abbbed72ff800dde43386c3d0fab18726ad1ae55/short.mp4",
           "ae255a8e1c1209c8e8973e80cd1ad767a614ea8e60204f99f1f27b6fb3745ba2", (0, 150), (180, 237)),
    Source("U4_project_video_later.mp4",
           f"{RAW}/LucFrachon/advanced_lane_lines_detection/cdd637f69f93a9ce2fa666401e5c4cfda0e3f3fb/short_video.mp4",
           "023813b62de5fa7602f20f8567dd919ea46815607e900d88bf1bb8f73dcb5a18", (0, 175)),
    pandaset("front_camera", (0, 80)),
    pandaset("front_right_camera", (0, 80)),
    pandaset("front_left_camera", (0, 0), (0, 80)),
    pandaset("left_camera", (0, 80)),
    pandaset("right_camera", (0, 80)),
    pandaset("back_camera", (0, 80)),
)


class RealClips:
    """The clips of a folder, read in crops. ValueError where there is none of at least `frames` frames."""

    def __init__(self, folder: str | Path, frames: int):
        self.frames, self.files = frames, []
        for file in sorted(Path(folder).glob("*.safetensors")):
            shape = shape_of(file)
            if shape[1] >= frames:
                self.files.append((file, shape))
        if not self.files:
            raise ValueError(f"{folder}: wanted NAME.safetensors clips of at least {frames} frames, found none "
                             "(python -m mirage_min.data.real_clips makes them)")
        self.names = [file.stem for file, _ in self.files]

    def paths(self) -> list[Path]:
        """The files of the clips."""
        return [file for file, _ in self.files]

    def crop(self, size: tuple[int, int], draws: Generator, frames: int | None = None) -> tuple[Tensor, str]:
        """A piece [3, frames, h, w] in [-1, 1] of a clip, mirrored half of the time, and the clip's name.

        Clips are drawn by their numbers of frames. The piece is taken at a random scale, even in its logarithm, from
        the whole frame shrunk to `size` to the clip's own pixels, so that near and far detail are both seen.
        """
        frames = frames or self.frames
        lengths = torch.tensor([shape[1] for _, shape in self.files], dtype=torch.float32)
        file, (_, *whole) = self.files[int(torch.multinomial(lengths, 1, generator=draws))]
        t, y, x = random_piece(whole, (frames, *size), 1.0, draws)
        with safe_open(file, framework="pt") as tensors:
            piece = tensors.get_slice("x")[:, t, y, x]
        piece = resize(from_bytes(piece), size)
        if int(torch.randint(2, (), generator=draws)):
            piece = piece.flip(-1)
        return piece, file.stem


def shape_of(file: Path) -> list[int]:
    """3, T, H, W of a clip's x; ValueError of one line if the file holds none."""
    with one_line(file), safe_open(file, framework="pt") as tensors:
        kinds = {key: (tensors.get_slice(key).get_dtype(), tensors.get_slice(key).get_shape())
                 for key in tensors.keys()}
    kind, shape = kinds.get("x", (None, []))
    if kind != "U8" or len(shape) != 4 or shape[0] != 3 or min(shape) < 1:
        raise ValueError(f"{file}: wanted a tensor x, uint8 [3, T, H, W], got {list(kinds.items())[:5]}")
    return shape


# ---- pieces of a recording -------------------------------------------------------------------------------------------

def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """x [3, T, H, W] -> [3, T, h, w], filtered; x itself if it has that size."""
    if x.shape[-2:] == tuple(size):
        return x
    return nnf.interpolate(x.transpose(0, 1), size, mode="bilinear", antialias=True).transpose(0, 1)


def random_piece(whole: Sequence[int], piece: tuple[int, int, int], finest: float, draws: Generator
                 ) -> tuple[slice, slice, slice]:
    """Frames, rows and columns of a random piece of a clip of T, H, W = whole, to be resized to t, h, w = piece.

    Its scale is even in its logarithm, from that of the whole frame to `finest`, at 1 the clip's own pixels.
    """
    T, H, W = whole
    t, h, w = piece
    low = max(h / H, w / W)
    scale = low * max(finest / low, 1.0) ** float(torch.rand((), generator=draws))
    sizes = t, min(H, round(h / scale)), min(W, round(w / scale))
    starts = [int(torch.randint(n - size + 1, (), generator=draws)) for n, size in zip((T, H, W), sizes)]
    frames, rows, columns = (slice(start, start + size) for start, size in zip(starts, sizes))
    return frames, rows, columns


def shrink(x: Tensor, size: tuple[int, int], most: float, draws: Generator) -> Tensor:
    """x [3, T, H, W] at a random scale -> [3, T, H', W'], from just as large as `size` needs to `most` times that, and
    never enlarged for more than that."""
    H, W = x.shape[-2:]
    h, w = size
    low = max(h / H, w / W)
    scale = min(1.0, low * float(uniform(draws, 1.0, most)))
    return resize(x, (max(h, round(H * scale)), max(w, round(W * scale))))


def window_about(box: Tensor, whole: tuple[int, int], size: tuple[int, int], draws: Generator) -> tuple[int, int]:
    """(top, left) of a random window of a frame that holds as much of a box [4] (x0, y0, x1, y1) as fits."""
    x0, y0, x1, y1 = box.tolist()
    found = []
    for a, b, n, m in ((y0, y1, whole[0], size[0]), (x0, x1, whole[1], size[1])):
        low, high = sorted((b - m, a))
        found.append(int(min(max(float(uniform(draws, low, high)), 0), n - m)))
    return found[0], found[1]


# ---- getting them ----------------------------------------------------------------------------------------------------

def fetch(source: Source, folder: Path) -> Path:
    """Download a clip: a video, checked against its digest, or a folder of images. ValueError where it differs."""
    if "{n" in source.url:
        target = folder / Path(source.name).stem
        target.mkdir(exist_ok=True)
        for n in range(max(source.train[1], source.val[1])):
            urllib.request.urlretrieve(source.url.format(n=n), target / f"{n:06d}.jpg")
        return target
    target = folder / source.name
    urllib.request.urlretrieve(source.url, target)
    check(source, target)
    return target


def check(source: Source, file: Path) -> None:
    """ValueError if this is not the file that is meant."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if source.sha256 is not None and digest != source.sha256:
        raise ValueError(f"{file}: wanted sha256 {source.sha256}, got {digest}")


def keep(source: Source, video: Path, out: Path) -> None:
    """Write the frames for training and for validation, at most WIDEST columns wide. ValueError for too few frames."""
    for part, (start, stop) in (("train", source.train), ("val", source.val)):
        target = out / part / f"{Path(source.name).stem}.safetensors"
        if stop == 0 or target.exists():
            continue
        frames = []
        with Video(video) as read:
            for i, frame in enumerate(read):
                if i >= stop:
                    break
                if i >= start:
                    H, W = frame.shape[-2:]
                    size = (H, W) if W <= WIDEST else (round(H * WIDEST / W), WIDEST)
                    frames.append(to_bytes(resize(frame[:, None], size)))
        if len(frames) != stop - start:
            raise ValueError(f"{video}: wanted frames {start} to {stop - 1}, got {len(frames)} of them")
        target.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(target, {"x": torch.cat(frames, dim=1)})


def main(args: argparse.Namespace) -> None:
    """Write every clip, atomically, unless its file exists."""
    with tempfile.TemporaryDirectory() as temporary:
        for source in desk.bar(SOURCES, unit="clip"):
            if args.folder is None:
                video = fetch(source, Path(temporary))
            else:
                found = sorted(args.folder.rglob(source.name))
                if not found:
                    raise ValueError(f"{args.folder}: there is no {source.name}")
                video = found[0]
                check(source, video)
            keep(source, video, args.out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=desk.first_line(__doc__))
    parser.add_argument("--out", type=Path, help="folder for the clips; without it, the list is printed")
    parser.add_argument("--folder", type=Path, help="take the files from here instead of fetching them")
    args = parser.parse_args()
    if args.out is None:
        for source in SOURCES:
            print(f"{source.name:32} train {source.train[1] - source.train[0]:3}, "
                  f"val {source.val[1] - source.val[0]:3} frames")
    else:
        sys.exit(desk.serve("real_clips", lambda: main(args), lambda: "; the clips that are whole stay"))
