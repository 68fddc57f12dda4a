"""Noise schedules, and a clean latent from one call of the transformer (Mirage §3.1, §3.2).

Diffusion mixes a clean latent with noise, and CogVideoX's transformer is trained to name the "velocity" v of that mix:

    z_t = √ᾱ_t · z0 + √(1 − ᾱ_t) · ε                                                    (Mirage §3.1)
    v   = √ᾱ_t · ε − √(1 − ᾱ_t) · z0          hence    z0 = √ᾱ_t · z_t − √(1 − ᾱ_t) · v

Wan walks a straight line instead (flow): z_t = (1 − σ) · x0 + σ · ε and v = ε − x0, hence x0 = z_t − σ · v.

Mirage takes z_NI itself for z_t at a small fixed t (§3.2), and adds no noise, neither in training nor at inference: the
wrong light and the missing shadow are the "noise" to remove. Fresh noise would bury details of a scene that has to
stay, which one step cannot bring back, and would make the result a matter of chance. So t is no noise level here. It
chooses √ᾱ_t and √(1 − ᾱ_t), how much of z_NI goes straight through and how much the prediction weighs, and it asks the
transformer for what it has learned to do at that t: at 199, small repairs.

Mirage's Eq. 1 states the loss for a network that predicts ε; the published CogVideoX predicts v. A schedule is a table
of ᾱ, or None for a flow. Left out: samplers of many steps, guidance, and the loss of Eq. 1 (the scripts have theirs).

    python -m mirage_min.method.one_step           # the schedule, and the weights of one step at some t
"""

from collections.abc import Callable

import torch
from torch import Tensor

STEPS, BETA_START, BETA_END = 1000, 0.00085, 0.012  # CogVideoX

# Fields of scheduler_config.json whose value is built in below. A field that is absent has its published default.
FIXED = {
    "CogVideoXDDIMScheduler": {
        "num_train_timesteps": STEPS,
        "beta_start": BETA_START,
        "beta_end": BETA_END,
        "beta_schedule": "scaled_linear",
        "trained_betas": None,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
    },
    "UniPCMultistepScheduler": {
        "num_train_timesteps": STEPS,
        "prediction_type": "flow_prediction",
        "thresholding": False,
    },
}
IGNORED = {
    "CogVideoXDDIMScheduler": {  # clipping is declared but never applied by the published sampler
        "clip_sample", "clip_sample_range", "sample_max_value", "set_alpha_to_one", "steps_offset", "timestep_spacing",
        "snr_shift_scale",  # any value: it is read
    },
    "UniPCMultistepScheduler": {  # how it spaces and combines many steps
        "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr", "sample_max_value",
        "dynamic_thresholding_ratio", "solver_order", "solver_p", "solver_type", "predict_x0", "lower_order_final",
        "disable_corrector", "steps_offset", "timestep_spacing", "final_sigmas_type", "flow_shift", "use_beta_sigmas",
        "use_exponential_sigmas", "use_flow_sigmas", "use_karras_sigmas",
    },
}
PUBLISHED_DEFAULTS = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}


def alpha_bar(snr_shift: float = 1.0) -> Tensor:
    """ᾱ of CogVideoX, [1000], float64: falls from about 1 to exactly 0. snr_shift is 1 for 5b and 1.5, 3 for 2b.

    β is the square of STEPS even steps from √BETA_START to √BETA_END, and ᾱ_t = Π (1 − β) up to and with t. Then the
    signal-to-noise ratio ᾱ / (1 − ᾱ) is divided by snr_shift. Last, √ᾱ is moved and stretched, linearly, so that its
    last value is 0 and its first what it was (zero terminal SNR).
    """
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, STEPS, dtype=torch.float64) ** 2
    # ᾱ_t = Π (1 − β)
    a = torch.cumprod(1 - betas, dim=0)
    # signal-to-noise ratio ᾱ / (1 − ᾱ) divided by snr_shift
    a = a / (snr_shift + (1 - snr_shift) * a)
    # √ᾱ moved so that it ends at 0, then stretched so that it still starts where it did (zero terminal SNR)
    root = a.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def schedule_from_config(config: dict) -> Tensor | None:
    """The table of ᾱ that a published scheduler_config.json describes, or None where the model predicts a flow.

    How a sampler spaces its steps does not matter to a single one. What would change the result and is not built in
    here is refused by name, and so is a field never heard of (ValueError).
    """
    name = config.get("_class_name")
    if name not in FIXED:
        raise ValueError(f"_class_name must be one of {sorted(FIXED)}, got {name!r}")
    for field, wanted in FIXED[name].items():
        given = config.get(field, PUBLISHED_DEFAULTS.get(field, wanted))
        if given != wanted:
            raise ValueError(f"{name}: {field} must be {wanted!r}, got {given!r}")
    unknown = set(config) - set(FIXED[name]) - IGNORED[name] - {"_class_name", "_diffusers_version"}
    if unknown:
        raise ValueError(f"{name}: unknown fields {sorted(unknown)}")
    if name == "UniPCMultistepScheduler":
        return None
    return alpha_bar(config.get("snr_shift_scale", 3.0))  # the published default


def add_noise(z0: Tensor, eps: Tensor, alpha_bar_t: float | Tensor) -> Tensor:
    """z_t = √ᾱ_t · z0 + √(1 − ᾱ_t) · ε. alpha_bar_t here and below: ᾱ at t, one number or [B]; latents in any dtype,
    [B, ...], weighted in float32 at least (_weights) and given back in their own."""
    a, b = _weights(alpha_bar_t, z0)
    # z_t = √ᾱ_t · z0 + √(1 − ᾱ_t) · ε                                                     Mirage §3.1
    return (a * z0 + b * eps).to(z0.dtype)


def v_target(z0: Tensor, eps: Tensor, alpha_bar_t: float | Tensor) -> Tensor:
    """What the transformer is trained to predict from z_t: v = √ᾱ_t · ε − √(1 − ᾱ_t) · z0."""
    a, b = _weights(alpha_bar_t, z0)
    # v = √ᾱ_t · ε − √(1 − ᾱ_t) · z0
    return (a * eps - b * z0).to(z0.dtype)


def z0_from_v(z_t: Tensor, v: Tensor, alpha_bar_t: float | Tensor) -> Tensor:
    """The clean latent that z_t and v together name: z0 = √ᾱ_t · z_t − √(1 − ᾱ_t) · v."""
    a, b = _weights(alpha_bar_t, z_t)
    # z0 = √ᾱ_t · z_t − √(1 − ᾱ_t) · v
    return (a * z_t - b * v).to(z_t.dtype)


def z0_from_flow(z_t: Tensor, v: Tensor, sigma: float | Tensor) -> Tensor:
    """The clean latent of a flow, z_t − σ · v; sigma is one number or [B]."""
    # x0 = z_t − σ · v
    return (z_t - _column(sigma, z_t) * v).to(z_t.dtype)


def denoise(dit: Callable, z_t: Tensor, t: int | Tensor, text: Tensor, alpha_bar: Tensor | None = None) -> Tensor:
    """One call: z_t [B, C, F, h, w] (Mirage: z_NI), t an int or [B], text [B, L, D] -> z0, shape and dtype of z_t.

    alpha_bar: the table [1000] of a v-predicting transformer, or None for one that predicts a flow: then σ is 1. The
    transformer is given z_t, t and text as they are; no noise is added.
    """
    prediction = dit(z_t, t, text)
    if alpha_bar is None:
        # z_DR = z_NI − prediction: the whole way from insertion to truth, whatever σ belongs to t    ChopGrad B.4
        return z0_from_flow(z_t, prediction, 1.0)
    return z0_from_v(z_t, prediction, alpha_bar[torch.as_tensor(t, device=alpha_bar.device)])


def _weights(alpha_bar_t: float | Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    a = torch.as_tensor(alpha_bar_t, dtype=torch.float64)
    return _column(a.sqrt(), like), _column((1 - a).sqrt(), like)


def _column(weight: float | Tensor, like: Tensor) -> Tensor:
    """A number or [B] -> [B or 1, 1, ...], at least float32: √ᾱ rounded to bfloat16 would dim the whole latent."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.as_tensor(weight).to(like.device, dtype).reshape(-1, *[1] * (like.ndim - 1))


if __name__ == "__main__":
    table = alpha_bar()
    for t in (0, 199, 399, 999):
        print(f"t {t:3d}   ᾱ {float(table[t]):.4f}   z0 = {float(table[t].sqrt()):.3f} z_t − "
              f"{float((1 - table[t]).sqrt()):.3f} v")
    torch.manual_seed(0)
    z0, eps = torch.randn(2, 1, 16, 3, 8, 12, dtype=torch.float64)
    z_t = add_noise(z0, eps, table[199])
    oracle = denoise(lambda z, t, text: v_target(z0, eps, table[t]), z_t, 199, None, table)
    print(f"one step with a perfect transformer, largest error {float((oracle - z0).abs().max()):.0e}")
    a, b = float(table[199].sqrt()), float((1 - table[199]).sqrt())
    print(f"z_NI comes out unchanged where v = {(a - 1) / b:.3f} z_NI")
