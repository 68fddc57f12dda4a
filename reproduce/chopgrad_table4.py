"""ChopGrad Table 4 in the small: Mirage on longer, larger videos, as trained on short ones and trained on by ChopGrad.

    python -m reproduce.chopgrad_table4 --perceptual DIR

    Mirage (hires inference)   stages A and H on clips of 9 frames at 96 x 144, run on 33 frames at 128 x 192
    ChopGrad                   the same, and stage H goes on with 33 frames at 128 x 192, d_trunc 1, 2 x 2 tiles,
                               batch 1, for half of --steps

The paper: Wan 2.1, 9 x 480 x 832, then 1,000 steps at 49 x 720 x 1280 in 4 x 4 tiles. Here it is the small CogVideoX
and recipe `small`. ChopGrad's figures 3, 5, 6 and 13 come from benchmarks/chopgrad_locality.py and chopgrad_memory.py.
Three seeds of 150 steps: about 50 minutes on two quiet cores, 10 of them for 64 long clips to train on.
"""

import argparse
import shutil

import torch

from mirage_min.mirage import Mirage
from reproduce import common

PAPER = {"Mirage (hires inference)": {"PSNR": 27.30, "SSIM": 0.8912, "LPIPS": 0.2067, "DISTS": 0.0740},
         "ChopGrad": {"PSNR": 29.49, "SSIM": 0.9031, "LPIPS": 0.1719, "DISTS": 0.0561}}
FRAMES, SIZE, CLIPS = 33, "128x192", 64  # of the long videos


def main(args) -> None:
    H, W = map(int, SIZE.split("x"))
    few = argparse.Namespace(**vars(args) | {"clips": min(8, args.clips)})
    clips, seeds = common.held_out(few, FRAMES, SIZE), []
    training = common.once(args.runs / "long_clips", {"clips": min(CLIPS, args.steps)}, lambda to: common.python(
        "-m", "mirage_min.toy_world", "--out", to, "--first-seed", 500_000, "--clips", min(CLIPS, args.steps),
        "--frames", FRAMES, "--size", SIZE))
    for seed in range(1, args.seeds + 1):
        folder, settings = args.runs / "chopgrad_table4" / f"seed_{seed}", common.settings_of(args)

        def short(to):
            common.stage_a(args, to, seed)
            common.stage_h(args, to, seed)

        def long(to):
            for name in ("stage_a", "stage_h", "prompt"):
                shutil.copy(models["Mirage (hires inference)"] / f"{name}.safetensors", to)
            common.stage_h(args, to, seed + 100, training, steps=max(1, args.steps // 2), frames=FRAMES, height=H,
                           width=W, batch=1, d_trunc=1, tiles=2)
        models = {"Mirage (hires inference)": common.once(folder / "model of Mirage", settings, short)}
        models["ChopGrad"] = common.once(folder / "model of ChopGrad", settings, long)

        @torch.no_grad()
        def harmonise(to, model):
            mirage = Mirage.from_pretrained(model)
            common.predict(clips, to, lambda x_ni, x_gt: mirage(x_ni))
        results = {name: common.once(folder / name, settings, lambda to: harmonise(to, model))
                   for name, model in models.items()}
        seeds.append(common.evaluate(args, clips, results, folder / "scores"))
    common.report("chopgrad_table4", __doc__, args, {"full frame": PAPER}, seeds)


if __name__ == "__main__":
    main(common.arguments(__doc__, steps=150))
