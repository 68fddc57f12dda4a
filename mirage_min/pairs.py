"""Reading NI–GT pairs: clips of a naive insertion and of the truth, cropped and flipped alike (Mirage §3.3).

A folder of pairs holds `ni/NAME` and `gt/NAME` videos (mp4 or image folders) of equal names, or clips as toy_world and
build_pairs write them, `NAME.safetensors` with x_ni and x_gt as uint8 [3, T, H, W]. Which clips, crops and flips make a
batch is a function of one generator alone, so that a run can be repeated and resumed.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .video import read_clip


class Pairs:
    """The pairs of a folder, and beside them `real` videos that are their own truth (nothing was inserted)."""

    def __init__(self, folder: str | Path, real: str | Path | None = None, real_frames: int | None = None):
        """`real_frames`: use only so many frames of the real video, from its start."""
        folder = Path(folder)
        self.clips: list[Path | tuple[Path, Path]] = sorted(folder.glob("*.safetensors"))
        ni = {p.name for p in (folder / "ni").glob("*")} if (folder / "ni").is_dir() else set()
        gt = {p.name for p in (folder / "gt").glob("*")} if (folder / "gt").is_dir() else set()
        self.clips += [(folder / "ni" / name, folder / "gt" / name) for name in sorted(ni & gt)]
        self.left_out = [f"{name}: only in {'ni' if name in ni else 'gt'}" for name in sorted(ni ^ gt)]
        if not self.clips:
            raise ValueError(f"{folder}: no *.safetensors clips and no ni/ and gt/ videos of equal names")
        self.real = None if real is None else _uint8(read_clip(real)[:, :real_frames])      # [3, T, H, W]

    def __len__(self) -> int:
        return len(self.clips)

    def batch(self, draws: torch.Generator, n: int, frames: int, size: tuple[int, int] | None = None,
              real: float = 0.0) -> tuple[Tensor, Tensor]:
        """n random pairs -> x_ni, x_gt [n, 3, frames, h, w] in [-1, 1]; a share of `real` ones; size None: no crop."""
        def integer(high: int) -> int:
            return int(torch.randint(high, (), generator=draws))

        ni, gt = [], []
        for _ in range(n):
            if self.real is not None and torch.rand((), generator=draws) < real:
                x = y = self._real_crop(draws, frames, size)
            else:
                x, y = self.read(integer(len(self)), integer, frames, size)
            if integer(2):
                x, y = x.flip(-1), y.flip(-1)
            ni.append(x), gt.append(y)
        return torch.stack(ni), torch.stack(gt)

    def read(self, i: int, integer, frames: int, size: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
        """One pair, each [3, frames, h, w] in [-1, 1]; `integer(n)` draws where to cut. A broken clip: ValueError."""
        clip = self.clips[i]
        try:
            if isinstance(clip, tuple):
                x, y = (_uint8(read_clip(path)) for path in clip)
                return _both(x, y, *_cut(x.shape, integer, frames, size, clip[0]))
            with safe_open(clip, framework="pt") as file:  # reads only what the crop needs
                x, y = file.get_slice("x_ni"), file.get_slice("x_gt")
                return _both(x, y, *_cut(x.get_shape(), integer, frames, size, clip))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{clip}: cannot be read: {error}") from None

    def _real_crop(self, draws: torch.Generator, frames: int, size: tuple[int, int] | None) -> Tensor:
        """A crop of the real video at a random smaller scale, so that its detail spans that of the toy scenes."""
        T, H, W = self.real.shape[1:]
        h, w = size or (96, 144)
        low = max(h / H, w / W)
        scale = low + (0.8 - low) * float(torch.rand((), generator=draws))
        ch, cw = min(H, round(h / scale)), min(W, round(w / scale))
        t, y, x = (int(torch.randint(n, (), generator=draws)) for n in (T - frames + 1, H - ch + 1, W - cw + 1))
        crop = _float(self.real[:, t : t + frames, y : y + ch, x : x + cw]).transpose(0, 1)
        return F.interpolate(crop, size=(h, w), mode="bilinear", antialias=True).transpose(0, 1)


def _cut(shape, integer, frames: int, size: tuple[int, int] | None, name) -> tuple[slice, slice, slice]:
    """Where to cut a random piece out of [3, T, H, W]."""
    C, T, H, W = shape
    h, w = size or (H, W)
    if T < frames or H < h or W < w:
        raise ValueError(f"{name}: wanted at least {frames} frames of {h}x{w}, got {T} of {H}x{W}")
    t, y, x = (integer(n + 1) for n in (T - frames, H - h, W - w))
    return slice(t, t + frames), slice(y, y + h), slice(x, x + w)


def _both(x, y, t: slice, h: slice, w: slice) -> tuple[Tensor, Tensor]:
    return _float(x[:, t, h, w]), _float(y[:, t, h, w])


def _float(x: Tensor) -> Tensor:
    return x.float() / 127.5 - 1


def _uint8(x: Tensor) -> Tensor:
    return ((x + 1) * 127.5).round().to(torch.uint8)
