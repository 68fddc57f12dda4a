"""Procedural driving scenes: pairs of a naive insertion and the truth, with everything that is known about them.

A scene is a road with markings, verges, buildings, poles, trees and vehicles, seen from a moving car and lit by a sun
and a sky. One of the vehicles is the actor. Of each seed there are, from the same primary hits,

    x_gt   the scene as it is: the actor lit by the scene's light, with its cast and its contact shadow
    x_ni   the naive insertion: the same actor, same shape and paint, lit by another light, and no shadow of it anywhere

and, exactly, the actor's mask, its shadow, depth, optical flow, 2D and 3D boxes and cameras. The scenes stand in for
MirageDrive, which is not public, and are made so that a small model can learn from them (DEVIATIONS.md): the asset's
paint is the actor's paint, lights vary within narrow ranges, actors are large and shadows long.

    python -m mirage_min.data.toy_world --out data/toy --clips 2000 --workers 2
    python -m mirage_min.data.toy_world --video naive.mp4 --frames 33 --first-seed 1000005 --size 128x192
    python -m mirage_min.data.toy_world --scene example     # a scene folder for build_pairs.py
    python -m mirage_min.data.toy_world                     # one scene: shapes and a picture
"""

import argparse
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..networks import weights
from .align import mask_box
from .toy_render import Body, Light, Part, Scene, frame, intrinsics, motion
from .video import from_bytes, to_bytes, to_uint8, write_clip


@dataclass
class WorldConfig:
    """How a clip is sampled; the field of view does not depend on it."""

    frames: int = 9
    height: int = 96
    width: int = 144
    supersample: int = 2
    fps: float = 10.0
    grain: float = 0.3  # standard deviation of the sensor's noise, in 1/255, the same in both videos


@dataclass
class Clip:
    """One pair and what is known about it; the fields from `depth` on are None in a clip saved without extras."""

    x_ni: Tensor                    # [3, T, H, W] in [-1, 1]
    x_gt: Tensor                    # [3, T, H, W] in [-1, 1]
    actor: Tensor                   # [1, T, H, W] in [0, 1], its alpha
    shadow: Tensor                  # [1, T, H, W] in [0, 1], where the actor darkens what is around it
    depth: Tensor | None = None     # [1, T, H, W] metres along z of the camera; inf: sky
    flow: Tensor | None = None      # [2, T-1, H, W] pixels (dx, dy) from t to t + 1
    visible: Tensor | None = None   # [1, T-1, H, W] 1 where it is still seen at t + 1, to a pixel
    boxes: Tensor | None = None     # [T, 4] x0, y0, x1, y1 of the mask, in pixels; 0: hidden
    pose: Tensor | None = None      # [T, 4, 4] the actor's object-to-world
    size: Tensor | None = None      # [3] the actor's width, height, length in metres
    K: Tensor | None = None         # [3, 3]
    c2w: Tensor | None = None       # [T, 4, 4]


# ---- shapes ----------------------------------------------------------------------------------------------------------

FACES = (4, 5, 6, 7), (3, 2, 1, 0), (0, 1, 5, 4), (1, 2, 6, 5), (2, 3, 7, 6), (3, 0, 4, 7)  # corners of a prism's faces


def prism(x0, x1, y0, y1, z0, z1, top=(1.0, 1.0, 0.0), paint="plain") -> Part:
    """A box from y0 (top) to y1 (bottom) whose top is scaled by top[:2] in x and z and shifted by top[2] in z."""
    cx, cz, hx, hz = (x0 + x1) / 2, (z0 + z1) / 2, (x1 - x0) / 2, (z1 - z0) / 2
    low = [(cx + sx * hx, y1, cz + sz * hz) for sx, sz in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    high = [(cx + sx * hx * top[0], y0, cz + sz * hz * top[1] + top[2])
            for sx, sz in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    c = torch.tensor(low + high)
    n = torch.stack([torch.linalg.cross(c[b] - c[a], c[d] - c[b]) for a, b, d, _ in FACES])
    n = F.normalize(n, dim=1)
    n = n * torch.sign((n * (c[[face[0] for face in FACES]] - c.mean(0))).sum(1, keepdim=True))
    return Part(n, (n * c[[face[0] for face in FACES]]).sum(1), paint, c)


def car(length: float, width: float, height: float) -> list[Part]:
    """Body, cabin and wheels, standing on y = 0 and facing +z."""
    half, w, waist = length / 2, width / 2, -0.6 * height
    parts = [prism(-w, w, waist, -0.22, -half, half, (0.94, 0.97, 0.0), "body"),
             prism(-0.92 * w, 0.92 * w, -height, waist, -0.78 * half, 0.42 * half, (0.8, 0.62, -0.16 * half), "cabin")]
    for sx in (-1, 1):
        for z in (-0.62 * half, 0.62 * half):
            x0, x1 = sorted((sx * w * 1.01, sx * w * 0.75))
            parts.append(prism(x0, x1, -0.62, 0.0, z - 0.31, z + 0.31, (1.0, 0.75, 0.0), "wheel"))
    return parts


# ---- sampling --------------------------------------------------------------------------------------------------------

PAINTS = [(0.62, 0.60, 0.58), (0.55, 0.06, 0.05), (0.07, 0.16, 0.45), (0.30, 0.32, 0.34), (0.70, 0.66, 0.52),
          (0.08, 0.30, 0.16), (0.62, 0.36, 0.06), (0.10, 0.10, 0.11)]


class Draws:
    """The random numbers of a scene, drawn in the order in which it is built."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def pick(self, *values):
        return values[int(self(0, len(values) - 1e-6))]

    def paint(self) -> Tensor:
        return (torch.tensor(self.pick(*PAINTS)) * self(0.85, 1.15)).clamp(0, 0.9)


def standing(config: WorldConfig, x, z, yaw, speed=0.0, turn=0.0) -> Tensor:
    """[T, 4, 4] of something that leaves (x, 0, z), heading `yaw` from +z: frame 0 is a step on."""
    T, dt = config.frames, 1 / config.fps
    pose, angle = torch.eye(4).repeat(T, 1, 1), yaw + turn * (torch.arange(T) * dt)
    pose[:, 0, 0], pose[:, 0, 2], pose[:, 2, 0], pose[:, 2, 2] = angle.cos(), angle.sin(), -angle.sin(), angle.cos()
    pose[:, 0, 3] = x + torch.cumsum(speed * dt * angle.sin(), 0)
    pose[:, 2, 3] = z + torch.cumsum(speed * dt * angle.cos(), 0)
    return pose


def ego(u: Draws, config: WorldConfig) -> tuple[Tensor, float]:
    """The camera's path [T, 4, 4]: forward at some speed, with a little turn and pitch; and the speed."""
    speed, turn = u(2, 12), u(-0.06, 0.06)
    c2w, pitch = standing(config, u(-0.4, 0.4), 0.0, u(-0.05, 0.05), speed, turn), torch.eye(4)
    p = u(0.06, 0.16)
    pitch[1, 1], pitch[1, 2], pitch[2, 1], pitch[2, 2] = math.cos(p), math.sin(p), -math.sin(p), math.cos(p)
    c2w = c2w @ pitch
    c2w[:, 1, 3] = -u(1.5, 2.0)
    return c2w, speed


def actor_and_traffic(u: Draws, config: WorldConfig, c2w: Tensor, speed: float) -> list[Body]:
    """The actor, ahead in this lane or a neighbouring one, seen from behind, ahead or the side; other vehicles, parked
    or driving, not where it is. Where the ego car would run into the actor, its path is slowed down in place."""
    kind = u.pick("ahead", "ahead", "beside", "oncoming", "crossing")
    length, width, height = u(4.0, 4.9), u(1.75, 1.95), u(1.45, 1.85)
    z = u(7.5, 12.0)
    x, yaw, own = {"ahead": (u(-1.2, 1.2), u(-0.5, 0.5), speed + u(-1.0, 2.0)),
                   "beside": (u.pick(-1, 1) * u(2.0, 3.4), u(-0.5, 0.5), speed + u(-1.0, 2.0)),
                   "oncoming": (-u(2.0, 3.4), math.pi + u(-0.4, 0.4), u(0.0, 1.0)),
                   "crossing": (u(-2.0, 2.0), u.pick(-1, 1) * math.pi / 2 + u(-0.4, 0.4), u(0.0, 2.0))}[kind]
    if kind in ("oncoming", "crossing"):
        c2w[:, 2, 3] *= 0.25
        z = u(8.5, 13.0)
    bodies = [Body(car(length, width, height), u.paint(), standing(config, x, z, yaw, own),
                   torch.tensor([width, height, length]))]
    for _ in range(int(u(1, 4))):
        side = u.pick(-1, 1)
        bx, bz = side * u(3.4, 6.5), u(4, 45)
        if abs(bz - z) < 6.5 and abs(bx - x) < 4.2:
            bz += 14
        size = (u(4.0, 5.2), u(1.75, 2.0), u(1.4, 2.1))
        bodies.append(Body(car(*size), u.paint(), standing(config, bx, bz, u.pick(0, math.pi) + u(-0.1, 0.1), u(0, 6)),
                           torch.tensor([size[1], size[2], size[0]])))
    return bodies


def roadside(u: Draws, config: WorldConfig) -> list[Body]:
    """Buildings, poles and trees on both sides."""
    bodies = []
    for side in (-1, 1):
        at = u(-4, 8)
        while at < 75:
            depth, front, tall = u(8, 16), u(9.5, 15), u(3.5, 8)
            x0, x1 = sorted((side * front, side * (front + 10)))
            color = torch.tensor([u(0.25, 0.6)] * 3) * torch.tensor([u(0.9, 1.1), 1.0, u(0.8, 1.05)])
            if u() < 0.6:
                wall = prism(x0, x1, -tall, 0.0, at, at + depth, paint="wall")
                bodies.append(Body([wall], color, standing(config, 0, 0, 0), None))
            at += depth + u(0.5, 8)
        for _ in range(int(u(1, 4))):
            px, pz, tall = side * u(5.2, 7.5), u(5, 40), u(3.5, 6)
            parts = [prism(-0.09, 0.09, -tall, 0.0, -0.09, 0.09)]
            if u() < 0.6:  # a tree
                r = u(0.9, 1.5)
                parts.append(prism(-r, r, -tall - r, -tall * 0.55, -r, r, (0.55, 0.55, 0.0), "leaves"))
            bodies.append(Body(parts, torch.tensor([0.22, 0.18, 0.14]), standing(config, px, pz, u(0, 3)), None))
    return bodies


def light(u: Draws, elevation: tuple, sun: tuple, sky: tuple, tint: float, exposure: tuple) -> Light:
    """A sun at an elevation (degrees) and a sky, drawn from these ranges; `tint` is how warm or cold it may be."""
    high, azimuth = math.radians(u(*elevation)), u(-math.pi, math.pi)
    while math.cos(azimuth) < -0.75:  # a sun right behind would hide the shadow behind the actor
        azimuth = u(-math.pi, math.pi)
    to_sun = torch.tensor([math.cos(high) * math.sin(azimuth), -math.sin(high), math.cos(high) * math.cos(azimuth)])
    warm = u(-tint, tint)
    return Light(to_sun, torch.tensor([1.0 + warm, 0.96, 0.86 - warm]) * u(*sun),
                 torch.tensor([0.80, 0.92, 1.10]) * u(*sky), u(*exposure))


def sample_scene(seed: int, config: WorldConfig = WorldConfig()) -> Scene:
    """The scene of a seed; the same at every size."""
    u = Draws(seed)
    c2w, speed = ego(u, config)
    bodies = actor_and_traffic(u, config, c2w, speed) + roadside(u, config)
    overcast = u() < 0.07
    sun, sky = ((0.10, 0.25), (0.75, 0.95)) if overcast else ((1.7, 2.2), (0.38, 0.52))
    scene = light(u, (24, 48), sun, sky, 0.05, (0.95, 1.1))
    naive = light(u, (35, 75), (0.3, 1.6), (0.5, 1.1), 0.12, (0.75, 1.35))
    road = {"half": u(5.0, 5.8), "lane": u(3.2, 3.7), "tone": u(0.16, 0.24),
            "verge": u.pick((0.20, 0.26, 0.10), (0.34, 0.32, 0.28)), "dash": u(2.5, 4.0), "phase": u(0, 8)}
    return Scene(bodies, scene, naive, c2w, road, seed)


def render(scene: Scene, config: WorldConfig = WorldConfig(), extras: bool = True) -> Clip:
    """The pair of a scene."""
    frames = [frame(scene, config, t) for t in range(config.frames)]
    naive, truth, actor, shadow = (torch.stack(parts, dim=1) for parts in zip(*frames))
    grain = torch.randn(truth.shape, generator=torch.Generator().manual_seed(scene.seed + 1)) * config.grain / 255
    # linear light to sRGB's curve, roughly: x^(1/2.2)
    x_ni, x_gt = ((v.clamp(0, 1) ** (1 / 2.2) + grain).clamp(0, 1) * 2 - 1 for v in (naive, truth))
    clip = Clip(x_ni, x_gt, actor, shadow)
    if extras:
        clip.depth, clip.flow, clip.visible = motion(scene, config)
        clip.boxes = torch.stack([mask_box(a) for a in actor[0]])
        clip.pose, clip.size = scene.bodies[0].pose, scene.bodies[0].size
        clip.K, clip.c2w = intrinsics(config), scene.c2w
    return clip


def make_clip(seed: int, config: WorldConfig = WorldConfig(), extras: bool = True) -> Clip:
    """The pair of a seed."""
    return render(sample_scene(seed, config), config, extras)


# ---- files -----------------------------------------------------------------------------------------------------------

def save_clip(clip: Clip, path: str | Path) -> None:
    """One safetensors: videos and masks as uint8, what else there is as it is."""
    tensors = {f.name: getattr(clip, f.name) for f in fields(Clip) if getattr(clip, f.name) is not None}
    for name in ("x_ni", "x_gt"):
        tensors[name] = to_bytes(tensors[name])
    for name in ("actor", "shadow"):
        tensors[name] = (tensors[name] * 255).round().to(torch.uint8)
    weights.save_tensors(path, tensors)


def load_clip(path: str | Path) -> Clip:
    """The inverse of save_clip, to the precision of uint8."""
    tensors, _ = weights.load_tensors(path)
    for name in ("x_ni", "x_gt"):
        tensors[name] = from_bytes(tensors[name])
    for name in ("actor", "shadow"):
        tensors[name] = tensors[name].float() / 255
    return Clip(**tensors)


def write(seed: int, config: WorldConfig, folder: Path, extras: bool) -> None:
    """One clip to its file, unless it is there; one thread, for every worker is a process."""
    torch.set_num_threads(1)
    path = folder / f"{seed:07d}.safetensors"
    if not path.exists():
        save_clip(make_clip(seed, config, extras), path)


def main(args) -> None:
    """A folder of clips."""
    H, W = args.size
    config = WorldConfig(frames=args.frames, height=H, width=W)
    args.out.mkdir(parents=True, exist_ok=True)
    seeds = range(args.first_seed, args.first_seed + args.clips)
    with ProcessPoolExecutor(args.workers) as pool:
        jobs = [pool.submit(write, seed, config, args.out, args.extras) for seed in seeds]
        for job in tqdm(jobs, unit="clip"):
            job.result()


def demonstrate() -> None:
    """One scene: its shapes, and a picture."""
    from PIL import Image
    clip = make_clip(0)
    for f in fields(Clip):
        print(f"{f.name:8} {list(getattr(clip, f.name).shape)}")
    picture = torch.cat([clip.x_ni[:, 4], clip.x_gt[:, 4]], dim=2)     # [3, H, 2W]
    Image.fromarray(to_uint8(picture)).save("toy_world.png")
    print("toy_world.png: naive insertion | truth")


def height_x_width(text: str) -> tuple[int, int]:
    """"96x144" -> (96, 144)"""
    H, W = map(int, text.split("x"))
    return H, W


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for the clips; without it, one scene is shown")
    parser.add_argument("--clips", type=int, default=100, help="how many (default 100); those that exist are kept")
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first clip (default 0)")
    parser.add_argument("--size", type=height_x_width, default=(96, 144), help="height x width (default 96x144)")
    parser.add_argument("--frames", type=int, default=9, help="frames of a clip (default 9)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--extras", action="store_true", help="also depth, flow, visibility, boxes and cameras")
    parser.add_argument("--video", type=Path, help="write the first seed's naive insertion to this mp4 instead")
    parser.add_argument("--scene", type=Path, help="write the first seed as a scene folder for build_pairs.py instead")
    args = parser.parse_args()
    if min(args.clips, args.frames, args.workers, *args.size) < 1:
        parser.error("clips, frames, workers and size must be at least 1")
    config = WorldConfig(args.frames, *args.size)
    if args.scene:
        from .toy_scene import write_scene
        write_scene(args.scene, args.first_seed, config)
    elif args.video:
        write_clip(args.video, make_clip(args.first_seed, config, extras=False).x_ni, config.fps, crf=8)
    elif args.out:
        main(args)
    else:
        demonstrate()
