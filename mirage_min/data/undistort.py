"""A scene folder whose lens distorts -> one of pinholes: pictures and boxes as a straight lens would show them.

    python -m mirage_min.data.undistort data/scenes/filmed data/scenes/street

Brown's model, as OpenCV, COLMAP and nerfstudio write it. Of what is at (x, y) = (X / Z, Y / Z), r² = x² + y², the lens
makes a picture at

    x' = x (1 + k1 r² + k2 r⁴ + k3 r⁶) + 2 p1 x y + p2 (r² + 2 x²)
    y' = y (1 + k1 r² + k2 r⁴ + k3 r⁶) + p1 (r² + 2 y²) + 2 p2 x y

The focal length changes just so far that no pixel shows what was not filmed. Poses and Gaussians stay as they are: a
reconstruction does not depend on the lens once it is made. Left out: k4 and further, which OpenCV and nerfstudio
define differently, and fisheyes; both are refused by name.

    python -m mirage_min.data.undistort          # how a lens is straightened
"""

import argparse
import shutil
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as nnf

from ..networks import checked
from ..networks.weights import read_json
from . import desk
from .pictures import pictures_of
from .scene import read_tracks
from .scene_cameras import BROWN, DATAPARSER, TRANSFORMS, View, camera, ordered, read_frames, refuse_lenses
from .toy_scene import write_json
from .video import Format, Video, writing

ZOOMS = 0.25, 4.0  # the range in which a straight focal length is sought, in filmed focal lengths


@dataclass
class Lens:
    """Coefficients of Brown's model."""

    k1: float = 0.0
    k2: float = 0.0
    k3: float = 0.0
    p1: float = 0.0
    p2: float = 0.0


def distort(lens: Lens, xy: Tensor) -> Tensor:
    """(x, y) [..., 2] of a pinhole at focal length 1 -> where the lens shows it [..., 2]."""
    x, y = xy.unbind(-1)
    rr = x * x + y * y
    radial = 1 + rr * (lens.k1 + rr * (lens.k2 + rr * lens.k3))
    return torch.stack([x * radial + 2 * lens.p1 * x * y + lens.p2 * (rr + 2 * x * x),
                        y * radial + lens.p1 * (rr + 2 * y * y) + 2 * lens.p2 * x * y], dim=-1)


def undistort(lens: Lens, xy: Tensor) -> Tensor:
    """The inverse of `distort`, on points [..., 2], by iteration in float64; ValueError if it does not converge."""
    found = xy = xy.double()
    for _ in range(200):
        found = found + xy - distort(lens, found)
    missed = (distort(lens, found) - xy).abs().max()
    if not missed < 1e-6:
        raise ValueError(f"wanted a lens that can be inverted inside the image, got {lens}")
    return found


def folds(lens: Lens, radius: float) -> bool:
    """Whether the lens shows two rings of a pinhole's image, within `radius` at focal length 1, in one place."""
    # d/dr of r (1 + k1 r² + k2 r⁴ + k3 r⁶)
    rr = torch.linspace(0, radius, 1000, dtype=torch.float64) ** 2
    return bool((1 + rr * (3 * lens.k1 + rr * (5 * lens.k2 + rr * 7 * lens.k3)) <= 0).any())


@dataclass
class Straight:
    """An image without its lens: the same principal point, and `zoom` times the focal lengths of the filmed one."""

    lens: Lens
    focal: Tensor   # [2] of the filmed image, in pixels
    middle: Tensor  # [2] the principal point of both
    zoom: float

    def to_filmed(self, uv: Tensor) -> Tensor:
        """Pixels [..., 2] of the straight image -> where the filmed one has what they show."""
        return distort(self.lens, (uv - self.middle) / (self.zoom * self.focal)) * self.focal + self.middle

    def to_straight(self, uv: Tensor) -> Tensor:
        """The inverse of to_filmed, [..., 2] -> [..., 2]."""
        return undistort(self.lens, (uv - self.middle) / self.focal) * self.zoom * self.focal + self.middle


def outline(width: float, height: float, steps: int) -> Tensor:
    """Points [4 (steps + 1), 2] along the sides of a rectangle whose corner is at 0, 0."""
    at, one = torch.linspace(0, 1, steps + 1, dtype=torch.float64), torch.ones(steps + 1, dtype=torch.float64)
    sides = [torch.stack(side, dim=1) for side in ((at, 0 * one), (at, one), (0 * one, at), (one, at))]
    return torch.cat(sides) * torch.tensor([width, height])


def straighten(lens: Lens, K: Tensor, width: int, height: int) -> Straight:
    """The pinhole that sees as much as it can of what was filmed through `lens` with K [3, 3], and nothing else.

    ValueError if there is none in the range of ZOOMS.
    """
    edges, size = outline(width, height, width + height), torch.tensor([width, height])
    focal, middle = K.diagonal()[:2].double(), K[:2, 2].double()

    def fits(zoom: float) -> bool:
        filmed = Straight(lens, focal, middle, zoom).to_filmed(edges)
        radius = float(((edges - middle) / (zoom * focal)).norm(dim=1).max())
        return bool(((filmed >= 0) & (filmed <= size)).all()) and not folds(lens, radius)
    low, high = ZOOMS
    if not fits(high):
        raise ValueError(f"wanted a lens that a pinhole of {high:g} times its focal length can replace, got {lens}")
    for _ in range(40):
        zoom = (low + high) / 2
        low, high = (low, zoom) if fits(zoom) else (zoom, high)
    return Straight(lens, focal, middle, high)


def straight_frame(frame: Tensor, straight: Straight) -> Tensor:
    """A filmed frame [3, H, W] -> the straight one, of the same size, bilinearly resampled."""
    C, H, W = frame.shape
    v, u = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    filmed = straight.to_filmed(torch.stack([u, v], dim=-1))
    grid = (2 * filmed / torch.tensor([W, H]) - 1).to(frame)
    return nnf.grid_sample(frame[None], grid[None], mode="bilinear", padding_mode="border", align_corners=False)[0]


def straight_box(box: list[float], straight: Straight, width: int, height: int) -> list[float]:
    """A box x0, y0, x1, y1, cut off at the edges of the filmed image -> the one around its straight sides."""
    size = torch.tensor([width, height, width, height])
    x0, y0, x1, y1 = torch.tensor(box, dtype=torch.float64).clamp(min=0).minimum(size).tolist()
    sides = straight.to_straight(outline(x1 - x0, y1 - y0, 64) + torch.tensor([x0, y0]))
    return torch.cat([sides.amin(0), sides.amax(0)]).tolist()


# ---- a folder --------------------------------------------------------------------------------------------------------

def read_lenses(path: Path) -> tuple[list[View], list[Lens]]:
    """transforms.json -> its frames, and the lens of each; ValueError for lenses of another kind."""
    views, lenses = [], []
    for i, fields in enumerate(read_frames(path)):
        refuse_lenses(fields, path, f"frames[{i}]", allowed=BROWN)
        views.append(checked.record(View, fields, path, f"frames[{i}]"))
        lenses.append(checked.record(Lens, fields, path, f"frames[{i}]"))
    return views, lenses


def undistort_scene(scene: Path, out: Path) -> list[Straight]:
    """Write the scene folder `scene` to `out` as pinholes show it -> what was done to each frame.

    ValueError of one line for what is wrong with `scene`; its Gaussians are copied as they are, and not read.
    """
    path = scene / TRANSFORMS
    if out.resolve() == scene.resolve():
        raise ValueError(f"{out}: wanted another folder than the scene's own")
    film = scene / ("video.mp4" if (scene / "video.mp4").exists() else "images")
    out.mkdir(parents=True, exist_ok=True)
    done, frames = write_frames(path, film, out / "images")
    about = read_json(path)
    world = {key: about[key] for key in ("applied_transform", "applied_scale") if key in about}
    write_json(out / TRANSFORMS, {"camera_model": "PINHOLE"} | world | {"frames": frames})
    if (scene / "tracks.json").exists():
        width, height = frames[0]["w"], frames[0]["h"]
        write_json(out / "tracks.json", straight_tracks(scene / "tracks.json", done, width, height))
    for name in ("scene.ply", "asset.ply", DATAPARSER):
        if (scene / name).exists():
            shutil.copyfile(scene / name, out / name)
    return done


def write_frames(path: Path, film: Path, images: Path) -> tuple[list[Straight], list[dict]]:
    """The frames of a film, straight, as pictures -> what was done to each, and the frames of a new transforms.json.

    path: the transforms.json of the film. ValueError unless it has a camera for each frame.
    """
    views, lenses = read_lenses(path)
    order = ordered([view.file_path for view in views], pictures_of(film) if film.is_dir() else [], path)
    done, frames = [], []
    with Video(film) as video:
        W, H = video.format.width, video.format.height
        with writing(images, Format(W, H, Fraction(25), Fraction(1, 25))) as pngs:
            for t, frame in enumerate(desk.bar(video, total=len(order), unit="frame")):
                if t == len(order):
                    raise ValueError(f"{film}: wanted a frame for each of the {t} cameras of {path}, got more")
                view = views[order[t]]
                K = camera(view, f"{path}: frames[{order[t]}]", W, H).K
                straight = straighten(lenses[order[t]], K, W, H)
                pngs.write(straight_frame(frame, straight), t, 1)
                fl_x, fl_y = (straight.zoom * straight.focal).tolist()
                cx, cy = straight.middle.tolist()
                frames.append({"file_path": f"images/{t:06d}.png", "fl_x": fl_x, "fl_y": fl_y, "cx": cx, "cy": cy,
                               "w": W, "h": H, "transform_matrix": view.transform_matrix.tolist()})
                done.append(straight)
            if len(done) < len(order):
                raise ValueError(f"{film}: wanted a frame for each of the {len(order)} cameras of {path}, "
                                 f"got {len(done)}")
    return done, frames


def straight_tracks(path: Path, done: list[Straight], width: int, height: int) -> dict:
    """tracks.json with every box where the straight image has it; ValueError as in read_tracks."""
    read_tracks(path, len(done))
    tracks = read_json(path)
    for item in tracks["objects"]:
        for sight in item["frames"]:
            sight["box"] = straight_box(sight["box"], done[sight["frame"]], width, height)
    return tracks


def main(argv: list[str] | None = None) -> int:
    """What the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(description=desk.first_line(__doc__))
    parser.add_argument("scene", type=Path, nargs="?", help="folder with transforms.json and images/ or video.mp4")
    parser.add_argument("out", type=Path, nargs="?", help="where the straight scene goes")
    args = parser.parse_args(argv)
    if args.scene is None:
        K = torch.tensor([[800.0, 0, 320], [0, 800, 180], [0, 0, 1]])
        for lens in (Lens(), Lens(k1=-0.3, k2=0.1), Lens(k1=0.2), Lens(p1=0.01)):
            straight = straighten(lens, K, 640, 360)
            u, v = straight.to_straight(torch.tensor([0.0, 0.0])).tolist()
            print(f"{lens}: {straight.zoom:.3f} times the focal length; the filmed corner is at {u:.1f}, {v:.1f}")
        return 0
    if args.out is None:
        parser.error("wanted two folders: the scene, and where the straight one goes")

    def run() -> None:
        done = undistort_scene(args.scene, args.out)
        desk.say(f"{args.out}: {len(done)} frames, the focal length {done[0].zoom:.4f} times the filmed one's in the "
                 "first")
    return desk.serve("undistort", run)


if __name__ == "__main__":
    sys.exit(main())
