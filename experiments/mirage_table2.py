"""Mirage Table 2 in the small: four ways to decode, each trained alike on reconstruction (Eqs. 2 and 3).

    python -m experiments.mirage_table2 --perceptual DIR         # an hour and a half

    2D VAE              AutoencoderKL, frame by frame, LoRA of rank 16 on its decoder
    2D VAE, skips       the same, and R3D2's skip connections from the encoder's view of x_NI
    3D VAE              CogVideoX's, LoRA of rank 16 on its decoder
    3D VAE, 2D injection   stage A, as train_vae.py trains it

All see z of x_GT; the 2D features and skips see x_NI. Same steps, batch, crops, loss (MSE + 0.1 LPIPS on SqueezeNet)
and learning rate. Not the paper's: bases of 0.3 and 2.6 million parameters, 4 and 16 channels of latents, toy scenes.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from experiments import common, tables
from experiments.skip_vae import SkipVAE
from mirage_min.method import lora
from mirage_min.networks.vae_2d import AutoencoderKL
from mirage_min.networks.vae_cogvideox import CogVideoXVAE
from mirage_min.systems.mirage import Mirage

PAPER = {"2D VAE": {"PSNR": 30.30, "LPIPS": 0.040, "vFID": 0.112},
         "2D VAE, skips": {"PSNR": 32.70, "LPIPS": 0.043, "vFID": 0.106},
         "3D VAE": {"PSNR": 33.98, "LPIPS": 0.041, "vFID": 0.080},
         "3D VAE, 2D injection": {"PSNR": 35.07, "LPIPS": 0.039, "vFID": 0.079}}
LR = 3e-3
Reconstruct = Callable[[Tensor, Tensor], Tensor]  # (x_ni, x_gt) [B, 3, T, H, W] -> x_ro


def two_d(args: argparse.Namespace, seed: int, folder: Path, skips: bool) -> Reconstruct:
    """The trained 2D VAE."""
    torch.manual_seed(seed)
    model = SkipVAE(AutoencoderKL.from_pretrained(args.weights / "vae_2d")).requires_grad_(False)
    lora.add(model.vae.decoder, "lora", 16, 16.0)

    def decode(ni: Tensor, gt: Tensor) -> Tensor:  # frames [N, 3, H, W]
        with torch.no_grad():
            z, mids = model.vae.encode(gt), model.vae.mids(ni)
        return model.decode(z, mids)

    reconstruct = partial(tables.framewise, decode)
    params = lora.parameters(model.vae.decoder, "lora") + (list(model.skips.parameters()) if skips else [])
    fit(reconstruct, params, args, seed)
    return reconstruct


def three_d(args: argparse.Namespace, seed: int, folder: Path) -> Reconstruct:
    """The trained 3D VAE without injection."""
    torch.manual_seed(seed)
    vae = CogVideoXVAE.from_pretrained(args.weights / "base", "vae").requires_grad_(False)
    lora.add(vae.decoder, "lora", 16, 16.0)

    def reconstruct(x_ni: Tensor, x_gt: Tensor) -> Tensor:
        with torch.no_grad():
            z = vae.encode(x_gt)
        return vae.decode(z)

    fit(reconstruct, lora.parameters(vae.decoder, "lora"), args, seed)
    return reconstruct


def injected(args: argparse.Namespace, seed: int, folder: Path) -> Reconstruct:
    """Stage A, by the script that trains it."""
    make = partial(tables.stage_a, args, seed=seed, lr=LR)
    model = tables.once(folder / "model of stage A", tables.trained_with(args, lr=LR), make)
    mirage = Mirage.from_pretrained(model)
    return lambda x_ni, x_gt: mirage.vae.decode(mirage.vae.encode(x_gt), mirage.mids(x_ni))


def fit(reconstruct: Reconstruct, params: list[nn.Parameter], args: argparse.Namespace, seed: int) -> None:
    """Train on Eq. 3."""
    lpips = tables.perceptual_loss(args)

    def loss(x_ni: Tensor, x_gt: Tensor) -> Tensor:
        x = reconstruct(x_ni, x_gt).float()
        # L_vae = L_mse + λ1 · L_lpips                                                  Mirage Eq. 3
        return nnf.mse_loss(x, x_gt) + 0.1 * lpips(x, x_gt)

    tables.train(params, loss, args, seed, LR)


METHODS = {"2D VAE": partial(two_d, skips=False), "2D VAE, skips": partial(two_d, skips=True), "3D VAE": three_d,
           "3D VAE, 2D injection": injected}


def main(args: argparse.Namespace) -> None:
    clips, seeds = tables.held_out(args), []
    for seed in range(1, args.seeds + 1):
        folder, results = args.runs / "mirage_table2" / f"seed_{seed}", {}
        for name, trained in METHODS.items():
            def make(to: Path) -> None:
                tables.predict(clips, to, trained(args, seed, folder))
            results[name] = tables.once(folder / name, tables.scored_on(args), make)
        seeds.append(tables.evaluate(args, clips, results, folder / "scores"))
    tables.report("mirage_table2", __doc__, args, {tables.FULL: PAPER}, seeds)


def flags() -> argparse.ArgumentParser:
    return tables.flags(__doc__, steps=100)


if __name__ == "__main__":
    common.start(main, flags())
