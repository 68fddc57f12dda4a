"""The card of restorers: figures are of what they are called, the plain fill is the lines that it says it is."""

import argparse
import json

import pytest
import torch

from experiments import restore_card
from mirage_min.data.degradations import central_mask
from mirage_min.data.toy_world import WorldConfig, make_clip
from mirage_min.method.schedules import WAN
from mirage_min.networks import small_base
from mirage_min.systems.restore import Restorer
from mirage_min.systems.restore_folder import Settings


def test_the_fill_is_two_lines_through_every_pixel_of_the_hole():
    x = torch.rand(3, 2, 9, 11, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 9, 11, dtype=torch.bool)
    mask[:, 2:6, 3:9] = True
    found = restore_card.fill(x, mask)
    wanted = x.clone()
    for i in range(2, 6):
        for j in range(3, 9):
            down = x[..., 1, j] + (i - 1) / 5 * (x[..., 6, j] - x[..., 1, j])
            across = x[..., i, 2] + (j - 2) / 7 * (x[..., i, 9] - x[..., i, 2])
            wanted[..., i, j] = (down + across) / 2
    assert torch.allclose(found, wanted, atol=1e-6), f"largest difference {(found - wanted).abs().max():.1e}"


def test_figures_are_of_the_full_frame_and_of_the_hole():
    x_gt, mask = torch.zeros(3, 2, 96, 144), central_mask(96, 144)
    x = torch.where(mask, x_gt + 0.2, x_gt)  # a quarter of the pixels is .2 off
    found = restore_card.figures({"ours": x}, x_gt, mask, lambda a, b: (a - b).abs().mean())
    assert found == pytest.approx({"full_psnr_ours": 26.021, "hole_psnr_ours": 20, "full_lpips_ours": 0.05,
                                   "hole_lpips_ours": 0.2}, abs=1e-3)
    assert "hole_psnr_ours" not in restore_card.figures({"ours": x}, x_gt, None, lambda a, b: 0)


def test_the_summary_has_means_and_counts_the_clips_in_which_ours_is_better():
    clips = [{"full_psnr_bicubic": 20.0, "full_psnr_ours": psnr, "full_lpips_bicubic": 0.4, "full_lpips_ours": lpips}
             for psnr, lpips in ((22.0, 0.5), (20.0, 0.1), (21.0, 0.3))]
    found = restore_card.summary("upscale", clips)
    assert found["full_psnr"] == {"bicubic": 20, "ours": 21, "better in": 2}
    assert found["full_lpips"]["ours"] == pytest.approx(0.3) and found["full_lpips"]["better in"] == 2
    assert found.keys() == {"full_psnr", "full_lpips"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Streams do not predict their memory, which takes longer than they do."""
    monkeypatch.setattr(Restorer, "check_memory", lambda *given: None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Restorers that change nothing but what their VAE loses, one for each task."""
    folder = tmp_path_factory.mktemp("restorers")
    torch.manual_seed(0)
    parts = small_base.new_vae("wan", 0.25), small_base.new_transformer("wan", 1), torch.zeros(1, 1, 16), WAN
    for settings in (Settings("upscale", scale=4), Settings("inpaint"), Settings("artifacts")):
        Restorer(*parts, settings).save_pretrained(folder / settings.task)
    return folder


@pytest.mark.parametrize("task, names", [("upscale", ["low resolution", "bicubic", "ours"]),
                                         ("inpaint", ["hole", "fill", "ours"])])
def test_both_sides_start_from_the_same_degraded_clip_and_a_seed_repeats(folders, task, names):
    restorer = Restorer.from_pretrained(folders / task)
    x_gt = make_clip(1_000_000, WorldConfig(frames=2), extras=False).x_gt
    first, again, other = (restore_card.TASKS[task](restorer, x_gt, seed) for seed in (1, 1, 2))
    assert list(first) == names and all(x.shape == x_gt.shape for x in first.values())
    assert all(torch.equal(first[name], again[name]) for name in names)
    if task == "upscale":
        assert not torch.equal(first["bicubic"], other["bicubic"])
        errors = [(found["bicubic"] - x_gt).square().mean() for found in (first, other)]
        assert sum(errors) / 2 < x_gt.var() / 4
    else:
        mask = central_mask(96, 144)
        assert all(torch.equal(torch.where(mask, x_gt, x), x_gt) for x in first.values()), "outside nothing changes"


@pytest.mark.parametrize("count, shown", [(1, 1), (6, 4)])
def test_clips_are_the_first_held_out_ones_and_the_picture_has_the_middle_frames_of_four(monkeypatch, count, shown):
    """Each clip is its number, and each frame a tenth of it more."""
    def clip(seed, config):
        x = (seed - 1_000_000 + torch.arange(5.0) / 10).view(1, 5, 1, 1).expand(3, 5, 4, 6)
        return argparse.Namespace(x_gt=x)
    restorer = argparse.Namespace(settings=argparse.Namespace(task="upscale"), masked=False)
    monkeypatch.setattr(restore_card.Restorer, "from_pretrained", lambda path, dtype: restorer)
    monkeypatch.setattr(restore_card, "make_clip", lambda seed, config, extras: clip(seed, config))
    monkeypatch.setitem(restore_card.TASKS, "upscale", lambda restorer, x, seed: {"bicubic": x + 2, "ours": x + 1})
    args = argparse.Namespace(clips=count, frames=5)
    part, strips = restore_card.measure("a", args, lambda a, b: 0.5)
    assert len(part["clips"]) == count and part["means"]["full_psnr"]["better in"] == count
    assert part["shown"] == ["bicubic", "ours", "truth"]
    for k, strip in enumerate(strips):
        assert strip.shape == (3, 4, 18) and strip[0, 0, ::6].tolist() == pytest.approx([k + 2.2, k + 1.2, k + 0.2])
    assert len(strips) == shown


def test_the_card_has_both_restorers_and_refuses_another(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(restore_card, "Lpips", lambda features: lambda x, y: (x - y).abs().flatten(1).mean(dim=1))
    monkeypatch.setattr(restore_card, "Features", lambda *given: None)
    given = ["--clips", "2", "--frames", "2", "--perceptual", "x", "--out", str(tmp_path)]
    models = [str(folders / task) for task in ("upscale", "inpaint")]
    restore_card.main(restore_card.flags().parse_args([*models, *given]))
    card = json.loads((tmp_path / "restore_card.json").read_text())
    assert [part["task"] for part in card["restorers"]] == ["upscale", "inpaint"]
    row = card["restorers"][1]["means"]["hole_psnr"]
    line = f"| PSNR in the hole | {row['fill']:.3f} | {row['ours']:.3f} | {row['better in']} of 2 |"
    assert line in (tmp_path / "restore_card.md").read_text() == capsys.readouterr().out[:-1]
    assert (tmp_path / "restore_card.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(ValueError, match="artifacts: wanted a restorer for one of upscale, inpaint"):
        restore_card.main(restore_card.flags().parse_args([str(folders / "artifacts"), *given]))
