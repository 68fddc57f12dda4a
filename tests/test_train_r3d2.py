"""train_r3d2.py: a step is the equation written out, trains what it should and no more, and resumes bit-equal."""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as nnf

import train_r3d2
from mirage_min.method import lora, perceptual
from mirage_min.networks import imagenet, weights
from mirage_min.systems.r3d2 import R3D2
from mirage_min.training import memory, watch
from tests import small


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A base with an AutoencoderKL, a tiny VAE, pairs, and random backbones for the losses."""
    folder = tmp_path_factory.mktemp("work")
    small.r3d2().save_pretrained(folder / "trained")
    small.r3d2().save_pretrained(folder / "base")
    small.r3d2().vae.save_pretrained(folder / "base" / "vae")
    (folder / "base" / "model_index.json").unlink(), (folder / "base" / "prompt.safetensors").unlink()
    small.r3d2(kl=False).vae.save_pretrained(folder / "taesd")
    small.save_backbones(folder, vgg_layers=9)
    (folder / "pairs").mkdir()
    for i in range(3):
        x = torch.randint(0, 256, (2, 3, 5, 40, 48), dtype=torch.uint8)
        weights.save_tensors(folder / "pairs" / f"{i}.safetensors", {"x_ni": x[0], "x_gt": x[1]})
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without memory.plan and pictures, which take longer than these small steps."""
    monkeypatch.setattr(memory, "plan", lambda *given, **settings: "")
    monkeypatch.setattr(watch.Log, "report", lambda *given: None)


def train(work: Path, out: Path, base="base", vae=None, prompt=None, recipe="r3d2-big", val=None, **settings) -> Path:
    args = argparse.Namespace(data=work / "pairs", base=base and str(work / base), vae=vae and str(work / vae), val=val,
                              prompt=prompt, perceptual=work, real=None, out=out, run=out / "run", device="cpu",
                              stage="r3d2", recipe=recipe)
    train_r3d2.main(args, train_r3d2.Recipe(**dict(steps=2, batch=2, height=32, width=40, lr=1e-2, warmup=1, every=1,
                                                   lpips="squeeze", rank=2, bf16=False) | settings))
    return out


# ---- the loss --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """(LPIPS on SqueezeNet, VGG-16), random, in float64."""
    folder = tmp_path_factory.mktemp("perceptual")
    small.save_backbones(folder)
    lpips = perceptual.Lpips(imagenet.Features("squeeze", folder)).double()
    return lpips, imagenet.Features("vgg", folder).double()


@pytest.mark.parametrize("kl", [True, False], ids=["AutoencoderKL", "AutoencoderTiny"])
@pytest.mark.parametrize("step, gram, mse", [(4, False, 1.5), (5, True, 0.0)])
def test_a_step_is_the_equation_written_out(backbones, kl, step, gram, mse):
    lpips_distance, texture = backbones
    system = small.r3d2(kl).double()
    for p in system.vae.decoder.parameters():
        p.mul_(2)  # some pixels lie beyond ±1, where a clamp would lose their gradients
    lora.add(system.vae.decoder, "decoder", 2, 4.0)
    system.double()
    params = [*system.unet.parameters(), *system.skips.parameters(), *lora.parameters(system.vae.decoder, "decoder")]
    for p in params:
        p.data.add_(0.05 * torch.randn_like(p))
        p.requires_grad_()
    draws = torch.Generator().manual_seed(3)
    x_ni, x_gt = 2 * torch.rand(2, 2, 3, 2, 33, 40, generator=draws, dtype=torch.float64) - 1
    recipe = train_r3d2.Recipe(batch=4, lambda_lpips=0.7, lambda_gram=0.2, lambda_mse=mse, gram_from=5, bf16=False)
    terms = defaultdict(float)
    train_r3d2.forward_and_backward(nn.ModuleList([system, *backbones]), recipe, x_ni, x_gt, terms, step)
    got = [p.grad.clone() for p in params]

    x_dr = torch.stack([system.enhance(x_ni[:, :, t]) for t in range(2)], dim=2)
    assert x_dr.abs().max() > 1
    x, y = (v.movedim(2, 1).flatten(0, 1) for v in (x_dr, x_gt))
    # the two clips given are half of the batch
    wanted = {"lpips": lpips_distance(x, y).mean() / 2}
    loss = 0.7 * wanted["lpips"]
    if gram:
        wanted["gram"] = perceptual.gram_loss(texture(x), texture(y)).mean() / 2
        loss = loss + 0.2 * wanted["gram"]
    if mse:
        wanted["mse"] = nnf.mse_loss(x_dr, x_gt) / 2
        loss = loss + mse * wanted["mse"]
    assert terms.keys() == wanted.keys()
    for name, value in wanted.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-9), name
    wanted = torch.autograd.grad(loss, params)
    # attention to a text of one token has queries and keys without a gradient: what is there is rounding
    least = 1e-9 * max(b.norm() for b in wanted)
    difference = max(((a - b).norm() / b.norm().clamp_min(least)).item() for a, b in zip(got, wanted))
    assert difference < 1e-8, f"largest relative difference of a gradient {difference:.1e}, allowed 1e-8"


def test_the_recipes_are_the_papers():
    r3d2, big, difix = (train_r3d2.RECIPES[name] for name in ("r3d2", "r3d2-big", "difix"))
    assert r3d2 == big
    # R3D2 A.2
    assert (r3d2.lambda_lpips, r3d2.lambda_gram, r3d2.lambda_mse, r3d2.gram_from) == (1.0, 0.5, 0.0, 0)
    assert (r3d2.lr, r3d2.warmup, r3d2.cosine) == (1e-4, 500, False)
    assert (r3d2.height, r3d2.width, r3d2.frames, r3d2.batch, r3d2.skip_start) == (1080, 1920, 1, 8, 0.0)
    # Difix
    assert (difix.lambda_lpips, difix.lambda_gram, difix.lambda_mse, difix.gram_from) == (1.0, 1.0, 1.0, 2000)
    assert (difix.lr, difix.t, difix.rank, difix.alpha, difix.skip_start) == (2e-5, 199, 4, 8.0, 1e-5)
    assert (difix.height, difix.width, difix.steps) == (576, 1024, 10_000)
    for name in ("r3d2", "r3d2-big", "difix"):
        assert train_r3d2.BASES[name][0] == "stabilityai/sd-turbo" and train_r3d2.RECIPES[name].lpips == "vgg"


def test_the_rate_warms_up_and_the_gradient_has_norm_1_at_most(work, tmp_path, monkeypatch):
    step, seen = torch.optim.AdamW.step, []

    def watched(optimizer, *given):
        grads = [p.grad.norm() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        seen.append((optimizer.param_groups[0]["lr"], torch.stack(grads).norm().item()))
        return step(optimizer, *given)
    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    train(work, tmp_path, steps=4, every=4, lr=1e-3, warmup=3, lambda_mse=1e5)
    assert [rate for rate, _ in seen] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3])
    assert [norm for _, norm in seen] == pytest.approx([1] * 4, rel=1e-3)


# ---- what is trained -------------------------------------------------------------------------------------------------

def test_unet_skips_and_decoder_are_trained_and_the_encoder_is_not_and_the_result_runs(work, tmp_path):
    before = {p: p.read_bytes() for p in work.rglob("*.safetensors")}
    out = train(work, tmp_path)
    assert before == {p: p.read_bytes() for p in work.rglob("*.safetensors")}, "the base must stay as it is"
    base, trained = R3D2.from_base(work / "base"), R3D2.from_pretrained(out)
    moved = {name: not torch.equal(p, trained.get_parameter(name)) for name, p in base.named_parameters()}
    wrong = [name for name, changed in moved.items() if changed != name.startswith(("unet.", "skips."))
             and not name.startswith("vae.decoder.") and ".bias" not in name]
    assert not wrong, f"trained, or not, against the recipe: {wrong[:5]}"
    assert sum(moved[name] for name in moved if name.startswith("vae.decoder.") and name.endswith("weight")) > 10
    assert not any(changed for name, changed in moved.items() if name.startswith("vae.encoder."))
    index = json.loads((out / "model_index.json").read_text())
    assert index["step"] == "2" and json.loads(index["recipe"])["lambda_gram"] == 0.5 and index["t"] == 199
    x = torch.rand(1, 3, 2, 20, 24) * 2 - 1
    with torch.no_grad():
        assert not torch.equal(trained(x), base(x))


def test_what_is_written_computes_what_was_trained(work, tmp_path, monkeypatch):
    """The LoRA is merged: the last step's system and the folder's give the same."""
    seen = []
    monkeypatch.setattr(watch.Log, "report", lambda log, step, model, x, *given: seen.extend([x, model(*x)]))
    trained = R3D2.from_pretrained(train(work, tmp_path, every=2))
    (x_ni, _), y = seen
    with torch.no_grad():
        difference = (trained(x_ni) - y).abs().max().item()
    assert difference < 1e-5, f"largest difference {difference:.1e}"


def test_a_trained_system_continues_with_its_skips_and_its_prompt(work, tmp_path):
    begun = R3D2.from_pretrained(work / "trained")
    same = R3D2.from_pretrained(train(work, tmp_path / "0", base="trained", steps=0))
    mine, its = begun.state_dict(), same.state_dict()
    assert mine.keys() == its.keys() and all(torch.equal(mine[key], its[key]) for key in mine)
    on = R3D2.from_pretrained(train(work, tmp_path / "1", base="trained", steps=1, lr=1e-4))
    largest = max((p - begun.get_parameter(name)).abs().max().item() for name, p in on.unet.named_parameters("unet"))
    assert 0 < largest <= 1.1e-4, f"one AdamW step of 1e-4 moves by that at most, got {largest:.1e}"
    assert torch.equal(on.text, begun.text)


def test_r3d2_proper_trains_on_a_tiny_vae_with_a_prompt_and_is_written_as_float16(work, tmp_path, capsys, monkeypatch):
    monkeypatch.undo()  # with the plan and the pictures
    weights.save_tensors(tmp_path / "p.safetensors", {"text": torch.ones(1, 3, 12)})
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "0.safetensors").symlink_to(work / "pairs" / "0.safetensors")
    out = train(work, tmp_path / "out", recipe="r3d2", vae="taesd", prompt=tmp_path / "p.safetensors", steps=1,
                half=True, frames=2, checkpoint_unet=True, bf16=True, val=tmp_path / "val")
    trained = R3D2.from_pretrained(out)
    assert trained.vae.CLASS_NAME == "AutoencoderTiny" and (trained.text == 1).all()
    stored = {t.dtype for file in out.rglob("diffusion*.safetensors") for t in weights.load_tensors(file)[0].values()}
    assert stored == {torch.float16} and {p.dtype for p in trained.parameters()} == {torch.float32}
    printed = capsys.readouterr().out
    assert "a step needs about" in printed and "trained: unet" in printed and "val_psnr" in printed
    assert (out / "run" / "step_1.png").exists()


def test_the_small_recipe_starts_from_committed_files_and_random_weights(work, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    recipe = train_r3d2.RECIPES["small"]
    args = argparse.Namespace(base=None, vae="weights/vae_2d", prompt=None, perceptual=work, recipe="small")
    models, params = train_r3d2.build(args, recipe)
    system = models[0]
    with torch.no_grad():
        z = torch.randn(1, 4, 3, 5)
        scale = (system.denoise(z) / z).mean().item()
    assert scale == pytest.approx(0.7552383612 ** -0.5, rel=1e-5), "ε = 0 at the start"
    numbers = sum(p.numel() for p in [*system.unet.parameters(), *system.vae.parameters(), *system.skips.parameters()])
    assert 2 * numbers - 2 * sum(p.numel() for name, p in params.items() if name.startswith("decoder")) <= 8_000_000
    assert recipe.half and (recipe.lambda_lpips, recipe.lambda_gram, recipe.lambda_mse) == (1.0, 0.5, 2.0)


# ---- interruptions ---------------------------------------------------------------------------------------------------

def test_a_run_that_is_interrupted_resumes_bit_equal_and_another_is_refused(work, tmp_path):
    settings = dict(steps=3, cosine=True)
    whole = train(work, tmp_path / "whole", **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch.Log, "report", lambda log, step, *given: (_ for _ in ()).throw(KeyboardInterrupt)
                      if step == 1 else None)
        with pytest.raises(KeyboardInterrupt):
            train(work, tmp_path / "twice", **settings)
    assert not (tmp_path / "twice" / "unet").exists(), "nothing is written before the end"
    twice = train(work, tmp_path / "twice", **settings)
    for file in ("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
                 "run/checkpoint.safetensors"):
        one, two = (weights.load_tensors(folder / file)[0] for folder in (whole, twice))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), file
    with pytest.raises(ValueError, match="another run.*lambda_gram: then 0.5, now 0.1"):
        train(work, tmp_path / "twice", lambda_gram=0.1, **settings)
    with pytest.raises(ValueError, match="another run.*weights: then"):
        train(work, tmp_path / "twice", prompt=save_prompt(tmp_path), **settings)


def save_prompt(folder: Path) -> Path:
    weights.save_tensors(folder / "prompt.safetensors", {"text": torch.ones(1, 2, 12)})
    return folder / "prompt.safetensors"


def test_a_recipe_on_another_vae_than_its_own_is_refused(work, tmp_path):
    with pytest.raises(ValueError, match="recipe r3d2 is for an AutoencoderTiny, got an AutoencoderKL"):
        train(work, tmp_path, recipe="r3d2")


def test_a_prompt_without_text_is_refused_by_its_file(work, tmp_path):
    weights.save_tensors(tmp_path / "p.safetensors", {"embedding": torch.ones(1)})
    with pytest.raises(ValueError, match="p.safetensors: wanted a tensor `text`"):
        train(work, tmp_path, prompt=tmp_path / "p.safetensors")
