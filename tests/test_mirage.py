"""Mirage, Figure 2: any length and size, in one step."""

import pytest
import torch

from mirage_min.method.one_step import alpha_bar, z0_from_v
from mirage_min.networks.vae_wan import WanVAE, WanVAEConfig
from mirage_min.systems.mirage import Mirage, explain
from tests import small


@pytest.fixture(scope="module")
def mirage():
    return small.mirage(window=3)


def clip(T, H=32, W=48, seed=0):
    return torch.rand(1, 3, T, H, W, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_forward_is_figure_2_written_out(mirage):
    x = clip(9)
    z_ni = mirage.vae.encode(x)
    z_dr = z0_from_v(z_ni, mirage.dit(z_ni, 199, mirage.text), alpha_bar()[199])
    frames = mirage.vae2d.mids(x[0].transpose(0, 1), count=2)
    wanted = mirage.vae.decode(z_dr, [f.transpose(0, 1)[None] for f in frames])
    assert torch.equal(mirage(x), wanted)


def test_change_only_adds_to_the_input_what_the_transformer_changes(mirage):
    x = clip(9, 20, 36)
    padded = mirage.pad(x)
    z_ni, features = mirage.vae.encode(padded), mirage.mids(padded)
    change = [mirage.vae.decode(z, inject=list(features)) for z in (mirage.denoise(z_ni), z_ni)]
    changing = small.mirage(window=3)
    changing.change_only = True
    assert torch.allclose(changing(x), x + (change[0] - change[1])[..., :20, :36], atol=1e-5)
    changing.denoise = lambda z: z
    assert torch.allclose(changing(x), x, atol=1e-6), "what nothing changes stays as it was"


def test_figure_2_walked_stage_by_stage_is_the_forward(mirage, capsys):
    x = clip(3, 17, 20)
    difference = (explain(mirage, x) - mirage(x)).abs().max()
    assert difference <= 1e-5, f"largest difference {difference:.1e}, allowed 1e-5"
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and sum("[1, 4, 3, 4, 4]" in line for line in lines) == 2, lines


def test_features_are_folded_back_into_time_in_order(mirage):
    """Batch and time must not mix: each clip's and frame's features are those of that frame alone."""
    x = torch.cat([clip(3, seed=1), clip(3, seed=2)])
    for i, feature in enumerate(mirage.mids(x)):
        for b in range(2):
            for t in range(3):
                alone = mirage.vae2d.mids(x[b, :, t][None])[i][0]
                assert torch.allclose(feature[b, :, t], alone, atol=1e-5), f"map {i}, clip {b}, frame {t}"


@pytest.mark.parametrize("T, H, W", [(1, 16, 16), (2, 17, 33), (8, 16, 40), (9, 31, 16), (10, 16, 16), (18, 20, 16)])
def test_any_length_and_size_comes_back_as_it_was(mirage, T, H, W):
    x = clip(T, H, W)
    assert mirage(x).shape == x.shape


def test_padding_repeats_the_last_frame_row_and_column(mirage):
    padded = mirage.pad(clip(10, 17, 30))
    assert padded.shape == (1, 3, 17, 32, 32)
    assert torch.equal(padded[:, :, :10, :17, :30], clip(10, 17, 30))
    assert torch.equal(padded[:, :, 16], padded[:, :, 9]) and torch.equal(padded[..., 31, :], padded[..., 16, :])
    assert torch.equal(padded[..., 31], padded[..., 29])


def test_the_default_window_has_at_most_nine_latents():
    vae, dit, vae2d = small.parts()
    assert Mirage(vae, dit, vae2d, torch.zeros(1, 2, 8), None).window <= 9


def test_channels_of_the_features_are_read_off_the_configurations():
    """No encoder runs while a Mirage is made, and its fusion blocks fit what the encoders make."""
    wan = WanVAE(WanVAEConfig(base_dim=4, dim_mult=(1, 3, 2, 2), num_res_blocks=1))
    vae, dit, vae2d = small.parts()
    for vae, vae2d in ((vae, vae2d), (wan, None)):
        encoder = (vae if vae2d is None else vae2d).encoder
        hook = encoder.conv_in.register_forward_pre_hook(lambda *_: pytest.fail("an encoder ran"))
        mirage = Mirage(vae, dit, vae2d, torch.zeros(1, 2, 8), None)
        hook.remove()
        features = mirage.mids(torch.zeros(1, 3, 1, 16, 16))
        channels = [f.shape[1] + c for f, c in zip(features, vae.inject_channels, strict=True)]
        assert channels == [block.weight.shape[1] for block in vae.fusion]


def test_a_frame_too_small_is_refused(mirage):
    with pytest.raises(ValueError, match="at least 16, got"):
        mirage(clip(1, 8, 16))


