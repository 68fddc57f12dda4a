"""What training is said to cost: every part of a step is in it, and its operations are those of a step on data."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from experiments import training_cost
from mirage_min.method.schedules import WAN
from mirage_min.systems.restore import Restorer
from mirage_min.systems.restore_folder import Settings
from tests import small


@pytest.fixture
def small_vgg(monkeypatch):
    """One layer in place of VGG-16."""
    monkeypatch.setattr(training_cost, "vgg16", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    monkeypatch.setattr(training_cost, "TAPS", {"vgg": {"relu1_1": 1}})


def small_restorer(stage):
    """A recipe of training_cost's for a small Wan as a restorer, in bfloat16."""
    def make(device):
        world = small.world()
        parts = world.vae, world.dit, torch.ones(1, 2, 8), WAN, Settings("artifacts")
        return Restorer(*parts).requires_grad_(False).to(device, torch.bfloat16)
    return training_cost.Recipe("small", make, stage, (9, 32, 32), 10, tiles=2)


def test_a_restorers_memory_is_divided_among_processes_but_for_what_is_not_its_transformers(small_vgg):
    recipe = small_restorer("R")
    one, eight = (training_cost.restorer_memory(recipe, n) for n in (1, 8))
    weights = 4 * sum(p.numel() for p in recipe.make("cpu").dit.parameters())
    assert one["moments"] == 2 * weights and eight["moments"] == pytest.approx(2 * weights / 8, rel=0.01)
    assert one["parameters"] - eight["parameters"] == pytest.approx(weights * 7 / 8, rel=0.01)
    assert one["backward"] == eight["backward"] > 0 and one["passing"] >= eight["passing"] > 0


def test_the_operations_of_a_training_step_are_those_of_the_same_step_on_data(small_vgg):
    """On the meta device and on a CPU, whose attention is another; and stage H takes more than stage A."""
    counts = {}
    for stage in "AH":
        recipe = training_cost.Recipe("small", lambda device: small.mirage().to(device), stage, (9, 16, 24), 10)
        counts[stage], on_cpu = (training_cost.operations(recipe, device) for device in ("meta", "cpu"))
        assert counts[stage] == pytest.approx(on_cpu, rel=1e-3), f"stage {stage}: {counts[stage]} and {on_cpu}"
    assert counts["H"] > counts["A"] > 0
    restorer = small_restorer("R")
    on_meta, on_cpu = (training_cost.operations(restorer, device) for device in ("meta", "cpu"))
    assert on_meta == pytest.approx(on_cpu, rel=1e-3) and on_meta > 0


def test_the_losses_take_each_video_through_vgg_and_grams_one_product_of_each_tap(small_vgg):
    """By hand, of 2 frames of 10 x 12: a convolution to 8 x 10 pixels for either video, and its products."""
    x, y = torch.rand(2, 2, 3, 10, 12, generator=torch.Generator().manual_seed(0))
    for gram in (False, True):
        judge = training_cost.Judge(gram)
        with FlopCounterMode(display=False) as count:
            loss = judge(x, y).item()
        pixels = 2 * 8 * 10  # of two frames
        assert count.get_total_flops() == 2 * (2 * 9 * 3 * 4 * pixels + gram * 2 * 4 * 4 * pixels)
        a, b = (judge.layers(v).flatten(2) for v in (x, y))
        wanted = (a - b).square().mean() + gram * (a @ a.mT - b @ b.mT).square().mean()
        assert loss == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("stage", "AH")
def test_a_step_has_the_parts_of_its_stage(monkeypatch, stage):
    """Stage A codes the truth, stage H denoises the insertion; both see its features, and compare with the truth."""
    x_ni, x_gt = torch.zeros(1, 3, 2, 4, 4), torch.ones(1, 3, 2, 4, 4)
    given = {}

    def backward(vae, z, loss_fn, **settings):
        piece = (slice(None), slice(None), slice(1, 2))
        given.update(settings, z=z, loss=loss_fn(x_gt[piece] * 3, piece))
        return 0.0, torch.full_like(z, 5.0)
    monkeypatch.setattr(training_cost.chopgrad, "backward", backward)
    mirage = SimpleNamespace(vae=SimpleNamespace(encode=lambda x: x + 10), mids=lambda x: ["features", x],
                             denoise=lambda z: z * weight)
    weight = torch.ones((), requires_grad=True)
    recipe = training_cost.Recipe("", None, stage, (2, 4, 4), 1, tiles=4)
    training_cost.step(mirage, lambda x, y: (x - y).abs().mean() + 0 * x.shape[0], recipe, x_ni, x_gt)
    assert (given["z"] == (11 if stage == "A" else 10)).all() and given["inject"] == ["features", x_ni]
    assert (given["d_trunc"], given["tiles"]) == (1, (4, 4))
    assert given["loss"] == 4 + 2, "the mean square and the judge's"
    if stage == "H":
        assert weight.grad == 5 * 10 * x_ni.numel(), "the gradient of z goes on through the transformer"
    else:
        assert weight.grad is None


def test_hours_are_at_two_fifths_of_the_peak_and_the_tables_have_every_recipe(tmp_path, monkeypatch, capsys):
    assert training_cost.gpu_hours(263e12, 80_000) == pytest.approx(14.8, abs=0.05)
    monkeypatch.setattr(training_cost, "operations", lambda recipe: 989e12 * 3600 * 0.4 / recipe.clips * 2.5)
    sizes = {"parameters": 2**30, "moments": 2**31, "backward": 2**29, "passing": 2**28}
    monkeypatch.setattr(training_cost, "restorer_memory", lambda recipe, processes: sizes)
    training_cost.main(training_cost.flags().parse_args(["--out", str(tmp_path)]))
    text = (tmp_path / "training_cost.md").read_text()
    every = training_cost.RECIPES + training_cost.RESTORERS
    for recipe in every:
        assert f"| {recipe.name}, {'x'.join(map(str, recipe.size))} |" in text
    assert text.count(" | 2.5 |") == len(every) == 7 and "an assumed 40% of an\nH200's 989 bf16 TFLOP/s" in text
    assert text.count(" | 1.0 | 2.0 | 0.5 | 0.2 | 3.8 |") == 2, "GiB of the restorers"
    assert "of a restorer's step on one clip in each of 8 processes" in text
