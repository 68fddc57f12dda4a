"""A decoded frame as RGB: by the matrix and range that the file names, upright, and over black where it has alpha.

If a file names no matrix, BT.601 is meant up to 576 lines and BT.709 above; no range means limited. The display matrix
of a phone's video, rotating, mirroring or both, is applied to the pixels. Left out: tone mapping of HDR, matrices other
than BT.601, 709, 2020, FCC and SMPTE 240M (read as if the file named none), more than 8 bits.

    python -m mirage_min.data.colour          # one colour as YUV by two matrices, and what is read
"""

from typing import NamedTuple

import av
import numpy as np

BT709, UNKNOWN, FCC, BT470BG, BT601, SMPTE240M, BT2020 = 1, 2, 4, 5, 6, 7, 9  # matrices, as H.273 numbers them
LIMITED, FULL = 1, 2                                                          # ranges, as libav numbers them

# swscale's flags bicubic, accurate_rnd and full_chroma_int; without the last two it is off by up to 3 of 255.
EXACTLY = 0x4 | 0x40000 | 0x2000


def matrix_of(frame: av.VideoFrame) -> int:
    """The matrix between the frame's YUV and RGB; for an RGB frame, the one to write it with."""
    if frame.colorspace in (BT709, FCC, BT470BG, BT601, SMPTE240M, BT2020):
        return frame.colorspace
    return BT601 if frame.height <= 576 and not frame.format.is_rgb else BT709


def swscale_matrix(matrix: int) -> int:
    """swscale's number for a matrix: the same, but it knows BT.601 by its other name only."""
    return BT470BG if matrix == BT601 else matrix


def rgb(frame: av.VideoFrame) -> np.ndarray:
    """A decoded frame -> uint8 [H, W, 3], full range, as it is stored."""
    name = frame.format.name
    transparent = name == "pal8" or any(component.is_alpha for component in frame.format.components)
    stored = frame.color_range or (FULL if name.startswith(("yuvj", "gray", "ya", "mono")) else LIMITED)
    source = {} if frame.format.is_rgb or name == "pal8" else {
        "src_colorspace": swscale_matrix(matrix_of(frame)), "src_color_range": stored, "dst_color_range": FULL}
    pixels = frame.reformat(format="rgba" if transparent else "rgb24", interpolation=EXACTLY, **source).to_ndarray()
    return over_black(pixels) if transparent else pixels


def over_black(pixels: np.ndarray) -> np.ndarray:
    """RGBA, uint8 [H, W, 4] -> uint8 [H, W, 3]"""
    return (pixels[..., :3] * (pixels[..., 3:] / 255)).round().astype(np.uint8)


class Turn(NamedTuple):
    """How a stored picture is to be shown: transposed, then mirrored, then upside down, each or not."""

    transposed: bool = False
    mirrored: bool = False
    upside_down: bool = False

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """[H, W, 3] as stored -> as shown."""
        if self.transposed:
            pixels = pixels.transpose(1, 0, 2)
        return np.ascontiguousarray(pixels[:: -1 if self.upside_down else 1, :: -1 if self.mirrored else 1])


def turn_of_angle(degrees: float) -> Turn:
    """The turn by a multiple of 90 degrees counter-clockwise."""
    return (Turn(), Turn(True, False, True), Turn(False, True, True), Turn(True, True, False))[round(degrees / 90) % 4]


def turn_of_matrix(a: int, b: int, c: int, d: int) -> Turn:
    """The turn that a display matrix means: x' = a x + c y, y' = b x + d y (ISO 14496-12, 8.3.2)."""
    return Turn(False, a < 0, d < 0) if abs(a * d) >= abs(b * c) else Turn(True, c < 0, b < 0)


if __name__ == "__main__":
    for matrix in (BT709, BT601):
        frame = av.VideoFrame(2, 2, "yuv444p")
        frame.colorspace = matrix
        for plane, level in zip(frame.planes, (81, 90, 216)):
            plane.update(bytes([level]) * plane.buffer_size)
        print(f"Y, U, V = 81, 90, 216 by matrix {matrix} -> R, G, B = {', '.join(map(str, rgb(frame)[0, 0]))}")
