"""The chain of elements of a Matroska file (or WebM), followed as its packets are read (RFC 8794, RFC 9559).

libav's demuxer looks for the next place that makes sense where it meets damage, and continues there: what lies between
is lost without a word. Here each element must be allowed in its place and end within the element that holds it, and the
frames in the blocks are counted. What the elements contain is not looked at.

    python -m mirage_min.data.matroska            # a WebM with one bit flipped
"""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Elements, by the element that holds them. None: the file. A track may hold anything.
EBML, SEGMENT, TRACKS, TRACK, NUMBER, TYPE = 0x1A45DFA3, 0x18538067, 0x1654AE6B, 0xAE, 0xD7, 0x83
CLUSTER, GROUP, BLOCK, SIMPLE_BLOCK, VOID, CRC = 0x1F43B675, 0xA0, 0xA1, 0xA3, 0xEC, 0xBF
CHILDREN = {
    None: {EBML, SEGMENT, VOID, CRC},
    SEGMENT: {0x114D9B74, 0x1549A966, TRACKS, CLUSTER, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367, VOID, CRC},
    TRACKS: {TRACK, VOID, CRC},
    TRACK: None,
    CLUSTER: {0xE7, 0x5854, 0xA7, 0xAB, GROUP, SIMPLE_BLOCK, 0xAF, VOID, CRC},
    GROUP: {BLOCK, 0xA2, 0x75A1, 0x9B, 0xFA, 0xFB, 0xFD, 0xA4, 0x75A2, 0x8E, 0xC8, VOID, CRC},
}
INTEGERS = {0xE7, 0xA7, 0xAB, 0x9B, 0xFA, 0xFB, NUMBER}  # of at most eight bytes
VIDEO = 1  # a track's type


class Master(NamedTuple):
    """An element that holds others: its name, the byte after it, and whether the file tells that byte."""

    name: int | None
    end: float
    known: bool


class Matroska:
    """The chain of a file, followed so far."""

    def __init__(self, path: Path):
        self.path, self.at, self.broken = path, 0, False
        self.tracks: list[dict[int, int]] = []   # NUMBER and TYPE of each
        self.frames: Counter[int] = Counter()    # in the blocks so far, by the number of their track
        self._places = self.places()

    def breaks_before(self, position: float) -> bool:
        """Whether the chain breaks before this byte of the file; True once, False from then on."""
        try:
            while self.at < position and not self.broken:
                self.at = next(self._places, math.inf)
        except ValueError:
            self.broken = True
            return True
        return False

    def frames_of_video(self, number: int) -> int:
        """How many frames of the video track `number`, counted from 0, are in the blocks so far."""
        videos = [track.get(NUMBER) for track in self.tracks if track.get(TYPE) == VIDEO]
        return self.frames[videos[number]] if number < len(videos) else 0

    def places(self) -> Iterator[int]:
        """The first byte of each element, in order; ValueError where the chain breaks, or at the end of a cut file.

        A recorder that could not go back leaves the length of the Segment open: such a file ends where it ends.
        """
        around, at, size = [Master(None, math.inf, True)], 0, self.path.stat().st_size
        with open(self.path, "rb") as file:
            while at < size:
                yield at
                file.seek(at)
                head = file.read(32)
                while at >= around[-1].end:
                    around.pop()
                try:
                    name, length, start = element(head)
                except IndexError:
                    break  # cut within a name or a length
                except ValueError:
                    if len(around) == 1:
                        return  # whatever was appended to the file
                    raise
                while not (around[-1].known or may_hold(around[-1], name)):
                    around.pop()
                if len(around) == 1 and at > 0 and not may_hold(around[0], name):
                    return
                end = around[-1].end if length is None else at + start + length
                longest = at + start + 8 if name in INTEGERS else math.inf
                if not may_hold(around[-1], name) or end > min(around[-1].end, longest):
                    raise ValueError(f"{self.path}: no element {name:x} can be at byte {at}")
                if name in CHILDREN:
                    around.append(Master(name, end, length is not None))
                    at += start
                    if name == TRACK:
                        self.tracks.append({})
                    continue
                if name in (NUMBER, TYPE) and around[-1].name == TRACK:
                    self.tracks[-1][name] = int.from_bytes(head[start : start + length], "big")
                if name in (BLOCK, SIMPLE_BLOCK) and at + start + 8 < size:
                    self._count(head[start:], length, at)
                at = end
        if any(master.name == SEGMENT and master.known and master.end > size for master in around):
            raise ValueError(f"{self.path}: cut off")

    def _count(self, head: bytes, length: int, at: int) -> None:
        """Count the frames of the block at byte `at`: its track, two bytes of time, flags (10.1). length: in bytes."""
        track, n = number(head)
        if track not in (known.get(NUMBER) for known in self.tracks):
            raise ValueError(f"{self.path}: a block of no track at byte {at}")
        laced = head[n + 2] & 0x06
        self.frames[track] += head[n + 3] + 1 if laced else length > n + 3


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
        elements = list(Matroska(path).places())
        data[elements[-8]] ^= 4
        path.write_bytes(data)
        with av.open(str(path)) as file:
            print(f"{len(elements)} elements, one bit of a name flipped: libav finds {len(list(file.decode(video=0)))} "
                  "of 12 frames and says nothing")
        print("broken before the end:", Matroska(path).breaks_before(math.inf))
