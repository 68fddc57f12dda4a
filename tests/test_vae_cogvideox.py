"""The CogVideoX VAE is the published network: live parity, official groups, prefixes, causality (Mirage Table 5)."""

import json
from pathlib import Path

import pytest
import torch

from mirage_min.method import injection
from mirage_min.networks import frugal
from mirage_min.networks.vae_cogvideox import CogVideoXVAE, CogVideoXVAEConfig
from tests.torchvision_stub import stub

stub()
from diffusers import AutoencoderKLCogVideoX  # noqa: E402

from mirage_min.training.memory import LiveBytes  # noqa: E402

CONFIGS = Path(__file__).parents[2] / "shared" / "checkpoint_configs"
SMALL = dict(block_out_channels=(8, 16, 16, 24), layers_per_block=1, norm_num_groups=4, latent_channels=4,
             scaling_factor=0.7)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """diffusers' model, small and random, and ours loaded from what it saved."""
    torch.manual_seed(0)
    published = AutoencoderKLCogVideoX(**SMALL).eval()
    with torch.no_grad():
        for p in published.parameters():  # norms and biases too, or a swapped one would go unnoticed
            p.copy_(torch.randn_like(p) * 0.3 + 1 if p.dim() == 1 else torch.randn_like(p) * (2 / p[0].numel()) ** 0.5)
    folder = tmp_path_factory.mktemp("vae")
    published.save_pretrained(folder)
    return published, CogVideoXVAE.from_pretrained(folder)


def compare(name, ours, published, dtype):
    assert ours.shape == published.shape, f"{name}: shape {list(ours.shape)}, published {list(published.shape)}"
    error = (ours - published).abs().max() if dtype == torch.float64 else (ours - published).square().mean().sqrt()
    error = (error / published.std()).item()
    kind = "largest" if dtype == torch.float64 else "RMS"
    assert error <= 1e-5, f"{name}: {kind} difference {error:.1e} of the std, allowed 1e-5"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("B, T, H, W", [(2, 1, 16, 24), (1, 5, 16, 16), (1, 8, 16, 24), (2, 9, 37, 51), (1, 13, 16, 16),
                                        (1, 17, 16, 24), (1, 33, 16, 16)])
def test_encode_and_decode_equal_the_published_network(pair, dtype, B, T, H, W):
    published, ours = (m.to(dtype) for m in pair)
    x = torch.rand(B, 3, T, H, W, dtype=dtype, generator=torch.Generator().manual_seed(T)) * 2 - 1
    with torch.no_grad():
        z = published.encode(x).latent_dist.mean * 0.7
        compare("z", ours.encode(x), z, dtype)
        compare("x", ours.decode(z), published.decode(z / 0.7).sample, dtype)


@torch.no_grad()
def test_a_clip_comes_back_at_its_own_size_where_it_fills_whole_cells_and_groups(pair):
    """And nowhere else, as the docstring of `posterior` says: rows and columns are dropped, frames dropped or added."""
    vae = pair[1].float()
    for T in range(1, 18):
        back = vae.decode(vae.encode(torch.zeros(1, 3, T, 8, 8))).shape[2]
        assert (back == T) == (T % 8 in (0, 1)), f"{T} frames come back as {back}"
    assert vae.encode(torch.zeros(1, 3, 1, 23, 17)).shape[3:] == (2, 2)


@pytest.mark.parametrize("widths", [(8, 16), (8, 16, 16), (8, 16, 16, 24, 24)])
def test_another_number_of_changes_of_size_is_refused(widths):
    """Features enter the last two of four stages, and a latent cell is 8 pixels wide everywhere."""
    with pytest.raises(ValueError, match=r"block_out_channels must be 4 numbers.*got \[8, 16"):
        CogVideoXVAEConfig(block_out_channels=widths)


def test_features_are_cut_into_the_groups_of_frames_that_the_latents_decode_to(pair):
    vae = pair[1].float()
    for F in range(1, 12):
        frames = vae.encode_groups(4 * F - 3 * (F % 2))
        z = torch.zeros(1, 4, F, 1, 1)
        with torch.no_grad():
            lengths = [vae.decode_group(z[:, :, g])[0].shape[2] for g in vae.decode_groups(F)]
        assert [g.stop - g.start for g in frames] == lengths


@pytest.mark.parametrize("F", [1, 2, 3, 4, 6, 7])
def test_any_number_of_latents_decodes_as_published(pair, F):
    published, ours = (m.double() for m in pair)
    z = torch.randn(1, 4, F, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(F))
    with torch.no_grad():
        compare("x", ours.decode(z), published.decode(z / 0.7).sample, torch.float64)


def test_gradients_with_respect_to_the_input_equal_the_published_ones(pair):
    published, ours = (m.double() for m in pair)
    x = (torch.rand(1, 3, 17, 16, 16, dtype=torch.float64) * 2 - 1).requires_grad_()
    weight = torch.randn(1, 3, 17, 16, 16, dtype=torch.float64)
    wanted, = torch.autograd.grad((published.decode(published.encode(x).latent_dist.mean).sample * weight).sum(), x)
    given, = torch.autograd.grad((ours.decode(ours.encode(x)) * weight).sum(), x)
    compare("dx", given, wanted, torch.float64)


def test_bfloat16_stays_within_its_rounding_of_float32(pair):
    ours = pair[1].float()
    x = torch.rand(1, 3, 9, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        z, y = ours.encode(x), ours.decode(ours.encode(x))
        half = ours.to(torch.bfloat16)
        z_half = half.encode(x.bfloat16())
        y_half = half.decode(z.bfloat16())
    ours.float()
    for name, a, b in (("z", z_half, z), ("x", y_half, y)):
        error = ((a.float() - b).square().mean().sqrt() / b.std()).item()
        assert 1e-4 < error < 0.05, f"{name}: bfloat16 differs by RMS {error:.1e} of the std, allowed 5e-2"


def test_diffusers_loads_what_we_save(pair, tmp_path):
    ours = pair[1].float()
    ours.save_pretrained(tmp_path)
    again = AutoencoderKLCogVideoX.from_pretrained(tmp_path)
    z = torch.randn(1, 4, 3, 2, 2)
    with torch.no_grad():
        difference = (again.decode(z / again.config.scaling_factor).sample - ours.decode(z)).abs().max()
    assert difference < 1e-4, f"largest difference {difference:.1e}, allowed 1e-4"


@pytest.mark.parametrize("name", ["cogvideox-2b", "cogvideox-5b", "cogvideox1.5-5b"])
def test_official_configs_have_the_published_keys_and_shapes(name):
    file = CONFIGS / f"{name}.vae.json"
    if not file.exists():
        pytest.skip(f"needs {file.name}, the official config")
    from mirage_min.networks import weights
    config = json.loads(file.read_text())
    with torch.device("meta"):
        ours = CogVideoXVAE(weights.read_config(CogVideoXVAE, config, file))
        published = AutoencoderKLCogVideoX.from_config(config)
    shapes = [{k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (ours, published)]
    assert shapes[0] == shapes[1]


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return CogVideoXVAE(CogVideoXVAEConfig(**SMALL)).double().eval().requires_grad_(False)


def test_groups_are_the_official_ones(vae):
    lengths = lambda groups: [g.stop - g.start for g in groups]  # noqa: E731
    assert [lengths(vae.encode_groups(T)) for T in (1, 5, 8, 9, 15, 16, 17, 33)] == [
        [1], [5], [8], [9], [15], [8, 8], [9, 8], [9, 8, 8, 8]]
    assert [lengths(vae.decode_groups(F)) for F in (1, 2, 3, 4, 5, 9)] == [[1], [2], [3], [2, 2], [3, 2], [3, 2, 2, 2]]


def test_legal_lengths_encode_and_decode_to_themselves(vae):
    assert [vae.legal_length(T) for T in (1, 2, 8, 9, 10, 17, 18)] == [1, 9, 9, 9, 17, 17, 25]
    for T in (1, 9, 17):
        assert vae.decode(vae.encode(torch.zeros(1, 3, T, 16, 16, dtype=torch.float64))).shape[2] == T


@pytest.mark.parametrize("T, prefix", [(33, 17), (33, 9), (24, 16), (22, 14)])
def test_prefixes_with_the_same_first_group_agree(vae, T, prefix):
    x = torch.rand(1, 3, T, 16, 16, dtype=torch.float64) * 2 - 1
    z, short = vae.encode(x), vae.encode(x[:, :, :prefix])
    assert torch.equal(z[:, :, : short.shape[2]], short)
    y, short = vae.decode(z), vae.decode(short)
    assert torch.equal(y[:, :, : short.shape[2]], short)


def test_the_grouping_is_part_of_the_network(vae):
    """GroupNorm spans a group: one shot and official groups must differ, or the groups are not what they claim."""
    x = torch.rand(1, 3, 17, 16, 16, dtype=torch.float64) * 2 - 1
    one_shot, _ = vae.encode_group(x)
    assert (one_shot - vae.encode(x)).abs().max() > 1e-3


def test_no_group_sees_a_later_one(vae):
    x = torch.rand(1, 3, 25, 16, 16, dtype=torch.float64) * 2 - 1
    changed = x.clone()
    changed[:, :, 17:] += 0.5
    z, z_changed = vae.encode(x), vae.encode(changed)
    assert torch.equal(z[:, :, :5], z_changed[:, :, :5]) and not torch.equal(z[:, :, 5:], z_changed[:, :, 5:])
    y, y_changed = vae.decode(z), vae.decode(z_changed)
    assert torch.equal(y[:, :, :17], y_changed[:, :, :17])


def test_a_cache_given_is_left_alone_and_reaches_the_next_group(vae):
    z = torch.randn(1, 4, 5, 2, 2, dtype=torch.float64)
    _, cache = vae.decode_group(z[:, :, :3])
    before = {k: v.clone() for k, v in cache.items()}
    with_past, new = vae.decode_group(z[:, :, 3:], cache)
    again, _ = vae.decode_group(z[:, :, 3:], cache)
    alone, _ = vae.decode_group(z[:, :, 3:])
    assert new is not cache and all(torch.equal(cache[k], before[k]) for k in before)
    assert torch.equal(with_past, again) and not torch.allclose(with_past, alone)


def test_the_decoder_stages_have_the_shapes_of_table_5(vae):
    shapes = []
    hooks = [stage.layers[0].register_forward_pre_hook(lambda m, args: shapes.append(list(args[0].shape[1:])))
             for stage in (*vae.encoder.down_blocks[1:], vae.encoder.mid_block, *vae.decoder.up_blocks)]
    vae.decode(vae.encode(torch.zeros(1, 3, 9, 32, 48, dtype=torch.float64)))
    for hook in hooks:
        hook.remove()
    assert shapes == [[8, 5, 16, 24], [16, 3, 8, 12], [16, 3, 4, 6], [24, 3, 4, 6],
                      [24, 3, 4, 6], [24, 5, 8, 12], [16, 9, 16, 24], [16, 9, 32, 48]]


def test_features_without_fusion_blocks_are_refused(vae):
    with pytest.raises(ValueError, match="injection.attach"):
        vae.decode(torch.zeros(1, 4, 1, 2, 2, dtype=torch.float64), [torch.zeros(1, 5, 1, 16, 16)])


def test_injected_features_reach_the_group_they_belong_to(vae):
    """decode cuts inject by group: a change of the features of frames 9.. must leave frames 0..8 alone."""
    injection.attach(vae, [5, 6])
    for block in vae.fusion.double():
        torch.nn.init.normal_(block.weight, std=0.1)
    z = torch.randn(1, 4, 5, 2, 2, dtype=torch.float64)
    inject = [torch.randn(1, 5, 17, 16, 16, dtype=torch.float64), torch.randn(1, 6, 17, 8, 8, dtype=torch.float64)]
    moved = [m.clone() for m in inject]
    for m in moved:
        m[:, :, 9:] += 1
    y, y_moved = vae.decode(z, inject), vae.decode(z, moved)
    vae.fusion = None
    assert torch.equal(y[:, :, :9], y_moved[:, :, :9])
    assert ((y - y_moved)[:, :, 9:].abs().amax(dim=(0, 1, 3, 4)) > 0).all()


# ---- little memory --------------------------------------------------------------------------------------------------


def test_without_gradients_the_official_network_holds_far_less_than_the_published_one():
    """Bytes of tensors alive at once, counted on the meta device."""
    with torch.device("meta"):
        vae, reference = CogVideoXVAE(), AutoencoderKLCogVideoX(
            down_block_types=["CogVideoXDownBlock3D"] * 4, up_block_types=["CogVideoXUpBlock3D"] * 4,
            block_out_channels=(128, 256, 256, 512), layers_per_block=3)
        z, held = torch.empty(1, 16, 3, 32, 32), []
    for model in (frugal.apply(vae), reference):
        with torch.no_grad(), LiveBytes(model) as live:
            model.decode(z)
        held.append(live.peak / 2**20)
    assert held[0] <= 0.6 * held[1], f"{held[0]:.0f} MiB, published {held[1]:.0f} MiB, allowed 0.6 of it"
