"""Stage A: adapt the 3D decoder to injected 2D features (Mirage §3.2.1, Eq. 2, Eq. 3).

    x_RO  = D3D[E3D(x_GT), z2D_mid],  z2D_mid from E2D(x_NI)                                       (Mirage Eq. 2)
    L_vae = L_mse(x_RO, x_GT) + λ1 · L_lpips(x_RO, x_GT)                                           (Mirage Eq. 3)

Trained: the fusion blocks and Reconstruction-LoRA. Frozen: everything else. The transformer takes no part.
With `--set init=FILE` training continues from an existing stage A.

    python train_vae.py --base weights/base --vae2d weights/vae_2d --data data/toy --perceptual DIR
    torchrun --nproc-per-node=8 train_vae.py --recipe mirage --base ... --vae2d ... --data ... --perceptual DIR
"""

if __name__ == "__main__":
    from mirage_min.data import desk

    desk.open_up()  # before the imports that take seconds

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as nnf

from mirage_min.data import desk
from mirage_min.method import chopgrad, injection, lora
from mirage_min.method.perceptual import Lpips
from mirage_min.networks import weights
from mirage_min.networks.card import write_card
from mirage_min.networks.imagenet import Features
from mirage_min.systems.mirage import Mirage
from mirage_min.systems.mirage_folder import RECONSTRUCTION
from mirage_min.systems.prompt import read_prompt, write_prompt
from mirage_min.training import checkpoint, memory, processes, run, watch


@dataclass
class Recipe(run.Recipe):
    """Stage A. The defaults are Mirage's (§4.1), which warms up stage H only."""

    lambda1: float = 0.1
    lpips: str = "vgg"      # LPIPS' backbone
    rank: int = 16          # of Reconstruction-LoRA; Mirage gives none, ChopGrad B.4 has 16
    alpha: float = 16.0
    d_trunc: int = 1
    tiles: int = 1          # the decoder's gradient in tiles x tiles pieces of the frame
    checkpoint_decoder: bool = run.may_change(False)
    init: str = ""          # a stage_a.safetensors to continue from; "": new fusion blocks and a new LoRA
    seed: int = 1


RECIPES = {
    "mirage": Recipe(),
    "chopgrad": Recipe(height=480, width=832, lr=2e-4, beta2=0.99),  # ChopGrad B.4
    # DEVIATION: the small model has no full VGG-16 (LPIPS on SqueezeNet), a larger rate and few steps.
    "small": Recipe(steps=1500, batch=2, height=96, width=96, lr=3e-3, warmup=50, cosine=True,
                    lpips="squeeze", real=0.25, varied=0.8),
    # A few minutes on a laptop, on the shipped base: a lesson, not a model (docs/training.md).
    "minute": Recipe(steps=60, batch=1, frames=5, height=96, width=144, lr=3e-3, warmup=5, cosine=True, bf16=False,
                     lpips="squeeze", every=30),
}


def build(args, recipe: Recipe) -> tuple[nn.ModuleList, dict[str, nn.Parameter], dict[str, str]]:
    """(Mirage without its transformer, LPIPS), what is trained by name, and the metadata of the prompt's file.

    ValueError if a file is missing or does not fit.
    """
    text, about_prompt = None, {"text": "none: zeros"}
    if args.prompt:
        text, about_prompt = read_prompt(args.prompt)
    mirage = Mirage.from_base(args.base, args.vae2d, text, dtype=None if recipe.bf16 else torch.float32)
    if recipe.init:
        begun, about_begun = weights.load_tensors(Path(recipe.init))
        if {key.partition(".")[0] for key in begun} != {"fusion", RECONSTRUCTION}:
            raise ValueError(f"{recipe.init}: wanted a stage A: fusion blocks and {RECONSTRUCTION}-LoRA, and no more")
        mirage.load_stage(begun, about_begun, recipe.init)
        processes.print_once(f"stage A continues from {recipe.init}, with the rank of its LoRA")
    else:
        mirage.add_lora(RECONSTRUCTION, recipe.rank, recipe.alpha)
    mirage.dit = None  # frees its memory
    params = {f"fusion.{name}": p for name, p in mirage.vae.fusion.named_parameters()}
    params |= lora.named_parameters(mirage.vae.decoder, RECONSTRUCTION)
    for p in params.values():
        p.requires_grad_()
    return nn.ModuleList([mirage, Lpips(Features(recipe.lpips, args.perceptual))]), params, about_prompt


@torch.no_grad()
def reconstruct(mirage: Mirage, recipe: Recipe, x_ni: Tensor, x_gt: Tensor) -> Tensor:
    """x_RO, as it is now: clips [B, 3, T, H, W] in [-1, 1] -> the same, not clamped."""
    T, H, W = x_gt.shape[2:]
    x_ni, x_gt = mirage.pad(x_ni), mirage.pad(x_gt)
    with run.autocast(recipe, x_gt.device):
        # x_RO = D3D[E3D(x_GT), z2D_mid]                                                    Mirage Eq. 2
        x_ro = mirage.vae.decode(mirage.vae.encode(x_gt), mirage.mids(x_ni))
    return x_ro[:, :, :T, :H, :W]


def forward_and_backward(models: nn.ModuleList, recipe: Recipe, x_ni: Tensor, x_gt: Tensor,
                         terms: dict[str, Tensor]) -> None:
    """Forward and backward for some of a step's clips x_ni, x_gt [n, 3, T, H, W] in [-1, 1].

    Their share of the batch's gradient is added to .grad, and their share of each term of the loss, unweighted, to
    `terms`.
    """
    mirage, lpips_distance = models
    x_ni, x_gt = mirage.pad(x_ni), mirage.pad(x_gt)

    def loss_fn(x_ro, where):
        x_ro, target = x_ro.to(x_gt.dtype), x_gt[where]
        mse = nnf.mse_loss(x_ro, target)
        lpips = lpips_distance(*(rearrange(x, "b c t h w -> (b t) c h w") for x in (x_ro, target))).mean()
        # L_vae = L_mse + λ1 · L_lpips                                                      Mirage Eq. 3
        loss = mse + recipe.lambda1 * lpips
        share = target.numel() / (recipe.batch * x_gt[0].numel())  # of the pixels of the whole batch
        terms["mse"] += share * mse.detach()
        terms["lpips"] += share * lpips.detach()
        return share * loss

    with run.autocast(recipe, x_gt.device):
        with torch.no_grad():
            z, z2d_mid = mirage.vae.encode(x_gt), mirage.mids(x_ni)
        # x_RO = D3D[E3D(x_GT), z2D_mid], its loss and gradients group by group             Mirage Eq. 2
        chopgrad.backward(mirage.vae, z, loss_fn, recipe.d_trunc, (recipe.tiles, recipe.tiles), inject=z2d_mid,
                          checkpoint=recipe.checkpoint_decoder)


def main(args, recipe: Recipe) -> None:
    torch.manual_seed(recipe.seed)
    data, val = run.open_data(args, recipe)
    models, params, about_prompt = build(args, recipe)
    mirage, lpips = models
    processes.print_once(f"stage A: {recipe}\ntrained: {run.count(params)}")
    processes.print_once(memory.plan(models, forward_and_backward, recipe, args.device, processes.world()))
    models.to(args.device)
    kept = params | {f"fusion.{n}": scale for n, scale in mirage.vae.fusion.named_buffers()}
    identity = checkpoint.identify(args, recipe, data.paths(), models, kept)
    optimizer = run.optimizer(params, recipe)
    start = checkpoint.resume(args.run, kept, optimizer, identity, recipe.steps)
    log = watch.Log(args.run, recipe, start)
    *shown, _ = run.batch(data, recipe, 0, range(1), args.device)
    if start == 0 and not recipe.init:
        # once, on the untrained decoder: the blocks keep their scales
        x_ni, x_gt = map(mirage.pad, shown)
        with torch.no_grad(), run.autocast(recipe, args.device):
            scales = injection.measure_scales(mirage.vae, mirage.vae.encode(x_gt), mirage.mids(x_ni))
        processes.print_once("std of (decoder stream, 2D features), finest first:", scales)

    if start == 0:
        log.report(-1, partial(reconstruct, mirage, recipe), shown)  # before the first step
    bar = run.Steps(args, recipe, start)
    for step in bar:
        terms, names = defaultdict(float), []
        optimizer.zero_grad()
        for clips in processes.pieces(recipe):
            x_ni, x_gt, drawn = run.batch(data, recipe, step, clips, args.device)
            forward_and_backward(models, recipe, x_ni, x_gt, terms)
            names += drawn
        processes.reduce(params, terms)
        norm = torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        processes.check_finite(step, terms, norm, names)
        run.set_rate(optimizer, recipe, step)
        optimizer.step()

        if step % 10 == 0:
            bar.set_postfix(log(step, terms))
        if run.due(step, recipe):
            log.report(step, partial(reconstruct, mirage, recipe), shown, val, lpips)
            checkpoint.save(args.run, step + 1, kept, optimizer, identity)
    if processes.rank() == 0:
        about = run.about(recipe) | {"base": run.seen_from(args.out, args.base)}
        if args.vae2d:
            about["vae2d"] = run.seen_from(args.out, args.vae2d)
        mirage.save_stage(args.out / "stage_a.safetensors", [RECONSTRUCTION], about, fusion=True)
        write_prompt(args.out, mirage.text, about_prompt)
        write_card(args.out, "Mirage", args.base, about)
        desk.say(f"stage A: {recipe.steps} steps -> {args.out / 'stage_a.safetensors'}")


if __name__ == "__main__":
    parser = run.flags(__doc__, "stage_a", RECIPES)
    parser.add_argument("--base", default="weights/base", help="folder or hub id of CogVideoX or Wan")
    parser.add_argument("--vae2d", default="weights/vae_2d",
                        help="folder or hub id of an AutoencoderKL; '' with Wan, which needs none")
    parser.add_argument("--prompt", type=Path, help="the prompt's embedding (safetensors with `text`); default zeros")
    run.launch(main, parser.parse_args(), RECIPES, conv3d=True)
