"""Real naive insertions through the shipped model: what it does to video such as it was never trained on.

    python -m experiments.real_pairs --pairs PAIRS --perceptual DIR

The folder holds NAME_ni.mp4 and NAME_gt.mp4, aligned frame by frame. infer.py with its defaults makes the results, and
evaluate.py scores them over the full frame, along DIS flow of the truth; the clips have no boxes, so there are no
crops. Two pairs of 20 frames at 640 x 384: about 5 minutes on two quiet cores.
"""

import argparse
import os
from pathlib import Path

from experiments.common import python


def main(args) -> None:
    folders = {side: args.runs / side for side in ("ni", "gt", "ours")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    names = sorted(path.name.removesuffix("_ni.mp4") for path in args.pairs.glob("*_ni.mp4"))
    for name in names:
        for side in ("ni", "gt"):  # evaluate.py wants equal names
            link = folders[side] / f"{name}.mp4"
            link.unlink(missing_ok=True)
            os.symlink((args.pairs / f"{name}_{side}.mp4").resolve(), link)
        if not (folders["ours"] / f"{name}.mp4").exists():
            python("infer.py", folders["ni"] / f"{name}.mp4", folders["ours"] / f"{name}.mp4", "--model", args.weights)
    python("evaluate.py", "--pred", f"ours={folders['ours']}", "--ni", folders["ni"], "--gt", folders["gt"],
           "--perceptual", args.perceptual, "--out", args.out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True, help="folder with NAME_ni.mp4 and NAME_gt.mp4")
    parser.add_argument("--weights", type=Path, default=Path("weights"), help="the model (default weights)")
    parser.add_argument("--perceptual", type=Path, required=True, help="backbones of LPIPS and DISTS")
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments/real_pairs"))
    parser.add_argument("--out", type=Path, default=Path("docs/experiments/real_pairs"), help="where the scores go")
    main(parser.parse_args())
