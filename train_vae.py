"""Stage A: adapt the 3D decoder to injected 2D features (Mirage §3.2.1, Eq. 2, Eq. 3).

    x_RO  = D3D[E3D(x_GT), z2D_mid],  z2D_mid from E2D(x_NI)                                       (Mirage Eq. 2)
    L_vae = L_mse(x_RO, x_GT) + λ1 · L_lpips(x_RO, x_GT)                                           (Mirage Eq. 3)

Trained: the fusion blocks and Reconstruction-LoRA. Frozen: everything else. The transformer takes no part.

    python train_vae.py --base weights/base --vae2d weights/vae_2d --data data/toy --perceptual DIR
"""

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from tqdm import tqdm

from mirage_min import chopgrad, injection, lora, run, weights
from mirage_min.mirage import RECONSTRUCTION, Mirage
from mirage_min.pairs import Pairs
from mirage_min.perceptual import Features, Lpips


@dataclass
class Recipe:
    """Stage A. The defaults are Mirage's (§4.1)."""

    steps: int = 10_000
    batch: int = 8
    frames: int = 9
    height: int = 512
    width: int = 768
    lr: float = 1e-4
    beta2: float = 0.999
    weight_decay: float = 0.01
    warmup: int = 1         # the paper warms up stage H only
    cosine: bool = False    # after the warm-up the paper's rate is constant
    lambda1: float = 0.1
    lpips: str = "vgg"
    rank: int = 16          # of Reconstruction-LoRA; Mirage gives none, ChopGrad B.4 has 16
    alpha: float = 16.0
    d_trunc: int = 1
    real: float = 0.0       # share of clips from the real video
    bf16: bool = True
    seed: int = 1
    every: int = 200


RECIPES = {
    "mirage": Recipe(),
    "chopgrad": Recipe(height=480, width=832, lr=2e-4, beta2=0.99),
    # DEVIATION: the small model has no full VGG-16 (LPIPS on SqueezeNet), a larger rate and few steps.
    "small": Recipe(steps=1500, batch=2, height=96, width=96, lr=3e-3, warmup=50, cosine=True,
                    lpips="squeeze", real=0.25),
}


def main(args, recipe: Recipe) -> None:
    torch.manual_seed(recipe.seed)
    data = Pairs(args.data, args.real, args.real_frames)
    lpips = Lpips(Features(recipe.lpips, args.perceptual)).to(args.device)
    text = weights.load_tensors(args.prompt)[0]["text"] if args.prompt else None
    mirage = Mirage.from_base(args.base, args.vae2d, text, device=args.device)
    mirage.add_lora(RECONSTRUCTION, recipe.rank, recipe.alpha)

    # what is trained
    params = {f"fusion.{n}": p.requires_grad_() for n, p in mirage.vae.fusion.named_parameters()}
    params |= {f"{n}.{m}": p for n, _, a in lora.adapters(mirage.vae.decoder, RECONSTRUCTION)
               for m, p in a.named_parameters()}
    optimizer = torch.optim.AdamW(params.values(), lr=recipe.lr, betas=(0.9, recipe.beta2),
                                  weight_decay=recipe.weight_decay)
    log = run.Log(args.run, recipe)
    print(f"stage A: {sum(p.numel() for p in params.values()):,} trained parameters, {asdict(recipe)}")

    def batch(step: int):
        x_ni, x_gt = data.batch(run.draws(recipe.seed, step), recipe.batch, recipe.frames,
                                (recipe.height, recipe.width), recipe.real)
        return mirage.pad(x_ni.to(args.device)), mirage.pad(x_gt.to(args.device))

    def encode(x_ni, x_gt):
        with torch.no_grad():
            return mirage.vae.encode(x_gt), mirage.mids(x_ni)

    # the two streams' scales: measured once, on the untrained decoder, and kept with the fusion blocks
    scales = injection.measure_scales(mirage.vae, *encode(*batch(0)))
    print("std of (decoder stream, 2D features), finest first:", scales)
    start = run.resume(args.run, params, optimizer)

    for step in (bar := tqdm(range(start, recipe.steps), initial=start, total=recipe.steps, unit="step")):
        x_ni, x_gt = batch(step)
        terms = {"mse": 0.0, "lpips": 0.0}

        def loss_fn(x_g, where):
            x_g, target = x_g.float(), x_gt[where]
            share = target.numel() / x_gt.numel()
            frames = [rearrange(v, "b c t h w -> (b t) c h w") for v in (x_g, target)]
            # L_vae = L_mse + λ1 · L_lpips                                                  Mirage Eq. 3
            mse, perceptual = share * F.mse_loss(x_g, target), share * recipe.lambda1 * lpips(*frames).mean()
            terms["mse"] += mse.detach()
            terms["lpips"] += perceptual.detach()
            return mse + perceptual

        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * run.schedule(step, recipe.warmup, recipe.steps, recipe.cosine)
        optimizer.zero_grad()
        with torch.autocast(args.device, torch.bfloat16, enabled=recipe.bf16):
            # x_RO = D3D[E3D(x_GT), z2D_mid], its loss and gradients group by group         Mirage Eq. 2
            z, inject = encode(x_ni, x_gt)
            loss, _ = chopgrad.backward(mirage.vae, z, loss_fn, recipe.d_trunc, inject=inject)
        run.check_finite(step, loss, terms)
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.step()

        if step % 10 == 0:
            bar.set_postfix({k: f"{v:.4f}" for k, v in log(step, terms).items()})
        if (step + 1) % recipe.every == 0 or step + 1 == recipe.steps:
            run.save(args.run, step + 1, params, optimizer)
    mirage.save_stage(args.out / "stage_a.safetensors", [RECONSTRUCTION], run.about(args, recipe), fusion=True)
    weights.save_tensors(args.out / "prompt.safetensors", {"text": mirage.text})
    print(f"stage A: {recipe.steps} steps -> {args.out / 'stage_a.safetensors'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data/toy"), help="folder of pairs (default data/toy)")
    parser.add_argument("--base", default="weights/base", help="folder or hub id of CogVideoX or Wan")
    parser.add_argument("--vae2d", default="weights/vae_2d", help="folder or hub id of an AutoencoderKL")
    parser.add_argument("--prompt", type=Path, help="the prompt's embedding (safetensors with `text`); default zeros")
    parser.add_argument("--perceptual", type=Path, help="folder with the weights of LPIPS' backbone")
    parser.add_argument("--real", type=Path, help="a real video, its own truth, mixed into the batches")
    parser.add_argument("--real-frames", type=int, help="use only so many of its frames")
    parser.add_argument("--out", type=Path, default=Path("weights"), help="where stage_a.safetensors goes")
    parser.add_argument("--run", type=Path, default=Path("runs/stage_a"), help="checkpoints and logs")
    parser.add_argument("--recipe", choices=list(RECIPES), default="small", help="settings (default small)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a value of the recipe")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        main(args, run.override(RECIPES[args.recipe], args.set))
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
