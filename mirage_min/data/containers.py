"""Frames that are missing from a damaged file, found in the bytes of its container where the demuxer is silent.

A demuxer that meets damage looks for the next place that makes sense and continues there; what lies between is lost
without a word. Here the tables are counted and the chain of chunks is followed instead: AVI, MPEG transport streams,
Flash video, and the pictures that move. Matroska and mp4 have files of their own (matroska.py, boxes.py).

    python -m mirage_min.data.containers          # an AVI, whole and cut off
"""

import math
import re
import struct
from pathlib import Path

import numpy as np
from av import VideoStream
from av.container import InputContainer

from .boxes import spoilt
from .demux import samples

WEBP = {b"VP8X", b"VP8 ", b"VP8L", b"ANIM", b"ANMF", b"ALPH", b"ICCP", b"EXIF", b"XMP "}  # its chunks
# What a chunk of an AVI may be called: False: elsewhere, True: among the packets.
AVI_NAMES = {False: re.compile(rb"[ -~]{4}"), True: re.compile(rb"\d\d[ -~]{2}|ix\d\d|idx1|LIST|RIFF|JUN[KQ]|junk")}
UNKNOWN = {0, 2**31 - 1, 2**32 - 1}  # the length of a RIFF that was never filled in
GIF_HEAD = re.compile(rb"\0\x21\xf9\x04.{4}\0\x2c", re.DOTALL)  # an image's control block and how its descriptor begins
AT_ONCE = 2**14  # packets of a transport stream


def missing(path: Path, container: InputContainer, stream: VideoStream, read: int, latest: float) -> int:
    """How many more frames a file tells of than the `read` packets that came, the last of them at `latest` ticks.

    1 where the file only tells that something is missing. What can be told while reading is Matroska's (matroska.py).
    """
    form, entries = container.format.name, stream.index_entries
    if form == "avi":
        return avi_missing(path, container, stream, read, latest)
    if form == "mpegts":
        return int(transport_is_broken(path, stream.id))
    if form == "flv":
        return int(flv_is_broken(path))
    if not form.startswith("mov,"):
        return 0
    lost = max(0, sum(entry.size > 0 for entry in entries) - read)
    # Some samples have a time and no place, unless an edit list hides them. Such a table tells no number.
    nowhere = stream.frames > len(entries) and stream.frames > len(samples(path, stream.index))
    return max(lost, int(nowhere or spoilt(path)))


def avi_missing(path: Path, container: InputContainer, stream: VideoStream, read: int, latest: float) -> int:
    """The same for an AVI: by its chunks, and where it is cut off by its header, unless that is spoilt as well."""
    size = path.stat().st_size
    if cut := riff_missing(path):
        frames = 1 + round(max(latest, -1))
        told, likely = stream.frames - frames, math.ceil(frames * cut / size)
        return max(1, min(told, 4 * likely))
    chunks = avi_frames(path, stream.index, len(container.streams))
    lost = max(0, sum(entry.size > 0 for entry in stream.index_entries) - read)
    return max(lost, 1 if chunks is None else chunks - read)


def riff_missing(path: Path) -> int:
    """How many bytes an AVI file is shorter than the lengths in its RIFF chunks; 0 where these were never filled in."""
    at, size, length = 0, path.stat().st_size, 0
    with open(path, "rb") as file:
        while at + 8 <= size:
            file.seek(at)
            head = file.read(8)
            length = int.from_bytes(head[4:], "little")
            if head[:4] != b"RIFF" or length in UNKNOWN:
                return 0
            at += 8 + length + length % 2
    return max(0, at - length % 2 - size)  # what fills up the last chunk may be left out


def avi_frames(path: Path, stream: int, streams: int) -> int | None:
    """How many chunks of a stream, neither empty nor palettes, an AVI has; None where its chain of chunks breaks.

    Lists are entered and not measured: writers get their lengths wrong, and leave out what fills up an odd chunk.
    """
    frames, at, odd, end, movi, size = 0, 0, 0, 0, False, path.stat().st_size
    with open(path, "rb") as file:
        if file.read(12)[8:] != b"AVI ":
            return 0  # a relative of AVI, with other rules
        while at + odd + 8 <= size:
            file.seek(at)
            head = file.read(13)
            skip = odd if fits(head[odd:], movi, streams) else 0
            name, length = head[skip : skip + 4], int.from_bytes(head[skip + 4 : skip + 8], "little")
            if at + odd >= end and name != b"RIFF":
                return frames  # whatever was appended to the file
            if not fits(head[skip:], movi, streams):
                return None
            if name == b"RIFF":
                end = math.inf if length in UNKNOWN else at + 8 + length
            if name in (b"RIFF", b"LIST"):
                kind = head[skip + 8 : skip + 12]
                at, odd, movi = at + skip + 12, 0, kind == b"movi" or (movi and kind == b"rec ")
                continue
            movi &= name != b"idx1"
            at, odd = at + skip + 8 + length, length % 2
            frames += movi and at <= size and length > 0 and name[:2] == b"%02d" % stream and name[2:] != b"pc"
    return frames if at <= size or end == math.inf else None


def fits(head: bytes, movi: bool, streams: int) -> bool:
    """Whether a chunk of an AVI may begin so, in the list of its packets (movi) or elsewhere."""
    known = AVI_NAMES[movi].match(head) is not None
    return known and not (movi and head[:2].isdigit() and int(head[:2]) >= streams)


def transport_is_broken(path: Path, pid: int) -> bool:
    """Whether packets of a stream are missing from an MPEG transport stream (ISO 13818-1, 2.4.3), as far as it tells.

    Every packet begins with 0x47, and those of a stream are numbered modulo 16. Where the numbers jump to a place from
    which a decoder can start, recordings were joined. Packets may have 4 more bytes before them, or 16 after.
    """
    size, last = path.stat().st_size, None
    with open(path, "rb") as file:
        data = np.frombuffer(file.read(6 * 204), np.uint8)
        aligned = [(start, n) for n in (188, 192, 204) for start in range(min(n, len(data)))
                   if (data[start : start + 5 * n : n] == 0x47).all()]
        if not aligned:
            return True
        start, n = aligned[0]
        if (size - start + n - 188) % n not in (0, n - 188):
            return True
        file.seek(start)
        while block := file.read(n * AT_ONCE):
            count = -(-len(block) // n)
            rows = np.frombuffer(block.ljust(n * count, b"\0"), np.uint8).reshape(count, n)
            high, low, control = rows[:, 1:4].T.astype(int)
            if (rows[:, 0] != 0x47).any():
                return True
            rows = rows[(high % 32 * 256 + low == pid) & (control & 0x10 > 0)]     # ours, those with payload
            if len(rows) == 0:
                continue
            high, low, control, length, flags = rows[:, 1:6].T.astype(int)
            number, begins, adapts = control % 16, high & 0x40 > 0, control & 0x20 > 0
            # The payload that begins a frame begins with 0, 0, 1, unless it is scrambled.
            at = np.where(adapts, 5 + length, 4)[:, None] + range(3)
            heads = np.take_along_axis(rows, at % n, axis=1)
            if (begins & (control < 0x40) & (heads != (0, 0, 1)).any(axis=1)).any():
                return True
            # flags of the adaptation field, if any: 0x40 a decoder can start here, 0x80 the numbers start anew
            flags = np.where(adapts & (length > 0), flags, 0)
            joined = (flags & 0x80 > 0) | (begins & (flags & 0x40 > 0))
            before = np.append(number[0] if last is None else last, number[:-1])
            if (((number - before) % 16 > 1) & ~joined).any():
                return True
            last = number[-1]
    return False


def flv_is_broken(path: Path) -> bool:
    """Whether the chain of tags of a Flash video breaks, or does not end where the file does (its format, annex E).

    A tag has a kind (8 sound, 9 video, 18 data), three bytes of length, four of time and three zeros.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        at = int.from_bytes(file.read(9)[5:], "big") + 4
        while at + 11 <= size:
            file.seek(at)
            head = file.read(1024)
            if head[0] & 0x1F not in (8, 9, 18) or any(head[8:11]):
                return True
            told = re.search(rb"\x00\x08filesize\x00(.{8})", head, re.DOTALL) if head[0] == 18 else None
            if told and struct.unpack(">d", told[1])[0] > size:
                return True
            at += 11 + int.from_bytes(head[1:4], "big") + 4
    return at not in (size, size + 4)  # the last length may be left out


def webp_images(path: Path) -> tuple[int, bool]:
    """How many images an animated WebP has (0: it does not move), and whether its chain of chunks is whole."""
    data, images, at, known = path.read_bytes(), 0, 12, True
    while at + 8 <= len(data):
        images += data[at : at + 4] == b"ANMF"
        known &= data[at : at + 4] in WEBP
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8 + length + length % 2
    return images, known and at == len(data) == 8 + int.from_bytes(data[4:8], "little")


def png_images(path: Path) -> int:
    """How many images of an animation the chunks of a PNG announce; 0 if it does not move."""
    data, images, at = path.read_bytes(), 0, 8
    while at + 8 <= len(data):
        images += data[at + 4 : at + 8] == b"fcTL"
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return images


def gif_images(path: Path) -> tuple[int, bool]:
    """How many images a GIF has, and whether its chain of blocks is whole to the trailer (GIF89a, appendix B).

    It is not where the pixels of one image have swallowed the head of the next: a spoilt length does that.
    """
    data, images, whole = path.read_bytes(), 0, True

    def colours(flags: int) -> int:
        return 3 << (flags & 7) + 1 if flags & 0x80 else 0
    try:
        at = 13 + colours(data[10])
        while data[at] != 0x3B:
            image, start = data[at] == 0x2C, at
            if image:
                images += 1
                at += 11 + colours(data[at + 9])
            elif data[at] == 0x21:
                at += 2
            else:
                return images, False
            while data[at]:
                at += data[at] + 1
            at += 1
            whole &= not (image and GIF_HEAD.search(data, start, at))
    except IndexError:
        return images, False
    return images, whole


if __name__ == "__main__":
    import tempfile

    import av

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clip.avi")
        with av.open(str(path), "w") as file:
            stream = file.add_stream("mpeg4", rate=10)
            stream.width, stream.height = 96, 64
            for _ in range(12):
                file.mux(stream.encode(av.VideoFrame(96, 64, "yuv420p")))
            file.mux(stream.encode())
        data = path.read_bytes()
        print("chunks of the video:", avi_frames(path, 0, 1), "- bytes missing:", riff_missing(path))
        path.write_bytes(data[: len(data) * 2 // 3])
        print("a third cut off, bytes missing:", riff_missing(path))
