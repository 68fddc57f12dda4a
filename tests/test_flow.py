"""Flow matching: the loss from what the network was shown, the sampler against diffusers' Euler steps."""

import numpy as np
import pytest
import torch
from torch import Generator

from mirage_min.method.flow import flow_loss, sample, shifted
from tests import small
from tests.torchvision_stub import stub

B, C, F, h, w = 2, 3, 4, 2, 5


def latents(seed=0, dtype=torch.float64):
    return torch.randn(B, C, F, h, w, generator=Generator().manual_seed(seed), dtype=dtype)


class Shown:
    """A network that says `answer`, and remembers what it was asked."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def __call__(self, z, t):
        self.asked.append((z.clone(), t.clone()))
        return self.answer(z, t) if callable(self.answer) else self.answer


@pytest.mark.parametrize("clean", [0, 1, 3])
def test_the_loss_is_the_squared_error_of_the_flow_outside_the_clean_latents(clean):
    """In loops: the noise is found again from the mix that the network was shown."""
    z, network = latents(), Shown(latents(1))
    with small.unchanged(z):
        loss = flow_loss(network, z, Generator().manual_seed(5), clean=clean)
    (mix, t), = network.asked
    assert t.shape == (B, F) and torch.equal(mix[:, :, :clean], z[:, :, :clean]) and not t[:, :clean].any()
    total, count = 0.0, 0
    for b in range(B):
        for f in range(clean, F):
            sigma = float(t[b, f]) / 1000
            assert 0 < sigma < 1
            eps = (mix[b, :, f] - (1 - sigma) * z[b, :, f]) / sigma
            assert 0.4 < eps.std() < 1.8, "noise of another size"
            total += float((network.answer[b, :, f] - (eps - z[b, :, f])).square().sum())
            count += eps.numel()
    assert float(loss) == pytest.approx(total / count, rel=1e-5)


def test_with_a_generator_for_each_a_sample_has_the_same_noise_whatever_it_is_with():
    z, together, alone = latents(), Shown(latents(1)), Shown(latents(1)[1:])
    flow_loss(together, z, [Generator().manual_seed(k) for k in (3, 4)])
    flow_loss(alone, z[1:], [Generator().manual_seed(4)])
    (mix, t), (one, its_t) = together.asked[0], alone.asked[0]
    assert torch.equal(mix[1:], one) and torch.equal(t[1:], its_t) and not torch.equal(t[0], t[1])


def test_noise_levels_differ_between_latents_and_samples_and_lean_to_one():
    z, network = torch.zeros(400, 1, 9, 1, 1), Shown(torch.zeros(()))
    flow_loss(network, z, Generator().manual_seed(0))
    sigma = network.asked[0][1][:, 1:] / 1000
    assert len(sigma.unique()) > 3000
    # u ~ U(0, 1) has its quartiles at .25, .5 and .75: σ = 5u / (1 + 4u) has .625, .833 and .9375
    found = torch.quantile(sigma.flatten(), torch.tensor([0.25, 0.5, 0.75]))
    assert (found - torch.tensor([0.625, 0.8333, 0.9375])).abs().max() < 0.02, found


def test_a_network_that_knows_the_flow_has_no_loss_and_the_clean_latent_no_gradient():
    z = latents()

    def knows(mix, t):
        sigma = (t / 1000)[:, None, :, None, None].double()
        return torch.where(sigma > 0, (mix - z) / sigma, 7.0)
    assert flow_loss(knows, z, Generator().manual_seed(0)) < 1e-8
    answer = latents(1).requires_grad_()
    grad, = torch.autograd.grad(flow_loss(Shown(answer), z, Generator().manual_seed(0)), answer)
    assert not grad[:, :, 0].any() and grad[:, :, 1:].all()


def test_the_same_draws_give_the_same_loss_and_others_another():
    z, answer = latents(), latents(1)
    a, b, c = (float(flow_loss(Shown(answer), z, Generator().manual_seed(seed))) for seed in (1, 1, 2))
    assert a == b != c


@pytest.mark.parametrize("steps, shift", [(1, 5.0), (4, 5.0), (7, 1.0), (20, 3.0)])
def test_steps_are_diffusers_own(steps, shift):
    """A network whose answer bends the way; noise levels spaced as Wan spaces them, evenly before the shift."""
    stub()
    from diffusers import FlowMatchEulerDiscreteScheduler

    def bent(z, t):
        return z * (t.double() / 1000)[:, None, :, None, None].cos() + z.roll(1, dims=-1).tanh()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1])
    noise, wanted = latents(), latents()
    for t in scheduler.timesteps:
        wanted = scheduler.step(bent(wanted, t.expand(B, F)), t, wanted, return_dict=False)[0].double()
    with small.unchanged(noise):
        found = sample(bent, noise, steps, shift)
    difference = (found - wanted).abs().max()
    assert difference < 1e-5 * wanted.std(), f"largest difference {difference:.1e}, std {wanted.std():.2f}"


def test_a_straight_way_is_followed_exactly_in_any_number_of_steps():
    noise, z = latents(), latents(1)
    for steps in (1, 3, 10):
        assert (sample(lambda z_t, t: noise - z, noise, steps) - z).abs().max() < 1e-12


@pytest.mark.parametrize("n", [1, 2])
def test_given_latents_are_shown_clean_at_every_step_and_come_out_as_they_are(n):
    noise, given, network = latents(), latents(1)[:, :, :n], Shown(lambda z, t: torch.ones_like(z))
    found = sample(network, noise, 3, given=given)
    assert len(network.asked) == 3 and torch.equal(found[:, :, :n], given)
    for z, t in network.asked:
        assert torch.equal(z[:, :, :n], given) and not t[:, :n].any()
        assert len(t[:, n:].unique()) == 1 and t[0, -1] > 0
    levels = [float(t[0, -1]) for _, t in network.asked]
    assert levels == pytest.approx([1000, 1000 * 10 / 11, 1000 * 5 / 7])  # u of 1, 2/3, 1/3
    assert (found[:, :, n:] - (noise[:, :, n:] - 1)).abs().max() < 1e-12


def test_the_ends_stay_and_a_shift_of_one_changes_nothing():
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert (shifted(u, 1.0) - u).abs().max() < 1e-15
    assert shifted(u, 5.0)[0] == 0 and shifted(u, 5.0)[-1] == 1


def test_bfloat16_is_kept_and_small_steps_are_not_lost_in_it():
    """A thousand steps, each smaller than a bfloat16 can add to 1."""
    noise = torch.ones(1, 1, 1, 1, 1, dtype=torch.bfloat16)
    found = sample(lambda z, t: torch.full_like(z, 0.5), noise, 1000, shift=1.0)
    assert found.dtype == torch.bfloat16 and float(found) == pytest.approx(0.5, abs=1e-2)
    network = Shown(torch.zeros(()))
    flow_loss(network, latents(dtype=torch.bfloat16), Generator().manual_seed(0))
    assert network.asked[0][0].dtype == torch.bfloat16 and network.asked[0][1].dtype == torch.float32


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="clean must be from 0 to 3.* got 4"):
        flow_loss(Shown(0), latents(), Generator(), clean=4)
    for n in (1, 3):
        with pytest.raises(ValueError, match=f"wanted a generator for each of 2 samples, got {n}"):
            flow_loss(Shown(0), latents(), [Generator() for _ in range(n)])
    with pytest.raises(ValueError, match=r"given must be the first latents of .*, got \[2, 3, 1, 2, 4\]"):
        sample(Shown(0), latents(), 2, given=latents()[:, :, :1, :, 1:])
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        sample(Shown(0), latents(), 0)
