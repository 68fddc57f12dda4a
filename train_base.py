"""Train the small base that stands in for published weights: in the paper it comes from CogVideoX and AutoencoderKL.

    python -m mirage_min.data.toy_world --out data/toy --clips 2000
    python train_base.py vae_2d   --data data/toy --perceptual DIR
    python train_base.py vae      --data data/toy --perceptual DIR
    python train_base.py prior    --data data/toy      # the transformer, as a diffusion model of true videos
    python train_base.py one_step --data data/toy      # DEVIATION: the paper has no such stage, see below

The networks are CogVideoX's and AutoencoderKL's classes with small numbers. The stage `one_step` trains the
transformer to name z_GT from z_NI in latent space before stage H does so through pixels. The paper has none, because
its transformer starts from a strong prior; one of four million parameters does not (DEVIATIONS.md).
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from tqdm import tqdm

from mirage_min.data.pairs import Pairs
from mirage_min.method.one_step import add_noise, alpha_bar, denoise, v_target
from mirage_min.method.perceptual import Features, Lpips
from mirage_min.networks.dit_cogvideox import CogVideoXDiT, CogVideoXDiTConfig
from mirage_min.networks.vae_2d import AutoencoderKL, AutoencoderKLConfig
from mirage_min.networks.vae_cogvideox import CogVideoXVAE, CogVideoXVAEConfig
from mirage_min.training import run, watch

SMALL_VAE_2D = AutoencoderKLConfig(block_out_channels=(16, 32, 32, 32), norm_num_groups=8, layers_per_block=1,
                                   latent_channels=4)
SMALL_VAE = CogVideoXVAEConfig(block_out_channels=(16, 32, 64, 64), norm_num_groups=8, layers_per_block=1)
SMALL_DIT = CogVideoXDiTConfig(num_attention_heads=3, num_layers=6, time_embed_dim=64, text_embed_dim=16,
                               max_text_seq_length=1, sample_height=12, sample_width=18,
                               use_rotary_positional_embeddings=True)
T_ONE_STEP = 199  # Mirage §3.2
SCHEDULER = {"_class_name": "CogVideoXDDIMScheduler",
             "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
             "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "snr_shift_scale": 1.0}


@dataclass
class Recipe:
    """What a stage costs and how it goes about it. The learning rate warms up linearly and falls as a cosine."""

    steps: int
    batch: int
    height: int = 64
    width: int = 64
    frames: int = 9
    lr: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.01
    real: float = 0.15      # share of crops from the real clip
    real_frames: int = 0    # use only so many of its frames; 0: all
    bf16: bool = True
    seed: int = 0
    every: int = 200        # steps between checkpoints


RECIPES = {
    "vae_2d": Recipe(steps=600, batch=8, frames=1, lr=2e-3),
    "vae": Recipe(steps=4000, batch=2),
    "prior": Recipe(steps=1500, batch=16, height=96, width=144, lr=1e-3, real=0.0),
    "one_step": Recipe(steps=9000, batch=16, height=96, width=144, lr=1e-3, real=0.0),
}


def kl(mean, logvar):
    """Of the posterior to a standard normal, per latent value."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def reconstruction(y, x, lpips, mean, logvar):
    """L = MSE + 0.1 L1 + 0.1 LPIPS + 1e-4 KL"""
    y, frames = y.float(), lambda v: rearrange(v, "b c t h w -> (b t) c h w")
    return {"mse": F.mse_loss(y, x), "l1": 0.1 * F.l1_loss(y, x), "lpips": 0.1 * lpips(frames(y), frames(x)).mean(),
            "kl": 1e-4 * kl(mean.float(), logvar.float())}


def vae_2d_loss(model, batch, draws, lpips):
    """Frames through the 2D VAE and back."""
    x = batch[1]
    frames = rearrange(x, "b c t h w -> (b t) c h w")
    mean, logvar = model.posterior(frames)
    z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=draws)
    y = rearrange(model.decode(z * model.config.scaling_factor), "(b t) c h w -> b c t h w", b=x.shape[0])
    return reconstruction(y, x, lpips, mean, logvar)


def vae_loss(model, batch, draws, lpips):
    """Clips of one group through the 3D VAE and back."""
    x = batch[1]
    mean, logvar, _ = model.posterior_group(x)
    z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=draws)
    return reconstruction(model.decode(z * model.config.scaling_factor), x, lpips, mean, logvar)


def prior_loss(model, batch, draws, schedule):
    """v-prediction on true latents at a random t."""
    z0 = batch[1]
    t = torch.randint(1000, (z0.shape[0],), generator=draws)
    eps = torch.randn(z0.shape, generator=draws)
    v = model(add_noise(z0, eps, schedule[t]), t, torch.zeros(z0.shape[0], 1, SMALL_DIT.text_embed_dim))
    return {"v": F.mse_loss(v.float(), v_target(z0, eps, schedule[t]))}


def one_step_loss(model, batch, draws, schedule):
    """z_GT from z_NI in one call."""
    z_ni, z_gt = batch
    text = torch.zeros(z_ni.shape[0], 1, SMALL_DIT.text_embed_dim)
    return {"z": F.mse_loss(denoise(model, z_ni, T_ONE_STEP, text, schedule).float(), z_gt)}


@torch.no_grad()
def new_transformer() -> CogVideoXDiT:
    """A transformer that starts as nothing: every block's gates and the output are zero (adaLN-zero, DiT)."""
    model = CogVideoXDiT(SMALL_DIT)
    for block in model.transformer_blocks:
        for norm in (block.norm1, block.norm2):  # the thirds are shift, scale, gate for the video, then for the text
            for k in (2, 5):
                norm.linear.weight.view(6, -1, norm.linear.in_features)[k].zero_()
                norm.linear.bias.view(6, -1)[k].zero_()
    model.proj_out.weight.zero_(), model.proj_out.bias.zero_()
    return model


class Latents:
    """The pairs as latents, as they are and mirrored, encoded once and kept in a file.

    ValueError if the file is there and holds those of other pairs or of another VAE.
    """

    def __init__(self, pairs: Pairs, vae: CogVideoXVAE, recipe: Recipe, file: Path):
        of = {"pairs": str(len(pairs)), "first": pairs.names[0], "last": pairs.names[-1],
              "vae": f"{sum(p.double().sum().item() for p in vae.encoder.parameters()):.6f}"}  # of what encodes
        if not file.exists():
            z = None  # one tensor from the first clip on: many small ones, kept between large ones, hold the heap open
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
                for i in tqdm(range(len(pairs)), desc="encoding", unit="clip"):
                    x = torch.stack(pairs.read(i, lambda n: 0))                          # [NI and GT, 3, T, H, W]
                    both = torch.stack([vae.encode(x), vae.encode(x.flip(-1))]).half()   # [2, 2, 16, F, h, w]
                    if z is not None and both.shape[1:] != z.shape[1:]:
                        raise ValueError(f"{pairs.names[i]}: wanted clips of one size, got latents "
                                         f"{list(both.shape[2:])} after {list(z.shape[2:])}")
                    z = both.new_empty(2 * len(pairs), *both.shape[1:]) if z is None else z
                    z[2 * i : 2 * i + 2] = both
            file.parent.mkdir(parents=True, exist_ok=True)
            run.weights.save_tensors(file, {"z": z}, of)
        tensors, found = run.weights.load_tensors(file)
        if found != of:
            raise ValueError(f"{file}: wanted latents of {of}, got {found}: remove it, or give --runs another folder")
        self.z = tensors["z"]                                                            # [2 N, 2, 16, F, h, w]

    def batch(self, draws, real):
        z = self.z[torch.randint(len(self.z), (len(draws),), generator=draws[0])].float()
        return z[:, 0], z[:, 1]


def main(args, recipe: Recipe) -> None:
    torch.manual_seed(recipe.seed)
    base, folder = args.out / "base", args.runs / args.stage
    pixels = args.stage in ("vae_2d", "vae")
    data = Pairs(args.data, recipe.frames, (recipe.height, recipe.width) if pixels else None, args.real,
                 recipe.real_frames)
    settings = run.settings(args, recipe, data.names)
    if pixels:
        what = Lpips(Features("squeeze", args.perceptual))
        if args.stage == "vae_2d":
            model, loss, out = AutoencoderKL(SMALL_VAE_2D), vae_2d_loss, args.out / "vae_2d"
        else:
            model, loss, out = CogVideoXVAE(SMALL_VAE), vae_loss, base / "vae"
    else:
        what, out = alpha_bar(), base / "transformer"
        loss = prior_loss if args.stage == "prior" else one_step_loss
        model = new_transformer() if args.stage == "prior" else CogVideoXDiT.from_pretrained(out)
        data = Latents(data, CogVideoXVAE.from_pretrained(base, "vae"), recipe, args.runs / "latents.safetensors")
    model.train()
    params = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(params.values(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    start = run.resume(folder, params, optimizer, settings)
    log = watch.Log(folder, recipe, start)
    print(f"{args.stage}: {sum(p.numel() for p in params.values()):,} parameters, {asdict(recipe)}")

    for step in (bar := tqdm(range(start, recipe.steps), initial=start, total=recipe.steps, unit="step")):
        draws = run.draws(recipe.seed, step)
        batch = data.batch([draws] * recipe.batch, recipe.real)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
            terms = loss(model, batch, draws, what)

        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * run.schedule(step, recipe.warmup, recipe.steps, cosine=True)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        terms = {name: value.detach() for name, value in terms.items()}
        norm = torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        run.check_finite(step, terms, norm, batch[2] if pixels else [])
        optimizer.step()

        if step % 20 == 0:
            bar.set_postfix(log(step, terms))
        if (step + 1) % recipe.every == 0 or step + 1 == recipe.steps:
            run.save(folder, step + 1, params, optimizer, settings)
    if args.stage == "prior":
        (base / "scheduler").mkdir(parents=True, exist_ok=True)
        (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2) + "\n")
    if args.stage == "vae":
        model.config.scaling_factor = 1 / latent_std(model, data, recipe)
    model.save_pretrained(out)
    print(f"{args.stage}: {recipe.steps} steps -> {out}")


@torch.no_grad()
def latent_std(model, data, recipe) -> float:
    """The standard deviation of latents, whose inverse becomes scaling_factor."""
    x = data.batch([run.draws(recipe.seed, recipe.steps)] * 16)[1]
    return (model.encode(x) / model.config.scaling_factor).std().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stage", choices=list(RECIPES), help="what is trained, in the order above")
    parser.add_argument("--data", type=Path, default=Path("data/toy"), help="folder of pairs (default data/toy)")
    parser.add_argument("--real", type=Path, help="a real video, its own truth, mixed into the VAEs' crops")
    parser.add_argument("--perceptual", type=Path, default=Path("data/perceptual"),
                        help="folder with squeezenet1_1_features.safetensors, for LPIPS (default data/perceptual)")
    parser.add_argument("--out", type=Path, default=Path("weights"),
                        help="where the weights go (default weights: in place of the shipped ones)")
    parser.add_argument("--runs", type=Path, default=Path("runs/base"), help="checkpoints and logs (default runs/base)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="change a value of the recipe (a wrong key names them all)")
    args = parser.parse_args()
    try:
        recipe = run.override(RECIPES[args.stage], args.set)
        run.check(recipe)
        main(args, recipe)
    except (ValueError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
