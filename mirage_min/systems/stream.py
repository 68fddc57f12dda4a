"""A video of any length through a system, in memory that does not depend on the length.

    stream_windows     a VAE takes groups of frames, a transformer overlapping windows of latents   Mirage.stream
    stream_images      every frame by itself, a few at once                                         R3D2.stream
    alike, finished    the checks of every stream, on the way in and on the way out                  Harmonizer.stream

Each takes frames [3, H, W] in [-1, 1] one after another and yields as many, clamped, float32, on the CPU. Its state is
in local variables, not on the system, so two streams of one system may be read in turn.

    python -m mirage_min.systems.stream          # which latents each window sees, and what it weighs
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice, repeat
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..method.tiles import Tile, assemble, cut, select
from ..networks.causal_conv import Cache

CELL = 8     # pixels of a latent cell, along each side
LEAST = 16   # pixels along the shorter side of a frame: a transformer's patch is 2 x 2 cells


# ---- the checks of every stream --------------------------------------------------------------------------------------

def alike(frames: Iterable[Tensor], least: int = LEAST) -> Iterator[Tensor]:
    """Frames as they are; ValueError naming the first that is not [3, H, W], is too small, or is unlike frame 0."""
    first = None
    for number, frame in enumerate(frames):
        if frame.ndim != 3 or frame.shape[0] != 3 or min(frame.shape[1:]) < least:
            raise ValueError(f"frame {number}: wanted [3, H, W], H and W at least {least}, got {list(frame.shape)}")
        if first is None:
            first = frame.shape
        if frame.shape != first:
            raise ValueError(f"frame {number}: wanted {list(first)} as the frames before it, got {list(frame.shape)}")
        yield frame


def finished(x: Tensor, number: int) -> Iterator[Tensor]:
    """A system's results from frame `number` on, [N, 3, H, W] -> one frame [3, H, W] after another, for the stream.

    ValueError naming the first frame with NaN or inf, which would otherwise be written as black or white.
    """
    for frame in x:
        if not frame.isfinite().all():
            hint = ": float16 ends at 65504, take bfloat16 or float32" if x.dtype == torch.float16 else ""
            raise ValueError(f"frame {number} (counted from 0): the model's result is not finite (NaN or inf){hint}")
        yield frame.clamp(-1, 1).float().cpu()
        number += 1


# ---- every frame by itself -------------------------------------------------------------------------------------------

@torch.no_grad()
def stream_images(frames: Iterable[Tensor], harmonise: Callable[[Tensor], Tensor], batch: int, like: Tensor
                  ) -> Iterator[Tensor]:
    """A stream of frames of any size, each processed without the others.

    harmonise  x [N, 3, H, W] in [-1, 1], N <= batch -> like x
    like       a tensor of the dtype that harmonise takes, on its device: one of the system's parameters
    ValueError if batch is below 1, and for frames that `alike` and `finished` refuse.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    frames, number = alike(frames, least=1), 0
    while images := list(islice(frames, batch)):
        x = torch.stack(images).to(like.device, like.dtype)
        yield from finished(harmonise(x), number)
        number += len(images)


# ---- groups of frames, windows of latents ----------------------------------------------------------------------------

@torch.no_grad()
def stream_windows(frames: Iterable[Tensor], mirage: nn.Module, window: int, tiles: int = 1, margin: int = 8,
                   change_only: bool = False) -> Iterator[Tensor]:
    """Mirage.forward piece by piece, on frames [3, H, W] in [-1, 1]: the VAE's caches are carried from first to last.

    window  latents that the transformer sees at once; two windows share about a quarter, and are blended there
    tiles   rows and columns into which frames are cut for the VAEs where memory is short; the transformer sees all
    margin  latent cells around each tile that it sees besides its own
    change_only    as in Mirage.forward
    ValueError for a window or tiles that do not fit.
    """
    windows = Windows(mirage.denoise, window, mirage.temporal_patch)
    waiting: deque[tuple[Group, Tensor]] = deque()  # encoded groups, each with its z_NI
    z_dr: Tensor | None = None                      # their denoised latents, as far as they are final
    plan, encoding, decoding = [], [], []           # the tiles of a frame, and two caches for each
    done = 0                                        # frames

    for group in groups(frames, mirage):
        h, w = (n // CELL for n in group.x.shape[-2:])
        if not plan:
            plan = cut(h, w, (tiles, tiles), margin)
            encoding, decoding = [None] * len(plan), [None] * len(plan)
        z_ni = assemble(encode_tiles(mirage, group.x, plan, encoding), h, w)
        waiting.append((group, z_ni))
        final = windows.push(z_ni, group.last)
        z_dr = final if z_dr is None else torch.cat([z_dr, final], dim=2)
        while waiting and z_dr.shape[2] >= waiting[0][1].shape[2]:
            ready, z_ni = waiting.popleft()
            latents = z_ni.shape[2]
            z = torch.cat([z_dr[:, :, :latents], z_ni]) if change_only else z_dr[:, :, :latents]
            x_dr = assemble(decode_tiles(mirage, z, ready.x, plan, decoding), h, w)
            if change_only:
                x_dr = ready.x + x_dr[:1] - x_dr[1:]
            z_dr = z_dr[:, :, latents:]
            yield from finished(x_dr[0, :, : ready.frames, : ready.H, : ready.W].transpose(0, 1), done)
            done += ready.frames


class Group(NamedTuple):
    """Frames that the VAE takes at once."""

    x: Tensor    # [1, 3, T, H', W'], padded
    frames: int  # how many of its T are the video's
    H: int
    W: int
    last: bool


def groups(frames: Iterable[Tensor], mirage: nn.Module) -> Iterator[Group]:
    """Frames [3, H, W] -> the groups in which the VAE takes them, read one frame ahead to know which is the last."""
    vae, like = mirage.vae, next(mirage.vae.parameters())
    # The first group differs in length, the others are alike. 18 frames are two groups of CogVideoX, and more of Wan.
    first, later = (g.stop - g.start for g in vae.encode_groups(vae.legal_length(18))[:2])
    frames = alike(frames)
    ahead = next(frames, None)
    for length in chain([first], repeat(later)):
        if ahead is None:
            return
        held = [ahead, *islice(frames, length - 1)]
        ahead = next(frames, None)
        x = torch.stack(held, dim=1)[None].to(like.device, like.dtype)             # [1, 3, T, H, W]
        T = vae.legal_length(len(held)) if length == first else later
        yield Group(mirage.pad(x, T), len(held), *x.shape[-2:], last=ahead is None)


def encode_tiles(mirage: nn.Module, x: Tensor, plan: list[Tile], caches: list[Cache | None]
                 ) -> Iterator[tuple[Tile, Tensor]]:
    """x [1, 3, T, H, W] -> (tile, its z_NI) for each tile, seen with its margin; its cache is replaced."""
    for i, tile in enumerate(plan):
        z, caches[i] = mirage.vae.encode_group(select(x, tile, CELL), caches[i])
        yield tile, z


def decode_tiles(mirage: nn.Module, z: Tensor, x: Tensor, plan: list[Tile], caches: list[Cache | None]
                 ) -> Iterator[tuple[Tile, Tensor]]:
    """Latents [B, C, F, h, w] and x_NI [1, 3, T, H, W], whose features all of them get -> (tile, its frames) for each
    tile; its cache is replaced."""
    for i, tile in enumerate(plan):
        mids = mirage.mids(select(x, tile, CELL))
        mids = mids and [m.expand(len(z), -1, -1, -1, -1) for m in mids]
        y, caches[i] = mirage.vae.decode_group(select(z, tile, 1), caches[i], inject=mids)
        yield tile, y


class Windows:
    """Latents in, denoised latents out as soon as they are final: overlapping windows, blended where they meet.

    The first window has an odd number of latents where a temporal patch is 2: the transformer doubles its first latent,
    as in every clip. Each later window has one less, so that it begins and ends with a whole patch.
    """

    def __init__(self, denoise: Callable[[Tensor], Tensor], window: int, patch: int):
        """denoise: z [B, C, F, h, w] -> like z; window: the most F it is given; patch: latents to a temporal patch."""
        self.denoise, self.overlap = denoise, overlap(window, patch)
        self.length, self.later = window, window - (patch - 1)
        self.z: Tensor | None = None     # noisy latents from the start of the next window on
        self.tail: Tensor | None = None  # what the last window made of those that the next one sees too

    def push(self, z: Tensor, last: bool = False) -> Tensor:
        """The next latents [B, C, F, h, w] -> [B, C, F', h, w], F' >= 0, those that are final now: with `last` all."""
        self.z = z if self.z is None else torch.cat([self.z, z], dim=2)
        final = [z[:, :, :0]]
        while self.z.shape[2] >= self.length:
            z_dr = blend(self.tail, self.denoise(self.z[:, :, : self.length]))
            keep = self.length - self.overlap
            final.append(z_dr[:, :, :keep])
            self.z, self.tail = self.z[:, :, keep:], z_dr[:, :, keep:]
            self.length = self.later
        if last and self.tail is not None and self.z.shape[2] == self.overlap:
            final.append(self.tail)
        elif last:
            final.append(blend(self.tail, self.denoise(self.z)))
        return torch.cat(final, dim=2)


def overlap(window: int, patch: int) -> int:
    """Latents that two windows share, about a quarter, in whole temporal patches; ValueError if a window is too short,
    or even where a patch is 2."""
    if window < 2 * patch + 1 or (patch == 2 and window % 2 == 0):
        raise ValueError(f"window must be {'odd and ' if patch == 2 else ''}at least {2 * patch + 1}, got {window}")
    return patch * max(1, window // (4 * patch))


def blend(tail: Tensor | None, z: Tensor) -> Tensor:
    """A window's latents z [B, C, F, h, w], the first n mixed with `tail`, the last n of the window before (or None).

    The weights of z rise linearly, k / (n + 1) for k = 1 to n; the tail's are 1 minus these.
    """
    if tail is None:
        return z
    n = tail.shape[2]
    rise = torch.arange(1, n + 1, device=z.device, dtype=z.dtype).view(1, 1, n, 1, 1) / (n + 1)
    return torch.cat([torch.lerp(tail, z[:, :, :n], rise), z[:, :, n:]], dim=2)


if __name__ == "__main__":
    for patch, window, length in ((1, 9, 25), (2, 9, 25)):
        print(f"{length} latents in windows of {window}, {patch} to a temporal patch:")
        seen = []

        def denoise(z: Tensor) -> Tensor:
            """Records what it sees; its answer is 1 in one channel, another at each call, so that weights come out."""
            seen.append(z[0, -1, :, 0, 0].int().tolist())
            answer = torch.zeros_like(z)
            answer[:, len(seen) - 1] = 1
            return answer

        z = torch.arange(float(length)).view(1, 1, -1, 1, 1).expand(1, 20, -1, 1, 1)
        weights = Windows(denoise, window, patch).push(z, last=True)[0, :, :, 0, 0]
        for latents, row in zip(seen, weights):
            shown = " ".join(f"{v:.2f}".rstrip("0").rstrip(".") for v in row[latents[0] : latents[-1] + 1].tolist())
            print(f"  sees latents {latents[0]:2d} to {latents[-1]:2d}, weights {shown}")
