"""Injection of 2D features: nothing at first, frame by frame, with both streams at one scale (Mirage §3.2.1)."""

import pytest
import torch

from mirage_min.method import injection
from mirage_min.networks.vae_wan import WanVAE, WanVAEConfig
from tests import small


@pytest.fixture
def vae():
    vae = small.parts()[0].double().requires_grad_(False)
    injection.attach(vae, [5, 6])
    vae.fusion.double()
    return vae


def features(F_frames=9, h=16, w=24):
    draws = torch.Generator().manual_seed(0)
    return [torch.randn(2, 5, F_frames, h, w, generator=draws, dtype=torch.float64) * 3,
            torch.randn(2, 6, F_frames, h // 2, w // 2, generator=draws, dtype=torch.float64)]


def fill(vae):
    for block in vae.fusion:
        torch.nn.init.normal_(block.weight, std=0.2)
        torch.nn.init.normal_(block.bias, std=0.2)


def test_new_blocks_leave_the_decoder_exactly_as_it_was(vae):
    z = torch.randn(2, 4, 3, 2, 3, dtype=torch.float64)
    injection.measure_scales(vae, z, features())
    assert torch.equal(vae.decode(z, features()), vae.decode(z))
    fill(vae)
    assert not torch.allclose(vae.decode(z, features()), vae.decode(z)), "a filled block must change the output"


def test_a_block_is_one_convolution_of_the_two_scaled_streams_over_single_frames(vae):
    fill(vae)
    block = vae.fusion[0]
    block.s_h.fill_(20.0), block.s_f.fill_(0.5)
    h, f = torch.randn(2, 8, 3, 4, 5, dtype=torch.float64) * 20, torch.randn(2, 5, 3, 4, 5, dtype=torch.float64)
    both = torch.cat([h / 20, f / 0.5], dim=1)
    merged = [torch.nn.functional.conv2d(both[:, :, t], block.weight, block.bias, padding=1) for t in range(3)]
    wanted = h + 20 * torch.stack(merged, dim=2)
    with small.unchanged(h, f):
        difference = (block(h, f) - wanted).abs().max()
    assert difference < 1e-10, f"largest difference {difference:.1e}, allowed 1e-10"


def test_the_features_of_one_frame_change_what_enters_at_that_frame_alone(vae):
    fill(vae)
    for block, f in zip(vae.fusion, features()):
        h = torch.randn(2, 8, *f.shape[2:], dtype=torch.float64)
        moved = f.clone()
        moved[:, :, 4] += 1
        changed = (block(h, moved) - block(h, f)).abs().amax(dim=(0, 1, 3, 4)) > 0
        assert changed.tolist() == [t == 4 for t in range(9)]


def test_measured_scales_are_the_standard_deviations_of_what_flows_in(vae):
    z, seen = torch.randn(2, 4, 3, 2, 3, dtype=torch.float64), []

    def see(block, args):
        seen.append([v.std().item() for v in args])
    hooks = [block.register_forward_pre_hook(see) for block in vae.fusion]
    vae.decode(z, features())
    for hook in hooks:
        hook.remove()
    given = features()
    with small.unchanged(z, *given):
        measured = injection.measure_scales(vae, z, given)
    assert torch.allclose(torch.tensor(measured), torch.tensor(seen[::-1])), f"{measured} but {seen[::-1]} flowed in"
    assert abs(measured[0][1] - 3) < 0.1 and abs(measured[1][1] - 1) < 0.1
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in vae.fusion), "a hook was left behind"


@pytest.mark.parametrize("kind", ["CogVideoX", "Wan"])
def test_the_scales_of_a_clip_of_several_groups_are_those_of_all_of_it(vae, kind):
    """17 frames: two groups of CogVideoX, five of Wan, whose features grow from frame to frame."""
    channels, F = [5, 6], 5
    if kind == "Wan":
        vae, channels = WanVAE(WanVAEConfig(base_dim=8, num_res_blocks=1, z_dim=4, latents_mean=(0,) * 4,
                                            latents_std=(1,) * 4)).double(), [6]
        injection.attach(vae, channels)
        vae.fusion.double()
    rise = torch.arange(17, dtype=torch.float64).view(1, 1, 17, 1, 1)
    inject = [torch.randn(1, c, 17, 16 // s, 24 // s, dtype=torch.float64) * (1 + rise) + rise
              for c, s in zip(channels, (1, 2) if kind == "CogVideoX" else (2,))]
    z, seen = torch.randn(1, 4, F, 2, 3, dtype=torch.float64), {block: [] for block in vae.fusion}
    hooks = [block.register_forward_pre_hook(lambda block, args: seen[block].append(args[0])) for block in vae.fusion]
    vae.decode(z, inject)
    for hook in hooks:
        hook.remove()
    for (s_h, s_f), hs, f in zip(injection.measure_scales(vae, z, inject), seen.values(), inject, strict=True):
        for name, given, wanted in (("h", s_h, torch.cat(hs, dim=2).std()), ("f", s_f, f.std())):
            assert len(hs) > 1 and abs(given / wanted - 1) < 1e-5, f"s_{name} is {given}, wanted {wanted}"


def test_features_enter_the_last_two_stages(vae):
    """Dec-4 takes the finest map, Dec-3 the next: widths tell them apart, swapped maps are refused."""
    z = torch.randn(2, 4, 3, 2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"injected features must be \[2, 6, 9, 8, 12\], got \[2, 5, 9, 16, 24\]"):
        vae.decode(z, features()[::-1])


def test_the_blocks_stay_out_of_the_checkpoint_and_come_back_from_their_own(vae, tmp_path):
    assert not any("fusion" in key for key in vae.state_dict())
    fill(vae)
    z = torch.randn(2, 4, 3, 2, 3, dtype=torch.float64)
    injection.measure_scales(vae, z, features())
    state, wanted = {k: v.clone() for k, v in injection.state_dict(vae).items()}, vae.decode(z, features())
    injection.attach(vae, [5, 6])
    vae.fusion.double()
    injection.load(vae, state)
    assert torch.equal(vae.decode(z, features()), wanted)
    with pytest.raises(ValueError, match=r"1 wrongly shaped: fusion.0.weight \(wanted \[8, 13, 3, 3\], got \[1\]\)"):
        injection.load(vae, state | {"fusion.0.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="1 missing: fusion.1.s_f"):
        injection.load(vae, {k: v for k, v in state.items() if k != "fusion.1.s_f"})


def test_a_wrong_number_of_feature_maps_is_refused(vae):
    with pytest.raises(ValueError, match="2 places, got 3"):
        injection.attach(vae, [1, 2, 3])
