"""What the official recipes cost, computed and not measured: operations of a training step, and GPU-hours from them.

    python -m experiments.training_cost          # minutes on one core; writes training_cost.md and .json

Every step runs as a whole, forward and backward, on the meta device, which has shapes and no data: matrix products,
convolutions and attention count, a multiplication and an addition as two. GPU-hours assume 40 % of an H200's 989 bf16
TFLOP/s, and nothing computed twice (no checkpointing).

    stage A     E3D(x_GT), E2D(x_NI); the decoder with its adapters, MSE + LPIPS (VGG)                 Mirage Eq. 3
    stage H     E3D(x_NI), E2D(x_NI); the transformer and the decoder with their adapters, LPIPS + Gram (VGG)    Eq. 4
    ChopGrad    stage H on long, large clips, the decoder in tiles
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
from experiments.common import H200_BF16
from experiments.tables import frames_of
from mirage_min.method import chopgrad
from mirage_min.networks.imagenet import TAPS, vgg16
from mirage_min.systems.mirage import Mirage
from mirage_min.systems.mirage_folder import HARMONISATION, RECONSTRUCTION, TRANSFORMER

SHARE = 0.4  # of a GPU's peak that training is assumed to reach
RANK, DIT_RANK = 16, 128  # of the adapters


@dataclass
class Recipe:
    """A row of the table."""

    name: str
    make: Callable[[str], Mirage]  # on a device
    stage: str                     # "A" or "H"
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
        """Two videos [B, 3, T, H, W] -> the loss; both terms take one pass through VGG, as in the scripts."""
        pairs = [(a.flatten(2), b.flatten(2)) for a, b in zip(self.taps(frames_of(x)), self.taps(frames_of(y)))]
        loss = sum(nnf.mse_loss(a, b) for a, b in pairs)
        if self.gram:
            loss = loss + sum(nnf.mse_loss(a @ a.mT, b @ b.mT) for a, b in pairs)
        return loss


def step(mirage: Mirage, judge: Judge, recipe: Recipe, x_ni: Tensor, x_gt: Tensor) -> None:
    """Forward and backward of one clip, as train_vae.py and train_harmonize.py have it."""
    def loss_fn(x: Tensor, where) -> Tensor:
        return nnf.mse_loss(x, x_gt[where]) + judge(x, x_gt[where])

    with torch.no_grad():
        z, inject = mirage.vae.encode(x_gt if recipe.stage == "A" else x_ni), mirage.mids(x_ni)
    z_dr = mirage.denoise(z) if recipe.stage == "H" else z
    _, grad_z = chopgrad.backward(mirage.vae, z_dr, loss_fn, 1, (recipe.tiles, recipe.tiles), inject=inject)
    if recipe.stage == "H":
        z_dr.backward(grad_z)


def prepared(recipe: Recipe, device: str) -> Callable[[], None]:
    """A call that takes a clip's step, its models being on a device, with random weights in bfloat16."""
    mirage = recipe.make(device)
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


def gpu_hours(flops: float, clips: int) -> float:
    """Of so many clips, each of so many operations, at SHARE of an H200's peak."""
    return flops * clips / (SHARE * H200_BF16) / 3600


HEAD = """# What the official recipes cost, computed and not measured

Made by `python -m experiments.training_cost`: operations counted on the meta device, at an assumed {share:.0%} of an
H200's {peak:.0f} bf16 TFLOP/s.

"""


def main(args: argparse.Namespace) -> None:
    rows, figures = [], {}
    for recipe in RECIPES:
        flops = operations(recipe)
        hours = gpu_hours(flops, recipe.clips)
        size = "x".join(map(str, recipe.size))
        rows.append([f"{recipe.name}, {size}", f"{flops / 1e12:,.0f}", f"{recipe.clips:,}", f"{hours:.3g}"])
        figures[recipe.name] = {"size": recipe.size, "flops": flops, "clips": recipe.clips, "gpu_hours": hours}
        print(*rows[-1], sep=" | ", flush=True)
    text = HEAD.format(share=SHARE, peak=H200_BF16 / 1e12)
    text += common.table(["", "TFLOP a clip", "clips", "GPU-hours"], rows)
    common.save_text(args.out / "training_cost.md", text + "\n")
    common.save_json(args.out / "training_cost.json", figures)


def flags() -> argparse.ArgumentParser:
    return common.flags(__doc__)


if __name__ == "__main__":
    common.start(main, flags())
