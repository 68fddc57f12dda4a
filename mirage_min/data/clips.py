"""A clip in NAME.safetensors as video: its x_ni, uint8 [3, T, H, W], as toy_world.py and build_pairs.py write pairs.

    python -m mirage_min.data.clips           # a clip written and read
"""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from ..networks.weights import load_tensors, save_tensors
from .colour import BT709, UNKNOWN


class Clip:
    """The frames of one tensor of a clip, `fps` of them a second."""

    aspect, matrix, primaries, transfer = Fraction(1), BT709, UNKNOWN, UNKNOWN

    def __init__(self, path: Path, fps: Fraction, key: str = "x_ni"):
        """ValueError if the file has no such video."""
        self.x, self.notes = load_tensors(path)[0].get(key), []
        if self.x is None or self.x.dtype != torch.uint8 or self.x.ndim != 4 or self.x.shape[0] != 3:
            found = "none" if self.x is None else f"{self.x.dtype} {list(self.x.shape)}"
            raise ValueError(f"{path}: wanted {key}, uint8 [3, T, H, W], got {found}")
        self.count, self.rate, self.time_base = self.x.shape[1], fps, 1 / fps

    def frames(self) -> Iterator[tuple[np.ndarray, int, int]]:
        """(pixels uint8 [H, W, 3], its time and its duration in ticks) of each frame."""
        for t in range(self.count):
            yield self.x[:, t].permute(1, 2, 0).contiguous().numpy(), t, 1

    def name(self, number: int) -> str:
        """A frame's name in errors."""
        return f"frame {number} (counted from 0)"

    def close(self) -> None:
        """Nothing is open."""


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clip.safetensors")
        levels = torch.tensor([0, 100, 200], dtype=torch.uint8)
        save_tensors(path, {"x_ni": levels.view(1, 3, 1, 1).expand(3, 3, 16, 16)})
        print([int(pixels.mean()) for pixels, _, _ in Clip(path, Fraction(25)).frames()])
