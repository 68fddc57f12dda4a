"""Restorers: train a whole video transformer through pixels, one call at a fixed t (ChopGrad §4.1 to 4.3, C.1 to C.3).

    z_out = z_in − prediction                     Wan; CogVideoX: √ᾱ_t z_in − √(1 − ᾱ_t) v
    L     = λ_latent ‖z_out − z_gt‖² + λ_lpips L_lpips(x_out, x_gt) + λ_mse L_mse + λ_dists L_dists,  x_out = D[z_out]

Trained: every weight of the transformer. Frozen: the VAE, through whose decoder ChopGrad takes the pixel losses.
x_in is made of x_gt: low resolution, or a hole; or it is what the pairs have (artifacts of splats, hidden vehicles).
The result is a folder for infer.py. Two other ways, for comparison: `--set pixel=false` is the paper's ChopGrad*, the
latent loss alone; `--set each_frame=yes` is DOVE's, which takes every frame by itself through encoder and decoder.

    python train_restore.py --recipe small-upscale --vae weights/vae_wan_48 --data data/toy --perceptual DIR
    torchrun --nproc-per-node=4 train_restore.py --recipe dove --base DOVE --prompt empty.safetensors ...
    python train_restore.py --recipe artifacts --base WAN --prompt prompt.safetensors --data pairs --perceptual DIR

A small recipe first learns from latents that were encoded once (`latent_until`), which costs a fraction of a step
through pixels.
"""

if __name__ == "__main__":
    from mirage_min.data import desk

    desk.open_up()  # before the imports that take seconds

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import EllipsisType
from typing import Annotated, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as nnf

from mirage_min.data import desk
from mirage_min.data.degradations import central_mask, low_resolution
from mirage_min.data.masks import hide
from mirage_min.data.pairs import Pairs
from mirage_min.method import chopgrad
from mirage_min.method.one_step import T_WAN
from mirage_min.method.perceptual import Dists, Lpips
from mirage_min.method.schedules import WAN
from mirage_min.networks import checked, frugal, small_base
from mirage_min.networks.dit_wan import wide
from mirage_min.networks.imagenet import Features
from mirage_min.networks.vae_wan import WanVAE
from mirage_min.systems.harmonizer import subfolder
from mirage_min.systems.prompt import read_prompt
from mirage_min.systems.restore import Restorer
from mirage_min.systems.restore_folder import Settings
from mirage_min.training import checkpoint, memory, processes, run, watch
from mirage_min.training.latents import DrawnLatents

Weight = Annotated[float, checked.Within(0)]


@dataclass
class Recipe(run.Recipe):
    """The defaults are those of artifact removal (C.2)."""

    task: Literal["upscale", "artifacts", "inpaint"] = "artifacts"
    degrade: Literal["given", "low resolution", "hole"] = "given"  # of x_in; given: the pairs'
    steps: int = 880
    batch: int = 1
    frames: int = 81
    height: int = 480
    width: int = 832
    lr: float = 1e-5
    beta2: float = 0.99
    weight_decay: float = 0.1
    t: int = T_WAN
    scale: int = 1
    lambda_latent: Weight = 1.0
    lambda_lpips: Weight = 100.0
    lambda_mse: Weight = 0.0
    lambda_dists: Weight = 0.0
    lambda_frame: Weight = 0.0  # of the difference from frame to frame, as in DOVE; wants each_frame
    lpips: str = "vgg"          # LPIPS' backbone
    normalised: bool = True     # of the latent loss: latents of unit variance; False: a channel counts as it varies
    pixel: bool = True          # False: the latent loss alone (ChopGrad*)
    each_frame: bool = False    # DOVE's way through pixels: every frame is encoded and decoded by itself
    latent_until: int = 0       # until this step the latent loss alone, on latents that were encoded once
    latent_clips: int = 600     # how many clips those latents are of
    latent_batch: int = 8       # how many of them a step takes
    d_trunc: int = 1
    tiles: int = 2              # the decoder's gradient in tiles x tiles pieces of the frame
    heads: int = 2              # of a new small transformer, 64 numbers each
    layers: int = 6             # of the same
    checkpoint_decoder: bool = run.may_change(False)
    checkpoint_dit: bool = run.may_change(False)
    shard: bool = run.may_change(False)  # divide the transformer, its gradients and moments among the processes (FSDP2)
    half: bool = run.may_change(False)   # the result is written as float16
    seed: int = 4


SMALL = dict(steps=1_200, batch=1, frames=9, height=96, width=144, lr=1e-3, warmup=50, cosine=True, weight_decay=0.01,
             latent_until=900, lambda_lpips=3.0, lambda_mse=10.0, lpips="squeeze", normalised=False, tiles=1, real=0.2,
             half=True)
RECIPES = {
    # DEVIATION: DOVE's second stage has images too; ChopGrad trains on videos alone, as here. DOVE's MSE is of [0, 1],
    # a quarter of that on [-1, 1]
    "dove": Recipe(task="upscale", degrade="low resolution", steps=500, batch=4, frames=24, height=320, width=640,
                   lr=5e-6, t=399, scale=4, lambda_latent=0.0, lambda_lpips=0.0, lambda_mse=0.25, lambda_dists=0.1,
                   tiles=1),
    "artifacts": Recipe(),
    "inpaint": Recipe(task="inpaint", degrade="hole", steps=475, frames=49),           # 5 epochs of 95 scenes
    "inpaint-boxes": Recipe(task="inpaint", steps=475, frames=49),
    "inpaint-rovi": Recipe(task="inpaint", steps=10_000, frames=29),
    # DEVIATION: LPIPS on SqueezeNet and an MSE term, for the small transformer starts from nothing
    "small-upscale": Recipe(task="upscale", degrade="low resolution", scale=4, **SMALL),
    "small-inpaint": Recipe(task="inpaint", degrade="hole", **SMALL),
}


def build(args, recipe: Recipe) -> tuple[nn.ModuleList, dict[str, nn.Parameter]]:
    """(the restorer, LPIPS, DISTS where it has a weight), and what is trained by name."""
    if recipe.lambda_frame and not recipe.each_frame:
        raise ValueError("lambda_frame: ChopGrad never has two groups of frames at once: wanted each_frame=yes, or 0")
    settings = Settings(recipe.task, recipe.t, recipe.scale, window=window_of(recipe.frames))
    text = read_prompt(args.prompt)[0] if args.prompt else None
    if args.base:
        restorer = Restorer.from_base(args.base, settings, text, args.vae, dtype=None if recipe.bf16 else torch.float32)
        restorer.dit.float()
    else:
        torch.manual_seed(recipe.seed)
        vae = frugal.apply(WanVAE.from_pretrained(args.vae, subfolder(args.vae, "vae"), dtype=torch.float32))
        dit = small_base.new_transformer("wan", recipe.heads, vae.config.z_dim, recipe.layers)
        text = torch.zeros(1, 1, dit.config.text_dim) if text is None else text
        restorer = Restorer(vae, dit, text, WAN, settings).requires_grad_(False).eval()
    if not (recipe.normalised or isinstance(restorer.vae, WanVAE)):
        raise ValueError("normalised: CogVideoX's latents have one factor for all channels: wanted a Wan VAE, or yes")
    restorer.dit.activation_checkpointing = recipe.checkpoint_dit
    restorer.dit.requires_grad_()
    judges = [Lpips(Features(recipe.lpips, args.perceptual))]
    if recipe.lambda_dists:
        vgg = judges[0].features if recipe.lpips == "vgg" else Features("vgg", args.perceptual)
        judges.append(Dists(vgg))
    return nn.ModuleList([restorer, *judges]), trained(restorer)


def window_of(frames: int) -> int:
    """How many latents the transformer sees at once in a stream: as in training, but an odd number, and 5 at least."""
    latents = (frames + 2) // 4 + 1
    return max(5, latents - (latents + 1) % 2)


def trained(restorer: Restorer) -> dict[str, nn.Parameter]:
    """All of the transformer's parameters, by name."""
    return {f"transformer.{name}": p for name, p in restorer.dit.named_parameters()}


# ---- data ------------------------------------------------------------------------------------------------------------

def degrade(restorer: Restorer, recipe: Recipe, x: Tensor, x_gt: Tensor, draws: torch.Generator) -> Tensor:
    """x_in [3, T, H, W], as large as the truth: made of x_gt or, where the pairs have it already, x."""
    if recipe.degrade == "hole":
        return hide(x_gt, central_mask(*x_gt.shape[-2:]))
    if recipe.degrade == "given":
        return x
    return restorer.enlarge(low_resolution(x_gt, recipe.scale, draws)[None])[0]


def read(data: Pairs, restorer: Restorer, recipe: Recipe, step: int, clips: range) -> tuple[Tensor, Tensor, list[str]]:
    """These clips of a step's batch: x_in, x_gt [n, 3, T, H, W] in [-1, 1] and their names; on the CPU."""
    pairs, names = [], []
    for k in clips:
        draws = run.draws(recipe.seed, step, k)
        x, x_gt, name = data.batch([draws], recipe.real, recipe.varied)
        pairs.append((degrade(restorer, recipe, x[0], x_gt[0], draws), x_gt[0]))
        names += name
    x_in, x_gt = map(torch.stack, zip(*pairs))
    return x_in, x_gt, names


class Degraded:
    """Held-out pairs whose first video is degraded as in training, each the same at every reading."""

    def __init__(self, pairs: Pairs, restorer: Restorer, recipe: Recipe):
        self.pairs, self.degrade, self.crops = pairs, partial(degrade, restorer, recipe), pairs.crops

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, i: int, integer) -> tuple[Tensor, Tensor]:
        """As Pairs.read."""
        x, x_gt = self.pairs.read(i, integer)
        return self.degrade(x, x_gt, run.draws(0, i)), x_gt


# ---- the losses ------------------------------------------------------------------------------------------------------

def latent_loss(restorer: Restorer, recipe: Recipe, z_in: Tensor, z_gt: Tensor, share: float,
                terms: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """z_in, z_gt [n, C, F, h, w] -> (z_out, λ_latent times its share of the batch's mean square)."""
    z_out = restorer.denoise(z_in)
    # L_latent = ‖z_out − z_gt‖²                                                        ChopGrad C.2
    error = wide(z_out) - wide(z_gt)
    if not recipe.normalised:
        std = torch.tensor(restorer.vae.config.latents_std, dtype=error.dtype, device=error.device)
        error = error * std.view(-1, 1, 1, 1)
    mse = error.square().mean()
    terms["latent"] += share * mse.detach()
    return z_out, share * recipe.lambda_latent * mse


def forward_and_backward(models: nn.ModuleList, recipe: Recipe, x_in: Tensor, x_gt: Tensor,
                         terms: dict[str, Tensor]) -> None:
    """Forward and backward for some of a step's clips x_in, x_gt [n, 3, T, H, W] in [-1, 1].

    Their share of the batch's gradient is added to .grad, and their share of each term of the loss, unweighted, to
    `terms`.
    """
    restorer, lpips_distance, *dists = models
    x_in, x_gt = restorer.pad(x_in), restorer.pad(x_gt)

    def pixel_loss(x_out, where):
        x_out, target = x_out.to(x_gt.dtype), x_gt[where]
        x, y = (rearrange(v, "b c t h w -> (b t) c h w") for v in (x_out, target))
        found = {}
        if recipe.lambda_lpips:
            found["lpips"] = lpips_distance(x, y).mean()
        if recipe.lambda_mse:
            found["mse"] = nnf.mse_loss(x, y)
        if recipe.lambda_dists:
            found["dists"] = dists[0](x, y).mean()
        if recipe.lambda_frame:
            found["frame"] = nnf.l1_loss(x_out.diff(dim=2), target.diff(dim=2))
        share = target.numel() / (recipe.batch * x_gt[0].numel())  # of the pixels of the whole batch
        for name, value in found.items():
            terms[name] += share * value.detach()
        # L_pixel = λ_lpips L_lpips (C.2), or λ_mse L_mse + λ_dists L_dists (§4.1)        ChopGrad §4
        return share * sum(getattr(recipe, f"lambda_{name}") * value for name, value in found.items())

    with autocast(recipe, x_gt.device):
        with torch.no_grad():
            encode = partial(encode_each_frame, restorer.vae) if recipe.each_frame else restorer.vae.encode
            z_in, z_gt = encode(x_in), encode(x_gt)
        z_out, loss = latent_loss(restorer, recipe, z_in, z_gt, len(x_gt) / recipe.batch, terms)
        if recipe.pixel and recipe.each_frame:
            grad_z = backward_each_frame(restorer.vae, z_out, pixel_loss)
        elif recipe.pixel:
            # dL_pixel / dz_out                                                          ChopGrad Alg. 1
            _, grad_z = chopgrad.backward(restorer.vae, z_out, pixel_loss, recipe.d_trunc,
                                          (recipe.tiles, recipe.tiles), checkpoint=recipe.checkpoint_decoder)
    if recipe.pixel:
        torch.autograd.backward([loss, z_out], [None, grad_z])  # once through the transformer, for both losses
    else:
        loss.backward()


def autocast(recipe: Recipe, device: str | torch.device) -> torch.autocast:
    """run.autocast; without copies in bfloat16 if the transformer is sharded, for they would make it whole again."""
    return run.autocast(recipe, device, keep_copies=not recipe.shard)


def encode_each_frame(vae: nn.Module, x: Tensor) -> Tensor:
    """x [B, 3, T, H, W] -> [B, C, T, h, w]: a latent for each frame, which knows of no other (DOVE)."""
    z = vae.encode(rearrange(x, "b c t h w -> (b t) c 1 h w"))
    return rearrange(z, "(b t) c 1 h w -> b c t h w", b=len(x))


def backward_each_frame(vae: nn.Module, z: Tensor, pixel_loss: Callable[[Tensor, EllipsisType], Tensor]) -> Tensor:
    """dL_pixel / dz of z [B, C, T, h, w], each latent decoded to a frame by itself, all in one graph (DOVE)."""
    z = z.detach().requires_grad_()
    x = vae.decode(rearrange(z, "b c t h w -> (b t) c 1 h w"))
    loss = pixel_loss(rearrange(x, "(b t) c 1 h w -> b c t h w", b=len(z)), ...)
    return torch.autograd.grad(loss, z)[0]


def main(args, recipe: Recipe) -> None:
    args.vae = args.vae or (None if args.base else "weights/vae_wan_48")
    data, val = run.open_data(args, recipe)
    models, params = build(args, recipe)
    restorer, lpips, *_ = models
    val = val and Degraded(val, restorer, recipe)
    identity = checkpoint.identify(args, recipe, data.paths(), models, params)
    processes.print_once(f"restorer: {recipe}\ntrained: {run.count(params)}")
    processes.print_once(memory.plan(models, forward_and_backward, recipe, args.device, processes.world(),
                                     params.values()))
    if recipe.shard:
        processes.shard(restorer.dit, args.device, trained=True)
        params = trained(restorer)
    models.to(args.device)
    optimizer = run.optimizer(params, recipe)
    start = checkpoint.resume(args.run, params, optimizer, identity, recipe.steps)
    log = watch.Log(args.run, recipe, start)
    draw = partial(read, data, restorer, recipe)
    cached = None
    if start < recipe.latent_until:
        cached = DrawnLatents(draw, restorer.vae, recipe, args.run / "latents.safetensors", identity)
    shown = [x.to(args.device) for x in draw(0, range(1))[:2]]

    @torch.no_grad()
    def restore(x_in, x_gt):
        with autocast(recipe, x_in.device):  # x_in is as large as the truth already
            return restorer.restore(x_in)

    bar = run.Steps(args, recipe, start)
    for step in bar:
        terms, names = defaultdict(float), []
        optimizer.zero_grad()
        if step < recipe.latent_until:
            z_in, z_gt = cached.batch(recipe.latent_batch, run.draws(recipe.seed, step))
            with autocast(recipe, args.device):
                share = 1 / processes.world()  # every process computes the same
                _, loss = latent_loss(restorer, recipe, z_in.to(args.device), z_gt.to(args.device), share, terms)
            loss.backward()
        else:
            for clips in processes.pieces(recipe):
                x_in, x_gt, drawn = draw(step, clips)
                forward_and_backward(models, recipe, x_in.to(args.device), x_gt.to(args.device), terms)
                names += drawn
        processes.reduce(params, terms)
        norm = processes.whole(torch.nn.utils.clip_grad_norm_(params.values(), 1.0))
        processes.check_finite(step, terms, norm, names)
        run.set_rate(optimizer, recipe, step)
        optimizer.step()

        if step % 10 == 0:
            bar.set_postfix(log(step, terms))
        if run.due(step, recipe):
            log.report(step, restore, shown, val, lpips)
            checkpoint.save(args.run, step + 1, params, optimizer, identity)
    save(args, recipe, restorer)


def save(args, recipe: Recipe, restorer: Restorer) -> None:
    """Write the folder for infer.py; a VAE that was given stays where it is."""
    dit = processes.whole_network(restorer.dit)
    if processes.rank() == 0:
        restorer.dit = dit.half() if recipe.half else dit
        restorer.save_pretrained(args.out, args.vae and run.seen_from(args.out, args.vae), run.about(recipe))
        desk.say(f"restorer: {recipe.steps} steps -> {args.out}")


if __name__ == "__main__":
    parser = run.flags(__doc__, "restore", RECIPES)
    parser.set_defaults(recipe="small-upscale")
    parser.add_argument("--base", help="folder or hub id of a CogVideoX or Wan (default: a small new transformer)")
    parser.add_argument("--vae", help="folder or hub id of its VAE (default: the base's; without one "
                                      "weights/vae_wan_48)")
    parser.add_argument("--prompt", type=Path, help="the prompt's embedding (encode_prompt.py; default: zeros)")
    run.launch(main, parser.parse_args(), RECIPES)
