"""ChopGrad Table 2 (bottom) in the small: what pixel losses are worth, and how much d_trunc matters.

    python -m experiments.restore_table2 --perceptual DIR

    latents            the latent MSE alone (the paper's ChopGrad*)
    latents, twice     the same for twice as many steps (ChopGrad†)
    d_trunc 0, 1, 2    latent MSE + 100 LPIPS through the decoder, truncated after so many groups

Artifacts of Gaussian splats (the stream `artifacts`) are removed from clips of 9 frames, of which Wan's VAE makes three
groups: d_trunc 2 is the whole gradient. All methods continue one restorer that learned from latents (restorers.py).
Not the paper's: 14 billion parameters, 81 frames; LPIPS is SqueezeNet's in training, AlexNet's in the scores.
"""

import argparse
from pathlib import Path

from experiments import common, restorers, tables

COLUMNS = "PSNR", "SSIM", "LPIPS", "DISTS"
PAPER = {name: dict(zip(COLUMNS, row)) for name, row in {
    "latents": (19.501, 0.588, 0.440, 0.244), "latents, twice": (19.401, 0.586, 0.439, 0.238),
    "d_trunc 0": (19.231, 0.605, 0.345, 0.115), "d_trunc 1": (19.237, 0.610, 0.342, 0.113),
    "d_trunc 2": (19.308, 0.609, 0.343, 0.115)}.items()}
PIXELS = {"lambda_latent": 1.0, "lambda_lpips": 100.0, "lambda_mse": 0.0}


def methods(steps: int) -> dict[str, dict]:
    """The settings of each."""
    found = {"latents": {"pixel": "no"}, "latents, twice": {"pixel": "no", "steps": 2 * steps}}
    return found | {f"d_trunc {d}": PIXELS | {"d_trunc": d} for d in (0, 1, 2)}


def pairs(args: argparse.Namespace, name: str, first_seed: int, count: int) -> Path:
    """So many clips with artifacts, and the truth."""
    def make(to: Path) -> None:
        tables.python("-m", "mirage_min.data.streams", "--streams", "artifacts", "--out", to, "--count", count,
                      "--first-seed", first_seed, "--workers", 2)
    return tables.once(args.runs / f"artifacts_{name}_{count}", {"first_seed": first_seed, "count": count}, make)


def main(args: argparse.Namespace) -> None:
    data, clips = pairs(args, "training", 0, args.pairs), pairs(args, "held_out", 1_000_000, args.clips)
    flags = "--recipe", "small-inpaint", "--data", data  # but for its task
    artifacts, seeds = {"task": "artifacts", "degrade": "given"}, []
    for seed in range(1, args.seeds + 1):
        start = restorers.beginning(args, seed, "artifacts", *flags, **artifacts)
        folder = args.runs / "restore_table2" / f"seed_{seed}"
        models = {name: restorers.continued(args, seed, folder / f"model of {name}", start, *flags,
                                             **artifacts | settings) for name, settings in methods(args.steps).items()}
        results = tables.harmonise(clips, folder, models, tables.scored_on(args), restorers.read)
        seeds.append(restorers.score(args, clips, results, folder / "scores"))
    tables.draw_strip(args.out / "reproduce" / "restore_table2.png", clips, results, (4,))
    tables.report("restore_table2", __doc__, args, {tables.FULL: PAPER}, seeds)


def flags() -> argparse.ArgumentParser:
    parser = restorers.flags(__doc__, steps=1000)
    parser.add_argument("--pairs", type=int, default=400, help="pairs to train on (default 400)")
    return parser


if __name__ == "__main__":
    common.start(main, flags())
