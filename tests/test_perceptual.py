"""LPIPS, Gram and DISTS against the published packages on equal weights, and against loops."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mirage_min.method.perceptual import (
    FILES,
    GRAM_WEIGHTS,
    TAPS,
    Dists,
    Features,
    L2Pool,
    Lpips,
    _package_file,
    gram_loss,
    per_video,
)
from tests.small import unchanged
from tests.torchvision_stub import stub

stub()
REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "perceptual"
BUILDERS = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}


def torchvision_features(net: str, state: dict | None = None) -> nn.Sequential:
    """torchvision's own `features` with `state`, or with random weights that keep the activations' scale."""
    from torchvision import models

    with torch.device("meta"):  # its classifier alone has a hundred million parameters: never allocate them
        features = getattr(models, BUILDERS[net])(weights=None).features
    features = features.to_empty(device="cpu")
    if state is not None:
        features.load_state_dict(state)
        return features.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for p in features.parameters():
        fan = p[0].numel() if p.ndim == 4 else 100
        p.data = torch.randn(p.shape, generator=generator) * (2 / fan) ** 0.5
    return features.requires_grad_(False)


def frames(*shape: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Two different batches of smooth colours with some noise, in [-1, 1]."""
    torch.manual_seed(seed)
    coarse = torch.rand(2 * shape[0], 3, 4, 4)
    x = nn.functional.interpolate(coarse, shape[-2:], mode="bicubic").clamp(0, 1) * 2 - 1
    return (x + 0.1 * torch.randn_like(x)).clamp(-1, 1).split(shape[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Random weights of the three networks, under the names the package asks for."""
    path = tmp_path_factory.mktemp("weights")
    for net, name in FILES.items():
        save_file(torchvision_features(net).state_dict(), path / f"{name}.safetensors")
    return path


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


@pytest.mark.parametrize("net", ["alex", "squeeze"])
@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/perceptual")
def test_lpips_equals_the_lpips_package_on_real_weights(net, monkeypatch):
    reference = package_lpips(net, load_file(REAL / f"{FILES[net]}.safetensors"), monkeypatch)
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
        for fx, fy, weight in zip(taps_x, taps_y, GRAM_WEIGHTS, strict=False):
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


def test_a_vgg_file_that_ends_early_gives_the_taps_it_reaches(vgg, folder, tmp_path):
    state = load_file(folder / "vgg16_features.safetensors")
    early = {key: value for key, value in state.items() if int(key.split(".")[0]) < 9}
    save_file(early, tmp_path / "vgg16_features_to_relu2_2.safetensors")
    short = Features("vgg", tmp_path)
    assert short.taps == ["relu1_2", "relu2_2"]
    x, _ = frames(1, 3, 32, 48)
    assert all(torch.equal(a, b) for a, b in zip(short(x), vgg(x)[:2], strict=True))
    with pytest.raises(ValueError, match=r"LPIPS needs the 5 taps.*reach only \['relu1_2', 'relu2_2'\]"):
        Lpips(short)
    with pytest.raises(ValueError, match="DISTS needs the taps"):
        Dists(short)


def test_a_whole_torchvision_state_dict_is_accepted(vgg, folder, tmp_path):
    state = load_file(folder / "vgg16_features.safetensors")
    whole = {f"features.{key}": value for key, value in state.items()} | {"classifier.0.bias": torch.zeros(4)}
    save_file(whole, tmp_path / "vgg16.safetensors")
    x, _ = frames(1, 3, 16, 16)
    other = Features("vgg", tmp_path / "vgg16.safetensors")
    assert other.taps == list(TAPS["vgg"]) and all(torch.equal(a, b) for a, b in zip(other(x), vgg(x), strict=True))


def test_weights_that_are_missing_or_of_another_network_are_named(vgg, folder, tmp_path):
    with pytest.raises(ValueError, match=r"no vgg weights: put vgg16_features\.safetensors into .*empty"):
        Features("vgg", tmp_path / "empty")
    with pytest.raises(ValueError, match=r"alexnet_features\.safetensors: not the weights of squeeze: 0\.weight"):
        Features("squeeze", folder / "alexnet_features.safetensors")
    save_file({"conv1.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"no weights of vgg up to its first tap, got the keys \['conv1\.weight'\]"):
        Features("vgg", tmp_path / "other.safetensors")
    state = load_file(folder / "vgg16_features.safetensors")
    save_file({**state, "2.weight": torch.zeros(64, 64, 1, 1)}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"2\.weight \[64, 64, 1, 1\] \(wanted \[64, 64, 3, 3\]\)"):
        Features("vgg", tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"vgg: wanted frames \[N, 3, H, W\] of 16x16 at least, got \[3, 64, 64\]"):
        vgg(torch.zeros(3, 64, 64))


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


@pytest.mark.parametrize("net, least", [("vgg", 16), ("squeeze", 17), ("alex", 31)])
def test_frames_of_which_pooling_leaves_nothing_are_refused_and_no_larger_ones(net, least, folder):
    features = Features(net, folder)
    assert all(min(tap.shape) > 0 for tap in features(torch.zeros(1, 3, least, least)))
    with pytest.raises(ValueError, match=rf"of {least}x{least} at least, got \[1, 3, 64, {least - 1}\]"):
        features(torch.zeros(1, 3, 64, least - 1))


@pytest.mark.parametrize("B, T", [(2, 5), (1, 1)])
def test_micro_batches_of_frames_give_the_same_distance_and_gradient(B, T, folder):
    lpips = Lpips(Features("squeeze", folder)).double()
    x, y = (v.double().unflatten(0, (B, T)).transpose(1, 2) for v in frames(B * T, 3, 33, 40))
    x.requires_grad_()
    singly = torch.stack([torch.stack([lpips(x[b : b + 1, :, t], y[b : b + 1, :, t])[0] for t in range(T)]).mean()
                          for b in range(B)])
    wanted, = torch.autograd.grad((singly * torch.arange(1, B + 1)).sum(), x)
    for n in (1, 3, 100):  # frames to a micro-batch: each alone, straddling two videos, all at once
        value = per_video(lpips, x, y, pixels=n * 33 * 40 + 7)
        grad, = torch.autograd.grad((value * torch.arange(1, B + 1)).sum(), x)
        for name, a, b in (("distance", value, singly), ("gradient", grad, wanted)):
            difference = ((a - b).abs().max() / b.abs().max()).item()
            assert difference <= 1e-12, f"{name} with {n} frames a batch: relative difference {difference:.1e} > 1e-12"


def test_what_is_kept_for_backward_does_not_grow_with_the_clip(folder):
    lpips = Lpips(Features("squeeze", folder))

    def kept(T: int) -> int:
        """Bytes saved for backward beyond the clip itself."""
        x, y = (v.unflatten(0, (1, T)).transpose(1, 2) for v in frames(T, 3, 32, 32))
        sizes = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            value = per_video(lpips, x.requires_grad_(), y, pixels=2 * 32 * 32)
        assert value.requires_grad
        return sum(sizes.values())

    one, five = kept(2), kept(10)
    assert five <= one / 10, f"kept for backward: {one} bytes with one micro-batch, {five} with five"


def test_per_video_names_the_shapes_it_refuses(vgg):
    with pytest.raises(ValueError, match=r"got \[1, 3, 2, 16, 16\] and \[1, 3, 3, 16, 16\]"):
        per_video(Lpips(vgg), torch.zeros(1, 3, 2, 16, 16), torch.zeros(1, 3, 3, 16, 16))
