"""What the world model sees in its own frames: their depth, by a network in a file, or by the renderer of a toy scene.

The loop (world.py) asks `observe(frames [3, n, H, W] in [-1, 1], n cameras) -> Geometry`. Two are here:

    DepthNetwork("depth.pt")    TorchScript, or NAME.onnx, for which onnxruntime is needed. Its input is [1, 3, H, W],
                                float32 in [-1, 1], its output [1, H, W] or [1, 1, H, W]: depth along the camera's z
    ToyDepth(scene)             exact, of a scene in which nothing moves

A network rarely knows the unit of the poses: `matched` finds the one factor that its depth needs, on a frame whose
depth is given. Left out: masks of what moves, so what is generated has to be at rest. Where a network says 0, inf or
nan, the depth is unknown, as it is in the sky.

    python -m mirage_min.systems.observe         # a network that is off by a factor, and the toy renderer
"""

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..data import toy_render
from ..data.toy_render import Scene
from ..method.camera import Camera
from .world import Geometry


class DepthNetwork:
    """The depth of frames by a network that is read from a file, times `scale`."""

    def __init__(self, file: str | Path, device: str = "cpu", scale: float = 1.0):
        """ValueError if the file holds neither kind; ImportError for NAME.onnx where onnxruntime is not installed."""
        self.file, self.device, self.scale = Path(file), device, scale
        if not self.file.is_file():
            raise ValueError(f"{file}: no such file")
        self.network = onnx(self.file) if self.file.suffix == ".onnx" else torchscript(self.file, device)

    @torch.no_grad()
    def __call__(self, frames: Tensor, cameras: list[Camera]) -> Geometry:
        """frames [3, n, H, W] in [-1, 1] -> depth [n, H, W]; ValueError if the network fails or gives another shape."""
        depth = torch.cat([self._look(image) for image in frames.movedim(1, 0).float().split(1)])
        return Geometry(self.scale * depth.to(frames))

    def _look(self, image: Tensor) -> Tensor:
        """One frame [1, 3, H, W], the batch that networks are exported for -> its depth [1, H, W]."""
        H, W = image.shape[2:]
        try:
            depth = self.network(image.contiguous())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a network's code raises what it likes
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise ValueError(f"{self.file}: fails on a frame {list(image.shape)}: {reason}") from error
        if not isinstance(depth, Tensor) or list(depth.shape) not in ([1, H, W], [1, 1, H, W]):
            shape = list(depth.shape) if isinstance(depth, Tensor) else type(depth).__name__
            raise ValueError(f"{self.file}: wanted depth [1, {H}, {W}] or [1, 1, {H}, {W}], got {shape}")
        return depth.view(1, H, W)

    def matched(self, frame: Tensor, depth: Tensor, camera: Camera) -> tuple["DepthNetwork", float]:
        """The same network times the factor that fits a frame of known depth, and how far off it still is there.

        frame [3, H, W] in [-1, 1] and depth [H, W], 0, inf and nan unknown. The second result is the median of
        |depth − given| / given. ValueError if nowhere both are known.
        """
        found = self(frame[:, None], [camera]).depth[0]
        known = (depth > 0) & depth.isfinite() & (found > 0) & found.isfinite()
        if not known.any():
            raise ValueError(f"{self.file}: knows no depth where that of the first frame is given")
        factor = (depth[known] / found[known]).median()
        off = (factor * found[known] / depth[known] - 1).abs().median()
        other = copy(self)
        other.scale = self.scale * float(factor)
        return other, float(off)


def torchscript(file: Path, device: str) -> Callable[[Tensor], Tensor]:
    """A TorchScript network, in eval mode on the device; ValueError if the file holds none.

    DEVIATION from safetensors only, as for vFID's network: TorchScript is code, and can write files.
    """
    try:
        return torch.jit.load(file, map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{file}: neither a TorchScript network nor NAME.onnx: {str(error).splitlines()[0]}") from None


def onnx(file: Path) -> Callable[[Tensor], Tensor]:
    """The first output of an ONNX network with one input, on the CPU. ImportError without onnxruntime; ValueError if
    the file holds none."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"{file}: needs onnxruntime (pip install onnxruntime), or the network as TorchScript"
                          ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # it prints what it raises, too
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no class in common
        raise ValueError(f"{file}: not an ONNX network: {message_of(error)}") from error
    name = session.get_inputs()[0].name

    def network(images: Tensor) -> Tensor:
        try:
            return torch.from_numpy(session.run(None, {name: images.cpu().numpy()})[0])
        except Exception as error:
            raise ValueError(message_of(error)) from error
    return network


def message_of(error: Exception) -> str:
    """What an error says, without its line breaks."""
    return " ".join(str(error).split())


class ToyDepth:
    """The depth of a toy scene from wherever it is asked for; bodies stay where they are in frame 0."""

    def __init__(self, scene: Scene):
        self.scene = scene

    def __call__(self, frames: Tensor, cameras: list[Camera]) -> Geometry:
        """Depth [n, H, W] of the n cameras, inf in the sky; what the frames show is ignored."""
        n = len(cameras)
        bodies = [replace(body, pose=body.pose[:1].repeat(n, 1, 1)) for body in self.scene.bodies]
        poses = torch.stack([camera.camera_to_world.float() for camera in cameras])
        scene = replace(self.scene, bodies=bodies, c2w=poses)
        depth = [toy_render.cast(scene, camera.K.float(), (camera.height, camera.width), t, 1).depth
                 for t, camera in enumerate(cameras)]
        return Geometry(torch.stack(depth).view(n, cameras[0].height, cameras[0].width).to(frames))


if __name__ == "__main__":
    import tempfile

    from ..data.toy_world import WorldConfig, render, sample_scene

    class Flat(torch.nn.Module):
        """Depth 1 everywhere, whatever the frames show."""

        def forward(self, images: Tensor) -> Tensor:
            return torch.ones_like(images[:, 0])

    config = WorldConfig(frames=2, static=True)
    scene = sample_scene(0, config)
    clip = render(scene, config)
    cameras = [Camera.from_pose(clip.K, pose, config.width, config.height) for pose in clip.c2w]
    exact = ToyDepth(scene)(clip.x_gt, cameras).depth
    off = (exact - clip.depth[0]).nan_to_num().abs().max()
    print(f"the renderer: largest difference to the clip's depth {off:.0e}")
    with tempfile.TemporaryDirectory() as folder:
        torch.jit.script(Flat()).save(f"{folder}/flat.pt")
        network, off = DepthNetwork(f"{folder}/flat.pt").matched(clip.x_gt[:, 0], clip.depth[0, 0], cameras[0])
    print(f"a network that sees a wall: it would be {network.scale:.1f} m away, off by {off:.0%} in the middle")
