"""train_online.py: a step is DiffusionHarmonizer's equations, batches alternate, only the transformer moves, and a run
resumes bit-equal."""

import argparse
import json
from collections import defaultdict

import pytest
import torch
from torch import nn
from torch.nn import functional as nnf

import train_online
from mirage_min.data.pairs import Pairs
from mirage_min.method import optical_flow, perceptual
from mirage_min.networks import imagenet, weights
from mirage_min.networks.dit_cosmos import CosmosDiT, CosmosDiTConfig
from mirage_min.networks.vae_wan import WanVAE, WanVAEConfig
from mirage_min.systems.harmonizer import Harmonizer, Settings
from mirage_min.training import memory, run, watch
from train_online import Batch

DIT = CosmosDiTConfig(num_attention_heads=1, attention_head_dim=12, num_layers=2, mlp_ratio=2.0, text_embed_dim=4,
                      adaln_lora_dim=4, max_size=(8, 16, 16))
VAE = WanVAEConfig(base_dim=4, num_res_blocks=1)
FRAMES, SIZE = 6, 32


def networks():
    torch.manual_seed(0)
    return WanVAE(VAE), CosmosDiT(DIT)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A base, a VAE, backbones and pairs of six frames, the first of which holds its flow."""
    folder = tmp_path_factory.mktemp("work")
    vae, dit = networks()
    vae.save_pretrained(folder / "vae"), dit.save_pretrained(folder / "base" / "transformer")
    for name, net in (("squeezenet1_1", imagenet.squeezenet()), ("vgg16", imagenet.vgg16()[:9])):
        weights.save_tensors(folder / f"{name}_features.safetensors", net.state_dict())
    for kind, more in (("pairs", {}), ("moving", {"flow": torch.randn(2, FRAMES - 1, 40, 48),
                                                  "visible": torch.ones(1, FRAMES - 1, 40, 48)})):
        (folder / kind).mkdir()
        for i in range(2):
            x = nnf.interpolate(torch.rand(2 * FRAMES, 3, 8, 8), (40, 48), mode="bicubic").clamp(0, 1) * 255
            x_ni, x_gt = x.byte().view(2, FRAMES, 3, 40, 48).transpose(1, 2).contiguous()
            weights.save_tensors(folder / kind / f"{i}.safetensors", {"x_ni": x_ni, "x_gt": x_gt, **more})
    return folder


plan = memory.plan


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(memory, "plan", lambda *args, **settings: "")
    monkeypatch.setattr(watch.Log, "report", lambda *args: None)


def recipe(**settings):
    return train_online.Recipe(**dict(steps=4, batch=2, lr=1e-3, frames=FRAMES, height=SIZE, width=SIZE, past=4,
                                      temporal_from=1, lpips="squeeze", bf16=False, every=1, latent_clips=2) | settings)


def train(work, out, data="moving", base="base", **settings):
    args = argparse.Namespace(data=work / data, base=base and str(work / base), vae=str(work / "vae"), val=None,
                              perceptual=work, real=None, out=out, run=out / "run", device="cpu", stage="harmonizer")
    train_online.main(args, recipe(**settings))
    return out


# ---- a step is the equations written out -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def models(work):
    """(harmonizer, LPIPS, VGG) in float64, and clips of six frames."""
    vae, dit = networks()
    harmonizer = Harmonizer(vae, dit, Settings("paper", 4)).requires_grad_(False).eval()
    lpips = perceptual.Lpips(imagenet.Features("squeeze", work))
    draws = torch.Generator().manual_seed(3)
    x = nnf.interpolate(torch.rand(24, 3, 6, 6, generator=draws), (SIZE, SIZE), mode="bicubic") * 2 - 1
    x_ni, x_gt = x.double().view(2, 2, FRAMES, 3, SIZE, SIZE).transpose(2, 3).contiguous()
    flow = 2 * torch.randn(2, 2, SIZE, SIZE, generator=draws, dtype=torch.float64)
    visible = (torch.rand(2, 1, SIZE, SIZE, generator=draws) < 0.8).double()
    return nn.ModuleList([harmonizer, lpips, imagenet.Features("vgg", work)]).double(), x_ni, x_gt, (flow, visible)


def written_out(models, wiring, kind, x_ni, x_gt, moved, r):
    """Terms of the loss, unweighted, by the whole method (enhance_whole) and the equations."""
    harmonizer, lpips, vgg = models
    T, seen = x_ni.shape[2], []
    shown = [T - 2, T - 1] if kind.temporal else [T - 1]
    for t in range(shown[0] - kind.past, shown[0]):                   # the past: newest first
        with torch.no_grad():
            y = x_gt[:, :, t] if r.past_from == "truth" else harmonizer.enhance_whole(x_ni[:, :, t], seen)
        seen.insert(0, as_remembered(y, wiring))
    outputs = []
    for t in shown:
        outputs.append(harmonizer.enhance_whole(x_ni[:, :, t], seen))
        seen.insert(0, as_remembered(x_gt[:, :, t] if r.past_from == "truth" else outputs[-1].detach(), wiring))
    terms, draws = defaultdict(float), torch.Generator().manual_seed(5)
    for t, y in zip(shown, outputs):
        terms["l2"] += (y - x_gt[:, :, t]).square().mean() / len(shown)
        rows, columns = perceptual.random_square(SIZE, SIZE, vgg.least, draws)
        taps = zip(vgg(y[:, :, rows, columns]), vgg(x_gt[:, :, t, rows, columns]), perceptual.PATCH_WEIGHTS)
        terms["patch"] += sum(w * (a - b).square().mean() for a, b, w in taps) / 2 / len(shown)
        terms["lpips"] += lpips(y, x_gt[:, :, t]).mean() / len(shown)
    if kind.temporal:
        per_clip = []
        for before, now, flow, visible in zip(*outputs, *moved):      # Eq. 5, along the flow of the earlier frame
            fetched, inside = optical_flow.warp(now[None], flow[None])
            seen_in_both = (inside[0, 0] & visible[0].bool())
            per_clip.append((before - fetched[0]).square().sum(0)[seen_in_both].mean())
        terms["warp"] = torch.stack(per_clip).mean()
    return terms


def as_remembered(y, wiring):
    y = y.clamp(-1, 1)
    return ((y + 1) * 127.5).round() / 127.5 - 1 if wiring == "release" else y


def step_against_equations(models, wiring, kind, **settings):
    """AssertionError unless terms and gradients are those of the equations."""
    networks, x_ni, x_gt, moved = models
    harmonizer = networks[0]
    harmonizer.settings = Settings(wiring, 4)
    r = recipe(batch=4, lambda_l2=0.7, lambda_patch=0.5, lambda_lpips=0.3, lambda_warp=2.0, wiring=wiring, **settings)
    params = [p.requires_grad_() for name, p in harmonizer.dit.named_parameters() if ".attn2." not in name
              and ".norm2." not in name]
    for p in params:
        p.grad = None
    terms = defaultdict(float)
    train_online.forward_and_backward(networks, r, x_ni, x_gt, terms, kind, moved if kind.temporal else None,
                                      torch.Generator().manual_seed(5))
    wanted = written_out(networks, wiring, kind, x_ni, x_gt, moved, r)
    assert terms.keys() == wanted.keys(), (set(terms), set(wanted))
    for name, value in wanted.items():
        assert terms[name].item() == pytest.approx(0.5 * value.item(), rel=1e-6), name  # two clips of a batch of four
    weights_ = {"l2": 0.7, "patch": 0.5, "lpips": 0.3, "warp": 2.0}
    loss = 0.5 * sum(weights_[name] * value for name, value in wanted.items())
    for p, grad in zip(params, torch.autograd.grad(loss, params)):
        difference = ((p.grad - grad).norm() / grad.norm().clamp(min=1e-12)).item()
        assert difference < 1e-5, f"relative difference of a gradient {difference:.1e}, allowed 1e-5"


CASES = [("paper", Batch(False, 0), {}), ("paper", Batch(True, 2), {}), ("paper", Batch(True, 4), {}),
         ("release", Batch(True, 4), {}), ("paper", Batch(True, 2), {"past_from": "truth"}),
         ("release", Batch(True, 4), {"past_from": "truth"})]


@pytest.mark.parametrize("wiring, kind, settings", CASES)
def test_a_step_is_equations_2_4_and_5_written_out(models, wiring, kind, settings):
    step_against_equations(models, wiring, kind, **settings)


def swapped(x, other, flow, visible):
    return optical_flow.warp_loss(other, x, flow, visible)


def everywhere(x, other, flow, visible):
    return optical_flow.warp_loss(x, other, flow, torch.ones_like(visible))


MISTAKES = {
    "the flow of the wrong frame": ("warp_loss", swapped),
    "occluded pixels count": ("warp_loss", everywhere),
    "whole frames in place of squares": ("patch_loss", lambda vgg, x, y, draws: perceptual.patch_loss(vgg, x, y, None)),
    "a past that is not seen": ("see_past", lambda *given: []),
    "the truth as past": ("see_past", lambda h, r, frames, truths: [] if not frames else train_past(h, truths)),
}


def train_past(harmonizer, truths):
    past = []
    for truth in truths:
        past = harmonizer.remember(truth, past)
    return past


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_caught(models, monkeypatch, mistake):
    monkeypatch.setattr(train_online, *MISTAKES[mistake])
    with pytest.raises(AssertionError):
        step_against_equations(models, "paper", Batch(True, 2))


def test_no_gradient_goes_through_the_past(models, monkeypatch):
    networks, x_ni, x_gt, moved = models
    networks[0].settings, calls, enhance = Settings("paper", 4), [], Harmonizer.enhance

    def watched(harmonizer, *given):
        y = enhance(harmonizer, *given)
        calls.append((y.requires_grad, [z.requires_grad for z in given[1]]))
        return y
    monkeypatch.setattr(Harmonizer, "enhance", watched)
    for p in networks[0].dit.parameters():
        p.requires_grad_()
    train_online.forward_and_backward(networks, recipe(), x_ni, x_gt, defaultdict(float), Batch(True, 3), moved)
    assert calls == [(False, []), (False, [False]), (False, [False] * 2), (True, [False] * 3), (True, [False] * 4)]


@torch.no_grad()
def test_the_loss_of_latents_is_that_of_frames_which_see_no_past(models):
    networks, x_ni, x_gt, _ = models
    harmonizer = networks[0]
    z, z_gt = (harmonizer.vae.encode(x[:, :, -1:]) for x in (x_ni, x_gt))
    z_hat = 0.8 * z - 0.2 * harmonizer.dit(0.8 * z, 0.2)
    got = train_online.latent_loss(harmonizer, z, z_gt)
    assert got.item() == pytest.approx((z_hat - z_gt).square().mean().item(), rel=1e-6)


def test_latents_are_those_of_the_last_frames_of_drawn_clips(work):
    data, r = Pairs(work / "pairs", FRAMES, (SIZE, SIZE)), recipe()
    x_ni, x_gt, names = train_online.last_frames(data, r, 7, range(2))
    whole_ni, whole_gt, wanted = run.batch(data, r, 7, range(2), "cpu")
    assert torch.equal(x_ni, whole_ni[:, :, -1:]) and torch.equal(x_gt, whole_gt[:, :, -1:]) and names == wanted


# ---- which batch when ------------------------------------------------------------------------------------------------

def test_single_frames_first_then_every_other_batch_is_temporal_with_any_number_of_outputs_in_view():
    r = recipe(temporal_from=10, temporal_every=2)
    kinds = [train_online.batch_of(step, r) for step in range(200)]
    assert all(kind == Batch(False, 0) for kind in kinds[:10])
    assert [kind.temporal for kind in kinds[10:]] == [step % 2 == 0 for step in range(190)]
    assert {kind.past for kind in kinds if kind.temporal} == {0, 1, 2, 3, 4}
    assert all(kind.past == 0 for kind in kinds if not kind.temporal)
    assert kinds == [train_online.batch_of(step, r) for step in range(200)], "a function of the seed and the step"


def test_the_release_sees_all_of_the_past_or_none_for_half_of_the_batches():
    kinds = [train_online.batch_of(step, train_online.RECIPES["release"]) for step in range(400)]
    assert all(kind.temporal for kind in kinds) and {kind.past for kind in kinds} == {0, 4}
    assert 160 < sum(kind.past == 4 for kind in kinds) < 240


def test_the_small_recipe_begins_with_latents():
    small = train_online.RECIPES["small"]
    steps = small.latent_until, small.temporal_from, small.temporal_from + 1
    assert 0 < small.latent_until < small.temporal_from < small.steps
    assert [train_online.batch_of(step, small).temporal for step in steps] == [False, True, False]


def test_the_papers_recipe_is_the_papers_in_every_number():
    paper = vars(train_online.RECIPES["paper"])
    said = dict(steps=14_000, temporal_from=10_000, temporal_every=2, height=576, width=1024, past=4, wiring="paper",
                past_from="outputs", lambda_l2=1, lambda_patch=1, lambda_warp=1, lambda_lpips=0, bf16=True)
    assert {key: paper[key] for key in said} == said


# ---- flow ------------------------------------------------------------------------------------------------------------

def test_flow_is_the_clips_own_and_missing_flow_is_refused_with_what_to_change(work):
    moving = Pairs(work / "moving", FRAMES, (SIZE, SIZE)).moving_batch([torch.Generator().manual_seed(0)])
    flow, visible = train_online.motion(recipe(), *moving[1:])
    assert torch.equal(flow, moving[2][:, :, -1]) and torch.equal(visible, moving[3][:, :, -1])
    still = Pairs(work / "pairs", FRAMES, (SIZE, SIZE)).moving_batch([torch.Generator().manual_seed(0)])
    assert still[2].isnan().all() and not still[3].any()
    with pytest.raises(ValueError, match=r"^\d.safetensors: holds no flow, which the warp loss needs: --set flow=dis"):
        train_online.motion(recipe(), *still[1:])


def test_dis_estimates_the_flow_that_a_clip_lacks_and_leaves_the_others(work):
    pytest.importorskip("cv2")
    canvas = nnf.interpolate(torch.rand(1, 3, 20, 24), (80, 96), mode="bicubic").clamp(0, 1) * 2 - 1
    x_gt = torch.stack([canvas[:, :, t : t + 64, 2 * t : 2 * t + 80] for t in range(3)], dim=2).repeat(2, 1, 1, 1, 1)
    flow, visible = torch.full((2, 2, 2, 64, 80), torch.nan), torch.zeros(2, 1, 2, 64, 80)
    flow[1], visible[1] = 3.0, 1.0
    found, seen = train_online.motion(recipe(flow="dis"), x_gt, flow, visible, ["a", "b"])
    assert (found[1] == 3).all() and (seen[1] == 1).all()
    error = (found[0] - torch.tensor([-2.0, -1.0]).view(2, 1, 1))[:, 12:-12, 12:-12].abs().mean()
    assert error < 0.3 and seen[0].mean() > 0.6 and flow[0].isnan().all()


def test_a_flow_is_that_of_the_same_crop_and_turns_with_it(tmp_path):
    """The flow of every pixel is its place, so that where a crop is from can be read off it."""
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(48.0), indexing="ij")
    t = torch.arange(FRAMES - 1.0).view(1, -1, 1, 1).expand(1, -1, 40, 48)
    flow = torch.stack([x, y]).unsqueeze(1).expand(2, FRAMES - 1, 40, 48).contiguous()
    frames = torch.stack([x, y, 0 * x]).byte().unsqueeze(1).repeat(1, FRAMES, 1, 1)
    frames[2] = torch.arange(FRAMES).view(-1, 1, 1)
    weights.save_tensors(tmp_path / "a.safetensors", {"x_ni": frames, "x_gt": frames.clone(), "flow": flow,
                                                      "visible": t.contiguous()})
    turned = set()
    for seed in range(8):
        x_ni, x_gt, flow, visible, names = Pairs(tmp_path, 3, (16, 20)).moving_batch(
            [torch.Generator().manual_seed(seed)])
        place = ((x_gt + 1) * 127.5).round()[0]                        # [3, 3, 16, 20]: column, row, frame
        sign = float(flow[0, 0].sign().max() if flow[0, 0].max() > 0 else -1)
        turned.add(sign)
        assert torch.equal(flow[0, 0], sign * place[0, :2]) and torch.equal(flow[0, 1], place[1, :2])
        assert torch.equal(visible[0, 0], place[2, :2]) and names == ["a.safetensors"]
        assert (place[0, 0, 0, 0] > place[0, 0, 0, -1]) == (sign < 0), "dx is negated where the clip is mirrored"
        same = Pairs(tmp_path, 3, (16, 20)).batch([torch.Generator().manual_seed(seed)])
        assert torch.equal(same[0], x_ni) and torch.equal(same[1], x_gt)
    assert turned == {-1.0, 1.0}


def test_a_flow_of_another_size_leaves_the_pair_out(tmp_path):
    x = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
    for name, flow in (("bad", torch.zeros(2, 3, 16, 16)), ("good", torch.zeros(2, 2, 16, 16))):
        weights.save_tensors(tmp_path / f"{name}.safetensors", {"x_ni": x, "x_gt": x.clone(), "flow": flow,
                                                                "visible": torch.zeros(1, 2, 16, 16)})
    pairs = Pairs(tmp_path, 3)
    assert pairs.names == ["good.safetensors"]
    assert pairs.left_out == ["bad.safetensors: wanted flow [2, 2, 16, 16], got [2, 3, 16, 16]"]


# ---- a run -----------------------------------------------------------------------------------------------------------

def test_the_transformer_moves_the_vae_and_attention_to_a_text_do_not_and_the_result_streams(work, tmp_path):
    before = {p: p.read_bytes() for p in work.rglob("*.safetensors")}
    out = train(work, tmp_path)
    assert before == {p: p.read_bytes() for p in work.rglob("*.safetensors")}
    begun, ended = (weights.load_tensors(folder / "transformer" / "diffusion_pytorch_model.safetensors")[0]
                    for folder in (work / "base", out))
    for name in begun:
        text = ".attn2." in name or ".norm2." in name
        assert torch.equal(begun[name], ended[name]) == text, name
    about = json.loads((out / "model_index.json").read_text())
    assert about["wiring"] == "paper" and about["past"] == 4 and (out / about["vae"]).samefile(work / "vae")
    frames = list(Harmonizer.from_pretrained(out).stream(iter(torch.zeros(3, 3, 40, 40))))
    assert len(frames) == 3 and frames[0].shape == (3, 40, 40)
    line, = (out / "run" / "log.jsonl").read_text().splitlines()
    assert json.loads(line).keys() == {"step", "seconds", "l2", "patch"}


@pytest.mark.parametrize("settings, half", [(dict(steps=4, temporal_from=2), 3),
                                            (dict(steps=4, temporal_from=3, latent_until=2), 1)])
def test_a_run_in_two_halves_and_in_pieces_ends_bit_equal(work, tmp_path, settings, half):
    one = train(work, tmp_path / "one", **settings)
    train(work, tmp_path / "two", **settings | dict(steps=half))
    two = train(work, tmp_path / "two", **settings)
    a, b = (weights.load_tensors(out / "transformer" / "diffusion_pytorch_model.safetensors")[0] for out in (one, two))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    with pytest.raises(ValueError, match="belongs to another run, 1 things differ: past_from: then outputs, now truth"):
        train(work, tmp_path / "two", **settings, past_from="truth")


def test_a_clip_without_flow_trains_without_the_warp_loss_and_not_with_it(work, tmp_path):
    train(work, tmp_path / "a", data="pairs", lambda_warp=0.0, steps=2)
    with pytest.raises(ValueError, match="holds no flow"):
        train(work, tmp_path / "b", data="pairs", steps=2)


def test_a_past_longer_than_the_clips_is_one_line(work, tmp_path):
    with pytest.raises(ValueError, match="frames must be past \\+ 2 = 8 at least, got 6: --set frames=8, or a smaller"):
        train(work, tmp_path, past=6)
    with pytest.raises(ValueError, match=r"no usable pairs: .*wanted at least \[8, 32, 32\] .*, got \[6"):
        train(work, tmp_path, past=6, frames=8)


def test_without_a_base_a_small_transformer_is_trained_from_nothing(work, tmp_path, monkeypatch):
    monkeypatch.setattr(train_online.small_base, "DIT_COSMOS", DIT)
    new, out = (train(work, tmp_path / str(n), base=None, steps=n, latent_until=1) for n in (0, 1))
    assert json.loads((out / "run" / "log.jsonl").read_text()).keys() == {"step", "seconds", "latent"}
    before, after = (weights.load_tensors(folder / "transformer" / weights.WEIGHTS)[0] for folder in (new, out))
    assert before.keys() == after.keys() and any(not torch.equal(before[key], after[key]) for key in before)


def test_the_plan_of_a_step_is_that_of_a_temporal_batch(work):
    args, r = argparse.Namespace(base=work / "base", vae=work / "vae", perceptual=work), recipe(wiring="release")
    models, _ = train_online.build(args, r)
    said = plan(models, train_online.forward_and_backward, r, "cpu")
    assert said.startswith("a step needs about 0.0"), said
