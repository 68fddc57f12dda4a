"""Stage A: adapt the 3D decoder to injected 2D features (Mirage §3.2.1, Eq. 2, Eq. 3).

    x_RO  = D3D[E3D(x_GT), z2D_mid],  z2D_mid from E2D(x_NI)                                       (Mirage Eq. 2)
    L_vae = L_mse(x_RO, x_GT) + λ1 · L_lpips(x_RO, x_GT)                                           (Mirage Eq. 3)

Trained: the fusion blocks and Reconstruction-LoRA. Frozen: everything else. The transformer takes no part.
With `--set init=FILE` a stage A that is there already is trained on.

    python train_vae.py --base weights/base --vae2d weights/vae_2d --data data/toy --perceptual DIR
    torchrun --nproc-per-node=8 train_vae.py --recipe mirage --base ... --vae2d ... --data ... --perceptual DIR
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from mirage_min.data.pairs import Pairs
from mirage_min.method import chopgrad, injection, lora
from mirage_min.method.perceptual import Features, Lpips
from mirage_min.networks import weights
from mirage_min.systems.mirage import RECONSTRUCTION, Mirage
from mirage_min.training import memory, run, watch


@dataclass
class Recipe:
    """Stage A. The defaults are Mirage's (§4.1)."""

    steps: int = 10_000
    batch: int = 8          # clips a step, over all processes
    accumulate: int = 1     # pieces in which a process works through its clips
    frames: int = 9         # padded to what the VAE takes, as height and width are; the padding counts in the loss
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
    tiles: int = 1          # the decoder's gradient in tiles x tiles pieces of the frame
    checkpoint_decoder: bool = False
    real: float = 0.0       # share of clips from the real video
    real_frames: int = 0    # use only so many of its frames; 0: all
    init: str = ""          # a stage_a.safetensors to go on from; "": new fusion blocks and a new LoRA
    bf16: bool = True
    seed: int = 1
    every: int = 200        # steps between checkpoints, pictures and validations


RECIPES = {
    "mirage": Recipe(),
    "chopgrad": Recipe(height=480, width=832, lr=2e-4, beta2=0.99),  # ChopGrad B.4
    # DEVIATION: the small model has no full VGG-16 (LPIPS on SqueezeNet), a larger rate and few steps.
    "small": Recipe(steps=1500, batch=2, height=96, width=96, lr=3e-3, warmup=50, cosine=True,
                    lpips="squeeze", real=0.25),
}


def gradients(models: nn.ModuleList, recipe: Recipe, x_ni: Tensor, x_gt: Tensor, terms: dict[str, Tensor]) -> None:
    """Forward, loss and backward of some of a step's clips: adds to `terms` and to the gradients their share."""
    mirage, lpips = models

    def loss_fn(x_g, where):
        x_g, target = x_g.to(x_gt.dtype), x_gt[where]
        frames = [rearrange(v, "b c t h w -> (b t) c h w") for v in (x_g, target)]
        # L_vae = L_mse + λ1 · L_lpips                                                      Mirage Eq. 3
        part = {"mse": F.mse_loss(x_g, target), "lpips": recipe.lambda1 * lpips(*frames).mean()}
        share = target.numel() / (recipe.batch * x_gt[0].numel())  # of the pixels of the whole batch
        for name, value in part.items():
            terms[name] += share * value.detach()
        return share * sum(part.values())

    with torch.autocast(x_gt.device.type, torch.bfloat16, enabled=recipe.bf16):
        with torch.no_grad():
            z, inject = mirage.vae.encode(x_gt), mirage.mids(x_ni)
        # x_RO = D3D[E3D(x_GT), z2D_mid], its loss and gradients group by group             Mirage Eq. 2
        chopgrad.backward(mirage.vae, z, loss_fn, recipe.d_trunc, (recipe.tiles, recipe.tiles), inject=inject,
                          checkpoint=recipe.checkpoint_decoder)


def main(args, recipe: Recipe) -> None:
    torch.manual_seed(recipe.seed)
    pieces, size = run.pieces(recipe), (recipe.height, recipe.width)
    data = Pairs(args.data, recipe.frames, size, args.real, recipe.real_frames)
    val = Pairs(args.val, recipe.frames) if args.val else None
    for pair in data.left_out + (val.left_out if val else []):
        run.say("left out:", pair)
    settings = run.settings(args, recipe, data.names)
    prompt, about_prompt = weights.load_tensors(args.prompt) if args.prompt else ({}, {"text": "none: zeros"})
    if args.prompt and "text" not in prompt:
        raise ValueError(f"{args.prompt}: wanted a tensor `text` (encode_prompt.py), got {sorted(prompt)[:5]}")
    mirage = Mirage.from_base(args.base, args.vae2d, prompt.get("text"), dtype=None if recipe.bf16 else torch.float32)
    if recipe.init:
        begun, about_begun = weights.load_tensors(Path(recipe.init))
        if {key.partition(".")[0] for key in begun} != {"fusion", RECONSTRUCTION}:
            raise ValueError(f"{recipe.init}: wanted a stage A: fusion blocks and {RECONSTRUCTION}-LoRA, and no more")
        mirage.load_stage(begun, about_begun)
        run.say(f"stage A goes on from {recipe.init}, with the rank of its LoRA")
    else:
        mirage.add_lora(RECONSTRUCTION, recipe.rank, recipe.alpha)
    mirage.dit = None  # takes no part: its memory is better used
    models = nn.ModuleList([mirage, Lpips(Features(recipe.lpips, args.perceptual))])

    # what is trained
    params = {f"fusion.{n}": p.requires_grad_() for n, p in mirage.vae.fusion.named_parameters()}
    params |= {f"{RECONSTRUCTION}.{n}.{m}": p.requires_grad_()
               for n, _, a in lora.adapters(mirage.vae.decoder, RECONSTRUCTION) for m, p in a.named_parameters()}
    run.say(f"stage A: {recipe}\ntrained: {run.count(params)}")
    run.say(memory.plan(models, gradients, recipe, run.world(), args.device))
    models.to(args.device)
    optimizer = torch.optim.AdamW(params.values(), lr=recipe.lr, betas=(0.9, recipe.beta2),
                                  weight_decay=recipe.weight_decay)
    kept = params | {f"fusion.{n}": scale for n, scale in mirage.vae.fusion.named_buffers()}
    start = run.resume(args.run, kept, optimizer, settings)
    log = watch.Log(args.run, recipe, start)

    def batch(step: int, clips: range):
        x_ni, x_gt, names = data.batch([run.draws(recipe.seed, step, k) for k in clips], recipe.real)
        return mirage.pad(x_ni.to(args.device)), mirage.pad(x_gt.to(args.device)), names

    @torch.no_grad()
    @torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=recipe.bf16)
    def now(x_ni, x_gt):
        T, H, W = x_gt.shape[2:]
        x_ni, x_gt = mirage.pad(x_ni), mirage.pad(x_gt)
        return mirage.vae.decode(mirage.vae.encode(x_gt), mirage.mids(x_ni))[:, :, :T, :H, :W]

    x_ni, x_gt, _ = shown = batch(0, range(1))
    if start == 0 and not recipe.init:
        # the two streams' scales: measured once, on the untrained decoder, and kept with the fusion blocks
        with torch.no_grad(), torch.autocast(x_gt.device.type, torch.bfloat16, enabled=recipe.bf16):
            scales = injection.measure_scales(mirage.vae, mirage.vae.encode(x_gt), mirage.mids(x_ni))
        run.say("std of (decoder stream, 2D features), finest first:", scales)

    for step in (bar := tqdm(range(start, recipe.steps), initial=start, total=recipe.steps, unit="step",
                             disable=run.rank() > 0)):
        terms, clips = {"mse": 0.0, "lpips": 0.0}, []
        optimizer.zero_grad()
        for piece in pieces:
            x_ni, x_gt, names = batch(step, piece)
            gradients(models, recipe, x_ni, x_gt, terms)
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
            log.look(step, now, shown[:2], val, models[1])
            run.save(args.run, step + 1, kept, optimizer, settings)
    if run.rank() == 0:
        mirage.save_stage(args.out / "stage_a.safetensors", [RECONSTRUCTION], run.about(args, recipe), fusion=True)
        weights.save_tensors(args.out / "prompt.safetensors", {"text": mirage.text}, about_prompt)
        print(f"stage A: {recipe.steps} steps -> {args.out / 'stage_a.safetensors'}")


if __name__ == "__main__":
    parser = run.flags(__doc__, "stage_a", RECIPES)
    parser.add_argument("--base", default="weights/base", help="folder or hub id of CogVideoX or Wan")
    parser.add_argument("--vae2d", default="weights/vae_2d", help="folder or hub id of an AutoencoderKL")
    parser.add_argument("--prompt", type=Path, help="the prompt's embedding (safetensors with `text`); default zeros")
    run.launch(main, parser.parse_args(), RECIPES)
