"""train_base.py: its four stages make a base that loads, one after the other, and encode every pair both ways round."""

import argparse
import json

import pytest
import torch

import train_base
from mirage_min.data.pairs import Pairs
from mirage_min.method import perceptual
from mirage_min.networks import weights
from mirage_min.networks.dit_cogvideox import CogVideoXDiTConfig
from mirage_min.networks.vae_2d import AutoencoderKL
from mirage_min.networks.vae_cogvideox import CogVideoXVAE, CogVideoXVAEConfig
from mirage_min.systems.mirage import Mirage

SMALL_VAE = CogVideoXVAEConfig(block_out_channels=(4, 4, 8, 8), norm_num_groups=4, layers_per_block=1)
SMALL_DIT = CogVideoXDiTConfig(num_attention_heads=1, num_layers=2, time_embed_dim=8, text_embed_dim=16,
                               max_text_seq_length=1, sample_height=4, sample_width=6,
                               use_rotary_positional_embeddings=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three pairs of 9 frames of 32 x 48, random backbones, and the base after all four stages."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    weights.save_tensors(folder / "squeezenet1_1_features.safetensors", perceptual.squeezenet().state_dict())
    (folder / "pairs").mkdir()
    for i in range(3):
        x = torch.randint(0, 256, (2, 3, 9, 32, 48), dtype=torch.uint8)
        weights.save_tensors(folder / "pairs" / f"{i}.safetensors", {"x_ni": x[0], "x_gt": x[1]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_base, "SMALL_VAE", SMALL_VAE)
        patch.setattr(train_base, "SMALL_DIT", SMALL_DIT)
        for stage in ("vae", "vae_2d", "prior", "one_step"):
            train(folder, stage, steps=2)
            (folder / stage).mkdir()
            for file in (folder / "out").rglob("*.safetensors"):
                (folder / stage / file.parent.name).write_bytes(file.read_bytes())
    return folder


def train(folder, stage, **settings):
    args = argparse.Namespace(stage=stage, data=folder / "pairs", real=None, perceptual=folder, out=folder / "out",
                              runs=folder / "runs")
    recipe = dict(batch=2, height=32, width=32, warmup=1, bf16=False) | settings
    train_base.main(args, train_base.Recipe(**recipe))


def test_each_stage_trains_its_own_network_and_leaves_the_others_alone(folder):
    made = [{p.name: p.read_bytes() for p in (folder / stage).iterdir()}
            for stage in ("vae", "vae_2d", "prior", "one_step")]
    assert [sorted(files) for files in made] == [["vae"], ["vae", "vae_2d"]] + 2 * [["transformer", "vae", "vae_2d"]]
    for before, after in zip(made, made[1:]):
        assert all(before[name] == after[name] for name in before if name != "transformer")
    assert made[2]["transformer"] != made[3]["transformer"], "one_step goes on from the prior"


def test_the_base_loads_as_published_ones_do_and_mirage_stands_on_it(folder):
    vae = CogVideoXVAE.from_pretrained(folder / "out" / "base", "vae")
    mirage = Mirage.from_base(folder / "out" / "base", folder / "out" / "vae_2d")
    assert isinstance(mirage.vae2d, AutoencoderKL) and mirage.vae.config == vae.config
    assert mirage(torch.zeros(1, 3, 9, 32, 48)).shape == (1, 3, 9, 32, 48)
    config = json.loads((folder / "out" / "base" / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == "v_prediction" and abs(float(mirage.alpha_bar[199]) - 0.7387) < 1e-4


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


def test_latents_of_other_pairs_or_of_another_vae_are_refused(folder, tmp_path):
    vae, pairs = CogVideoXVAE.from_pretrained(folder / "out" / "base", "vae"), Pairs(folder / "pairs", 9)
    file = folder / "runs" / "latents.safetensors"
    assert len(train_base.Latents(pairs, vae, train_base.Recipe(1, 1), file).z) == 6
    pairs.names = pairs.names[:2]
    with pytest.raises(ValueError, match="latents.safetensors: wanted latents of .*'pairs': '2'.*, got .*'pairs': '3'"):
        train_base.Latents(pairs, vae, train_base.Recipe(1, 1), file)
    with torch.no_grad():
        vae.encoder.conv_in.conv.weight[0, 0, 0, 0, 0] += 1
    with pytest.raises(ValueError, match="wanted latents of"):
        train_base.Latents(Pairs(folder / "pairs", 9), vae, train_base.Recipe(1, 1), file)


def test_clips_of_different_sizes_are_refused_by_name(folder, tmp_path):
    vae = CogVideoXVAE.from_pretrained(folder / "out" / "base", "vae")
    for name, width in (("a", 48), ("b", 64)):
        x = torch.zeros(3, 9, 32, width, dtype=torch.uint8)
        weights.save_tensors(tmp_path / f"{name}.safetensors", {"x_ni": x, "x_gt": x.clone()})
    with pytest.raises(ValueError, match="b.safetensors: wanted clips of one size"):
        train_base.Latents(Pairs(tmp_path, 9), vae, train_base.Recipe(1, 1), tmp_path / "z")


def test_a_new_transformer_says_nothing_whatever_it_is_given(monkeypatch):
    monkeypatch.setattr(train_base, "SMALL_DIT", SMALL_DIT)
    torch.manual_seed(0)
    model, x, text = train_base.new_transformer(), torch.randn(2, 16, 3, 4, 6), torch.randn(2, 1, 16)
    with torch.no_grad():
        assert model(x, 199, text).abs().max() == 0
        torch.nn.init.normal_(model.proj_out.weight)
        before = model(x, 199, text)
        for block in model.transformer_blocks:  # their gates are shut: what they compute does not matter
            torch.nn.init.normal_(block.ff.net["2"].weight)
            torch.nn.init.normal_(block.attn1.to_out[0].weight)
        assert before.abs().max() > 0 and torch.equal(model(x, 199, text), before)


def test_the_losses_are_their_formulas(folder):
    draws, table = torch.Generator().manual_seed(3), train_base.alpha_bar()
    z_ni, z_gt = torch.randn(2, 2, 16, 3, 4, 6)
    v = torch.randn(2, 16, 3, 4, 6)
    a = float(table[199])
    wanted = (a**0.5 * z_ni - (1 - a) ** 0.5 * v - z_gt).square().mean()
    got = train_base.one_step_loss(lambda z, t, text: v, (z_ni, z_gt), draws, table)["z"]
    assert abs(got - wanted) < 1e-5
    again = torch.Generator().manual_seed(3)
    t, eps = torch.randint(1000, (2,), generator=again), torch.randn(2, 16, 3, 4, 6, generator=again)
    a = table[t].float().view(2, 1, 1, 1, 1)
    seen = []
    got = train_base.prior_loss(lambda z, t, text: seen.append((z, t)) or v, (z_ni, z_gt),
                                torch.Generator().manual_seed(3), table)["v"]
    assert torch.equal(seen[0][1], t) and torch.allclose(seen[0][0], a**0.5 * z_gt + (1 - a) ** 0.5 * eps, atol=1e-5)
    assert abs(got - (v - (a**0.5 * eps - (1 - a) ** 0.5 * z_gt)).square().mean()) < 1e-5
    mean, logvar = torch.randn(4, 5), torch.randn(4, 5)
    normal, posterior = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(mean, (logvar / 2).exp())
    assert abs(train_base.kl(mean, logvar) - torch.distributions.kl_divergence(posterior, normal).mean()) < 1e-5
