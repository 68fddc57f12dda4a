"""Mirage Table 2 in the small: four ways to decode, each trained alike on reconstruction (Eqs. 2 and 3).

    python -m experiments.mirage_table2 --perceptual DIR

    2D VAE              AutoencoderKL, frame by frame, LoRA of rank 16 on its decoder
    2D VAE, skips       the same, and R3D2's skip connections from the encoder's view of x_NI
    3D VAE              CogVideoX's, LoRA of rank 16 on its decoder
    3D VAE, 2D injection   stage A, as train_vae.py trains it

All see z of x_GT; the 2D features and skips see x_NI. Same steps, batch, crops, loss (MSE + 0.1 LPIPS on SqueezeNet)
and learning rate. Not the paper's: bases of 0.3 and 2.6 million parameters, 4 and 16 channels of latents, toy scenes.
"""

import torch
import torch.nn.functional as F

from experiments import common
from experiments.common import SkipVAE, framewise
from mirage_min.method import lora
from mirage_min.networks.vae_2d import AutoencoderKL
from mirage_min.networks.vae_cogvideox import CogVideoXVAE
from mirage_min.systems.mirage import Mirage

PAPER = {"2D VAE": {"PSNR": 30.30, "LPIPS": 0.040, "vFID": 0.112},
         "2D VAE, skips": {"PSNR": 32.70, "LPIPS": 0.043, "vFID": 0.106},
         "3D VAE": {"PSNR": 33.98, "LPIPS": 0.041, "vFID": 0.080},
         "3D VAE, 2D injection": {"PSNR": 35.07, "LPIPS": 0.039, "vFID": 0.079}}
LR = 3e-3


def two_d(args, seed: int, skips: bool):
    """The trained 2D VAE as a function of (x_ni, x_gt)."""
    torch.manual_seed(seed)
    model = SkipVAE(AutoencoderKL.from_pretrained(args.weights / "vae_2d")).requires_grad_(False)
    lora.add(model.vae.decoder, "lora", 16, 16.0)

    def reconstruct(x_ni, x_gt):
        def frames(ni, gt):
            with torch.no_grad():
                z, mids = model.vae.encode(gt), model.vae.mids(ni)
            return model.decode(z, mids)
        return framewise(frames, x_ni, x_gt)

    params = lora.parameters(model.vae.decoder, "lora") + (list(model.skips.parameters()) if skips else [])
    fit(reconstruct, params, args, seed)
    return reconstruct


def three_d(args, seed: int):
    """The trained 3D VAE without injection."""
    torch.manual_seed(seed)
    vae = CogVideoXVAE.from_pretrained(args.weights / "base", "vae").requires_grad_(False)
    lora.add(vae.decoder, "lora", 16, 16.0)

    def reconstruct(x_ni, x_gt):
        with torch.no_grad():
            z = vae.encode(x_gt)
        return vae.decode(z)

    fit(reconstruct, lora.parameters(vae.decoder, "lora"), args, seed)
    return reconstruct


def injected(args, seed: int, folder):
    """Stage A, by the script that trains it."""
    settings = common.trained_with(args, lr=LR)
    mirage = Mirage.from_pretrained(common.once(folder, settings, lambda to: common.stage_a(args, to, seed, lr=LR)))
    return lambda x_ni, x_gt: mirage.vae.decode(mirage.vae.encode(x_gt), mirage.mids(x_ni))


def fit(reconstruct, params, args, seed: int) -> None:
    """Eq. 3."""
    lpips = common.perceptual_loss(args)

    def loss(x_ni, x_gt):
        # L_vae = L_mse + λ1 · L_lpips                                                      Mirage Eq. 3
        x = reconstruct(x_ni, x_gt).float()
        return F.mse_loss(x, x_gt) + 0.1 * lpips(x, x_gt)

    common.train(params, loss, args, seed, LR)


def main(args) -> None:
    clips, seeds = common.held_out(args), []
    methods = {"2D VAE": lambda seed, to: two_d(args, seed, skips=False),
               "2D VAE, skips": lambda seed, to: two_d(args, seed, skips=True),
               "3D VAE": lambda seed, to: three_d(args, seed),
               "3D VAE, 2D injection": lambda seed, to: injected(args, seed, to.parent / "model of stage A")}
    for seed in range(1, args.seeds + 1):
        folder = args.runs / "mirage_table2" / f"seed_{seed}"
        results = {name: common.once(folder / name, common.scored_on(args),
                                     lambda to: common.predict(clips, to, make(seed, to)))
                   for name, make in methods.items()}
        seeds.append(common.evaluate(args, clips, results, folder / "scores"))
    common.report("mirage_table2", __doc__, args, {"full frame": PAPER}, seeds)


if __name__ == "__main__":
    main(common.arguments(__doc__, steps=100))
