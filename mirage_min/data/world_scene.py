"""What a world model starts from: a frame with its depth, and cameras to go along. A folder, checked at the door.

    transforms.json   cameras, as scene.py reads them: nerfstudio's, OpenGL's axes, centres of pixels at half-integers.
                      Frames go by file_path, or, where one has none, as they stand in the file. The first is the start:
                      its file_path is a picture that is there. A frame with depth_file_path and a picture is known too
    depth_file_path   a 16-bit PNG in mm, or .npy or .npz in metres, float: along the camera's z, not along the ray, of
                      the picture's size; 0, inf and nan are unknown. Poses are then in metres
    mask_path         a picture: black, 0, is left out of the memory (what moves), as nerfstudio has it

or `geometry.npz`, as the world model's release exchanges it: depths [T, H, W], intrinsics [T, 3, 3] for centres at
integers, poses_c2w [T, 4, 4] with OpenCV's axes, perhaps masks [T, H, W] (0 is left out), and frames (uint8
[T, H, W, 3]), or else first_frame.png next to it. Nothing is unpickled.

Depth and poses that do not fit each other are the commonest mistake: scene_fit.py refuses them with the error that it
measures.

    python -m mirage_min.data.world_scene --out scene --seed 3 --path loop     # a made-up one, whose depth is rendered
    python -m mirage_min.data.world_scene
"""

import argparse
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..method.camera import Camera
from ..networks import checked
from ..networks.checked import Within
from ..networks.weights import one_line, read_json
from . import desk, toy_paths, toy_world
from .pictures import IMAGES
from .pixels import to_float
from .scene_cameras import OPENGL_TO_OPENCV, camera, ordered, read_views, rigid
from .scene_fit import Known, Misfit, check_fit
from .toy_paths import PATHS
from .toy_render import Scene
from .toy_scene import write_json
from .toy_street import Draws
from .video import read_clip, read_image, write_clip

GEOMETRY, TRANSFORMS = "geometry.npz", "transforms.json"


@dataclass
class Toy:
    """What transforms.json says of the made-up scene that it shows, `toy_world`."""

    seed: int
    frames: int
    height: int
    width: int
    path: str

    def config(self) -> toy_world.WorldConfig:
        return toy_world.WorldConfig(self.frames, self.height, self.width, path=self.path, static=True)


@dataclass
class WorldScene:
    """A start, what else is known, and the way."""

    source: Path
    cameras: list[Camera]
    known: list[Known]       # the first is that of the first camera
    off: Misfit | None       # how far depth and poses are off each other; None: it cannot be said
    toy: Toy | None = None


# ---- the door --------------------------------------------------------------------------------------------------------

def read_world_scene(path: str | Path) -> WorldScene:
    """A scene folder, or a geometry.npz; whatever is wrong is a ValueError of one line that names file and field."""
    path = Path(path)
    if path.is_dir() and (path / TRANSFORMS).is_file():
        scene = from_transforms(path)
    elif (file := path / GEOMETRY if path.is_dir() else path).is_file() and file.suffix == ".npz":
        scene = from_npz(file)
    else:
        raise ValueError(f"{path}: wanted a folder with {TRANSFORMS} or {GEOMETRY}" if path.exists() else
                         f"{path}: no such folder")
    scene.off = check_fit(scene.known, path)
    return scene


def from_transforms(folder: Path) -> WorldScene:
    """A folder with transforms.json, not yet checked for its fit."""
    path = folder / TRANSFORMS
    views = read_views(path)
    names = [view.file_path for view in views]
    order = ordered(names, [], path) if all(names) else range(len(views))
    first = order[0]
    where = f"{path}: frames[{first}]"
    picture = find_picture(folder, names[first])
    if picture is None:
        raise ValueError(f"{where}.file_path: wanted a picture of the first frame, got {names[first]!r}")
    if not views[first].depth_file_path:
        raise ValueError(f"{where}.depth_file_path: wanted the depth of the first frame, with which the memory begins")
    H, W = read_image(picture).shape[1:]
    cameras, known = [], []
    for i in order:
        view = views[i]
        cameras.append(camera(view, f"{path}: frames[{i}]", W, H))
        picture = find_picture(folder, view.file_path)
        if not view.depth_file_path:
            continue
        if picture is None:
            raise ValueError(f"{path}: frames[{i}].file_path: wanted a picture where there is depth, got "
                             f"{view.file_path!r}")
        frame = of_size(read_image(picture), H, W, picture)
        depth = of_size(read_depth(folder / view.depth_file_path), H, W, view.depth_file_path)
        mask = None
        if view.mask_path:
            mask = of_size(read_image(folder / view.mask_path), H, W, view.mask_path).amax(dim=0) == -1
        known.append(Known(frame, depth, mask, cameras[-1]))
    about = read_json(path).get("toy_world")
    toy = None if about is None else checked.record(Toy, about, path, "toy_world", Within(0, 2**40))
    return WorldScene(folder, cameras, known, None, toy)


def from_npz(file: Path) -> WorldScene:
    """geometry.npz of the release, not yet checked for its fit."""
    given = read_arrays(file)
    if missing := {"depths", "intrinsics", "poses_c2w"} - given.keys():
        raise ValueError(f"{file}: wanted {', '.join(sorted(missing))} too, got {', '.join(sorted(given))}")
    T, H, W = given["depths"].shape if given["depths"].ndim == 3 else (0, 0, 0)
    wanted = {"depths": (T, H, W), "intrinsics": (T, 3, 3), "poses_c2w": (T, 4, 4), "masks": (T, H, W),
              "frames": (T, H, W, 3)}
    for name, shape in wanted.items():
        if name in given and (given[name].shape != shape or given[name].dtype.kind not in "fiub" or not T):
            raise ValueError(f"{file}: {name}: wanted numbers {list(shape)}, got {given[name].dtype} "
                             f"{list(given[name].shape)}")
    K, poses = (torch.from_numpy(given[name].astype(np.float64)) for name in ("intrinsics", "poses_c2w"))
    pinholes = (K.diagonal(dim1=1, dim2=2) > 0).all() and (K[:, 2] == torch.tensor([0, 0, 1])).all()
    if not (K.isfinite().all() and pinholes):
        raise ValueError(f"{file}: intrinsics: wanted finite numbers, focal lengths above 0 and 0 0 1 in the last row")
    cameras = [Camera.from_pose(K[t], rigid(poses[t], f"{file}: poses_c2w[{t}]"), W, H, integer_pixels=True)
               for t in range(T)]
    if "frames" in given and given["frames"].dtype == np.uint8:
        frames = [to_float(image) for image in given["frames"]]
    elif (picture := file.parent / "first_frame.png").is_file():
        frames = [of_size(read_image(picture), H, W, picture)]
    elif (clip := file.parent / "clip.mp4").is_file():
        frames = [of_size(frame, H, W, clip) for frame in read_clip(clip, T).unbind(dim=1)]
    else:
        raise ValueError(f"{file}: wanted frames, uint8 [{T}, {H}, {W}, 3], or first_frame.png or clip.mp4 next to it")
    depths = torch.from_numpy(given["depths"].astype(np.float32))
    out = torch.from_numpy(given["masks"] == 0) if "masks" in given else [None] * T
    known = [Known(frame, known_depth(depths[t], f"{file}: depths[{t}]"), out[t], cameras[t])
             for t, frame in enumerate(frames)]
    return WorldScene(file, cameras, known, None)


def find_picture(folder: Path, name: str) -> Path | None:
    """The picture that a file_path names; it may lack its ending. None if there is none."""
    names = [name, *(name + ending for ending in sorted(IMAGES))] if name else []
    return next((folder / each for each in names if (folder / each).is_file()), None)


def read_depth(file: Path) -> Tensor:
    """A depth file -> [H, W] in metres, float32, 0 where it is unknown. ValueError that names it."""
    kind = file.suffix.lower()
    if kind == ".png":
        with any_error(file), Image.open(file) as image:
            mode, array = image.mode, np.asarray(image).astype(np.float32) * 1e-3
        if not mode.startswith("I"):
            raise ValueError(f"{file}: wanted 16 bits a pixel, depth in mm, got a picture of mode {mode}")
    elif kind in (".npy", ".npz"):
        arrays = read_arrays(file)
        if not arrays:
            raise ValueError(f"{file}: wanted an array of depth, got none")
        array = arrays.get("depth", next(iter(arrays.values())))
    else:
        raise ValueError(f"{file}: wanted a 16-bit PNG in mm, or .npy or .npz in metres")
    array = array.squeeze()
    if array.ndim != 2 or array.dtype.kind != "f":
        raise ValueError(f"{file}: wanted depth [H, W] of floating-point numbers, got {array.dtype} "
                         f"{list(array.shape)}")
    return known_depth(torch.from_numpy(array.astype(np.float32)), file)


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """The arrays of NAME.npz by name, or the one of NAME.npy under "". Nothing is unpickled; ValueError that names the
    file."""
    with any_error(file):
        found = np.load(file, allow_pickle=False)
        if isinstance(found, np.lib.npyio.NpzFile):
            with found as arrays:
                return {name: arrays[name] for name in arrays.files}
    return {"": found}


@contextmanager
def any_error(file: Path):
    """one_line, for numpy and Pillow: what they raise on a broken file has no class in common."""
    with one_line(file):
        try:
            yield
        except OSError:
            raise
        except Exception as error:
            raise ValueError(" ".join(str(error).split())) from error


def known_depth(depth: Tensor, where) -> Tensor:
    """Depth [H, W] in float32, 0 where it is unknown; ValueError if all is."""
    depth = torch.where((depth > 0) & depth.isfinite(), depth, 0).float()
    if not depth.any():
        raise ValueError(f"{where}: wanted depth, got no value above 0 that is finite")
    return depth


def of_size(image: Tensor, H: int, W: int, where) -> Tensor:
    """An image [..., H, W], if it is of this size."""
    if image.shape[-2:] != (H, W):
        raise ValueError(f"{where}: wanted the first frame's {W}x{H}, got {image.shape[-1]}x{image.shape[-2]}")
    return image


# ---- ways ------------------------------------------------------------------------------------------------------------

def way_through(scene: WorldScene, name: str, frames: int, way: float = 0.0) -> list[Camera]:
    """The cameras of a path of toy_paths that begins at the scene's first.

    way  metres ahead; 0: a made-up scene's free way, elsewhere .3 of the median depth of the first frame
    In a made-up scene the path keeps to the ground, and out and back is no longer than a drive; elsewhere it goes where
    the first camera looks. ValueError for the way of a drive through a made-up scene, whose speed is the scene's.
    """
    first = scene.cameras[0]
    if scene.toy is not None:
        if way and name == "drive":
            raise ValueError(f"{scene.source}: a drive through a made-up scene has a speed: wanted way=0, got {way:g}")
        drive, _ = toy_paths.drive(Draws(scene.toy.seed), replace(scene.toy.config(), frames=frames))
        drive[:, :3, 3] += first.camera_to_world[:3, 3] - drive[0, :3, 3]
        poses = toy_paths.along(name, drive, toy_scene(scene.toy).bodies, way)
    else:
        depth = scene.known[0].depth
        way = way or 0.3 * float(depth[depth > 0].median())
        ahead = torch.eye(4).repeat(frames, 1, 1)
        ahead[:, 2, 3] = way * torch.arange(frames) / max(1, (frames - 1) // (1 if name == "drive" else 2))
        found = {"drive": lambda: ahead, "out_and_back": lambda: toy_paths.out_and_back(ahead, way),
                 "loop": lambda: toy_paths.loop(ahead, way, width=0.15 * way)}[name]()
        poses = first.camera_to_world.float() @ found
    return [Camera.from_pose(first.K, pose, first.width, first.height) for pose in poses]


def toy_scene(toy: Toy) -> Scene:
    """The made-up scene."""
    return toy_world.sample_scene(toy.seed, toy.config())


def write_toy(folder: Path, toy: Toy) -> None:
    """A made-up scene at rest as such a folder: pictures and depth of all frames along its path."""
    clip, config = toy_world.make_clip(toy.seed, toy.config()), toy.config()
    folder.mkdir(parents=True, exist_ok=True)
    write_clip(folder / "images", clip.x_gt, config.fps)
    (folder / "depth").mkdir(exist_ok=True)
    frames = []
    for t, pose in enumerate(clip.c2w):
        np.save(folder / "depth" / f"{t:06d}.npy", clip.depth[0, t].numpy())
        frames.append({"file_path": f"images/{t:06d}.png", "depth_file_path": f"depth/{t:06d}.npy",
                       "transform_matrix": (pose @ OPENGL_TO_OPENCV.float()).tolist()})
    K = clip.K.tolist()
    write_json(folder / TRANSFORMS, {"w": toy.width, "h": toy.height, "fl_x": K[0][0], "fl_y": K[1][1], "cx": K[0][2],
                                     "cy": K[1][2], "toy_world": asdict(toy), "frames": frames})


def demonstrate() -> None:
    """A made-up scene written, read, and spoilt."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_toy(Path(folder), Toy(0, 9, 48, 72, "loop"))
        scene = read_world_scene(folder)
        print(f"{len(scene.cameras)} cameras, {len(scene.known)} frames with depth, off by {scene.off}")
        for factor in (1e3, 0.5):
            for file in Path(folder, "depth").iterdir():
                np.save(file, np.load(file) * np.float32(factor))
            try:
                read_world_scene(folder)
            except ValueError as error:
                print("refused:", str(error).replace(folder, "FOLDER"))
            for file in Path(folder, "depth").iterdir():
                np.save(file, np.load(file) / np.float32(factor))


def main(argv: list[str] | None = None) -> None:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=desk.first_line(__doc__))
    parser.add_argument("--out", type=Path, help="folder for a made-up scene; without it, one is shown")
    parser.add_argument("--seed", type=int, default=0, help="of the scene (default 0)")
    parser.add_argument("--path", choices=PATHS, default="loop", help="of the camera (default loop)")
    parser.add_argument("--frames", type=int, default=33, help="cameras (default 33)")
    parser.add_argument("--size", type=toy_world.height_x_width, default=(96, 144), help="height x width")
    args = parser.parse_args(argv)
    if args.out is None:
        demonstrate()
        return
    if min(args.frames, *args.size) < 1:
        parser.error("frames and size must be at least 1")
    write_toy(args.out, Toy(args.seed, args.frames, *args.size, args.path))


if __name__ == "__main__":
    main()
