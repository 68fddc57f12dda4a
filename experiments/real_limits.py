"""What stands in the way on real insertions: the latent, the decoder, or what the 2D encoder sees?

    python -m experiments.real_limits --insertions PAIRS --perceptual DIR      # 5 minutes for two pairs, 640x384

Each part of the shipped model is replaced by the truth in turn, and scored as real_card.py scores it. PAIRS holds
NAME_ni.mp4 and NAME_gt.mp4, aligned frame by frame. Writes real_limits.json and real_limits.md.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from experiments import common, real_card
from mirage_min.data.video import read_clip
from mirage_min.method.perceptual import Lpips
from mirage_min.networks.imagenet import Features
from mirage_min.systems.mirage import Mirage

HEAD = """# What stands in the way on real insertions

Made by `python -m experiments.real_limits`: means over {count} real insertions, the first {frames} frames of each.
Every row but the first comes out of the shipped model's decoder. *Latent* is what the decoder is given, *features* what
the 2D encoder saw. [weights/README.md](../weights/README.md) says what follows from it.
"""


@torch.no_grad()
def variants(mirage: Mirage, x_ni: Tensor, x_gt: Tensor) -> dict[str, Tensor]:
    """What the decoder makes of latents and features of the insertion x_ni or the truth x_gt [1, 3, T, H, W]: by name,
    each like x_ni, clamped."""
    T, H, W = x_ni.shape[2:]
    x_ni, x_gt = mirage.pad(x_ni), mirage.pad(x_gt)
    z_ni, z_gt = mirage.vae.encode(x_ni), mirage.vae.encode(x_gt)
    seen_ni, seen_gt = mirage.mids(x_ni), mirage.mids(x_gt)
    z_dr = mirage.denoise(z_ni)
    made = {"the model": (z_dr, seen_ni),
            "insertion's latent: no transformer": (z_ni, seen_ni),
            "truth's latent: a perfect transformer": (z_gt, seen_ni),
            "model's latent, truth's features": (z_dr, seen_gt),
            "truth's latent and features: the decoder's ceiling": (z_gt, seen_gt)}
    out = {}
    for name, (z, seen) in made.items():
        x = mirage.vae.decode(z, inject=list(seen))
        out[name] = x[:, :, :T, :H, :W].clamp(-1, 1)
    return out


def measure(folder: Path, frames: int, mirage: Mirage, lpips: Lpips | None) -> dict[str, dict[str, float]]:
    """The mean figures by variant over every NAME_ni.mp4 and NAME_gt.mp4 of a folder, and the number of pairs.

    ValueError if there are none.
    """
    paths = sorted(folder.glob("*_ni.mp4"))
    if not paths:
        raise ValueError(f"{folder}: wanted NAME_ni.mp4 and NAME_gt.mp4, found no *_ni.mp4")
    rows: dict[str, list[dict]] = {}
    for path in paths:
        x_ni = read_clip(path, frames)
        x_gt = read_clip(path.with_name(path.name.replace("_ni.mp4", "_gt.mp4")), frames)
        boxes = real_card.largest_patch(x_ni, x_gt)
        made = {"naive insertion": x_ni[None]} | variants(mirage, x_ni[None], x_gt[None])
        for name, x in made.items():
            figures = real_card.inserted_figures(x_ni, x_gt, x[0], boxes, lpips)
            kept = {metric: figures[f"{metric}_ours"] for metric in ("full_psnr", "crop_psnr", "crop_lpips")}
            rows.setdefault(name, []).append(kept)
    means = {name: {metric: real_card.mean([row[metric] for row in found]) for metric in found[0]}
             for name, found in rows.items()}
    return {"pairs": len(paths), "frames": frames, "means": means}


def report(found: dict) -> str:
    """The text of real_limits.md."""
    cells = [[name, f"{row['full_psnr']:.2f}", f"{row['crop_psnr']:.2f}", f"{row['crop_lpips']:.3f}"]
             for name, row in found["means"].items()]
    table = common.table(["", "full, PSNR", "crop, PSNR", "crop, LPIPS"], cells)
    return HEAD.format(count=found["pairs"], frames=found["frames"]) + "\n" + table + "\n"


def main(args: argparse.Namespace) -> None:
    mirage = Mirage.from_pretrained(args.model, dtype=torch.float32)
    lpips = None if args.perceptual is None else Lpips(Features("alex", args.perceptual))
    found = measure(args.insertions, args.frames, mirage, lpips)
    common.save_json(args.out / "real_limits.json", found)
    common.save_text(args.out / "real_limits.md", report(found))
    print(report(found))


def flags() -> argparse.ArgumentParser:
    parser = common.flags(__doc__)
    parser.add_argument("--model", type=Path, default=Path("weights"), help="folder of a Mirage (default weights)")
    parser.add_argument("--insertions", type=Path, metavar="DIR", required=True,
                        help="real insertions with their truth: NAME_ni.mp4, NAME_gt.mp4")
    parser.add_argument("--frames", type=int, default=17, help="frames of each video (default 17)")
    parser.add_argument("--perceptual", type=Path, help="folder with alexnet_features.safetensors, for LPIPS")
    return parser


if __name__ == "__main__":
    common.start(main, flags())
