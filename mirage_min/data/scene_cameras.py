"""A scene's cameras as reconstructions come with them, and the world in which they are.

    transforms.json   as nerfstudio and instant-ngp write it: frames[].transform_matrix, camera to world with OpenGL's
                      axes; fl_x, fl_y, cx, cy, w, h of the file or of a frame; or camera_angle_x (_y) for fl_x (_y).
                      Without w, h, cx, cy: the video's size and its middle. Frames go by file_path: the picture of that
                      name, and of a video.mp4 numbers by value
    cameras.json      where there is no transforms.json: INRIA's list of img_name, width, height, fx, fy, position and
                      rotation, camera to world with OpenCV's axes; the principal point is the middle
    dataparser_transforms.json  as nerfstudio writes it next to a trained model's config.yml. It turns, moves and scales
                      the world before it trains; with this file scene.ply is brought back to transforms.json's

Cameras are pinholes: a fisheye or a panorama is refused by name, and so is a distorting lens, which undistort.py takes
out of images and boxes.

    python -m mirage_min.data.scene_cameras      # nerfstudio's world, and the way back
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from ..method.camera import Camera
from ..networks import checked
from ..networks.checked import Within
from ..networks.weights import one_line, read_json
from .pictures import natural_order

OPENGL_TO_OPENCV = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))  # y up, z back: both turned
TRANSFORMS, INRIA, DATAPARSER = "transforms.json", "cameras.json", "dataparser_transforms.json"
# Fields that say in which way an image is not a pinhole's, and those that say that the camera is of another kind
BROWN = ("k1", "k2", "k3", "p1", "p2")
DISTORTION = {*BROWN, *(f"k{i}" for i in range(4, 9)), "p3", "p4", "b1", "b2", "distortion_params", "rolling_shutter"}
OTHER_LENSES = ("is_fisheye", "fisheye_crop_radius", "equirectangular", "latlong", "orthographic", "ftheta_p0")
Length = Annotated[float, Within(2**-20, 2**20)]     # in pixels
Pixels = Annotated[float, Within(-(2**20), 2**20)]
Angle = Annotated[float, Within(2**-20, 3.14)]       # in radians
Scale = Annotated[float, Within(2**-40, 2**40)]


def scene_cameras(folder: Path, width: int, height: int, pictures: list[Path] = []) -> list[Camera]:
    """The cameras of a scene folder whose video has this size, in its frames' order. ValueError as in read_cameras."""
    inria = folder / INRIA
    if inria.exists() and not (folder / TRANSFORMS).exists():
        return read_inria(inria, width, height, pictures)
    return read_cameras(folder / TRANSFORMS, width, height, pictures)


# ---- nerfstudio's ----------------------------------------------------------------------------------------------------

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
    ValueError naming the file and the field for missing or bad values, other sizes and lenses that are not pinholes.
    """
    views = read_views(path)
    cameras = [camera(view, f"{path}: frames[{i}]", width, height) for i, view in enumerate(views)]
    return [cameras[i] for i in ordered([view.file_path for view in views], pictures, path)]


def read_views(path: Path) -> list[View]:
    """The frames of transforms.json, in the file's order; ValueError as in read_cameras."""
    views = []
    for i, fields in enumerate(read_frames(path)):
        refuse_lenses(fields, path, f"frames[{i}]")
        views.append(checked.record(View, fields, path, f"frames[{i}]"))
    return views


def read_frames(path: Path) -> list[dict[str, Any]]:
    """Everything that transforms.json says about each frame; ValueError if frames are not a list of objects."""
    about = read_json(path)
    frames = about.get("frames")
    if not isinstance(frames, list) or not frames:
        raise ValueError(f"{path}: frames: wanted a list of objects, got {str(frames)[:40]}")
    # a frame's own intrinsics come first
    return [about | checked.value(dict[str, Any], frame, path, f"frames[{i}]") for i, frame in enumerate(frames)]


def refuse_lenses(fields: dict, path: Path, field: str, allowed: tuple[str, ...] = ()) -> None:
    """ValueError for a frame of transforms.json whose camera is not a pinhole, or distorts by more than `allowed`."""
    if other := [name for name in OTHER_LENSES if fields.get(name)]:
        raise ValueError(f"{path}: {field}.{other[0]}: wanted a pinhole camera, got {str(fields[other[0]])[:40]}")
    for name in sorted(DISTORTION & fields.keys() - set(allowed)):
        bent = checked.value(float | list[float], fields[name], path, f"{field}.{name}")
        if any(bent if isinstance(bent, list) else [bent]):
            way_out = " (python -m mirage_min.data.undistort makes them)" if name in BROWN else ""
            raise ValueError(f"{path}: {field}.{name}: wanted images without lens distortion{way_out}, "
                             f"got {fields[name]}")


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
    """The focal length, in pixels, of a camera that sees `size` pixels in an angle of this many radians."""
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
            fault = "there is no such picture" if place is None else "is another frame's picture"
            raise ValueError(f"{path}: frames[{i}].file_path: {fault} in {pictures[0].parent}: {name}")
        found[place] = i
    return [found[place] for place in sorted(found)]


def rigid(pose: Tensor, where: str) -> Tensor:
    """`pose` [4, 4], if it is a rotation and a translation; ValueError, beginning with `where`, otherwise."""
    R = pose[:3, :3]
    turns = (R @ R.T - torch.eye(3)).abs().max() <= 1e-3 and torch.linalg.det(R) > 0
    if not turns or pose[3].tolist() != [0, 0, 0, 1]:
        raise ValueError(f"{where}: wanted a rotation and a translation over 0 0 0 1, got a matrix of determinant "
                         f"{torch.linalg.det(R):.3g}: {R.tolist()}")
    return pose


# ---- INRIA's ---------------------------------------------------------------------------------------------------------

@dataclass
class Shot:
    """A camera in cameras.json, as 3D Gaussian Splatting writes it next to its point_cloud/."""

    img_name: str
    width: Length
    height: Length
    fx: Length
    fy: Length
    position: Annotated[Tensor, (3,)]
    rotation: Annotated[Tensor, (3, 3)]


def read_inria(path: Path, width: int, height: int, pictures: list[Path] = []) -> list[Camera]:
    """cameras.json -> the camera of every frame of a video of this size; arguments and errors as in read_cameras."""
    with one_line(path):
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    shots = checked.value(tuple[Shot, ...], content, path, "cameras")
    cameras = []
    for i, shot in enumerate(shots):
        where = f"{path}: cameras[{i}]"
        if (shot.width, shot.height) != (width, height):
            raise ValueError(f"{where}: width, height: wanted the video's {width}x{height}, "
                             f"got {shot.width:g}x{shot.height:g}")
        K = torch.tensor([[shot.fx, 0, width / 2], [0, shot.fy, height / 2], [0, 0, 1]])
        pose = torch.eye(4, dtype=torch.float64)
        pose[:3, :3] = shot.rotation
        pose[:3, 3] = shot.position
        cameras.append(Camera(K, torch.linalg.inv(rigid(pose, f"{where}.rotation")).float(), width, height))
    return [cameras[i] for i in ordered([shot.img_name for shot in shots], pictures, path)]


# ---- the world -------------------------------------------------------------------------------------------------------

@dataclass
class Applied:
    """What transforms.json says about its own world: how it was made of the one before it, of COLMAP as a rule."""

    applied_transform: Annotated[Tensor, (3, 4)] | None = None
    applied_scale: Scale = 1.0


@dataclass
class Dataparser:
    """dataparser_transforms.json: p' = scale · (transform · p), from the world before `applied_transform`."""

    transform: Annotated[Tensor, (3, 4)]
    scale: Scale


def to_the_cameras_world(folder: Path) -> tuple[float, Tensor, Tensor] | None:
    """s, R [3, 3] and t [3]: x = s·R·x' + t takes scene.ply to the world of transforms.json. None: it is there.

    ValueError naming the file and the field if nerfstudio's transforms are not rotations and translations.
    """
    if not (folder / DATAPARSER).exists():
        return None
    path = folder / TRANSFORMS
    applied = checked.record(Applied, read_json(path), path)
    parsed = checked.record(Dataparser, read_json(folder / DATAPARSER), folder / DATAPARSER)
    A = torch.eye(4, dtype=torch.float64)
    if applied.applied_transform is not None:
        A[:3] = applied.applied_transform
    M = torch.eye(4, dtype=torch.float64)
    M[:3] = parsed.transform
    # nerfstudio writes M A and σ a, where x' = σ (M x); A and a made transforms.json of the world before it
    M = rigid(M, f"{folder / DATAPARSER}: transform") @ torch.linalg.inv(rigid(A, f"{path}: applied_transform"))
    back = torch.linalg.inv(M)
    return applied.applied_scale / parsed.scale, back[:3, :3], back[:3, 3]


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        axes = [[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0]]
        (folder / TRANSFORMS).write_text(json.dumps({"applied_transform": axes}))
        (folder / DATAPARSER).write_text(json.dumps({"transform": [[1, 0, 0, -3], [0, 0, 1, 0], [0, -1, 0, 0]],
                                                     "scale": 0.1}))
        s, R, t = to_the_cameras_world(folder)
    x = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    print(f"nerfstudio's {x.tolist()} is {[round(v, 6) for v in (s * R @ x + t).tolist()]} among its cameras")
