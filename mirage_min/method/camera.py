"""A pinhole camera, and where in an image a pixel is.

Axes are OpenCV's: x right, y down, z forward. The centre of the pixel in row i and column j is at (j + ½, i + ½). So an
image spans [0, W] x [0, H], and one that is s times smaller has K's first two rows divided by s, with no offset.
OpenCV's calibrations, and networks whose pixel grid is `arange(W)`, have centres at integers: `from_pose` takes both.

    python -m mirage_min.method.camera       # one point in both conventions, and on a grid 16 times coarser
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Camera:
    """A pinhole camera with OpenCV's axes. Centres of pixels are at half-integers."""

    K: Tensor                # [3, 3] intrinsics in pixels, last row 0 0 1
    world_to_camera: Tensor  # [4, 4]
    width: int               # of the image, in pixels
    height: int

    @classmethod
    def from_pose(cls, K: Tensor, camera_to_world: Tensor, width: int, height: int, *,
                  integer_pixels: bool = False) -> "Camera":
        """A camera from K [3, 3], its pose [4, 4] and its image's size in pixels.

        `integer_pixels` says that K has the centres of pixels at integers: then ½ is added to its principal point.
        """
        shift = torch.tensor([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]).to(K)
        return cls(K + shift if integer_pixels else K, inverse(camera_to_world), width, height)

    @property
    def camera_to_world(self) -> Tensor:
        """The pose [4, 4], in the dtype of world_to_camera."""
        return inverse(self.world_to_camera)

    def resized(self, width: int, height: int) -> "Camera":
        """The same view on a grid of another size: K is scaled to width x height pixels, or latent cells."""
        # K' = diag(w / W, h / H, 1) · K
        scale = torch.tensor([width / self.width, height / self.height, 1], dtype=torch.float64).to(self.K)
        return Camera(scale[:, None] * self.K, self.world_to_camera, width, height)


def inverse(M: Tensor) -> Tensor:
    """M⁻¹ of M [..., n, n], computed in float64 and returned in M's dtype. RuntimeError if M is singular."""
    return torch.linalg.inv(M.double()).to(M.dtype)


if __name__ == "__main__":
    # The middle of an image of 64 x 32 pixels: between the pixels 31 and 32.
    half = torch.tensor([[50.0, 0, 32], [0, 50, 16], [0, 0, 1]])
    integer = torch.tensor([[50.0, 0, 31.5], [0, 50, 15.5], [0, 0, 1]])
    ahead = torch.tensor([0.0, 0, 5])
    for name, K, flag in (("half-integers", half, False), ("integers", integer, True)):
        camera = Camera.from_pose(K, torch.eye(4), 64, 32, integer_pixels=flag)
        u, v, z = camera.K @ ahead
        cell_u, cell_v, _ = camera.resized(4, 2).K @ ahead
        print(f"centres at {name:13}: straight ahead is ({u / z:.1f}, {v / z:.1f}) in pixels, "
              f"({cell_u / z:.1f}, {cell_v / z:.1f}) in cells of 16")
