"""A scene folder: a drive reconstructed as 3D Gaussians, with its cameras, its tracked objects and its video.

    scene.ply        Gaussians in INRIA's layout, in world coordinates; those of a moving object as it is in one frame
    asset.ply        the generated asset, in the same layout, upright in its own frame
    transforms.json  cameras as nerfstudio and instant-ngp write them: frames[].transform_matrix, camera to world with
                     OpenGL's axes; fl_x, fl_y, cx, cy, w, h of the file or of a frame; or camera_angle_x (_y) for
                     fl_x (_y). Without w, h, cx, cy: the video's size and its middle. Frames go by file_path: the
                     picture of that name, and of a video.mp4 numbers by value
    tracks.json      {"objects": [{"id": 7, "category": "car", "reference": 0, "frames": [{"frame": 0,
                     "pose": 4x4, "size": [length, width, height], "box": [x0, y0, x1, y1], "visible": true}, ...]}]}
    video.mp4        what was filmed, one frame to each camera; or images/, a folder

`pose` is object to world, with x forward, y left and z up from the middle of the object's 3D box, as Waymo and nuScenes
have it; `box` is in pixels. Objects move rigidly with their track: `reference` (if not given, the first of its frames)
is the frame at which scene.ply shows the object. A Gaussian belongs to the object whose id is its integer property
`object_id`; in a file without that property, to the object in whose 3D box it lies at the object's reference frame.
All other Gaussians do not move. Cameras are pinholes: a distorting lens, a fisheye or a panorama is refused by name, so
undistort the images first.

    python -m mirage_min.data.scene
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from ..method.camera import Camera
from ..networks import checked
from ..networks.checked import Within
from ..networks.weights import read_json
from .pictures import natural_order, pictures_of
from .splat import Gaussians, load_ply
from .video import Video

OPENGL_TO_OPENCV = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))  # y up, z back: both turned
# Fields that say in which way an image is not a pinhole's, and those that say that the camera is of another kind
DISTORTION = {*(f"k{i}" for i in range(1, 9)), *(f"p{i}" for i in range(1, 5)), "b1", "b2", "distortion_params",
              "rolling_shutter"}
OTHER_LENSES = ("is_fisheye", "fisheye_crop_radius", "equirectangular", "latlong", "orthographic", "ftheta_p0")
Length = Annotated[float, Within(2**-20, 2**20)]     # in pixels
Pixels = Annotated[float, Within(-(2**20), 2**20)]
Angle = Annotated[float, Within(2**-20, 3.14)]       # in radians


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
    cameras = read_cameras(folder / "transforms.json", width, height, pictures)
    if len(cameras) != count:
        raise ValueError(f"{path}: {count} frames, but {folder / 'transforms.json'}: frames has {len(cameras)}")
    tracks = read_tracks(folder / "tracks.json", len(cameras))
    still, objects = split(load_ply(folder / "scene.ply"), tracks)
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


# ---- cameras ---------------------------------------------------------------------------------------------------------

@dataclass
class View:
    """The fields that are read of a frame in transforms.json; those that it lacks come from the top of the file."""

    transform_matrix: Annotated[Tensor, (4, 4)]
    file_path: str = ""
    depth_file_path: str = ""  # this and the next are for world_scene.py
    mask_path: str = ""
    camera_model: Literal["OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "RADIAL", "SIMPLE_RADIAL"] = "PINHOLE"
    fl_x: Length | None = None
    fl_y: Length | None = None
    camera_angle_x: Angle | None = None
    camera_angle_y: Angle | None = None
    cx: Pixels | None = None
    cy: Pixels | None = None
    w: Pixels | None = None
    h: Pixels | None = None


def read_cameras(path: Path, width: int, height: int, pictures: list[Path] = []) -> list[Camera]:
    """transforms.json -> the camera of every frame of a video of this size, with OpenCV's axes.

    pictures: those that the video consists of, in order; without them frames are ordered by file_path.
    ValueError naming the file and the field for missing or bad values, other sizes and lenses that are no pinholes.
    """
    views = read_views(path)
    cameras = [camera(view, f"{path}: frames[{i}]", width, height) for i, view in enumerate(views)]
    return [cameras[i] for i in ordered([view.file_path for view in views], pictures, path)]


def read_views(path: Path) -> list[View]:
    """The frames of transforms.json, in the file's order; ValueError as of read_cameras."""
    about = read_json(path)
    frames = about.get("frames")
    if not isinstance(frames, list) or not frames:
        raise ValueError(f"{path}: frames: wanted a list of objects, got {str(frames)[:40]}")
    views = []
    for i, frame in enumerate(frames):
        frame = checked.value(dict[str, Any], frame, path, f"frames[{i}]")
        here = about | frame                                           # a frame's own intrinsics come first
        refuse_lenses(here, path, f"frames[{i}]")
        views.append(checked.record(View, here, path, f"frames[{i}]"))
    return views


def refuse_lenses(here: dict, path: Path, field: str) -> None:
    """ValueError for a frame of transforms.json, `here`, whose camera is no pinhole, or distorts."""
    if other := [name for name in OTHER_LENSES if here.get(name)]:
        raise ValueError(f"{path}: {field}.{other[0]}: wanted a pinhole camera, got {str(here[other[0]])[:40]}")
    for name in DISTORTION & here.keys():
        bent = checked.value(float | list[float], here[name], path, f"{field}.{name}")
        if any(bent if isinstance(bent, list) else [bent]):
            raise ValueError(f"{path}: {field}.{name}: wanted images without lens distortion, got {here[name]}")


def camera(view: View, where: str, width: int, height: int) -> Camera:
    """The Camera of a frame of this size in pixels, with OpenCV's axes; `where` names the frame in errors.

    ValueError if its size is another, a focal length is missing, or its pose is not rigid.
    """
    w, h = view.w or width, view.h or height
    if (w, h) != (width, height):
        raise ValueError(f"{where}: w, h: wanted the video's {width}x{height}, got {w:g}x{h:g}")
    if view.fl_x is None and view.camera_angle_x is None:
        raise ValueError(f"{where}: no intrinsics: neither fl_x nor camera_angle_x")
    fx = view.fl_x or focal_length(w, view.camera_angle_x)
    fy = view.fl_y or (focal_length(h, view.camera_angle_y) if view.camera_angle_y else fx)
    cx = w / 2 if view.cx is None else view.cx
    cy = h / 2 if view.cy is None else view.cy
    K = torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
    camera_to_world = rigid(view.transform_matrix, f"{where}.transform_matrix") @ OPENGL_TO_OPENCV
    return Camera(K, torch.linalg.inv(camera_to_world).float(), width, height)


def focal_length(size: float, angle: float) -> float:
    """The focal length, in pixels, of a camera that sees `size` pixels in an angle of so many radians."""
    return size / 2 / math.tan(angle / 2)


def ordered(names: list[str], pictures: list[Path], path: Path) -> list[int]:
    """The indices of the frames with these names (file_path), in the order of the pictures that they name.

    Without pictures or names they are in the natural order of their names, numbers by value. ValueError if a name is no
    picture's, or two are the same one's.
    """
    if not pictures or not all(names):
        return sorted(range(len(names)), key=lambda i: natural_order(names[i]))
    places = {picture.stem: k for k, picture in enumerate(pictures)} | {p.name: k for k, p in enumerate(pictures)}
    found: dict[int, int] = {}
    for i, name in enumerate(names):
        last = name.replace("\\", "/").rpartition("/")[2]
        place = places.get(last, places.get(Path(last).stem))          # the file may lack the ending, or name another
        if place is None or place in found:
            what = "there is no such picture" if place is None else "is another frame's picture"
            raise ValueError(f"{path}: frames[{i}].file_path: {what} in {pictures[0].parent}: {name}")
        found[place] = i
    return [found[place] for place in sorted(found)]


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


def rigid(pose: Tensor, where: str) -> Tensor:
    """`pose` [4, 4], if it is a rotation and a translation; ValueError, beginning with `where`, otherwise."""
    R = pose[:3, :3]
    turns = (R @ R.T - torch.eye(3)).abs().max() <= 1e-3 and torch.linalg.det(R) > 0
    if not turns or pose[3].tolist() != [0, 0, 0, 1]:
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
          f"{len(scene.still)} Gaussians that do not move")
    for i, track in scene.tracks.items():
        print(f"object {i}: {track.category}, {[round(x, 1) for x in track.size[0].tolist()]} m, "
              f"{len(scene.objects[i])} Gaussians, boxes {track.box.round().int().tolist()}")
    print(f"without object 1, frame 0 has {len(scene.at(0, without=1))} Gaussians of {len(scene.at(0))}")
