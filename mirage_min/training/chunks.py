"""Clips as the chunks of latents that a world model makes, encoded once, with what its memory needs to know of them.

A clip is NAME.safetensors, as `toy_world --extras` writes it: x_gt (uint8 [3, T, H, W]), and depth [1, T, H, W] along
the camera's z, K [3, 3], c2w [T, 4, 4] and perhaps moving (uint8 [1, T, H, W]). Chunk k of F latents begins at frame
4 (F − 1) k, the last of the chunk before, and is encoded by itself, as the loop does it (systems/world.py). The frames
after the last whole chunk are not used.

    python -m mirage_min.training.chunks
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Generator, Tensor, nn

from ..data import desk
from ..data.pixels import from_bytes
from ..method.camera import Camera
from ..method.latent_memory import pixel_frame
from ..networks import weights
from . import processes
from .checkpoint import digest_of_files, digest_of_frozen

GEOMETRY = "depth", "K", "c2w"


@dataclass
class Chunk:
    """One chunk of a clip, and the clip around it. Latents are numbered 0 to n (F − 1) through the clip's n chunks."""

    name: str                      # of the clip
    number: int                    # of the chunk
    z: Tensor                      # [n, C, F, h, w], float32: the latents of all chunks
    cameras: list[Camera]          # of each latent, none where geometry was not asked for
    depth: Tensor | None = None    # [latents, H, W]
    dynamic: Tensor | None = None  # [latents, H, W] bool

    def latent(self, i: int) -> Tensor:
        """Latent i of the clip [C, h, w], from the chunk that made it: where two share one, the earlier."""
        F = self.z.shape[2]
        chunk = max(0, i - 1) // (F - 1)
        return self.z[chunk, :, i - chunk * (F - 1)]


class Chunks:
    """The chunks of a folder's clips; `left_out` has a line for each clip that is of no use, which says why."""

    def __init__(self, folder: str | Path, encode: Callable[[Tensor], Tensor], vae: nn.Module, latents: int,
                 cache: Path, geometry: bool = True):
        """
        encode    x [1, 3, T, H, W] in [-1, 1] -> z [1, C, F, h, w], by `vae`
        latents   F of a chunk
        cache     folder for the latents, a file a clip
        geometry  whether depth and cameras are needed
        ValueError if no clip is usable, clips differ in size, or the cache holds latents of other clips or another VAE.
        """
        self.folder, self.latents, self.cache, self.geometry = Path(folder), latents, Path(cache), geometry
        self.left_out, shapes = [], {}
        for file in sorted(self.folder.glob("[!.]*.safetensors")):
            try:
                shapes[file.name] = self._shape(file)
            except (OSError, SafetensorError, ValueError) as error:
                self.left_out.append(f"{file.name}: {error}")
        if not shapes:
            raise ValueError(f"{folder}: no usable clips: " + ("; ".join(self.left_out[:3]) or "wanted *.safetensors"))
        sizes = sorted({(H, W) for _, H, W in shapes.values()})
        if len(sizes) > 1:
            raise ValueError(f"{folder}: wanted clips of one size, got {sizes}")
        self.names = list(shapes)
        self.counts = [(T - 1) // pixel_frame(latents - 1) for T, _, _ in shapes.values()]  # of whole chunks
        self._encode_all(encode, digest_of_frozen(vae, {}))

    def __len__(self) -> int:
        return len(self.names)

    def paths(self) -> list[Path]:
        """The files that clips are read from."""
        return [self.folder / name for name in self.names]

    def draw(self, draws: Generator) -> Chunk:
        """A chunk of a clip, both drawn evenly."""
        i = int(torch.randint(len(self), (), generator=draws))
        return self.read(i, int(torch.randint(self.counts[i], (), generator=draws)))

    def read(self, i: int, number: int) -> Chunk:
        """Chunk `number` of clip i."""
        name = self.names[i]
        z = weights.load_tensors(self.cache / name)[0]["z"].float()
        if not self.geometry:
            return Chunk(name, number, z, [])
        at = [pixel_frame(f) for f in range(len(z) * (self.latents - 1) + 1)]
        with weights.one_line(self.folder / name), safe_open(self.folder / name, framework="pt") as file:
            H, W = file.get_slice("depth").get_shape()[2:]
            K, poses = file.get_tensor("K"), file.get_tensor("c2w")
            depth, moving = (torch.stack([file.get_slice(key)[0, t] for t in at]) if key in file.keys() else None
                             for key in ("depth", "moving"))
        cameras = [Camera.from_pose(K, poses[t], W, H) for t in at]
        return Chunk(name, number, z, cameras, depth.float(), None if moving is None else moving > 0)

    def _shape(self, file: Path) -> tuple[int, int, int]:
        """Frames, height and width of a clip; ValueError if it is too short, or lacks what is needed."""
        with safe_open(file, framework="pt") as clip:
            if missing := {"x_gt", *(GEOMETRY if self.geometry else ())} - set(clip.keys()):
                raise ValueError(f"holds no {', '.join(sorted(missing))} (toy_world --extras writes them)")
            shapes = {key: clip.get_slice(key).get_shape() for key in clip.keys()}
            C, T, H, W = shapes["x_gt"]
        if T < pixel_frame(self.latents - 1) + 1:
            raise ValueError(f"has {T} frames, wanted {pixel_frame(self.latents - 1) + 1} at least")
        wanted = {"depth": [1, T, H, W], "moving": [1, T, H, W], "K": [3, 3], "c2w": [T, 4, 4]}
        if self.geometry and (wrong := [key for key in wanted if key in shapes and shapes[key] != wanted[key]]):
            raise ValueError(f"wanted {wrong[0]} {wanted[wrong[0]]}, got {shapes[wrong[0]]}")
        return T, H, W

    @torch.no_grad()
    def _encode_all(self, encode: Callable[[Tensor], Tensor], vae: str) -> None:
        """Write the latents of the clips that the cache does not have yet."""
        step = pixel_frame(self.latents - 1)
        self.cache.mkdir(parents=True, exist_ok=True)
        for path in desk.bar(self.paths()[processes.rank() :: processes.world()], desc="encoding", unit="clip"):
            about = {"clip": digest_of_files([path]), "vae": vae, "latents": str(self.latents)}
            file = self.cache / path.name
            if not file.exists():
                x = from_bytes(weights.load_tensors(path)[0]["x_gt"])[None]
                starts = range(0, x.shape[2] - step, step)
                z = torch.cat([encode(x[:, :, t : t + step + 1]) for t in starts])
                weights.save_tensors(file, {"z": z.half()}, about)
            with weights.one_line(file), safe_open(file, framework="pt") as found:
                if found.metadata() != about:
                    raise ValueError(f"{file}: wanted latents of {about}, got {found.metadata()}: remove {self.cache}")
        processes.wait()


if __name__ == "__main__":
    import tempfile

    from ..data.toy_world import WorldConfig, make_clip, save_clip
    from ..networks import small_base

    with tempfile.TemporaryDirectory() as folder:
        save_clip(make_clip(0, WorldConfig(9, 32, 48, path="out_and_back", static=True)), f"{folder}/0.safetensors")
        save_clip(make_clip(1, WorldConfig(9, 32, 48), extras=False), f"{folder}/1.safetensors")
        vae = small_base.new_vae("wan")
        chunks = Chunks(folder, vae.encode, vae, latents=2, cache=Path(folder, "latents"))
        print("left out:", chunks.left_out)
        for number in range(2):
            chunk = chunks.read(0, number)
            print(f"chunk {chunk.number} of {list(chunk.z.shape)}: {len(chunk.cameras)} latents in the clip, nearest "
                  f"point {chunk.depth.min():.1f} m, {chunk.dynamic.float().mean():.0%} moves")
