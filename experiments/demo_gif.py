"""The picture on the first screen: naive insertion | ours | truth of the demo clip, as a GIF.

    python -m experiments.demo_gif              # a minute on one core; --out docs renews the README's

The clip is the first held-out seed, from 1,000,000 on, whose actor is whole and in view in all of its 33 frames. It was
chosen by that rule before anything was harmonised. toy_world wrote it and its truth:

    python -m mirage_min.data.toy_world --pair assets/naive_insertion.mp4 assets/truth.mp4 --frames 33 \\
        --first-seed 1000000
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from experiments import common
from mirage_min.data.pixels import to_uint8
from mirage_min.data.video import Video, read_clip
from mirage_min.method import metrics
from mirage_min.networks.weights import whole_file
from mirage_min.systems.mirage import Mirage

CAPTION = 14  # rows of pixels above the pictures


def sheets(videos: dict[str, Tensor]) -> list[Image.Image]:
    """Each frame of videos [3, T, H, W] in [-1, 1], next to each other under their captions."""
    T, H, W = next(iter(videos.values())).shape[1:]
    header = Image.new("RGB", (len(videos) * W, CAPTION), "white")
    for k, caption in enumerate(videos):
        ImageDraw.Draw(header).text((k * W + 3, 1), caption, fill="black")
    found = []
    for t in range(T):
        sheet = Image.new("RGB", (header.width, CAPTION + H))
        sheet.paste(header)
        sheet.paste(Image.fromarray(to_uint8(torch.cat([x[:, t] for x in videos.values()], dim=2))), (0, CAPTION))
        found.append(sheet)
    return found


def save_gif(path: Path, frames: list[Image.Image], fps: float) -> None:
    """A GIF that plays for ever, in one palette for all of its frames, so that a still surface does not flicker."""
    width, height = frames[0].size
    some = frames[:: max(1, len(frames) // 4)]
    together = Image.new("RGB", (width, height * len(some)))
    for k, frame in enumerate(some):
        together.paste(frame, (0, k * height))
    palette = together.quantize(256)
    first, *rest = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        first.save(temporary, "gif", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)


def main(args: argparse.Namespace) -> None:
    x_ni, x_gt = read_clip(args.clip), read_clip(args.truth)
    if x_ni.shape != x_gt.shape:
        raise ValueError(f"{args.clip} is {list(x_ni.shape)}, {args.truth} {list(x_gt.shape)}")
    with Video(args.clip) as video:
        fps = float(video.format.rate)
    mirage = Mirage.from_pretrained(args.model, dtype=torch.float32, change_only=True)
    x_dr = torch.stack(list(mirage.stream(iter(x_ni.unbind(1)))), dim=1)
    for name, x in (("naive insertion", x_ni), ("ours", x_dr)):
        print(f"{name}: PSNR {metrics.psnr(x[None], x_gt[None]).item():.2f} dB over full frames")
    save_gif(args.out / "demo.gif", sheets({"naive insertion": x_ni, "ours": x_dr, "truth": x_gt}), fps)


def flags() -> argparse.ArgumentParser:
    parser = common.flags(__doc__)
    parser.add_argument("--clip", type=Path, default=Path("assets/naive_insertion.mp4"), help="(default the demo clip)")
    parser.add_argument("--truth", type=Path, default=Path("assets/truth.mp4"), help="(default the demo clip's)")
    parser.add_argument("--model", type=Path, default=Path("weights"), help="folder of a Mirage (default weights)")
    return parser


if __name__ == "__main__":
    common.start(main, flags())
