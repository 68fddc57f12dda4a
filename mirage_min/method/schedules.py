"""Published scheduler_config.json files -> the ᾱ of one_step.py.

    alpha_bar = schedule_from_config(read_json(folder / "scheduler_config.json"))                # CogVideoX or Wan
    alpha_bar = schedule_from_config(read_json(folder / "scheduler_config.json"), Epsilon)       # SD-Turbo

Each dataclass says what such a file may hold. A Literal is the one value that is understood: another would change what
one step computes. A field without a default must be given, because its published default is not understood. How a
sampler spaces and combines many steps does not matter to one step: those fields are `ignored`.

    python -m mirage_min.method.schedules          # which schedulers are read, and what is refused
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from torch import Tensor

from ..networks.checked import Within, record
from .one_step import BETA_END, BETA_START, STEPS, alpha_bar

SPACING = {"timestep_spacing", "steps_offset", "set_alpha_to_one", "sample_max_value", "dynamic_thresholding_ratio",
           "clip_sample_range", "final_sigmas_type", "use_beta_sigmas", "use_exponential_sigmas", "use_karras_sigmas"}


@dataclass(kw_only=True)
class VPrediction:
    """A network that predicts v, with zero terminal SNR and a shift: CogVideoX."""

    prediction_type: Literal["v_prediction"]
    rescale_betas_zero_snr: Literal[True]
    num_train_timesteps: Literal[STEPS] = STEPS
    beta_start: Literal[BETA_START] = BETA_START
    beta_end: Literal[BETA_END] = BETA_END
    beta_schedule: Literal["scaled_linear"] = "scaled_linear"
    trained_betas: None = None
    snr_shift_scale: Annotated[float, Within(1e-3, 1e3)] = 3.0
    ignored: ClassVar = SPACING | {"clip_sample"}  # declared, but the published sampler never clips

    def table(self) -> Tensor:
        """ᾱ of every timestep, [1000], falling from about 1 to 0."""
        return alpha_bar(self.snr_shift_scale)


@dataclass(kw_only=True)
class Flow:
    """A network that predicts a flow, to which no ᾱ belongs: Wan."""

    prediction_type: Literal["flow_prediction"]
    num_train_timesteps: Literal[STEPS] = STEPS
    thresholding: Literal[False] = False
    ignored: ClassVar = SPACING | {
        "solver_order", "solver_p", "solver_type", "predict_x0", "lower_order_final", "disable_corrector",
        "flow_shift", "use_flow_sigmas", "beta_start", "beta_end", "beta_schedule", "trained_betas",
        "rescale_betas_zero_snr"}

    def table(self) -> None:
        """None: a flow has no ᾱ."""


@dataclass(kw_only=True)
class Epsilon:
    """A network that predicts ε, without zero terminal SNR: Stable Diffusion, SD-Turbo, R3D2, Difix."""

    beta_start: Literal[BETA_START]
    beta_end: Literal[BETA_END]
    beta_schedule: Literal["scaled_linear"]
    num_train_timesteps: Literal[STEPS] = STEPS
    trained_betas: None = None
    prediction_type: Literal["epsilon"] = "epsilon"
    rescale_betas_zero_snr: Literal[False] = False
    clip_sample: Literal[False] = False
    thresholding: Literal[False] = False
    timestep_type: Literal["discrete"] = "discrete"
    ignored: ClassVar = SPACING | {"sigma_min", "sigma_max", "interpolation_type", "skip_prk_steps", "variance_type"}

    def table(self) -> Tensor:
        """ᾱ of every timestep, [1000], falling from about 1 to .005."""
        return alpha_bar(zero_terminal_snr=False)


@dataclass(kw_only=True)
class ClippingEpsilon(Epsilon):
    """The same network, in the files of samplers that clip z0 to ±1 unless told otherwise."""

    clip_sample: Literal[False] = dataclasses.field()  # without a default


# Wan's scheduler_config.json; the shift matters to samplers of many steps alone
WAN = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "flow_shift": 3.0}
STABLE_DIFFUSION = Epsilon(beta_start=BETA_START, beta_end=BETA_END, beta_schedule="scaled_linear")
SCHEDULERS = {
    "CogVideoXDDIMScheduler": VPrediction,
    "UniPCMultistepScheduler": Flow,
    "EulerDiscreteScheduler": Epsilon,
    "EulerAncestralDiscreteScheduler": Epsilon,
    "PNDMScheduler": Epsilon,
    "DDPMScheduler": ClippingEpsilon,
    "DDIMScheduler": ClippingEpsilon,
}


def schedule_from_config(config: dict, *accepted: type, file="scheduler_config.json") -> Tensor | None:
    """The table of ᾱ [1000] that a published scheduler_config.json describes, or None for a flow.

    accepted  what the network may predict; not given: VPrediction or Flow, as for video transformers
    ValueError that names the file and the field, for a scheduler that is not accepted, a value that is not understood,
    and a field that no published scheduler has.
    """
    names = [name for name, kind in SCHEDULERS.items() if issubclass(kind, accepted or (VPrediction, Flow))]
    name = config.get("_class_name")
    if name not in names:
        raise ValueError(f"{file}: _class_name: wanted one of {', '.join(names)}, got {name!r}")
    schedule = record(SCHEDULERS[name], config, file)
    known = {field.name for field in dataclasses.fields(schedule)} | schedule.ignored
    if unknown := sorted(field for field in config if field not in known and not field.startswith("_")):
        raise ValueError(f"{file}: {name} has unknown fields {unknown}")
    return schedule.table()


def config_from_schedule(schedule: VPrediction | Flow | Epsilon) -> dict:
    """The content of a scheduler_config.json that describes a schedule, under the first class name that fits it."""
    name = next(name for name, kind in SCHEDULERS.items() if kind is type(schedule))
    return {"_class_name": name} | dataclasses.asdict(schedule)


if __name__ == "__main__":
    small = config_from_schedule(VPrediction(prediction_type="v_prediction", rescale_betas_zero_snr=True))
    print(f"CogVideoX-2b: {small}\n  ᾱ at 199: {schedule_from_config(small)[199]:.4f}")
    turbo = {"_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012,
             "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}
    print(f"SD-Turbo: ᾱ at 199: {schedule_from_config(turbo, Epsilon)[199]:.4f}")
    for change in ({"prediction_type": "v_prediction"}, {"rescale_betas_zero_snr": True}, {"clip_sample": True},
                   {"_class_name": "DDPMScheduler"}, {"sharpness": 1}):
        try:
            schedule_from_config(turbo | change, Epsilon)
        except ValueError as error:
            print(f"{change} -> {error}")
