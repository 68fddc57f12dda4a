"""Pairs as latents: what the transformer or UNet of a small base trains on, encoded once and kept in a file.

    python -m mirage_min.training.latents
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from einops import rearrange
from torch import Generator, Tensor, nn

from ..data import desk
from ..data.pairs import Pairs
from ..networks import weights
from ..networks.vae_2d import AutoencoderKL
from ..networks.vae_cogvideox import CogVideoXVAE
from ..networks.vae_wan import WanVAE
from .checkpoint import digest_of_files, digest_of_frozen
from .run import Optimisation, autocast


class EachFrame(nn.Module):
    """An image VAE that encodes videos, each frame alone."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def encode(self, x: Tensor) -> Tensor:
        """x [B, 3, T, H, W] in [-1, 1] -> z [B, 4, T, H/8, W/8], scaled as the image VAE scales it"""
        z = self.vae.encode(rearrange(x, "b c t h w -> (b t) c h w"))
        return rearrange(z, "(b t) c h w -> b c t h w", b=len(x))


class Latents:
    """The latents z [2 N, 2, C, F, h, w] of N pairs, each as it is and mirrored, encoded once and kept in a file.

    ValueError if the file exists and holds those of other pairs or of another VAE, or the pairs differ in size.
    """

    def __init__(self, pairs: Pairs, vae: CogVideoXVAE | WanVAE | EachFrame, recipe: Optimisation, file: Path):
        about = {"pairs": digest_of_files(pairs.paths()), "vae": digest_of_frozen(vae, {})}
        if not file.exists():
            z = self.encode(pairs, vae, recipe)
            file.parent.mkdir(parents=True, exist_ok=True)
            weights.save_tensors(file, {"z": z}, about)
        tensors, found = weights.load_tensors(file)
        if found != about:
            raise ValueError(f"{file}: wanted latents of {about}, got {found}: remove it, or name another --runs")
        self.z = tensors["z"]                                                            # [2 N, 2, C, F, h, w]

    @staticmethod
    @torch.no_grad()
    def encode(pairs: Pairs, vae: CogVideoXVAE | WanVAE | EachFrame, recipe: Optimisation) -> Tensor:
        """All N pairs -> latents [2 N, 2, C, F, h, w] in float16: of each pair as it is, then mirrored; NI, then GT.

        ValueError if the pairs differ in size.
        """
        z, device = None, next(vae.parameters()).device
        for i in desk.bar(range(len(pairs)), desc="encoding", unit="clip"):
            x = torch.stack(pairs.read(i, lambda n: 0)).to(device)                       # [NI and GT, 3, T, H, W]
            with autocast(recipe, device):
                both = torch.stack([vae.encode(x), vae.encode(x.flip(-1))]).half().cpu()  # [2, 2, C, F, h, w]
            if z is None:  # one tensor from the start: many small ones, kept between large ones, hold the heap open
                z = both.new_empty(2 * len(pairs), *both.shape[1:])
            if both.shape[1:] != z.shape[1:]:
                raise ValueError(f"{pairs.names[i]}: wanted clips of one size, got latents {list(both.shape[2:])} "
                                 f"after {list(z.shape[2:])}")
            z[2 * i : 2 * i + 2] = both
        return z

    def batch(self, n: int, draws: Generator) -> tuple[Tensor, Tensor]:
        """n pairs of latents, drawn with replacement: z_NI, z_GT [n, C, F, h, w] in float32."""
        z = self.z[torch.randint(len(self.z), (n,), generator=draws)].float()
        return z[:, 0], z[:, 1]


class DrawnLatents:
    """The latents z [n, 2, C, F, h, w] of what a recipe draws first, n = recipe.latent_clips, kept in a file.

    ValueError if the file exists and was made by another run.
    """

    @torch.no_grad()
    def __init__(self, draw: Callable, vae: nn.Module, recipe: Optimisation, file: Path, identity: dict):
        """draw(step, clips) -> x_in, x_gt [n, 3, T, H, W] and names; identity: the run's (checkpoint.identify)."""
        about, device = {"run": json.dumps(identity)}, next(vae.parameters()).device
        if not file.exists():
            z = None
            for i in desk.bar(range(recipe.latent_clips), desc="encoding", unit="clip"):
                # steps before the first: the pixel loss sees other draws
                x_in, x_gt, _ = draw(-1 - i, range(1))
                with autocast(recipe, device):
                    z_in, z_gt = (vae.encode(x.to(device))[0] for x in (x_in, x_gt))
                    both = torch.stack([z_in, z_gt]).half().cpu()                        # [2, C, F, h, w]
                z = both.new_empty(recipe.latent_clips, *both.shape) if z is None else z
                z[i] = both
            file.parent.mkdir(parents=True, exist_ok=True)
            weights.save_tensors(file, {"z": z}, about)
        tensors, found = weights.load_tensors(file)
        if found != about:
            raise ValueError(f"{file}: was made by another run: remove it, or name another --run-folder")
        self.z = tensors["z"]                                                            # [n, 2, C, F, h, w]

    def batch(self, n: int, draws: Generator) -> tuple[Tensor, Tensor]:
        """n of them, drawn with replacement: z_in, z_gt [n, C, F, h, w] in float32."""
        z = self.z[torch.randint(len(self.z), (n,), generator=draws)].float()
        return z[:, 0], z[:, 1]


if __name__ == "__main__":
    import tempfile

    from ..data.toy_world import WorldConfig, make_clip, save_clip
    from ..networks import small_base

    with tempfile.TemporaryDirectory() as folder:
        for seed in range(2):
            save_clip(make_clip(seed, WorldConfig(height=32, width=48)), f"{folder}/{seed}.safetensors")
        pairs, vae, recipe = Pairs(folder, frames=9), small_base.new_vae(), Optimisation(bf16=False)
        for change in ("none", "another scaling factor"):
            if change != "none":
                vae.config.scaling_factor *= 2
            try:
                z = Latents(pairs, vae, recipe, Path(folder, "z")).z
                print(f"change: {change}: {len(pairs)} pairs, each twice -> z_NI and z_GT {list(z.shape)} in {z.dtype}")
            except ValueError as error:
                print(f"change: {change}: refused, {str(error).partition(':')[2].replace(folder, 'FOLDER')}")
