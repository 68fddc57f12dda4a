"""generate.py: a scene goes in, a video comes out whole or not at all, and what is wrong is one line."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import generate
from experiments import world_study
from experiments.world_memories import Known, NoMemory, as_kind
from mirage_min.data.video import read_clip
from mirage_min.data.world_scene import Toy, write_toy
from mirage_min.method import metrics
from mirage_min.networks import weights
from tests import small


class Deep(nn.Module):
    """Depth by the row, in another unit."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (torch.ones_like(images[:, 0]).cumsum(1) + 1).flip(1)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A model, a made-up scene, the same as anybody's, and a depth network."""
    folder = tmp_path_factory.mktemp("work")
    small.world().save_pretrained(folder / "model")
    for name in ("toy", "plain"):
        write_toy(folder / name, Toy(3, 9, 20, 32, "loop"))
    content = json.loads((folder / "plain" / "transforms.json").read_text())
    del content["toy_world"]
    (folder / "plain" / "transforms.json").write_text(json.dumps(content))
    torch.jit.script(Deep()).save(folder / "depth.pt")
    return folder


def run(work, scene, out, *more) -> int:
    flags = ["--model", work / "model", "--device", "cpu", *more]
    return generate.cli([str(flag) for flag in (work / scene, out, *flags)])


def frames_of(path) -> torch.Tensor:
    return weights.load_tensors(path)[0]["x_dr"]


def test_a_video_begins_with_the_given_frame_and_says_what_the_memory_showed(work, tmp_path, capsys):
    assert run(work, "toy", tmp_path / "out.safetensors") == 0
    x = frames_of(tmp_path / "out.safetensors")
    first = read_clip(work / "toy" / "images")[:, 0]
    assert x.shape == (3, 9, 20, 32) and torch.equal(x[:, 0], ((first + 1) * 127.5).round().byte())
    said = capsys.readouterr().out
    assert "9 cameras, 9 frames with depth; depth and poses are off each other by" in said
    shares = said.partition("the memory showed: ")[2].partition(";")[0].split(", ")
    assert len(shares) == 2 and all(share.endswith("%") for share in shares)
    assert run(work, "toy", tmp_path / "again.safetensors") == 0
    assert torch.equal(x, frames_of(tmp_path / "again.safetensors")), "the same seed, the same video"
    assert run(work, "toy", tmp_path / "other.safetensors", "--set", "seed=1", "--set", "views=0") == 0
    assert not torch.equal(x, frames_of(tmp_path / "other.safetensors"))


def test_a_network_gives_the_depth_where_no_renderer_does_and_the_path_is_chosen(work, tmp_path, capsys):
    out = tmp_path / "out.mp4"
    assert run(work, "plain", out, "--path", "out_and_back", "--frames", 7, "--depth", work / "depth.pt") == 0
    assert read_clip(out).shape == (3, 7, 20, 32)
    assert "depth.pt: times " in capsys.readouterr().out
    assert run(work, "plain", tmp_path / "pngs", "--depth", work / "depth.pt", "--set", "latents=3") == 0
    assert len(list((tmp_path / "pngs").iterdir())) == 9


def test_a_path_out_of_all_that_is_known_is_allowed_and_said(work, tmp_path, capsys):
    assert run(work, "plain", tmp_path / "far.mp4", "--path", "drive", "--frames", 9, "--set", "way=4000",
               "--depth", work / "depth.pt") == 0
    assert "the memory showed: 0%, 0%" in capsys.readouterr().out


@pytest.mark.parametrize("scene, more, message", [
    ("plain", [], "is no made-up scene: wanted --depth FILE"),
    ("toy", ["--frames", 10], "holds 9 cameras, wanted 10 at least: --path drive or out_and_back or loop makes up"),
    ("toy", ["--frames", 4], "a path of 4 cameras, wanted 5 at least, one chunk of 2 latents"),
    ("toy", ["--set", "latents=4"], "a path of 9 cameras, wanted 13 at least, one chunk of 4 latents"),
    ("toy", ["--depth", "gone.pt"], "gone.pt: no such file"),
    ("toy", ["--set", "speed=3"], "unknown key 'speed', there are .*steps.*seed"),
    ("toy", ["--set", "views=10"], "toy: depth of 9 frames, wanted views=10"),
    ("toy", ["--set", "steps=0"], "steps: wanted an integer from 1"),
    ("gone", [], "gone: no such folder"), ("model", [], "wanted a folder with transforms.json")])
def test_what_is_wrong_is_one_line_and_leaves_nothing(work, tmp_path, capsys, scene, more, message):
    assert run(work, scene, tmp_path / "out.mp4", *more) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("generate.py: ") and re.search(message, said), said
    assert not list(tmp_path.iterdir())


def test_without_a_model_where_the_small_one_would_be_the_line_says_where_one_comes_from(work, tmp_path, capsys,
                                                                                           monkeypatch):
    monkeypatch.setattr(generate, "SHIPPED", tmp_path / "world")
    assert generate.cli([str(work / "toy"), str(tmp_path / "out.mp4")]) == 2
    said = capsys.readouterr().err
    assert said == (f"generate.py: {tmp_path / 'world'}: no small world model is there: wanted --model DIR, a folder "
                    "that train_world.py has written\n")


def test_a_failure_on_the_way_leaves_nothing_and_what_exists_is_kept(work, tmp_path, capsys, monkeypatch):
    (tmp_path / "out.mp4").write_text("kept")
    assert run(work, "toy", tmp_path / "out.mp4") == 2
    assert "exists (--overwrite replaces it)" in capsys.readouterr().err
    calls = []

    def failing(network, frames, cameras):
        calls.append(len(cameras))
        if len(calls) > 1:
            raise ValueError("the depth network has gone")
        return generate.Geometry(torch.full((len(cameras), *frames.shape[-2:]), 5.0))
    monkeypatch.setattr(generate.ToyDepth, "__call__", failing)
    assert run(work, "toy", tmp_path / "out.mp4", "--overwrite") == 2
    assert calls == [1, 1] and "the depth network has gone" in capsys.readouterr().err
    assert (tmp_path / "out.mp4").read_text() == "kept" and [p.name for p in tmp_path.iterdir()] == ["out.mp4"]


def test_depth_that_does_not_fit_is_refused_with_its_error(work, tmp_path, capsys):
    write_toy(tmp_path / "scene", Toy(5, 9, 32, 48, "loop"))
    for file in (tmp_path / "scene" / "depth").iterdir():
        np.save(file, np.load(file) * np.float32(1000))
    assert run(work, tmp_path / "scene", tmp_path / "out.mp4") == 2
    said = capsys.readouterr().err
    assert "depth and poses do not fit" in said and "with depth times 0.001 by" in said


def test_the_shipped_model_finds_the_street_again_where_its_memory_shows_it():
    """Two chunks out and back: what frame 0 shows comes back nearer to it with the memory than without."""
    world = world_study.read_world(generate.SHIPPED, SimpleNamespace(steps=4, frames=17))
    clip, path = world_study.make(1_200_000, 17, "out_and_back", True)
    seen = world_study.seen_first(world, clip, path)[None, :, [16]]
    first = clip.x_gt[None, :, [0]]
    found = []
    for kind in (world, as_kind(NoMemory, world)):
        x = world_study.rollout(kind, clip, path, Known(clip, path), seed=0)
        found.append(float(metrics.psnr(x[None, :, [16]], first, seen)))
    assert found[0] > found[1] + 1, found
