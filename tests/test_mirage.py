"""Mirage, Figure 2: any length and size, in one step, streamed or whole, and its adapters on disk."""

import pytest
import torch

from mirage_min.method import lora
from mirage_min.method.one_step import alpha_bar, z0_from_v
from mirage_min.networks import weights
from mirage_min.systems.mirage import HARMONISATION, RECONSTRUCTION, TRANSFORMER, Mirage, explain
from tests import small


@pytest.fixture(scope="module")
def mirage():
    return small.mirage(window=3)


def clip(T, H=32, W=48, seed=0):
    return torch.rand(1, 3, T, H, W, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def streamed(mirage, x, **kwargs):
    return torch.stack(list(mirage.stream(iter(x[0].unbind(1)), **kwargs)), dim=1)[None]


def test_the_forward_is_figure_2_written_out(mirage):
    x = clip(9)
    z_ni = mirage.vae.encode(x)
    z_dr = z0_from_v(z_ni, mirage.dit(z_ni, 199, mirage.text), alpha_bar()[199])
    frames = mirage.vae2d.mids(x[0].transpose(0, 1), count=2)
    wanted = mirage.vae.decode(z_dr, [f.transpose(0, 1)[None] for f in frames])
    assert torch.equal(mirage(x), wanted)


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
    assert streamed(mirage, x).shape == x.shape


def test_padding_repeats_the_last_frame_row_and_column(mirage):
    padded = mirage.pad(clip(10, 17, 30))
    assert padded.shape == (1, 3, 17, 32, 32)
    assert torch.equal(padded[:, :, :10, :17, :30], clip(10, 17, 30))
    assert torch.equal(padded[:, :, 16], padded[:, :, 9]) and torch.equal(padded[..., 31, :], padded[..., 16, :])
    assert torch.equal(padded[..., 31], padded[..., 29])


@pytest.mark.parametrize("T", [1, 2, 9, 10, 17, 33])
@pytest.mark.parametrize("patch_size_t", [None, 2])
def test_a_stream_with_one_window_is_the_plain_forward(T, patch_size_t):
    mirage = small.mirage(patch_size_t)
    x = clip(T, 24, 20)
    difference = (streamed(mirage, x, window=9) - mirage(x).clamp(-1, 1)).abs().max()
    assert difference < 1e-5, f"largest difference {difference:.1e} to the plain forward, allowed 1e-5"


@pytest.mark.parametrize("patch_size_t, window, T", [
    (None, 3, 57), (None, 5, 50), (None, 4, 33), (2, 5, 57), (2, 9, 90)])
def test_a_stream_yields_every_frame_once_whatever_the_window(patch_size_t, window, T):
    mirage = small.mirage(patch_size_t)
    mirage.denoise = lambda z: z  # then windows and their blending must give back what went in
    x = clip(T, 16, 16)
    whole = mirage.vae.decode(mirage.vae.encode(mirage.pad(x)), mirage.mids(mirage.pad(x)))[:, :, :T].clamp(-1, 1)
    difference = (streamed(mirage, x, window=window) - whole).abs().max()
    assert difference < 1e-5, f"largest difference {difference:.1e} to one uninterrupted decode, allowed 1e-5"


def test_windows_overlap_and_fall_on_whole_temporal_patches():
    mirage, seen = small.mirage(2), []
    z = torch.arange(25.0).view(1, 1, 25, 1, 1).expand(1, 4, 25, 2, 2)
    mirage.denoise = lambda z: (seen.append(z[0, 0, :, 0, 0].int().tolist()), z)[1]
    out = torch.cat(list(mirage._windows(iter(z.split([3] + [2] * 11, dim=2)), 9)), dim=2)
    wanted = [list(range(a, b)) for a, b in ((0, 9), (5, 13), (9, 17), (13, 21), (17, 25))]
    assert seen == wanted or all(s[0] % 2 == 1 and len(s) % 2 == 0 for s in seen[1:]), seen
    assert torch.allclose(out, z)


def test_a_window_is_denoised_as_soon_as_its_last_latent_is_there(mirage):
    """Windows of 4 that share 1 begin at latents 0, 3, 6 and 9 and are full with 4, 7, 10; the last with the 12th."""
    taken = []

    def pieces():
        for _ in range(6):
            taken.append(2)
            yield torch.zeros(1, 4, 2, 4, 6)
    assert [(sum(taken), z.shape[2]) for z in mirage._windows(pieces(), 4)] == [(4, 3), (8, 3), (10, 3), (12, 3)]


def test_blended_weights_rise_and_sum_to_one():
    tail, new = torch.zeros(1, 1, 3, 1, 1), torch.ones(1, 1, 5, 1, 1)
    assert torch.allclose(Mirage._blend(tail, new).flatten(), torch.tensor([0.25, 0.5, 0.75, 1.0, 1.0]))


@pytest.mark.parametrize("patch_size_t, window", [(None, 3), (None, 9), (2, 5), (2, 9)])
def test_the_weights_of_all_windows_sum_to_one_at_every_latent(patch_size_t, window):
    """Window k answers with 1 in channel k and 0 elsewhere: what comes out are the weights themselves."""
    mirage, calls = small.mirage(patch_size_t), []

    def denoise(z):
        calls.append(z.shape[2])
        answer = torch.zeros(1, 30, *z.shape[2:])
        answer[:, len(calls) - 1] = 1
        return answer

    mirage.denoise = denoise
    pieces = mirage._windows(iter(torch.zeros(1, 1, 31, 1, 1).split(2, dim=2)), window)
    weights = torch.cat(list(pieces), dim=2)[0, :, :, 0, 0]
    assert weights.shape == (30, 31) and len(calls) > 3 and (weights >= 0).all()
    assert torch.allclose(weights.sum(0), torch.ones(31), atol=1e-6), weights.sum(0)
    assert ((weights > 0).sum(0) == 2).any(), "no two windows are blended"
    assert max(calls) <= window


def test_the_default_window_has_at_most_nine_latents():
    vae, dit, vae2d = small.parts()
    assert Mirage(vae, dit, vae2d, torch.zeros(1, 2, 8), None).window <= 9


# ---- tiles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiles, margin", [(2, 0), (2, 1), (3, 2), (4, 5)])
def test_tiles_of_a_vae_that_sees_single_cells_blend_to_the_untiled_result(tiles, margin):
    """Mean of a cell one way, repetition the other, and a cache that says how many groups its own tile has had."""
    mirage = small.mirage(window=3)

    def counted(y, cache):
        age = cache["age"] + 1 if cache else torch.zeros(1, 1, 1, *y.shape[-2:], dtype=y.dtype)
        return y + age, {"age": age}

    def encode_group(x, cache=None):
        z = x.mean(1, keepdim=True).unflatten(4, (-1, 8)).unflatten(3, (-1, 8)).mean((4, 6))
        return counted(z[:, :, :: 4].repeat(1, 4, 1, 1, 1), cache)

    def decode_group(z, cache=None, inject=None):
        x = z[:, :3, -1:].repeat_interleave(8, 3).repeat_interleave(8, 4)
        return counted(x.repeat(1, 1, 9 if not cache else 8, 1, 1) / 9, cache)

    mirage.vae.encode_group, mirage.vae.decode_group, mirage.mids = encode_group, decode_group, lambda x: None
    mirage.denoise, x = lambda z: z, clip(25, 60, 76)
    x = x / 99
    difference = (streamed(mirage, x, tiles=tiles, margin=margin) - streamed(mirage, x)).abs().max()
    assert difference < 1e-5, f"largest difference {difference:.1e} to the untiled result, allowed 1e-5"


def test_tiles_with_a_margin_as_wide_as_the_frame_are_the_untiled_result(mirage):
    x = clip(10, 40, 32)
    difference = (streamed(mirage, x, tiles=2, margin=6) - streamed(mirage, x)).abs().max()
    assert difference < 1e-5, f"largest difference {difference:.1e}, allowed 1e-5"
    assert (streamed(mirage, x, tiles=2, margin=0) - streamed(mirage, x)).abs().max() > 1e-3, "nothing was tiled"


@pytest.mark.parametrize("tiles, margin", [(0, 1), (3, 1), (2, -1)])
def test_tiles_that_do_not_fit_are_refused(mirage, tiles, margin):
    with pytest.raises(ValueError, match="want tiles in"):
        streamed(mirage, clip(1, 16, 16), tiles=tiles, margin=margin)


@pytest.mark.parametrize("patch_size_t, window", [(None, 2), (2, 4), (2, 8), (2, 3)])
def test_a_window_that_does_not_fit_is_refused(patch_size_t, window):
    with pytest.raises(ValueError, match="window must be"):
        streamed(small.mirage(patch_size_t), clip(9, 16, 16), window=window)


def test_a_frame_too_small_is_refused(mirage):
    with pytest.raises(ValueError, match="at least 16, got"):
        mirage(clip(1, 8, 16))


@pytest.fixture
def folder(tmp_path):
    """A base and a 2D VAE on disk, as published."""
    small.save_cogvideox(tmp_path)
    return tmp_path


def test_what_the_stages_save_comes_back_the_same(folder):
    trained = Mirage.from_base(folder / "base", folder / "vae_2d", torch.randn(1, 2, 8))
    for name, rank, alpha in ((RECONSTRUCTION, 2, 4.0), (TRANSFORMER, 3, 1.5), (HARMONISATION, 2, 2.0)):
        trained.add_lora(name, rank, alpha)
        for p in lora.parameters(trained.adapters(name), name):
            torch.nn.init.normal_(p, std=0.1)
    for block in trained.vae.fusion:
        torch.nn.init.normal_(block.weight, std=0.1)
    weights.save_tensors(folder / "prompt.safetensors", {"text": trained.text})
    bases = {"base": "base", "vae2d": "vae_2d"}
    trained.save_stage(folder / "stage_a.safetensors", [RECONSTRUCTION], bases, fusion=True)
    without_h = Mirage.from_pretrained(folder)
    trained.save_stage(folder / "stage_h.safetensors", [TRANSFORMER, HARMONISATION], {"t": "249", "window": "5"})
    again = Mirage.from_pretrained(folder)
    assert (again.t, again.window) == (249, 5)
    trained.t = 249
    x = clip(9, 16, 24)
    with torch.no_grad():
        difference = (again(x) - trained(x)).abs().max()
        assert difference < 1e-5, f"largest difference {difference:.1e}, allowed 1e-5"
        assert not torch.allclose(without_h(x), trained(x))
    assert not any(p.requires_grad for p in again.parameters())


def test_the_transformers_adapter_has_peft_names_and_both_alphas_are_kept(folder):
    trained = Mirage.from_base(folder / "base", folder / "vae_2d")
    trained.add_lora(TRANSFORMER, 4, 2.0)
    trained.save_stage(folder / "h.safetensors", [TRANSFORMER], {})
    tensors, about = weights.load_tensors(folder / "h.safetensors")
    assert "transformer.transformer_blocks.0.attn1.to_out.0.lora_A.weight" in tensors
    assert about["transformer.rank"] == "4" and about["transformer.alpha"] == "2.0"


def test_cogvideox_without_a_2d_vae_is_refused(folder):
    with pytest.raises(ValueError, match="AutoencoderKL"):
        Mirage.from_base(folder / "base", None)
