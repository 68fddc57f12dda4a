"""A scene folder: a drive reconstructed as 3D Gaussians, with its cameras, its tracked objects and its video.

    scene.ply        Gaussians in INRIA's layout, in world coordinates; those of a moving object stand as at one frame
    asset.ply        the generated asset, in the same layout, upright in its own frame
    transforms.json  cameras as nerfstudio and instant-ngp write them: frames[].transform_matrix, camera to world with
                     OpenGL's axes; fl_x, fl_y, cx, cy, w, h of the file or of a frame; or camera_angle_x for fl_x.
                     Without w, h, cx, cy: the video's size and its middle. Frames go by file_path, numbers by value
    tracks.json      {"objects": [{"id": 7, "category": "car", "reference": 0, "frames": [{"frame": 0,
                     "pose": 4x4, "size": [length, width, height], "box": [x0, y0, x1, y1], "visible": true}, ...]}]}
    video.mp4        what was filmed, one frame to each camera; or images/, a folder

`pose` is object to world, with x forward, y left and z up from the middle of the object's 3D box, as Waymo and nuScenes
have it; `box` is in pixels. Objects move rigidly with their track: `reference` (if not given, the first of its frames)
is the frame at which scene.ply shows the object. A Gaussian belongs to the object whose id is its integer property
`object_id`; in a file without that property, to the object in whose 3D box it lies at the object's reference frame.
All other Gaussians stand still. Lens distortion is not modelled: undistort the images first.

    python -m mirage_min.data.scene
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..networks.weights import read_json
from .pictures import natural_order
from .splat import Camera, Gaussians, load_ply
from .video import Video

OPENGL_TO_OPENCV = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))  # y up, z back: both turned
DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")


@dataclass
class Track:
    """One object through all T frames of a scene; pose, size and box are nan where it has no entry."""

    id: int
    category: str
    reference: int
    pose: Tensor     # [T, 4, 4] object to world, float64
    size: Tensor     # [T, 3] length, width, height in world units
    box: Tensor      # [T, 4] x0, y0, x1, y1 in pixels
    visible: Tensor  # [T] bool


@dataclass
class SceneFolder:
    """What a scene folder holds, apart from the asset."""

    video: Path
    cameras: list[Camera]
    tracks: dict[int, Track]
    still: Gaussians               # what no track moves, in world coordinates
    objects: dict[int, Gaussians]  # by id, each in its object's frame

    def at(self, t: int, without: int | None = None) -> Gaussians:
        """All Gaussians in world coordinates as they stand at frame t, without one object."""
        moving = [moved(g, self.tracks[i].pose[t]) for i, g in self.objects.items()
                  if i != without and self.tracks[i].pose[t].isfinite().all()]
        return Gaussians.cat([self.still, *moving])


def moved(g: Gaussians, pose: Tensor) -> Gaussians:
    """Gaussians taken along by a rigid pose [4, 4]."""
    return g.transformed(1.0, pose[:3, :3], pose[:3, 3])


def on(g: Gaussians, device: str) -> Gaussians:
    """Gaussians on a device."""
    return Gaussians(*(None if v is None else v.to(device) for v in vars(g).values()))


def read_scene(folder: str | Path, device: str = "cpu") -> SceneFolder:
    """Read and check a scene folder; whatever is wrong is a ValueError of one line naming the file and the field."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    path = folder / ("video.mp4" if (folder / "video.mp4").exists() else "images")
    if not path.exists():
        raise ValueError(f"{folder}: holds neither video.mp4 nor images/")
    with Video(path) as video:
        count, width, height = sum(1 for _ in video), video.format.width, video.format.height
    cameras = read_cameras(folder / "transforms.json", width, height)
    if len(cameras) != count:
        raise ValueError(f"{path}: {count} frames, but {folder / 'transforms.json'}: frames has {len(cameras)}")
    tracks = read_tracks(folder / "tracks.json", len(cameras))
    still, objects = split(load_ply(folder / "scene.ply"), tracks)
    return SceneFolder(path, cameras, tracks, on(still, device), {i: on(g, device) for i, g in objects.items()})


def split(scene: Gaussians, tracks: dict[int, Track]) -> tuple[Gaussians, dict[int, Gaussians]]:
    """The Gaussians of scene.ply -> (those that stand still, {id: those of an object, in its own frame})."""
    free, objects = torch.ones(len(scene), dtype=torch.bool), {}
    for i, track in tracks.items():
        to_object = torch.linalg.inv(track.pose[track.reference])
        if scene.ids is not None:
            mine = scene.ids == i
        else:
            local = scene.means.double() @ to_object[:3, :3].T + to_object[:3, 3]
            mine = free & (local.abs() <= track.size[track.reference] / 2).all(dim=1)
        free &= ~mine
        objects[i] = moved(scene.select(mine), to_object)
    return scene.select(free), objects


# ---- the two JSON files ----------------------------------------------------------------------------------------------

def read_cameras(path: Path, width: int, height: int) -> list[Camera]:
    """transforms.json -> the camera of every frame of a video of this size, with OpenCV's axes."""
    about, cameras = read_json(path), []

    numbered = enumerate(entries(about, "frames", str(path)))
    for i, frame in sorted(numbered, key=lambda pair: natural_order(str(pair[1].get("file_path", "")))):
        where, here = f"{path}: frames[{i}]", about | frame            # a frame's own intrinsics come first

        def number(name: str, default: float | None = None) -> float:
            return float(numbers(here.get(name, default), (), f"{where}.{name}"))

        if bent := [name for name in DISTORTION if number(name, 0.0)]:
            raise ValueError(f"{where}.{bent[0]}: wanted images without lens distortion, got {here[bent[0]]}")
        if (w := number("w", width), h := number("h", height)) != (width, height):
            raise ValueError(f"{where}: w, h: wanted the video's {width}x{height}, got {w:g}x{h:g}")
        if "fl_x" not in here and "camera_angle_x" not in here:
            raise ValueError(f"{where}: no intrinsics: neither fl_x nor camera_angle_x")
        fx = number("fl_x") if "fl_x" in here else w / 2 / math.tan(number("camera_angle_x") / 2)
        fy = number("fl_y", fx)
        if min(fx, fy) <= 0:
            raise ValueError(f"{where}: fl_x, fl_y: wanted focal lengths above 0, got {fx:g}, {fy:g}")
        K = torch.tensor([[fx, 0, number("cx", w / 2)], [0, fy, number("cy", h / 2)], [0, 0, 1]])
        camera_to_world = rigid(frame.get("transform_matrix"), f"{where}.transform_matrix") @ OPENGL_TO_OPENCV
        cameras.append(Camera(K, torch.linalg.inv(camera_to_world).float(), width, height))
    return cameras


def read_tracks(path: Path, T: int) -> dict[int, Track]:
    """tracks.json of a scene of T frames -> {id: Track}."""
    tracks = {}
    for n, item in enumerate(entries(read_json(path), "objects", str(path))):
        where = f"{path}: objects[{n}]"
        id = int(numbers(item.get("id"), (), f"{where}.id"))
        if id in tracks:
            raise ValueError(f"{where}.id: {id} is taken by an object before it")
        track = Track(id, str(item.get("category", "")), -1, *(torch.full((T, *shape), torch.nan, dtype=torch.float64)
                      for shape in ((4, 4), (3,), (4,))), torch.zeros(T, dtype=torch.bool))
        for k, entry in enumerate(entries(item, "frames", where)):
            here = f"{where}.frames[{k}]"
            t = int(numbers(entry.get("frame"), (), f"{here}.frame"))
            if not 0 <= t < T or track.pose[t].isfinite().all():
                raise ValueError(f"{here}.frame: wanted each of 0 to {T - 1} at most once, got {t}")
            track.pose[t] = rigid(entry.get("pose"), f"{here}.pose")
            track.size[t], track.box[t] = (numbers(entry.get(name), (n,), f"{here}.{name}")
                                           for name, n in (("size", 3), ("box", 4)))
            track.visible[t] = bool(entry.get("visible", True))
        there = track.pose.isfinite().all(dim=(1, 2)).nonzero().flatten().tolist()
        track.reference = int(numbers(item.get("reference", there[0] if there else None), (), f"{where}.reference"))
        if track.reference not in there:
            raise ValueError(f"{where}.reference: wanted a frame of this track, got {track.reference}")
        tracks[id] = track
    return tracks


def entries(item: dict, name: str, where: str) -> list[dict]:
    """item[name], which must be a list of JSON objects, and not empty."""
    found = item.get(name)
    if not isinstance(found, list) or not found or not all(isinstance(e, dict) for e in found):
        raise ValueError(f"{where}: {name}: wanted a list of objects, got {str(found)[:40]}")
    return found


def numbers(value, shape: tuple, where: str) -> Tensor:
    """A JSON value as a finite float64 tensor of a shape."""
    try:
        tensor = torch.tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        tensor = None
    if tensor is None or tensor.shape != shape or not tensor.isfinite().all():
        raise ValueError(f"{where}: wanted {'x'.join(map(str, shape)) or 'one'} finite numbers, got {str(value)[:60]}")
    return tensor


def rigid(value, where: str) -> Tensor:
    """A JSON value as a rotation and a translation [4, 4]."""
    pose = numbers(value, (4, 4), where)
    R = pose[:3, :3]
    if (R @ R.T - torch.eye(3)).abs().max() > 1e-3 or torch.linalg.det(R) < 0 or pose[3].tolist() != [0, 0, 0, 1]:
        raise ValueError(f"{where}: wanted a rotation and a translation over 0 0 0 1, got a matrix of determinant "
                         f"{torch.linalg.det(R):.3g}: {R.tolist()}")
    return pose


if __name__ == "__main__":
    import tempfile

    from .toy_scene import write_scene
    from .toy_world import WorldConfig

    with tempfile.TemporaryDirectory() as folder:
        write_scene(Path(folder), 0, WorldConfig(frames=3, height=48, width=72))
        scene = read_scene(Path(folder))
    print(f"{len(scene.cameras)} cameras of {scene.cameras[0].width} x {scene.cameras[0].height}, "
          f"{len(scene.still)} Gaussians stand still")
    for i, track in scene.tracks.items():
        print(f"object {i}: {track.category}, {[round(x, 1) for x in track.size[0].tolist()]} m, "
              f"{len(scene.objects[i])} Gaussians, boxes {track.box.round().int().tolist()}")
    print(f"without object 1, frame 0 has {len(scene.at(0, without=1))} Gaussians of {len(scene.at(0))}")
