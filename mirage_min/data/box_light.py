"""A recorded vehicle in another light: its 3D box says which way its sides face, and the light what they get.

    I = M ⊙ x · gain + (1 − M) ⊙ x,   gain = exposure · g / mean(g),   g = shade(n, light) / shade(n, overcast sky)

in linear light; n is the normal of a rounded box. The street and the vehicle's shadow stay as they were recorded.

    normals = box_normals(corners, (H, W))      # of one frame, corners [8, 2] in pixels
    y = relight(x, mask, normals, light)        # x [3, T, H, W] in [-1, 1]

DEVIATION: DiffusionHarmonizer relights with a diffusion model. Here a vehicle is a box, and what the sun did to it when
it was recorded stays in the picture: it is taken for the light of an overcast sky.

    python -m mirage_min.data.box_light         # how a low sun from one side lights the sides of a box
"""

import torch
from torch import Tensor
from torch.nn import functional as nnf

from .isp import FEATHER, OF_HEIGHT, feather
from .street import GAMMA
from .toy_light import Light, shade

OVERCAST = Light(torch.tensor([0.0, -1.0, 0.0]), torch.zeros(3), torch.ones(3), 1.0)


def relight(x: Tensor, mask: Tensor, normals: Tensor, light: Light) -> Tensor:
    """x [3, T, H, W] in [-1, 1] with the vehicle in mask [1, T, H, W] in another light; like x.

    normals [3, T, H, W] are unit vectors where the mask is 1, in axes of the box: right, down, ahead.
    """
    n = normals.flatten(1).T
    one = torch.ones(len(n))
    new, old = (shade(torch.ones(3), n, each, one, one) for each in (light, OVERCAST))
    g = (new / old).T.view_as(normals)
    mean = (g.mean(dim=0, keepdim=True) * mask).sum() / mask.sum()
    gain = light.exposure * g / mean
    M = feather(mask, FEATHER * x.shape[2] / OF_HEIGHT)
    linear = ((x + 1) / 2).clamp(0, 1) ** GAMMA
    # I = M ⊙ x · gain + (1 − M) ⊙ x
    y = M * linear * gain + (1 - M) * linear
    return y.clamp(0, 1) ** (1 / GAMMA) * 2 - 1


# ---- which way a box faces -------------------------------------------------------------------------------------------

def box_normals(corners: Tensor, size: tuple[int, int]) -> Tensor:
    """Normals [3, H, W] of a rounded box at the pixels of an image: right, down, ahead in the box's own axes.

    corners [8, 2]: its corners in pixels, the first four at its left, the first two of each four at its rear, the first
    of each two below (pandaset.CORNERS). A pixel outside the box has the normal of the nearest side.
    """
    H, W = size
    ys, xs = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    pixels = torch.stack([xs, ys], dim=-1).double()
    nearest, normals = torch.full((H, W), torch.inf, dtype=torch.float64), torch.zeros(H, W, 3, dtype=torch.float64)
    for axis in range(3):
        for sign in (-1, 1):
            quad = side(corners.double(), axis, sign)
            if sign * area(quad) > -1:
                continue  # it faces away, or covers less than a pixel
            u, v = on_side(quad, pixels).unbind(-1)
            outside = torch.maximum(u.abs(), v.abs())  # 1 at the side's edge
            u, v = u.clamp(-1, 1), v.clamp(-1, 1)
            # flat in the middle, and halfway to the next side at an edge
            n = torch.zeros_like(normals)
            n[..., axis], n[..., (axis + 1) % 3], n[..., (axis + 2) % 3] = sign, u**3, v**3
            nearer = outside < nearest
            normals[nearer], nearest[nearer] = n[nearer], outside[nearer]
    width, length, height = nnf.normalize(normals, dim=-1).float().unbind(-1)
    return torch.stack([width, -height, length])


def side(corners: Tensor, axis: int, sign: int) -> Tensor:
    """The corners [4, 2] of a side of a box, in a loop: (−, −), (+, −), (+, +), (−, +) along the next two axes."""
    box = corners.view(2, 2, 2, 2).select(axis, (sign + 1) // 2)
    if axis == 1:  # what is left is (height, width) in turn, not (width, height)
        box = box.transpose(0, 1)
    return torch.stack([box[0, 0], box[1, 0], box[1, 1], box[0, 1]])


def area(loop: Tensor) -> float:
    """The signed area of a loop of points [N, 2]; above 0 if it runs clockwise to the eye, y pointing down."""
    x, y = loop.T
    return float((x * y.roll(-1) - x.roll(-1) * y).sum() / 2)


def on_side(quad: Tensor, pixels: Tensor) -> Tensor:
    """Where pixels [..., 2] lie on a side whose corners are at quad [4, 2]: u, v [..., 2], within ±1 on it.

    A plane in a camera is a homography: (x, y) ~ P (u, v, 1). A point behind the side's horizon is infinitely far.
    """
    uv = torch.tensor([[-1.0, -1.0], [1, -1], [1, 1], [-1, 1]], dtype=torch.float64)
    rows, values = [], []
    for (u, v), (x, y) in zip(uv.tolist(), quad.tolist()):
        rows += [[u, v, 1, 0, 0, 0, -x * u, -x * v], [0, 0, 0, u, v, 1, -y * u, -y * v]]
        values += [x, y]
    P = torch.linalg.lstsq(torch.tensor(rows, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)).solution
    back = torch.linalg.pinv(torch.cat([P, torch.ones(1, dtype=torch.float64)]).view(3, 3))
    back = back / (back @ torch.cat([quad.mean(dim=0), torch.ones(1, dtype=torch.float64)]))[2]
    x = torch.cat([pixels, torch.ones_like(pixels[..., :1])], dim=-1) @ back.T
    return torch.where(x[..., 2:] > 1e-9, x[..., :2] / x[..., 2:], torch.inf)


if __name__ == "__main__":
    sun = nnf.normalize(torch.tensor([-1.0, -0.5, 0.0]), dim=0)
    light = Light(sun, torch.ones(3), torch.full((3,), 0.5), 1.0)
    for name, normal in {"roof": (0, -1, 0), "left": (-1, 0, 0), "right": (1, 0, 0), "front": (0, 0, 1)}.items():
        n = torch.tensor([normal], dtype=torch.float32)
        new, old = (float(shade(torch.ones(3), n, each, torch.ones(1), torch.ones(1))[0, 0])
                    for each in (light, OVERCAST))
        print(f"{name:5} {new / old:.2f} of what an overcast sky gives it, the sun low at the left")
