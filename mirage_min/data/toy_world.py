"""Procedural driving scenes: pairs of a naive insertion and the truth, with everything that is known about them.

A scene is a street with vehicles (toy_street), seen along a path (toy_paths) and lit by a sun and a sky (toy_light).
One of the vehicles is the actor. Each seed gives, from the same primary hits (toy_render),

    x_gt   the scene as it is: the actor lit by the scene's light, with its cast and its contact shadow
    x_ni   the naive insertion: the same actor, same shape and paint, lit by another light, and no shadow of it anywhere

and, exactly, the actor's mask, its shadow, depth, optical flow, 2D and 3D boxes and cameras. The scenes take the place
of MirageDrive, which is not public, and are made so that a small model can learn from them (DEVIATIONS.md): the asset's
paint is the actor's paint, lights vary within narrow ranges, actors are large and shadows long.

    python -m mirage_min.data.toy_world --out data/toy --clips 2000 --workers 2
    python -m mirage_min.data.toy_world --out data/loops --clips 8 --frames 33 --path loop --static --extras
    python -m mirage_min.data.toy_world --out data/films --clips 8 --videos       # the same as mp4s, in ni/ and gt/
    python -m mirage_min.data.toy_world --pair naive.mp4 truth.mp4 --frames 33 --first-seed 1000000
    python -m mirage_min.data.toy_world --scene example     # a scene folder for build_pairs.py
    python -m mirage_min.data.toy_world                     # one scene: shapes and a picture
"""

if __name__ == "__main__":
    from . import desk

    desk.open_up()  # before the imports that take seconds

import argparse
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from ..networks import weights
from . import desk
from .align import mask_box
from .pixels import from_bytes, to_bytes, to_uint8
from .toy_light import sample_light
from .toy_paths import PATHS, along, drive
from .toy_render import Scene, frame, intrinsics, motion
from .toy_shapes import CARS
from .toy_street import Draws, actor_and_traffic, roadside, sample_road
from .video import write_clip


@dataclass
class WorldConfig:
    """How a clip is sampled; the field of view does not depend on it. The defaults are what the shipped model knows."""

    frames: int = 9
    height: int = 96
    width: int = 144
    supersample: int = 2
    fps: float = 10.0
    grain: float = 0.3                    # standard deviation of the sensor's noise, in 1/255, the same in both videos
    path: str = "drive"                   # of the camera: one of toy_paths.PATHS
    static: bool = False                  # nothing but the camera moves
    cars: tuple[str, ...] = ("saloon",)   # of toy_shapes.CARS, of which every vehicle is one
    gloss: float = 0.0                    # 0 to 1: how much of the sky and the sun cars mirror

    def __post_init__(self):
        if self.path not in PATHS:
            raise ValueError(f"path must be one of {', '.join(PATHS)}, got {self.path!r}")
        if not self.cars or not set(self.cars) <= set(CARS):
            raise ValueError(f"cars must be some of {', '.join(CARS)}, got {self.cars}")
        if not 0 <= self.gloss <= 1:
            raise ValueError(f"gloss must be from 0 to 1, got {self.gloss}")


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
    moving: Tensor | None = None    # [1, T, H, W] 1 where a body is seen that moves during the clip
    boxes: Tensor | None = None     # [T, 4] x0, y0, x1, y1 of the mask, in pixels; 0: hidden
    pose: Tensor | None = None      # [T, 4, 4] the actor's object-to-world
    size: Tensor | None = None      # [3] the actor's width, height, length in metres
    K: Tensor | None = None         # [3, 3]
    c2w: Tensor | None = None       # [T, 4, 4]


# ---- a seed's clip ---------------------------------------------------------------------------------------------------

def sample_scene(seed: int, config: WorldConfig = WorldConfig()) -> Scene:
    """The scene of a seed; the same at every size. What the config asks for beyond its defaults draws no numbers."""
    u = Draws(seed)
    c2w, speed = drive(u, config)
    bodies = actor_and_traffic(u, config, c2w, speed, cars_of(seed, config)) + roadside(u, config)
    overcast = u() < 0.07
    light = sample_light(u, elevation=(24, 48), sun=(0.10, 0.25) if overcast else (1.7, 2.2),
                         sky=(0.75, 0.95) if overcast else (0.38, 0.52), tint=0.05, exposure=(0.95, 1.1))
    naive = sample_light(u, elevation=(35, 75), sun=(0.3, 1.6), sky=(0.5, 1.1), tint=0.12, exposure=(0.75, 1.35))
    road = sample_road(u)
    if config.static:
        bodies = [replace(body, pose=body.pose[:1].repeat(config.frames, 1, 1)) for body in bodies]
    return Scene(bodies, light, naive, along(config.path, c2w, bodies), road, seed=seed, gloss=config.gloss)


def cars_of(seed: int, config: WorldConfig) -> list[str]:
    """The shapes of a scene's vehicles, the actor's first: the config's in a random order of the seed's own."""
    order = torch.randperm(len(config.cars), generator=torch.Generator().manual_seed(seed))
    return [config.cars[i] for i in order.tolist()]


def render(scene: Scene, config: WorldConfig = WorldConfig(), extras: bool = True, relit: bool = True,
           shadowed: bool = False) -> Clip:
    """The pair of a scene; relit and shadowed: what x_ni is, as in toy_render.frame."""
    frames = []
    for t in range(config.frames):
        # in a scene at rest, a view that comes back is the same frame
        before = [s for s in range(t) if config.static and torch.equal(scene.c2w[s], scene.c2w[t])]
        frames.append(frames[before[0]] if before else frame(scene, config, t, relit, shadowed))
    naive, truth, actor, shadow = (torch.stack(parts, dim=1) for parts in zip(*frames))
    grain = torch.randn(truth.shape, generator=torch.Generator().manual_seed(scene.seed + 1)) * config.grain / 255
    # linear light to sRGB's curve, roughly: x^(1/2.2)
    x_ni, x_gt = ((v.clamp(0, 1) ** (1 / 2.2) + grain).clamp(0, 1) * 2 - 1 for v in (naive, truth))
    if not extras:
        return Clip(x_ni, x_gt, actor, shadow)
    boxes = torch.stack([mask_box(a) for a in actor[0]])
    of_actor = scene.bodies[0]
    return Clip(x_ni, x_gt, actor, shadow, **vars(motion(scene, config)), boxes=boxes, pose=of_actor.pose,
                size=of_actor.size, K=intrinsics(config), c2w=scene.c2w)


def make_clip(seed: int, config: WorldConfig = WorldConfig(), extras: bool = True) -> Clip:
    """The pair of a seed."""
    return render(sample_scene(seed, config), config, extras)


# ---- files -----------------------------------------------------------------------------------------------------------

def save_clip(clip: Clip, path: str | Path) -> None:
    """One safetensors: videos and masks as uint8, what else there is as it is."""
    tensors = {f.name: getattr(clip, f.name) for f in fields(Clip) if getattr(clip, f.name) is not None}
    for name in ("x_ni", "x_gt"):
        tensors[name] = to_bytes(tensors[name])
    for name in {"actor", "shadow", "moving"} & tensors.keys():
        tensors[name] = (tensors[name] * 255).round().to(torch.uint8)
    weights.save_tensors(path, tensors)


def load_clip(path: str | Path) -> Clip:
    """The inverse of save_clip, to the precision of uint8."""
    tensors, _ = weights.load_tensors(path)
    for name in ("x_ni", "x_gt"):
        tensors[name] = from_bytes(tensors[name])
    for name in {"actor", "shadow", "moving"} & tensors.keys():
        tensors[name] = tensors[name].float() / 255
    return Clip(**tensors)


def write(seed: int, config: WorldConfig, folder: Path, extras: bool) -> None:
    """Write one clip, unless its file exists; on one thread, since every worker is a process."""
    torch.set_num_threads(1)
    path = folder / f"{seed:07d}.safetensors"
    if not path.exists():
        save_clip(make_clip(seed, config, extras), path)


def write_videos(seed: int, config: WorldConfig, folder: Path) -> None:
    """Write one clip as ni/SEED.mp4, gt/SEED.mp4 and known/SEED.safetensors, which has the rest that evaluate.py needs:
    boxes, flow and visible. That file is written last, so where it exists the videos do too."""
    torch.set_num_threads(1)
    path = folder / "known" / f"{seed:07d}.safetensors"
    if not path.exists():
        clip = make_clip(seed, config)
        write_pair(clip, *(folder / side / f"{seed:07d}.mp4" for side in ("ni", "gt")), config.fps)
        weights.save_tensors(path, {key: getattr(clip, key) for key in ("boxes", "flow", "visible")})


def write_pair(clip: Clip, ni: Path, gt: Path, fps: float) -> None:
    """The naive insertion and the truth as two mp4s that hardly lose anything."""
    write_clip(ni, clip.x_ni, fps, crf=8)
    write_clip(gt, clip.x_gt, fps, crf=8)


def write_all(args: argparse.Namespace, config: WorldConfig) -> None:
    """A folder of clips, or of pairs of videos."""
    for folder in ("ni", "gt", "known") if args.videos else (".",):
        (args.out / folder).mkdir(parents=True, exist_ok=True)
    seeds = range(args.first_seed, args.first_seed + args.clips)
    if args.videos:
        desk.share(write_videos, [(seed, config, args.out) for seed in seeds], args.workers, "clip")
    else:
        desk.share(write, [(seed, config, args.out, args.extras) for seed in seeds], args.workers, "clip")


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


def main(argv: list[str] | None = None) -> None:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=desk.first_line(__doc__))
    parser.add_argument("--out", type=Path, help="folder for the clips; without it, one scene is shown")
    parser.add_argument("--clips", type=int, default=100, help="how many (default 100); those that exist are kept")
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first clip (default 0)")
    parser.add_argument("--size", type=height_x_width, default=(96, 144), help="height x width (default 96x144)")
    parser.add_argument("--frames", type=int, default=9, help="frames of a clip (default 9)")
    parser.add_argument("--path", choices=PATHS, default="drive", help="of the camera (default drive)")
    parser.add_argument("--static", action="store_true", help="nothing but the camera moves")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--extras", action="store_true", help="also depth, flow, masks, boxes and cameras")
    parser.add_argument("--videos", action="store_true", help="each as ni/SEED.mp4 and gt/SEED.mp4, boxes in known/")
    parser.add_argument("--pair", type=Path, nargs=2, metavar=("NI", "GT"),
                        help="write the first seed's naive insertion and truth to these two mp4s instead")
    parser.add_argument("--scene", type=Path, help="write the first seed as a scene folder for build_pairs.py instead")
    args = parser.parse_args(argv)
    if min(args.clips, args.frames, args.workers, *args.size) < 1:
        parser.error("clips, frames, workers and size must be at least 1")
    config = WorldConfig(args.frames, *args.size, path=args.path, static=args.static)
    if args.scene:
        from .toy_scene import write_scene
        write_scene(args.scene, args.first_seed, config)
    elif args.pair:
        write_pair(make_clip(args.first_seed, config, extras=False), *args.pair, config.fps)
    elif args.out:
        write_all(args, config)
    else:
        demonstrate()


if __name__ == "__main__":
    sys.exit(desk.serve("toy_world", main, lambda: "; the clips that are whole stay"))
