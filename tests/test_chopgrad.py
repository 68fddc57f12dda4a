"""ChopGrad against its definition: each loss by itself, decoded again with every cache outside its reach cut off.

The spec shares nothing with chopgrad.py: it cuts by no_grad, decodes every window anew and leaves the rest to autograd.
"""

from functools import cache as once
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from experiments.chopgrad_memory import passes
from mirage_min.method import chopgrad, injection, tiles
from mirage_min.networks.vae_cogvideox import CogVideoXVAE, CogVideoXVAEConfig
from mirage_min.networks.vae_wan import WanVAE, WanVAEConfig
from mirage_min.training.memory import SavedBytes
from tests.small import unchanged
from tests.torchvision_stub import stub

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # autograd warns, once, of gradients laid out badly
both = pytest.mark.parametrize("name", ["cogvideox", "wan"])
ALL = slice(None)
LATENTS = {"cogvideox": 9, "wan": 5, "diffusers cogvideox": 5, "diffusers wan": 4}  # 4, 5, 2 and 4 groups
# 3 x 2 cells in tiles (1, 1), (2, 2) and (3, 1); with a margin of 1 the context of the last of these begins at cell 1
WHOLE, UNEVEN, THREE = ([(0, 3)], [(0, 2)]), ([(0, 1), (1, 3)], [(0, 1), (1, 2)]), ([(0, 1), (1, 2), (2, 3)], [(0, 2)])


@once
def small(name: str, dtype: torch.dtype = torch.float64):
    """A random decoder in which every parameter matters."""
    torch.manual_seed(0)
    size = {"block_out_channels": (4, 4, 8, 8), "latent_channels": 3, "layers_per_block": 1, "norm_num_groups": 2}
    size_wan = {"base_dim": 4, "z_dim": 3, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1,
                "latents_mean": [0.1, -0.2, 0.3], "latents_std": [0.8, 1.0, 1.2]}
    if name.startswith("diffusers"):
        stub()
        from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan

        from examples.chopgrad_diffusers import CogVideoXGroups, WanGroups
        return (CogVideoXGroups(AutoencoderKLCogVideoX(**size).to(dtype)) if name == "diffusers cogvideox" else
                WanGroups(AutoencoderKLWan(**size_wan).to(dtype)))
    vae = CogVideoXVAE(CogVideoXVAEConfig(**size)) if name == "cogvideox" else WanVAE(WanVAEConfig(**size_wan))
    injection.attach(vae, [2, 3][: len(vae.inject_channels)])
    for p in vae.fusion.parameters():
        nn.init.normal_(p, std=0.2)
    return vae.to(dtype)


def module(vae) -> nn.Module:
    return vae if isinstance(vae, nn.Module) else vae.vae  # the adapters of examples/ are no modules


def clip(vae, F: int, T: int | None = None, B: int = 1):
    """Random latents of 3 x 2 cells, features to inject where the VAE takes them, a loss that differs everywhere."""
    torch.manual_seed(1)
    T, like = T or 4 * F - 3, {"dtype": next(module(vae).parameters()).dtype}
    z, target = torch.randn(B, 3, F, 3, 2, **like), torch.randn(B, 3, T, 24, 16, **like)
    weight = torch.rand(B, 1, T, 24, 16, **like)
    sizes = [(24, 16), (12, 8)] if isinstance(vae, CogVideoXVAE) else [(12, 8)]
    inject = [torch.randn(B, c, T, *size, **like) for c, size in zip((2, 3), sizes)] if vae is module(vae) else []

    def loss_fn(x: Tensor, where) -> Tensor:
        return (1 + where[2].start) * (weight[where[:1] + (ALL,) + where[2:]] * (x - target[where]) ** 2).sum()
    return z, inject, loss_fn


def spec(vae, z, inject, loss_fn, d: int, borders=WHOLE, margin: int = 0) -> tuple[Tensor, dict]:
    """By definition: L_i of a decode in which group i - d is the first that autograd sees; then the sum over i."""
    F, h, w = z.shape[2:]
    groups, total = vae.decode_groups(F), 0
    z, inject = z.detach().requires_grad_(), [m.detach().requires_grad_() for m in inject]
    for (y0, y1), (x0, x1) in product(*borders):
        ya, yb, xa, xb = max(y0 - margin, 0), min(y1 + margin, h), max(x0 - margin, 0), min(x1 + margin, w)
        for i in range(len(groups)):
            cache, stop = None, 0
            for j, g in enumerate(groups[: i + 1]):
                start, stop = stop, stop + (inject[0].shape[2] - 4 * (F - g.stop) - stop if inject else 0)
                maps = [m[:, :, start:stop, ya * m.shape[3] // h : yb * m.shape[3] // h,
                          xa * m.shape[4] // w : xb * m.shape[4] // w] for m in inject]
                with torch.set_grad_enabled(j >= i - d):
                    x, cache = vae.decode_group(z[:, :, g, ya:yb, xa:xb], cache, maps or None)
                stop = start + x.shape[2]
            where = (ALL, ALL, slice(start, stop), slice(8 * y0, 8 * y1), slice(8 * x0, 8 * x1))
            x = x[..., 8 * (y0 - ya) : 8 * (y1 - ya), 8 * (x0 - xa) : 8 * (x1 - xa)]
            total = total + loss_fn(x, where)
    return total.detach(), gradients(vae, z, inject, total)


def gradients(vae, z, inject, total: Tensor) -> dict:
    leaves = {"z": z, **{f"inject {i}": m for i, m in enumerate(inject)},
              **{name: p for name, p in module(vae).named_parameters() if p.requires_grad}}
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()), allow_unused=True)))


def run(vae, z, inject, loss_fn, backward=chopgrad.backward, **how) -> tuple[Tensor, dict]:
    """chopgrad.backward, its gradients under the spec's names."""
    module(vae).zero_grad()
    inject = [m.detach().requires_grad_() for m in inject]
    loss, grad_z = backward(vae, z, loss_fn, inject=inject, **how)
    return loss, {"z": grad_z, **{f"inject {i}": m.grad for i, m in enumerate(inject)},
                  **{name: p.grad for name, p in module(vae).named_parameters()}}


def difference(got: tuple[Tensor, dict], want: tuple[Tensor, dict], floor: float = 1e-6) -> float:
    """The largest relative difference of the loss or of any gradient; tiny ones against `floor` of the largest."""
    least = floor * max(g.norm() for g in want[1].values() if g is not None)
    worst = [abs(got[0] - want[0]) / abs(want[0])]
    for name, g in want[1].items():
        mine = got[1][name]
        g, mine = torch.zeros(1) if g is None else g, torch.zeros(1) if mine is None else mine
        worst.append((mine - g).norm() / max(g.norm(), least))
    return float(torch.stack([w.double() for w in worst]).max())  # Python's max would pass over a NaN


def check(got, want, tolerance: float = 1e-9, **how) -> None:
    worst = difference(got, want, **how)
    assert worst <= tolerance, f"relative difference to the spec {worst:.2e}, tolerance {tolerance:.0e}"


# ---- Algorithm 1 to the letter --------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("d", range(6))
def test_algorithm_1_equals_its_definition_and_the_general_function(name, d):
    vae = small(name)
    z, _, loss_fn = clip(vae, LATENTS[name])
    want = spec(vae, z, [], loss_fn, d)
    assert want[1]["z"].abs().max() > 0
    for backward in (chopgrad.algorithm_1, chopgrad.backward):
        module(vae).zero_grad()
        with unchanged(z):
            loss, grad_z = backward(vae, z, loss_fn, d_trunc=d)
        check((loss, {"z": grad_z, **{n: p.grad for n, p in module(vae).named_parameters()}}), want, 1e-12)


@pytest.mark.parametrize("d", range(5))
def test_on_a_recurrence_of_plain_numbers_truncation_cuts_a_geometric_series(d):
    """c_i = r c_{i-1} + p z_i, x_i = c_i: dL_i/dz_j = p r^(i - j), so z_j gets p (1 + r + … + r^n), n groups on."""
    r, p, N = 0.3, torch.tensor(2.0, dtype=torch.float64, requires_grad=True), 5

    class Numbers:
        def decode_groups(self, F):
            return [slice(i, i + 1) for i in range(F)]

        def decode_group(self, z_i, cache, inject=None):
            c_i = p * z_i + (0 if cache is None else r * cache["c"])
            return c_i, {"c": c_i, "nothing remembered": z_i.new_empty(0)}
    z = torch.arange(1.0, N + 1, dtype=torch.float64).view(1, 1, N, 1, 1)
    reached = [[j for j in range(N) if i - d <= j <= i] for i in range(N)]  # by the loss of group i
    wanted = [sum(2.0 * r ** (i - j) for i in range(N) if j in reached[i]) for j in range(N)]
    of_p = sum(r ** (i - j) * (j + 1) for i in range(N) for j in reached[i])
    for backward in (chopgrad.algorithm_1, chopgrad.backward):
        p.grad = None
        _, grad_z = backward(Numbers(), z, lambda x, where: x.sum(), d_trunc=d)
        assert grad_z.flatten().tolist() == pytest.approx(wanted, rel=1e-12), f"{backward.__name__}: wanted {wanted}"
        assert p.grad.item() == pytest.approx(of_p, rel=1e-12)


@both
@pytest.mark.parametrize("d", [0, 1, 2])
def test_algorithm_1_holds_no_more_for_a_longer_clip(name, d):
    vae = small(name)

    def peak(F):
        with SavedBytes(vae) as held:
            z = torch.randn(1, 3, F, 3, 2, dtype=torch.float64)
            chopgrad.algorithm_1(vae, z, lambda x, where: x.square().sum(), d)
        return held.peak
    first = 2 * d + 5 if name == "cogvideox" else d + 3
    peaks = [peak(F) for F in (first, first + 4)]
    assert max(peaks) <= 1.01 * min(peaks), f"peak bytes {peaks}"


# ---- the function that training calls -------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("d", [0, 1, 2, 3, None])
def test_every_gradient_is_that_of_the_definition(name, d):
    vae = small(name)
    case = clip(vae, LATENTS[name])
    want = spec(vae, *case, 99 if d is None else d)
    check(run(vae, *case, d_trunc=d), want)
    check(run(vae, *case, d_trunc=d, delayed=True, checkpoint=d == 2), want)


@both
def test_reaching_all_groups_is_full_backpropagation_through_decode(name):
    vae = small(name)
    z, inject, loss_fn = clip(vae, LATENTS[name])
    weights, inject = torch.ones_like(z).requires_grad_(), [m.requires_grad_() for m in inject]
    x = vae.decode(weights * z, inject)
    want = loss_by_group(vae, x, loss_fn, LATENTS[name])
    want = want.detach(), gradients(vae, weights, inject, want)
    for d in (len(vae.decode_groups(LATENTS[name])) - 1, None):
        weights.grad = None
        z_dr = weights * z
        loss, found = run(vae, z_dr, inject, loss_fn, d_trunc=d)
        z_dr.backward(found["z"])
        check((loss, found | {"z": weights.grad}), want)


def loss_by_group(vae, x, loss_fn, F: int) -> Tensor:
    total, stop = 0, 0
    for g in vae.decode_groups(F):
        start, stop = stop, x.shape[2] - 4 * (F - g.stop)
        total = total + loss_fn(x[:, :, start:stop], (ALL, ALL, slice(start, stop), ALL, ALL))
    return total


@both
@pytest.mark.parametrize("tiles, borders, margin", [((2, 2), UNEVEN, 0), ((2, 2), UNEVEN, 1), ((3, 1), THREE, 1)],
                         ids=["no margin", "margin", "three with margins"])
def test_tiles_with_their_margins_are_decodes_of_their_own(name, tiles, borders, margin):
    vae = small(name)
    case = clip(vae, 5 if name == "cogvideox" else 3)
    want = spec(vae, *case, 1, borders, margin)
    check(run(vae, *case, d_trunc=1, tiles=tiles, margin=margin, checkpoint=margin == 1), want)


@both
def test_a_margin_over_the_whole_frame_makes_tiles_exact(name):
    vae = small(name)
    case = clip(vae, 3)
    check(run(vae, *case, tiles=(3, 2), margin=3), run(vae, *case))


def test_pieces_cover_every_pixel_once():
    vae, taken = small("wan"), torch.zeros(1, 3, 9, 24, 16)

    def loss_fn(x, where):
        assert x.shape == taken[where].shape
        taken[where] += 1
        return x.sum()
    chopgrad.backward(vae, clip(vae, 3)[0], loss_fn, tiles=(2, 2), margin=1)
    assert taken.min() == taken.max() == 1


@both
@pytest.mark.parametrize("F, T, B", [(1, 1, 2), (2, None, 1), (4, None, 1)])
def test_one_latent_even_counts_and_batches(name, F, T, B):
    vae = small(name)
    case = clip(vae, F, T or (4 * F if name == "cogvideox" else None), B)
    check(run(vae, *case, d_trunc=1), spec(vae, *case, 1))


@both
@pytest.mark.parametrize("attached", [True, False])
def test_a_loss_may_look_at_a_single_frame(name, attached):
    """Groups without loss give a zero, with a graph behind it or without; their own latents still reach the frame."""
    vae = small(name)
    z, inject, _ = clip(vae, LATENTS[name])
    frame = 4 * LATENTS[name] - 3 - 5  # one of the last group but one

    def loss_fn(x, where):
        at = frame - where[2].start
        if 0 <= at < x.shape[2]:
            return x[:, :, at].square().sum()
        return 0 * x.sum() if attached else x.new_zeros(())
    check(run(vae, z, inject, loss_fn, d_trunc=1, delayed=attached), spec(vae, z, inject, loss_fn, 1))


@both
def test_a_frozen_decoder_gives_the_same_gradient_of_z_and_none_of_its_own(name):
    vae = small(name)
    case = clip(vae, LATENTS[name])
    want = spec(vae, *case, 1)
    vae.requires_grad_(False)
    try:
        got = run(vae, *case, d_trunc=1)
    finally:
        vae.requires_grad_(True)
    check(got, (want[0], {name: g for name, g in want[1].items() if name == "z" or name.startswith("inject")}))
    assert all(p.grad is None for p in vae.parameters())


@both
@pytest.mark.parametrize("dtype, mixed, tolerance", [
    (torch.float32, False, 1e-5), (torch.bfloat16, False, 0.1), (torch.float32, True, 0.1)])
def test_low_precision_and_autocast(name, dtype, mixed, tolerance):
    vae = small(name, dtype)
    case = clip(vae, 5)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        got = run(vae, *case, d_trunc=1, checkpoint=mixed)
    # without autocast's cache, which would keep the weights it cast under the spec's no_grad, cut off from their own
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed, cache_enabled=False):
        want = spec(vae, *case, 1)
    assert got[1]["z"].dtype == dtype
    check(got, want, tolerance, floor=1e-2)


def test_gradients_accumulate_over_calls_even_without_grad_mode():
    vae = small("wan")
    z, inject, loss_fn = clip(vae, 3)
    once_, (m,) = run(vae, z, inject, loss_fn), [m.requires_grad_() for m in inject]
    vae.zero_grad()
    with torch.no_grad():
        for _ in range(2):
            loss, grad_z = chopgrad.backward(vae, z, loss_fn, inject=[m])
    twice = {name: p.grad for name, p in vae.named_parameters()} | {"inject 0": m.grad}
    doubled = {name: None if g is None else 2 * g for name, g in once_[1].items() if name != "z"}
    check((loss, twice | {"z": grad_z}), (once_[0], doubled | {"z": once_[1]["z"]}))


@pytest.mark.parametrize("name", ["diffusers cogvideox", "diffusers wan"])
def test_the_adapters_drive_diffusers_own_vaes(name):
    vae = small(name)
    z, _, loss_fn = clip(vae, LATENTS[name])
    check(run(vae, z, [], loss_fn, d_trunc=1, checkpoint=True), spec(vae, z, [], loss_fn, 1))
    z, limit = z.requires_grad_(), 1.0 if name == "diffusers wan" else float("inf")  # diffusers clamps what Wan decodes
    want = loss_by_group(vae, module(vae).decode(z).sample, loss_fn, LATENTS[name])
    want = want.detach(), gradients(vae, z, [], want)
    check(run(vae, z, [], lambda x, where: loss_fn(x.clamp(-limit, limit), where), d_trunc=None), want)


@pytest.mark.parametrize("delayed", [False, True])
def test_passes_through_the_groups_are_as_many_as_promised(delayed, monkeypatch):
    vae = small("wan")
    z, _, loss_fn = clip(vae, 4)
    real, calls = torch.autograd.backward, []
    monkeypatch.setattr(torch.autograd, "backward", lambda *a, **k: (calls.append(1), real(*a, **k)))
    counts = []
    for d in range(5):
        chopgrad.backward(vae, z, loss_fn, d_trunc=d, delayed=delayed)
        counts.append(len(calls))
        calls.clear()
    assert counts == [passes(4, d, delayed) for d in range(5)] == ([4, 6, 6, 4, 4] if delayed else [4, 7, 9, 10, 10])


@both
@pytest.mark.parametrize("how", [{"d_trunc": 0}, {"d_trunc": 1}, {"d_trunc": 1, "delayed": True}, {"d_trunc": 2}])
def test_bytes_held_for_backward_do_not_grow_with_the_clip(name, how):
    vae = small(name)

    def peak(F):
        z = torch.randn(1, 3, F, 3, 2, dtype=torch.float64)
        with SavedBytes(vae) as held:
            chopgrad.backward(vae, z, lambda x, where: x.square().sum(), **how)
        assert held.count == 0, f"{held.count} bytes outlive the call"
        return held.peak
    first = 2 * how["d_trunc"] + 3 if name == "cogvideox" else how["d_trunc"] + 2
    peaks = [peak(F) for F in (first, first + 4)]
    assert max(peaks) <= 1.01 * min(peaks), f"peak bytes {peaks} from the first full window on"
    if how["d_trunc"] == 0:
        z_1 = torch.randn(1, 3, 3 if name == "cogvideox" else 1, 3, 2, dtype=torch.float64, requires_grad=True)
        cache = None if name == "cogvideox" else vae.decode_group(z_1.detach())[1]
        with SavedBytes(vae) as held:
            x, _ = vae.decode_group(z_1, cache)
        # the loss holds the pixels once; nothing else comes on top of one group
        assert max(peaks) <= held.peak + x.nbytes, f"{max(peaks)} bytes for d_trunc 0, one group holds {held.peak}"


@both
@pytest.mark.parametrize("attached", [True, False])
def test_groups_out_of_reach_are_dropped_without_any_loss(name, attached):
    """A clip of which only the last frame takes loss holds no more than any other."""
    vae = small(name)

    def peak(F):
        with SavedBytes(vae) as held:
            chopgrad.backward(vae, torch.randn(1, 3, F, 3, 2, dtype=torch.float64), lambda x, where: x.square().sum() if
                              where[2].stop == 4 * F - 3 else 0 * x.sum() if attached else x.new_zeros(()), d_trunc=0)
        return held.peak
    short, long = peak(5), peak(9)
    assert long <= 1.01 * short, f"{short} bytes at 5 latents, {long} at 9"


MISTAKES = {  # {what: (file, text, what stands there instead)}
    "cache not detached": ("chopgrad", "c.detach().requires_grad_(c.requires_grad and d_trunc > 0)", "c"),
    "cache detached one group too early": ("chopgrad", "reach = d_trunc if", "reach = max(d_trunc - 1, 0) if"),
    "cache detached one group too late": ("chopgrad", "reach = d_trunc if", "reach = d_trunc + 1 if"),
    "cache gradient not zeroed": ("chopgrad", "        c.grad = None\n", "        pass\n"),
    "graph released early": ("chopgrad", "retain_graph=k < reach", "retain_graph=k + 1 < reach"),
    "parameter gradients of re-used graphs counted twice": (
        "chopgrad", "            torch.autograd.backward(tensors, gradients, retain_graph=k < reach)\n",
        "            torch.autograd.backward(tensors, gradients, retain_graph=True)\n"
        "            if k: torch.autograd.backward(tensors, gradients, retain_graph=True, inputs=PARAMETERS)\n"),
    "pixel gradient pushed again with every later loss": (
        "chopgrad", "        graph.x = graph.grad_x = None", "        pass"),
    "delayed losses of a short clip never pushed": ("chopgrad", "if i < len(clip.groups) - 1 else 0", ""),
    "tile borders off by one": ("tiles", "n * k // pieces for", "n * k // pieces + (0 < k < pieces) for"),
    "margin not cut off": ("tiles", "origin=side.seen.start", "origin=side.own.start"),
    "injected maps of the wrong frames": ("chopgrad", "(m, self.frames[i],", "(m, self.frames[i - (i > 1)],"),
    "overlapping tiles overwrite": ("chopgrad", ".add_(leaf.grad)", ".copy_(leaf.grad)"),
}


def mutant(file: str = "", old: str = "", new: str = "") -> ModuleType:
    """chopgrad.py and tiles.py as one module, with a mistake in one of the files."""
    module = ModuleType("mutant")
    for path in (tiles.__file__, chopgrad.__file__):
        source = Path(path).read_text().replace("from .tiles import Tile, cut, select, without_margin\n", "")
        if Path(path).stem == file:
            assert source.count(old) == 1, f"{path} has {old!r} {source.count(old)} times"
            source = source.replace(old, new)
        exec(compile(source, "mutant", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("mistake", [None, *MISTAKES])
def test_planted_mistakes_are_found(mistake):
    vae, broken = small("wan"), mutant(*MISTAKES.get(mistake, ()))
    broken.PARAMETERS = list(vae.decoder.parameters())
    case, worst = clip(vae, 4), 0.0
    try:
        for d in (2, 9):
            got = run(vae, *case, broken.backward, d_trunc=d, tiles=(2, 1), margin=1, delayed=d == 9)
            worst = max(worst, difference(got, mistakes_spec(d)))
    except (RuntimeError, UserWarning):  # autograd refuses a graph that is gone, and the .grad of what is no leaf
        worst = float("inf")
    assert worst <= 1e-9 if mistake is None else worst > 1e-6, f"{mistake}: relative difference {worst:.2e}"


@once
def mistakes_spec(d: int):
    vae = small("wan")
    return spec(vae, *clip(vae, 4), d, (UNEVEN[0], WHOLE[1]), 1)


def test_what_cannot_be_done_is_refused():
    vae = small("wan")
    z, inject, loss_fn = clip(vae, 3)
    for how in ({"tiles": (4, 1)}, {"tiles": (1, 0)}, {"margin": -1}):
        with pytest.raises(ValueError, match="want tiles in 1..3 x 1..2"):
            chopgrad.backward(vae, z, loss_fn, **how)
    with pytest.raises(ValueError, match="want d_trunc of 0 or more, got -1"):
        chopgrad.backward(vae, z, loss_fn, d_trunc=-1)
    for wrong in ([inject[0][:, :, :5]], [inject[0].requires_grad_() * 2]):
        with pytest.raises(ValueError, match="want inject for 3 groups"):
            chopgrad.backward(vae, z, loss_fn, inject=wrong)
