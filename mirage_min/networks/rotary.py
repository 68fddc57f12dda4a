"""A patch's position and a timestep as angles, for every transformer here (RoPE: Su et al. 2021, §3.4.2, Eq. 34).

    turn = torch.cat(on_grid(angles(frames, d_t), angles(rows, d_y), angles(columns, d_x)), dim=-1)
    q, k = rotate(q, unit(turn)), rotate(k, unit(turn))

A pair of a head's channels, read as a complex number, is turned by an angle that grows with the patch's position: the
product of a query and a key then depends on how far apart the two are, not on where they are. Each transformer has its
own `rotary_table`, which says how it divides the channels among frame, row and column and how fast they turn.

    python -m mirage_min.networks.rotary     # a product of two rotated vectors, at three places of the same distance
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from einops import rearrange, repeat
from torch import Tensor


def angles(positions: Tensor, dim: int) -> Tensor:
    """positions [...] -> [..., dim/2]: position · 10000^(-2i/dim), in the positions' own dtype.

    Rounded as published: at t = 999 another order of the same float32 operations is 6e-5 off.
    """
    i = torch.arange(dim // 2, dtype=positions.dtype, device=positions.device)
    return positions[..., None] * torch.exp(-math.log(10000) * i / (dim // 2))


def on_grid(frames: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features of latents [f, d_t], rows [h, d_y] and columns [w, d_x] -> those of each patch, [f*h*w, d_t], …"""
    f, h, w = len(frames), len(rows), len(columns)
    return (repeat(frames, "f d -> (f h w) d", h=h, w=w),
            repeat(rows, "h d -> (f h w) d", f=f, w=w),
            repeat(columns, "w d -> (f h w) d", f=f, h=h))


def unit(turn: Tensor) -> Tensor:
    """Angles [...] in radians -> the unit complex numbers exp(jθ) [...]."""
    return torch.polar(torch.ones_like(turn), turn)


def rotate(x: Tensor, rotation: Tensor, halves: bool = False) -> Tensor:
    """Turn the channel pairs of queries or keys, at least in float32; returns x's dtype.

    x         [B, L, heads, d]
    rotation  [L, d/2], complex, of magnitude 1
    halves    whether channel i makes a pair with i + d/2 (Cosmos), or channel 2i with 2i + 1 (CogVideoX, Wan)
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    flat = "... (two i)" if halves else "... (i two)"
    pairs = rearrange(wide, f"{flat} -> ... i two", two=2)
    # (a + jb) · exp(jθ)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * rotation[:, None])
    return rearrange(turned, f"... i two -> {flat}").to(x.dtype)


def cached_table(size: int) -> Callable[[Callable], Callable]:
    """A decorator for a function that computes a table: the last `size` tables are cached.

    Without the guards, a table first computed under inference_mode would be cached and fail in every later training.
    """
    def decorate(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lru_cache(maxsize=size)(torch.inference_mode(False)(torch.no_grad()(make)))
    return decorate


if __name__ == "__main__":
    torch.manual_seed(0)
    turn = unit(angles(torch.arange(100.0), 16))
    q, k = torch.randn(2, 1, 1, 1, 16)
    for i, j in ((0, 3), (50, 53), (96, 99), (0, 90)):
        product = (rotate(q, turn[i : i + 1]) * rotate(k, turn[j : j + 1])).sum()
        print(f"query at {i:2}, key at {j:2}: product {product:.4f}")
