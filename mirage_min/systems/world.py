"""A world model with a latent spatial memory: drive out, come back, and find the same street again.

This is the *world model* called Mirage ("Latent Spatial Memory for Video World Models", arXiv 2606.09828), not Mirage,
the harmoniser. From one frame, its depth and a path of cameras it makes a video, chunk by chunk. A chunk is

    read      what the memory shows at each latent's camera, and where: the control of the side branch
    denoise   the chunk's latents, from noise; those it shares with the chunk before are given
    decode    to frames
    observe   the depth of the new frames, and what moves or is sky there
    encode    the decoded frames again, which is what the next chunk will be given too
    add       the cells of the new latents to the memory, without what moves, sky and unknown depth

    state, first = world.start(frame, geometry, camera), frame
    state, frames = world.step(state, cameras, observe, draws)        # and again

The frames that two chunks share are encoded anew for the second, because a latent in the middle of a video codes four
frames and the first of a chunk codes one. Left out: text for each chunk, guidance, reference frames, and networks for
masks and cameras: `observe` (observe.py) is the caller's, and cameras are those of the path. On disk: world_folder.py.

    python -m mirage_min.systems.world       # random networks: the loop, its shapes, and how the memory grows
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as nnf

from ..method import flow, latent_memory
from ..method.camera import Camera
from ..method.latent_memory import Memory, pixel_frame
from ..networks.checked import Within
from . import world_folder

CELL = 16  # frames are padded to multiples of so many pixels: Wan 2.2's cell, twice Wan 2.1's


@dataclass
class WorldSettings:
    """How a video is made."""

    latents: Annotated[int, Within(2, 1000)] = 9  # of a chunk, 33 frames
    shared: Annotated[int, Within(1, 999)] = 1    # how many of them a chunk has in common with the one before
    steps: Annotated[int, Within(1, 1000)] = 20
    shift: Annotated[float, Within(0.001, 1000)] = 5.0
    known: Annotated[float, Within(0)] = 0.0      # bounds the memory's growth (latent_memory.add); 0: the paper's union
    mask: bool = True                             # off: the branch is told that the memory shows all (the release)

    def __post_init__(self):
        if not 1 <= self.shared < self.latents:
            raise ValueError(f"shared must be from 1 to latents - 1 = {self.latents - 1}, got {self.shared}")


@dataclass
class Geometry:
    """What is known of n frames; masks are True where a pixel is to be left out, None where nothing is."""

    depth: Tensor                  # [n, H, W] along z of the camera, in the unit of its pose; 0, inf, nan: unknown
    dynamic: Tensor | None = None  # [n, H, W] bool
    sky: Tensor | None = None      # [n, H, W] bool


Observe = Callable[[Tensor, list[Camera]], Geometry]  # (frames [3, n, H, W] in [-1, 1], their cameras)


@dataclass
class State:
    """A video as far as it has been made."""

    memory: Memory
    past: Tensor           # [1, 3, 4k - 3, H', W'], padded: the frames that the next chunk is given
    cameras: list[Camera]  # theirs
    seen: float = 1.0      # the share of the cells of the newest frames' latents that the memory showed


class World(nn.Module):
    """The loop over chunks, around the given networks."""

    Options = WorldSettings
    from_base, from_pretrained = classmethod(world_folder.from_base), classmethod(world_folder.from_pretrained)
    save_pretrained = world_folder.save_pretrained

    def __init__(self, vae: nn.Module, dit: nn.Module, branch: nn.Module, text: Tensor,
                 settings: WorldSettings = WorldSettings()):
        """
        vae     WanVAE or Wan22VAE
        dit     WanDiT
        branch  WanBranch; its control is the latent that was read and its mask
        text    [1, L, D], the encoded prompt
        ValueError if the branch takes another number of channels.
        """
        super().__init__()
        wanted = dit.config.in_channels + 1
        if branch.config.vace_in_channels != wanted:
            raise ValueError(f"the branch must take {wanted} channels, a latent's {wanted - 1} and the mask, "
                             f"got {branch.config.vace_in_channels}")
        self.vae, self.dit, self.branch, self.settings = vae, dit, branch, settings
        self.register_buffer("text", text)

    @torch.no_grad()
    def start(self, frame: Tensor, geometry: Geometry, camera: Camera, memory: Memory | None = None) -> State:
        """The state that holds one frame [3, H, W] in [-1, 1], which is added to the memory; geometry has n = 1.

        memory: of views that are known already, None if there are none. ValueError if frame, depth and camera are not
        of one size.
        """
        if frame.shape != (3, camera.height, camera.width):
            raise ValueError(f"frame must be [3, {camera.height}, {camera.width}], the camera's size, "
                             f"got {list(frame.shape)}")
        past = pad(frame[None, :, None])                               # [1, 3, 1, H', W']
        memory = self.blank(frame) if memory is None else memory
        return State(self.update(memory, past, [0], geometry, [camera]), past, [camera])

    @torch.no_grad()
    def step(self, state: State, cameras: list[Camera], observe: Observe, draws: Generator) -> tuple[State, Tensor]:
        """The next frames, one for each camera -> (the new state, frames [1, 3, n, H, W] in [-1, 1]).

        n is at most `room(state)`. ValueError for more, none, or another size than the first frame's.
        """
        H, W = state.cameras[0].height, state.cameras[0].width
        known, n = len(state.cameras), len(cameras)
        if not 1 <= n <= self.room(state):
            raise ValueError(f"a step takes from 1 to {self.room(state)} cameras, got {n}")
        if any((camera.height, camera.width) != (H, W) for camera in cameras):
            raise ValueError(f"all cameras must be of {H} x {W} pixels, as the first")
        cameras = state.cameras + cameras
        given = self.vae.encode(state.past)                            # [1, C, k, h, w]
        control = self.control(state.memory, cameras, given)
        z = self.denoise(given, control, draws)
        decoded = self.vae.decode(z)[:, :, known : known + n, : state.past.shape[3], : state.past.shape[4]]
        # What is known stays as it is: it has been decoded once.
        x = torch.cat([state.past, decoded.clamp(-1, 1)], dim=2)       # [1, 3, known + n, H', W']
        frames = x[:, :, :, :H, :W]

        new = [f for f in range(given.shape[2], z.shape[2]) if pixel_frame(f) < x.shape[2]]
        memory = state.memory
        if new:
            at = [pixel_frame(f) for f in new]
            seen_by = [cameras[i] for i in at]
            memory = self.update(memory, x, new, observe(frames[0, :, at], seen_by), seen_by)
        keep = self.kept(x.shape[2])
        cell = state.past.shape[3] // given.shape[3]
        h, w = -(-H // cell), -(-W // cell)  # without those that only padding has
        seen = control[:, :-1, given.shape[2] :, :h, :w].any(dim=1).double().mean()
        return State(memory, x[:, :, -keep:], cameras[-keep:], float(seen)), frames[:, :, known:]

    def generate(self, frame: Tensor, geometry: Geometry, cameras: list[Camera], observe: Observe,
                 draws: Generator) -> Iterator[tuple[State, Tensor]]:
        """A whole path: frame [3, H, W] is what the first camera sees; each chunk's (state, new frames) in turn."""
        state = self.start(frame, geometry, cameras[0])
        done = 1
        while done < len(cameras):
            ahead = cameras[done : done + self.room(state)]
            state, x = self.step(state, ahead, observe, draws)
            done += len(ahead)
            yield state, x

    def room(self, state: State) -> int:
        """How many new frames the next chunk has."""
        return pixel_frame(self.settings.latents - 1) + 1 - len(state.cameras)

    def kept(self, frames: int) -> int:
        """How many of a chunk's frames the next is given: 4k - 3, those of its first k latents."""
        return min(pixel_frame(self.settings.shared - 1), pixel_frame((frames - 1) // 4)) + 1

    # ---- the parts of a step -----------------------------------------------------------------------------------------

    def blank(self, like: Tensor) -> Memory:
        """A memory without points, in the dtype and on the device of `like`."""
        return Memory.empty(self.dit.config.in_channels, like.dtype, like.device)

    def control(self, memory: Memory, cameras: list[Camera], like: Tensor) -> Tensor:
        """What the branch is shown for a chunk whose frames have these cameras: `shown` at the camera of each latent.

        Where there are fewer cameras than frames, the last one stays.
        """
        views = [cameras[min(pixel_frame(f), len(cameras) - 1)] for f in range(self.settings.latents)]
        return self.shown(memory, views, like)

    def shown(self, memory: Memory, views: list[Camera], like: Tensor) -> Tensor:
        """What the memory shows at each latent's camera, and the mask -> [1, C + 1, F, h, w]; h and w are those of
        `like`."""
        h, w = like.shape[-2:]
        shown = [latent_memory.read(memory, padded(view), h, w) for view in views]
        z, mask = (torch.stack(images, dim=1) for images in zip(*shown))   # [C, F, h, w], [1, F, h, w]
        if not self.settings.mask:
            mask = torch.ones_like(mask)
        return torch.cat([z, mask])[None]

    def denoise(self, given: Tensor, control: Tensor, draws: Generator) -> Tensor:
        """Latents [1, C, F, h, w], of which the first are the given ones [1, C, k, h, w]."""
        noise = torch.randn(1, given.shape[1], *control.shape[2:], generator=draws, device=draws.device)

        def predict(z: Tensor, t: Tensor) -> Tensor:
            return self.dit(z, t, self.text, self.branch(self.dit, z, t, self.text, control))
        return flow.sample(predict, noise.to(given), self.settings.steps, self.settings.shift, given)

    def update(self, memory: Memory, x: Tensor, new: list[int], geometry: Geometry, cameras: list[Camera]) -> Memory:
        """The memory and the latents `new` of frames x [1, 3, T, H', W'], with the geometry and cameras of each."""
        z = self.vae.encode(x)[0]                                      # [C, F, h, w]
        return self.remember(memory, z[:, new], geometry, cameras)

    def remember(self, memory: Memory, z: Tensor, geometry: Geometry, cameras: list[Camera]) -> Memory:
        """The memory and the cells of latents z [C, n, h, w], with the geometry and the cameras of their n frames."""
        if len(geometry.depth) != len(cameras):
            raise ValueError(f"observe was asked for {len(cameras)} frames and gave the depth of {len(geometry.depth)}")
        for i, camera in enumerate(cameras):
            depth, dynamic, sky = (None if image is None else fill(image[i], camera)
                                   for image in (geometry.depth, geometry.dynamic, geometry.sky))
            memory = latent_memory.add(memory, z[:, i], depth, padded(camera), dynamic=dynamic, sky=sky,
                                       known=self.settings.known or None)
        return memory


def pad(x: Tensor) -> Tensor:
    """x [1, 3, T, H, W] -> sides that are multiples of CELL, the last row and column repeated."""
    H, W = x.shape[3:]
    return nnf.pad(x, (0, -W % CELL, 0, -H % CELL, 0, 0), mode="replicate")


def fill(image: Tensor, camera: Camera) -> Tensor:
    """A depth or mask [H, W] of a frame -> of the padded frame: 0, which is unknown depth, and False."""
    if image.shape != (camera.height, camera.width):
        raise ValueError(f"depth and masks must be of the frame's size {camera.height} x {camera.width}, "
                         f"got {list(image.shape)}")
    return nnf.pad(image, (0, -camera.width % CELL, 0, -camera.height % CELL))


def padded(camera: Camera) -> Camera:
    """The camera of the padded frame: what is added lies at the right and below, so K stays."""
    return replace(camera, width=camera.width + -camera.width % CELL, height=camera.height + -camera.height % CELL)


if __name__ == "__main__":
    from ..networks.dit_wan import WanDiT
    from ..networks.vae_wan22 import Wan22VAE, Wan22VAEConfig
    from ..networks.wan_branch import WanBranch, WanBranchConfig

    torch.manual_seed(0)
    statistics = dict(latents_mean=(0.0,) * 8, latents_std=(1.0,) * 8)
    vae = Wan22VAE(Wan22VAEConfig(base_dim=8, decoder_base_dim=8, z_dim=8, num_res_blocks=1, **statistics))
    config = WanBranchConfig(num_attention_heads=2, attention_head_dim=24, in_channels=8, out_channels=8, text_dim=16,
                             freq_dim=32, ffn_dim=64, num_layers=2, vace_layers=(0,), vace_in_channels=9)
    world = World(vae, WanDiT(config), WanBranch(config), torch.zeros(1, 4, 16), WorldSettings(latents=3, steps=2))
    K = torch.tensor([[90.0, 0, 48], [0, 90, 32], [0, 0, 1]])
    path = torch.eye(4).repeat(17, 1, 1)
    path[:, 2, 3] = torch.tensor([*range(9), *range(7, -1, -1)]) / 4  # two metres ahead, and back
    cameras = [Camera.from_pose(K, pose, 96, 64) for pose in path]

    def wall(frames: Tensor, cameras: list[Camera]) -> Geometry:
        """It is at z = 6."""
        z = torch.stack([camera.camera_to_world[2, 3] for camera in cameras])
        return Geometry((6 - z)[:, None, None].expand(-1, 64, 96))

    first = torch.rand(3, 64, 96) * 2 - 1
    done = 1
    for state, x in world.generate(first, wall(first, cameras[:1]), cameras, wall, Generator().manual_seed(0)):
        done += x.shape[2]
        mask = latent_memory.read(state.memory, padded(cameras[done - 1]), 4, 6)[1]
        print(f"{done} frames, {list(x.shape)} of them new: {len(state.memory)} points, "
              f"{mask.mean():.0%} of the last view known")
