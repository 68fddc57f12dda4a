"""The pictures of docs/walkthrough.md, from the project's own code and the small model in weights/.

    python -m experiments.walkthrough_figures      # a minute; writes walkthrough_*.png and prints their numbers
"""

import argparse
import functools
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from experiments import common, tables
from experiments.chopgrad_locality import influence
from mirage_min.data.toy_world import WorldConfig, make_clip
from mirage_min.data.video import read_image
from mirage_min.method.one_step import alpha_bar
from mirage_min.networks.vae_cogvideox import CogVideoXVAE
from mirage_min.networks.weights import load_tensors
from mirage_min.systems.mirage import Mirage
from mirage_min.systems.prompt import read_prompt

COLOURS = 128  # of a picture: they are part of every handout


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


def draw_groups() -> Figure:
    """Groups and caches on a time line: 17 frames, a convolution of kt = 3, the two frames that it keeps of each."""
    figure = Figure(figsize=(7.5, 1.9), layout="constrained")
    axis = figure.subplots()
    starts = [0, 9, 17]
    for g, (a, b) in enumerate(zip(starts, starts[1:])):
        for t in range(a, b):
            kept = t >= b - 2
            axis.add_patch(Rectangle((t + 0.05, 0), 0.9, 0.9, facecolor=f"C{g}", alpha=1.0 if kept else 0.4))
            axis.text(t + 0.5, 0.45, str(t), ha="center", va="center", fontsize=8)
        axis.text((a + b) / 2, 1.1, f"group {g}: {b - a} frames, one call of the network", ha="center", fontsize=8)
    axis.annotate("cache: the last kt − 1 = 2 input frames,\nput before the next group's first",
                  xy=(9.5, -0.05), xytext=(7.2, -1.0), fontsize=8, arrowprops={"arrowstyle": "->"})
    axis.set(xlim=(-0.2, 17.2), ylim=(-1.2, 1.5))
    axis.set_axis_off()
    return figure


def draw_graphs() -> Figure:
    """Three groups at d_trunc 1: which graph is alive after which group, and which .grad crosses a border."""
    figure = Figure(figsize=(7.5, 2.6), layout="constrained")
    axis = figure.subplots()
    for step in range(3):
        for g in range(step + 1):
            alive = g >= step - 1
            axis.add_patch(Rectangle((3 * g, -step), 2.2, 0.7, facecolor=f"C{g}" if alive else "none",
                                     alpha=0.5 if alive else 1.0, edgecolor="grey", linestyle="-" if alive else ":"))
            text = f"graph {g}" if alive else f"graph {g}: freed"
            axis.text(3 * g + 1.1, 0.35 - step, text, ha="center", va="center", fontsize=8)
        if step:
            axis.annotate("", xy=(3 * step - 0.75, 0.35 - step), xytext=(3 * step - 0.05, 0.35 - step),
                          arrowprops={"arrowstyle": "->", "color": "C3"})
            axis.text(3 * step - 0.4, 0.5 - step, ".grad", ha="center", fontsize=7, color="C3")
        axis.text(9.0, 0.35 - step, f"backward of L_{step}", va="center", fontsize=8)
    axis.set(xlim=(-0.2, 11.2), ylim=(-2.3, 1))
    axis.set_axis_off()
    return figure


@torch.no_grad()
def draw_stages(folder: Path, x_ni: Tensor, x_gt: Tensor) -> Figure:
    """The middle frame of clips [1, 3, T, H, W]: naive | base | with stage A | with A and H | truth."""
    text, _ = read_prompt(folder / "prompt.safetensors")
    mirage = Mirage.from_base(folder / "base", folder / "vae_2d", text, dtype=torch.float32)
    shown = [x_ni, mirage(x_ni)]
    for stage in ("stage_a", "stage_h"):
        mirage.load_stage(*load_tensors(folder / f"{stage}.safetensors"), f"{stage}.safetensors")
        shown.append(mirage(x_ni))
    titles = ("naive insertion", "base alone", "with stage A", "with A and H", "truth")
    return draw_row(dict(zip(titles, [x[0, :, x.shape[2] // 2].clamp(-1, 1) for x in (*shown, x_gt)])))


@torch.no_grad()
def draw_figure_2(mirage: Mirage, x_ni: Tensor) -> Figure:
    """Mirage's Figure 2 in what flows through it, of x_NI [1, 3, T, H, W]: three channels of the middle of each."""
    z_ni = mirage.vae.encode(x_ni)
    z_dr = mirage.denoise(z_ni)
    mids = mirage.mids(x_ni)
    parts = {"x_NI": x_ni, "z_NI": z_ni, "z_DR": z_dr, "2D features": mids[0],
             "x_DR": mirage.vae.decode(z_dr, inject=mids)}
    shown = {}
    for title, x in parts.items():
        x = x[0, :3, x.shape[2] // 2]
        if not title.startswith("x"):
            x = (x - x.mean(dim=(1, 2), keepdim=True)) / (2 * x.std(dim=(1, 2), keepdim=True))
        shown[f"{title}  {list(parts[title].shape[1:])}"] = x.clamp(-1, 1)
    return draw_row(shown)


def draw_pairs() -> Figure:
    """The contact sheet that build_pairs.py makes of the example scene, in its three panels of 240 pixels."""
    with tempfile.TemporaryDirectory() as folder:
        tables.python("-m", "mirage_min.data.toy_world", "--scene", f"{folder}/scene")
        tables.python("build_pairs.py", f"{folder}/scene", "--out", f"{folder}/pairs")
        sheet = read_image(f"{folder}/pairs/scene.png")
    titles = "asset placed by position alone", "aligned twice: x_NI", "truth: x_GT"
    return draw_row({title: sheet[:, :, 244 * i : 244 * i + 240] for i, title in enumerate(titles)})


def draw_row(pictures: dict[str, Tensor]) -> Figure:
    """Pictures [3, H, W] in [-1, 1] next to each other, with their titles."""
    figure = Figure(figsize=(2.2 * len(pictures), 1.8), layout="constrained")
    for axis, (title, x) in zip(figure.subplots(1, len(pictures)), pictures.items()):
        axis.imshow(((x + 1) / 2).permute(1, 2, 0))
        axis.set_title(title, fontsize=8)
        axis.set_axis_off()
    return figure


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    vae = CogVideoXVAE.from_pretrained(args.model / "base" / "vae", dtype=torch.float32).requires_grad_(False)
    with torch.no_grad():
        z = vae.encode(make_clip(1_000_000, WorldConfig(frames=33)).x_gt[None, :, :, 32:64, 48:96])
    table = influence_table(vae, z, probes=1)
    print("influence of group j on group i, that of i = 1:", [[f"{v:.3f}" for v in row] for row in table.tolist()])
    clip = make_clip(1_000_000, WorldConfig())
    x_ni, x_gt = clip.x_ni[None], clip.x_gt[None]
    save = functools.partial(common.save_figure, colours=COLOURS)
    save(args.out / "walkthrough_groups.png", draw_groups())
    save(args.out / "walkthrough_graphs.png", draw_graphs())
    save(args.out / "walkthrough_stages.png", draw_stages(args.model, x_ni, x_gt), dpi=80)
    mirage = Mirage.from_pretrained(args.model, dtype=torch.float32)
    save(args.out / "walkthrough_figure_2.png", draw_figure_2(mirage, x_ni), dpi=80)
    save(args.out / "walkthrough_pairs.png", draw_pairs(), dpi=100)
    save(args.out / "walkthrough_schedule.png", draw_schedule(alpha_bar()))
    save(args.out / "walkthrough_influence.png", draw_influence(table))


def flags() -> argparse.ArgumentParser:
    parser = common.flags(__doc__)
    parser.add_argument("--model", type=Path, default=Path("weights"), help="folder with base/vae (default weights)")
    return parser


if __name__ == "__main__":
    common.start(main, flags())
