"""Train the small bases that stand in for the published weights of CogVideoX, Wan and AutoencoderKL.

    python -m mirage_min.data.toy_world --out data/toy --clips 2000
    python -m mirage_min.data.real_clips --out data/real
    python train_base.py vae_2d   --data data/toy --real data/real/train --perceptual DIR
    python train_base.py vae      --data data/toy --real data/real/train --perceptual DIR
    python train_base.py prior    --data data/toy      # the transformer, as a diffusion model of true videos
    python train_base.py one_step --data data/toy      # DEVIATION: the paper has no such stage, see below

With `--family wan`, vae, prior and one_step train a base of Wan's classes instead of CogVideoX's.

The autoencoders see every clip under one photometric variation (mirage_min/data/photometric.py), in crops of mixed
sizes, and their loss weighs coarse tone by itself: a network that has seen the tones of one drive shifts the others'.

The networks are the published classes with small numbers. The stage `one_step` trains the transformer to predict z_GT
from z_NI in latent space before stage H does so through pixels. The paper has none, because its transformer starts from
a strong prior; one of four million parameters does not (DEVIATIONS.md).
"""

import argparse
import copy
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from mirage_min.data.pairs import Pairs
from mirage_min.data.photometric import vary
from mirage_min.data.real_clips import RealClips
from mirage_min.method.one_step import T_MIRAGE, T_WAN, add_noise, alpha_bar, denoise, v_target
from mirage_min.method.perceptual import Features, Lpips
from mirage_min.method.schedules import VPrediction, config_from_schedule
from mirage_min.networks.dit_cogvideox import CogVideoXDiT, CogVideoXDiTConfig
from mirage_min.networks.dit_wan import WanDiT, WanDiTConfig
from mirage_min.networks.vae_2d import AutoencoderKL, AutoencoderKLConfig
from mirage_min.networks.vae_cogvideox import CogVideoXVAE, CogVideoXVAEConfig
from mirage_min.networks.vae_wan import WanVAE, WanVAEConfig
from mirage_min.training import run, watch

SMALL_VAE_2D = AutoencoderKLConfig(block_out_channels=(16, 32, 32, 32), norm_num_groups=8, layers_per_block=1,
                                   latent_channels=4)
SMALL_VAE = CogVideoXVAEConfig(block_out_channels=(16, 32, 64, 64), norm_num_groups=8, layers_per_block=1)
SMALL_VAE_WAN = WanVAEConfig(base_dim=16, num_res_blocks=1, latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16)
SMALL_DIT = CogVideoXDiTConfig(num_attention_heads=3, num_layers=6, time_embed_dim=64, text_embed_dim=16,
                               max_text_seq_length=1, sample_height=12, sample_width=18,
                               use_rotary_positional_embeddings=True)
SMALL_DIT_WAN = WanDiTConfig(num_attention_heads=3, attention_head_dim=64, text_dim=16, freq_dim=64, ffn_dim=768,
                             num_layers=6)
SCHEDULER_WAN = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "flow_shift": 3.0}
SCHEDULER = config_from_schedule(VPrediction(prediction_type="v_prediction", rescale_betas_zero_snr=True,
                                             snr_shift_scale=1.0))


@dataclass
class Recipe:
    """What a stage costs and how it goes about it. The learning rate warms up linearly and falls as a cosine."""

    steps: int
    batch: int
    frames: int = 9         # of the pairs
    lr: float = 2e-3
    beta2: float = 0.99
    warmup: int = 100
    weight_decay: float = 0.01
    real: float = 0.5       # share of crops from the real clips
    sizes: str = "9x48x48 9x80x80 1x128x192"  # of the autoencoders' crops: one is drawn a step, the first with
                                              # `batch` clips, the others with as many pixels, but two clips at least
    norm_groups: int = 8    # of CogVideoX's VAE
    width: float = 1.0      # factor on the autoencoders' channels
    bf16: bool = False      # on a CPU that multiplies it natively
    seed: int = 0
    every: int = 200        # steps between checkpoints


RECIPES = {
    "vae_2d": Recipe(steps=4000, batch=8, sizes="1x64x64 1x96x144 1x192x320"),
    "vae": Recipe(steps=4000, batch=4),
    "vae_wan": Recipe(steps=4000, batch=4, lr=5e-4),  # at three times the rate it does not settle
    "prior": Recipe(steps=1500, batch=16, lr=1e-3),
    "one_step": Recipe(steps=9000, batch=16, lr=1e-3),
}


def kl(mean, logvar):
    """Of the posterior to a standard normal, per latent value."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def reconstruction(y, x, lpips, mean, logvar):
    """L = MSE + 0.5 tone + 0.1 L1 + 0.1 LPIPS + 1e-4 KL; tone is the L1 of means over 16 x 16 pixels."""
    y = rearrange(y.float(), "b c t h w -> (b t) c h w")
    x = rearrange(x, "b c t h w -> (b t) c h w")
    tone = F.avg_pool2d(y - x, 16).abs().mean()
    return {"mse": F.mse_loss(y, x), "tone": 0.5 * tone, "l1": 0.1 * F.l1_loss(y, x), "lpips": 0.1 * lpips(y, x).mean(),
            "kl": 1e-4 * kl(mean.float(), logvar.float())}


def vae_2d_loss(model, batch, draws, lpips):
    """Frames through the 2D VAE and back."""
    x = batch[0]
    frames = rearrange(x, "b c t h w -> (b t) c h w")
    mean, logvar = model.posterior(frames)
    z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=draws)
    y = rearrange(model.decode(z * model.config.scaling_factor), "(b t) c h w -> b c t h w", b=x.shape[0])
    return reconstruction(y, x, lpips, mean, logvar)


def vae_loss(model, batch, draws, lpips):
    """Clips of one group through the 3D VAE and back."""
    x = batch[0]
    mean, logvar, _ = model.posterior_group(x)
    z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=draws)
    # Wan's latents are normalised only after training; CogVideoX's are scaled as its decoder undoes it.
    y, _ = model.decode_group(z * getattr(model.config, "scaling_factor", 1.0))
    return reconstruction(y, x, lpips, mean, logvar)


def prior_loss(model, batch, draws, schedule):
    """v-prediction on true latents at a random t; without a schedule, flow matching at a random σ = t / 1000."""
    z0 = batch[1]
    t = torch.randint(1000, (z0.shape[0],), generator=draws)
    eps = torch.randn(z0.shape, generator=draws)
    if schedule is None:
        sigma = (t / 1000).view(-1, 1, 1, 1, 1)
        # z_t = (1 − σ) · z0 + σ · ε,  v = ε − z0
        z_t, target = torch.lerp(z0, eps, sigma), eps - z0
    else:
        z_t, target = add_noise(z0, eps, schedule[t]), v_target(z0, eps, schedule[t])
    return {"v": F.mse_loss(model(z_t, t, empty_prompt(z0.shape[0])).float(), target)}


def one_step_loss(model, batch, draws, schedule):
    """z_GT from z_NI in one call."""
    z_ni, z_gt = batch
    t = T_WAN if schedule is None else T_MIRAGE
    z_dr = denoise(model, z_ni, t, empty_prompt(z_ni.shape[0]), schedule)
    return {"z": F.mse_loss(z_dr.float(), z_gt)}


def empty_prompt(batch: int) -> Tensor:
    """The embedding [batch, 1, D] that both small transformers are given."""
    return torch.zeros(batch, 1, SMALL_DIT.text_embed_dim)


@torch.no_grad()
def new_transformer(family: str = "cogvideox") -> CogVideoXDiT | WanDiT:
    """A transformer that starts as nothing: every block's gates and the output are zero (adaLN-zero, DiT)."""
    if family == "wan":
        model = WanDiT(SMALL_DIT_WAN)
        time_proj = model.condition_embedder.time_proj
        for k in (2, 5):  # of shift, scale, gate, for attention and for the feed-forward layers
            time_proj.weight.view(6, -1, time_proj.in_features)[k].zero_()
            time_proj.bias.view(6, -1)[k].zero_()
            for block in model.blocks:
                block.scale_shift_table[:, k].zero_()
        for block in model.blocks:  # cross-attention has no gate
            block.attn2.to_out[0].weight.zero_()
            block.attn2.to_out[0].bias.zero_()
        model.proj_out.weight.zero_()
        model.proj_out.bias.zero_()
        return model
    model = CogVideoXDiT(SMALL_DIT)
    for block in model.transformer_blocks:
        for norm in (block.norm1, block.norm2):  # the thirds are shift, scale, gate for the video, then for the text
            for k in (2, 5):
                norm.linear.weight.view(6, -1, norm.linear.in_features)[k].zero_()
                norm.linear.bias.view(6, -1)[k].zero_()
    model.proj_out.weight.zero_()
    model.proj_out.bias.zero_()
    return model


class Latents:
    """The pairs as latents, as they are and mirrored, encoded once and kept in a file.

    ValueError if the file is there and holds those of other pairs or of another VAE.
    """

    def __init__(self, pairs: Pairs, vae: CogVideoXVAE | WanVAE, recipe: Recipe, file: Path):
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


@torch.no_grad()
def quiet_posterior(model) -> None:
    """Start with little noise on the latents (std e^-2), or decoders first learn to ignore them."""
    last = model.encoder.conv_out.conv if isinstance(model, CogVideoXVAE) else model.quant_conv
    last.bias.chunk(2)[1].sub_(4)


class Crops:
    """Crops of toy and real clips at mixed sizes, each clip under one photometric variation."""

    def __init__(self, pairs: Pairs, real: RealClips | None, recipe: Recipe):
        self.pairs, self.real, self.recipe = pairs, real, recipe
        self.toy = pairs.read(0, lambda n: 0)[0].shape[-2:]
        self.sizes = [tuple(map(int, size.split("x"))) for size in recipe.sizes.split()]

    def batch(self, step: int) -> tuple[Tensor, list[str]]:
        """The crops of a step, [n, 3, T, h, w] in [-1, 1], and the names of their clips."""
        draws = run.draws(self.recipe.seed, step)
        T, h, w = size = self.sizes[int(torch.randint(len(self.sizes), (), generator=draws))]
        first = self.sizes[0]
        # two: PyTorch's CPU chooses a convolution that is many times slower for one small clip
        n = max(2, round(self.recipe.batch * first[0] * first[1] * first[2] / (T * h * w)))
        crops = [self.crop(size, run.draws(self.recipe.seed, step, k + 1)) for k in range(n)]
        return torch.stack([x for x, _ in crops]), [name for _, name in crops]

    def crop(self, size: tuple[int, int, int], draws: torch.Generator) -> tuple[Tensor, str]:
        """One crop [3, T, h, w]: real where the toy clips are smaller than it, else by the recipe's share."""
        T, h, w = size
        H, W = self.toy
        if self.real and (h > H or w > W or torch.rand((), generator=draws) < self.recipe.real):
            x, name = self.real.crop((h, w), draws, T)
        else:
            i, side, t = (int(torch.randint(n, (), generator=draws)) for n in (len(self.pairs), 2, 10**6))
            x = self.pairs.read(i, lambda n: 0)[side]                  # the naive insertion, or the truth
            t %= x.shape[1] - T + 1
            y, z = (int(torch.randint(n + 1, (), generator=draws)) for n in (x.shape[2] - h, x.shape[3] - w))
            x, name = x[:, t : t + T, y : y + h, z : z + w], self.pairs.names[i]
        return vary(x, draws), name


def widened(config, recipe: Recipe):
    """The small autoencoder's config with the recipe's width and groups."""
    config = copy.copy(config)
    if isinstance(config, WanVAEConfig):
        config.base_dim = round(config.base_dim * recipe.width)
        return config
    config.block_out_channels = tuple(round(c * recipe.width) for c in config.block_out_channels)
    if isinstance(config, CogVideoXVAEConfig):
        config.norm_num_groups = recipe.norm_groups
    return config


def main(args, recipe: Recipe) -> None:
    torch.manual_seed(recipe.seed)
    wan = args.family == "wan" and args.stage != "vae_2d"
    base, folder = args.out / ("base_wan" if wan else "base"), args.runs / (args.stage + "_wan" * wan)
    pixels = args.stage in ("vae_2d", "vae")
    pairs = Pairs(args.data, recipe.frames)
    real = RealClips(args.real, 9) if args.real else None
    settings = run.settings(args, recipe, pairs.names + (real.names if real else []))
    if pixels:
        what = Lpips(Features("squeeze", args.perceptual))
        data = Crops(pairs, real, recipe)
        if args.stage == "vae_2d":
            model, loss, out = AutoencoderKL(widened(SMALL_VAE_2D, recipe)), vae_2d_loss, args.out / "vae_2d"
        else:
            VAE, config = (WanVAE, SMALL_VAE_WAN) if wan else (CogVideoXVAE, SMALL_VAE)
            model, loss, out = VAE(widened(config, recipe)), vae_loss, base / "vae"
    else:
        what, out = None if wan else alpha_bar(), base / "transformer"
        loss = prior_loss if args.stage == "prior" else one_step_loss
        VAE, DiT = (WanVAE, WanDiT) if wan else (CogVideoXVAE, CogVideoXDiT)
        model = new_transformer(args.family) if args.stage == "prior" else DiT.from_pretrained(out)
        vae = VAE.from_pretrained(base, "vae")
        data = Latents(pairs, vae, recipe, args.runs / f"latents{'_wan' * wan}.safetensors")
    if pixels:
        quiet_posterior(model)
    model.train()
    params = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(params.values(), lr=recipe.lr, betas=(0.9, recipe.beta2),
                                  weight_decay=recipe.weight_decay)
    start = run.resume(folder, params, optimizer, settings)
    log = watch.Log(folder, recipe, start)
    print(f"{args.stage}: {sum(p.numel() for p in params.values()):,} parameters, {asdict(recipe)}")

    for step in (bar := tqdm(range(start, recipe.steps), initial=start, total=recipe.steps, unit="step")):
        draws = run.draws(recipe.seed, step)
        batch = data.batch(step) if pixels else data.batch([draws] * recipe.batch, 0)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
            terms = loss(model, batch, draws, what)

        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * run.schedule(step, recipe.warmup, recipe.steps, cosine=True)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        terms = {name: value.detach() for name, value in terms.items()}
        norm = torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        run.check_finite(step, terms, norm, batch[1] if pixels else [])
        optimizer.step()

        if step % 20 == 0:
            bar.set_postfix(log(step, terms))
        if (step + 1) % recipe.every == 0 or step + 1 == recipe.steps:
            run.save(folder, step + 1, params, optimizer, settings)
    if args.stage == "prior":
        (base / "scheduler").mkdir(parents=True, exist_ok=True)
        (base / "scheduler" / "scheduler_config.json").write_text(
            json.dumps(SCHEDULER_WAN if wan else SCHEDULER, indent=2) + "\n")
    if args.stage == "vae":
        normalise_latents(model, data, recipe)
    model.save_pretrained(out)
    print(f"{args.stage}: {recipe.steps} steps -> {out}")


@torch.no_grad()
def normalise_latents(model, data: Crops, recipe: Recipe, batches: int = 32) -> None:
    """Measure what makes latents of unit variance: CogVideoX's one factor, Wan's mean and std for each channel."""
    z = torch.cat([model.posterior_group(data.batch(recipe.steps + k)[0])[0].transpose(0, 1).flatten(1)
                   for k in range(batches)], dim=1)                    # [C, values]
    if isinstance(model, CogVideoXVAE):
        model.config.scaling_factor = 1 / z.std().item()
    else:
        model.config.latents_mean = tuple(z.mean(1).tolist())
        model.config.latents_std = tuple(z.std(1).tolist())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stage", choices=["vae_2d", "vae", "prior", "one_step"], help="what is trained, in this order")
    parser.add_argument("--family", choices=["cogvideox", "wan"], default="cogvideox",
                        help="whose classes the 3D VAE and the transformer are (default cogvideox)")
    parser.add_argument("--data", type=Path, default=Path("data/toy"), help="folder of pairs (default data/toy)")
    parser.add_argument("--real", type=Path, help="folder of real clips for the autoencoders' crops (real_clips.py)")
    parser.add_argument("--perceptual", type=Path, default=Path("data/perceptual"),
                        help="folder with squeezenet1_1_features.safetensors, for LPIPS (default data/perceptual)")
    parser.add_argument("--out", type=Path, default=Path("weights"),
                        help="where the weights go (default weights: in place of the shipped ones)")
    parser.add_argument("--runs", type=Path, default=Path("runs/base"), help="checkpoints and logs (default runs/base)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="change a value of the recipe (a wrong key names them all)")
    args = parser.parse_args()
    try:
        recipe = run.override(RECIPES.get(f"{args.stage}_{args.family}", RECIPES[args.stage]), args.set)
        run.check(recipe)
        main(args, recipe)
    except (ValueError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
