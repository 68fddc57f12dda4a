"""Noise schedules, and a clean latent from one call of the network (Mirage §3.1, §3.2; ChopGrad B.4).

Diffusion mixes a clean latent z0 with noise ε. Networks differ in the mix z_t, and in what they predict from it:

    z_t = √ᾱ_t · z0 + √(1 − ᾱ_t) · ε                                                     Mirage §3.1
        CogVideoX   v = √ᾱ_t · ε − √(1 − ᾱ_t) · z0      hence    z0 = √ᾱ_t · z_t − √(1 − ᾱ_t) · v
        SD-Turbo    ε                                   hence    z0 = (z_t − √(1 − ᾱ_t) · ε) / √ᾱ_t
    z_t = (1 − σ) · z0 + σ · ε
        Wan         v = ε − z0, a flow                  hence    z0 = z_t − σ · v
    z   = z0 + σ · ε, which is shrunk by 1 − t = 1 / (1 + σ) before the network sees it
        Cosmos      F = ε − z0, as Wan at σ = t         hence    z0 = (1 − t) · z − t · F((1 − t) · z, t)

Mirage takes z_NI itself for z_t at a small fixed t (§3.2), and adds no noise, neither in training nor at inference: the
wrong light and the missing shadow are the "noise" to remove. Fresh noise would bury details of a scene that has to
stay, which one step cannot bring back, and would make the result a matter of chance. So t is not a noise level here. It
chooses √ᾱ_t and √(1 − ᾱ_t), how much of z_NI goes straight through and how much the prediction weighs, and it asks the
transformer for what it has learned to do at that t: at 199, small repairs.

Mirage's Eq. 1 states the loss for a network that predicts ε; the published CogVideoX predicts v. Left out: samplers of
many steps, guidance, and the loss of Eq. 1 (the scripts have theirs). schedules.py reads published schedules.

    python -m mirage_min.method.one_step           # the schedules, and the weights of one step at some t
"""

from collections.abc import Callable

import torch
from torch import Tensor

STEPS, BETA_START, BETA_END = 1000, 0.00085, 0.012  # CogVideoX's and Stable Diffusion's
T_MIRAGE, T_WAN = 199, 200                          # Mirage §3.2, ChopGrad B.4


def alpha_bar(snr_shift: float = 1.0, zero_terminal_snr: bool = True) -> Tensor:
    """ᾱ, [1000], float64: falls from about 1, to exactly 0 with zero_terminal_snr.

    β is the square of STEPS even steps from √BETA_START to √BETA_END, and ᾱ_t = Π (1 − β) up to and with t. Then the
    signal-to-noise ratio ᾱ / (1 − ᾱ) is divided by snr_shift. Last, with zero_terminal_snr, √ᾱ is moved and stretched,
    linearly, so that its last value is 0 and its first what it was.

    snr_shift          1 for CogVideoX 5b and 1.5 and for Stable Diffusion, 3 for CogVideoX 2b
    zero_terminal_snr  True for CogVideoX, False for Stable Diffusion (SD-Turbo: R3D2, Difix)
    """
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, STEPS, dtype=torch.float64) ** 2
    # ᾱ_t = Π (1 − β)
    a = torch.cumprod(1 - betas, dim=0)
    # signal-to-noise ratio ᾱ / (1 − ᾱ) divided by snr_shift
    a = a / (snr_shift + (1 - snr_shift) * a)
    if not zero_terminal_snr:
        return a
    # √ᾱ moved so that it ends at 0, then stretched so that it still starts where it did (zero terminal SNR)
    root = a.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


# ---- noise, and what networks predict from it ------------------------------------------------------------------------
# The header has the equations. Latents are [B, ...] of one shape and any dtype; they are weighted in float32 at least
# (_weights) and returned in their own dtype. alpha_bar_t is ᾱ at t, sigma a flow's σ: one number, or [B].

def add_noise(z0: Tensor, eps: Tensor, alpha_bar_t: float | Tensor) -> Tensor:
    """z0, ε [B, ...] -> the mix z_t of a clean latent and noise, as CogVideoX and Stable Diffusion mix them."""
    a, b = _weights(alpha_bar_t, z0)
    # z_t = √ᾱ_t · z0 + √(1 − ᾱ_t) · ε                                                     Mirage §3.1
    return (a * z0 + b * eps).to(z0.dtype)


def v_target(z0: Tensor, eps: Tensor, alpha_bar_t: float | Tensor) -> Tensor:
    """z0, ε [B, ...] -> the velocity v of that mix, which CogVideoX is trained to predict from z_t."""
    a, b = _weights(alpha_bar_t, z0)
    # v = √ᾱ_t · ε − √(1 − ᾱ_t) · z0
    return (a * eps - b * z0).to(z0.dtype)


def z0_from_v(z_t: Tensor, v: Tensor, alpha_bar_t: float | Tensor) -> Tensor:
    """z_t, v [B, ...] -> the clean latent that a mix and its velocity determine (CogVideoX)."""
    a, b = _weights(alpha_bar_t, z_t)
    # z0 = √ᾱ_t · z_t − √(1 − ᾱ_t) · v
    return (a * z_t - b * v).to(z_t.dtype)


def z0_from_epsilon(z_t: Tensor, eps: Tensor, alpha_bar_t: float | Tensor) -> Tensor:
    """z_t, ε [B, ...] -> the clean latent that a mix and its noise determine (Stable Diffusion). ᾱ must not be 0."""
    a, b = _weights(alpha_bar_t, z_t)
    # z0 = (z_t − √(1 − ᾱ_t) · ε) / √ᾱ_t
    return ((z_t - b * eps) / a).to(z_t.dtype)


def z0_from_flow(z_t: Tensor, v: Tensor, sigma: float | Tensor) -> Tensor:
    """z_t, v [B, ...] -> the clean latent that a mix at noise level sigma and its flow determine (Wan)."""
    # z0 = z_t − σ · v                                                                      ChopGrad B.4
    return (z_t - _column(sigma, z_t) * v).to(z_t.dtype)


def _weights(alpha_bar_t: float | Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """√ᾱ and √(1 − ᾱ), each a _column."""
    a = torch.as_tensor(alpha_bar_t, dtype=torch.float64)
    return _column(a.sqrt(), like), _column((1 - a).sqrt(), like)


def _column(weight: float | Tensor, like: Tensor) -> Tensor:
    """A number or [B] -> [B or 1, 1, ...], at least float32: √ᾱ rounded to bfloat16 would dim the whole latent."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.as_tensor(weight, dtype=torch.float64).to(like.device, dtype).reshape(-1, *[1] * (like.ndim - 1))


# ---- one step --------------------------------------------------------------------------------------------------------
# A network is given the latent, the timestep and the text as they are. No noise is added.

def denoise(dit: Callable, z_t: Tensor, t: int | Tensor, text: Tensor, alpha_bar: Tensor | None = None) -> Tensor:
    """One call of a transformer: z_t [B, C, F, h, w] (Mirage: z_NI) -> z0, shape and dtype of z_t.

    t          an int or [B]
    text       [B, L, D]
    alpha_bar  the table [1000] of a network that predicts v; None for one that predicts a flow: then σ is 1
    """
    prediction = dit(z_t, t, text)
    if alpha_bar is None:
        # z_DR = z_NI − prediction: the whole way from insertion to truth, whatever σ belongs to t    ChopGrad B.4
        return z0_from_flow(z_t, prediction, 1.0)
    return z0_from_v(z_t, prediction, alpha_bar[torch.as_tensor(t, device=alpha_bar.device)])


def denoise_epsilon(unet: Callable, z_t: Tensor, t: int | Tensor, text: Tensor, alpha_bar: Tensor) -> Tensor:
    """One call of a network that predicts ε (SD-Turbo: R3D2, Difix): z_t [N, C, h, w] -> z0, shape and dtype of z_t.

    At t = 999 √ᾱ is .068: an error of ε counts 14.6 times there, and .57 times at 199.

    t, text    an int or [N], and [N, L, D]
    alpha_bar  the table [1000] without zero terminal SNR
    """
    eps = unet(z_t, t, text)
    return z0_from_epsilon(z_t, eps, alpha_bar[torch.as_tensor(t, device=alpha_bar.device)])


def denoise_edm(dit: Callable, z: Tensor, sigma: float | Tensor, text: Tensor | None = None) -> Tensor:
    """One call of a network with EDM's noise levels (Cosmos-Predict2): z [B, C, F, h, w] -> z0, shape and dtype of z.

    DiffusionHarmonizer's "timestep 250" is sigma = .25: t = .2, and z0 = .8 z − .2 F(.8 z, .2).

    sigma  noise in units of the clean latent's: one number, or [B]
    text   [B, L, D], or None
    """
    # t = σ / (1 + σ)
    t = sigma / (1 + sigma)
    # z_t = (1 − t) · z, the network's input; z0 = z_t − t · F(z_t, t)
    z_t = ((1 - _column(t, z)) * z).to(z.dtype)
    return z0_from_flow(z_t, dit(z_t, t, text), t)


if __name__ == "__main__":
    table = alpha_bar()
    for t in (0, 199, 399, 999):
        print(f"t {t:3d}   ᾱ {float(table[t]):.4f}   z0 = {float(table[t].sqrt()):.3f} z_t − "
              f"{float((1 - table[t]).sqrt()):.3f} v")
    turbo = alpha_bar(zero_terminal_snr=False)
    for t in (199, 999):
        a, b = float(turbo[t].sqrt()), float((1 - turbo[t]).sqrt())
        print(f"t {t:3d}   ᾱ {a * a:.4f}   z0 = {1 / a:.3f} z_t − {b / a:.3f} ε")
    torch.manual_seed(0)
    z0, eps = torch.randn(2, 1, 16, 3, 8, 12, dtype=torch.float64)
    perfect = {
        "v": denoise(lambda z, t, text: v_target(z0, eps, table[t]), add_noise(z0, eps, table[199]), 199, None, table),
        "ε": denoise_epsilon(lambda z, t, text: eps, add_noise(z0, eps, turbo[999]), 999, None, turbo),
        "EDM": denoise_edm(lambda z, t, text: eps - z0, z0 + 0.25 * eps, 0.25),
    }
    for name, found in perfect.items():
        print(f"one step with a perfect network of {name}: largest error {float((found - z0).abs().max()):.0e}")
    a, b = float(table[199].sqrt()), float((1 - table[199]).sqrt())
    print(f"z_NI comes out unchanged where v = {(a - 1) / b:.3f} z_NI")
