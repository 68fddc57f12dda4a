"""Bytes become numbers in [-1, 1], and numbers bytes: here and nowhere else.

    python -m mirage_min.data.pixels          # 256 bytes there and back
"""

import numpy as np
import torch
from torch import Tensor


def from_bytes(x: Tensor) -> Tensor:
    """uint8 of any shape -> float32 in [-1, 1], in new storage: 0 is -1, 255 is 1."""
    return x.to(torch.float32, copy=True).div_(127.5).sub_(1)


def to_bytes(x: Tensor) -> Tensor:
    """Numbers in [-1, 1] of any shape -> uint8, rounded to the nearest, others clamped. ValueError for NaN and inf."""
    x = x.detach().float()
    if not x.is_meta and not x.isfinite().all():  # a meta tensor is a shape without values
        raise ValueError("a frame is not finite (NaN or inf), so it has no colours")
    return ((x + 1) * 127.5).round().clamp(0, 255).byte()


def in_eight_bits(x: Tensor) -> Tensor:
    """x in [-1, 1], of any shape, rounded to the values that 8 bits can hold, in x's dtype; NaN stays NaN."""
    return (((x.float() + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1).to(x)


def to_float(pixels: np.ndarray) -> Tensor:
    """Pixels, uint8 [H, W, 3] -> a frame [3, H, W] in [-1, 1]."""
    return from_bytes(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())


def to_uint8(x: Tensor) -> np.ndarray:
    """A frame [3, H, W] in [-1, 1] -> uint8 [H, W, 3]; ValueError for NaN and inf."""
    return to_bytes(x.cpu()).permute(1, 2, 0).contiguous().numpy()


if __name__ == "__main__":
    x = from_bytes(torch.arange(256, dtype=torch.uint8))
    same = torch.equal(to_bytes(x).int(), torch.arange(256, dtype=torch.int32))
    print(f"0, 1 and 255 are {x[0]:.4f}, {x[1]:.4f} and {x[255]:.4f}; all 256 come back: {same}")
    print(f".001 in eight bits is {in_eight_bits(torch.tensor(0.001)):.5f}")
