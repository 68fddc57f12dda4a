"""DiffusionHarmonizer's training: one frame, in one step, in view of what came out before it (§3.1, §3.3).

    Î_t    = D(F(E(I_t), E(Î_t−1), …, E(Î_t−K)))                                        (Eq. 2)
    L      = λ_L2 ‖Î_t − I*_t‖² + λ_patch L_perc + λ_warp L_temp                        (Eqs. 4 and 5)
    L_temp = 1/|Ω| Σ_Ω ‖Î_t(p) − Î_t−1 along the truth's flow‖²                         (Eq. 5)

Trained: the whole transformer, apart from attention to a text, which is null. Frozen: the VAE. First on single frames.
From `temporal_from` on every other batch is temporal: two frames in a row, after up to K outputs that the model makes
of the frames before them, without gradients.

    python train_online.py --vae weights/vae_wan_48 --data data/toy --perceptual DIR         # a small one, from nothing
    torchrun --nproc-per-node=8 train_online.py --recipe paper --base COSMOS --vae WAN --data pairs --perceptual DIR

--base is a folder of Cosmos-Predict2 as convert.py writes it, or a harmonizer's, to continue its training. Pairs are of
mirage_min/data/streams.py, toy_world.py --extras, or any that pairs.py reads; the result is a folder for infer.py.
"""

if __name__ == "__main__":
    from mirage_min.data import desk

    desk.open_up()  # before the imports that take seconds

import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as nnf

from mirage_min.data import desk
from mirage_min.data.pairs import Pairs
from mirage_min.method.optical_flow import flow_dis, visible_by_consistency, warp_loss
from mirage_min.method.perceptual import Lpips, lpips_and_texture, patch_loss
from mirage_min.networks import checked, frugal, small_base
from mirage_min.networks.dit_cosmos import CosmosDiT
from mirage_min.networks.imagenet import Features
from mirage_min.networks.vae_wan import WanVAE
from mirage_min.systems.harmonizer import Harmonizer, Settings, subfolder
from mirage_min.training import checkpoint, memory, processes, run, watch
from mirage_min.training.latents import DrawnLatents

Share = Annotated[float, checked.Within(0, 1)]
Weight = Annotated[float, checked.Within(0)]


@dataclass
class Recipe(run.Recipe):
    """The defaults are the paper's (§4), except rate and batch, which it does not give: they are the release's."""

    steps: int = 14_000
    lr: float = 2e-5
    frames: int = 6                # K + 2 at least: two that are enhanced, and their past
    height: int = 576
    width: int = 1024
    wiring: Literal["release", "paper"] = "paper"
    past: Annotated[int, checked.Within(0, 64)] = 4  # K
    change_only: bool = False      # the result is the frame and what the transformer changes of it (harmonizer.py)
    temporal_from: int = 10_000    # the step from which there are temporal batches
    temporal_every: Annotated[int, checked.Within(1)] = 2  # then one step in this many has one
    past_from: Literal["outputs", "truth"] = "outputs"  # what a temporal batch sees: the model's outputs, or the truth
    past_share: Share = 1.0        # of temporal batches that see a past; the others begin a clip
    lambda_l2: Weight = 1.0
    lambda_patch: Weight = 1.0
    lambda_warp: Weight = 1.0
    lambda_lpips: Weight = 0.0     # of LPIPS on whole frames, which the paper replaces by the patch loss
    lpips: str = "vgg"             # its backbone
    flow: Literal["exact", "dis"] = "exact"  # of the warp loss: the clip's own; or, where it has none, OpenCV's DIS
    latent_until: int = 0          # until this step the latent loss alone, on single frames that were encoded once
    latent_clips: int = 2_000      # how many frames those are, each of a clip drawn anew
    latent_batch: int = 16         # how many of them a step takes
    checkpoint_dit: bool = run.may_change(False)
    seed: int = 3


RECIPES = {
    "paper": Recipe(),
    # DEVIATION: the release also trains the VAE, clamps LPIPS to .3, and has a temporal batch of one frame.
    "release": Recipe(steps=10_000, wiring="release", temporal_from=0, temporal_every=1, past_from="truth",
                      past_share=0.5, lambda_patch=0.0, lambda_lpips=0.3, lambda_warp=0.0),
    # DEVIATION: a transformer that knows nothing first learns latents, at a fraction of what pixels cost.
    "small": Recipe(steps=9_000, batch=4, lr=1e-3, warmup=50, cosine=True, height=96, width=144, change_only=True,
                    temporal_from=7_000, latent_until=5_000, lpips="squeeze"),
}


class Batch(NamedTuple):
    """What kind of batch a step has."""

    temporal: bool  # two frames in a row, the second in view of the first
    past: int       # outputs in view of the first


def batch_of(step: int, recipe: Recipe) -> Batch:
    """The kind of a step's batch, the same in all processes. DEVIATION: one draw a step, not one a clip, so that a
    batch is one tensor."""
    since = step - recipe.temporal_from
    temporal, past = since >= 0 and since % recipe.temporal_every == 0, 0
    draws = run.draws(recipe.seed, step, k=4_097)
    if temporal and torch.rand((), generator=draws) < recipe.past_share:
        # the paper's wiring sees as many outputs as there are yet, the release's all K or none
        past = recipe.past if recipe.wiring == "release" else int(torch.randint(recipe.past + 1, (), generator=draws))
    return Batch(temporal, past)


def build(args, recipe: Recipe) -> tuple[nn.ModuleList, dict[str, nn.Parameter]]:
    """(the harmonizer, LPIPS, VGG), and what is trained by name. ValueError if frames are too few for the past."""
    if recipe.frames < recipe.past + 2:
        raise ValueError(f"frames must be past + 2 = {recipe.past + 2} at least, got {recipe.frames}: "
                         f"--set frames={recipe.past + 2}, or a smaller past")
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # autocast, in the norms
    torch.manual_seed(recipe.seed)
    vae = WanVAE.from_pretrained(args.vae, subfolder(args.vae, "vae"))
    if args.base:
        dit = CosmosDiT.from_pretrained(args.base, subfolder(args.base, "transformer"), dtype=torch.float32)
    else:
        dit = small_base.new_transformer("cosmos", channels=vae.config.z_dim)
    settings = Settings(recipe.wiring, recipe.past, change_only=recipe.change_only)
    harmonizer = Harmonizer(frugal.apply(vae.float()), dit, settings).requires_grad_(False).eval()
    dit.activation_checkpointing = recipe.checkpoint_dit
    unused = (".attn2.", ".norm2.")  # attention to a text: of null text it has no gradient, and decay would shrink it
    params = {f"transformer.{name}": p.requires_grad_() for name, p in dit.named_parameters()
              if not any(part in f".{name}" for part in unused)}
    return nn.ModuleList([harmonizer, *lpips_and_texture(recipe.lpips, "vgg", args.perceptual)]), params


def motion(recipe: Recipe, x_gt: Tensor, flow: Tensor, visible: Tensor, names: list[str]) -> tuple[Tensor, Tensor]:
    """How the truth [n, 3, T, H, W] moves from its last frame but one to its last: flow [n, 2, H, W], visible
    [n, 1, H, W].

    The given flow and visible are Pairs.moving_batch's. ValueError for a clip that has none, if flow is to be exact.
    """
    flow, visible = flow[:, :, -1].clone(), visible[:, :, -1].clone()
    unknown = flow.isnan().flatten(1).any(dim=1)
    if unknown.any() and recipe.flow == "exact":
        name = names[int(unknown.nonzero()[0])]
        raise ValueError(f"{name}: holds no flow, which the warp loss needs: --set flow=dis estimates it, "
                         "--set lambda_warp=0 does without the loss")
    if unknown.any():
        pair = x_gt[unknown][:, :, -2:]
        forward, backward = flow_dis(pair), flow_dis(pair.flip(2))
        flow[unknown] = forward[:, :, 0]
        visible[unknown] = visible_by_consistency(forward, backward)[:, :, 0].to(visible)
    return flow, visible


@torch.no_grad()
def see_past(harmonizer: Harmonizer, recipe: Recipe, frames: Sequence[Tensor], truths: Sequence[Tensor]
             ) -> list[Tensor]:
    """`past` after these frames in a row, each [n, 3, H, W]: made of the model's own outputs, or of the truth."""
    past = []
    for frame, truth in zip(frames, truths, strict=True):
        past = harmonizer.remember(truth if recipe.past_from == "truth" else harmonizer.enhance(frame, past), past)
    return past


def forward_and_backward(models: nn.ModuleList, recipe: Recipe, x_ni: Tensor, x_gt: Tensor, terms: dict[str, Tensor],
                         batch: Batch | None = None, moved: tuple[Tensor, Tensor] | None = None,
                         draws: Generator | None = None) -> None:
    """Forward and backward for some of a step's clips x_ni, x_gt [n, 3, T, H, W] in [-1, 1].

    Their share of the batch's gradient is added to .grad, and their share of each term of the loss, unweighted, to
    `terms`. ValueError for clips of fewer than past + 2 frames.

    batch   None: the kind that takes the most memory
    moved   flow and visible between the two frames of a temporal batch (`motion`); None: nothing moved
    draws   for the square of the patch loss; None: the largest
    """
    harmonizer, lpips_distance, vgg = models
    n, _, T, H, W = x_ni.shape
    share = n / recipe.batch  # of the clips of the whole batch
    batch = batch or Batch(temporal=True, past=recipe.past)
    if T < recipe.past + 2:
        raise ValueError(f"wanted clips of past + 2 = {recipe.past + 2} frames, got {T}")
    frames, truths = x_ni.unbind(dim=2), x_gt.unbind(dim=2)
    shown = range(T - 2, T) if batch.temporal else range(T - 1, T)
    before = slice(shown[0] - batch.past, shown[0])
    found, outputs = defaultdict(float), []
    with run.autocast(recipe, x_gt.device):
        past = see_past(harmonizer, recipe, frames[before], truths[before])
        for t in shown:
            # Î_t = D(F(E(I_t), E(Î_t−1), …, E(Î_t−K)))                        DiffusionHarmonizer Eq. 2
            y = harmonizer.enhance(frames[t], past)
            past = harmonizer.remember(truths[t] if recipe.past_from == "truth" else y, past)
            outputs.append(y.to(x_gt.dtype))
            for name, distance in losses(recipe, lpips_distance, vgg, outputs[-1], truths[t], draws=draws).items():
                found[name] = found[name] + distance / len(shown)
        if batch.temporal and recipe.lambda_warp:
            flow, visible = moved or (x_gt.new_zeros(n, 2, H, W), x_gt.new_ones(n, 1, H, W))
            # DEVIATION from Eq. 5: over the pixels of the earlier frame, to which a made-up clip's flow belongs
            found["warp"] = warp_loss(outputs[0], outputs[1], flow, visible).mean()
    weights = {"l2": recipe.lambda_l2, "patch": recipe.lambda_patch, "lpips": recipe.lambda_lpips,
               "warp": recipe.lambda_warp}
    for name, value in found.items():
        terms[name] += share * value.detach()
    # L = λ_L2 L_L2 + λ_patch L_perc + λ_warp L_temp                               DiffusionHarmonizer Eqs. 4, 5
    (share * sum(weights[name] * value for name, value in found.items())).backward()


def latent_loss(harmonizer: Harmonizer, z_ni: Tensor, z_gt: Tensor) -> Tensor:
    """The mean square between the truth's latents and what is made of single frames, all [n, C, 1, h, w].

    DEVIATION: the papers have no such loss; their transformers are trained already.
    """
    return nnf.mse_loss(harmonizer.denoise(z_ni).float(), z_gt)


def losses(recipe: Recipe, lpips_distance: Lpips, vgg: Features, y: Tensor, truth: Tensor, draws: Generator | None
           ) -> dict[str, Tensor]:
    """The terms of one frame y [n, 3, H, W] in [-1, 1] that have a weight, each the mean over the clips."""
    found = {"l2": nnf.mse_loss(y, truth)}
    if recipe.lambda_patch:
        found["patch"] = patch_loss(vgg, y, truth, draws).mean()
    if recipe.lambda_lpips:
        found["lpips"] = lpips_distance(y, truth).mean()
    return found


def main(args, recipe: Recipe) -> None:
    models, params = build(args, recipe)
    data, val = run.open_data(args, recipe)
    harmonizer, lpips, _ = models
    identity = checkpoint.identify(args, recipe, data.paths(), models, params)
    processes.print_once(f"harmonizer: {recipe}\ntrained: {run.count(params)}")
    processes.print_once(memory.plan(models, forward_and_backward, recipe, args.device, processes.world()))
    models.to(args.device)
    optimizer = run.optimizer(params, recipe)
    start = checkpoint.resume(args.run, params, optimizer, identity, recipe.steps)
    log = watch.Log(args.run, recipe, start)
    *shown, _ = run.batch(data, recipe, 0, range(1), args.device)
    cached = None
    if start < recipe.latent_until:
        draw = partial(last_frames, data, recipe)
        cached = DrawnLatents(draw, harmonizer.vae, recipe, args.run / "latents.safetensors", identity)

    @torch.no_grad()
    def enhance(x_ni, x_gt):
        with run.autocast(recipe, x_ni.device):
            return harmonizer(x_ni)

    bar = run.Steps(args, recipe, start)
    for step in bar:
        terms, names = defaultdict(float), []
        optimizer.zero_grad()
        if step < recipe.latent_until:
            z_ni, z_gt = (z.to(args.device) for z in cached.batch(recipe.latent_batch, run.draws(recipe.seed, step)))
            with run.autocast(recipe, args.device):
                loss = latent_loss(harmonizer, z_ni, z_gt) / processes.world()  # every process computes the same
            terms["latent"] += loss.detach()
            loss.backward()
        else:
            batch = batch_of(step, recipe)
            for clips in processes.pieces(recipe):
                x_ni, x_gt, moved, drawn = read(data, recipe, step, clips, args.device, batch=batch)
                square = run.draws(recipe.seed, step, k=4_098)  # one a step, whichever process and piece a clip is in
                forward_and_backward(models, recipe, x_ni, x_gt, terms, batch=batch, moved=moved, draws=square)
                names += drawn
        processes.reduce(params, terms)
        norm = torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        processes.check_finite(step, terms, norm, names)
        run.set_rate(optimizer, recipe, step)
        optimizer.step()

        if step % 10 == 0:
            bar.set_postfix(log(step, terms))
        if run.due(step, recipe):
            log.report(step, enhance, shown, val, lpips)
            checkpoint.save(args.run, step + 1, params, optimizer, identity)
    if processes.rank() == 0:
        harmonizer.save_pretrained(args.out, vae=run.seen_from(args.out, args.vae))
        desk.say(f"harmonizer: {recipe.steps} steps -> {args.out}")


def last_frames(data: Pairs, recipe: Recipe, step: int, clips: range) -> tuple[Tensor, Tensor, list[str]]:
    """The last frames of a step's clips, padded to what the VAE takes: x_ni, x_gt [n, 3, 1, H, W]; names."""
    x_ni, x_gt, names = run.batch(data, recipe, step, clips, "cpu")
    x_ni, x_gt = (Harmonizer.pad(x[:, :, -1]).unsqueeze(2) for x in (x_ni, x_gt))
    return x_ni, x_gt, names


def read(data: Pairs, recipe: Recipe, step: int, clips: range, device: str, batch: Batch):
    """These clips of a step's batch: x_ni, x_gt, flow and visible where the warp loss wants them (else None), names."""
    if not (batch.temporal and recipe.lambda_warp):
        x_ni, x_gt, names = run.batch(data, recipe, step, clips, device)
        return x_ni, x_gt, None, names
    draws = [run.draws(recipe.seed, step, k) for k in clips]
    x_ni, x_gt, flow, visible, names = data.moving_batch(draws, recipe.real, recipe.varied)
    moved = motion(recipe, x_gt, flow, visible, names)
    return x_ni.to(device), x_gt.to(device), tuple(v.to(device) for v in moved), names


if __name__ == "__main__":
    parser = run.flags(__doc__, "harmonizer", RECIPES)
    parser.add_argument("--base", help="a Cosmos-Predict2 or a harmonizer, folder or hub id (default: a small new one)")
    parser.add_argument("--vae", default="weights/vae_wan_48",
                        help="Wan 2.1, folder or hub id (default weights/vae_wan_48)")
    run.launch(main, parser.parse_args(), RECIPES)
