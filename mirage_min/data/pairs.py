"""Reading NI–GT pairs: clips of a naive insertion and of the truth, cropped and flipped alike (Mirage §3.3).

A folder of pairs holds `ni/NAME` and `gt/NAME` videos (files or image folders) of equal names, or clips as toy_world
and build_pairs write them, `NAME.safetensors` with x_ni and x_gt as uint8 [3, T, H, W] and perhaps the actor's `boxes`
[T, 4]. A sample's clip, crop and flip depend on its generator alone, so a run can be repeated, resumed, and shared
among processes.

    python -m mirage_min.data.pairs
"""

import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..method.metrics import actor_crops
from .photometric import vary
from .pixels import from_bytes, to_bytes
from .real_clips import RealClips, random_piece, resize
from .video import Video, read_clip

NUMBERS = {"F16", "BF16", "F32", "F64", "U8", "I8", "I16", "I32", "I64"}  # safetensors' names of what boxes may be


class Pairs:
    """The usable pairs of a folder; `left_out` has a line for each of the others, which says why.

    Every pair is checked once, from its header or first frame: both videos exist, are of one size and length, and have
    at least `frames` frames and `size` (height, width). A pair that turns out to be broken when it is read is named in
    a warning, and another is drawn in its place.
    """

    def __init__(self, folder: str | Path, frames: int, size: tuple[int, int] | None = None,
                 real: str | Path | None = None, real_frames: int = 0):
        """size: of the samples; None: whole frames. ValueError if no pair is usable, or `real` is too short.

        real         videos that are their own truth: one that PyAV decodes, or a folder of clips (real_clips.py)
        real_frames  how many of that one video's frames are used; 0: all
        """
        self.folder, self.frames, self.size = Path(folder), frames, size
        ni, gt = ({p.name for p in (self.folder / side).glob("[!.]*")} for side in ("ni", "gt"))
        self.left_out = [f"{name}: only in {'ni' if name in ni else 'gt'}" for name in sorted(ni ^ gt)]
        found = sorted(p.name for p in self.folder.glob("[!.]*.safetensors")) + sorted(ni & gt)
        self.names = [name for name in found if self._usable(name)]
        if not self.names:
            raise ValueError(f"{folder}: no usable pairs: " + ("; ".join(self.left_out[:5]) or
                             "wanted *.safetensors clips, or ni/ and gt/ videos of equal names"))
        self.real: Tensor | None = None            # one video, uint8 [3, T, H, W]
        self.real_clips: RealClips | None = None
        self.real_paths: list[Path] = []
        if real is not None and any(Path(real).glob("*.safetensors")):
            self.real_clips = RealClips(real, frames)
            self.real_paths = self.real_clips.paths()
        elif real is not None:
            self.real = to_bytes(read_clip(real)[:, : real_frames or None])
            self.real_paths = [Path(real)]
            if self.real.shape[1] < frames:
                raise ValueError(f"{real}: wanted at least {frames} frames, got {self.real.shape[1]}")

    def __len__(self) -> int:
        return len(self.names)

    def paths(self) -> list[Path]:
        """Every file or folder that clips are read from, in the order of `names`; those of `real` last."""
        return [path for name in self.names for path in self._paths(name)] + self.real_paths

    def _paths(self, name: str) -> list[Path]:
        """Where one pair is: a file, or a video on each side."""
        if name.endswith(".safetensors"):
            return [self.folder / name]
        return [self.folder / side / name for side in ("ni", "gt")]

    def batch(self, draws: list[torch.Generator], real: float = 0.0,
              varied: float = 0.0) -> tuple[Tensor, Tensor, list[str]]:
        """A sample for each generator: x_ni, x_gt [n, 3, frames, h, w] in [-1, 1], names; a share of `real` ones, and a
        share `varied` in other tones, both sides of a pair alike (photometric.py)."""
        samples, names = zip(*(self._sample(generator, real, varied, moving=False) for generator in draws))
        x_ni, x_gt = map(torch.stack, zip(*samples))
        return x_ni, x_gt, list(names)

    def moving_batch(self, draws: list[torch.Generator], real: float = 0.0, varied: float = 0.0
                     ) -> tuple[Tensor, Tensor, Tensor, Tensor, list[str]]:
        """The same samples, and how the truth moves in them: x_ni, x_gt, flow [n, 2, frames - 1, h, w] in pixels (dx,
        dy) from each frame to the next, visible [n, 1, frames - 1, h, w], 1 where it is still seen there, names.

        Where a clip does not hold them, flow is nan and visible 0.
        """
        samples, names = zip(*(self._sample(generator, real, varied, moving=True) for generator in draws))
        x_ni, x_gt, flow, visible = map(torch.stack, zip(*samples))
        return x_ni, x_gt, flow, visible, list(names)

    def _sample(self, draws: torch.Generator, real: float, varied: float, moving: bool) -> tuple[list[Tensor], str]:
        """x_ni, x_gt and, moving, flow and visible; the clip's name."""
        (x, y, *motion), name = self._draw(draws, real, moving)
        if int(torch.randint(2, (), generator=draws)):
            x, y, *motion = (v.flip(-1) for v in (x, y, *motion))
            if moving:
                motion[0] = motion[0] * torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)  # what went right goes left
        if varied and torch.rand((), generator=draws) < varied:
            same = draws.get_state()
            x = vary(x, draws)
            draws.set_state(same)
            y = vary(y, draws)
        return [x, y, *motion], name

    def _draw(self, draws: torch.Generator, real: float, moving: bool) -> tuple[list[Tensor], str]:
        """A crop of a pair, or of the real clips."""
        def integer(high: int) -> int:
            return int(torch.randint(high, (), generator=draws))

        if self.real_paths and torch.rand((), generator=draws) < real:
            if self.real_clips is not None:
                x, name = self.real_clips.crop(self.size or (96, 144), draws)
            else:
                x, name = self._real_crop(draws), "the real video"
            return [x, x, *(unknown_motion(x) if moving else [])], name
        for _ in range(100):
            i = integer(len(self))
            try:
                return self._read(i, integer, moving), self.names[i]
            except ValueError as error:
                warnings.warn(f"left out, another is drawn: {error}")
        raise ValueError(f"{self.folder}: a hundred pairs in a row cannot be read")

    def read(self, i: int, integer) -> tuple[Tensor, Tensor]:
        """Pair number i: x_ni, x_gt [3, frames, h, w] in [-1, 1]. integer(n) draws one of 0 … n - 1, for where to cut.

        ValueError if the clip is broken.
        """
        x_ni, x_gt = self._read(i, integer, moving=False)
        return x_ni, x_gt

    def _read(self, i: int, integer, moving: bool) -> list[Tensor]:
        """`read`, and then, moving, flow and visible of the same piece."""
        name = self.names[i]
        try:
            if name.endswith(".safetensors"):
                return self._read_tensors(name, integer, moving)
            x_ni, x_gt = (read_clip(path) for path in self._paths(name))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.folder / name}: cannot be read: {error}") from None
        if x_ni.shape != x_gt.shape or x_ni.shape[1] < self.frames:
            raise ValueError(f"{name}: ni decodes to {list(x_ni.shape)}, gt to {list(x_gt.shape)}")
        t, h, w = self._cut(x_ni.shape, integer)
        found = [x_ni[:, t, h, w], x_gt[:, t, h, w]]
        return found + unknown_motion(found[0]) if moving else found

    def _read_tensors(self, name: str, integer, moving: bool) -> list[Tensor]:
        """`_read` for a pair in one file: only the crop is read."""
        with safe_open(self.folder / name, framework="pt") as file:
            t, h, w = self._cut(file.get_slice("x_ni").get_shape(), integer)
            found = [from_bytes(file.get_slice(key)[:, t, h, w]) for key in ("x_ni", "x_gt")]
            if not moving:
                return found
            if "flow" not in file.keys():
                return found + unknown_motion(found[0])
            steps = slice(t.start, t.stop - 1)  # from each of the frames to the next
            return found + [file.get_slice(key)[:, steps, h, w].float() for key in ("flow", "visible")]

    def crops(self, i: int) -> list[tuple[slice, slice] | None] | None:
        """metrics.actor_crops of the clip's first frames; None if its boxes are not known, or show no actor there.

        ValueError if a box is not finite, or the clip is broken.
        """
        clip = self.folder / self.names[i]
        if clip.suffix != ".safetensors":
            return None
        try:
            with safe_open(clip, framework="pt") as file:
                if "boxes" not in file.keys():
                    return None
                boxes = file.get_tensor("boxes")[: self.frames]
                H, W = file.get_slice("x_gt").get_shape()[2:]
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{clip}: cannot be read: {error}") from None
        if not boxes.isfinite().all():
            raise ValueError(f"{clip}: wanted boxes of finite numbers")
        crops = actor_crops(boxes, H, W)
        return crops if any(crops) else None

    def _usable(self, name: str) -> bool:
        """Whether both videos can be opened and fit; if not, left_out says why."""
        try:
            if irregular := [path for path in self._paths(name) if not (path.is_file() or path.is_dir())]:
                raise ValueError(f"{irregular[0]} is neither a file nor a folder")
            ni, gt = self._shapes(name)  # [T or None, H, W]
            least = [self.frames, *(self.size or (1, 1))]
            if any(None not in (a, b) and a != b for a, b in zip(ni, gt)):
                raise ValueError(f"ni is {ni} (frames, height, width), gt {gt}")
            if any(n is not None and n < m for n, m in zip(ni, least)):
                raise ValueError(f"wanted at least {least} (frames, height, width), got {ni}")
            return True
        except (OSError, SafetensorError, ValueError) as error:
            self.left_out.append(f"{name}: {error}")
            return False

    def _shapes(self, name: str) -> list[list[int | None]]:
        """Frames (None: the file does not tell), height and width of both videos."""
        if name.endswith(".safetensors"):
            with safe_open(self.folder / name, framework="pt") as file:
                both = [file.get_slice(key) for key in ("x_ni", "x_gt")]
                for x in both:
                    if x.get_dtype() != "U8" or len(x.get_shape()) != 4 or x.get_shape()[0] != 3:
                        raise ValueError(f"wanted uint8 [3, T, H, W], got {x.get_dtype()} {x.get_shape()}")
                if "boxes" in file.keys():
                    boxes, T = file.get_slice("boxes"), both[0].get_shape()[1]
                    if boxes.get_dtype() not in NUMBERS or boxes.get_shape() != [T, 4]:
                        raise ValueError(f"wanted boxes [{T}, 4], got {boxes.get_dtype()} {boxes.get_shape()}")
                T, H, W = both[1].get_shape()[1:]
                if "flow" in file.keys():
                    for key, C in (("flow", 2), ("visible", 1)):
                        given = file.get_slice(key).get_shape() if key in file.keys() else "none"
                        if given != [C, T - 1, H, W]:
                            raise ValueError(f"wanted {key} {[C, T - 1, H, W]}, got {given}")
                return [x.get_shape()[1:] for x in both]
        shapes = []
        for side in ("ni", "gt"):
            with Video(self.folder / side / name) as video:
                shapes.append([video.count, video.format.height, video.format.width])
        return shapes

    def _cut(self, shape, integer) -> tuple[slice, slice, slice]:
        """Frames, rows and columns of a random piece of a clip [3, T, H, W]."""
        C, T, H, W = shape
        h, w = self.size or (H, W)
        t, y, x = (integer(n + 1) for n in (T - self.frames, H - h, W - w))
        return slice(t, t + self.frames), slice(y, y + h), slice(x, x + w)

    def _real_crop(self, draws: torch.Generator) -> Tensor:
        """A crop [3, frames, h, w] of the real video at a random scale, so that its detail spans that of toy scenes.

        Some are whole frames, because norms treat a whole frame otherwise than a piece.
        """
        size = self.size or (96, 144)
        t, y, x = random_piece(self.real.shape[1:], (self.frames, *size), 0.8, draws)
        return resize(from_bytes(self.real[:, t, y, x]), size)


def unknown_motion(x: Tensor) -> list[Tensor]:
    """Flow and visible of a clip [3, T, H, W] whose motion is not known: nan and 0."""
    C, T, H, W = x.shape
    return [torch.full((2, T - 1, H, W), torch.nan), torch.zeros(1, T - 1, H, W)]


if __name__ == "__main__":
    import tempfile

    from ..training.run import draws
    from .toy_world import WorldConfig, make_clip, save_clip

    with tempfile.TemporaryDirectory() as folder:
        for seed in range(2):
            save_clip(make_clip(seed, WorldConfig(frames=3)), f"{folder}/{seed}.safetensors")
        Path(folder, "broken.safetensors").write_bytes(b"no clip")
        pairs = Pairs(folder, frames=2, size=(64, 96))
        print("left out:", pairs.left_out)
        for k in (0, 1, 0):  # clip k of step 5
            x_ni, x_gt, names = pairs.batch([draws(seed=0, step=5, k=k)])
            differ = ((x_ni - x_gt).abs() > 2 / 255).float().mean()
            print(f"k {k}: {names[0]}, {list(x_ni.shape)}, mean {x_gt.mean():+.4f}; they differ by more than "
                  f"1/255 in {differ:.0%} of the values")
