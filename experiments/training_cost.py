"""What the official recipes cost, computed and not measured: operations of a training step, and GPU-hours from them.

    python -m experiments.training_cost          # minutes on one core; writes training_cost.md and .json

Every step runs as a whole, forward and backward, on the meta device, which has shapes and no data: matrix products,
convolutions and attention count, a multiplication and an addition as two. GPU-hours assume 40 % of an H200's 989 bf16
TFLOP/s, and nothing computed twice (no checkpointing).

    stage A     E3D(x_GT), E2D(x_NI); the decoder with its adapters, MSE + LPIPS (VGG)                 Mirage Eq. 3
    stage H     E3D(x_NI), E2D(x_NI); the transformer and the decoder with their adapters, LPIPS + Gram (VGG)    Eq. 4
    ChopGrad    stage H on long, large clips, the decoder in tiles
    restorer    E3D of both; all of the transformer, latent MSE and LPIPS (VGG), the decoder in tiles       ChopGrad C.2

A restorer's memory is counted as the scripts predict it (training/memory.py).
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

SHARE = 0.4  # of a GPU's peak that training is assumed to reach
RANK, DIT_RANK = 16, 128  # of the adapters
PROCESSES = 8  # among which a restorer's weights, gradients and moments are divided


@dataclass
class Recipe:
    """A row of the table."""

    name: str
    make: Callable[[str], Mirage | Restorer]  # on a device
    stage: str                     # "A" or "H", or "R": a restorer
    size: tuple[int, int, int]     # frames, height, width of a clip
    clips: int                     # in all
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
    """VGG-16 with random weights under losses that cost what LPIPS and, with `gram`, the Gram loss do.

    What LPIPS does with the taps is no matrix product and costs next to nothing; Gram takes one product a tap.
    """

    def __init__(self, gram: bool):
        super().__init__()
        self.layers, self.gram = vgg16().requires_grad_(False), gram

    def taps(self, x: Tensor) -> list[Tensor]:
        """Frames [N, 3, H, W] -> what LPIPS and Gram look at, finest first."""
        found = []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in TAPS["vgg"].values():
                found.append(x)
        return found

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Frames x, y [N, 3, H, W] -> the loss; both terms take one pass through VGG, as in the scripts."""
        pairs = [(a.flatten(2), b.flatten(2)) for a, b in zip(self.taps(x), self.taps(y))]
        loss = sum(nnf.mse_loss(a, b) for a, b in pairs)
        if self.gram:
            loss = loss + sum(nnf.mse_loss(a @ a.mT, b @ b.mT) for a, b in pairs)
        return loss


def step(mirage: Mirage, judge: Judge, recipe: Recipe, x_ni: Tensor, x_gt: Tensor) -> None:
    """Forward and backward of one clip, as train_vae.py and train_harmonize.py have it."""
    def loss_fn(x: Tensor, where) -> Tensor:
        return nnf.mse_loss(x, x_gt[where]) + judge(frames_of(x), frames_of(x_gt[where]))

    with torch.no_grad():
        z, inject = mirage.vae.encode(x_gt if recipe.stage == "A" else x_ni), mirage.mids(x_ni)
    z_dr = mirage.denoise(z) if recipe.stage == "H" else z
    _, grad_z = chopgrad.backward(mirage.vae, z_dr, loss_fn, 1, (recipe.tiles, recipe.tiles), inject=inject)
    if recipe.stage == "H":
        z_dr.backward(grad_z)


def restorer_step(models: nn.ModuleList, recipe: Recipe, x_in: Tensor, x_gt: Tensor, checkpoint: bool = False) -> None:
    """Forward and backward of one clip, as train_restore.py has it; models: the restorer and a Judge."""
    restorer, judge = models

    def loss_fn(x: Tensor, where) -> Tensor:
        return judge(frames_of(x), frames_of(x_gt[where]))

    with torch.no_grad():
        z_in, z_gt = restorer.vae.encode(x_in), restorer.vae.encode(x_gt)
    z_out = restorer.denoise(z_in)
    loss = nnf.mse_loss(z_out, z_gt)
    _, grad_z = chopgrad.backward(restorer.vae, z_out, loss_fn, 1, (recipe.tiles, recipe.tiles), checkpoint=checkpoint)
    torch.autograd.backward([loss, z_out], [None, grad_z])


def prepared(recipe: Recipe, device: str) -> Callable[[], None]:
    """A call that takes a clip's step, its models being on a device, with random weights in bfloat16."""
    mirage = recipe.make(device)
    if recipe.stage == "R":
        with torch.device(device):
            judge = Judge(gram=False).to(torch.bfloat16)
            x_in, x_gt = (torch.zeros(1, 3, *recipe.size, dtype=torch.bfloat16) for _ in range(2))
        mirage.dit.requires_grad_()
        return partial(restorer_step, nn.ModuleList([mirage, judge]), recipe, x_in, x_gt)
    with torch.device(device):
        judge = Judge(gram=recipe.stage == "H")
        mirage.add_lora(RECONSTRUCTION, RANK, RANK)
        if recipe.stage == "H":
            mirage.requires_grad_(False)
            mirage.add_lora(HARMONISATION, RANK, RANK)
            mirage.add_lora(TRANSFORMER, DIT_RANK, DIT_RANK / 2)
        x_ni, x_gt = (torch.zeros(1, 3, *recipe.size, dtype=torch.bfloat16) for _ in range(2))
    for module in (mirage, judge):
        module.to(torch.bfloat16)
    return partial(step, mirage, judge, recipe, mirage.pad(x_ni), mirage.pad(x_gt))


def operations(recipe: Recipe, device: str = "meta") -> int:
    """Floating-point operations of a clip's step."""
    take_step = prepared(recipe, device)
    with FlopCounterMode(display=False) as count:
        take_step()
    return count.get_total_flops()


def restorer_memory(recipe: Recipe, processes: int) -> dict[str, int]:
    """Bytes of a step in one of so many processes, by what they hold (memory.expected): weights and moments in float32,
    the rest under autocast in bfloat16, transformer and decoder recomputed."""
    restorer = recipe.make("meta")
    restorer.dit.float().requires_grad_()
    restorer.dit.activation_checkpointing = True
    with torch.device("meta"):
        models = nn.ModuleList([restorer, Judge(gram=False)])

    def step(models: nn.ModuleList, x_in: Tensor, x_gt: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # as where shard=true
            restorer_step(models, recipe, x_in, x_gt, checkpoint=True)
    return memory.expected(models, step, (1, 3, *recipe.size), "cpu", restorer.dit.parameters(), processes)


def gpu_hours(flops: float, clips: int) -> float:
    """Of so many clips, each of so many operations, at SHARE of an H200's peak."""
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
        name, flops = f"{recipe.name}, {'x'.join(map(str, recipe.size))}", operations(recipe)
        hours = gpu_hours(flops, recipe.clips)
        rows.append([name, f"{flops / 1e12:,.0f}", f"{recipe.clips:,}", f"{hours:.3g}"])
        figures[name] = {"flops": flops, "clips": recipe.clips, "gpu_hours": hours}
        print(*rows[-1], sep=" | ", flush=True)
        if recipe.stage == "R":
            parts = restorer_memory(recipe, PROCESSES)
            figures[name] |= {"processes": PROCESSES, "bytes": parts}
            needs.append([name, *(f"{size / GIB:.1f}" for size in (*parts.values(), sum(parts.values())))])
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
