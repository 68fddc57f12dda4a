"""Mirage: a naive insertion in, a harmonised video out, in one diffusion step (Mirage §3.2, Figure 2).

    x_NI ──vae.encode──> z_NI ──denoise(dit, t)──> z_DR ──vae.decode──> x_DR
      └──2D encoder, each frame alone──> features ──fusion blocks──┘ (last two decoder stages)

`Mirage.forward` is that figure for a clip that fits in memory; `Mirage.stream` is the same for a video of any length,
group by group: the VAE's caches run through from first frame to last, and the transformer sees overlapping windows of
latents. A folder of Mirage holds what the two stages trained, beside the base they were trained on:

    stage_a.safetensors    fusion blocks, Reconstruction-LoRA            (metadata: base, vae2d, ranks, alphas, recipe)
    stage_h.safetensors    transformer LoRA, Harmonisation-LoRA          (metadata: the same, and t, window)
    prompt.safetensors     the text embedding of the fixed prompt

    python -m mirage_min.systems.mirage [VIDEO [MODEL]]     # walks Figure 2 once: shapes, ranges, seconds
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as nnf

from ..method import injection, lora
from ..method.one_step import T_MIRAGE, T_WAN, denoise
from ..method.schedules import schedule_from_config
from ..method.tiles import Tile, assemble, cut, select
from ..networks import frugal, weights
from ..networks.dit_cogvideox import CogVideoXDiT
from ..networks.dit_wan import WanDiT
from ..networks.vae_2d import AutoencoderKL
from ..networks.vae_cogvideox import CogVideoXVAE
from ..networks.vae_wan import WanVAE

RECONSTRUCTION, HARMONISATION, TRANSFORMER = "reconstruction", "harmonisation", "transformer"  # the three LoRAs
CELL = 16  # pixels: frames are padded to whole patches of 2 x 2 latents


class Mirage(nn.Module):
    """Figure 2: a causal 3D VAE with fusion blocks, a transformer, and a 2D encoder that supplies detail."""

    def __init__(self, vae: nn.Module, dit: nn.Module, vae2d: nn.Module | None, text: Tensor, alpha_bar: Tensor | None,
                 t: int = T_MIRAGE, window: int = 9):
        """text [1, L, D]; alpha_bar [1000] of a v-predicting base, None for flow; vae2d None: the 3D encoder run frame
        by frame supplies the features (ChopGrad B.4). `window` is in latents, for `stream`."""
        super().__init__()
        self.vae, self.dit, self.vae2d = vae, dit, vae2d
        self.alpha_bar, self.t, self.window = alpha_bar, t, window
        self.register_buffer("text", text)
        injection.attach(vae, self.feature_channels())

    def forward(self, x_ni: Tensor) -> Tensor:
        """x_ni [B, 3, T, H, W] in [-1, 1], any T >= 1, H and W >= 16 -> x_dr of the same shape, not clamped."""
        x = self.pad(x_ni)
        z_ni = self.vae.encode(x)
        # z_DR = ε_θ's estimate of z0 from z_NI at t                                     Mirage §3.2
        z_dr = self.denoise(z_ni)
        # x_DR = D3D[z_DR, z2D_mid]                                                      Mirage §3.2
        x_dr = self.vae.decode(z_dr, inject=self.mids(x))
        return x_dr[:, :, : x_ni.shape[2], : x_ni.shape[3], : x_ni.shape[4]]

    def denoise(self, z_ni: Tensor) -> Tensor:
        """z_NI [B, C, F, h, w] -> z_DR: one call of the transformer."""
        text = self.text.to(z_ni.dtype).expand(z_ni.shape[0], -1, -1)
        return denoise(self.dit, z_ni, self.t, text, self.alpha_bar)

    def mids(self, x: Tensor) -> list[Tensor]:
        """z2D_mid: what the 2D encoder sees of each frame alone, finest first, batch folded back into time."""
        if self.vae2d is None:
            return self.vae.mids2d(x)
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        return [rearrange(f, "(b t) c h w -> b c t h w", b=x.shape[0]) for f in self.vae2d.mids(frames, count=2)]

    def feature_channels(self) -> list[int]:
        """Channels of the features that `mids` returns."""
        with torch.no_grad():
            like = next(self.vae.parameters())
            return [f.shape[1] for f in self.mids(torch.zeros(1, 3, 1, 16, 16, dtype=like.dtype, device=like.device))]

    def pad(self, x: Tensor) -> Tensor:
        """Repeat the last frame up to a legal length, and the last row and column up to whole patches."""
        B, C, T, H, W = x.shape
        if min(H, W) < 16 or C != 3:
            raise ValueError(f"wanted [B, 3, T, H, W] with H and W of at least 16, got {list(x.shape)}")
        return nnf.pad(x, (0, -W % CELL, 0, -H % CELL, 0, self.vae.legal_length(T) - T), mode="replicate")

    @torch.no_grad()
    def stream(self, frames: Iterable[Tensor], window: int | None = None, tiles: int = 1, margin: int = 8
               ) -> Iterator[Tensor]:
        """Frames [3, H, W] in [-1, 1] -> as many frames [3, H, W], clamped, in memory independent of the length.

        `window`: how many latents the transformer sees at once. Windows overlap by one temporal patch or more and are
        blended there, with weights that rise linearly and sum to one. `tiles`: into how many rows and columns frames
        are cut for the VAEs where memory is short, each with `margin` latent cells around it; the transformer sees
        whole frames.
        """
        waiting: list[tuple[Tensor, int, int]] = []  # encoded groups whose latents are still to be denoised
        cut_up, encoding, decoding = (tiles, margin), {}, {}

        def encoded() -> Iterator[Tensor]:
            for x_g, count in self._groups(frames):
                z_g = self._tiled(lambda cache, x: self.vae.encode_group(x, cache), encoding, cut_up, x_g)
                waiting.append((x_g, z_g.shape[2], count))
                yield z_g

        def decode(cache: dict | None, z: Tensor, x: Tensor) -> tuple[Tensor, dict]:
            return self.vae.decode_group(z, cache, inject=self.mids(x))

        ready: Tensor | None = None  # denoised latents that wait for the rest of their group
        for z_dr in self._windows(encoded(), self.window if window is None else window):
            ready = z_dr if ready is None else torch.cat([ready, z_dr], dim=2)
            while waiting and ready.shape[2] >= waiting[0][1]:
                x_g, latents, count = waiting.pop(0)
                x_dr = self._tiled(decode, decoding, cut_up, ready[:, :, :latents], x_g)
                ready = ready[:, :, latents:]
                H, W = self._size
                yield from x_dr[0, :, :count, :H, :W].clamp(-1, 1).float().cpu().unbind(dim=1)

    @staticmethod
    def _tiled(step: Callable, caches: dict, cut_up: tuple[int, int], *parts: Tensor) -> Tensor:
        """step(cache, *parts) -> (y, new cache) for each tile of the frame by itself, blended to one y.

        caches: a cache for each tile. parts: tensors over the same frame, of latents or of pixels; the last of pixels.
        """
        h, w = (n // 8 for n in parts[-1].shape[-2:])

        def pieces() -> Iterator[tuple[Tile, Tensor]]:
            for i, tile in enumerate(cut(h, w, (cut_up[0], cut_up[0]), cut_up[1])):
                y, caches[i] = step(caches.pop(i, None), *(select(v, tile, v.shape[-1] // w) for v in parts))
                yield tile, y
        return assemble(pieces(), h, w)

    def _groups(self, frames: Iterable[Tensor]) -> Iterator[tuple[Tensor, int]]:
        """Frames -> (x_g [1, 3, T_g, H', W'], how many of its frames are real): the groups of a legal length."""
        like, held, first = next(self.vae.parameters()), [], True
        lead, size = (g.stop - g.start for g in self.vae.encode_groups(self.vae.legal_length(18))[:2])

        def group(held: list[Tensor], T: int) -> tuple[Tensor, int]:
            x = torch.stack(held, dim=1)[None].to(like.device, like.dtype)           # [1, 3, count, H, W]
            H, W = self._size = x.shape[-2:]
            return nnf.pad(x, (0, -W % CELL, 0, -H % CELL, 0, T - len(held)), mode="replicate"), len(held)

        for frame in frames:
            held.append(frame)
            if len(held) == (lead if first else size):
                yield group(held, len(held))
                held, first = [], False
        if held:
            yield group(held, self.vae.legal_length(len(held)) if first else size)

    def _windows(self, latents: Iterator[Tensor], window: int) -> Iterator[Tensor]:
        """Latents in pieces of any length -> denoised latents, in order, as soon as they are final.

        The first window has an odd number of latents where a temporal patch is 2 (its first latent is doubled by the
        transformer, as in every clip); the later ones then start and end on whole patches.
        """
        patch, overlap = self.patch_and_overlap(window)
        z: Tensor | None = None     # noisy latents from the start of the window on
        tail: Tensor | None = None  # the last window's estimate of the overlap
        length = window
        for piece in latents:
            z = piece if z is None else torch.cat([z, piece], dim=2)
            while z.shape[2] >= length:
                z_dr = self._blend(tail, self.denoise(z[:, :, :length]))
                yield z_dr[:, :, : length - overlap]
                z, tail = z[:, :, length - overlap :], z_dr[:, :, length - overlap :]
                length = window if patch == 1 else window - 1
        if z is not None and z.shape[2] > (0 if tail is None else overlap):
            yield self._blend(tail, self.denoise(z))
        elif tail is not None:
            yield tail

    def patch_and_overlap(self, window: int) -> tuple[int, int]:
        """Latents to a temporal patch of the transformer, and how many two windows share: about a quarter."""
        patch = getattr(self.dit.config, "patch_size_t", None) or 1
        if window < 2 * patch + 1 or (patch == 2 and window % 2 == 0):
            raise ValueError(f"window must be {'odd and ' if patch == 2 else ''}at least {2 * patch + 1}, got {window}")
        return patch, patch * max(1, window // (4 * patch))

    @staticmethod
    def _blend(tail: Tensor | None, z_dr: Tensor) -> Tensor:
        if tail is None:
            return z_dr
        n = tail.shape[2]
        rise = torch.arange(1, n + 1, device=z_dr.device, dtype=z_dr.dtype).view(1, 1, n, 1, 1) / (n + 1)
        return torch.cat([torch.lerp(tail, z_dr[:, :, :n], rise), z_dr[:, :, n:]], dim=2)

    @classmethod
    def from_base(cls, base: str | Path, vae2d: str | Path | None, text: Tensor | None = None, device=None, dtype=None,
                  **settings) -> "Mirage":
        """Published weights with new, untrained fusion blocks: where training starts.

        base: a CogVideoX or Wan folder or hub id (vae, transformer and scheduler in subfolders); vae2d: an
        AutoencoderKL (None for Wan); text: the prompt's embedding [1, L, D], zeros if not given.
        """
        config = weights.read_json(weights.locate(WanVAE, base, "vae") / "config.json")
        wan = config.get("_class_name") == "AutoencoderKLWan"
        VAE, DiT = (WanVAE, WanDiT) if wan else (CogVideoXVAE, CogVideoXDiT)
        place = dict(dtype=dtype, device=device)
        vae, dit = VAE.from_pretrained(base, "vae", **place), DiT.from_pretrained(base, "transformer", **place)
        scheduler = weights.locate(DiT, base, "scheduler", "scheduler_config.json") / "scheduler_config.json"
        alpha_bar = schedule_from_config(weights.read_json(scheduler), file=scheduler)
        if vae2d is None and not wan:
            raise ValueError(f"{base} is CogVideoX: Mirage needs an AutoencoderKL beside it (--vae2d)")
        vae2d = None if wan else AutoencoderKL.from_pretrained(vae2d, **place)
        shape = (1, 512, dit.config.text_dim) if wan else (
            1, dit.config.max_text_seq_length, dit.config.text_embed_dim)
        text = torch.zeros(shape) if text is None else text
        if text.shape != shape:
            raise ValueError(f"{base} takes a prompt of {list(shape)}, given {list(text.shape)} (encode_prompt.py)")
        mirage = cls(vae, dit, vae2d, text.to(device), alpha_bar, **({"t": T_WAN} if wan else {}) | settings)
        frugal.apply(vae)
        return mirage.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, path: str | Path, base: str | Path | None = None, vae2d: str | Path | None = None,
                        device=None, dtype=None) -> "Mirage":
        """A trained Mirage from its folder; base and vae2d default to what the adapters were trained on."""
        path = Path(path)
        a, a_about = weights.load_tensors(path / "stage_a.safetensors")
        stage_h = path / "stage_h.safetensors"
        h, h_about = weights.load_tensors(stage_h) if stage_h.exists() else ({}, {})
        text = weights.load_tensors(path / "prompt.safetensors")[0].get("text")
        if text is None or not (base or "base" in a_about):
            raise ValueError(f"{path}: prompt.safetensors has no `text`" if text is None else
                             f"{path}: stage_a.safetensors does not say on what base it was trained (--base)")
        def beside(name: str | None) -> str | Path | None:  # bases that are shipped lie beside the adapters
            return path / name if name and (path / name).is_dir() else name
        settings = {k: int(h_about[k]) for k in ("t", "window") if k in h_about}
        base, vae2d = base or beside(a_about.get("base")), vae2d or beside(a_about.get("vae2d"))
        mirage = cls.from_base(base, vae2d, text, device, dtype, **settings)
        mirage.load_stage(a, a_about)
        if h:
            mirage.load_stage(h, h_about)
        return mirage.to(device)

    def add_lora(self, name: str, rank: int, alpha: float, targets: list[str] | None = None) -> None:
        """Reconstruction- and Harmonisation-LoRA: every convolution of the 3D decoder; the transformer's: attention."""
        if name == TRANSFORMER:
            lora.add(self.dit, name, rank, alpha, targets or ("to_q", "to_k", "to_v", "to_out.0"))
        else:
            lora.add(self.vae.decoder, name, rank, alpha)

    def adapters(self, name: str) -> nn.Module:
        """The module that carries the adapter `name`."""
        return self.dit if name == TRANSFORMER else self.vae.decoder

    def save_stage(self, path: Path, names: list[str], about: dict[str, str], fusion: bool = False) -> None:
        """Write adapters (and the fusion blocks) with what is needed to load them; whole or not at all."""
        tensors = injection.state_dict(self.vae) if fusion else {}
        for name in names:
            tensors |= {f"{name}.{key}": p for key, p in lora.state_dict(self.adapters(name), name).items()}
            adapter = next(lora.adapters(self.adapters(name), name))[2]
            about = about | {f"{name}.rank": str(adapter.A.shape[0]), f"{name}.alpha": str(adapter.alpha)}
            if name == TRANSFORMER:  # the one that diffusers can load too
                about[lora.METADATA] = lora.peft_config(self.dit, name)
        weights.save_tensors(path, tensors, about)

    def load_stage(self, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
        """The inverse of save_stage; the transformer's LoRA may also come from diffusers, on any of its layers."""
        names = (RECONSTRUCTION, HARMONISATION, TRANSFORMER)
        def whole(key: str) -> str:  # diffusers' save_lora_weights has the prefix, its save_lora_adapter none
            return key if key.partition(".")[0] in ("fusion", *names) else f"{TRANSFORMER}.{key}"
        tensors = {whole(key): tensor for key, tensor in tensors.items()}
        config = {whole(key): value for key, value in json.loads(about.get(lora.METADATA, "{}")).items()}
        if config.get(f"{TRANSFORMER}.use_rslora") or config.get(f"{TRANSFORMER}.alpha_pattern"):
            raise ValueError("wanted a LoRA with one scale, alpha / rank, got one with use_rslora or alpha_pattern")
        if fusion := {k: v for k, v in tensors.items() if k.startswith("fusion.")}:
            injection.load(self.vae, fusion)
        for name in names:
            if state := {k[len(name) + 1 :]: v for k, v in tensors.items() if k.startswith(name + ".")}:
                rank = min((v.shape[0] for k, v in state.items() if k.endswith(".lora_A.weight")), default=1)
                alpha = float(about.get(f"{name}.alpha", config.get(f"{name}.lora_alpha", rank)))
                self.add_lora(name, rank, alpha, config.get(f"{name}.target_modules"))
                lora.load(self.adapters(name), name, state)
        self.requires_grad_(False)


@torch.no_grad()
def explain(mirage: Mirage, x_ni: Tensor) -> Tensor:
    """Mirage.forward on x_ni [1, 3, T, H, W], a line for each stage: its output's shape and range, and its seconds."""
    print(f"{'x_NI, the naive insertion':<40} {list(x_ni.shape)}  in [{x_ni.min():.2f}, {x_ni.max():.2f}]")

    def stage(name: str, run, *args, **kwargs):
        start = time.time()
        out = run(*args, **kwargs)
        for k, v in enumerate(out if isinstance(out, list) else [out]):
            seconds = f"{time.time() - start:.2f} s" if k == 0 else ""
            print(f"{name if k == 0 else '':<40} {list(v.shape)}  in [{v.min():.2f}, {v.max():.2f}]  {seconds}")
        return out

    x = stage("padded to whole groups and patches", mirage.pad, x_ni)
    z_ni = stage("z_NI = E3D(x_NI)", mirage.vae.encode, x)
    z_dr = stage(f"z_DR: the transformer, once, at t = {mirage.t}", mirage.denoise, z_ni)
    mids = stage("z2D_mid: each frame alone, finest first", mirage.mids, x)
    x_dr = stage("x_DR = D3D[z_DR, z2D_mid]", mirage.vae.decode, z_dr, inject=mids)
    return x_dr[:, :, : x_ni.shape[2], : x_ni.shape[3], : x_ni.shape[4]]


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
