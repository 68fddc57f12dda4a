"""The shipped model on real streets: what it leaves alone, and what it improves.

    python -m experiments.real_card --unchanged CLIPS --streets PAIRS --insertions PAIRS --perceptual DIR

--unchanged   folder of videos in which nothing was inserted: what comes out should be what went in. Also the first
              of them in a quarter of its light and with bars, and frames of one colour
--streets     folder of pairs on recorded streets (python -m mirage_min.data.streams --clips ...): rendered cars, with
              an exact truth
--insertions  folder with NAME_ni.mp4 and NAME_gt.mp4, real insertions and the real recording, aligned frame by frame;
              the crop is around the largest patch in which the two differ

Whatever is left out of the command is left out of the card. Writes real_card.json, .md and .png, or NAME.* (input |
ours | truth, the first clips of each kind, not chosen).
"""

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as nnf
from tqdm import tqdm

from experiments import common, model_card
from mirage_min.data.pixels import from_bytes
from mirage_min.data.video import read_clip
from mirage_min.method import metrics, optical_flow
from mirage_min.method.perceptual import Lpips
from mirage_min.networks.imagenet import Features
from mirage_min.networks.weights import load_tensors
from mirage_min.systems.mirage import Mirage

CELL, LEAST = 16, 12 / 127.5  # pixels; a cell of an insertion has changed where it differs by so much on average
SHOWN = 3                     # clips of each kind in the picture


def harmonised(mirage: Mirage, x: Tensor) -> tuple[Tensor, float]:
    """x [3, T, H, W] in [-1, 1] as a stream through the model -> (like x, frames a second)."""
    start = time.time()
    y = torch.stack(list(mirage.stream(iter(x.unbind(1)))), dim=1)
    return y, x.shape[1] / (time.time() - start)


def shrunk(x: Tensor, width: int) -> Tensor:
    """x [3, T, H, W] at this width, its height to the nearest even number: [3, T, h, width] in [-1, 1]."""
    height = 2 * round(x.shape[2] * width / x.shape[3] / 2)
    x = nnf.interpolate(x.transpose(0, 1), (height, width), mode="bilinear", antialias=True)
    return x.transpose(0, 1).clamp(-1, 1)


def shift(y: Tensor, x: Tensor) -> list[float]:
    """How far the means of red, green and blue moved from x to y [3, T, H, W], of 255."""
    return ((y - x).mean(dim=(1, 2, 3)) * 127.5).tolist()


# ---- nothing inserted ------------------------------------------------------------------------------------------------

def unchanged_figures(x: Tensor, y: Tensor) -> dict:
    """PSNR of the output y to the input x [3, T, H, W], the shift of the means, and y's flicker: its warp error along
    the input's flow as a multiple of the input's own."""
    forward = optical_flow.flow_dis(x[None])
    seen = optical_flow.visible_by_consistency(forward, optical_flow.flow_dis(x[None].flip(2)).flip(2))
    flicker = [optical_flow.warp_error(v[None], forward, seen).item() for v in (y, x)]
    return {"psnr": metrics.psnr(y[None], x[None]).item(), "shift": shift(y, x), "flicker": flicker[0] / flicker[1]}


def tones(x: Tensor) -> dict[str, Tensor]:
    """Inputs that a model which has seen one drive gets wrong, like x [3, T, H, W]: dark, barred, of one colour."""
    edge = x.shape[2] // 6
    barred = torch.full_like(x, -1)
    barred[:, :, edge:-edge] = x[:, :, edge:-edge]
    return {"a quarter of the light": (x + 1) / 4 - 1, "bars": barred, "black": torch.full_like(x, -1),
            "grey": torch.zeros_like(x), "white": torch.ones_like(x)}


# ---- something inserted ----------------------------------------------------------------------------------------------

def largest_patch(x_ni: Tensor, x_gt: Tensor) -> Tensor:
    """Boxes [T, 4] x0, y0, x1, y1 around the largest patch of cells in which insertion and truth [3, T, H, W] differ;
    zeros in frames without any."""
    T, H, W = x_ni.shape[1:]
    far = (x_ni - x_gt).abs().mean(dim=0)[:, None]                                 # [T, 1, H, W]
    changed = nnf.avg_pool2d(far, CELL, ceil_mode=True)[:, 0] > LEAST              # [T, H / CELL, W / CELL]
    boxes = torch.zeros(T, 4)
    for t, cells in enumerate(changed):
        patch = max(patches(cells), key=len, default=[])
        if patch:
            rows, columns = zip(*patch)
            x0, y0, x1, y1 = min(columns), min(rows), max(columns) + 1, max(rows) + 1
            boxes[t] = torch.tensor([x0 * CELL, y0 * CELL, min(x1 * CELL, W), min(y1 * CELL, H)])
    return boxes


def patches(cells: Tensor) -> list[list[tuple[int, int]]]:
    """The connected patches of a bool [rows, columns], each a list of (row, column); cells touch at corners too."""
    left = {tuple(cell) for cell in cells.nonzero().tolist()}
    found = []
    while left:
        patch = [left.pop()]
        for row, column in patch:  # it grows as it is read
            around = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= around
            patch += around
        found.append(patch)
    return found


def inserted_figures(x_ni: Tensor, x_gt: Tensor, y: Tensor, boxes: Tensor, lpips: Lpips | None) -> dict[str, float]:
    """PSNR over whole frames, PSNR and LPIPS in the crops around boxes [T, 4], of the insertion and of the output y;
    videos are [3, T, H, W] in [-1, 1]."""
    crops, out = metrics.actor_crops(boxes, *x_gt.shape[2:]), {}
    for name, x in (("naive", x_ni), ("ours", y)):
        out[f"full_psnr_{name}"] = metrics.psnr(x[None], x_gt[None]).item()
        out[f"crop_psnr_{name}"] = out[f"crop_lpips_{name}"] = math.nan
        if any(crops):
            pair = metrics.cropped(x[None], crops), metrics.cropped(x_gt[None], crops)
            out[f"crop_psnr_{name}"] = metrics.psnr(*pair).item()
            if lpips is not None:
                out[f"crop_lpips_{name}"] = metrics.lpips(*pair, lpips).item()
    return out


def shadow_psnr(x_ni: Tensor, x_gt: Tensor, actor: Tensor, x: Tensor) -> float:
    """PSNR of x to the truth where the truth's street is darker than the insertion's, outside the actor; nan where it
    is nowhere."""
    darker = (x_ni - x_gt).mean(dim=0, keepdim=True) > 4 / 127.5
    shadow = darker & (actor < 0.02)
    return metrics.psnr(x[None], x_gt[None], shadow[None]).item()


# ---- results ---------------------------------------------------------------------------------------------------------

def mean(values: list[float]) -> float:
    """The mean of those that are numbers."""
    numbers = [value for value in values if not math.isnan(value)]
    return sum(numbers) / len(numbers) if numbers else math.nan


def report(card: dict) -> str:
    """The text of real_card.md."""
    def three(values: list[float]) -> str:
        return ", ".join(f"{value:+.1f}" for value in values)

    made = f"Made by `python -m experiments.real_card`{model_card.chosen(card['set'])}."
    parts = ["# The shipped model on real streets", made]
    for width, rows in card.get("unchanged", {}).items():
        cells = [[r["name"], f"{r['psnr']:.1f}", three(r["shift"]), f"{r['flicker']:.2f}", f"{r['speed']:.2f}"]
                 for r in rows]
        parts += [f"Nothing inserted, {len(rows)} clips {width} wide:",
                  common.table(["", "PSNR to the input", "shift of R, G, B, of 255", "flicker, of the input's",
                                "frames/s"], cells)]
    if "tones" in card:
        parts += ["The first of them in other tones, 480 wide:",
                  common.table(["", "shift of R, G, B, of 255"],
                               [[name, three(value)] for name, value in card["tones"].items()])]
    for kind, title in (("streets", "rendered cars on recorded streets"), ("insertions", "real insertions")):
        if kind in card:
            rows = card[kind]
            cells = []
            for metric in ("crop_psnr", "crop_lpips", "shadow_psnr", "full_psnr"):
                if f"{metric}_ours" in rows[0]:
                    values = (mean([row[f"{metric}_{name}"] for row in rows]) for name in ("naive", "ours"))
                    cells.append([metric.replace("_", ", "), *(f"{value:.3f}" for value in values)])
            parts += [f"Means over {len(rows)} pairs, {title}:", common.table(["", "naive insertion", "ours"], cells)]
    return "\n\n".join(parts) + "\n"


def middle(*videos: Tensor) -> Tensor:
    """The middle frames of videos [3, T, H, W] next to each other, 320 columns each: [3, h, n · 320]."""
    return torch.cat([shrunk(x[:, x.shape[1] // 2][:, None], 320)[:, 0] for x in videos], dim=2)


def measure_unchanged(args: argparse.Namespace, mirage: Mirage, strips: list[Tensor]) -> dict:
    """The figures of every clip at every width, and of the first in other tones. ValueError if there is no clip."""
    clips = sorted(args.unchanged.glob("*.mp4"))
    if not clips:
        raise ValueError(f"{args.unchanged}: wanted *.mp4, found none")
    card = {width: [] for width in args.widths}
    for width, rows in card.items():
        for path in tqdm(clips, unit="clip", disable=None):
            x = shrunk(read_clip(path, args.frames), width)
            y, speed = harmonised(mirage, x)
            rows.append({"name": path.stem, **unchanged_figures(x, y), "speed": speed})
            if width == args.widths[0] and len(rows) <= SHOWN:
                strips.append(middle(x, y, x))
    first = shrunk(read_clip(clips[0], args.frames), args.widths[0])
    moved = {name: shift(harmonised(mirage, x)[0], x) for name, x in tones(first).items()}
    return {"unchanged": card, "tones": moved}


def measure_streets(folder: Path, mirage: Mirage, lpips: Lpips | None, strips: list[Tensor]) -> list[dict]:
    """The figures of every pair of a folder. ValueError if there is none."""
    rows = []
    for path in tqdm(sorted(folder.glob("*.safetensors")), unit="pair", disable=None):
        tensors, _ = load_tensors(path)
        x_ni, x_gt, actor = from_bytes(tensors["x_ni"]), from_bytes(tensors["x_gt"]), tensors["actor"].float() / 255
        y, _ = harmonised(mirage, x_ni)
        row = inserted_figures(x_ni, x_gt, y, tensors["boxes"], lpips)
        for name, x in (("naive", x_ni), ("ours", y)):
            row[f"shadow_psnr_{name}"] = shadow_psnr(x_ni, x_gt, actor, x)
        rows.append({"name": path.stem, **row})
        if len(rows) <= SHOWN:
            strips.append(middle(x_ni, y, x_gt))
    if not rows:
        raise ValueError(f"{folder}: wanted pairs, *.safetensors, found none")
    return rows


def measure_insertions(folder: Path, mirage: Mirage, lpips: Lpips | None, strips: list[Tensor]) -> list[dict]:
    """The figures of every NAME_ni.mp4 and NAME_gt.mp4 of a folder. ValueError if there are none."""
    rows = []
    for path in sorted(folder.glob("*_ni.mp4")):
        name = path.name.removesuffix("_ni.mp4")
        x_ni, x_gt = read_clip(path), read_clip(folder / f"{name}_gt.mp4")
        y, _ = harmonised(mirage, x_ni)
        rows.append({"name": name, **inserted_figures(x_ni, x_gt, y, largest_patch(x_ni, x_gt), lpips)})
        if len(rows) <= SHOWN:
            strips.append(middle(x_ni, y, x_gt))
    if not rows:
        raise ValueError(f"{folder}: wanted NAME_ni.mp4 and NAME_gt.mp4, found no *_ni.mp4")
    return rows


def main(args: argparse.Namespace) -> None:
    if not (args.unchanged or args.streets or args.insertions):
        raise ValueError("wanted --unchanged, --streets or --insertions")
    mirage = model_card.load(args.model, args.set)
    lpips = None if args.perceptual is None else Lpips(Features("alex", args.perceptual))
    card, strips = {"set": args.set}, []
    if args.unchanged:
        card |= measure_unchanged(args, mirage, strips)
    if args.streets:
        card["streets"] = measure_streets(args.streets, mirage, lpips, strips)
    if args.insertions:
        card["insertions"] = measure_insertions(args.insertions, mirage, lpips, strips)
    height = max(strip.shape[1] for strip in strips)
    sheet = torch.cat([nnf.pad(strip, (0, 0, 0, height - strip.shape[1])) for strip in strips], dim=1)
    common.save_json(args.out / f"{args.name}.json", card)
    common.save_text(args.out / f"{args.name}.md", report(card))
    common.save_figure(args.out / f"{args.name}.png", common.picture(sheet), dpi=100)
    print(report(card))


def flags() -> argparse.ArgumentParser:
    parser = common.flags(__doc__)
    parser.add_argument("--model", type=Path, default=Path("weights"), help="folder of a Mirage (default weights)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="an option of the model, as in infer.py: change_only=no")
    parser.add_argument("--name", default="real_card", help="of the files that are written (default real_card)")
    parser.add_argument("--unchanged", type=Path, metavar="DIR", help="videos without insertions")
    parser.add_argument("--streets", type=Path, metavar="DIR", help="pairs on recorded streets")
    parser.add_argument("--insertions", type=Path, metavar="DIR", help="real insertions with their truth")
    parser.add_argument("--frames", type=int, default=9, help="frames of each video (default 9)")
    parser.add_argument("--widths", type=int, nargs="+", default=[480, 960], help="(default 480 960)")
    parser.add_argument("--perceptual", type=Path, help="folder with alexnet_features.safetensors, for LPIPS")
    return parser


if __name__ == "__main__":
    common.start(main, flags())
