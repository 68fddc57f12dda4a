"""3D Gaussians: PLY files of them, moving them, and a differentiable renderer in plain torch.

A scene is N ellipsoids with an opacity and a colour that depends on where it is seen from. A frame of it is made as in
3D Gaussian Splatting (Kerbl et al. 2023): an ellipsoid's image is approximated by a 2D Gaussian (EWA, Zwicker et al.
2001), and a pixel p blends those over it from the nearest to the farthest,

    C(p) = Σ_i c_i α_i T_i,     T_i = Π_{j<i} (1 - α_j)

The image is made tile by tile, a tile by blocks of Gaussians, and the backward pass computes each block again: nothing
of the size Gaussians × pixels is ever held. Left out: CUDA kernels and the optimisation of scenes.

    python -m mirage_min.data.splat              # a sphere of Gaussians: written, read, rendered to splat.png
"""

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as nnf
from torch.utils.checkpoint import checkpoint

from ..method.camera import Camera
from ..networks.weights import one_line, whole_file

NEAR, LOW_PASS, MAX_ALPHA, MIN_ALPHA = 0.2, 0.3, 0.99, 1 / 255  # 3DGS's: world units, square pixels
TILE, BLOCK = 16, 1024


@dataclass
class Gaussians:
    """N Gaussians as PLY files store them; ValueError if the shapes do not fit together."""

    means: Tensor              # [N, 3]
    log_scales: Tensor         # [N, 3] logarithms of the standard deviations along a Gaussian's axes
    quats: Tensor              # [N, 4] w x y z of any length > 0: a Gaussian's axes to world
    logit_opacities: Tensor    # [N] before the sigmoid
    sh: Tensor                 # [N, (degree + 1)², 3], degree 0 to 3; colour in [0, 1] = ½ + Σ_k sh_k Y_k(direction)
    ids: Tensor | None = None  # [N] int64, the object that each belongs to

    def __post_init__(self):
        N = len(self.means)
        K = self.sh.shape[1] if self.sh.ndim == 3 else 0
        wanted = [[N, 3], [N, 3], [N, 4], [N], [N, K, 3]] + [[N]] * (self.ids is not None)
        given = [list(v.shape) for v in vars(self).values() if v is not None]
        if given != wanted or K not in (1, 4, 9, 16):
            raise ValueError(f"Gaussians: wanted shapes {wanted} with K of 1, 4, 9 or 16, got {given}")

    def __len__(self) -> int:
        return len(self.means)

    def select(self, index: Tensor) -> "Gaussians":
        """The Gaussians of a mask [N] bool, or of indices [M] int64, in their order."""
        return Gaussians(*(None if v is None else v[index] for v in vars(self).values()))

    @staticmethod
    def cat(parts: list["Gaussians"]) -> "Gaussians":
        """The Gaussians of several sets in one; SH get zeros up to the highest degree; no ids unless all have them."""
        K = max(p.sh.shape[1] for p in parts)
        parts = [replace(p, sh=nnf.pad(p.sh, (0, 0, 0, K - p.sh.shape[1]))) for p in parts]
        columns = [[getattr(p, f.name) for p in parts] for f in fields(Gaussians)]
        return Gaussians(*(None if any(v is None for v in c) else torch.cat(c) for c in columns))

    def transformed(self, s: float, R: Tensor, t: Tensor) -> "Gaussians":
        """x' = s·R·x + t for the whole: sizes are multiplied by s, axes (unit quaternions then) and every band of the
        SH turned by R, so that the colours travel with the object. s > 0, R [3, 3] a rotation (else ValueError), t [3].
        """
        like = {"dtype": self.means.dtype, "device": self.means.device}
        s, R, t = (torch.as_tensor(v, **like) for v in (s, R, t))
        if not (s > 0 and (R @ R.T - torch.eye(3).to(R)).abs().max() < 1e-3 and torch.linalg.det(R) > 0):
            raise ValueError(f"wanted a scale > 0 and a rotation, got {s.item():.3g} and {R.tolist()}")
        # f'(d) = f(Rᵀ d) at many directions d, solved for the coefficients of f'
        K = self.sh.shape[1]
        draws = torch.Generator().manual_seed(0)
        d = nnf.normalize(torch.randn(64, 3, generator=draws, dtype=torch.float64), dim=1)
        turn = torch.linalg.lstsq(sh_basis(d, K), sh_basis(d @ R.double().cpu(), K)).solution
        return replace(self, means=s * self.means @ R.T + t, log_scales=self.log_scales + s.log(),
                       quats=quaternions(R @ rotations(self.quats)), sh=turn.to(self.sh) @ self.sh)


def rotations(quats: Tensor) -> Tensor:
    """Quaternions w x y z [N, 4], of any length > 0 -> rotation matrices [N, 3, 3]"""
    w, x, y, z = nnf.normalize(quats, dim=1).unbind(1)
    return torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
                        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
                        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], dim=1).view(-1, 3, 3)


def quaternions(R: Tensor) -> Tensor:
    """Rotation matrices [N, 3, 3] -> unit quaternions w x y z [N, 4], of either sign"""
    a, b, c, d, e, f, g, h, i = R.flatten(1).unbind(1)
    # 4 q qᵀ: every row is a multiple of q, the one with the largest diagonal a safe one
    Q = torch.stack([1 + a + e + i, h - f, c - g, d - b, h - f, 1 + a - e - i, b + d, c + g,
                     c - g, b + d, 1 - a + e - i, f + h, d - b, c + g, f + h, 1 - a - e + i], dim=1).view(-1, 4, 4)
    return nnf.normalize(Q[torch.arange(len(Q)), Q.diagonal(dim1=1, dim2=2).argmax(1)], dim=1)


def sh_basis(d: Tensor, K: int) -> Tensor:
    """The first K real spherical harmonics, with 3DGS's signs, at unit directions [N, 3] -> [N, K]"""
    x, y, z = d.unbind(1)
    xx, yy, zz = x * x, y * y, z * z
    a, b, c, d = 0.4886025119029199, 1.0925484305920792, 0.4570457994644658, 0.5900435899266435
    Y = [torch.full_like(x, 0.28209479177387814), -a * y, a * z, -a * x,
         b * x * y, -b * y * z, 0.31539156525252005 * (3 * zz - 1), -b * x * z, b / 2 * (xx - yy),
         -d * y * (3 * xx - yy), 2.890611442640554 * x * y * z, -c * y * (5 * zz - 1),
         0.3731763325901154 * z * (5 * zz - 3), -c * x * (5 * zz - 1), 1.445305721320277 * z * (xx - yy),
         -d * x * (xx - 3 * yy)]
    return torch.stack(Y[:K], dim=1)


# ---- files -----------------------------------------------------------------------------------------------------------

KINDS = dict(char="i1", uchar="u1", short="<i2", ushort="<u2", int="<i4", uint="<u4", float="<f4", double="<f8")
KINDS |= {np.dtype(kind).name: kind for kind in KINDS.values()}  # int8, uint8, ..., float64


def columns(K: int) -> list[str]:
    """The names of INRIA's PLY properties in order, without the normals, for K spherical harmonics."""
    return [*"xyz", *(f"f_dc_{i}" for i in range(3)), *(f"f_rest_{i}" for i in range(3 * K - 3)), "opacity",
            *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4))]


def read_header(file: BinaryIO, path: str | Path) -> tuple[int, list[str], np.dtype, int]:
    """The header of a PLY -> how many vertices it has, their properties, the bytes of one, and where the first begins.

    ValueError that names the line which is not understood.
    """
    elements: list[tuple[str, int, list[tuple[str, str]]]] = []
    for number in range(2**20):
        line = file.readline(2**12)
        words = line.decode("ascii", "replace").split()
        match words:
            case ["ply"] if number == 0:
                continue
            case ["format", "binary_little_endian", "1.0"] | ["comment" | "obj_info", *_] if number > 0:
                continue
            case ["element", name, count] if number > 0 and count.isdecimal() and len(count) < 19:
                elements.append((name, int(count), []))
            case ["property", kind, name] if elements and kind in KINDS:
                elements[-1][2].append((kind, name))
            case ["property", "list", _, _, name] if elements and elements[-1][0] != "vertex":
                elements[-1][2].append(("list", name))
            case ["end_header"] if elements:
                break
            case _:
                raise ValueError(f"{path}: wanted a PLY header: format binary_little_endian 1.0, element vertex, "
                                 f"properties of one number each; its line {number + 1} is {line[:60]!r}")
    start = file.tell()
    for name, count, properties in elements:
        dtype = np.dtype([(str(i), KINDS.get(kind, "V0")) for i, (kind, _) in enumerate(properties)])
        if name == "vertex" and properties:
            return count, [name for _, name in properties], dtype, start
        if name == "chunk":
            raise ValueError(f"{path}: a compressed PLY, as SuperSplat and gsplat write them, is not read: "
                             "export an uncompressed one")
        if any(kind == "list" for kind, _ in properties):
            break
        start += count * dtype.itemsize
    raise ValueError(f"{path}: wanted a PLY header with vertices first, or after elements of one size, got "
                     f"{', '.join(name for name, _, _ in elements)[:60]}")


def load_ply(path: str | Path) -> Gaussians:
    """Gaussians in float32 from a PLY in INRIA's layout; ids are its property `object_id`, None if there is none.

    Properties may have any order and number type, and there may be others; only the header and the vertices are read.
    ValueError with file and field otherwise.
    """
    with one_line(Path(path)):
        file = open(path, "rb")
    with file:
        N, names, dtype, start = read_header(file, path)
        body = max(0, os.fstat(file.fileno()).st_size - start)
        if body < N * dtype.itemsize:
            raise ValueError(f"{path}: truncated: {N} vertices take {N * dtype.itemsize} bytes, got {body}")
        file.seek(start)
        table = np.fromfile(file, dtype, N)

    def column(name: str) -> Tensor:
        if names.count(name) != 1:
            raise ValueError(f"{path}: wanted one property {name}, got {names.count(name)}")
        values = table[str(names.index(name))]
        with np.errstate(over="ignore", invalid="ignore"):
            as_kept = values.astype(np.int64 if name == "object_id" else np.float32)
        if name == "object_id":
            good = as_kept == values
        elif name == "opacity":
            good = ~np.isnan(values)  # an opacity of 1 or 0 has no finite logit
        else:
            good = np.isfinite(as_kept)
        if not good.all():
            fault = "no integer" if name == "object_id" else "not finite"
            raise ValueError(f"{path}: property {name} is {fault} at vertex {good.argmin()}: {values[good.argmin()]}")
        return torch.from_numpy(as_kept)

    rest = sum(name.startswith("f_rest_") for name in names)
    K = next((k for k in (1, 4, 9) if 3 * k - 3 >= rest), 16)
    values = torch.stack([column(name) for name in columns(K)], dim=1)
    means, dc, rest, opacity, log_scales, quats = values.split([3, 3, 3 * K - 3, 1, 3, 4], dim=1)
    if not quats.any(dim=1).all():
        raise ValueError(f"{path}: rot_0 to rot_3 are zero at vertex {quats.any(dim=1).int().argmin()}")
    # f_rest: all coefficients of red, then of green, then of blue
    sh = torch.cat([dc[:, None], rest.view(N, 3, K - 1).mT], dim=1)
    ids = column("object_id") if "object_id" in names else None
    return Gaussians(means, log_scales, quats, opacity[:, 0], sh, ids=ids)


def save_ply(path: str | Path, g: Gaussians) -> None:
    """Write Gaussians as a PLY in INRIA's layout, atomically; load_ply reads float32 back bit for bit.

    ids become int32.
    """
    names, rest = columns(g.sh.shape[1]), g.sh[:, 1:].mT.flatten(1)
    values = torch.cat([g.means, g.sh[:, 0], rest, g.logit_opacities[:, None], g.log_scales, g.quats], dim=1)
    layout = [*"xyz", "nx", "ny", "nz", *names[3:]] + ["object_id"] * (g.ids is not None)
    table = np.zeros(len(g), [(name, "<i4" if name == "object_id" else "<f4") for name in layout])
    for name, value in zip(names, values.detach().cpu().T):
        table[name] = value.numpy()
    if g.ids is not None:
        table["object_id"] = g.ids.cpu().numpy()
    lines = "".join(f"property {'int' if name == 'object_id' else 'float'} {name}\n" for name in layout)
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(g)}\n{lines}end_header\n"
    with whole_file(Path(path)) as temporary:
        temporary.write_bytes(header.encode() + table.tobytes())


# ---- rendering -------------------------------------------------------------------------------------------------------

def project(g: Gaussians, camera: Camera) -> tuple[Tensor, Tensor]:
    """What a camera can see, from the nearest to the farthest, as 2D Gaussians.

    -> splats [M, 10]: x, y in pixels; a, b, c of the inverse covariance [[a, b], [b, c]]; opacity; r, g, b; depth
    -> boxes [M, 4]: x0, y0, x1, y1 in pixels, outside of which alpha is below MIN_ALPHA
    """
    K = camera.K.to(g.means)
    W, t = camera.world_to_camera[:3].to(g.means).split([3, 1], dim=1)
    p, opacity = g.means @ W.T + t[:, 0], g.logit_opacities.sigmoid()          # in the camera's coordinates
    seen = ((p[:, 2] > NEAR) & (opacity > MIN_ALPHA)).nonzero().squeeze(1)
    seen = seen[p[seen, 2].argsort(stable=True)]
    g, p, opacity = g.select(seen), p[seen], opacity[seen]
    z = p[:, 2]
    slope = p[:, :2] / z[:, None]
    xy = slope @ K[:2, :2].T + K[:2, 2]
    # J = ∂(pixel) / ∂(camera), taken at most 0.15 image sizes outside the image, as 3DGS: farther off it explodes
    size, focal = torch.tensor([camera.width, camera.height]).to(K), K.diagonal()[:2]
    low, high = (-K[:2, 2] - 0.15 * size) / focal, (1.15 * size - K[:2, 2]) / focal
    u, v = slope.maximum(low).minimum(high).unbind(1)
    J = K[:2, :2] @ torch.stack([1 / z, 0 * z, -u / z, 0 * z, 1 / z, -v / z], dim=1).view(-1, 2, 3)
    # Σ' = J W Σ Wᵀ Jᵀ + 0.3 I = A Aᵀ + 0.3 I = [[a, b], [b, c]],   Σ = R S Sᵀ Rᵀ                       3DGS Eq. 5, 6
    A = J @ W @ (rotations(g.quats) * g.log_scales.exp()[:, None])
    a = (A[:, 0] ** 2).sum(1) + LOW_PASS
    b = (A[:, 0] * A[:, 1]).sum(1)
    c = (A[:, 1] ** 2).sum(1) + LOW_PASS
    # a c - b² without cancellation: |A_0 × A_1|² + 0.3 (a + c) - 0.3²
    det = torch.linalg.cross(A[:, 0], A[:, 1]).square().sum(1) + LOW_PASS * (a + c) - LOW_PASS**2
    # colour = max(0, ½ + Σ_k sh_k Y_k(d)),   d from the camera to the Gaussian
    d = nnf.normalize(g.means + (W.T @ t).T, dim=1)
    rgb = (0.5 + torch.einsum("nk,nkc->nc", sh_basis(d, g.sh.shape[1]), g.sh)).clamp(min=0)
    splats = torch.cat([xy, torch.stack([c / det, -b / det, a / det, opacity], dim=1), rgb, z[:, None]], dim=1)
    # o exp(-½ r²) = 1/255 on the ellipse of radius r, whose box has the half sizes r √a and r √c. DEVIATION: 3DGS cuts
    # at r = 3, so that what a pixel shows depends on the tile it is in
    half = (2 * (opacity / MIN_ALPHA).log()[:, None] * torch.stack([a, c], dim=1)).sqrt().detach()
    boxes = torch.cat([xy - half, xy + half], dim=1).detach()
    inside = (boxes[:, 2:] > 0).all(1) & (boxes[:, :2] < size).all(1) & splats.isfinite().all(1)
    return splats[inside], boxes[inside]


def blend(splats: Tensor, index: Tensor, pixels: Tensor, sums: Tensor, T: Tensor) -> tuple[Tensor, Tensor]:
    """Blend splats[index], farther than those in the sums [P, 5] of pixels [P, 2], into these -> new sums and T.

    sums are r, g, b, depth and 1, weighted with α T; T [P] is the transmittance of all that was blended so far.
    """
    s = splats[index]                                                   # [n, 10]
    dx, dy = pixels.T[:, None] - s[:, :2].T[..., None]                  # [n, P] each
    a, b, c, opacity = s[:, 2:6, None].unbind(1)                        # [n, 1] each
    # α = o exp(-½ dᵀ Σ'⁻¹ d), at most .99, and 0 if less than 1/255
    alpha = (opacity * torch.exp(-0.5 * (a * dx * dx + c * dy * dy) - b * dx * dy)).clamp(max=MAX_ALPHA)
    alpha = torch.where(alpha < MIN_ALPHA, 0, alpha)                    # [n, P]
    through = torch.cat([T[None], T * (1 - alpha).cumprod(0)])          # [n + 1, P]
    values = torch.cat([s[:, 6:], torch.ones_like(s[:, :1])], dim=1)    # [n, 5] red, green, blue, depth, 1
    return sums + (alpha * through[:-1]).T @ values, through[-1]


def render(gaussians: Gaussians, camera: Camera, background=(0.0, 0.0, 0.0)) -> tuple[Tensor, Tensor, Tensor]:
    """One frame: rgb [3, H, W] in [0, 1] over the background, alpha [1, H, W] in [0, 1] and depth [1, H, W].

    Depth is z in the camera, averaged with the weights of the blending; inf where alpha is 0. Differentiable in the
    Gaussians and the camera, in the means' dtype and on their device. What is not finite is left out.
    """
    splats, boxes = project(gaussians, camera)
    rows = []
    for y in range(0, camera.height, TILE):
        over = ((boxes[:, 1] < y + TILE) & (boxes[:, 3] > y)).nonzero().squeeze(1)
        row, x0, x1 = splats[over], boxes[over, 0], boxes[over, 2]
        tiles = []
        for x in range(0, camera.width, TILE):
            near = ((x0 < x + TILE) & (x1 > x)).nonzero().squeeze(1)
            tiles.append(render_tile(row, near, x, y, camera))
        rows.append(torch.cat(tiles, dim=2))
    rgb, depth, alpha = torch.cat(rows, dim=1).split([3, 1, 1])
    rgb = rgb + (1 - alpha) * torch.as_tensor(background, dtype=rgb.dtype, device=rgb.device).view(3, 1, 1)
    depth = torch.where(alpha > 0, depth / torch.where(alpha > 0, alpha, 1), torch.inf)
    return rgb.clamp(0, 1), alpha, depth


def render_tile(splats: Tensor, index: Tensor, x: int, y: int, camera: Camera) -> Tensor:
    """The tile whose first pixel is in column x and row y, made of splats[index] -> [5, h, w], the sums of `blend`."""
    h, w = min(TILE, camera.height - y), min(TILE, camera.width - x)
    pixels = torch.cartesian_prod(torch.arange(h) + y + 0.5, torch.arange(w) + x + 0.5).flip(1).to(splats)
    sums, T = splats.new_zeros(h * w, 5), splats.new_ones(h * w)
    for block in index.split(BLOCK):
        if T.max() <= 1e-6:  # DEVIATION: 3DGS stops each pixel at 1e-4, which its gradients feel
            break
        if splats.requires_grad:
            sums, T = checkpoint(blend, splats, block, pixels, sums, T, use_reentrant=False)
        else:
            sums, T = blend(splats, block, pixels, sums, T)
    return sums.T.view(5, h, w)


if __name__ == "__main__":
    from PIL import Image
    d = nnf.normalize(torch.randn(20000, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    save_ply("splat.ply", Gaussians(d, torch.full_like(d, -4), nnf.pad(d, (1, 0)), 2 + 0 * d[:, 0], 2 * d[:, None]))
    view = torch.eye(4)
    view[2, 3] = 4
    K = torch.tensor([[400.0, 0, 192], [0, 400, 128], [0, 0, 1]])
    rgb, alpha, depth = render(load_ply("splat.ply"), Camera(K, view, 384, 256))
    print(f"splat.ply, splat.png: {alpha.mean():.0%} covered, the nearest at depth {depth.min():.2f}")
    Image.fromarray((rgb * 255).round().byte().permute(1, 2, 0).numpy()).save("splat.png")
