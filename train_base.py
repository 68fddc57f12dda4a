"""Train the small bases that stand in for the published weights of CogVideoX, Wan and Stable Diffusion.

    python -m mirage_min.data.toy_world --out data/toy --clips 2000
    python -m mirage_min.data.real_clips --out data/real
    python train_base.py vae_2d   --data data/toy --real data/real/train --perceptual DIR
    python train_base.py vae      --data data/toy --real data/real/train --perceptual DIR
    python train_base.py prior    --data data/toy      # the transformer, as a diffusion model of true videos
    python train_base.py one_step --data data/toy      # DEVIATION: the paper has no such stage, see below
    python train_base.py one_step_2d --data data/toy   # the same of R3D2's UNet, each frame alone

With `--family wan`, vae, prior and one_step train a base of Wan's classes instead of CogVideoX's. With
`--set init=FOLDER` training continues from the network in that folder.

The autoencoders see crops of mixed sizes in many tones (mirage_min/data/crops.py), and their loss weighs coarse tone by
itself: a network that has seen the tones of one drive shifts the others'. The networks are the published classes with
small numbers (mirage_min/networks/small_base.py). The stage `one_step` trains the transformer to predict z_GT from z_NI
in latent space before stage H does so through pixels, and `one_step_2d` the UNet before train_r3d2.py does. The papers
have none, because theirs start from a strong prior; one of four million parameters does not (DEVIATIONS.md).
"""

if __name__ == "__main__":
    from mirage_min.data import desk

    desk.open_up()  # before the imports that take seconds

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from torch import Generator, Tensor, nn
from torch.nn import functional as nnf

from mirage_min.data import desk
from mirage_min.data.crops import Crops
from mirage_min.data.pairs import Pairs
from mirage_min.data.real_clips import RealClips
from mirage_min.method.one_step import T_MIRAGE, T_WAN, add_noise, alpha_bar, denoise, denoise_epsilon, v_target
from mirage_min.method.perceptual import Lpips
from mirage_min.method.schedules import STABLE_DIFFUSION, WAN, VPrediction, config_from_schedule
from mirage_min.networks import small_base, weights
from mirage_min.networks.dit_cogvideox import CogVideoXDiT
from mirage_min.networks.dit_wan import WanDiT
from mirage_min.networks.imagenet import Features
from mirage_min.networks.unet_2d import UNet2D
from mirage_min.networks.vae_2d import AutoencoderKL
from mirage_min.networks.vae_cogvideox import CogVideoXVAE
from mirage_min.networks.vae_wan import WanVAE
from mirage_min.training import checkpoint, processes, run, watch
from mirage_min.training.latents import EachFrame, Latents
from mirage_min.training.transform import begin_as_transform, leave_blocks_out

NETWORKS = {"cogvideox": (CogVideoXVAE, CogVideoXDiT), "wan": (WanVAE, WanDiT)}
SCHEDULERS = {  # scheduler_config.json, by family
    "cogvideox": config_from_schedule(VPrediction(prediction_type="v_prediction", rescale_betas_zero_snr=True,
                                                  snr_shift_scale=1.0)),
    "wan": WAN,
    "2d": config_from_schedule(STABLE_DIFFUSION),
}


@dataclass
class Recipe(run.Optimisation):
    """How a stage is trained."""

    lr: float = 2e-3
    beta2: float = 0.99
    warmup: int = 100
    cosine: bool = True
    frames: int = 9         # of the pairs
    real: float = 0.5       # share of crops from the real clips
    sizes: str = "9x48x48 9x80x80 1x128x192"  # of the autoencoders' crops: one is drawn a step, the first with
                                              # `batch` clips, the others with as many pixels, but two clips at least
    norm_groups: int = 8    # of CogVideoX's VAE
    width: float = 1.0      # factor on the autoencoders' channels
    lambda_lpips: float = 0.1  # of the autoencoders
    decoder_only: bool = False  # of the 3D VAE: the encoder stays as it is, and with it what was trained on its latents
    z_dim: int = 16         # channels of the latents of a new Wan VAE
    patches: bool = False   # of a new Wan VAE: frames enter as patches of 2 x 2 pixels
    transform: bool = False  # a new Wan VAE begins linear, its encoder as a transform (training/transform.py)
    without_blocks: bool = False  # of such a VAE's decoder: its blocks, which add nothing yet, are left out for now
    init: str = ""          # folder of a network to continue from; "": a new one, and for one_step the prior
    bf16: bool = False      # pays where run.Optimisation says
    seed: int = 0


RECIPES = {
    "vae_2d": Recipe(steps=4000, batch=8, sizes="1x64x64 1x96x144 1x192x320"),
    "vae": Recipe(steps=4000, batch=4),
    "vae_wan": Recipe(steps=4000, batch=4, lr=5e-4),  # at three times the rate it does not settle
    "prior": Recipe(steps=1500, batch=16, lr=1e-3),
    "one_step": Recipe(steps=9000, batch=16, lr=1e-3),
    "one_step_2d": Recipe(steps=9000, batch=8, lr=1e-3),
}


# ---- losses: (network, batch, generator, what else they need) -> (loss, its terms, unweighted) -----------------------

def kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL divergence [] of the posterior N(mean, exp(logvar)) to a standard normal, per latent value."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def sample(mean: Tensor, logvar: Tensor, draws: Generator) -> Tensor:
    """One draw of N(mean, exp(logvar)), in the shape of mean [...]; the same on every device."""
    return mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=draws).to(mean.device)


def reconstruction(y: Tensor, x: Tensor, lpips_distance: Lpips, lambda_lpips: float, mean: Tensor, logvar: Tensor):
    """The loss of y, made from x [B, 3, T, H, W] in [-1, 1], and of the posterior between; tone is the L1 of means
    over 16 x 16 pixels."""
    y = rearrange(y.float(), "b c t h w -> (b t) c h w")
    x = rearrange(x, "b c t h w -> (b t) c h w")
    mse, l1 = nnf.mse_loss(y, x), nnf.l1_loss(y, x)
    tone = nnf.avg_pool2d(y - x, 16).abs().mean()
    lpips = lpips_distance(y, x).mean()
    divergence = kl(mean.float(), logvar.float())
    # L = MSE + 0.5 tone + 0.1 L1 + λ_lpips LPIPS + 1e-4 KL
    loss = mse + 0.5 * tone + 0.1 * l1 + lambda_lpips * lpips + 1e-4 * divergence
    return loss, {"mse": mse, "tone": tone, "l1": l1, "lpips": lpips, "kl": divergence}


def vae_2d_loss(model: AutoencoderKL, batch: list[Tensor], draws: Generator, lpips_distance: Lpips,
                lambda_lpips: float):
    """Frames of crops, batch[0] [B, 3, T, H, W] in [-1, 1], through the 2D VAE and back."""
    x = batch[0]
    mean, logvar = model.posterior(rearrange(x, "b c t h w -> (b t) c h w"))
    z = sample(mean, logvar, draws)
    y = rearrange(model.decode(z * model.config.scaling_factor), "(b t) c h w -> b c t h w", b=x.shape[0])
    return reconstruction(y, x, lpips_distance, lambda_lpips, mean, logvar)


def vae_loss(model: CogVideoXVAE | WanVAE, batch: list[Tensor], draws: Generator, lpips_distance: Lpips,
             lambda_lpips: float):
    """Crops, batch[0] [B, 3, T, H, W] in [-1, 1], through the 3D VAE and back, in the same groups as at inference.

    ValueError as in `posterior`.
    """
    x = batch[0]
    mean, logvar = posterior(model, x)
    z = sample(mean, logvar, draws)
    if isinstance(model, WanVAE):  # every grouping computes the same
        y, _ = model.decode_group(model.normalise(z))
    else:
        y = model.decode(z * model.config.scaling_factor)
    return reconstruction(y, x, lpips_distance, lambda_lpips, mean, logvar)


def posterior(model: CogVideoXVAE | WanVAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance [B, C, F, h, w] of the latents of x [B, 3, T, H, W], not normalised.

    ValueError for a number of frames that the VAE would pad: it would train on frames that are none.
    """
    if model.legal_length(x.shape[2]) != x.shape[2]:
        raise ValueError(f"sizes: wanted crops of as many frames as {type(model).__name__} takes whole, got "
                         f"{x.shape[2]}")
    if isinstance(model, WanVAE):  # every grouping computes the same
        mean, logvar, _ = model.posterior_group(x)
        return mean, logvar
    return model.posterior(x)


def prior_loss(model: CogVideoXDiT | WanDiT, batch: list[Tensor], draws: Generator, alpha_bars: Tensor | None):
    """v-prediction on true latents batch[1] [B, C, F, h, w] at a random t, by the schedule alpha_bars [1000]; without
    one, flow matching at a random σ = t / 1000."""
    z0 = batch[1]
    t = torch.randint(1000, (z0.shape[0],), generator=draws)
    eps = torch.randn(z0.shape, generator=draws).to(z0.device)
    if alpha_bars is None:
        sigma = (t / 1000).view(-1, 1, 1, 1, 1).to(z0.device)
        # z_t = (1 − σ) · z0 + σ · ε,  v = ε − z0
        z_t, target = torch.lerp(z0, eps, sigma), eps - z0
    else:
        z_t, target = add_noise(z0, eps, alpha_bars[t]), v_target(z0, eps, alpha_bars[t])
    loss = nnf.mse_loss(model(z_t, t.to(z0.device), empty_prompt(z0)).float(), target)
    return loss, {"v": loss}


def one_step_loss(model: CogVideoXDiT | WanDiT, batch: list[Tensor], draws: Generator, alpha_bars: Tensor | None):
    """z_GT from z_NI in one call; batch = (z_NI, z_GT), each [B, C, F, h, w]."""
    z_ni, z_gt = batch
    t = T_WAN if alpha_bars is None else T_MIRAGE
    z_dr = denoise(model, z_ni, t, empty_prompt(z_ni), alpha_bars)
    loss = nnf.mse_loss(z_dr.float(), z_gt)
    return loss, {"z": loss}


def one_step_2d_loss(model: UNet2D, batch: list[Tensor], draws: Generator, alpha_bars: Tensor):
    """The same by a UNet, each frame alone; batch = (z_NI, z_GT), each [B, C, T, h, w]."""
    z_ni, z_gt = (rearrange(z, "b c t h w -> (b t) c h w") for z in batch)
    z_dr = denoise_epsilon(model, z_ni, T_MIRAGE, empty_prompt(z_ni), alpha_bars)
    loss = nnf.mse_loss(z_dr.float(), z_gt)
    return loss, {"z": loss}


def empty_prompt(z: Tensor) -> Tensor:
    """The embedding [B, 1, D] that all small networks get with latents z [B, C, ...]."""
    return torch.zeros(z.shape[0], 1, small_base.DIT.text_embed_dim, device=z.device)


# ---- data ------------------------------------------------------------------------------------------------------------

def next_batch(data: Crops | Latents, recipe: Recipe, step: int, draws: Generator) -> tuple[tuple, list[str]]:
    """What a step trains on, (crops [n, 3, T, h, w],) or (z_NI, z_GT), and the names of its clips."""
    if isinstance(data, Latents):
        return data.batch(recipe.batch, draws), []
    size = data.draw_size(run.draws(recipe.seed, step))
    crops = [data.crop(size, run.draws(recipe.seed, step, k + 1)) for k in range(data.count(size, recipe.batch))]
    return (torch.stack([x for x, _ in crops]),), [name for _, name in crops]


# ---- stages ----------------------------------------------------------------------------------------------------------

@dataclass
class Stage:
    """What is trained, on what, by which loss(model, batch, draws), and where it goes."""

    model: nn.Module
    data: Crops | Latents
    loss: Callable
    out: Path
    files: list[Path]          # that clips are read from
    judge: Lpips | None = None  # the network of the loss


def build(args, recipe: Recipe) -> Stage:
    """The stage of --stage and --family."""
    wan = args.family == "wan"
    suffix = "_wan" if wan else ""
    VAE, DiT = NETWORKS[args.family]
    base = args.out / f"base{suffix}"
    pairs = Pairs(args.data, recipe.frames)
    if args.stage in ("vae_2d", "vae"):
        real = RealClips(args.real, 9) if args.real else None
        data = Crops(pairs, real, recipe.real, recipe.sizes)
        files = pairs.paths() + (real.paths() if real else [])
        lpips = Lpips(Features("squeeze", args.perceptual)).to(args.device)
        if args.stage == "vae_2d":
            model, loss, out = small_base.new_vae_2d(recipe.width), vae_2d_loss, args.out / "vae_2d"
        else:
            model = small_base.new_vae(args.family, recipe.width, recipe.norm_groups, recipe.z_dim,
                                       recipe.patches)
            loss, out = vae_loss, base / "vae"
            if recipe.transform and (recipe.init or not wan):
                raise ValueError("transform: wanted a new VAE of Wan's (--family wan, no init), got "
                                 + (f"init={recipe.init}" if recipe.init else f"--family {args.family}"))
            if recipe.transform:
                begin_as_transform(model, some_crops(data, recipe))
        loss = partial(loss, lpips_distance=lpips, lambda_lpips=recipe.lambda_lpips)
        return Stage(model, data, loss, out, files, judge=lpips)
    if args.stage == "one_step_2d":
        vae = EachFrame(AutoencoderKL.from_pretrained(args.out, "vae_2d", device=args.device))
        data = Latents(pairs, vae, recipe, args.run.parent / "latents_2d.safetensors")
        loss = partial(one_step_2d_loss, alpha_bars=alpha_bar(zero_terminal_snr=False).to(args.device))
        return Stage(small_base.new_unet(), data, loss, args.out / "base_2d" / "unet", pairs.paths())
    out = base / "transformer"
    alpha_bars = None if wan else alpha_bar().to(args.device)
    vae = VAE.from_pretrained(base, "vae", device=args.device)
    if args.stage == "prior":
        channels = vae.config.z_dim if wan else vae.config.latent_channels
        model, loss = small_base.new_transformer(args.family, channels=channels), prior_loss
    else:
        model, loss = DiT.from_pretrained(recipe.init or out), one_step_loss
    data = Latents(pairs, vae, recipe, args.run.parent / f"latents{suffix}.safetensors")
    return Stage(model, data, partial(loss, alpha_bars=alpha_bars), out, pairs.paths())


def some_crops(data: Crops, recipe: Recipe, batches: int = 64) -> list[Tensor]:
    """Crops that no step draws, each [n, 3, T, h, w]."""
    return [next_batch(data, recipe, -1 - i, run.draws(recipe.seed, -1 - i))[0][0] for i in range(batches)]


def freeze_encoder(model: nn.Module) -> None:
    """Let only the decoder of a 3D VAE be trained. ValueError for another network."""
    if not isinstance(model, CogVideoXVAE | WanVAE):
        raise ValueError(f"decoder_only: wanted the stage vae, got {type(model).__name__}")
    for name, p in model.named_parameters():
        if name.startswith(("encoder.", "quant_conv.")):
            p.requires_grad_(False)


def main(args, recipe: Recipe) -> None:
    torch.manual_seed(recipe.seed)
    stage = build(args, recipe)
    files = stage.files
    if recipe.init:
        stage.model = type(stage.model).from_pretrained(recipe.init)
        files = files + [Path(recipe.init)]
    model = stage.model.train().to(args.device)
    if recipe.decoder_only:
        freeze_encoder(model)
    if recipe.without_blocks:
        leave_blocks_out(model)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    identity = checkpoint.identify(args, recipe, files, nn.ModuleList([model, stage.judge]), params)
    optimizer = run.optimizer(params, recipe)
    start = checkpoint.resume(args.run, params, optimizer, identity, recipe.steps)
    log = watch.Log(args.run, recipe, start)
    desk.say(f"{args.stage}: {sum(p.numel() for p in params.values()):,} parameters, {recipe}")

    bar = run.Steps(args, recipe, start)
    for step in bar:
        draws = run.draws(recipe.seed, step)
        batch, names = next_batch(stage.data, recipe, step, draws)
        optimizer.zero_grad()
        with run.autocast(recipe, args.device):
            loss, terms = stage.loss(model, [x.to(args.device) for x in batch], draws)
        loss.backward()
        terms = {name: value.detach() for name, value in terms.items()}
        norm = torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        processes.check_finite(step, terms, norm, names)
        run.set_rate(optimizer, recipe, step)
        optimizer.step()

        if step % 20 == 0:
            bar.set_postfix(log(step, terms))
        if run.due(step, recipe):
            checkpoint.save(args.run, step + 1, params, optimizer, identity)
    save(args, recipe, stage)
    desk.say(f"{args.stage}: {recipe.steps} steps -> {stage.out}")


def save(args, recipe: Recipe, stage: Stage) -> None:
    """Write the network as the published ones are; a VAE with its latents' scale, what predicts with its schedule."""
    if args.stage == "vae" and not recipe.decoder_only:
        normalise_latents(stage.model, stage.data, recipe)
    if args.stage in ("prior", "one_step_2d"):
        schedule = SCHEDULERS["2d" if args.stage == "one_step_2d" else args.family]
        folder = stage.out.parent / "scheduler"
        folder.mkdir(parents=True, exist_ok=True)
        with weights.whole_file(folder / "scheduler_config.json") as file:
            file.write_text(json.dumps(schedule, indent=2) + "\n")
    stage.model.save_pretrained(stage.out)


@torch.no_grad()
def normalise_latents(model: CogVideoXVAE | WanVAE, data: Crops, recipe: Recipe, batches: int = 32) -> None:
    """Measure what makes latents of unit variance: CogVideoX's one factor, Wan's mean and std for each channel."""
    values = []
    for step in range(recipe.steps, recipe.steps + batches):
        (x,), _ = next_batch(data, recipe, step, run.draws(recipe.seed, step))
        mean, _ = posterior(model, x.to(next(model.parameters()).device))
        values.append(mean.transpose(0, 1).flatten(1))
    z = torch.cat(values, dim=1)                                                         # [C, values]
    if isinstance(model, CogVideoXVAE):
        model.config.scaling_factor = 1 / z.std().item()
    else:
        model.config.latents_mean = tuple(z.mean(1).tolist())
        model.config.latents_std = tuple(z.std(1).tolist())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=desk.first_line(__doc__))
    parser.add_argument("stage", choices=["vae_2d", "vae", "prior", "one_step", "one_step_2d"],
                        help="what is trained, in this order")
    parser.add_argument("--family", choices=["cogvideox", "wan"], default="cogvideox",
                        help="whose classes the 3D VAE and the transformer are (default cogvideox)")
    parser.add_argument("--data", type=Path, default=Path("data/toy"), help="folder of pairs (default data/toy)")
    parser.add_argument("--real", type=Path, help="folder of real clips for the autoencoders' crops (real_clips.py)")
    parser.add_argument("--perceptual", type=Path, default=Path("data/perceptual"),
                        help="folder with squeezenet1_1_features.safetensors, or auto (default data/perceptual)")
    parser.add_argument("--runs", type=Path, default=Path("runs/base"),
                        help="folder for checkpoints, logs and latents (default runs/base)")
    parser.add_argument("--out", type=Path, default=Path("runs/base/weights"),
                        help="where the weights go, and are looked for (default runs/base/weights)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="change a value of the recipe (a wrong key names them all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: cuda if there is one, else cpu")
    args = parser.parse_args()
    is_wan = args.family == "wan" and not args.stage.endswith("_2d")
    name = f"{args.stage}_wan" if is_wan else args.stage
    args.run = args.runs / name
    args.recipe = name if name in RECIPES else args.stage
    del args.runs  # only where things lie
    run.launch(main, args, RECIPES, conv3d=args.stage == "vae")
