"""real_limits.py replaces the parts of the model that it names, and no others."""

import json

import pytest
import torch

from experiments import real_card, real_limits
from mirage_min.data.video import read_clip, write_clip
from tests import small


def clip(seed: int, T: int = 3, H: int = 40, W: int = 56) -> torch.Tensor:
    """A smooth random video [3, T, H, W] in [-1, 1]."""
    x = torch.rand(3, T, 5, 7, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(x, (H, W), mode="bilinear") * 1.6 - 0.8


@torch.no_grad()
def test_each_variant_is_the_decoder_on_what_it_names():
    mirage = small.mirage()
    x_ni, x_gt = clip(0)[None], clip(1)[None]
    made = real_limits.variants(mirage, x_ni, x_gt)
    assert made.keys() == {"the model", "insertion's latent: no transformer", "truth's latent: a perfect transformer",
                           "model's latent, truth's features", "truth's latent and features: the decoder's ceiling"}
    torch.testing.assert_close(made["the model"], mirage(x_ni).clamp(-1, 1), rtol=0, atol=1e-5)
    # by hand: frames repeated to a whole group, then cut again
    padded = mirage.pad(x_gt)
    ceiling = mirage.vae.decode(mirage.vae.encode(padded), inject=mirage.mids(padded))[:, :, :3, :40, :56].clamp(-1, 1)
    torch.testing.assert_close(made["truth's latent and features: the decoder's ceiling"], ceiling, rtol=0, atol=1e-5)
    others = list(made.values())
    for i, x in enumerate(others):
        assert all((x - y).abs().max() > 1e-4 for y in others[:i]), "two variants are the same"


def test_a_folder_of_pairs_becomes_a_table(tmp_path, monkeypatch):
    for name in ("a", "b"):
        x_gt = clip(len(name), T=2, H=64, W=64)
        x_ni = x_gt.clone()
        x_ni[:, :, 16:48, 16:48] += 0.2
        write_clip(tmp_path / f"{name}_gt.mp4", x_gt)
        write_clip(tmp_path / f"{name}_ni.mp4", x_ni)
    found = real_limits.measure(tmp_path, 2, small.mirage(), None)
    assert found["pairs"] == 2 and found["frames"] == 2 and len(found["means"]) == 6
    x_ni, x_gt = (read_clip(tmp_path / f"a_{side}.mp4", 2) for side in ("ni", "gt"))
    wanted = real_card.inserted_figures(x_ni, x_gt, x_ni, real_card.largest_patch(x_ni, x_gt), None)
    assert found["means"]["naive insertion"]["crop_psnr"] == pytest.approx(wanted["crop_psnr_naive"], abs=1e-4)
    json.dumps(found)
    text = real_limits.report(found)
    assert "means over 2 real insertions, the first 2 frames" in text and text.count("\n|") >= 7
    with pytest.raises(ValueError, match="NAME_ni.mp4"):
        real_limits.measure(tmp_path / "none", 2, small.mirage(), None)
