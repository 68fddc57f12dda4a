"""What the official recipes cost, computed and not measured: operations of a training step, and GPU-hours from them.

    python -m experiments.training_cost          # minutes on one core; writes training_cost.md and .json

The whole step, forward and backward, runs on the meta device, whose tensors have a shape and no data. Matrix products,
convolutions and attention are counted; a multiplication and an addition are two operations. GPU-hours assume 40 % of an
H200's 989 bf16 TFLOP/s, and that nothing is computed twice (no checkpointing).

    stage A     E3D(x_GT), E2D(x_NI); the decoder with its adapters, MSE + LPIPS (VGG)                 Mirage Eq. 3
    stage H     E3D(x_NI), E2D(x_NI); the transformer and the decoder with their adapters, LPIPS + Gram (VGG)    Eq. 4
    ChopGrad    stage H on long, large clips, the decoder in tiles
    restorer    E3D(x_in), E3D(x_GT); all of the transformer, latent MSE and LPIPS (VGG), decoder in tiles  ChopGrad C.2

A restorer's memory is predicted as the training scripts do it (training/memory.py).
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.utils.flop_counter import FlopCounterMode

from experiments import common, published
from experiments.common import GIB, H200_BF16
from experiments.tables import frames_of
from mirage_min.method import chopgrad
from mirage_min.networks.imagenet import TAPS, vgg16
from mirage_min.systems.mirage import Mirage
from mirage_min.systems.mirage_folder import HARMONISATION, RECONSTRUCTION, TRANSFORMER
from mirage_min.systems.restore import Restorer
from mirage_min.training import memory

SHARE = 0.4  # of a GPU's peak, which training is assumed to reach
RANK, DIT_RANK = 16, 128  # of the adapters
PROCESSES = 8  # that share a restorer's weights, gradients and moments


@dataclass
class Recipe:
    """A row of the table."""

    name: str
    make: Callable[[str], Mirage | Restorer]  # the system on a device
    stage: str                     # "A" or "H", or "R": a restorer
    size: tuple[int, int, int]     # frames, height, width of a clip
    clips: int                     # of the whole training
    tiles: int = 1


WAN_1_3B, WAN_14B = (partial(published.mirage_wan, size) for size in ("1.3B", "14B"))
RECIPES = [
    Recipe("stage A, CogVideoX1.5-5B", published.mirage_5b, "A", (9, 512, 768), 80_000),
    Recipe("stage H, CogVideoX1.5-5B", published.mirage_5b, "H", (9, 512, 768), 80_000),
    Recipe("stage H, Wan 2.1 1.3B", WAN_1_3B, "H", (9, 480, 832), 80_000),
    Recipe("stage H, Wan 2.1 14B", WAN_14B, "H", (9, 480, 832), 80_000),
    Recipe("ChopGrad's fine-tuning, Wan 2.1 1.3B, 4x4 tiles", WAN_1_3B, "H", (49, 720, 1280), 1_000, tiles=4),
]

WAN_14B_RESTORER = partial(published.artifact_remover, size="14B")
RESTORERS = [
    Recipe("restorer, Wan 2.1 14B, 2x2 tiles", WAN_14B_RESTORER, "R", (81, 480, 832), 880, tiles=2),
    Recipe("restorer, Wan 2.1 14B, 2x2 tiles", WAN_14B_RESTORER, "R", (49, 720, 1280), 880, tiles=2),
]


class Judge(nn.Module):
    """VGG-16 with random weights, and losses that cost as much as LPIPS and, with `gram`, the Gram loss.

    LPIPS compares the taps without a matrix product, which costs next to nothing; Gram takes one product for each tap.
    """

    def __init__(self, gram: bool):
        super().__init__()
        self.layers = vgg16().requires_grad_(False)
        self.gram = gram

    def taps(self, x: Tensor) -> list[Tensor]:
        """Frames [N, 3, H, W] -> the features that LPIPS and Gram compare, finest first."""
        taps = []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in TAPS["vgg"].values():
                taps.append(x)
        return taps

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Frames x, y [N, 3, H, W] -> the loss; both terms share one pass through VGG, as in the scripts."""
        pairs = [(a.flatten(2), b.flatten(2)) for a, b in zip(self.taps(x), self.taps(y))]
        loss = sum(nnf.mse_loss(a, b) for a, b in pairs)
        if self.gram:
            loss = loss + sum(nnf.mse_loss(a @ a.mT, b @ b.mT) for a, b in pairs)
        return loss


def step(mirage: Mirage, judge: Judge, recipe: Recipe, x_ni: Tensor, x_gt: Tensor) -> None:
    """Forward and backward of one clip, as in train_vae.py and train_harmonize.py."""
    def loss_fn(x: Tensor, where) -> Tensor:
        return nnf.mse_loss(x, x_gt[where]) + judge(frames_of(x), frames_of(x_gt[where]))

    with torch.no_grad():
        z = mirage.vae.encode(x_gt if recipe.stage == "A" else x_ni)
        inject = mirage.mids(x_ni)
    z_dr = mirage.denoise(z) if recipe.stage == "H" else z
    tiles = recipe.tiles, recipe.tiles
    _, grad_z = chopgrad.backward(mirage.vae, z_dr, loss_fn, d_trunc=1, tiles=tiles, inject=inject)
    if recipe.stage == "H":
        z_dr.backward(grad_z)


def restorer_step(models: nn.ModuleList, recipe: Recipe, x_in: Tensor, x_gt: Tensor, checkpoint: bool = False) -> None:
    """Forward and backward of one clip, as in train_restore.py; models: the restorer and a Judge."""
    restorer, judge = models

    def loss_fn(x: Tensor, where) -> Tensor:
        return judge(frames_of(x), frames_of(x_gt[where]))

    with torch.no_grad():
        z_in, z_gt = restorer.vae.encode(x_in), restorer.vae.encode(x_gt)
    z_out = restorer.denoise(z_in)
    loss = nnf.mse_loss(z_out, z_gt)
    tiles = recipe.tiles, recipe.tiles
    _, grad_z = chopgrad.backward(restorer.vae, z_out, loss_fn, d_trunc=1, tiles=tiles, checkpoint=checkpoint)
    torch.autograd.backward([loss, z_out], [None, grad_z])


def prepared(recipe: Recipe, device: str) -> Callable[[], None]:
    """A function that takes one clip's step: models with random weights on the device, everything in bfloat16."""
    mirage = recipe.make(device)
    if recipe.stage == "R":
        with torch.device(device):
            judge = Judge(gram=False).to(torch.bfloat16)
            x_in, x_gt = torch.zeros(2, 1, 3, *recipe.size, dtype=torch.bfloat16)
        mirage.dit.requires_grad_()
        return partial(restorer_step, nn.ModuleList([mirage, judge]), recipe, x_in, x_gt)
    with torch.device(device):
        judge = Judge(gram=recipe.stage == "H")
        mirage.add_lora(RECONSTRUCTION, RANK, RANK)
        if recipe.stage == "H":
            mirage.requires_grad_(False)
            mirage.add_lora(HARMONISATION, RANK, RANK)
            mirage.add_lora(TRANSFORMER, DIT_RANK, DIT_RANK / 2)
        x_ni, x_gt = torch.zeros(2, 1, 3, *recipe.size, dtype=torch.bfloat16)
    mirage.to(torch.bfloat16)
    judge.to(torch.bfloat16)
    return partial(step, mirage, judge, recipe, mirage.pad(x_ni), mirage.pad(x_gt))


def operations(recipe: Recipe, device: str = "meta") -> int:
    """Floating-point operations of one clip's step."""
    take_step = prepared(recipe, device)
    with FlopCounterMode(display=False) as count:
        take_step()
    return count.get_total_flops()


def restorer_memory(recipe: Recipe, processes: int) -> dict[str, int]:
    """Bytes that one of `processes` processes needs for a step, by what they hold (memory.expected).

    Weights and moments are float32, the rest is bfloat16 under autocast; transformer and decoder are recomputed.
    """
    restorer = recipe.make("meta")
    restorer.dit.float().requires_grad_()
    restorer.dit.activation_checkpointing = True
    with torch.device("meta"):
        models = nn.ModuleList([restorer, Judge(gram=False)])

    def autocast_step(models: nn.ModuleList, x_in: Tensor, x_gt: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # as with shard=true
            restorer_step(models, recipe, x_in, x_gt, checkpoint=True)
    return memory.expected(models, autocast_step, (1, 3, *recipe.size), "cpu", restorer.dit.parameters(), processes)


def gpu_hours(flops: float, clips: int) -> float:
    """GPU-hours of `clips` clips, with `flops` operations each, at SHARE of an H200's peak."""
    return flops * clips / (SHARE * H200_BF16) / 3600


HEAD = """# What the official recipes cost, computed and not measured

Made by `python -m experiments.training_cost`: operations counted on the meta device, at an assumed {share:.0%} of an
H200's {peak:.0f} bf16 TFLOP/s.

"""
MEMORY = """

Memory of a restorer's step on one clip in each of {processes} processes, in GiB: weights and moments in float32, the
rest in bfloat16, with shard, checkpoint_dit and checkpoint_decoder.

"""


def main(args: argparse.Namespace) -> None:
    rows, figures, needs = [], {}, []
    for recipe in RECIPES + RESTORERS:
        name = f"{recipe.name}, {'x'.join(map(str, recipe.size))}"
        flops = operations(recipe)
        hours = gpu_hours(flops, recipe.clips)
        rows.append([name, f"{flops / 1e12:,.0f}", f"{recipe.clips:,}", f"{hours:.3g}"])
        figures[name] = {"flops": flops, "clips": recipe.clips, "gpu_hours": hours}
        print(*rows[-1], sep=" | ", flush=True)
        if recipe.stage == "R":
            sizes = restorer_memory(recipe, PROCESSES)
            figures[name] |= {"processes": PROCESSES, "bytes": sizes}
            needs.append([name, *(f"{size / GIB:.1f}" for size in (*sizes.values(), sum(sizes.values())))])
            print(*needs[-1], sep=" | ", flush=True)
    text = HEAD.format(share=SHARE, peak=H200_BF16 / 1e12)
    text += common.table(["", "TFLOP a clip", "clips", "GPU-hours"], rows) + MEMORY.format(processes=PROCESSES)
    text += common.table(["", "weights", "moments", "for backward", "the rest", "in all"], needs)
    common.save_text(args.out / "training_cost.md", text + "\n")
    common.save_json(args.out / "training_cost.json", figures)


def flags() -> argparse.ArgumentParser:
    return common.flags(__doc__)


if __name__ == "__main__":
    common.start(main, flags())
