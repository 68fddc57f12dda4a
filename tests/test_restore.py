"""Restorers: DOVE's wiring against diffusers' parts, sizes, masks, streams, folders, and what is refused.

The pipeline here is written from what is known of DOVE's inference, not from its code.
"""

import json
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.nn import functional as nnf

import infer
from mirage_min.data.masks import read_mask
from mirage_min.data.video import read_clip, write_clip
from mirage_min.method.one_step import alpha_bar
from mirage_min.method.schedules import WAN
from mirage_min.networks import weights
from mirage_min.networks.card import fields_of_card
from mirage_min.systems import load, restore, restore_folder
from mirage_min.systems.restore import Restorer
from mirage_min.systems.restore_folder import Settings
from mirage_min.training import memory
from tests import small
from tests.torchvision_stub import stub


def video(*shape, seed=0):
    return 2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) - 1


def save_published(folder, text=True):
    """A small CogVideoX1.5 as a pipeline's folder, as DOVE is one, and its prompt."""
    small.save_cogvideox(folder)
    base = folder / "base"
    (base / "model_index.json").write_text(json.dumps({"_class_name": "CogVideoXPipeline", "vae": [
        "diffusers", "AutoencoderKLCogVideoX"], "transformer": ["diffusers", "CogVideoXTransformer3DModel"]}))
    if text:
        prompt = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(1))
        weights.save_tensors(folder / "empty.safetensors", {"text": prompt})
    return base


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return save_published(tmp_path_factory.mktemp("published"))


def small_restorer(settings: Settings, tiles: int = 1) -> Restorer:
    """On a random Wan whose transformer does something."""
    world = small.world()
    return Restorer(world.vae, world.dit, torch.ones(1, 2, 8), WAN, settings, tiles).requires_grad_(False).eval()


# ---- the method ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("T", [5, 9])
def test_dove_is_its_pipeline_put_together_of_diffusers_parts(published, T):
    stub()
    diffusers = pytest.importorskip("diffusers", reason="parity is measured against diffusers: pip install diffusers")
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    vae = diffusers.AutoencoderKLCogVideoX.from_pretrained(published / "vae")
    dit = diffusers.CogVideoXTransformer3DModel.from_pretrained(published / "transformer")
    scheduler = diffusers.CogVideoXDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        rescale_betas_zero_snr=True, snr_shift_scale=1.0)
    text = weights.load_tensors(published.parent / "empty.safetensors")[0]["text"]
    x = video(1, 3, T, 8, 12)

    with torch.no_grad():
        large = torch.stack([nnf.interpolate(x[:, :, t], size=(32, 48), mode="bilinear", align_corners=False)
                             for t in range(T)], dim=2)
        large = torch.cat([large, large[:, :, -1:].repeat(1, 1, 9 - T, 1, 1)], dim=2)       # 8 N + 1 frames
        z = vae.encode(large).latent_dist.mode() * vae.config.scaling_factor                # [1, 4, 3, 4, 6]
        z = torch.cat([z[:, :, :1], z], dim=2).transpose(1, 2)                              # an even number of latents
        rotary = get_3d_rotary_pos_embed(16, None, (2, 3), 2, grid_type="slice", max_size=(2, 3))
        v = dit(z, text, torch.tensor([399]), image_rotary_emb=rotary, return_dict=False)[0]
        z0 = scheduler.get_velocity(v, z, torch.tensor([399]))[:, 1:].transpose(1, 2)
        wanted = vae.decode(z0 / vae.config.scaling_factor).sample[:, :, :T]

    restorer = Restorer.from_pretrained(published, task="dove", prompt=published.parent / "empty.safetensors")
    got = restorer(x)
    assert restorer.settings == Settings("upscale", 399, 4, 7)
    assert got.shape == wanted.shape == (1, 3, T, 32, 48)
    difference = (got - wanted).abs().max().item() / wanted.std().item()
    assert difference < 1e-4, f"largest difference {difference:.1e} of the standard deviation, allowed 1e-4"


def test_a_flow_is_subtracted_and_v_is_weighted_as_the_papers_say():
    restorer = small_restorer(Settings("artifacts", t=200))
    z = torch.randn(2, 4, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    prediction = restorer.dit(z, 200, torch.ones(2, 2, 8))
    assert torch.allclose(restorer.denoise(z), z - prediction, atol=1e-6) and prediction.std() > 0.01
    by_v = small.mirage()
    v = {"_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
         "snr_shift_scale": 1.0}
    restorer = Restorer(by_v.vae, by_v.dit, by_v.text, v, Settings("upscale", 399, 4))
    a = float(alpha_bar()[399])
    assert a == pytest.approx(0.3935, abs=5e-5)
    wanted = a**0.5 * z - (1 - a) ** 0.5 * by_v.dit(z, 399, by_v.text.expand(2, -1, -1))
    with torch.no_grad():
        assert torch.allclose(restorer.denoise(z), wanted, atol=1e-6)


@pytest.mark.parametrize("scale, T, H, W", [(1, 1, 16, 16), (2, 6, 17, 11), (3, 5, 7, 19), (4, 2, 4, 9)])
def test_sizes_are_exact_for_every_scale_and_a_stream_gives_what_a_clip_gives(scale, T, H, W):
    restorer = small_restorer(Settings("upscale", scale=scale))
    x = video(3, T, H, W)
    y = restorer(x[None])[0]
    assert y.shape == (3, T, scale * H, scale * W)
    streamed = torch.stack(list(restorer.stream(iter(x.unbind(1)))), dim=1)
    difference = (streamed - y.clamp(-1, 1)).abs().max().item()
    assert streamed.shape == y.shape and difference < 1e-4, f"largest difference {difference:.1e}, allowed 1e-4"


def test_a_long_stream_in_windows_and_tiles_gives_as_many_frames():
    restorer = small_restorer(replace(Settings("upscale", scale=2), window=3), tiles=2)
    frames = list(restorer.stream(video(3, 18, 12, 20).unbind(1)))
    assert len(frames) == 18 and {tuple(f.shape) for f in frames} == {(3, 24, 40)}


# ---- masks -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("moving", [False, True])
def test_what_the_mask_does_not_cover_comes_out_exactly_and_what_it_covers_is_never_seen(moving):
    restorer = small_restorer(Settings("inpaint"))
    x, draws = video(3, 7, 18, 22), torch.Generator().manual_seed(2)
    mask = torch.rand(1, 7 if moving else 1, 18, 22, generator=draws) < 0.4
    given = mask.unbind(1) if moving else mask[:, 0]
    y = torch.stack(list(restorer.stream(x.unbind(1), given)), dim=1)
    mask = mask.expand(1, 7, 18, 22)
    everywhere = mask.expand_as(x)
    assert torch.equal(y[~everywhere], x[~everywhere]) and (y != x)[everywhere].float().mean() > 0.99
    hidden = torch.where(everywhere, video(3, 7, 18, 22, seed=9), x)  # something else under the mask
    again = torch.stack(list(restorer.stream(hidden.unbind(1), given)), dim=1)
    assert torch.equal(again[everywhere], y[everywhere])
    clip = restorer(x[None], mask[None])[0]
    assert torch.equal(clip[~everywhere], x[~everywhere])
    assert (clip.clamp(-1, 1) - y).abs().max() < 1e-4


def test_masks_are_read_from_a_box_a_picture_and_a_video(tmp_path):
    box = torch.zeros(1, 20, 30, dtype=torch.bool)
    box[:, 5:11, 3:20] = True
    assert torch.equal(read_mask("3,5,20,11", 20, 30), box)
    assert torch.equal(read_mask("-4,-4,60,60", 20, 30), torch.ones_like(box))
    Image.fromarray(box[0].byte().numpy() * 200).save(tmp_path / "mask.png")  # a light grey
    assert torch.equal(read_mask(tmp_path / "mask.png", 20, 30), box)
    each = torch.stack([box.roll(t, 2) for t in range(3)], dim=1)
    write_clip(tmp_path / "masks", (each.float() * 2 - 1).expand(3, -1, -1, -1))
    assert torch.equal(torch.stack(list(read_mask(tmp_path / "masks", 20, 30)), dim=1), each)


# ---- files and infer.py ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{task: the folder of a small random Restorer}; the second has its VAE in the first."""
    root = tmp_path_factory.mktemp("restorers")
    small_restorer(Settings("upscale", scale=3)).save_pretrained(root / "1")
    small_restorer(Settings("inpaint")).save_pretrained(root / "2", vae="../1/vae")
    return {"upscale": root / "1", "inpaint": root / "2"}


def test_a_folder_that_is_written_has_a_card(folders):
    assert all(fields_of_card(folder) >= {"license", "pipeline_tag", "tags"} for folder in folders.values())


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """Six frames of 22 x 18, as a folder of PNGs."""
    path = tmp_path_factory.mktemp("frames") / "in"
    write_clip(path, video(3, 6, 18, 22))
    return path


@pytest.mark.parametrize("task", ["upscale", "inpaint"])
def test_a_folder_says_its_task_and_infer_runs_it(folders, frames, tmp_path, task):
    assert load.system_in(folders[task]) is Restorer
    flags = ["--mask", "4,4,12,12"] if task == "inpaint" else ["--compare"]
    assert infer.cli([str(frames), str(tmp_path / "out"), "--model", str(folders[task]), *flags, "--device", "cpu"]
                     ) == 0
    x, y = read_clip(frames), read_clip(tmp_path / "out")
    masks = read_mask("4,4,12,12", 18, 22) if task == "inpaint" else None
    wanted = torch.stack(list(Restorer.from_pretrained(folders[task]).stream(x.unbind(1), masks)), dim=1)
    if task == "upscale":
        assert y.shape == (3, 6, 54, 132)
        left, y = y[..., :66], y[..., 66:]
        assert (left[..., 1::3, 1::3] - x).abs().max() <= 1.01 / 255, "pixels' middles stay"
    assert (y - wanted).abs().max() <= 1.01 / 255


@pytest.mark.parametrize("task, flags, said", [
    ("inpaint", [], "task 'inpaint' needs a mask of what it is to fill .--mask"),
    ("upscale", ["--mask", "0,0,4,4"], "task 'upscale' takes no mask"),
    ("inpaint", ["--mask", "30,0,40,4"], r"the box \[30, 0, 40, 4\] covers nothing of a frame of 22x18"),
    ("inpaint", ["--mask", "large.png"], "large.png: wanted a mask as large as the video, 22x18, got 23x18"),
    ("inpaint", ["--mask", "short"], "the mask has 5 frames, and the video has more"),
    ("inpaint", ["--mask", "long"], "the mask has more than the 6 frames of the video"),
    ("inpaint", ["--mask", "black.png"], "black.png: covers nothing: wanted white where frames are to be filled"),
    ("inpaint", ["--mask", "absent.png"], "absent.png: no such file, and not a box"),
    ("inpaint", ["--mask", "0,0,4,4", "--set", "scale=2"], "was trained for task=inpaint and scale=1, got .*scale=2"),
    ("upscale", ["--set", "scale=4"], "was trained for task=upscale and scale=3, got task=upscale and scale=4"),
    ("upscale", ["--set", "task=dove"], "got task=dove"),
    ("upscale", ["--set", "at_height=16"], "enlarges 3 times, which at_height and keep do not follow"),
    ("upscale", ["--set", "window=2"], "window: wanted an integer from 3"),
    ("wan", ["--set", "task=dove"], "DOVE's is a CogVideoXPipeline, got a WanPipeline"),
    ("published", [], "does not say what it was trained for: a DOVE checkpoint takes --set task=dove"),
    ("published", ["--set", "task=dove"], 'no such file; python encode_prompt.py --base .* --text "" --out')])
def test_what_does_not_fit_is_one_line(folders, published, frames, tmp_path, capsys, monkeypatch, task, flags, said):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (23, 18), "white").save("large.png")
    Image.new("RGB", (22, 18), "black").save("black.png")
    for name, T in (("short", 5), ("long", 7)):
        write_clip(name, torch.ones(3, T, 18, 22))
    model = folders.get(task, published)
    if task == "wan":
        model = tmp_path / "wan"
        model.mkdir()
        (model / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    assert infer.cli([str(v) for v in (frames, "out", "--model", model, "--device", "cpu", *flags)]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert re.search(said, line), line
    assert not (tmp_path / "out").exists()


def test_frames_too_large_for_the_memory_are_refused_before_the_run_with_the_tiles_that_fit(monkeypatch):
    restorer = small_restorer(Settings("upscale", scale=4, window=3))
    restorer.margin = 1
    whole, tiled = (restore.memory_for(restorer, 512, 768, n) for n in (1, 2))
    assert tiled < 0.8 * whole
    monkeypatch.setattr(memory, "available", lambda device: (whole + tiled) // 2)
    with pytest.raises(ValueError, match=r"frames of 768x512 need about .* GiB, and cpu has .*: --set tiles=2 fits"):
        next(restorer.stream(video(3, 1, 128, 192).unbind(1)))
    monkeypatch.setattr(memory, "available", lambda device: 1000)
    monkeypatch.setattr(restore, "TILES", (2,))
    with pytest.raises(ValueError, match="and tiles do not make it fit"):
        next(restorer.stream(video(3, 1, 128, 192).unbind(1)))


def test_a_task_that_keeps_the_size_has_no_scale():
    with pytest.raises(ValueError, match="the task 'inpaint' keeps the size: wanted 1, got 2"):
        Settings("inpaint", scale=2)
    assert restore_folder.Settings is Settings


def test_a_prompt_that_does_not_fit_is_refused():
    world = small.world()
    with pytest.raises(ValueError, match=r"wanted a prompt \[1, L, 8\]"):
        Restorer(world.vae, world.dit, torch.zeros(1, 2, 9), WAN, Settings("artifacts"))
