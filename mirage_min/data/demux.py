"""The packets of a video file, of the picture or of the sound, on a clock that starts near 0.

    python -m mirage_min.data.demux           # a recording that begins at ten hours
"""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av

# Formats that are not videos themselves but name other files, hosts or devices; text drawn as pictures; and animations,
# which pictures.py reads.
REFUSED = {"concat", "dash", "ffmetadata", "hls", "imf", "rtp", "rtsp", "sap", "sdp", "vobsub", "webm_dash_manifest",
           "tty", "gif", "gif_pipe", "apng"}
READ = {name for name in av.formats_available if av.ContainerFormat(name).is_input} - REFUSED


class Clock:
    """Lets the times of a stream begin near 0, and continue where a broadcast's clock jumps."""

    def __init__(self, container: av.container.InputContainer, stream: av.stream.Stream):
        self.broadcast = bool(container.format.flags & av.format.Flags.ts_discont.value)
        start = Fraction(container.start_time or 0, av.time_base)
        # A start of a second or more is a recorder's clock; less is a picture, or a sound, that begins late.
        self.off = round(start / stream.time_base) if self.broadcast or abs(start) >= 1 else 0
        self.of_decoding = container.format.name == "avi"  # which has times of decoding, shifted by libav
        self.back, self.ahead = (round(seconds / stream.time_base) for seconds in (Fraction(1, 2), 10))
        self.next, self.step = None, 0

    def set(self, packet: av.Packet) -> None:
        """Shift the times of the stream's next packet, in place, onto this clock."""
        time = packet.pts if packet.dts is None else packet.dts
        if time is None:
            return
        if self.of_decoding and self.next is None:
            self.off += 0 if packet.pts is None else packet.pts - time
        if self.broadcast and self.next is not None:
            jump = time - self.off - self.next
            self.off += jump if not -self.back <= jump <= self.ahead else 0
        self.step = packet.duration or self.step
        self.next = time - self.off + self.step
        packet.pts = None if packet.pts is None else packet.pts - self.off
        packet.dts = None if packet.dts is None else packet.dts - self.off


def open_file(path: Path, **more: str) -> av.container.InputContainer:
    """A container, and nothing that it points to, with more options of libav's; ValueError of one line if not."""
    if not path.is_file():
        raise ValueError(f"{path}: is no file" if path.exists() else f"{path}: No such file")
    options = {"format_whitelist": ",".join(READ), "pattern_type": "none"} | more
    try:  # without the prefix "file:", the part of a name before a colon would be taken for a protocol
        return av.open(f"file:{path}", metadata_errors="replace", options=options)
    except av.FFmpegError as error:
        raise ValueError(f"{path}: cannot be read as video: {error.strerror}") from error


def measured_rate(path: Path, index: int, packets: int = 25) -> Fraction | None:
    """Frames a second, by the times of a stream's first packets; None if they have none, or it would be above 120.

    ValueError if the file cannot be opened.
    """
    with open_file(path) as container:
        stream = container.streams[index]
        times = sorted(packet.pts for packet, _ in zip(container.demux(stream), range(packets))
                       if packet.pts is not None)
    if len(times) < 2 or times[0] == times[-1]:
        return None
    rate = (len(times) - 1) / ((times[-1] - times[0]) * stream.time_base)
    return rate.limit_denominator(1001) if rate <= 120 else None


def samples(path: Path, index: int) -> list[int]:
    """The sizes of the samples that the tables of a mov or mp4 have for a stream, those that an edit list hides too."""
    with open_file(path, ignore_editlist="1") as container:
        return [entry.size for entry in container.streams[index].index_entries]


def hidden_by_edits(path: Path, container: av.container.InputContainer, stream: av.VideoStream) -> int:
    """How many frames of a mov or mp4 its edit list hides."""
    shown = sum(not entry.is_discard for entry in stream.index_entries)
    if not container.format.name.startswith("mov,") or shown == len(stream.index_entries) >= stream.frames:
        return 0
    return sum(size > 0 for size in samples(path, stream.index)) - shown


def packets(container: av.container.InputContainer, streams: list) -> Iterator[av.Packet | None]:
    """The packets of some streams on a clock that starts near 0; None where the file is cut off.

    At the end comes an empty one for each stream, which makes decoders hand out what they hold.
    """
    clocks = {stream.index: Clock(container, stream) for stream in streams}
    try:
        for packet in container.demux(streams) if streams else ():
            clocks[packet.stream.index].set(packet)
            yield packet
    except av.FFmpegError:
        yield None
        for stream in streams:
            end = av.Packet()
            end.stream = stream
            yield end


def decode_packet(decoder: av.CodecContext, packet: av.Packet) -> tuple[list, bool]:
    """The frames that a packet completes, and whether decoding it failed (then there are none)."""
    try:
        return decoder.decode(packet), False
    except av.FFmpegError:
        return [], True


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clip.mkv")
        with av.open(str(path), "w") as file:
            stream = file.add_stream("libx264", rate=10)
            stream.width, stream.height = 96, 64
            for t in range(5):
                frame = av.VideoFrame(96, 64, "yuv420p")
                frame.pts, frame.time_base = 360_000 + t, Fraction(1, 10)
                file.mux(stream.encode(frame))
            file.mux(stream.encode())
        with open_file(path) as file:
            stored = [float(packet.pts * packet.time_base) for packet in file.demux(video=0) if packet.size]
        with open_file(path) as file:
            read = [float(p.pts * p.time_base) for p in packets(file, [file.streams.video[0]]) if p.size]
        print(f"times stored: {stored}\ntimes read:   {read}")
