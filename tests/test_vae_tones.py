"""How VAEs carry tone: the figures of a VAE whose mistake is known, equal minutes, and the table of two real ones."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from experiments import vae_tones
from mirage_min.networks import small_base, weights


class Brighter(nn.Module):
    """What a VAE would be that adds a tenth to red."""

    def encode(self, x):
        return x * 0.5  # leaves room for the tenth

    def decode(self, z):
        return z * 2 + torch.tensor([0.1, 0.0, 0.0]).view(1, 3, 1, 1, 1)


def test_a_known_shift_is_found_in_every_tone():
    x = torch.rand(3, 9, 16, 24) * 0.2 - 0.1
    found = vae_tones.carried(Brighter(), {"a": x, "b": x.flip(1)})
    assert list(found) == list(vae_tones.KINDS)
    for kind in ("as it is", "haze", "night"):  # those that no clamp reaches
        assert found[kind]["shift"] == pytest.approx([12.75, 12.75], abs=0.2), kind
        # PSNR of [-1, 1], only red is off: 10 log10(4 / (.1² / 3))
        assert found[kind]["psnr"] == pytest.approx([10 * math.log10(4 * 3 / 0.01)] * 2, abs=0.1), kind


@pytest.mark.parametrize("T, frames", [(12, slice(1, 10)), (9, slice(0, 9)), (5, slice(0, 5))])
def test_of_a_recorded_clip_the_middle_is_seen(tmp_path, T, frames):
    """120 x 288 is as wide as it is made: 12 rows and 72 columns are cut off at either side."""
    x = torch.randint(0, 256, (3, T, 120, 288), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    weights.save_tensors(tmp_path / "a.safetensors", {"x": x})
    found = vae_tones.recorded(tmp_path / "a.safetensors")
    assert found.shape[2:] == (96, 144)
    wanted = x[:, frames, 12:108, 72:216].float() / 127.5 - 1
    assert found.shape == wanted.shape and (found - wanted).abs().max() < 1e-5


def test_twice_as_large_a_clip_is_made_smaller(tmp_path):
    large = torch.zeros(3, 1, 240, 576, dtype=torch.uint8)
    large[:, :, :120] = 255
    weights.save_tensors(tmp_path / "a.safetensors", {"x": large})
    found = vae_tones.recorded(tmp_path / "a.safetensors")
    assert found.shape == (3, 1, 96, 144) and (found[:, :, :46] == 1).all() and (found[:, :, 50:] == -1).all()


def test_seconds_are_those_that_the_script_took_of_a_processor(tmp_path, monkeypatch):
    used = iter([(10.0, 1.0), (17.0, 1.5)])
    monkeypatch.setattr(vae_tones.resource, "getrusage", lambda who: SimpleNamespace(
        **dict(zip(("ru_utime", "ru_stime"), next(used)))))
    said = []
    monkeypatch.setattr(vae_tones.tables, "python", lambda *argv: said.extend(map(str, argv)))
    args = vae_tones.flags().parse_args(["--real", "r", "--perceptual", "p"])
    assert vae_tones.train(args, "wan", {"width": 0.5}, 7, tmp_path) == 7.5
    assert said[:4] == ["train_base.py", "vae", "--family", "wan"] and said[-4:] == ["--set", "width=0.5", "--set",
                                                                                   "steps=7"]


def test_a_row_has_means_without_what_is_infinite_and_the_largest_shift_of_all():
    assert vae_tones.mean([20.0, math.inf, 30.0]) == 25 and vae_tones.mean([math.inf]) == math.inf
    kinds = {kind: {"psnr": [30.0, 40.0], "shift": [1.0, 2.0]} for kind in vae_tones.KINDS}
    kinds["bars"]["shift"] = [7.0, 3.0]
    text = vae_tones.report(vae_tones.flags().parse_args(["--train", "2"]), {"a VAE": kinds})
    assert f"| a VAE |{' 35.0 / 1.5 |' * 5} 35.0 / 5.0 | 7.0 |" in text
    assert "Each was trained for 2 minutes of one core. Means over 2 clips" in text


def test_a_variant_gets_as_many_steps_as_fit_into_its_minutes(tmp_path, monkeypatch):
    asked = []

    def train(args, family, settings, steps, to):
        asked.append(steps)
        (to / f"out_{steps}" / "base_wan" / "vae").mkdir(parents=True)
        return 20 + 0.5 * steps  # starting takes 20 s, a step half a second

    monkeypatch.setattr(vae_tones, "train", train)
    args = vae_tones.flags().parse_args(["--train", "2"])
    vae_tones.train_for(args, "wan", {}, tmp_path)
    assert asked == [vae_tones.SHORT, vae_tones.LONG, 240] and (tmp_path / "vae").is_dir()
    assert not (tmp_path / "out_240" / "base_wan" / "vae").exists()


def test_the_card_has_a_row_for_each_vae_and_the_same_clips(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vae_tones, "SIZE", (16, 24))
    torch.manual_seed(0)
    (tmp_path / "val").mkdir()
    x = torch.randint(0, 256, (3, 12, 20, 60), dtype=torch.uint8)
    weights.save_tensors(tmp_path / "val" / "street.safetensors", {"x": x})
    folders = [tmp_path / family for family in ("cogvideox", "wan")]
    for folder in folders:
        small_base.new_vae(folder.name, width=0.5, norm_groups=4).save_pretrained(folder)
    words = ["--clips", tmp_path / "val", "--toy", 1, "--out", tmp_path / "out", "--vae", *folders]
    vae_tones.main(vae_tones.flags().parse_args([str(word) for word in words]))
    card = json.loads((tmp_path / "out" / "vae_tones.json").read_text())
    assert card["clips"] == ["street", "toy 900000"]
    assert all(len(card["vaes"][str(folder)][kind]["psnr"]) == 2 for folder in folders for kind in vae_tones.KINDS)
    text = (tmp_path / "out" / "vae_tones.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith(f"| {folders[1]}"))
    mean = sum(card["vaes"][str(folders[1])]["as it is"]["psnr"]) / 2
    assert row.split("|")[2].strip().startswith(f"{mean:.1f} /")


@pytest.mark.parametrize("words, line", [
    ([], "wanted --vae FOLDER or --train MINUTES"), (["--vae", "{tmp}", "--clips", "{tmp}"], "found none"),
    (["--train", "1"], "--train wants --real and --perceptual")])
def test_what_is_missing_is_said(tmp_path, words, line):
    with pytest.raises(ValueError, match=line):
        vae_tones.main(vae_tones.flags().parse_args([word.format(tmp=tmp_path) for word in words]))
