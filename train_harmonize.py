"""Stage H: harmonise, through pixels (Mirage §3.2.2, Eq. 4; ChopGrad Alg. 1).

    x_DR      = D3D[denoise(E3D(x_NI)), z2D_mid],  z2D_mid from E2D(x_NI)
    L_harmon. = L_lpips(x_DR, x_GT) + λ2 · L_gram(x_DR, x_GT)                                      (Mirage Eq. 4)

Trained: the transformer's LoRA and Harmonisation-LoRA. Frozen: the base, and everything of stage A.
The pixel loss goes back through the decoder by ChopGrad, group by group, and once through the transformer.

    python train_harmonize.py --mirage weights --data data/toy --perceptual DIR
    torchrun --nproc-per-node=8 train_harmonize.py --recipe mirage --mirage my_run --out my_run ...
    python train_harmonize.py --recipe chopgrad --mirage my_run --out my_run_long ...     # its batch is one clip

Where --mirage holds a stage H already, as in the last line, training continues from it.
"""

if __name__ == "__main__":
    from mirage_min.data import desk

    desk.open_up()  # before the imports that take seconds

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as nnf

from mirage_min.data import desk
from mirage_min.method import chopgrad, lora
from mirage_min.method.perceptual import lpips_and_gram, lpips_and_texture
from mirage_min.networks import weights
from mirage_min.networks.card import write_card
from mirage_min.systems.mirage import Mirage
from mirage_min.systems.mirage_folder import HARMONISATION, RECONSTRUCTION, TRANSFORMER
from mirage_min.systems.prompt import PROMPT, read_prompt, write_prompt
from mirage_min.training import checkpoint, memory, processes, run, watch


@dataclass
class Recipe(run.Recipe):
    """Stage H. The defaults are Mirage's (§4.1)."""

    warmup: int = 500
    lambda2: float = 0.1
    gram_from: int = 2_000  # the step from which the Gram loss counts
    mse: float = 0.0        # a weight of MSE, which the paper does not use in stage H
    lpips: str = "vgg"      # LPIPS' backbone
    gram: str = "vgg"       # the Gram loss's
    rank: int = 16          # of Harmonisation-LoRA; Mirage gives no ranks, these are ChopGrad B.4's
    alpha: float = 16.0
    dit_rank: int = 128
    dit_alpha: float = 64.0
    d_trunc: int = 1
    tiles: int = 1          # the decoder's gradient in tiles x tiles pieces of the frame, each with its own Gram
    checkpoint_decoder: bool = run.may_change(False)
    checkpoint_dit: bool = run.may_change(False)
    shard: bool = run.may_change(False)  # the frozen transformer's weights divided among the processes (FSDP2)
    seed: int = 2


RECIPES = {
    "mirage": Recipe(),
    "chopgrad": Recipe(steps=1_000, batch=1, frames=49, height=720, width=1280, lr=2e-4, beta2=0.99, weight_decay=0.1,
                       warmup=1, gram_from=0, tiles=4),
    # DEVIATION: where full VGG-16 cannot be had, LPIPS on SqueezeNet and Gram on VGG's relu1_2 and relu2_2; and an MSE
    # term, because the small prior does not know what a car in the sun looks like.
    "small": Recipe(steps=700, batch=2, height=96, width=144, lr=1e-3, warmup=50, cosine=True, gram_from=150, mse=2.0,
                    lpips="squeeze", dit_rank=32, dit_alpha=32.0, real=0.1),
}


def build(args, recipe: Recipe) -> tuple[nn.ModuleList, dict[str, nn.Parameter]]:
    """(Mirage, LPIPS, the network whose features Gram compares), and what is trained by name."""
    mirage = Mirage.from_pretrained(args.mirage, args.base, args.vae2d, dtype=None if recipe.bf16 else torch.float32)
    for name, rank, alpha in ((TRANSFORMER, recipe.dit_rank, recipe.dit_alpha),
                              (HARMONISATION, recipe.rank, recipe.alpha)):
        if list(lora.adapters(mirage.adapters(name), name)):
            processes.print_once(f"{name}-LoRA continues from {args.mirage / 'stage_h.safetensors'}, with its rank")
        else:
            mirage.add_lora(name, rank, alpha)
    params = {}
    for name in (TRANSFORMER, HARMONISATION):
        params |= lora.named_parameters(mirage.adapters(name), name)
    for p in params.values():
        p.requires_grad_()
    return nn.ModuleList([mirage, *lpips_and_texture(recipe.lpips, recipe.gram, args.perceptual)]), params


def forward_and_backward(models: nn.ModuleList, recipe: Recipe, x_ni: Tensor, x_gt: Tensor,
                         terms: dict[str, Tensor], step: float = math.inf) -> None:
    """Forward and backward for some of a step's clips x_ni, x_gt [n, 3, T, H, W] in [-1, 1].

    Their share of the batch's gradient is added to .grad, and their share of each term of the loss, unweighted, to
    `terms`.

    step    which one it is: from gram_from on, the Gram loss counts
    """
    mirage, lpips_distance, texture = models
    mirage.dit.activation_checkpointing = recipe.checkpoint_dit
    x_ni, x_gt = mirage.pad(x_ni), mirage.pad(x_gt)

    def loss_fn(x_dr, where):
        x_dr, target = x_dr.to(x_gt.dtype), x_gt[where]
        x, y = (rearrange(v, "b c t h w -> (b t) c h w") for v in (x_dr, target))
        share = target.numel() / (recipe.batch * x_gt[0].numel())  # of the pixels of the whole batch
        if step >= recipe.gram_from:
            lpips, gram = (distance.mean() for distance in lpips_and_gram(lpips_distance, texture, x, y))
            terms["gram"] += share * gram.detach()
        else:
            lpips, gram = lpips_distance(x, y).mean(), 0.0
        terms["lpips"] += share * lpips.detach()
        # L_harmon. = L_lpips + λ2 · L_gram                                                 Mirage Eq. 4
        loss = lpips + recipe.lambda2 * gram
        if recipe.mse:  # DEVIATION: the paper has no such term
            mse = nnf.mse_loss(x_dr, target)
            terms["mse"] += share * mse.detach()
            loss = loss + recipe.mse * mse
        return share * loss

    with run.autocast(recipe, x_gt.device):
        with torch.no_grad():
            z_ni, z2d_mid = mirage.vae.encode(x_ni), mirage.mids(x_ni)
        z_dr = mirage.denoise(z_ni)
        # dL/dz_DR, and the decoder's own gradients                                         ChopGrad Alg. 1
        _, grad_z = chopgrad.backward(mirage.vae, z_dr, loss_fn, recipe.d_trunc, (recipe.tiles, recipe.tiles),
                                      inject=z2d_mid, checkpoint=recipe.checkpoint_decoder)
    z_dr.backward(grad_z)


def main(args, recipe: Recipe) -> None:
    torch.manual_seed(recipe.seed)
    data, val = run.open_data(args, recipe)
    models, params = build(args, recipe)
    mirage, lpips, _ = models
    identity = checkpoint.identify(args, recipe, data.paths(), models, params, t=mirage.t)
    processes.print_once(f"stage H: {recipe}\ntrained: {run.count(params)}")
    frozen = [p for p in mirage.dit.parameters() if not p.requires_grad]
    processes.print_once(memory.plan(models, forward_and_backward, recipe, args.device, processes.world(), frozen))
    if recipe.shard:
        processes.shard(mirage.dit, args.device)
    models.to(args.device)
    optimizer = run.optimizer(params, recipe)
    start = checkpoint.resume(args.run, params, optimizer, identity, recipe.steps)
    log = watch.Log(args.run, recipe, start)
    *shown, _ = run.batch(data, recipe, 0, range(1), args.device)

    @torch.no_grad()
    def harmonise(x_ni, x_gt):
        with run.autocast(recipe, x_ni.device):
            return mirage(x_ni)

    bar = run.Steps(args, recipe, start)
    for step in bar:
        terms, names = defaultdict(float), []
        optimizer.zero_grad()
        for clips in processes.pieces(recipe):
            x_ni, x_gt, drawn = run.batch(data, recipe, step, clips, args.device)
            forward_and_backward(models, recipe, x_ni, x_gt, terms, step=step)
            names += drawn
        processes.reduce(params, terms)
        norm = torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        processes.check_finite(step, terms, norm, names)
        run.set_rate(optimizer, recipe, step)
        optimizer.step()

        if step % 10 == 0:
            bar.set_postfix(log(step, terms))
        if run.due(step, recipe):
            log.report(step, harmonise, shown, val, lpips)
            checkpoint.save(args.run, step + 1, params, optimizer, identity)
    if processes.rank() == 0:
        save(args, recipe, mirage)
        desk.say(f"stage H: {recipe.steps} steps -> {args.out / 'stage_h.safetensors'}")


def save(args, recipe: Recipe, mirage: Mirage) -> None:
    """Write stage H and, if --out is another folder than --mirage, stage A and the prompt, so that it is complete."""
    _, about_a = weights.load_tensors(args.mirage / "stage_a.safetensors")
    bases = {}
    for name in ("base", "vae2d"):
        base = getattr(args, name)
        if base is None and name in about_a:
            inside = args.mirage / about_a[name]  # stage A names a folder as it is seen from its own
            base = inside if inside.is_dir() else about_a[name]
        if base:
            bases[name] = run.seen_from(args.out, base)
    if args.out.resolve() != args.mirage.resolve():
        mirage.save_stage(args.out / "stage_a.safetensors", [RECONSTRUCTION], about_a | bases, fusion=True)
        write_prompt(args.out, *read_prompt(args.mirage / PROMPT))
    latents = (mirage.vae.legal_length(recipe.frames) - 1) // 4 + 1
    # streams show the transformer as many latents as it was trained on, where possible
    window = min(max(latents, 2 * mirage.temporal_patch + 1), 9)
    about = bases | run.about(recipe) | {"t": str(mirage.t), "window": str(window)}
    mirage.save_stage(args.out / "stage_h.safetensors", [TRANSFORMER, HARMONISATION], about)
    write_card(args.out, "Mirage", about.get("base", about_a.get("base")), about)


if __name__ == "__main__":
    parser = run.flags(__doc__, "stage_h", RECIPES)
    parser.add_argument("--mirage", type=Path, default=Path("weights"),
                        help="folder with stage_a.safetensors, and perhaps a stage H to continue (default weights)")
    parser.add_argument("--base", help="folder or hub id of the base, if not the one stage A names")
    parser.add_argument("--vae2d", help="folder or hub id of the AutoencoderKL, if not the one stage A names")
    run.launch(main, parser.parse_args(), RECIPES, conv3d=True)
