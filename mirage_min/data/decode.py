"""The frames of a video file, upright and in RGB: each with its time, and none lost in silence.

Decoders conceal damage, and what they cannot conceal they may drop without a word. Here a frame that does not decode is
a None in its place, so that video.py can refuse the file or repair it, and say which frame it is. A frame is lost where
the decoder says so, where the container's own table or chain says so (containers.py), and, with the few codecs whose
decoders pass over damage, where a packet's time comes and goes without a frame.

    python -m mirage_min.data.decode          # a clip with a hole in it
"""

import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition

from . import containers
from .colour import BT709, UNKNOWN, Turn, matrix_of, rgb, turn_of_angle, turn_of_matrix
from .demux import decode_packet, hidden_by_edits, measured_rate, open_file, packets
from .due import Due
from .matroska import Matroska

SILENT = {"hevc", "av1", "mpeg1video", "mpeg2video", "mpeg4"}  # codecs whose decoders lose a frame without saying so


class File:
    """The default video stream of anything that libav reads.

    rate: frames a second, on average; time_base: seconds in a tick; aspect: width / height of a pixel; matrix,
    primaries, transfer: as H.273 numbers them; count: how many frames there are, as far as the file tells, or None;
    notes: what is worth saying, one line each. ValueError if it holds no video.
    """

    def __init__(self, path: Path):
        self.path, self.container, self.notes = path, open_file(path), []
        videos = [s for s in self.container.streams.video if not s.disposition & Disposition.attached_pic]
        known = [s for s in videos if s.codec_context is not None]
        if not known:
            raise ValueError(f"{path}: holds no video" + " of a known codec" * bool(videos))
        best = self.container.streams.best("video")
        self.stream = stream = next((s for s in known if best is not None and s.index == best.index), known[0])
        if len(known) > 1:
            self.notes.append(f"{path}: holds {len(known)} videos; read is the one of {stream.width}x{stream.height} "
                              f"(stream {stream.index})")
        self.decoder, self.codec = stream.codec_context, stream.codec_context.codec.canonical_name
        if hidden := hidden_by_edits(path, self.container, stream):
            self.notes.append(f"{path}: its edit list hides {hidden} frames")
        if any(sound.codec_context is None for sound in self.container.streams.audio):
            self.notes.append(f"{path}: holds sound of an unknown codec, which is left out")
        alpha = any(name.lower() == "alpha_mode" and value == "1" for name, value in stream.metadata.items())
        if alpha and self.codec in ("vp8", "vp9"):  # libav's own decoders leave the alpha of a WebM out
            self.decoder = av.CodecContext.create({"vp8": "libvpx", "vp9": "libvpx-vp9"}[self.codec], "r")
        self.time_base = stream.time_base
        self.rate = stream.average_rate or measured_rate(path, stream.index) or Fraction(25)
        self.aspect = stream.sample_aspect_ratio or Fraction(1)
        self.matrix, self.primaries, self.transfer = BT709, UNKNOWN, UNKNOWN
        seconds = Fraction(self.container.duration or 0, av.time_base)
        self.count = stream.frames or round(seconds * self.rate) or None

    def frames(self) -> Iterator[tuple[np.ndarray | None, int | None, int | None]]:
        """(pixels uint8 [H, W, 3], its time and its duration in ticks) of each frame.

        Pixels are None where a frame is lost, times and durations where the file does not tell them.
        """
        turn = None
        for frame, time in self._decoded():
            if frame is None:
                yield None, time, None
                continue
            if turn is None:
                turn = self._turn(frame)
                self.aspect = 1 / self.aspect if turn.transposed else self.aspect
                self.matrix, self.primaries, self.transfer = matrix_of(frame), frame.color_primaries, frame.color_trc
            yield turn(rgb(frame)), time, frame.duration or None

    def _turn(self, frame: av.VideoFrame) -> Turn:
        """How the stream is to be shown, by its first frame."""
        if self.codec not in ("png", "apng"):  # whose ICC profiles PyAV 18 frees twice, once side data was looked at
            try:
                a, b, _, c, d = np.frombuffer(frame.side_data["DISPLAYMATRIX"], np.int32)[:5].tolist()
                return turn_of_matrix(a, b, c, d)
            except (KeyError, ValueError):  # there is none, or there is another kind that PyAV does not know
                pass
        return turn_of_angle(frame.rotation)

    def _decoded(self) -> Iterator[tuple[av.VideoFrame | None, int | None]]:
        """Each frame, None if it is lost, and its time in ticks, None if the file does not tell it."""
        timed = self.container.format.name.startswith(("mov,", "matroska"))
        chain = Matroska(self.path) if self.container.format.name.startswith("matroska") else None
        due, read, cut = Due(), 0, False
        for packet in packets(self.container, [self.stream]):
            if packet is None:
                cut = True
                continue
            if chain and chain.breaks_before(packet.pos or 0):
                yield None, None
            if packet.size == 0 and packet.pts is not None:
                continue  # a recorder could not keep up: the frame before stays
            read += packet.size > 0
            decoded, failed = decode_packet(self.decoder, packet)
            if packet.pts is not None and (decoded or failed or not self._repeats(packet)):
                due.add(packet.pts, failed, promised=timed and self.codec in SILENT and not packet.is_discard)
            for frame in decoded:
                lost, time = due.take(frame)
                yield from ((None, pts) for pts in lost)
                yield (None if frame.is_corrupt else frame), time
        if chain:
            cut |= chain.breaks_before(math.inf)
            lost = max(cut, chain.frames_of_video(self.container.streams.video.index(self.stream)) - read)
        else:
            lost = max(cut, containers.missing(self.path, self.container, self.stream, read, due.latest))
        yield from ((None, None if lost else pts) for pts in due.rest())
        yield from ((None, None) for _ in range(lost))

    def _repeats(self, packet: av.Packet) -> bool:
        """Whether a packet that gave no frame says that the one before stays: MPEG-4's vop_coded = 0."""
        return self.codec == "mpeg4" and packet.size - max(0, bytes(packet).rfind(b"\0\0\1\xb6")) < 16

    def name(self, number: int) -> str:
        """What an error calls frame number `number`."""
        return f"frame {number} (counted from 0)"

    def close(self) -> None:
        """Close the file; no frame can be read after that."""
        self.container.close()


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
        print([(pts, "lost" if frame is None else frame.shape) for frame, pts, _ in File(path).frames()])
