"""The algebra of one step, and the schedule against the published scheduler."""

import json
from pathlib import Path

import pytest
import torch

from mirage_min.method import one_step
from tests.small import unchanged
from tests.torchvision_stub import stub

CONFIGS = Path(__file__).parents[2] / "shared" / "checkpoint_configs"
V_CONFIG = {"_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
FLOW_CONFIG = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"}


def published():
    """diffusers' own class; the tests that do not compare with it do without the package."""
    stub()
    from diffusers import CogVideoXDDIMScheduler
    return CogVideoXDDIMScheduler


def latents(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, 4, 3, 5, 6, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_schedule_equals_the_published_schedulers(shift):
    want = published()(rescale_betas_zero_snr=True, snr_shift_scale=shift).alphas_cumprod
    got = one_step.alpha_bar(shift)
    assert got.shape == (1000,) and got.dtype == torch.float64
    assert (got - want).abs().max() <= 1e-12, f"largest difference {(got - want).abs().max():.1e}, allowed 1e-12"


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_schedule_is_that_of_its_definition_in_loops(shift):
    roots, product = [], 1.0
    for t in range(1000):
        product *= 1 - (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * t / 999) ** 2
        snr = product / (1 - product) / shift
        roots.append((snr / (1 + snr)) ** 0.5)
    first, last = roots[0], roots[-1]
    want = torch.tensor([((r - last) * first / (first - last)) ** 2 for r in roots], dtype=torch.float64)
    difference = (one_step.alpha_bar(shift) - want).abs().max()
    assert difference <= 1e-12, f"largest difference {difference:.1e}, allowed 1e-12"


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
    for function in (one_step.add_noise, one_step.v_target, one_step.z0_from_v):
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


@pytest.mark.parametrize("name, shift", [("cogvideox-2b", 3.0), ("cogvideox-5b", 1.0)])
def test_published_cogvideox_schedules_are_read(name, shift):
    file = CONFIGS / f"{name}.scheduler.json"
    if not file.exists():
        pytest.skip(f"needs {file.name} in ../shared/checkpoint_configs")
    assert torch.equal(one_step.schedule_from_config(json.loads(file.read_text())), one_step.alpha_bar(shift))


def test_a_schedule_is_read_with_all_the_fields_that_diffusers_writes(tmp_path):
    published()(prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=1.7).save_config(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert len(config) > 12 and torch.equal(one_step.schedule_from_config(config), one_step.alpha_bar(1.7))
    with pytest.raises(ValueError, match="unknown fields .'sharpness'"):
        one_step.schedule_from_config(config | {"sharpness": 1})


def test_published_wan_schedule_is_a_flow():
    file = CONFIGS / "wan2.1.scheduler.diffusers.json"
    if not file.exists():
        pytest.skip(f"needs {file.name} in ../shared/checkpoint_configs")
    assert one_step.schedule_from_config(json.loads(file.read_text())) is None


def test_an_absent_field_has_its_published_default():
    got = one_step.schedule_from_config(V_CONFIG)
    assert torch.equal(got, one_step.alpha_bar(published().from_config(V_CONFIG).config.snr_shift_scale))
    for field in ("prediction_type", "rescale_betas_zero_snr"):
        with pytest.raises(ValueError, match=field):
            one_step.schedule_from_config({k: v for k, v in V_CONFIG.items() if k != field})


@pytest.mark.parametrize("config, change", [
    (V_CONFIG, {"prediction_type": "epsilon"}), (V_CONFIG, {"beta_schedule": "linear"}), (V_CONFIG, {"beta_end": 0.02}),
    (V_CONFIG, {"num_train_timesteps": 500}), (V_CONFIG, {"trained_betas": [0.1]}), (V_CONFIG, {"shift": 5.0}),
    (FLOW_CONFIG, {"prediction_type": "v_prediction"}), (FLOW_CONFIG, {"thresholding": True}),
    (V_CONFIG, {"_class_name": "DDIMScheduler"}),
], ids=lambda x: str(x) if len(x) == 1 else x["_class_name"][:6])
def test_what_would_change_the_result_is_refused_by_name(config, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        one_step.schedule_from_config(config | change)
