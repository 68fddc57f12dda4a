"""The papers' tables in the small: nothing is made twice or kept too long, and a table says what was scored."""

import json
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import train_r3d2
from experiments import chopgrad_table4, mirage_table2, mirage_table3, mirage_table4, r3d2_table5, tables
from experiments.mirage_table1 import drift
from experiments.skip_vae import SkipVAE
from mirage_min.data import desk
from mirage_min.networks import weights
from mirage_min.networks.vae_2d import AutoencoderKL, AutoencoderKLConfig
from mirage_min.systems.r3d2 import R3D2
from mirage_min.training import run
from tests import small


def test_what_was_made_is_kept_until_a_setting_changes(tmp_path):
    made = []

    def make(to):
        made.append(to.name)
        (to / "model").write_text("x" * len(made))
    for settings in ({"steps": 2}, {"steps": 2}, {"steps": 3}, {"steps": 3}):
        folder = tables.once(tmp_path / "seed_1", settings, make)
    assert len(made) == 2 and (folder / "model").read_text() == "xx"
    about = json.loads((folder / "made.json").read_text())
    assert about["settings"] == {"steps": 3} and about["minutes"] >= 0


def test_what_was_interrupted_goes_on_in_the_same_folder_and_other_settings_empty_it(tmp_path):
    def fail(to):
        (to / "checkpoint").touch()
        raise KeyboardInterrupt
    seen = []
    with pytest.raises(KeyboardInterrupt):
        tables.once(tmp_path / "a", {"steps": 2}, fail)
    tables.once(tmp_path / "a", {"steps": 2}, lambda to: seen.append((to / "checkpoint").exists()))
    tables.once(tmp_path / "a", {"steps": 4}, lambda to: seen.append((to / "checkpoint").exists()))
    assert seen == [True, False]


@pytest.mark.parametrize("ours, wanted", [
    ({"a": 3.0, "b": 2.0, "c": 1.0}, "3 of 3"), ({"a": 1.0, "b": 2.0, "c": 3.0}, "0 of 3"),
    ({"a": 3.0, "b": 1.0, "c": 2.0}, "2 of 3"), ({"a": None, "b": 2.0, "c": 1.0}, "1 of 1"), ({"a": 1.0}, "–")])
def test_the_papers_order_is_counted_by_pairs_of_methods(ours, wanted):
    paper = {"a": 30.0, "b": 20.0, "c": 10.0}
    assert tables.agreement(paper, ours, max) == wanted
    assert tables.agreement({k: -v for k, v in paper.items()}, {k: v and -v for k, v in ours.items()}, min) == wanted


def test_a_report_holds_means_deviations_the_papers_numbers_and_the_command(tmp_path, capsys):
    def seed(a, b):
        absent = dict.fromkeys(tables.BETTER)
        scores = {"x": absent | {"PSNR": a}, "y": absent | {"PSNR": b}, "naive": absent | {"PSNR": "inf"}}
        means = {region: scores for region in (tables.CROPS, tables.FULL)}
        return {"mean": means, "remarks": {"LPIPS": "absent: no weights"}}
    args = Namespace(steps=5, seeds=2, clips=3, out=tmp_path)
    tables.report("mirage_table9", "A table.\n\nMore.", args, {"full frame": {"x": {"PSNR": 20}, "y": {"PSNR": 25}}},
                  [seed(10.0, 12.0), seed(14.0, 13.0)])
    text = (tmp_path / "reproduce" / "mirage_table9.md").read_text()
    assert "`python -m experiments.mirage_table9 --steps 5 --seeds 2 --clips 3 --perceptual DIR`" in text
    assert "| x | 12.000 ± 2.828 (20) |" in text and "| y | 12.500 ± 0.707 (25) |" in text
    assert "| naive | inf |" in text, "evaluate.py's JSON has a string where two videos are equal"
    assert text.startswith("# A table.\n") and "| full frame: ours (paper) | PSNR |" in text
    assert "| actor-centric crops | PSNR |" in text, "the paper has no crops here"
    assert "PSNR: pairs of methods in the paper's order, seed by seed: 1 of 1, 0 of 1" in text
    assert "LPIPS: absent: no weights" in text and "| LPIPS |" not in text
    kept = json.loads((tmp_path / "reproduce" / "mirage_table9.json").read_text())["seeds"]
    assert kept[1]["mean"]["full frame"]["x"]["PSNR"] == 14
    args = Namespace(steps=5, seeds=1, clips=3, pairs=8, start=Path("mine"), set=["lr=1", "past=2"], out=tmp_path)
    tables.report("harmonizer_table9", "A table.", args, {}, [seed(10.0, 12.0)])
    text = (tmp_path / "reproduce" / "harmonizer_table9.md").read_text()
    assert "_table9 --steps 5 --seeds 1 --clips 3 --pairs 8 --start DIR --set lr=1 --set past=2 --perceptual" in text


def test_a_cell_has_a_spread_only_where_the_seeds_differ_and_the_papers_number_only_where_there_is_one():
    assert tables.cell([1.0, 3.0], 2.5) == "2.000 ± 1.414 (2.5)" and tables.cell([1.0, 1.0], None) == "1.000"
    assert tables.cell([None, None], 2.5) == "–" and tables.cell(["inf", "inf"], None) == "inf"


def test_a_table_of_one_seed_has_no_spread():
    text = tables.region_table("crops", {"ours": {"PSNR": 2.5}}, [{"ours": {"PSNR": 1.0, "LPIPS": None}}])
    assert "crops: ours (paper) | PSNR |" in text and "| ours | 1.000 (2.5) |" in text and "LPIPS" not in text


def test_training_is_adamw_at_the_scripts_rate_on_the_clips_of_the_folder(tmp_path):
    """From 0 without decay to feel, AdamW's first step is the rate, its second nearly so for an even gradient."""
    x = torch.randint(0, 256, (2, 3, 9, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    weights.save_tensors(tmp_path / "a.safetensors", {"x_ni": x[0], "x_gt": x[1]})
    p, seen = torch.nn.Parameter(torch.zeros(())), []

    def loss(x_ni, x_gt):
        seen.append((x_ni.shape, float(p.detach())))
        return p * x_ni.abs().mean()
    tables.train([p], loss, Namespace(data=tmp_path, steps=3), 1, lr=0.25)
    rates = [0.25 * run.schedule(step, 50, 3, cosine=True) for step in range(3)]
    assert [shape for shape, _ in seen] == [(2, 3, 9, 96, 96)] * 3
    values = [value for _, value in seen] + [float(p.detach())]
    steps = [a - b for a, b in zip(values, values[1:])]
    assert steps == pytest.approx(rates, rel=0.05), f"steps {steps}, rates {rates}"


def test_a_prediction_is_what_the_model_makes_of_both_videos_of_each_clip(tmp_path):
    clips, to = tmp_path / "clips", tmp_path / "to"
    clips.mkdir(), to.mkdir()
    torch.manual_seed(0)
    x = {name: torch.randint(0, 256, (2, 3, 2, 4, 6), dtype=torch.uint8) for name in "ab"}
    for name, (ni, gt) in x.items():
        weights.save_tensors(clips / f"{name}.safetensors", {"x_ni": ni, "x_gt": gt})
    tables.predict(clips, to, lambda x_ni, x_gt: 0.25 * x_ni + 0.75 * x_gt)
    for name, (ni, gt) in x.items():
        found = weights.load_tensors(to / f"{name}.safetensors")[0]["x_dr"]
        difference = (found - (0.25 * ni.float() + 0.75 * gt.float())).abs().max()
        assert found.dtype == torch.uint8 and difference <= 0.51, f"{name}: largest difference {difference} of 255"


def test_mirages_2d_features_say_nothing_of_other_frames_and_the_3d_encoders_do():
    """Figure 6: noise in frame j of the input, and what moves of frame 7's features."""
    torch.manual_seed(0)
    reaction = mirage_table4.reactions(small.mirage(), torch.rand(1, 3, 9, 16, 24) * 2 - 1)
    assert reaction["2D encoder"] == [0] * 7 + [1, 0], reaction["2D encoder"]
    for name in ("Enc-1", "Enc-2 (t = 4 of 5)", "Dec-4"):
        values = reaction[name]
        assert len(values) == 9 and values[7] == 1 and min(values[:7]) > 0.01, f"{name}: {values}"


def test_3d_skips_start_at_nothing_and_repeat_frames_as_the_decoder_does():
    vae = small.mirage().vae
    skips, torch_ones = mirage_table4.Skips(vae), torch.ones(1, 8, 5, 8, 12)
    fine, coarse = skips([torch.rand(1, 8, 9, 16, 24), torch_ones])
    assert fine.abs().max() == 0 and coarse.abs().max() == 0
    for conv in skips.convs:
        torch.nn.init.constant_(conv.weight, 0.5)
    marked = torch_ones * torch.arange(5.0).view(1, 1, 5, 1, 1)
    fine, coarse = skips([torch.rand(1, 8, 9, 16, 24), marked])
    assert coarse[0, 0, :, 0, 0].tolist() == [4 * i for i in (0, 1, 1, 2, 2, 3, 3, 4, 4)], "8 channels times a half"
    assert fine.shape[1:] == (vae.inject_channels[0], 9, 16, 24)
    assert coarse.shape[1:] == (vae.inject_channels[1], 9, 8, 12)


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
    model, x = SkipVAE(vae).double(), torch.rand(1, 3, 2, 16, 24, dtype=torch.float64) * 2 - 1

    @torch.no_grad()
    def through(x):
        return tables.framewise(lambda frames: model.decode(vae.encode(frames), vae.mids(frames)), x)
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


TABLES = {"mirage_table3": (mirage_table3, ["none", "full"]), "r3d2_table5": (r3d2_table5, ["full"])}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("steps, training, held_out, r3d2_steps", [(100, 32, 16, 120), (2, 2, 1, 2), (9, 2, 1, 10)])
def test_r3d2s_are_trained_on_pairs_of_one_set_of_scenes_and_scored_on_others(tmp_path, monkeypatch, name, steps,
                                                                              training, held_out, r3d2_steps):
    """With three fifths of the other tables' steps; a small run has few scenes."""
    ran, trained, scored = [], [], {}
    monkeypatch.setattr(tables, "python", lambda *argv, accepted=(0,): ran.append([*map(str, argv)]))
    monkeypatch.setattr(tables, "train_r3d2", lambda args, to, **given: trained.append(given))
    monkeypatch.setattr(tables, "harmonise", lambda clips, folder, models, *rest: models)
    monkeypatch.setattr(tables, "evaluate", lambda args, clips, results, to, exact: scored.update(results, on=clips))
    monkeypatch.setattr(tables, "report", lambda *given: None)
    monkeypatch.setattr(tables, "draw_strip", lambda *given, frames: None)
    monkeypatch.setattr(r3d2_table5, "save_repairs", lambda folders, to: None)
    monkeypatch.setattr(r3d2_table5, "save_reconstructions", lambda folders, clips, to: None)
    experiment, alignments = TABLES[name]
    flags = ["--steps", steps, "--seeds", 2, "--perceptual", "p", "--runs", tmp_path, "--out", tmp_path]
    experiment.main(experiment.flags().parse_args([str(word) for word in flags]))
    seeds = [int(words[-1]) for words in ran if "--scene" in words]
    assert seeds == [*range(training), *range(1_000_000, 1_000_000 + held_out)]
    built = [words for words in ran if "build_pairs.py" in words]
    shown = [[int(word.rpartition("_")[2]) for word in words if "/scene_" in word] for words in built]
    assert shown == [seeds[training:]] + [seeds[:training]] * len(alignments)
    assert [words[words.index("--align") + 1] for words in built] == ["full", *alignments]
    assert str(scored["on"]) in built[0] and len({given["data"] for given in trained}) == len(trained) / 2
    assert [(given["steps"], given["seed"]) for given in trained] == [
        (r3d2_steps, seed) for seed in (1, 2) for _ in range(len(trained) // 2)]


def test_table_2_fits_reconstructions_by_equation_3(monkeypatch):
    kept = {}
    monkeypatch.setattr(tables, "perceptual_loss", lambda args: lambda x, y: (x - y).abs().mean())
    monkeypatch.setattr(tables, "train", lambda params, loss, args, seed, lr: kept.update(loss=loss, lr=lr, seed=seed))
    mirage_table2.fit(lambda x_ni, x_gt: x_ni + 2 * x_gt, [], Namespace(), 7)
    x_ni, x_gt = torch.full((1, 3, 2, 4, 4), 0.25), torch.full((1, 3, 2, 4, 4), 0.5)
    # the reconstruction is 1.25: .75 off
    assert kept["loss"](x_ni, x_gt).item() == pytest.approx(0.75**2 + 0.1 * 0.75) and kept["seed"] == 7


def test_chopgrads_table_4_gives_long_clips_as_many_steps_as_short_ones(tmp_path, monkeypatch):
    """Half of a stage's each, from one Mirage, with other draws than it had."""
    ran, stages = [], []
    monkeypatch.setattr(tables, "python", lambda *argv: ran.append([*map(str, argv)]))
    monkeypatch.setattr(tables, "harmonised", lambda args, seed: tmp_path / f"mirage {seed}")
    monkeypatch.setattr(tables, "stage_h", lambda args, start, to, **given: stages.append((start, given)))
    for steps, half, clips in ((100, 50, 64), (30, 15, 30), (1, 1, 1)):
        ran.clear(), stages.clear()
        args = Namespace(steps=steps, runs=tmp_path / str(steps), data="toy", weights="w")
        chopgrad_table4.models(args, 3, tmp_path / str(steps) / "models")
        (words,) = ran
        assert words[words.index("--clips") + 1] == str(clips) and words[-1] == "128x192"
        (start, more), (same, chopped) = stages
        assert start == same == tmp_path / "mirage 3" and more == {"steps": half, "seed": 103, "data": None}
        assert chopped.pop("data") == tmp_path / str(steps) / "long_clips" and chopped["tiles"] == 2
        assert (chopped["steps"], chopped["seed"], chopped["frames"]) == (half, 103, 33)
        assert (chopped["height"], chopped["width"], chopped["batch"]) == (128, 192, 1)


def test_a_reconstruction_is_the_scene_rendered_and_the_video_it_was_filmed_in(tmp_path, monkeypatch):
    frames = torch.rand(5, 3, 4, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scene = Namespace(video="x.mp4", cameras=[*range(5)], at=lambda t: 10 * t)
    monkeypatch.setattr(r3d2_table5, "read_scene", lambda folder: scene)
    monkeypatch.setattr(r3d2_table5, "render", lambda at, camera: (torch.full((3, 4, 6), (at + camera) / 100), None))
    monkeypatch.setattr(r3d2_table5, "Video", lambda path: nullcontext(iter(frames)))
    shown, filmed = r3d2_table5.reconstruction(tmp_path, 3)
    assert torch.equal(filmed, frames[:3].movedim(0, 1)) and shown.shape == (3, 3, 4, 6)
    assert shown[0, :, 0, 0].tolist() == pytest.approx([-1, 2 * 0.11 - 1, 2 * 0.22 - 1])


# ---- R3D2 in the tables ----------------------------------------------------------------------------------------------

def test_r3d2_is_trained_by_its_scripts_as_long_as_mirages_two_stages_and_its_base_once(tmp_path, monkeypatch):
    """What the scripts are called with; the settings are checked against the recipe that they change."""
    calls = []
    monkeypatch.setattr(tables, "python", lambda *argv: calls.append([str(word) for word in argv]))
    (tmp_path / "weights" / "vae_2d").mkdir(parents=True)
    args = Namespace(steps=5, data=tmp_path / "toy", weights=tmp_path / "weights", perceptual=tmp_path,
                     runs=tmp_path / "runs")
    for seed in (1, 2):
        tables.train_r3d2(args, tmp_path / f"model_{seed}", seed)
    base, first, second = calls
    assert base[:2] == ["train_base.py", "one_step_2d"] and "steps=100" in base
    out = base[base.index("--out") + 1]
    assert first[first.index("--base") + 1] == second[second.index("--base") + 1] == f"{out}/base_2d"
    assert (tmp_path / "runs" / "r3d2_base" / "vae_2d").is_dir(), "the VAE lies where train_base.py looks for it"
    settings = [first[i + 1] for i, word in enumerate(first) if word == "--set"]
    recipe = desk.override(train_r3d2.RECIPES["small"], settings)
    assert (recipe.steps, recipe.batch * recipe.frames, recipe.seed, recipe.gram_from) == (10, 18, 1, 0)
    assert (recipe.lambda_lpips, recipe.lambda_gram, recipe.lambda_mse) == (1.0, 0.5, 2.0)


def test_the_base_of_r3d2_is_trained_on_where_a_run_was_killed(tmp_path, monkeypatch):
    (tmp_path / "weights" / "vae_2d").mkdir(parents=True)
    (tmp_path / "weights" / "vae_2d" / "config.json").write_text("{}")
    args = Namespace(steps=5, data=tmp_path / "toy", weights=tmp_path / "weights", runs=tmp_path / "runs")
    checkpoint = args.runs / "r3d2_base" / "runs" / "checkpoint"
    seen = []

    def python(*argv):
        seen.append(checkpoint.exists())
        checkpoint.parent.mkdir(exist_ok=True)
        checkpoint.touch()
        if len(seen) == 1:
            raise SystemExit(143)
    monkeypatch.setattr(tables, "python", python)
    with pytest.raises(SystemExit):
        tables.r3d2_base(args)
    for _ in range(2):
        assert tables.r3d2_base(args) == args.runs / "r3d2_base" / "base_2d"
    assert seen == [False, True], "the second goes on from the checkpoint of the first, and then it is made"


def test_a_trained_r3d2_predicts_each_clip_in_float32(tmp_path):
    small.r3d2().half().save_pretrained(tmp_path / "model")
    clips = tmp_path / "clips"
    clips.mkdir()
    x = torch.randint(0, 256, (2, 3, 2, 16, 24), dtype=torch.uint8)
    weights.save_tensors(clips / "1.safetensors", {"x_ni": x[0], "x_gt": x[1]})
    made = tables.harmonise(clips, tmp_path / "made", {"R3D2": tmp_path / "model"}, {}, tables.read_r3d2)
    system = R3D2.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        wanted = system(x[:1].float() / 127.5 - 1)[0].clamp(-1, 1)
    found = weights.load_tensors(made["R3D2"] / "1.safetensors")[0]["x_dr"]
    difference = (found.float() - (wanted + 1) * 127.5).abs().max().item()
    assert difference <= 0.51, f"largest difference {difference} of 255"


def test_a_reconstruction_is_saved_under_its_scenes_clip_and_one_without_a_clip_is_not(tmp_path, monkeypatch):
    shown, filmed = torch.full((3, 2, 4, 4), 0.5), torch.full((3, 2, 4, 4), -0.5)
    monkeypatch.setattr(r3d2_table5, "reconstruction", lambda folder, frames: (shown, filmed))
    for name in ("clips", "shown", "repairs"):
        (tmp_path / name).mkdir()
    (tmp_path / "clips" / "scene_7_000000.safetensors").touch()
    folders = [tmp_path / "scene_7", tmp_path / "scene_8"]
    r3d2_table5.save_reconstructions(folders, tmp_path / "clips", tmp_path / "shown")
    r3d2_table5.save_repairs(folders, tmp_path / "repairs")
    assert [path.name for path in (tmp_path / "shown").iterdir()] == ["scene_7_000000.safetensors"]
    pair = weights.load_tensors(tmp_path / "repairs" / "scene_8.safetensors")[0]
    assert (pair["x_ni"] == 191).all() and (pair["x_gt"] == 64).all()
