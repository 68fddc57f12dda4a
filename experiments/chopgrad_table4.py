"""ChopGrad Table 4 in the small: Mirage on longer, larger videos, as trained on short ones and trained on by ChopGrad.

    python -m experiments.chopgrad_table4 --perceptual DIR

    Mirage (hires inference)   stages A and H on clips of 9 frames at 96 x 144, run on 33 frames at 128 x 192
    Mirage, trained on         the same, and stage H goes on as it was for half of --steps: what the steps alone bring
    ChopGrad                   the same, and stage H goes on for as many steps, at the same learning rate, with clips of
                               33 frames at 128 x 192, batch 1, d_trunc 1, 2 x 2 tiles

The paper: Wan 2.1, 9 x 480 x 832, then 1,000 steps at 49 x 720 x 1280 in 4 x 4 tiles. Here it is the small CogVideoX
and recipe `small`. ChopGrad's figures 3, 5, 6 and 13 come from experiments/chopgrad_locality.py and chopgrad_memory.py.
chopgrad_table4.png shows three frames of the first held-out clip.
"""

import argparse

from experiments import common

PAPER = {"Mirage (hires inference)": {"PSNR": 27.30, "SSIM": 0.8912, "LPIPS": 0.2067, "DISTS": 0.0740},
         "ChopGrad": {"PSNR": 29.49, "SSIM": 0.9031, "LPIPS": 0.1719, "DISTS": 0.0561}}
FRAMES, SIZE, CLIPS = 33, "128x192", 64  # of the long videos


def main(args) -> None:
    H, W = map(int, SIZE.split("x"))
    few = argparse.Namespace(**vars(args) | {"clips": min(8, args.clips)})
    clips, seeds = common.held_out(few, FRAMES, SIZE), []
    training = common.once(args.runs / "long_clips", {"clips": min(CLIPS, args.steps)}, lambda to: common.python(
        "-m", "mirage_min.data.toy_world", "--out", to, "--first-seed", 500_000, "--clips", min(CLIPS, args.steps),
        "--frames", FRAMES, "--size", SIZE))
    for seed in range(1, args.seeds + 1):
        folder, short = args.runs / "chopgrad_table4" / f"seed_{seed}", common.harmonised(args, seed)

        def trained_on(name: str, data=None, **settings):
            settings = {"steps": max(1, args.steps // 2)} | settings
            return common.once(folder / f"model of {name}", common.trained_with(args, **settings), lambda to:
                               common.stage_h(args, short, to, seed + 100, data, **settings))
        models = {"Mirage (hires inference)": short, "Mirage, trained on": trained_on("Mirage, trained on"),
                  "ChopGrad": trained_on("ChopGrad", training, frames=FRAMES, height=H, width=W, batch=1, tiles=2)}
        results = common.harmonise(clips, folder, models, common.scored_on(few))
        seeds.append(common.evaluate(args, clips, results, folder / "scores"))
    common.picture(args.out / "chopgrad_table4.png", clips, results, (0, 16, 32))
    common.report("chopgrad_table4", __doc__, args, {"full frame": PAPER}, seeds)


if __name__ == "__main__":
    main(common.arguments(__doc__, steps=100))
