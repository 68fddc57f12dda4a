"""What restorers undo: low resolution, and holes to be filled (ChopGrad §4.1, §4.3, B.3). One function each.

    small = low_resolution(x, 4, draws)              # [3, T, H, W] in [-1, 1] -> [3, T, H/4, W/4]
    mask = central_mask(H, W)                        # half the height and half the width, in the middle
    mask = half_of_vehicles(boxes, T, H, W, draws)   # boxes [T, 4] of each vehicle

A video is degraded twice over, as Real-ESRGAN degrades images (second order): each time blurred, resized, given noise
and stored as JPEG; at last it is resized to its final size and stored as H.264. One draw serves all frames of a clip,
but for the noise. The ranges are Real-ESRGAN's.
Left out: sinc filters, Poisson noise, generalised Gaussians. Artifacts of splats are in streams.py.

    python -m mirage_min.data.degradations --out data/boxes --count 400     # pairs with half of their vehicles hidden
    python -m mirage_min.data.degradations                                  # degradations.png: truth | each of them
"""

import argparse
import io
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn import functional as nnf

from . import desk, toy_render, toy_world
from .masks import hide
from .photometric import integer, uniform
from .pixels import to_float, to_uint8
from .shots import Sample, save_sample, toy_shot
from .toy_world import WorldConfig, height_x_width

Range = tuple[float, float]


@dataclass(frozen=True)
class Order:
    """One of the two rounds."""

    blur: Range                    # standard deviations of the Gaussian along its two axes, in pixels
    blurred: float                 # share of clips that are blurred
    resize: Range                  # factor on both sides
    noise: Range                   # standard deviation of Gaussian noise, of 255
    jpeg: tuple[int, int]          # quality


FIRST = Order(blur=(0.2, 3.0), blurred=1.0, resize=(0.15, 1.5), noise=(1, 30), jpeg=(30, 95))
SECOND = Order(blur=(0.2, 1.5), blurred=0.8, resize=(0.3, 1.2), noise=(1, 25), jpeg=(30, 95))
CRF = 18, 35  # quality of the H.264
MODES = "area", "bilinear", "bicubic"
LEAST = 8  # pixels of a side in between


# ---- low resolution --------------------------------------------------------------------------------------------------

def low_resolution(x: Tensor, scale: int, draws: Generator) -> Tensor:
    """x [3, T, H, W] in [-1, 1] -> [3, T, H / scale, W / scale]. ValueError unless the scale divides both sides."""
    H, W = x.shape[-2:]
    if H % scale or W % scale:
        raise ValueError(f"wanted frames whose sides {scale} divides, got {H}x{W}")
    frames = ((x + 1) / 2).transpose(0, 1)                                       # [T, 3, H, W] in [0, 1]
    # the second round starts from what the final size needs, as Real-ESRGAN has it
    for order, sides in ((FIRST, (H, W)), (SECOND, (H / scale, W / scale))):
        if float(uniform(draws, 0, 1)) < order.blurred:
            frames = blur(frames, draws, order.blur)
        frames = resize(frames, sides, float(uniform(draws, *order.resize)), draws)
        frames = noisy(frames, draws, order.noise)
        frames = as_jpeg(frames, whole(draws, order.jpeg))
    frames = resize(frames, (H // scale, W // scale), 1.0, draws)
    return (as_h264(frames, whole(draws, CRF)) * 2 - 1).transpose(0, 1)


def blur(frames: Tensor, draws: Generator, sigma: Range) -> Tensor:
    """frames [T, 3, H, W] under one Gaussian with two standard deviations, at any angle."""
    a, b = (float(uniform(draws, *sigma)) for _ in range(2))
    angle = float(uniform(draws, 0, math.pi))
    n = max(1, math.ceil(3 * max(a, b)))
    y, x = torch.meshgrid(*[torch.arange(-n, n + 1.0)] * 2, indexing="ij")
    along = (x * math.cos(angle) + y * math.sin(angle)) / a
    across = (y * math.cos(angle) - x * math.sin(angle)) / b
    kernel = torch.exp(-0.5 * (along.square() + across.square()))
    kernel = (kernel / kernel.sum()).expand(3, 1, -1, -1)
    return nnf.conv2d(nnf.pad(frames, (n, n, n, n), mode="replicate"), kernel, groups=3)


def resize(frames: Tensor, sides: tuple[float, float], factor: float, draws: Generator) -> Tensor:
    """frames [T, 3, h, w] -> `factor` times `sides`, by one of MODES; LEAST pixels at least where the factor is not 1.
    """
    mode = MODES[integer(draws, len(MODES))]
    least = 1 if factor == 1 else LEAST
    size = [max(least, round(side * factor)) for side in sides]
    smooth = {} if mode == "area" else {"antialias": True}
    return nnf.interpolate(frames, size, mode=mode, **smooth).clamp(0, 1)


def noisy(frames: Tensor, draws: Generator, sigma: Range) -> Tensor:
    """frames [T, 3, h, w] with Gaussian noise, the same in all colours for two clips of five."""
    channels = 1 if float(uniform(draws, 0, 1)) < 0.4 else 3
    T, _, h, w = frames.shape
    noise = float(uniform(draws, *sigma)) / 255 * torch.randn(T, channels, h, w, generator=draws)
    return (frames + noise).clamp(0, 1)


def as_jpeg(frames: Tensor, quality: int) -> Tensor:
    """frames [T, 3, h, w] in [0, 1], each stored as JPEG and read again."""
    read = []
    for frame in frames:
        file = io.BytesIO()
        Image.fromarray(to_uint8(frame * 2 - 1)).save(file, "JPEG", quality=quality)
        with Image.open(file) as image:
            read.append(to_unit(image.convert("RGB")))
    return torch.stack(read)


def as_h264(frames: Tensor, crf: int) -> Tensor:
    """frames [T, 3, h, w] in [0, 1] stored as H.264 and read again; in a way whose bits repeat."""
    T, _, h, w = frames.shape
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        # with x264's macroblock tree equal frames come to different files, even on one thread
        options = {"crf": str(crf), "preset": "veryfast", "mbtree": "0"}
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height = w, h
        stream.pix_fmt = "yuv444p" if h % 2 or w % 2 else "yuv420p"
        stream.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(to_uint8(frame * 2 - 1), format="rgb24")))
        container.mux(stream.encode())
    file.seek(0)
    with av.open(file) as container:
        return torch.stack([to_unit(frame.to_image()) for frame in container.decode(video=0)])


def to_unit(image: Image.Image) -> Tensor:
    """A picture -> [3, h, w] in [0, 1]."""
    return (to_float(np.array(image)) + 1) / 2


def whole(draws: Generator, limits: tuple[int, int]) -> int:
    """A whole number within limits, both included."""
    return limits[0] + integer(draws, limits[1] - limits[0] + 1)


# ---- holes -----------------------------------------------------------------------------------------------------------

def central_mask(H: int, W: int) -> Tensor:
    """[1, H, W], true in the middle: half the height and half the width (ChopGrad §4.3)."""
    mask = torch.zeros(1, H, W, dtype=torch.bool)
    mask[:, H // 4 : H // 4 + H // 2, W // 4 : W // 4 + W // 2] = True
    return mask


def half_of_vehicles(boxes: list[Tensor], T: int, H: int, W: int, draws: Generator) -> Tensor:
    """boxes [T, 4] in pixels, one tensor a vehicle, NaN where it is not seen -> [1, T, H, W], true in half of them.

    The same vehicles in all frames (ChopGrad B.3, Waymo-Bbox); of an odd number one more. ValueError where the mask
    covers nothing.
    """
    mask = torch.zeros(1, T, H, W, dtype=torch.bool)
    for i in torch.randperm(len(boxes), generator=draws)[: -(-len(boxes) // 2)].tolist():
        for t, box in enumerate(boxes[i]):
            if box.isfinite().all():
                x0, y0, x1, y1 = box.tolist()
                rows, columns = (slice(max(0, math.floor(a)), max(0, math.ceil(b))) for a, b in ((y0, y1), (x0, x1)))
                mask[:, t, rows, columns] = True
    if not mask.any():
        raise ValueError("no vehicle of the half that was drawn is seen")
    return mask


def vehicle_boxes(scene: toy_render.Scene, config: WorldConfig) -> list[Tensor]:
    """The boxes [T, 4] in pixels of each vehicle of a made-up scene, NaN where a corner is behind the camera."""
    K, found = toy_render.intrinsics(config), []
    for body in scene.bodies:
        if body.size is None:
            continue
        corners = torch.cat([part.corners for part in body.parts])                            # [N, 3]
        boxes = []
        for pose, c2w in zip(body.pose, scene.c2w):
            to_camera = torch.linalg.inv(c2w) @ pose
            seen = (corners @ to_camera[:3, :3].T + to_camera[:3, 3]) @ K.T
            u, v = seen[:, 0] / seen[:, 2], seen[:, 1] / seen[:, 2]
            box = torch.stack([u.min(), v.min(), u.max(), v.max()])
            boxes.append(box if (seen[:, 2] > 0.1).all() else torch.full((4,), math.nan))
        found.append(torch.stack(boxes))
    return found


def boxes_hidden(seed: int, config: WorldConfig) -> Sample:
    """A made-up scene with half of its vehicles hidden: the first of the shots that a seed draws in which one shows.

    ValueError if there is none among 50.
    """
    for attempt in range(50):
        draws = torch.Generator().manual_seed(seed * 64 + attempt)
        shot = toy_shot(draws, config)
        try:
            boxes = vehicle_boxes(shot.scene, config)
            mask = half_of_vehicles(boxes, config.frames, config.height, config.width, draws)
        except ValueError:
            continue
        clip = toy_world.render(shot.scene, config)
        return Sample(hide(clip.x_gt, mask), clip.x_gt, mask.float(), clip.boxes, clip.flow, clip.visible,
                      {"share": float(mask.float().mean())})
    raise ValueError(f"seed {seed}: no shot in 50 shows a vehicle that could be hidden")


# ---- files -----------------------------------------------------------------------------------------------------------

def demonstrate() -> None:
    """Each degradation of one clip."""
    x = toy_world.make_clip(3).x_gt
    T, H, W = x.shape[1:]
    small = low_resolution(x, 4, torch.Generator().manual_seed(0))
    shown = {"truth": x,
             "low resolution": nnf.interpolate(small.transpose(0, 1), (H, W), mode="bilinear").transpose(0, 1),
             "central mask": hide(x, central_mask(H, W)),
             "half of the vehicles": boxes_hidden(3, WorldConfig()).degraded}
    for name, y in shown.items():
        print(f"{name:22} {-10 * math.log10(max(float((y - x).square().mean()) / 4, 1e-9)):5.1f} dB")
    Image.fromarray(to_uint8(torch.cat([y[:, T // 2] for y in shown.values()], dim=2))).save("degradations.png")
    print("degradations.png:", " | ".join(shown))


def main(args: argparse.Namespace) -> None:
    """A folder of pairs or, without one, a demonstration."""
    if not args.out:
        return demonstrate()
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in desk.bar(range(args.first_seed, args.first_seed + args.count), unit="pair"):
        path = args.out / f"boxes_toy_{seed:06d}.safetensors"
        if not path.exists():
            save_sample(boxes_hidden(seed, WorldConfig(args.frames, *args.size)), path, "boxes")
    print(f"{args.count} pairs in {args.out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=desk.first_line(__doc__))
    parser.add_argument("--out", type=Path, help="folder for the pairs; without it, each degradation is shown")
    parser.add_argument("--count", type=int, default=100, help="how many (default 100); those that exist are kept")
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first (default 0)")
    parser.add_argument("--size", type=height_x_width, default=(96, 144), help="rows x columns (default 96x144)")
    parser.add_argument("--frames", type=int, default=9, help="frames of a pair (default 9)")
    args = parser.parse_args()
    if min(args.count, args.frames, *args.size) < 1 or args.first_seed < 0:
        parser.error("count, frames and size must be at least 1, first-seed 0 or more")
    sys.exit(desk.serve("degradations", lambda: main(args), lambda: "; the pairs that are whole stay"))
