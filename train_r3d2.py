"""R3D2 and Difix: train an image system through pixels, each frame alone (R3D2 A.2).

    x_DR = D[denoise(E(x_NI)), skips]
    L    = λ_lpips · L_lpips(x_DR, x_GT) + λ_gram · L_gram(x_DR, x_GT) + λ_mse · L_mse(x_DR, x_GT)     (R3D2 A.2, Difix)

Trained: all of the UNet, the skips, and a LoRA on the decoder, which is merged in what is written. Frozen: the encoder.
R3D2 has λ_mse = 0. It does not say what it trains, at which t, nor for how many steps: these are Difix's.

    python train_r3d2.py --data data/toy --perceptual DIR                           # the small one, from random weights
    python train_r3d2.py --base runs/base/weights/base_2d --vae weights/vae_2d ...  # from train_base.py one_step_2d
    python encode_prompt.py --base stabilityai/sd-turbo --out prompt.safetensors
    torchrun --nproc-per-node=8 train_r3d2.py --recipe r3d2-big --prompt prompt.safetensors --data ... --perceptual DIR

--base may also be a trained system's folder, from which training continues.
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
from mirage_min.method import lora
from mirage_min.method.one_step import T_MIRAGE, alpha_bar
from mirage_min.method.perceptual import lpips_and_gram, lpips_and_texture
from mirage_min.method.skips import PUBLISHED_START
from mirage_min.networks import small_base
from mirage_min.networks.vae_2d import AutoencoderKL
from mirage_min.networks.vae_tiny import AutoencoderTiny
from mirage_min.systems.prompt import choose_prompt
from mirage_min.systems.r3d2 import R3D2, read_vae
from mirage_min.training import checkpoint, memory, processes, run, watch

DECODER = "decoder"  # the name of its LoRA


@dataclass
class Recipe(run.Recipe):
    """The defaults are R3D2's (A.2): a batch of 1 on each of eight GPUs."""

    frames: int = 1
    height: int = 1080
    width: int = 1920
    warmup: int = 500
    lambda_lpips: float = 1.0
    lambda_gram: float = 0.5
    lambda_mse: float = 0.0
    gram_from: int = 0          # the step from which the Gram loss counts
    lpips: str = "vgg"          # LPIPS' backbone
    gram: str = "vgg"           # the Gram loss's
    t: int = T_MIRAGE
    skip_start: float = 0.0     # of every weight of new skips
    rank: int = 4               # of the decoder's LoRA
    alpha: float = lora.PEFT_ALPHA
    checkpoint_unet: bool = run.may_change(False)
    half: bool = run.may_change(False)  # the result is written as float16
    seed: int = 3


RECIPES = {
    "r3d2": Recipe(),
    "r3d2-big": Recipe(),
    "difix": Recipe(height=576, width=1024, lr=2e-5, lambda_gram=1.0, lambda_mse=1.0, gram_from=2_000,
                    skip_start=PUBLISHED_START),
    # DEVIATION: as in stage H's recipe `small`, LPIPS on SqueezeNet and an MSE term, for its UNet has no strong prior.
    "small": Recipe(steps=3_000, batch=8, height=96, width=144, lr=1e-3, warmup=50, cosine=True, gram_from=600,
                    lambda_mse=2.0, lpips="squeeze", rank=16, alpha=16.0, real=0.1, half=True),
}
BASES = {  # --base and --vae where no --base is given; None: the small untrained UNet, and the base's own VAE
    "r3d2": ("stabilityai/sd-turbo", "madebyollin/taesd"),
    "r3d2-big": ("stabilityai/sd-turbo", None),
    "difix": ("stabilityai/sd-turbo", None),
    "small": (None, "weights/vae_2d"),
}
VAES = {"r3d2": AutoencoderTiny, "r3d2-big": AutoencoderKL, "difix": AutoencoderKL}  # what a recipe is for


def build(args, recipe: Recipe) -> tuple[nn.ModuleList, dict[str, nn.Parameter]]:
    """(R3D2, LPIPS, the network whose features Gram compares), and what is trained by name. ValueError if a file is
    missing or does not fit, or the VAE is not the recipe's."""
    text = choose_prompt(args.prompt, args.base)
    if args.base is None:
        unet = small_base.new_unet()
        vae, skips = read_vae(args.vae, None, recipe.skip_start)
        text = torch.zeros(1, 1, unet.config.cross_attention_dim) if text is None else text
        r3d2 = R3D2(unet, vae, skips, text, alpha_bar(zero_terminal_snr=False), t=recipe.t).float()
    else:
        r3d2 = R3D2.from_base(args.base, args.vae, text, recipe.t, recipe.skip_start, dtype=torch.float32)
    wanted = VAES.get(args.recipe)
    if wanted is not None and type(r3d2.vae) is not wanted:
        raise ValueError(f"--vae: the recipe {args.recipe} is for an {wanted.CLASS_NAME}, got an {r3d2.vae.CLASS_NAME}")
    r3d2.vae.requires_grad_(False)
    lora.add(r3d2.vae.decoder, DECODER, recipe.rank, recipe.alpha)
    params = {f"unet.{name}": p for name, p in r3d2.unet.named_parameters()}
    params |= {f"skips.{name}": p for name, p in r3d2.skips.named_parameters()}
    params |= lora.named_parameters(r3d2.vae.decoder, DECODER)
    return nn.ModuleList([r3d2, *lpips_and_texture(recipe.lpips, recipe.gram, args.perceptual)]), params


def forward_and_backward(models: nn.ModuleList, recipe: Recipe, x_ni: Tensor, x_gt: Tensor,
                         terms: dict[str, Tensor], step: float = math.inf) -> None:
    """Forward and backward for some of a step's clips x_ni, x_gt [n, 3, T, H, W] in [-1, 1].

    Their share of the batch's gradient is added to .grad, and their share of each term of the loss, unweighted, to
    `terms`.

    step    its number: the Gram loss counts from gram_from on
    """
    r3d2, lpips_distance, texture = models
    r3d2.unet.activation_checkpointing = recipe.checkpoint_unet
    with run.autocast(recipe, x_gt.device):
        x_dr = r3d2(x_ni)  # not clamped: a clamped pixel has no gradient
        x, y = (rearrange(v, "b c t h w -> (b t) c h w") for v in (x_dr.to(x_gt.dtype), x_gt))
        if step >= recipe.gram_from:
            lpips, gram = (distance.mean() for distance in lpips_and_gram(lpips_distance, texture, x, y))
            found = {"lpips": lpips, "gram": gram}
        else:
            lpips, gram = lpips_distance(x, y).mean(), 0.0
            found = {"lpips": lpips}
        # L = λ_lpips · L_lpips + λ_gram · L_gram                                           R3D2 A.2
        loss = recipe.lambda_lpips * lpips + recipe.lambda_gram * gram
        if recipe.lambda_mse:
            found["mse"] = nnf.mse_loss(x, y)
            # L = ... + λ_mse · L_mse                                                       Difix
            loss = loss + recipe.lambda_mse * found["mse"]
    share = len(x_gt) / recipe.batch  # of the clips of the whole batch
    (share * loss).backward()
    for name, value in found.items():
        terms[name] += share * value.detach()


def main(args, recipe: Recipe) -> None:
    torch.manual_seed(recipe.seed)
    if args.base is None:
        args.base, vae = BASES[args.recipe]
        args.vae = args.vae or vae
    data, val = run.open_data(args, recipe)
    models, params = build(args, recipe)
    r3d2, lpips, _ = models
    identity = checkpoint.identify(args, recipe, data.paths(), models, params)
    processes.print_once(f"R3D2: {recipe}\ntrained: {run.count(params)}")
    processes.print_once(memory.plan(models, forward_and_backward, recipe, args.device, processes.world()))
    models.to(args.device)
    optimizer = run.optimizer(params, recipe)
    start = checkpoint.resume(args.run, params, optimizer, identity, recipe.steps)
    log = watch.Log(args.run, recipe, start)
    *shown, _ = run.batch(data, recipe, 0, range(1), args.device)

    @torch.no_grad()
    def harmonise(x_ni, x_gt):
        with run.autocast(recipe, x_ni.device):
            return r3d2(x_ni)

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
        lora.merge(r3d2.vae.decoder, DECODER)
        (r3d2.half() if recipe.half else r3d2).save_pretrained(args.out, run.about(recipe))
        desk.say(f"R3D2: {recipe.steps} steps -> {args.out}")


if __name__ == "__main__":
    parser = run.flags(__doc__, "r3d2", RECIPES)
    parser.add_argument("--base", help="folder or hub id of a Stable Diffusion, or of a system to continue (default: "
                        "stabilityai/sd-turbo; of the recipe small an untrained UNet)")
    parser.add_argument("--vae", help="folder or hub id of the VAE (default: the base's own; without --base of the "
                        "recipe r3d2 madebyollin/taesd, of small weights/vae_2d)")
    parser.add_argument("--prompt", type=Path, help="the prompt's embedding (safetensors with `text`; default: that of "
                        "the system in --base, else zeros)")
    run.launch(main, parser.parse_args(), RECIPES)
