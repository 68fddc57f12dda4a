"""How well the coarse 3D stage finds a known similarity: the figures of docs/alignment.md.

    python -m experiments.alignment                     # 200 trials of every case; writes docs/alignment.md

An asset is 600 points on the surface of a random car (toy_world's), in its own frame; the object is the same car at a
random place, yaw and scale. The object's points are drawn by themselves, from the same surface, save in the first row.

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
from pathlib import Path

import torch
from torch import Tensor

from mirage_min.data.align import Similarity, coarse_3d
from mirage_min.data.splat import Gaussians
from mirage_min.data.toy_world import FACES, car
from mirage_min.networks.weights import whole_file

CASES = ("copies", "clean", "noise", "floaters", "half", "all", "cut")


def surface(parts: list, N: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """N points drawn evenly from the outside of a union of prisms -> points [N, 3], normals [N, 3]"""
    corners = torch.stack([p.corners[list(face)] for p in parts for face in FACES])
    normals = torch.cat([p.normals for p in parts]).repeat_interleave(2, dim=0)
    triangles = torch.stack([corners[:, [0, 1, 2]], corners[:, [0, 2, 3]]], dim=1).flatten(0, 1)
    a, b, c = triangles.unbind(1)
    which = torch.multinomial(torch.linalg.cross(b - a, c - a).norm(dim=1), 4 * N, True, generator=draws)
    u = torch.rand(4 * N, 2, generator=draws)
    u = torch.where(u.sum(1, keepdim=True) > 1, 1 - u, u)
    x = a[which] + u[:, :1] * (b - a)[which] + u[:, 1:] * (c - a)[which]
    outside = ~torch.stack([(x @ p.normals.T < p.offsets - 1e-4).all(1) for p in parts]).any(0)
    return x[outside][:N], normals[which][outside][:N]


def gaussians(x: Tensor, opacity: Tensor) -> Gaussians:
    quats = torch.tensor([1.0, 0, 0, 0]).repeat(len(x), 1)
    return Gaussians(x, torch.full_like(x, -3), quats, torch.logit(opacity, 1e-3), torch.zeros(len(x), 1, 3))


def yaw(angle: float) -> Tensor:
    """About the vertical of OpenCV's axes: z turns towards x."""
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def trial(case: str, seed: int, N: int = 600) -> dict:
    """An asset, an object, the track's heading, and the truth."""
    draws = torch.Generator().manual_seed(seed)

    def u(a: float, b: float) -> float:
        return a + (b - a) * torch.rand((), generator=draws).item()

    length, width, height = u(3.8, 5.0), u(1.7, 2.0), u(1.4, 1.9)
    parts = car(length, width, height)
    asset, _ = surface(parts, N, draws)
    x, normals = (asset, None) if case == "copies" else surface(parts, 4 * N, draws)
    if case in ("half", "all"):
        azimuth, elevation = u(-math.pi, math.pi), math.radians(u(3, 20))
        camera = torch.tensor([math.cos(elevation) * math.sin(azimuth), -math.sin(elevation),
                               math.cos(elevation) * math.cos(azimuth)])
        x = x[normals @ camera > 0]
    x = x[:N]
    if case == "cut":
        azimuth = u(-math.pi, math.pi)
        x = x[x[:, 0] * math.sin(azimuth) + x[:, 2] * math.cos(azimuth) > 0]
    if case in ("noise", "all"):
        along = torch.nn.functional.normalize(torch.randn(x.shape, generator=draws), dim=1)
        x = x + length * (0.02 * along * torch.randn(len(x), 1, generator=draws)
                          + 0.005 * torch.randn(x.shape, generator=draws))
    opacity, centre = torch.full((len(x),), 0.9), torch.tensor([0, -height / 2, 0])
    if case in ("floaters", "all"):
        size = torch.tensor([width, height, length])
        off = centre + 2 * size * (torch.rand(len(x) // 9, 3, generator=draws) - 0.5)
        x, opacity = torch.cat([x, off]), torch.cat([opacity, torch.rand(len(off), generator=draws)])
    s, R, t = u(0.3, 3.0), yaw(u(-math.pi, math.pi)), 30 * torch.randn(3, generator=draws)
    return {"asset": gaussians(asset, torch.full((N,), 0.9)), "obj": gaussians(s * x @ R.T + t, opacity),
            "heading": R @ yaw(math.radians(u(-30, 30))) @ torch.tensor([0.0, 0, 1]), "truth": (s, R, t),
            "centre": centre, "size": s * length}


def errors(found: Similarity, known: dict) -> tuple[float, float, float]:
    """(centre in % of the size, yaw in degrees, scale in %) of a similarity."""
    (s, R, t), (s0, R0, t0), c = found, known["truth"], known["centre"]
    turn = R @ R0.T
    centre = ((s * R @ c + t) - (s0 * R0 @ c + t0)).norm() / known["size"] * 100
    degrees = math.degrees(math.atan2(turn[0, 2] - turn[2, 0], turn[0, 0] + turn[2, 2]))
    return centre.item(), abs(degrees), abs(s / s0 - 1).item() * 100


def measure(case: str, trials: int, heading: bool = True) -> Tensor:
    """[trials, 3] errors of the seeds 0, 1, ..."""
    known = [trial(case, seed) for seed in range(trials)]
    return torch.tensor([errors(coarse_3d(k["asset"], k["obj"], k["heading"] if heading else None), k) for k in known])


def main(args) -> None:
    """Measure every case and write the table."""
    torch.set_num_threads(1)
    lines = [f"# Coarse 3D alignment: {args.trials} random trials a row", "",
             "Made by `python -m experiments.alignment`, which says what the rows are. Median (90th percentile) of the",
             "errors; flips are yaw errors of more than 90°.", "",
             "| case | centre, % of the length | yaw, degrees | scale, % | flips |", "|---|---|---|---|---|"]
    start = time.process_time()
    for case, heading in [*((case, True) for case in CASES), ("all", False)]:
        e = measure(case, args.trials, heading)
        columns = [f"{m:.3f} ({q:.3f})" for m, q in e.quantile(torch.tensor([0.5, 0.9]), dim=0).T.tolist()]
        name = case if heading else f"{case}, no heading given"
        lines.append(f"| {name} | {' | '.join(columns)} | {int((e[:, 1] > 90).sum())} |")
        print(lines[-1], flush=True)
    seconds = (time.process_time() - start) / args.trials / (len(CASES) + 1)
    lines += ["", f"One alignment took {seconds:.2f} s of one core on average, the making of its trial included.", ""]
    with whole_file(args.out) as temporary:
        temporary.write_text("\n".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=200, help="of every case")
    parser.add_argument("--out", type=Path, default=Path("docs/alignment.md"))
    main(parser.parse_args())
