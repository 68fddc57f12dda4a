"""Real naive insertions through the shipped model: what it does to video of a kind that it was never trained on.

    python -m experiments.real_pairs --pairs PAIRS --perceptual DIR      # 5 minutes for two pairs of 20 frames, 640x384

PAIRS holds NAME_ni.mp4 and NAME_gt.mp4, aligned frame by frame. infer.py with its defaults makes the results, and
evaluate.py scores them over the full frame, along DIS flow of the truth; the clips have no boxes, so there are no
crops. Writes reproduce/real_pairs.md and .json.
"""

import argparse
import json
import shutil
from pathlib import Path

from experiments import common, tables

HEAD = """# Real naive insertions through the shipped model

`python -m experiments.real_pairs --pairs PAIRS --perceptual DIR`: {count} pairs of clips, aligned frame by frame, of a
kind that the model was not trained on.
"""


def copy_pairs(pairs: Path, to: Path) -> list[str]:
    """NAME_ni.mp4 and NAME_gt.mp4 as to/ni/NAME.mp4 and to/gt/NAME.mp4, names as evaluate.py wants them -> the names.

    ValueError if there are none, or one lacks its other half.
    """
    names = sorted(path.name.removesuffix("_ni.mp4") for path in pairs.glob("*_ni.mp4"))
    if not names:
        raise ValueError(f"{pairs}: wanted NAME_ni.mp4 and NAME_gt.mp4, found no *_ni.mp4")
    for side in ("ni", "gt"):
        shutil.rmtree(to / side, ignore_errors=True)
        (to / side).mkdir(parents=True)
        for name in names:
            shutil.copyfile(pairs / f"{name}_{side}.mp4", to / side / f"{name}.mp4")
    return names


def main(args: argparse.Namespace) -> None:
    work = args.runs / "real_pairs"
    names = copy_pairs(args.pairs, work)
    (work / "ours").mkdir(exist_ok=True)
    for name in names:
        tables.python("infer.py", work / "ni" / f"{name}.mp4", work / "ours" / f"{name}.mp4", "--model", args.weights,
                      "--overwrite")
    tables.python("evaluate.py", "--pred", f"ours={work / 'ours'}", "--ni", work / "ni", "--gt", work / "gt",
                  "--perceptual", args.perceptual, "--out", work / "scores")
    scores = json.loads((work / "scores" / "scores.json").read_text())
    text = HEAD.format(count=len(names)) + "\n" + (work / "scores" / "scores.md").read_text()
    common.save_json(args.out / "reproduce" / "real_pairs.json", scores)
    common.save_text(args.out / "reproduce" / "real_pairs.md", text)


def flags() -> argparse.ArgumentParser:
    parser = common.flags(__doc__)
    parser.add_argument("--pairs", type=Path, required=True, help="folder with NAME_ni.mp4 and NAME_gt.mp4")
    parser.add_argument("--perceptual", type=Path, required=True, help="backbones of LPIPS and DISTS")
    parser.add_argument("--weights", type=Path, default=Path("weights"), help="the model (default weights)")
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments/work"), help="videos and scores on the way")
    return parser


if __name__ == "__main__":
    common.start(main, flags())
