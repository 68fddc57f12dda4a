"""The frames of a video file or of a folder of images: each with its time, and none lost without being missed.

Decoders conceal damage, and what they cannot conceal they may drop without a word. Here a frame that does not decode is
a None in its place, so that video.py can refuse the file or repair it, and say which frame it is.

    python -m mirage_min.data.decode          # a clip with a hole in it
"""

import heapq
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
from av.stream import Disposition

IMAGES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class File:
    """The first video stream of anything that libav reads.

    rate: frames a second, on average; time_base: seconds in a tick; aspect: width / height of a pixel;
    count: how many frames there are, as far as the file tells, or None. ValueError if it holds no video.
    """

    def __init__(self, path: Path):
        self.path, self.container = path, open_file(path)
        streams = [s for s in self.container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams or streams[0].codec_context is None:
            raise ValueError(f"{path}: holds no video" + " of a known codec" * bool(streams))
        self.stream = streams[0]
        self.rate = self.stream.average_rate or self.stream.guessed_rate or Fraction(25)
        self.time_base = self.stream.time_base
        self.aspect = self.stream.sample_aspect_ratio or Fraction(1)
        seconds = Fraction(self.container.duration or 0, av.time_base)
        self.count = self.stream.frames or round(seconds * self.rate) or None

    def frames(self) -> Iterator[tuple[av.VideoFrame | None, int | None]]:
        """(frame, or None where one does not decode; its time in ticks, or None if the file does not say)."""
        name = self.container.format.name
        # In these each packet promises a frame at its time: one that never comes was broken, even if the decoder does
        # not say so (HEVC's does not). In others (where fields may come apart, say) only what the decoder says counts.
        promising = name.startswith(("mov,", "matroska"))
        # AVI counts the frames, left-out ones too, in the order of decoding: which need not be that of showing.
        timed = name != "avi" or not self.stream.codec_context.codec.reorder
        origin = round(clock_start(self.container) / self.time_base)

        def shown_at(pts: int | None) -> int | None:
            return pts - origin if timed and pts is not None else None

        due: list[tuple[int, bool]] = []  # a heap: times of frames still to come, and whether their packet failed
        count, begun = 0, False
        for packet in packets(self.container, [self.stream]):
            count += packet.dts is not None
            decoded, failed = decode_packet(packet)
            if packet.pts is not None and (failed or (promising and not hidden(packet))):
                heapq.heappush(due, (packet.pts, failed))
            for frame in decoded:
                while due and frame.pts is not None and due[0][0] <= frame.pts:
                    pts, failed = heapq.heappop(due)
                    # A stream may start with packets whose references were cut away: only later are they a loss.
                    if pts < frame.pts and (begun or failed):
                        yield None, shown_at(pts)
                begun = True
                yield (None if frame.is_corrupt else frame), shown_at(frame.pts)
        # A file that was cut off has fewer packets than its table (mov, mp4) lists, or bytes than it says (Matroska).
        lost = max(0, len(self.stream.index_entries) - count) if name.startswith("mov,") else ends_early(self.path)
        yield from ((None, None if lost else shown_at(pts)) for pts, _ in sorted(due))
        yield from ((None, None) for _ in range(lost))

    def name(self, number: int) -> str:
        return f"frame {number} (counted from 0)"

    def close(self) -> None:
        self.container.close()


class Folder:
    """The images of a folder in natural order (9.png before 10.png), each opened as a video of one frame."""

    aspect = Fraction(1)

    def __init__(self, path: Path, fps: Fraction):
        images = (file for file in path.iterdir() if file.suffix.lower() in IMAGES and not file.name.startswith("."))
        self.files = sorted(images, key=lambda file: natural_order(file.name))
        self.count = len(self.files)
        self.rate, self.time_base = fps, 1 / fps

    def frames(self) -> Iterator[tuple[av.VideoFrame | None, int]]:
        for number, file in enumerate(self.files):
            try:
                with open_file(file) as container:
                    # or half a JPEG would be a whole frame, the rest of it grey
                    container.streams.video[0].codec_context.options = {"err_detect": "explode"}
                    frame = next(container.decode(video=0), None)
            except (ValueError, IndexError, av.FFmpegError):  # cannot be opened, holds no image, does not decode
                frame = None
            if frame is not None:
                frame.duration = 1
            yield frame, number

    def name(self, number: int) -> str:
        return f"frame {number} ({self.files[number].name})"

    def close(self) -> None:
        pass


def natural_order(name: str) -> list:
    """A key to sort names by: numbers in them go by value (9.png before 10.png), capitals do not count."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]


def open_file(path: Path) -> av.container.InputContainer:
    """ValueError of one line if it cannot be opened."""
    try:
        return av.open(f"file:{path}")  # without the prefix, what is before a colon in a name would be a protocol
    except av.FFmpegError as error:
        raise ValueError(f"{path}: cannot be read as video: {error.strerror}") from error


def ends_early(path: Path) -> bool:
    """Whether a Matroska file (or WebM) is shorter than its second element, the Segment, says; other files are not."""
    with open(path, "rb") as file:
        head, at = file.read(4096), 0
        while head[:4] == b"\x1a\x45\xdf\xa3" and at + 12 < len(head):  # EBML: id, length, content
            length = at + 9 - head[at].bit_length()  # leading zeros of the first byte tell how many bytes follow
            content = length + 9 - head[length].bit_length()
            bits = 7 * (content - length)
            size = int.from_bytes(head[length:content], "big") & ((1 << bits) - 1)
            if head[at:length] == b"\x18\x53\x80\x67":
                return size != (1 << bits) - 1 and content + size > path.stat().st_size  # all ones: not known
            at = content + size
    return False


def clock_start(container: av.container.InputContainer) -> Fraction:
    """Seconds that a file's clock shows at its start: 0, save in broadcast streams, whose clock runs by itself."""
    broadcast = container.format.flags & av.format.Flags.ts_discont.value
    return Fraction(container.start_time or 0, av.time_base) if broadcast else Fraction(0)


def packets(container: av.container.InputContainer, streams: list) -> Iterator[av.Packet]:
    """The packets of some streams, and at the end an empty one each, which makes decoders hand out what they hold."""
    try:
        yield from container.demux(streams) if streams else ()
    except av.FFmpegError:  # the file was cut off
        for stream in streams:
            end = av.Packet()
            end.stream = stream
            yield end


def decode_packet(packet: av.Packet) -> tuple[list, bool]:
    """The frames that a packet completes, and whether it failed."""
    try:
        return packet.decode(), False
    except av.FFmpegError:
        return [], True


def hidden(packet: av.Packet) -> bool:
    """Whether the frame of a packet is not for showing: cut away by an edit list, or only a reference (VP8)."""
    return packet.is_discard or (packet.stream.name == "vp8" and packet.size > 0 and not bytes(packet)[0] & 0x10)


if __name__ == "__main__":
    import tempfile

    import torch

    from .video import write_clip

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clip.mp4")
        write_clip(path, torch.rand(3, 9, 64, 96) * 2 - 1, fps=10)
        with open_file(path) as container:
            places = [(packet.pts, packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
        pts, pos, size = places[4]
        data = bytearray(path.read_bytes())
        data[pos : pos + size] = bytes(size)
        path.write_bytes(data)
        print(f"the packet of frame {pts} of {len(places)} overwritten with zeros:")
        print([(pts, "does not decode" if frame is None else frame.format.name) for frame, pts in File(path).frames()])
