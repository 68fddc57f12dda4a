"""The solids of toy scenes: cars of several shapes, houses, poles and trees, and how they are painted.

Everything solid is a union of convex parts, each an intersection of half-spaces, in the object's own coordinates: x
right, y down, z forward, the ground at y = 0. A new shape is a function that returns parts, entered into CARS; a new
paint is a function of the points that a ray meets, entered into PAINTS.

    python -m mirage_min.data.toy_shapes
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as nnf


@dataclass
class Part:
    """A convex part in its object's coordinates: points p with normals @ p <= offsets."""

    normals: Tensor   # [K, 3], unit
    offsets: Tensor   # [K]
    paint: str        # a key of PAINTS
    corners: Tensor   # [M, 3], for culling


@dataclass
class Body:
    """A solid: convex parts, a colour, and where it is in every frame."""

    parts: list[Part]
    color: Tensor         # [3], linear RGB
    pose: Tensor          # [T, 4, 4], object to world
    size: Tensor | None   # [3] width, height, length of a vehicle; None for what is not a vehicle


FACES = (4, 5, 6, 7), (3, 2, 1, 0), (0, 1, 5, 4), (1, 2, 6, 5), (2, 3, 7, 6), (3, 0, 4, 7)  # corners of a prism's faces


def prism(x: tuple[float, float], y: tuple[float, float], z: tuple[float, float],
          top: tuple[float, float, float] = (1.0, 1.0, 0.0), paint: str = "plain") -> Part:
    """A box over these ranges, y from the top to the bottom; its top is scaled by top[:2] in x and z and shifted by
    top[2] in z."""
    (x0, x1), (y0, y1), (z0, z1) = x, y, z
    cx, hx = (x0 + x1) / 2, (x1 - x0) / 2
    cz, hz = (z0 + z1) / 2, (z1 - z0) / 2
    signs = ((-1, -1), (1, -1), (1, 1), (-1, 1))
    low = [(cx + sx * hx, y1, cz + sz * hz) for sx, sz in signs]
    high = [(cx + sx * hx * top[0], y0, cz + sz * hz * top[1] + top[2]) for sx, sz in signs]
    c = torch.tensor(low + high)
    n = torch.stack([torch.linalg.cross(c[b] - c[a], c[d] - c[b]) for a, b, d, _ in FACES])
    n = nnf.normalize(n, dim=1)
    first = c[[face[0] for face in FACES]]
    n = n * torch.sign((n * (first - c.mean(0))).sum(1, keepdim=True))  # outwards
    return Part(n, (n * first).sum(1), paint, c)


# ---- cars ------------------------------------------------------------------------------------------------------------

def wheels(half: float, w: float) -> list[Part]:
    """Four of them, for a car of this half length and half width."""
    parts = []
    for sx in (-1, 1):
        for z in (-0.62 * half, 0.62 * half):
            x = sorted((sx * w * 1.01, sx * w * 0.75))
            parts.append(prism(x, (-0.62, 0.0), (z - 0.31, z + 0.31), (1.0, 0.75, 0.0), "wheel"))
    return parts


def saloon(half: float, w: float, height: float) -> list[Part]:
    """A body, and a cabin that leans back, between a hood and a boot."""
    waist = -0.6 * height
    return [prism((-w, w), (waist, -0.22), (-half, half), (0.94, 0.97, 0.0), "body"),
            prism((-0.92 * w, 0.92 * w), (-height, waist), (-0.78 * half, 0.42 * half), (0.8, 0.62, -0.16 * half),
                  "cabin")]


def hatchback(half: float, w: float, height: float) -> list[Part]:
    """A cabin that reaches the very end, with a steep rear window."""
    waist = -0.58 * height
    return [prism((-w, w), (waist, -0.22), (-half, half), (0.94, 0.96, 0.0), "body"),
            prism((-0.93 * w, 0.93 * w), (-height, waist), (-0.97 * half, 0.40 * half), (0.82, 0.72, -0.12 * half),
                  "cabin")]


def van(half: float, w: float, height: float) -> list[Part]:
    """A box with a short, sloping front; higher than the other cars."""
    tall, waist = 1.25 * height, -0.62 * height
    return [prism((-w, w), (waist, -0.22), (-half, half), (0.97, 0.98, 0.0), "body"),
            prism((-0.97 * w, 0.97 * w), (-tall, waist), (-0.98 * half, 0.78 * half), (0.92, 0.84, -0.13 * half),
                  "cabin")]


def pickup(half: float, w: float, height: float) -> list[Part]:
    """A cabin in the middle, and a bed between low walls after it."""
    waist = -0.56 * height
    walls = [prism((s * w - 0.06, s * w + 0.06), (waist - 0.18, waist), (-0.98 * half, -0.25 * half), paint="body")
             for s in (-0.93, 0.93)]
    return [prism((-w, w), (waist, -0.30), (-half, half), (0.96, 0.98, 0.0), "body"), *walls,
            prism((-0.90 * w, 0.90 * w), (-height, waist), (-0.25 * half, 0.45 * half), (0.82, 0.66, -0.04 * half),
                  "cabin")]


CARS = {"saloon": saloon, "hatchback": hatchback, "van": van, "pickup": pickup}


def car(length: float, width: float, height: float, shape: str = "saloon") -> list[Part]:
    """A car of a shape (a key of CARS), in metres, facing +z."""
    return CARS[shape](length / 2, width / 2, height) + wheels(length / 2, width / 2)


def box_size(parts: list[Part]) -> Tensor:
    """[3]: width, height and length of the box around parts."""
    corners = torch.cat([part.corners for part in parts])
    return corners.amax(0) - corners.amin(0)


# ---- along the road --------------------------------------------------------------------------------------------------

def house(x0: float, x1: float, tall: float, z0: float, z1: float) -> list[Part]:
    """A block with windows."""
    return [prism((x0, x1), (-tall, 0.0), (z0, z1), paint="wall")]


def pole(tall: float) -> list[Part]:
    """A square post."""
    return [prism((-0.09, 0.09), (-tall, 0.0), (-0.09, 0.09))]


def crown(tall: float, r: float) -> list[Part]:
    """The leaves of a tree whose trunk is a pole of this height."""
    return [prism((-r, r), (-tall - r, -tall * 0.55), (-r, r), (0.55, 0.55, 0.0), "leaves")]


# ---- paint: (body, points of it, seed) -> linear RGB albedo [M, 3] ---------------------------------------------------

@dataclass
class Points:
    """Points of one part that rays have met."""

    local: Tensor     # [M, 3] in the body's coordinates
    normal: Tensor    # [M, 3] in the world
    depth: Tensor     # [M] metres from the camera


def noise(x: Tensor, y: Tensor, seed: int) -> Tensor:
    """Smooth value noise in [-1, 1] at coordinates of any shape, one cell to a unit."""
    i, j = x.floor().long(), y.floor().long()
    u, v = x - i, y - j
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    top = torch.lerp(lattice(i, j, seed), lattice(i + 1, j, seed), u)
    bottom = torch.lerp(lattice(i, j + 1, seed), lattice(i + 1, j + 1, seed), u)
    return torch.lerp(top, bottom, v)


def lattice(i: Tensor, j: Tensor, seed: int) -> Tensor:
    """The noise at whole coordinates: a hash of them and the seed, in [-1, 1]."""
    h = (i * 374761393 + j * 668265263 + seed * 974711) & 0x7FFFFFFF
    h = ((h ^ (h >> 13)) * 1274126177) & 0x7FFFFFFF
    return ((h ^ (h >> 16)) & 0xFFFF).float() / 32767.5 - 1


def plain(body: Body, points: Points, seed: int) -> Tensor:
    """The body's colour, [M, 3], as every paint returns it."""
    return body.color.expand(len(points.local), 3).clone()


def tyre(body: Body, points: Points, seed: int) -> Tensor:
    """Nearly black."""
    return torch.full_like(points.local, 0.03)


def leaves(body: Body, points: Points, seed: int) -> Tensor:
    """Mottled green."""
    x, y, z = points.local.T
    return torch.tensor([0.10, 0.20, 0.06]) * (1 + 0.5 * noise(x * 3 + y * 2, z * 3 + y, seed))[:, None]


def wall(body: Body, points: Points, seed: int) -> Tensor:
    """The body's colour with rows of windows, which fade with distance."""
    x, y, z = points.local.T
    fade = (1 - points.depth / 70).clamp(0, 1)
    along = torch.where(points.normal[:, 0].abs() > 0.5, z, x)
    window = ((along % 3.0 - 1.5).abs() < 0.7) & ((y % 3.2 - 1.5).abs() < 0.75) & (y < -0.6)
    color = body.color.expand(len(x), 3).clone()
    return torch.lerp(color, torch.tensor([0.06, 0.08, 0.11]).expand_as(color), (0.8 * fade * window)[:, None])


def cabin(body: Body, points: Points, seed: int) -> Tensor:
    """The car's colour, and glass."""
    color = body.color.expand(len(points.local), 3).clone()
    color[is_glass(body, points)] = torch.tensor([0.035, 0.045, 0.055])
    return color


def is_glass(body: Body, points: Points) -> Tensor:
    """Which points of a cabin are glass [M]: between waist and roof, on faces that are not level."""
    y, h = points.local[:, 1], body.size[1]
    return (y > -0.96 * h) & (y < -0.64 * h) & (points.normal[:, 1].abs() < 0.8)


def car_body(body: Body, points: Points, seed: int) -> Tensor:
    """The car's colour, a dark sill, lamps and number plates."""
    x, y, z = points.local.T
    w, h, length = body.size
    color = body.color.expand(len(x), 3).clone()
    low = y > -0.24 * h
    color[low] = color[low] * 0.25
    side = x.abs() > 0.30 * w
    lamp = (y < -0.40 * h) & (y > -0.56 * h) & side
    color[lamp & (z < -0.46 * length)] = torch.tensor([0.45, 0.02, 0.02])
    color[lamp & (z > 0.46 * length)] = torch.tensor([0.80, 0.80, 0.75])
    plate = (x.abs() < 0.13 * w) & (y > -0.42 * h) & (y < -0.32 * h) & (z.abs() > 0.46 * length)
    color[plate] = 0.55
    return color


Paint = Callable[[Body, Points, int], Tensor]
PAINTS: dict[str, Paint] = {"plain": plain, "wheel": tyre, "leaves": leaves, "wall": wall, "cabin": cabin,
                            "body": car_body}


def albedo(body: Body, k: int, points: Points, seed: int) -> Tensor:
    """Linear RGB albedo [M, 3] of a body's k-th part at points of it."""
    return PAINTS[body.parts[k].paint](body, points, seed)


def gloss(body: Body, k: int, points: Points) -> Tensor:
    """How much of a mirror a body's k-th part is at points of it [M], 0 to 1: glass 1, a car's paint a half."""
    paint = body.parts[k].paint
    shine = torch.full((len(points.local),), 0.5 if paint in ("body", "cabin") else 0.0)
    return torch.where(is_glass(body, points), 1.0, shine) if paint == "cabin" else shine


if __name__ == "__main__":
    for name in CARS:
        parts = car(4.5, 1.8, 1.5, name)
        width, height, length = box_size(parts).tolist()
        print(f"{name:10} {len(parts)} parts, {width:.2f} wide, {height:.2f} high, {length:.2f} long")
