"""The light of toy scenes: a sun and a sky, what they do to a surface, and the haze between it and the camera.

World: metres, x right, y down, z forward. Colours are linear RGB. DEVIATION from physics: surfaces are diffuse unless
`mirror` is asked for, light bounces once, and a body hides the sky from the ground around it by a formula (`contact`).

    python -m mirage_min.data.toy_light
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as nnf

from .toy_shapes import Body

HORIZON, ZENITH = (0.82, 0.86, 0.90), (0.30, 0.48, 0.80)


@dataclass
class Light:
    """A sun and a sky, linear RGB."""

    to_sun: Tensor    # [3], unit
    sun: Tensor       # [3]
    sky: Tensor       # [3], from above
    exposure: float


def sample_light(u: Callable[[float, float], float], elevation: tuple[float, float], sun: tuple[float, float],
                 sky: tuple[float, float], tint: float, exposure: tuple[float, float]) -> Light:
    """A sun at an elevation (degrees) and a sky, drawn by u(low, high) from these ranges; `tint` is how much redder the
    sun may be, and as much less blue."""
    high = math.radians(u(*elevation))
    azimuth = u(-math.pi, math.pi)
    while math.cos(azimuth) < -0.75:  # a sun right behind the camera would hide the shadow behind the actor
        azimuth = u(-math.pi, math.pi)
    to_sun = torch.tensor([math.cos(high) * math.sin(azimuth), -math.sin(high), math.cos(high) * math.cos(azimuth)])
    warm = u(-tint, tint)
    return Light(to_sun, torch.tensor([1.0 + warm, 0.96, 0.86 - warm]) * u(*sun),
                 torch.tensor([0.80, 0.92, 1.10]) * u(*sky), u(*exposure))


# ---- surfaces --------------------------------------------------------------------------------------------------------

def shade(albedo: Tensor, normal: Tensor, light: Light, lit: Tensor, open_sky: Tensor) -> Tensor:
    """Diffuse light [N, 3] that leaves points with an albedo [N, 3] and normals [N, 3], times exposure.

    lit [N]: whether the sun is seen from there; open_sky [N]: how much of the sky is. Both 0 to 1.
    """
    # albedo · (sky · how much of it is seen + sun · max(0, n·l) · whether it is seen)
    up = (0.65 - 0.35 * normal[:, 1:2]) * open_sky[:, None]
    sun = (normal @ light.to_sun).clamp(min=0)[:, None] * lit[:, None]
    return albedo * (light.sky * up + light.sun * sun) * light.exposure


def mirror(direction: Tensor, normal: Tensor, light: Light, lit: Tensor, gloss: Tensor) -> Tensor:
    """What a glossy surface adds [N, 3]: the sky and the sun as it mirrors them, more at grazing angles.

    direction [N, 3] of the ray that meets it, of any length; gloss [N] from 0, which adds nothing, to 1, clear glass.
    """
    d = nnf.normalize(direction, dim=1)
    cosine = -(d * normal).sum(1, keepdim=True)
    r = d + 2 * cosine * normal
    # F = F0 + (1 − F0)(1 − cos θ)⁵, F0 = .04                                                      Schlick 1994
    fresnel = 0.04 + 0.96 * (1 - cosine.clamp(0, 1)) ** 5
    above = sky(-r[:, 1], light)
    ground = 0.2 * light.sky * light.exposure  # a grey road, in the light of the sky alone
    seen = torch.where(r[:, 1:2] < 0, above, ground)
    glint = (r @ light.to_sun).clamp(min=0)[:, None] ** 300 * 40 * light.sun * light.exposure * lit[:, None]
    return gloss[:, None] * fresnel * (seen + glint)


# ---- sky and air -----------------------------------------------------------------------------------------------------

def sky(up: Tensor, light: Light) -> Tensor:
    """The sky's colour [N, 3] in directions whose upward component is `up` [N]."""
    up = up.clamp(min=0)[:, None]
    return torch.lerp(torch.tensor(HORIZON), torch.tensor(ZENITH), up.sqrt()) * glow(light) * light.exposure


def horizon(light: Light) -> Tensor:
    """The sky's colour [3] where it meets the ground, and the haze's."""
    return torch.tensor(HORIZON) * glow(light) * light.exposure


def glow(light: Light) -> Tensor:
    """How bright the sky itself looks []."""
    return light.sky.mean() * 1.1 + 0.25 * light.sun.mean()


def haze(color: Tensor, depth: Tensor, light: Light) -> Tensor:
    """Colours [N, 3] as they are seen through this many metres [N] of air."""
    share = (depth / 220).clamp(0, 0.5)[:, None]
    return torch.lerp(color, horizon(light).expand_as(color), share)


def contact(point: Tensor, body: Body, t: int) -> Tensor:
    """How much of the sky a vehicle leaves open to points on the ground [N, 3] in frame t -> [N]: least beneath it."""
    x, _, z = ((point - body.pose[t, :3, 3]) @ body.pose[t, :3, :3]).T
    outside = torch.stack([x.abs() - body.size[0] / 2, z.abs() - body.size[2] / 2]).clamp(min=0).norm(dim=0)
    return 1 - 0.75 * torch.exp(-outside / 0.45)


if __name__ == "__main__":
    light = Light(torch.tensor([0.0, -1.0, 0.0]), torch.tensor([2.0, 1.92, 1.72]), torch.tensor([0.36, 0.41, 0.5]), 1.0)
    one, grey = torch.ones(1), torch.full((1, 3), 0.5)
    for degrees in (0, 30, 60, 90):
        a = math.radians(degrees)
        normal = torch.tensor([[0.0, -math.cos(a), math.sin(a)]])
        sunny, shady = (shade(grey, normal, light, lit * one, one).mean().item() for lit in (1, 0))
        print(f"grey, {degrees:2} degrees from the sun above: {sunny:.2f} in the sun, {shady:.2f} in the shadow")
