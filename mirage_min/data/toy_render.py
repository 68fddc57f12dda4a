"""Ray casting of toy scenes in plain torch: what a frame shows, and where every point of it goes next.

Everything solid is a union of convex parts, each an intersection of half-spaces, so that one slab test serves primary
and shadow rays. From the same primary hits come the truth, lit by the scene's light with the actor's cast and contact
shadow, and the naive insertion, in which the actor is lit by another light and darkens nothing.

World: metres, x right, y down, z forward (OpenCV's axes), the ground at y = 0. Colours are linear RGB throughout.

    python -m mirage_min.data.toy_render
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


@dataclass
class Part:
    """A convex part in its object's coordinates: points p with normals @ p <= offsets."""

    normals: Tensor   # [K, 3], unit
    offsets: Tensor   # [K]
    paint: str        # what `paint` does with it
    corners: Tensor   # [M, 3], for culling


@dataclass
class Body:
    """A solid: convex parts, a colour, and where it stands in every frame."""

    parts: list[Part]
    color: Tensor     # [3], linear
    pose: Tensor      # [T, 4, 4], object to world
    size: Tensor      # [3] width, height, length of its box


@dataclass
class Light:
    """A sun and a sky, linear RGB."""

    to_sun: Tensor    # [3], unit
    sun: Tensor       # [3]
    sky: Tensor       # [3], from above
    exposure: float


@dataclass
class Scene:
    """Everything that is needed to render every frame."""

    bodies: list[Body]  # the actor is the first
    light: Light
    naive: Light        # what lights the inserted asset
    c2w: Tensor         # [T, 4, 4]
    road: dict
    seed: int


# ---- geometry --------------------------------------------------------------------------------------------------------

def slab(origin: Tensor, direction: Tensor, part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """Rays [N, 3] in the part's coordinates -> (t where they enter, t where they leave, index of the face entered)."""
    along = direction @ part.normals.T                                 # [N, K]
    t = (part.offsets - origin @ part.normals.T) / torch.where(along.abs() < 1e-9, 1e-9, along)
    near, face = torch.where(along < 0, t, -math.inf).max(dim=1)
    far = torch.where(along >= 0, t, math.inf).amin(dim=1)
    return near, far, face


def intrinsics(config) -> Tensor:
    """K [3, 3]: a horizontal field of view of 58 degrees at any size; pixel centres at half-integers."""
    f = config.width * 0.9
    return torch.tensor([[f, 0.0, config.width / 2], [0.0, f, config.height * 0.5], [0.0, 0.0, 1.0]])


def project(points: Tensor, K: Tensor, c2w: Tensor) -> tuple[Tensor, Tensor]:
    """World points [N, 3] -> (pixels [N, 2], depth [N])."""
    p = (points - c2w[:3, 3]) @ c2w[:3, :3]
    return p[:, :2] / p[:, 2:].clamp(min=1e-6) @ K[:2, :2].T + K[:2, 2], p[:, 2]


@dataclass
class Hits:
    """What the rays of one frame meet first; all [N, ...]."""

    point: Tensor     # world
    normal: Tensor    # world
    local: Tensor     # in the body's coordinates
    depth: Tensor     # along the camera's z
    body: Tensor      # index of the body, -1 the ground, -2 the sky
    part: Tensor      # index of its part


def cast(scene: Scene, K: Tensor, size: tuple[int, int], t: int, supersample: int) -> Hits:
    """Primary rays of frame t of a camera K [3, 3] with `size` rows and columns, `supersample` squared to a pixel."""
    H, W = size[0] * supersample, size[1] * supersample
    c2w = scene.c2w[t]
    y, x = torch.meshgrid((torch.arange(H) + 0.5) / supersample, (torch.arange(W) + 0.5) / supersample, indexing="ij")
    rays = torch.stack([(x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1], torch.ones_like(x)], dim=-1).view(-1, 3)
    direction, origin = rays @ c2w[:3, :3].T, c2w[:3, 3]               # rays have z = 1: their t is the depth
    down = direction[:, 1]
    depth = torch.where(down > 1e-6, -origin[1] / down.clamp(min=1e-6), math.inf)
    depth = torch.where(depth < 160, depth, math.inf)
    body = torch.where(depth < math.inf, -1, -2)
    part, local = torch.zeros_like(body), torch.zeros_like(direction)
    normal = torch.tensor([0.0, -1.0, 0.0]).repeat(len(rays), 1)
    grid = torch.arange(H * W).view(H, W)
    for b, solid in enumerate(scene.bodies):
        R, centre = solid.pose[t, :3, :3], solid.pose[t, :3, 3]
        o = (origin - centre) @ R
        for k, p in enumerate(solid.parts):
            pixels, z = project(p.corners @ R.T + centre, K, c2w)
            if (z < 0.3).all():
                continue
            if (z < 0.3).any():  # it reaches behind the camera: no rectangle bounds it
                index = grid.flatten()
            else:
                x0, y0 = (pixels.amin(0) * supersample).floor().long().tolist()
                x1, y1 = (pixels.amax(0) * supersample).ceil().long().tolist()
                index = grid[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)].flatten()
            if len(index) == 0:
                continue
            d = direction[index] @ R
            near, far, face = slab(o.expand_as(d), d, p)
            hit = ((near < far) & (near > 0.1) & (near < depth[index])).nonzero().squeeze(1)
            index, near = index[hit], near[hit]
            depth[index], body[index], part[index] = near, b, k
            local[index] = o + near[:, None] * d[hit]
            normal[index] = p.normals[face[hit]] @ R.T
    point = origin + torch.where(depth.isfinite(), depth, 0.0)[:, None] * direction
    sky = body == -2
    local[sky] = F.normalize(direction[sky], dim=1)
    return Hits(point, normal, local, depth, body, part)


def blocked(scene: Scene, t: int, point: Tensor, bodies: list[int], to_sun: Tensor) -> Tensor:
    """Whether the sun is hidden from points [N, 3] by any of these bodies -> [N] bool."""
    dark = torch.zeros(len(point), dtype=torch.bool)
    for b in bodies:
        solid = scene.bodies[b]
        R, centre = solid.pose[t, :3, :3], solid.pose[t, :3, 3]
        corners = torch.cat([p.corners for p in solid.parts]) @ R.T + centre
        middle, radius = corners.mean(0), (corners - corners.mean(0)).norm(dim=1).max()
        # only points whose ray to the sun passes the bounding sphere
        away = point - middle
        along = away @ to_sun
        index = ((away.square().sum(1) - along.square() < radius**2) & (along < radius) & ~dark).nonzero().squeeze(1)
        if len(index) == 0:
            continue
        o, d = (point[index] - centre) @ R, (to_sun @ R).expand(len(index), 3)
        for p in solid.parts:
            near, far, _ = slab(o, d, p)
            dark[index] |= (near < far) & (far > 1e-3)
    return dark


# ---- appearance ------------------------------------------------------------------------------------------------------

def noise(x: Tensor, y: Tensor, seed: int) -> Tensor:
    """Smooth value noise in [-1, 1] at coordinates of any shape, one cell to a unit."""
    def lattice(i: Tensor, j: Tensor) -> Tensor:
        h = (i * 374761393 + j * 668265263 + seed * 974711) & 0x7FFFFFFF
        h = ((h ^ (h >> 13)) * 1274126177) & 0x7FFFFFFF
        return ((h ^ (h >> 16)) & 0xFFFF).float() / 32767.5 - 1
    i, j = x.floor().long(), y.floor().long()
    u, v = x - i, y - j
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    top = torch.lerp(lattice(i, j), lattice(i + 1, j), u)
    return torch.lerp(top, torch.lerp(lattice(i, j + 1), lattice(i + 1, j + 1), u), v)


def ground(scene: Scene, hits: Hits, on: Tensor) -> Tensor:
    """The road's albedo [M, 3] at hits `on`: asphalt, markings, verge; detail fades where a pixel covers much of it."""
    road, (x, _, z), depth = scene.road, hits.point[on].T, hits.depth[on]
    fade, fine = (1 - depth / 60).clamp(0, 1), (1 - depth / 18).clamp(0, 1)
    grain = 0.10 * fade * noise(x * 0.7, z * 0.35, scene.seed) + 0.12 * fine * noise(x * 5, z * 5, scene.seed + 1)
    asphalt = (road["tone"] * (1 + grain))[:, None].expand(-1, 3)
    verge = torch.tensor(road["verge"]) * (1 + 1.6 * grain)[:, None]
    edge = ((x.abs() - road["half"]) * 8).clamp(0, 1)[:, None]
    color = torch.lerp(asphalt, verge, edge)
    half = 0.07 + 0.004 * depth  # a line is at least so wide that a pixel can show it
    def line(at):
        return ((half - (x - at).abs()) / (0.02 + 0.006 * depth) + 0.5).clamp(0, 1)
    dashed = (((z + road["phase"]) % (2.2 * road["dash"])) < road["dash"]).float()
    marks = torch.maximum(line(-road["lane"] / 2) * dashed, line(road["lane"] / 2) * dashed)
    marks = torch.maximum(marks, torch.maximum(line(road["half"] - 0.3), line(0.3 - road["half"])))
    return torch.lerp(color, torch.tensor([0.62, 0.62, 0.58]).expand_as(color), (0.85 * marks * fade)[:, None])


def paint(scene: Scene, hits: Hits, on: Tensor, b: int, k: int) -> Tensor:
    """Albedo [M, 3] of part k of body b at hits `on`."""
    body, part = scene.bodies[b], scene.bodies[b].parts[k]
    x, y, z = hits.local[on].T
    color = body.color.expand(len(on), 3).clone()
    if part.paint == "wheel":
        color[:] = 0.03
    elif part.paint == "leaves":
        color = torch.tensor([0.10, 0.20, 0.06]) * (1 + 0.5 * noise(x * 3 + y * 2, z * 3 + y, scene.seed))[:, None]
    elif part.paint == "wall":
        fade = (1 - hits.depth[on] / 70).clamp(0, 1)
        along = torch.where(hits.normal[on, 0].abs() > 0.5, z, x)
        window = ((along % 3.0 - 1.5).abs() < 0.7) & ((y % 3.2 - 1.5).abs() < 0.75) & (y < -0.6)
        color = torch.lerp(color, torch.tensor([0.06, 0.08, 0.11]).expand_as(color), (0.8 * fade * window)[:, None])
    elif part.paint == "cabin":
        h = body.size[1]
        glass = (y > -0.96 * h) & (y < -0.64 * h) & (hits.normal[on, 1].abs() < 0.8)
        color[glass] = torch.tensor([0.035, 0.045, 0.055])
    elif part.paint == "body":
        w, h, length = body.size
        low = y > -0.24 * h
        color[low] = color[low] * 0.25
        side = x.abs() > 0.30 * w
        lamp = (y < -0.40 * h) & (y > -0.56 * h) & side
        rear, front = lamp & (z < -0.46 * length), lamp & (z > 0.46 * length)
        color[rear], color[front] = torch.tensor([0.45, 0.02, 0.02]), torch.tensor([0.80, 0.80, 0.75])
        plate = (x.abs() < 0.13 * w) & (y > -0.42 * h) & (y < -0.32 * h) & (z.abs() > 0.46 * length)
        color[plate] = 0.55
    return color


def shade(albedo: Tensor, normal: Tensor, light: Light, lit: Tensor, open_sky: Tensor) -> Tensor:
    """Diffuse: albedo · (sky · how much of it is seen + sun · max(0, n · l) · whether it is seen), times exposure."""
    up = (0.65 - 0.35 * normal[:, 1:2]) * open_sky[:, None]
    sun = (normal @ light.to_sun).clamp(min=0)[:, None] * lit[:, None]
    return albedo * (light.sky * up + light.sun * sun) * light.exposure


def contact(point: Tensor, body: Body, t: int) -> Tensor:
    """How much of the sky a body leaves open to points on the ground [N, 3] -> [N]: darkest beneath it."""
    x, _, z = ((point - body.pose[t, :3, 3]) @ body.pose[t, :3, :3]).T
    outside = torch.stack([x.abs() - body.size[0] / 2, z.abs() - body.size[2] / 2]).clamp(min=0).norm(dim=0)
    return 1 - 0.75 * torch.exp(-outside / 0.45)


def frame(scene: Scene, config, t: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Frame t in linear light: (naive [3, H, W], truth [3, H, W], actor's alpha [1, H, W], its shadow [1, H, W])."""
    hits = cast(scene, intrinsics(config), (config.height, config.width), t, config.supersample)
    light = scene.light
    N = len(hits.body)
    albedo, sky, actor = torch.zeros(N, 3), hits.body == -2, hits.body == 0
    on = (hits.body == -1).nonzero().squeeze(1)
    albedo[on] = ground(scene, hits, on)
    for b, body in enumerate(scene.bodies):
        mine = hits.body == b
        for k in range(len(body.parts)):
            which = (mine & (hits.part == k)).nonzero().squeeze(1)
            if len(which):
                albedo[which] = paint(scene, hits, which, b, k)

    # the sun and the sky without the actor, then with it
    solid = (~sky).nonzero().squeeze(1)
    start = hits.point[solid] + 0.01 * hits.normal[solid]
    lit, lit_actor, open_sky, open_actor = torch.ones(N), torch.ones(N), torch.ones(N), torch.ones(N)
    lit[solid] = 1 - blocked(scene, t, start, list(range(1, len(scene.bodies))), light.to_sun).float()
    lit_actor[solid] = 1 - blocked(scene, t, start, [0], light.to_sun).float()
    for b, body in enumerate(scene.bodies):
        if body.size is not None:
            seen = contact(hits.point[on], body, t)
            if b == 0:
                open_actor[on] = seen
            else:
                open_sky[on] = torch.minimum(open_sky[on], seen)

    truth = shade(albedo, hits.normal, light, lit * lit_actor, torch.minimum(open_sky, open_actor))
    naive = shade(albedo, hits.normal, light, lit, open_sky)
    one = torch.ones(int(actor.sum()))
    naive[actor] = shade(albedo[actor], hits.normal[actor], scene.naive, one, one)
    up = (-hits.local[sky, 1]).clamp(min=0)[:, None]
    heaven = torch.lerp(torch.tensor([0.82, 0.86, 0.90]), torch.tensor([0.30, 0.48, 0.80]), up.sqrt())
    truth[sky] = naive[sky] = heaven * (light.sky.mean() * 1.1 + 0.25 * light.sun.mean()) * light.exposure
    # distance takes a little of the horizon's colour, the same in both
    haze = (hits.depth / 220).clamp(0, 0.5)[:, None]
    horizon = torch.tensor([0.82, 0.86, 0.90]) * (light.sky.mean() * 1.1 + 0.25 * light.sun.mean()) * light.exposure
    truth, naive = (torch.where(sky[:, None], v, torch.lerp(v, horizon.expand_as(v), haze)) for v in (truth, naive))

    darker = ((naive - truth).sum(1) > 0.04 * naive.sum(1)) & ~actor & ~sky
    s = config.supersample
    def down(v):
        return rearrange(v.view(config.height, s, config.width, s, -1), "h p w q c -> c h w p q").mean(dim=(3, 4))
    return down(naive), down(truth), down(actor.float()[:, None]), down(darker.float()[:, None])


def motion(scene: Scene, config) -> tuple[Tensor, Tensor, Tensor]:
    """(depth [1, T, H, W], flow [2, T-1, H, W], visible [1, T-1, H, W]) at the pixels' centres."""
    H, W, K, T = config.height, config.width, intrinsics(config), config.frames
    hits = [cast(scene, K, (H, W), t, 1) for t in range(T)]
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    here, flow, visible = torch.stack([x, y], dim=-1).view(-1, 2), [], []
    for t in range(T - 1):
        now, after = hits[t], hits[t + 1]
        point = now.point.clone()
        for b, body in enumerate(scene.bodies):
            on = now.body == b
            point[on] = now.local[on] @ body.pose[t + 1, :3, :3].T + body.pose[t + 1, :3, 3]
        sky = now.body == -2
        point[sky] = scene.c2w[t, :3, 3] + 1e5 * now.local[sky]
        pixel, z = project(point, K, scene.c2w[t + 1])
        inside = ((pixel > 0) & (pixel < torch.tensor([W, H]))).all(dim=1) & (z > 0.1)
        i = pixel.floor().long().clamp(min=0)
        there = i[:, 1].clamp(max=H - 1) * W + i[:, 0].clamp(max=W - 1)
        same = (after.body[there] == now.body) & (sky | ((after.depth[there] - z).abs() < 0.05 * z + 0.1))
        flow.append((pixel - here).T.view(2, H, W))
        visible.append((inside & same).float().view(1, H, W))
    depth = torch.stack([h.depth.view(1, H, W) for h in hits], dim=1)
    return depth, torch.stack(flow, dim=1) if flow else torch.zeros(2, 0, H, W), \
        torch.stack(visible, dim=1) if visible else torch.zeros(1, 0, H, W)


if __name__ == "__main__":
    from PIL import Image

    from .toy_world import WorldConfig, sample_scene

    config = WorldConfig(frames=2)
    scene = sample_scene(0, config)
    hits = cast(scene, intrinsics(config), (config.height, config.width), 0, 1)
    for name, body in (("sky", -2), ("ground", -1), ("actor", 0)):
        print(f"{name:6} {(hits.body == body).float().mean():5.1%} of the rays")
    naive, truth, actor, shadow = frame(scene, config, 0)
    for name, alpha in (("on the actor", actor), ("in its shadow", shadow)):
        before, after = (v[:, alpha[0] > 0.5].mean() for v in (naive, truth))
        print(f"linear light {name:13} {before:.3f} naive, {after:.3f} in truth")
    depth, flow, visible = motion(scene, config)
    near = (depth[0, 0] / depth[0, 0].clamp(max=60).max()).clamp(max=1).expand(3, -1, -1)
    moved = (flow[:, 0].norm(dim=0) / 8).clamp(max=1).expand(3, -1, -1)
    sheet = torch.cat([naive.clamp(0, 1) ** (1 / 2.2), truth.clamp(0, 1) ** (1 / 2.2), near, moved], dim=2)
    Image.fromarray((sheet * 255).round().byte().permute(1, 2, 0).numpy()).save("toy_render.png")
    print(f"{visible.mean():.0%} of frame 0 is still seen in frame 1; toy_render.png: naive | truth | depth | flow")
