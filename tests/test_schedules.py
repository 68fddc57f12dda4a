"""Published scheduler configurations: which are read, and that what would change the result is refused by name."""

import json
from pathlib import Path

import pytest
import torch

from mirage_min.method.one_step import alpha_bar
from mirage_min.method.schedules import (
    SCHEDULERS,
    ClippingEpsilon,
    Epsilon,
    Flow,
    VPrediction,
    config_from_schedule,
    schedule_from_config,
)
from tests.torchvision_stub import stub

CONFIGS = Path(__file__).parents[2] / "shared" / "checkpoint_configs"
V_CONFIG = {"_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
FLOW_CONFIG = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD_1_5 = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", **BETAS, "num_train_timesteps": 1000,
          "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
          "clip_sample": False}
TURBO = {"_class_name": "EulerDiscreteScheduler", **BETAS, "timestep_spacing": "trailing"}


def published(name: str):
    """diffusers' own class."""
    stub()
    import diffusers
    return getattr(diffusers, name)


@pytest.mark.parametrize("name, shift", [("cogvideox-2b", 3.0), ("cogvideox-5b", 1.0)])
def test_published_cogvideox_schedules_are_read(name, shift):
    file = CONFIGS / f"{name}.scheduler.json"
    if not file.exists():
        pytest.skip(f"needs {file.name} in ../shared/checkpoint_configs")
    assert torch.equal(schedule_from_config(json.loads(file.read_text())), alpha_bar(shift))


def test_a_schedule_is_read_with_all_the_fields_that_diffusers_writes(tmp_path):
    scheduler = published("CogVideoXDDIMScheduler")
    scheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=1.7).save_config(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert len(config) > 12 and torch.equal(schedule_from_config(config), alpha_bar(1.7))
    with pytest.raises(ValueError, match="unknown fields .'sharpness'"):
        schedule_from_config(config | {"sharpness": 1})


def test_published_wan_schedule_is_a_flow():
    file = CONFIGS / "wan2.1.scheduler.diffusers.json"
    if not file.exists():
        pytest.skip(f"needs {file.name} in ../shared/checkpoint_configs")
    assert schedule_from_config(json.loads(file.read_text())) is None


def test_an_absent_field_has_its_published_default():
    got = schedule_from_config(V_CONFIG)
    assert torch.equal(got, alpha_bar(published("CogVideoXDDIMScheduler").from_config(V_CONFIG).config.snr_shift_scale))
    for field in ("prediction_type", "rescale_betas_zero_snr"):
        with pytest.raises(ValueError, match=field):
            schedule_from_config({k: v for k, v in V_CONFIG.items() if k != field})


@pytest.mark.parametrize("config, change", [
    (V_CONFIG, {"prediction_type": "epsilon"}), (V_CONFIG, {"beta_schedule": "linear"}), (V_CONFIG, {"beta_end": 0.02}),
    (V_CONFIG, {"num_train_timesteps": 500}), (V_CONFIG, {"trained_betas": [0.1]}), (V_CONFIG, {"shift": 5.0}),
    (FLOW_CONFIG, {"prediction_type": "v_prediction"}), (FLOW_CONFIG, {"thresholding": True}),
    (V_CONFIG, {"_class_name": "DDIMScheduler"}),
], ids=lambda x: str(x) if len(x) == 1 else x["_class_name"][:6])
def test_what_would_change_the_result_is_refused_by_name(config, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        schedule_from_config(config | change)


@pytest.mark.parametrize("name", [name for name, kind in SCHEDULERS.items() if issubclass(kind, Epsilon)])
def test_the_schedulers_of_networks_that_predict_epsilon_are_read_as_diffusers_writes_them(name, tmp_path):
    clip = {"clip_sample": False} if SCHEDULERS[name] is ClippingEpsilon else {}
    published(name)(**BETAS, **clip).save_config(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert len(config) > 8 and torch.equal(schedule_from_config(config, Epsilon), alpha_bar(zero_terminal_snr=False))
    with pytest.raises(ValueError, match="_class_name: wanted one of CogVideoXDDIMScheduler, UniPCMultistepScheduler"):
        schedule_from_config(config)  # a video transformer's is wanted


def test_stable_diffusion_1_5_and_turbo_are_read_and_a_video_schedule_is_refused_for_them():
    for config in (SD_1_5, TURBO):
        assert abs(float(schedule_from_config(config, Epsilon)[199]) - 0.755238) <= 1e-6
    with pytest.raises(ValueError, match="scheduler_config.json: _class_name: wanted one of Euler"):
        schedule_from_config(V_CONFIG, Epsilon)


@pytest.mark.parametrize("config, change", [
    (TURBO, {"prediction_type": "v_prediction"}), (TURBO, {"rescale_betas_zero_snr": True}),
    (TURBO, {"clip_sample": True}), (TURBO, {"beta_start": 0.0001}), (TURBO, {"timestep_type": "continuous"}),
    (TURBO, {"trained_betas": [0.1]}), (TURBO | {"_class_name": "DDPMScheduler", "clip_sample": False},
                                        {"thresholding": True}), (SD_1_5, {"num_train_timesteps": 999}),
    (SD_1_5, {"sharpness": 1})], ids=lambda x: next(iter(x)))
def test_what_would_change_the_result_of_an_epsilon_network_is_refused_by_name(config, change):
    schedule_from_config(config, Epsilon)
    with pytest.raises(ValueError, match=next(iter(change))):
        schedule_from_config(config | change, Epsilon)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_a_sampler_that_clips_unless_told_otherwise_is_refused_where_its_file_is_silent(name):
    with pytest.raises(ValueError, match="clip_sample: wanted one of False, got nothing"):
        schedule_from_config(TURBO | {"_class_name": name}, Epsilon)


def test_betas_that_the_file_does_not_give_are_not_guessed():
    for field in BETAS:
        with pytest.raises(ValueError, match=f"{field}: wanted .* got nothing"):
            schedule_from_config({k: v for k, v in TURBO.items() if k != field}, Epsilon)


@pytest.mark.parametrize("shift", [0, -1.0, "3", float("nan"), True, None], ids=str)
def test_a_shift_that_is_no_positive_number_is_refused(shift):
    with pytest.raises(ValueError, match="snr_shift_scale: wanted one finite number"):
        schedule_from_config(V_CONFIG | {"snr_shift_scale": shift})


@pytest.mark.parametrize("schedule", [
    VPrediction(prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=1.0),
    Flow(prediction_type="flow_prediction"), Epsilon(**BETAS)], ids=lambda x: type(x).__name__)
def test_a_configuration_written_by_us_is_read_by_us_and_by_diffusers(schedule):
    config = config_from_schedule(schedule)
    table = schedule_from_config(json.loads(json.dumps(config)), type(schedule))
    assert table is None if isinstance(schedule, Flow) else torch.equal(table, schedule.table())
    theirs = published(config["_class_name"]).from_config(config)
    assert theirs.config.prediction_type == schedule.prediction_type
    if isinstance(schedule, VPrediction):
        assert (theirs.alphas_cumprod - table).abs().max() <= 1e-12
