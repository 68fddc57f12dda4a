"""The world model's loop with networks that can be foreseen: what was seen comes back to the bit, and where."""

from types import SimpleNamespace

import pytest
import torch
from einops import rearrange
from torch import Generator, nn
from torch.nn import functional as nnf

from mirage_min.method.camera import Camera
from mirage_min.networks.dit_wan import WanDiT
from mirage_min.networks.vae_wan22 import Wan22VAE, Wan22VAEConfig
from mirage_min.networks.wan_branch import WanBranch, WanBranchConfig
from mirage_min.systems.world import CELL, Geometry, World, WorldSettings

H, W, DEPTH, FOCAL = 32, 64, 4.0, 80.0  # pixels; a wall straight ahead
ACROSS = CELL * DEPTH / FOCAL           # the way to the side that moves the wall by one cell


class Cells(nn.Module):
    """A VAE without loss: a latent is frame 4f, with a cell's pixels as channels; every frame it codes is that one."""

    def __init__(self, cell=CELL):
        super().__init__()
        self.cell = cell

    def encode(self, x):
        x = nnf.pad(x, (0, 0, 0, 0, 0, -(x.shape[2] - 1) % 4), mode="replicate")
        return rearrange(x[:, :, ::4], "b c f (h p) (w q) -> b (c p q) f h w", p=self.cell, q=self.cell)

    def decode(self, z):
        x = rearrange(z, "b (c p q) f h w -> b c f (h p) (w q)", p=self.cell, q=self.cell)
        return x.repeat_interleave(4, dim=2)[:, :, 3:]


class Obedient(nn.Module):
    """A transformer whose flow leads to what its branch read, and to `elsewhere` where there is nothing."""

    config = SimpleNamespace(in_channels=3 * CELL**2)

    def __init__(self, elsewhere=0.5):
        super().__init__()
        self.elsewhere = elsewhere

    def forward(self, z, t, text, hints):
        read, mask = hints.split([z.shape[1], 1], dim=1)
        sigma = (t / 1000).clamp(min=1e-9)[:, None, :, None, None].to(z.dtype)
        return (z - torch.where(mask > 0, read, self.elsewhere)) / sigma


class Repeat(nn.Module):
    """A branch whose hint is its control."""

    config = SimpleNamespace(vace_in_channels=3 * CELL**2 + 1)

    def forward(self, dit, z, t, text, control):
        return control


def camera(cells: float, height=H, width=W) -> Camera:
    """As many cells to the right of the start."""
    K = torch.tensor([[FOCAL, 0, width / 2], [0, FOCAL, height / 2], [0, 0, 1]], dtype=torch.float64)
    pose = torch.eye(4, dtype=torch.float64)
    pose[0, 3] = cells * ACROSS
    return Camera.from_pose(K, pose, width, height)


def wall(frames, cameras):
    return Geometry(torch.full((len(cameras), *frames.shape[-2:]), DEPTH, dtype=torch.float64))


def world(**settings) -> World:
    settings = WorldSettings(**dict(latents=3, steps=2) | settings)
    return World(Cells(), Obedient(), Repeat(), torch.zeros(1, 1, 1), settings)


def picture(height=H, width=W):
    return torch.rand(3, height, width, generator=Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


def run(model, frame, cameras, observe=wall):
    chunks = list(model.generate(frame, observe(frame[:, None], cameras[:1]), cameras, observe,
                                 Generator().manual_seed(1)))
    return torch.cat([frame[None, :, None]] + [x for _, x in chunks], dim=2)[0], [state for state, _ in chunks]


def moved(frame, cells, new=0.5):
    """The frame seen from so many cells to the right: shifted left, with `new` at the right end."""
    return nnf.pad(frame[:, :, cells * CELL :], (0, cells * CELL), value=new)


def close(x, wanted):
    difference = (x - wanted).abs().max()
    assert difference < 1e-6, f"largest difference {difference:.1e}"


@pytest.mark.parametrize("shared", [1, 2])
def test_out_and_back_shows_each_view_of_the_wall_where_it_was(shared):
    """Two cells to the right in eight frames, and back in eight: known, shifted, new, and the start again."""
    way = [*range(9), *range(7, -1, -1)]
    frame = picture()
    video, states = run(world(shared=shared), frame, [camera(step / 4) for step in way])
    assert video.shape == (3, 17, H, W)
    for t, cells in ((4, 1), (8, 2), (12, 1), (16, 0)):
        close(video[:, t], moved(frame, cells))
    h, w = H // CELL, W // CELL
    assert len(states[-1].memory) == 5 * h * w, "the first frame once, and four latents, of which none twice"


def test_a_bounded_memory_shows_the_same_and_holds_only_what_was_new():
    way = [*range(9), *range(7, -1, -1)]
    cameras, frame = [camera(step / 4) for step in way], picture()
    video, states = run(world(known=0.05), frame, cameras)
    close(video, run(world(), frame, cameras)[0])
    assert len(states[-1].memory) == (H // CELL) * (W // CELL + 2)


def test_without_what_moves_and_sky_in_the_memory():
    """The left cells of every frame move, the lower row of the first is sky: neither is there the next time."""
    def masked(frames, cameras):
        geometry = wall(frames, cameras)
        geometry.dynamic, geometry.sky = torch.zeros(2, len(cameras), H, W, dtype=torch.bool)
        geometry.dynamic[:, :, 3] = True
        geometry.sky[:, CELL:] = True
        return geometry
    frame = picture()
    video, states = run(world(), frame, [camera(0)] * 9, masked)
    wanted = frame.clone()
    wanted[:, :, :CELL], wanted[:, CELL:] = 0.5, 0.5
    close(video[:, 4], wanted)
    assert len(states[-1].memory) == 3 * (W // CELL - 1)


def test_a_second_view_that_is_known_from_the_start_is_shown_where_the_first_ends():
    """The wall two cells to the right is given too: nothing is new there."""
    model, wide = world(), torch.cat([picture(), -picture()], dim=2)
    first, second = wide[:, :, :W], wide[:, :, 2 * CELL : 2 * CELL + W]
    known = model.start(second, wall(second[:, None], [camera(2)]), camera(2)).memory
    state = model.start(first, wall(first[:, None], [camera(0)]), camera(0), known)
    assert len(state.memory) == 2 * (H // CELL) * (W // CELL) and state.seen == 1
    state, x = model.step(state, [camera(step / 4) for step in range(1, 9)], wall, Generator().manual_seed(1))
    close(x[0, :, 7], second)
    assert state.seen == 1


def test_the_state_says_how_many_cells_of_the_new_latents_the_memory_showed():
    """One cell in four is new at the first latent, two at the second: 5 of 8 were there."""
    model, frame = world(), picture()
    state = model.start(frame, wall(frame[:, None], [camera(0)]), camera(0))
    state, _ = model.step(state, [camera(step / 4) for step in range(1, 9)], wall, Generator().manual_seed(1))
    assert state.seen == pytest.approx(5 / 8)
    away, _ = model.step(state, [camera(100)] * 8, wall, Generator().manual_seed(1))
    assert away.seen == 0


def test_cells_that_only_padding_has_do_not_count_as_unseen():
    """24 rows are padded to 32, so the last of four rows of cells of 8 pixels is padding. Else as in the test above."""
    model, rows = world(), 24
    model.vae, model.dit.config = Cells(8), SimpleNamespace(in_channels=3 * 8**2)
    frame, way = picture(rows), [camera(step / 4, rows) for step in range(9)]
    state = model.start(frame, wall(frame[:, None], way[:1]), way[0])
    state, _ = model.step(state, way[1:], wall, Generator().manual_seed(1))
    assert state.seen == pytest.approx(5 / 8)


def test_without_the_mask_the_branch_is_told_that_all_is_shown_and_the_state_says_what_is():
    """Where nothing was read the networks now take the 0 of the memory."""
    frame, way = picture(), [camera(step / 4) for step in range(9)]
    video, states = run(world(mask=False), frame, way)
    wanted = moved(frame, 2)
    wanted[:, :, -2 * CELL :] = 0
    close(video[:, 8], wanted)
    assert states[0].seen == pytest.approx(5 / 8)


@pytest.mark.parametrize("frames", [2, 5, 9, 10, 20])
def test_any_number_of_cameras_gives_as_many_frames(frames):
    video, states = run(world(), picture(), [camera(0)] * frames)
    assert video.shape[1] == frames and len(states) == -(-(frames - 1) // 8)
    close(video[:, -1], picture())


def test_sizes_that_are_no_whole_cells_are_padded_and_cropped():
    """A cell at the right or bottom is known if half of it is in the frame: of 24 x 40 pixels, all but the corner's."""
    for height, width, rows, columns in ((24, 40, 24, 40), (20, 36, 16, 32)):
        frame = picture(height, width)
        video, _ = run(world(), frame, [camera(0, height, width)] * 5)
        wanted = frame.clone()
        wanted[:, rows:], wanted[:, :, columns:], wanted[:, 16:, 32:] = 0.5, 0.5, 0.5
        assert video.shape == (3, 5, height, width)
        close(video[:, 4], wanted)


def test_only_the_new_latents_frames_are_observed_and_each_with_its_camera():
    asked = []

    def watching(frames, cameras):
        asked.append((frames.clone(), [float(c.camera_to_world[0, 3] / ACROSS) for c in cameras]))
        return wall(frames, cameras)
    frame = picture()
    video, _ = run(world(shared=2), frame, [camera(step / 4) for step in range(13)], watching)
    places = [places for _, places in asked]
    assert [[round(4 * p) for p in chunk] for chunk in places] == [[0], [4, 8], [12]]
    close(asked[1][0], video[:, [4, 8]])


def test_small_random_networks_run_and_the_branch_is_heard():
    """Same draws, same video; another branch, another; the first frame is not touched."""
    torch.manual_seed(0)
    vae = Wan22VAE(Wan22VAEConfig(base_dim=8, decoder_base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=(0.0,) * 4,
                                  latents_std=(1.0,) * 4))
    config = WanBranchConfig(num_attention_heads=1, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=8,
                             freq_dim=16, ffn_dim=32, num_layers=2, vace_layers=(0, 1), vace_in_channels=5)
    model = World(vae, WanDiT(config), WanBranch(config), torch.zeros(1, 2, 8), WorldSettings(latents=2, steps=1))
    frame, cameras = picture().float(), [camera(step / 4) for step in range(6)]
    a, states = run(model, frame, cameras)
    assert a.shape == (3, 6, H, W) and a.dtype == torch.float32 and a.abs().max() <= 1
    assert torch.equal(a, run(model, frame, cameras)[0]) and not states[0].memory.features.requires_grad
    nn.init.normal_(model.branch.vace_blocks[0].proj_out.weight, std=0.5)
    assert not torch.equal(a, run(model, frame, cameras)[0])


def test_what_does_not_fit_is_refused():
    model, frame = world(), picture()
    state = model.start(frame, wall(frame, [camera(0)]), camera(0))
    draws = Generator()
    with pytest.raises(ValueError, match="a step takes from 1 to 8 cameras, got 9"):
        model.step(state, [camera(0)] * 9, wall, draws)
    with pytest.raises(ValueError, match="from 1 to 8 cameras, got 0"):
        model.step(state, [], wall, draws)
    with pytest.raises(ValueError, match="all cameras must be of 32 x 64 pixels"):
        model.step(state, [camera(0, 32, 48)], wall, draws)
    with pytest.raises(ValueError, match=r"the frame's size 32 x 64, got \[32, 48\]"):
        model.start(frame, Geometry(torch.ones(1, 32, 48)), camera(0))
    with pytest.raises(ValueError, match=r"frame must be \[3, 32, 64\], the camera's size, got \[3, 32, 48\]"):
        model.start(frame[:, :, :48], wall(frame, [camera(0)]), camera(0))
    with pytest.raises(ValueError, match="asked for 2 frames and gave the depth of 1"):
        model.step(state, [camera(0)] * 8, lambda frames, cameras: wall(frames, cameras[:1]), draws)
    with pytest.raises(ValueError, match="shared must be from 1 to latents - 1 = 2, got 3"):
        WorldSettings(latents=3, shared=3)
    deaf = Repeat()
    deaf.config = SimpleNamespace(vace_in_channels=96)
    with pytest.raises(ValueError, match="the branch must take 769 channels, a latent's 768 and the mask, got 96"):
        World(Cells(), Obedient(), deaf, torch.zeros(1, 1, 1))
