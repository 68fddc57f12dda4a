"""The algebra of one step, and ᾱ against its definition in loops and the published schedulers."""

import pytest
import torch

from mirage_min.method import one_step
from tests.small import unchanged
from tests.torchvision_stub import stub

V_CONFIG = {"_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


def published(name: str = "CogVideoXDDIMScheduler"):
    """diffusers' own class; the tests that do not compare with it do without the package."""
    stub()
    import diffusers
    return getattr(diffusers, name)


def latents(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, 4, 3, 5, 6, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_schedule_equals_the_published_schedulers(shift):
    want = published()(rescale_betas_zero_snr=True, snr_shift_scale=shift).alphas_cumprod
    got = one_step.alpha_bar(shift)
    assert got.shape == (1000,) and got.dtype == torch.float64
    assert (got - want).abs().max() <= 1e-12, f"largest difference {(got - want).abs().max():.1e}, allowed 1e-12"


def test_without_zero_terminal_snr_it_equals_stable_diffusions():
    want = published("DDPMScheduler")(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    got = one_step.alpha_bar(zero_terminal_snr=False)
    assert (got - want).abs().max() <= 1e-6, f"largest difference {(got - want).abs().max():.1e}, allowed 1e-6"
    assert [round(float(got[t]), 6) for t in (199, 999)] == [0.755238, 0.004660]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_schedule_is_that_of_its_definition_in_loops(shift):
    roots, product = [], 1.0
    for t in range(1000):
        product *= 1 - (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * t / 999) ** 2
        snr = product / (1 - product) / shift
        roots.append((snr / (1 + snr)) ** 0.5)
    first, last = roots[0], roots[-1]
    want = torch.tensor([((r - last) * first / (first - last)) ** 2 for r in roots], dtype=torch.float64)
    without = torch.tensor([r**2 for r in roots], dtype=torch.float64)
    for name, got, wanted in (("as CogVideoX", one_step.alpha_bar(shift), want),
                              ("without zero terminal SNR", one_step.alpha_bar(shift, False), without)):
        difference = (got - wanted).abs().max()
        assert difference <= 1e-12, f"{name}: largest difference {difference:.1e}, allowed 1e-12"


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_schedule_falls_to_exactly_zero(shift):
    table = one_step.alpha_bar(shift)
    assert (table.diff() < 0).all() and table[0] < 1 and table[-1] == 0


def test_the_timesteps_of_the_papers_keep_the_known_signal():
    table = one_step.alpha_bar()
    assert [round(float(table[t]), 4) for t in (199, 399)] == [0.7387, 0.3935]


def test_z0_and_v_name_the_same_point():
    z0, eps = latents()
    for t in (0, 199, 999):
        a = one_step.alpha_bar()[t]
        with unchanged(z0, eps, a):
            z_t, v = one_step.add_noise(z0, eps, a), one_step.v_target(z0, eps, a)
            with unchanged(z_t, v):
                torch.testing.assert_close(one_step.z0_from_v(z_t, v, a), z0, rtol=0, atol=1e-12)
        # (z_t, v) is (z0, ε) turned by an angle, so lengths are kept
        torch.testing.assert_close(z_t**2 + v**2, z0**2 + eps**2, rtol=0, atol=1e-12)


def test_the_published_sampler_finds_the_same_z0():
    z_t, v = latents()
    scheduler = published().from_config(V_CONFIG | {"snr_shift_scale": 1.0})
    scheduler.set_timesteps(1000)
    want = scheduler.step(v, 199, z_t).pred_original_sample
    got = one_step.z0_from_v(z_t, v, one_step.alpha_bar()[199])
    assert (got - want).abs().max() <= 1e-12, f"largest difference {(got - want).abs().max():.1e}, allowed 1e-12"


def test_each_clip_of_a_batch_has_its_own_timestep():
    z0, eps = latents()
    table, t = one_step.alpha_bar(), torch.tensor([199, 700])
    for function in (one_step.add_noise, one_step.v_target, one_step.z0_from_v, one_step.z0_from_epsilon):
        both = function(z0, eps, table[t])
        alone = torch.cat([function(z0[i:i + 1], eps[i:i + 1], table[t[i]]) for i in range(2)])
        assert torch.equal(both, alone), function.__name__


def test_flow_finds_the_start_of_the_line():
    x0, eps = latents()
    sigma = torch.tensor([0.2, 0.9], dtype=torch.float64)
    s = sigma.reshape(2, 1, 1, 1, 1)
    z_t, v = (1 - s) * x0 + s * eps, eps - x0
    with unchanged(z_t, v, sigma):
        torch.testing.assert_close(one_step.z0_from_flow(z_t, v, sigma), x0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("t", [199, torch.tensor([199, 399])], ids=["int", "tensor"])
def test_denoise_calls_the_transformer_once_on_the_latent_as_it_is(t):
    z_ni, v = latents()
    calls = []

    def dit(*given):
        calls.append(given)
        return v

    table = one_step.alpha_bar()
    a = table[t].reshape(-1, 1, 1, 1, 1)
    wanted, wanted_flow = a.sqrt() * z_ni - (1 - a).sqrt() * v, z_ni - v
    with unchanged(z_ni, v, table):
        got = one_step.denoise(dit, z_ni, t, "text", table)
        (given,) = calls
        assert given[0] is z_ni and given[1] is t and given[2] == "text"
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
        assert torch.equal(one_step.denoise(dit, z_ni, t, "text"), wanted_flow)


def test_bfloat16_latents_keep_full_precision_weights():
    z_t, v = latents(torch.bfloat16)
    a = one_step.alpha_bar()[199]
    wanted = one_step.z0_from_v(z_t.double(), v.double(), a).float().bfloat16()
    got = one_step.z0_from_v(z_t, v, a)
    assert got.dtype == torch.bfloat16 and torch.equal(got, wanted)


# ---- SD-Turbo's and Cosmos' one step --------------------------------------------------------------------------------


def test_epsilon_and_the_mix_name_the_clean_latent():
    z0, eps = latents()
    table = one_step.alpha_bar(zero_terminal_snr=False)
    for t in (0, 199, 999):
        with unchanged(z0, eps):
            z_t = one_step.add_noise(z0, eps, table[t])
            torch.testing.assert_close(one_step.z0_from_epsilon(z_t, eps, table[t]), z0, rtol=0, atol=1e-11)


@pytest.mark.parametrize("t, of_z, of_eps, unchanged_by", [
    (199, 1.150689, 0.569285, 0.26470), (249, 1.216772, 0.693205, 0.31271), (399, 1.531973, 1.160578, 0.45837),
    (999, 14.648814, 14.614641, 0.93391)])
def test_sd_turbos_step_has_the_known_weights(t, of_z, of_eps, unchanged_by):
    z, eps = latents()
    table, calls = one_step.alpha_bar(zero_terminal_snr=False), []

    def unet(*given):
        calls.append(given)
        return eps
    with unchanged(z, eps, table):
        got = one_step.denoise_epsilon(unet, z, t, "text", table)
    assert len(calls) == 1 and calls[0][0] is z and calls[0][1:] == (t, "text")
    torch.testing.assert_close(got, of_z * z - of_eps * eps, rtol=0, atol=1e-5)
    still = one_step.denoise_epsilon(lambda z, t, text: unchanged_by * z, z, t, "text", table)
    torch.testing.assert_close(still, z, rtol=0, atol=2e-4)


@pytest.mark.parametrize("t", [199, 999])
def test_the_published_ddpm_step_finds_the_same_z0(t):
    z, eps = latents(torch.float32)
    scheduler = published("DDPMScheduler")(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                           clip_sample=False)
    scheduler.set_timesteps(timesteps=[t])
    want = scheduler.step(eps, t, z).pred_original_sample
    got = one_step.z0_from_epsilon(z, eps, one_step.alpha_bar(zero_terminal_snr=False)[t])
    difference = ((got - want).abs().max() / want.abs().max()).item()
    assert difference <= 1e-5, f"largest relative difference {difference:.1e}, allowed 1e-5"


def test_bfloat16_latents_are_not_weighted_in_bfloat16_where_errors_count_fourteen_times():
    z, eps = latents(torch.bfloat16)
    a = one_step.alpha_bar(zero_terminal_snr=False)[999]
    wanted = one_step.z0_from_epsilon(z.double(), eps.double(), a).float().bfloat16()
    got = one_step.z0_from_epsilon(z, eps, a)
    assert got.dtype == torch.bfloat16 and torch.equal(got, wanted)


@pytest.mark.parametrize("sigma", [0.25, torch.tensor([0.25, 4.0])], ids=["number", "one each"])
def test_edms_step_is_that_of_cosmos(sigma):
    """sigma .25: t = .2, and z0 = .8 z - .2 F(.8 z, .2); the network sees the shrunken latent once, and t."""
    z, F = latents()
    calls = []

    def dit(*given):
        calls.append(given)
        return F
    t = sigma / (1 + sigma)
    column = torch.as_tensor(t, dtype=torch.float64).reshape(-1, 1, 1, 1, 1)
    with unchanged(z, F):
        got = one_step.denoise_edm(dit, z, sigma, "text")
    (seen, time, text), = calls
    torch.testing.assert_close(seen, (1 - column) * z, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.as_tensor(time), torch.as_tensor(t), rtol=0, atol=0)
    torch.testing.assert_close(got, (1 - column) * z - column * F, rtol=0, atol=1e-12)
    assert text == "text" and (not isinstance(sigma, float) or abs(time - 0.2) <= 1e-15)


def test_edms_step_undoes_noise_of_a_known_size():
    z0, eps = latents()
    for sigma in (0.002, 0.25, 80.0):
        got = one_step.denoise_edm(lambda z_t, t, text: eps - z0, z0 + sigma * eps, sigma)
        torch.testing.assert_close(got, z0, rtol=0, atol=1e-12)
