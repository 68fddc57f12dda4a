"""Mirage Table 1 and Figure 4 in the small: naive insertion, R3D2, and Mirage.

    python -m experiments.mirage_table1 --perceptual DIR

    R3D2       R3D2-BIG's wiring on the small 2D VAE (train_r3d2.py --recipe small), each frame alone. Its UNet first
               learns z_GT from z_NI in the 2D latents, as the 3D base did (train_base.py one_step_2d): once for all
               seeds, 20 times the steps of a stage. Then as many steps as Mirage's stages have together
    Mirage     stages A and H by their scripts

Each step of either sees 18 frames, and the losses are of one kind: LPIPS on SqueezeNet, Gram on what VGG there is, 2
MSE. R3D2's Gram counts .5, as in its paper, Mirage's .1. Identity over a long clip (Fig. 4): the mean colour of the
actor's pixels minus that of the truth's, frame by frame; its deviation over the frames, in 1/255, is the drift.
mirage_fig4.png shows the actor at three frames of the first clip.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from experiments import common, tables
from mirage_min.method import metrics
from mirage_min.networks import weights
from mirage_min.systems.mirage import Mirage

METRICS = "PSNR", "SSIM", "LPIPS", "DISTS", "E*warp", "vFID"
PAPER = {region: {method: dict(zip(METRICS, row)) for method, row in rows.items()} for region, rows in {
    tables.CROPS: {"naive insertion": (14.93, 0.307, 0.209, 0.236, 0.801, 0.506),
                   "R3D2": (16.18, 0.356, 0.188, 0.207, 1.119, 0.442),
                   "Mirage": (17.43, 0.390, 0.179, 0.183, 0.874, 0.448)},
    tables.FULL: {"naive insertion": (27.56, 0.921, 0.112, 0.091, 7.423, 0.244),
                  "R3D2": (27.61, 0.904, 0.072, 0.055, 11.320, 0.206),
                  "Mirage": (28.60, 0.914, 0.069, 0.054, 9.955, 0.178)}}.items()}
LONG = 49  # frames of a long clip


# ---- the two methods, as functions (x_ni, x_gt) -> x_dr --------------------------------------------------------------

def theirs(args: argparse.Namespace, seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    """R3D2, trained."""
    folder = tables.once(args.runs / "r3d2" / f"seed_{seed}", tables.trained_with(args),
                         lambda to: tables.train_r3d2(args, to, seed))
    r3d2 = tables.read_r3d2(folder)
    return lambda x_ni, x_gt: torch.stack(list(r3d2.stream(x_ni[0].unbind(1), batch=9)), dim=1)[None]


def ours(args: argparse.Namespace, seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Mirage's two stages; any length, as a stream."""
    mirage = Mirage.from_pretrained(tables.harmonised(args, seed))
    return lambda x_ni, x_gt: torch.stack(list(mirage.stream(x_ni[0].unbind(1))), dim=1)[None]


# ---- identity over a long clip ---------------------------------------------------------------------------------------

def drift(clips: Path, folder: Path, key: str) -> float:
    """Deviation over the frames of the actor's mean colour minus the truth's, in 1/255; mean over clips."""
    found = []
    for path in sorted(clips.glob("*.safetensors")):
        truth = weights.load_tensors(path)[0]
        x = weights.load_tensors(folder / path.name)[0][key].float()
        mask = truth["actor"].float() / 255
        shown = mask.sum(dim=(0, 2, 3)) > 0
        if shown.sum() > 1:
            error = ((x - truth["x_gt"].float()) * mask).sum(dim=(2, 3)) / mask.sum(dim=(2, 3))      # [3, T]
            error = error[:, shown]
            found.append((error - error.mean(dim=1, keepdim=True)).square().sum(dim=0).mean().sqrt().item())
    return sum(found) / len(found)


def draw_figure_4(path: Path, clips: Path, results: dict[str, Path]) -> None:
    """Draw the actor at the first, the middle and the last frame that shows it: naive, truth, each method."""
    clip = min(clips.glob("*.safetensors"))
    truth = weights.load_tensors(clip)[0]
    crops = metrics.actor_crops(truth["boxes"], *truth["x_gt"].shape[-2:])
    shown = [t for t, crop in enumerate(crops) if crop]
    rows = {"naive insertion": truth["x_ni"], "truth": truth["x_gt"]}
    rows |= {name: weights.load_tensors(folder / clip.name)[0]["x_dr"] for name, folder in results.items()}
    figure = Figure(figsize=(8, 2 * len(rows)), layout="constrained")
    for line, (name, x) in zip(figure.subplots(len(rows), 3), rows.items()):
        for axis, t in zip(line, (shown[0], shown[len(shown) // 2], shown[-1])):
            ys, xs = crops[t]
            tables.draw_frame(axis, x[:, t, ys, xs], f"{name}, frame {t}")
    common.save_figure(path, figure, dpi=80)


METHODS = {"R3D2": theirs, "Mirage": ours}


def predict(args: argparse.Namespace, short: Path, long: Path, name: str, seed: int, to: Path) -> None:
    """Train by the method of that name, unless it is trained, and write what it makes of all clips into `to`."""
    model = METHODS[name](args, seed)
    for clips, part in ((short, "short"), (long, "long")):
        (to / part).mkdir(exist_ok=True)
        tables.predict(clips, to / part, model)


def main(args: argparse.Namespace) -> None:
    short = tables.held_out(args)
    few = tables.with_settings(args, clips=min(8, args.clips))
    long = tables.held_out(few, LONG)
    seeds, drifts = [], []
    for seed in range(1, args.seeds + 1):
        folder = args.runs / "mirage_table1" / f"seed_{seed}"
        made = {}
        for name in METHODS:
            make = partial(predict, args, short, long, name, seed)
            made[name] = tables.once(folder / name, tables.scored_on(args), make)
        results = {name: to / "short" for name, to in made.items()}
        seeds.append(tables.evaluate(args, short, results, folder / "scores"))
        drifts.append({"naive insertion": drift(long, long, "x_ni")}
                      | {name: drift(long, to / "long", "x_dr") for name, to in made.items()})
    seeds[0]["remarks"][f"drift of the actor's colour over {LONG} frames, of 255"] = ", ".join(
        f"{name} {' '.join(f'{each[name]:.1f}' for each in drifts)}" for name in drifts[0])
    draw_figure_4(args.out / "reproduce" / "mirage_fig4.png", long, {name: to / "long" for name, to in made.items()})
    tables.report("mirage_table1", __doc__, args, PAPER, seeds, more={"drift": drifts})


def flags() -> argparse.ArgumentParser:
    return tables.flags(__doc__, steps=100)


if __name__ == "__main__":
    common.start(main, flags())
