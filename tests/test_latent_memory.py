"""The world model's latent memory against loops over points and cells, and what its order must not change."""

import math
from dataclasses import replace

import pytest
import torch

from mirage_min.method.camera import Camera
from mirage_min.method.latent_memory import NEAR, Memory, add, pixel_frame, read
from tests import small

C, h, w, P = 3, 5, 7, 4  # channels, cells, and a cell's side in pixels
H, W = h * P, w * P


def camera(x=0.0, y=0.0, z=0.0, turn=0.0, dtype=torch.float64) -> Camera:
    """At a place in the world, turned to the right; the principal point is not the middle."""
    K = torch.tensor([[19.0, 0, 13.3], [0, 23.0, 11.1], [0, 0, 1]], dtype=dtype)
    pose = torch.eye(4, dtype=dtype)
    pose[0, 0], pose[0, 2], pose[2, 0], pose[2, 2] = math.cos(turn), math.sin(turn), -math.sin(turn), math.cos(turn)
    pose[:3, 3] = torch.tensor([x, y, z], dtype=dtype)
    return Camera.from_pose(K, pose, W, H)


WAY = [camera(), camera(0.3, -0.1, 0.5, 0.1), camera(-0.4, 0.2, 1.0, -0.2), camera(0.1, 0, -1.0, 0.05)]


def frames(dtype=torch.float64, seed=0):
    """A latent and a depth for each camera of WAY; every depth of a cell is one number, so that no median matters."""
    g = torch.Generator().manual_seed(seed)
    for _ in WAY:
        depth = 2 + 3 * torch.rand(h, w, generator=g, dtype=dtype)
        yield torch.randn(C, h, w, generator=g, dtype=dtype), depth.repeat_interleave(P, 0).repeat_interleave(P, 1)


def filled(dtype=torch.float64) -> Memory:
    memory = Memory.empty(C, dtype)
    for (z, depth), view in zip(frames(dtype), WAY):
        memory = add(memory, z, depth, view)
    return memory


def looped(memory: Memory, view: Camera) -> tuple[torch.Tensor, torch.Tensor]:
    """`read` in loops: each point through the full-size camera, the pixel's cell by division."""
    z, mask, depth = torch.zeros(C, h, w, dtype=torch.float64), torch.zeros(1, h, w), {}
    for point, feature in zip(memory.points.tolist(), memory.features):
        a, b, c = (sum(m * p for m, p in zip(row, [*point, 1.0])) for row in view.world_to_camera.tolist()[:3])
        if c <= NEAR:
            continue
        u = (view.K[0, 0] * a + view.K[0, 1] * b + view.K[0, 2] * c) / c
        v = (view.K[1, 1] * b + view.K[1, 2] * c) / c
        i, j = math.floor(v / P), math.floor(u / P)
        if 0 <= i < h and 0 <= j < w and c < depth.get((i, j), math.inf):
            depth[i, j], z[:, i, j], mask[0, i, j] = c, feature, 1
    return z, mask


def same(given, wanted):
    for a, b in zip(given, wanted):
        assert a.shape == b.shape and torch.equal(a.double(), b.double()), f"{(a != b).sum()} of {a.numel()} differ"


def test_a_point_is_where_its_cells_centre_was():
    """Against an equation for each coordinate, pixels in place of cells."""
    (z, depth), view = next(frames()), WAY[1]
    memory = add(Memory.empty(C, torch.float64), z, depth, view)
    for n in range(h * w):
        i, j = divmod(n, w)
        d = depth[i * P, j * P]
        x = (P * (j + 0.5) - view.K[0, 2]) / view.K[0, 0] * d
        y = (P * (i + 0.5) - view.K[1, 2]) / view.K[1, 1] * d
        wanted = torch.linalg.inv(view.world_to_camera) @ torch.tensor([x, y, d, 1], dtype=torch.float64)
        assert (memory.points[n] - wanted[:3]).abs().max() < 1e-12
        assert torch.equal(memory.features[n], z[:, i, j])


@pytest.mark.parametrize("view", [*WAY, camera(0, 0, 3.0), camera(turn=0.9)])
def test_read_is_the_loop_over_points(view):
    memory = filled()
    wanted = looped(memory, view)
    assert wanted[1].sum() > 5, "the test would see nothing"
    same(read(memory, view, h, w), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_view_that_was_added_is_read_back_to_the_bit(dtype):
    for (z, depth), view in zip(frames(dtype), WAY):
        memory = add(Memory.empty(C, dtype), z, depth, view)
        same(read(memory, view, h, w), (z, torch.ones(1, h, w)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_order_and_repetition_change_nothing(dtype):
    memory, shuffle = filled(dtype), torch.randperm(len(WAY) * h * w, generator=torch.Generator().manual_seed(1))
    shuffled = Memory(memory.points[shuffle], memory.features[shuffle])
    twice = Memory(memory.points.repeat(2, 1), memory.features.repeat(2, 1))
    for view in WAY:
        same(read(shuffled, view, h, w), read(memory, view, h, w))
        same(read(twice, view, h, w), read(memory, view, h, w))


def test_of_points_at_one_depth_the_oldest_is_read():
    """A wall straight ahead, added three times with other features."""
    view, wall = camera(), torch.full((H, W), 3.0, dtype=torch.float64)
    layers = torch.randn(3, C, h, w, dtype=torch.float64)
    memory = Memory.empty(C, torch.float64)
    for z in layers:
        memory = add(memory, z, wall, view)
    same(read(memory, view, h, w)[:1], layers[:1])
    last_first = Memory(memory.points.flip(0), memory.features.flip(0))
    same(read(last_first, view, h, w)[:1], layers[2:])


def test_what_is_nearer_hides_what_is_farther_whichever_came_first():
    view, near, far = camera(), torch.ones(C, h, w), torch.full((C, h, w), 2.0)
    wall = torch.full((H, W), 5.0)
    post = torch.zeros(H, W)
    post[:, 2 * P : 3 * P] = 2.0
    wanted = torch.full((C, h, w), 2.0)
    wanted[:, :, 2] = 1.0
    for order in ([(near, post), (far, wall)], [(far, wall), (near, post)]):
        memory = Memory.empty(C)
        for z, depth in order:
            memory = add(memory, z, depth, view)
        assert len(memory) == h + h * w
        same(read(memory, view, h, w), (wanted, torch.ones(1, h, w)))


def test_where_there_is_nothing_all_is_zero():
    for memory, view in ((Memory.empty(C), camera()), (filled(), camera(turn=math.pi)), (filled(), camera(z=100.0))):
        z, mask = read(memory, view, h, w)
        assert z.shape == (C, h, w) and not z.any() and not mask.any()


def test_the_depth_of_a_cell_is_the_nearer_median_of_its_known_pixels_if_half_are_known():
    z, view = torch.zeros(C, h, w), camera()
    depth = torch.full((H, W), math.inf)
    cell = torch.tensor([9.0, 2, 7, 3, math.nan, 0, math.inf, -1, 8, 4, 6, 5, math.inf, 0, 0, 0])  # 2 … 9 are known
    depth[:P, :P] = cell.view(P, P)
    memory = add(Memory.empty(C), z, depth, view)
    assert len(memory) == 1
    assert (view.world_to_camera @ torch.tensor([*memory.points[0].tolist(), 1]).double())[2] == pytest.approx(5)
    depth[0, 0] = math.nan  # seven of sixteen
    assert len(add(Memory.empty(C), z, depth, view)) == 0


def test_one_moving_pixel_leaves_a_cell_out_and_sky_must_be_most_of_it():
    z, depth, view = torch.zeros(C, h, w), torch.full((H, W), 3.0), camera()
    dynamic, sky = torch.zeros(2, H, W, dtype=torch.bool)
    dynamic[3 * P - 1, 4 * P] = True                   # the corner of cell (2, 4)
    sky[:P, :P] = True                                 # cell (0, 0)
    sky[:P, P : P + P // 2] = True                     # half of (0, 1), which stays
    sky[:P, 2 * P : 3 * P] = sky[:P, 3 * P - 1] = True  # (0, 2)
    sky[0, 2 * P : 3 * P - 1] = False                  # but for three of its pixels
    kept = read(add(Memory.empty(C), z, depth, view, dynamic=dynamic, sky=sky), view, h, w)[1][0]
    assert [divmod(n, w) for n in (kept == 0).flatten().nonzero().flatten().tolist()] == [(0, 0), (0, 2), (2, 4)]


def test_a_bounded_memory_takes_only_what_it_does_not_show_at_that_depth():
    (z, depth), view = next(frames()), camera()
    memory = add(Memory.empty(C, torch.float64), z, depth, view)
    assert len(add(memory, z + 1, depth * 1.04, view, known=0.05)) == h * w
    assert len(add(memory, z, depth, view)) == 2 * h * w, "the union takes all"
    nearer = depth.clone()
    nearer[:P] /= 1.1
    assert len(add(memory, z, nearer, view, known=0.05)) == h * w + w
    assert len(add(memory, z, depth, camera(turn=math.pi), known=0.05)) == 2 * h * w


def test_gradients_reach_the_features_that_were_read_and_no_others():
    memory = filled()
    features = memory.features.clone().requires_grad_()
    memory = Memory(memory.points.requires_grad_(), features)
    z, mask = read(memory, WAY[1], h, w)
    weight = torch.randn_like(z)
    found, of_points = torch.autograd.grad((z * weight).sum(), [features, memory.points], allow_unused=True)
    wanted = torch.zeros_like(features)
    for i, j in mask[0].nonzero().tolist():
        n = (features == z[:, i, j]).all(dim=1).nonzero().item()
        wanted[n] = weight[:, i, j]
    assert torch.equal(found, wanted) and of_points is None
    # and through `add`
    (z, depth), view = next(frames()), camera()
    z.requires_grad_()
    grad, = torch.autograd.grad(read(add(Memory.empty(C, z.dtype), z, depth, view), view, h, w)[0].sum(), z)
    assert torch.equal(grad, torch.ones_like(z))


def test_a_camera_with_pixel_centres_at_integers_is_taken_at_the_door():
    """One point seen by both; without the flag it falls half a pixel off, which in a cell of 1 pixel shows."""
    ours = camera()
    K = ours.K.clone()
    K[:2, 2] -= 0.5
    pose = torch.linalg.inv(ours.world_to_camera)
    theirs = Camera.from_pose(K, pose, W, H, integer_pixels=True)
    assert torch.equal(theirs.K, ours.K) and K[0, 2] == 12.8, "the K given is left alone"
    assert torch.equal(Camera.from_pose(K, pose, W, H).K, K)
    # the pixel (row 4, column 9) of an integer grid looks along K⁻¹ [9, 4, 1]
    point = 3 * torch.linalg.inv(K) @ torch.tensor([9.0, 4, 1], dtype=torch.float64)
    memory = Memory(point[None], torch.ones(1, C, dtype=torch.float64))
    assert read(memory, theirs, H, W)[1][0].nonzero().tolist() == [[4, 9]]


def test_what_is_given_stays_and_bfloat16_keeps_points_in_float32():
    (z, depth), view = next(frames(torch.float32)), camera()
    memory = Memory.empty(C, torch.bfloat16)
    with small.unchanged(z, depth, view.K, view.world_to_camera, memory.points, memory.features):
        fuller = add(memory, z, depth, view)
        seen, mask = read(fuller, view, h, w)
    assert len(memory) == 0 and len(fuller) == h * w
    assert fuller.points.dtype == torch.float32 and seen.dtype == mask.dtype == torch.bfloat16
    assert torch.equal(seen, z.bfloat16())


def test_the_frame_of_a_latent_is_the_last_that_it_codes():
    assert [pixel_frame(f) for f in range(3)] == [0, 4, 8]


@pytest.mark.parametrize("change, message", [
    (dict(z=torch.zeros(C + 1, h, w)), r"z must be \[3, h, w\], got \[4, 5, 7\]"),
    (dict(z=torch.zeros(1, C, h, w)), r"z must be \[3, h, w\], got \[1, 3, 5, 7\]"),
    (dict(depth=torch.ones(H, W + 1)), r"depth must be \[H, W\] = \[20, 28\].* got \[20, 29\]"),
    (dict(depth=torch.ones(1, H, W)), r"depth must be .* got \[1, 20, 28\]"),
    (dict(dynamic=torch.ones(h, w, dtype=torch.bool)), r"dynamic must be .* got \[5, 7\]"),
    (dict(sky=torch.ones(W, H, dtype=torch.bool)), r"sky must be .* got \[28, 20\]"),
    (dict(z=torch.zeros(C, 6, w)), "20 x 28 pixels cannot be cut into 6 x 7 cells"),
    (dict(camera=replace(camera(), world_to_camera=torch.full((4, 4), math.nan))), "camera is not finite"),
    (dict(camera=replace(camera(), K=torch.full((3, 3), math.inf))), "camera is not finite")])
def test_what_does_not_fit_is_refused(change, message):
    given = dict(z=torch.zeros(C, h, w), depth=torch.ones(H, W), camera=camera()) | change
    with pytest.raises(ValueError, match=message):
        add(Memory.empty(C), **given)
    if "camera" in change or "cells" in message:
        with pytest.raises(ValueError, match=message):
            read(Memory.empty(C), given["camera"], *given["z"].shape[1:])
