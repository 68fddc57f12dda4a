"""The streets of toy scenes: a road and its markings, the houses and trees along it, and the vehicles on it.

Everything is drawn from a seed's random numbers, in a fixed order, so that a seed always gives the same street. A new
thing along the road must be drawn at the end of that order, or from a separate generator.

    python -m mirage_min.data.toy_street
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .toy_shapes import Body, box_size, car, crown, house, noise, pole

if TYPE_CHECKING:
    from .toy_world import WorldConfig

CAR_COLORS = [(0.62, 0.60, 0.58), (0.55, 0.06, 0.05), (0.07, 0.16, 0.45), (0.30, 0.32, 0.34), (0.70, 0.66, 0.52),
              (0.08, 0.30, 0.16), (0.62, 0.36, 0.06), (0.10, 0.10, 0.11)]


class Draws:
    """The random numbers of a scene, drawn in the order in which it is built."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, low: float = 0.0, high: float = 1.0) -> float:
        """Evenly from low to high."""
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def pick(self, *values):
        """One of the values, each equally often."""
        return values[int(self(0, len(values) - 1e-6))]

    def color(self) -> Tensor:
        """A car's colour [3], linear RGB."""
        return (torch.tensor(self.pick(*CAR_COLORS)) * self(0.85, 1.15)).clamp(0, 0.9)


# ---- the road --------------------------------------------------------------------------------------------------------

@dataclass
class Road:
    """A straight road along z, in metres."""

    half: float                         # width
    lane: float                         # distance of the two dashed lines
    tone: float                         # albedo of the asphalt
    verge: tuple[float, float, float]   # albedo of what is next to it
    dash: float                         # length of the dashes
    phase: float                        # where they begin


def sample_road(u: Draws) -> Road:
    """A road."""
    return Road(half=u(5.0, 5.8), lane=u(3.2, 3.7), tone=u(0.16, 0.24),
                verge=u.pick((0.20, 0.26, 0.10), (0.34, 0.32, 0.28)), dash=u(2.5, 4.0), phase=u(0, 8))


def ground(road: Road, point: Tensor, depth: Tensor, seed: int) -> Tensor:
    """Albedo [M, 3] of the ground at points [M, 3], seen from this many metres [M]: asphalt, markings, verge.

    Detail fades where a pixel covers much of it.
    """
    x, _, z = point.T
    fade, fine = (1 - depth / 60).clamp(0, 1), (1 - depth / 18).clamp(0, 1)
    grain = 0.10 * fade * noise(x * 0.7, z * 0.35, seed) + 0.12 * fine * noise(x * 5, z * 5, seed + 1)
    asphalt = (road.tone * (1 + grain))[:, None].expand(-1, 3)
    verge = torch.tensor(road.verge) * (1 + 1.6 * grain)[:, None]
    edge = ((x.abs() - road.half) * 8).clamp(0, 1)[:, None]
    color = torch.lerp(asphalt, verge, edge)
    half = 0.07 + 0.004 * depth  # a line is at least so wide that a pixel can show it

    def line(at: float) -> Tensor:
        return ((half - (x - at).abs()) / (0.02 + 0.006 * depth) + 0.5).clamp(0, 1)
    dashed = (((z + road.phase) % (2.2 * road.dash)) < road.dash).float()
    marks = torch.maximum(line(-road.lane / 2) * dashed, line(road.lane / 2) * dashed)
    marks = torch.maximum(marks, torch.maximum(line(road.half - 0.3), line(0.3 - road.half)))
    return torch.lerp(color, torch.tensor([0.62, 0.62, 0.58]).expand_as(color), (0.85 * marks * fade)[:, None])


# ---- what moves, and what does not -----------------------------------------------------------------------------------

def moving(config: "WorldConfig", x: float, z: float, yaw: float, speed: float = 0.0, turn: float = 0.0) -> Tensor:
    """Poses [T, 4, 4] of something that leaves (x, 0, z), heading `yaw` (radians) from +z, at `speed` m/s, turning at
    `turn` rad/s; frame 0 is a step on."""
    T, dt = config.frames, 1 / config.fps
    angle = yaw + turn * (torch.arange(T) * dt)
    pose = torch.eye(4).repeat(T, 1, 1)
    pose[:, :3, :3] = turned(angle)
    pose[:, 0, 3] = x + torch.cumsum(speed * dt * angle.sin(), 0)
    pose[:, 2, 3] = z + torch.cumsum(speed * dt * angle.cos(), 0)
    return pose


def turned(angle: Tensor) -> Tensor:
    """Rotations [..., 3, 3] by angles [...] in radians about the vertical, from z towards x."""
    c, s, o = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return torch.stack([c, o, s, o, o + 1, o, -s, o, c], dim=-1).unflatten(-1, (3, 3))


def vehicle(config: "WorldConfig", size: tuple[float, float, float], color: Tensor, pose: Tensor, shape: str) -> Body:
    """A car of a shape, at poses [T, 4, 4], of a colour [3]; size: length, width and height, of which a shape may use
    another height."""
    parts = car(*size, shape)
    length, width, height = size
    box = torch.tensor([width, height, length])
    if shape != "saloon":
        box[1] = box_size(parts)[1]
    return Body(parts, color, pose, box)


def actor_and_traffic(u: Draws, config: "WorldConfig", c2w: Tensor, speed: float, shapes: list[str]) -> list[Body]:
    """The actor, ahead in this lane or a neighbouring one, seen from the rear, the front or the side; and other
    vehicles, parked or driving, elsewhere. Where the ego car would run into the actor, its path c2w [T, 4, 4] is slowed
    in place.

    shapes: keys of toy_shapes.CARS, taken in turn.
    """
    kind = u.pick("ahead", "ahead", "beside", "oncoming", "crossing")
    length, width, height = u(4.0, 4.9), u(1.75, 1.95), u(1.45, 1.85)
    z = u(7.5, 12.0)
    x, yaw, own = {"ahead": (u(-1.2, 1.2), u(-0.5, 0.5), speed + u(-1.0, 2.0)),
                   "beside": (u.pick(-1, 1) * u(2.0, 3.4), u(-0.5, 0.5), speed + u(-1.0, 2.0)),
                   "oncoming": (-u(2.0, 3.4), math.pi + u(-0.4, 0.4), u(0.0, 1.0)),
                   "crossing": (u(-2.0, 2.0), u.pick(-1, 1) * math.pi / 2 + u(-0.4, 0.4), u(0.0, 2.0))}[kind]
    if kind in ("oncoming", "crossing"):
        c2w[:, 2, 3] *= 0.25
        z = u(8.5, 13.0)
    color = u.color()
    bodies = [vehicle(config, (length, width, height), color, moving(config, x, z, yaw, own), shapes[0])]
    for i in range(int(u(1, 4))):
        side = u.pick(-1, 1)
        bx, bz = side * u(3.4, 6.5), u(4, 45)
        if abs(bz - z) < 6.5 and abs(bx - x) < 4.2:
            bz += 14
        size = (u(4.0, 5.2), u(1.75, 2.0), u(1.4, 2.1))
        color = u.color()
        pose = moving(config, bx, bz, u.pick(0, math.pi) + u(-0.1, 0.1), u(0, 6))
        bodies.append(vehicle(config, size, color, pose, shapes[(i + 1) % len(shapes)]))
    return bodies


def roadside(u: Draws, config: "WorldConfig") -> list[Body]:
    """Houses, poles and trees on both sides."""
    bodies = []
    for side in (-1, 1):
        at = u(-4, 8)
        while at < 75:
            depth, front, tall = u(8, 16), u(9.5, 15), u(3.5, 8)
            x0, x1 = sorted((side * front, side * (front + 10)))
            color = torch.tensor([u(0.25, 0.6)] * 3) * torch.tensor([u(0.9, 1.1), 1.0, u(0.8, 1.05)])
            if u() < 0.6:
                bodies.append(Body(house(x0, x1, tall, at, at + depth), color, moving(config, 0, 0, 0), None))
            at += depth + u(0.5, 8)
        for _ in range(int(u(1, 4))):
            px, pz, tall = side * u(5.2, 7.5), u(5, 40), u(3.5, 6)
            parts = pole(tall)
            if u() < 0.6:
                parts = parts + crown(tall, u(0.9, 1.5))
            bodies.append(Body(parts, torch.tensor([0.22, 0.18, 0.14]), moving(config, px, pz, u(0, 3)), None))
    return bodies


if __name__ == "__main__":
    u = Draws(0)
    road = sample_road(u)
    for x in (0.0, road.lane / 2, road.half - 0.3, road.half + 1):
        point = torch.tensor([[x, 0.0, 5.0]])
        shown = [round(v, 2) for v in ground(road, point, torch.tensor([5.0]), 0)[0].tolist()]
        print(f"{x:5.2f} m from the middle, 5 m away: albedo {shown}")
