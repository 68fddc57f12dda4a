"""The boxes of an mp4 or a mov (ISO 14496-12), where libav's demuxer is silent about what is missing.

What a movie holds is in tables at one place, and libav tells when a frame of them is not there (containers.py). But a
track whose own box is spoilt is read by other rules, and a file of fragments, as recorders and streams have it, is read
up to the first that makes no sense. Here each box must fit into the one that holds it, and hold what it must.

    python -m mirage_min.data.boxes               # a file of fragments, one of which is spoilt
"""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

MUST = {  # boxes that are entered, and what they must hold
    b"moov": set(), b"trak": {b"tkhd", b"mdia"}, b"mdia": {b"mdhd", b"hdlr", b"minf"}, b"minf": {b"stbl"},
    b"mvex": set(), b"moof": {b"mfhd"}, b"traf": {b"tfhd"}}
ANYWHERE = {b"free", b"skip", b"uuid", b"meta"}
MAY = {  # what else there may be in a file of fragments, on top (None) and in them; elsewhere there may be anything
    None: {b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"sidx", b"ssix", b"prft", b"emsg", b"mfra", b"pdin", b"wide"},
    b"moof": {b"traf", b"pssh"},
    b"traf": {b"tfdt", b"trun", b"sbgp", b"sgpd", b"subs", b"saiz", b"saio", b"senc", b"sdtp", b"tfxd", b"tfrf"}}


def boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, first byte of the content, byte after it) of each box; ValueError where one does not fit."""
    while end - start >= 8:
        file.seek(start)
        head = file.read(16)
        size, begin = int.from_bytes(head[:4], "big"), start + 8
        if size == 1:
            size, begin = int.from_bytes(head[8:], "big"), start + 16
        start = start + size if size else end
        if not begin <= start <= end:
            raise ValueError(f"no box can be at byte {begin - 8}")
        yield head[4:8], begin, start


def spoilt(path: Path) -> bool:
    """Whether boxes without which frames are lost are missing, or a file of fragments does not end where one does."""
    tracks: set[int] = set()
    try:
        with open(path, "rb") as file:
            for name, start, end in boxes(file, 0, path.stat().st_size):
                if tracks and name not in MAY[None] | ANYWHERE:
                    return True
                try:
                    follow(file, name, start, end, tracks)
                except (ValueError, RecursionError):  # the latter of boxes in boxes in boxes
                    return True
    except ValueError:  # where a box on top does not fit; a movie without fragments has tables
        return bool(tracks)
    return False


def follow(file: BinaryIO, name: bytes, start: int, end: int, tracks: set[int]) -> None:
    """Enter a box of MUST; `tracks` collects those that have fragments. ValueError where it is not as it must be."""
    if name not in MUST:
        return
    found = set()
    for child, first, last in boxes(file, start, end):
        found.add(child)
        if name in MAY and child not in MAY[name] | MUST[name] | ANYWHERE:
            raise ValueError(f"{child} in {name}")
        follow(file, child, first, last, tracks)
        file.seek(first)
        if child == b"trex":
            tracks.add(int.from_bytes(file.read(8)[4:], "big"))
        elif child == b"tfhd" and int.from_bytes(file.read(8)[4:], "big") not in tracks:
            raise ValueError("a fragment of no track")
        elif child == b"trun":
            check_run(file.read(8), last - first)
    if missing := MUST[name] - found:
        raise ValueError(f"{name} without {missing}")


def samples_told(path: Path) -> int:
    """The most samples that the table of sizes of any track tells of (stsz, 8.7.3.2), 0 without such a table."""
    def most(file: BinaryIO, start: int, end: int) -> int:
        found = 0
        for name, first, last in boxes(file, start, end):
            if name in (b"moov", b"trak", b"mdia", b"minf", b"stbl"):
                found = max(found, most(file, first, last))
            elif name == b"stsz":
                file.seek(first + 8)  # after version, flags, and the size that all samples have
                found = max(found, int.from_bytes(file.read(4), "big"))
        return found
    try:
        with open(path, "rb") as file:
            return most(file, 0, path.stat().st_size)
    except (ValueError, RecursionError):  # boxes that do not fit
        return 0


def check_run(head: bytes, size: int) -> None:
    """ValueError if a run of samples (trun, 8.8.8) has another size than its number of samples takes."""
    flags, samples = int.from_bytes(head[1:4], "big"), int.from_bytes(head[4:], "big")
    each = 4 * (flags & 0xF00).bit_count()
    if size != 8 + 4 * (flags & 0x005).bit_count() + samples * each:
        raise ValueError(f"a run of {samples} samples in {size} bytes")


if __name__ == "__main__":
    import tempfile

    import av

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clip.mp4")
        with av.open(str(path), "w", options={"movflags": "frag_every_frame+empty_moov"}) as file:
            stream = file.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
            for _ in range(12):
                file.mux(stream.encode(av.VideoFrame(96, 64, "yuv420p")))
            file.mux(stream.encode())
        print("as it was written, spoilt:", spoilt(path))
        data = path.read_bytes()
        at = data.rindex(b"moof", 0, data.rindex(b"moof"))
        path.write_bytes(data[:at] + b"moog" + data[at + 4 :])
        with av.open(str(path)) as file:
            print(f"one bit of a name flipped: libav finds {len(list(file.decode(video=0)))} of 12 frames")
        print("spoilt:", spoilt(path))
