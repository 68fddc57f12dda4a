"""The model card: its figures are what they are called, and the shipped model keeps a floor."""

import json
import math
from pathlib import Path

import pytest
import torch

from experiments import model_card
from mirage_min.data.align import mask_box
from mirage_min.data.toy_world import WorldConfig, make_clip
from mirage_min.method import metrics, optical_flow
from mirage_min.networks.vae_wan import WanVAE
from mirage_min.systems.mirage import Mirage
from mirage_min.systems.mirage_folder import Options

WEIGHTS = Path(__file__).parents[1] / "weights"


@pytest.fixture(scope="module")
def clip():
    return make_clip(1_000_000, WorldConfig(frames=2))


def psnr(x, y):
    """Of one frame's numbers in [-1, 1], by the definition."""
    return 10 * math.log10(4 / (x.double() - y.double()).square().mean().item())


@pytest.fixture(scope="module")
def figures(clip):
    """The card of an output that is 0.1 off on the actor, 0.2 in its shadow and 0.05 elsewhere, from the truth."""
    actor, shadow = clip.actor > 0.5, clip.shadow > 0.5
    off = torch.where(actor, 0.1, torch.where(shadow, 0.2, 0.05))
    return model_card.toy_figures(clip, clip.x_gt + off, None), clip.x_gt + off


def test_every_psnr_is_of_its_region_against_the_truth(clip, figures):
    found, x = figures
    assert found["actor_psnr_ours"] == pytest.approx(10 * math.log10(4 / 0.1**2), abs=1e-3)
    assert found["shadow_psnr_ours"] == pytest.approx(10 * math.log10(4 / 0.2**2), abs=1e-3)
    for name, video in (("ours", x), ("naive", clip.x_ni)):
        frames = [psnr(video[:, t], clip.x_gt[:, t]) for t in range(2)]
        assert found[f"full_psnr_{name}"] == pytest.approx(sum(frames) / 2, abs=1e-3)
        seen = [psnr(video[:, t][(clip.actor[:, t] > 0.5).expand(3, -1, -1)],
                     clip.x_gt[:, t][(clip.actor[:, t] > 0.5).expand(3, -1, -1)]) for t in range(2)]
        assert found[f"actor_psnr_{name}"] == pytest.approx(sum(seen) / 2, abs=1e-3), name


def test_the_crop_is_that_of_evaluate_and_follows_the_actor(clip, figures):
    found, x = figures
    crops = metrics.actor_crops(clip.boxes, 96, 144)
    frames = [psnr(x[:, t, ys, xs], clip.x_gt[:, t, ys, xs]) for t, (ys, xs) in enumerate(crops)]
    assert found["crop_psnr_ours"] == pytest.approx(sum(frames) / 2, abs=1e-3)


def test_the_background_is_what_neither_actor_nor_shadow_comes_near(clip):
    near = (clip.actor + clip.shadow > 0.02).float()
    spread = torch.nn.functional.max_pool3d(near, (1, 9, 9), 1, (0, 4, 4)) > 0  # and four pixels around them
    x = clip.x_ni + torch.where(spread, 1.0, 0.1)
    found = model_card.toy_figures(clip, x, None)
    assert found["background_psnr_ours"] == pytest.approx(10 * math.log10(4 / 0.1**2), abs=1e-3)
    assert found["warp_background_naive"] == pytest.approx(found["warp_background_truth"], rel=0.05)
    truth = model_card.toy_figures(clip, clip.x_gt, None)
    assert truth["warp_ours"] == truth["warp_truth"] != truth["warp_naive"]
    wanted = optical_flow.warp_error(clip.x_gt[None], clip.flow[None], clip.visible[None])
    assert truth["warp_truth"] == pytest.approx(wanted.item())


def test_means_are_over_the_clips_that_have_a_figure():
    rows = [{"a": 1.0, "b": math.nan, "c": math.nan}, {"a": 3.0, "b": 2.0, "c": math.nan}]
    assert model_card.mean_figures(rows) == {"a": 2.0, "b": 2.0}


class Brightening:
    """A stand-in for a Mirage: every channel a little brighter, red by .02, green by .04, blue by .06."""

    def stream(self, frames):
        for frame in frames:
            yield frame + torch.tensor([0.02, 0.04, 0.06]).view(3, 1, 1)


def test_a_real_clip_is_compared_with_itself_channel_by_channel(monkeypatch):
    x = torch.rand(3, 3, 12, 12) - 0.5
    found = model_card.real_figures(Brightening(), x)
    assert 1e-3 < found["frames_per_second"] < 1e7
    assert [found[f"shift_{c}"] for c in "rgb"] == pytest.approx([2.55, 5.1, 7.65], rel=1e-3)
    assert found["psnr"] == pytest.approx(10 * math.log10(4 / ((0.02**2 + 0.04**2 + 0.06**2) / 3)), abs=1e-2)
    assert found["difference_in"] == pytest.approx((x[:, 1:] - x[:, :-1]).abs().mean().item() * 127.5, rel=1e-4)
    assert found["difference_out"] == pytest.approx(found["difference_in"], rel=1e-4)
    monkeypatch.setattr(model_card, "read_clip", lambda path: torch.arange(6.0).view(1, 6, 1, 1).expand(3, 6, 8, 8) / 9)
    clip = model_card.real_clip(Path("x"), (4, 4), 2, 4)
    assert clip.shape == (3, 3, 4, 4) and clip[0, :, 0, 0].tolist() == pytest.approx([2 / 9, 3 / 9, 4 / 9])


def test_blank_frames_are_dark_barred_and_of_one_colour():
    seen = []

    class Watching(Brightening):
        def stream(self, frames):
            frames = list(frames)
            seen.append(torch.stack(frames, dim=1))
            return super().stream(frames)
    x = torch.rand(3, 2, 12, 12) * 2 - 1
    found = model_card.blank_figures(Watching(), x)
    assert list(found) == ["dark", "bars", "black", "grey", "white"]
    dark, barred, black, grey, white = seen
    assert torch.allclose((dark + 1) / 2, (x + 1) / 2 / 10, atol=1e-6)
    assert torch.equal(barred[:, :, 2:-2], x[:, :, 2:-2]) and (barred[:, :, [0, 1, 10, 11]] == -1).all()
    assert [v.unique().tolist() for v in (black, grey, white)] == [[-1], [0], [1]]
    assert list(found.values()) == pytest.approx([5.1] * 5, rel=1e-3)


def test_the_card_is_written_as_text_numbers_and_a_picture(tmp_path, monkeypatch, capsys):
    given = {}

    class System:
        Options = Options

        @staticmethod
        def from_pretrained(path, dtype, **options):
            given.update(options)
            return Brightening()

    monkeypatch.setattr(model_card, "system_in", {tmp_path / "model": System}.get)
    real = torch.rand(3, 9, 12, 12) * 2 - 1
    monkeypatch.setattr(model_card, "real_clip", lambda *args: real)
    args = ["--clips", "2", "--frames", "2", "--real", "x", "--out", str(tmp_path), "--model", str(tmp_path / "model"),
            "--name", "a_card", "--set", "change_only=no"]
    model_card.main(model_card.flags().parse_args(args))
    card = json.loads((tmp_path / "a_card.json").read_text())
    assert given == vars(Options(change_only=False))
    assert card["clips"] == 2 and card["model"].endswith("model")
    assert card["crop_gain"] == card["crop_psnr_ours"] - card["crop_psnr_naive"]
    text = (tmp_path / "a_card.md").read_text()
    assert "model` with `--set change_only=no`. Means over 2 held-out" in text
    for key, row in (("crop_psnr", "PSNR in the crop"), ("shadow_psnr", "PSNR in its shadow")):
        assert f"| {row} | {card[f'{key}_naive']:.3f} | {card[f'{key}_ours']:.3f} |  |" in text
    assert f"| {card['warp_truth']:.3f} |" in text and "+2.55, +5.10, +7.65" in text
    assert (tmp_path / "a_card.png").read_bytes()[1:4] == b"PNG"


def test_the_shipped_model_lifts_the_crop_by_5_db_on_four_held_out_clips():
    """The floor: the card has the mean of 64. About 12 seconds of one core."""
    mirage, gains = Mirage.from_pretrained(WEIGHTS, dtype=torch.float32), []
    for seed in range(1_000_004, 1_000_008):
        clip = make_clip(seed, WorldConfig(frames=9), extras=False)
        x_dr = model_card.harmonised(mirage, clip.x_ni)
        boxes = torch.stack([mask_box(alpha) for alpha in clip.actor[0]])
        crops = metrics.actor_crops(boxes, *clip.x_gt.shape[2:])
        x_gt = metrics.cropped(clip.x_gt[None], crops)
        after, before = (metrics.psnr(metrics.cropped(x[None], crops), x_gt).item() for x in (x_dr, clip.x_ni))
        gains.append(after - before)
    mean = sum(gains) / 4
    assert mean > 5, f"the crop gains {mean:.2f} dB on average, wanted 5 ({', '.join(f'{g:.1f}' for g in gains)})"


def test_the_shipped_wan_vae_carries_a_made_up_clip_and_its_tones():
    x = make_clip(900_000, WorldConfig(frames=5)).x_gt[None]
    vae = WanVAE.from_pretrained(WEIGHTS / "vae_wan", dtype=torch.float32)
    with torch.no_grad():
        z = vae.encode(x)
        y = vae.decode(z)
    assert metrics.psnr(y, x) > 23 and ((y - x).mean(dim=(2, 3, 4)).abs() * 127.5).max() < 3
    assert 0.5 < z.std() < 1.5, "latents_mean and latents_std belong to it"
