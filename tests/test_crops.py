"""Crops for the autoencoders: of the sizes asked for, toy or real by their share, a function of their generator."""

from collections import Counter

import pytest
import torch

from mirage_min.data import photometric
from mirage_min.data.crops import Crops
from mirage_min.data.pairs import Pairs
from mirage_min.data.real_clips import RealClips
from mirage_min.networks import weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two pairs of 9 frames of 32 x 48, whose pixels say which they are, and one real clip."""
    folder = tmp_path_factory.mktemp("clips")
    for i in range(2):
        x = torch.full((2, 3, 9, 32, 48), 40 * i, dtype=torch.uint8)
        x[1] += 20
        weights.save_tensors(folder / f"{i}.safetensors", {"x_ni": x[0], "x_gt": x[1]})
    (folder / "real").mkdir()
    weights.save_tensors(folder / "real" / "street.safetensors", {"x": torch.full((3, 12, 96, 160), 200).byte()})
    return folder


@pytest.fixture
def crops(folder, monkeypatch):
    monkeypatch.setattr(photometric, "KINDS", {"as it is": 1.0})
    return Crops(Pairs(folder, 9), RealClips(folder / "real", 9), 0.25, "9x16x16 1x64x96")


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_crop_has_its_size_and_is_a_function_of_its_generator(crops):
    for size in crops.sizes:
        for seed in range(4):
            x, name = crops.crop(size, draws(seed))
            again, same = crops.crop(size, draws(seed))
            assert x.shape == (3, *size) and torch.equal(x, again) and name == same and x.abs().max() <= 1


def test_both_sides_of_a_pair_are_seen_real_clips_by_their_share_and_alone_where_toy_clips_are_too_small(crops):
    seen = Counter()
    for seed in range(200):
        x, name = crops.crop((9, 16, 16), draws(seed))
        seen[name, round((x.mean().item() + 1) * 127.5)] += 1
        assert crops.crop((1, 64, 96), draws(seed))[1] == "street"
    toy = {("0.safetensors", 0), ("0.safetensors", 20), ("1.safetensors", 40), ("1.safetensors", 60)}
    assert set(seen) == toy | {("street", 200)} and min(seen.values()) > 15
    assert 30 <= seen["street", 200] <= 70, f"{seen['street', 200]} of 200, wanted a quarter"


def test_crops_of_a_pair_lie_anywhere_in_it(tmp_path, monkeypatch):
    """A clip whose values say where and when they are: red the column, green the row, blue the frame."""
    monkeypatch.setattr(photometric, "KINDS", {"as it is": 1.0})
    t, y, x = torch.meshgrid(torch.arange(9), torch.arange(24), torch.arange(48), indexing="ij")
    clip = torch.stack([x, y, t]).byte()
    weights.save_tensors(tmp_path / "a.safetensors", {"x_ni": clip, "x_gt": clip.clone()})
    crops, firsts = Crops(Pairs(tmp_path, 9), None, 0.0, "3x16x40"), []
    for seed in range(120):
        crop, _ = crops.crop((3, 16, 40), draws(seed))
        left, top, first = ((crop[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
        wanted = clip[:, first : first + 3, top : top + 16, left : left + 40]
        assert torch.equal(((crop + 1) * 127.5).round().byte(), wanted)
        firsts.append((first, top, left))
    for drawn, last in zip(zip(*firsts), (6, 8, 8)):
        assert set(drawn) == set(range(last + 1))


def test_sizes_are_drawn_alike_and_make_batches_of_as_many_pixels(crops):
    drawn = Counter(crops.draw_size(draws(seed)) for seed in range(200))
    assert drawn.keys() == {(9, 16, 16), (1, 64, 96)} and min(drawn.values()) > 70
    assert crops.count((9, 16, 16), 8) == 8 and crops.count((1, 64, 96), 8) == round(8 * 9 * 16 * 16 / (64 * 96))
    assert crops.count((1, 64, 96), 1) == 2, "two at least"


def test_crops_are_shown_in_one_photometric_variation_each(folder, monkeypatch):
    crops = Crops(Pairs(folder, 9), None, 0.0, "9x16x16")
    monkeypatch.setattr(photometric, "KINDS", {"one colour": 1.0})
    changed = [crops.crop((9, 16, 16), draws(seed))[0] for seed in range(3)]
    assert all(len(x.unique()) > 1 or x.min() > -0.9 for x in changed)
    assert not torch.equal(changed[0], changed[1])


@pytest.mark.parametrize("sizes", ["", "9x64", "9x64x64x3", "axbxc", "0x16x16", "-1x16x16"])
def test_sizes_that_are_none_are_refused(folder, sizes):
    with pytest.raises(ValueError, match=f"sizes: wanted frames x height x width, .* got '{sizes}'"):
        Crops(Pairs(folder, 9), None, 0.0, sizes)


@pytest.mark.parametrize("size", ["10x16x16", "1x33x16", "1x16x49"])
def test_sizes_that_fit_into_no_clip_are_refused(folder, size):
    with pytest.raises(ValueError, match=f"sizes: wanted crops of at most 9x32x48, .* got {size}"):
        Crops(Pairs(folder, 9), None, 0.0, size)
