"""A recorded vehicle's light: where a box faces, by rays through it, and what a light does to its sides."""

import math

import pytest
import torch

from mirage_min.data import box_light
from mirage_min.data.toy_light import Light

SIZE, FOCAL = (60, 90), 70.0
CORNERS = torch.cartesian_prod(*(torch.tensor([-0.5, 0.5], dtype=torch.float64),) * 3)  # right, ahead, up
EXTENT = torch.tensor([1.9, 4.4, 1.5], dtype=torch.float64)  # width, length, height


def camera_to_box(yaw):
    """Rotation [3, 3] from a camera (right, down, ahead) to a box (width, length, height) that is turned by yaw."""
    c, s = math.cos(yaw), math.sin(yaw)
    upright = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]], dtype=torch.float64)
    return torch.tensor([[c, s, 0], [-s, c, 0], [0, 0, 1]], dtype=torch.float64) @ upright


def seen(yaw, middle):
    """The corners [8, 2] in pixels of a box whose middle is at `middle` in the camera."""
    points = (CORNERS * EXTENT) @ camera_to_box(yaw) + torch.tensor(middle, dtype=torch.float64)
    return points[:, :2] / points[:, 2:] * FOCAL + torch.tensor([SIZE[1] / 2, SIZE[0] / 2])


def faces_by_rays(yaw, middle):
    """For each pixel the side where its ray enters the box, (axis, sign), by slabs; None where it passes."""
    R = camera_to_box(yaw)
    found = {}
    for i in range(SIZE[0]):
        for j in range(SIZE[1]):
            ray = torch.tensor([(j + 0.5 - SIZE[1] / 2) / FOCAL, (i + 0.5 - SIZE[0] / 2) / FOCAL, 1.0]).double()
            o, d = -(R @ torch.tensor(middle, dtype=torch.float64)), R @ ray
            near, far = (-EXTENT / 2 * d.sign() - o) / d, (EXTENT / 2 * d.sign() - o) / d
            if near.amax() < far.amin():
                axis = int(near.argmax())
                found[i, j] = axis, -int(d[axis].sign())
    return found


@pytest.mark.parametrize("yaw, middle", [(0.4, (0.5, 1.0, 9.0)), (-1.2, (-2.0, 0.9, 8.0)), (2.5, (1.0, -1.5, 9.0))])
def test_a_pixel_faces_where_its_ray_enters_the_box(yaw, middle):
    normals = box_light.box_normals(seen(yaw, middle), SIZE)
    assert torch.allclose(normals.norm(dim=0), torch.ones(SIZE), atol=1e-5)
    width, height, length = normals
    in_box = torch.stack([width, length, -height])
    faces = faces_by_rays(yaw, middle)
    assert len(set(faces.values())) >= 2 and len(faces) > 200
    for (i, j), (axis, sign) in faces.items():
        n = in_box[:, i, j]
        assert sign * n[axis] >= n.abs().amax() - 1e-4, (i, j)


def test_the_middle_of_a_side_faces_straight_out_and_an_edge_halfway_to_the_next():
    corners = seen(0.6, (0.0, 1.2, 8.0))
    rear = box_light.side(corners, 1, -1)
    assert torch.allclose(box_light.on_side(rear, rear), torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]]).double())
    normals = box_light.box_normals(corners, SIZE)
    x, y = rear.mean(dim=0).int().tolist()  # not the middle in perspective, but well inside
    assert normals[2, y, x] < -0.99, "a rear faces against the box's ahead"
    for edge, axis, sign in (((2, 3), 0, 1), ((1, 2), 1, -1)):  # to the right side, and to the roof: up is -down
        x, y = rear[list(edge)].mean(dim=0).int().tolist()
        beyond, ahead = sign * normals[axis, y, x], normals[2, y, x]
        assert beyond > 0.5 and ahead < -0.5, "an edge faces half to the next side"


def light(to_sun, sun, sky=(1.0, 1.0, 1.0), exposure=1.0):
    to_sun = torch.tensor(to_sun) / torch.tensor(to_sun).norm()
    return Light(to_sun, torch.tensor(sun), torch.tensor(sky), exposure)


@pytest.fixture
def clip():
    torch.manual_seed(0)
    x, mask = torch.rand(3, 2, *SIZE) * 0.6 - 0.7, torch.zeros(1, 2, *SIZE)
    mask[:, :, 15:45, 20:70] = 1
    normals = torch.zeros(3, 2, *SIZE)
    normals[0, :, :, :45], normals[1, :, :, 45:] = -1, -1  # the left half faces left, the right one up
    return x, mask, normals


def test_the_light_it_is_taken_to_have_changes_nothing_and_exposure_all_of_it(clip):
    x, mask, normals = clip
    assert (box_light.relight(x, mask, normals, box_light.OVERCAST) - x).abs().max() < 1e-5
    y = box_light.relight(x, mask, normals, light((0.0, -1, 0), (0.0, 0, 0), exposure=0.7))
    ratio = ((y + 1) / (x + 1))[:, :, 20:40, 25:65] ** 2.2
    assert torch.allclose(ratio, torch.tensor(0.7), atol=1e-4)


def test_the_vehicles_edge_is_as_wide_as_two_pixels_are_on_576_rows():
    x, mask = torch.zeros(3, 1, 288, 40), torch.zeros(1, 1, 288, 40)
    mask[..., 20:] = 1
    up = torch.tensor([0.0, -1.0, 0.0]).view(3, 1, 1, 1).expand(3, 1, 288, 40)
    half_as_bright = box_light.relight(x, mask, up, light((0.0, -1, 0), (0.0, 0, 0), exposure=0.5))
    share = 2 * (1 - (half_as_bright[0, 0, 144] + 1) ** 2.2)
    wanted = 0.5 * (1 + torch.erf((torch.arange(40) - 19.5) / 2**0.5))  # a step blurred by one pixel
    assert (share - wanted).abs().max() < 0.03, f"largest difference {(share - wanted).abs().max():.3f}"


def test_a_sun_lights_the_sides_that_it_sees_by_its_own_colour(clip):
    x, mask, normals = clip
    y = box_light.relight(x, mask, normals, light((-1.0, 0, 0), (1.0, 0.5, 0.0)))
    gain = ((y + 1) / (x + 1))[:, 0] ** 2.2
    left, above = gain[:, 30, 30], gain[:, 30, 60]
    # g: to the left .65 sky and the sun, over .65; above 1 over 1; the mean over the mask is made 1
    g_left, g_above = (0.65 + torch.tensor([1.0, 0.5, 0.0])) / 0.65, torch.ones(3)
    mean = (g_left.mean() + g_above.mean()) / 2
    assert torch.allclose(left, g_left / mean, atol=1e-3) and torch.allclose(above, g_above / mean, atol=1e-3)
    assert (y - x)[:, :, :10].abs().max() < 1e-5, "far from the vehicle nothing changes"


def test_the_area_of_a_loop_is_signed_by_its_sense():
    triangle = torch.tensor([[1.0, 1.0], [4.0, 1.0], [1.0, 3.0]])  # to the right, then down to the left: clockwise
    assert box_light.area(triangle) == pytest.approx(3) and box_light.area(triangle.flip(0)) == pytest.approx(-3)
    assert box_light.area(triangle + 100) == pytest.approx(3)
