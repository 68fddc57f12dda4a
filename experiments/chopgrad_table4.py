"""ChopGrad Table 4 in the small: a Mirage of short, small clips on longer, larger ones, and after training on these.

    python -m experiments.chopgrad_table4 --perceptual DIR       # an hour, and 20 minutes for the Mirage others share

    Mirage (hires inference)   stages A and H on clips of 9 frames at 96 x 144, run on 33 frames at 128 x 192
    Mirage, trained on         the same, and stage H continues as it was for half of --steps: what the steps alone bring
    ChopGrad                   the same, and stage H continues for as many steps, at the same learning rate, with clips
                               of 33 frames at 128 x 192, batch 1, d_trunc 1, 2 x 2 tiles

The paper: Wan 2.1, 9 x 480 x 832, then 1,000 steps at 49 x 720 x 1280 in 4 x 4 tiles. Here it is the small CogVideoX
and recipe `small`. ChopGrad's figures 3 to 6 and 13 come from experiments/chopgrad_locality.py and chopgrad_memory.py.
chopgrad_table4.png shows three frames of the first held-out clip.
"""

import argparse
from functools import partial
from pathlib import Path

from experiments import common, tables

PAPER = {"Mirage (hires inference)": {"PSNR": 27.30, "SSIM": 0.8912, "LPIPS": 0.2067, "DISTS": 0.0740},
         "ChopGrad": {"PSNR": 29.49, "SSIM": 0.9031, "LPIPS": 0.1719, "DISTS": 0.0561}}
FRAMES, H, W, CLIPS = 33, 128, 192, 64  # of the long videos


def long_clips(args: argparse.Namespace) -> Path:
    """Long, large clips to train on."""
    count = min(CLIPS, args.steps)

    def make(to: Path) -> None:
        tables.python("-m", "mirage_min.data.toy_world", "--out", to, "--first-seed", 500_000, "--clips", count,
                      "--frames", FRAMES, "--size", f"{H}x{W}")
    return tables.once(args.runs / "long_clips", {"clips": count}, make)


def models(args: argparse.Namespace, seed: int, folder: Path) -> dict[str, Path]:
    """The three methods' Mirages of a seed, kept under `folder`."""
    short, steps = tables.harmonised(args, seed), max(1, args.steps // 2)
    chopped = {"steps": steps, "frames": FRAMES, "height": H, "width": W, "batch": 1, "tiles": 2}
    found, longer = {"Mirage (hires inference)": short}, long_clips(args)
    for name, data, settings in (("Mirage, trained on", None, {"steps": steps}), ("ChopGrad", longer, chopped)):
        make = partial(tables.stage_h, args, short, seed=seed + 100, data=data, **settings)
        found[name] = tables.once(folder / f"model of {name}", tables.trained_with(args, **settings), make)
    return found


def main(args: argparse.Namespace) -> None:
    few = tables.with_settings(args, clips=min(8, args.clips))
    clips, seeds = tables.held_out(few, FRAMES, f"{H}x{W}"), []
    for seed in range(1, args.seeds + 1):
        folder = args.runs / "chopgrad_table4" / f"seed_{seed}"
        results = tables.harmonise(clips, folder, models(args, seed, folder), tables.scored_on(few))
        seeds.append(tables.evaluate(args, clips, results, folder / "scores"))
    tables.draw_strip(args.out / "reproduce" / "chopgrad_table4.png", clips, results, (0, 16, 32))
    tables.report("chopgrad_table4", __doc__, args, {tables.FULL: PAPER}, seeds)


def flags() -> argparse.ArgumentParser:
    return tables.flags(__doc__, steps=100)


if __name__ == "__main__":
    common.start(main, flags())
