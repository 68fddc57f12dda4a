"""LPIPS, Gram and DISTS against the published packages on equal weights, and against loops; the patch loss."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mirage_min.method import perceptual
from mirage_min.method.perceptual import (
    Dists,
    L2Pool,
    Lpips,
    _package_file,
    gram_loss,
    lpips_and_gram,
    patch_loss,
    random_square,
)
from mirage_min.networks.imagenet import FILES, Features
from tests.random_imagenet import BUILDERS, frames, save_networks, torchvision_features
from tests.small import unchanged

DIFIX = (1 / 2.6, 1 / 4.8, 1 / 3.7, 1 / 5.6, 10 / 1.5)              # the layers' weights in its src/loss.py
PATCH_WEIGHTS = (1 / 0.41, 1 / 1.5, 1 / 3.1, 1 / 0.67, 1 / 0.12)    # the recipe's
REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "perceptual"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_networks(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def vgg(folder) -> Features:
    return Features("vgg", folder)


def package_lpips(net: str, state: dict, monkeypatch) -> nn.Module:
    """The lpips package's own model around torchvision's own network."""
    import lpips.pretrained_networks

    def build(pretrained: bool) -> SimpleNamespace:
        return SimpleNamespace(features=torchvision_features(net, state))

    monkeypatch.setattr(lpips.pretrained_networks, "tv", SimpleNamespace(**{BUILDERS[net]: build}))
    return lpips.LPIPS(net=net, verbose=False)


@pytest.mark.parametrize("net", ["vgg", "alex", "squeeze"])
def test_lpips_equals_the_lpips_package_on_random_weights(net, folder, monkeypatch):
    reference = package_lpips(net, load_file(folder / f"{FILES[net]}.safetensors"), monkeypatch)
    x, y = frames(2, 3, 65, 47)
    ours, theirs = Lpips(Features(net, folder))(x, y), reference(x, y).flatten()
    difference = (ours - theirs).abs().max().item()
    assert difference <= 1e-6, f"LPIPS {theirs.tolist()}, largest difference {difference:.1e} > 1e-6"


@pytest.mark.parametrize("net", ["vgg", "alex", "squeeze"])
def test_lpips_equals_the_lpips_package_on_real_weights(net, monkeypatch):
    if not (REAL / f"{FILES[net]}.safetensors").exists():
        pytest.skip(f"needs ../shared/data/perceptual/{FILES[net]}.safetensors")
    state = load_file(REAL / f"{FILES[net]}.safetensors")
    state = {key.removeprefix("features."): value for key, value in state.items()}
    reference = package_lpips(net, state, monkeypatch)
    x, y = frames(3, 3, 64, 96)
    ours, theirs = Lpips(Features(net, REAL))(x, y), reference(x, y).flatten()
    difference = (ours - theirs).abs().max().item()
    assert difference <= 1e-6, f"LPIPS {theirs.tolist()}, largest difference {difference:.1e} > 1e-6"


def test_the_gradient_of_lpips_equals_the_packages_and_stays_finite_where_all_features_vanish(folder, monkeypatch):
    reference = package_lpips("alex", load_file(folder / f"{FILES['alex']}.safetensors"), monkeypatch)
    lpips = Lpips(Features("alex", folder))
    x, y = (v.requires_grad_() for v in frames(1, 3, 64, 64))
    ours, = torch.autograd.grad(lpips(x, y).sum(), x)
    theirs, = torch.autograd.grad(reference(x, y).sum(), x)
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert difference <= 1e-5, f"gradient's largest relative difference {difference:.1e} > 1e-5"

    dark = [torch.zeros(1, len(w), 2, 2, requires_grad=True) for w in lpips.weights]
    lpips.distance(dark, [torch.ones_like(f) for f in dark]).sum().backward()
    assert all(f.grad.isfinite().all() for f in dark), "NaN gradient at features that are all zero"


def test_no_gradient_flows_into_the_target_or_the_weights(folder):
    lpips = Lpips(Features("squeeze", folder))
    x, y = (v.requires_grad_() for v in frames(1, 3, 32, 32))
    lpips(x, y).sum().backward()
    assert x.grad.abs().max() > 0 and y.grad is None
    assert not any(p.requires_grad for p in lpips.parameters())


def gram_loss_in_loops(taps_x, taps_y) -> list[float]:
    """One sample, one layer, one pair of channels, one position at a time."""
    losses = []
    for n in range(len(taps_x[0])):
        loss = 0.0
        for fx, fy, weight in zip(taps_x, taps_y, DIFIX, strict=False):
            _, d, h, w = fx.shape
            squares = 0.0
            for i in range(d):
                for j in range(d):
                    at = [(p, q) for p in range(h) for q in range(w)]
                    g_x, g_y = (sum(f[n, i, p, q].item() * f[n, j, p, q].item() for p, q in at) for f in (fx, fy))
                    squares += (g_x - g_y) ** 2
            loss += weight * squares / d**2 / (d * h * w)
        losses.append(loss)
    return losses


@pytest.mark.parametrize("layers", [5, 2])
def test_gram_loss_equals_loops_with_each_sample_apart(layers):
    torch.manual_seed(0)
    shapes = [(2, 3, 4, 5), (2, 4, 2, 3), (2, 4, 1, 2), (2, 2, 1, 1), (2, 2, 1, 1)][:layers]
    taps_x, taps_y = ([torch.rand(s, dtype=torch.float64) for s in shapes] for _ in range(2))
    loops = torch.tensor(gram_loss_in_loops(taps_x, taps_y), dtype=torch.float64)
    with unchanged(*taps_x, *taps_y):
        ours = gram_loss(taps_x, taps_y)
    difference = ((ours - loops).abs() / loops).max().item()
    assert difference <= 1e-12, f"Gram {loops.tolist()}, largest relative difference {difference:.1e} > 1e-12"


def test_gram_and_lpips_are_summed_in_float32_under_autocast(vgg):
    x, y = frames(1, 3, 32, 32)
    taps_x, taps_y = ([f.bfloat16() for f in vgg(v)] for v in (x, y))
    lpips = Lpips(vgg)
    for name, distance in (("Gram", gram_loss), ("LPIPS", lpips.distance)):
        wanted = distance([f.float() for f in taps_x], [f.float() for f in taps_y]).item()
        with torch.autocast("cpu", torch.bfloat16):
            got = distance(taps_x, taps_y).item()
        assert abs(got - wanted) <= 1e-5 * wanted, f"{name} of bfloat16 features {got}, in float32 {wanted}"


# ---- LPIPS and Gram together ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("texture", ["vgg", "squeeze"])
def test_both_losses_are_those_of_two_calls_and_take_one_pass_an_image_where_they_read_one_network(texture, folder):
    vgg = Features("vgg", folder).double()
    lpips = Lpips(vgg).double()
    other = vgg if texture == "vgg" else Features(texture, folder).double()
    x, y = (v.double() for v in frames(2, 3, 32, 40))
    x.requires_grad_()
    wanted = lpips(x, y), gram_loss(other(x), other(y))
    passes = []
    for net in {vgg, other}:
        net.register_forward_hook(lambda net, args, taps: passes.append(net.net))
    got = lpips_and_gram(lpips, other, x, y.requires_grad_())
    assert sorted(passes) == sorted(2 * ["vgg"] if texture == "vgg" else 2 * ["squeeze", "vgg"]), passes
    for name, a, b in zip(("LPIPS", "Gram"), got, wanted, strict=True):
        assert a.shape == (2,) and torch.equal(a, b), f"{name}: {b.tolist()}, got {a.tolist()}"
    want_grad, = torch.autograd.grad((wanted[0] + wanted[1]).sum(), x)
    got_grad, y_grad = torch.autograd.grad((got[0] + got[1]).sum(), (x, y), allow_unused=True)
    difference = ((got_grad - want_grad).abs().max() / want_grad.abs().max()).item()
    assert difference <= 1e-12 and y_grad is None, f"gradient's largest relative difference {difference:.1e} > 1e-12"


# ---- patches --------------------------------------------------------------------------------------------------------


def test_the_patch_loss_is_the_weighted_mean_square_of_feature_differences_on_the_square(vgg, monkeypatch):
    """DiffusionHarmonizer Eq. 4: the features of the square alone, not a crop of the features of the frame."""
    vgg, (x, y) = Features("vgg", REAL) if (REAL / "vgg16_features.safetensors").exists() else vgg, frames(2, 3, 48, 64)
    monkeypatch.setattr(perceptual, "random_square", lambda H, W, least, draws: (slice(5, 37), slice(20, 52)))
    x.requires_grad_()
    wanted = [0.0, 0.0]
    for n in range(2):
        with torch.no_grad():
            for fx, fy, weight in zip(*(vgg(v[n : n + 1, :, 5:37, 20:52]) for v in (x, y)), PATCH_WEIGHTS, strict=True):
                squares = (fx - fy).square().flatten().double()
                wanted[n] += weight * float(squares.sum()) / len(squares) / 5
    got = patch_loss(vgg, x, y.requires_grad_(), torch.Generator())
    assert got.shape == (2,) and got.tolist() == pytest.approx(wanted, rel=1e-5), f"wanted {wanted}, got {got.tolist()}"
    got.sum().backward()
    outside = x.grad.clone()
    outside[:, :, 5:37, 20:52] = 0
    assert x.grad.abs().max() > 0 and outside.abs().max() == 0 and y.grad is None


class Taps:
    """A network of two taps: every other pixel doubled, and the mean of the colours."""

    least = 8

    def __call__(self, x):
        return [2 * x[..., ::2, ::2], x.mean(dim=1, keepdim=True)]


def test_the_patch_loss_of_two_taps_is_the_equation_in_loops_on_the_square_alone(monkeypatch):
    """DiffusionHarmonizer Eq. 4 with fewer taps than weights; the truth is given, so no gradient flows into it."""
    monkeypatch.setattr(perceptual, "random_square", lambda H, W, least, draws: (slice(1, 11), slice(4, 14)))
    x, y = (v.requires_grad_() for v in frames(2, 3, 12, 16))
    wanted = []
    for n in range(2):
        d = (x - y)[n, :, 1:11, 4:14].detach().double()
        first = sum(float(2 * d[c, i, j]) ** 2 for c in range(3) for i in range(0, 10, 2) for j in range(0, 10, 2)) / 75
        second = sum(float(d[:, i, j].mean()) ** 2 for i in range(10) for j in range(10)) / 100
        wanted.append((PATCH_WEIGHTS[0] * first + PATCH_WEIGHTS[1] * second) / 2)
    got = patch_loss(Taps(), x, y, None)
    assert got.shape == (2,) and got.tolist() == pytest.approx(wanted, rel=1e-5), f"wanted {wanted}, got {got.tolist()}"
    got.sum().backward()
    inside = torch.zeros_like(x, dtype=torch.bool)
    inside[:, :, 1:11, 4:14] = True
    assert x.grad[inside].any() and not x.grad[~inside].any() and y.grad is None
    with pytest.raises(ValueError, match="wanted frames x and y of one shape"):
        patch_loss(Taps(), x, y[..., :15], None)


def test_without_draws_the_patch_loss_is_that_of_the_largest_square_in_the_middle():
    assert random_square(576, 1024, 16, None) == (slice(32, 544), slice(256, 768))
    assert random_square(18, 30, 8, None) == (slice(1, 17), slice(7, 23))
    x, y = frames(1, 3, 18, 30)
    middle = (..., slice(1, 17), slice(7, 23))
    changed = x.clone()
    changed[..., 0, :] += 1                                            # outside of it
    assert patch_loss(Taps(), x, y, None) == patch_loss(Taps(), changed, y, None)
    changed[middle] += 1
    assert patch_loss(Taps(), x, y, None) != patch_loss(Taps(), changed, y, None)


def test_every_call_draws_another_square_and_a_generator_of_the_same_seed_the_same_ones(vgg):
    x, y = frames(1, 3, 64, 64)

    def losses(seed):
        draws = torch.Generator().manual_seed(seed)
        return [patch_loss(vgg, x, y, draws).item() for _ in range(4)]
    assert losses(0) == losses(0) != losses(1) and len(set(losses(0))) == 4


@pytest.mark.parametrize("H, W, low, high", [
    (576, 1024, 128, 512), (1080, 1920, 128, 512), (288, 512, 64, 256), (96, 144, 21, 85), (40, 60, 16, 36),
    (16, 200, 16, 16)], ids=lambda x: str(x))
def test_squares_have_the_papers_sides_for_the_frames_height_and_lie_everywhere(H, W, low, high):
    draws, sides, tops, lefts = torch.Generator().manual_seed(0), [], [], []
    for _ in range(4000):
        rows, columns = random_square(H, W, 16, draws)
        assert 0 <= rows.start and rows.stop <= H and 0 <= columns.start and columns.stop <= W
        assert rows.stop - rows.start == columns.stop - columns.start
        sides.append(rows.stop - rows.start)
        tops.append(rows.start / max(H - sides[-1], 1))
        lefts.append(columns.start / max(W - sides[-1], 1))
    assert low <= min(sides) <= low + (high - low) / 50 and high - (high - low) / 50 <= max(sides) <= high
    assert abs(sum(sides) / 4000 - (low + high) / 2) <= (high - low) / 40, "sides are uniform"
    for name, places in (("rows", tops), ("columns", lefts)):
        if max(places) > 0:
            assert min(places) <= 0.01 and max(places) == 1 and abs(sum(places) / 4000 - 0.5) <= 0.03, name


def test_the_patch_loss_refuses_frames_that_differ_or_are_too_small(vgg):
    x, y = frames(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"got \[1, 3, 32, 32\] and \[1, 3, 32, 31\]"):
        patch_loss(vgg, x, y[..., :31], torch.Generator())
    with pytest.raises(ValueError, match="of 16x16 at least"):
        patch_loss(vgg, x[..., :15], y[..., :15], torch.Generator())


# ---- DISTS ----------------------------------------------------------------------------------------------------------


def test_networks_that_end_early_serve_neither_lpips_nor_dists(vgg, folder, tmp_path):
    state = load_file(folder / "vgg16_features.safetensors")
    save_file({key: value for key, value in state.items() if int(key.split(".")[0]) < 9},
              tmp_path / "vgg16_features_to_relu2_2.safetensors")
    short = Features("vgg", tmp_path)
    with pytest.raises(ValueError, match=r"LPIPS needs the 5 taps.*reach only \['relu1_2', 'relu2_2'\]"):
        Lpips(short)
    with pytest.raises(ValueError, match="DISTS needs the taps"):
        Dists(short)


def test_the_hanning_pool_equals_loops():
    x = torch.rand(1, 2, 5, 4, dtype=torch.float64)
    ours = L2Pool()(x)
    assert ours.shape == (1, 2, 3, 2)
    window = [[1, 2, 1], [2, 4, 2], [1, 2, 1]]
    for c in range(2):
        for i in range(3):
            for j in range(2):
                total = 0.0
                for a in range(3):
                    for b in range(3):
                        row, column = 2 * i + a - 1, 2 * j + b - 1
                        if 0 <= row < 5 and 0 <= column < 4:
                            total += window[a][b] / 16 * x[0, c, row, column].item() ** 2
                difference = abs(ours[0, c, i, j].item() - total**0.5)
                assert difference <= 1e-9, f"at {(c, i, j)}: {total**0.5}, difference {difference:.1e} > 1e-9"


def test_dists_equals_the_published_implementation(vgg, folder, monkeypatch):
    pytest.importorskip("DISTS_pytorch", reason="needs pip install --no-deps DISTS_pytorch")
    from DISTS_pytorch import DISTS_pt

    state = load_file(folder / "vgg16_features.safetensors")
    networks = SimpleNamespace(vgg16=lambda pretrained: SimpleNamespace(features=torchvision_features("vgg", state)))
    monkeypatch.setattr(DISTS_pt, "models", networks)
    theirs = DISTS_pt.DISTS(load_weights=False)
    theirs.load_state_dict(torch.load(_package_file("DISTS_pytorch", "weights.pt"), weights_only=True), strict=False)
    x, y = frames(2, 3, 49, 66)
    wanted, got = theirs((x + 1) / 2, (y + 1) / 2), Dists(vgg)(x, y)
    difference = (got - wanted).abs().max().item()
    assert difference <= 2e-6, f"DISTS {wanted.tolist()}, largest difference {difference:.1e} > 2e-6"


def test_dists_is_zero_for_equal_frames_and_reads_its_vectors_from_a_file(vgg, tmp_path):
    vectors = {name: torch.rand(1, 1475, 1, 1) for name in ("alpha", "beta")}
    torch.save(vectors, tmp_path / "weights.pt")
    x, y = frames(1, 3, 32, 32)
    dists = Dists(vgg, tmp_path / "weights.pt")
    assert abs(dists(x, x).item()) <= 1e-5 and 0.01 < dists(x, y).item() < 2
    assert dists(x.double(), y.double()).item() == pytest.approx(dists(x, y).item(), abs=1e-6)
