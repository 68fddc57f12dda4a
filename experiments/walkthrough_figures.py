"""The pictures of docs/walkthrough.md, from the project's own code and the small model in weights/.

    python -m experiments.walkthrough_figures      # half a minute; writes walkthrough_*.png and prints their numbers
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from experiments import common
from experiments.chopgrad_locality import influence
from mirage_min.data.toy_world import WorldConfig, make_clip
from mirage_min.method.one_step import alpha_bar
from mirage_min.networks.vae_cogvideox import CogVideoXVAE


def axes() -> tuple[Figure, object]:
    """A small figure and its one plot."""
    figure = Figure(figsize=(4.2, 2.8), layout="constrained")
    return figure, figure.subplots()


def draw_schedule(table: Tensor) -> Figure:
    """ᾱ [1000], and the two weights of one step, z0 = √ᾱ z_t − √(1 − ᾱ) v."""
    figure, axis = axes()
    axis.plot(table, label="ᾱ")
    axis.plot(table.sqrt(), label="√ᾱ, weight of z_NI")
    axis.plot((1 - table).sqrt(), label="√(1 − ᾱ), weight of v")
    axis.axvline(199, color="grey", linewidth=0.8)
    axis.text(205, 1.0, "t = 199")
    axis.set_xlabel("t")
    axis.legend(loc="center right")
    return figure


def influence_table(vae: CogVideoXVAE, z: Tensor, probes: int) -> Tensor:
    """[groups, groups]: the influence of latent group j on the pixels of group i, as a share of group i's on them."""
    N = len(vae.decode_groups(z.shape[2]))
    values = iter(influence(vae, z, probes))
    table = torch.zeros(N, N)
    for i in range(N):
        for j in range(i + 1):
            table[i, j] = next(values)[1]
    return table / table.diag()[:, None]


def draw_influence(table: Tensor) -> Figure:
    """The table as a picture, in powers of ten."""
    figure, axis = axes()
    image = axis.imshow(table.clamp_min(1e-6).log10(), vmin=-4, vmax=0)
    axis.set(xlabel="latents of group j", ylabel="pixels of group i")
    axis.set(xticks=range(len(table)), yticks=range(len(table)))
    figure.colorbar(image, label="log10 of influence, own = 1")
    return figure


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    vae = CogVideoXVAE.from_pretrained(args.model / "base" / "vae", dtype=torch.float32).requires_grad_(False)
    with torch.no_grad():
        z = vae.encode(make_clip(1_000_000, WorldConfig(frames=33)).x_gt[None, :, :, 32:64, 48:96])
    table = influence_table(vae, z, probes=1)
    print("influence of group j on group i, that of i = 1:", [[f"{v:.3f}" for v in row] for row in table.tolist()])
    common.save_figure(args.out / "walkthrough_schedule.png", draw_schedule(alpha_bar()))
    common.save_figure(args.out / "walkthrough_influence.png", draw_influence(table))


def flags() -> argparse.ArgumentParser:
    parser = common.flags(__doc__)
    parser.add_argument("--model", type=Path, default=Path("weights"), help="folder with base/vae (default weights)")
    return parser


if __name__ == "__main__":
    common.start(main, flags())
