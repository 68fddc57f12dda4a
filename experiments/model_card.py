"""The shipped model's figures: held-out toy clips, and a real video in which nothing was inserted.

    python -m experiments.model_card --perceptual DIR [--real REAL]

Writes docs/model_card.json and docs/model_card.png (naive | ours | truth of the first held-out clips, not chosen).
Held out: seeds from 1,000,000 on; training used seeds from 0 on. Of the real video training saw no frame after 109.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from mirage_min.data.toy_world import Clip, WorldConfig, make_clip
from mirage_min.data.video import read_clip
from mirage_min.method import metrics, optical_flow
from mirage_min.method.perceptual import Features, Lpips
from mirage_min.systems.mirage import Mirage


def crop_box(clip: Clip) -> tuple[slice, slice]:
    """Rows and columns of the actor and its shadow over the whole clip, at least 40 x 40 pixels (LPIPS needs 31)."""
    ys, xs = ((clip.actor + clip.shadow)[0].amax(dim=0) > 0.1).nonzero(as_tuple=True)

    def side(v, size):
        a, b = int(v.min()), int(v.max()) + 1
        grow = max(0, 40 - (b - a))
        a = max(0, min(a - grow // 2, size - (b - a + grow)))
        return slice(a, min(size, max(b, a + 40)))
    return side(ys, clip.actor.shape[-2]), side(xs, clip.actor.shape[-1])


def toy_figures(mirage: Mirage, clip: Clip, lpips: Lpips | None) -> tuple[dict[str, float], torch.Tensor]:
    """Every figure of one clip, and the harmonised video [1, 3, T, H, W]."""
    x_ni, x_gt = clip.x_ni[None], clip.x_gt[None]
    x_dr = torch.stack(list(mirage.stream(iter(clip.x_ni.unbind(1)))), dim=1)[None]
    ys, xs = crop_box(clip)
    around = F.max_pool3d((clip.actor + clip.shadow > 0.02).float(), (1, 9, 9), 1, (0, 4, 4))[None] == 0
    inside, seen = clip.actor[None] > 0.5, clip.visible[None]
    behind = seen * (around[:, :, :-1] & around[:, :, 1:])  # what is seen twice, both times outside actor and shadow
    out = {}
    for name, x in (("naive", x_ni), ("ours", x_dr), ("truth", x_gt)):
        out |= {f"warp_{name}": optical_flow.warp_error(x, clip.flow[None], seen).item(),
                f"warp_background_{name}": optical_flow.warp_error(x, clip.flow[None], behind).item()}
    for name, x in (("naive", x_ni), ("ours", x_dr)):
        out |= {f"crop_psnr_{name}": metrics.psnr(x[..., ys, xs], x_gt[..., ys, xs]).item(),
                f"actor_psnr_{name}": metrics.psnr(x, x_gt, inside).item(),
                f"shadow_psnr_{name}": metrics.psnr(x, x_gt, clip.shadow[None] > 0.5).item(),
                f"full_psnr_{name}": metrics.psnr(x, x_gt).item()}
        if lpips is not None:
            out |= {f"crop_lpips_{name}": metrics.lpips(x[..., ys, xs], x_gt[..., ys, xs], lpips).item(),
                    f"full_lpips_{name}": metrics.lpips(x, x_gt, lpips).item()}
    out["background_psnr_ours"] = metrics.psnr(x_dr, x_ni, around).item()
    return out, x_dr


def real_clip(path: Path, size: tuple[int, int], first: int, last: int) -> torch.Tensor:
    """Frames first..last of a video, made smaller: [3, T, H, W] in [-1, 1]."""
    x = read_clip(path)[:, first : last + 1]
    return F.interpolate(x.transpose(0, 1), size=size, mode="bilinear", antialias=True).transpose(0, 1).clamp(-1, 1)


def real_figures(mirage: Mirage, x: torch.Tensor) -> dict[str, float]:
    """PSNR to the input x [3, T, H, W] and the shift of each channel's mean (of 255)."""
    start = time.time()
    y = torch.stack(list(mirage.stream(iter(x.unbind(1)))), dim=1)
    shift = ((y - x).mean(dim=(1, 2, 3)) * 127.5).tolist()
    return {"psnr": metrics.psnr(y[None], x[None]).item(),
            "shift_r": shift[0], "shift_g": shift[1], "shift_b": shift[2],
            "difference_in": ((x[:, 1:] - x[:, :-1]).abs().mean() * 127.5).item(),
            "difference_out": ((y[:, 1:] - y[:, :-1]).abs().mean() * 127.5).item(),
            "frames_per_second": x.shape[1] / (time.time() - start)}


def blank_figures(mirage: Mirage, x: torch.Tensor) -> dict[str, float]:
    """The mean change, of 255, of x [3, T, H, W] in the dark, of black bars around it, and of frames of one colour."""
    edge = x.shape[2] // 6
    bars = torch.full_like(x, -1)
    bars[:, :, edge:-edge] = x[:, :, edge:-edge]
    inputs = {"dark": (x + 1) * 0.1 - 1, "bars": bars} | {
        name: torch.full_like(x, level) for name, level in (("black", -1.0), ("grey", 0.0), ("white", 1.0))}
    changes = {}
    for name, v in inputs.items():
        change = (torch.stack(list(mirage.stream(iter(v.unbind(1)))), dim=1) - v).abs() * 127.5
        changes[name] = (change[:, :, :edge] if name == "bars" else change).mean().item()
    return changes


def main(args) -> None:
    mirage = Mirage.from_pretrained(args.model)
    lpips = None if args.perceptual is None else Lpips(Features("alex", args.perceptual))
    rows, pictures = [], []
    for seed in tqdm(range(1_000_000, 1_000_000 + args.clips), unit="clip"):
        clip = make_clip(seed, WorldConfig(frames=args.frames))
        figures, x_dr = toy_figures(mirage, clip, lpips)
        rows.append(figures)
        if len(pictures) < 8:
            middle = args.frames // 2
            pictures.append(torch.cat([clip.x_ni[:, middle], x_dr[0, :, middle], clip.x_gt[:, middle]], dim=2))
    card = {key: sum(r[key] for r in rows) / len(rows) for key in rows[0]}
    card |= {"clips": args.clips, "crop_gain": card["crop_psnr_ours"] - card["crop_psnr_naive"],
             "warp_ours_over_truth": card["warp_ours"] / card["warp_truth"]}
    if args.real:
        x = real_clip(args.real, (272, 480), 150, 220)
        card["real"], card["blank"] = real_figures(mirage, x), blank_figures(mirage, x[:, :9])
    args.out.mkdir(exist_ok=True)
    (args.out / "model_card.json").write_text(json.dumps(card, indent=2) + "\n")
    sheet = torch.cat([torch.cat(pictures[i : i + 2], dim=2) for i in range(0, len(pictures) - 1, 2)], dim=1)
    sheet = F.interpolate(sheet[None], scale_factor=2, mode="bilinear")[0]
    pixels = ((sheet + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(args.out / "model_card.png")
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("weights"), help="folder of a Mirage (default weights)")
    parser.add_argument("--clips", type=int, default=64, help="held-out toy clips (default 64)")
    parser.add_argument("--frames", type=int, default=9, help="frames of each (default 9)")
    parser.add_argument("--perceptual", type=Path, help="folder with alexnet_features.safetensors, for LPIPS")
    parser.add_argument("--real", type=Path, help="the real video that the README names, or another of 221 frames")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="where the figures go (default docs)")
    main(parser.parse_args())
