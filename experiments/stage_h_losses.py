"""Stage H's losses: Mirage's own (Eq. 4), and with the MSE that the recipe `small` adds.

    python -m experiments.stage_h_losses --perceptual DIR        # 26 minutes, and 20 for the Mirage that others share

    LPIPS + Gram          L_lpips + 0.1 L_gram, as in the paper
    LPIPS + Gram + MSE    the same and 2 L_mse: the Mirage of the other tables

Same steps, seeds, clips and stage A. The paper has no such table. LPIPS is SqueezeNet's, Gram on VGG's relu1_2 and
relu2_2. stage_h_losses.png shows two frames of the first held-out clip.
"""

import argparse
from functools import partial
from pathlib import Path

from experiments import common, tables


def without_mse(args: argparse.Namespace, seed: int, to: Path) -> None:
    """Stage H with the paper's losses, into the folder `to`."""
    tables.stage_h(args, tables.reconstruction(args, seed), to, seed, mse=0)


def main(args: argparse.Namespace) -> None:
    clips, seeds = tables.held_out(args), []
    for seed in range(1, args.seeds + 1):
        folder = args.runs / "stage_h_losses" / f"seed_{seed}"
        make = partial(without_mse, args, seed)
        models = {"LPIPS + Gram": tables.once(folder / "model", tables.trained_with(args), make),
                  "LPIPS + Gram + MSE": tables.harmonised(args, seed)}
        results = tables.harmonise(clips, folder, models, tables.scored_on(args))
        seeds.append(tables.evaluate(args, clips, results, folder / "scores"))
    tables.draw_strip(args.out / "reproduce" / "stage_h_losses.png", clips, results, (0, 8))
    tables.report("stage_h_losses", __doc__, args, {}, seeds)


def flags() -> argparse.ArgumentParser:
    return tables.flags(__doc__, steps=100)


if __name__ == "__main__":
    common.start(main, flags())
