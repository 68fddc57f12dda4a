"""A counterpart of Mirage Table 3 in the small: what aligned pairs are worth to the model that is trained on them.

    python -m reproduce.mirage_table3 --perceptual DIR

The paper trains R3D2 with and without aligned data. Here it is Mirage, stages A and H, on pairs that build_pairs.py
made of the same scenes of Gaussians with --align none, coarse and full, and all three are scored on the same held-out
pairs, aligned in full. The scenes are toy_world's own reconstructions (--scene), clips of 9 frames.
Three seeds of 150 steps: about 50 minutes of training on two quiet cores, and what 32 scenes and their pairs take: 24
to train on, 8 to score.
"""

from pathlib import Path

import torch

from mirage_min.mirage import Mirage
from reproduce import common

PAPER = {"none": {"PSNR": 27.61, "LPIPS": 0.072, "vFID": 0.206}, "full": {"PSNR": 28.31, "LPIPS": 0.072, "vFID": 0.193}}
TRAINING, HELD_OUT = 24, 8  # scenes


def scenes(args, name: str, first_seed: int, count: int) -> list[Path]:
    """Scene folders, made once."""
    return [common.once(args.runs / "mirage_table3" / name / str(seed), {"seed": seed}, lambda to: common.python(
        "-m", "mirage_min.toy_world", "--scene", to / f"scene_{seed}", "--first-seed", seed)) / f"scene_{seed}"
        for seed in range(first_seed, first_seed + count)]


def pairs(args, folders: list[Path], align: str, name: str) -> Path:
    """build_pairs.py on them, leaving out only scenes whose actor does not stay in the image (status 1): what poor
    alignment costs is the question."""
    return common.once(args.runs / "mirage_table3" / name, {"scenes": folders}, lambda to: common.python(
        "build_pairs.py", *folders, "--out", to, "--align", align, "--frames", 9, "--min-iou", 0, accepted=(0, 1)))


def main(args) -> None:
    small = args.steps < 10  # enough to see that it runs
    training = scenes(args, "scenes", 0, 2 if small else TRAINING)
    clips = pairs(args, scenes(args, "scenes_held_out", 1_000_000, 1 if small else HELD_OUT), "full", "held_out")
    seeds = []
    for seed in range(1, args.seeds + 1):
        folder, results = args.runs / "mirage_table3" / f"seed_{seed}", {}
        for align in ("none", "coarse", "full"):
            args.data = pairs(args, training, align, f"pairs_{align}")

            def make(to):
                common.stage_a(args, to, seed)
                common.stage_h(args, to, seed)

            def harmonise(to):
                mirage = Mirage.from_pretrained(common.once(folder / f"model {align}", common.settings_of(args), make))
                with torch.no_grad():
                    common.predict(clips, to, lambda x_ni, x_gt: mirage(x_ni))
            results[align] = common.once(folder / align, common.settings_of(args), harmonise)
        seeds.append(common.evaluate(args, clips, results, folder / "scores", exact=False))
    common.report("mirage_table3", __doc__, args, {"full frame": PAPER}, seeds)


if __name__ == "__main__":
    main(common.arguments(__doc__, steps=150))
