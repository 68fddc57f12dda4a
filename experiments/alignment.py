"""How well the coarse 3D stage of alignment finds a known similarity (Mirage §3.3).

    python -m experiments.alignment         # 200 trials of every case, three minutes; writes alignment.md

An asset is 600 points on the surface of a random car (toy_world's), in its own frame; the object is the same car at a
random place, yaw and scale. The object's points are drawn by themselves, from the same surface, except in the first
row.

    copies      the asset's own points: every point has its counterpart, and the moments alone give the answer
    clean       nothing but the other draw
    noise       along a random direction by 2 % of the length, across it by 0.5 % (standard deviations)
    floaters    10 % of the points lie anywhere in a box of twice the car's size, at random opacities
    half        only faces that look towards one distant camera, 3 to 20 degrees above the ground
    all         noise, floaters and half at once
    cut         harder than any camera makes it: all points behind a vertical plane through the centre are gone

The heading that is given is wrong by up to 30 degrees. Errors are those of the centre of the asset's box, in % of the
car's length, of the yaw in degrees, and of the scale in %.
"""

import argparse
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as nnf

from experiments import common
from mirage_min.data.align import Similarity, coarse_3d
from mirage_min.data.splat import Gaussians
from mirage_min.data.toy_shapes import FACES, Part, car

CASES = ("copies", "clean", "noise", "floaters", "half", "all", "cut")


@dataclass
class Trial:
    """A problem for coarse_3d and its solution."""

    asset: Gaussians
    obj: Gaussians
    heading: Tensor    # [3] as the track has it
    truth: Similarity  # asset to object
    centre: Tensor     # [3] of the asset's box, in its own coordinates
    length: float      # of the object


class Draws:
    """Random numbers of a seed, in the order in which a trial asks for them."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def number(self, low: float, high: float) -> float:
        """Evenly from low to high."""
        return low + (high - low) * torch.rand((), generator=self.generator).item()

    def even(self, *shape: int) -> Tensor:
        """Evenly from 0 to 1."""
        return torch.rand(*shape, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        """From the normal distribution."""
        return torch.randn(*shape, generator=self.generator)


def surface(parts: list[Part], N: int, draws: Draws) -> tuple[Tensor, Tensor]:
    """N points drawn evenly from the outside of a union of prisms -> points [N, 3], normals [N, 3]."""
    corners = torch.stack([p.corners[list(face)] for p in parts for face in FACES])
    normals = torch.cat([p.normals for p in parts]).repeat_interleave(2, dim=0)
    triangles = torch.stack([corners[:, [0, 1, 2]], corners[:, [0, 2, 3]]], dim=1).flatten(0, 1)
    a, b, c = triangles.unbind(1)
    areas = torch.linalg.cross(b - a, c - a).norm(dim=1)
    which = torch.multinomial(areas, 4 * N, True, generator=draws.generator)
    u = draws.even(4 * N, 2)
    u = torch.where(u.sum(1, keepdim=True) > 1, 1 - u, u)
    x = a[which] + u[:, :1] * (b - a)[which] + u[:, 1:] * (c - a)[which]
    inside = torch.stack([(x @ p.normals.T < p.offsets - 1e-4).all(1) for p in parts]).any(0)
    return x[~inside][:N], normals[which][~inside][:N]


def points(x: Tensor, opacity: Tensor) -> Gaussians:
    """Small Gaussians at x [N, 3] with opacities [N] in [0, 1]."""
    quats = torch.tensor([1.0, 0, 0, 0]).repeat(len(x), 1)
    return Gaussians(x, torch.full_like(x, -3), quats, torch.logit(opacity, 1e-3), torch.zeros(len(x), 1, 3))


def yaw(angle: float) -> Tensor:
    """[3, 3]: a turn by an angle in radians about the vertical of OpenCV's axes, z towards x."""
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def seen_from_one_side(x: Tensor, normals: Tensor, draws: Draws) -> Tensor:
    """Those of the points [N, 3] whose faces look towards a distant camera."""
    azimuth = draws.number(-math.pi, math.pi)
    elevation = math.radians(draws.number(3, 20))
    camera = torch.tensor([math.cos(elevation) * math.sin(azimuth), -math.sin(elevation),
                           math.cos(elevation) * math.cos(azimuth)])
    return x[normals @ camera > 0]


def make_trial(case: str, seed: int, N: int = 600) -> Trial:
    """The trial of a case and a seed, with N points on either side."""
    draws = Draws(seed)
    length, width, height = draws.number(3.8, 5.0), draws.number(1.7, 2.0), draws.number(1.4, 1.9)
    parts = car(length, width, height)
    asset, normals = surface(parts, N, draws)
    x = asset
    if case != "copies":
        x, normals = surface(parts, 4 * N, draws)
    if case in ("half", "all"):
        x = seen_from_one_side(x, normals, draws)
    x = x[:N]
    if case == "cut":
        azimuth = draws.number(-math.pi, math.pi)
        x = x[x[:, 0] * math.sin(azimuth) + x[:, 2] * math.cos(azimuth) > 0]
    if case in ("noise", "all"):
        along = nnf.normalize(draws.normal(*x.shape), dim=1)
        x = x + length * (0.02 * along * draws.normal(len(x), 1) + 0.005 * draws.normal(*x.shape))
    opacity = torch.full((len(x),), 0.9)
    centre = torch.tensor([0, -height / 2, 0])
    if case in ("floaters", "all"):
        floaters = centre + 2 * torch.tensor([width, height, length]) * (draws.even(len(x) // 9, 3) - 0.5)
        x = torch.cat([x, floaters])
        opacity = torch.cat([opacity, draws.even(len(floaters))])
    s = draws.number(0.3, 3.0)
    R = yaw(draws.number(-math.pi, math.pi))
    t = 30 * draws.normal(3)
    heading = R @ yaw(math.radians(draws.number(-30, 30))) @ torch.tensor([0.0, 0, 1])
    return Trial(asset=points(asset, torch.full((N,), 0.9)), obj=points(s * x @ R.T + t, opacity), heading=heading,
                 truth=(s, R, t), centre=centre, length=s * length)


def errors(found: Similarity, trial: Trial) -> tuple[float, float, float]:
    """(centre in % of the length, yaw in degrees, scale in %): how far a similarity is from the truth of a trial."""
    s, R, t = found
    s0, R0, t0 = trial.truth
    centre = s * R @ trial.centre + t
    centre0 = s0 * R0 @ trial.centre + t0
    turn = R @ R0.T
    degrees = math.degrees(math.atan2(turn[0, 2] - turn[2, 0], turn[0, 0] + turn[2, 2]))
    return ((centre - centre0).norm() / trial.length * 100).item(), abs(degrees), abs(s / s0 - 1).item() * 100


def measure(case: str, trials: int, heading: bool = True) -> Tensor:
    """The errors [trials, 3] of the seeds 0, 1, ..., with the track's heading or without."""
    found = []
    for seed in range(trials):
        trial = make_trial(case, seed)
        similarity = coarse_3d(trial.asset, trial.obj, trial.heading if heading else None)
        found.append(errors(similarity, trial))
    return torch.tensor(found)


HEAD = """# Coarse 3D alignment: {trials} random trials a row

Made by `python -m experiments.alignment`, which says what the rows are. Median (90th percentile) of the
errors; flips are yaw errors of more than 90°.

| case | centre, % of the length | yaw, degrees | scale, % | flips |
|---|---|---|---|---|"""


def main(args: argparse.Namespace) -> None:
    """Measure every case and write the table."""
    torch.set_num_threads(1)
    lines = [HEAD.format(trials=args.trials)]
    start = time.process_time()
    for case, heading in [*((case, True) for case in CASES), ("all", False)]:
        e = measure(case, args.trials, heading)
        quantiles = e.quantile(torch.tensor([0.5, 0.9]), dim=0).T.tolist()
        columns = [f"{median:.3f} ({ninetieth:.3f})" for median, ninetieth in quantiles]
        name = case if heading else f"{case}, no heading given"
        lines.append(f"| {name} | {' | '.join(columns)} | {int((e[:, 1] > 90).sum())} |")
        print(lines[-1], flush=True)
    seconds = (time.process_time() - start) / args.trials / (len(CASES) + 1)
    lines += ["", f"One alignment took {seconds:.2f} s of one core on average, the making of its trial included.", ""]
    common.save_text(args.out / "alignment.md", "\n".join(lines))


def flags() -> argparse.ArgumentParser:
    parser = common.flags(__doc__)
    parser.add_argument("--trials", type=int, default=200, help="of every case (default 200)")
    return parser


if __name__ == "__main__":
    common.start(main, flags())
