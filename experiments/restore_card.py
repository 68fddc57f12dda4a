"""Small restorers on held-out toy clips: super-resolution against bicubic, inpainting against a plain fill.

    python -m experiments.restore_card --perceptual DIR                  # weights/restore/upscale
    python -m experiments.restore_card my_upscaler --perceptual DIR      # one of them, whatever its folder

Writes restore_card.json, .md and .png (the first held-out clips, not chosen). Held out: seeds from 1,000,000 on;
training used seeds from 0 on. Every clip is degraded as in training, by draws that its seed fixes:

    upscale    low resolution of second order (data/degradations.py); bicubic enlarges the same small frames
    inpaint    a hole of half the height and width; `fill` draws straight lines across it, from edge to edge

LPIPS is AlexNet's, which no training saw.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as nnf
from tqdm import tqdm

from experiments import common
from experiments.model_card import FIRST_SEED, draw_sheet
from mirage_min.data.degradations import central_mask, low_resolution
from mirage_min.data.masks import hide
from mirage_min.data.toy_world import WorldConfig, make_clip
from mirage_min.method import metrics
from mirage_min.method.perceptual import Lpips
from mirage_min.networks.imagenet import Features
from mirage_min.systems.restore import Restorer

SHOWN = 4  # clips that the picture has
BASELINE = {"upscale": "bicubic", "inpaint": "fill"}
ROWS = {"full_psnr": ("PSNR, full frame", max), "full_lpips": ("LPIPS, full frame", min),
        "hole_psnr": ("PSNR in the hole", max), "hole_lpips": ("LPIPS in the hole", min)}


# ---- what is compared: (restorer, x_gt [3, T, H, W], seed) -> {name: a video like x_gt} ------------------------------

def upscaled(restorer: Restorer, x_gt: Tensor, seed: int) -> dict[str, Tensor]:
    """One low resolution of the truth, as it is, pixel by pixel, and enlarged in both ways."""
    small = low_resolution(x_gt, restorer.scale, torch.Generator().manual_seed(seed))
    nearest, bicubic = (nnf.interpolate(small.transpose(0, 1), x_gt.shape[-2:], mode=mode).transpose(0, 1).clamp(-1, 1)
                        for mode in ("nearest", "bicubic"))
    return {"low resolution": nearest, "bicubic": bicubic,
            "ours": torch.stack(list(restorer.stream(small.unbind(1))), dim=1)}


def inpainted(restorer: Restorer, x_gt: Tensor, seed: int) -> dict[str, Tensor]:
    """One hole in the truth, filled in both ways, and as the network sees it."""
    mask = central_mask(*x_gt.shape[-2:])
    x = hide(x_gt, mask)
    return {"hole": x, "fill": fill(x, mask), "ours": torch.stack(list(restorer.stream(x.unbind(1), mask)), dim=1)}


def fill(x: Tensor, mask: Tensor) -> Tensor:
    """x [..., H, W] with the rectangle that mask [1, H, W] covers filled: the mean of two straight lines through every
    pixel, one across and one down, between the known pixels where they end. No side of the frame may touch it."""
    rows, columns = (mask[0].any(dim=dim).nonzero()[:, 0] for dim in (1, 0))
    top, bottom, left, right = rows[0] - 1, rows[-1] + 1, columns[0] - 1, columns[-1] + 1
    down = ((rows - top) / (bottom - top))[:, None]
    across = (columns - left) / (right - left)
    filled, inside = x.clone(), (..., slice(top + 1, bottom), slice(left + 1, right))
    vertical = torch.lerp(x[..., top, None, columns], x[..., bottom, None, columns], down)
    horizontal = torch.lerp(x[..., rows, left, None], x[..., rows, right, None], across)
    filled[inside] = (vertical + horizontal) / 2
    return filled


TASKS: dict[str, Callable[[Restorer, Tensor, int], dict[str, Tensor]]] = {"upscale": upscaled, "inpaint": inpainted}


# ---- figures ---------------------------------------------------------------------------------------------------------

def figures(videos: dict[str, Tensor], x_gt: Tensor, hole: Tensor | None, distance: Callable) -> dict[str, float]:
    """PART_METRIC_NAME of each video and of the truth, [3, T, H, W]: full frames and, where there is a hole [1, H, W],
    the rectangle that it is; distance: of two videos [1, 3, T, H, W]."""
    parts = {"full": (slice(None), slice(None))}
    if hole is not None:
        rows, columns = (hole[0].any(dim=dim).nonzero()[:, 0] for dim in (1, 0))
        parts["hole"] = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    found = {}
    for name, x in videos.items():
        for part, (ys, xs) in parts.items():
            pair = x[None, ..., ys, xs], x_gt[None, ..., ys, xs]
            found[f"{part}_psnr_{name}"] = metrics.psnr(*pair).item()
            found[f"{part}_lpips_{name}"] = float(distance(*pair))
    return found


def summary(task: str, clips: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Of each of ROWS that was measured the means of the baseline and of ours, and in how many clips ours is better."""
    table = {}
    for key, (_, better) in ROWS.items():
        if f"{key}_ours" not in clips[0]:
            continue
        theirs, ours = ([clip[f"{key}_{name}"] for clip in clips] for name in (BASELINE[task], "ours"))
        wins = sum(b != a and better(a, b) == b for a, b in zip(theirs, ours))
        table[key] = {BASELINE[task]: sum(theirs) / len(clips), "ours": sum(ours) / len(clips), "better in": wins}
    return table


def measure(path: Path, args: argparse.Namespace, distance: Callable) -> tuple[dict, list[Tensor]]:
    """A restorer's part of the card, and the picture's strips [3, H, W]."""
    restorer = Restorer.from_pretrained(path, dtype=torch.float32)
    task = restorer.settings.task
    if task not in TASKS:
        raise ValueError(f"{path}: wanted a restorer for one of {', '.join(TASKS)}, got one for {task}")
    clips, strips = [], []
    for seed in tqdm(range(FIRST_SEED, FIRST_SEED + args.clips), desc=task, unit="clip", disable=None):
        x_gt = make_clip(seed, WorldConfig(frames=args.frames), extras=False).x_gt
        videos = TASKS[task](restorer, x_gt, seed)
        clips.append(figures(videos, x_gt, central_mask(*x_gt.shape[-2:]) if restorer.masked else None, distance))
        if len(strips) < SHOWN:
            shown = (*videos.values(), x_gt)
            strips.append(torch.cat([x[:, args.frames // 2] for x in shown], dim=2))
    return {"task": task, "model": str(path), "shown": [*videos, "truth"], "means": summary(task, clips),
            "clips": clips}, strips


# ---- results ---------------------------------------------------------------------------------------------------------

def report(card: dict) -> str:
    """The text of restore_card.md."""
    parts = ["# Small restorers, measured",
             f"Made by `{card['command']}`: means over {card['held_out']} held-out toy clips of {card['frames']} "
             "frames at 96x144; LPIPS is AlexNet's. The last column counts the clips in which ours is better."]
    for part in card["restorers"]:
        baseline = BASELINE[part["task"]]
        rows = [[ROWS[key][0], f"{row[baseline]:.3f}", f"{row['ours']:.3f}",
                 f"{row['better in']} of {card['held_out']}"] for key, row in part["means"].items()]
        parts.append(common.table([f"{part['task']}, `{part['model']}`", baseline, "ours", "better in"], rows))
    shown = "; ".join(f"{part['task']}: {' | '.join(part['shown'])}" for part in card["restorers"])
    return "\n\n".join([*parts, f"![{shown}](restore_card.png)", f"*{shown}*"]) + "\n"


def main(args: argparse.Namespace) -> None:
    distance = partial(metrics.lpips, model=Lpips(Features("alex", args.perceptual)))
    parts, strips = [], []
    for path in args.models:
        part, found = measure(path, args, distance)
        parts.append(part)
        strips += found
    names = " ".join(map(str, args.models))
    card = {"command": f"python -m experiments.restore_card {names} --clips {args.clips} --perceptual DIR",
            "held_out": args.clips, "frames": args.frames, "restorers": parts}
    common.save_json(args.out / "restore_card.json", card)
    common.save_text(args.out / "restore_card.md", report(card))
    common.save_figure(args.out / "restore_card.png", draw_sheet(strips), dpi=100)
    print(report(card))


def flags() -> argparse.ArgumentParser:
    parser = common.flags(__doc__)
    parser.add_argument("models", nargs="*", type=Path, help="restorers' folders (default: those of weights/restore)",
                        default=[Path("weights/restore/upscale")])
    parser.add_argument("--clips", type=int, default=64, help="held-out toy clips (default 64)")
    parser.add_argument("--frames", type=int, default=9, help="frames of each (default 9)")
    parser.add_argument("--perceptual", type=Path, required=True, help="folder with alexnet_features.safetensors")
    return parser


if __name__ == "__main__":
    common.start(main, flags())
