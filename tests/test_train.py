"""The training scripts: each stage trains what it should and nothing else, resumes bit-equal, and its result runs."""

import argparse
import json

import pytest
import torch

import train_harmonize
import train_vae
from mirage_min import lora, perceptual, run, weights
from mirage_min.mirage import HARMONISATION, RECONSTRUCTION, TRANSFORMER, Mirage
from mirage_min.pairs import Pairs
from tests import small


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A base, a 2D VAE, pairs and random backbones for the losses."""
    folder = tmp_path_factory.mktemp("work")
    small.save_cogvideox(folder)
    torch.manual_seed(0)
    for name, net in (("squeezenet1_1", perceptual.squeezenet()), ("vgg16", perceptual.vgg16())):
        state = {k: v for k, v in net.state_dict().items() if name != "vgg16" or int(k.split(".")[0]) < 9}
        weights.save_tensors(folder / f"{name}_features.safetensors", state)
    (folder / "pairs").mkdir()
    for i in range(3):
        x = torch.randint(0, 256, (2, 3, 17, 32, 48), dtype=torch.uint8)
        weights.save_tensors(folder / "pairs" / f"{i}.safetensors", {"x_ni": x[0], "x_gt": x[1]})
    return folder


def vae2d(work):
    return work / "vae_2d" if (work / "vae_2d").exists() else None


def stage_a(work, out, **settings):
    args = argparse.Namespace(data=work / "pairs", base=work / "base", vae2d=vae2d(work), prompt=None,
                              perceptual=work, real=None, real_frames=None, out=out, run=out / "run", device="cpu")
    recipe = train_vae.Recipe(**dict(steps=4, batch=1, frames=17, height=32, width=32, lr=1e-2, lpips="squeeze", rank=2,
                                     every=2, bf16=False) | settings)
    train_vae.main(args, recipe)
    return out


def stage_h(work, out, **settings):
    args = argparse.Namespace(data=work / "pairs", mirage=out, base=work / "base", vae2d=vae2d(work),
                              perceptual=work, real=None, real_frames=None, out=out, run=out / "run_h", device="cpu")
    recipe = train_harmonize.Recipe(**dict(steps=4, batch=1, frames=17, height=32, width=32, lr=1e-2, warmup=1,
                                           gram_from=2, lpips="squeeze", rank=2, dit_rank=2, dit_alpha=1.0, every=2,
                                           bf16=False) | settings)
    train_harmonize.main(args, recipe)
    return out


def test_stage_a_trains_fusion_and_reconstruction_and_stage_h_the_other_two(work, tmp_path):
    before = {p.name: p.read_bytes() for p in work.rglob("*.safetensors")}
    out = stage_a(work, tmp_path)
    trained, about = weights.load_tensors(out / "stage_a.safetensors")
    assert trained["fusion.0.weight"].abs().max() > 0
    assert all(trained[k].abs().max() > 0 for k in trained if "lora_B" in k)
    assert {k.split(".")[0] for k in trained} == {"fusion", RECONSTRUCTION} and about["base"]
    a = (out / "stage_a.safetensors").read_bytes()
    stage_h(work, out)
    trained, about = weights.load_tensors(out / "stage_h.safetensors")
    assert {k.split(".")[0] for k in trained} == {TRANSFORMER, HARMONISATION} and about["t"] == "199"
    assert all(trained[k].abs().max() > 0 for k in trained if "lora_B" in k)
    assert (out / "stage_a.safetensors").read_bytes() == a, "stage H must leave stage A as it is"
    assert before == {p.name: p.read_bytes() for p in work.rglob("*.safetensors")}, "the base must stay as it is"
    lines = [json.loads(line) for line in (out / "run_h" / "log.jsonl").read_text().splitlines()]
    assert lines[0]["gram"] == 0 and lines[0]["lpips"] > 0


def test_an_interrupted_run_ends_bit_equal_to_an_uninterrupted_one(work, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    stage_a(work, whole), stage_h(work, whole)
    check, calls = run.check_finite, iter(range(100))

    def stop_at_third(*args):
        if next(calls) == 3:
            raise KeyboardInterrupt
        check(*args)
    monkeypatch.setattr(run, "check_finite", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        stage_a(work, parts)
    assert not (parts / "stage_a.safetensors").exists()
    stage_a(work, parts), stage_h(work, parts)
    for name in ("stage_a.safetensors", "stage_h.safetensors"):
        one, two = weights.load_tensors(whole / name)[0], weights.load_tensors(parts / name)[0]
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one), name


def test_a_trained_folder_harmonises_a_clip(work, tmp_path):
    stage_h(work, stage_a(work, tmp_path))
    mirage = Mirage.from_pretrained(tmp_path)
    for name in (RECONSTRUCTION, HARMONISATION, TRANSFORMER):
        assert list(lora.adapters(mirage.adapters(name), name)), f"no {name} adapter"
    frames = list(mirage.stream(iter(torch.zeros(3, 3, 40, 40))))
    assert len(frames) == 3 and frames[0].shape == (3, 40, 40)


def test_mirage_on_wan_trains_both_stages_and_harmonises_a_clip(work, tmp_path):
    """ChopGrad's variant: features of the 3D encoder in 2D mode, flow, t = 200, nine frames in three groups."""
    (tmp_path / "out").mkdir()
    for file in (*work.glob("*.safetensors"), work / "pairs"):
        (tmp_path / file.name).symlink_to(file)
    small.save_wan(tmp_path)
    out = stage_h(tmp_path, stage_a(tmp_path, tmp_path / "out", frames=9, steps=2), frames=9, steps=2)
    trained, about = weights.load_tensors(out / "stage_h.safetensors")
    assert about["t"] == "200" and all(trained[k].abs().max() > 0 for k in trained if "lora_B" in k)
    mirage = Mirage.from_pretrained(out)
    assert mirage.alpha_bar is None and mirage.vae2d is None and len(mirage.vae.fusion) == 1
    x = torch.rand(1, 3, 6, 40, 24) * 2 - 1
    with torch.no_grad():
        z = mirage.vae.encode(mirage.pad(x))
        assert torch.equal(mirage.denoise(z), z - mirage.dit(z, 200, mirage.text)), "z_DR = z_NI - prediction"
        whole = mirage(x).clamp(-1, 1)
    streamed = torch.stack(list(mirage.stream(iter(x[0].unbind(1)), window=9)), dim=1)[None]
    difference = (streamed - whole).abs().max()
    assert whole.shape == x.shape and difference < 1e-5, f"stream and forward differ by {difference:.1e}"


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(work, tmp_path):
    with pytest.raises(ValueError, match=r"step 0: the loss is not finite: mse [\d.]+, lpips nan"):
        stage_a(work, tmp_path, lambda1=float("nan"))
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_settings_are_typed_and_unknown_ones_refused():
    recipe = run.override(train_vae.Recipe(), ["steps=7", "lr=0.5", "cosine=true", "lpips=alex"])
    assert (recipe.steps, recipe.lr, recipe.cosine, recipe.lpips) == (7, 0.5, True, "alex")
    with pytest.raises(ValueError, match="unknown key 'stepz'"):
        run.override(recipe, ["stepz=7"])
    with pytest.raises(ValueError, match="steps must be int, got 'many'"):
        run.override(recipe, ["steps=many"])


def test_the_paper_recipes_are_the_papers():
    a, h, c = train_vae.RECIPES["mirage"], train_harmonize.RECIPES["mirage"], train_harmonize.RECIPES["chopgrad"]
    assert (a.steps, a.batch, a.frames, a.height, a.width, a.lr, a.beta2, a.lambda1, a.warmup) == (
        10_000, 8, 9, 512, 768, 1e-4, 0.999, 0.1, 1)
    assert (h.steps, h.lambda2, h.gram_from, h.warmup, h.mse, h.lpips) == (10_000, 0.1, 2_000, 500, 0.0, "vgg")
    assert (c.steps, c.frames, c.height, c.width, c.tiles, c.d_trunc, c.batch, c.lr, c.beta2, c.weight_decay) == (
        1_000, 49, 720, 1280, 4, 1, 1, 2e-4, 0.99, 0.1)


def test_a_batch_is_a_function_of_its_generator_and_cuts_both_videos_alike(work):
    pairs = Pairs(work / "pairs")
    one = pairs.batch(run.draws(3, 5), 2, 9, (16, 24))
    two = pairs.batch(run.draws(3, 5), 2, 9, (16, 24))
    other = pairs.batch(run.draws(3, 6), 2, 9, (16, 24))
    assert all(torch.equal(x, y) for x, y in zip(one, two)) and not torch.equal(one[0], other[0])
    assert one[0].shape == (2, 3, 9, 16, 24) and -1 <= one[0].min() and one[0].max() <= 1
    whole = [weights.load_tensors(work / "pairs" / f"{i}.safetensors")[0] for i in range(3)]
    for x_ni, x_gt in zip(*one):  # find the crop of x_ni; x_gt must lie at the same place, flipped alike
        i, t, y, x, flip = locate(whole, x_ni)
        cut = whole[i]["x_gt"][:, t : t + 9, y : y + 16, x : x + 24].float() / 127.5 - 1
        assert torch.equal(cut.flip(-1) if flip else cut, x_gt)


def locate(whole, x_ni):
    """Where in which clip a crop was cut, by its first frame's first rows."""
    for i, clip in enumerate(whole):
        for flip in (False, True):
            crop = x_ni.flip(-1) if flip else x_ni
            value = ((crop + 1) * 127.5).round().to(torch.uint8)
            for t in range(9):
                for y in range(17):
                    for x in range(25):
                        if torch.equal(clip["x_ni"][:, t, y, x : x + 24], value[:, 0, 0]):
                            return i, t, y, x, flip
    raise AssertionError("the crop is in no clip")


def test_a_folder_without_pairs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no \\*.safetensors clips"):
        Pairs(tmp_path)


def test_a_broken_or_short_clip_is_named(work, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="a.safetensors: cannot be read"):
        Pairs(tmp_path).batch(run.draws(0, 0), 1, 9)
    with pytest.raises(ValueError, match="wanted at least 18 frames of 32x48, got 17 of 32x48"):
        Pairs(work / "pairs").batch(run.draws(0, 0), 1, 18)
