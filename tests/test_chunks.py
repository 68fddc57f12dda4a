"""chunks.py: clips cut as the world model's loop cuts them, encoded once; what is of no use is left out by name."""

import pytest
import torch
from torch import nn

from mirage_min.data.toy_world import WorldConfig, load_clip, make_clip, save_clip
from mirage_min.networks import weights
from mirage_min.training.chunks import Chunk, Chunks

CONFIG = WorldConfig(14, 16, 24, path="out_and_back", static=True)


class Counting(nn.Module):
    """A latent is the mean colour of the last frame that it codes, a cell for the whole frame; calls are counted."""

    def __init__(self):
        super().__init__()
        self.calls, self.scale = 0, nn.Parameter(torch.ones(()))

    def encode(self, x):
        self.calls += 1
        return self.scale * x[:, :, ::4].mean(dim=(-2, -1), keepdim=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for seed in (1, 2):
        save_clip(make_clip(seed, CONFIG), folder / f"{seed}.safetensors")
    save_clip(make_clip(3, CONFIG, extras=False), folder / "flat.safetensors")
    short = make_clip(4, WorldConfig(8, 16, 24))  # one chunk of 5, and not quite two
    save_clip(short, folder / "short.safetensors")
    (folder / "torn.safetensors").write_bytes(b"no clip")
    return folder


def test_chunks_share_a_frame_and_latents_are_numbered_through_the_clip(folder, tmp_path):
    vae = Counting()
    chunks = Chunks(folder, vae.encode, vae, latents=3, cache=tmp_path)
    assert chunks.names == ["1.safetensors", "2.safetensors"] and chunks.counts == [1, 1]
    assert [line.partition(".")[0] for line in chunks.left_out] == ["flat", "short", "torn"]
    assert "holds no K, c2w, depth (toy_world" in chunks.left_out[0] and "has 8 frames, wanted 9" in chunks.left_out[1]

    chunks = Chunks(folder, vae.encode, vae, latents=2, cache=tmp_path / "two")
    assert chunks.counts == [3, 3] + [1] and chunks.names[2] == "short.safetensors"
    clip, chunk = load_clip(folder / "1.safetensors"), chunks.read(0, 2)
    assert chunk.name == "1.safetensors" and chunk.number == 2 and chunk.z.shape == (3, 3, 2, 1, 1)
    for i in range(4):  # latent i shows frame 4 i
        assert torch.allclose(chunk.latent(i).flatten(), clip.x_gt[:, 4 * i].mean(dim=(1, 2)), atol=1e-3)
        assert torch.equal(chunk.depth[i], clip.depth[0, 4 * i]) and not chunk.dynamic[i].any()
        assert torch.allclose(chunk.cameras[i].camera_to_world, clip.c2w[4 * i], atol=1e-5)
        assert torch.equal(chunk.cameras[i].K, clip.K) and (chunk.cameras[i].height, chunk.cameras[i].width) == (16, 24)
    assert len(chunk.cameras) == len(chunk.depth) == 4
    # of a latent that two chunks have, the earlier one's
    chunk.z[1, :, 0] = 7
    assert (chunk.latent(1) == chunk.z[0, :, 1]).all() and (chunk.latent(2) == chunk.z[1, :, 1]).all()


@pytest.mark.parametrize("F", [2, 3, 5])
def test_the_latents_of_a_clip_are_those_of_its_chunks_in_a_row_without_the_ones_that_come_twice(F):
    z = torch.stack([torch.arange(F) + 10.0 * chunk for chunk in range(3)]).view(3, 1, F, 1, 1)
    clip = Chunk("a", 0, z, [])
    wanted = [*range(F), *range(11, 10 + F), *range(21, 20 + F)]
    assert [clip.latent(i).item() for i in range(3 * (F - 1) + 1)] == wanted


def test_a_chunk_is_a_function_of_its_generator_and_all_are_drawn(folder, tmp_path):
    vae = Counting()
    chunks = Chunks(folder, vae.encode, vae, latents=2, cache=tmp_path)
    drawn = [chunks.draw(torch.Generator().manual_seed(k)) for k in range(60)]
    found = {f"{chunk.name[0]}{chunk.number}" for chunk in drawn}
    assert found == {"10", "11", "12", "20", "21", "22", "s0"}
    again = chunks.draw(torch.Generator().manual_seed(5))
    assert (again.name, again.number) == (drawn[5].name, drawn[5].number) and torch.equal(again.z, drawn[5].z)


def test_latents_are_made_once_and_those_of_another_network_are_refused(folder, tmp_path):
    vae = Counting()
    flat = Chunks(folder, vae.encode, vae, 3, tmp_path, geometry=False)
    assert flat.names == ["1.safetensors", "2.safetensors", "flat.safetensors"] and vae.calls == 3
    assert flat.read(2, 0).cameras == [] and flat.read(2, 0).depth is None
    Chunks(folder, vae.encode, vae, 3, tmp_path)
    assert vae.calls == 3
    other = Counting()
    other.scale.data.fill_(2)
    with pytest.raises(ValueError, match="1.safetensors: wanted latents of .*: remove"):
        Chunks(folder, other.encode, other, 3, tmp_path)


def test_a_folder_without_use_and_clips_of_two_sizes_are_refused(folder, tmp_path):
    vae = Counting()
    with pytest.raises(ValueError, match="no usable clips: 1.safetensors: has 14 frames, wanted 17"):
        Chunks(folder, vae.encode, vae, 5, tmp_path)
    with pytest.raises(ValueError, match=r"no usable clips: wanted \*.safetensors"):
        Chunks(tmp_path, vae.encode, vae, 2, tmp_path / "cache")
    (tmp_path / "mixed").mkdir()
    for size in (16, 32):
        save_clip(make_clip(0, WorldConfig(5, size, 24)), tmp_path / "mixed" / f"{size}.safetensors")
    with pytest.raises(ValueError, match=r"wanted clips of one size, got \[\(16, 24\), \(32, 24\)\]"):
        Chunks(tmp_path / "mixed", vae.encode, vae, 2, tmp_path / "cache")
    tensors, _ = weights.load_tensors(tmp_path / "mixed" / "16.safetensors")
    (tmp_path / "mixed" / "32.safetensors").unlink()
    weights.save_tensors(tmp_path / "mixed" / "16.safetensors", tensors | {"depth": torch.ones(5, 16, 24)})
    with pytest.raises(ValueError, match=r"wanted depth \[1, 5, 16, 24\], got \[5, 16, 24\]"):
        Chunks(tmp_path / "mixed", vae.encode, vae, 2, tmp_path / "cache")
