"""train_world.py: a step is the flow's loss written out, the memory shows what the loop's does, runs resume alike."""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import Generator
from torch.nn import functional as nnf

import train_world
from mirage_min.data.toy_world import WorldConfig, load_clip, make_clip, save_clip
from mirage_min.method import latent_memory
from mirage_min.method.camera import Camera
from mirage_min.networks import weights
from mirage_min.systems.world import World, padded
from mirage_min.training import checkpoint, run
from mirage_min.training.chunks import Chunks
from tests import small

RECIPE = dict(steps=2, batch=2, lr=1e-2, warmup=1, every=1, latents=2, every_layer=1, rank=2, alpha=4.0, bf16=False)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A small world model, and clips of three chunks; the frames are no whole cells."""
    folder = tmp_path_factory.mktemp("work")
    small.world().save_pretrained(folder / "base")
    (folder / "clips").mkdir()
    for seed in (1, 2):
        clip = make_clip(seed, WorldConfig(13, 20, 40, path="out_and_back"))
        save_clip(clip, folder / "clips" / f"{seed}.safetensors")
    return folder


def train(work: Path, out: Path, part="branch", base="base", vae=None, val=None, **settings) -> Path:
    args = argparse.Namespace(part=part, data=work / "clips", val=val, base=str(work / base), vae=vae, prompt=None,
                              latents=work / "latents", out=out, run=out / "run", recipe="small", device="cpu")
    train_world.main(args, train_world.Recipe(**RECIPE | settings))
    return out


# ---- a step ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("part", ["base", "branch", "lora"])
def test_a_step_is_the_flow_written_out(part):
    world = small.world().double()
    recipe = train_world.Recipe(**RECIPE | dict(batch=4))
    params = train_world.choose(world, part, recipe)
    for p in params.values():
        p.data = p.data.double() + 0.05 * torch.randn(p.shape, dtype=torch.float64)
    g = Generator().manual_seed(2)
    z, control = (torch.randn(2, C, 3, 4, 6, generator=g, dtype=torch.float64) for C in (4, 5))
    terms = defaultdict(float)
    draws = [Generator().manual_seed(k) for k in (5, 6)]
    train_world.forward_and_backward(world, part, recipe, z, control, terms, draws)
    got = {name: p.grad.clone() for name, p in params.items()}

    wanted = 0
    for n, seed in enumerate((5, 6)):
        draws = Generator().manual_seed(seed)
        u = torch.rand(1, 3, generator=draws)
        eps = torch.randn(1, 4, 3, 4, 6, generator=draws, dtype=torch.float64)
        sigma = 5 * u / (1 + 4 * u)
        sigma[:, 0] = 0
        z_t = torch.stack([(1 - s) * z[n : n + 1, :, f] + s * eps[:, :, f] for f, s in enumerate(sigma[0])], dim=2)
        hints = None if part == "base" else world.branch(world.dit, z_t, 1000 * sigma, world.text, control[n : n + 1])
        v = world.dit(z_t, 1000 * sigma, world.text, hints)
        # two of the batch's four chunks
        wanted = wanted + (v - (eps - z[n : n + 1]))[:, :, 1:].square().mean() / 4
    assert terms["v"].item() == pytest.approx(wanted.item(), rel=1e-6), "in float32, as the noise levels are"
    grads = torch.autograd.grad(wanted, list(params.values()), allow_unused=True)
    for (name, a), b in zip(got.items(), grads):
        assert (a - b).norm() <= 1e-6 * b.norm() + 1e-9, name


@pytest.mark.parametrize("memory", ["past", "first"])
def test_what_the_memory_shows_is_what_it_would_show_when_the_video_is_made(work, tmp_path, memory):
    """With latent_memory alone: latents 0 to 2 of the clip, or the chunk's first, seen from latents 2 and 3."""
    world, recipe = small.world(), train_world.Recipe(**RECIPE | dict(memory=memory))
    clip = load_clip(work / "clips" / "1.safetensors")
    chunks = Chunks(work / "clips", lambda x: world.vae.encode(train_world.pad(x)), world.vae, 2, tmp_path)
    chunk = chunks.read(0, 2)
    control = train_world.control_of(world, chunk, recipe)

    shown = latent_memory.Memory.empty(4)
    for i in (0, 1, 2) if memory == "past" else (2,):
        view = padded(Camera.from_pose(clip.K, clip.c2w[4 * i], 40, 20))
        depth, moving = (nnf.pad(image[0, 4 * i], (0, 8, 0, 12)) for image in (clip.depth, clip.moving))
        z = chunk.z[max(0, i - 1), :, min(i, 1)] if memory == "past" else chunk.z[2, :, 0]
        shown = latent_memory.add(shown, z, depth, view, dynamic=moving > 0)
    assert len(shown) > 5
    for f in range(2):
        view = padded(Camera.from_pose(clip.K, clip.c2w[4 * (2 + f)], 40, 20))
        z, mask = latent_memory.read(shown, view, 4, 6)
        assert torch.equal(control[0, :4, f], z) and torch.equal(control[0, 4:, f], mask)
    assert 0 < control[0, 4].mean() < 1


def test_a_share_of_the_chunks_is_shown_an_empty_memory(work, tmp_path):
    world = small.world()
    data = Chunks(work / "clips", lambda x: world.vae.encode(train_world.pad(x)), world.vae, 2, tmp_path)
    for without, low, high in ((0.0, 0, 0), (0.5, 5, 15), (1.0, 20, 20)):
        recipe = train_world.Recipe(**RECIPE | dict(without=without))
        _, control, draws, names = train_world.draw(data, world, "branch", recipe, 0, range(20), "cpu")
        empty = int((control.flatten(1) == 0).all(dim=1).sum())
        assert low <= empty <= high and len(draws) == len(names) == 20
    told = small.world(mask=False)
    _, control, *_ = train_world.draw(data, told, "branch", recipe, 0, range(2), "cpu")
    assert (control[:, :-1] == 0).all() and (control[:, -1] == 1).all(), "where the mask is off, it says 1"
    z, control, *_ = train_world.draw(data, world, "base", recipe, 0, range(3), "cpu")
    assert control is None and z.shape == (3, 4, 2, 4, 6)


# ---- what is trained -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("part, settings, moved", [
    ("base", {}, {"dit"}), ("branch", dict(mask=False), {"branch"}), ("lora", {}, {"branch", "dit"}),
    ("lora", dict(freeze_branch=True, wide_lora=True), {"dit"})])
def test_each_part_trains_what_it_says_and_writes_a_whole_folder(work, tmp_path, part, settings, moved):
    before = {p: p.read_bytes() for p in (work / "base").rglob("*.*")}
    out = train(work, tmp_path, part, half=False, **settings)
    assert before == {p: p.read_bytes() for p in (work / "base").rglob("*.*")}
    base, trained = World.from_pretrained(work / "base"), World.from_pretrained(out)
    changed = {name for name, p in base.named_parameters() if not torch.equal(p, trained.get_parameter(name))}
    assert {name.partition(".")[0] for name in changed} == moved
    if part == "lora":
        layers = {name.split(".", 3)[3] for name in changed if name.startswith("dit.")}
        wide = bool(settings)
        assert {"attn1.to_q.weight", "attn1.to_k.weight", "attn1.to_v.weight", "attn1.to_out.0.weight"} <= layers
        assert ({"ffn.net.2.weight", "attn2.to_v.weight"} <= layers) == wide and len(layers) == (10 if wide else 4)
    assert torch.equal(base.text, trained.text) and trained.settings.latents == 2
    assert trained.settings.mask == settings.get("mask", True)
    about = json.loads((out / "model_index.json").read_text())
    assert about["step"] == "2" and json.loads(about["recipe"])["rank"] == 2 and about["vae"] == "vae"


def test_a_new_branch_is_made_for_a_wan_and_the_small_one_starts_from_nothing(work, tmp_path):
    world = small.world()
    world.dit.save_pretrained(tmp_path / "wan" / "transformer"), world.vae.save_pretrained(tmp_path / "wan" / "vae")
    args = argparse.Namespace(part="branch", base=str(tmp_path / "wan"), vae=None, prompt=None)
    made, params = train_world.build(args, train_world.Recipe(**RECIPE | dict(every_layer=2)))
    assert made.branch.config.vace_layers == (0,) and made.branch.config.vace_in_channels == 5
    assert params and all(name.startswith("branch.") for name in params)
    assert made.branch.vace_blocks[0].proj_out.weight.abs().max() == 0
    weights.save_tensors(tmp_path / "prompt.safetensors", {"text": torch.ones(1, 3, 8)})
    args.prompt = tmp_path / "prompt.safetensors"
    assert train_world.build(args, train_world.Recipe(**RECIPE))[0].text.shape == (1, 3, 8)
    args.part = "lora"
    with pytest.raises(ValueError, match="wan: has no branch, and a new one that stays frozen shows nothing"):
        train_world.build(args, train_world.Recipe(**RECIPE | dict(freeze_branch=True)))
    args.prompt = tmp_path / "gone"
    with pytest.raises(ValueError, match="gone: no such file"):
        train_world.build(args, train_world.Recipe(**RECIPE))


def test_the_recipes_are_those_of_paper_and_release_as_far_as_they_are_known():
    recipes = train_world.RECIPES
    for stage in recipes["paper"].values():
        assert (stage.rank, stage.shift, stage.latents) == (64, 5.0, 9) and not stage.wide_lora
        assert not stage.freeze_branch
    for stage in recipes["release"].values():
        assert (stage.batch, stage.lr, stage.weight_decay, stage.steps) == (4, 1e-5, 0.01, 10_000)
        assert (stage.rank, stage.alpha, stage.every_layer, stage.memory, stage.beta2) == (32, 32.0, 2, "first", 0.999)
    assert recipes["release"]["lora"].freeze_branch and recipes["release"]["lora"].wide_lora
    assert list(recipes["small"]) == ["base", "branch", "lora"] and recipes["small"]["lora"].half
    for argv, message in ((["base", "--recipe", "paper"], "the recipe paper has the parts branch, lora"),
                          (["branch"], "wanted --vae")):
        with pytest.raises(SystemExit):
            train_world.parse(argv)
    args = train_world.parse(["lora", "--recipe", "release"])
    assert args.base == "Wan-AI/Wan2.2-TI2V-5B-Diffusers" and args.run == Path("runs/world_lora_release")


# ---- interruptions ---------------------------------------------------------------------------------------------------

def test_a_run_that_is_interrupted_resumes_bit_equal_and_another_is_refused(work, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_world, "HELD_OUT", 2)
    settings = dict(steps=3, cosine=True, without=0.3)
    whole = train(work, tmp_path / "whole", "lora", val=work / "clips", **settings)
    assert "val_v" in (whole / "run" / "log.jsonl").read_text() and (whole / "run" / "losses.png").exists()
    save = checkpoint.save
    with pytest.MonkeyPatch.context() as patch:
        def killed(folder, step, *given):
            save(folder, step, *given)
            if step == 2:
                raise KeyboardInterrupt
        patch.setattr(checkpoint, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            train(work, tmp_path / "twice", "lora", val=work / "clips", **settings)
    assert not (tmp_path / "twice" / "model_index.json").exists(), "nothing is written before the end"
    twice = train(work, tmp_path / "twice", "lora", val=work / "clips", **settings)
    assert "resumes at step 2" in capsys.readouterr().out
    for file in sorted(whole.rglob("*.safetensors")):
        if file.name == "previous.safetensors":
            continue
        one, two = (weights.load_tensors(folder / file.relative_to(whole))[0] for folder in (whole, twice))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), file
    with pytest.raises(ValueError, match="another run.*shift: then 5.0, now 3.0"):
        train(work, tmp_path / "twice", "lora", shift=3.0, **settings)


def test_pieces_of_a_batch_add_up_to_the_whole(work, tmp_path):
    """Gradients are those of the same noise, however the batch is cut."""
    world = small.world()
    data = Chunks(work / "clips", lambda x: world.vae.encode(train_world.pad(x)), world.vae, 2, tmp_path)
    grads = []
    for pieces in ([range(0, 4)], [range(0, 1), range(1, 4)]):
        world = small.world()
        recipe = train_world.Recipe(**RECIPE | dict(batch=4))
        params = train_world.choose(world, "branch", recipe)
        for clips in pieces:
            z, control, draws, _ = train_world.draw(data, world, "branch", recipe, 7, clips, "cpu")
            train_world.forward_and_backward(world, "branch", recipe, z, control, defaultdict(float), draws)
        grads.append(torch.cat([p.grad.flatten() for p in params.values()]))
    difference = ((grads[0] - grads[1]).norm() / grads[0].norm()).item()
    assert difference < 1e-5, f"relative difference {difference:.1e}"
    assert run.draws(4, 7, 0).initial_seed() != run.draws(4, 7, 1).initial_seed()
