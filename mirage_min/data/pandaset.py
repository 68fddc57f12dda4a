"""PandaSet (Hesai and Scale AI, CC BY 4.0): a camera of a sequence and its annotated objects, as a scene folder.

    python -m mirage_min.data.pandaset pandaset/002 data/scenes/002 --camera front_camera

    SEQUENCE/camera/CAMERA/intrinsics.json, poses.json, 00.jpg ...   as the dataset has them; or video.mp4 of the frames
    SEQUENCE/annotations/cuboids.json   {"fields": [...], "frames": [[[value of each field], ...], ...]}, made from
                      cuboids/*.pkl.gz by the lines in docs/scenes.md: pickles run code, so nothing here opens them

It writes the pictures, transforms.json and tracks.json, in PandaSet's world, in metres. What is missing then is
scene.ply, of a reconstruction, and asset.ply. Boxes in the image are those around the projected 3D boxes. What hides an
object is not annotated, and poses of moving objects are those of the lidar's sweep, up to .05 s from the camera's time.

    python -m mirage_min.data.pandaset           # a box, its corners and where a camera sees them
"""

import argparse
import json
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..method.camera import Camera
from ..networks import checked
from ..networks.weights import one_line, read_json
from . import desk
from .pictures import pictures_of
from .scene_cameras import OPENGL_TO_OPENCV, TRANSFORMS, Length
from .splat import rotations
from .toy_scene import write_json
from .video import Video

SIZE = 1920, 1080       # of the recorded images, for which intrinsics.json is
SENSORS = -1, 0         # an object that both lidars see has two boxes; these are of the one that turns, or of both
NEAREST = 0.1           # metres: a box with a corner nearer than this, or behind the camera, has no box in the image
CORNERS = torch.tensor([[x, y, z] for y in (0.5, -0.5) for x in (-0.5, 0.5) for z in (-0.5, 0.5)],
                       dtype=torch.float64)
FIELDS = ("object", "label", "x", "y", "z", "width", "length", "height", "yaw", "sensor_id")


@dataclass
class Intrinsics:
    """intrinsics.json, for images of SIZE."""

    fx: Length
    fy: Length
    cx: Length
    cy: Length


@dataclass
class Vector:
    """A position in metres."""

    x: float
    y: float
    z: float


@dataclass
class Quaternion:
    """A rotation, camera to world."""

    w: float
    x: float
    y: float
    z: float


@dataclass
class Pose:
    """A frame of poses.json: camera to world, with OpenCV's axes."""

    position: Vector
    heading: Quaternion


@dataclass
class Cuboids:
    """cuboids.json: of each frame the objects, of each object the values of the fields."""

    fields: tuple[str, ...]
    frames: tuple[list[list[Any]], ...]


@dataclass
class Cuboid:
    """An annotated box: its middle, size in metres and yaw in radians, in the world's axes."""

    object: int | str
    label: str
    x: float
    y: float
    z: float
    width: Length
    length: Length
    height: Length
    yaw: float
    sensor_id: int

    def pose(self) -> Tensor:
        """[4, 4] object to world, with x forward, y left and z up, from the middle of the box."""
        # yaw 0 looks along y, and turns to the left: forward = (−sin yaw, cos yaw)
        sin, cos = math.sin(self.yaw), math.cos(self.yaw)
        return torch.tensor([[-sin, -cos, 0, self.x], [cos, -sin, 0, self.y], [0, 0, 1, self.z], [0, 0, 0, 1]],
                            dtype=torch.float64)

    def size(self) -> list[float]:
        """Length, width and height."""
        return [self.length, self.width, self.height]

    def seen_by(self, camera: Camera) -> tuple[Tensor, Tensor]:
        """Its corners in an image, [8, 2] in pixels, and their depths [8] in metres.

        Its left four come first, of these the rear two, of these the lower one. Behind the camera pixels mean nothing.
        """
        to_camera = camera.world_to_camera.double() @ self.pose()
        corners = CORNERS * torch.tensor(self.size(), dtype=torch.float64)
        x = corners @ to_camera[:3, :3].T + to_camera[:3, 3]
        return (x @ camera.K.double().T)[:, :2] / x[:, 2:], x[:, 2]


def image_box(cuboid: Cuboid, camera: Camera) -> list[float] | None:
    """The box x0, y0, x1, y1 in pixels around a 3D box's corners; None if one is not in front of the camera."""
    uv, depth = cuboid.seen_by(camera)
    if depth.min() < NEAREST:
        return None
    return [*uv.amin(0).tolist(), *uv.amax(0).tolist()]


# ---- files -----------------------------------------------------------------------------------------------------------

def read_cameras(folder: Path, width: int, height: int) -> list[Camera]:
    """intrinsics.json and poses.json of a camera's folder -> its cameras, for images of this size.

    ValueError for a size of other proportions than SIZE, and for a file of another kind.
    """
    if abs(width * SIZE[1] - height * SIZE[0]) > max(SIZE):
        raise ValueError(f"{folder}: wanted images of {SIZE[0]}x{SIZE[1]} or as much smaller on both sides, got "
                         f"{width}x{height}")
    k = checked.record(Intrinsics, read_json(folder / "intrinsics.json"), folder / "intrinsics.json")
    K = torch.tensor([[k.fx, 0, k.cx], [0, k.fy, k.cy], [0, 0, 1]], dtype=torch.float64)
    path = folder / "poses.json"
    with one_line(path):
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    cameras = []
    for t, pose in enumerate(checked.value(tuple[Pose, ...], content, path, "poses")):
        camera_to_world = torch.eye(4, dtype=torch.float64)
        heading = torch.tensor([list(vars(pose.heading).values())], dtype=torch.float64)
        if not heading.any():
            raise ValueError(f"{path}: poses[{t}].heading: wanted a rotation, got {heading[0].tolist()}")
        camera_to_world[:3, :3] = rotations(heading)[0]
        camera_to_world[:3, 3] = torch.tensor(list(vars(pose.position).values()), dtype=torch.float64)
        cameras.append(Camera.from_pose(K, camera_to_world, *SIZE).resized(width, height))
    return cameras


def read_cuboids(path: Path, frames: int) -> list[list[Cuboid]]:
    """cuboids.json -> the boxes of every frame; ValueError naming the file and the field, or for other than so many."""
    table = checked.record(Cuboids, read_json(path), path)
    if missing := set(FIELDS) - set(table.fields):
        raise ValueError(f"{path}: fields: wanted {', '.join(FIELDS)}; {', '.join(sorted(missing))} is missing")
    if len(table.frames) != frames:
        raise ValueError(f"{path}: frames: wanted {frames}, as many as the camera has, got {len(table.frames)}")
    return [[checked.record(Cuboid, dict(zip(table.fields, row)), path, f"frames[{t}][{n}]")
             for n, row in enumerate(rows)] for t, rows in enumerate(table.frames)]


def tracks_of(frames: list[list[Cuboid]], cameras: list[Camera]) -> dict:
    """The content of tracks.json: the objects of SENSORS, with their boxes in the camera. Text ids become numbers."""
    objects: dict[int | str, dict] = {}
    for t, (cuboids, camera) in enumerate(zip(frames, cameras)):
        for cuboid in cuboids:
            if cuboid.sensor_id not in SENSORS:
                continue
            number = cuboid.object if isinstance(cuboid.object, int) else len(objects)
            track = objects.setdefault(cuboid.object, {"id": number, "category": cuboid.label, "frames": []})
            box = image_box(cuboid, camera)
            track["frames"].append({"frame": t, "pose": cuboid.pose().tolist(), "size": cuboid.size(),
                                    "box": box or [0.0] * 4, "visible": box is not None})
    return {"objects": list(objects.values())}


def write_scene(sequence: Path, out: Path, camera: str) -> tuple[int, int]:
    """A camera of a sequence -> a scene folder without Gaussians; returns how many frames and objects it has.

    ValueError of one line for what is missing or of another kind.
    """
    folder = sequence / "camera" / camera
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    film = folder / "video.mp4" if (folder / "video.mp4").exists() else folder
    with Video(film) as video:
        width, height = video.format.width, video.format.height
        count = sum(1 for _ in video)
    cameras = read_cameras(folder, width, height)
    if count != len(cameras):
        raise ValueError(f"{film}: {count} frames, but {len(cameras)} poses")
    frames = read_cuboids(sequence / "annotations" / "cuboids.json", len(cameras))
    out.mkdir(parents=True, exist_ok=True)
    names = [f"images/{t:06d}.jpg" for t in range(count)]
    if film.is_dir():
        (out / "images").mkdir(exist_ok=True)
        for name, picture in zip(names, pictures_of(film)):
            shutil.copyfile(picture, out / name)
    else:
        shutil.copyfile(film, out / "video.mp4")
    K = cameras[0].K
    views = [{"file_path": name, "transform_matrix": (one.camera_to_world @ OPENGL_TO_OPENCV).tolist()}
             for name, one in zip(names, cameras)]
    write_json(out / TRANSFORMS, {"camera_model": "PINHOLE", "w": width, "h": height, "fl_x": K[0, 0].item(),
                                  "fl_y": K[1, 1].item(), "cx": K[0, 2].item(), "cy": K[1, 2].item(),
                                  "frames": views})
    tracks = tracks_of(frames, cameras)
    write_json(out / "tracks.json", tracks)
    return count, len(tracks["objects"])


def main(argv: list[str] | None = None) -> int:
    """What the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(description=desk.first_line(__doc__))
    parser.add_argument("sequence", type=Path, nargs="?", help="folder with camera/ and annotations/")
    parser.add_argument("out", type=Path, nargs="?", help="where the scene goes")
    parser.add_argument("--camera", default="front_camera", help="a folder of camera/ (default front_camera)")
    args = parser.parse_args(argv)
    if args.sequence is None:
        K = torch.tensor([[1000.0, 0, 960], [0, 1000, 540], [0, 0, 1]])
        ahead = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 1.5], [0, 0, 0, 1]])  # it looks along y
        car = Cuboid(0, "Car", 2.0, 15.0, 0.8, 1.9, 4.6, 1.6, 0.3, -1)
        box = image_box(car, Camera.from_pose(K, ahead, *SIZE))
        print(f"a car 15 m ahead, turned by .3: forward {[round(v, 3) for v in car.pose()[:3, 0].tolist()]}, "
              f"in the image {[round(v) for v in box]}")
        return 0
    if args.out is None:
        parser.error("wanted two folders: the sequence, and where the scene goes")

    def run() -> None:
        frames, objects = write_scene(args.sequence, args.out, args.camera)
        desk.say(f"{args.out}: {frames} frames and {objects} objects; scene.ply and asset.ply are still missing")
    return desk.serve("pandaset", run)


if __name__ == "__main__":
    sys.exit(main())
