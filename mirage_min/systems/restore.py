"""Restorers: degraded video in, restored video out, in one call of a transformer that was trained whole (ChopGrad §4).

    x ──(enlarge)──(hide what the mask covers)──vae.encode──> z_in ──transformer, once, at t──> z_out ──vae.decode──> y

Mirage without a 2D encoder, without injection and without LoRA: what is learned is in the transformer's own weights.

    upscale      super-resolution by a whole number: bilinear first, then the network at the full size (DOVE, B.1)
    artifacts    renders of a poor reconstruction (B.2)
    inpaint      what a mask covers is filled, all else is pasted back exactly as it was (B.3)

    z_out = z_in − prediction               if the base predicts a flow: Wan, at t = 200                 ChopGrad C.2
    z_out = √ᾱ_t z_in − √(1 − ᾱ_t) v        if it predicts v: CogVideoX, at t = 399                      DOVE

A folder is laid out as a base's, in diffusers' layout. Its model_index.json also says task, t, scale and window, and
prompt.safetensors has the one prompt's embedding. A DOVE checkpoint is a CogVideoX1.5 folder that says none of these:

    restorer = Restorer.from_pretrained("DOVE", task="dove", prompt="empty.safetensors")       # encode_prompt.py
    y = restorer(x)                                     # [B, 3, T, H, W] in [-1, 1] -> [B, 3, T, 4 H, 4 W]
    for frame in restorer.stream(frames): ...           # [3, 4 H, 4 W], as many as went in

Left out: classifier-free guidance, noise, and a prompt for each video.

    python -m mirage_min.systems.restore                # a random one: sizes, and what inpainting leaves alone
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import repeat

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as nnf

from ..data.masks import hide
from ..method.one_step import denoise
from ..method.schedules import schedule_from_config
from ..method.tiles import cut, select
from ..training import memory
from . import restore_folder
from .mirage import PATCH, Mirage
from .restore_folder import Settings
from .stream import CELL, LEAST, alike, stream_windows

TILES = 2, 3, 4, 6, 8  # that are tried where memory is short


class Restorer(nn.Module):
    """A causal video VAE, a transformer, and the task that it was trained for."""

    def __init__(self, vae: nn.Module, dit: nn.Module, text: Tensor, schedule: dict, settings: Settings,
                 tiles: int = 1, margin: int = 8):
        """
        vae, dit         CogVideoXVAE and CogVideoXDiT, or WanVAE and WanDiT
        text             [1, L, D], the embedding of the one prompt
        schedule         the base's scheduler_config.json, which says what the transformer predicts
        tiles, margin    of its streams
        ValueError unless transformer and text fit.
        """
        super().__init__()
        L, D = restore_folder.empty_text(dit).shape[1:]
        if text.ndim != 3 or len(text) != 1 or text.shape[2] != D or L not in (1, text.shape[1]):
            raise ValueError(f"wanted a prompt [1, {L if L > 1 else 'L'}, {D}], as this transformer takes it, got "
                             f"{list(text.shape)} (encode_prompt.py)")
        self.vae, self.dit, self.settings = vae, dit, settings
        self.schedule, self.alpha_bar = schedule, schedule_from_config(schedule)
        self.tiles, self.margin = tiles, margin
        self.register_buffer("text", text)

    # ---- the method --------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, 3, T, H, W] in [-1, 1], any size of 16 or more once enlarged -> y [B, 3, T, s H, s W], not clamped.

        mask: [B or 1, 1, T or 1, H, W], true where an inpainting Restorer fills; elsewhere y is x, exactly.
        ValueError if there is a mask and the task has none, or the other way round.
        """
        self.check_mask(mask is not None)
        x = self.enlarge(x)
        if mask is None:
            return self.restore(x)
        # DEVIATION: the paper does not say that what is known is pasted back
        return torch.where(mask, self.restore(hide(x, mask)), x)

    def restore(self, x_in: Tensor) -> Tensor:
        """What the network sees, enlarged or with holes, [B, 3, T, H, W] -> x_out of the same shape, not clamped."""
        T, H, W = x_in.shape[2:]
        z_in = self.vae.encode(self.pad(x_in))
        return self.vae.decode(self.denoise(z_in))[:, :, :T, :H, :W]

    def enlarge(self, x: Tensor) -> Tensor:
        """x [B, 3, T, H, W] -> [B, 3, T, s H, s W], bilinear; x itself where the scale is 1."""
        if self.scale == 1:
            return x
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        frames = nnf.interpolate(frames, scale_factor=float(self.scale), mode="bilinear")
        return rearrange(frames, "(b t) c h w -> b c t h w", b=len(x))

    def denoise(self, z: Tensor) -> Tensor:
        """z_in [B, C, F, h, w] -> z_out, the same shape: one call of the transformer, without noise."""
        text = self.text.to(z.dtype).expand(len(z), -1, -1)
        # Wan: z_out = z_in − prediction                                                          ChopGrad C.2
        # CogVideoX: z_out = √ᾱ_t z_in − √(1 − ᾱ_t) v                                             DOVE
        return denoise(self.dit, z, self.settings.t, text, self.alpha_bar)

    pad = Mirage.pad                        # repeats the last frame, row and column up to what VAE and patches take
    temporal_patch = Mirage.temporal_patch

    def mids(self, x: Tensor) -> None:
        """What Mirage would inject into the decoder: a Restorer injects nothing."""

    @property
    def scale(self) -> int:
        """The output's size over the input's."""
        return self.settings.scale

    @property
    def masked(self) -> bool:
        """Whether it takes a mask."""
        return self.settings.task == "inpaint"

    def check_mask(self, given: bool) -> None:
        """ValueError if there is a mask and the task has none, or the other way round."""
        if given != self.masked:
            wanted = "needs a mask of what it is to fill" if self.masked else "takes no mask"
            raise ValueError(f"a system for the task {self.settings.task!r} {wanted} (--mask)")

    # ---- a video of any length ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def stream(self, frames: Iterable[Tensor], masks: Tensor | Iterable[Tensor] | None = None) -> Iterator[Tensor]:
        """Frames [3, H, W] in [-1, 1] -> as many [3, s H, s W], clamped, in memory independent of their number.

        masks: [1, H, W], true where frames are filled: one for all of them, or one for each. What it does not cover
        comes out exactly as it went in.
        ValueError for masks of another size or number, frames too large for the memory, and what stream.py refuses.
        """
        self.check_mask(masks is not None)
        waiting = deque()  # frames that the model has not yet given back, with their masks
        ready = self.prepare(frames, masks, waiting)
        for y in stream_windows(ready, self, self.settings.window, self.tiles, self.margin):
            if masks is not None:
                x, mask = waiting.popleft()
                y = torch.where(mask, y, x)
            yield y

    def prepare(self, frames: Iterable[Tensor], masks: Tensor | Iterable[Tensor] | None,
                waiting: deque[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        """Frames as the network sees them, enlarged or with holes; with holes, (frame, mask) is put into `waiting`."""
        every = isinstance(masks, Tensor)
        if every:
            masks = repeat(masks)
        elif masks is not None:
            masks = iter(masks)
        count = 0
        for frame in alike(frames, least=-(-LEAST // self.scale)):
            if count == 0:
                self.check_memory(*frame.shape[1:])
            x = self.enlarge(frame[None, :, None])[0, :, 0]
            if masks is not None:
                mask = next(masks, None)
                if mask is None:
                    raise ValueError(f"the mask has {count} frames, and the video has more")
                if mask.shape[-2:] != x.shape[-2:]:
                    raise ValueError(f"frame {count}: wanted a mask as large as the frame, {list(x.shape[-2:])}, got "
                                     f"{list(mask.shape[-2:])}")
                waiting.append((x, mask))
                x = hide(x, mask)
            count += 1
            yield x
        if masks is not None and not every and next(masks, None) is not None:
            raise ValueError(f"the mask has more than the {count} frames of the video")

    def check_memory(self, H: int, W: int) -> None:
        """ValueError if a stream of frames H x W does not fit the memory, with the tiles that do. Computes nothing."""
        H, W, device = self.scale * H, self.scale * W, str(self.text.device)
        need, there = memory_for(self, H, W, self.tiles), memory.available(device)
        if need <= there:
            return
        finer = (n for n in TILES if self.tiles < n <= min(H, W) // CELL)
        fits = next((n for n in finer if memory_for(self, H, W, n) <= there), None)
        hint = f"--set tiles={fits} fits" if fits else "and tiles do not make it fit"
        raise ValueError(f"frames of {W}x{H} need about {need / memory.GIB:.1f} GiB, and {device} has "
                         f"{there / memory.GIB:.1f}: {hint}")

    # ---- files -------------------------------------------------------------------------------------------------------

    Options = restore_folder.Options
    from_base = classmethod(restore_folder.from_base)
    from_pretrained = classmethod(restore_folder.from_pretrained)
    save_pretrained = restore_folder.save_pretrained


def memory_for(restorer: Restorer, H: int, W: int, tiles: int) -> int:
    """Bytes that a stream needs at its peak for frames H x W as the network sees them, besides the weights."""
    own = sum(t.nbytes for t in (*restorer.parameters(), *restorer.buffers()))
    rehearsal = partial(two_groups, H=H, W=W, tiles=tiles)
    return memory.rehearse(restorer, rehearsal, str(restorer.text.device))[0] - own


@torch.no_grad()
def two_groups(restorer: Restorer, H: int, W: int, tiles: int) -> None:
    """A stream where it takes most: groups with a cache are encoded, a window is denoised, groups are decoded.

    Tiles are processed one at a time, and each keeps two caches: here the largest tile stands for all.
    """
    vae, h, w = restorer.vae, *(-(-n // PATCH) * PATCH // CELL for n in (H, W))
    plan, like = cut(h, w, (tiles, tiles), restorer.margin), next(vae.parameters())
    tile = max(plan, key=lambda tile: math.prod(side.seen.stop - side.seen.start for side in tile))
    first, later = (g.stop - g.start for g in vae.encode_groups(vae.legal_length(18))[:2])
    cache, after = None, None
    for length in (first, later):
        x = like.new_empty(1, 3, length, h * CELL, w * CELL)
        z, cache = vae.encode_group(select(x, tile, CELL), cache)
    kept = [[c.clone() for c in cache.values()] for _ in plan[1:]]
    z = restorer.denoise(like.new_empty(1, z.shape[1], restorer.settings.window, h, w))
    kept.append(torch.empty_like(x))  # the group, assembled from its tiles
    for group in vae.decode_groups(z.shape[2])[:2]:
        y, after = vae.decode_group(select(z[:, :, group], tile, 1), after)
    kept += [[c.clone() for c in after.values()] for _ in plan[1:]]


if __name__ == "__main__":
    from ..method.schedules import WAN
    from ..networks import small_base

    torch.manual_seed(0)
    parts = small_base.new_vae("wan"), small_base.new_transformer("wan"), torch.zeros(1, 1, 16), WAN
    x = torch.rand(1, 3, 6, 20, 30) * 2 - 1
    for s in (1, 2, 3):
        restorer = Restorer(*parts, Settings("upscale", scale=s)).requires_grad_(False).eval()
        print(f"upscale by {s}: {list(x.shape)} -> {list(restorer(x).shape)}; a stream of 480 x 832 would need "
              f"{memory_for(restorer, 480 * s, 832 * s, 1) / memory.GIB:.2f} GiB, in 2 x 2 tiles "
              f"{memory_for(restorer, 480 * s, 832 * s, 2) / memory.GIB:.2f}")
    restorer = Restorer(*parts, Settings("inpaint")).requires_grad_(False).eval()
    mask = torch.zeros(1, 20, 30, dtype=torch.bool)
    mask[:, 5:15, 8:22] = True
    y = torch.stack(list(restorer.stream(x[0].unbind(1), mask)), dim=1)[None]
    changed = (y != x).any(dim=1)
    print(f"inpaint: {float(changed.float().mean()):.0%} of the pixels changed, the mask covers "
          f"{float(mask.float().mean()):.0%}; outside of it {int((changed & ~mask).sum())} changed")
