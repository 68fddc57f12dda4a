"""A generated asset in the place of a scene's actor: aligned in 3D and in the image, and composited (Mirage §3.3, §8).

    insertions = align_asset(scene, asset, turn, actor, frames, bar=bar)     # one at each stage of the alignment
    front = insertions["full"].render(t, camera, pose)                   # the asset alone
    frame, alpha = composite(render(scene.at(t, without=actor), camera), front, margin)

build_pairs.py makes pairs of scene folders with it, streams.py of made-up scenes.

    python -m mirage_min.data.insertion          # how near each stage brings the asset of a made-up scene
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from ..method.camera import Camera
from . import align
from .scene import SceneFolder, moved
from .splat import Gaussians, render


@dataclass
class Insertion:
    """The asset in the actor's place: fixed in 3D, and moved in the image by one affine map in every frame."""

    asset: Gaussians                            # in the actor's frame
    boxes: Tensor                               # [T, 4] of its rendering as it is in 3D, in pixels; 0: not in the frame
    scaling: tuple[float, float] = (1.0, 1.0)   # about the middle of the frame's box
    displacement: tuple[float, float] = (0.0, 0.0)

    def render(self, t: int, camera: Camera, pose: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Frame t: colour times alpha [3, H, W], alpha [1, H, W] and depth [1, H, W] of the asset alone.

        pose [4, 4]: the actor's, object to world.
        """
        # x' = s (x − c) + c + d is applied to the camera: no picture is resampled, so the asset stays sharp
        x0, y0, x1, y1 = self.boxes[t].tolist()
        cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
        sx, sy = self.scaling
        dx, dy = self.displacement
        A = torch.tensor([[sx, 0, cx - sx * cx + dx], [0, sy, cy - sy * cy + dy], [0, 0, 1]])
        return render(moved(self.asset, pose), replace(camera, K=A @ camera.K))

    def aligned_boxes(self) -> Tensor:
        """The asset's boxes [T, 4] after the 2D map, x0, y0, x1, y1 in pixels."""
        return align.move_boxes(self.boxes, self.scaling, self.displacement)


def by_position(asset: Gaussians, actor: Gaussians, size: Tensor, R: Tensor) -> tuple[float, Tensor, Tensor]:
    """The naive similarity s, R, t: as long as the actor's 3D box, its middle at the mean of the actor's Gaussians.

    size [3]: length, width and height of that box; R [3, 3] turns the asset's axes into the actor's.
    """
    x = asset.means @ R.T.to(asset.means)
    low, high = x.amin(0), x.amax(0)
    s = float(size[0] / (high - low)[0])
    return s, R, actor.means.mean(0) - s * (low + high) / 2


def composite(back: tuple[Tensor, ...], front: tuple[Tensor, ...], margin: float) -> tuple[Tensor, Tensor]:
    """Composite the asset, front, over the background, back (§8.4) -> (frame [3, H, W], its visible alpha [1, H, W]).

    Both are (rgb, alpha, depth) as splat.render returns them. The background hides the asset where it is nearer by
    `margin` or more, in world units; by less, it would be the ground, hiding the lower edge of an asset that is
    a little too low. DEVIATION: the paper does not mention depth here.
    """
    background, density, depth = back
    rgb, alpha, asset_depth = front
    seen = ((depth > asset_depth - margin) | (density < 0.5)).float()
    # x = α a + (1 − α) b, the asset's colour being multiplied by its α already
    return seen * rgb + (1 - seen * alpha) * background, seen * alpha


def align_asset(scene: SceneFolder, asset: Gaussians, turn: Tensor, actor: int, frames: range, *, bar: tqdm
                ) -> dict[str, Insertion]:
    """Align in two stages -> the Insertion at each: "none", "coarse" and "full"; boxes outside `frames` are 0.

    turn [3, 3] takes the asset's axes to the actor's: x forward, y left, z up. `bar` moves one step a frame.
    ValueError if asset and actor cannot be aligned (align.coarse_3d, align.fine_2d).
    """
    track = scene.tracks[actor]
    front, _, up = torch.eye(3)
    similarities = {
        "none": by_position(asset, scene.objects[actor], track.size[track.reference], turn),
        "coarse": align.coarse_3d(asset, scene.objects[actor], front, up, asset_up=up @ turn, asset_front=front @ turn)}
    found = {stage: Insertion(asset.transformed(*similarity), torch.zeros(len(scene.cameras), 4))
             for stage, similarity in similarities.items()}
    for t in frames:
        for insertion in found.values():
            insertion.boxes[t] = align.mask_box(insertion.render(t, scene.cameras[t], track.pose[t])[1][0])
        bar.update()
    rows = slice(frames.start, frames.stop)
    scaling, displacement = align.fine_2d(found["coarse"].boxes[rows], track.box[rows].float())
    return found | {"full": replace(found["coarse"], scaling=scaling, displacement=displacement)}


if __name__ == "__main__":
    import tempfile
    from pathlib import Path

    from .scene import read_scene
    from .splat import load_ply
    from .toy_scene import write_scene
    from .toy_world import WorldConfig

    with tempfile.TemporaryDirectory() as folder:
        write_scene(Path(folder), 0, WorldConfig(frames=2, height=48, width=72))
        scene = read_scene(Path(folder))
        asset = load_ply(Path(folder, "asset.ply"))
    turn = torch.tensor([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])  # x right, y down, z forward -> forward, left, up
    found = align_asset(scene, asset, turn, 1, range(2), bar=tqdm(disable=True))
    for stage, insertion in found.items():
        overlap = align.iou(insertion.aligned_boxes(), scene.tracks[1].box.float()).mean()
        print(f"{stage:7} the asset's box and the annotated one overlap by {overlap:.3f}")
