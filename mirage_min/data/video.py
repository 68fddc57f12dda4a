"""Video in and out: a file or a folder of images -> frames [3, H, W] in [-1, 1] -> an mp4 or a folder of PNGs.

    with Video("in.mkv") as video, writing("out.mp4", video.format, sound="in.mkv") as out:
        for frame in video:                              # one after another: never the whole video in memory
            out.write(frame, *video.times.popleft())     # at its own time, regular or not

What is kept of a video, and how:

    colour   an mp4 is written with the matrix of the input (colour.py) in limited range, and says so: reading it again
             shifts no colour.
    time     every frame keeps its presentation time and duration; the shape of a pixel is carried over.
    sound    every audio stream is copied, or encoded as AAC where players of mp4 would not know it (sound.py).
    whole    a written file or folder appears under its name when it is complete, or never (place.py).

Left out: subtitles, chapters, metadata, interlacing flags, more than 8 bits, tone mapping of HDR (its tags are kept).

    python -m mirage_min.data.video                           # a clip written and read again
"""

import math
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..networks.weights import save_tensors
from .clips import Clip
from .colour import BT709, EXACTLY, FULL, LIMITED, UNKNOWN, swscale_matrix
from .decode import File
from .pictures import Animation, Folder, animates, read_picture
from .pixels import to_bytes, to_float, to_uint8
from .place import is_clip, is_mp4, taking_place
from .sound import copy_sound

LOOK_AHEAD = 2**26  # bytes of frames, 1 a number, that are decoded before they are asked for


@dataclass(frozen=True)
class Format:
    """What a written video takes over from the one it was made of."""

    width: int
    height: int
    rate: Fraction = Fraction(25)          # frames a second, on average
    time_base: Fraction = Fraction(1, 25)  # seconds in a tick of presentation time
    aspect: Fraction = Fraction(1)         # width / height of a pixel
    matrix: int = BT709                    # this and the next two as H.273 numbers them
    primaries: int = UNKNOWN
    transfer: int = UNKNOWN


# ---- reading --------------------------------------------------------------------------------------------------------


class Video(AbstractContextManager):
    """A video file, a clip, or a folder of pictures in natural order (`fps` of them a second), open for reading.

    Iterate it, once, for its frames [3, H, W] in [-1, 1]; a thread decodes up to `ahead` of them in advance, fewer if
    they are large.

        format   Format: size (upright), rate, colours
        count    how many frames there are, as far as the file tells; None if it does not
        times    (presentation time, duration) in ticks, of every frame that was decoded and is not yet popped
        broken   numbers, counted from 0, of the frames that did not decode
        notes    lines worth saying: which of several videos is read, how many frames an edit list hides

    A frame that does not decode, or is missing from a damaged file, is a ValueError; with `skip_broken` the frame
    before is repeated. Whatever is wrong is a ValueError of one line that begins with the path.
    """

    def __init__(self, path: str | Path, fps: float | Fraction = 25, skip_broken: bool = False, ahead: int = 8):
        self.path, self.skip_broken = Path(path), skip_broken
        self.source = open_source(self.path, rational(fps))
        self.count, self.notes, self.format = self.source.count, self.source.notes, None
        self.times: deque[tuple[int, int]] = deque()
        self.broken: list[int] = []
        self._pool = ThreadPoolExecutor(1)
        self._frames = self._decode()
        try:
            self._first = next(self._frames, None)
            if self._first is None:
                raise ValueError(f"{path}: holds no frames" + " that decode" * bool(self.broken))
        except BaseException:
            self.source.close()
            raise
        self.ahead = min(ahead, max(1, LOOK_AHEAD // self._first.size))

    def __iter__(self) -> Iterator[Tensor]:
        yield to_float(self._first)
        self._first = None
        pending = deque(self._pool.submit(next, self._frames, None) for _ in range(self.ahead))
        while (pixels := pending.popleft().result()) is not None:
            pending.append(self._pool.submit(next, self._frames, None))
            yield to_float(pixels)

    def _decode(self) -> Iterator[np.ndarray]:
        """The frames, uint8 [H, W, 3], repaired: none is missing and their times rise."""
        last, clock, step = None, None, 1
        for number, (pixels, time, duration) in enumerate(self.source.frames()):
            if pixels is not None:
                self._check(number, pixels)
                step = max(1, round(1 / (self.format.rate * self.format.time_base)))
                last = pixels
            elif self.skip_broken:
                self.broken.append(number)
            else:
                raise ValueError(f"{self.path}: {self.source.name(number)} does not decode "
                                 "(--skip-broken repeats the frame before it)")
            if last is None:
                continue  # broken from the start: there is nothing to repeat
            if time is None or (clock is not None and time <= clock):
                time = 0 if clock is None else clock + step
            clock = time
            self.times.append((clock, duration or step))
            yield last

    def _check(self, number: int, pixels: np.ndarray) -> None:
        """Take the format from the first frame; hold the others to its size."""
        H, W, C = pixels.shape
        if self.format is None:
            s = self.source
            self.format = Format(W, H, s.rate, s.time_base, s.aspect, s.matrix, s.primaries, s.transfer)
        w, h = self.format.width, self.format.height
        if (W, H) != (w, h):
            raise ValueError(f"{self.path}: {self.source.name(number)} is {W}x{H}, the first is {w}x{h}")

    def __exit__(self, *error) -> None:
        self._pool.shutdown(cancel_futures=True)  # waits for the frame in progress: its file must stay open so long
        self.source.close()


def open_source(path: Path, fps: Fraction) -> File | Folder | Animation | Clip:
    """What reads the frames of a path; each has rate, time_base, aspect, matrix and frames()."""
    if path.is_dir():
        return Folder(path, fps)
    if is_clip(path):
        return Clip(path, fps)
    return Animation(path, fps) if animates(path) else File(path)


def may_sound(path: Path) -> bool:
    """Whether an input of this path may have sound: pictures and clips have none."""
    return not (path.is_dir() or is_clip(path) or animates(path))


def read_image(path: str | Path) -> Tensor:
    """A picture file -> [3, H, W] in [-1, 1]; ValueError if there is none, or it cannot be read as one."""
    pixels = read_picture(Path(path))
    if pixels is None:
        raise ValueError(f"{path}: {'cannot be read as a picture' if Path(path).exists() else 'no such file'}")
    return to_float(pixels)


def read_clip(path: str | Path, frames: int | None = None) -> Tensor:
    """A whole video in memory, or its first `frames`: [3, T, H, W] in [-1, 1]. ValueError as in Video."""
    with Video(path) as video:
        return torch.stack(list(islice(video, frames)), dim=1)


# ---- writing --------------------------------------------------------------------------------------------------------


@contextmanager
def writing(path: str | Path, format: Format, crf: int = 16, preset: str = "medium", sound: str | Path | None = None,
            overwrite: bool = True):
    """Lend a writer, `write(x [3, H, W] in [-1, 1], pts, duration)`, of an mp4, a clip or a folder of PNGs.

    The output appears under its name at the end (place.py); if anything is raised before, nothing is left of it.
    A path that is not a folder and ends in .mp4 becomes H.264: `crf` is its quality, from 0 (lossless but for the
    conversion to YUV) to 51, and `sound` the file whose sound is taken over. NAME.safetensors gets x_dr. PNGs are
    lossless, and silent. ValueError if the place is taken, x264 refuses the settings, or writing fails.
    """
    target = Path(os.path.realpath(path))
    try:
        with taking_place(target, overwrite) as new:
            if is_mp4(target):
                writer = Mp4(new, format, crf, preset, sound)
            else:
                writer = Tensors(new) if is_clip(target) else Pngs(new)
            with writer:
                yield writer
    except av.FFmpegError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from error


def write_clip(path: str | Path, x: Tensor, fps: float | Fraction = 25, crf: int = 16) -> None:
    """Write [3, T, H, W] in [-1, 1] to an mp4 of quality `crf`, or without loss to a folder of PNGs."""
    C, T, H, W = x.shape
    with writing(path, Format(W, H, rational(fps), 1 / rational(fps)), crf) as out:
        for t in range(T):
            out.write(x[:, t], t, 1)


def rational(fps: float | Fraction) -> Fraction:
    """Frames a second as containers keep them: 29.97 -> 2997/100. ValueError outside 1/1001 to 1000."""
    if not 1 / 1001 <= fps <= 1000:
        raise ValueError(f"fps must be from 1/1001 to 1000, got {fps}")
    return Fraction(fps).limit_denominator(1001)


class Mp4(AbstractContextManager):
    """H.264 in yuv420p, or in yuv444p where a side is odd, because then chroma cannot be halved."""

    def __init__(self, path: Path, format: Format, crf: int, preset: str, sound: str | Path | None):
        if not (0 <= crf <= 51 and preset):
            raise ValueError(f"x264 takes a crf from 0 to 51 and a preset, got crf={crf}, preset={preset}")
        self.format = format
        ticks = {"video_track_timescale": str(format.time_base.denominator)}
        self.container = av.open(f"file:{path}", "w", format="mp4", options=ticks)
        # Without B-frames (bf 0), because with them mp4 loses how long the last frames are shown.
        options = {"crf": str(crf), "preset": preset, "bf": "0"}
        stream = self.container.add_stream("libx264", rate=format.rate, options=options)
        stream.width, stream.height = format.width, format.height
        stream.pix_fmt = "yuv420p" if format.width % 2 == format.height % 2 == 0 else "yuv444p"
        context = stream.codec_context
        context.time_base, context.sample_aspect_ratio = format.time_base, format.aspect
        context.colorspace, context.color_range = format.matrix, LIMITED
        context.color_primaries, context.color_trc = format.primaries, format.transfer
        context.flags |= av.codec.context.Flags.frame_duration
        try:
            context.open()
        except av.FFmpegError as error:
            raise ValueError(f"x264 takes no such settings: crf={crf}, preset={preset}, {format}") from error
        self.stream = stream
        self.sound = copy_sound(Path(sound), self.container) if sound and may_sound(Path(sound)) else iter(())
        self.heard = next(self.sound, math.inf)  # seconds of sound written; the first step adds its streams

    def write(self, x: Tensor, pts: int, duration: int = 0) -> None:
        """Write a frame [3, H, W] in [-1, 1] at `pts` ticks, which must rise. ValueError: another size, NaN, inf."""
        C, H, W = x.shape
        if (H, W) != (self.format.height, self.format.width):
            raise ValueError(f"wanted a frame [3, {self.format.height}, {self.format.width}], got {list(x.shape)}")
        frame = av.VideoFrame.from_ndarray(to_uint8(x), format="rgb24").reformat(
            format=self.stream.pix_fmt, src_color_range=FULL, dst_color_range=LIMITED,
            dst_colorspace=swscale_matrix(self.format.matrix), interpolation=EXACTLY)
        frame.pts, frame.duration, frame.time_base = pts, duration, self.format.time_base
        self.container.mux(self.stream.encode(frame))
        self._sound_until(float(pts * self.format.time_base))

    def _sound_until(self, seconds: float) -> None:
        while self.heard < seconds:
            self.heard = next(self.sound, math.inf)

    def __exit__(self, kind, *error) -> None:
        try:
            if kind is None:
                self.container.mux(self.stream.encode())
                self._sound_until(math.inf)
        finally:
            self.container.close()


class Tensors(AbstractContextManager):
    """A clip NAME.safetensors with x_dr, uint8 [3, T, H, W], which is in memory as a whole."""

    def __init__(self, path: Path):
        self.path, self.frames = path, []

    def write(self, x: Tensor, pts: int = 0, duration: int = 0) -> None:
        """Add a frame [3, H, W] in [-1, 1]; its time is not kept. ValueError for NaN and inf."""
        self.frames.append(to_bytes(x.cpu()))

    def __exit__(self, kind, *error) -> None:
        if kind is None:
            save_tensors(self.path, {"x_dr": torch.stack(self.frames, dim=1)})


class Pngs(AbstractContextManager):
    """A folder of 000000.png, 000001.png and so on."""

    def __init__(self, folder: Path):
        folder.mkdir()
        self.folder, self.number = folder, 0

    def write(self, x: Tensor, pts: int = 0, duration: int = 0) -> None:
        """Write a frame [3, H, W] in [-1, 1] as the next PNG; its time is not kept. ValueError for NaN and inf."""
        Image.fromarray(to_uint8(x)).save(self.folder / f"{self.number:06d}.png")
        self.number += 1

    def __exit__(self, *error) -> None:
        pass


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        x = torch.stack(torch.meshgrid(torch.linspace(-1, 1, 3), torch.linspace(-1, 1, 9), torch.linspace(-1, 1, 64),
                                       torch.linspace(-1, 1, 96), indexing="ij")).mean(0)
        for name in ("clip.mp4", "clip"):
            write_clip(f"{folder}/{name}", x, fps=10)
            with Video(f"{folder}/{name}", fps=10) as video:
                y = torch.stack(list(video), dim=1)
                shift = float((y - x).mean() * 127.5)
                print(f"{name:8}  {list(x.shape)} -> {list(y.shape)}  matrix {video.format.matrix}, "
                      f"mean shift {shift:+.2f} of 255, times {[pts for pts, _ in video.times]}")
