"""Recorded vehicles: where they are in a clip, so that one can be shown as another camera would (isp.py), or in another
light (box_light.py).

The 3D boxes of a drive, as its camera saw them, are in NAME.vehicles.json, next to the clip NAME.safetensors:

    {"width": 1920, "height": 1080,                        of the image that the corners are in
     "vehicles": [{"id": 12, "frames": [{"frame": 0, "depth": 14.2, "corners": [[801.2, 455.0], …]}, …]}, …]}

`corners` are the eight corners of a box in pixels: first its left four, of these first the rear two, of these first the
lower one. `depth` is that of its middle in metres. A vehicle's mask is the convex hull of its corners without the hulls
of nearer vehicles: a little larger than the vehicle. PandaSet's boxes are written to such files by

    python -m mirage_min.data.vehicles --pandaset pandaset/002 --clips data/real/train

from a sequence in the layout of pandaset.py, without its pictures.

    python -m mirage_min.data.vehicles                     # a box two lanes away, its corners and its mask
"""

if __name__ == "__main__":
    from . import desk

    desk.open_up()  # before the imports that take seconds

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors import safe_open
from torch import Generator, Tensor

from ..method.camera import Camera
from ..networks import checked
from ..networks.checked import Within
from ..networks.weights import read_json, whole_file
from . import desk
from .align import mask_box
from .box_light import box_normals, relight
from .pandaset import SIZE, Cuboid, read_cameras, read_cuboids
from .photometric import integer
from .pixels import from_bytes
from .real_clips import shrink, window_about
from .shots import Sample
from .toy_light import Light

LABELS = ("Car", "Pickup Truck", "Medium-sized Truck", "Semi-truck", "Bus", "Other Vehicle - Construction Vehicle")
LEAST = 0.04           # the share of the image's width that a vehicle must have
MOST = 0.4             # the share of the piece that it may cover: nearer ones are cut off by the recording car
FREE = 0.6             # the share of its hull that no nearer vehicle may cover
NEAREST = 0.5          # metres: PandaSet's vehicles with a corner nearer than this are left out


@dataclass
class Sight:
    """A vehicle in one frame."""

    frame: Annotated[int, Within(0, 10**6)]
    depth: Annotated[float, Within(0, 1e4)]
    corners: Annotated[Tensor, (8, 2)]


@dataclass
class Vehicle:
    """A vehicle in a clip."""

    id: int
    frames: list[Sight]


@dataclass
class Vehicles:
    """What NAME.vehicles.json holds."""

    width: Annotated[int, checked.COUNT]
    height: Annotated[int, checked.COUNT]
    vehicles: list[Vehicle]


@dataclass
class RecordedShot:
    """A piece of a recording and the mask of a vehicle in it."""

    x: Tensor        # [3, T, H, W] in [-1, 1]
    mask: Tensor     # [1, T, H, W] 0 or 1
    corners: Tensor  # [T, 8, 2] of the vehicle's box, in pixels

    def pair(self, relit: bool, shadowed: bool) -> Sample:
        """The piece itself; `in_light` is for another light. ValueError for a vehicle without its shadow."""
        if relit or not shadowed:
            raise ValueError("a recorded vehicle keeps its shadow, and its light unless another is given")
        return Sample(self.x, self.x, self.mask, torch.stack([mask_box(m) for m in self.mask[0]]))

    def in_light(self, light: Light) -> Sample:
        """Clean, and degraded: the vehicle in another light, with the shadow it had."""
        sample = self.pair(relit=False, shadowed=True)
        size = self.x.shape[-2:]
        normals = torch.stack([box_normals(corners, size) for corners in self.corners], dim=1)
        return replace(sample, degraded=relight(self.x, self.mask, normals, light))


# ---- a clip's file ---------------------------------------------------------------------------------------------------

def vehicles_of(clip: Path) -> Vehicles | None:
    """What NAME.vehicles.json next to a clip says; None: there is none. ValueError of one line if it is wrong."""
    file = clip.with_suffix(".vehicles.json")
    return checked.record(Vehicles, read_json(file), file) if file.exists() else None


def shoot_vehicle(clip: Path, known: Vehicles, size: tuple[int, int], frames: int, draws: Generator) -> RecordedShot:
    """A random piece of `size` rows and columns with a vehicle that is in view in all of its frames.

    ValueError if there is none, or the one drawn is hidden or too near.
    """
    sights = {v.id: {s.frame: s for s in v.frames if is_wide(s, known.width)} for v in known.vehicles}
    with safe_open(clip, framework="pt") as file:
        x = file.get_slice("x")
        T = x.get_shape()[1]
        starts = [(i, t) for i, seen in sights.items() for t in range(T - frames + 1)
                  if all(t + k in seen for k in range(frames))]
        if not starts:
            raise ValueError(f"{clip}: no vehicle is in view in {frames} frames in a row")
        chosen, t = starts[integer(draws, len(starts))]
        x = from_bytes(x[:, t : t + frames])
    x = shrink(x, size, 2.5, draws)
    H, W = x.shape[-2:]
    mask = torch.stack([mask_of(known, chosen, t + k, (H, W)) for k in range(frames)], dim=1)
    top, left = window_about(mask_box(mask[0, frames // 2]), (H, W), size, draws)
    rows, columns = slice(top, top + size[0]), slice(left, left + size[1])
    hull = hull_mask(sights[chosen][t + frames // 2].corners, known, (H, W))
    if mask[:, frames // 2].sum() < FREE * hull.sum() or mask[:, :, rows, columns].mean() > MOST:
        raise ValueError(f"{clip}: vehicle {chosen} is hidden or too near at frame {t}")
    corners = torch.stack([sights[chosen][t + k].corners for k in range(frames)])
    corners = corners * torch.tensor([W / known.width, H / known.height]) - torch.tensor([left, top])
    return RecordedShot(x[:, :, rows, columns], mask[:, :, rows, columns], corners)


def is_wide(sight: Sight, width: int) -> bool:
    """Whether a vehicle is large enough, and its middle in the image."""
    x = sight.corners[:, 0]
    return bool(x.amax() - x.amin() >= LEAST * width and 0 < x.mean() < width)


def mask_of(known: Vehicles, vehicle: int, frame: int, size: tuple[int, int]) -> Tensor:
    """[1, H, W]: 1 in the hull of a vehicle's corners, 0 where a nearer vehicle's is."""
    here = {v.id: s for v in known.vehicles for s in v.frames if s.frame == frame}
    mine = here[vehicle]
    mask = hull_mask(mine.corners, known, size)
    for i, sight in here.items():
        if i != vehicle and sight.depth < mine.depth:
            mask = mask * (1 - hull_mask(sight.corners, known, size))
    return mask


def hull_mask(corners: Tensor, known: Vehicles, size: tuple[int, int]) -> Tensor:
    """[1, H, W]: 1 in the convex hull of corners [8, 2]."""
    H, W = size
    points = (corners * torch.tensor([W / known.width, H / known.height])).tolist()
    picture = Image.new("L", (W, H))
    ImageDraw.Draw(picture).polygon([tuple(p) for p in convex_hull(points)], fill=1)
    return torch.from_numpy(np.array(picture)).float()[None]


def convex_hull(points: list[list[float]]) -> list[list[float]]:
    """The corners of the convex hull of points, in order (Andrew's monotone chain)."""
    ordered = sorted(points)
    return half_hull(ordered) + half_hull(ordered[::-1])


def half_hull(ordered: list[list[float]]) -> list[list[float]]:
    """The corners on one side of the line from the first point to the last, which is left out."""
    chain = []
    for p in ordered:
        while len(chain) > 1 and turn(chain[-2], chain[-1], p) <= 0:
            chain.pop()
        chain.append(p)
    return chain[:-1]


def turn(a: list[float], b: list[float], c: list[float]) -> float:
    """Above 0 where the path from a to b to c turns left."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


# ---- PandaSet --------------------------------------------------------------------------------------------------------

def from_pandaset(sequence: Path, camera: str) -> dict:
    """The content of NAME.vehicles.json for one of PandaSet's cameras ("front_camera", …).

    ValueError if the sequence has cuboids of more frames than the camera has, or of fewer.
    """
    cameras = read_cameras(sequence / "camera" / camera, *SIZE)
    frames = read_cuboids(sequence / "annotations" / "cuboids.json", len(cameras))
    found = {}
    for t, (cuboids, view) in enumerate(zip(frames, cameras)):
        for cuboid in cuboids:
            if cuboid.label not in LABELS:
                continue
            corners, depths = cuboid.seen_by(view)
            if depths.min() > NEAREST and corners[:, 0].amax() > 0 and corners[:, 0].amin() < SIZE[0]:
                sight = {"frame": t, "depth": round(depths.mean().item(), 2),
                         "corners": corners.round(decimals=1).tolist()}
                found.setdefault(cuboid.object, []).append(sight)
    return {"width": SIZE[0], "height": SIZE[1],
            "vehicles": [{"id": i, "frames": sights} for i, sights in found.items()]}


def main(args: argparse.Namespace) -> None:
    """A file next to each of PandaSet's clips; or a demonstration."""
    if args.pandaset is None:
        return demonstrate()
    clips = sorted(args.clips.glob("*_camera.safetensors"))
    if not clips:
        raise ValueError(f"{args.clips}: no clip of PandaSet's cameras (CAMERA_camera.safetensors: real_clips.py)")
    for clip in clips:
        content = from_pandaset(args.pandaset, clip.stem)
        with whole_file(clip.with_suffix(".vehicles.json")) as temporary:
            temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
        print(f"{clip.stem}: {len(content['vehicles'])} vehicles")


def demonstrate() -> None:
    """A box in a camera that looks along the world's y."""
    K = torch.tensor([[1970.0, 0, 960], [0, 1970, 540], [0, 0, 1]])
    ahead = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 1.6], [0, 0, 0, 1]])
    car = Cuboid(1, "Car", 3.0, 12.0, 0.8, 1.9, 4.6, 1.6, 0.0, -1)
    corners, depths = car.seen_by(Camera.from_pose(K, ahead, *SIZE))
    known = Vehicles(*SIZE, [Vehicle(1, [Sight(0, depths.mean().item(), corners)])])
    mask = mask_of(known, 1, 0, (90, 160))
    print(f"{depths.mean():.1f} m away, columns {corners[:, 0].amin():.0f} to {corners[:, 0].amax():.0f} of 1920, "
          f"{mask.mean():.1%} of the frame")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=desk.first_line(__doc__))
    parser.add_argument("--pandaset", type=Path, metavar="DIR", help="a sequence of PandaSet (pandaset.py)")
    parser.add_argument("--clips", type=Path, default=Path("data/real/train"), help="folder of clips (real_clips.py)")
    args = parser.parse_args()
    sys.exit(desk.serve("vehicles", lambda: main(args)))
