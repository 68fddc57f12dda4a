"""3D Gaussians: the renderer against its definition, files to the bit, and objects that take their colours along."""

import math
import tracemalloc
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch.nn import functional as nnf

from mirage_min.data import splat
from mirage_min.data.splat import Gaussians, load_ply, render, save_ply
from mirage_min.method.camera import Camera


def camera(width=27, height=19, focal=22.0):
    """A camera that stands and looks somewhere, with its principal point off the centre."""
    view = torch.eye(4, dtype=torch.float64)
    view[:3, :3] = splat.rotations(torch.tensor([[0.98, 0.05, -0.1, 0.03]], dtype=torch.float64))[0]
    view[:3, 3] = torch.tensor([0.2, -0.1, 0.3])
    K = torch.tensor([[focal, 0, 0.45 * width], [0, 1.1 * focal, 0.55 * height], [0, 0, 1]], dtype=torch.float64)
    return Camera(K, view, width, height)


def cloud(N, degree=3, seed=0, dtype=torch.float64, ids=False):
    """N Gaussians before that camera, some of them behind it or beside the image."""
    draws = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draws, dtype=torch.float64).to(dtype)
    means = normal(N, 3) * torch.tensor([2.0, 1.2, 2.0]).to(dtype) + torch.tensor([0, 0, 3.5]).to(dtype)
    sh = 0.4 * normal(N, (degree + 1) ** 2, 3)
    return Gaussians(means, normal(N, 3) * 0.5 - 1.5, 3 * normal(N, 4), 2 * normal(N), sh,
                     torch.randint(-3, 9, (N,), generator=draws) if ids else None)


def one(mean=(0, 0, 4), log_scale=-1.0, logit=0.0, color=(0.3, 0.5, 0.9), **others):
    rows = [mean], [[log_scale] * 3], [[1.0, 0, 0, 0]], [logit], [[color]]
    *geometry, color = (torch.tensor(row, dtype=torch.float64) for row in rows)
    return replace(Gaussians(*geometry, (color - 0.5) / 0.28209479177387814), **others)


def straight(width=40, height=24, f=50.0):
    K = torch.tensor([[f, 0, width / 2], [0, f, height / 2], [0, 0, 1]], dtype=torch.float64)
    return Camera(K, torch.eye(4, dtype=torch.float64), width, height)


# ---- rendering: the definition in loops ------------------------------------------------------------------------------

def slow_sh(coefficients, d):
    """Colour from the associated Legendre polynomials, with the Condon-Shortley phase, degree by degree."""
    x, y, z = d.tolist()
    phi, color, k = math.atan2(y, x), torch.full((3,), 0.5, dtype=torch.float64), 0
    legendre = {(0, 0): 1.0}
    for m in range(4):
        if m:
            legendre[m, m] = -(2 * m - 1) * math.sqrt(1 - z * z) * legendre[m - 1, m - 1]
        for n in range(m + 1, 4):
            before = (n + m - 1) * legendre.get((n - 2, m), 0)
            legendre[n, m] = ((2 * n - 1) * z * legendre[n - 1, m] - before) / (n - m)
    for n in range(math.isqrt(len(coefficients))):
        for m in range(-n, n + 1):
            norm = math.sqrt((2 * n + 1) / (4 * math.pi) * math.factorial(n - abs(m)) / math.factorial(n + abs(m)))
            wave = 1 if m == 0 else math.sqrt(2) * (math.cos(m * phi) if m > 0 else math.sin(-m * phi))
            color = color + norm * wave * legendre[n, abs(m)] * coefficients[k]
            k += 1
    return color.clamp(min=0)


def slow_render(g, camera, background):
    """Every pixel against every Gaussian, one after the other."""
    view, K, splats = camera.world_to_camera, camera.K, []
    W = view[:3, :3]
    centre = -W.T @ view[:3, 3]
    for i in range(len(g)):
        p = W @ g.means[i] + view[:3, 3]
        if p[2] <= 0.2:
            continue
        w, x, y, z = (g.quats[i] / g.quats[i].norm()).tolist()
        R = torch.tensor([[w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)],
                          [2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)],
                          [2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z]]).to(p)
        sigma = R @ torch.diag(g.log_scales[i].exp() ** 2) @ R.T
        slope = []
        for axis, n in enumerate((camera.width, camera.height)):
            f, c = K[axis, axis], K[axis, 2]
            slope.append(torch.clamp(p[axis] / p[2], (-0.15 * n - c) / f, (1.15 * n - c) / f))
        J = torch.tensor([[K[0, 0] / p[2], 0, -K[0, 0] * slope[0] / p[2]],
                          [0, K[1, 1] / p[2], -K[1, 1] * slope[1] / p[2]]]).to(p)
        cov = J @ W @ sigma @ W.T @ J.T + 0.3 * torch.eye(2).to(p)
        d = g.means[i] - centre
        splats.append((p[2], (K @ p / p[2])[:2], torch.linalg.inv(cov), torch.sigmoid(g.logit_opacities[i]),
                       slow_sh(g.sh[i], d / d.norm())))
    splats.sort(key=lambda s: s[0])
    rgb = torch.zeros(3, camera.height, camera.width).to(g.means)
    alpha, depth = torch.zeros_like(rgb[:1]), torch.full_like(rgb[:1], torch.inf)
    for v in range(camera.height):
        for u in range(camera.width):
            T, color, z_sum = 1.0, torch.zeros(3).to(rgb), 0.0
            for z, xy, inverse, opacity, c in splats:
                e = torch.tensor([u + 0.5, v + 0.5]).to(rgb) - xy
                a = min(0.99, float(opacity * torch.exp(-0.5 * e @ inverse @ e)))
                if a >= 1 / 255:
                    color, z_sum, T = color + T * a * c, z_sum + T * a * z, T * (1 - a)
            rgb[:, v, u] = (color + T * torch.tensor(background)).clamp(0, 1)
            alpha[:, v, u] = 1 - T
            if T < 1:
                depth[:, v, u] = z_sum / (1 - T)
    return rgb, alpha, depth


@pytest.mark.parametrize("degree", [0, 3])
def test_a_frame_equals_the_definition_pixel_by_pixel(degree):
    g, background = cloud(30, degree), (0.2, 0.4, 0.1)
    frame = render(g, camera(), background)
    assert 0.2 < frame[1].mean() < 0.999, "the scene must show something, and not only that"
    for name, fast, slow in zip(("rgb", "alpha", "depth"), frame, slow_render(g, camera(), background)):
        assert torch.equal(fast.isinf(), slow.isinf()), name
        difference = (fast - slow)[slow.isfinite()].abs().max()
        assert difference < 1e-5, f"{name}: largest difference to the loops {difference:.1e}, allowed 1e-5"


def test_single_precision_is_enough():
    g = cloud(200, 2)
    single = Gaussians(*(None if v is None else v.float() for v in vars(g).values()))
    for fast, exact in zip(render(single, camera(80, 50))[:2], render(g, camera(80, 50))[:2]):
        # a pixel where alpha falls on the other side of 1/255 may differ by that
        assert fast.dtype == torch.float32
        assert (fast - exact).abs().median() < 1e-6 and (fast - exact).abs().max() < 1 / 255


def test_one_gaussian_is_its_closed_form():
    """Round, before the camera: alpha = o exp(-r² / 2σ²), σ² = (f e^s / z)² + 0.3, and the colour as it is."""
    rgb, alpha, depth = render(one(), straight())
    y, x = torch.meshgrid(torch.arange(24) + 0.5 - 12, torch.arange(40) + 0.5 - 20, indexing="ij")
    wanted = 0.5 * torch.exp(-(x * x + y * y) / 2 / ((50 * math.exp(-1) / 4) ** 2 + 0.3)).double()
    wanted = wanted * (wanted >= 1 / 255)
    assert (alpha[0] - wanted).abs().max() < 1e-7 and (wanted == 0).any()
    assert (rgb - wanted * torch.tensor([0.3, 0.5, 0.9])[:, None, None]).abs().max() < 1e-7
    assert (depth[alpha > 0] - 4).abs().max() < 1e-9 and depth[alpha == 0].isinf().all()


def test_the_nearer_hides_the_farther_in_any_order():
    front, back = one((0, 0, 3), logit=9.0, color=(1, 0, 0)), one((0, 0, 5), log_scale=0.0, logit=9.0, color=(0, 1, 0))
    rgb, alpha, depth = render(Gaussians.cat([back, front]), straight())
    # opacity is cut at .99, so 1 % of what is behind shows through
    assert torch.allclose(rgb[:, 12, 20], torch.tensor([0.99, 0.0099, 0.0]).double(), atol=2e-2)
    assert rgb[0, 12, 20] < 0.991 and rgb[1, 12, 20] > 5e-3
    for a, b in zip((rgb, alpha, depth), render(Gaussians.cat([front, back]), straight())):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name, g", [
    ("behind the camera", one((0, 0, -4))), ("before the near plane", one((0, 0, 0.1))),
    ("beside the image", one((40, 0, 4))), ("with no opacity", one(logit=-math.inf)),
    ("with hardly any opacity", one(logit=-5.6)), ("of infinite size", one(log_scale=math.inf)),
    ("at no number", one((math.nan, 0, 4))), ("of no colour", one(color=(math.nan, 0, 0))),
    ("none at all", one().select(torch.tensor([], dtype=torch.long)))])
def test_a_gaussian_that_cannot_be_seen_leaves_the_frame_as_it_is(name, g):
    rgb, alpha, depth = render(g, straight(), (0.1, 0.2, 0.3))
    assert (alpha == 0).all() and depth.isinf().all(), name
    assert torch.equal(rgb, torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)[:, None, None].expand(3, 24, 40))
    with_another = render(Gaussians.cat([g, one()]), straight())
    assert all(torch.equal(a, b) for a, b in zip(with_another, render(one(), straight()))), f"{name}: spoils another"


def test_degenerate_gaussians_are_drawn_by_the_low_pass():
    """A point, a needle and a sheet are at least as wide as the low-pass filter."""
    for log_scales in ([-math.inf] * 3, [1.0, -math.inf, -math.inf], [-40.0, 0.5, 0.5]):
        _, alpha, _ = render(one(log_scales=torch.tensor([log_scales]).double()), straight(41, 25))
        assert alpha.isfinite().all() and abs(alpha[0, 12, 20] - 0.5) < 1e-9, log_scales
    point = render(one(log_scale=-math.inf), straight(41, 25))[1]
    assert abs(point[0, 12, 21] - 0.5 * math.exp(-1 / 0.6)) < 1e-9


def test_the_tiles_leave_no_seam(monkeypatch):
    g, views = cloud(60), []
    for tile, block in ((16, 1024), (7, 3), (64, 1)):
        monkeypatch.setattr(splat, "TILE", tile)
        monkeypatch.setattr(splat, "BLOCK", block)
        views.append(torch.cat(render(g, camera())[:2]))
    for other in views[1:]:
        difference = (other - views[0]).abs().max()
        assert difference < 2e-6, f"largest difference between sizes of tile and block {difference:.1e}, allowed 2e-6"


def test_gradients_equal_finite_differences():
    """Of all parameters and of the camera; in double precision, away from the thresholds."""
    g, view = cloud(6, 1, seed=3), camera(13, 9, 11.0)
    g.means[:, 2] += 1
    weights = torch.rand(2, 3, 9, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    names = ("means", "log_scales", "quats", "logit_opacities", "sh")

    def loss(*values):
        rgb, alpha, depth = render(Gaussians(*values[:5]), Camera(view.K, values[5], 13, 9), (0.3, 0.3, 0.3))
        return (weights[0] * rgb).sum() + (weights[1, :1] * alpha).sum() \
            + (weights[1, 1:2] * depth).where(alpha > 0, 0).sum()
    values = [*(getattr(g, name).requires_grad_() for name in names), view.world_to_camera.requires_grad_()]
    grads = torch.autograd.grad(loss(*values), values)
    draws = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, value, grad in zip((*names, "camera"), values, grads):
            # along random directions, with two step lengths: a jump at 1/255 would show in one of them
            for _ in range(4):
                v = torch.randn(value.shape, generator=draws, dtype=torch.float64)
                slopes = []
                for h in (1e-6, 3e-6):
                    ends = [loss(*(x + sign * h * v if x is value else x for x in values)) for sign in (1, -1)]
                    slopes.append((ends[0] - ends[1]) / (2 * h))
                wanted, given = min(slopes, key=abs), (grad * v).sum()
                assert abs(wanted - given) < 1e-5 * (1 + grad.norm()), f"{name}: {given:.8f}, differences {wanted:.8f}"
            assert grad.norm() > 1e-3, f"{name} has no gradient"


def test_what_is_kept_for_the_backward_pass_is_not_gaussians_times_pixels():
    """All that autograd saves, each storage once: less than one number for five pairs of a Gaussian and a pixel."""
    g, saved = cloud(1500, 0, dtype=torch.float32), {}
    g.log_scales += 1
    g.means.requires_grad_()

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // 4
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        rgb, _, _ = render(g, camera(128, 96, 100.0))
    rgb.sum().backward()
    assert g.means.grad.abs().sum() > 0
    kept, bound = sum(saved.values()), 1500 * 128 * 96 / 5
    assert kept < bound, f"{kept} numbers kept, allowed {bound:.0f}"


# ---- Gaussians -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_moving_the_scene_and_the_camera_alike_changes_no_pixel(degree):
    """x' = s R x + t of the world, and a camera that goes along; nothing is near the near plane, which does not."""
    g, view, s = cloud(60, degree, ids=True), camera(), 1.7
    g = g.select(g.means @ view.world_to_camera[2, :3] + view.world_to_camera[2, 3] > 0.5)
    R = splat.rotations(torch.tensor([[0.1, -0.7, 0.5, 0.5]]).double())[0]
    t = torch.tensor([3.0, -2, 9]).double()
    moved = g.transformed(s, R, t)
    there = view.world_to_camera.clone()
    # R' (s R x + t) + t' = s (R_c x + t_c) for all x
    there[:3, :3] = view.world_to_camera[:3, :3] @ R.T
    there[:3, 3] = s * view.world_to_camera[:3, 3] - there[:3, :3] @ t
    after = render(moved, replace(view, world_to_camera=there))
    for name, a, b, unit in zip(("rgb", "alpha", "depth"), render(g, view), after, (1, 1, s)):
        difference = (unit * a - b)[a.isfinite()].abs().max()
        assert difference < 1e-9, f"{name}: largest difference {difference:.1e}, allowed 1e-9"
    assert torch.equal(moved.ids, g.ids)


def test_quaternions_and_rotations_are_inverse_at_half_turns_too():
    q = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 1, 1, 0], [1e-9, 0, 3, -4]])
    q = torch.cat([q.double(), torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)])
    R = splat.rotations(q)
    assert (R @ R.mT - torch.eye(3)).abs().max() < 1e-12 and (torch.linalg.det(R) - 1).abs().max() < 1e-12
    back = splat.quaternions(R)
    assert ((back * nnf.normalize(q, dim=1)).sum(1).abs() - 1).abs().max() < 1e-12


def test_cat_and_select_are_inverse_and_pad_spherical_harmonics():
    a, b = cloud(5, 1, ids=True), cloud(4, 3, seed=1, ids=True)
    both = Gaussians.cat([a, b])
    assert len(both) == 9 and both.sh.shape == (9, 16, 3) and (both.sh[:5, 4:] == 0).all()
    again = both.select(torch.arange(9) >= 5)
    assert all(torch.equal(getattr(again, f.name), getattr(b, f.name)) for f in fields(Gaussians))
    assert torch.equal(both.select(torch.tensor([6, 2])).means, torch.stack([b.means[1], a.means[2]]))
    assert Gaussians.cat([a, replace(b, ids=None)]).ids is None


def test_bad_shapes_and_maps_are_refused():
    g = cloud(3, 0)
    with pytest.raises(ValueError, match=r"wanted shapes \[\[3, 3\].*got \[\[3, 3\], \[3, 3\], \[3, 3\]"):
        replace(g, quats=g.quats[:, :3])
    with pytest.raises(ValueError, match="K of 1, 4, 9 or 16"):
        replace(g, sh=torch.zeros(3, 2, 3))
    for s, R in ((0, torch.eye(3)), (1, -torch.eye(3)), (1, torch.zeros(3, 3)), (math.nan, torch.eye(3))):
        with pytest.raises(ValueError, match="a scale > 0 and a rotation"):
            g.transformed(s, R, torch.zeros(3))


# ---- files -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("N", [0, 1, 50])
def test_written_and_read_again_is_the_same_to_the_bit(tmp_path, degree, ids, N):
    g = cloud(N, degree, dtype=torch.float32, ids=ids)
    save_ply(tmp_path / "a.ply", g)
    again = load_ply(tmp_path / "a.ply")
    for f in fields(Gaussians):
        a, b = getattr(g, f.name), getattr(again, f.name)
        assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)), f.name
    save_ply(tmp_path / "b.ply", again)
    assert (tmp_path / "a.ply").read_bytes() == (tmp_path / "b.ply").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ply", "b.ply"]


@pytest.mark.parametrize("degree", [0, 3])
def test_plyfile_writes_what_we_read_and_reads_what_we_write(tmp_path, degree):
    plyfile = pytest.importorskip("plyfile", reason="pip install plyfile")
    g, K = cloud(20, degree, dtype=torch.float32, ids=True), (degree + 1) ** 2
    # INRIA's own order, with other types, a comment, a property of no interest and an element after the vertices
    rest = {f"f_rest_{c * (K - 1) + k - 1}": g.sh[:, k, c] for c in range(3) for k in range(1, K)}
    columns = {"x": g.means[:, 0], "y": g.means[:, 1], "z": g.means[:, 2], "confidence": g.means[:, 0],
               **{f"f_dc_{c}": g.sh[:, 0, c] for c in range(3)}, **rest, "opacity": g.logit_opacities,
               **{f"scale_{i}": g.log_scales[:, i] for i in range(3)}, **{f"rot_{i}": g.quats[:, i] for i in range(4)}}
    kinds = [(name, "f8" if name == "x" else "f4") for name in columns]
    table = np.zeros(20, [*kinds[:4], ("object_id", "i2"), *kinds[4:]])
    for name, value in [*columns.items(), ("object_id", g.ids)]:
        table[name] = value.numpy()
    elements = [plyfile.PlyElement.describe(table, "vertex"),
                plyfile.PlyElement.describe(np.zeros(3, [("width", "i4"), ("height", "f4")]), "sensor")]
    plyfile.PlyData(elements, byte_order="<", comments=["made by a test"]).write(tmp_path / "theirs.ply")
    ours = load_ply(tmp_path / "theirs.ply")
    assert all(torch.equal(getattr(ours, f.name), getattr(g, f.name)) for f in fields(Gaussians))
    save_ply(tmp_path / "ours.ply", g)
    vertex = plyfile.PlyData.read(tmp_path / "ours.ply")["vertex"]
    assert vertex["object_id"].tolist() == g.ids.tolist() and vertex["nx"].tolist() == [0] * 20
    assert all(np.array_equal(vertex[name], value.numpy()) for name, value in columns.items() if name != "confidence")


def changed(data, old, new):
    assert old in data
    return data.replace(old, new, 1)


@pytest.mark.parametrize("change, message", [
    (lambda d: changed(d, b"ply\n", b"plz\n"), "wanted a PLY header"),
    (lambda d: changed(d, b"binary_little_endian", b"ascii"), "wanted a PLY header"),
    (lambda d: changed(d, b"element vertex 5", b"element face 5"), "wanted a PLY header"),
    (lambda d: changed(d, b"property float nx", b"property list uchar int nx"), "wanted a PLY header"),
    (lambda d: changed(d, b"end_header", b"end_footer"), "wanted a PLY header"),
    (lambda d: b"", "wanted a PLY header"),
    (lambda d: changed(d, b"float opacity", b"float opaqueness"), "wanted one property opacity, got 0"),
    (lambda d: changed(d, b"float scale_2", b"float scale_9"), "wanted one property scale_2, got 0"),
    (lambda d: changed(d, b"float f_rest_7", b"float f_west_7"), "wanted one property f_rest_7, got 0"),
    (lambda d: changed(d, b"float nx", b"float x"), "wanted one property x, got 2"),
    (lambda d: d[:-1], r"truncated: 5 vertices take 540 bytes, got 539"),
    (lambda d: d[:-540 + 108 * 3 + 4] + np.float32(np.nan).tobytes() + d[-540 + 108 * 3 + 8:],
     "property y is not finite at vertex 3"),
    (lambda d: d[:-20] + bytes(16) + d[-4:], "rot_0 to rot_3 are zero at vertex 4")])
def test_a_bad_file_is_refused_in_one_line_that_names_file_and_field(tmp_path, change, message):
    save_ply(tmp_path / "bad.ply", cloud(5, 1, dtype=torch.float32, ids=True))
    # vertices: 3 + 3 normals + 3 + 9 + 1 + 3 + 4 floats and an int, 108 bytes
    data = (tmp_path / "bad.ply").read_bytes()
    (tmp_path / "bad.ply").write_bytes(change(data))
    with pytest.raises(ValueError, match=f"bad.ply: .*{message}") as error:
        load_ply(tmp_path / "bad.ply")
    assert "\n" not in str(error.value)


def ply(names, columns, comments=b""):
    """A PLY of float32 columns, written property by property."""
    header = f"element vertex {len(columns['x'])}\n" + "".join(f"property float {name}\n" for name in names)
    table = np.stack([columns[name].numpy() for name in names], axis=1).astype("<f4")
    return b"ply\nformat binary_little_endian 1.0\n" + comments + header.encode() + b"end_header\n" + table.tobytes()


XYZ, NORMALS, DC = ["x", "y", "z"], ["nx", "ny", "nz"], [f"f_dc_{i}" for i in range(3)]
SHAPE, REST = [*(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4))], [f"f_rest_{i}" for i in range(45)]
LAYOUTS = {  # who writes them: their properties in order, what the header says, the degree of the colours
    "INRIA's": ([*XYZ, *NORMALS, *DC, *REST, "opacity", *SHAPE], b"", 3),
    "nerfstudio's": ([*XYZ, *NORMALS, *DC, *REST, "opacity", *SHAPE],
                     b"comment Generated by Nerfstudio 1.1.5\ncomment Vertical Axis: z\n", 3),
    "gsplat's": ([*XYZ, *DC, *REST, "opacity", *SHAPE], b"", 3),
    "Trellis's": ([*XYZ, *NORMALS, *DC, "opacity", *SHAPE], b"", 0),
    "SuperSplat's": ([*XYZ, *DC, "opacity", *SHAPE[3:], *SHAPE[:3], *REST], b"comment Generated by SuperSplat\n", 3),
    "SuperSplat's, two bands": ([*XYZ, *SHAPE, "opacity", *DC, *REST[:24]], b"", 2)}


@pytest.mark.parametrize("who", LAYOUTS)
def test_what_the_field_writes_is_read(tmp_path, who):
    """f_rest in the order of 3DGS: all of red, of green, of blue; a normal, where there is one, means nothing."""
    names, comments, degree = LAYOUTS[who]
    g, K = cloud(6, degree, dtype=torch.float32), (degree + 1) ** 2
    columns = {name: g.means[:, i] for i, name in enumerate(XYZ)} | {name: torch.ones(6) for name in NORMALS}
    columns |= {f"f_dc_{c}": g.sh[:, 0, c] for c in range(3)} | {"opacity": g.logit_opacities}
    columns |= {f"f_rest_{c * (K - 1) + k}": g.sh[:, 1 + k, c] for c in range(3) for k in range(K - 1)}
    columns |= {f"scale_{i}": g.log_scales[:, i] for i in range(3)} | {f"rot_{i}": g.quats[:, i] for i in range(4)}
    (tmp_path / "a.ply").write_bytes(ply(names, columns, comments))
    again = load_ply(tmp_path / "a.ply")
    assert all(torch.equal(getattr(g, f.name), getattr(again, f.name)) for f in fields(Gaussians) if f.name != "ids")
    assert again.ids is None


def test_a_compressed_file_is_refused_by_name(tmp_path):
    """The layout of SuperSplat and of gsplat's ply_compressed: chunks of 256, and four packed integers a Gaussian."""
    chunk = "".join(f"property float {end}_{name}\n" for name in ("x", "y", "z", "scale_x", "scale_y", "scale_z")
                    for end in ("min", "max"))
    packed = "".join(f"property uint packed_{name}\n" for name in ("position", "rotation", "scale", "color"))
    header = f"ply\nformat binary_little_endian 1.0\nelement chunk 1\n{chunk}element vertex 2\n{packed}end_header\n"
    (tmp_path / "a.ply").write_bytes(header.encode() + bytes(4 * (12 + 8)))
    with pytest.raises(ValueError, match="a.ply: a compressed PLY, as SuperSplat and gsplat write them, is not read"):
        load_ply(tmp_path / "a.ply")


HEADERS = {
    "CRLF": lambda h: h.replace(b"\n", b"\r\n"),
    "obj_info": lambda h: h.replace(b"element", b"obj_info Generated by CloudCompare!\nelement"),
    "comments everywhere": lambda h: h.replace(b"\n", b"\ncomment x y\n").removesuffix(b"comment x y\n"),
    "comment of no letters": lambda h: h.replace(b"element", b"comment \xff\xfe\nelement"),
    "an empty element first": lambda h: h.replace(b"element", b"element camera 0\nproperty float view_px\nelement"),
    "a list after": lambda h: h.replace(b"end_h", b"element face 0\nproperty list uchar int vertex_index\nend_h")}


def cut_header(path):
    data = path.read_bytes()
    at = data.index(b"end_header\n") + 11
    return data[:at], data[at:]


@pytest.mark.parametrize("kind", HEADERS)
def test_every_valid_header_is_read(tmp_path, kind):
    g = cloud(5, 1, dtype=torch.float32, ids=True)
    save_ply(tmp_path / "a.ply", g)
    header, body = cut_header(tmp_path / "a.ply")
    (tmp_path / "a.ply").write_bytes(HEADERS[kind](header) + body)
    again = load_ply(tmp_path / "a.ply")
    assert all(torch.equal(getattr(g, f.name), getattr(again, f.name)) for f in fields(Gaussians))


def test_elements_before_the_vertices_are_passed_over_by_their_size(tmp_path):
    g = cloud(5, 0, dtype=torch.float32)
    save_ply(tmp_path / "a.ply", g)
    header, body = cut_header(tmp_path / "a.ply")
    camera = b"element camera 3\nproperty double f\nproperty uchar i\nelement vertex"
    (tmp_path / "a.ply").write_bytes(header.replace(b"element vertex", camera) + bytes(3 * 9) + body)
    assert torch.equal(load_ply(tmp_path / "a.ply").means, g.means)
    for more, said in ((b"element chunk 1\nproperty float min_x\n", "a compressed PLY, as SuperSplat"),
                       (b"element face 2\nproperty list uchar int i\n", "wanted a PLY header with vertices first")):
        (tmp_path / "b.ply").write_bytes(header.replace(b"element vertex", more + b"element vertex") + bytes(4) + body)
        with pytest.raises(ValueError, match=f"b.ply: {said}"):
            load_ply(tmp_path / "b.ply")


def test_of_a_large_file_only_the_vertices_are_read(tmp_path):
    """Four gigabytes of nothing after five vertices: a sparse file."""
    save_ply(tmp_path / "a.ply", cloud(5, 0, dtype=torch.float32))
    with open(tmp_path / "a.ply", "rb+") as file:
        file.truncate(2**32)
    tracemalloc.start()
    try:
        assert len(load_ply(tmp_path / "a.ply")) == 5
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("count", ["2147483648", "9" * 18, "9" * 30, "9" * 3000, "-1", "five"])
def test_a_count_that_lies_is_refused(tmp_path, count):
    save_ply(tmp_path / "a.ply", cloud(5, 0, dtype=torch.float32))
    data = (tmp_path / "a.ply").read_bytes().replace(b"vertex 5", f"vertex {count}".encode())
    (tmp_path / "a.ply").write_bytes(data)
    with pytest.raises(ValueError, match="a.ply: (truncated|wanted a PLY header)"):
        load_ply(tmp_path / "a.ply")


@pytest.mark.parametrize("name, kind, value, said", [
    ("x", "double", 1e300, "property x is not finite at vertex 0: 1e[+]300"),
    ("object_id", "double", 1.5, "property object_id is no integer at vertex 0: 1.5"),
    ("object_id", "double", 1e30, "property object_id is no integer"), ("object_id", "float", np.nan, "no integer"),
    ("opacity", "double", np.nan, "property opacity is not finite"), ("opacity", "float", np.inf, None),
    ("opacity", "double", -1e300, None), ("object_id", "double", 3.0, None), ("rot_0", "float", np.inf, "rot_0")])
def test_a_number_must_survive_the_type_that_it_is_kept_in(tmp_path, name, kind, value, said):
    names = [*"xyz", *(f"f_dc_{i}" for i in range(3)), "opacity", *(f"scale_{i}" for i in range(3)),
             *(f"rot_{i}" for i in range(4)), "object_id"]
    kinds = {n: kind if n == name else "float" for n in names}
    table = np.ones(2, [(n, {"float": "<f4", "double": "<f8"}[kinds[n]]) for n in names])
    table[name][0] = value
    lines = "".join(f"property {kinds[n]} {n}\n" for n in names)
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex 2\n{lines}end_header\n"
    (tmp_path / "a.ply").write_bytes(header.encode() + table.tobytes())
    if said is None:
        g = load_ply(tmp_path / "a.ply")
        assert len(g) == 2 and (name != "opacity" or g.logit_opacities.sigmoid()[0] in (0, 1))
    else:
        with pytest.raises(ValueError, match=f"a.ply: .*{said}"):
            load_ply(tmp_path / "a.ply")


def test_any_number_of_harmonics_that_is_no_degrees_is_refused_by_the_first_that_is_missing(tmp_path):
    """3 ((degree + 1)² - 1) of them are whole; with one more or fewer the colours of the rest would be wrong."""
    whole = [3 * ((degree + 1) ** 2 - 1) for degree in range(4)]
    for rest in range(whole[-1] + 1):
        names = [*"xyz", *(f"f_dc_{i}" for i in range(3)), *(f"f_rest_{i}" for i in range(rest)), "opacity",
                 *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4))]
        lines = "".join(f"property float {name}\n" for name in names)
        header = f"ply\nformat binary_little_endian 1.0\nelement vertex 2\n{lines}end_header\n"
        (tmp_path / "a.ply").write_bytes(header.encode() + np.ones((2, len(names)), np.float32).tobytes())
        if rest in whole:
            assert list(load_ply(tmp_path / "a.ply").sh.shape) == [2, 1 + rest // 3, 3]
        else:
            with pytest.raises(ValueError, match=f"wanted one property f_rest_{rest}, got 0"):
                load_ply(tmp_path / "a.ply")


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="nowhere.ply: no such file"):
        load_ply(tmp_path / "nowhere.ply")
