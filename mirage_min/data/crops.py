"""Crops to train autoencoders on: of toy pairs and real clips, at mixed sizes, each clip in one photometric variation.

Norms take their statistics from the crop, so a network that has seen one size shifts the tones of the others; one that
has seen the tones of one drive shifts the others' (photometric.py). A crop depends on its generator alone.

    python -m mirage_min.data.crops
"""

import torch
from torch import Generator, Tensor

from .pairs import Pairs
from .photometric import vary
from .real_clips import RealClips

Size = tuple[int, int, int]  # frames, height, width


class Crops:
    """crop(size, generator) -> [3, T, h, w] in [-1, 1]. sizes: "9x64x64 1x192x320", frames x height x width each."""

    def __init__(self, pairs: Pairs, real: RealClips | None, share: float, sizes: str):
        """share: that of real clips among crops that fit into the toy clips; larger ones are all real.

        ValueError for sizes that cannot be read, or that fit into no clip.
        """
        self.pairs, self.real, self.share = pairs, real, share
        self.toy = pairs.read(0, lambda n: 0)[0].shape[1:]
        try:
            self.sizes: list[Size] = [(int(T), int(h), int(w)) for T, h, w in (s.split("x") for s in sizes.split())]
        except ValueError:
            self.sizes = []
        if not self.sizes or min(map(min, self.sizes)) < 1:
            raise ValueError(f"sizes: wanted frames x height x width, as in 9x64x64 1x192x320, got {sizes!r}")
        for size in self.sizes:
            if real is None and any(n > m for n, m in zip(size, self.toy)):
                raise ValueError(f"sizes: wanted crops of at most {'x'.join(map(str, self.toy))}, as there are no real "
                                 f"clips, got {'x'.join(map(str, size))}")

    def draw_size(self, draws: Generator) -> Size:
        """One of the sizes, each equally often."""
        return self.sizes[int(torch.randint(len(self.sizes), (), generator=draws))]

    def count(self, size: Size, batch: int) -> int:
        """How many crops of this size make a batch: as many pixels as `batch` crops of the first size, but two at
        least. PyTorch's CPU chooses a convolution that is many times slower for one small clip."""
        first = self.sizes[0]
        return max(2, round(batch * first[0] * first[1] * first[2] / (size[0] * size[1] * size[2])))

    def crop(self, size: Size, draws: Generator) -> tuple[Tensor, str]:
        """One crop [3, T, h, w], and the name of its clip."""
        T, h, w = size
        _, H, W = self.toy
        if self.real and (h > H or w > W or torch.rand((), generator=draws) < self.share):
            x, name = self.real.crop((h, w), draws, T)
        else:
            i, side, t = (int(torch.randint(n, (), generator=draws)) for n in (len(self.pairs), 2, 10**6))
            x = self.pairs.read(i, lambda n: 0)[side]                  # the naive insertion, or the truth
            t %= x.shape[1] - T + 1
            top, left = (int(torch.randint(n + 1, (), generator=draws)) for n in (x.shape[2] - h, x.shape[3] - w))
            x, name = x[:, t : t + T, top : top + h, left : left + w], self.pairs.names[i]
        return vary(x, draws), name


if __name__ == "__main__":
    import tempfile

    from .toy_world import WorldConfig, make_clip, save_clip

    with tempfile.TemporaryDirectory() as folder:
        for seed in range(2):
            save_clip(make_clip(seed, WorldConfig(frames=3)), f"{folder}/{seed}.safetensors")
        crops = Crops(Pairs(folder, frames=3), None, 0.0, "3x32x32 1x96x144")
        for step in range(4):
            draws = torch.Generator().manual_seed(step)
            size = crops.draw_size(draws)
            x, name = crops.crop(size, draws)
            print(f"step {step}: {crops.count(size, batch=4)} crops of {list(x.shape)}; one of {name}, its means "
                  f"{[round(v, 2) for v in x.mean(dim=(1, 2, 3)).tolist()]}")
