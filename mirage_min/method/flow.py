"""Flow matching with a noise level for each latent: the loss to train with, the steps to sample with (Wan 2.2).

A clean latent z and noise ε are mixed, and the network predicts the way from one to the other,

    z_σ = (1 − σ) z + σ ε,     v(z_σ, t) ≈ ε − z,     t = 1000 σ

so that a sample is made by following −v from noise, σ = 1, to σ = 0, in steps. Training draws σ evenly, sampling spaces
it evenly, and both then shift it towards 1, where the large shapes are decided:

    σ = s u / (1 + (s − 1) u),     u in 0 .. 1,     s = 5

The latents of a video may have different σ. So a video can continue what is known: its first latent, an image or
the last of the chunk before, is clean, at t = 0, in training as in sampling, and is left out of the loss. `predict` is
a transformer with its other inputs bound: lambda z, t: dit(z, t, text). One step at a fixed t is in one_step.py.
Left out: samplers of higher order (UniPC), and guidance, which belongs in `predict`.

    python -m mirage_min.method.flow         # the best possible network for data of a known spread, in 1 to 50 steps
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Generator, Tensor

Predict = Callable[[Tensor, Tensor], Tensor]  # (z_t [B, C, F, h, w], t [B, F] in 0 .. 1000) -> v like z_t


def shifted(u: Tensor, shift: float) -> Tensor:
    """Even noise levels u in 0 .. 1 -> σ in 0 .. 1, like u, shifted towards 1 by shift > 1 (Wan 2.2: 5)."""
    # σ = s u / (1 + (s − 1) u)
    return shift * u / (1 + (shift - 1) * u)


def flow_loss(predict: Predict, z: Tensor, draws: Generator | list[Generator], shift: float = 5.0, clean: int = 1
              ) -> Tensor:
    """The mean squared error of the flow at random noise levels, one for each latent; a number.

    z      [B, C, F, h, w], latents of the data
    draws  a generator, or one for each sample: then its noise does not depend on the rest of the batch
    clean  how many of the first latents are given as they are, at t = 0, and left out of the loss
    ValueError unless 0 <= clean < F, and for another number of generators.
    """
    F = z.shape[2]
    if not 0 <= clean < F:
        raise ValueError(f"clean must be from 0 to {F - 1}, so that a latent is left to judge, got {clean}")
    if not isinstance(draws, Generator) and len(draws) != len(z):
        raise ValueError(f"wanted a generator for each of {len(z)} samples, got {len(draws)}")
    if isinstance(draws, Generator):
        u, eps = noise_like(z, draws)
    else:
        u, eps = map(torch.cat, zip(*map(noise_like, z.split(1), draws)))
    sigma = shifted(u, shift)
    sigma[:, :clean] = 0
    # z_σ = (1 − σ) z + σ ε,   t = 1000 σ
    each = each_latent(sigma)
    v = predict(((1 - each) * z + each * eps).to(z.dtype), 1000 * sigma)
    # L = mean (v − (ε − z))², over the latents that are not given
    error = (v - (eps - z))[:, :, clean:]
    return error.to(each.dtype).square().mean()


def noise_like(z: Tensor, draws: Generator) -> tuple[Tensor, Tensor]:
    """For z [B, C, F, h, w] even noise levels u [B, F] in 0 .. 1 and noise ε like z, from a generator on any device."""
    u = torch.rand(z.shape[0], z.shape[2], generator=draws, device=draws.device)
    eps = torch.randn(z.shape, generator=draws, device=draws.device, dtype=z.dtype)
    return u.to(z.device), eps.to(z.device)


def sample(predict: Predict, noise: Tensor, steps: int, shift: float = 5.0, given: Tensor | None = None) -> Tensor:
    """From noise to a latent video, in `steps` steps of Euler's method; shape and dtype of the noise.

    noise  [B, C, F, h, w]
    given  [B, C, n, h, w]: clean latents in place of the first n, which the network sees at t = 0; n may be 0
    ValueError if `given` does not fit the noise, or steps < 1.
    """
    given = noise[:, :, :0] if given is None else given
    n = given.shape[2]
    if given.shape != noise[:, :, :n].shape:
        raise ValueError(f"given must be the first latents of {list(noise.shape)}, got {list(given.shape)}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    z = noise.to(torch.promote_types(noise.dtype, torch.float32))  # many small steps, not lost in bfloat16
    rest = z[:, :, n:]
    for sigma, after in pairwise(shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).tolist()):
        t = noise.new_full((len(noise), noise.shape[2]), 1000 * sigma, dtype=torch.float32)
        t[:, :n] = 0
        v = predict(torch.cat([given, rest.to(noise.dtype)], dim=2), t)
        # z_σ' = z_σ + (σ' − σ) v
        rest = rest + (after - sigma) * v[:, :, n:]
    return torch.cat([given, rest.to(noise.dtype)], dim=2)


def each_latent(sigma: Tensor) -> Tensor:
    """A noise level for each latent, [B, F] -> [B, 1, F, 1, 1], to be multiplied with latents [B, C, F, h, w]."""
    return sigma[:, None, :, None, None]


if __name__ == "__main__":
    SPREAD = 0.5

    def best(z: Tensor, t: Tensor) -> Tensor:
        """E[ε − z | z_σ] for data drawn from N(0, SPREAD²): what a network with this loss would become."""
        sigma = each_latent(t / 1000)
        return (sigma - (1 - sigma) * SPREAD**2) / ((1 - sigma) ** 2 * SPREAD**2 + sigma**2) * z

    draws = Generator().manual_seed(0)
    z = SPREAD * torch.randn(64, 4, 9, 8, 8, generator=draws)
    print(f"loss of the best network {float(flow_loss(best, z, draws)):.3f}, "
          f"of one that says 0 {float(flow_loss(lambda z, t: 0 * z, z, draws)):.3f}")
    noise = torch.randn(z.shape, generator=draws)
    for steps in (1, 2, 5, 20, 50):
        print(f"{steps:2} steps: a spread of {float(sample(best, noise, steps).std()):.3f}, that of the data {SPREAD}")
    video = sample(best, noise, 20, given=z[:, :, :1])
    print(f"the first latent given: kept {torch.equal(video[:, :, 0], z[:, :, 0])}")
