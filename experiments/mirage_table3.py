"""Mirage Table 3 in the small: what aligned pairs are worth to the R3D2 that is trained on them.

    python -m experiments.mirage_table3 --perceptual DIR

R3D2, as in mirage_table1, on pairs that build_pairs.py made of the same scenes of Gaussians with --align none and with
--align full; both are scored on the same held-out pairs, aligned in full. Training has 3/5 of the steps of the other
tables, for the pairs are few. The scenes are toy_world's own reconstructions, 9 frames long.
"""

import argparse
from functools import partial
from pathlib import Path

from experiments import common, tables

PAPER = {"none": {"PSNR": 27.61, "LPIPS": 0.072, "vFID": 0.206}, "full": {"PSNR": 28.31, "LPIPS": 0.072, "vFID": 0.193}}
TRAINING, HELD_OUT = 32, 16  # scenes, about half of which keep their actor in the image


def make_scene(seed: int, to: Path) -> None:
    """The scene folder of a seed, in the folder `to`."""
    tables.python("-m", "mirage_min.data.toy_world", "--scene", to / f"scene_{seed}", "--first-seed", seed)


def scenes(args: argparse.Namespace, name: str, first_seed: int, count: int) -> list[Path]:
    """Scene folders, made once."""
    folder = args.runs / "mirage_table3" / name
    return [tables.once(folder / str(seed), {"seed": seed}, partial(make_scene, seed)) / f"scene_{seed}"
            for seed in range(first_seed, first_seed + count)]


def pairs(args: argparse.Namespace, folders: list[Path], align: str, name: str) -> Path:
    """build_pairs.py on them, leaving out only scenes whose actor does not stay in the image (status 1): what poor
    alignment costs is the question."""
    def make(to: Path) -> None:
        tables.python("build_pairs.py", *folders, "--out", to, "--align", align, "--frames", 9, "--min-iou", 0,
                      accepted=(0, 1))
    return tables.once(args.runs / "mirage_table3" / name, {"scenes": folders}, make)


def all_scenes(args: argparse.Namespace) -> tuple[list[Path], list[Path]]:
    """Those to train on, and those held out."""
    few = args.steps < 10  # enough to see that it runs
    return (scenes(args, "scenes", 0, 2 if few else TRAINING),
            scenes(args, "scenes_held_out", 1_000_000, 1 if few else HELD_OUT))


def settings_of(args: argparse.Namespace) -> dict:
    """What a model that was trained on scenes depends on, and its steps."""
    training, held_out = all_scenes(args)
    return tables.trained_with(args, system="R3D2", steps_r3d2=max(1, 2 * args.steps * 3 // 5),
                               scenes=[len(training), len(held_out)])


def trained(args: argparse.Namespace, align: str, seed: int) -> Path:
    """R3D2, trained on pairs that were aligned so; r3d2_table5 scores the one of "full", too."""
    data, settings = pairs(args, all_scenes(args)[0], align, f"pairs_{align}"), settings_of(args)
    make = partial(tables.train_r3d2, args, seed=seed, data=data, steps=settings["steps_r3d2"])
    return tables.once(args.runs / "mirage_table3" / f"seed_{seed}" / f"model {align}", settings, make)


def main(args: argparse.Namespace) -> None:
    clips, seeds = pairs(args, all_scenes(args)[1], "full", "held_out"), []
    for seed in range(1, args.seeds + 1):
        folder = args.runs / "mirage_table3" / f"seed_{seed}"
        models = {align: trained(args, align, seed) for align in ("none", "full")}
        results = tables.harmonise(clips, folder, models, settings_of(args), tables.read_r3d2)
        seeds.append(tables.evaluate(args, clips, results, folder / "scores", exact=False))
    tables.report("mirage_table3", __doc__, args, {tables.FULL: PAPER}, seeds)


def flags() -> argparse.ArgumentParser:
    return tables.flags(__doc__, steps=100)


if __name__ == "__main__":
    common.start(main, flags())
