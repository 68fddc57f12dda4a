"""Tiles: a frame that is too large for memory, cut into pieces of latent cells that are processed one by one.

A tile owns its cells, and sees `margin` more on every side, because convolutions look beyond its border:

    for rows, columns in cut(h, w, tiles=(2, 2), margin=8):     # h x w latent cells
        rows.seen, rows.own                                      # slices: with the margin, and without

A training step decodes all cells that a tile sees, and takes the loss only of the pixels that it owns
(`without_margin`). A stream keeps the margins too and blends tiles where they overlap (`assemble`), so that no edge
shows. No VAE tiles exactly: Wan's attention and CogVideoX's GroupNorm look at whole frames (measured:
docs/streaming.md, docs/chopgrad).

    python -m mirage_min.method.tiles                            # a cut, and the weights of a blend
"""

from collections.abc import Iterable
from itertools import pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor


class Side(NamedTuple):
    """The rows of a tile, or its columns, counted in latent cells of the whole frame."""

    seen: slice  # with the margin
    own: slice   # without


Tile = tuple[Side, Side]  # rows, columns


def cut(h: int, w: int, tiles: tuple[int, int], margin: int) -> list[Tile]:
    """A frame of h x w latent cells -> its tiles, row by row.

    tiles   rows and columns of tiles; need not divide h and w
    margin  cells on each side of a tile that it sees in addition to those it owns
    ValueError if there are more tiles than cells, or the margin is negative.
    """
    if not (1 <= tiles[0] <= h and 1 <= tiles[1] <= w and margin >= 0):
        raise ValueError(f"want tiles in 1..{h} x 1..{w} and a margin of 0 or more, got {tiles} and {margin}")
    return list(product(cut_side(h, tiles[0], margin), cut_side(w, tiles[1], margin)))


def cut_side(n: int, pieces: int, margin: int) -> list[Side]:
    """Cut n cells into pieces that begin at n·k // pieces -> a Side for each; margins do not leave 0 to n."""
    edges = [n * k // pieces for k in range(pieces + 1)]
    return [Side(slice(max(a - margin, 0), min(b + margin, n)), slice(a, b)) for a, b in pairwise(edges)]


def scale(cells: slice, s: int, origin: int = 0) -> slice:
    """A slice of cells -> the slice of their pixels, s to a cell, counted from the first pixel of cell `origin`."""
    return slice((cells.start - origin) * s, (cells.stop - origin) * s)


def select(x: Tensor, tile: Tile, s: int) -> Tensor:
    """The part of a frame x [..., h·s, w·s] that a tile sees: a view [..., height·s, width·s]; s pixels to a cell."""
    rows, columns = (scale(side.seen, s) for side in tile)
    return x[..., rows, columns]


def without_margin(x: Tensor, t: int, tile: Tile) -> tuple[Tensor, tuple[slice, ...]]:
    """The pixels of a decoded tile that it owns, and where in the video they lie.

    x [B, C, T, height·s, width·s] begins at frame t of the video, for any number s of pixels to a cell
    -> (a view of x, the five slices that cut the same pixels from the video).
    """
    s = pixels_to_a_cell(x, tile)
    rows, columns = (scale(side.own, s, origin=side.seen.start) for side in tile)
    in_video = slice(None), slice(None), slice(t, t + x.shape[2]), *(scale(side.own, s) for side in tile)
    return x[..., rows, columns], in_video


def pixels_to_a_cell(x: Tensor, tile: Tile) -> int:
    """How many pixels a cell has along a side of x [..., height·s, width·s]: s, 8 for frames and 1 for latents."""
    return x.shape[-1] // (tile[1].seen.stop - tile[1].seen.start)


def assemble(tiles: Iterable[tuple[Tile, Tensor]], h: int, w: int) -> Tensor:
    """Tiles with their margins -> the frame, blended where tiles overlap.

    tiles  pairs (tile, y [B, C, T, height·s, width·s]), all of one `cut`; a generator keeps one of them in memory
    h, w   latent cells of the frame -> [B, C, T, h·s, w·s] in y's dtype

    Two neighbours' weights rise and fall linearly over their whole overlap, 2·margin cells, and sum to one.
    """
    total = weight = None
    for tile, y in tiles:
        if tile == cut(h, w, (1, 1), 0)[0]:
            return y  # the only one
        s = pixels_to_a_cell(y, tile)
        if total is None:
            total = y.new_zeros(*y.shape[:3], h * s, w * s, dtype=torch.promote_types(y.dtype, torch.float32))
            weight = torch.zeros_like(total[0, 0, 0])
        rows, columns = tile
        rise = torch.outer(ramp(rows, h, s).to(total), ramp(columns, w, s).to(total))
        select(total, tile, s).add_(y * rise)
        select(weight, tile, s).add_(rise)
    return (total / weight).to(y.dtype)


def ramp(side: Side, n: int, s: int) -> Tensor:
    """Weights of the pixels that one side of a tile sees, [size·s]: their distance to the nearest end with a neighbour.

    n  cells of the whole frame along this side, which show whether there is a neighbour; s pixels to a cell
    """
    size = (side.seen.stop - side.seen.start) * s
    from_the_start = torch.arange(1, size + 1)
    weights = torch.full_like(from_the_start, size)
    if side.own.start > 0:
        weights = torch.minimum(weights, from_the_start)
    if side.own.stop < n:
        weights = torch.minimum(weights, from_the_start.flip(0))
    return weights


if __name__ == "__main__":
    for rows, columns in cut(7, 10, tiles=(2, 2), margin=1):
        print(f"7 x 10 cells: rows {rows.own.start} to {rows.own.stop}, columns {columns.own.start} to "
              f"{columns.own.stop} are its own; it sees rows {rows.seen.start} to {rows.seen.stop}, columns "
              f"{columns.seen.start} to {columns.seen.stop}")
    pair = cut(1, 8, tiles=(1, 2), margin=2)
    answers = torch.zeros(1, 1, 1, 1, 6), torch.ones(1, 1, 1, 1, 6)
    blended = assemble(zip(pair, answers), 1, 8).flatten()
    print(f"a tile of zeros and one of ones, blended: {[round(x, 2) for x in blended.tolist()]}")
