"""AutoencoderKL against diffusers' own, live, on small random weights and on the official configs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mirage_min.networks.vae_2d import AutoencoderKL, AutoencoderKLConfig
from mirage_min.networks.weights import read_config
from tests.torchvision_stub import stub

stub()
diffusers = pytest.importorskip("diffusers", reason="parity is measured against diffusers: pip install diffusers")

CONFIGS = Path(__file__).parents[2] / "shared" / "checkpoint_configs"
WIDTHS = (16, 32, 32, 48)
SIZES = [(1, 32, 48), (2, 33, 47), (1, 24, 17)]  # N, H, W; each halving of 33 x 47 meets an odd size


def published(seed=0, **changes):
    """diffusers' AutoencoderKL, small and random, in float64; norms and biases too are off their start values."""
    torch.manual_seed(seed)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    small = {"block_out_channels": WIDTHS, "layers_per_block": 2, "norm_num_groups": 8, "scaling_factor": 0.13025}
    vae = diffusers.AutoencoderKL(**blocks | small | changes).double().eval()
    with torch.no_grad():
        for p in vae.parameters():
            p.add_(torch.randn_like(p) * (0.2 if p.ndim == 1 else 0.02))
    return vae


@pytest.fixture
def pair(tmp_path):
    """Makes (diffusers' VAE, ours loaded from what diffusers saved)."""
    def make(**changes):
        theirs = published(**changes)
        theirs.save_pretrained(tmp_path)
        return theirs, AutoencoderKL.from_pretrained(tmp_path)
    return make


def assert_equal_in_float64(what, ours, theirs):
    difference, tolerance = (ours - theirs).abs().max().item(), 1e-5 * theirs.std().item()
    assert ours.shape == theirs.shape, f"{what}: {list(ours.shape)}, diffusers {list(theirs.shape)}"
    assert difference <= tolerance, f"{what}: largest difference {difference:.1e}, tolerance {tolerance:.1e}"


def their_mids(vae, x):
    """The inputs of diffusers' downsamplers, seen by hooks on a whole encode."""
    seen = []
    hooks = [block.downsamplers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
             for block in vae.encoder.down_blocks[:-1]]
    vae.encode(x)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def test_norms_of_hardly_any_contrast_are_the_published_ones(pair):
    """Where the variance is that of the norms' epsilon, which decides then."""
    theirs, ours = pair()
    norms = {name: layer for name, layer in theirs.named_modules() if isinstance(layer, torch.nn.GroupNorm)}
    assert len(norms) > 20
    for name, norm in norms.items():
        x = 1e-3 * torch.randn(1, norm.num_channels, 5, 7, dtype=torch.float64)
        assert_equal_in_float64(name, ours.get_submodule(name)(x), norm(x))


@pytest.mark.parametrize(("N", "H", "W"), SIZES)
@torch.no_grad()
def test_encode_decode_and_mids_equal_the_published_ones_in_float64(pair, N, H, W):
    theirs, ours = pair()
    for vae in (theirs, ours):
        vae.quant_conv.bias[-2:] += torch.tensor([99.0, -99.0])  # both ends of the clamp of the log-variance
    x = torch.rand(N, 3, H, W, dtype=torch.float64) * 2 - 1
    posterior = theirs.encode(x).latent_dist
    z = ours.encode(x)
    assert_equal_in_float64("encode", z, posterior.mean * 0.13025)
    assert_equal_in_float64("decode", ours.decode(z), theirs.decode(posterior.mean).sample)
    mean, logvar = ours.posterior(x)
    assert_equal_in_float64("posterior mean", mean, posterior.mean)
    assert_equal_in_float64("posterior log-variance", logvar, posterior.logvar)
    mids, wanted = ours.mids(x), their_mids(theirs, x)
    assert len(mids) == len(wanted) == 3
    for i, (m, w) in enumerate(zip(mids, wanted)):
        assert_equal_in_float64(f"mids[{i}]", m, w)


@torch.no_grad()
def test_float32_stays_within_1e_5_rms_of_the_published_float32(pair):
    theirs, ours = (vae.float() for vae in pair())
    x = torch.rand(2, 3, 33, 47) * 2 - 1
    mean = theirs.encode(x).latent_dist.mean
    for what, a, b in [("encode", ours.encode(x), mean * 0.13025),
                       ("decode", ours.decode(mean * 0.13025), theirs.decode(mean).sample),
                       ("mids[1]", ours.mids(x)[1], their_mids(theirs, x)[1])]:
        rms, tolerance = ((a - b).square().mean().sqrt() / b.std()).item(), 1e-5
        assert rms <= tolerance, f"{what}: RMS difference {rms:.1e} of the std, tolerance {tolerance:.1e}"


@torch.no_grad()
def test_bfloat16_stays_within_bf16_rounding_of_float32(pair):
    theirs, ours = (vae.float() for vae in pair())
    x = torch.rand(1, 3, 40, 24) * 2 - 1
    z = ours.encode(x)
    wanted = [z, ours.decode(z), *ours.mids(x)]
    theirs, ours, x, z = (v.bfloat16() for v in (theirs, ours, x, z))
    given = [ours.encode(x), ours.decode(z), *ours.mids(x)]
    published = [theirs.encode(x).latent_dist.mean * 0.13025, theirs.decode(z / 0.13025).sample, *their_mids(theirs, x)]
    for what, g, p, w in zip(["encode", "decode", "mids[0]", "mids[1]", "mids[2]"], given, published, wanted):
        assert g.dtype == torch.bfloat16
        rms, rms_published = (((v.float() - w).square().mean().sqrt() / w.std()).item() for v in (g, p))
        bound = min(2**-4, 1.25 * rms_published)  # 2^-4: sixteen roundings of 2^-8, through some sixty layers
        assert rms <= bound, f"{what}: RMS {rms:.1e} of the std, diffusers' own {rms_published:.1e}, bound {bound:.1e}"


def test_the_gradient_of_the_input_equals_the_published_one(pair):
    theirs, ours = pair()
    x = (torch.rand(1, 3, 25, 32, dtype=torch.float64) * 2 - 1).requires_grad_()
    mean = theirs.encode(x).latent_dist.mean
    (wanted,) = torch.autograd.grad(theirs.decode(mean).sample.square().mean() + mean.square().mean(), x)
    z = ours.encode(x)
    (given,) = torch.autograd.grad(ours.decode(z).square().mean() + (z / 0.13025).square().mean(), x)
    assert_equal_in_float64("gradient", given, wanted)


def test_mids_runs_no_more_of_the_encoder_than_it_returns():
    vae = AutoencoderKL(AutoencoderKLConfig(block_out_channels=WIDTHS, norm_num_groups=8))
    ran = []
    for name, module in vae.named_modules():
        module.register_forward_hook(lambda m, a, y, name=name: ran.append(name))
    with torch.no_grad():
        x = torch.rand(1, 3, 16, 16)
        two, ran_for_two = vae.mids(x, count=2), set(ran)
        three = vae.mids(x)
    assert [list(m.shape) for m in two] == [[1, 16, 16, 16], [1, 32, 8, 8]]
    assert all(torch.equal(a, b) for a, b in zip(two, three))
    beyond = {n for n in ran_for_two if n.startswith(("encoder.down_blocks.1.down", "encoder.down_blocks.2",
                                                      "encoder.mid_block", "quant_conv"))}
    assert not beyond, f"two features do not need {sorted(beyond)}"
    for count in (0, 4):
        with pytest.raises(ValueError, match=f"1 to 3.*got {count}"):
            vae.mids(x, count=count)


@pytest.mark.parametrize(("N", "h", "w"), [(1, 4, 6), (2, 5, 3)])
@torch.no_grad()
def test_the_inputs_of_the_down_blocks_are_given_and_skips_enter_before_the_up_blocks(pair, N, h, w):
    """img2img-turbo's and Difix's wiring, against hooks on diffusers' own blocks."""
    theirs, ours = pair()
    x = torch.rand(N, 3, 8 * h, 8 * w, dtype=torch.float64) * 2 - 1
    seen, skips = [], [torch.randn(N, c, s * h, s * w, dtype=torch.float64) for c, s in ((48, 1), (48, 2), (32, 4),
                                                                                         (32, 8))]
    for block in theirs.encoder.down_blocks:
        block.register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    for block, skip in zip(theirs.decoder.up_blocks, skips):
        block.register_forward_pre_hook(lambda block, args, skip=skip: (args[0] + skip, *args[1:]))
    mean = theirs.encode(x).latent_dist.mean
    z, features = ours.encode_with_features(x)
    assert torch.equal(z, ours.encode(x))
    assert_equal_in_float64("z", z, mean * 0.13025)
    assert len(features) == len(seen) == 4
    for i, (f, s) in enumerate(zip(features, seen)):
        assert_equal_in_float64(f"features[{i}]", f, s)
    wanted = theirs.decode(mean).sample
    assert_equal_in_float64("decode with skips", ours.decode(z, skips), wanted)
    assert_equal_in_float64("skips made on the way", ours.decode(z, (skip for skip in skips)), wanted)
    assert (ours.decode(z) - wanted).abs().max() > 0.1 * wanted.std()
    assert ours.skip_channels() == [(f.shape[1], s.shape[1]) for f, s in zip(reversed(features), skips)]
    with pytest.raises(ValueError, match="skip must have the shape"):
        ours.decode(z, skips[1:])


def test_official_skips_are_those_of_img2img_turbo():
    with torch.device("meta"):
        vae = AutoencoderKL(AutoencoderKLConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2))
    assert vae.skip_channels() == [(512, 512), (256, 512), (128, 512), (128, 256)]


def test_both_spellings_of_the_attention_keys_load_and_agree(tmp_path):
    published().save_pretrained(tmp_path / "new")
    (tmp_path / "old").mkdir()
    state = load_file(tmp_path / "new" / "diffusion_pytorch_model.safetensors")
    spelling = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, tensor in state.items():
        for new, old in spelling.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        renamed[key] = tensor
    assert len(renamed.keys() - state.keys()) == 16  # 4 layers with weight and bias, in the encoder and in the decoder
    save_file(renamed, tmp_path / "old" / "diffusion_pytorch_model.safetensors")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    new, old = (AutoencoderKL.from_pretrained(tmp_path / name).state_dict() for name in ("new", "old"))
    assert new.keys() == old.keys() and all(torch.equal(new[key], old[key]) for key in new)


@torch.no_grad()
def test_a_config_with_the_few_fields_of_2022_means_the_published_defaults(tmp_path):
    theirs = published(scaling_factor=0.18215)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    few = ["_class_name", "act_fn", "block_out_channels", "down_block_types", "in_channels", "latent_channels",
           "layers_per_block", "norm_num_groups", "out_channels", "sample_size", "up_block_types"]
    (tmp_path / "config.json").write_text(json.dumps({name: config[name] for name in few}))
    x = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    assert_equal_in_float64("encode", AutoencoderKL.from_pretrained(tmp_path).encode(x),
                            theirs.encode(x).latent_dist.mean * 0.18215)


@pytest.mark.parametrize("changes", [
    {"use_quant_conv": False, "latent_channels": 16}, {"use_post_quant_conv": False},
    {"mid_block_add_attention": False},
    {"block_out_channels": (16, 32), "layers_per_block": 1, "down_block_types": ["DownEncoderBlock2D"] * 2,
     "up_block_types": ["UpDecoderBlock2D"] * 2}],
    ids=["no quant_conv, 16 latents", "no post_quant_conv", "no attention", "two stages"])
@torch.no_grad()
def test_the_other_shapes_of_the_network_equal_the_published_ones(pair, changes):
    theirs, ours = pair(**changes)
    x = torch.rand(1, 3, 24, 40, dtype=torch.float64) * 2 - 1
    mean = theirs.encode(x).latent_dist.mean
    assert_equal_in_float64("encode", ours.encode(x), mean * 0.13025)
    assert_equal_in_float64("decode", ours.decode(mean * 0.13025), theirs.decode(mean).sample)


SD = {"_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512], "in_channels": 3,
      "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "latent_channels": 4,
      "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3, "force_upcast": True}
OFFICIAL = {"sd-vae-ft-mse": None,  # read from its file
            "sd-turbo": SD | {"sample_size": 768, "scaling_factor": 0.18215, "latents_mean": None, "latents_std": None},
            "sdxl": SD | {"sample_size": 1024, "scaling_factor": 0.13025}}


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_official_configs_give_the_published_keys_and_shapes(name):
    config = OFFICIAL[name]
    if config is None:
        file = CONFIGS / f"{name}.json"
        if not file.is_file():
            pytest.skip(f"needs {file.name} among the shared checkpoint configs")
        config = json.loads(file.read_text())
    with torch.device("meta"):
        ours = AutoencoderKL(read_config(AutoencoderKL, config, name)).state_dict()
        theirs = diffusers.AutoencoderKL.from_config(config).state_dict()
    shapes = [{key: tuple(tensor.shape) for key, tensor in state.items()} for state in (ours, theirs)]
    assert shapes[0] == shapes[1], f"differ at {sorted(set(shapes[0].items()) ^ set(shapes[1].items()))[:5]}"


@pytest.mark.parametrize(("name", "value"), [
    ("act_fn", "relu"), ("down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
    ("shift_factor", 0.1159), ("latents_mean", [0.0] * 4), ("norm_type", "spatial")])
def test_a_field_that_would_change_the_result_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        read_config(AutoencoderKL, SD | {name: value}, "config.json")
