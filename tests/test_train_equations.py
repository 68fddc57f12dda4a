"""A training step is the papers' equation written out: terms and gradients by plain autograd, without ChopGrad."""

from argparse import Namespace
from collections import defaultdict

import pytest
import torch
from torch import nn
from torch.nn import functional as nnf

import train_harmonize
import train_vae
from mirage_min.method import lora, perceptual
from mirage_min.networks import imagenet
from mirage_min.systems.mirage_folder import HARMONISATION, RECONSTRUCTION, TRANSFORMER
from tests import small


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """(LPIPS on SqueezeNet, VGG-16), random, in float64."""
    folder = tmp_path_factory.mktemp("perceptual")
    small.save_backbones(folder)
    lpips = perceptual.Lpips(imagenet.Features("squeeze", folder)).double()
    return lpips, imagenet.Features("vgg", folder).double()


def mirage_with(*names):
    """A small Mirage in float64 with filled adapters -> (mirage, what is trained)."""
    mirage = small.mirage().double()
    for name in names:
        mirage.add_lora(name, 2, 4.0)
    mirage.double()
    params = [p for name in names for p in lora.parameters(mirage.adapters(name), name)]
    if RECONSTRUCTION in names:
        params += list(mirage.vae.fusion.parameters())
    for p in params:
        p.data.normal_(std=0.1)
        p.requires_grad_()
    return mirage, params


def frames(x):
    return x.movedim(2, 1).flatten(0, 1)


def compare(params, terms, wanted_terms, wanted_loss):
    """Terms, unweighted, and the gradients of the loss against those by plain autograd."""
    got = [p.grad.clone() for p in params]
    assert terms.keys() == wanted_terms.keys()
    for name, value in wanted_terms.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-9), name
    wanted = torch.autograd.grad(wanted_loss, params)
    difference = max(((a - b).norm() / b.norm()).item() for a, b in zip(got, wanted))
    assert difference < 1e-8, f"largest relative difference of a gradient {difference:.1e}, allowed 1e-8"


def clips():
    """One of a batch of two clips, in two groups of frames."""
    draws = torch.Generator().manual_seed(3)
    return 2 * torch.rand(2, 1, 3, 17, 32, 32, generator=draws, dtype=torch.float64) - 1


def test_a_step_of_stage_a_is_equations_2_and_3_written_out(backbones):
    mirage, params = mirage_with(RECONSTRUCTION)
    recipe = train_vae.Recipe(batch=2, lambda1=0.3, d_trunc=9, bf16=False)
    terms, (x_ni, x_gt) = defaultdict(float), clips()
    train_vae.forward_and_backward(nn.ModuleList([mirage, backbones[0]]), recipe, x_ni, x_gt, terms)
    x_ro = mirage.vae.decode(mirage.vae.encode(x_gt), mirage.mids(x_ni))
    mse, lpips = nnf.mse_loss(x_ro, x_gt) / 2, backbones[0](frames(x_ro), frames(x_gt)).mean() / 2
    compare(params, terms, {"mse": mse, "lpips": lpips}, mse + 0.3 * lpips)
    shown = train_vae.reconstruct(mirage, recipe, x_ni, x_gt)
    difference = (shown - x_ro).abs().max().item()
    assert difference < 1e-12, f"the picture is of what is trained: largest difference {difference:.1e}"


def test_the_picture_of_a_clip_of_any_size_is_that_of_the_padded_clip_cut_to_the_clips_frames_rows_and_columns():
    mirage, _ = mirage_with(RECONSTRUCTION)
    x_ni, x_gt = (x[:, :, :10, :17, :30] for x in clips())
    shown = train_vae.reconstruct(mirage, train_vae.Recipe(bf16=False), x_ni, x_gt)
    with torch.no_grad():
        whole = mirage.vae.decode(mirage.vae.encode(mirage.pad(x_gt)), mirage.mids(mirage.pad(x_ni)))
    assert whole.shape == (1, 3, 17, 32, 32) and torch.equal(shown, whole[:, :, :10, :17, :30])


@pytest.mark.parametrize("step, gram", [(4, 0), (5, 1)])
@pytest.mark.parametrize("shared", [False, True], ids=["two backbones", "one backbone"])
def test_a_step_of_stage_h_is_equation_4_written_out_and_gram_counts_from_its_step_on(backbones, step, gram, shared):
    mirage, params = mirage_with(TRANSFORMER, HARMONISATION)
    lpips_distance, texture = backbones
    passes = []
    if shared:
        lpips_distance = perceptual.Lpips(texture).double()
    recipe = train_harmonize.Recipe(batch=2, lambda2=0.2, gram_from=5, mse=1.5, d_trunc=9, bf16=False)
    terms, (x_ni, x_gt) = defaultdict(float), clips()
    models = nn.ModuleList([mirage, lpips_distance, texture])
    with texture.register_forward_hook(lambda *given: passes.append(given)):
        train_harmonize.forward_and_backward(models, recipe, x_ni, x_gt, terms, step)
    groups = len(mirage.vae.decode_groups(5))
    assert groups == 2 and len(passes) == 2 * groups * (shared or gram), "once for x, once for y, for both losses"
    x_dr = mirage(x_ni)
    wanted = {"lpips": lpips_distance(frames(x_dr), frames(x_gt)).mean() / 2, "mse": nnf.mse_loss(x_dr, x_gt) / 2}
    loss = wanted["lpips"] + 1.5 * wanted["mse"]
    if gram:
        wanted["gram"] = perceptual.gram_loss(texture(frames(x_dr)), texture(frames(x_gt))).mean() / 2
        loss = loss + 0.2 * wanted["gram"]
    compare(params, terms, wanted, loss)


def test_where_both_losses_of_stage_h_have_the_same_backbone_there_is_one(tmp_path, monkeypatch):
    small.save_backbones(tmp_path)
    monkeypatch.setattr(train_harmonize.Mirage, "from_pretrained", lambda *given, **settings: small.mirage())
    args = Namespace(mirage=tmp_path, base=None, vae2d=None, perceptual=tmp_path)
    for name, shared in (("mirage", True), ("chopgrad", True), ("small", False)):
        (_, lpips, texture), _ = train_harmonize.build(args, train_harmonize.RECIPES[name])
        assert (texture is lpips.features) is shared and texture.net == "vgg"
