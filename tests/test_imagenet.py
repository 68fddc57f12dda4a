"""The ImageNet networks against torchvision's, and the files that they are loaded from."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mirage_min.networks.imagenet import FILES, TAPS, Features
from tests.random_imagenet import frames, save_networks, torchvision_features


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_networks(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def vgg(folder) -> Features:
    return Features("vgg", folder)


@pytest.mark.parametrize("net", ["vgg", "alex", "squeeze"])
def test_the_taps_are_what_torchvisions_layers_give_on_normalised_colours(net, folder):
    theirs = torchvision_features(net, load_file(folder / f"{FILES[net]}.safetensors"))
    x, _ = frames(2, 3, 65, 47)
    ours = Features(net, folder)(x)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    y, taps = ((x + 1) / 2 - mean) / std, {}
    for i, layer in enumerate(theirs[: max(TAPS[net].values()) + 1]):
        y = layer(y)
        taps[i] = y.clone()  # the next rectifier works in place
    for (name, i), tap in zip(TAPS[net].items(), ours, strict=True):
        difference = ((tap - taps[i]).abs().max() / taps[i].abs().max()).item()
        assert difference <= 1e-5, f"{name}: largest relative difference {difference:.1e} > 1e-5"


def test_a_vgg_file_that_ends_early_gives_the_taps_it_reaches(vgg, folder, tmp_path):
    state = load_file(folder / "vgg16_features.safetensors")
    early = {key: value for key, value in state.items() if int(key.split(".")[0]) < 9}
    save_file(early, tmp_path / "vgg16_features_to_relu2_2.safetensors")
    short = Features("vgg", tmp_path)
    assert short.taps == ["relu1_2", "relu2_2"]
    x, _ = frames(1, 3, 32, 48)
    assert all(torch.equal(a, b) for a, b in zip(short(x), vgg(x)[:2], strict=True))


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
    with pytest.raises(ValueError, match=r"alexnet_features\.safetensors .*does not fit squeeze.*: 0\.weight \("):
        Features("squeeze", folder / "alexnet_features.safetensors")
    save_file({"conv1.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"no weights of vgg up to its first tap, got the keys \['conv1\.weight'\]"):
        Features("vgg", tmp_path / "other.safetensors")
    state = load_file(folder / "vgg16_features.safetensors")
    save_file({**state, "2.weight": torch.zeros(64, 64, 1, 1)}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"2\.weight \(wanted \[64, 64, 3, 3\], got \[64, 64, 1, 1\]\)"):
        Features("vgg", tmp_path / "odd.safetensors")
    for bias, said in ((torch.full((64,), torch.nan), r"2\.bias is not finite"),
                       (torch.ones(64, dtype=torch.int64), r"2\.bias: wanted floating-point numbers .*int64")):
        save_file({**state, "2.bias": bias}, tmp_path / "odd.safetensors")
        with pytest.raises(ValueError, match=said):
            Features("vgg", tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"vgg: wanted frames \[N, 3, H, W\] of 16x16 at least, got \[3, 64, 64\]"):
        vgg(torch.zeros(3, 64, 64))


@pytest.mark.parametrize("net, least", [("vgg", 16), ("squeeze", 17), ("alex", 31)])
def test_frames_of_which_pooling_leaves_nothing_are_refused_and_no_larger_ones(net, least, folder):
    features = Features(net, folder)
    assert all(min(tap.shape) > 0 for tap in features(torch.zeros(1, 3, least, least)))
    with pytest.raises(ValueError, match=rf"of {least}x{least} at least, got \[1, 3, 64, {least - 1}\]"):
        features(torch.zeros(1, 3, 64, least - 1))
