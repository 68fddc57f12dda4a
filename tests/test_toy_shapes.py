"""Cars of several shapes, glass and gloss: options that change the vehicles of a toy scene and nothing else."""

import math

import pytest
import torch

from mirage_min.data import toy_light, toy_shapes
from mirage_min.data.toy_world import WorldConfig, make_clip, sample_scene

SHAPES = tuple(toy_shapes.CARS)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_car_stands_on_the_ground_is_symmetric_and_has_its_length_and_width(shape):
    parts = toy_shapes.car(4.5, 1.8, 1.5, shape)
    corners = torch.cat([part.corners for part in parts])
    assert corners[:, 1].max() == 0 and corners[:, 1].min() < -1.3
    assert corners[:, 2].min() == -2.25 and corners[:, 2].max() == 2.25, "from bumper to bumper"
    assert corners[:, 0].abs().max() == pytest.approx(0.9 * 1.01), "the wheels"
    mirrored = {tuple(round(v, 4) for v in (-x, y, z)) for x, y, z in corners.tolist()}
    assert mirrored == {tuple(round(v, 4) for v in c) for c in corners.tolist()}, "left and right differ"
    for part in parts:
        middle = part.corners.mean(0)
        assert (part.normals @ middle < part.offsets).all(), "the normals point outwards"
        assert ((part.corners @ part.normals.T - part.offsets).amax(0).abs() < 1e-4).all(), "corners lie on the faces"
    size = toy_shapes.box_size(parts)
    assert torch.allclose(size, corners.amax(0) - corners.amin(0))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_car_has_paint_tyres_lamps_and_glass(shape):
    parts = toy_shapes.car(4.5, 1.8, 1.5, shape)
    color = torch.tensor([0.5, 0.2, 0.1])
    body = toy_shapes.Body(parts, color, torch.eye(4)[None], torch.tensor([1.8, 1.5, 4.5]))
    seen = set()
    for k, part in enumerate(parts):
        inside = part.corners.mean(0)
        local = torch.cat([torch.lerp(inside, part.corners, s) for s in (0.999, 0.9, 0.7)])
        local = torch.cat([local, part.corners.view(-1, 1, 3).lerp(part.corners.view(1, -1, 3), 0.5).view(-1, 3)])
        points = toy_shapes.Points(local, torch.tensor([[0.0, 0, 1]]).repeat(len(local), 1), torch.ones(len(local)))
        painted, shine = toy_shapes.albedo(body, k, points, 0), toy_shapes.gloss(body, k, points)
        seen |= {tuple(round(v, 3) for v in c) for c in painted.tolist()}
        glass = (painted == torch.tensor([0.035, 0.045, 0.055])).all(1)
        wanted = torch.where(glass, 1.0, 0.0 if part.paint == "wheel" else 0.5)
        assert torch.equal(shine, wanted), f"{part.paint}: glass mirrors wholly, paint by half, tyres not at all"
    for name, wanted in (("paint", (0.5, 0.2, 0.1)), ("tyres", (0.03, 0.03, 0.03)), ("glass", (0.035, 0.045, 0.055)),
                         ("a sill", (0.125, 0.05, 0.025))):
        assert wanted in seen, f"no {name} among {sorted(seen)}"


def test_other_cars_leave_the_street_and_the_lights_as_they_are_and_all_are_used():
    used = set()
    for seed in range(6):
        plain, mixed = sample_scene(seed), sample_scene(seed, WorldConfig(cars=SHAPES))
        assert len(plain.bodies) == len(mixed.bodies) and plain.road == mixed.road
        for a, b in zip(plain.bodies, mixed.bodies):
            assert torch.equal(a.pose, b.pose) and torch.equal(a.color, b.color)
            assert a.size is None or torch.equal(a.size[[0, 2]], b.size[[0, 2]])
            if a.size is not None:
                height = -torch.cat([part.corners for part in b.parts])[:, 1].min()
                assert b.size[1] == pytest.approx(float(height), rel=1e-5), "the box has the shape's own height"
        assert torch.equal(plain.light.sun, mixed.light.sun) and torch.equal(plain.naive.sky, mixed.naive.sky)
        used |= {len(body.parts) for body in mixed.bodies if body.size is not None}
        assert all(torch.equal(a.corners, b.corners) for x, y in zip(plain.bodies, sample_scene(seed).bodies)
                   for a, b in zip(x.parts, y.parts)), "without the option they are saloons"
    assert used == {6, 8}, "a pickup has two walls more"
    assert {sample_scene(seed, WorldConfig(cars=("van", "pickup"))).bodies[0].parts[1].paint for seed in range(6)} == {
        "cabin", "body"}, "the actor is a van or a pickup"


def test_gloss_changes_vehicles_alone_and_none_is_none():
    plain, none, shiny = (make_clip(0, WorldConfig(frames=1, grain=0.0, **more)) for more in (
        {}, {"gloss": 0.0}, {"gloss": 1.0}))
    assert torch.equal(plain.x_gt, none.x_gt) and torch.equal(plain.x_ni, none.x_ni)
    changed = (plain.x_gt != shiny.x_gt).any(dim=0, keepdim=True)
    assert changed[plain.actor == 1].float().mean() > 0.5
    assert (shiny.x_gt - plain.x_gt).min() >= -1e-6, "a mirror adds light"
    others = plain.moving > 0                                          # all vehicles move here
    grown = torch.nn.functional.max_pool2d((others | (plain.actor > 0)).float()[0], 3, 1, 1) > 0
    assert not (changed[0] & ~grown).any(), "what is no vehicle has changed"
    assert (plain.x_ni != shiny.x_ni)[:, plain.actor[0] == 1].any(), "the inserted asset is glossy too"


def light(to_sun=(0.0, -1.0, 0.0)):
    return toy_light.Light(torch.tensor(to_sun), torch.tensor([2.0, 1.9, 1.7]), torch.tensor([0.4, 0.45, 0.5]), 1.1)


def test_a_mirror_shows_the_sky_where_the_reflected_ray_goes_by_schlicks_fresnel():
    up, one = torch.tensor([[0.0, -1.0, 0.0]]), torch.ones(1)
    for degrees in (0, 50, 80):
        a = math.radians(degrees)                                      # from the vertical
        ray = torch.tensor([[0.0, math.cos(a), math.sin(a)]])
        found = toy_light.mirror(3 * ray, up, light((1.0, 0.0, 0.0)), one, 0.5 * one)
        fresnel = 0.04 + 0.96 * (1 - math.cos(a)) ** 5
        wanted = 0.5 * fresnel * toy_light.sky(torch.tensor([math.cos(a)]), light())
        assert torch.allclose(found, wanted, rtol=1e-4), f"{degrees} degrees: {found.tolist()}, not {wanted.tolist()}"
    wall = torch.tensor([[0.0, 0.0, -1.0]])
    down = torch.tensor([[0.0, 0.6, 0.8]])                             # the reflected ray meets the road
    found = toy_light.mirror(down, wall, light((1.0, 0.0, 0.0)), one, one)
    assert torch.allclose(found, (0.04 + 0.96 * 0.2**5) * 0.2 * 1.1 * light().sky[None], rtol=1e-4)


def test_the_sun_glints_where_a_mirror_throws_it_to_the_eye_unless_it_is_hidden():
    up, one, s = torch.tensor([[0.0, -1.0, 0.0]]), torch.ones(1), math.sqrt(0.5)
    sun = light((0.0, -s, s))
    ray = torch.tensor([[0.0, s, s]])
    bright, hidden = (toy_light.mirror(ray, up, sun, lit, one) for lit in (one, 0 * one))
    fresnel = 0.04 + 0.96 * (1 - s) ** 5
    assert torch.allclose(bright - hidden, fresnel * 40 * 1.1 * sun.sun[None], rtol=1e-3)
    beside = torch.nn.functional.normalize(torch.tensor([[0.1, s, s]]), dim=1)
    assert (toy_light.mirror(beside, up, sun, one, one) - hidden).mean() < 0.3 * (bright - hidden).mean()


def test_the_haze_takes_up_to_half_of_a_far_colour():
    color, far = torch.tensor([[0.1, 0.2, 0.3]]), toy_light.horizon(light())
    for depth, share in ((0.0, 0.0), (55.0, 0.25), (110.0, 0.5), (math.inf, 0.5)):
        found = toy_light.haze(color, torch.tensor([depth]), light())
        assert torch.allclose(found, (1 - share) * color + share * far, rtol=1e-5), f"{depth} m"
