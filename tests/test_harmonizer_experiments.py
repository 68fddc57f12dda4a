"""Experiments on DiffusionHarmonizer: each method differs in what it is named for, each measure sees its fault."""

import argparse

import pytest
import torch

from experiments import harmonizer_losses, harmonizer_streams, harmonizer_temporal, harmonizers, tables
from mirage_min.data.pixels import to_bytes
from mirage_min.networks import weights

EXPERIMENTS = {"temporal": harmonizer_temporal, "losses": harmonizer_losses, "streams": harmonizer_streams}


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Commands in place of what they would do: {where the result goes: its settings}; and the flags of a small run."""
    ran, scored = {}, {}

    def record(*argv):
        argv = [str(word) for word in argv]
        settings = dict(word.split("=") for flag, word in zip(argv, argv[1:]) if flag == "--set")
        given = {flag: value for flag, value in zip(argv, argv[1:]) if flag.startswith("--") and flag != "--set"}
        ran[given["--out"]] = (argv[0] if argv[0] != "-m" else argv[1], settings, given)
        if argv[1] == "mirage_min.data.streams":
            for name in harmonizer_streams.STREAMS:
                weights.save_tensors(f"{given['--out']}/{name}_toy_000001.safetensors", {"x": torch.zeros(1)})

    def evaluate(args, clips, results, to):
        scored.update(results)
        return {"mean": {tables.FULL: {name: {} for name in results}}, "remarks": {}}
    monkeypatch.setattr(tables, "python", record)
    monkeypatch.setattr(tables, "harmonise", lambda clips, folder, models, settings: models)
    monkeypatch.setattr(tables, "evaluate", evaluate)
    monkeypatch.setattr(tables, "draw_strip", lambda *given: None)
    monkeypatch.setattr(tables, "report", lambda *given, more=None: None)
    monkeypatch.setattr(harmonizer_temporal, "temporal_score", lambda *given: 0.98)
    monkeypatch.setattr(harmonizer_losses, "residual_spectrum", lambda *given: torch.ones(73))

    def run(name, *more):
        parser = EXPERIMENTS[name].flags()
        args = parser.parse_args(["--steps", "3", "--seeds", "1", "--clips", "1", "--pairs", "5", "--perceptual", "p",
                                  "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), *more])
        EXPERIMENTS[name].main(args)
        return {method: ran[str(where)] for method, where in scored.items()}
    return run


def test_the_temporal_methods_share_their_beginning_and_differ_in_the_loss_or_the_past(commands):
    ran = commands("temporal")
    assert {script for script, _, _ in ran.values()} == {"train_online.py"}
    assert len({given["--base"] for _, _, given in ran.values()}) == 1
    common = {"steps": "3", "seed": "1", "latent_until": "0", "temporal_from": "0"}
    assert ran["whole"][1] == common
    assert ran["no temporal loss"][1] == common | {"lambda_warp": "0.0"}
    assert ran["no past"][1] == common | {"past": "0"}


def test_a_setting_is_every_methods_but_where_it_has_its_own(commands):
    ran = commands("temporal", "--start", "s", "--set", "lr=6e-4", "--set", "lambda_warp=9")
    assert {settings["lr"] for _, settings, _ in ran.values()} == {"6e-4"}
    assert {name: settings["lambda_warp"] for name, (_, settings, _) in ran.items()} == {
        "whole": "9", "no temporal loss": "0.0", "no past": "9"}


def test_the_losses_are_trained_from_nothing_on_the_same_pairs(commands):
    ran = commands("losses")
    assert all("--base" not in given for _, _, given in ran.values())
    assert len({given["--data"] for _, _, given in ran.values()}) == 1
    common = {"steps": "6", "seed": "1", "latent_until": "3", "latent_clips": "48", "temporal_from": "6"}
    assert ran["patch"][1] == common and ran["L2"][1] == common | {"lambda_patch": "0.0"}
    assert ran["LPIPS"][1] == common | {"lambda_patch": "0.0", "lambda_lpips": "1.0", "lpips": "vgg"}


@pytest.mark.parametrize("name", ["temporal", "losses", "streams"])
def test_every_method_may_continue_a_harmonizer_that_is_there(commands, name):
    ran = commands(name, "--start", "weights/harmonizer")
    assert {given["--base"] for _, _, given in ran.values()} == {"weights/harmonizer"}
    assert all(settings["steps"] == "3" and settings["latent_until"] == "0" for _, settings, _ in ran.values())


def test_each_stream_is_left_out_once(commands):
    ran = commands("streams")
    assert list(ran) == ["all", *(f"no {name}" for name in harmonizer_streams.STREAMS)]
    assert len({str(settings) for _, settings, _ in ran.values()}) == 1
    for method, (_, _, given) in ran.items():
        names = {path.name.partition("_")[0] for path in tables.Path(given["--data"]).glob("*.safetensors")}
        assert names == set(harmonizer_streams.STREAMS) - {method.removeprefix("no ")}


def test_settings_of_every_method_are_those_of_the_script():
    from mirage_min.data import desk
    from train_online import RECIPES
    for methods in (harmonizer_temporal.METHODS, harmonizer_losses.METHODS):
        for settings in methods.values():
            desk.override(RECIPES["small"], [f"{key}={value}" for key, value in settings.items()])


def test_pairs_of_one_stream_alone_cannot_be_left_out(tmp_path):
    weights.save_tensors(tmp_path / "isp_toy_000001.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="wanted pairs of isp and of others, found 0 others of 1"):
        harmonizer_streams.without(tmp_path, "isp", tmp_path / "out")


def test_a_grid_sticks_out_of_the_spectrum_and_noise_does_not():
    noise = torch.randn(20, 3, 24, 144, generator=torch.Generator().manual_seed(0))
    plain = harmonizer_losses.grid(harmonizer_losses.spectrum(noise), 144)
    assert 0.9 < plain < 1.1
    comb = (torch.arange(144) % 16 == 0).float()
    assert harmonizer_losses.grid(harmonizer_losses.spectrum(noise + 2 * comb), 144) > 2
    wave = torch.cos(2 * torch.pi * torch.arange(144) * 9 / 144).expand(1, 1, 144)
    assert harmonizer_losses.spectrum(wave).argmax() == 9, "nine cycles in 144 pixels"


def test_a_spectrum_is_the_mean_power_of_rows_under_a_hann_window():
    """By the sum that defines it."""
    d = torch.rand(2, 3, 4, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.3
    n = torch.arange(12, dtype=torch.float64)
    window = 0.5 - 0.5 * torch.cos(2 * torch.pi * n / 12)
    for k, found in enumerate(harmonizer_losses.spectrum(d)):
        wave = torch.exp(-2j * torch.pi * k * n / 12)
        wanted = (d * window * wave).sum(dim=-1).abs().square().mean()
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5), f"frequency {k}"


def test_the_grid_compares_the_multiples_of_its_frequency_with_two_bins_to_either_side():
    power = torch.full((73,), 1000.0)  # of rows of 144 pixels: every ninth bin up to the seventh
    for k in range(1, 8):
        power[9 * k], power[9 * k - 2], power[9 * k + 2] = 3, 1, 2
    assert harmonizer_losses.grid(power, 144) == pytest.approx(2)
    power[9] = 10  # of one bin of seven
    assert harmonizer_losses.grid(power, 144) == pytest.approx((6 * 2 + 2 * 10 / 3) / 7)


def test_the_residual_is_the_results_difference_to_the_truth_over_all_clips(tmp_path):
    """Two clips whose errors are waves of 3 and of 5 cycles; their common part, the truth, leaves no trace."""
    x = torch.arange(48) * 2 * torch.pi / 48
    for folder in ("clips", "made"):
        (tmp_path / folder).mkdir()
    for name, cycles in (("a", 3), ("b", 5)):
        truth = 0.3 * torch.cos(7 * x).expand(3, 2, 4, 48)
        for folder, key, video in (("clips", "x_gt", truth), ("made", "x_dr", truth + 0.4 * torch.cos(cycles * x))):
            weights.save_tensors(tmp_path / folder / f"{name}.safetensors", {key: to_bytes(video).contiguous()})
    found = harmonizer_losses.residual_spectrum(tmp_path / "clips", tmp_path / "made")
    wanted = sum(harmonizer_losses.spectrum(0.4 * torch.cos(cycles * x)[None]) for cycles in (3, 5)) / 2
    assert found.shape == (25,) and (found - wanted).abs().max() < 0.02 * wanted.max()


def test_the_temporal_score_of_a_still_clip_is_1_and_of_a_flickering_one_less(tmp_path):
    still = torch.zeros(3, 4, 8, 8)
    weights.save_tensors(tmp_path / "a.safetensors", {"x_dr": to_bytes(still)})
    assert harmonizer_temporal.temporal_score(tmp_path, "x_dr") == 1
    flicker = still + 0.2 * torch.tensor([1.0, -1, 1, -1]).view(1, 4, 1, 1)
    weights.save_tensors(tmp_path / "a.safetensors", {"x_dr": to_bytes(flicker)})
    assert harmonizer_temporal.temporal_score(tmp_path, "x_dr") == pytest.approx(0.8, abs=0.01)


def test_what_was_trained_is_kept_until_a_setting_changes(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(tables, "python", lambda *argv: calls.append(argv))
    args = argparse.Namespace(runs=tmp_path, steps=2, data="d", weights="w", perceptual="p", vae="v", pairs=5,
                              start=None, set=[])
    for settings in ({}, {}, {"past": 0}):
        harmonizers.continued(args, 1, tmp_path, tmp_path / "model", tmp_path / "start", **settings)
    assert len(calls) == 2
    args.set = ["lr=1"]
    harmonizers.continued(args, 1, tmp_path, tmp_path / "model", tmp_path / "start", past=0)
    assert len(calls) == 3
