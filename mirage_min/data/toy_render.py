"""Ray casting of toy scenes in plain torch: what a frame shows, and where every point of it goes next.

One slab test serves primary and shadow rays, for everything solid is a union of convex parts (toy_shapes). From the
same primary hits come the truth, lit by the scene's light with the actor's cast and contact shadow, and the naive
insertion, in which the actor is lit by another light and darkens nothing.

World: metres, x right, y down, z forward (OpenCV's axes), the ground at y = 0. Colours are linear RGB throughout.

    python -m mirage_min.data.toy_render
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as nnf

from .toy_light import Light, contact, haze, mirror, shade, sky
from .toy_shapes import Body, Part, Points, albedo, gloss
from .toy_street import Road, ground

if TYPE_CHECKING:
    from .toy_world import WorldConfig

FAR = 160  # metres: the ground ends there
GROUND, SKY = -1, -2  # in place of a body's index


@dataclass
class Scene:
    """Everything that is needed to render every frame."""

    bodies: list[Body]  # the actor is the first
    light: Light
    naive: Light        # what lights the inserted asset
    c2w: Tensor         # [T, 4, 4] camera to world
    road: Road | None   # None: only bodies are painted
    seed: int
    gloss: float = 0.0  # of cars, 0 to 1: how much of what they could mirror they do


# ---- geometry --------------------------------------------------------------------------------------------------------

def slab(origin: Tensor, direction: Tensor, part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """Rays [N, 3] in the part's coordinates -> (t where they enter, t where they leave, index of the face entered)."""
    along = direction @ part.normals.T                                 # [N, K]
    t = (part.offsets - origin @ part.normals.T) / torch.where(along.abs() < 1e-9, 1e-9, along)
    near, face = torch.where(along < 0, t, -math.inf).max(dim=1)
    far = torch.where(along >= 0, t, math.inf).amin(dim=1)
    return near, far, face


def intrinsics(config: "WorldConfig") -> Tensor:
    """K [3, 3]: a horizontal field of view of 58 degrees at any size; pixel centres at half-integers."""
    f = config.width * 0.9
    return torch.tensor([[f, 0.0, config.width / 2], [0.0, f, config.height * 0.5], [0.0, 0.0, 1.0]])


def project(points: Tensor, K: Tensor, c2w: Tensor) -> tuple[Tensor, Tensor]:
    """World points [N, 3] -> (pixels [N, 2], depth [N] along the camera's z)."""
    p = (points - c2w[:3, 3]) @ c2w[:3, :3]
    return p[:, :2] / p[:, 2:].clamp(min=1e-6) @ K[:2, :2].T + K[:2, 2], p[:, 2]


@dataclass
class Hits:
    """What the rays of one frame meet first; all [N, ...]."""

    point: Tensor     # world
    normal: Tensor    # world
    local: Tensor     # in the body's coordinates; of the sky its direction
    depth: Tensor     # along the camera's z; inf: the sky
    body: Tensor      # index of the body, or GROUND or SKY
    part: Tensor      # index of its part

    def at(self, index: Tensor) -> Points:
        """What a paint needs to know of some of them: a mask [N] or indices [M]."""
        return Points(self.local[index], self.normal[index], self.depth[index])


def cast(scene: Scene, K: Tensor, size: tuple[int, int], t: int, supersample: int) -> Hits:
    """Primary rays of frame t of a camera K [3, 3] with `size` rows and columns, `supersample` squared to a pixel."""
    H, W = size[0] * supersample, size[1] * supersample
    c2w = scene.c2w[t]
    y, x = torch.meshgrid((torch.arange(H) + 0.5) / supersample, (torch.arange(W) + 0.5) / supersample, indexing="ij")
    rays = torch.stack([(x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1], torch.ones_like(x)], dim=-1).view(-1, 3)
    direction, origin = rays @ c2w[:3, :3].T, c2w[:3, 3]               # rays have z = 1: their t is the depth
    hits = meet_ground(origin, direction)
    pixels_of = torch.arange(H * W).view(H, W)
    for b, solid in enumerate(scene.bodies):
        R, centre = solid.pose[t, :3, :3], solid.pose[t, :3, 3]
        o = (origin - centre) @ R
        for k, part in enumerate(solid.parts):
            pixels, z = project(part.corners @ R.T + centre, K, c2w)
            index = candidates(pixels * supersample, z, pixels_of)
            if len(index) == 0:
                continue
            d = direction[index] @ R
            near, far, face = slab(o.expand_as(d), d, part)
            hit = ((near < far) & (near > 0.1) & (near < hits.depth[index])).nonzero().squeeze(1)
            index, near = index[hit], near[hit]
            hits.depth[index] = near
            hits.body[index] = b
            hits.part[index] = k
            hits.local[index] = o + near[:, None] * d[hit]
            hits.normal[index] = part.normals[face[hit]] @ R.T
    hits.point = origin + torch.where(hits.depth.isfinite(), hits.depth, 0.0)[:, None] * direction
    above = hits.body == SKY
    hits.local[above] = nnf.normalize(direction[above], dim=1)
    return hits


def meet_ground(origin: Tensor, direction: Tensor) -> Hits:
    """Where rays from a point [3] in directions [N, 3] meet the empty ground, or nothing."""
    down = direction[:, 1]
    depth = torch.where(down > 1e-6, -origin[1] / down.clamp(min=1e-6), math.inf)
    depth = torch.where(depth < FAR, depth, math.inf)
    body = torch.where(depth < math.inf, GROUND, SKY)
    up = torch.tensor([0.0, -1.0, 0.0]).repeat(len(direction), 1)
    return Hits(point=torch.zeros_like(direction), normal=up, local=torch.zeros_like(direction), depth=depth, body=body,
                part=torch.zeros_like(body))


def candidates(pixels: Tensor, z: Tensor, pixels_of: Tensor) -> Tensor:
    """Indices of the rays that can meet a part whose corners project to pixels [M, 2] at depths z [M].

    pixels_of [H, W]: the index of the ray of each pixel.
    """
    if (z < 0.3).all():
        return pixels_of.flatten()[:0]
    if (z < 0.3).any():  # it reaches behind the camera: no rectangle bounds it
        return pixels_of.flatten()
    x0, y0 = pixels.amin(0).floor().long().tolist()
    x1, y1 = pixels.amax(0).ceil().long().tolist()
    return pixels_of[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)].flatten()


def blocked(scene: Scene, t: int, point: Tensor, bodies: list[int], to_sun: Tensor) -> Tensor:
    """Whether the sun is hidden from points [N, 3] by any of these bodies -> [N] bool."""
    dark = torch.zeros(len(point), dtype=torch.bool)
    for b in bodies:
        solid = scene.bodies[b]
        R, centre = solid.pose[t, :3, :3], solid.pose[t, :3, 3]
        corners = torch.cat([part.corners for part in solid.parts]) @ R.T + centre
        middle = corners.mean(0)
        radius = (corners - middle).norm(dim=1).max()
        # only points whose ray to the sun passes the bounding sphere
        away = point - middle
        along = away @ to_sun
        index = ((away.square().sum(1) - along.square() < radius**2) & (along < radius) & ~dark).nonzero().squeeze(1)
        if len(index) == 0:
            continue
        o, d = (point[index] - centre) @ R, (to_sun @ R).expand(len(index), 3)
        for part in solid.parts:
            near, far, _ = slab(o, d, part)
            dark[index] |= (near < far) & (far > 1e-3)
    return dark


# ---- frames ----------------------------------------------------------------------------------------------------------

@dataclass
class Surface:
    """What is known of the points that the rays of a frame meet; all [N, ...]."""

    point: Tensor        # [N, 3] world
    normal: Tensor       # [N, 3] world
    albedo: Tensor       # [N, 3], 0 for the sky
    gloss: Tensor        # [N], 0 to 1
    lit: Tensor          # 1 where no body but the actor hides the sun
    lit_actor: Tensor    # 1 where the actor does not
    open_sky: Tensor     # how much of the sky all vehicles but the actor leave open
    open_actor: Tensor   # how much the actor does

    def at(self, index: Tensor) -> "Surface":
        """Those of a mask [N] or of indices."""
        return Surface(*(v[index] for v in vars(self).values()))


def look_at(scene: Scene, hits: Hits, t: int) -> Surface:
    """Paint every hit, and ask what hides the sun and the sky from it."""
    N, above = len(hits.body), hits.body == SKY
    found = Surface(hits.point, hits.normal, torch.zeros(N, 3), torch.zeros(N), *(torch.ones(N) for _ in range(4)))
    on = (hits.body == GROUND).nonzero().squeeze(1)
    found.albedo[on] = ground(scene.road, hits.point[on], hits.depth[on], scene.seed)
    for b, body in enumerate(scene.bodies):
        mine = hits.body == b
        for k in range(len(body.parts)):
            index = (mine & (hits.part == k)).nonzero().squeeze(1)
            if len(index):
                points = hits.at(index)
                found.albedo[index] = albedo(body, k, points, scene.seed)
                found.gloss[index] = scene.gloss * gloss(body, k, points)

    solid = (~above).nonzero().squeeze(1)
    start = hits.point[solid] + 0.01 * hits.normal[solid]
    others = list(range(1, len(scene.bodies)))
    found.lit[solid] = 1 - blocked(scene, t, start, others, scene.light.to_sun).float()
    found.lit_actor[solid] = 1 - blocked(scene, t, start, [0], scene.light.to_sun).float()
    for b, body in enumerate(scene.bodies):
        if body.size is not None:
            seen = contact(hits.point[on], body, t)
            if b == 0:
                found.open_actor[on] = seen
            else:
                found.open_sky[on] = torch.minimum(found.open_sky[on], seen)
    return found


def leaving(surface: Surface, eye: Tensor, light: Light, lit: Tensor, open_sky: Tensor) -> Tensor:
    """What leaves points towards the eye [3], in a light that `lit` and `open_sky` [N] let through -> [N, 3]."""
    color = shade(surface.albedo, surface.normal, light, lit, open_sky)
    shiny = surface.gloss.nonzero().squeeze(1)
    if len(shiny):
        s = surface.at(shiny)
        color[shiny] = color[shiny] + mirror(s.point - eye, s.normal, light, lit[shiny], s.gloss)
    return color


def frame(scene: Scene, config: "WorldConfig", t: int, relit: bool = True, shadowed: bool = False
          ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Frame t in linear light: (naive [3, H, W], truth [3, H, W], actor's alpha [1, H, W], its shadow [1, H, W]).

    In the naive one, the actor is lit by `scene.naive` (not relit: as in truth) and has no shadow (shadowed: it has).
    """
    hits = cast(scene, intrinsics(config), (config.height, config.width), t, config.supersample)
    light, eye = scene.light, scene.c2w[t, :3, 3]
    above, actor = hits.body == SKY, hits.body == 0
    s = look_at(scene, hits, t)
    truth = leaving(s, eye, light, s.lit * s.lit_actor, torch.minimum(s.open_sky, s.open_actor))
    naive = truth.clone() if shadowed else leaving(s, eye, light, s.lit, s.open_sky)
    one = torch.ones(int(actor.sum()))
    naive[actor] = leaving(s.at(actor), eye, scene.naive, one, one) if relit else truth[actor]
    truth[above] = sky(-hits.local[above, 1], light)
    naive[above] = truth[above]
    # distance takes a little of the horizon's colour, the same in both
    truth, naive = (torch.where(above[:, None], v, haze(v, hits.depth, light)) for v in (truth, naive))
    darker = ((naive - truth).sum(1) > 0.04 * naive.sum(1)) & ~actor & ~above
    return tuple(to_pixels(v, config.height, config.width)
                 for v in (naive, truth, actor.float()[:, None], darker.float()[:, None]))


def to_pixels(v: Tensor, H: int, W: int) -> Tensor:
    """Values [H·s·W·s, C] of the rays of a frame, s squared to a pixel -> their means [C, H, W]."""
    s = round((len(v) / (H * W)) ** 0.5)
    return rearrange(v.view(H, s, W, s, -1), "h p w q c -> c h w p q").mean(dim=(3, 4))


@dataclass
class Motion:
    """What is known of every pixel's centre."""

    depth: Tensor     # [1, T, H, W] metres along the camera's z; inf: the sky
    flow: Tensor      # [2, T-1, H, W] pixels (dx, dy) from frame t to t + 1
    visible: Tensor   # [1, T-1, H, W] 1 where it is still seen at t + 1, to a pixel
    moving: Tensor    # [1, T, H, W] 1 where a body is seen that moves during the clip


def motion(scene: Scene, config: "WorldConfig") -> Motion:
    """Depth, flow, visibility and what moves, of all frames."""
    H, W, T = config.height, config.width, config.frames
    hits = [cast(scene, intrinsics(config), (H, W), t, 1) for t in range(T)]
    flow, visible = torch.zeros(2, T - 1, H, W), torch.zeros(1, T - 1, H, W)
    for t in range(T - 1):
        flow[:, t], visible[:, t] = step(scene, config, t, hits[t], hits[t + 1])
    moves = torch.tensor([bool((body.pose != body.pose[:1]).any()) for body in scene.bodies] + [False, False])
    return Motion(torch.stack([h.depth.view(1, H, W) for h in hits], dim=1), flow, visible,
                  torch.stack([moves[h.body].float().view(1, H, W) for h in hits], dim=1))


def step(scene: Scene, config: "WorldConfig", t: int, before: Hits, after: Hits) -> tuple[Tensor, Tensor]:
    """(flow [2, H, W], visible [1, H, W]) from frame t to t + 1, whose rays through the pixels' centres met these."""
    H, W = config.height, config.width
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    here = torch.stack([x, y], dim=-1).view(-1, 2)
    point, above = before.point.clone(), before.body == SKY
    for b, body in enumerate(scene.bodies):
        on = before.body == b
        point[on] = before.local[on] @ body.pose[t + 1, :3, :3].T + body.pose[t + 1, :3, 3]
    point[above] = scene.c2w[t, :3, 3] + 1e5 * before.local[above]
    pixel, z = project(point, intrinsics(config), scene.c2w[t + 1])
    inside = ((pixel > 0) & (pixel < torch.tensor([W, H]))).all(dim=1) & (z > 0.1)
    i = pixel.floor().long().clamp(min=0)
    there = i[:, 1].clamp(max=H - 1) * W + i[:, 0].clamp(max=W - 1)
    same = (after.body[there] == before.body) & (above | ((after.depth[there] - z).abs() < 0.05 * z + 0.1))
    return (pixel - here).T.view(2, H, W), (inside & same).float().view(1, H, W)


if __name__ == "__main__":
    from PIL import Image

    from .toy_world import WorldConfig, sample_scene

    config = WorldConfig(frames=2)
    scene = sample_scene(0, config)
    hits = cast(scene, intrinsics(config), (config.height, config.width), 0, 1)
    for name, body in (("sky", SKY), ("ground", GROUND), ("actor", 0)):
        print(f"{name:6} {(hits.body == body).float().mean():5.1%} of the rays")
    naive, truth, actor, shadow = frame(scene, config, 0)
    for name, alpha in (("on the actor", actor), ("in its shadow", shadow)):
        before, after = (v[:, alpha[0] > 0.5].mean() for v in (naive, truth))
        print(f"linear light {name:13} {before:.3f} naive, {after:.3f} in truth")
    known = motion(scene, config)
    near = (known.depth[0, 0] / known.depth[0, 0].clamp(max=60).max()).clamp(max=1).expand(3, -1, -1)
    moved = (known.flow[:, 0].norm(dim=0) / 8).clamp(max=1).expand(3, -1, -1)
    sheet = torch.cat([naive.clamp(0, 1) ** (1 / 2.2), truth.clamp(0, 1) ** (1 / 2.2), near, moved], dim=2)
    Image.fromarray((sheet * 255).round().byte().permute(1, 2, 0).numpy()).save("toy_render.png")
    print(f"{known.visible.mean():.0%} of frame 0 is still seen in frame 1; "
          "toy_render.png: naive | truth | depth | flow")
