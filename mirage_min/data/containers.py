"""Frames that are missing from a damaged file, found in the bytes of its container where the demuxer is silent.

A demuxer that meets damage looks for the next place that makes sense and continues there; what lies between is lost
without a word. Here the chain of elements is followed instead: each must be allowed in its place, and end within the
element that holds it. Their contents are not looked at.

    python -m mirage_min.data.containers          # a WebM with one bit flipped
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Matroska's elements (RFC 9559), by the element that holds them. None: the file. A track may hold anything.
EBML, SEGMENT, TRACKS, TRACK, NUMBER, CLUSTER = 0x1A45DFA3, 0x18538067, 0x1654AE6B, 0xAE, 0xD7, 0x1F43B675
GROUP, BLOCK, SIMPLE_BLOCK, VOID, CRC = 0xA0, 0xA1, 0xA3, 0xEC, 0xBF
CHILDREN = {
    None: {EBML, SEGMENT, VOID, CRC},
    SEGMENT: {0x114D9B74, 0x1549A966, TRACKS, CLUSTER, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367, VOID, CRC},
    TRACKS: {TRACK, VOID, CRC},
    TRACK: None,
    CLUSTER: {0xE7, 0x5854, 0xA7, 0xAB, GROUP, SIMPLE_BLOCK, 0xAF, VOID, CRC},
    GROUP: {BLOCK, 0xA2, 0x75A1, 0x9B, 0xFA, 0xFB, 0xFD, 0xA4, 0x75A2, 0x8E, 0xC8, VOID, CRC},
}

INTEGERS = {0xE7, 0xA7, 0xAB, 0x9B, 0xFA, 0xFB, NUMBER}  # of at most eight bytes
WEBP = {b"VP8X", b"VP8 ", b"VP8L", b"ANIM", b"ANMF", b"ALPH", b"ICCP", b"EXIF", b"XMP "}  # its chunks
# What a chunk of an AVI may be called: False: elsewhere, True: among the packets.
AVI_NAMES = {False: re.compile(rb"[ -~]{4}"), True: re.compile(rb"\d\d[ -~]{2}|ix\d\d|idx1|LIST|RIFF|JUN[KQ]|junk")}
UNKNOWN = {0, 2**31 - 1, 2**32 - 1}  # the length of a RIFF that was never filled in
AT_ONCE = 2**14  # packets of a transport stream


class Master(NamedTuple):
    """An element that holds others: its name, the byte after it, and whether the file tells that byte."""

    name: int | None
    end: float
    known: bool


class Matroska:
    """The chain of elements of a Matroska file (or WebM), followed as far as its packets are read."""

    def __init__(self, path: Path):
        self.at, self.broken, self.places = 0, False, places(path)

    def breaks_before(self, position: float) -> bool:
        """Whether the chain breaks before this byte of the file; True once, False from then on."""
        try:
            while self.at < position and not self.broken:
                self.at = next(self.places, math.inf)
        except ValueError:
            self.broken = True
            return True
        return False


def places(path: Path) -> Iterator[int]:
    """The first byte of each element, in order; ValueError where the chain breaks, or at the end of a cut file.

    A recorder that could not go back leaves the length of the Segment open: such a file ends where it ends.
    """
    tracks: set[int] = set()
    around, at, size = [Master(None, math.inf, True)], 0, path.stat().st_size
    with open(path, "rb") as file:
        while at < size:
            yield at
            file.seek(at)
            head = file.read(32)
            try:
                name, length, start = element(head)
            except IndexError:
                break  # cut within a name or a length
            while at >= around[-1].end or not (around[-1].known or may_hold(around[-1], name)):
                around.pop()
            if len(around) == 1 and at > 0 and not may_hold(around[0], name):
                return  # whatever was appended to the file
            end = around[-1].end if length is None else at + start + length
            if not may_hold(around[-1], name) or end > around[-1].end or (name in INTEGERS and end > at + start + 8):
                raise ValueError(f"{path}: no element {name:x} can be at byte {at}")
            if name in CHILDREN:
                around.append(Master(name, end, length is not None))
                at += start
                continue
            if name == NUMBER and around[-1].name == TRACK:
                tracks.add(int.from_bytes(head[start : start + length], "big"))
            if name in (BLOCK, SIMPLE_BLOCK) and at + start + 8 < size and number(head[start:])[0] not in tracks:
                raise ValueError(f"{path}: a block of no track at byte {at}")
            at = end
    if any(master.name == SEGMENT and master.known and master.end > size for master in around):
        raise ValueError(f"{path}: cut off")


def may_hold(master: Master, name: int) -> bool:
    """Whether Matroska allows an element of this name, a number, inside the master."""
    return CHILDREN[master.name] is None or name in CHILDREN[master.name]


def element(head: bytes) -> tuple[int, int | None, int]:
    """The first bytes of an element -> its name, the length of its content (None: not told), where that begins."""
    name_bytes = number(head)[1]
    length, bytes_ = number(head[name_bytes:])
    unknown = length == (1 << 7 * bytes_) - 1
    return int.from_bytes(head[:name_bytes], "big"), None if unknown else length, name_bytes + bytes_


def number(head: bytes) -> tuple[int, int]:
    """A number of EBML -> (its value, its bytes): leading zeros of the first byte tell how many follow (RFC 8794, 4).

    ValueError if it is none, IndexError if it is cut off.
    """
    n = 9 - head[0].bit_length()
    if n > 8:
        raise ValueError("no number of EBML")
    if n > len(head):
        raise IndexError("cut off")
    return int.from_bytes(head[:n], "big") & ((1 << 7 * n) - 1), n


def riff_is_cut(path: Path) -> bool:
    """Whether an AVI file is shorter than the lengths in its RIFF chunks; False where these were never filled in."""
    at, size, length = 0, path.stat().st_size, 0
    with open(path, "rb") as file:
        while at + 8 <= size:
            file.seek(at)
            head = file.read(8)
            length = int.from_bytes(head[4:], "little")
            if head[:4] != b"RIFF" or length in UNKNOWN:
                return False
            at += 8 + length + length % 2
    return at - length % 2 > size  # what fills up the last chunk may be left out


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
            packets = np.frombuffer(block.ljust(n * count, b"\0"), np.uint8).reshape(count, n)
            sync, high, low, control, length, flags = packets[:, :6].T.astype(int)
            if (sync != 0x47).any():
                return True
            ours = (high % 32 * 256 + low == pid) & (control & 0x10 > 0)          # with payload
            if not ours.any():
                continue
            number, begins = control[ours] % 16, high[ours] & 0x40 > 0
            # flags of the adaptation field, if any: 0x40 a decoder can start here, 0x80 the numbers start anew
            flags = np.where((control & 0x20 > 0) & (length > 0), flags, 0)[ours]
            joined = (flags & 0x80 > 0) | (begins & (flags & 0x40 > 0))
            before = np.append(number[0] if last is None else last, number[:-1])
            if (((number - before) % 16 > 1) & ~joined).any():
                return True
            last = number[-1]
    return False


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
    """How many images a GIF has, and whether its chain of blocks is whole to the trailer (GIF89a, appendix B)."""
    data, images = path.read_bytes(), 0

    def colours(flags: int) -> int:
        return 3 << (flags & 7) + 1 if flags & 0x80 else 0
    try:
        at = 13 + colours(data[10])
        while data[at] != 0x3B:
            if data[at] == 0x2C:
                images += 1
                at += 11 + colours(data[at + 9])
            elif data[at] == 0x21:
                at += 2
            else:
                return images, False
            while data[at]:
                at += data[at] + 1
            at += 1
    except IndexError:
        return images, False
    return images, True


if __name__ == "__main__":
    import tempfile

    import av

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clip.webm")
        with av.open(str(path), "w") as file:
            stream = file.add_stream("libvpx-vp9", rate=10)
            stream.width, stream.height = 96, 64
            for _ in range(12):
                file.mux(stream.encode(av.VideoFrame(96, 64, "yuv420p")))
            file.mux(stream.encode())
        data = bytearray(path.read_bytes())
        elements = list(places(path))
        data[elements[-8]] ^= 4
        path.write_bytes(data)
        with av.open(str(path)) as file:
            print(f"{len(elements)} elements, one bit of a name flipped: libav finds {len(list(file.decode(video=0)))} "
                  "of 12 frames and says nothing")
        print("broken before the end:", Matroska(path).breaks_before(math.inf))
