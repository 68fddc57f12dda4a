"""Stage H: harmonise, through pixels (Mirage §3.2.2, Eq. 4; ChopGrad Alg. 1).

    x_DR      = D3D[denoise(E3D(x_NI)), z2D_mid],  z2D_mid from E2D(x_NI)
    L_harmon. = L_lpips(x_DR, x_GT) + λ2 · L_gram(x_DR, x_GT)                                      (Mirage Eq. 4)

Trained: the transformer's LoRA and Harmonisation-LoRA. Frozen: the base, and everything of stage A.
The pixel loss goes back through the decoder by ChopGrad, group by group, and once through the transformer.

    python train_harmonize.py --mirage weights --data data/toy --perceptual DIR
    torchrun --nproc-per-node=8 train_harmonize.py --recipe mirage --mirage my_run --out my_run ...
    python train_harmonize.py --recipe chopgrad --mirage my_run --out my_run_long ...     # its batch is one clip

Where --mirage holds a stage H already, as in the last line, that one is trained on.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from mirage_min.data.pairs import Pairs
from mirage_min.method import chopgrad, lora
from mirage_min.method.perceptual import Features, Lpips, gram_loss
from mirage_min.networks import weights
from mirage_min.systems.mirage import HARMONISATION, RECONSTRUCTION, TRANSFORMER, Mirage
from mirage_min.training import memory, run, watch


@dataclass
class Recipe:
    """Stage H. The defaults are Mirage's (§4.1)."""

    steps: int = 10_000
    batch: int = 8          # clips a step, over all processes
    accumulate: int = 1     # pieces in which a process works through its clips
    frames: int = 9         # padded to what the VAE takes, as height and width are; the padding counts in the loss
    height: int = 512
    width: int = 768
    lr: float = 1e-4
    beta2: float = 0.999
    weight_decay: float = 0.01
    warmup: int = 500
    cosine: bool = False
    lambda2: float = 0.1
    gram_from: int = 2_000  # the step from which the Gram loss counts
    mse: float = 0.0        # DEVIATION: a weight of MSE, which the paper does not use in stage H
    lpips: str = "vgg"
    gram: str = "vgg"
    rank: int = 16          # of Harmonisation-LoRA; Mirage gives no ranks, these are ChopGrad B.4's
    alpha: float = 16.0
    dit_rank: int = 128
    dit_alpha: float = 64.0
    d_trunc: int = 1
    tiles: int = 1          # the decoder's gradient in tiles x tiles pieces of the frame, of which each has its Gram
    checkpoint_decoder: bool = False
    checkpoint_dit: bool = False
    shard: bool = False     # the frozen transformer's weights divided among the processes (FSDP2)
    real: float = 0.0       # share of clips from the real video
    real_frames: int = 0    # use only so many of its frames; 0: all
    bf16: bool = True
    seed: int = 2
    every: int = 200        # steps between checkpoints, pictures and validations


RECIPES = {
    "mirage": Recipe(),
    "chopgrad": Recipe(steps=1_000, batch=1, frames=49, height=720, width=1280, lr=2e-4, beta2=0.99, weight_decay=0.1,
                       warmup=1, gram_from=0, tiles=4),
    # DEVIATION: where full VGG-16 cannot be had, LPIPS on SqueezeNet and Gram on VGG's relu1_2 and relu2_2; and an MSE
    # term, because the small prior does not know what a car in the sun looks like.
    "small": Recipe(steps=700, batch=2, height=96, width=144, lr=1e-3, warmup=50, cosine=True, gram_from=150, mse=2.0,
                    lpips="squeeze", dit_rank=32, dit_alpha=32.0, real=0.1),
}


def gradients(models: nn.ModuleList, recipe: Recipe, x_ni: Tensor, x_gt: Tensor, terms: dict[str, Tensor],
              step: float = math.inf) -> None:
    """Forward, loss and backward of some of a step's clips: adds to `terms` and to the gradients their share."""
    mirage, lpips, texture = models
    mirage.dit.activation_checkpointing = recipe.checkpoint_dit

    def loss_fn(x_g, where):
        x_g, target = x_g.to(x_gt.dtype), x_gt[where]
        x, y = (rearrange(v, "b c t h w -> (b t) c h w") for v in (x_g, target))
        # L_harmon. = L_lpips + λ2 · L_gram                                                 Mirage Eq. 4
        part = {"lpips": lpips(x, y).mean()}
        if step >= recipe.gram_from:
            with torch.no_grad():
                taps_y = texture(y)
            part["gram"] = recipe.lambda2 * gram_loss(texture(x), taps_y).mean()
        if recipe.mse:
            part["mse"] = recipe.mse * F.mse_loss(x_g, target)
        share = target.numel() / (recipe.batch * x_gt[0].numel())  # of the pixels of the whole batch
        for name, value in part.items():
            terms[name] += share * value.detach()
        return share * sum(part.values())

    with torch.autocast(x_gt.device.type, torch.bfloat16, enabled=recipe.bf16):
        with torch.no_grad():
            z_ni, inject = mirage.vae.encode(x_ni), mirage.mids(x_ni)
        z_dr = mirage.denoise(z_ni)
        # dL/dz_DR, and the decoder's own gradients                                         ChopGrad Alg. 1
        _, grad_z = chopgrad.backward(mirage.vae, z_dr, loss_fn, recipe.d_trunc, (recipe.tiles, recipe.tiles),
                                      inject=inject, checkpoint=recipe.checkpoint_decoder)
    z_dr.backward(grad_z)


def main(args, recipe: Recipe) -> None:
    torch.manual_seed(recipe.seed)
    pieces, size = run.pieces(recipe), (recipe.height, recipe.width)
    data = Pairs(args.data, recipe.frames, size, args.real, recipe.real_frames)
    val = Pairs(args.val, recipe.frames) if args.val else None
    for pair in data.left_out + (val.left_out if val else []):
        run.say("left out:", pair)
    settings = run.settings(args, recipe, data.names)
    mirage = Mirage.from_pretrained(args.mirage, args.base, args.vae2d, dtype=None if recipe.bf16 else torch.float32)
    for name, rank, alpha in ((TRANSFORMER, recipe.dit_rank, recipe.dit_alpha),
                              (HARMONISATION, recipe.rank, recipe.alpha)):
        if list(lora.adapters(mirage.adapters(name), name)):
            run.say(f"{name}-LoRA goes on from {args.mirage / 'stage_h.safetensors'}, with the rank that it has there")
        else:
            mirage.add_lora(name, rank, alpha)
    lpips, texture = Lpips(Features(recipe.lpips, args.perceptual)), Features(recipe.gram, args.perceptual)
    models = nn.ModuleList([mirage, lpips, texture])

    # what is trained
    params = {f"{name}.{n}.{m}": p.requires_grad_() for name in (TRANSFORMER, HARMONISATION)
              for n, _, a in lora.adapters(mirage.adapters(name), name) for m, p in a.named_parameters()}
    run.say(f"stage H: {recipe}\ntrained: {run.count(params)}")
    run.say(memory.plan(models, gradients, recipe, run.world(), args.device))
    if recipe.shard:
        run.shard(mirage.dit, args.device)
    models.to(args.device)
    optimizer = torch.optim.AdamW(params.values(), lr=recipe.lr, betas=(0.9, recipe.beta2),
                                  weight_decay=recipe.weight_decay)
    start = run.resume(args.run, params, optimizer, settings)
    log = watch.Log(args.run, recipe, start)

    def batch(step: int, clips: range):
        x_ni, x_gt, names = data.batch([run.draws(recipe.seed, step, k) for k in clips], recipe.real)
        return mirage.pad(x_ni.to(args.device)), mirage.pad(x_gt.to(args.device)), names

    @torch.no_grad()
    @torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=recipe.bf16)
    def now(x_ni, x_gt):
        return mirage(x_ni)

    shown = batch(0, range(1))
    for step in (bar := tqdm(range(start, recipe.steps), initial=start, total=recipe.steps, unit="step",
                             disable=run.rank() > 0)):
        terms, clips = {"lpips": 0.0, "gram": 0.0, "mse": 0.0}, []
        optimizer.zero_grad()
        for piece in pieces:
            x_ni, x_gt, names = batch(step, piece)
            gradients(models, recipe, x_ni, x_gt, terms, step)
            clips += names
        run.reduce(params, terms)
        norm = torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        run.check_finite(step, terms, norm, clips)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * run.schedule(step, recipe.warmup, recipe.steps, recipe.cosine)
        optimizer.step()

        if step % 10 == 0:
            bar.set_postfix(log(step, terms))
        if (step + 1) % recipe.every == 0 or step + 1 == recipe.steps:
            log.look(step, now, shown[:2], val, lpips)
            run.save(args.run, step + 1, params, optimizer, settings)
    if run.rank() == 0:
        _, about_a = weights.load_tensors(args.mirage / "stage_a.safetensors")
        about = run.about(args, recipe, about_a)
        if args.out.resolve() != args.mirage.resolve():  # a folder holds both stages
            about_a |= {key: about[key] for key in ("base", "vae2d") if key in about}  # as they are called from there
            mirage.save_stage(args.out / "stage_a.safetensors", [RECONSTRUCTION], about_a, fusion=True)
            prompt = weights.load_tensors(args.mirage / "prompt.safetensors")
            weights.save_tensors(args.out / "prompt.safetensors", *prompt)
        latents = (mirage.vae.legal_length(recipe.frames) - 1) // 4 + 1
        patch = getattr(mirage.dit.config, "patch_size_t", None) or 1
        window = min(max(latents, 2 * patch + 1), 9)  # streaming shows as many latents as were trained on, if it can
        about |= {"t": str(mirage.t), "window": str(window)}
        mirage.save_stage(args.out / "stage_h.safetensors", [TRANSFORMER, HARMONISATION], about)
        print(f"stage H: {recipe.steps} steps -> {args.out / 'stage_h.safetensors'}")


if __name__ == "__main__":
    parser = run.flags(__doc__, "stage_h", RECIPES)
    parser.add_argument("--mirage", type=Path, default=Path("weights"),
                        help="folder with stage_a.safetensors, and perhaps a stage_h to go on from (default weights)")
    parser.add_argument("--base", help="folder or hub id of the base, if not the one stage A names")
    parser.add_argument("--vae2d", help="folder or hub id of the AutoencoderKL, if not the one stage A names")
    run.launch(main, parser.parse_args(), RECIPES)
