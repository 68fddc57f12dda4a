"""The camera's paths through a toy scene: a drive, out and back, a loop.

A path is poses [T, 4, 4], camera to world with OpenCV's axes. Training clips are drives. The other paths come back to
where they began, to try what remembers (a world model): in a scene that does not move, the last frame shows what the
first one showed.

    python -m mirage_min.data.toy_paths
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .toy_shapes import Body
from .toy_street import Draws, moving, turned

if TYPE_CHECKING:
    from .toy_world import WorldConfig

PATHS = "drive", "out_and_back", "loop"
KEPT = 3.0   # metres between the camera and what is ahead of it
LANE = 2.2   # metres to either side of the camera that have to be free


def drive(u: Draws, config: "WorldConfig") -> tuple[Tensor, float]:
    """Forward at some speed, with a little turn and pitch, 1.5 to 2 m up -> (path [T, 4, 4], metres a second)."""
    speed, turn = u(2, 12), u(-0.06, 0.06)
    c2w = moving(config, u(-0.4, 0.4), 0.0, yaw=u(-0.05, 0.05), speed=speed, turn=turn)
    p = u(0.06, 0.16)
    pitch = torch.eye(4)
    pitch[1:3, 1:3] = torch.tensor([[math.cos(p), math.sin(p)], [-math.sin(p), math.cos(p)]])
    c2w = c2w @ pitch
    c2w[:, 1, 3] = -u(1.5, 2.0)
    return c2w, speed


def free_way(bodies: list[Body], start: Tensor) -> float:
    """How many metres the camera can go along +z from its first pose [4, 4] before it comes near a vehicle."""
    free = math.inf
    for body in bodies:
        if body.size is None:
            continue
        corners = torch.cat([part.corners for part in body.parts]) @ body.pose[0, :3, :3].T + body.pose[0, :3, 3]
        x, _, z = (corners - start[:3, 3]).T
        in_the_way = x.amin() < LANE and x.amax() > -LANE and z.amax() > 0
        if in_the_way:
            free = min(free, float(z.amin()) - KEPT)
    return max(free, 0.5)


def out_and_back(path: Tensor, way: float) -> Tensor:
    """The first half of a drive [T, 4, 4], at most `way` metres of it, and the same poses back -> [T, 4, 4].

    The poses of frames t and T − 1 − t are equal, so an even number of frames has two equal ones in the middle.
    """
    T = len(path)
    out = (T + 1) // 2
    first = path[:out].clone()
    gone = first[:, :3, 3] - first[0, :3, 3]
    far = float(gone[-1].norm()) if out > 1 else 0.0
    if far > way:
        first[:, :3, 3] = first[0, :3, 3] + gone * (way / far)
    return torch.cat([first, first[: T - out].flip(0)])


def loop(path: Tensor, way: float, width: float = 1.2, swing: float = 0.25) -> Tensor:
    """Out on the right and back on the left, from the first pose of a path [T, 4, 4] to that pose again -> [T, 4, 4].

    At phase φ = 2π t / (T − 1) the camera is `way` (1 − cos φ) / 2 metres ahead and `width` sin φ to the right, and has
    turned by `swing` sin φ (radians, to the right).
    """
    T = len(path)
    phase = torch.arange(T) * (2 * math.pi / max(1, T - 1))
    start = path[0]
    found = path[:1].repeat(T, 1, 1)
    found[:, :3, :3] = turned(swing * phase.sin()) @ start[:3, :3]
    found[:, 0, 3] = start[0, 3] + width * phase.sin()
    found[:, 2, 3] = start[2, 3] + way * (1 - phase.cos()) / 2
    if T > 1:
        found[-1] = start  # exactly
    return found


def along(name: str, path: Tensor, bodies: list[Body], way: float = 0.0) -> Tensor:
    """The path [T, 4, 4] of a name (of PATHS) that begins as the drive `path` does; ValueError for another name.

    way  metres ahead, of paths that come back; 0: what is free, of a loop 8 at most
    """
    if name == "drive":
        return path
    free = free_way(bodies, path[0])
    if name == "out_and_back":
        return out_and_back(path, way or free)
    if name == "loop":
        return loop(path, way or min(free, 8.0))
    raise ValueError(f"path must be one of {', '.join(PATHS)}, got {name!r}")


if __name__ == "__main__":
    from .toy_world import WorldConfig

    path, speed = drive(Draws(0), WorldConfig(frames=9))
    for name in PATHS:
        poses = along(name, path, [])
        places = ", ".join(f"({x:.1f}, {z:.1f})" for x, z in poses[:, [0, 2], 3].tolist())
        print(f"{name:13} x and z in metres, of a drive at {speed:.1f} m/s: {places}")
