"""A rendered car on a real street: pairs whose street is a recording and whose shadow is known (Mirage §3.3).

The truth is the recording with a toy car composited in, lit by that street's sun and sky, with its cast and its contact
shadow. The naive insertion is the same car under another light, without either. What the renderer must know of the
recording are a few numbers that a person can write down from one frame, a `Street` (street_camera.py).

    pair = make_pair(clip, STREETS["U3_challenge_video"], (192, 320), 9, draws)

    python -m mirage_min.data.street --clips data/real/train --out data/street --count 200     # pairs for training
    python -m mirage_min.data.street                                            # a car on a made-up road: street.png
"""

if __name__ == "__main__":
    from . import desk

    desk.open_up()  # before the imports that take seconds

import argparse
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from torch import Generator, Tensor

from ..networks.weights import save_tensors
from . import desk
from .align import mask_box
from .photometric import uniform
from .pixels import from_bytes, to_bytes, to_uint8
from .real_clips import shape_of, shrink, window_about
from .street_camera import Street, clips_of_known_streets, intrinsics
from .toy_light import Light, contact, shade
from .toy_render import Scene, blocked, cast, project, to_pixels
from .toy_shapes import Body, albedo, car
from .toy_street import CAR_COLORS, turned
from .toy_world import height_x_width

GAMMA = 2.2  # between a file's values and linear light, roughly


@dataclass
class Pair:
    """A naive insertion, the truth, the car's alpha and its boxes."""

    x_ni: Tensor     # [3, T, H, W] in [-1, 1]
    x_gt: Tensor     # [3, T, H, W] in [-1, 1]
    actor: Tensor    # [1, T, H, W] in [0, 1]
    boxes: Tensor    # [T, 4] x0, y0, x1, y1 in pixels


@dataclass
class Shot:
    """A piece of a recording and the car that is to be put into it."""

    x: Tensor        # [3, T, H, W] in [-1, 1]
    scene: Scene     # the car, its light and a wrong one
    K: Tensor        # [3, 3] of the piece
    shadow: float    # `Street`'s
    white: Tensor    # [3] linear light: how bright a road of albedo 1 would be


def make_pair(clip: Path, street: Street, size: tuple[int, int], frames: int, draws: Generator) -> Pair:
    """One pair of `size` rows and columns from a clip's file: a random time, scale and crop with the car in it."""
    return insert(**vars(shoot(clip, street, size, frames, draws)))


def shoot(clip: Path, street: Street, size: tuple[int, int], frames: int, draws: Generator) -> Shot:
    """The piece of a clip's file, and the car, of make_pair. ValueError if the clip has fewer frames."""
    h, w = size
    with safe_open(clip, framework="pt") as file:
        x = file.get_slice("x")
        T = x.get_shape()[1]
        if T < frames:
            raise ValueError(f"{clip}: wanted at least {frames} frames, got {T}")
        t = int(torch.randint(T - frames + 1, (), generator=draws))
        x = from_bytes(x[:, t : t + frames])
    x = shrink(x, size, 1.8, draws)
    scene = sample_car(street, frames, draws)
    K = intrinsics(street, *x.shape[-2:])
    road = brightness_of_the_road(x, street)
    top, left = window_with_the_car(scene, K, x.shape[-2:], size, draws)
    K[0, 2] -= left
    K[1, 2] -= top
    return Shot(x[:, :, top : top + h, left : left + w], scene, K, street.shadow, road / street.asphalt)


def window_with_the_car(scene: Scene, K: Tensor, whole: tuple[int, int], size: tuple[int, int], draws: Generator
                        ) -> tuple[int, int]:
    """(top, left) of a random crop that holds as much of the car in the middle frame as fits; K [3, 3] in pixels."""
    body, t = scene.bodies[0], len(scene.c2w) // 2
    corners = torch.cat([part.corners for part in body.parts]) @ body.pose[t, :3, :3].T + body.pose[t, :3, 3]
    pixels, _ = project(corners, K, scene.c2w[t])
    return window_about(torch.cat([pixels.amin(0), pixels.amax(0)]), whole, size, draws)


def insert(x: Tensor, scene: Scene, K: Tensor, shadow: float, white: Tensor, relit: bool = True,
           shadowed: bool = False) -> Pair:
    """Composite the scene's car into x [3, T, H, W] in [-1, 1], once in the street's light and with its shadow.

    truth = x · darkening · (1 − alpha) + car lit by the street;  naive = x · (1 − alpha) + car lit otherwise; linear.
    The first five are a `Shot`'s. relit False: the naive car is lit by the street; shadowed: it has its shadow.
    """
    naive, truth, alphas = [], [], []
    for t in range(x.shape[1]):
        linear = ((x[:, t] + 1) / 2).clamp(min=0) ** GAMMA  # resizing may leave a value just below 0: a power is NaN
        lit, wrong, alpha, darkening = render_car(scene, K, x.shape[-2:], t, shadow=shadow, white=white)
        truth.append(linear * darkening * (1 - alpha) + lit)
        naive.append(linear * (darkening if shadowed else 1) * (1 - alpha) + (wrong if relit else lit))
        alphas.append(alpha)
    actor = torch.stack(alphas, dim=1)
    x_ni, x_gt = (torch.stack(v, dim=1).clamp(0, 1) ** (1 / GAMMA) * 2 - 1 for v in (naive, truth))
    return Pair(x_ni, x_gt, actor, torch.stack([mask_box(a) for a in actor[0]]))


def sample_car(street: Street, T: int, draws: Generator) -> Scene:
    """A car in one of the street's lanes, its light and a wrong one, seen by a camera at rest."""
    lane, heading = street.lanes[int(torch.randint(len(street.lanes), (), generator=draws))]
    length, width, height = (float(uniform(draws, *r)) for r in ((4.0, 4.9), (1.75, 1.95), (1.45, 1.85)))
    x = lane + float(uniform(draws, -0.5, 0.5))
    z = float(uniform(draws, street.near, street.far))
    yaw = math.radians(heading + float(uniform(draws, -6, 6)))
    pose = torch.eye(4).repeat(T, 1, 1)
    pose[:, :3, :3] = turned(torch.tensor(yaw, dtype=torch.float64))
    drift = float(uniform(draws, -0.12, 0.12)) * torch.arange(T)       # metres along its heading
    pose[:, 0, 3] = x + drift * math.sin(yaw)
    pose[:, 2, 3] = z + drift * math.cos(yaw)
    color = torch.tensor(CAR_COLORS[int(torch.randint(len(CAR_COLORS), (), generator=draws))])
    color = color * uniform(draws, 0.85, 1.15)
    body = Body(car(length, width, height), color.clamp(0, 0.9), pose, torch.tensor([width, height, length]))

    overcast = street.shadow > 0.7
    sun_share = 0.25 if overcast else 1.0
    right = Light(towards(*street.sun), sun_share * torch.tensor([1.0 + street.warmth, 1.0, 1.0 - street.warmth]),
                  torch.tensor([0.9, 0.97, 1.1]) * (0.8 if overcast else 0.35), 1.0)
    tint = float(uniform(draws, -0.15, 0.15))
    wrong = Light(towards(float(uniform(draws, -180, 180)), float(uniform(draws, 30, 75))),
                  torch.tensor([1.0 + tint, 1.0, 1.0 - tint]) * uniform(draws, 0.2, 1.2),
                  torch.tensor([0.85, 0.95, 1.05]) * uniform(draws, 0.4, 1.0), float(uniform(draws, 0.7, 1.4)))
    c2w = torch.eye(4).repeat(T, 1, 1)
    c2w[:, 1, 3] = -street.height
    return Scene([body], right, wrong, c2w, road=None, seed=0)


def towards(azimuth: float, elevation: float) -> Tensor:
    """The unit vector [3] to a sun, in camera axes (x right, y down, z ahead); both angles in degrees."""
    a, e = math.radians(azimuth), math.radians(elevation)
    return torch.tensor([math.cos(e) * math.sin(a), -math.sin(e), math.cos(e) * math.cos(a)])


def brightness_of_the_road(x: Tensor, street: Street) -> Tensor:
    """[3] linear light of the asphalt ahead, the median of a patch: the car's exposure is tied to it.

    Where the point ahead is out of the frame, as a camera that looks aside has it, the patch is the nearest in it.
    """
    H, W = x.shape[-2:]
    horizon, centre = min(max(street.horizon, -0.10), 0.75), min(max(street.centre, 0.12), 0.88)
    top, bottom = horizon + 0.10, horizon + 0.25
    patch = x[:, :, int(top * H) : int(bottom * H), int((centre - 0.12) * W) : int((centre + 0.12) * W)]
    return ((patch + 1) / 2).flatten(1).median(dim=1).values.clamp(min=0.02) ** GAMMA


def render_car(scene: Scene, K: Tensor, size: tuple[int, int], t: int, shadow: float, white: Tensor, s: int = 2
               ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One frame in linear light: the car under the street's light and under the wrong one, each [3, H, W] times alpha;
    alpha [1, H, W]; and by what factor [3, H, W] the street is darkened. s² rays to a pixel.

    The car is exposed so that a road of albedo 1 in the same light would be as bright as `white` [3].
    """
    H, W = size
    hits = cast(scene, K, (H, W), t, s)
    body, light = scene.bodies[0], scene.light
    on, ground = hits.body == 0, hits.body == -1
    painted = torch.zeros(len(on), 3)
    for k in range(len(body.parts)):
        which = (on & (hits.part == k)).nonzero().squeeze(1)
        if len(which):
            painted[which] = albedo(body, k, hits.at(which), scene.seed)

    start = hits.point + 0.01 * hits.normal
    free = torch.ones(len(on))
    near_it = on | ground
    free[near_it] = 1 - blocked(scene, t, start[near_it], [0], light.to_sun).float()
    one = torch.ones(int(on.sum()))
    up = torch.tensor([[0.0, -1.0, 0.0]])
    road = shade(torch.ones(1, 3), up, light, torch.ones(1), torch.ones(1))[0]
    lit, wrong = torch.zeros(2, len(on), 3)
    lit[on] = shade(painted[on], hits.normal[on], light, free[on], one) * (white / road)
    grey = white.mean() / road.mean()
    wrong[on] = shade(painted[on], hits.normal[on], scene.naive, one, one) * grey

    # what reaches the road: `shadow` of all light where the sun is hidden, and less of that close to the car
    factor = torch.ones(len(on))
    open_sky = contact(hits.point[ground], body, t)
    factor[ground] = (shadow + (1 - shadow) * free[ground]) * (0.4 + 0.6 * open_sky)

    darkening = to_pixels(factor[:, None].expand(-1, 3), H, W)
    if shadow < 0.7:  # where the sun is hidden, the blue sky lights the road
        blue = torch.tensor([0.94, 1.0, 1.08]).view(3, 1, 1)
        darkening = darkening * torch.lerp(blue, torch.ones(3, 1, 1), darkening)
    return to_pixels(lit, H, W), to_pixels(wrong, H, W), to_pixels(on.float()[:, None], H, W), darkening


# ---- files -----------------------------------------------------------------------------------------------------------

def save_pair(pair: Pair, path: Path) -> None:
    """One safetensors as data/pairs.py reads it."""
    actor = (pair.actor * 255).round().to(torch.uint8)
    save_tensors(path, {"x_ni": to_bytes(pair.x_ni), "x_gt": to_bytes(pair.x_gt), "actor": actor, "boxes": pair.boxes})


def demonstrate() -> None:
    """A car on an even road under an even sky."""
    x = torch.full((3, 1, 96, 160), 0.2)
    x[:, :, 43:] = -0.2
    street = Street(0.9, 0.45, lanes=((1.5, 0.0),), near=8, far=10, sun=(60, 35))
    scene = sample_car(street, 1, torch.Generator().manual_seed(3))
    K = intrinsics(street, 96, 160)
    pair = insert(x, scene, K, street.shadow, brightness_of_the_road(x, street) / street.asphalt)
    darker = (x - pair.x_gt).mean(dim=0)[pair.actor[0] == 0] * 127.5
    print(f"the car covers {pair.actor.mean():.1%} of the frame, its box is {pair.boxes[0].int().tolist()}")
    print(f"{(darker > 2).sum()} pixels of the road are darker in the truth, by up to {darker.max():.0f} of 255")
    Image.fromarray(to_uint8(torch.cat([pair.x_ni[:, 0], pair.x_gt[:, 0]], dim=2))).save("street.png")
    print("street.png: naive insertion | truth")


def write_pair(path: Path, seed: int, clip: Path, street: Street, size: tuple[int, int], frames: int) -> None:
    """Write the pair of a seed, unless its file exists; on one thread, since every worker is a process."""
    torch.set_num_threads(1)
    if not path.exists():
        save_pair(make_pair(clip, street, size, frames, torch.Generator().manual_seed(seed)), path)


def lengths_of(clips: Iterable[Path]) -> Tensor:
    """How many frames clips in NAME.safetensors have [n]."""
    return torch.tensor([shape_of(clip)[1] for clip in clips], dtype=torch.float32)


def main(args: argparse.Namespace) -> None:
    """A folder of pairs, clips drawn by their lengths; without one, a demonstration."""
    if not args.out:
        return demonstrate()
    streets = clips_of_known_streets(args.clips)
    clips, weights = list(streets), lengths_of(streets)
    args.out.mkdir(parents=True, exist_ok=True)
    calls = []
    for seed in range(args.first_seed, args.first_seed + args.count):
        clip = clips[int(torch.multinomial(weights, 1, generator=torch.Generator().manual_seed(seed)))]
        path = args.out / f"{clip.stem}_{seed:06d}.safetensors"
        calls.append((path, seed, clip, streets[clip], args.size, args.frames))
    desk.share(write_pair, calls, args.workers, "pair")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=desk.first_line(__doc__))
    parser.add_argument("--clips", type=Path, default=Path("data/real/train"), help="folder of clips (real_clips.py)")
    parser.add_argument("--out", type=Path, help="folder for the pairs; without it, one car is shown")
    parser.add_argument("--count", type=int, default=100, help="how many (default 100); those that exist are kept")
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first (default 0)")
    parser.add_argument("--size", type=height_x_width, default=(192, 320), help="rows x columns (default 192x320)")
    parser.add_argument("--frames", type=int, default=9, help="frames of a pair (default 9)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    args = parser.parse_args()
    sys.exit(desk.serve("street", lambda: main(args), lambda: "; the pairs that are whole stay"))
