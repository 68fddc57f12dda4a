"""Stage H: harmonise, through pixels (Mirage §3.2.2, Eq. 4; ChopGrad Alg. 1).

    x_DR      = D3D[denoise(E3D(x_NI)), z2D_mid],  z2D_mid from E2D(x_NI)
    L_harmon. = L_lpips(x_DR, x_GT) + λ2 · L_gram(x_DR, x_GT)                                      (Mirage Eq. 4)

Trained: the transformer's LoRA and Harmonisation-LoRA. Frozen: the base, and everything of stage A.
The pixel loss goes back through the decoder by ChopGrad, group by group, and once through the transformer.

    python train_harmonize.py --mirage weights --data data/toy --perceptual DIR
"""

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from tqdm import tqdm

from mirage_min import chopgrad, lora, run
from mirage_min.mirage import HARMONISATION, TRANSFORMER, Mirage
from mirage_min.pairs import Pairs
from mirage_min.perceptual import Features, Lpips, gram_loss


@dataclass
class Recipe:
    """Stage H. The defaults are Mirage's (§4.1)."""

    steps: int = 10_000
    batch: int = 8
    frames: int = 9
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
    tiles: int = 1          # the decoder's gradient in tiles x tiles pieces of the frame
    real: float = 0.0
    bf16: bool = True
    seed: int = 2
    every: int = 200


RECIPES = {
    "mirage": Recipe(),
    "chopgrad": Recipe(steps=1_000, batch=1, frames=49, height=720, width=1280, lr=2e-4, beta2=0.99, weight_decay=0.1,
                       warmup=1, gram_from=0, tiles=4),
    # DEVIATION: where full VGG-16 cannot be had, LPIPS on SqueezeNet and Gram on VGG's relu1_2 and relu2_2; and an MSE
    # term, because the small prior does not know what a car in the sun looks like.
    "small": Recipe(steps=700, batch=2, height=96, width=144, lr=1e-3, warmup=50, cosine=True, gram_from=150, mse=2.0,
                    lpips="squeeze", dit_rank=32, dit_alpha=32.0, real=0.1),
}


def main(args, recipe: Recipe) -> None:
    torch.manual_seed(recipe.seed)
    data = Pairs(args.data, args.real, args.real_frames)
    lpips = Lpips(Features(recipe.lpips, args.perceptual)).to(args.device)
    texture = Features(recipe.gram, args.perceptual).to(args.device)
    mirage = Mirage.from_pretrained(args.mirage, args.base, args.vae2d, device=args.device)
    if not list(lora.adapters(mirage.dit, TRANSFORMER)):  # otherwise a stage H is there already and goes on
        mirage.add_lora(TRANSFORMER, recipe.dit_rank, recipe.dit_alpha)
        mirage.add_lora(HARMONISATION, recipe.rank, recipe.alpha)

    # what is trained
    params = {f"{name}.{n}.{m}": p.requires_grad_() for name in (TRANSFORMER, HARMONISATION)
              for n, _, a in lora.adapters(mirage.adapters(name), name) for m, p in a.named_parameters()}
    optimizer = torch.optim.AdamW(params.values(), lr=recipe.lr, betas=(0.9, recipe.beta2),
                                  weight_decay=recipe.weight_decay)
    log = run.Log(args.run, recipe)
    start = run.resume(args.run, params, optimizer)
    print(f"stage H: {sum(p.numel() for p in params.values()):,} trained parameters, {asdict(recipe)}")

    for step in (bar := tqdm(range(start, recipe.steps), initial=start, total=recipe.steps, unit="step")):
        x_ni, x_gt = data.batch(run.draws(recipe.seed, step), recipe.batch, recipe.frames,
                                (recipe.height, recipe.width), recipe.real)
        x_ni, x_gt = mirage.pad(x_ni.to(args.device)), mirage.pad(x_gt.to(args.device))
        terms = {"lpips": 0.0, "gram": 0.0, "mse": 0.0}

        def loss_fn(x_g, where):
            x_g, target = x_g.float(), x_gt[where]
            share = target.numel() / x_gt.numel()
            x, y = (rearrange(v, "b c t h w -> (b t) c h w") for v in (x_g, target))
            # L_harmon. = L_lpips + λ2 · L_gram                                             Mirage Eq. 4
            part = {"lpips": lpips(x, y).mean()}
            if step >= recipe.gram_from:
                with torch.no_grad():
                    taps_y = texture(y)
                part["gram"] = recipe.lambda2 * gram_loss(texture(x), taps_y).mean()
            if recipe.mse:
                part["mse"] = recipe.mse * F.mse_loss(x_g, target)
            for name, value in part.items():
                terms[name] += share * value.detach()
            return share * sum(part.values())

        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * run.schedule(step, recipe.warmup, recipe.steps, recipe.cosine)
        optimizer.zero_grad()
        with torch.autocast(args.device, torch.bfloat16, enabled=recipe.bf16):
            with torch.no_grad():
                z_ni, inject = mirage.vae.encode(x_ni), mirage.mids(x_ni)
            z_dr = mirage.denoise(z_ni)
            # dL/dz_DR, and the decoder's own gradients                                     ChopGrad Alg. 1
            loss, grad_z = chopgrad.backward(mirage.vae, z_dr, loss_fn, recipe.d_trunc, (recipe.tiles, recipe.tiles),
                                             inject=inject)
        z_dr.backward(grad_z)
        run.check_finite(step, loss, terms)
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.step()

        if step % 10 == 0:
            bar.set_postfix({k: f"{v:.4f}" for k, v in log(step, terms).items()})
        if (step + 1) % recipe.every == 0 or step + 1 == recipe.steps:
            run.save(args.run, step + 1, params, optimizer)
    window = min(max(z_dr.shape[2], 3), 9)  # streaming shows the transformer as many latents as it was trained on
    about = run.about(args, recipe) | {"t": str(mirage.t), "window": str(window)}
    mirage.save_stage(args.out / "stage_h.safetensors", [TRANSFORMER, HARMONISATION], about)
    print(f"stage H: {recipe.steps} steps -> {args.out / 'stage_h.safetensors'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data/toy"), help="folder of pairs (default data/toy)")
    parser.add_argument("--mirage", type=Path, default=Path("weights"), help="folder with stage_a.safetensors")
    parser.add_argument("--base", help="folder or hub id of the base, if not the one stage A names")
    parser.add_argument("--vae2d", help="folder or hub id of the AutoencoderKL, if not the one stage A names")
    parser.add_argument("--perceptual", type=Path, help="folder with the weights of LPIPS' backbone and of VGG-16")
    parser.add_argument("--real", type=Path, help="a real video, its own truth, mixed into the batches")
    parser.add_argument("--real-frames", type=int, help="use only so many of its frames")
    parser.add_argument("--out", type=Path, default=Path("weights"), help="where stage_h.safetensors goes")
    parser.add_argument("--run", type=Path, default=Path("runs/stage_h"), help="checkpoints and logs")
    parser.add_argument("--recipe", choices=list(RECIPES), default="small", help="settings (default small)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a value of the recipe")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        main(args, run.override(RECIPES[args.recipe], args.set))
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
