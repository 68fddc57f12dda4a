"""Pictures as video: a folder of them, one frame each, or an animated GIF, WebP, AVIF or PNG. Read by Pillow.

    python -m mirage_min.data.pictures        # three pictures of a folder, one of them mirrored
"""

import re
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from .boxes import samples_told
from .colour import BT709, UNKNOWN, Turn, over_black, rgb, turn_of_angle
from .containers import gif_images, png_images, webp_images
from .demux import open_file

IMAGES = {".avif", ".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}  # what a folder's frames end in
VIDEOS = {".3g2", ".3gp", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gif", ".h264", ".h265", ".hevc", ".ivf",
          ".m2ts", ".m2v", ".m4v", ".mjpeg", ".mjpg", ".mkv", ".mov", ".mp4", ".mpe", ".mpeg", ".mpg", ".mts", ".mxf",
          ".nut", ".obu", ".ogm", ".ogv", ".safetensors", ".ts", ".vob", ".webm", ".wmv", ".y4m"}  # its videos
Image.init()  # all of Pillow's formats
FORMATS = [name for name in ("AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP") if name in Image.OPEN]
ANIMATED = {"AVIF", "GIF", "PNG", "WEBP"}
ORIENTATIONS = {2: Turn(False, True, False), 3: Turn(False, True, True), 4: Turn(False, False, True),  # EXIF, 4.6.4
                5: Turn(True, False, False), 6: Turn(True, True, False), 7: Turn(True, True, True),
                8: Turn(True, False, True)}
warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata; and of large pictures, errors from 179 megapixels


class Folder:
    """The pictures of a folder in natural order (9.png before 10.png), `rate` of them a second."""

    aspect, matrix, primaries, transfer = Fraction(1), BT709, UNKNOWN, UNKNOWN

    def __init__(self, path: Path, fps: Fraction):
        self.files, self.notes = pictures_of(path), []
        self.count, self.rate, self.time_base = len(self.files), fps, 1 / fps

    def frames(self) -> Iterator[tuple[np.ndarray | None, int, int]]:
        """(pixels uint8 [H, W, 3], or None where one does not decode; its time and its duration in ticks)."""
        for number, file in enumerate(self.files):
            yield read_picture(file), number, 1

    def name(self, number: int) -> str:
        """A frame's name in errors."""
        return f"frame {number} ({self.files[number].name})"

    def close(self) -> None:
        """Nothing is open."""


class Animation:
    """The frames of one picture file, each with its own duration; a picture that does not move lasts 1 / fps."""

    aspect, matrix, primaries, transfer = Fraction(1), BT709, UNKNOWN, UNKNOWN
    time_base = Fraction(1, 1000)

    def __init__(self, path: Path, fps: Fraction):
        """ValueError if Pillow cannot open it."""
        self.path, self.rate, self.notes = path, fps, []
        try:
            self.image = Image.open(path, formats=FORMATS)
            moves = self.image.format in ANIMATED
            self.images = self.image.n_frames if moves and self.image.format != "GIF" else 1
            if self.image.format == "TIFF" and self.image.n_frames > 1:
                self.notes.append(f"{path}: holds {self.image.n_frames} pictures; read is the first")
        except Exception as error:  # Pillow's decoders raise whatever comes
            raise ValueError(f"{path}: cannot be read as a picture: {error}") from error
        self.whole = True
        if self.image.format == "GIF":
            self.images, self.whole = gif_images(path)
        elif self.image.format == "WEBP" and self.images > 1:
            images, self.whole = webp_images(path)
            self.images = max(images, self.images)
        elif self.image.format == "PNG":
            self.whole = png_images(path) <= self.images
        elif self.image.format == "AVIF":
            self.whole = samples_told(path) <= self.images
        # A PNG may begin with a picture for viewers that cannot animate.
        self.start = int(getattr(self.image, "default_image", False) and self.images > 1)
        self.count = self.images - self.start

    def frames(self) -> Iterator[tuple[np.ndarray | None, int, int]]:
        """(pixels uint8 [H, W, 3], or None where one does not decode; its time and its duration in ms)."""
        clock = 0.0
        for number in range(self.start, self.images):
            pixels = self._read(number)
            milliseconds = self.image.info.get("duration", 0) or 1000 / self.rate
            if self.image.format == "GIF" and milliseconds < 20:
                milliseconds = 100  # as browsers show it
            if number == self.start:
                self.rate = rate_of(milliseconds)
            yield pixels, round(clock), max(1, round(clock + milliseconds) - round(clock))
            clock += milliseconds
        if not self.whole:
            yield None, round(clock), 1

    def _read(self, number: int) -> np.ndarray | None:
        if self.images == 1:
            return read_picture(self.path)
        try:
            self.image.seek(number)
            return pixels_of(self.image)
        except Exception:
            return None

    def name(self, number: int) -> str:
        """A frame's name in errors."""
        return f"frame {number} (counted from 0)"

    def close(self) -> None:
        """Close the file."""
        self.image.close()


def rate_of(milliseconds: float) -> Fraction:
    """Frames a second, if each lasts so long."""
    return max(Fraction(1, 1001), Fraction(1000 / milliseconds).limit_denominator(1001))


def animates(path: Path) -> bool:
    """Whether a file is a picture of a kind that may move, or is named like a picture and is one."""
    if not path.is_file():
        return False  # a pipe would be waited for
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.format in ANIMATED or path.suffix.lower() in IMAGES
    except Exception:
        with open(path, "rb") as file:  # of a damaged animation libav would read what it finds
            head = file.read(12)
        avif = "AVIF" in FORMATS and head[4:] in (b"ftypavif", b"ftypavis")
        webp = head[:4] + head[8:] == b"RIFFWEBP" and webp_images(path)[0] > 0
        return avif or webp or (head.startswith(b"\x89PNG") and png_images(path) > 0)


def pictures_of(folder: Path) -> list[Path]:
    """The pictures of a folder in natural order; hidden files are passed over."""
    files = (file for file in folder.iterdir() if file.suffix.lower() in IMAGES and not file.name.startswith("."))
    return sorted(files, key=lambda file: natural_order(file.name))


def videos_in(folder: Path) -> tuple[list[Path], list[str]]:
    """The videos and clips of a folder in natural order, by their endings; and the names of all other visible entries.

    No videos where the path is not a folder, or is one of pictures. ValueError if it holds videos and pictures, or two
    videos that differ in their ending alone.
    """
    if not folder.is_dir():
        return [], []
    entries = sorted((entry for entry in folder.iterdir() if not entry.name.startswith(".")),
                     key=lambda entry: natural_order(entry.name))
    files = [entry for entry in entries if entry.suffix.lower() in VIDEOS]
    if files and (pictures := pictures_of(folder)):
        raise ValueError(f"{folder}: holds pictures ({pictures[0].name}), the frames of one video, and videos "
                         f"({files[0].name}): wanted the one or the other")
    named = {}
    for file in files:
        if (other := named.setdefault(file.stem, file)) != file:
            raise ValueError(f"{folder}: the results of {other.name} and {file.name} would have one name")
    return files, [entry.name for entry in entries if entry.suffix.lower() not in VIDEOS]


def natural_order(name: str) -> list:
    """A key to sort names by: numbers in them go by value (9.png before 10.png), capitals do not count."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]


def read_picture(path: Path) -> np.ndarray | None:
    """A picture file, or the first picture in it -> uint8 [H, W, 3]; None if it does not decode whole.

    ValueError if it may not be read.
    """
    try:
        if not path.is_file():
            return None  # a pipe would be waited for
        with Image.open(path, formats=FORMATS) as image:
            return pixels_of(image)
    except PermissionError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except Exception:
        return read_by_libav(path)


def read_by_libav(path: Path) -> np.ndarray | None:
    """The same for what Pillow does not take and is whole, such as a JPEG without its end marker."""
    try:
        with open_file(path) as container:
            container.streams.video[0].codec_context.options = {"err_detect": "explode"}  # or half a JPEG would do
            frame = next(container.decode(video=0), None)
            return None if frame is None or frame.is_corrupt else turn_of_angle(frame.rotation)(rgb(frame))
    except (ValueError, IndexError, av.FFmpegError):
        return None


def pixels_of(image: Image.Image) -> np.ndarray:
    """A picture that Pillow has opened -> uint8 [H, W, 3], upright and over black."""
    image.load()
    if image.mode.startswith("I"):
        pixels = (np.asarray(image) / 257).round()            # 16 bits
    elif image.mode == "F":
        pixels = (np.asarray(image) * 255.0).round()
    elif image.has_transparency_data:
        pixels = over_black(np.asarray(image.convert("RGBA")))
    else:
        pixels = np.asarray(image.convert("RGB"))
    pixels = pixels.clip(0, 255).astype(np.uint8)
    pixels = pixels if pixels.ndim == 3 else pixels[..., None].repeat(3, axis=2)
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # EXIF of no kind that Pillow knows: the pixels are whole
        orientation = 1
    return ORIENTATIONS.get(orientation, Turn())(pixels)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        ramp = np.arange(0, 255, 51, dtype=np.uint8)[None, :, None].repeat(3, axis=2)
        exif = Image.Exif()
        for number, exif[0x0112] in enumerate((1, 2, 3), 9):
            Image.fromarray(ramp).save(f"{folder}/{number}.png", exif=exif)
        pictures = Folder(Path(folder), Fraction(25))
        for number, (pixels, time, _) in enumerate(pictures.frames()):
            print(f"{pictures.name(number)} at {time * pictures.time_base} s: red {pixels[0, :, 0].tolist()}")
