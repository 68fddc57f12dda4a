"""The card of real streets: what moved is measured as it moved, and the crop is where insertion and truth differ."""

import argparse
import json
import math

import pytest
import torch

from experiments import real_card
from mirage_min.data.pixels import to_bytes
from mirage_min.data.video import write_clip
from mirage_min.networks.weights import save_tensors


class Brightening:
    """A stand-in for a Mirage: red brighter by .02, green by .04, blue by .06."""

    def stream(self, frames):
        for frame in frames:
            yield frame + torch.tensor([0.02, 0.04, 0.06]).view(3, 1, 1)


def smooth(T=3, H=64, W=96, seed=0):
    """A video in [-.8, .8] that an mp4 hardly changes: a picture that moves to the right by two pixels a frame."""
    x = torch.nn.functional.interpolate(torch.rand(1, 3, 8, 16, generator=torch.Generator().manual_seed(seed)),
                                        (H, W + 2 * T), mode="bicubic")[0].clamp(0, 1) * 1.6 - 0.8
    return torch.stack([x[:, :, 2 * (T - t) : 2 * (T - t) + W] for t in range(T)], dim=1)


def test_what_should_not_change_is_measured_as_it_changed():
    pytest.importorskip("cv2")
    x = smooth()
    y, speed = real_card.harmonised(Brightening(), x)
    found = real_card.unchanged_figures(x, y)
    mse = sum(v**2 for v in (0.02, 0.04, 0.06)) / 3
    assert found["psnr"] == pytest.approx(10 * math.log10(4 / mse), abs=1e-3) and speed > 0
    assert found["shift"] == pytest.approx([2.55, 5.1, 7.65], abs=1e-3)
    assert found["flicker"] == pytest.approx(1, abs=1e-3), "the same shift in every frame does not flicker"
    flickering = x + 0.1 * torch.tensor([0.0, 1, 0]).view(3, 1, 1)
    assert real_card.unchanged_figures(x, flickering)["flicker"] > 2


def test_the_tones_are_what_they_are_called():
    x = smooth(H=60)
    tones = real_card.tones(x)
    torch.testing.assert_close((tones["a quarter of the light"] + 1) * 4, x + 1)
    assert (tones["bars"][:, :, :10] == -1).all() and torch.equal(tones["bars"][:, :, 10:50], x[:, :, 10:50])
    assert [tones[name].unique().tolist() for name in ("black", "grey", "white")] == [[-1], [0], [1]]


def test_the_crop_is_around_the_largest_patch_that_differs():
    x_gt = smooth(T=3, H=80, W=112)
    x_ni = x_gt.clone()
    x_ni[:, 0, 20:60, 40:70] += 0.5            # cells 1 to 3 down, 2 to 4 across
    x_ni[:, 0, 70:80, 0:10] += 0.5             # a smaller one
    x_ni[:, 1, :, 100:] += 0.5                 # the last cells across are whole: 112 is 7 of 16
    boxes = real_card.largest_patch(x_ni, x_gt)
    assert boxes.tolist() == [[32, 16, 80, 64], [96, 0, 112, 80], [0, 0, 0, 0]]


def test_the_shadow_is_what_the_truth_darkens_outside_the_actor():
    x_gt = smooth()
    x_ni, actor = x_gt.clone(), torch.zeros(1, *x_gt.shape[1:])
    x_ni[:, :, 40:50, 20:60] += 0.3
    actor[:, :, 40:50, 20:30] = 1
    x = x_gt + 0.1
    x[:, :, 40:50, 30:60] = x_gt[:, :, 40:50, 30:60] + 0.2
    assert real_card.shadow_psnr(x_ni, x_gt, actor, x) == pytest.approx(10 * math.log10(4 / 0.04), abs=1e-3)
    assert math.isnan(real_card.shadow_psnr(x_gt, x_gt, actor, x))


def test_clips_are_seen_at_every_width_and_tones_and_the_picture_are_of_the_first(tmp_path, monkeypatch):
    seen, strips = [], []

    def harmonised(mirage, x):
        seen.append(list(x.shape))
        return torch.full_like(x, x.shape[3] / 100), 2.0
    monkeypatch.setattr(real_card, "harmonised", harmonised)
    monkeypatch.setattr(real_card, "unchanged_figures", lambda x, y: {"width": x.shape[3]})
    monkeypatch.setattr(real_card, "read_clip", lambda path, frames: smooth(frames, 64, 96))
    for name in "abcd":
        (tmp_path / f"{name}.mp4").touch()
    card = real_card.measure_unchanged(argparse.Namespace(unchanged=tmp_path, widths=[48, 96], frames=3), None, strips)
    assert seen == [[3, 3, 32, 48]] * 4 + [[3, 3, 64, 96]] * 4 + [[3, 3, 32, 48]] * 5
    assert {width: [row["width"] for row in rows] for width, rows in card["unchanged"].items()} == {
        48: [48] * 4, 96: [96] * 4}
    assert card["unchanged"][48][1]["name"] == "b" and card["unchanged"][48][1]["speed"] == 2
    assert len(card["tones"]) == 5 and card["tones"]["grey"] == pytest.approx([0.48 * 127.5] * 3)
    for strip in strips:
        assert strip.shape == (3, 214, 960) and (strip[:, :, 330:630] - 0.48).abs().max() < 1e-5, "input | ours | truth"
    assert len(strips) == 3


def test_frames_a_second_are_those_of_the_whole_clip(monkeypatch):
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(real_card.time, "time", lambda: next(clock))
    assert real_card.harmonised(Brightening(), torch.zeros(3, 6, 2, 2))[1] == 3


def test_the_card_has_every_part_that_was_asked_for_and_names_an_empty_folder(tmp_path, monkeypatch, capsys):
    pytest.importorskip("cv2")
    monkeypatch.setattr(real_card.Mirage, "from_pretrained", lambda *given, **settings: Brightening())
    x = smooth()
    x_ni = x.clone()
    x_ni[:, :, 20:40, 20:60] += 0.2
    for folder in ("clips", "streets", "pairs"):
        (tmp_path / folder).mkdir()
    write_clip(tmp_path / "clips" / "road.mp4", x)
    write_clip(tmp_path / "pairs" / "a_ni.mp4", x_ni)
    write_clip(tmp_path / "pairs" / "a_gt.mp4", x)
    save_tensors(tmp_path / "streets" / "b.safetensors", {
        "x_ni": to_bytes(x_ni), "x_gt": to_bytes(x), "boxes": torch.tensor([[20.0, 20, 60, 40]] * 3),
        "actor": torch.zeros(1, 3, 64, 96, dtype=torch.uint8)})
    given = ["--unchanged", tmp_path / "clips", "--streets", tmp_path / "streets", "--insertions", tmp_path / "pairs",
             "--widths", 96, 48, "--out", tmp_path / "out"]
    real_card.main(real_card.flags().parse_args([str(a) for a in given]))
    card = json.loads((tmp_path / "out" / "real_card.json").read_text())
    assert card.keys() == {"set", "unchanged", "tones", "streets", "insertions"}
    assert card["unchanged"].keys() == {"96", "48"}
    (street,) = card["streets"]
    assert street["crop_psnr_naive"] < street["full_psnr_naive"] and street["shadow_psnr_ours"] > 0
    text = capsys.readouterr().out
    assert "Means over 1 pairs, real insertions:" in text and "| road |" in text
    assert (tmp_path / "out" / "real_card.png").exists()
    (tmp_path / "none").mkdir()
    for flag, wanted in (("--streets", "found none"), ("--insertions", "found no"), ("--unchanged", "found none")):
        with pytest.raises(ValueError, match=wanted):
            real_card.main(real_card.flags().parse_args([flag, str(tmp_path / "none"), "--out", str(tmp_path)]))
    with pytest.raises(ValueError, match="wanted --unchanged, --streets or --insertions"):
        real_card.main(argparse.Namespace(set=[], unchanged=None, streets=None, insertions=None, perceptual=None,
                                          model=tmp_path, out=tmp_path))
