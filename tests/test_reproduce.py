"""What the reproductions share: nothing is made twice or kept too long, and the tables say what was scored."""

import json
from argparse import Namespace

import pytest
import torch

from experiments import common
from experiments.mirage_table1 import drift
from mirage_min.networks import weights
from mirage_min.networks.vae_2d import AutoencoderKL, AutoencoderKLConfig


def test_what_was_made_is_kept_until_a_setting_changes(tmp_path):
    made = []

    def make(to):
        made.append(to.name)
        (to / "model").write_text("x" * len(made))
    for settings in ({"steps": 2}, {"steps": 2}, {"steps": 3}, {"steps": 3}):
        folder = common.once(tmp_path / "seed_1", settings, make)
    assert len(made) == 2 and (folder / "model").read_text() == "xx"
    about = json.loads((folder / "made.json").read_text())
    assert about["settings"] == {"steps": 3} and about["minutes"] >= 0


def test_what_was_interrupted_goes_on_in_the_same_folder_and_other_settings_empty_it(tmp_path):
    def fail(to):
        (to / "checkpoint").touch()
        raise KeyboardInterrupt
    seen = []
    with pytest.raises(KeyboardInterrupt):
        common.once(tmp_path / "a", {"steps": 2}, fail)
    common.once(tmp_path / "a", {"steps": 2}, lambda to: seen.append((to / "checkpoint").exists()))
    common.once(tmp_path / "a", {"steps": 4}, lambda to: seen.append((to / "checkpoint").exists()))
    assert seen == [True, False]


@pytest.mark.parametrize("ours, wanted", [
    ({"a": 3.0, "b": 2.0, "c": 1.0}, "3 of 3"), ({"a": 1.0, "b": 2.0, "c": 3.0}, "0 of 3"),
    ({"a": 3.0, "b": 1.0, "c": 2.0}, "2 of 3"), ({"a": None, "b": 2.0, "c": 1.0}, "1 of 1"), ({"a": 1.0}, "–")])
def test_the_papers_order_is_counted_by_pairs_of_methods(ours, wanted):
    paper = {"a": 30.0, "b": 20.0, "c": 10.0}
    assert common.agreement(paper, ours, max) == wanted
    assert common.agreement({k: -v for k, v in paper.items()}, {k: v and -v for k, v in ours.items()}, min) == wanted


def test_a_report_holds_means_deviations_the_papers_numbers_and_the_command(tmp_path, capsys):
    def seed(a, b):
        absent = dict.fromkeys(common.BETTER)
        scores = {"x": absent | {"PSNR": a}, "y": absent | {"PSNR": b}, "naive": absent | {"PSNR": "inf"}}
        return {"mean": {region: scores for region in common.REGIONS}, "remarks": {"LPIPS": "absent: no weights"}}
    args = Namespace(steps=5, seeds=2, clips=3, out=tmp_path)
    common.report("mirage_table9", "A table.\n\nMore.", args, {"full frame": {"x": {"PSNR": 20}, "y": {"PSNR": 25}}},
                  [seed(10.0, 12.0), seed(14.0, 13.0)])
    text = (tmp_path / "mirage_table9.md").read_text()
    assert "`python -m experiments.mirage_table9 --steps 5 --seeds 2 --clips 3 --perceptual DIR`" in text
    assert "| x | 12.000 ± 2.828 (20) |" in text and "| y | 12.500 ± 0.707 (25) |" in text
    assert "| naive | inf |" in text, "evaluate.py's JSON has a string where two videos are equal"
    assert "PSNR: pairs of methods in the paper's order, seed by seed: 1 of 1, 0 of 1" in text
    assert "LPIPS: absent: no weights" in text and "| LPIPS |" not in text
    kept = json.loads((tmp_path / "mirage_table9.json").read_text())["seeds"]
    assert kept[1]["mean"]["full frame"]["x"]["PSNR"] == 14


def test_the_drift_is_how_the_actors_colour_strays_from_its_own_mean_distance_to_the_truth(tmp_path):
    clips, made, shape = tmp_path / "clips", tmp_path / "made", (3, 6, 8, 8)
    for folder in (clips, made):
        folder.mkdir()
    truth, actor = torch.full(shape, 100, dtype=torch.uint8), torch.zeros(1, *shape[1:], dtype=torch.uint8)
    actor[:, :4, 2:5, 3:7] = 255  # hidden in the last two frames
    constant, flicker = truth + 30, truth.clone()
    flicker[0, 0:4:2, 2:5, 3:7] += 10          # red is 10 too much in every other frame: 5 to either side of the mean
    flicker[:, 4:] = 0                         # where there is no actor nothing counts
    flicker[:, :, 0] = 255                     # nor beside it
    for name, x, wanted in (("constant", constant, 0), ("flicker", flicker, 5)):
        weights.save_tensors(clips / "1.safetensors", {"x_gt": truth, "actor": actor})
        weights.save_tensors(made / "1.safetensors", {"x_dr": x})
        assert drift(clips, made, "x_dr") == pytest.approx(wanted, abs=1e-4), name


def test_the_baselines_skips_start_at_nothing_each_takes_part_and_a_frame_sees_only_itself():
    torch.manual_seed(0)
    vae = AutoencoderKL(AutoencoderKLConfig(block_out_channels=(8, 16, 16), norm_num_groups=4))
    model, x = common.SkipVAE(vae).double(), torch.rand(1, 3, 2, 16, 24, dtype=torch.float64) * 2 - 1

    @torch.no_grad()
    def through(x):
        return common.framewise(lambda frames: model.decode(vae.encode(frames), vae.mids(frames)), x)
    with torch.no_grad():
        plain = torch.stack([vae.decode(vae.encode(frame)) for frame in x.unbind(2)], dim=2)
    before = through(x)
    assert torch.allclose(before, plain, atol=1e-12), f"largest difference {(before - plain).abs().max():.1e}"
    for skip in model.skips:
        torch.nn.init.normal_(skip.weight)
        after = through(x)
        assert (after - before).abs().max() > 1e-3, "a skip that changes nothing"
        before = after
    other = x.clone()
    other[:, :, 1] = 0
    assert torch.allclose(through(other)[:, :, 0], before[:, :, 0], atol=1e-12)
