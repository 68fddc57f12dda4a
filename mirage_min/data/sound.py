"""The sound of a video file, taken over into the mp4 that is made of its frames: copied, or encoded as AAC.

mp4 holds many codecs, and players of mp4 know a few: what they know is copied packet by packet, without loss; the rest
(Vorbis, PCM, ...) is decoded and encoded as AAC. Every track keeps its place in time. Damaged packets are passed over.

    python -m mirage_min.data.sound           # what becomes of some codecs
"""

import math
from collections.abc import Iterator
from pathlib import Path

import av

from .demux import decode_packet, open_file, packets

MP4_SOUND = {"aac", "ac3", "alac", "eac3", "flac", "mp3", "mp3float", "opus"}
AAC_RATES = av.Codec("aac", "w").audio_rates
AAC_LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "4.0", 5: "5.0", 6: "5.1", 8: "7.1"}


def copy_sound(path: Path, out: av.container.OutputContainer) -> Iterator[float]:
    """Mux the sound of a file into `out`, packet by packet; yields up to which second it is written."""
    with open_file(path) as container:
        streams = [s for s in container.streams.audio if s.codec_context is not None and s.rate]
        tracks = {s.index: Track(s, out) for s in streams}
        yield -math.inf
        for packet in packets(container, streams):
            if packet is not None:
                second = None if packet.dts is None else float(packet.dts * packet.stream.time_base)
                tracks[packet.stream.index].add(packet)
                if second is not None:  # the ends of all streams come together, and all of them must be written
                    yield second


class Track:
    """A track of the mp4."""

    def __init__(self, stream: av.AudioStream, out: av.container.OutputContainer):
        self.out, self.decoder, self.latest, self.kind = out, stream.codec_context, -math.inf, None
        self.copied = stream.name in MP4_SOUND and not (stream.name.startswith("mp3") and stream.rate < 16000)
        rate = stream.rate if stream.rate in AAC_RATES else 48000
        aac = {"codec_name": "aac", "rate": rate, "layout": AAC_LAYOUTS.get(stream.layout.nb_channels, "stereo")}
        self.track = out.add_stream_from_template(stream) if self.copied else out.add_stream(**aac)

    def add(self, packet: av.Packet) -> None:
        """Take over the next packet, or at the end, a packet without a time, what the coders still hold."""
        end = packet.dts is None
        if self.copied and not end:
            late = max(0, self.latest + 1 - packet.dts)  # in an mp4 times rise
            packet.pts += late
            packet.dts += late
            packet.stream = self.track
            self.latest = packet.dts
            self.out.mux(packet)
        if self.copied:
            return
        for frame in decode_packet(self.decoder, packet)[0] + [None] * end:
            kind = frame and (frame.format.name, frame.layout.name, frame.sample_rate)
            if kind != self.kind:  # broadcasts change from stereo to 5.1 and back: each has its own resampler
                self._encode(self.resampler.resample(None) if self.kind else [])
                self.kind, self.resampler = kind, av.AudioResampler("fltp", self.track.layout, self.track.rate)
            self._encode(self.resampler.resample(frame) if frame else [None])

    def _encode(self, frames: list[av.AudioFrame | None]) -> None:
        for frame in frames:
            self.out.mux(self.track.encode(frame))


if __name__ == "__main__":
    for codec in ("aac", "opus", "vorbis", "pcm_s16le", "wmav2"):
        print(f"{codec}: {'copied' if codec in MP4_SOUND else 'encoded as AAC'}")
