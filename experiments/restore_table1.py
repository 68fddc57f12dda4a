"""ChopGrad Table 1 in the small: super-resolution trained as DOVE is, frame by frame, against ChopGrad on whole clips.

    python -m experiments.restore_table1 --perceptual DIR

    DOVE's way    every frame by itself through encoder and decoder; MSE + .1 LPIPS + the L1 of frame differences
    ChopGrad      whole clips of three groups, d_trunc 1; MSE + .1 LPIPS

Both continue one restorer that learned from latents (restorers.py), as DOVE's first stage does, and run alike on whole
clips. MSE and differences are of [0, 1], as in DOVE's code. LPIPS on SqueezeNet stands for DISTS, whose weights need
not be at hand; AlexNet scores. DOVE's script has clips of two frames, and four batches of single images for each of
them; here both ways have nine. The paper's numbers are means over its five sets of videos; there DOVE's row is the
published checkpoint, which ChopGrad continues.
"""

import argparse

from experiments import common, restorers, tables

COLUMNS = "PSNR", "SSIM", "LPIPS", "DISTS"
PAPER = {"DOVE's way": dict(zip(COLUMNS, (23.73, 0.712, 0.278, 0.160))),
         "ChopGrad": dict(zip(COLUMNS, (23.99, 0.711, 0.254, 0.134)))}
PIXELS = {"lambda_latent": 0.0, "lambda_mse": 0.25, "lambda_lpips": 0.1}  # a quarter: its square of [-1, 1]
METHODS = {"DOVE's way": PIXELS | {"each_frame": "yes", "lambda_frame": 0.5}, "ChopGrad": PIXELS | {"d_trunc": 1}}


def main(args: argparse.Namespace) -> None:
    clips, seeds = restorers.held_out(args, "low_resolution", restorers.enlarged), []
    flags = "--recipe", "small-upscale", "--data", args.data
    for seed in range(1, args.seeds + 1):
        start = restorers.beginning(args, seed, "upscale", *flags)
        folder = args.runs / "restore_table1" / f"seed_{seed}"
        models = {name: restorers.continued(args, seed, folder / f"model of {name}", start, *flags, **settings)
                  for name, settings in METHODS.items()}
        results = tables.harmonise(clips, folder, models, tables.scored_on(args), restorers.read)
        seeds.append(restorers.score(args, clips, results, folder / "scores"))
    tables.draw_strip(args.out / "reproduce" / "restore_table1.png", clips, results, (4,))
    tables.report("restore_table1", __doc__, args, {tables.FULL: PAPER}, seeds)


def flags() -> argparse.ArgumentParser:
    return restorers.flags(__doc__, steps=1000)


if __name__ == "__main__":
    common.start(main, flags())
