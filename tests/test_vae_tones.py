"""How VAEs carry tone: the figures of a VAE whose mistake is known, equal minutes, and the table of two real ones."""

import json
import math

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
