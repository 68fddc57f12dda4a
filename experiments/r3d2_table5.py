"""R3D2 Table 5 in the small: a model that was trained to repair Gaussians does not insert anything.

    python -m experiments.r3d2_table5 --perceptual DIR

    reconstruction   the scene rendered from its Gaussians, its own car in it: nothing was inserted
    R3D2             trained on pairs: an asset inserted into the reconstruction, and what was filmed (mirage_table3's)
    repair only      the same network, steps and scenes, but trained on reconstructions without an insertion, as Difix
                     is: it sees floaters and noise, and never a missing shadow

All are scored on held-out pairs (those of mirage_table3); the two models on the same naive insertions. The paper's
third row is the published Difix3D+.
"""

import argparse
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from experiments import common, tables
from experiments.mirage_table3 import all_scenes, pairs, settings_of, trained
from mirage_min.data.pixels import to_bytes
from mirage_min.data.scene import read_scene
from mirage_min.data.splat import render
from mirage_min.data.video import Video
from mirage_min.networks import weights

PAPER = {"naive insertion": {"LPIPS": 0.211, "SSIM": 0.866, "PSNR": 24.48},
         "reconstruction": {"LPIPS": 0.177, "SSIM": 0.896, "PSNR": 28.94},
         "R3D2": {"LPIPS": 0.142, "SSIM": 0.862, "PSNR": 25.29},
         "repair only": {"LPIPS": 0.254, "SSIM": 0.806, "PSNR": 23.58}}


@torch.no_grad()
def reconstruction(folder: Path, frames: int) -> tuple[Tensor, Tensor]:
    """The first frames of a scene as its Gaussians show it and as it was filmed, each [3, T, H, W] in [-1, 1]."""
    scene = read_scene(folder)
    shown = [render(scene.at(t), scene.cameras[t])[0] * 2 - 1 for t in range(frames)]
    with Video(scene.video) as video:
        filmed = list(islice(video, frames))
    return torch.stack(shown, dim=1), torch.stack(filmed, dim=1)


def save_repairs(folders: list[Path], to: Path) -> None:
    """Pairs whose naive side is the reconstruction itself."""
    for folder in folders:
        x, x_gt = reconstruction(folder, 9)
        weights.save_tensors(to / f"{folder.name}.safetensors", {"x_ni": to_bytes(x), "x_gt": to_bytes(x_gt)})


def save_reconstructions(folders: list[Path], clips: Path, to: Path) -> None:
    """The reconstruction of every scene of which there is a clip, as x_dr for evaluate.py."""
    names = {path.stem.rpartition("_")[0]: path.name for path in clips.glob("*.safetensors")}
    for folder in folders:
        if folder.name in names:
            weights.save_tensors(to / names[folder.name], {"x_dr": to_bytes(reconstruction(folder, 9)[0])})


def main(args: argparse.Namespace) -> None:
    training, held_out = all_scenes(args)
    clips, home = pairs(args, held_out, "full", "held_out"), args.runs / "r3d2_table5"
    repairs = tables.once(home / "repairs", {"scenes": training}, partial(save_repairs, training))
    shown = tables.once(home / "reconstruction", {"scenes": held_out}, partial(save_reconstructions, held_out, clips))
    settings, seeds = settings_of(args), []
    for seed in range(1, args.seeds + 1):
        folder = home / f"seed_{seed}"
        repair = partial(tables.train_r3d2, args, seed=seed, data=repairs, steps=settings["steps_r3d2"])
        models = {"R3D2": trained(args, "full", seed),
                  "repair only": tables.once(folder / "model repair only", settings, repair)}
        results = tables.harmonise(clips, folder, models, settings, tables.read_r3d2)
        seeds.append(tables.evaluate(args, clips, {"reconstruction": shown} | results, folder / "scores", exact=False))
    pictures = {"reconstruction": shown} | results
    tables.draw_strip(args.out / "reproduce" / "r3d2_table5.png", clips, pictures, frames=(4,))
    tables.report("r3d2_table5", __doc__, args, {tables.FULL: PAPER}, seeds)


def flags() -> argparse.ArgumentParser:
    return tables.flags(__doc__, steps=100)


if __name__ == "__main__":
    common.start(main, flags())
