"""Mirage Table 1 and Figure 4 in the small: naive insertion, a per-frame one-step baseline, and Mirage.

    python -m experiments.mirage_table1 --perceptual DIR

    R3D2       its recipe on the small 2D VAE: each frame alone, one step at t = 199, skip connections from zero,
               LPIPS + 0.5 Gram. Its transformer, of the same shape as ours, first learns z_GT from z_NI in the 2D
               latents, as the 3D base did (train_base.py one_step): once for all seeds, 20 times the steps of the
               pixel stage, 18 frames each
    Mirage     stages A and H by their scripts

Both with 2 MSE, LPIPS on SqueezeNet and Gram on what VGG there is (recipe `small`). Identity over a long clip (Fig. 4):
the mean colour of the actor's pixels minus that of the truth's, frame by frame; its deviation over the frames, in
1/255, is the drift. mirage_fig4.png shows the actor at three frames of the first clip.
"""

import argparse
from dataclasses import replace

import matplotlib
import torch
import torch.nn.functional as F
from einops import rearrange

from experiments import common
from experiments.common import SkipVAE, framewise
from mirage_min.method import lora, metrics
from mirage_min.method.one_step import alpha_bar, denoise
from mirage_min.networks import weights
from mirage_min.networks.dit_cogvideox import CogVideoXDiT
from mirage_min.networks.vae_2d import AutoencoderKL
from mirage_min.systems.mirage import Mirage

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend comes first)

METRICS = "PSNR", "SSIM", "LPIPS", "DISTS", "E*warp", "vFID"
PAPER = {region: {method: dict(zip(METRICS, row)) for method, row in rows.items()} for region, rows in {
    "actor-centric crops": {"naive insertion": (14.93, 0.307, 0.209, 0.236, 0.801, 0.506),
                            "R3D2": (16.18, 0.356, 0.188, 0.207, 1.119, 0.442),
                            "Mirage": (17.43, 0.390, 0.179, 0.183, 0.874, 0.448)},
    "full frame": {"naive insertion": (27.56, 0.921, 0.112, 0.091, 7.423, 0.244),
                   "R3D2": (27.61, 0.904, 0.072, 0.055, 11.320, 0.206),
                   "Mirage": (28.60, 0.914, 0.069, 0.054, 9.955, 0.178)}}.items()}
LR, T_ONE_STEP, LONG = 1e-3, 199, 49  # of recipe `small`; Mirage §3.2; frames of a long clip


def one_step(dit, z):
    """z_NI [N, 4, h, w] of single frames -> z_DR"""
    text = torch.zeros(len(z), dit.config.max_text_seq_length, dit.config.text_embed_dim)
    return denoise(dit, z[:, :, None], T_ONE_STEP, text, alpha_bar())[:, :, 0]


def prior(args) -> CogVideoXDiT:
    """The baseline's transformer, trained to name z_GT from z_NI; made once."""
    vae = AutoencoderKL.from_pretrained(args.weights / "vae_2d").requires_grad_(False)
    channels = vae.config.latent_channels
    config = CogVideoXDiT.from_pretrained(args.weights / "base", "transformer").config
    torch.manual_seed(0)
    dit = CogVideoXDiT(replace(config, in_channels=channels, out_channels=channels))
    long = argparse.Namespace(**vars(args) | {"steps": 20 * args.steps})

    def make(to):
        torch.nn.init.zeros_(dit.proj_out.weight)  # starts at z0 = √ᾱ z
        torch.nn.init.zeros_(dit.proj_out.bias)

        def loss(x_ni, x_gt):
            with torch.no_grad():
                z_ni, z_gt = (vae.encode(rearrange(x, "b c t h w -> (b t) c h w")) for x in (x_ni, x_gt))
            return F.mse_loss(one_step(dit, z_ni).float(), z_gt.float())
        common.train(dit.parameters(), loss, long, 0, LR, size=(96, 144))
        weights.save_tensors(to / "transformer.safetensors", dit.state_dict())
    folder = common.once(args.runs / "mirage_table1" / "prior", common.trained_with(long), make)
    dit.load_state_dict(weights.load_tensors(folder / "transformer.safetensors")[0])
    return dit


def per_frame(args, seed: int):
    """The trained baseline as a function of (x_ni, x_gt)."""
    dit = prior(args)
    torch.manual_seed(seed)
    model = SkipVAE(AutoencoderKL.from_pretrained(args.weights / "vae_2d")).requires_grad_(False)
    lora.add(model.vae.decoder, "lora", 16, 16.0)

    def harmonise(frames):
        with torch.no_grad():
            z, mids = model.vae.encode(frames), model.vae.mids(frames)
        return model.decode(one_step(dit, z), mids)

    judge = common.perceptual_loss(args, gram=0.5, mse=2.0)
    params = [*dit.parameters(), *lora.parameters(model.vae.decoder, "lora"), *model.skips.parameters()]
    common.train(params, lambda x_ni, x_gt: judge(framewise(harmonise, x_ni), x_gt), args, seed, LR, size=(96, 144))
    return lambda x_ni, x_gt: framewise(harmonise, x_ni)


def ours(args, seed: int):
    """Both stages; any length, as a stream."""
    mirage = Mirage.from_pretrained(common.harmonised(args, seed))
    return lambda x_ni, x_gt: torch.stack(list(mirage.stream(x_ni[0].unbind(1))), dim=1)[None]


def drift(clips, folder, key: str) -> float:
    """Deviation over the frames of the actor's mean colour minus the truth's, in 1/255; mean over clips."""
    found = []
    for path in sorted(clips.glob("*.safetensors")):
        truth, x = weights.load_tensors(path)[0], weights.load_tensors(folder / path.name)[0][key].float()
        mask = truth["actor"].float() / 255
        shown = mask.sum(dim=(0, 2, 3)) > 0
        error = ((x - truth["x_gt"].float()) * mask).sum(dim=(2, 3)) / mask.sum(dim=(2, 3))          # [3, T]
        error = error[:, shown]
        if shown.sum() > 1:
            found.append((error - error.mean(dim=1, keepdim=True)).square().sum(dim=0).mean().sqrt().item())
    return sum(found) / len(found)


def figure_4(args, clips, results) -> None:
    """The actor at the first, the middle and the last frame that shows it: naive, each method, truth."""
    path = min(clips.glob("*.safetensors"))
    truth = weights.load_tensors(path)[0]
    H, W = truth["x_gt"].shape[-2:]
    crops = metrics.actor_crops(truth["boxes"], H, W)
    shown = [t for t, crop in enumerate(crops) if crop]
    rows = {"naive insertion": truth["x_ni"], "truth": truth["x_gt"]}
    rows |= {name: weights.load_tensors(folder / path.name)[0]["x_dr"] for name, folder in results.items()}
    figure, axes = plt.subplots(len(rows), 3, figsize=(8, 2 * len(rows)), layout="constrained")
    for line, (name, x) in zip(axes, rows.items()):
        for axis, t in zip(line, (shown[0], shown[len(shown) // 2], shown[-1])):
            ys, xs = crops[t]
            axis.imshow(rearrange(x[:, t, ys, xs], "c h w -> h w c"))
            axis.set_title(f"{name}, frame {t}", fontsize=8)
            axis.set_axis_off()
    args.out.mkdir(parents=True, exist_ok=True)
    with weights.whole_file(args.out / "mirage_fig4.png") as file:
        figure.savefig(file, format="png", dpi=80)


def main(args) -> None:
    short = common.held_out(args)
    few = argparse.Namespace(**vars(args) | {"clips": min(8, args.clips)})
    long, seeds, drifts = common.held_out(few, LONG), [], []
    for seed in range(1, args.seeds + 1):
        folder = args.runs / "mirage_table1" / f"seed_{seed}"
        methods = {"R3D2": per_frame, "Mirage": ours}

        def make(to, train):
            model = train(args, seed)
            for clips, name in ((short, "short"), (long, "long")):
                (to / name).mkdir(exist_ok=True)
                common.predict(clips, to / name, model)
        made = {name: common.once(folder / name, common.scored_on(args), lambda to: make(to, train))
                for name, train in methods.items()}
        seeds.append(common.evaluate(args, short, {name: to / "short" for name, to in made.items()}, folder / "scores"))
        drifts.append({"naive insertion": drift(long, long, "x_ni")}
                      | {name: drift(long, to / "long", "x_dr") for name, to in made.items()})
    seeds[0]["remarks"][f"drift of the actor's colour over {LONG} frames, of 255"] = ", ".join(
        f"{name} {' '.join(f'{each[name]:.1f}' for each in drifts)}" for name in drifts[0])
    figure_4(args, long, {name: to / "long" for name, to in made.items()})
    common.report("mirage_table1", __doc__, args, PAPER, seeds, {"drift": drifts})


if __name__ == "__main__":
    main(common.arguments(__doc__, steps=100))
