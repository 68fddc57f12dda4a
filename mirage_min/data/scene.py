"""A scene folder: a drive reconstructed as 3D Gaussians, with its cameras, its tracked objects and its video.

    scene.ply        Gaussians in INRIA's layout, in world coordinates; those of a moving object as it is in one frame
    asset.ply        the generated asset, in the same layout, upright in its own frame
    transforms.json  cameras as nerfstudio and instant-ngp write them, or cameras.json, INRIA's (scene_cameras.py)
    tracks.json      {"objects": [{"id": 7, "category": "car", "reference": 0, "frames": [{"frame": 0,
                     "pose": 4x4, "size": [length, width, height], "box": [x0, y0, x1, y1], "visible": true}, ...]}]}
    video.mp4        what was filmed, one frame to each camera; or images/, a folder

`pose` is object to world, with x forward, y left and z up from the middle of the object's 3D box, as Waymo and nuScenes
have it; `box` is in pixels. Objects move rigidly with their track: `reference` (if not given, the first of its frames)
is the frame at which scene.ply shows the object. A Gaussian belongs to the object whose id is its integer property
`object_id`; in a file without that property, to the object in whose 3D box it lies at the object's reference frame.
All other Gaussians do not move. docs/scenes.md says how to come here from what reconstructions leave.

    python -m mirage_min.data.scene
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from ..method.camera import Camera
from ..networks import checked
from ..networks.weights import read_json
from .pictures import pictures_of
from .scene_cameras import rigid, scene_cameras, to_the_cameras_world
from .splat import Gaussians, load_ply
from .video import Video


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
        """All Gaussians at frame t, in world coordinates; `without` is the id of an object to leave out."""
        moving = [moved(g, self.tracks[i].pose[t]) for i, g in self.objects.items()
                  if i != without and self.tracks[i].pose[t].isfinite().all()]
        return Gaussians.cat([self.still, *moving])


def moved(g: Gaussians, pose: Tensor) -> Gaussians:
    """Gaussians moved by a rigid pose [4, 4]; ValueError if it is none."""
    return g.transformed(1.0, pose[:3, :3], pose[:3, 3])


def on(g: Gaussians, device: str) -> Gaussians:
    """The same Gaussians on a device."""
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
        width, height = video.format.width, video.format.height
        count = sum(1 for _ in video)
    pictures = pictures_of(path) if path.is_dir() else []
    cameras = scene_cameras(folder, width, height, pictures)
    if len(cameras) != count:
        raise ValueError(f"{path}: {count} frames, but {folder} has {len(cameras)} cameras")
    tracks = read_tracks(folder / "tracks.json", len(cameras))
    gaussians = load_ply(folder / "scene.ply")
    if (similarity := to_the_cameras_world(folder)) is not None:
        gaussians = gaussians.transformed(*similarity)
    still, objects = split(gaussians, tracks)
    return SceneFolder(path, cameras, tracks, on(still, device), {i: on(g, device) for i, g in objects.items()})


def split(scene: Gaussians, tracks: dict[int, Track]) -> tuple[Gaussians, dict[int, Gaussians]]:
    """The Gaussians of scene.ply -> (those that do not move, {id: those of an object, in its frame})."""
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


# ---- tracks ----------------------------------------------------------------------------------------------------------

@dataclass
class Sight:
    """An object in one frame, in tracks.json."""

    frame: int
    pose: Annotated[Tensor, (4, 4)]
    size: Annotated[Tensor, (3,)]
    box: Annotated[Tensor, (4,)]
    visible: bool = True


@dataclass
class Tracked:
    """An object of tracks.json."""

    id: int
    frames: tuple[Sight, ...]
    category: str | int = ""
    reference: int | None = None


@dataclass
class Tracks:
    """tracks.json."""

    objects: tuple[Tracked, ...]


def read_tracks(path: Path, T: int) -> dict[int, Track]:
    """tracks.json of a scene of T frames -> {id: Track}.

    ValueError naming the file and the field for ids or frames that repeat, a frame outside 0 to T - 1, a size of 0 or
    less, a box whose sides are swapped, a pose that is not rigid, or a reference that is no frame of the track.
    """
    tracks = {}
    for n, item in enumerate(checked.record(Tracks, read_json(path), path).objects):
        where = f"{path}: objects[{n}]"
        if item.id in tracks:
            raise ValueError(f"{where}.id: {item.id} is taken by an object before it")
        pose, size, box = (torch.full((T, *shape), torch.nan, dtype=torch.float64) for shape in ((4, 4), (3,), (4,)))
        track = Track(item.id, str(item.category), reference=-1, pose=pose, size=size, box=box,
                      visible=torch.zeros(T, dtype=torch.bool))
        for k, sight in enumerate(item.frames):
            t, here = sight.frame, f"{where}.frames[{k}]"
            if not 0 <= t < T or track.pose[t].isfinite().all():
                raise ValueError(f"{here}.frame: wanted each of 0 to {T - 1} at most once, got {t}")
            if sight.size.min() <= 0:
                raise ValueError(f"{here}.size: wanted a length, width and height above 0, got {sight.size.tolist()}")
            if (sight.box[:2] > sight.box[2:]).any():
                raise ValueError(f"{here}.box: wanted x0, y0, x1, y1 with x0 <= x1 and y0 <= y1, got "
                                 f"{sight.box.tolist()}")
            track.pose[t] = rigid(sight.pose, f"{here}.pose")
            track.size[t] = sight.size
            track.box[t] = sight.box
            track.visible[t] = sight.visible
        there = [sight.frame for sight in item.frames]
        track.reference = min(there) if item.reference is None else item.reference
        if track.reference not in there:
            raise ValueError(f"{where}.reference: wanted a frame of this track, got {track.reference}")
        tracks[item.id] = track
    return tracks


if __name__ == "__main__":
    import tempfile

    from .toy_scene import write_scene
    from .toy_world import WorldConfig

    with tempfile.TemporaryDirectory() as folder:
        write_scene(Path(folder), 0, WorldConfig(frames=3, height=48, width=72))
        scene = read_scene(Path(folder))
    print(f"{len(scene.cameras)} cameras of {scene.cameras[0].width} x {scene.cameras[0].height}, "
          f"{len(scene.still)} Gaussians that do not move")
    for i, track in scene.tracks.items():
        print(f"object {i}: {track.category}, {[round(x, 1) for x in track.size[0].tolist()]} m, "
              f"{len(scene.objects[i])} Gaussians, boxes {track.box.round().int().tolist()}")
    print(f"without object 1, frame 0 has {len(scene.at(0, without=1))} Gaussians of {len(scene.at(0))}")
