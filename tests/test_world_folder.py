"""A world model's folder: what is written is read again and computes the same; what does not fit is refused by name."""

import json

import pytest
import torch
from torch import Generator

from mirage_min.method.camera import Camera
from mirage_min.networks import weights
from mirage_min.networks.vae_wan22 import Wan22VAE
from mirage_min.systems.load import system_in
from mirage_min.systems.world import Geometry, World
from tests import small

H, W = 32, 48


def camera(z: float) -> Camera:
    pose = torch.eye(4)
    pose[2, 3] = z
    return Camera.from_pose(torch.tensor([[40.0, 0, 24], [0, 40, 16], [0, 0, 1]]), pose, W, H)


def wall(frames, cameras):
    return Geometry(torch.full((len(cameras), H, W), 5.0))


def video(world: World) -> torch.Tensor:
    frame = torch.rand(3, H, W, generator=Generator().manual_seed(0)) * 2 - 1
    cameras = [camera(0.1 * t) for t in range(5)]
    chunks = world.generate(frame, wall(frame, cameras[:1]), cameras, wall, Generator().manual_seed(1))
    return torch.cat([x for _, x in chunks], dim=2)


@pytest.mark.parametrize("two_two", [False, True], ids=["Wan 2.1", "Wan 2.2"])
def test_what_is_written_is_read_and_makes_the_same_video(tmp_path, two_two):
    world = small.world(two_two, shift=3.0, known=0.05)
    world.save_pretrained(tmp_path, about={"step": "7"})
    again = World.from_pretrained(tmp_path)
    assert again.settings == world.settings and isinstance(again.vae, Wan22VAE) == two_two
    assert json.loads((tmp_path / "model_index.json").read_text())["step"] == "7"
    assert not any(p.requires_grad for p in again.parameters()) and not again.training
    difference = (video(again) - video(world)).abs().max().item()
    assert difference < 1e-5, f"largest difference {difference:.1e}"


def test_settings_replace_those_of_the_folder_and_float16_is_computed_in_float32(tmp_path):
    small.world().half().save_pretrained(tmp_path)
    stored = {t.dtype for file in tmp_path.rglob("*.safetensors") for t in weights.load_tensors(file)[0].values()}
    world = World.from_pretrained(tmp_path, steps=3, latents=4)
    assert stored == {torch.float16} and {p.dtype for p in world.parameters()} == {torch.float32}
    assert world.text.dtype == torch.float32 and (world.settings.steps, world.settings.latents) == (3, 4)
    assert World.from_pretrained(tmp_path, dtype=torch.bfloat16).text.dtype == torch.bfloat16


def test_parts_of_two_types_compute_in_the_transformers(tmp_path):
    world = small.world()
    world.vae.save_pretrained(tmp_path / "vae")
    world.bfloat16().save_pretrained(tmp_path / "world", vae="../vae")
    assert {p.dtype for p in World.from_pretrained(tmp_path / "world").parameters()} == {torch.bfloat16}


def test_the_vae_may_be_elsewhere_and_parts_may_come_from_several_folders(tmp_path):
    world = small.world()
    world.vae.save_pretrained(tmp_path / "vae_wan")
    (tmp_path / "world").mkdir()
    world.save_pretrained(tmp_path / "world", vae="../vae_wan")
    assert not (tmp_path / "world" / "vae").exists()
    wanted = video(world)
    torch.testing.assert_close(video(World.from_pretrained(tmp_path / "world")), wanted)
    parts = World.from_base(tmp_path / "world" / "transformer", tmp_path / "world" / "branch", tmp_path / "vae_wan",
                            world.text, latents=2, steps=1)
    torch.testing.assert_close(video(parts), wanted)
    unprompted = World.from_base(tmp_path / "world", tmp_path / "world", tmp_path / "vae_wan")
    assert unprompted.text.shape == (1, 1, 8) and unprompted.text.abs().max() == 0


def spoil(folder, **changes):
    index = json.loads((folder / "model_index.json").read_text()) | changes
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("changes, message", [
    (dict(_class_name="Harmonizer"), "model_index.json: wanted _class_name 'World', got 'Harmonizer'"),
    (dict(latents=1), "model_index.json: latents: wanted an integer from 2 to 1000, got 1"),
    (dict(steps="20"), "model_index.json: steps: wanted an integer"),
    (dict(shared=2), "shared must be from 1 to latents - 1 = 1, got 2"),
    (dict(vae=3), "model_index.json: vae: wanted text, got 3"),
    (dict(vae="../gone"), "gone: no such folder")])
def test_a_wrong_index_is_refused_by_its_field(tmp_path, changes, message):
    small.world().save_pretrained(tmp_path)
    spoil(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        World.from_pretrained(tmp_path)


def test_a_prompt_or_a_branch_that_does_not_fit_is_refused(tmp_path):
    small.world().save_pretrained(tmp_path)
    for text, message in ((torch.zeros(1, 2, 9), r"wanted a prompt \[1, L, 8\].*got \[1, 2, 9\]"),
                          (torch.full((1, 2, 8), torch.nan), "prompt.safetensors: text is not finite")):
        weights.save_tensors(tmp_path / "prompt.safetensors", {"text": text})
        with pytest.raises(ValueError, match=message):
            World.from_pretrained(tmp_path)
    (tmp_path / "prompt.safetensors").unlink()
    assert World.from_pretrained(tmp_path).text.abs().max() == 0
    (tmp_path / "branch" / "config.json").unlink()
    with pytest.raises(ValueError, match="no config.json in .*branch"):
        World.from_pretrained(tmp_path)


def test_infer_is_told_what_a_world_model_is_for(tmp_path):
    small.world().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_index.json: a world model makes a video from one frame: generate.py"):
        system_in(tmp_path)
