"""train_base.py: its stages make bases that load, one after the other, and encode every pair both ways round."""

import argparse
import dataclasses
import itertools
import json
import shutil

import pytest
import torch

import train_base
from mirage_min.data.crops import Crops
from mirage_min.data.pairs import Pairs
from mirage_min.data.real_clips import RealClips
from mirage_min.method import perceptual
from mirage_min.networks import imagenet, small_base, weights
from mirage_min.networks.dit_cogvideox import CogVideoXDiTConfig
from mirage_min.networks.dit_wan import WanDiT
from mirage_min.networks.unet_2d import UNet2DConfig
from mirage_min.networks.vae_2d import AutoencoderKL
from mirage_min.networks.vae_cogvideox import CogVideoXVAE, CogVideoXVAEConfig
from mirage_min.networks.vae_wan import WanVAE, WanVAEConfig
from mirage_min.systems.mirage import Mirage
from mirage_min.systems.r3d2 import R3D2
from mirage_min.training import checkpoint, run
from mirage_min.training.latents import Latents

SMALL_VAE = CogVideoXVAEConfig(block_out_channels=(4, 4, 8, 8), norm_num_groups=4, layers_per_block=1)
SMALL_DIT = CogVideoXDiTConfig(num_attention_heads=1, num_layers=2, time_embed_dim=8, text_embed_dim=16,
                               max_text_seq_length=1, sample_height=4, sample_width=6,
                               use_rotary_positional_embeddings=True)

SMALL_UNET = UNet2DConfig(block_out_channels=(4, 4, 4, 4), attention_head_dim=1, layers_per_block=1, norm_num_groups=4,
                          cross_attention_dim=16)
SMALL_VAE_WAN = WanVAEConfig(base_dim=4, num_res_blocks=1, latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three pairs of 9 frames of 32 x 48, random backbones, and the base after all four stages."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    weights.save_tensors(folder / "squeezenet1_1_features.safetensors", imagenet.squeezenet().state_dict())
    (folder / "pairs").mkdir()
    for i in range(3):
        x = torch.randint(0, 256, (2, 3, 9, 32, 48), dtype=torch.uint8)
        weights.save_tensors(folder / "pairs" / f"{i}.safetensors", {"x_ni": x[0], "x_gt": x[1]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_base, "VAE", SMALL_VAE)
        patch.setattr(small_base, "DIT", SMALL_DIT)
        patch.setattr(small_base, "VAE_WAN", SMALL_VAE_WAN)
        patch.setattr(small_base, "UNET", SMALL_UNET)
        for stage in ("vae", "vae_2d", "prior", "one_step"):
            train(folder, stage, steps=2)
            (folder / stage).mkdir()
            for file in (folder / "out").rglob("*.safetensors"):
                (folder / stage / file.parent.name).write_bytes(file.read_bytes())
        for stage in ("vae", "prior", "one_step"):
            train(folder, stage, family="wan", steps=2)
        train(folder, "one_step_2d", steps=2)
    return folder


def train(folder, stage, family="cogvideox", out=None, **settings):
    run_folder = (out or folder) / "runs" / f"{stage}_{family}"
    args = argparse.Namespace(stage=stage, family=family, data=folder / "pairs", real=None, perceptual=folder,
                              out=out or folder / "out", run=run_folder, device="cpu")
    recipe = dict(batch=2, sizes="9x32x32 1x32x48", norm_groups=4, warmup=1) | settings
    train_base.main(args, train_base.Recipe(**recipe))


def test_each_stage_trains_its_own_network_and_leaves_the_others_alone(folder):
    made = [{p.name: p.read_bytes() for p in (folder / stage).iterdir()}
            for stage in ("vae", "vae_2d", "prior", "one_step")]
    assert [sorted(files) for files in made] == [["vae"], ["vae", "vae_2d"]] + 2 * [["transformer", "vae", "vae_2d"]]
    for before, after in zip(made, made[1:]):
        assert all(before[name] == after[name] for name in before if name != "transformer")
    assert made[2]["transformer"] != made[3]["transformer"], "one_step goes on from the prior"


@pytest.mark.parametrize("stage, where", [("vae_2d", "vae_2d"), ("vae", "base/vae"), ("prior", "base/transformer"),
                                          ("one_step", "base/transformer")])
def test_a_stage_continues_from_the_network_in_a_folder(folder, tmp_path, stage, where):
    begun, _ = weights.load_tensors(folder / "out" / where / "diffusion_pytorch_model.safetensors")
    (tmp_path / "begun").mkdir()
    for file in (folder / "out" / where).iterdir():
        (tmp_path / "begun" / file.name).write_bytes(file.read_bytes())
    shutil.copytree(folder / "out" / "base" / "vae", tmp_path / "base" / "vae")  # whose latents a transformer trains on
    train(folder, stage, out=tmp_path, steps=0, init=str(tmp_path / "begun"))
    ended, _ = weights.load_tensors(tmp_path / where / "diffusion_pytorch_model.safetensors")
    assert ended.keys() == begun.keys() and all(torch.equal(ended[key], begun[key]) for key in begun)


@pytest.mark.parametrize("family, base", [("cogvideox", "base"), ("wan", "base_wan")])
def test_decoder_only_leaves_latents_and_their_scale_as_they_are(folder, tmp_path, family, base):
    begun = folder / "out" / base / "vae"
    train(folder, "vae", family, out=tmp_path, steps=2, init=str(begun), decoder_only=True, lr=0.1)
    ended = tmp_path / base / "vae"
    assert (ended / "config.json").read_text() == (begun / "config.json").read_text()
    (old, _), (new, _) = (weights.load_tensors(at / "diffusion_pytorch_model.safetensors") for at in (begun, ended))
    moved = {key.split(".")[0] for key in old if not torch.equal(old[key], new[key])}
    assert moved == {"decoder"} | ({"post_quant_conv"} if family == "wan" else set())


@pytest.mark.parametrize("stage", ["vae_2d", "prior"])
def test_decoder_only_is_refused_for_what_is_no_3d_vae(folder, tmp_path, stage):
    shutil.copytree(folder / "out" / "base" / "vae", tmp_path / "base" / "vae")
    with pytest.raises(ValueError, match=r"decoder_only: wanted the stage vae, got (AutoencoderKL|CogVideoXDiT)$"):
        train(folder, stage, out=tmp_path, steps=1, decoder_only=True)


def test_a_decoder_trains_without_its_blocks_and_then_with_them(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(small_base, "VAE_WAN_PATCHES", dataclasses.replace(
        SMALL_VAE_WAN, base_dim=12, dim_mult=(1, 2, 2), temperal_downsample=(True, True), patch_size=2, in_channels=12,
        out_channels=12))
    found = []
    for name, settings in (("begun", dict(patches=True, transform=True, steps=0)),
                           ("without", dict(without_blocks=True)), ("with", {})):
        if found:
            settings |= dict(init=str(tmp_path / "vae"), decoder_only=True, steps=2, lr=0.1)
        train(folder, "vae", "wan", out=tmp_path / name, **settings)
        shutil.rmtree(tmp_path / "vae", ignore_errors=True)
        shutil.copytree(tmp_path / name / "base_wan" / "vae", tmp_path / "vae")
        found.append(weights.load_tensors(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")[0])
    moved = [{key for key in old if not torch.equal(old[key], new[key])} for old, new in itertools.pairwise(found)]
    block = "decoder.up_blocks.0.resnets.0.conv2.weight"
    assert block not in moved[0] and {"decoder.conv_in.weight", "decoder.conv_out.weight"} <= moved[0]
    assert block in moved[1] and not any(key.startswith("encoder") for keys in moved for key in keys)


def test_latents_and_the_transformer_on_them_have_the_channels_that_are_asked_for(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(small_base, "VAE_WAN", SMALL_VAE_WAN)
    for stage, settings in (("vae", {"z_dim": 5}), ("prior", {})):
        train(folder, stage, "wan", out=tmp_path, steps=1, **settings)
    vae = WanVAE.from_pretrained(tmp_path / "base_wan" / "vae")
    dit = WanDiT.from_pretrained(tmp_path / "base_wan" / "transformer")
    assert vae.encode(torch.zeros(1, 3, 1, 16, 16)).shape[1] == len(vae.config.latents_std) == 5
    assert dit.config.in_channels == dit.config.out_channels == 5


def test_an_encoder_that_begins_as_a_transform_is_that_of_crops_which_no_step_draws(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(small_base, "VAE_WAN", SMALL_VAE_WAN)
    taken, drawn = [], []
    begin, batch = train_base.begin_as_transform, train_base.next_batch

    def begin_as_transform(vae, videos):
        taken.extend(videos)
        begin(vae, videos)

    def next_batch(data, recipe, step, draws):
        drawn.append(step)
        return batch(data, recipe, step, draws)
    monkeypatch.setattr(train_base, "begin_as_transform", begin_as_transform)
    monkeypatch.setattr(train_base, "next_batch", next_batch)
    train(folder, "vae", "wan", out=tmp_path, steps=0, z_dim=5, transform=True)
    before = [step for step in drawn if step < 0]
    assert len(taken) == len(before) == len(set(before)) == 64 and taken[0].shape[1] == 3
    vae = WanVAE.from_pretrained(tmp_path / "base_wan" / "vae")
    assert not vae.encoder.down_blocks[0].conv2.weight.any()


@pytest.mark.parametrize("family, settings, got", [("cogvideox", {}, "--family cogvideox"),
                                                   ("wan", {"init": "x"}, "init=x")])
def test_a_transform_is_refused_where_the_encoder_is_not_a_new_one_of_wans(folder, tmp_path, family, settings, got):
    with pytest.raises(ValueError, match=rf"transform: wanted a new VAE of Wan's \(--family wan, no init\), got {got}"):
        train(folder, "vae", family, out=tmp_path, steps=0, transform=True, **settings)


def test_the_base_loads_as_published_ones_do_and_mirage_stands_on_it(folder):
    vae = CogVideoXVAE.from_pretrained(folder / "out" / "base", "vae")
    mirage = Mirage.from_base(folder / "out" / "base", folder / "out" / "vae_2d")
    assert isinstance(mirage.vae2d, AutoencoderKL) and mirage.vae.config == vae.config
    assert mirage(torch.zeros(1, 3, 9, 32, 48)).shape == (1, 3, 9, 32, 48)
    config = json.loads((folder / "out" / "base" / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == "v_prediction" and abs(float(mirage.alpha_bar[199]) - 0.7387) < 1e-4


def test_r3d2_stands_on_the_unet_of_one_step_2d_which_learns_z_gt_from_z_ni_of_single_frames(folder):
    vae = AutoencoderKL.from_pretrained(folder / "out" / "vae_2d")
    r3d2 = R3D2.from_base(folder / "out" / "base_2d", folder / "out" / "vae_2d")
    assert r3d2.unet.conv_out.weight.abs().max() > 0, "two steps of training"
    file = folder / "runs" / "latents_2d.safetensors"
    z, (x, y) = weights.load_tensors(file)[0]["z"], Pairs(folder / "pairs", 9).read(2, lambda n: 0)
    with torch.no_grad():
        for i, side in enumerate((x, y)):
            for mirrored in (0, 1):
                wanted = vae.encode((side.flip(-1) if mirrored else side).transpose(0, 1)).transpose(0, 1)
                difference = (z[4 + mirrored, i] - wanted).abs().max()
                assert difference < 1e-3 * wanted.abs().max(), f"{i} {mirrored}: {difference:.1e}"
        batch = z[:2].float().unbind(1)
        loss, terms = train_base.one_step_2d_loss(r3d2.unet, batch, None, r3d2.alpha_bar)
        z_dr = torch.stack([r3d2.denoise(frame) for frame in batch[0].unbind(2)], dim=2)
    assert loss.item() == terms["z"].item() == pytest.approx((z_dr - batch[1]).square().mean().item(), rel=1e-5)


def test_a_base_of_wans_classes_loads_too_and_its_latents_are_normalised(folder):
    mirage = Mirage.from_base(folder / "out" / "base_wan", None, text=torch.zeros(1, 512, 16))
    assert isinstance(mirage.vae, WanVAE) and mirage.alpha_bar is None and mirage.t == 200
    assert mirage(torch.zeros(1, 3, 9, 32, 48)).shape == (1, 3, 9, 32, 48)
    recipe = train_base.Recipe(2, 2, sizes="9x32x32 1x32x48")
    crops = Crops(Pairs(folder / "pairs", 9), None, recipe.real, recipe.sizes)  # those by which they were normalised
    with torch.no_grad():
        batches = [train_base.next_batch(crops, recipe, 2 + k, None)[0][0] for k in range(32)]
        z = torch.cat([mirage.vae.encode(x).transpose(0, 1).flatten(1) for x in batches], dim=1)
    mean, std = z.mean(dim=1), z.std(dim=1)
    assert mean.abs().max() < 1e-3 and (std - 1).abs().max() < 1e-3, f"channel means {mean}, standard deviations {std}"


def test_a_step_trains_on_as_many_crops_of_a_size_as_its_batch_has_pixels_each_drawn_by_its_place(folder, tmp_path):
    weights.save_tensors(tmp_path / "street.safetensors", {"x": torch.randint(0, 256, (3, 12, 96, 160)).byte()})
    recipe, shapes = train_base.Recipe(1, 4, sizes="9x16x16 1x64x96", real=0.5, seed=3), {}
    crops = Crops(Pairs(folder / "pairs", 9), RealClips(tmp_path, 9), recipe.real, recipe.sizes)
    for step in range(24):
        (x,), names = train_base.next_batch(crops, recipe, step, None)
        shapes.setdefault(tuple(x.shape), []).extend(names)
        again, name = crops.crop(tuple(x.shape[2:]), run.draws(3, step, 2))
        assert torch.equal(x[1], again) and names[1] == name, "crop k of a step has the generator (seed, step, k + 1)"
    assert set(shapes) == {(4, 3, 9, 16, 16), (2, 3, 1, 64, 96)}
    assert set(shapes[2, 3, 1, 64, 96]) == {"street"} and len(set(shapes[4, 3, 9, 16, 16])) > 2


def test_a_frame_that_is_uniformly_too_bright_costs_its_tone_and_noise_does_not(folder):
    lpips = perceptual.Lpips(perceptual.Features("squeeze", folder))
    x, zero = torch.zeros(1, 3, 1, 64, 64), torch.zeros(1)
    _, bright = train_base.reconstruction(x + 0.1, x, lpips, 0.1, zero, zero)
    _, noise = train_base.reconstruction(x + 0.1 * torch.randn_like(x).sign(), x, lpips, 0.1, zero, zero)
    assert abs(bright["mse"] - 0.01) < 1e-6 and abs(bright["tone"] - 0.1) < 1e-6
    assert abs(noise["mse"] - 0.01) < 1e-6 and noise["tone"] < 1.2e-2


@pytest.mark.parametrize("model", [AutoencoderKL(), WanVAE(SMALL_VAE_WAN), CogVideoXVAE(SMALL_VAE)],
                         ids=lambda model: type(model).__name__)
def test_an_autoencoder_starts_with_little_noise_on_its_latents(model):
    x = torch.rand(1, 3, 32, 32) if isinstance(model, AutoencoderKL) else torch.rand(1, 3, 9, 32, 32)

    def posterior():
        with torch.no_grad():
            return (model.posterior(x) if isinstance(model, AutoencoderKL) else model.posterior_group(x))[:2]
    mean, logvar = posterior()
    small_base.quiet(model)
    assert torch.equal(posterior()[0], mean) and torch.allclose(posterior()[1], logvar - 4, atol=1e-4)


@pytest.mark.parametrize("make", [small_base.new_vae_2d, small_base.new_vae, lambda: small_base.new_vae("wan")])
def test_the_small_autoencoders_are_made_quiet(make, monkeypatch):
    torch.manual_seed(0)
    quiet = make().state_dict()
    monkeypatch.setattr(small_base, "quiet", lambda vae: vae)
    torch.manual_seed(0)
    loud = make().state_dict()
    moved = {key: loud[key] - quiet[key] for key in loud if not torch.equal(loud[key], quiet[key])}
    (less,) = moved.values()
    n = len(less) // 2
    assert less[:n].eq(0).all() and torch.allclose(less[n:], torch.full((n,), 4.0)), moved


def test_the_loss_of_an_autoencoder_is_the_weighted_sum_of_terms_that_are_logged_unweighted(folder):
    lpips = perceptual.Lpips(perceptual.Features("squeeze", folder))
    (x, y), mean, logvar = torch.rand(2, 2, 3, 2, 32, 48) * 2 - 1, torch.randn(4, 5), torch.randn(4, 5)
    loss, terms = train_base.reconstruction(y, x, lpips, 0.03, mean, logvar)
    frames = [v.movedim(2, 1).flatten(0, 1) for v in (y, x)]
    wanted = {"mse": (y - x).square().mean(), "l1": (y - x).abs().mean(), "lpips": lpips(*frames).mean(),
              "tone": (y - x).unflatten(3, (2, 16)).unflatten(5, (3, 16)).mean(dim=(4, 6)).abs().mean(),
              "kl": train_base.kl(mean, logvar)}
    assert terms.keys() == wanted.keys()
    for name, value in wanted.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-5), name
    weights_of = {"mse": 1, "tone": 0.5, "l1": 0.1, "lpips": 0.03, "kl": 1e-4}
    weighted = sum(weights_of[name] * value.item() for name, value in wanted.items())
    assert loss.item() == pytest.approx(weighted, rel=1e-5)


@pytest.mark.parametrize("family, frames", [("cogvideox", 17), ("cogvideox", 1), ("wan", 9)])
def test_an_autoencoder_trains_on_the_groups_of_frames_in_which_inference_takes_them(family, frames, monkeypatch):
    monkeypatch.setattr(small_base, "VAE", SMALL_VAE)
    monkeypatch.setattr(small_base, "VAE_WAN", SMALL_VAE_WAN)
    torch.manual_seed(0)
    vae = small_base.new_vae(family, norm_groups=4).double()
    x, seen = torch.rand(1, 3, frames, 32, 32, dtype=torch.float64) * 2 - 1, []
    factor = getattr(vae.config, "scaling_factor", 1.0)
    with torch.no_grad():
        mean, logvar = train_base.posterior(vae, x)
        z = vae.encode(x) / factor
        difference = (mean - z).abs().max().item()
        assert mean.shape == logvar.shape == z.shape and difference < 1e-9, f"largest difference {difference:.1e}"
        monkeypatch.setattr(train_base, "sample", lambda mean, logvar, draws: mean)
        monkeypatch.setattr(train_base, "reconstruction", lambda y, *given: seen.append(y) or (None, {}))
        train_base.vae_loss(vae, [x], None, None, 0.1)
        difference = (seen[0] - vae.decode(z * factor)).abs().max().item()
    assert difference < 1e-9, f"largest difference {difference:.1e}"


def test_a_wan_vae_that_is_trained_on_is_trained_as_it_decodes_whatever_its_latents_scale():
    torch.manual_seed(0)
    scaled, plain = (WanVAE(WanVAEConfig(base_dim=4, num_res_blocks=1, latents_mean=(m,) * 16, latents_std=(s,) * 16))
                     for m, s in ((0.7, 2.5), (0.0, 1.0)))
    plain.load_state_dict(scaled.state_dict())
    x = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    assert torch.allclose(scaled.decode(scaled.encode(x)), plain.decode(plain.encode(x)), atol=1e-5)
    losses = [train_base.vae_loss(vae, [x], torch.Generator().manual_seed(1), lambda y, x: (y - x).abs(), 0.1)[0].item()
              for vae in (scaled, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("family", ["cogvideox", "wan"])
def test_crops_of_a_length_that_the_vae_would_pad_are_refused(family):
    with pytest.raises(ValueError, match="sizes: wanted crops of as many frames as .*VAE takes whole, got 10"):
        train_base.posterior(small_base.new_vae(family), torch.zeros(1, 3, 10, 16, 16))


def test_latents_are_scaled_to_a_standard_deviation_of_about_one(folder):
    vae = CogVideoXVAE.from_pretrained(folder / "out" / "base", "vae")
    with torch.no_grad():
        z = torch.cat([vae.encode(Pairs(folder / "pairs", 9).read(i, lambda n: 0)[1][None]) for i in range(3)])
    assert 0.8 < z.std() < 1.25 and vae.config.scaling_factor != CogVideoXVAEConfig().scaling_factor, z.std()


def test_every_pair_is_encoded_as_it_is_and_mirrored(folder):
    vae, pairs = CogVideoXVAE.from_pretrained(folder / "out" / "base", "vae"), Pairs(folder / "pairs", 9)
    z = weights.load_tensors(folder / "runs" / "latents.safetensors")[0]["z"]
    assert z.shape == (6, 2, 16, 3, 4, 6) and z.dtype == torch.float16
    for i in range(3):
        x_ni, x_gt = pairs.read(i, lambda n: 0)
        for side, x in enumerate((x_ni, x_gt)):
            for mirrored in (0, 1):
                with torch.no_grad():
                    wanted = vae.encode((x.flip(-1) if mirrored else x)[None])[0]
                off = (z[2 * i + mirrored, side].float() - wanted).abs().max() / wanted.abs().max()
                assert off < 1e-3, f"pair {i}, side {side}, mirrored {mirrored}: {off:.1e} off"


def test_latents_of_other_pairs_other_contents_or_another_vae_are_refused(folder, tmp_path):
    shutil.copytree(folder / "pairs", tmp_path / "pairs")
    file = folder / "runs" / "latents.safetensors"

    def latents(change=lambda vae: None):
        vae = CogVideoXVAE.from_pretrained(folder / "out" / "base", "vae")
        with torch.no_grad():
            change(vae)
        return Latents(Pairs(tmp_path / "pairs", 9), vae, train_base.Recipe(1, 1), file)
    assert len(latents().z) == 6, "wherever the pairs are"
    refused = pytest.raises(ValueError, match="latents.safetensors: wanted latents of .*: remove it, or name another")
    with refused:
        latents(lambda vae: vae.encoder.conv_in.conv.weight[0, 0, 0, 0, 0].add_(1))
    with refused:
        latents(lambda vae: setattr(vae.config, "scaling_factor", 2.0))
    before = (tmp_path / "pairs" / "1.safetensors").read_bytes()
    (tmp_path / "pairs" / "1.safetensors").write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with refused:
        latents()
    (tmp_path / "pairs" / "1.safetensors").unlink()
    with refused:
        latents()


def test_clips_of_different_sizes_are_refused_by_name(folder, tmp_path):
    vae = CogVideoXVAE.from_pretrained(folder / "out" / "base", "vae")
    for name, width in (("a", 48), ("b", 64)):
        x = torch.zeros(3, 9, 32, width, dtype=torch.uint8)
        weights.save_tensors(tmp_path / f"{name}.safetensors", {"x_ni": x, "x_gt": x.clone()})
    with pytest.raises(ValueError, match="b.safetensors: wanted clips of one size"):
        Latents(Pairs(tmp_path, 9), vae, train_base.Recipe(1, 1), tmp_path / "z")


def test_a_new_transformer_says_nothing_whatever_it_is_given(monkeypatch):
    monkeypatch.setattr(small_base, "DIT", SMALL_DIT)
    torch.manual_seed(0)
    model, x, text = small_base.new_transformer(), torch.randn(2, 16, 3, 4, 6), torch.randn(2, 1, 16)
    with torch.no_grad():
        assert model(x, 199, text).abs().max() == 0
        torch.nn.init.normal_(model.proj_out.weight)
        before = model(x, 199, text)
        for block in model.transformer_blocks:  # their gates are shut: what they compute does not matter
            torch.nn.init.normal_(block.ff.net["2"].weight)
            torch.nn.init.normal_(block.attn1.to_out[0].weight)
        assert before.abs().max() > 0 and torch.equal(model(x, 199, text), before)


def test_a_new_wan_transformer_says_nothing_whatever_it_is_given():
    torch.manual_seed(0)
    model, x, text = small_base.new_transformer("wan"), torch.randn(1, 16, 1, 4, 6), torch.randn(1, 1, 16)
    with torch.no_grad():
        assert model(x, 200, text).abs().max() == 0
        torch.nn.init.normal_(model.proj_out.weight)
        before = model(x, 200, text)
        for block in model.blocks:  # their gates are shut
            torch.nn.init.normal_(block.ffn.net[2].weight)
            torch.nn.init.normal_(block.attn1.to_out[0].weight)
        assert before.abs().max() > 0 and torch.equal(model(x, 200, text), before)


def test_without_a_schedule_the_losses_are_those_of_a_flow():
    z_ni, z_gt, v = torch.randn(3, 2, 16, 3, 4, 6)
    got = train_base.one_step_loss(lambda z, t, text: v, (z_ni, z_gt), None, None)[1]["z"]
    assert abs(got - (z_ni - v - z_gt).square().mean()) < 1e-5
    again, seen = torch.Generator().manual_seed(3), []
    t, eps = torch.randint(1000, (2,), generator=again), torch.randn(2, 16, 3, 4, 6, generator=again)
    got = train_base.prior_loss(lambda z, t, text: seen.append((z, t)) or v, (z_ni, z_gt),
                                torch.Generator().manual_seed(3), None)[1]["v"]
    sigma = t.view(2, 1, 1, 1, 1) / 1000
    assert torch.equal(seen[0][1], t) and torch.allclose(seen[0][0], (1 - sigma) * z_gt + sigma * eps, atol=1e-5)
    assert abs(got - (v - (eps - z_gt)).square().mean()) < 1e-5


def test_the_losses_are_their_formulas(folder):
    draws, table = torch.Generator().manual_seed(3), train_base.alpha_bar()
    z_ni, z_gt = torch.randn(2, 2, 16, 3, 4, 6)
    v = torch.randn(2, 16, 3, 4, 6)
    a = float(table[199])
    wanted = (a**0.5 * z_ni - (1 - a) ** 0.5 * v - z_gt).square().mean()
    got = train_base.one_step_loss(lambda z, t, text: v, (z_ni, z_gt), draws, table)[1]["z"]
    assert abs(got - wanted) < 1e-5
    again = torch.Generator().manual_seed(3)
    t, eps = torch.randint(1000, (2,), generator=again), torch.randn(2, 16, 3, 4, 6, generator=again)
    a = table[t].float().view(2, 1, 1, 1, 1)
    seen = []
    got = train_base.prior_loss(lambda z, t, text: seen.append((z, t)) or v, (z_ni, z_gt),
                                torch.Generator().manual_seed(3), table)[1]["v"]
    assert torch.equal(seen[0][1], t) and torch.allclose(seen[0][0], a**0.5 * z_gt + (1 - a) ** 0.5 * eps, atol=1e-5)
    assert abs(got - (v - (a**0.5 * eps - (1 - a) ** 0.5 * z_gt)).square().mean()) < 1e-5
    mean, logvar = torch.randn(4, 5), torch.randn(4, 5)
    normal, posterior = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(mean, (logvar / 2).exp())
    assert abs(train_base.kl(mean, logvar) - torch.distributions.kl_divergence(posterior, normal).mean()) < 1e-5


def test_a_stage_resumes_and_ends_bit_equal_and_a_longer_one_is_another_run(folder, tmp_path, monkeypatch):
    for name in ("VAE", "DIT"):
        monkeypatch.setattr(small_base, name, {"VAE": SMALL_VAE, "DIT": SMALL_DIT}[name])
    save = checkpoint.save

    def killed(*given):
        save(*given)
        raise KeyboardInterrupt
    for name in ("pairs", "squeezenet1_1_features.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.setattr(checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "vae", steps=2, every=1)
    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(ValueError, match="belongs to another run, 1 things differ: steps: then 2, now 3"):
        train(tmp_path, "vae", steps=3, every=1)
    train(tmp_path, "vae", steps=2, every=2)
    one, two = (weights.load_tensors(where / "out/base/vae/diffusion_pytorch_model.safetensors")[0]
                for where in (folder, tmp_path))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
