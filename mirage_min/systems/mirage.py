"""Mirage: a naive insertion in, a harmonised video out, in one diffusion step (Mirage §3.2, Figure 2).

    x_NI ──vae.encode──> z_NI ──denoise(dit, t)──> z_DR ──vae.decode──> x_DR
      └──2D encoder, each frame alone──> features ──fusion blocks──┘ (last two decoder stages)

`Mirage.forward` is that figure, for a clip that fits in memory. stream.py does the same to a video of any length, and
mirage_folder.py reads and writes a Mirage's folder. With `change_only` what the decoder loses of the scene is not lost:

    x_DR = x_NI + D3D[z_DR, z2D_mid] − D3D[z_NI, z2D_mid]

    python -m mirage_min.systems.mirage [VIDEO [MODEL]]     # walks Figure 2 once: shapes, ranges, seconds
"""

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as nnf

from ..method import injection
from ..method.one_step import T_MIRAGE, denoise
from . import mirage_folder
from .stream import LEAST, stream_windows

PATCH = 16  # pixels: frames are padded to whole patches of 2 x 2 latents


class Mirage(nn.Module):
    """Figure 2: a causal 3D VAE with fusion blocks, a transformer, and a 2D encoder that supplies detail."""

    def __init__(self, vae: nn.Module, dit: nn.Module, vae2d: nn.Module | None, text: Tensor, alpha_bar: Tensor | None,
                 t: int = T_MIRAGE, window: int = 9, tiles: int = 1, margin: int = 8, change_only: bool = False):
        """
        vae        CogVideoXVAE or WanVAE; gets the fusion blocks, which change nothing yet
        dit        CogVideoXDiT or WanDiT
        vae2d      AutoencoderKL; None: the 3D encoder itself, run frame by frame, supplies the features (ChopGrad B.4)
        text       [1, L, D], the embedding of the one prompt
        alpha_bar  [1000], of a transformer that predicts v; None for one that predicts a flow
        window, tiles, margin    what `stream` uses by default
        change_only    DEVIATION: the result is x_NI and what the transformer changes, not all that the decoder makes
        """
        super().__init__()
        self.vae, self.dit, self.vae2d = vae, dit, vae2d
        self.alpha_bar, self.t = alpha_bar, t
        self.window, self.tiles, self.margin, self.change_only = window, tiles, margin, change_only
        self.register_buffer("text", text)
        injection.attach(vae, vae.feature_channels if vae2d is None else vae2d.config.block_out_channels[:2])

    def forward(self, x_ni: Tensor) -> Tensor:
        """x_ni [B, 3, T, H, W] in [-1, 1], any T >= 1, H and W >= 16 -> x_dr of the same shape, not clamped."""
        x = self.pad(x_ni)
        z_ni = self.vae.encode(x)
        # z_DR = ε_θ's estimate of z0 from z_NI at t                                     Mirage §3.2
        z_dr = self.denoise(z_ni)
        mids = self.mids(x)
        # x_DR = D3D[z_DR, z2D_mid]                                                      Mirage §3.2
        x_dr = self.vae.decode(z_dr, inject=mids)
        if self.change_only:
            x_dr = x + x_dr - self.vae.decode(z_ni, inject=mids)
        return x_dr[:, :, : x_ni.shape[2], : x_ni.shape[3], : x_ni.shape[4]]

    def denoise(self, z_ni: Tensor) -> Tensor:
        """z_NI [B, C, F, h, w] -> z_DR, the same shape: one call of the transformer."""
        text = self.text.to(z_ni.dtype).expand(z_ni.shape[0], -1, -1)
        return denoise(self.dit, z_ni, self.t, text, self.alpha_bar)

    def mids(self, x: Tensor) -> list[Tensor]:
        """z2D_mid: what the 2D encoder sees of each frame alone, batch folded back into time.

        x [B, 3, T, H, W] -> [B, C, T, H, W] and [B, C', T, H/2, W/2], the latter alone if there is no vae2d.
        """
        if self.vae2d is None:
            return self.vae.mids2d(x)
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        return [rearrange(f, "(b t) c h w -> b c t h w", b=x.shape[0]) for f in self.vae2d.mids(frames, count=2)]

    def pad(self, x: Tensor, T: int | None = None) -> Tensor:
        """Repeat the last frame up to T frames, by default a legal length, and the last row and column up to whole
        patches: [B, 3, T, H, W], H and W multiples of 16. ValueError for other channels, or a side below 16."""
        B, C, frames, H, W = x.shape
        if min(H, W) < LEAST or C != 3:
            raise ValueError(f"wanted [B, 3, T, H, W] with H and W of at least {LEAST}, got {list(x.shape)}")
        T = self.vae.legal_length(frames) if T is None else T
        return nnf.pad(x, (0, -W % PATCH, 0, -H % PATCH, 0, T - frames), mode="replicate")

    @property
    def temporal_patch(self) -> int:
        """Latents that the transformer puts into one token along time: 2 in CogVideoX1.5, else 1."""
        return getattr(self.dit.config, "patch_size_t", None) or 1

    def stream(self, frames: Iterable[Tensor], window: int | None = None, tiles: int | None = None,
               margin: int | None = None) -> Iterator[Tensor]:
        """Frames [3, H, W] in [-1, 1] -> as many, clamped, in memory independent of their number (stream.py)."""
        window = self.window if window is None else window
        tiles = self.tiles if tiles is None else tiles
        margin = self.margin if margin is None else margin
        return stream_windows(frames, self, window, tiles, margin, self.change_only)

    Options = mirage_folder.Options
    from_base = classmethod(mirage_folder.from_base)
    from_pretrained = classmethod(mirage_folder.from_pretrained)
    add_lora, adapters = mirage_folder.add_lora, mirage_folder.adapters
    save_stage, load_stage = mirage_folder.save_stage, mirage_folder.load_stage


@torch.no_grad()
def explain(mirage: Mirage, x_ni: Tensor) -> Tensor:
    """Mirage.forward on x_ni [1, 3, T, H, W]; each stage prints its output's shape and range, and its seconds."""
    describe("x_NI, the naive insertion", x_ni)
    stages = (  # whose method, and what it returns
        (mirage, "pad", "padded to whole groups and patches"),
        (mirage.vae, "encode", "z_NI = E3D(x_NI)"),
        (mirage, "denoise", f"z_DR: the transformer, once, at t = {mirage.t}"),
        (mirage, "mids", "z2D_mid: each frame alone, finest first"),
        (mirage.vae, "decode", "x_DR = D3D[z_DR, z2D_mid]"))
    for owner, method, name in stages:
        setattr(owner, method, partial(run_stage, name, getattr(owner, method)))  # hides the class's method
    try:
        return mirage(x_ni)
    finally:
        for owner, method, _ in stages:
            delattr(owner, method)


def run_stage(name: str, method: Callable, *args, **kwargs) -> Tensor | list[Tensor]:
    """Call a method and return its result; print each tensor of the result, and the seconds that it took."""
    start = time.time()
    out = method(*args, **kwargs)
    seconds = time.time() - start
    results = out if isinstance(out, list) else [out]
    describe(name, results[0], f"{seconds:.2f} s")
    for x in results[1:]:
        describe("", x)
    return out


def describe(name: str, x: Tensor, seconds: str = "") -> None:
    """Print a tensor's name, shape and range."""
    print(f"{name:<40} {list(x.shape)}  in [{x.min():.2f}, {x.max():.2f}]  {seconds}".rstrip())


if __name__ == "__main__":
    from ..data.video import read_clip

    home = Path(__file__).parents[2]
    parser = argparse.ArgumentParser(description="Figure 2, stage by stage, on the first 17 frames of a video.")
    parser.add_argument("video", nargs="?", default=home / "assets/naive_insertion.mp4", help="default: the demo clip")
    parser.add_argument("model", nargs="?", default=home / "weights", help="folder of a Mirage (default weights)")
    args = parser.parse_args()
    try:
        mirage, x_ni = Mirage.from_pretrained(args.model), read_clip(args.video, 17)[None]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    x_dr = explain(mirage, x_ni)
    streamed = torch.stack(list(mirage.stream(iter(x_ni[0].unbind(1)), window=5)), dim=1)
    print(f"the same as a stream, one window: largest difference {(streamed - x_dr[0].clamp(-1, 1)).abs().max():.1e}")
