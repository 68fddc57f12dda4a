"""What a person writes down about the camera and the light of a recorded street, so that a car can be put into it.

They are in NAME.street.json, next to the clip NAME.safetensors, measured by eye on one frame:

    focal     the focal length in image widths; 0.9 is a field of view of 58 degrees
    horizon   the row where the road would vanish, in image heights from the top
    centre    the column of straight ahead, in image widths from the left
    height    of the camera above the road, metres
    lanes     where cars may drive: [[metres to the right of the camera, heading in degrees from straight ahead], …]
    near, far how far ahead a car may be inserted, metres
    sun       [azimuth, elevation] in degrees: azimuth from straight ahead, positive to the right
    shadow    the share of a road's light that remains where the sun is hidden: 0.35 on a clear day, 1 under clouds
    asphalt   the road's albedo: 0.08 new and dark, 0.25 concrete; how bright a car is next to it follows from that
    warmth    how much redder than blue the sun is

    {"focal": 0.9, "horizon": 0.585, "height": 1.3, "lanes": [[0.3, 0], [3.9, 0]], "sun": [-120, 62]}

Only focal and horizon are required. Of the clips that real_clips.py fetches the numbers are known (STREETS); a file
next to such a clip changes single ones. To check them, draw the ground they mean over a frame:

    python -m mirage_min.data.street_camera --clips data/real/train --grid grid.png
    python -m mirage_min.data.street_camera                # how numbers become a camera, and what is refused
"""

if __name__ == "__main__":
    from . import desk

    desk.open_up()  # before the imports that take seconds

import argparse
import sys
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from ..networks import checked
from ..networks.checked import Within
from ..networks.weights import read_json
from . import desk
from .pixels import from_bytes, to_uint8
from .real_clips import resize, shape_of


@dataclass(frozen=True)
class Street:
    """What is known of a recording's camera and light; the fields are explained at the top of this file."""

    focal: Annotated[float, Within(0.2, 5)]
    horizon: Annotated[float, Within(-0.5, 1.5)]
    centre: Annotated[float, Within(-1, 2)] = 0.5
    height: Annotated[float, Within(0.3, 5)] = 1.4
    lanes: tuple[tuple[float, ...], ...] = ((0.0, 0.0),)
    near: Annotated[float, Within(1, 200)] = 8.0
    far: Annotated[float, Within(1, 200)] = 25.0
    sun: tuple[float, ...] = (150.0, 50.0)
    shadow: Annotated[float, Within(0.05, 1)] = 0.35
    asphalt: Annotated[float, Within(0.02, 0.6)] = 0.1
    warmth: Annotated[float, Within(-0.5, 0.5)] = 0.15

    def __post_init__(self):
        if not self.near < self.far:
            raise ValueError(f"near must be less than far, got {self.near} and {self.far}")
        if any(len(lane) != 2 for lane in self.lanes) or len(self.sun) != 2:
            raise ValueError(f"sun and each of lanes must be two numbers, got {self.sun} and {self.lanes}")


# Of the clips in real_clips.py: measured by eye on one frame, checked with --grid.
PROJECT_VIDEO = Street(focal=0.9, horizon=0.585, centre=0.50, height=1.3, lanes=((0.3, 0), (3.9, 0)), near=8, far=26,
                       sun=(-120, 62), shadow=0.34, asphalt=0.08)
pandaset = partial(Street, focal=0.98, height=1.6, shadow=0.85, asphalt=0.12)  # what its cameras have in common
STREETS = {
    "highway_dashcam": Street(focal=0.95, horizon=0.575, centre=0.49, height=1.3, lanes=((-3.7, 0), (-0.2, 0)),
                              near=9, far=30, sun=(-120, 58), shadow=0.35, asphalt=0.10),
    "U1a_project_video_000-199": PROJECT_VIDEO,
    "U1b_project_video_125-299": PROJECT_VIDEO,
    "U3_challenge_video": Street(focal=0.9, horizon=0.60, centre=0.52, height=1.3, lanes=((0.6, 0), (4.2, 0)),
                                 near=8, far=26, sun=(-100, 50), shadow=0.36, asphalt=0.25),
    "U4_project_video_later": PROJECT_VIDEO,
    "front_camera": pandaset(horizon=0.52, lanes=((-3.4, 0), (-6.6, 180)), near=9, far=24, sun=(-60, 25)),
    "back_camera": pandaset(horizon=0.50, lanes=((0.4, 180), (3.8, 180)), near=13, far=26, sun=(120, 25)),
    "front_left_camera": pandaset(horizon=0.52, lanes=((-1.0, 60), (2.0, 235)), near=8, far=16, sun=(0, 25)),
    "left_camera": pandaset(horizon=0.52, lanes=((0.0, 90), (0.0, 270)), near=8, far=14, sun=(-20, 20)),
}


# ---- the file --------------------------------------------------------------------------------------------------------

def street_of(clip: Path) -> Street | None:
    """What is known of a clip's camera: NAME.street.json next to it over what STREETS says; None: nothing.

    ValueError of one line if the file is wrong.
    """
    known, file = STREETS.get(clip.stem), clip.with_suffix(".street.json")
    if not file.exists():
        return known
    written, names = read_json(file), [field.name for field in fields(Street)]
    if unknown := sorted(written.keys() - set(names)):
        raise ValueError(f"{file}: {unknown[0]}: wanted only the fields {', '.join(names)}")
    return checked.record(Street, (asdict(known) if known else {}) | written, file)


def clips_of_known_streets(folder: Path) -> dict[Path, Street]:
    """The clips of a folder, in order, whose cameras are known. ValueError if there are none, or one is not a clip."""
    found = {clip: street_of(clip) for clip in sorted(folder.glob("*.safetensors"))}
    found = {clip: street for clip, street in found.items() if street is not None}
    if not found:
        raise ValueError(f"{folder}: no clip of a known camera (NAME.safetensors with NAME.street.json: "
                         "mirage_min/data/street_camera.py)")
    for clip in found:
        shape_of(clip)
    return found


# ---- what the numbers mean -------------------------------------------------------------------------------------------

def intrinsics(street: Street, H: int, W: int) -> Tensor:
    """K [3, 3] in pixels; straight ahead, on the horizon, is the principal point of a camera that looks level."""
    f = street.focal * W
    return torch.tensor([[f, 0.0, street.centre * W], [0.0, f, street.horizon * H], [0.0, 0.0, 1.0]])


def ground_grid(x: Tensor, street: Street) -> Tensor:
    """x [3, H, W] -> the same with lines on the road: every metre across, every 5 m ahead, the lanes in green."""
    H, W = x.shape[-2:]
    K, x = intrinsics(street, H, W), x.clone()
    across, ahead = torch.linspace(-8, 8, 1200), torch.linspace(4, 40, 2500)
    lanes = torch.tensor([right for right, _ in street.lanes])
    for points, color in ((torch.cartesian_prod(across, torch.arange(5.0, 45, 5)), (1.0, -1.0, -1.0)),
                          (torch.cartesian_prod(torch.arange(-8.0, 9), ahead), (1.0, 0.0, -1.0)),
                          (torch.cartesian_prod(lanes, ahead), (-1.0, 1.0, -1.0))):
        right, z = points.T
        column = (K[0, 2] + K[0, 0] * right / z).long()
        row = (K[1, 2] + K[1, 1] * street.height / z).long()
        seen = (row >= 0) & (row < H) & (column >= 0) & (column < W)
        x[:, row[seen], column[seen]] = torch.tensor(color)[:, None]
    return x


def draw_grids(folder: Path, to: Path) -> None:
    """The ground grid over the first frame of each clip of a folder, one below the other."""
    pictures = []
    for clip, street in clips_of_known_streets(folder).items():
        with safe_open(clip, framework="pt") as file:
            x = from_bytes(file.get_slice("x")[:, :1])
        pictures.append(ground_grid(resize(x, (360, 640))[:, 0], street))
    Image.fromarray(to_uint8(torch.cat(pictures, dim=1))).save(to)


def demonstrate() -> None:
    """A camera from its numbers."""
    street = Street(0.9, 0.45)
    K = intrinsics(street, 96, 160)
    for z in (8, 16, 32):
        row = K[1, 2] + K[1, 1] * street.height / z
        print(f"the road {z:2} m ahead is seen in row {row:.1f} of 96")
    for text in ({"focal": 9, "horizon": 0.5}, {"focal": 0.9}, {"focal": 0.9, "horizon": 0.5, "near": 30}):
        try:
            checked.record(Street, text, "drive.street.json")
        except ValueError as error:
            print("refused:", error)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=desk.first_line(__doc__))
    parser.add_argument("--clips", type=Path, default=Path("data/real/train"), help="folder of clips (real_clips.py)")
    parser.add_argument("--grid", type=Path, help="write the ground grid over a frame of each clip here")
    args = parser.parse_args()
    run = partial(draw_grids, args.clips, args.grid) if args.grid else demonstrate
    sys.exit(desk.serve("street_camera", run))
