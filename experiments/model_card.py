"""A shipped model's figures: held-out toy clips, and a real video in which nothing was inserted.

    python -m experiments.model_card --perceptual DIR [--real REAL]      # a quarter of an hour on one core
    python -m experiments.model_card --perceptual DIR --model weights/r3d2 --name r3d2_card

Writes model_card.json, .md and .png, or NAME.* (naive | ours | truth of the first held-out clips, not chosen).
Held out: seeds from 1,000,000 on; training used seeds from 0 on. Of the real video training saw no frame after 109.
The crop is evaluate.py's (metrics.actor_crops): it follows the actor; its shadow has a separate row.
"""

import argparse
import math
import time
from dataclasses import asdict
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as nnf
from tqdm import tqdm

from experiments import common
from mirage_min.data import desk
from mirage_min.data.toy_world import Clip, WorldConfig, make_clip
from mirage_min.data.video import read_clip
from mirage_min.method import metrics, optical_flow
from mirage_min.method.perceptual import Lpips
from mirage_min.networks.imagenet import Features
from mirage_min.systems.load import system_in

FIRST_SEED, SHOWN = 1_000_000, 8  # of the held-out clips; how many of them the picture has
ROWS = {"crop_psnr": "PSNR in the crop", "actor_psnr": "PSNR on the actor", "shadow_psnr": "PSNR in its shadow",
        "crop_lpips": "LPIPS in the crop", "full_psnr": "PSNR, full frame", "full_lpips": "LPIPS, full frame",
        "warp_background": "warp error outside actor and shadow, x 10³", "warp": "warp error, full frame, x 10³"}


def load(model: Path, settings: list[str]) -> nn.Module:
    """The system in a folder, in float32; settings: KEY=VALUE as infer.py's --set takes them."""
    System = system_in(model)
    return System.from_pretrained(model, dtype=torch.float32, **asdict(desk.override(System.Options(), settings)))


def chosen(settings: list[str]) -> str:
    """What a report says of such settings."""
    return f" with `{' '.join(f'--set {setting}' for setting in settings)}`" if settings else ""


def harmonised(system: nn.Module, x: Tensor) -> Tensor:
    """x [3, T, H, W] in [-1, 1] as a stream through the model -> like x."""
    return torch.stack(list(system.stream(iter(x.unbind(1)))), dim=1)


# ---- toy clips -------------------------------------------------------------------------------------------------------

def toy_figures(clip: Clip, x_dr: Tensor, lpips: Lpips | None) -> dict[str, float]:
    """Every figure of one clip and what the model made of it, x_dr [3, T, H, W]; nan where nothing is to be measured.

    Keys are METRIC_naive, METRIC_ours and, for warp errors, METRIC_truth.
    """
    videos = {"naive": clip.x_ni[None], "ours": x_dr[None], "truth": clip.x_gt[None]}
    x_gt, actor, shadow = videos["truth"], clip.actor[None] > 0.5, clip.shadow[None] > 0.5
    crops = metrics.actor_crops(clip.boxes, *x_gt.shape[3:])
    changed = (clip.actor + clip.shadow > 0.02).float()
    background = nnf.max_pool3d(changed, (1, 9, 9), 1, (0, 4, 4))[None] == 0
    seen = clip.visible[None]
    seen_behind = seen * (background[:, :, :-1] & background[:, :, 1:])  # in both frames outside actor and shadow
    out = {"background_psnr_ours": metrics.psnr(videos["ours"], videos["naive"], background).item()}
    for name, x in videos.items():
        out[f"warp_{name}"] = optical_flow.warp_error(x, clip.flow[None], seen).item()
        out[f"warp_background_{name}"] = optical_flow.warp_error(x, clip.flow[None], seen_behind).item()
    for name in ("naive", "ours"):
        x = videos[name]
        pairs = {"full": (x, x_gt)}
        if any(crops):
            pairs["crop"] = metrics.cropped(x, crops), metrics.cropped(x_gt, crops)
        for part, pair in pairs.items():
            out[f"{part}_psnr_{name}"] = metrics.psnr(*pair).item()
            out[f"{part}_lpips_{name}"] = metrics.lpips(*pair, lpips).item() if lpips else math.nan
        out[f"actor_psnr_{name}"] = metrics.psnr(x, x_gt, actor).item()
        out[f"shadow_psnr_{name}"] = metrics.psnr(x, x_gt, shadow).item()
    return out


def mean_figures(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of every figure over the clips that have it; figures that no clip has are left out."""
    means = {}
    for key in rows[0]:
        values = [row[key] for row in rows if not math.isnan(row.get(key, math.nan))]
        if values:
            means[key] = sum(values) / len(values)
    return means


# ---- a real video ----------------------------------------------------------------------------------------------------

def real_clip(path: Path, size: tuple[int, int], first: int, last: int) -> Tensor:
    """Frames first to last of a video, shrunk to (height, width): [3, T, H, W] in [-1, 1]."""
    x = read_clip(path)[:, first : last + 1]
    return nnf.interpolate(x.transpose(0, 1), size=size, mode="bilinear", antialias=True).transpose(0, 1).clamp(-1, 1)


def real_figures(system: nn.Module, x: Tensor) -> dict[str, float]:
    """PSNR to the input x [3, T, H, W], the shift of each channel's mean and the change from frame to frame, of 255."""
    start = time.time()
    y = harmonised(system, x)
    seconds = time.time() - start
    red, green, blue = ((y - x).mean(dim=(1, 2, 3)) * 127.5).tolist()
    return {"psnr": metrics.psnr(y[None], x[None]).item(), "shift_r": red, "shift_g": green, "shift_b": blue,
            "difference_in": (x.diff(dim=1).abs().mean() * 127.5).item(),
            "difference_out": (y.diff(dim=1).abs().mean() * 127.5).item(), "frames_per_second": x.shape[1] / seconds}


def blank_figures(system: nn.Module, x: Tensor) -> dict[str, float]:
    """The mean change, of 255, of x [3, T, H, W] in the dark, of black bars around it, and of frames of one colour."""
    edge = x.shape[2] // 6
    barred = torch.full_like(x, -1)
    barred[:, :, edge:-edge] = x[:, :, edge:-edge]
    inputs = {"dark": (x + 1) * 0.1 - 1, "bars": barred, "black": torch.full_like(x, -1), "grey": torch.zeros_like(x),
              "white": torch.ones_like(x)}
    changes = {name: (harmonised(system, v) - v).abs() * 127.5 for name, v in inputs.items()}
    changes["bars"] = changes["bars"][:, :, :edge]  # of the upper bar alone
    return {name: change.mean().item() for name, change in changes.items()}


# ---- results ---------------------------------------------------------------------------------------------------------

def report(card: dict) -> str:
    """The text of model_card.md."""
    def cells(key: str) -> list[str]:
        found = (card.get(f"{key}_{name}") for name in ("naive", "ours", "truth"))
        return ["" if value is None else f"{value:.3f}" for value in found]

    rows = [[title, *cells(key)] for key, title in ROWS.items()]
    rows.append(["PSNR to the input outside actor and shadow", "", f"{card['background_psnr_ours']:.2f}", ""])
    parts = ["# A small model, measured",
             f"Made by `python -m experiments.model_card` of `{card['model']}`{chosen(card['set'])}. Means over "
             f"{card['clips']} held-out toy clips of {card['frames']} frames; the crop is the actor's "
             "(metrics.actor_crops); LPIPS is AlexNet's.",
             common.table(["", "naive insertion", "ours", "truth"], rows)]
    if "real" in card:
        real, blank = card["real"], card["blank"]
        shift = ", ".join(f"{real[f'shift_{c}']:+.2f}" for c in "rgb")
        parts += ["A real clip in which nothing was inserted, at 480x272:",
                  common.table(["PSNR to the input", "shift of the means of R, G, B, of 255", "frames/s"],
                               [[f"{real['psnr']:.1f}", shift, f"{real['frames_per_second']:.2f}"]]),
                  "Mean change, of 255, of frames that should not change:",
                  common.table(list(blank), [[f"{value:.1f}" for value in blank.values()]])]
    return "\n\n".join(parts) + "\n"


def draw_sheet(strips: list[Tensor]) -> Figure:
    """Strips [3, H, W] in [-1, 1], two to a row."""
    rows = [torch.cat(strips[i : i + 2], dim=2) for i in range(0, len(strips), 2) if len(strips[i : i + 2]) == 2]
    return common.picture(torch.cat(rows or strips[:1], dim=1))


def main(args: argparse.Namespace) -> None:
    system = load(args.model, args.set)
    lpips = None if args.perceptual is None else Lpips(Features("alex", args.perceptual))
    rows, strips, middle = [], [], args.frames // 2
    for seed in tqdm(range(FIRST_SEED, FIRST_SEED + args.clips), unit="clip", disable=None):
        clip = make_clip(seed, WorldConfig(frames=args.frames))
        x_dr = harmonised(system, clip.x_ni)
        rows.append(toy_figures(clip, x_dr, lpips))
        if len(strips) < SHOWN:
            strips.append(torch.cat([x[:, middle] for x in (clip.x_ni, x_dr, clip.x_gt)], dim=2))
    card = mean_figures(rows)
    card |= {"model": str(args.model), "set": args.set, "clips": args.clips, "frames": args.frames,
             "crop_gain": card["crop_psnr_ours"] - card["crop_psnr_naive"],
             "warp_ours_over_truth": card["warp_ours"] / card["warp_truth"]}
    if args.real:
        x = real_clip(args.real, (272, 480), 150, 220)
        card["real"] = real_figures(system, x)
        card["blank"] = blank_figures(system, x[:, :9])
    common.save_json(args.out / f"{args.name}.json", card)
    common.save_text(args.out / f"{args.name}.md", report(card))
    common.save_figure(args.out / f"{args.name}.png", draw_sheet(strips), dpi=100)
    print(report(card))


def flags() -> argparse.ArgumentParser:
    parser = common.flags(__doc__)
    parser.add_argument("--model", type=Path, default=Path("weights"),
                        help="folder of a Mirage, an R3D2 or a harmonizer (default weights)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="an option of the model, as in infer.py: change_only=no")
    parser.add_argument("--name", default="model_card", help="of the files that are written (default model_card)")
    parser.add_argument("--clips", type=int, default=64, help="held-out toy clips (default 64)")
    parser.add_argument("--frames", type=int, default=9, help="frames of each (default 9)")
    parser.add_argument("--perceptual", type=Path, help="folder with alexnet_features.safetensors, for LPIPS")
    parser.add_argument("--real", type=Path, help="the real video of weights/README.md, or another of 221 frames")
    return parser


if __name__ == "__main__":
    common.start(main, flags())
