"""train_restore.py: a step is the losses written out, trains the transformer alone, and resumes bit-equal."""

import argparse
import dataclasses
from collections import defaultdict

import pytest
import torch
from torch import nn
from torch.nn import functional as nnf

import train_restore
from mirage_min.data.degradations import central_mask
from mirage_min.method import perceptual
from mirage_min.networks import imagenet, small_base, weights
from mirage_min.systems import restore_folder
from mirage_min.systems.restore import Restorer
from mirage_min.systems.restore_folder import Settings
from mirage_min.training import memory, watch
from tests import small


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A base, its VAE alone, pairs, and random backbones for the losses."""
    folder = tmp_path_factory.mktemp("work")
    small.save_wan(folder)
    small.save_backbones(folder)
    (folder / "pairs").mkdir()
    for i in range(3):
        x = torch.randint(0, 256, (2, 3, 6, 36, 48), dtype=torch.uint8)
        weights.save_tensors(folder / "pairs" / f"{i}.safetensors", {"x_ni": x[0], "x_gt": x[1]})
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without memory.plan and pictures, which take longer than these small steps."""
    monkeypatch.setattr(memory, "plan", lambda *given: "")
    monkeypatch.setattr(watch.Log, "report", lambda *given: None)


def train(work, out, recipe="small-inpaint", base="base", vae=None, val=None, prompt=None, **settings):
    args = argparse.Namespace(data=work / "pairs", base=base and str(work / base), vae=vae, val=val, prompt=prompt,
                              perceptual=work, real=None, out=out, run=out / "run", device="cpu", stage="restore",
                              recipe=recipe)
    small_numbers = dict(steps=2, batch=2, frames=5, height=32, width=40, lr=1e-2, warmup=1, every=1, latent_until=1,
                         latent_clips=2, latent_batch=2, real=0.0, bf16=False, lpips="squeeze")
    train_restore.main(args, dataclasses.replace(train_restore.RECIPES[recipe], **small_numbers | settings))
    return out


# ---- the losses ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("weighted", [{"latent": 0.7, "lpips": 2.0}, {"mse": 1.0, "dists": 0.1, "latent": 0.0}])
def test_a_step_is_the_losses_written_out(work, weighted):
    torch.manual_seed(0)
    world = small.world()
    restorer = Restorer(world.vae, world.dit, torch.ones(1, 2, 8), train_restore.WAN, Settings("artifacts")).double()
    judges = perceptual.Lpips(imagenet.Features("squeeze", work)), perceptual.Dists(imagenet.Features("vgg", work))
    models = nn.ModuleList([restorer, *judges]).double()
    params = [p.requires_grad_() for p in restorer.dit.parameters()]
    x_in, x_gt = 2 * torch.rand(2, 2, 3, 5, 32, 32, generator=torch.Generator().manual_seed(3),
                                dtype=torch.float64) - 1
    lambdas = {f"lambda_{name}": weighted.get(name, 0.0) for name in ("latent", "lpips", "mse", "dists")}
    recipe = train_restore.Recipe(batch=4, tiles=1, d_trunc=9, bf16=False, **lambdas)
    terms = defaultdict(float)
    train_restore.forward_and_backward(models, recipe, x_in, x_gt, terms)
    got = [p.grad for p in params]

    with torch.no_grad():
        z_in, z_gt = restorer.vae.encode(x_in), restorer.vae.encode(x_gt)
    z_out = z_in - restorer.dit(z_in, 200, torch.ones(2, 2, 8, dtype=torch.float64))
    x_out = restorer.vae.decode(z_out)
    x, y = (v.movedim(2, 1).flatten(0, 1) for v in (x_out, x_gt))
    # the two clips given are half of the batch
    wanted = {"latent": nnf.mse_loss(z_out, z_gt) / 2}
    if "lpips" in weighted:
        wanted["lpips"] = judges[0](x, y).mean() / 2
    if "mse" in weighted:
        wanted |= {"mse": nnf.mse_loss(x_out, x_gt) / 2, "dists": judges[1](x, y).mean() / 2}
    assert terms.keys() == wanted.keys()
    for name, value in wanted.items():
        assert float(terms[name]) == pytest.approx(value.item(), rel=1e-6), name
    loss = sum(weighted[name] * value for name, value in wanted.items())
    pairs = [(a, b) for a, b in zip(got, torch.autograd.grad(loss, params, allow_unused=True)) if b is not None]
    largest = max(((a - b).norm() / b.norm().clamp_min(1e-9)).item() for a, b in pairs)
    assert largest < 1e-5, f"largest relative difference of a gradient {largest:.1e}, allowed 1e-5"


def test_doves_way_takes_each_frame_by_itself_through_encoder_and_decoder(work):
    torch.manual_seed(0)
    world = small.world()
    restorer = Restorer(world.vae, world.dit, torch.ones(1, 2, 8), train_restore.WAN, Settings("upscale")).double()
    params = [p.requires_grad_() for p in restorer.dit.parameters()]
    x_in, x_gt = 2 * torch.rand(2, 1, 3, 5, 32, 32, dtype=torch.float64) - 1
    recipe = train_restore.Recipe(batch=1, each_frame=True, lambda_latent=0.5, lambda_lpips=0.0, lambda_mse=2.0,
                                  lambda_frame=3.0, bf16=False)
    terms = defaultdict(float)
    train_restore.forward_and_backward(nn.ModuleList([restorer, nn.Identity()]), recipe, x_in, x_gt, terms)
    got = [p.grad for p in params]

    z_in, z_gt = (torch.cat([restorer.vae.encode(x[:, :, t : t + 1]) for t in range(5)], dim=2) for x in (x_in, x_gt))
    z_out = z_in - restorer.dit(z_in, 200, torch.ones(1, 2, 8, dtype=torch.float64))
    x_out = torch.cat([restorer.vae.decode(z_out[:, :, t : t + 1]) for t in range(5)], dim=2)
    steps = [x[:, :, 1:] - x[:, :, :-1] for x in (x_out, x_gt)]
    wanted = {"latent": (z_out - z_gt).square().mean(), "mse": (x_out - x_gt).square().mean(),
              "frame": (steps[0] - steps[1]).abs().mean()}
    assert {name: float(value) for name, value in terms.items()} == pytest.approx(
        {name: value.item() for name, value in wanted.items()}, rel=1e-6)
    loss = 0.5 * wanted["latent"] + 2 * wanted["mse"] + 3 * wanted["frame"]
    pairs = [(a, b) for a, b in zip(got, torch.autograd.grad(loss, params, allow_unused=True)) if b is not None]
    largest = max(((a - b).norm() / b.norm().clamp_min(1e-9)).item() for a, b in pairs)
    assert largest < 1e-5, f"largest relative difference of a gradient {largest:.1e}, allowed 1e-5"
    with pytest.raises(ValueError, match="lambda_frame: .* wanted each_frame=yes"):
        train_restore.build(None, train_restore.Recipe(lambda_frame=1.0))


def test_the_latent_loss_alone_decodes_nothing(work, monkeypatch):
    world = small.world()
    restorer = Restorer(world.vae, world.dit, torch.ones(1, 2, 8), train_restore.WAN, Settings("artifacts"))
    restorer.dit.requires_grad_(True)
    monkeypatch.setattr(restorer.vae, "decode_group", lambda *given: pytest.fail("decoded"))
    terms, x = defaultdict(float), torch.zeros(1, 3, 5, 32, 32)
    recipe = train_restore.Recipe(pixel=False, bf16=False)
    train_restore.forward_and_backward(nn.ModuleList([restorer, nn.Identity()]), recipe, x, x + 0.5, terms)
    assert terms.keys() == {"latent"} and restorer.dit.proj_out.weight.grad.abs().sum() > 0


def test_channels_of_latents_that_are_not_normalised_count_as_they_vary(work):
    world, std = small.world(), [0.5, 1.0, 2.0, 4.0]
    world.vae.config.latents_std = std
    restorer = Restorer(world.vae, world.dit, torch.ones(1, 2, 8), train_restore.WAN, Settings("artifacts"))
    z_in, z_gt = torch.randn(2, 2, 4, 2, 4, 4)
    terms, recipe = defaultdict(float), train_restore.Recipe(normalised=False, lambda_latent=3.0)
    with torch.no_grad():
        z_out, loss = train_restore.latent_loss(restorer, recipe, z_in, z_gt, 0.5, terms)
    wanted = sum(s**2 * nnf.mse_loss(z_out[:, c], z_gt[:, c]) for c, s in enumerate(std)) / 4 / 2
    assert float(terms["latent"]) == pytest.approx(wanted.item(), rel=1e-5)
    assert loss.item() == pytest.approx(3 * wanted.item(), rel=1e-5)


def test_the_recipes_are_the_papers():
    artifacts, dove = train_restore.RECIPES["artifacts"], train_restore.RECIPES["dove"]
    # C.2: latent MSE 1, LPIPS (VGG) 100, 81 frames of 480 x 832 in 2 x 2 pieces, 880 steps
    assert (artifacts.lambda_latent, artifacts.lambda_lpips, artifacts.lpips, artifacts.t) == (1, 100, "vgg", 200)
    assert (artifacts.frames, artifacts.height, artifacts.width) == (81, 480, 832)
    assert (artifacts.tiles, artifacts.d_trunc) == (2, 1)
    assert (artifacts.steps, artifacts.batch, artifacts.lr, artifacts.weight_decay, artifacts.beta2) == (
        880, 1, 1e-5, 0.1, 0.99)
    # §4.1, C.1: MSE 1 (on [0, 1], as in DOVE's code), DISTS .1, 24 frames of 320 x 640, 500 steps, no pieces
    assert (dove.lambda_mse, dove.lambda_dists, dove.lambda_latent, dove.lambda_lpips) == (0.25, 0.1, 0, 0)
    assert (dove.frames, dove.height, dove.width, dove.steps, dove.tiles, dove.t, dove.scale) == (
        24, 320, 640, 500, 1, 399, 4)
    # C.3
    frames = {name: train_restore.RECIPES[name].frames for name in ("inpaint", "inpaint-boxes", "inpaint-rovi")}
    assert frames == {"inpaint": 49, "inpaint-boxes": 49, "inpaint-rovi": 29}
    assert train_restore.RECIPES["inpaint-rovi"].steps == 10_000


@pytest.mark.parametrize("frames", [1, 9, 17, 18, 21, 24, 25, 26, 29, 49, 80, 81])
def test_in_a_stream_the_transformer_sees_the_most_latents_of_a_clip_that_are_odd_and_five_at_least(frames):
    latents = next(n for n in range(1, 30) if 4 * n - 3 >= frames)  # Wan's: n latents are 4n - 3 frames
    assert train_restore.window_of(frames) == max(n for n in range(5, 30, 2) if n <= max(latents, 5))


# ---- what is trained, and what comes out -----------------------------------------------------------------------------

def test_the_transformer_is_trained_and_nothing_else_and_the_folder_runs(work, tmp_path):
    out = train(work, tmp_path)
    trained = Restorer.from_pretrained(out, dtype=torch.float32)
    assert trained.settings == Settings("inpaint", window=5)
    base = Restorer.from_base(work / "base", trained.settings)
    moved = [name for name, p in base.dit.named_parameters()
             if (trained.dit.get_parameter(name) - p).abs().max() > 1e-3]
    assert len(moved) > 20
    assert all(torch.equal(p, trained.vae.get_parameter(name)) for name, p in base.vae.named_parameters())
    stored = weights.load_tensors(out / "transformer" / weights.WEIGHTS)[0].values()
    assert {t.dtype for t in stored} == {torch.float16}
    x = 2 * torch.rand(3, 3, 32, 40) - 1
    assert len(list(trained.stream(x.unbind(1), central_mask(32, 40)))) == 3


def test_a_small_upscaler_starts_from_a_vae_alone_which_stays_where_it_is(work, tmp_path, capsys, monkeypatch):
    monkeypatch.undo()  # with the plan and the pictures
    config = dataclasses.replace(small_base.DIT_WAN, attention_head_dim=24)
    monkeypatch.setattr(small_base, "DIT_WAN", config)
    out = train(work, tmp_path / "out", "small-upscale", base=None, vae=str(work / "base" / "vae"), heads=1,
                layers=1, val=work / "pairs", every=2, bf16=True)
    assert not (out / "vae").exists()
    restorer = Restorer.from_pretrained(out, dtype=torch.float32)
    assert restorer.settings == Settings("upscale", scale=4, window=5)
    assert (len(restorer.dit.blocks), restorer.dit.config.num_attention_heads) == (1, 1)
    assert restorer(torch.zeros(1, 3, 2, 9, 11)).shape == (1, 3, 2, 36, 44)
    printed = capsys.readouterr().out
    assert "a step needs about" in printed and "trained: transformer" in printed and "val_psnr" in printed
    assert (out / "run" / "step_2.png").exists()
    assert restore_folder.read_settings(out / "model_index.json", weights.read_json(out / "model_index.json"), "", 0)


def test_a_run_that_is_interrupted_resumes_bit_equal_and_another_is_refused(work, tmp_path):
    settings = dict(steps=4, latent_until=2)
    whole = train(work, tmp_path / "whole", **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch.Log, "report", lambda log, step, *given: (_ for _ in ()).throw(KeyboardInterrupt)
                      if step == 2 else None)
        with pytest.raises(KeyboardInterrupt):
            train(work, tmp_path / "twice", **settings)
    twice = train(work, tmp_path / "twice", **settings)
    for file in ("transformer/diffusion_pytorch_model.safetensors", "run/checkpoint.safetensors"):
        one, two = (weights.load_tensors(folder / file)[0] for folder in (whole, twice))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), file
    with pytest.raises(ValueError, match="another run.*lambda_lpips: then 3.0, now 0.5"):
        train(work, tmp_path / "twice", lambda_lpips=0.5, **settings)
