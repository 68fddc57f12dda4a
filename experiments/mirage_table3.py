"""A counterpart of Mirage Table 3 in the small: what aligned pairs are worth to the model that is trained on them.

    python -m experiments.mirage_table3 --perceptual DIR

The paper trains R3D2 with and without aligned data. Here it is Mirage's stage H, on pairs that build_pairs.py made of
the same scenes of Gaussians with --align none, coarse and full; all three are scored on the same held-out pairs,
aligned in full. Stage A is that of the other tables, stage H has 3/5 of --steps, for the pairs are few. The scenes are
toy_world's own reconstructions, 9 frames long.
"""

from pathlib import Path

from experiments import common
from mirage_min.systems.mirage import Mirage

PAPER = {"none": {"PSNR": 27.61, "LPIPS": 0.072, "vFID": 0.206}, "full": {"PSNR": 28.31, "LPIPS": 0.072, "vFID": 0.193}}
TRAINING, HELD_OUT = 32, 16  # scenes, about half of which keep their actor in the image


def scenes(args, name: str, first_seed: int, count: int) -> list[Path]:
    """Scene folders, made once."""
    return [common.once(args.runs / "mirage_table3" / name / str(seed), {"seed": seed}, lambda to: common.python(
        "-m", "mirage_min.data.toy_world", "--scene", to / f"scene_{seed}", "--first-seed", seed)) / f"scene_{seed}"
        for seed in range(first_seed, first_seed + count)]


def pairs(args, folders: list[Path], align: str, name: str) -> Path:
    """build_pairs.py on them, leaving out only scenes whose actor does not stay in the image (status 1): what poor
    alignment costs is the question."""
    return common.once(args.runs / "mirage_table3" / name, {"scenes": folders}, lambda to: common.python(
        "build_pairs.py", *folders, "--out", to, "--align", align, "--frames", 9, "--min-iou", 0, accepted=(0, 1)))


def main(args) -> None:
    few = args.steps < 10  # enough to see that it runs
    training = scenes(args, "scenes", 0, 2 if few else TRAINING)
    held_out = scenes(args, "scenes_held_out", 1_000_000, 1 if few else HELD_OUT)
    clips, seeds = pairs(args, held_out, "full", "held_out"), []
    steps = max(1, args.steps * 3 // 5)
    settings = common.trained_with(args, steps_h=steps, scenes=[len(training), len(held_out)])
    for seed in range(1, args.seeds + 1):
        folder, results = args.runs / "mirage_table3" / f"seed_{seed}", {}
        for align in ("none", "coarse", "full"):
            data = pairs(args, training, align, f"pairs_{align}")

            def make(to):
                common.stage_h(args, common.reconstruction(args, seed), to, seed, data, steps=steps)

            def harmonise(to):
                mirage = Mirage.from_pretrained(common.once(folder / f"model {align}", settings, make))
                common.predict(clips, to, lambda x_ni, x_gt: mirage(x_ni))
            results[align] = common.once(folder / align, settings, harmonise)
        seeds.append(common.evaluate(args, clips, results, folder / "scores", exact=False))
    common.report("mirage_table3", __doc__, args, {"full frame": PAPER}, seeds)


if __name__ == "__main__":
    main(common.arguments(__doc__, steps=100))
