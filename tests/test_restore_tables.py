"""ChopGrad's tables in the small: methods differ in what they are named for, and the flow model is what it says."""

import argparse
from functools import partial

import pytest
import torch

import train_restore
from experiments import restore_table1, restore_table2, restore_table3, restorers, tables
from mirage_min.data import desk
from mirage_min.data.degradations import central_mask
from mirage_min.method import flow
from mirage_min.method.schedules import WAN
from mirage_min.networks import small_base, weights
from mirage_min.networks.vae_wan import WanVAE, WanVAEConfig
from mirage_min.systems.restore import Restorer
from mirage_min.systems.restore_folder import Settings
from mirage_min.training import run

EXPERIMENTS = {1: restore_table1, 2: restore_table2, 3: restore_table3}


def vae():
    torch.manual_seed(0)
    return WanVAE(WanVAEConfig(base_dim=4, num_res_blocks=1)).requires_grad_(False).eval()


# ---- what the tables compare -----------------------------------------------------------------------------------------

@pytest.fixture
def commands(tmp_path, monkeypatch):
    """A table -> {method: (its settings, its other flags)}, with commands recorded in place of what they would do."""
    ran, scored = {}, {}

    def record(*argv):
        argv = [str(word) for word in argv]
        settings = dict(word.split("=") for flag, word in zip(argv, argv[1:]) if flag == "--set")
        given = {flag: value for flag, value in zip(argv, argv[1:]) if flag.startswith("--") and flag != "--set"}
        ran[given["--out"]] = settings, given

    def evaluate(args, clips, results, to):
        scored.update(results)
        return {"mean": {tables.FULL: {"naive insertion": {}} | {name: {} for name in results}}, "remarks": {}}
    monkeypatch.setattr(tables, "python", record)
    monkeypatch.setattr(tables, "harmonise", lambda clips, folder, models, settings, read: models)
    monkeypatch.setattr(tables, "evaluate", evaluate)
    monkeypatch.setattr(tables, "draw_strip", lambda *given: None)
    monkeypatch.setattr(tables, "report", lambda name, doc, args, paper, seeds, more=None: scored.update(
        rows=list(seeds[0]["mean"][tables.FULL]), paper=list(paper[tables.FULL])))
    monkeypatch.setattr(restore_table3, "train_flow", lambda *given: None)
    monkeypatch.setattr(restore_table3, "open_flow", lambda *given: argparse.Namespace(predict=max))
    monkeypatch.setattr(restorers, "read", lambda folder: None)
    monkeypatch.setattr(restore_table3, "operations", lambda *given: 1)

    def run(number, *more):
        parser = EXPERIMENTS[number].flags()
        args = ["--steps", "3", "--seeds", "1", "--clips", "1", "--perceptual", "p", "--runs", str(tmp_path / "runs")]
        EXPERIMENTS[number].main(parser.parse_args([*args, *more, "--out", str(tmp_path / "out")]))
        rows, paper = scored.pop("rows"), scored.pop("paper")
        assert rows == ["input", *scored] and set(paper) == set(scored), "the rows, and those that the paper has"
        return {name: ran[str(where)] for name, where in scored.items() if str(where) in ran}
    return run


@pytest.mark.parametrize("number, recipe", [(1, "small-upscale"), (2, "small-inpaint"), (3, "small-inpaint")])
def test_all_methods_of_a_table_continue_one_beginning_with_settings_that_the_script_knows(commands, number, recipe):
    ran = commands(number)
    for settings, given in ran.values():
        assert given["--recipe"] == recipe and given["--vae"] == "weights/vae_wan_48"
        known = desk.override(train_restore.RECIPES[recipe], [f"{key}={value}" for key, value in settings.items()])
        assert (known.lr, known.latent_until, known.half) == (3e-4, 0, False)
        assert known.task == {1: "upscale", 2: "artifacts", 3: "inpaint"}[number]
    assert len({given["--base"] for _, given in ran.values()}) == 1


@pytest.mark.parametrize("number", [1, 2])
def test_all_methods_continue_a_restorer_that_is_there(commands, number):
    assert {given["--base"] for _, given in commands(number, "--start", "known").values()} == {"known"}


def test_table_2_compares_the_latent_loss_with_three_lengths_of_the_gradient(commands):
    ran = {name: settings for name, (settings, _) in commands(2).items()}
    common = {"steps": "3", "seed": "1", "latent_until": "0", "real": "0", "half": "no", "lr": "0.0003",
              "task": "artifacts", "degrade": "given"}
    assert ran["latents"] == common | {"pixel": "no"}
    assert ran["latents, twice"] == common | {"pixel": "no", "steps": "6"}
    for d in range(3):
        assert ran[f"d_trunc {d}"] == common | {"lambda_latent": "1.0", "lambda_lpips": "100.0", "lambda_mse": "0.0",
                                                "d_trunc": str(d)}


def test_table_1_compares_doves_way_with_chopgrad_under_equal_losses_but_for_the_frames_difference(commands):
    doves, ours = (settings for settings, _ in commands(1).values())
    assert doves.pop("each_frame") == "yes" and doves.pop("lambda_frame") == "0.5" and ours.pop("d_trunc") == "1"
    assert doves == ours and ours["lambda_mse"] == "0.25"


def test_what_was_trained_is_kept_until_a_setting_changes(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(tables, "python", lambda *argv: calls.append(argv))
    args = argparse.Namespace(runs=tmp_path, steps=2, data="d", weights="w", perceptual="p", vae="v", start=None)
    for settings in ({}, {}, {"d_trunc": 2}):
        restorers.continued(args, 1, tmp_path / "model", tmp_path / "start", "--data", "d", **settings)
    for _ in range(2):
        restorers.beginning(args, 1, "upscale", "--data", "d")
    assert len(calls) == 3 and "latent_until=2" in calls[2] and "latent_clips=16" in calls[2]


# ---- what is scored --------------------------------------------------------------------------------------------------

def test_held_out_clips_are_degraded_and_keep_everything_else(tmp_path, monkeypatch):
    (tmp_path / "clips").mkdir()
    x = torch.randint(0, 256, (2, 3, 2, 96, 144), dtype=torch.uint8)
    weights.save_tensors(tmp_path / "clips" / "a.safetensors", {"x_ni": x[0], "x_gt": x[1], "boxes": torch.ones(2, 4)})
    monkeypatch.setattr(tables, "held_out", lambda args: tmp_path / "clips")
    args = argparse.Namespace(runs=tmp_path, clips=1)
    for name, degrade in (("hole", restorers.with_hole), ("low", restorers.enlarged)):
        found = weights.load_tensors(restorers.held_out(args, name, degrade) / "a.safetensors")[0]
        assert torch.equal(found["x_gt"], x[1]) and torch.equal(found["boxes"], torch.ones(2, 4))
        assert found["x_ni"].shape == x[0].shape
        if name == "hole":
            mask = central_mask(96, 144)
            assert torch.equal(torch.where(mask, x[1], found["x_ni"]), x[1])
            assert ((found["x_ni"].float() - 127.5).abs()[mask.expand_as(x[0])] < 1).all()
        else:
            assert found["x_ni"].float().std() < x[1].float().std() / 2, "noise is gone in a fourth of the size"


def test_a_trained_restorer_takes_frames_as_large_as_the_truth(tmp_path):
    dit = small_base.new_transformer("wan", 1)
    torch.nn.init.normal_(dit.proj_out.weight, std=0.1)
    x = torch.rand(1, 3, 1, 32, 48) * 2 - 1
    for settings in (Settings("upscale", scale=4), Settings("inpaint")):
        restorer = Restorer(vae(), dit, torch.zeros(1, 1, 16), WAN, settings).requires_grad_(False)
        restorer.save_pretrained(tmp_path / settings.task)
        y = restorers.read(tmp_path / settings.task)(x)
        mask = central_mask(32, 48)[None, :, None]
        wanted = restorer(x, mask) if restorer.masked else restorer.restore(x)
        assert torch.allclose(y, wanted, atol=1e-5), f"{settings.task}: {(y - wanted).abs().max():.1e}"


# ---- the flow model --------------------------------------------------------------------------------------------------

def test_the_flow_is_learned_at_one_noise_level_a_clip_in_view_of_the_hole():
    model = restore_table3.FlowInpainter(vae())
    assert not any("seen" in key or "vae" in key for key in model.state_dict())
    z_in, z_gt = torch.randn(2, 3, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    seen = []

    def predict(z, t, known):
        seen.append((z, t, known))
        return torch.zeros_like(z)
    model.predict = predict
    found = model.loss(z_in, z_gt, torch.Generator().manual_seed(5)).item()
    draws = torch.Generator().manual_seed(5)
    sigma = flow.shifted(torch.rand(3, generator=draws), 5.0)
    eps = torch.randn(z_gt.shape, generator=draws)
    (z, t, known), = seen
    assert torch.allclose(t, 1000 * sigma) and known is z_in
    for b in range(3):
        assert torch.allclose(z[b], (1 - sigma[b]) * z_gt[b] + sigma[b] * eps[b], atol=1e-6)
    assert found == pytest.approx((eps - z_gt).square().mean().item(), rel=1e-6)


def test_what_the_flow_model_sees_of_the_hole_moves_its_prediction_patch_by_patch():
    model = restore_table3.FlowInpainter(vae())
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    z, z_in = torch.randn(2, 1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([500.0])
    with torch.no_grad():
        before = model.predict(z, t, z_in)
        other = z_in.clone()
        other[:, :, 1, 2:4, 4:6] += 1  # one patch
        moved = (model.predict(z, t, other) - before).abs().amax(dim=1)[0]
    patch = moved[1, 2:4, 4:6].mean()
    moved[1, 2:4, 4:6] = 0
    assert before.shape == z.shape and patch > 3 * moved.mean(), f"{patch:.2e} there, {moved.mean():.2e} elsewhere"


def test_the_flow_model_leaves_known_pixels_alone_and_its_steps_are_counted(monkeypatch):
    model = restore_table3.FlowInpainter(vae()).eval()
    x = torch.rand(1, 3, 1, 32, 48) * 2 - 1
    counts = {}
    for steps in (1, 3):
        monkeypatch.setattr(restore_table3, "STEPS", steps)
        counts[steps] = restore_table3.operations(model, x)
    y, mask = model(x), central_mask(32, 48)
    assert torch.equal(torch.where(mask, x, y), x) and not torch.equal(y, x)
    z = torch.zeros(1, 16, 1, 4, 6)
    one = restore_table3.operations(partial(model.predict, z, torch.zeros(1)), z)
    assert counts[3] - counts[1] == 2 * one > 0


def test_the_flow_models_training_moves_it_and_is_read_again(tmp_path):
    x = torch.randint(0, 256, (2, 3, 9, 96, 144), dtype=torch.uint8)
    (tmp_path / "data").mkdir()
    weights.save_tensors(tmp_path / "data" / "a.safetensors", {"x_ni": x[0], "x_gt": x[1]})
    vae().save_pretrained(tmp_path / "vae")
    args = argparse.Namespace(steps=1, data=tmp_path / "data", vae=tmp_path / "vae")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restore_table3, "BATCH", 1)
        patch.setattr(restorers, "latent_clips", lambda args: 1)
        restore_table3.train_flow(args, 1, tmp_path)
    torch.manual_seed(1)
    before, after = restore_table3.open_flow(args), restore_table3.open_flow(args, tmp_path)
    moved = [key for key, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[key])]
    assert "dit.proj_out.weight" in moved and "enter.weight" in moved


def test_the_flow_model_is_trained_twice_as_long_by_the_scripts_schedule_and_its_gradients_are_clipped(tmp_path,
                                                                                                      monkeypatch):
    """The gradient of the stand-in has a norm of 5; a step of the stand-in for AdamW writes down what it is given."""
    seen = []

    class Stand(torch.nn.Linear):
        vae = None

        def loss(self, z_in, z_gt, draws):
            return 3 * self.weight.sum() + 4 * self.bias.sum()

    class Optimizer(torch.optim.SGD):
        def step(self):
            (group,) = self.param_groups
            seen.append((group["lr"], torch.stack([p.grad.norm() for p in group["params"]]).norm().item()))
    latents = argparse.Namespace(batch=lambda count, draws: (count, None))
    monkeypatch.setattr(restore_table3, "open_flow", lambda args: Stand(1, 1))
    monkeypatch.setattr(restore_table3, "Pairs", lambda *given: None)
    monkeypatch.setattr(restore_table3, "DrawnLatents", lambda *given: latents)
    monkeypatch.setattr(torch.optim, "AdamW", Optimizer)
    restore_table3.train_flow(argparse.Namespace(steps=30, data=None), 1, tmp_path)
    rates, norms = zip(*seen)
    assert rates == pytest.approx([1e-3 * run.schedule(step, 50, 60, cosine=True) for step in range(60)])
    assert norms == pytest.approx([1] * 60, rel=1e-4)
    assert weights.load_tensors(tmp_path / restore_table3.WEIGHTS)[0].keys() == {"weight", "bias"}
