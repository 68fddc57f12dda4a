"""A norm, its SiLU and the causal convolution after them, by bands of rows: the same numbers in less memory.

    normed_conv(norm_of(norm, x), conv, x, old, new)       # conv(silu(norm(x)), old, new), without gradients

At full resolution norm(x) and its copy after the cached frames are the largest tensors of a VAE. Each band of rows is
normalised with the statistics of all of x and comes with the rows around it that the kernel sees, so the result is the
same. `frugal.py` puts this into the VAEs; their own files hold the plain form, which is the reference.

    python -m mirage_min.networks.bands          # both ways on one tensor: how far apart they are
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as nnf

from .causal_conv import Cache, CausalConv3d
from .onednn import SMALL
from .vae_cogvideox import SpatialNorm

ROWS = 32  # of the smallest band: smaller is slower, larger takes more memory

RowNorm = Callable[[Tensor, slice], Tensor]  # (x[:, :, :, rows], rows) -> these rows normalised, in new storage


class TakenCache(dict):
    """A cache inside the group that took it over: reading an entry removes it, and the reader may reuse its storage."""

    __getitem__ = dict.pop

    def __bool__(self) -> bool:
        """True when everything has been read, too: an empty one is still a video's past, not its start."""
        return True


def is_tall(x: Tensor) -> bool:
    """Whether x [..., H, W] has enough rows, more than ROWS, to be worked on in pieces."""
    return x.shape[-2] > ROWS


def normed_conv(norm: RowNorm, conv: CausalConv3d, x: Tensor, old: Cache | None, new: Cache, *,
                onto: Tensor | None = None) -> Tensor:
    """conv(silu(norm(x)), old, new), or `onto` plus that: x [B, C, T, H, W] -> [B, C', T, H, W], without gradients.

    norm  from norm_of(…, x)
    old   the cache that the convolution reads, None at a video's start; `new` gets its entry
    onto  [B, C', T, H, W]; if x is tall, the sum is made in it

    If x is tall and `old` is a TakenCache, the new entry takes the old one's storage. The convolution's stride must be
    1, its kernel longer than one frame, and a band higher than the rows that the kernel sees around it.
    """
    H, halo = x.shape[3], conv.kernel_size[1] // 2
    borders = cut_bands(x, conv)
    if len(borders) == 2:
        y = conv(nnf.silu(norm(x, slice(0, H)), inplace=True), old, new)
        return y if onto is None else onto + y
    past = old[conv.key] if old else None
    tail = past if isinstance(old, TakenCache) else None
    out, waiting = onto, None
    for a, b in pairwise(borders):
        seen = slice(max(a - halo, 0), min(b + halo, H))
        own = slice(a - seen.start, b - seen.start)
        band_old = None if past is None else {conv.key: past[:, :, :, seen]}
        band_new: Cache = {}
        y = conv(nnf.silu(norm(x[:, :, :, seen], seen), inplace=True), band_old, band_new)[:, :, :, own]
        band_tail = band_new[conv.key][:, :, :, own]
        if out is None:
            out = empty_like_rows(y, H).zero_()
        if tail is None:
            tail = empty_like_rows(band_tail, H)
        out[:, :, :, a:b] += y
        if waiting is not None:
            tail[:, :, :, a - halo : a] = waiting
        tail[:, :, :, a : b - halo] = band_tail[:, :, :, : b - a - halo]
        waiting = band_tail[:, :, :, b - a - halo :].clone()  # the next band still reads the past there
        del y, band_tail, band_new  # or they would be held until the next band's are made
    tail[:, :, :, H - halo :] = waiting
    new[conv.key] = tail
    return out


def cut_bands(x: Tensor, conv: CausalConv3d) -> list[int]:
    """The rows at which x [B, C, T, H, W] is cut into bands before `conv`, from 0 to H: [0, H] is one band."""
    B, C, T, H, W = x.shape
    rows = max(ROWS, SMALL // (B * C * (T + conv.kernel_size[0] - 1)) + 1)  # fewer would be slow (onednn.py)
    count = max(H // rows, 1) if is_tall(x) else 1
    return [H * k // count for k in range(count + 1)]


def empty_like_rows(band: Tensor, H: int) -> Tensor:
    """An empty [B, C, T, H, W] for bands like `band` [B, C, T, rows, W], channels last in memory as theirs are."""
    B, C, T, _, W = band.shape
    return band.new_empty(B, T, H, W, C).movedim(-1, 1)


# ---- norms -----------------------------------------------------------------------------------------------------------

def norm_of(norm: nn.Module, x: Tensor, *z: Tensor) -> RowNorm:
    """norm(x, *z), x [B, C, T, H, W], by bands of rows: f(x[:, :, :, rows], rows) are these rows of it.

    z: what the norm is given besides x, nothing or CogVideoX's latents [B, C_z, F, h, w].
    """
    if isinstance(norm, SpatialNorm):
        return SpatialRows(norm, x, *z)
    if isinstance(norm, nn.GroupNorm) and is_tall(x):
        return GroupRows(norm, x)
    return lambda band, rows: norm(band)  # Wan's norm sees one position at a time


class GroupRows:
    """GroupNorm of some rows, with the mean and variance of all of x [B, C, T, H, W]."""

    def __init__(self, norm: nn.GroupNorm, x: Tensor):
        self.norm = norm
        wide = torch.promote_types(x.dtype, torch.float32)
        mean = self.over_groups(x.mean(dim=(2, 3, 4), dtype=wide))
        # frame by frame, so that x - mean is never held whole
        variance = sum((frame - mean).square_().mean(dim=(2, 3)) for frame in x.unbind(dim=2)) / x.shape[2]
        # γ · (x − mean) / √(variance + ε) + β
        gain = norm.weight.to(wide)[:, None, None] * (self.over_groups(variance) + norm.eps).rsqrt()
        bias = norm.bias.to(wide)[:, None, None] - mean * gain
        self.gain, self.bias = gain[:, :, None], bias[:, :, None]                # [B, C, 1, 1, 1]

    def over_groups(self, v: Tensor) -> Tensor:
        """v [B, C], a number for each channel -> [B, C, 1, 1]: the mean over the channel's group."""
        mean = rearrange(v, "b (g c) -> b g c", g=self.norm.num_groups).mean(dim=2)
        return mean.repeat_interleave(v.shape[1] // self.norm.num_groups, dim=1)[..., None, None]

    def __call__(self, band: Tensor, rows: slice) -> Tensor:
        return torch.addcmul(self.bias, band, self.gain).to(band.dtype)


class SpatialRows:
    """SpatialNorm of some rows of f [B, C, T, H, W], with the statistics of all of f."""

    def __init__(self, norm: SpatialNorm, f: Tensor, z: Tensor):
        self.normalise = norm_of(norm.norm_layer, f)
        self.gain, self.bias = norm.gain_and_bias(z, f.shape[2])
        self.H, self.h, self.w = f.shape[3], *z.shape[3:]

    def __call__(self, band: Tensor, rows: slice) -> Tensor:
        cells = torch.arange(rows.start, rows.stop, device=band.device) * self.h // self.H
        band = rearrange(self.normalise(band, rows), "b c t h (w q) -> b t h 1 w q c", w=self.w)
        # f' = norm(f) · y(z) + b(z)
        band.mul_(self.gain[:, :, cells]).add_(self.bias[:, :, cells])
        return rearrange(band, "b t h 1 w q c -> b c t h (w q)")


if __name__ == "__main__":
    torch.manual_seed(0)
    norm, conv, x = nn.GroupNorm(4, 32), CausalConv3d(32, 32), torch.randn(1, 32, 9, 256, 48)
    conv.key = "conv"
    with torch.no_grad():
        whole = conv(nnf.silu(norm(x)), None, {})
        banded = normed_conv(norm_of(norm, x), conv, x, None, {})
    heights = [b - a for a, b in pairwise(cut_bands(x, conv))]
    print(f"256 rows at once and in bands of {heights}: they differ by {(whole - banded).abs().max():.1e} at most")
